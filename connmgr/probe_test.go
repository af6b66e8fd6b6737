package connmgr

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/policy"
)

// What is known of a path, step by step.
func TestPathStates(t *testing.T) {
	t0 := time.Now()
	at := func(s int) time.Time { return t0.Add(time.Duration(s) * time.Second) }
	for name, c := range map[string]struct {
		steps func(p *path)
		want  path
	}{
		"not asked": {func(*path) {}, path{}},
		"asked":     {func(p *path) { p.ask(at(1)) }, path{asked: at(1), asking: true}},
		"answered": {func(p *path) {
			p.ask(at(1))
			p.hear(at(1))
			p.end()
		}, path{health: pathAlive, at: at(1), asked: at(1)}},
		"answered again": {func(p *path) {
			p.ask(at(1))
			p.hear(at(1))
			p.end()
			p.ask(at(5))
			p.hear(at(5))
			p.end()
		}, path{health: pathAlive, at: at(5), asked: at(5)}},
		"carried nothing large": {func(p *path) {
			p.ask(at(1))
			p.hear(at(1))
			p.carried(false)
			p.end()
		}, path{health: pathAlive, at: at(1), asked: at(1), denied: 1}},
		"carried it then": {func(p *path) {
			p.carried(false)
			p.carried(true)
		}, path{wide: true}},
		"put, and nothing came": {func(p *path) {
			p.ask(at(1))
			p.miss(true)
		}, path{health: pathSilent, since: at(1), asked: at(1), lost: at(1), asking: true, tries: 1}},
		"not put": {func(p *path) {
			p.ask(at(1))
			p.miss(false)
		}, path{health: pathUnknown, asked: at(1), lost: at(1), asking: true, tries: 1}},
		"a late answer": {func(p *path) {
			p.ask(at(1))
			p.miss(true)
			p.hear(at(1))
			p.end()
		}, path{health: pathAlive, at: at(1), since: at(1), asked: at(1)}},
		"silent after it was alive": {func(p *path) {
			p.ask(at(1))
			p.hear(at(1))
			p.end()
			p.ask(at(5))
			p.miss(true)
			p.end()
		}, path{health: pathSilent, at: at(1), since: at(5), asked: at(5), lost: at(5), tries: 1}},
		"and alive again": {func(p *path) {
			p.ask(at(1))
			p.hear(at(1))
			p.end()
			p.ask(at(5))
			p.miss(true)
			p.end()
			p.ask(at(9))
			p.hear(at(9))
			p.end()
		}, path{health: pathAlive, at: at(9), since: at(9), asked: at(9)}},
		"alive after a question that could not be put": {func(p *path) {
			p.ask(at(1))
			p.miss(true)
			p.end()
			p.ask(at(5))
			p.miss(false)
			p.end()
			p.ask(at(9))
			p.hear(at(9))
			p.end()
		}, path{health: pathAlive, at: at(9), since: at(1), asked: at(9)}},
		"older evidence makes it no older": {func(p *path) {
			p.ask(at(5))
			p.hear(at(5))
			p.hear(at(1))
			p.end()
		}, path{health: pathAlive, at: at(5), asked: at(5)}},
	} {
		t.Run(name, func(t *testing.T) {
			var p path
			c.steps(&p)
			require.Equal(t, c.want, p)
		})
	}
}

