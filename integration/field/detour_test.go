package field

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peerstore"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/simtest"
)

// reach tries again and again to get an answer on a new stream, a second each time, and
// returns how long it has taken since then.
func (w *world) reach(ctx context.Context, from, to *end, since time.Time, limit time.Duration) (took time.Duration) {
	for time.Since(since) < limit {
		if _, err := w.requestWith(ctx, from, to, time.Second); err == nil {
			return time.Since(since)
		}
		time.Sleep(50 * time.Millisecond)
	}
	return limit
}

// The only connection to a peer dies, which its transport will not notice for half a minute,
// and there is another way. Both ends have new streams again in seconds, and streams on which
// nothing was under way go on.
func TestOnlyPathDies(t *testing.T) {
	for _, tr := range []Transport{QUIC, TCP} {
		for _, each := range []int{1, 150} {
			t.Run(fmt.Sprintf("%s, %d streams of each end", tr, each), func(t *testing.T) {
				together(t, func(w *world) { onlyPathDies(w, tr, each) })
			})
		}
	}
}

func onlyPathDies(w *world, tr Transport, each int) {
	w.hosts(setup{quietLog: true})
	w.direct(tr, 1)
	time.Sleep(5 * time.Second)
	var idle []*chat
	for range each {
		idle = append(idle, w.chat(w.a, w.b, 100, 70*time.Second), w.chat(w.b, w.a, 100, 70*time.Second))
	}
	w.chat(w.a, w.b, 100, 500*time.Millisecond)
	time.Sleep(10 * time.Second)
	w.Freeze(w.a.IPs()[1], w.b.IPs()[1])
	died := time.Now()
	var took [2]time.Duration
	var asking sync.WaitGroup
	for i, p := range [][2]*end{{w.a, w.b}, {w.b, w.a}} {
		asking.Go(func() { took[i] = w.reach(allowing(w.ctx), p[0], p[1], died, time.Minute) })
	}
	asking.Wait()
	for i, of := range []string{"one end", "the other end"} {
		assert.Less(w, took[i], 10*time.Second, "new streams of %s work again", of)
	}
	time.Sleep(time.Until(died.Add(90 * time.Second)))
	for _, c := range idle {
		require.NoError(w, c.state(5*time.Second))
	}
}

// The only direct connection is interrupted for some seconds, which plain hosts survive. Other
// ways stay, or are interrupted, too. Nothing is worse for another connection that comes
// meanwhile, neither for streams that can move nor for one that cannot.
func TestInterruptedForSeconds(t *testing.T) {
	for _, tr := range []Transport{QUIC, TCP} {
		for _, all := range []bool{false, true} {
			for _, gap := range []time.Duration{2, 4, 6, 8, 12, 18, 25} {
				if tr == QUIC && gap > 20 {
					continue // a plain host's QUIC does not survive it
				}
				gap *= time.Second
				what := "the path"
				if all {
					what = "everything"
				}
				t.Run(fmt.Sprintf("%s, %s for %v", tr, what, gap), func(t *testing.T) {
					compareWith(t, casts, func(w *world) { interrupted(w, tr, gap, all) })
				})
			}
		}
	}
}

func interrupted(w *world, tr Transport, gap time.Duration, all bool) {
	w.hosts(setup{})
	direct := w.direct(tr, 1)
	time.Sleep(5 * time.Second)
	chats := w.chats(2)
	pinned := w.pinned(w.a, w.b, direct, 100, time.Second)
	idle := w.chat(w.a, w.b, 100, 70*time.Second)
	time.Sleep(10 * time.Second)
	pairs := [][2]string{{w.a.IPs()[1], w.b.IPs()[1]}}
	if all {
		for _, x := range w.a.IPs() {
			for _, y := range w.b.IPs() {
				pairs = append(pairs, [2]string{x, y})
			}
		}
	}
	for _, p := range pairs {
		w.Freeze(p[0], p[1])
	}
	began := time.Now()
	var asking sync.WaitGroup
	for i, p := range [][2]*end{{w.a, w.b}, {w.b, w.a}} {
		asking.Go(func() {
			time.Sleep(time.Second)
			took, err := w.request(p[0], p[1], time.Minute)
			w.takes(fmt.Sprintf("request %d that was made meanwhile", i), err, took, 3*time.Second)
		})
	}
	time.Sleep(gap)
	for _, p := range pairs {
		w.Thaw(p[0], p[1])
	}
	asking.Wait()
	time.Sleep(time.Until(began.Add(90 * time.Second)))
	w.holds("a connection is left", len(w.a.conns(w.b)) > 0 && len(w.b.conns(w.a)) > 0)
	w.noteAll("stream", chats, 5*time.Second, 3*time.Second)
	w.takes("stream that cannot move", pinned.state(5*time.Second), pinned.wait(), 3*time.Second)
	w.takes("idle stream", idle.state(5*time.Second), idle.wait(), 3*time.Second)
	w.noteRequest("request after", w.a, w.b, 5*time.Second, time.Second)
	w.noteRequest("request back after", w.b, w.a, 5*time.Second, time.Second)
}

// The direct path dies for good, and there is a relay. Streams that may be on it, limited or
// not, work again in seconds; on plain hosts when the transport has noticed and one dials.
func TestDirectPathDiesAndThereIsARelay(t *testing.T) {
	for _, tr := range []Transport{QUIC, TCP} {
		for _, limited := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, limited: %v", tr, limited), func(t *testing.T) {
				compareWith(t, bothCasts, func(w *world) { fallBack(w, tr, limited) })
			})
		}
	}
}

func fallBack(w *world, tr Transport, limited bool) {
	w.hosts(setup{})
	r := w.relay(limited)
	w.Reserve(w.b.Node, r, TCP)
	w.Reach(w.a.Node, r, TCP)
	w.direct(tr, 1)
	time.Sleep(5 * time.Second)
	through := fmt.Sprintf("%s/p2p/%s/p2p-circuit", Addr(TCP, r.IPs()[0]), r.ID())
	w.a.Peerstore().AddAddr(w.b.ID(), ma.StringCast(through), peerstore.PermanentAddrTTL)
	chats := w.chats(1)
	idle := w.chat(w.b, w.a, 100, 70*time.Second)
	time.Sleep(10 * time.Second)
	for _, x := range w.a.IPs() {
		for _, y := range w.b.IPs() {
			w.Freeze(x, y)
		}
	}
	died := time.Now()
	var asking sync.WaitGroup
	for i, p := range [][2]*end{{w.a, w.b}, {w.b, w.a}} {
		asking.Go(func() {
			took := w.reach(network.WithAllowLimitedConn(w.ctx, "field"), p[0], p[1], died, 80*time.Second)
			w.takes(fmt.Sprintf("new stream of end %d", i), nil, took, time.Second)
			if w.cast.a {
				assert.Less(w, took, 10*time.Second, "new stream of end %d", i)
			}
		})
	}
	asking.Wait()
	time.Sleep(time.Until(died.Add(90 * time.Second)))
	for i, c := range chats {
		opener, acceptor := c.errorsAt()
		w.takes(fmt.Sprintf("opener of stream %d hears", i), nil, opener.Sub(died), 3*time.Second)
		w.takes(fmt.Sprintf("acceptor of stream %d hears", i), nil, acceptor.Sub(died), 3*time.Second)
	}
	if w.cast.a && !limited {
		assert.NoError(w, idle.state(5*time.Second), "nothing was under way on this stream")
	}
}
