package connmgr

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	identifypb "github.com/libp2p/go-libp2p/p2p/protocol/identify/pb"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/policy"
)

func TestQuietTime(t *testing.T) {
	const proof = defaultProof / directProofShare
	for name, c := range map[string]struct {
		world func(t *testing.T) *world
		loser string
		quiet time.Duration // since the connection came
	}{
		"limited": {func(t *testing.T) *world {
			return newWorld(t, higher)
		}, relayAddr, defaultQuietTime},
		"limited, as set": {func(t *testing.T) *world {
			return newWorld(t, higher, WithQuietTime(500*time.Millisecond))
		}, relayAddr, 500 * time.Millisecond},
		"limited, longer": {func(t *testing.T) *world {
			return newWorld(t, higher, WithQuietTime(7*time.Second))
		}, relayAddr, 7 * time.Second},
		"direct, the winner has to prove itself": {func(t *testing.T) *world {
			return newWorld(t, higher)
		}, tcpAddr, proof},
		"direct, as set": {func(t *testing.T) *world {
			return newWorld(t, higher, WithProof(time.Minute))
		}, tcpAddr, 6 * time.Second},
		"plain peer": {func(t *testing.T) *world {
			w := newWorld(t, higher)
			w.mover.setSupports(false)
			w.net.identify(higher)
			return w
		}, tcpAddr, defaultPlainQuietTime},
		"bare manager": {func(t *testing.T) *world {
			return newBareWorld(t, higher)
		}, tcpAddr, defaultPlainQuietTime},
		"bare manager, as set": {func(t *testing.T) *world {
			return newBareWorld(t, higher, WithPlainQuietTime(7*time.Second))
		}, tcpAddr, 7 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := c.world(t)
				w.connect(quicAddr).setPlain(1)
				loser := w.net.connect(higher, c.loser, c.loser == relayAddr)
				w.pass(c.quiet - time.Millisecond)
				require.False(t, loser.IsClosed(), "not before the quiet time is over")
				w.pass(10 * minRoundGap)
				require.True(t, loser.pruned(), "soon after: it is asked twice, and the winner once")
			})
		})
	}
}

// The last other unlimited connection is closed only when the winner has lived for a while:
// longer for a relayed one, which is the way to a peer behind a NAT.
func TestWinnerHasToProveItself(t *testing.T) {
	t.Run("against an unlimited relay", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			relay := w.net.connect(higher, relayAddr, false)
			s := relay.open(1)[0]
			w.pass(time.Minute)
			direct := w.connect(quicAddr)
			w.pass(defaultSettleDelay + minRoundGap)
			require.Equal(t, direct.id, w.steered(), "new streams use it at once")
			w.pass(defaultProof - defaultSettleDelay - 2*minRoundGap)
			require.Equal(t, network.Conn(relay), s.Conn(), "what is in no danger waits")
			require.Contains(t, w.m.Explain(higher).Conns[1].State, "1 stream to move when the winner has proved itself, in ")
			w.pass(rtt + 3*minRoundGap)
			require.Equal(t, network.Conn(direct), s.Conn())
			w.pass(defaultQuietTime + maxQuietGap)
			require.True(t, relay.pruned())
		})
	})
	t.Run("not with a third one", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher, WithProof(time.Hour))
			w.connect(quicAddr).setPlain(1)
			w.connect(tcpAddr).setPlain(1)
			third := w.connect(tcpAddr)
			w.pass(time.Minute)
			require.True(t, third.pruned())
			require.Len(t, w.net.ConnsToPeer(higher), 2)
		})
	})
	t.Run("that dies before", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			relay := w.net.connect(higher, relayAddr, false)
			s := relay.open(1)[0]
			w.pass(time.Minute)
			direct := w.connect(quicAddr)
			w.pass(defaultProof / 2)
			direct.Close()
			w.pass(time.Hour)
			require.False(t, relay.IsClosed())
			require.Equal(t, network.Conn(relay), s.Conn())
			require.Empty(t, w.mover.made())
		})
	})
	t.Run("and the next one for twice as long", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			relay := w.net.connect(higher, relayAddr, false)
			relay.open(1)
			relay.setPlain(1)
			for i := range 4 { // a path that flaps
				w.pass(time.Minute)
				proof := defaultProof << i
				direct := w.connect(quicAddr)
				w.pass(proof - time.Millisecond)
				require.Equal(t, 1, relay.count(), "%d", i)
				if i > 0 {
					require.NotEqual(t, direct.id, w.steered())
					require.Contains(t, w.m.Explain(higher).String(), "died young of late")
				}
				w.pass(time.Second + patienceIntervals*defaultInterval)
				require.Equal(t, direct.id, w.steered(), "%d", i)
				direct.Close()
				w.pass(minRoundGap)
				for _, s := range w.mover.made() {
					if fs := s.stream.(*fakeStream); fs.Conn() == network.Conn(direct) {
						fs.moveTo(relay)
					}
				}
			}
			tcp := w.connect(tcpAddr) // another kind
			w.pass(defaultProof + time.Second)
			require.Equal(t, tcp.id, w.steered())
		})
	})
}

