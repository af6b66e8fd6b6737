package field

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/p2p/protocol/ping"

	. "github.com/go-portage/portage/internal/simtest"
)

// go-libp2p lets a peer ping in two streams at a time, and both applications do all the time,
// beside two connections that are asked all the time which of them works. None of their pings
// is refused.
func TestPingsOfApplications(t *testing.T) {
	for name, second := range map[string]Transport{"and TCP": TCP, "and QUIC": QUIC} {
		t.Run(name, func(t *testing.T) {
			compare(t, func(w *world) {
				w.hosts(setup{limited: true, quietLog: true})
				w.dial(w.attempt(QUIC, 1, 0), w.back(second, 0, 10*time.Second))
				for _, p := range [][2]*end{{w.a, w.b}, {w.b, w.a}} {
					for i := range 2 {
						w.work.Go(func() { w.ping(fmt.Sprintf("%s's pings in stream %d", p[0].name, i), p[0], p[1]) })
					}
				}
				w.until("a second connection", 20*time.Second, func() bool { return len(w.a.conns(w.b)) == 2 })
				for _, c := range w.a.conns(w.b) { // so that both stay, and are asked
					w.pinned(w.a, w.b, c, 10, 5*time.Second)
				}
				time.Sleep(2 * time.Minute)
			})
		})
	}
}

// ping pings in one stream at a time, a new one each second, until the situation ends.
func (w *world) ping(what string, from, to *end) {
	for w.ctx.Err() == nil {
		ctx, cancel := context.WithCancel(w.ctx)
		answers := ping.Ping(ctx, from.host, to.ID())
		for range 4 {
			if a := <-answers; a.Error != nil && w.ctx.Err() == nil {
				w.is(what, a.Error)
				cancel()
				return
			}
			time.Sleep(200 * time.Millisecond)
		}
		cancel()
		for range answers {
		}
		time.Sleep(200 * time.Millisecond) // the peer learns that the stream has ended
	}
	w.is(what, nil)
}
