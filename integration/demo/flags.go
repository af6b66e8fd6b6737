package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// config is what the flags say, and what follows from them.
type config struct {
	file    string // "": generated
	size    int64  // bytes in all
	streams int
	from    path
	to      path
	after   time.Duration // first byte of the last stream to the dial of the second connection
	rate    int64         // sender's pace in bytes a second; 0: none
	without bool
	cut     bool // the connection is cut; see cut.go
	nat     bool // between real NATs; see nat_linux.go
	json    bool
	verbose bool
	svg     string // "": none
	timeout time.Duration
	hold    bool                        // for tests: no stream ends before all have moved
	http    string                      // "": nothing is served
	server  *server                     // of http
	before  func(context.Context) error // for tests: called before the second connection is dialled

	relay relayLimits // of -from relay and -cut
}

// relayLimits are what the relay allows a relayed connection, each way.
type relayLimits struct {
	rate int64 // bytes a second on the path to the relay; shaped
	data int64 // bytes; then it cuts the connection
	time time.Duration
}

const (
	// maxStreams is below the 256 streams that go-libp2p accepts at a time on one QUIC
	// connection, so that identify and Portage itself find room beside them.
	maxStreams = 200
	// minRelayed is the least size for which the limits of limitsFor leave room.
	minRelayed = 4 << 20
)

// limitsFor returns limits in proportion to the size of the file, so that the
// picture has the same shape whatever the size: a relay that would need half a
// minute for the file, and passes an eighth of it. Beyond the eighth there is
// room for what is under way in windows and buffers when the connection is left,
// 256 KiB, which matters for small files.
func limitsFor(size int64) relayLimits {
	return relayLimits{
		rate: size / 32,
		data: size/8 + 512<<10,
		time: 30 * time.Second,
	}
}

func parseFlags(args []string, stderr io.Writer) (config, error) {
	var cfg config
	fs := flag.NewFlagSet("demo", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&cfg.file, "file", "", "send this `file`; default: pseudo-random bytes")
	size := fs.String("size", "64MiB", "how much to send if there is no -file")
	fs.IntVar(&cfg.streams, "streams", 1, "send in this many streams at once; the size is divided among them")
	from := fs.String("from", "relay", "first connection: relay, quic, webtransport, tcp or ws")
	to := fs.String("to", "quic", "second connection: quic, webtransport, tcp or ws")
	fs.DurationVar(&cfg.after, "after", 1500*time.Millisecond, "dial the second connection this long after the first byte of every stream has arrived")
	rate := fs.String("rate", "", "pace of the sender per `second`, such as 16MiB; 0: as fast as it goes; default: a quarter of the size")
	fs.BoolVar(&cfg.without, "without", false, "plain go-libp2p, without Portage")
	fs.BoolVar(&cfg.nat, "nat", false, "between two hosts behind real NATs, where go-libp2p punches a hole: needs root on Linux; sends 512KiB by default")
	fs.BoolVar(&cfg.cut, "cut", false, "cut the connection under the transfer, again and again; -after says how long after it has gone on")
	fs.BoolVar(&cfg.json, "json", false, "write one JSON object instead of the summary")
	fs.StringVar(&cfg.svg, "svg", "migration.svg", "draw the throughput to this `file`; \"\": do not")
	fs.StringVar(&cfg.http, "http", "", "serve the status page of Portage, and metrics, at this `address`, such as 127.0.0.1:8080, until Ctrl-C")
	fs.BoolVar(&cfg.verbose, "v", false, "log in detail")
	fs.DurationVar(&cfg.timeout, "timeout", 0, "give up after this time; default: a minute, and a second for each 8 MiB")
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return config{}, err
		}
		return config{}, errors.New("the flags could not be read; -h lists them")
	}
	if fs.NArg() > 0 {
		return config{}, fmt.Errorf("%q is not a flag; to send a file use -file %s", fs.Arg(0), fs.Arg(0))
	}
	given := make(map[string]bool)
	fs.Visit(func(f *flag.Flag) { given[f.Name] = true })

	if cfg.nat {
		if err := cfg.natFlags(given, size); err != nil {
			return config{}, err
		}
	}
	if cfg.cut {
		for _, name := range []string{"nat", "from", "to"} {
			if given[name] {
				return config{}, fmt.Errorf("-cut goes from one path to the next by itself: leave out -%s", name)
			}
		}
		*from = string(tcp)
	}
	var err error
	if cfg.size, err = sizeToSend(cfg.file, *size, given["size"]); err != nil {
		return config{}, err
	}
	if cfg.from, err = parsePath(*from); err != nil {
		return config{}, fmt.Errorf("-from: %w", err)
	}
	if cfg.to, err = parsePath(*to); err != nil {
		return config{}, fmt.Errorf("-to: %w", err)
	}
	cfg.rate = cfg.size / 4
	if cfg.nat || cfg.cut {
		cfg.rate = cfg.size / 10
	}
	if *rate != "" {
		if cfg.rate, err = parseSize(strings.TrimSuffix(*rate, "/s")); err != nil {
			return config{}, fmt.Errorf("-rate: %w", err)
		}
	}
	cfg.relay = limitsFor(cfg.size)
	switch {
	case cfg.nat:
		cfg.relay = natLimits
	case cfg.cut:
		cfg.relay = cutLimits(cfg.size)
	}
	if cfg.timeout == 0 {
		cfg.timeout = time.Minute + time.Duration(cfg.size>>23)*time.Second
	}
	return cfg, cfg.check()
}

