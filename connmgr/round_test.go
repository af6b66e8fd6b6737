package connmgr

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"github.com/go-portage/portage/migrate"
	"github.com/go-portage/portage/policy"
)

func TestStreamsMoveToTheWinnerAndTheLoserIsClosed(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		relay := w.connectLimited()
		relay.open(14)
		direct := w.connect(quicAddr)
		direct.open(1)

		w.pass(time.Minute)
		require.Equal(t, 15, direct.count(), "every stream is on the winner")
		require.Equal(t, 14, w.mover.most, "all streams of a loser move at once, not one after the other")
		require.True(t, relay.pruned(), "the loser is closed, with ConnSupplanted")
		require.False(t, direct.IsClosed(), "the winner stays")
		require.Equal(t, []string{
			"peer " + shortID(higher) + ": moved 14 streams from limited relay to quic direct (rule unlimited: true over false) in 100 ms",
			"peer " + shortID(higher) + ": kept quic direct, dropped limited relay (rule unlimited: true over false), 14 streams moved in 100 ms",
		}, w.messages())
		require.Empty(t, w.m.sched.peers, "a peer with one connection is forgotten")
		require.Nil(t, w.m.steer.choose(t.Context(), higher), "and its streams are not steered")
	})
}

func TestDroppedLogHasEverythingInFields(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		w.connect(tcpAddr).open(3)
		w.connect(quicAddr)
		w.pass(time.Minute)
		entry := w.logs.FilterMessageSnippet("dropped").All()
		require.Len(t, entry, 1)
		fields := entry[0].ContextMap()
		delete(fields, "peer")
		require.Equal(t, map[string]any{
			"winner":        "quic direct " + quicAddr + " (conn-2)",
			"loser":         "tcp direct " + tcpAddr + " (conn-1)",
			"rule":          "transport",
			"winner_value":  "quic",
			"loser_value":   "tcp",
			"streams_moved": int64(3),
			"took":          rtt,
		}, fields)
	})
}

func TestStreamsOfAllLosersMoveAtOnce(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		w.connectLimited().open(3)
		w.connect(tcpAddr).open(4)
		direct := w.connect(quicAddr)
		w.pass(defaultSettleDelay + rtt + 2*minRoundGap)
		require.Equal(t, 7, direct.count())
		require.Equal(t, 7, w.mover.most)
	})
}

func TestLimitedConnections(t *testing.T) {
	// To the likings of this policy, what can be cut at any moment comes first.
	limitedFirst := policy.Chain(notRule{policy.Unlimited()})
	t.Run("never from unlimited to limited", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher, WithPolicy(limitedFirst))
			direct := w.connect(quicAddr)
			direct.open(2)
			empty := w.connect(tcpAddr)
			relay := w.connectLimited()
			w.pass(time.Hour)
			require.Empty(t, w.mover.made(), "no stream moves from an unlimited connection to a limited one")
			require.False(t, direct.IsClosed() || empty.IsClosed(), "nor is an unlimited one closed in favour of it")
			require.False(t, relay.IsClosed())

			report, err := w.m.Consolidate(t.Context(), higher)
			require.NoError(t, err)
			require.Equal(t, "it is unlimited, and the winner is not", report.Losers[0].Kept)
			require.Empty(t, w.mover.made(), "not even when asked to consolidate")
		})
	})
	t.Run("not from limited to limited", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher, WithPolicy(policy.Chain(policy.Older())))
			first := w.connectLimited()
			w.pass(time.Millisecond)
			second := w.connectLimited()
			second.open(1)
			w.pass(time.Hour)
			require.Empty(t, w.mover.made(), "each has a budget of its own")
			require.False(t, first.IsClosed() || second.IsClosed())
			require.Zero(t, first.timesAsked()+second.timesAsked())
			require.Contains(t, w.m.Explain(higher).State, "only limited connections")
		})
	})
	t.Run("from limited to unlimited", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			w.connectLimited().open(1)
			w.connect(quicAddr)
			w.pass(fastSettle + rtt)
			require.False(t, w.mover.made()[0].limited, "network.WithAllowLimitedConn only where it is needed")
		})
	})
}

