package connmgr

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/policy"
)

func TestQuietTime(t *testing.T) {
	for name, c := range map[string]struct {
		world func(t *testing.T) *world
		quiet time.Duration
	}{
		"peer that migrates": {func(t *testing.T) *world {
			return newWorld(t, higher)
		}, defaultQuietTime},
		"peer that migrates, as set": {func(t *testing.T) *world {
			return newWorld(t, higher, WithQuietTime(300*time.Millisecond))
		}, 300 * time.Millisecond},
		"plain peer": {func(t *testing.T) *world {
			w := newWorld(t, higher)
			w.mover.setSupports(false)
			w.net.identify(higher)
			return w
		}, defaultPlainQuietTime},
		"bare manager": {func(t *testing.T) *world {
			return newBareWorld(t, higher)
		}, defaultPlainQuietTime},
		"bare manager, as set": {func(t *testing.T) *world {
			return newBareWorld(t, higher, WithPlainQuietTime(7*time.Second))
		}, 7 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := c.world(t)
				w.connect(quicAddr).setPlain(1)
				loser := w.connect(tcpAddr)
				w.pass(defaultSettleDelay + c.quiet - time.Millisecond)
				require.False(t, loser.IsClosed(), "not before the quiet time is over")
				w.pass(time.Millisecond)
				require.True(t, loser.pruned(), "as soon as it is over")
			})
		})
	}
}

func TestQuietTimeStartsAgainWithAStream(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		w.connect(quicAddr)
		loser := w.connect(tcpAddr)
		w.pass(defaultSettleDelay + defaultQuietTime/2)
		loser.setPlain(1)
		w.pass(time.Second) // long enough for a look to find it
		loser.setPlain(0)
		ended := time.Now()
		w.pass(defaultQuietTime - time.Millisecond)
		require.False(t, loser.IsClosed(), "%v after its last stream", time.Since(ended))
		w.pass(defaultInterval + time.Millisecond) // how late the end may be noticed
		require.True(t, loser.pruned())
	})
}

func TestStreamThatComesAtTheLastMomentKeepsTheConnection(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		w.connect(quicAddr)
		loser := w.connect(tcpAddr)
		w.pass(defaultSettleDelay + defaultQuietTime - time.Millisecond)
		loser.setPlain(1)
		w.pass(time.Hour)
		require.False(t, loser.IsClosed(), "there is a stream")
	})
}

func TestLastConnectionIsNeverClosed(t *testing.T) {
	t.Run("winner gone unnoticed", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			winner := w.connect(quicAddr)
			loser := w.connect(tcpAddr)
			w.pass(defaultSettleDelay)
			d := w.m.peers[higher]
			v := w.m.look(higher, d)
			w.pass(defaultQuietTime - time.Millisecond)
			winner.mu.Lock()
			winner.closed = true // its transport knows, the network does not yet
			winner.mu.Unlock()
			w.pass(time.Millisecond)
			require.False(t, loser.IsClosed(), "the other connection is the last one")

			// The same within a round: what was looked at is out of date by the time of
			// closing.
			r := role{plain: defaultQuietTime}
			mayClose := func() bool {
				return w.m.mayClose(d, v.conns[0].connState, v.conns[1].connState, r, false)
			}
			require.False(t, mayClose())
			winner.mu.Lock()
			winner.closed = false
			winner.mu.Unlock()
			require.True(t, mayClose())
			loser.setPlain(1)
			require.False(t, mayClose(), "a stream has come meanwhile")
		})
	})
	t.Run("winner closed", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			winner := w.connect(quicAddr)
			loser := w.connect(tcpAddr)
			w.pass(defaultSettleDelay + defaultQuietTime - time.Millisecond)
			winner.Close()
			w.pass(time.Hour)
			require.False(t, loser.IsClosed())
		})
	})
	t.Run("many connections, all empty", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			for range 5 {
				w.connect(tcpAddr)
				w.connect(quicAddr)
			}
			w.pass(time.Hour)
			require.Len(t, w.net.ConnsToPeer(higher), 1)
		})
	})
}