// natLimits are those that go-libp2p's relay has by default.
var natLimits = relayLimits{data: 128 << 10, time: 2 * time.Minute}

// natFlags sees to it that -nat stands beside flags that mean something with it.
func (cfg config) natFlags(given map[string]bool, size *string) error {
	for _, name := range []string{"file", "from", "streams", "after"} {
		if given[name] {
			return fmt.Errorf("-nat sends generated bytes in one stream, from the relay to what go-libp2p finds: leave out -%s", name)
		}
	}
	if !given["size"] {
		*size = "512KiB"
	}
	return nil
}

// sizeToSend returns the size of file, or what size says if there is none.
func sizeToSend(file, size string, sizeGiven bool) (int64, error) {
	if file == "" {
		n, err := parseSize(size)
		if err != nil {
			return 0, fmt.Errorf("-size: %w", err)
		}
		return n, nil
	}
	if sizeGiven {
		return 0, errors.New("-size is for generated bytes: use it without -file")
	}
	info, err := os.Stat(file)
	if err != nil {
		return 0, fmt.Errorf("-file: %w", err)
	}
	if !info.Mode().IsRegular() {
		return 0, fmt.Errorf("-file: %s is not a regular file", file)
	}
	return info.Size(), nil
}

func (cfg config) check() error {
	switch {
	case cfg.streams < 1 || cfg.streams > maxStreams:
		return fmt.Errorf("-streams: give a number from 1 to %d", maxStreams)
	case cfg.size < int64(cfg.streams):
		return errors.New("there is not a byte for each stream: send more, or use fewer -streams")
	case cfg.to == relay:
		return errors.New("-to relay: streams never move to a relayed connection; use quic, webtransport, tcp or ws")
	case cfg.from == cfg.to:
		return fmt.Errorf("-from and -to are both %s: choose two", cfg.to)
	case cfg.after <= 0:
		return errors.New("-after: give a time above 0, such as 1s")
	case cfg.http != "" && (cfg.without || cfg.nat):
		return errors.New("-http: there is no status page with -without, and none to be reached with -nat: leave it out")
	case cfg.timeout < 0:
		return errors.New("-timeout: give a time above 0, such as 2m")
	case cfg.nat && cfg.to != quic && cfg.to != tcp:
		return errors.New("-nat: holes are punched for quic and tcp only: choose one with -to")
	case cfg.nat && cfg.size <= natLimits.data:
		return fmt.Errorf("-nat: so little would pass through the relay as well: send more than %s", formatSize(natLimits.data))
	case cfg.nat:
		return nil // the relay's path is not shaped, and nothing is dialled by the demo
	case cfg.cut && cfg.size < minRelayed:
		return fmt.Errorf("-cut: so little would be through before it is cut: send at least %s", formatSize(minRelayed))
	case cfg.from == relay && cfg.size < minRelayed:
		return fmt.Errorf("so little would pass through the relay as well: send at least %s, or use -from tcp", formatSize(minRelayed))
	case cfg.from == relay && cfg.after > cfg.relay.dialBy():
		return fmt.Errorf("-after: the relay cuts the connection before that; give at most %v", cfg.relay.dialBy())
	}
	return nil
}

// dialBy is the latest useful moment for the second connection: at three quarters of the
// time that the relay's data limit leaves.
func (l relayLimits) dialBy() time.Duration {
	whole := time.Duration(float64(l.data) / float64(l.rate) * float64(time.Second))
	return (min(whole, l.time) * 3 / 4).Truncate(100 * time.Millisecond)
}
