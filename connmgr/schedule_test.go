package connmgr

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/policy"
)

func TestSettleDelay(t *testing.T) {
	firstCall := func(t *testing.T, connect func(w *world)) time.Duration {
		w := newWorld(t, higher, WithSettleDelay(2*time.Second))
		start := time.Now()
		w.connect(tcpAddr).open(1)
		connect(w)
		w.pass(20 * time.Second)
		return w.mover.made()[0].at.Sub(start)
	}
	within := func(t *testing.T, want, got time.Duration) {
		t.Helper()
		require.GreaterOrEqual(t, got, want)
		require.LessOrEqual(t, got, want+4*minRoundGap+2*rtt) // in which the winner is asked once more
	}
	t.Run("from the second connection", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			within(t, 5*time.Second, firstCall(t, func(w *world) {
				w.pass(3 * time.Second)
				w.connect(quicAddr)
			}))
		})
	})
	t.Run("again with each connection", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			within(t, 5*time.Second, firstCall(t, func(w *world) {
				for range 3 {
					w.pass(time.Second)
					w.connect(quicAddr)
				}
			}))
		})
	})
	t.Run("but not for ever", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			within(t, 11*time.Second, firstCall(t, func(w *world) {
				for range 30 {
					w.pass(time.Second)
					c := w.connect(quicAddr)
					if len(w.net.ConnsToPeer(higher)) > 3 {
						c.Close()
					}
				}
			}))
		})
	})
	t.Run("not started again by a connection that goes", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			within(t, 2*time.Second, firstCall(t, func(w *world) {
				w.connect(quicAddr)
				relay := w.connectLimited()
				w.pass(1500 * time.Millisecond)
				relay.Close()
			}))
		})
	})
	t.Run("a new connection later settles too", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			relay := w.connectLimited()
			relay.open(1)
			relay.setPlain(1)
			ws := w.connect(wsAddr)
			w.pass(time.Minute)
			require.Equal(t, 1, ws.count())
			tcp := w.connect(tcpAddr) // of the same kind, so that streams do not wait until it has proved itself
			w.pass(defaultSettleDelay + rtt - time.Millisecond)
			require.Zero(t, tcp.count())
			w.pass(2 * minRoundGap)
			require.Equal(t, 1, tcp.count())
		})
	})
}

// Nothing that may still come outranks the only unlimited connection among limited ones, and
// each moment on a relay counts against its limit.
func TestFastSettle(t *testing.T) {
	for name, c := range map[string]struct {
		opts  []Option
		conns func(w *world)
		after time.Duration
	}{
		"one relay":            {nil, func(w *world) { w.connect(quicAddr) }, fastSettle},
		"several relays":       {nil, func(w *world) { w.connectLimited(); w.connectLimited(); w.connect(quicAddr) }, fastSettle},
		"the direct one first": {nil, func(w *world) { w.connect(quicAddr); w.connectLimited() }, fastSettle},
		"as set, if that is less": {[]Option{WithSettleDelay(40 * time.Millisecond)}, func(w *world) {
			w.connect(quicAddr)
		}, 40 * time.Millisecond},
		"not with two that have no limit": {nil, func(w *world) { w.connect(quicAddr); w.connect(tcpAddr) }, defaultSettleDelay},
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, higher, c.opts...)
				s := w.connectLimited().open(1)[0]
				start := time.Now()
				c.conns(w)
				w.pass(time.Minute)
				times := w.mover.callTimes(s, start)
				require.Len(t, times, 1)
				require.GreaterOrEqual(t, times[0], c.after)
				require.LessOrEqual(t, times[0], c.after+2*minRoundGap)
			})
		})
	}
}