func TestStandby(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher, WithStandby())
		relay := w.connectLimited()
		third := w.connect(tcpAddr)
		w.pass(time.Millisecond)
		second, first := w.connect(tcpAddr), w.connect(quicAddr)
		first.setPlain(1)
		w.pass(time.Hour)
		require.True(t, relay.pruned(), "a limited one is no second path")
		require.NotEqual(t, second.IsClosed(), third.IsClosed(), "one of the two is enough")
		require.Contains(t, w.m.Explain(higher).Conns[1].State, "kept: it stands by")
		require.Zero(t, max(0, w.m.Explain(higher).Conns[1].Candidate.Streams))
		first.Close()
		w.pass(time.Minute)
		require.Len(t, w.net.ConnsToPeer(higher), 1)
	})
}

// Not identified: nothing is known, so nothing is closed, but streams are steered.
func TestUnknownPeerKeepsItsDuplicates(t *testing.T) {
	for name, p := range map[string]peer.ID{"that decides": lower, "that does not": higher} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, p)
				w.net.forget(p)
				w.mover.setSupports(false)
				quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
				w.pass(time.Hour)
				require.False(t, quic.IsClosed() || tcp.IsClosed())
				require.Zero(t, tcp.timesAsked()+quic.timesAsked())
				w.net.identify(p)
				w.pass(2 * defaultPlainQuietTime)
				require.Len(t, w.net.ConnsToPeer(p), 1, "once it is known as one without a manager")
			})
		})
	}
}

// Two connections to a plain peer may lead to two processes that share a key. An idle one is
// closed only if both say the same of themselves.
func TestReplicasBehindOneKey(t *testing.T) {
	record := func(s string) *identifypb.Identify { return &identifypb.Identify{SignedPeerRecord: []byte(s)} }
	listens := func(agent string, addrs ...string) *identifypb.Identify {
		id := &identifypb.Identify{AgentVersion: &agent}
		for _, a := range addrs {
			id.ListenAddrs = append(id.ListenAddrs, []byte(a))
		}
		return id
	}
	for name, c := range map[string]struct {
		winner, loser func(*fakeConn)
		closed        bool
	}{
		"the same record":             {says(record("a")), says(record("a")), true},
		"different records":           {says(record("a")), says(record("b")), false},
		"one without a record":        {says(record("a")), says(listens("go", "x")), false},
		"the same addresses":          {says(listens("go", "x", "y")), says(listens("go", "y", "x")), true},
		"different addresses":         {says(listens("go", "x")), says(listens("go", "y")), false},
		"different agents":            {says(listens("go", "x")), says(listens("js", "x")), false},
		"neither tells anything":      {says(listens("go")), says(listens("go")), false},
		"the loser does not say":      {says(record("a")), func(c *fakeConn) { c.full = network.ErrResourceLimitExceeded }, false},
		"too long":                    {says(record("a")), says(record(strings.Repeat("a", maxIdentify))), false},
		"an identify that is a flood": {says(record("a")), says(flood()), false},
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, higher)
				w.net.identify(higher)
				quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
				quic.setPlain(1)
				w.pass(2 * time.Second) // they work
				quic.set(func() { c.winner(quic) })
				tcp.set(func() { c.loser(tcp) })
				w.pass(time.Hour)
				require.Equal(t, c.closed, tcp.pruned())
				require.False(t, quic.IsClosed())
				if !c.closed && tcp.full == nil {
					require.Contains(t, w.m.Explain(higher).Conns[1].State, "kept: it is not known to lead to the same process as the winner")
				}
			})
		})
	}
}