func TestEvidence(t *testing.T) {
	for name, c := range map[string]struct {
		before, after traffic
		heard         bool
	}{
		"nothing":                            {traffic{}, traffic{}, false},
		"a Write that QUIC's probes took":    {traffic{packets: 7, blocked: true}, traffic{packets: 7, freed: 1}, false},
		"bytes that had come before":         {traffic{packets: 7, received: 7}, traffic{packets: 7, received: 8}, false},
		"packets":                            {traffic{packets: 7}, traffic{packets: 8}, true},
		"bytes of a labelled stream":         {traffic{received: 7}, traffic{received: 8}, true},
		"sent, which says nothing":           {traffic{sent: 7}, traffic{sent: 8}, false},
		"a blocked Write went on":            {traffic{sent: 7, blocked: true}, traffic{sent: 8, freed: 1}, true},
		"it did, and streams have come":      {traffic{sent: 7, blocked: true, of: 1}, traffic{sent: 8, freed: 1, of: 2}, true},
		"another Write did":                  {traffic{sent: 7, blocked: true, freed: 1}, traffic{sent: 8, blocked: true, freed: 1}, false},
		"a blocked Write is blocked still":   {traffic{sent: 7, blocked: true}, traffic{sent: 7, blocked: true}, false},
		"fewer streams than before":          {traffic{received: 7, sent: 7}, traffic{}, false},
		"a Write is blocked that was not so": {traffic{sent: 7}, traffic{sent: 8, blocked: true}, false},
	} {
		t.Run(name, func(t *testing.T) { require.Equal(t, c.heard, c.before.heard(c.after)) })
	}
}

// The three outcomes of a question, and who loses to whom.
func TestOutcomes(t *testing.T) {
	for name, c := range map[string]struct {
		path func(w *world, c *fakeConn) // of the older connection
		want health                      // in time
		late health                      // a second later
	}{
		"answered":                       {func(*world, *fakeConn) {}, pathAlive, pathAlive},
		"no stream is to be had":         {func(_ *world, c *fakeConn) { c.full = network.ErrResourceLimitExceeded }, pathUnknown, pathUnknown},
		"a Write does not return":        {func(_ *world, c *fakeConn) { c.stuck = true }, pathUnknown, pathUnknown},
		"nothing comes":                  {func(_ *world, c *fakeConn) { c.silent = true }, pathSilent, pathSilent},
		"a late answer":                  {func(_ *world, c *fakeConn) { c.delay = defaultProbeTime + time.Second }, pathSilent, pathAlive},
		"something else comes meanwhile": {func(w *world, c *fakeConn) { c.silent = true; w.trickle(c) }, pathAlive, pathAlive},
		"full, and something comes":      {func(w *world, c *fakeConn) { c.stuck = true; w.trickle(c) }, pathAlive, pathAlive},
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, higher)
				older := w.connect(quicAddr)
				older.setPlain(1)
				w.pass(time.Minute)
				older.set(func() { c.path(w, older) })
				newer := w.connect(tcpAddr) // which ranks lower
				newer.setPlain(1)
				health := func() string {
					for _, e := range w.m.Explain(higher).Conns {
						if e.Conn.ID == older.id {
							return e.Path
						}
					}
					return "gone"
				}
				w.pass(defaultProbeTime + minRoundGap)
				require.Equal(t, c.want.String(), health())
				want := newer.id
				if c.want == pathAlive {
					want = older.id
				}
				w.pass(minRoundGap)
				require.Equal(t, want, w.steered(), "what could not be asked loses to a newer one that answers, as what is silent")
				w.pass(time.Second - minRoundGap)
				require.Equal(t, c.late.String(), health())
				w.pass(time.Minute)
				require.Equal(t, want, w.steered(), "that is final")
				require.False(t, older.IsClosed() || newer.IsClosed())
				require.Equal(t, c.want == pathSilent, w.logs.FilterMessageSnippet("quic direct does not answer").Len() > 0)
			})
		})
	}
}

// trickle has labelled streams on c receive a byte each second. It must be called with c.mu
// held.
func (w *world) trickle(c *fakeConn) {
	go func() {
		for {
			select {
			case <-time.After(time.Second):
				c.set(func() { c.moved.received++ })
			case <-w.net.done:
				return
			}
		}
	}()
}