// notRule is a rule the other way round.
type notRule struct{ policy.Rule }

func (r notRule) Compare(a, b policy.Candidate) int { return r.Rule.Compare(b, a) }

func TestDeniedStreamIsPinned(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		relay := w.connectLimited()
		streams := relay.open(2)
		direct := w.connect(quicAddr)
		w.mover.setAnswer(func(s *fakeStream) error {
			if s == streams[0] {
				return errDeniedByFake
			}
			return nil
		})
		w.pass(time.Hour)
		require.Len(t, w.mover.callTimes(streams[0], time.Now()), 1, "a denied stream is not tried again")
		require.Equal(t, 1, direct.count(), "the other one moves")
		require.False(t, relay.IsClosed(), "the connection stays for the denied one")
		require.Contains(t, w.m.Explain(higher).String(), "kept until 1 stream that cannot move (1 of /test/labelled/1.0.0, denied by the peer) has ended")
		require.Equal(t, 1, w.m.Explain(higher).Conns[1].Candidate.Pinned, "as the policy is told")

		w.connect(tcpAddr)
		w.pass(time.Minute)
		require.Len(t, w.mover.callTimes(streams[0], time.Now()), 1, "not for another connection either")

		relay.remove(streams[0])
		w.pass(time.Minute)
		require.True(t, relay.pruned(), "once it has ended, the connection goes")
	})
}

func TestFailedMigrationIsRetriedWithBackoff(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		// With a short interval there are many rounds that have to leave the stream
		// alone.
		w := newWorld(t, higher, WithRetry(time.Second, 5*time.Second), WithInterval(200*time.Millisecond))
		relay := w.connectLimited()
		s := relay.open(1)[0]
		w.mover.setAnswer(func(*fakeStream) error { return errFakeReset })
		start := time.Now()
		direct := w.connect(quicAddr)
		w.pass(20 * time.Second)
		times := w.mover.callTimes(s, start)
		require.Len(t, times, 6)
		for i, want := range []time.Duration{
			fastSettle,
			1200 * time.Millisecond,  // + rtt + 1 s
			3300 * time.Millisecond,  // + rtt + 2 s
			7400 * time.Millisecond,  // + rtt + 4 s
			12500 * time.Millisecond, // + rtt + 5 s, the limit
			17600 * time.Millisecond,
		} {
			late := time.Duration(i+1) * 2 * minRoundGap
			require.GreaterOrEqual(t, times[i], want)
			require.LessOrEqual(t, times[i], want+late)
		}
		require.False(t, relay.IsClosed(), "nothing is closed under a stream")

		other := w.connect(tcpAddr)
		w.pass(defaultSettleDelay + 2*minRoundGap)
		require.Len(t, w.mover.callTimes(s, start), 7, "another connection starts over")
		other.Close()

		w.mover.setAnswer(nil)
		w.pass(time.Minute)
		require.Equal(t, 1, direct.count())
		require.True(t, relay.pruned())
	})
}

func TestWhatWasInTheWayIsTriedAgainAfterTheOthers(t *testing.T) {
	for name, obstacle := range map[string]error{
		"try later":            migrate.ErrTryLater,
		"our resource limit":   fmt.Errorf("opening: %w", network.ErrResourceLimitExceeded),
		"their resource limit": &network.StreamError{ErrorCode: network.StreamResourceLimitExceeded, Remote: true},
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, higher)
				relay := w.connectLimited()
				streams := relay.open(3)
				refused := 0
				w.mover.setAnswer(func(s *fakeStream) error {
					if s == streams[1] && refused == 0 {
						refused++
						return obstacle
					}
					return nil
				})
				direct := w.connect(quicAddr)
				start := time.Now()
				w.pass(fastSettle + 2*rtt)
				require.Equal(t, 3, direct.count(), "in the same round")
				require.Equal(t, []time.Duration{fastSettle, fastSettle + rtt},
					w.mover.callTimes(streams[1], start), "right after the others")
			})
		})
	}
	t.Run("but not at once if there are no others", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			s := w.connectLimited().open(1)[0]
			w.mover.setAnswer(func(*fakeStream) error { return migrate.ErrTryLater })
			start := time.Now()
			w.connect(quicAddr)
			w.pass(3 * time.Second)
			times := w.mover.callTimes(s, start)
			require.Len(t, times, 2)
			require.GreaterOrEqual(t, times[1], fastSettle+rtt+defaultFirstRetry)
			require.LessOrEqual(t, times[1], fastSettle+rtt+defaultFirstRetry+2*minRoundGap)
		})
	})
}

