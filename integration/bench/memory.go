package main

import (
	"context"
	"fmt"
	"runtime"
	"time"

	"github.com/libp2p/go-libp2p/core/network"

	"github.com/go-portage/portage/internal/hosttest"
)

// memory measures the heap that an idle stream holds, at each end, and its goroutines.
func (s settings) memory() {
	type row struct {
		name    string
		runs    bool // the handler does not return
		portage bool
		moved   bool
	}
	rows := []row{
		{name: "plain"},
		{name: "plain once more"},
		{name: "Portage", portage: true},
		{name: "Portage, moved from QUIC to TCP", portage: true, moved: true},
		{name: "plain, its handler runs", runs: true},
		{name: "plain once more, its handler runs", runs: true},
		{name: "Portage, its handler runs", runs: true, portage: true},
		{name: "Portage, moved, its handler runs", runs: true, portage: true, moved: true},
	}
	plainBytes := make(map[bool]float64)
	first := true
	for _, r := range rows {
		if !s.only.MatchString("memory: " + r.name) {
			continue
		}
		if first {
			first = false
			fmt.Printf("\nWhat an idle stream on TCP holds at each end, the mean of %d:\n\n"+
				"| | bytes | over plain | goroutines |\n| --- | --- | --- | --- |\n", s.streams)
		}
		bytes, goroutines := idle(s.streams, r.portage, r.moved, r.runs)
		over := "–"
		if base, ok := plainBytes[r.runs]; ok {
			over = fmt.Sprintf("%+.0f", bytes-base)
		} else if !r.portage {
			plainBytes[r.runs] = bytes
		}
		fmt.Printf("| %s | %.0f | %s | %.1f |\n", r.name, bytes, over, goroutines)
	}
}

func idle(streams int, ours, moved, runs bool) (bytes, goroutines float64) {
	t := new(tb)
	defer t.end()
	// All have both connections, so that all hosts are alike but for the streams.
	p := plain
	if ours {
		p = portage
	}
	hosts := p(t, hosttest.QUIC, hosttest.TCP)
	release := make(chan struct{})
	defer close(release)
	accepted := make(chan network.Stream, 1)
	hosts.handle(func(s network.Stream) {
		accepted <- s
		if runs {
			<-release
		}
	})
	const onQUIC, onTCP = 0, 1
	var all []network.Stream
	open := func(n int) {
		for len(all) < n {
			var near network.Stream
			switch {
			case moved:
				near = hosts.openOn(onQUIC)
			case ours:
				near = hosts.openOn(onTCP)
			default:
				near = hosts.rawOn(onTCP)
			}
			write(near, 1)
			far := <-accepted
			read(far, 1)
			write(far, 1)
			read(near, 1)
			if moved {
				must(hosts.migrating(0).Migrate(context.Background(), near, hosts.conns[0][onTCP]))
			}
			all = append(all, near, far)
		}
		if moved {
			hosts.await("the other end to finish", func() bool {
				return len(hosts.migrating(1).Streams(hosts.conns[1][onQUIC])) == 0
			})
		}
	}
	open(2)
	all = append(make([]network.Stream, 0, 2*(streams+1)), all...)
	before, goBefore := heap(), runtime.NumGoroutine()
	open(2 * (streams + 1))
	time.Sleep(3 * time.Second) // a handler that runs for a second is counted anew; goroutines end
	ends := float64(2 * streams)
	bytes, goroutines = float64(heap()-before)/ends, float64(runtime.NumGoroutine()-goBefore)/ends
	for _, s := range all {
		_ = s.Reset()
	}
	return bytes, goroutines
}

// heap is what is in use when all garbage has been collected.
func heap() int64 {
	for range 3 {
		runtime.GC() // finalizers and pools need more than one
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