// What could not be asked loses to nothing that is older, and a direct one to no relayed one.
func TestUnknownPathKeepsItsPlace(t *testing.T) {
	full := errors.New("no stream is to be had")
	t.Run("against an older one", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			tcp := w.connect(tcpAddr)
			tcp.open(1)
			w.pass(time.Minute)
			quic := w.connect(quicAddr)
			quic.set(func() { quic.full = full })
			w.pass(time.Hour)
			require.Empty(t, w.mover.made())
			require.False(t, tcp.IsClosed() || quic.IsClosed())
			require.Contains(t, w.m.Explain(higher).State, "it is not known whether quic direct works")
		})
	})
	t.Run("a direct one against a relay", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			direct := w.connect(quicAddr)
			direct.open(1)
			direct.set(func() { direct.full = full })
			w.pass(time.Minute)
			relay := w.net.connect(higher, relayAddr, false)
			w.pass(time.Hour)
			require.Empty(t, w.mover.made())
			require.False(t, direct.IsClosed() || relay.IsClosed())
		})
	})
	t.Run("all of them", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			for _, addr := range []string{quicAddr, tcpAddr, quicAddr} {
				c := w.connect(addr)
				c.open(1)
				c.set(func() { c.full = full })
			}
			w.pass(time.Hour)
			require.Empty(t, w.mover.made())
			require.Len(t, w.net.ConnsToPeer(higher), 3)
			require.Empty(t, w.steered())
		})
	})
}

// Nothing is closed for a connection that stopped to answer, however it looks by then.
func TestNothingIsClosedForAWinnerOfOld(t *testing.T) {
	for name, stop := range map[string]func(c *fakeConn){
		"silent":   func(c *fakeConn) { c.silent = true },
		"stuck":    func(c *fakeConn) { c.stuck = true },
		"no room":  func(c *fakeConn) { c.full = network.ErrResourceLimitExceeded },
		"delaying": func(c *fakeConn) { c.delay = time.Minute },
	} {
		t.Run(name, func(t *testing.T) {
			const before = time.Second
			for at := time.Duration(0); at < defaultProof/directProofShare-before; at += 290 * time.Millisecond {
				inVirtualTime(t, func(t *testing.T) {
					w := newWorld(t, higher)
					quic := w.connect(quicAddr)
					w.pass(before)
					tcp := w.connect(tcpAddr)
					w.pass(at)
					quic.set(func() { stop(quic) })
					w.pass(5 * time.Minute)
					require.False(t, tcp.IsClosed(), "from %v on", at)
				})
			}
		})
	}
}

// All connections are asked at once, and nobody waits for the answers in a round.
func TestAllAreAskedAtOnce(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher, WithConcurrency(1))
		var conns []*fakeConn
		for range 20 {
			c := w.connect(quicAddr)
			c.set(func() { c.silent, c.plain = true, 1 })
			conns = append(conns, c)
		}
		w.pass(time.Millisecond)
		for _, c := range conns {
			require.Len(t, c.pipes(), 1)
		}
		other := higher + "2"
		w.net.identify(other, DrainID)
		w.net.connect(other, relayAddr, true).open(1)
		direct := w.net.connect(other, quicAddr, false)
		w.pass(fastSettle + rtt)
		require.Equal(t, 1, direct.count(), "another peer has its round meanwhile")
	})
}

// The first question is more than a packet, but on what a relay counts.
func TestQuestionsAreLarge(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		var mu sync.Mutex
		asked := make(map[*fakeConn][]bool)
		w.m.paths.greet = nil
		w.m.paths.probe = func(_ context.Context, c network.Conn, full bool, put func()) (time.Duration, error) {
			put()
			mu.Lock()
			defer mu.Unlock()
			fc := c.(*fakeConn)
			asked[fc] = append(asked[fc], full)
			return rtt, nil
		}
		relay := w.connectLimited()
		w.pass(time.Millisecond)
		direct := w.connect(quicAddr)
		relay.setPlain(1)
		direct.setPlain(1)
		w.pass(time.Minute)
		mu.Lock()
		defer mu.Unlock()
		require.NotContains(t, asked[relay], true)
		require.Greater(t, len(asked[direct]), 2)
		require.Equal(t, []bool{false, true}, asked[direct][:2], "with more than a packet once it has answered")
		require.NotContains(t, asked[direct][2:], true, "once it has carried that, a packet is enough")
	})
}