// Near the end of what its relay allows, nothing waits.
func TestEndOfARelaysLimit(t *testing.T) {
	moved := func(t *testing.T, limit map[any]any, before time.Duration, prepare func(relay *fakeConn)) (w *world, relay *fakeConn, to []*fakeConn, start time.Time) {
		w = newWorld(t, higher)
		w.net.limit = limit
		relay = w.connectLimited()
		w.net.limit = nil
		relay.open(1)
		prepare(relay)
		w.pass(before)
		start = time.Now()
		return w, relay, []*fakeConn{w.connect(quicAddr), w.connect(tcpAddr)}, start
	}
	t.Run("time", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w, _, to, _ := moved(t, map[any]any{client.StatLimitDuration: 2 * time.Minute}, 115*time.Second, func(*fakeConn) {})
			w.pass(2*minRoundGap + rtt)
			require.Equal(t, 1, to[0].count(), "there are 5 s left")
		})
	})
	t.Run("data", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w, _, to, _ := moved(t, map[any]any{client.StatLimitData: uint64(128 << 10)}, time.Second, func(relay *fakeConn) {
				relay.set(func() { relay.moved.received = 115 << 10 })
			})
			w.pass(2*minRoundGap + rtt)
			require.Equal(t, 1, to[0].count(), "all but an eighth of it is spent")
		})
	})
	t.Run("enough is left", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w, _, to, start := moved(t, map[any]any{client.StatLimitDuration: 2 * time.Minute, client.StatLimitData: uint64(128 << 10)}, time.Minute, func(relay *fakeConn) {
				relay.set(func() { relay.moved.received, relay.moved.sent = 100<<10, 100<<10 })
			})
			w.pass(2 * defaultSettleDelay)
			require.Equal(t, 1, to[0].count())
			require.GreaterOrEqual(t, w.mover.made()[0].at.Sub(start), defaultSettleDelay)
		})
	})
	t.Run("to another relay, only then", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			w.net.limit = map[any]any{client.StatLimitDuration: 2 * time.Minute}
			first := w.connectLimited()
			s := first.open(1)[0]
			w.pass(time.Minute)
			second := w.connectLimited()
			w.pass(time.Minute - endingSoon - time.Second)
			require.Empty(t, w.mover.made(), "each has a budget of its own")
			w.pass(time.Second + defaultInterval)
			require.Equal(t, network.Conn(second), s.Conn(), "the first is about to end")
			require.True(t, w.mover.made()[0].limited, "that needs network.WithAllowLimitedConn")
			w.pass(endingSoon - defaultInterval - time.Millisecond)
			require.False(t, first.IsClosed() || second.IsClosed(), "neither is closed for the other")
		})
	})
}

// A batch that is under way keeps no other round from running, but no two rounds of a peer
// run at once, and none runs right after another.
func TestFloorBetweenRounds(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		policy := &countingPolicy{Policy: policy.Default()}
		w := newWorld(t, higher, WithPolicy(policy))
		quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
		quic.setPlain(1)
		tcp.setPlain(1)
		w.pass(2 * defaultSettleDelay)
		before := policy.ranked()
		for range 1000 { // a second of provocations of all kinds
			time.Sleep(time.Millisecond)
			w.m.disp.identified(higher)
			w.request(tcp, drainMessage(0))
			w.request(quic, keepMessage())
			w.connect(tcpAddr).Close()
		}
		require.LessOrEqual(t, policy.ranked()-before, int(time.Second/minRoundGap)+1)
		require.GreaterOrEqual(t, policy.ranked()-before, int(time.Second/minRoundGap)/2, "they are not ignored, either")
	})
}

// countingPolicy counts how often it is asked.
type countingPolicy struct {
	policy.Policy
	mu    sync.Mutex
	count int
}

func (p *countingPolicy) Rank(candidates []policy.Candidate) policy.Ranking {
	p.mu.Lock()
	p.count++
	p.mu.Unlock()
	return p.Policy.Rank(candidates)
}

func (p *countingPolicy) ranked() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.count
}

func TestRoundsOfManyPeersAreBounded(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		const peers, concurrency = 1_000, 20
		w := newWorld(t, higher, WithConcurrency(concurrency))
		winners := make([]*fakeConn, peers)
		losers := make([]*fakeConn, peers)
		for i := range peers {
			p := peer.ID(fmt.Sprintf("peer z%d", i))
			w.net.identify(p, DrainID)
			losers[i] = w.net.connect(p, relayAddr, true)
			losers[i].open(1)
			winners[i] = w.net.connect(p, quicAddr, false)
		}
		w.pass(fastSettle + peers/concurrency*placeTime + rtt)
		require.LessOrEqual(t, w.mover.most, concurrency*int(rtt/placeTime+1), "streams in motion: those of a place's peer, and of the peers that had it before")
		for i := range peers {
			require.Equal(t, 1, winners[i].count(), "every peer has had its round")
		}
		w.pass(2 * defaultQuietTime)
		for i := range peers {
			require.True(t, losers[i].pruned())
		}
		require.Empty(t, w.m.sched.peers, "nothing is kept")
		require.Empty(t, w.due())
		require.Empty(t, w.m.steer.winners)
		require.Empty(t, w.m.usage.of)
	})
}