// D2: what a look has found may be out of date by the time of closing.
func TestNothingIsClosedOnOldKnowledge(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		w.connect(quicAddr)
		loser := w.connect(tcpAddr)
		w.pass(defaultSettleDelay)
		loser.setPlain(1) // until the round is over
		w.pass(defaultInterval)
		loser.set(func() { loser.plain, loser.unread = 0, 1 })
		d := w.m.peers[higher]
		v := w.m.look(higher, d)
		cs := v.conns[1].connState
		mayClose := func() bool {
			return w.m.mayClose(d, v.conns[0].connState, cs, role{drains: true, quiet: defaultQuietTime}, false)
		}
		change := func(f func()) {
			w.m.mu.Lock()
			defer w.m.mu.Unlock()
			f()
		}
		w.pass(time.Minute)
		require.False(t, mayClose(), "the peer has something to read there")
		change(func() { cs.drain.drained = true })
		require.True(t, mayClose())
		change(func() { cs.probes++ })
		require.False(t, mayClose(), "the end of a ping could hide the beginning of another stream")
		change(func() { cs.probes-- })
		require.True(t, mayClose())
		w.m.heard(loser)
		require.False(t, mayClose(), "the peer has opened a stream since it was asked")
		change(func() { cs.drain.drained = false }) // as it was
	})
}

// D3: a stream that is opened and closed here while the winner is pinged is seen by no look,
// and what came of it the peer may not have read.
func TestStreamDuringTheLastPing(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher, WithPolicy(policy.Chain(policy.TransportOrder())))
		var winner, loser *fakeConn
		probe := w.m.probe
		var mu sync.Mutex
		pings := 0
		w.m.probe = func(ctx context.Context, c network.Conn) (time.Duration, error) {
			mu.Lock()
			if c == network.Conn(winner) && loser.count() == 0 && w.agreed(loser) {
				pings++
				loser.set(func() { loser.unread = 1 })
			}
			mu.Unlock() // time stands still while anyone waits for a mutex
			return probe(ctx, c)
		}
		mu.Lock()
		winner, loser = w.connect(quicAddr), w.connect(tcpAddr)
		mu.Unlock()
		w.pass(time.Hour)
		mu.Lock()
		require.Equal(t, 1, pings)
		mu.Unlock()
		require.False(t, loser.IsClosed())
		loser.set(func() { loser.unread = 0 })
		w.pass(time.Second)
		require.True(t, loser.pruned())
	})
}

// agreed says whether the peer has answered that it has done with c.
func (w *world) agreed(c *fakeConn) bool {
	w.m.mu.Lock()
	defer w.m.mu.Unlock()
	cs := w.m.peers[w.peer].state(c)
	return cs != nil && cs.drain != nil && cs.drain.drained
}

func TestBareManagerClosesOnlyWhatIsEmpty(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newBareWorld(t, higher)
		relay := w.connectLimited()
		relay.setPlain(1)
		tcp := w.connect(tcpAddr)
		quic := w.connect(quicAddr)
		w.pass(time.Hour)
		require.True(t, tcp.pruned(), "the empty one goes")
		require.False(t, relay.IsClosed(), "the one with a stream stays")
		require.False(t, quic.IsClosed(), "the winner stays")
		require.Equal(t, 1, w.logs.FilterMessageSnippet("without a host").Len(), "it says once that it can do no better")
		require.Equal(t, "warn", w.logs.FilterMessageSnippet("without a host").All()[0].Level.String())
	})
}

func TestWrappedManagerDoesNotWarn(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		w.connect(quicAddr)
		w.connect(tcpAddr)
		w.pass(time.Minute)
		require.Zero(t, w.logs.FilterMessageSnippet("without a host").Len())
	})
}