// Resource limits may allow few streams of a peer at a time, and both ends ask all connections at
// once: a question for which there was no room, at either end, is put again soon.
func TestRefusedQuestionsArePutAgain(t *testing.T) {
	for name, refusal := range map[string]error{
		"by this end": fmt.Errorf("open: %w", network.ErrResourceLimitExceeded),
		"by the peer": &network.StreamError{ErrorCode: network.StreamResourceLimitExceeded, Remote: true},
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, higher)
				var mu sync.Mutex
				refusals := make(map[bool]int) // of the questions that are large, and of the others
				w.m.paths.greet = nil
				w.m.paths.probe = func(_ context.Context, c network.Conn, full bool, put func()) (time.Duration, error) {
					mu.Lock()
					defer mu.Unlock()
					if refusals[full] < 2 {
						refusals[full]++
						return 0, refusal
					}
					put()
					return rtt, nil
				}
				relay := w.connectLimited()
				relay.open(1)
				w.pass(10 * time.Second)
				mu.Lock()
				clear(refusals)
				mu.Unlock()
				direct := w.connect(quicAddr)
				w.pass(time.Second)
				require.Len(t, w.mover.made(), 1, "after two refusals of each question")
				require.Equal(t, direct.id, w.steered())
			})
		})
	}
}

// A peer that reconnects before the old connection is noticed to be dead.
func TestDeadConnectionDoesNotWin(t *testing.T) {
	for name, opts := range map[string][]Option{
		"by the default policy":                    nil, // for which round-trip times are measured first
		"by one that asks for no round-trip times": {WithPolicy(policy.Chain(policy.TransportOrder()))},
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, higher, opts...)
				dead := w.connect(quicAddr)
				streams := dead.open(2)
				dead.set(func() { dead.silent = true })
				w.pass(time.Minute)
				alive := w.connect(tcpAddr) // which ranks lower
				w.pass(defaultProbeTime + 2*minRoundGap + rtt)
				require.Equal(t, alive.id, w.steered())
				require.Equal(t, 1, w.logs.FilterMessageSnippet("quic direct does not answer").Len())
				require.Equal(t, 2, alive.count(), "its streams move to the one that works")
				require.Equal(t, network.Conn(alive), streams[0].Conn())
				w.pass(time.Hour)
				require.False(t, alive.IsClosed())
			})
		})
	}
}

// The same with a thousand peers at once, as when this side's network has changed.
func TestMassReconnect(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		const peers = 1_000
		w := newWorld(t, higher)
		streams := make([]*fakeStream, peers)
		newer := make([]*fakeConn, peers)
		for i := range peers {
			p := peer.ID(fmt.Sprintf("peer z%d", i))
			w.net.identify(p, DrainID)
			dead := w.net.connect(p, quicAddr, false)
			dead.set(func() { dead.silent = true })
			streams[i] = dead.open(1)[0]
		}
		w.pass(time.Minute)
		for i := range peers {
			newer[i] = w.net.connect(streams[i].Conn().RemotePeer(), quicAddr, false)
		}
		w.pass(defaultProbeTime + 3*time.Second)
		for i := range peers {
			require.Equal(t, network.Conn(newer[i]), streams[i].Conn(), "peer %d", i)
		}
	})
}

func TestConnectionThatAnswersAgainMayWin(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		quic := w.connect(quicAddr)
		quic.set(func() { quic.silent = true })
		quic.setPlain(1)
		w.pass(time.Minute)
		w.connect(tcpAddr).setPlain(1)
		w.pass(defaultSettleDelay + defaultProbeTime)
		e := w.m.Explain(higher)
		require.Contains(t, e.Conns[1].State, "it does not answer")
		quic.set(func() { quic.silent = false })
		w.pass(maxReprobe + (patienceIntervals+1)*defaultInterval)
		require.Equal(t, quic.id, w.steered(), "it ranks higher")
	})
}

func TestNothingIsDoneWhereNoConnectionAnswers(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		quic := w.connect(quicAddr)
		quic.set(func() { quic.silent = true })
		tcp := w.connect(tcpAddr)
		tcp.set(func() { tcp.silent = true })
		tcp.open(1)
		w.pass(time.Hour)
		require.False(t, quic.IsClosed() || tcp.IsClosed())
		require.Empty(t, w.mover.made())
		require.Empty(t, w.steered(), "the swarm chooses")
		_, err := w.m.Consolidate(t.Context(), higher)
		require.ErrorIs(t, err, errSilent)
	})
}