// Peers that use up every wait: their connections answer nothing, their streams never finish
// moving, they change something all the time. An honest peer's streams leave the relay all
// the same.
func TestHostilePeersDoNotKeepAnHonestOneWaiting(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		const hostile = 1_024
		w := newWorld(t, higher)
		w.mover.setAnswer(func(s *fakeStream) error {
			if s.Conn().RemotePeer() != higher {
				return errHang
			}
			return nil
		})
		for i := range hostile {
			p := peer.ID(fmt.Sprintf("peer z%d", i))
			w.net.identify(p, DrainID)
			relay := w.net.connect(p, relayAddr, true)
			direct := w.net.connect(p, quicAddr, false)
			relay.open(1)
			switch i % 3 {
			case 0:
				relay.set(func() { relay.silent = true })
				direct.set(func() { direct.silent = true })
			case 1:
				direct.set(func() { direct.delay = defaultProbeTime - time.Millisecond })
			}
		}
		for at := range 3 { // whenever it comes
			w.pass(fastSettle)
			relay := w.connectLimited()
			s := relay.open(1)[0]
			start := time.Now()
			direct := w.connect(quicAddr)
			w.pass(5 * time.Second)
			require.Equal(t, network.Conn(direct), s.Conn(), "%d: after 5 s", at)
			require.Less(t, w.mover.callTimes(s, start)[0], 5*time.Second-rtt)
			relay.Close()
			direct.Close()
		}
	})
}

// A peer whose streams did not finish in its place's time stands behind the others as long
// as they have not, whatever asks for a round, and not longer than that.
func TestWhoWaitedStandsBehind(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		policy := &countingPolicy{Policy: policy.Default()}
		w := newWorld(t, higher, WithConcurrency(1), WithPolicy(policy))
		relay := w.connectLimited()
		relay.openTheirs(1)
		w.connect(quicAddr)
		end := make(chan struct{})
		w.mover.setAnswer(func(*fakeStream) error { <-end; return nil })
		state := func() (waited, places int) {
			w.m.sched.mu.Lock()
			defer w.m.sched.mu.Unlock()
			return w.m.sched.peers[higher].waited, w.m.sched.places
		}
		w.net.identify(higher) // so that all streams move
		w.pass(fastSettle + minRoundGap)
		require.Len(t, w.mover.made(), 1)
		_, places := state()
		require.Equal(t, 1, places)
		w.pass(placeTime)
		waited, places := state()
		require.Equal(t, 1, waited)
		require.Zero(t, places, "its place is free")
		for i := range 6 { // it goes on
			relay.openTheirs(1)
			before := policy.ranked()
			rest := placeTime << min(waited, 5)
			start := time.Now()
			for time.Since(start) < rest-2*minRoundGap {
				w.m.disp.identified(higher)
				w.pass(minRoundGap)
			}
			require.LessOrEqual(t, policy.ranked(), before+1, "%d: no more rounds than its rest allows", i)
			for n := len(w.mover.made()); n < i+2; n = len(w.mover.made()) {
				w.m.disp.identified(higher)
				w.pass(minRoundGap)
			}
			w.pass(placeTime)
			waited, _ = state()
			require.Equal(t, i+2, waited)
		}
		close(end)
		w.pass(rtt + placeTime<<5 + minRoundGap)
		waited, _ = state()
		require.Zero(t, waited)
	})
}

func TestPeersWithOneConnectionCostNothing(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		for i := range 1000 {
			c := w.net.connect(peer.ID(fmt.Sprintf("peer %d", i)), quicAddr, false)
			if i%2 == 0 {
				c.Close()
			}
		}
		w.pass(time.Minute)
		require.Empty(t, w.m.sched.peers)
		require.Empty(t, w.mover.made())
	})
}