func TestWinnerThatDiesDuringARound(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		relay := w.connectLimited()
		relay.open(5)
		tcp := w.connect(tcpAddr)
		quic := w.connect(quicAddr)
		w.pass(defaultSettleDelay + rtt/2)
		require.Len(t, w.mover.made(), 5, "they move")
		quic.Close()
		w.pass(rtt)
		require.False(t, relay.IsClosed() || tcp.IsClosed(), "nothing else is closed")
		w.pass(rtt + placeTime + 4*minRoundGap)
		require.Equal(t, 5, tcp.count(), "the next best wins, without waiting for backoff")
		w.pass(time.Minute)
		require.True(t, relay.pruned())
		require.False(t, tcp.IsClosed())
	})
}

func TestLoserThatDiesDuringARound(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		relay := w.connectLimited()
		relay.open(5)
		direct := w.connect(quicAddr)
		w.mover.setAnswer(func(*fakeStream) error { return migrate.ErrClosed })
		w.pass(fastSettle + rtt/2)
		relay.Close()
		w.pass(time.Minute)
		require.False(t, direct.IsClosed())
		require.Len(t, w.mover.made(), 5)
		require.Empty(t, w.m.sched.peers)
	})
}

func TestStreamsThatAppearLaterMoveToo(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		relay := w.connectLimited()
		relay.setPlain(1)
		direct := w.connect(quicAddr)
		w.pass(time.Minute)
		relay.open(1)
		w.pass(defaultInterval + rtt + minRoundGap)
		require.Equal(t, 1, direct.count())
	})
}

func TestRoundDoesNotWaitForAStream(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher, WithConcurrency(1))
		relay := w.connectLimited()
		streams := relay.open(2)
		direct := w.connect(quicAddr)
		end := make(chan struct{})
		w.mover.setAnswer(func(s *fakeStream) error {
			if s == streams[0] {
				<-end
			}
			return nil
		})
		w.pass(fastSettle + rtt)
		require.Equal(t, 1, direct.count())

		other := peer.ID("peer zz")
		w.net.identify(other, DrainID)
		w.net.connect(other, tcpAddr, false).open(1)
		otherQUIC := w.net.connect(other, quicAddr, false)
		w.pass(defaultSettleDelay + rtt + 4*minRoundGap)
		require.Equal(t, 1, otherQUIC.count(), "the next peer has its turn")
		w.pass(moveWait + 2*defaultInterval)
		require.Len(t, w.mover.callTimes(streams[0], time.Now()), 1, "a migration under way is not started again")
		require.Equal(t, 1, w.logs.FilterMessageSnippet("1 still moving").Len(), "it is told as it is")

		relay.remove(streams[0]) // as if its old underlying stream were gone, but not the migration over
		w.pass(time.Minute)
		require.False(t, relay.IsClosed(), "nothing is closed while a migration touches it")
		relay.add(streams[0])
		close(end)
		w.pass(time.Minute)
		require.Equal(t, 2, direct.count())
		require.True(t, relay.pruned())
	})
}

// There is no more moved than the winner has room for, and some room is left for new streams.
func TestRoomOnTheWinner(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		tcp := w.connect(tcpAddr)
		tcp.open(300)
		quic := w.connect(quicAddr)
		own := quic.open(50)
		w.pass(defaultSettleDelay + 2*rtt)
		require.Equal(t, quicStreams-headroom, quic.count())
		require.Contains(t, w.m.Explain(higher).Conns[1].State, "when the winner has room for more")
		w.pass(time.Minute)
		require.Equal(t, quicStreams-headroom, quic.count())
		require.False(t, tcp.IsClosed())
		for _, s := range own {
			quic.remove(s)
		}
		w.pass(2*defaultInterval + rtt)
		require.Equal(t, quicStreams-headroom, quic.count(), "as there is room")
	})
}