func says(id *identifypb.Identify) func(*fakeConn) {
	return func(c *fakeConn) { c.identity = id }
}

// flood is a message that is too long in sum.
func flood() *identifypb.Identify {
	id := &identifypb.Identify{SignedPeerRecord: []byte("a")}
	for range 1000 {
		id.Protocols = append(id.Protocols, strings.Repeat("x", 100))
	}
	return id
}

func TestQuietTimeStartsAgainWithAStream(t *testing.T) {
	for name, stream := range map[string]func(w *world, c *fakeConn){
		"that is seen": func(w *world, c *fakeConn) {
			c.setPlain(1)
			w.pass(time.Second) // long enough for a look to find it
			c.setPlain(0)
		},
		"however short": func(w *world, c *fakeConn) { w.m.began(c, "/test/short/1.0.0", network.DirInbound) },
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, higher)
				w.connect(quicAddr)
				loser := w.connect(tcpAddr)
				w.pass(defaultSettleDelay + defaultQuietTime/2)
				stream(w, loser)
				w.pass(defaultQuietTime - time.Millisecond)
				require.False(t, loser.IsClosed())
				w.pass(defaultInterval + 10*minRoundGap) // how late the end may be noticed
				require.True(t, loser.pruned())
			})
		})
	}
	t.Run("short ones all the time", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			w.net.identify(higher)
			w.connect(quicAddr)
			loser := w.connect(tcpAddr)
			for range 100 {
				w.pass(defaultPlainQuietTime / 2)
				w.m.began(loser, "/test/short/1.0.0", network.DirInbound)
			}
			require.False(t, loser.IsClosed(), "it is in use")
			w.pass(defaultPlainQuietTime + defaultInterval)
			require.True(t, loser.pruned())
		})
	})
	t.Run("but not with the managers' own", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			w.connect(quicAddr)
			loser := w.connect(tcpAddr)
			for range 40 {
				w.pass(100 * time.Millisecond)
				for _, id := range []protocol.ID{DrainID, identify.ID, identify.IDPush, PathID} {
					w.m.began(loser, id, network.DirInbound)
				}
			}
			require.True(t, loser.pruned())
		})
	})
}

func TestStreamThatComesAtTheLastMomentKeepsTheConnection(t *testing.T) {
	for at := time.Duration(-100); at <= 100; at += 5 {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			w.connect(quicAddr)
			loser := w.connect(tcpAddr)
			w.pass(defaultProof/directProofShare + at*time.Millisecond)
			if loser.IsClosed() {
				return
			}
			loser.setPlain(1)
			w.pass(time.Hour)
			require.False(t, loser.IsClosed(), "there is a stream, since %v", at*time.Millisecond)
		})
	}
}

func TestLastConnectionIsNeverClosed(t *testing.T) {
	t.Run("winner gone unnoticed", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			winner := w.connect(quicAddr)
			loser := w.connect(tcpAddr)
			w.pass(defaultProof/directProofShare - time.Millisecond)
			winner.set(func() { winner.closed = true }) // its transport knows, the network does not yet
			w.pass(time.Hour)
			require.False(t, loser.IsClosed(), "the other connection is the last one")
		})
	})
	t.Run("winner closed", func(t *testing.T) {
		for at := time.Duration(-100); at <= 100; at += 5 {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, higher)
				winner := w.connect(quicAddr)
				loser := w.connect(tcpAddr)
				w.pass(defaultProof/directProofShare + at*time.Millisecond)
				if loser.IsClosed() {
					return
				}
				winner.Close()
				w.pass(time.Hour)
				require.False(t, loser.IsClosed())
			})
		}
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

