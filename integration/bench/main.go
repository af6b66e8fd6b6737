// Command bench measures what a stream costs that can move, and what moving it costs, beside
// plain go-libp2p in the same process:
//
//	go run ./integration/bench          # a quarter of an hour
//	go run ./integration/bench -quick   # some two minutes
//
// It prints the tables of docs/performance.md.
//
// What is compared takes turns, in an order that changes at random: plain go-libp2p, plain
// go-libp2p once more, Portage. A turn lasts 200 ms or longer. Each round gives two ratios:
// Portage to the mean of the two plain turns, and the second plain turn to the first (A/A).
// Reported are the medians, and the intervals that hold the true median with 95 %. How far
// A/A is from 1.00 is what the machine adds: a difference that is no larger says nothing.
package main

import (
	"flag"
	"fmt"
	"log"
	"os"
	"regexp"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"strings"
	"time"
)

type settings struct {
	rounds  int
	streams int // of which the memory is measured
	only    *regexp.Regexp
}

func main() {
	log.SetFlags(0)
	quick := flag.Bool("quick", false, "few rounds: shows large differences only")
	rounds := flag.Int("rounds", 25, "`rounds` of each comparison, six at least")
	streams := flag.Int("streams", 20_000, "`streams` whose memory is measured")
	only := flag.String("only", "", "measure rows whose name matches the `expression`")
	flag.BoolVar(&resumption, "resumption", false, "measure streams that may outlive their connection")
	profile := flag.String("profile", "", "write a CPU profile to `file`")
	flag.Parse()
	if *quick {
		*rounds, *streams = 6, 5_000
	}
	if flag.NArg() > 0 || *rounds < 6 || *streams < 1 {
		flag.Usage()
		os.Exit(2)
	}
	match, err := regexp.Compile(*only)
	if err != nil {
		log.Fatalf("-only: %v", err)
	}
	if *profile != "" {
		f, err := os.Create(*profile)
		must(err)
		must(pprof.StartCPUProfile(f))
		defer func() {
			pprof.StopCPUProfile()
			must(f.Close())
		}()
	}
	s := settings{*rounds, *streams, match}
	fmt.Printf("%s, %s/%s, %d processors, %s, go-libp2p %s, %d rounds.\n", time.Now().Format(time.DateOnly),
		runtime.GOOS, runtime.GOARCH, runtime.GOMAXPROCS(0), runtime.Version(), version("github.com/libp2p/go-libp2p"), s.rounds)
	s.traffic()
	s.opening()
	s.moving()
	s.memory()
}

func version(module string) string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, m := range info.Deps {
			if m.Path == module {
				return m.Version
			}
		}
	}
	return "of unknown version"
}

// comparison is a row of a table. prepare returns the three arms, and what frees them.
type comparison struct {
	name    string
	prepare func(t *tb) (raw, again, portage arm)
}

// table measures and prints comparisons.
func (s settings) table(title string, rows []comparison) {
	first := true
	for _, row := range rows {
		if !s.only.MatchString(row.name) {
			continue
		}
		if first {
			first = false
			fmt.Printf("\n%s\n\n| | CPU | A/A | time | A/A | plain, CPU | plain, time |\n| --- | --- | --- | --- | --- | --- | --- |\n", title)
		}
		t := new(tb)
		raw, again, ours := row.prepare(t)
		r := compare(s.rounds, raw, again, ours)
		t.end()
		fmt.Printf("| %s | %s | %s | %s | %s | %s | %s |\n", row.name,
			r.cpu, r.cpuAgain, r.wall, r.wallAgain, short(r.raw.cpu), short(r.raw.wall))
	}
}

// short rounds to three digits.
func short(d float64) string {
	unit := "ns"
	for _, u := range []string{"µs", "ms", "s"} {
		if d < 1000 {
			break
		}
		d, unit = d/1000, u
	}
	n := fmt.Sprintf("%.3g", d)
	if strings.Contains(n, "e") {
		n = fmt.Sprintf("%.0f", d)
	}
	return n + " " + unit
}

func must(err error) {
	if err != nil {
		log.Panic(err)
	}
}