func TestClose(t *testing.T) {
	atOnce := func(t *testing.T, w *world) {
		t.Helper()
		start := time.Now()
		require.NoError(t, w.m.Close())
		require.Zero(t, time.Since(start), "Close waits for nothing that takes time")
		require.NoError(t, w.m.Close(), "twice is once")
		w.pass(time.Hour) // nothing goes on; the bubble would not end with a goroutine left
	}
	for name, prepare := range map[string]func(t *testing.T, w *world){
		"unused":   func(t *testing.T, w *world) {},
		"settling": func(t *testing.T, w *world) { w.pass(fastSettle / 2) },
		"moving":   func(t *testing.T, w *world) { w.pass(fastSettle + rtt/2) },
		"moving without end": func(t *testing.T, w *world) {
			w.mover.setAnswer(func(*fakeStream) error { return errHang })
			w.pass(fastSettle + moveWait/2)
		},
		"moving without end beside the round": func(t *testing.T, w *world) {
			w.mover.setAnswer(func(*fakeStream) error { return errHang })
			w.pass(fastSettle + 2*moveWait)
		},
		"backing off": func(t *testing.T, w *world) {
			w.mover.setAnswer(func(*fakeStream) error { return errFakeReset })
			w.pass(time.Minute)
		},
		"quiet": func(t *testing.T, w *world) { w.pass(defaultQuietTime - rtt) },
		"done":  func(t *testing.T, w *world) { w.pass(time.Hour) },
		"consolidating": func(t *testing.T, w *world) {
			w.mover.setAnswer(func(*fakeStream) error { return errHang })
			ended := make(chan error, 1)
			go func() {
				_, err := w.m.Consolidate(context.Background(), higher)
				ended <- err
			}()
			w.pass(rtt / 2)
			t.Cleanup(func() { require.ErrorIs(t, <-ended, ErrClosed) })
		},
		"consolidating twice": func(t *testing.T, w *world) {
			w.mover.setAnswer(func(*fakeStream) error { return errHang })
			for range 2 {
				go w.m.Consolidate(context.Background(), higher)
			}
			w.pass(rtt / 2)
		},
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, higher)
				if name != "unused" {
					w.connectLimited().open(3)
					w.connect(quicAddr)
				}
				prepare(t, w)
				atOnce(t, w)
			})
		})
	}
	t.Run("closing a connection that blocks", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			relay := w.connectLimited()
			relay.blocks = make(chan struct{})
			w.connect(quicAddr)
			w.pass(time.Minute)
			ended := make(chan error, 1)
			go func() {
				_, err := w.m.Consolidate(context.Background(), higher)
				ended <- err
			}()
			w.pass(time.Minute)
			start := time.Now()
			require.NoError(t, w.m.Close())
			require.LessOrEqual(t, time.Since(start), time.Second)
			require.NoError(t, <-ended, "no round waits for it")
			require.Equal(t, 1, w.logs.FilterMessageSnippet("blocks").Len())
			close(relay.blocks)
			w.pass(time.Minute)
		})
	})
	t.Run("events after it are for inner alone", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			require.NoError(t, w.m.Close())
			w.connectLimited().open(3)
			w.connect(quicAddr)
			w.pass(time.Hour)
			require.Empty(t, w.mover.made())
			require.Empty(t, w.m.watch.events)
			require.Empty(t, w.m.sched.peers)
		})
	})
}

// Whoever waits for a peer's next round is told of it, however many wait, and also where there is
// none, since the peer is forgotten.
func TestAllWhoWaitForARoundAreTold(t *testing.T) {
	told := func(waits <-chan struct{}) bool {
		select {
		case <-waits:
			return true
		default:
			return false
		}
	}
	s := newScheduler(nil, 1)
	s.forget = func(*peerState) {}
	s.mu.Lock()
	d := s.entry(higher)
	d.running = true
	one, other := d.stirred(), d.stirred()
	require.False(t, told(one) || told(other))
	s.end(d, time.Time{})
	s.mu.Unlock()
	require.True(t, told(one) && told(other))
}
