package main

import (
	"fmt"
	"io"
	"sync"

	"github.com/libp2p/go-libp2p/core/network"

	"github.com/go-portage/portage/internal/hosttest"
)

// opening measures streams that live for a moment, on hosts with one connection.
func (s settings) opening() {
	var rows []comparison
	for _, tr := range transports {
		rows = append(rows, onHosts(names[tr]+", open, one byte there and back, close", tr, (*pair).echoes))
		for _, k := range []int{1, 16, 256} {
			name := names[tr] + ", a request of 200 B, a reply of 1 KiB"
			if k > 1 {
				name += fmt.Sprintf(", %d in parallel", k)
			}
			rows = append(rows, onHosts(name, tr, func(p *pair) arm { return p.requests(k) }))
		}
	}
	s.table("What it costs to open a stream, with all that the stream is for:", rows)
}

func onHosts(name string, tr hosttest.Transport, use func(*pair) arm) comparison {
	return comparison{name, func(t *tb) (raw, again, ours arm) {
		return use(plain(t, tr)), use(plain(t, tr)), use(portage(t, tr))
	}}
}

func (p *pair) echoes() arm {
	var served sync.WaitGroup
	p.handle(func(s network.Stream) {
		defer served.Done()
		buf := make([]byte, 1)
		_, err := s.Read(buf)
		must(err)
		_, err = s.Write(buf)
		must(err)
		if _, err = s.Read(buf); err != io.EOF {
			must(fmt.Errorf("want EOF, got %v", err))
		}
		_ = s.Close() // on QUIC an error where the other end is faster
	})
	return measured(func(n int) {
		buf := make([]byte, 1)
		for range n {
			served.Add(1)
			s := p.open()
			_, err := s.Write(buf)
			must(err)
			_, err = s.Read(buf)
			must(err)
			_ = s.Close()
		}
		served.Wait()
	})
}

// requests makes each request on a stream of its own, k at a time.
func (p *pair) requests(k int) arm {
	const size, replySize = 200, 1 << 10
	var served sync.WaitGroup
	p.handle(func(s network.Stream) {
		defer served.Done()
		var request, reply = make([]byte, size), make([]byte, replySize)
		_, err := io.ReadFull(s, request)
		must(err)
		_, err = s.Write(reply)
		must(err)
		_ = s.Close() // on QUIC an error where the other end is faster
	})
	return measured(func(n int) {
		var clients sync.WaitGroup
		for worker := range k {
			clients.Go(func() {
				request, reply := make([]byte, size), make([]byte, replySize)
				for i := worker; i < n; i += k {
					served.Add(1)
					s := p.open()
					_, err := s.Write(request)
					must(err)
					_ = s.CloseWrite() // on QUIC an error where the other end is faster
					_, err = io.ReadFull(s, reply)
					must(err)
					_ = s.Close()
				}
			})
		}
		clients.Wait()
		served.Wait()
	})
}