// What a plan was made of may be out of date by the time of closing: it is looked at again,
// with the claim.
func TestNothingIsClosedOnOldKnowledge(t *testing.T) {
	for name, change := range map[string]func(w *world, d *peerState, winner, loser *fakeConn, ws, ls *connState){
		"nothing has changed": nil,
		"a stream has come":   func(_ *world, _ *peerState, _, loser *fakeConn, _, _ *connState) { loser.setPlain(1) },
		"one came and went": func(w *world, _ *peerState, _, loser *fakeConn, _, _ *connState) {
			w.pass(time.Nanosecond)
			w.m.began(loser, "/test/short/1.0.0", network.DirInbound)
		},
		"the peer is asked":    func(_ *world, _ *peerState, _, _ *fakeConn, _, ls *connState) { ls.requests++ },
		"it has taken it back": func(_ *world, _ *peerState, _, _ *fakeConn, _, ls *connState) { ls.drain.off() },
		"a stream moves": func(_ *world, d *peerState, _, _ *fakeConn, ws, ls *connState) {
			d.moving = map[network.Stream]motion{&fakeStream{}: {ls, ws}}
		},
		"the winner is closed": func(_ *world, _ *peerState, winner, _ *fakeConn, _, _ *connState) {
			winner.set(func() { winner.closed = true })
		},
		"the loser is closed": func(_ *world, _ *peerState, _, loser *fakeConn, _, _ *connState) {
			loser.set(func() { loser.closed = true })
		},
		"the winner is silent": func(_ *world, _ *peerState, _, _ *fakeConn, ws, _ *connState) { ws.path.miss(true) },
		"it is not known":      func(_ *world, _ *peerState, _, _ *fakeConn, ws, _ *connState) { ws.path.miss(false) },
		"the winner is to go": func(_ *world, _ *peerState, _, _ *fakeConn, ws, _ *connState) {
			ws.pledged = time.Now().Add(time.Minute)
		},
		"the winner is going":   func(_ *world, _ *peerState, _, _ *fakeConn, ws, _ *connState) { ws.closing = true },
		"the manager is closed": func(w *world, _ *peerState, _, _ *fakeConn, _, _ *connState) { w.m.tasks.refuse() },
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, higher)
				winner, loser := w.connect(quicAddr), w.connect(tcpAddr)
				w.pass(2 * defaultSettleDelay)
				w.m.sched.mu.Lock()
				d := w.m.sched.peers[higher]
				w.m.sched.mu.Unlock()
				v := w.m.looks.look(higher, d)
				p := decide(w.m.cfg, w.m.policies.of(d), &v.facts)
				require.True(t, p.decided)
				ws, ls := v.conns[0].connState, v.conns[1].connState
				require.Equal(t, winner.id, ws.base.ID)
				if change != nil {
					change(w, d, winner, loser, ws, ls)
				}
				require.Equal(t, change == nil, w.m.rounds.close.claim(d, v, &p, 1))
				require.Equal(t, change == nil, ls.closing, "from here on it counts for nothing")
			})
		})
	}
}

// D3: a stream that is opened and closed here while the winner is asked is seen by no look,
// and what came of it the peer may not have read.
func TestStreamDuringTheLastPing(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher, WithPolicy(policy.Chain(policy.TransportOrder())))
		var mu sync.Mutex // guards what follows
		var winner, loser *fakeConn
		pings := 0
		probe := w.m.paths.probe
		w.m.paths.probe = func(ctx context.Context, c network.Conn, full bool, put func()) (time.Duration, error) {
			mu.Lock()
			if c == network.Conn(winner) && w.agreed(loser) && pings == 0 {
				pings++
				loser.set(func() { loser.unread = 1 })
			}
			mu.Unlock()
			return probe(ctx, c, full, put)
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
		w.pass(defaultInterval + time.Second)
		require.True(t, loser.pruned())
	})
}

// agreed says whether the peer has answered that it has done with c.
func (w *world) agreed(c *fakeConn) bool {
	w.m.sched.mu.Lock()
	defer w.m.sched.mu.Unlock()
	d := w.m.sched.peers[w.peer]
	if d == nil {
		return false
	}
	cs := d.state(c)
	return cs != nil && cs.drain.phase == drainAgreed
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