// Connections whose transport measures no round-trip time are pinged if the policy looks at
// it.
func TestRoundTripTimes(t *testing.T) {
	pings := func(t *testing.T, policy policy.Policy, took func(*fakeConn) time.Duration) (w *world, pinged func() map[*fakeConn]int) {
		w = newWorld(t, higher, WithPolicy(policy))
		var mu sync.Mutex
		counts := make(map[*fakeConn]int)
		pinged = func() map[*fakeConn]int {
			mu.Lock()
			defer mu.Unlock()
			return maps.Clone(counts)
		}
		w.m.paths.greet = nil
		w.m.paths.probe = func(_ context.Context, c network.Conn, _ bool, put func()) (time.Duration, error) {
			put()
			fc := c.(*fakeConn)
			time.Sleep(took(fc))
			mu.Lock()
			defer mu.Unlock()
			counts[fc]++
			return took(fc), nil
		}
		return w, pinged
	}
	t.Run("decide", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w, _ := pings(t, policy.Chain(policy.RTTBand()), func(c *fakeConn) time.Duration {
				return time.Duration(len(c.addr.Protocols())) * 50 * time.Millisecond // TCP has the shorter address
			})
			w.connect(quicAddr).setPlain(1)
			tcp := w.connect(tcpAddr)
			w.pass(defaultSettleDelay + minRoundGap)
			require.Equal(t, tcp.id, w.steered())
			require.Contains(t, w.m.Explain(higher).String(), "rtt")
		})
	})
	t.Run("at a bounded rate", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w, pinged := pings(t, policy.Chain(policy.RTTBand()), func(*fakeConn) time.Duration { return rtt })
			quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
			quic.setPlain(1)
			tcp.setPlain(1)
			w.pass(time.Hour)
			require.Len(t, pinged(), 2, "all of them")
			for _, n := range pinged() {
				require.LessOrEqual(t, n, int(time.Hour/useProbe)+5)
				require.Positive(t, n)
			}
		})
	})
}

func TestRoundTripTimesOfAllOrNone(t *testing.T) {
	v := view{conns: []connView{{connState: &connState{rtt: 7}}, {connState: &connState{}}, {connState: &connState{rtt: 9}}}}
	for i := range v.conns {
		v.conns[i].facts = new(connFacts)
	}
	v.measure([]time.Duration{5, 0, 0})
	for i := range v.conns {
		require.Zero(t, v.conns[i].facts.candidate.RTT)
	}
	v.measure([]time.Duration{5, 6, 0})
	for i, want := range []time.Duration{5, 6, 9} {
		require.Equal(t, want, v.conns[i].facts.candidate.RTT)
	}
}

func TestPingsAreSmoothed(t *testing.T) {
	var cs connState
	cs.pinged(800)
	cs.pinged(1600)
	require.Equal(t, time.Duration(900), cs.rtt, "an eighth of the new one, RFC 6298")
	var none connState
	none.pinged(0)
	require.NotZero(t, none.rtt, "zero would mean that it is not known")
}

func TestInterfaces(t *testing.T) {
	var in interfaces
	now := time.Now()
	require.NotEmpty(t, in.of(ma.StringCast("/ip4/127.0.0.1/tcp/1"), now))
	require.Empty(t, in.of(ma.StringCast("/ip4/203.0.113.7/tcp/1"), now), "an address that this machine does not have")
	require.Empty(t, in.of(nil, now))
	require.Empty(t, in.of(ma.StringCast("/dns4/example.com/tcp/1"), now))
}

// That a connection does not answer is told once, however often it is asked again.
func TestSilenceIsToldOnce(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		w.connect(quicAddr)
		dead := w.connect(tcpAddr)
		dead.setPlain(1)
		dead.set(func() { dead.silent = true })
		w.pass(10 * time.Minute)
		require.Len(t, w.logs.FilterMessageSnippet("tcp direct does not answer").All(), 1)
	})
}