func TestPassingWinnersDoNotMoveStreams(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		first := w.connect(quicAddr)
		first.open(3)
		first.setPlain(2)
		second := w.connect(quicAddr)
		second.setPlain(1) // lest it be closed meanwhile
		w.pass(2 * time.Second)
		require.Empty(t, w.mover.made())
		w.pass(defaultInterval)
		second.setPlain(9) // ranks first now: it has more pinned streams
		w.pass(2*defaultInterval - time.Second)
		second.setPlain(1)
		w.pass(2 * time.Second)
		require.Empty(t, w.mover.made(), "a winner for a moment is none")
		require.False(t, second.IsClosed())
		second.setPlain(9)
		w.pass(4 * defaultInterval)
		require.Equal(t, 3, second.count(), "one that lasts is")
	})
}

func TestPeerThatDoesNotMigrate(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		w.mover.setSupports(false)
		w.net.identify(higher)
		tcp := w.connect(tcpAddr)
		tcp.open(2) // the network counts them, but there is no moving them
		quic := w.connect(quicAddr)
		w.pass(time.Hour)
		require.Empty(t, w.mover.made())
		require.False(t, tcp.IsClosed() || quic.IsClosed())
		require.Equal(t, 2, w.m.Explain(higher).Conns[1].Candidate.Pinned)
	})
}

// A policy is a program's own code. What it does wrong is told once, and harms nobody but the
// peer that it ranks: nothing is done about that one, and the others go on.
func TestPolicyThatDoesWrong(t *testing.T) {
	for name, c := range map[string]struct {
		rank func(candidates []policy.Candidate) policy.Ranking
		err  error
	}{
		"names nothing": {func([]policy.Candidate) policy.Ranking { return policy.Ranking{} }, errNoWinner},
		"names another": {func(c []policy.Candidate) policy.Ranking {
			c[0].ID = "another"
			return policy.Ranking{Order: c}
		}, errNoWinner},
		"panics": {func([]policy.Candidate) policy.Ranking { panic("no idea") }, errPanic},
		"blocks": {func([]policy.Candidate) policy.Ranking { time.Sleep(time.Hour); return policy.Ranking{} }, errStuck},
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, higher, WithPolicy(&wrongPolicy{good: policy.Default(), wrong: c.rank}))
				relay, direct := w.connectLimited(), w.connect(quicAddr)
				relay.open(1)
				relay.opened = relay.opened.Add(-time.Hour) // by which the policy knows it
				other := higher + "2"
				w.net.identify(other, DrainID)
				w.net.connect(other, relayAddr, true).open(1)
				theirs := w.net.connect(other, quicAddr, false)
				w.pass(time.Minute)
				require.Equal(t, 1, theirs.count(), "another peer goes on")
				require.Len(t, w.net.ConnsToPeer(other), 1)
				require.False(t, relay.IsClosed() || direct.IsClosed())
				require.Equal(t, 1, relay.count())
				require.Empty(t, w.steered())
				require.Equal(t, 1, w.logs.FilterLevelExact(zap.ErrorLevel).Len(), "said once, not every time")
				require.Contains(t, w.m.Explain(higher).State, "policy")
				_, err := w.m.Consolidate(t.Context(), higher)
				require.ErrorIs(t, err, c.err)
				require.NoError(t, w.m.SetPolicy(policy.Default()))
				w.pass(2 * time.Hour)
				require.Equal(t, 1, direct.count(), "with another policy")
			})
		})
	}
}

// wrongPolicy does wrong for a peer with a connection that is older than an hour.
type wrongPolicy struct {
	good  policy.Policy
	wrong func([]policy.Candidate) policy.Ranking
}

func (*wrongPolicy) String() string { return "wrong" }

func (p *wrongPolicy) Rank(candidates []policy.Candidate) policy.Ranking {
	for _, c := range candidates {
		if c.Age >= time.Hour {
			return p.wrong(candidates)
		}
	}
	return p.good.Rank(candidates)
}

