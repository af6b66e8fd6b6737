package connmgr

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/stretchr/testify/require"
)

func TestSettleDelay(t *testing.T) {
	firstCall := func(t *testing.T, connect func(w *world)) time.Duration {
		w := newWorld(t, higher, WithSettleDelay(2*time.Second))
		start := time.Now()
		w.connectLimited().open(1)
		connect(w)
		w.pass(20 * time.Second)
		return w.mover.made()[0].at.Sub(start)
	}
	t.Run("from the second connection", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			require.Equal(t, 5*time.Second, firstCall(t, func(w *world) {
				w.pass(3 * time.Second)
				w.connect(quicAddr)
			}))
		})
	})
	t.Run("again with each connection", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			require.Equal(t, 5*time.Second, firstCall(t, func(w *world) {
				for range 3 {
					w.pass(time.Second)
					w.connect(quicAddr)
				}
			}))
		})
	})
	t.Run("but not for ever", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			require.Equal(t, 11*time.Second, firstCall(t, func(w *world) {
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
			require.Equal(t, 2*time.Second, firstCall(t, func(w *world) {
				w.connect(quicAddr)
				tcp := w.connect(tcpAddr)
				w.pass(1500 * time.Millisecond)
				tcp.Close()
			}))
		})
	})
	t.Run("a new connection later settles too", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			relay := w.connectLimited()
			relay.open(1)
			relay.setPlain(1)
			tcp := w.connect(tcpAddr)
			w.pass(time.Minute)
			require.Equal(t, 1, tcp.count())
			quic := w.connect(quicAddr)
			w.pass(defaultSettleDelay + rtt - time.Millisecond)
			require.Zero(t, quic.count())
			w.pass(time.Millisecond)
			require.Equal(t, 1, quic.count())
		})
	})
}

func TestOneRoundPerPeerAtATime(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		relay := w.connectLimited()
		relay.open(1)
		w.connect(quicAddr)
		tcp := w.connect(tcpAddr)
		w.pass(defaultSettleDelay + rtt/10)
		require.Len(t, w.mover.made(), 1, "a round is under way")
		relay.open(1) // something for another one to do
		tcp.Close()   // asks for it at once
		w.pass(rtt / 10)
		require.Len(t, w.mover.made(), 1, "not while one is running")
		w.pass(rtt)
		require.Len(t, w.mover.made(), 2, "but right after it")
	})
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
		w.pass(defaultSettleDelay + peers/concurrency*rtt)
		require.Equal(t, concurrency, w.mover.most)
		for i := range peers {
			require.Equal(t, 1, winners[i].count(), "every peer has had its round")
		}
		w.pass(2 * defaultQuietTime)
		for i := range peers {
			require.True(t, losers[i].pruned())
		}
		require.Empty(t, w.m.peers, "nothing is kept")
		require.Empty(t, w.due())
		require.Empty(t, w.m.steering.winners)
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
		require.Empty(t, w.m.peers)
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
		"settling": func(t *testing.T, w *world) { w.pass(defaultSettleDelay / 2) },
		"moving":   func(t *testing.T, w *world) { w.pass(defaultSettleDelay + rtt/2) },
		"moving without end": func(t *testing.T, w *world) {
			w.mover.setAnswer(func(*fakeStream) error { return errHang })
			w.pass(defaultSettleDelay + moveWait/2)
		},
		"moving without end beside the round": func(t *testing.T, w *world) {
			w.mover.setAnswer(func(*fakeStream) error { return errHang })
			w.pass(defaultSettleDelay + 2*moveWait)
		},
		"backing off": func(t *testing.T, w *world) {
			w.mover.setAnswer(func(*fakeStream) error { return errFakeReset })
			w.pass(time.Minute)
		},
		"quiet": func(t *testing.T, w *world) { w.pass(defaultSettleDelay + defaultQuietTime/2) },
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
			require.ErrorIs(t, <-ended, ErrClosed, "who waits for the round does not wait for it to end")
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
			require.Empty(t, w.m.peers)
		})
	})
}
