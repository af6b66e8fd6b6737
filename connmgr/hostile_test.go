package connmgr

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/migrate"
	"github.com/go-portage/portage/pb"
)

// What a peer says may cost it little, and must not cost this side much more: neither
// requests nor log lines come at a rate that the peer chooses.

// A peer that has never done with a connection, and always says that it soon will have.
func TestPeerThatIsAlwaysAlmostDone(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		w.connect(quicAddr)
		loser := w.connect(tcpAddr)
		loser.set(func() {
			loser.answer = func(*pb.DrainMessage) *pb.DrainMessage { return busyMessage(time.Millisecond) }
		})
		w.pass(time.Hour)
		require.False(t, loser.IsClosed())
		require.LessOrEqual(t, loser.timesAsked(), busyAsks+int(time.Hour/defaultInterval)+1)
		require.GreaterOrEqual(t, loser.timesAsked(), int(time.Hour/defaultInterval)/2, "it is still asked")

		loser.set(func() { loser.answer = nil })
		w.pass(3 * defaultInterval)
		require.True(t, loser.pruned())
	})
}

// A peer that resets each question is there, and has not shown that its newer connection
// carries what is large. It is not asked all the time; a little more often if it says that it has
// no room.
func TestPeerThatResetsQuestions(t *testing.T) {
	for code, most := range map[network.StreamErrorCode]int{network.StreamProtocolViolation: 40, network.StreamResourceLimitExceeded: 5 * 40} {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, higher)
				w.net.identify(higher) // it runs no manager, so that it is not greeted
				older := w.connect(tcpAddr)
				older.setPlain(1)
				w.pass(time.Minute)
				newer := w.connect(quicAddr)
				newer.set(func() { newer.resets = code })
				w.pass(10 * time.Minute)
				require.False(t, older.IsClosed() || newer.IsClosed())
				require.Less(t, newer.timesAskedPath(), most, "less and less often")
				require.Greater(t, newer.timesAskedPath(), 15)

				newer.set(func() { newer.resets = 0 })
				w.pass(2 * maxReprobe)
				require.Equal(t, newer.id, w.steered(), "once it answers, it wins")
			})
		})
	}
}

// Each answer comes after the time of a question is over: the path is silent and alive in
// turn.
func TestSlowPathIsToldOfOnceAMinute(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		slow, other := w.connect(quicAddr), w.connect(tcpAddr)
		for _, c := range []*fakeConn{slow, other} {
			c.setPlain(1)
			c.set(func() { c.delay = defaultProbeTime + time.Second })
		}
		w.pass(time.Hour)
		said := w.logs.FilterMessageSnippet("does not answer").Len()
		require.Positive(t, said)
		require.LessOrEqual(t, said, int(time.Hour/sampleEvery)+1, "of the peer, not of each connection")
	})
}

// A peer that refuses for another reason each time.
func TestChangingReasonsAreToldOfOnceAMinute(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher, WithRetry(time.Second, time.Second))
		w.connect(quicAddr)
		losers := []*fakeConn{w.connect(tcpAddr), w.connect(strings.Replace(tcpAddr, "4001", "4002", 1))}
		var n atomic.Int32
		for _, c := range losers {
			c.set(func() {
				c.answer = func(*pb.DrainMessage) *pb.DrainMessage {
					return refusedMessage(fmt.Sprint("reason ", n.Add(1)))
				}
			})
		}
		w.pass(time.Hour)
		require.Greater(t, losers[0].timesAsked()+losers[1].timesAsked(), 1000)
		said := w.logs.FilterMessageSnippet("refused to let it go").All()
		require.NotEmpty(t, said)
		require.LessOrEqual(t, len(said), int(time.Hour/sampleEvery)+1)
		require.Contains(t, fmt.Sprint(said[len(said)-1].ContextMap()["more_since_last"]), "9", "and how many were left out")
	})
}

// Whoever calls Consolidate does not wait for a connection that never answers.
func TestConsolidateDoesNotWaitForWhatIsSilent(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		first, second := w.connectLimited(), w.connectLimited()
		first.set(func() { first.silent = true })
		second.open(1)
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		start := time.Now()
		report, err := w.m.Consolidate(ctx, higher)
		require.NoError(t, err)
		require.LessOrEqual(t, time.Since(start), lateFactor*defaultProbeTime)
		require.Len(t, report.Losers, 2)
		for _, l := range report.Losers {
			require.Contains(t, l.Kept, "limits it")
		}
	})
}