// A policy that likes another connection each time moves nothing to and fro.
func TestPolicyThatChangesItsMind(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher, WithPolicy(&fickle{}))
		quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
		s := quic.open(1)[0]
		quic.setPlain(1)
		tcp.setPlain(1)
		w.pass(time.Hour)
		require.LessOrEqual(t, len(w.mover.callTimes(s, time.Now())), int(time.Hour/(patienceIntervals*defaultInterval)))
		require.False(t, quic.IsClosed() || tcp.IsClosed())
	})
}

type fickle struct{ turn atomic.Int32 }

func (*fickle) String() string { return "fickle" }

func (p *fickle) Rank(candidates []policy.Candidate) policy.Ranking {
	slices.SortFunc(candidates, func(a, b policy.Candidate) int { return cmp.Compare(a.ID, b.ID) })
	if p.turn.Add(1)%2 == 0 {
		slices.Reverse(candidates)
	}
	return policy.Ranking{Order: candidates}
}

func TestSteering(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		allowed := network.WithAllowLimitedConn(t.Context(), "test")
		relay := w.connectLimited()
		relay.setPlain(1)
		require.Nil(t, w.m.steer.choose(allowed, higher), "one connection is the swarm's choice anyway")
		second := w.connectLimited()
		w.pass(2 * time.Second)
		require.Nil(t, w.m.steer.choose(t.Context(), higher), "limited connections keep their rule")

		relayed := w.net.connect(higher, relayAddr, false)
		w.pass(2 * time.Second)
		require.Equal(t, network.Conn(relayed), w.m.steer.choose(t.Context(), higher))
		require.Nil(t, w.m.steer.choose(network.WithForceDirectDial(allowed, "test"), higher), "a relayed one is not direct")
		require.Nil(t, w.m.steer.choose(allowed, lower), "another peer")

		direct := w.connect(quicAddr)
		w.pass(2 * time.Second)
		require.Equal(t, network.Conn(direct), w.m.steer.choose(network.WithForceDirectDial(t.Context(), "test"), higher))
		direct.set(func() { direct.closed = true })
		require.Nil(t, w.m.steer.choose(allowed, higher), "a winner that is closed is not one")
		direct.set(func() { direct.closed = false })
		relay.Close()
		second.Close()
		relayed.Close()
		w.pass(time.Second)
		require.Nil(t, w.m.steer.choose(allowed, higher))
	})
}

// New streams do not go to a limited connection while there is one without a limit, whatever
// the policy likes and whichever of them answers; but for those that can move back, where the
// one without a limit does not answer.
func TestNothingIsSteeredToALimitedConnection(t *testing.T) {
	for name, opts := range map[string][]Option{"by default": nil, "liked": {WithPolicy(policy.Chain(notRule{policy.Unlimited()}))}} {
		for _, silent := range []bool{false, true} {
			for _, migrates := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s, silent: %v, migrates: %v", name, silent, migrates), func(t *testing.T) {
					inVirtualTime(t, func(t *testing.T) {
						w := newWorld(t, higher, opts...)
						w.mover.mu.Lock()
						w.mover.supports = migrates
						w.mover.mu.Unlock()
						allowed := network.WithAllowLimitedConn(t.Context(), "test")
						relay, direct := w.connectLimited(), w.connect(quicAddr)
						relay.setPlain(1)
						direct.set(func() { direct.plain, direct.silent = 1, silent })
						start, since := time.Now(), time.Duration(0)
						for range 600 {
							w.pass(100 * time.Millisecond)
							if w.m.steer.choose(allowed, higher) == network.Conn(relay) && since == 0 {
								since = time.Since(start)
							}
						}
						if silent && migrates {
							require.GreaterOrEqual(t, since, 2*defaultProbeTime)
							require.Less(t, since, 3*defaultProbeTime)
							require.Nil(t, w.m.steer.choose(t.Context(), higher), "a stream that may not be on it")
						} else {
							require.Zero(t, since)
						}
						require.False(t, relay.IsClosed() || direct.IsClosed())
					})
				})
			}
		}
	}
}

