package main

import (
	"fmt"

	"github.com/libp2p/go-libp2p/core/network"

	"github.com/go-portage/portage/internal/hosttest"
)

// traffic measures streams that are open: two plain ones and one of Portage, on the same
// connection.
func (s settings) traffic() {
	var rows []comparison
	for _, tr := range transports {
		for _, size := range []int{256, 4 << 10, 64 << 10, 1 << 20} {
			rows = append(rows, onOneConn(fmt.Sprintf("%s, Writes of %s", names[tr], bytesOf(size)), tr,
				func(near, far network.Stream) arm {
					return measured(func(n int) { send(near, far, size, n) })
				}))
		}
		rows = append(rows, onOneConn(names[tr]+", one byte there and back", tr,
			func(near, far network.Stream) arm {
				return measured(func(n int) { pingPong(near, far, n) })
			}))
	}
	s.table("What a Write costs, and a ping-pong:", rows)
}

func onOneConn(name string, tr hosttest.Transport, use func(near, far network.Stream) arm) comparison {
	return comparison{name, func(t *tb) (raw, again, ours arm) {
		p := portage(t, tr)
		onRaw := func() network.Stream { return p.rawOn(0) }
		return use(p.both(onRaw)), use(p.both(onRaw)), use(p.both(p.open))
	}}
}

func bytesOf(n int) string {
	switch {
	case n >= 1<<20:
		return fmt.Sprintf("%d MiB", n>>20)
	case n >= 1<<10:
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d B", n)
}

// send makes n Writes of size bytes each, and returns when all were read.
func send(from, to network.Stream, size, n int) {
	read := make(chan error, 1)
	go func() {
		buf := make([]byte, 64<<10)
		for left := size * n; left > 0; {
			m, err := to.Read(buf[:min(len(buf), left)])
			left -= m
			if err != nil {
				read <- err
				return
			}
		}
		read <- nil
	}()
	buf := make([]byte, size)
	for range n {
		_, err := from.Write(buf)
		must(err)
	}
	must(<-read)
}

func pingPong(near, far network.Stream, n int) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1)
		for range n {
			_, err := far.Read(buf)
			must(err)
			_, err = far.Write(buf)
			must(err)
		}
	}()
	buf := make([]byte, 1)
	for range n {
		_, err := near.Write(buf)
		must(err)
		_, err = near.Read(buf)
		must(err)
	}
	<-done
}
