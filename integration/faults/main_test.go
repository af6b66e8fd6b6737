// Package faults moves streams between real transports whose paths fail.
package faults

import (
	"flag"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-portage/portage/internal/hosttest"
)

var (
	all       = flag.Bool("all", false, "test every pair of transports, and at more moments; takes minutes")
	firstSeed = flag.Uint64("seed", 0, "where the seeds of random faults begin")
)

// frozenAtOnce has room for as many tests as have a processor each.
var frozenAtOnce = make(chan struct{}, runtime.GOMAXPROCS(0))

// inTime has t run beside others, but not so many that they take longer together than QUIC
// keeps a connection whose path is frozen, which are 30 s that cannot be set. Under the
// race detector it runs alone.
func inTime(t *testing.T) {
	if raceEnabled {
		return
	}
	t.Parallel()
	frozenAtOnce <- struct{}{}
	t.Cleanup(func() { <-frozenAtOnce })
}

// TestMain looks for goroutines that are left: none of anybody's outlives its host.
func TestMain(m *testing.M) {
	flag.Parse()
	if f := flag.Lookup("test.parallel"); f.Value.String() == f.DefValue {
		_ = f.Value.Set("8") // tests wait for their paths more than they compute
	}
	code := m.Run()
	if code == 0 {
		if err := hosttest.FindLeaks(); err != nil {
			fmt.Println("goroutines outlive the hosts:", err)
			code = 1
		}
	}
	fmt.Println("in all:", done.String())
	os.Exit(code)
}

// done counts what has been tested.
var done tally

type tally struct {
	faults, streams, moves, bytes atomic.Int64
	onWebRTC, rescued             atomic.Int64 // random streams on WebRTC, and those of them that were reset since they were stuck

	mu    sync.Mutex // guards all below
	pairs map[way]bool
	steps map[step]bool
}

func (d *tally) pair(w way) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.pairs == nil {
		d.pairs = make(map[way]bool)
	}
	d.pairs[w] = true
}

func (d *tally) step(s step) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.steps == nil {
		d.steps = make(map[step]bool)
	}
	d.steps[s] = true
}

func (d *tally) String() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return fmt.Sprintf("%d pairs of transports, %d steps, %d faults, %d streams, %d migrations, %d bytes checked, %d streams stuck on WebRTC",
		len(d.pairs), len(d.steps), d.faults.Load(), d.streams.Load(), d.moves.Load(), d.bytes.Load(), d.rescued.Load())
}

// summary logs what a test has done, when it is over.
func summary(t *testing.T) func() {
	start := time.Now()
	faults, streams, moves, bytes := done.faults.Load(), done.streams.Load(), done.moves.Load(), done.bytes.Load()
	return func() {
		t.Logf("%d faults, %d streams, %d migrations, %d bytes checked, in %v",
			done.faults.Load()-faults, done.streams.Load()-streams, done.moves.Load()-moves,
			done.bytes.Load()-bytes, time.Since(start).Round(time.Second/10))
	}
}