// Where nothing is decided, Consolidate says why.
func TestWhyNothingIsDecided(t *testing.T) {
	two := make([]verdict, 2)
	over, cancel := context.WithCancel(t.Context())
	cancel()
	for _, tc := range []struct {
		name string
		ctx  context.Context
		plan plan
		want error
	}{
		{"there is a winner", t.Context(), plan{decided: true, verdicts: two}, nil},
		{"all are left on purpose", t.Context(), plan{left: true, verdicts: two}, nil},
		{"there is one connection", t.Context(), plan{verdicts: two[:1]}, nil},
		{"it is not known which works", t.Context(), plan{verdicts: two}, errUnknown},
		{"none answers", t.Context(), plan{err: errSilent, verdicts: two}, errSilent},
		{"nobody waits any more", over, plan{verdicts: two}, context.Canceled},
	} {
		require.Equal(t, tc.want, errOf(tc.ctx, &tc.plan), tc.name)
	}
}

func TestConsolidate(t *testing.T) {
	t.Run("at once, and the report says what was done", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, lower) // which is the controller
			relay := w.connectLimited()
			streams := relay.open(4)
			relay.setPlain(2)
			tcp := w.connect(tcpAddr)
			tcp.open(1)
			quic := w.connect(quicAddr)
			w.mover.setAnswer(func(s *fakeStream) error {
				switch s {
				case streams[0]:
					return errDeniedByFake
				case streams[1]:
					return errFakeReset
				}
				return nil
			})
			report, err := w.m.Consolidate(t.Context(), lower)
			require.NoError(t, err)
			require.Less(t, report.Duration, 2*rtt, "without the settle delay")
			require.Equal(t, "conn-3", report.Winner.ID)
			require.Len(t, report.Losers, 2)
			require.Equal(t, "conn-2", report.Losers[0].Conn.ID, "the best first")
			require.Equal(t, 1, report.Losers[0].Moved)
			require.Equal(t, "transport", report.Losers[0].Decision.Rule)
			require.Equal(t, Loser{
				Conn:     relayInfo(relay),
				Decision: report.Losers[1].Decision,
				Moved:    2, Failed: 1, Pinned: 3,
				took: rtt,
			}, report.Losers[1])
			require.Equal(t, 3, quic.count())
			require.Contains(t, report.String(), "2 streams moved, 1 failed, 3 pinned")

			w.pass(defaultProof/directProofShare + maxQuietGap)
			require.True(t, tcp.pruned(), "later rounds close what is quiet, although the peer decides")
			require.False(t, relay.IsClosed())

			relay.setPlain(0)
			for _, s := range streams {
				relay.remove(s)
			}
			w.pass(2*defaultInterval + defaultQuietTime)
			require.True(t, relay.pruned(), "all of them")
		})
	})
	t.Run("closes what has been quiet already", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, lower)
			w.connect(quicAddr).setPlain(1)
			w.connect(tcpAddr)
			w.pass(defaultProof / directProofShare)
			_, err := w.m.Consolidate(t.Context(), lower)
			require.NoError(t, err, "it asks the peer")
			w.pass(10 * minRoundGap)
			require.Len(t, w.net.ConnsToPeer(lower), 1, "and when that has answered there is nothing to wait for")
		})
	})
	t.Run("in place of the round that was due", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			w.connectLimited().open(1)
			w.connect(quicAddr)
			w.pass(fastSettle / 2)
			require.Len(t, w.due(), 1)
			start := time.Now()
			go func() { _, _ = w.m.Consolidate(t.Context(), higher) }()
			w.pass(rtt)
			require.Len(t, w.due(), 1)
			require.Len(t, w.mover.made(), 1)
			require.Equal(t, start, w.mover.made()[0].at)
		})
	})
	t.Run("beside what moves already", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			w.connectLimited().open(1)
			direct := w.connect(quicAddr)
			w.pass(fastSettle + rtt/2)
			report, err := w.m.Consolidate(t.Context(), higher)
			require.NoError(t, err)
			require.Zero(t, report.Losers[0].Moved, "the other round does")
			w.pass(rtt)
			require.Equal(t, 1, direct.count())
			require.Len(t, w.mover.made(), 1)
		})
	})
	t.Run("returns with its context, and the migrations go on", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			w.connectLimited().open(2)
			direct := w.connect(quicAddr)
			ctx, cancel := context.WithTimeout(t.Context(), rtt/2)
			defer cancel()
			report, err := w.m.Consolidate(ctx, higher)
			require.ErrorIs(t, err, context.DeadlineExceeded)
			require.Equal(t, 2, report.Losers[0].Moving)
			w.pass(rtt)
			require.Equal(t, 2, direct.count())
			require.Len(t, w.mover.made(), 2)
		})
	})
	t.Run("one connection, none, no network", func(t *testing.T) {
		w := newBareWorld(t, higher)
		_, err := w.m.Consolidate(t.Context(), higher)
		require.ErrorIs(t, err, ErrNoNetwork)
		only := w.connect(quicAddr)
		report, err := w.m.Consolidate(t.Context(), higher)
		require.NoError(t, err)
		require.Equal(t, only.id, report.Winner.ID)
		require.Empty(t, report.Losers)
		_, err = w.m.Consolidate(t.Context(), lower)
		require.ErrorIs(t, err, network.ErrNoConn)
		require.NoError(t, w.m.Close())
		_, err = w.m.Consolidate(t.Context(), higher)
		require.ErrorIs(t, err, ErrClosed)
	})
}