// Where the winner has answered, but not just now, it is asked once more, and Consolidate
// returns with the streams moved all the same.
func TestConsolidateMovesAlsoAfterAWhile(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher, WithSettleDelay(time.Hour))
		quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
		w.pass(20 * time.Second)
		tcp.open(3)
		report, err := w.m.Consolidate(t.Context(), higher)
		require.NoError(t, err)
		require.Equal(t, quic.id, report.Winner.ID)
		require.Equal(t, 3, report.Losers[0].Moved)
		require.Equal(t, 3, quic.count())
	})
}

// A peer's process has died without a word and started anew: its old connections are dead,
// and say nothing of who it is now.
func TestPeerThatStartsAnew(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
		quic.setPlain(1)
		tcp.setPlain(1)
		w.pass(time.Second)
		w.pass(time.Minute)
		for _, c := range []*fakeConn{quic, tcp} {
			c.set(func() { c.silent = true })
		}
		again := w.connect(tcpAddr)
		again.set(func() { again.instance = 2 })
		w.pass(2 * defaultProbeTime)
		require.Equal(t, again.id, w.steered(), "new streams go to the process that is there")
		require.False(t, quic.IsClosed() || tcp.IsClosed())

		for _, c := range []*fakeConn{quic, tcp} {
			c.set(func() { c.silent = false })
		}
		w.pass(time.Minute)
		require.Empty(t, w.steered(), "two processes after all")
		require.Contains(t, w.m.Explain(higher).State, "different processes")
		require.False(t, quic.IsClosed() || tcp.IsClosed() || again.IsClosed())
	})
}

// What a peer has done to it is logged, but not at a rate that it chooses.
func TestLinesOfOnePeerAreBounded(t *testing.T) {
	const times = 300
	for name, provoke := range map[string]func(w *world){
		"streams to be moved": func(w *world) {
			w.connect(quicAddr)
			tcp := w.connect(tcpAddr)
			w.pass(2 * defaultSettleDelay)
			for range times {
				tcp.open(1)
				w.m.sched.poke(w.peer)
				w.pass(10 * rtt)
			}
			require.Greater(w.t, len(w.mover.made()), times/2)
		},
		"streams that it moves": func(w *world) {
			quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
			w.pass(2 * defaultSettleDelay)
			for range times {
				w.m.moves.migrated(migrate.Event{Peer: w.peer, Kind: migrate.Finished, From: tcp, To: quic, Time: time.Now()})
				w.pass(2 * byPeerPause)
			}
		},
		"connections to be closed": func(w *world) {
			w.connect(quicAddr)
			for range times {
				w.connect(tcpAddr)
			}
			w.pass(time.Minute)
			require.Len(w.t, w.net.ConnsToPeer(w.peer), 1)
		},
		"connections that it closes": func(w *world) {
			w.connect(quicAddr)
			w.pass(2 * defaultSettleDelay)
			for range times {
				tcp := w.connect(tcpAddr)
				w.pass(100 * time.Millisecond)
				w.m.serves.agreeToLose(tcp, time.Minute)
				w.pass(defaultQuietTime)
				w.m.serves.agreeToLose(tcp, time.Minute)
				tcp.Close()
				w.pass(100 * time.Millisecond)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				p := higher
				if strings.Contains(name, "that it") {
					p = lower
				}
				w := newWorld(t, p)
				start := time.Now()
				provoke(w)
				w.pass(2 * sampleEvery)
				said := w.messages()
				require.NotEmpty(t, said)
				require.LessOrEqual(t, len(said), (1+int(time.Since(start)/sampleEvery))*deedsAtOnce)
				require.Less(t, len(said), times)
			})
		})
	}
}

// A peer that decides, and changes its mind all the time.
func TestPeerThatNamesOneConnectionAfterTheOther(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, lower)
		quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
		quic.open(10)
		w.pass(2 * defaultSettleDelay)
		start := time.Now()
		refused := 0
		for i := range 600 {
			answer := w.request([]*fakeConn{tcp, quic}[i%2], keepMessage())
			if answer.GetRefused() != nil {
				refused++
				require.Equal(t, "too many have been named of late", answer.GetRefused().GetReason())
			}
			w.pass(2 * rtt)
		}
		turns := turnsAtOnce + int(time.Since(start)/turnPause) + 1
		require.LessOrEqual(t, len(w.mover.made()), 10*turns, "as often as this side itself would change its mind")
		require.Positive(t, refused)

		w.pass(turnsAtOnce * turnPause)
		for i := range turnsAtOnce {
			require.NotNil(t, w.request([]*fakeConn{tcp, quic}[i%2], keepMessage()).GetKept(), "an honest peer may do so for a good reason")
			require.NotNil(t, w.request([]*fakeConn{tcp, quic}[i%2], keepMessage()).GetKept(), "and say it twice")
		}
	})
}
