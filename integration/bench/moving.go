package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"sync"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/multiformats/go-multistream"

	"github.com/go-portage/portage/internal/hosttest"
	"github.com/go-portage/portage/migrate"
)

// atOnce is how many streams are open that move one after the other. QUIC allows 256.
const atOnce = 200

// moving measures migrations beside what no way from one connection to another can do without:
// a plain stream is opened on the one and another is closed on the other, with nothing on them.
func (s settings) moving() {
	var rows []comparison
	for i, from := range transports {
		dest := transports[1-i]
		beside := func(name string, move func(t *tb) arm) {
			rows = append(rows, comparison{fmt.Sprintf("%s, %s", to(from, dest), name), func(t *tb) (raw, again, ours arm) {
				return plain(t, from, dest).replacements(), plain(t, from, dest).replacements(), move(t)
			}})
		}
		beside("nobody reads", func(t *tb) arm { return portage(t, from, dest).migrations(false) })
		beside("both ends read", func(t *tb) arm { return portage(t, from, dest).migrations(true) })
		beside("opened again by the application", func(t *tb) arm { return plain(t, from, dest).reopenings() })
	}
	rows = append(rows,
		comparison{"TCP to WebSocket, 1,000 at once (beside 1,000 opened and closed at once)", func(t *tb) (raw, again, ours arm) {
			const n = 1000
			return plain(t, hosttest.WebSocket).opensAndClosesAtOnce(n), plain(t, hosttest.WebSocket).opensAndClosesAtOnce(n),
				portage(t, hosttest.TCP, hosttest.WebSocket).migrationsAtOnce(n)
		}},
		comparison{"QUIC to QUIC, quic-go moves the whole connection", func(t *tb) (raw, again, ours arm) {
			return plain(t, hosttest.QUIC).opensAndCloses(), plain(t, hosttest.QUIC).opensAndCloses(), pathMigrations(t)
		}})
	s.table("What a migration costs, where opening a plain stream on the new connection and closing one on the old is 1:", rows)
}

// replacements opens a stream on connection 1, as a plain host does whose peer is known to speak the
// protocol, and closes one on connection 0 at both ends.
func (p *pair) replacements() arm {
	return p.replace(func(opened <-chan network.Stream) (near, far network.Stream) {
		s, err := p.conns[0][1].NewStream(context.Background())
		must(err)
		must(s.SetProtocol(benchID))
		must(multistream.NewMSSelect(s, benchID).(interface{ Flush() error }).Flush())
		return s, <-opened
	})
}

// replace opens streams on connection 0, and returns what it costs to open each again, and
// to close it.
func (p *pair) replace(open func(opened <-chan network.Stream) (near, far network.Stream)) arm {
	return func(n int) (total cost) {
		for done := 0; done < n; done += atOnce {
			var near, far []network.Stream
			for range min(atOnce, n-done) {
				a, b := p.both(func() network.Stream { return p.rawOn(0) })
				near, far = append(near, a), append(far, b)
			}
			opened := make(chan network.Stream, 1)
			p.handle(func(s network.Stream) { opened <- s })
			before := spent()
			for i := range near {
				a, b := open(opened)
				_ = near[i].Close() // on QUIC an error where the other end is faster
				_ = far[i].Close()
				near[i], far[i] = a, b
			}
			total = total.plus(spent().minus(before))
			for i := range near {
				_ = near[i].Reset()
				_ = far[i].Reset()
			}
		}
		return total
	}
}

func (p *pair) opensAndCloses() arm {
	closed := p.closing()
	return measured(func(n int) {
		for range n {
			closed.Add(1)
			_ = p.open().Close() // on QUIC an error where the other end is faster
			closed.Wait()
		}
	})
}

func (p *pair) closing() *sync.WaitGroup {
	closed := new(sync.WaitGroup)
	p.handle(func(s network.Stream) {
		_ = s.Close()
		closed.Done()
	})
	return closed
}

func (p *pair) opensAndClosesAtOnce(n int) arm {
	closed := p.closing()
	return measured(func(times int) {
		for range times {
			closed.Add(n)
			for range n {
				go func() { _ = p.open().Close() }()
			}
			closed.Wait()
		}
	})
}

// migrations moves streams from connection 0 to connection 1. With reads, an application is
// inside Read at both ends.
func (p *pair) migrations(reads bool) arm {
	return func(n int) (total cost) {
		for done := 0; done < n; done += atOnce {
			total = total.plus(p.migrate(min(atOnce, n-done), reads, func(near []network.Stream) {
				for _, s := range near {
					p.move(s)
				}
			}))
		}
		return total
	}
}

func (p *pair) migrationsAtOnce(n int) arm {
	return func(times int) (total cost) {
		for range times {
			total = total.plus(p.migrate(n, false, func(near []network.Stream) {
				var moves sync.WaitGroup
				for _, s := range near {
					moves.Go(func() { p.move(s) })
				}
				moves.Wait()
			}))
		}
		return total
	}
}

// move migrates a stream, again where it is told to: yamux lets 256 streams begin at a time,
// and on a busy machine the others may wait for longer than an attempt does. What that costs
// is part of it.
func (p *pair) move(s network.Stream) {
	for {
		err := p.migrating(0).Migrate(context.Background(), s, p.conns[0][1])
		if err == nil {
			return
		}
		if !errors.Is(err, migrate.ErrTryLater) {
			log.Panic(err)
		}
	}
}

// migrate opens n streams on connection 0, and returns what it costs until move has moved
// them at both ends.
func (p *pair) migrate(n int, reads bool, move func(near []network.Stream)) cost {
	var near, far []network.Stream
	for range n {
		a, b := p.both(func() network.Stream { return p.openOn(0) })
		near, far = append(near, a), append(far, b)
	}
	var reading sync.WaitGroup
	if reads {
		for _, s := range append(far, near...) {
			reading.Go(func() { _, _ = s.Read(make([]byte, 1)) })
		}
	}
	before := spent()
	move(near)
	p.await("the other end to finish", func() bool { return len(p.migrating(1).Streams(p.conns[1][0])) == 0 })
	took := spent().minus(before)
	for i := range near {
		_ = near[i].Reset()
		_ = far[i].Reset()
	}
	reading.Wait()
	p.await("the streams to end", func() bool {
		return len(p.migrating(0).Streams(p.conns[0][1])) == 0 && len(p.migrating(1).Streams(p.conns[1][1])) == 0
	})
	return took
}

func (p *pair) await(what string, done func() bool) { hosttest.WaitFor(new(tb), what, done) }

// reopenings is what an application does that helps itself: a new stream, on which both ends
// tell which one it goes on with and how many bytes they have, and the old one is closed.
func (p *pair) reopenings() arm {
	const hello = 16 // which stream, and how many bytes were read
	return p.replace(func(opened <-chan network.Stream) (near, far network.Stream) {
		near = p.rawOn(1)
		write(near, hello)
		far = <-opened
		read(far, hello)
		write(far, hello)
		read(near, hello)
		return near, far
	})
}