func relayInfo(c *fakeConn) ConnInfo {
	return ConnInfo{ID: c.id, Kind: "limited relay", Remote: c.addr}
}

// A connection is a program's own code, too, or waits for a lock that somebody holds for long:
// none is called while what is kept of the peer is locked. And what does not change is asked
// once.
func TestNothingIsCalledWithTheLockHeld(t *testing.T) {
	w := newWorld(t, higher)
	w.m.sched.awake.Store(true) // no dispatcher: nothing happens by itself
	d, err := w.m.sched.take(t.Context(), higher)
	require.NoError(t, err)
	calls := make(map[string]int)
	call := func(what string) {
		calls[what]++
		require.True(t, d.mu.TryLock(), "%s is called with the lock held", what)
		d.mu.Unlock()
	}
	quic, tcp, other := w.connect(quicAddr), w.connect(tcpAddr), w.connect(tcpAddr)
	tcp.open(2)
	tcp.openTheirs(1)
	for _, c := range []*fakeConn{quic, tcp, other} {
		c.called = call
	}
	round := func() (*view, *plan) {
		v := w.m.looks.look(higher, d)
		v.facts.forced = true
		for i := range v.facts.conns {
			v.facts.conns[i].path = path{health: pathAlive, at: v.facts.now, since: v.facts.now, asked: v.facts.now, wide: true}
		}
		w.m.rounds.remember(d, v)
		p := decide(w.m.cfg, w.m.policies.of(d), &v.facts)
		require.True(t, p.decided)
		d.apply(v, &p)
		require.Len(t, d.mayMove(v, &p), 3)
		require.Len(t, reportOf(d, v, &p, nil).Losers, 2)
		w.m.rounds.close.claim(d, v, &p, 2)
		w.m.tells.measure(d, v, &p, false)
		w.m.tells.path(d, v, &p)
		return v, &p
	}
	v, _ := round()
	b := &batch{d: d, losers: map[*connState]*count{v.conns[1].connState: new(count)}}
	d.mu.Lock()
	require.Len(t, b.report(), 1)
	d.mu.Unlock()
	asked := calls["RemoteMultiaddr"]
	round()
	require.Equal(t, asked, calls["RemoteMultiaddr"], "an address is read once")
	require.Positive(t, calls["Stream.Stat"])
	w.m.moves.migrated(migrate.Event{Peer: higher, Kind: migrate.Started, From: tcp, To: quic, Time: time.Now()})
	d.mu.Lock()
	d.conns = nil // as if no round had seen any
	d.mu.Unlock()
	w.m.serves.answerHello(tcp, 1)
	d.mu.Lock()
	d.conns = d.conns[:1]
	d.mu.Unlock()
	w.m.serves.agreeToKeep(quic)
	d.mu.Lock()
	d.conns = d.conns[:1]
	d.mu.Unlock()
	w.m.serves.agreeToLose(tcp, time.Minute)
}
