package connmgr

import (
	"errors"
	"math"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/multiformats/go-multistream"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/pb"
	"github.com/go-portage/portage/policy"
)

// What was asked of the peer, step by step.
func TestDrainStates(t *testing.T) {
	cfg := defaultConfig()
	t0 := time.Now()
	busy := func(ms uint32) *pb.DrainMessage { return busyMessage(time.Duration(ms) * time.Millisecond) }
	type step func(d *drain, now time.Time)
	ask := func(d *drain, now time.Time) { d.ask(now, false) }
	confirm := func(d *drain, now time.Time) { d.ask(now, true) }
	answer := func(m *pb.DrainMessage) step {
		return func(d *drain, now time.Time) { d.answer(now, &cfg, m) }
	}
	fail := func(error) step {
		return func(d *drain, now time.Time) { d.fail(now, &cfg) }
	}
	void := func(d *drain, now time.Time) { d.void(now) }
	lapse := func(d *drain, now time.Time) { d.lapse(now) }
	off := func(d *drain, _ time.Time) { d.off() }
	wait := func(time.Duration) step { return nil } // a second passes in any case

	for name, c := range map[string]struct {
		steps []step // a second apart
		want  drainPhase
		until time.Duration // since the first step
	}{
		"nothing asked":                       {nil, drainOff, 0},
		"asked":                               {[]step{ask}, drainAsked, 0},
		"drained":                             {[]step{ask, answer(drainedMessage())}, drainAgreed, 0},
		"drained again, asked to confirm":     {[]step{ask, answer(drainedMessage()), confirm, answer(drainedMessage())}, drainConfirmed, 0},
		"drained again, not asked to confirm": {[]step{ask, answer(drainedMessage()), ask, answer(drainedMessage())}, drainAgreed, 0},
		"busy, and when to ask again":         {[]step{ask, answer(busy(1500))}, drainBusy, 2500 * time.Millisecond},
		"busy, the wait is bounded":           {[]step{ask, answer(busy(math.MaxUint32))}, drainBusy, time.Second + defaultInterval},
		"busy, asking at once is not":         {[]step{ask, answer(busy(1))}, drainBusy, time.Second + minRoundGap},
		"busy, nobody knows for how long":     {[]step{ask, answer(busy(0))}, drainBusy, 3 * time.Second},
		"busy when asked to confirm":          {[]step{ask, answer(drainedMessage()), confirm, answer(busy(1500))}, drainBusy, 4500 * time.Millisecond},
		"refused":                             {[]step{ask, answer(refusedMessage("no"))}, drainRefused, 2 * time.Second},
		"refused twice":                       {[]step{ask, answer(refusedMessage("no")), ask, answer(refusedMessage("no"))}, drainRefused, 5 * time.Second},
		"no answer":                           {[]step{ask, fail(errFakeReset)}, drainFailed, 2 * time.Second},
		"no answer twice":                     {[]step{ask, fail(errFakeReset), ask, fail(errFakeReset)}, drainFailed, 5 * time.Second},
		"a refusal after an answer":           {[]step{ask, fail(errFakeReset), ask, answer(drainedMessage()), ask, answer(refusedMessage("no"))}, drainRefused, 6 * time.Second},
		"a stream voids what was agreed to":   {[]step{ask, answer(drainedMessage()), void}, drainBusy, 2 * time.Second},
		"and what was confirmed":              {[]step{ask, answer(drainedMessage()), confirm, answer(drainedMessage()), void}, drainBusy, 4 * time.Second},
		"there is nothing to void":            {[]step{ask, answer(refusedMessage("no")), void}, drainRefused, 2 * time.Second},
		"nor while the answer is awaited":     {[]step{ask, void}, drainAsked, 0},
		"off":                                 {[]step{ask, answer(drainedMessage()), off}, drainOff, 0},
		"an answer after it was taken back":   {[]step{ask, off, answer(drainedMessage())}, drainOff, 0},
		"a failure after it was taken back":   {[]step{ask, off, fail(errFakeReset)}, drainOff, 0},
		"the lease goes on":                   {[]step{ask, answer(drainedMessage()), wait(0), lapse}, drainAgreed, 0},
	} {
		t.Run(name, func(t *testing.T) {
			var d drain
			now := t0
			for _, s := range c.steps {
				if s != nil {
					s(&d, now)
				}
				now = now.Add(time.Second)
			}
			require.Equal(t, c.want, d.phase)
			if c.until > 0 {
				require.Equal(t, c.until, d.until.Sub(t0))
			}
		})
	}

	t.Run("the lease ends", func(t *testing.T) {
		for _, m := range []*pb.DrainMessage{drainedMessage(), busy(0)} {
			var d drain
			d.ask(t0, false)
			d.answer(t0.Add(time.Second), &cfg, m)
			d.lapse(t0.Add(shortLease - 1))
			require.NotEqual(t, drainOff, d.phase)
			d.lapse(t0.Add(shortLease))
			require.Equal(t, drainOff, d.phase, "it counts from when it was asked for")
		}
	})
	t.Run("asking for long asks for a long lease", func(t *testing.T) {
		var d drain
		var leases []time.Duration
		for range 6 {
			d.ask(t0, false)
			leases = append(leases, d.lease)
			d.answer(t0, &cfg, busy(0))
		}
		require.Equal(t, []time.Duration{shortLease, shortLease, shortLease, shortLease, longLease, longLease}, leases)
	})
	t.Run("it is asked less and less often while nobody knows for how long", func(t *testing.T) {
		var d drain
		for range 100 {
			d.ask(t0, false)
			d.answer(t0, &cfg, busy(0))
			require.Positive(t, d.until.Sub(t0))
			require.LessOrEqual(t, d.until.Sub(t0), cfg.interval)
		}
	})
	t.Run("what is known of the other end", func(t *testing.T) {
		var cs connState
		none := multistream.ErrNotSupported[protocol.ID]{Protos: []protocol.ID{DrainID}}
		cs.heard(errors.New("reset"))
		require.False(t, cs.serves || cs.lacks)
		cs.heard(none)
		require.True(t, cs.lacks && !cs.serves)
		cs.heard(nil)
		require.True(t, cs.serves && !cs.lacks)
		cs.heard(none)
		require.True(t, cs.serves && cs.lacks, "it has been switched off")
	})
	t.Run("the reason is clipped", func(t *testing.T) {
		var d drain
		d.ask(t0, false)
		d.answer(t0, &cfg, refusedMessage(strings.Repeat("ü", maxReason)+"\xff"))
		require.LessOrEqual(t, len(d.reason), maxReason)
		require.True(t, strings.HasPrefix(d.reason, "üü"))
	})
}

func TestTellingStates(t *testing.T) {
	now := time.Now()
	for name, c := range map[string]struct {
		telling
		due, over bool
	}{
		"not told":               {telling{}, true, false},
		"under way":              {telling{phase: tellAsked}, false, false},
		"kept, it moves":         {telling{phase: tellKept, until: now.Add(1)}, false, false},
		"kept, it had its time":  {telling{phase: tellKept, until: now}, false, true},
		"refused":                {telling{phase: tellRefused, until: now.Add(1)}, false, true},
		"refused, some time ago": {telling{phase: tellRefused, until: now}, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			require.Equal(t, c.due, c.telling.due(now), "due")
			require.Equal(t, c.over, c.telling.over(now), "over")
		})
	}
}

// A peer that does not agree to what is kept is told again, less and less often.
func TestRefusedKeepIsToldAgain(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		quic := w.connect(quicAddr)
		quic.set(func() { quic.plain, quic.refuses = 1, "no" })
		w.connect(tcpAddr).setPlain(1)
		w.pass(time.Hour)
		require.LessOrEqual(t, quic.timesKept(), 8+int(time.Hour/defaultMaxRetry))
		require.GreaterOrEqual(t, quic.timesKept(), int(time.Hour/defaultMaxRetry)/2)
		quic.set(func() { quic.refuses = "" })
		w.pass(defaultMaxRetry + defaultInterval)
		told := quic.timesKept()
		w.pass(time.Hour)
		require.Equal(t, told, quic.timesKept())
	})
}

// D2: what the other end has not read keeps the connection.
func TestUnreadAtThePeerKeepsTheConnection(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		w.connect(quicAddr)
		loser := w.connect(tcpAddr)
		loser.set(func() { loser.unread = 1 })
		w.pass(time.Hour)
		require.False(t, loser.IsClosed())
		require.Contains(t, w.m.Explain(higher).Conns[1].State, "the peer has not done with it")
		require.LessOrEqual(t, loser.timesAsked(), int(time.Hour/defaultInterval)+10)
		loser.mu.Lock()
		require.EqualValues(t, longLease/time.Second, loser.leases[len(loser.leases)-1])
		loser.mu.Unlock()
		require.Empty(t, loser.pipes(), "no stream is held while anybody waits")
		loser.set(func() { loser.unread = 0 })
		w.pass(defaultInterval + time.Second)
		require.True(t, loser.pruned(), "soon after the peer has done")
	})
}

// While a stream here keeps the connection, the peer is asked no more than the lease needs.
func TestLeaseIsRenewed(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		w.connect(quicAddr)
		loser := w.connect(tcpAddr)
		loser.setPlain(1)
		w.pass(10 * time.Minute)
		asked := loser.timesAsked()
		w.pass(time.Hour)
		require.InDelta(t, time.Hour/(longLease/3), loser.timesAsked()-asked, 2)
	})
}

// D3: a stream that comes after Drained cancels nothing, but what came of it the peer
// may not have read, so it is asked again.
func TestStreamAfterDrained(t *testing.T) {
	for name, stream := range map[string]func(w *world, c *fakeConn){
		"that is seen": func(w *world, c *fakeConn) {
			c.setPlain(1)
			w.pass(maxQuietGap)
			c.setPlain(0)
		},
		"between two looks": func(w *world, c *fakeConn) {
			w.m.began(c, "/test/short/1.0.0", network.DirInbound)
		},
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, higher)
				w.connect(quicAddr)
				loser := w.connect(tcpAddr)
				w.pass(defaultSettleDelay + defaultQuietTime/2)
				require.Equal(t, 1, loser.timesAsked(), "fake peers answer at once")
				stream(w, loser)
				loser.set(func() { loser.unread = 1 })
				w.pass(time.Hour)
				require.False(t, loser.IsClosed())
				require.Greater(t, loser.timesAsked(), 1)
				loser.set(func() { loser.unread = 0 })
				w.pass(defaultInterval + time.Second)
				require.True(t, loser.pruned())
			})
		})
	}
}

func TestPeerRefuses(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		w.connect(quicAddr)
		loser := w.connect(tcpAddr)
		loser.set(func() { loser.refuses = "we like \n it" + strings.Repeat("x", maxReason) })
		w.pass(time.Hour)
		require.False(t, loser.IsClosed())
		require.LessOrEqual(t, loser.timesAsked(), 8+int(time.Hour/defaultMaxRetry), "it is not asked all the time")
		require.GreaterOrEqual(t, loser.timesAsked(), int(time.Hour/defaultMaxRetry)/2)
		require.Contains(t, w.m.Explain(higher).Conns[1].State, `kept: the peer refused: "we like`)
		said := w.logs.FilterMessageSnippet("refused to let it go").All()
		require.Len(t, said, 1, "each reason is said once")
		require.NotContains(t, said[0].Message, "\n", "a peer cannot write lines of its own")
		require.Less(t, len(said[0].Message), 2*maxReason)

		loser.set(func() { loser.refuses = "" })
		w.pass(defaultMaxRetry + defaultInterval)
		require.True(t, loser.pruned())
	})
}

// A peer that says in identify that it can be asked, and cannot.
func TestPeerThatDoesNotDrainAfterAll(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		quic, loser := w.connect(quicAddr), w.connect(tcpAddr)
		quic.set(func() { quic.noDrain = true })
		loser.set(func() { loser.noDrain = true })
		w.pass(defaultPlainQuietTime - time.Millisecond)
		require.False(t, loser.IsClosed())
		w.pass(defaultSettleDelay + maxQuietGap)
		require.True(t, loser.pruned(), "the quiet time of plain peers holds")
	})
}

// Where one connection's end serves requests and the other's does not, they are two
// processes, of which each has one connection.
func TestReplicaWithoutAManager(t *testing.T) {
	for name, first := range map[string]bool{"the first": true, "the second": false} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, higher)
				quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
				without := tcp
				if first {
					without = quic
				}
				without.set(func() { without.noDrain = true })
				w.pass(time.Hour)
				require.False(t, quic.IsClosed() || tcp.IsClosed())
				require.Contains(t, w.m.Explain(higher).State, "different processes")
				require.Empty(t, w.steered(), "the swarm chooses, as it would without a manager")
			})
		})
	}
}

// The drain is off where the loser wins after all, and a peer that has agreed to lose it is
// told that it is kept.
func TestWinnerIsNotDrained(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		quic := w.connect(quicAddr)
		tcp := w.connect(tcpAddr)
		relay := w.connectLimited()
		relay.setPlain(1)
		tcp.set(func() { tcp.unread = 1 })
		w.pass(2 * defaultSettleDelay)
		require.Positive(t, tcp.timesAsked())
		require.Zero(t, tcp.timesKept())
		asked := tcp.timesAsked()
		quic.Close()
		w.pass(time.Hour)
		require.Equal(t, asked, tcp.timesAsked(), "the last one without a limit is not drained")
		require.Equal(t, 1, tcp.timesKept())
		require.False(t, tcp.IsClosed())
	})
}

// An answer that does not fit the request, or is none, counts as none.
func TestWrongAnswersToDrain(t *testing.T) {
	for name, answer := range map[string]*pb.DrainMessage{
		"a request":     drainMessage(0),
		"of the other":  keptMessage(),
		"no member":     {},
		"nothing":       nil,
		"another's ask": keepMessage(),
		"a greeting":    helloMessage(1),
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, higher)
				w.connect(quicAddr).open(1)
				loser := w.connect(tcpAddr)
				loser.set(func() { loser.answer = func(*pb.DrainMessage) *pb.DrainMessage { return answer } })
				w.pass(time.Minute)
				require.Empty(t, loser.pipes())
				require.False(t, loser.IsClosed())
				require.Greater(t, loser.timesAsked(), 2, "it is asked again")
				require.Less(t, loser.timesAsked(), 10, "less and less often")
				require.Contains(t, w.m.Explain(higher).Conns[1].State, "the peer did not answer")
				loser.set(func() { loser.answer = nil })
				w.pass(defaultMaxRetry + defaultInterval + defaultQuietTime)
				require.True(t, loser.pruned())
			})
		})
	}
}

// A peer that takes its time to answer, or never does, holds nothing up.
func TestAnswerThatDoesNotCome(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher, WithConcurrency(1))
		w.connect(quicAddr)
		loser := w.connect(tcpAddr)
		loser.set(func() { loser.silent = true })
		w.pass(defaultSettleDelay + openTimeout + time.Second)
		require.False(t, loser.IsClosed())
		other := higher + "2"
		w.net.identify(other, DrainID)
		w.net.connect(other, relayAddr, true).open(1)
		direct := w.net.connect(other, quicAddr, false)
		w.pass(fastSettle + rtt + 2*minRoundGap)
		require.Equal(t, 1, direct.count())
	})
}

// D1: from Drain on, nothing is opened on the connection, for the length of the lease, and
// Drained comes when there is nothing else on it.
func TestPledge(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, lower, WithTakeover(time.Hour))
		quic := w.connect(quicAddr)
		tcp := w.connect(tcpAddr)
		tcp.setPlain(1)
		quic.setPlain(1)
		w.pass(2 * defaultSettleDelay)
		require.Equal(t, quic.id, w.steered(), "by its own policy")

		require.NotNil(t, w.request(quic, drainMessage(0)).GetBusy(), "there is a stream")
		require.Equal(t, tcp.id, w.steered(), "at once")
		require.Contains(t, w.m.Explain(lower).String(), "the peer wants to close it")
		for range 3 {
			w.pass(shortLease - time.Second)
			require.Equal(t, tcp.id, w.steered(), "for as long as it is renewed")
			require.NotNil(t, w.request(quic, drainMessage(0)).GetBusy())
		}
		quic.setPlain(0)
		w.pass(defaultInterval)
		busy := w.request(quic, drainMessage(0)).GetBusy()
		if busy != nil { // seen late
			w.pass(time.Duration(busy.GetWait()) * time.Millisecond)
		}
		require.NotNil(t, w.request(quic, drainMessage(0)).GetDrained())
		require.NotNil(t, w.request(quic, drainMessage(0)).GetDrained(), "as often as it is asked")

		w.pass(shortLease - time.Second)
		require.Equal(t, tcp.id, w.steered())
		w.pass(time.Second + (patienceIntervals+1)*defaultInterval)
		require.Equal(t, quic.id, w.steered(), "the lease has ended by itself")
	})
}

// The lease is what the peer asks for, within bounds.
func TestLease(t *testing.T) {
	for name, c := range map[string]struct {
		seconds uint32
		want    time.Duration
	}{
		"not given": {0, shortLease},
		"short":     {5, 5 * time.Second},
		"long":      {600, longLease},
		"too long":  {601, longLease},
		"for ever":  {math.MaxUint32, longLease},
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, lower)
				quic := w.connect(quicAddr)
				w.connect(tcpAddr)
				w.pass(defaultSettleDelay)
				w.request(quic, drainMessage(c.seconds))
				pledged := func() bool { return w.m.Explain(lower).Conns[1].RuledOut == "the peer wants to close it" }
				w.pass(c.want - time.Millisecond)
				require.True(t, pledged())
				w.pass(time.Millisecond)
				require.False(t, pledged())
			})
		})
	}
}

// D1: at once also while streams move, which takes as long as it does.
func TestPledgeDuringARound(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, lower)
		quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
		tcp.open(1)
		w.pass(defaultSettleDelay)
		w.mover.setAnswer(func(*fakeStream) error { return errHang })
		go func() { _, _ = w.m.Consolidate(t.Context(), lower) }()
		w.pass(rtt)
		require.Equal(t, quic.id, w.steered())
		require.NotNil(t, w.request(quic, drainMessage(0)).GetBusy(), "streams move there")
		require.Equal(t, tcp.id, w.steered())
		w.pass(time.Second)
		require.Equal(t, tcp.id, w.steered())
	})
}

// That the peer wants to close a loser is no reason to have another winner, and least of
// all at once.
func TestPledgeForALoserLeavesTheWinner(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher, WithPolicy(policy.Chain(policy.PinnedStreams())))
		conns := []*fakeConn{w.connect(quicAddr), w.connect(quicAddr), w.connect(quicAddr)}
		for _, c := range conns {
			c.setPlain(1)
		}
		w.pass(2 * defaultSettleDelay)
		var winner *fakeConn
		var losers []*fakeConn
		for _, c := range conns {
			if w.steered() == c.id {
				winner = c
			} else {
				losers = append(losers, c)
			}
		}
		require.Len(t, losers, 2)
		losers[0].setPlain(2) // for a moment
		require.NotNil(t, w.request(losers[1], drainMessage(5)).GetBusy())
		w.pass(minRoundGap)
		require.Equal(t, winner.id, w.steered())
		losers[0].setPlain(1)
		w.pass(4 * time.Second)
		require.Equal(t, winner.id, w.steered())
		losers[0].setPlain(2)
		w.pass(time.Second + minRoundGap)
		require.Equal(t, winner.id, w.steered(), "nor that it does not want to any more")
	})
}

// D1: the quiet time before Drained, and how long there is to wait for it.
func TestDrainedComesAfterAQuietTime(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, lower)
		quic := w.connect(quicAddr)
		w.connect(tcpAddr)
		w.pass(time.Second)
		require.EqualValues(t, 1000, w.request(quic, drainMessage(0)).GetBusy().GetWait())
		w.pass(time.Second - time.Millisecond)
		require.EqualValues(t, 1, w.request(quic, drainMessage(0)).GetBusy().GetWait())
		w.m.began(quic, "/test/short/1.0.0", network.DirInbound)
		w.pass(time.Millisecond)
		require.EqualValues(t, 1999, w.request(quic, drainMessage(0)).GetBusy().GetWait(), "there was a stream")
		w.pass(1999 * time.Millisecond)
		require.NotNil(t, w.request(quic, drainMessage(0)).GetDrained())
	})
}

// K1: Keep takes Drain back, at once.
func TestKeepTakesDrainBack(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, lower)
		quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
		w.pass(2 * defaultSettleDelay)
		require.NotNil(t, w.request(quic, drainMessage(600)).GetDrained())
		require.Equal(t, tcp.id, w.steered())
		require.NotNil(t, w.request(quic, keepMessage()).GetKept())
		w.pass(minRoundGap)
		require.Equal(t, quic.id, w.steered())
		require.Empty(t, w.m.Explain(lower).Conns[0].RuledOut)
		require.NotNil(t, w.request(tcp, drainMessage(0)).GetDrained(), "it is one that can take the other's place again")
	})
}

// K1: Drain on the connection that was to be kept ends that.
func TestDrainTakesKeepBack(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, lower)
		quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
		w.pass(2 * defaultSettleDelay)
		require.NotNil(t, w.request(tcp, keepMessage()).GetKept())
		w.pass(minRoundGap)
		require.Equal(t, tcp.id, w.steered())
		require.Nil(t, w.request(tcp, drainMessage(0)).GetRefused())
		require.Equal(t, quic.id, w.steered())
		w.pass(minRoundGap)
		require.Equal(t, quic.id, w.steered())
	})
}

func TestKeepIsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		peer   func(w *world) *fakeConn
		us     bool // decide
		reason string
	}{
		"by the one that decides": {func(w *world) *fakeConn {
			w.connect(tcpAddr)
			return w.connect(quicAddr)
		}, true, "this side decides"},
		"limited, and another one is not": {func(w *world) *fakeConn {
			w.connect(tcpAddr)
			return w.connectLimited()
		}, false, "it is limited, and there is one that is not"},
		"it is being closed": {func(w *world) *fakeConn {
			w.connect(quicAddr)
			tcp := w.connect(tcpAddr)
			tcp.blocks = make(chan struct{})
			w.t.Cleanup(func() { close(tcp.blocks) })
			_, err := w.m.Consolidate(w.t.Context(), lower)
			require.NoError(w.t, err)
			w.pass(10 * time.Second)
			return tcp
		}, false, "it is being closed"},
		"the manager is closed": {func(w *world) *fakeConn {
			w.connect(tcpAddr)
			quic := w.connect(quicAddr)
			w.pass(time.Millisecond)
			return quic
		}, false, ""},
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				p := lower
				if c.us {
					p = higher
				}
				w := newWorld(t, p)
				conn := c.peer(w)
				w.pass(time.Millisecond)
				if c.reason == "" {
					require.NoError(t, w.m.Close())
					require.Nil(t, w.request(conn, keepMessage()), "it answers nothing any more")
					return
				}
				require.Equal(t, c.reason, w.request(conn, keepMessage()).GetRefused().GetReason())
			})
		})
	}
	t.Run("not where it is the only one", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, lower)
			require.NotNil(t, w.request(w.connect(quicAddr), keepMessage()).GetKept())
			require.Empty(t, w.m.sched.peers, "nothing is kept of it")
		})
	})
}

func TestRefusals(t *testing.T) {
	const noOther = "there is no other connection that could take its place"
	for name, c := range map[string]struct {
		peer   func(w *world) *fakeConn // returns the connection to drain
		opts   []Option
		reason string
	}{
		"last connection": {func(w *world) *fakeConn {
			return w.connect(quicAddr)
		}, nil, noOther},
		"unlimited, and the other one is not": {func(w *world) *fakeConn {
			w.connectLimited()
			return w.connect(quicAddr)
		}, nil, noOther},
		"the other one is about to be closed by the peer": {func(w *world) *fakeConn {
			tcp, quic := w.connect(tcpAddr), w.connect(quicAddr)
			require.Nil(w.t, w.request(tcp, drainMessage(0)).GetRefused())
			return quic
		}, nil, noOther},
		"the other one is being closed by this side": {func(w *world) *fakeConn {
			quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
			tcp.blocks = make(chan struct{}) // closing it takes a while
			w.t.Cleanup(func() { close(tcp.blocks) })
			_, err := w.m.Consolidate(w.t.Context(), lower)
			require.NoError(w.t, err)
			w.pass(10 * time.Second)
			return quic
		}, nil, noOther},
		"exempt": {func(w *world) *fakeConn {
			w.connect(tcpAddr)
			return w.connect(quicAddr)
		}, []Option{WithExempt(ExemptConn("we measure it", func(c network.Conn) bool { return c.RemoteMultiaddr().String() == quicAddr }))}, "we measure it"},
		"it stands by": {func(w *world) *fakeConn {
			w.connect(tcpAddr)
			return w.connect(quicAddr)
		}, []Option{WithStandby()}, "it stands by"},
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, lower, c.opts...)
				conn := c.peer(w)
				w.pass(defaultSettleDelay)
				require.Equal(t, c.reason, w.request(conn, drainMessage(0)).GetRefused().GetReason())
				for _, e := range w.m.Explain(lower).Conns {
					if e.Conn.ID == conn.id {
						require.Empty(t, e.RuledOut)
					}
				}
			})
		})
	}
	t.Run("not where a third one stands by", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, lower, WithStandby())
			w.connect(tcpAddr)
			w.connect(tcpAddr)
			quic := w.connect(quicAddr)
			w.pass(defaultSettleDelay)
			require.Nil(t, w.request(quic, drainMessage(0)).GetRefused())
		})
	})
	t.Run("a refusal ends the lease", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, lower)
			quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
			w.pass(defaultSettleDelay)
			require.Nil(t, w.request(quic, drainMessage(0)).GetRefused())
			tcp.Close()
			w.pass(minRoundGap)
			require.NotNil(t, w.request(quic, drainMessage(0)).GetRefused())
			w.connect(tcpAddr)
			w.pass(2 * defaultSettleDelay)
			require.Equal(t, quic.id, w.steered())
		})
	})
}

// A controller keeps what it keeps.
func TestControllerRefusesToLoseItsWinner(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
		tcp.set(func() { tcp.unread = 1 })
		w.pass(2 * defaultSettleDelay)
		require.Equal(t, "this side decides, and keeps it", w.request(quic, drainMessage(0)).GetRefused().GetReason())
		require.Nil(t, w.request(tcp, drainMessage(0)).GetRefused(), "both may ask for the same one")
		tcp.set(func() { tcp.unread = 0 })
		w.pass(defaultInterval + defaultQuietTime + time.Second)
		require.True(t, tcp.pruned())
		require.False(t, quic.IsClosed())
	})
}

// D4: both ask at once, each for the connection that the other one keeps.
func TestBothDrainAtOnce(t *testing.T) {
	t.Run("the higher peer ID gives up its own", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, lower)
			quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
			tcp.set(func() { tcp.unread = 1 })
			w.pass(defaultSettleDelay)
			// The follower has been told to consolidate, so it asks although the peer decides.
			_, err := w.m.Consolidate(t.Context(), lower)
			require.NoError(t, err)
			w.pass(defaultQuietTime)
			require.Positive(t, tcp.timesAsked())
			d := w.m.sched.known(lower)
			phase := func() drainPhase {
				d.mu.Lock()
				defer d.mu.Unlock()
				return d.state(tcp).drain.phase
			}
			require.NotEqual(t, drainOff, phase())
			require.NotNil(t, w.request(quic, drainMessage(600)).GetDrained())
			require.Equal(t, drainOff, phase(), "what it has asked holds no longer, before the next round")
			asked := tcp.timesAsked()
			tcp.set(func() { tcp.unread = 0 })
			w.pass(9 * time.Minute)
			require.Equal(t, asked, tcp.timesAsked(), "it asks no more")
			require.False(t, tcp.IsClosed(), "it is the one that is left when the peer closes the other")
			quic.Close()
			w.pass(time.Hour)
			require.False(t, tcp.IsClosed())
		})
	})
	t.Run("the lower peer ID refuses", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
			tcp.set(func() { tcp.unread = 1 })
			w.pass(2 * defaultSettleDelay)
			w.m.sched.mu.Lock()
			w.m.sched.peers[higher].winner = nil // as if it had changed its mind
			w.m.sched.mu.Unlock()
			require.Equal(t, "this side wants to close the others", w.request(quic, drainMessage(0)).GetRefused().GetReason())
			asked := tcp.timesAsked()
			w.pass(time.Minute)
			require.Greater(t, tcp.timesAsked(), asked, "it goes on to ask")
		})
	})
}

// D4: the connection that was to stay fails while the other one is being drained.
func TestWinnerFailsDuringTheDrain(t *testing.T) {
	t.Run("pledged", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, lower)
			quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
			w.pass(defaultSettleDelay)
			w.request(quic, drainMessage(0))
			require.Equal(t, tcp.id, w.steered())
			tcp.Close()
			w.pass(time.Second)
			require.NotEqual(t, tcp.id, w.steered(), "nothing is steered to a closed connection")
			require.False(t, quic.IsClosed())
		})
	})
	t.Run("silently", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
			w.pass(defaultSettleDelay + minRoundGap)
			require.Equal(t, 1, tcp.timesAsked())
			quic.set(func() { quic.silent = true })
			w.pass(defaultQuietTime + defaultInterval + defaultProbeTime + time.Second)
			require.False(t, tcp.IsClosed(), "the winner does not answer any more")
			require.Equal(t, tcp.id, w.steered(), "new streams go to the one that does")
			w.pass(time.Hour)
			require.False(t, tcp.IsClosed())
		})
	})
}

// The wire: what is no request is a violation, changes nothing, and costs nothing but its
// stream.
func TestRequestsFromAHostilePeer(t *testing.T) {
	for name, bytes := range map[string]string{
		"nothing":       "",
		"oversized":     "\x81\x08" + strings.Repeat("\x00", 1025),
		"announced":     "\xff\xff\x7f",
		"endless size":  strings.Repeat("\xff", 20),
		"no member":     "\x00",
		"drained":       "\x02\x12\x00",
		"refused":       "\x02\x1a\x00",
		"kept":          "\x02\x2a\x00",
		"busy":          "\x02\x32\x00",
		"malformed":     "\x03\x0a\x05\x01",
		"half a drain":  "\x02\x0a",
		"unknown field": "\x03\xa2\x06\x00",
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, lower, WithTakeover(time.Hour))
				quic := w.connect(quicAddr)
				w.connect(tcpAddr)
				w.pass(2 * defaultSettleDelay)
				far := w.incoming(quic)
				_, err := far.Write([]byte(bytes))
				require.NoError(t, err)
				if name != "nothing" && name != "half a drain" {
					w.pass(0)
					_, err := readDrain(far)
					var reset *network.StreamError
					require.ErrorAs(t, err, &reset, "at once")
					require.Equal(t, network.StreamProtocolViolation, reset.ErrorCode)
				}
				w.pass(openTimeout)
				_, err = readDrain(far)
				require.ErrorIs(t, err, network.ErrReset)
				require.Empty(t, quic.pipes())
				require.Equal(t, quic.id, w.steered(), "nothing has changed")
				for _, c := range w.m.Explain(lower).Conns {
					require.Empty(t, c.RuledOut)
				}
			})
		})
	}
	t.Run("unknown fields are ignored", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, lower)
			quic := w.connect(quicAddr)
			w.connect(tcpAddr)
			w.pass(2 * defaultSettleDelay)
			far := w.incoming(quic)
			_, err := far.Write([]byte("\x09\x0a\x04\x08\x05\x10\x01\xa2\x06\x00"))
			require.NoError(t, err)
			w.pass(0)
			answer, err := readDrain(far)
			require.NoError(t, err)
			require.NotNil(t, answer.GetDrained())
		})
	})
	t.Run("a flood", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, lower)
			quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
			w.pass(defaultSettleDelay)
			for i := range 1000 {
				w.request([]*fakeConn{quic, tcp}[i%2], []*pb.DrainMessage{drainMessage(uint32(i)), keepMessage()}[i/2%2])
			}
			require.Empty(t, quic.pipes())
			require.Empty(t, tcp.pipes())
			w.m.sched.mu.Lock()
			require.Len(t, w.m.sched.peers, 1)
			require.Len(t, w.m.sched.peers[lower].conns, 2, "one entry for each connection")
			require.LessOrEqual(t, len(w.m.sched.due), 1)
			w.m.sched.mu.Unlock()
			require.Len(t, w.m.usage.of, 2)
			quic.Close()
			w.pass(time.Second)
			require.Empty(t, w.m.sched.peers)
			require.Empty(t, w.m.usage.of)
			require.False(t, tcp.IsClosed())
		})
	})
	t.Run("without duplicates", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, lower)
			quic := w.connect(quicAddr)
			for range 100 {
				require.NotNil(t, w.request(quic, drainMessage(0)).GetRefused())
				require.NotNil(t, w.request(quic, keepMessage()).GetKept())
			}
			require.Empty(t, w.m.sched.peers, "nothing is kept of it")
			require.Empty(t, w.m.usage.of)
		})
	})
}

func TestCloseWhileDraining(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		w.connect(quicAddr)
		tcp := w.connect(tcpAddr)
		tcp.set(func() { tcp.silent = true })
		w.pass(defaultSettleDelay / 2)
		tcp.set(func() { tcp.silent = false })
		w.pass(time.Minute)
		tcp.Close()
		tcp = w.connect(tcpAddr)
		tcp.set(func() { tcp.delay = time.Second })
		w.pass(3 * time.Second)
		far := w.incoming(tcp) // which says nothing
		synctest.Wait()
		start := time.Now()
		require.NoError(t, w.m.Close())
		require.Zero(t, time.Since(start))
		synctest.Wait()
		require.Empty(t, tcp.pipes(), "all requests have ended")
		_, err := readDrain(far)
		require.Error(t, err)
		require.Nil(t, w.request(tcp, drainMessage(0)))
	})
}

// A peer may ask about a connection that no round has seen yet: it was faster. That is still a
// connection that has come.
func TestAskedBeforeTheFirstLook(t *testing.T) {
	quietly := func(w *world, addr string) *fakeConn {
		w.net.notifiee = network.GlobalNoopNotifiee
		defer func() { w.net.notifiee = w.m.Notifee() }()
		return w.connect(addr)
	}
	t.Run("a better one wins at once", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			tcp, other := w.connect(tcpAddr), w.connect(tcpAddr)
			other.set(func() { other.unread = 1 })
			w.pass(time.Minute)
			require.Equal(t, tcp.id, w.steered())
			quic := quietly(w, quicAddr)
			w.m.serves.answerHello(quic, 1)
			w.m.Notifee().Connected(w.net, quic)
			w.pass(2 * defaultSettleDelay)
			require.Equal(t, quic.id, w.steered(), "not only once it has been better for long")
		})
	})
	t.Run("what was said holds", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, lower)
			w.connect(tcpAddr)
			w.connect(tcpAddr)
			w.pass(2 * defaultSettleDelay)
			quic := quietly(w, quicAddr)
			d := w.m.sched.known(lower)
			v := w.m.looks.look(lower, d)
			require.Nil(t, w.m.serves.agreeToLose(quic, time.Minute).GetRefused())
			w.m.rounds.remember(d, v)
			require.True(t, v.facts.conns[2].pledged)
			require.True(t, time.Now().Before(d.state(quic).pledged))
		})
	})
}

// A connection that new streams go to is about to go. Until the next plan says where to, they
// go to one that works.
func TestNewStreamsGoToWhatWorks(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, lower)
		dead, slow, relay, tcp, quic := w.connect(tcpAddr), w.connect(tcpAddr), w.connect(relayAddr), w.connect(tcpAddr), w.connect(quicAddr)
		dead.set(func() { dead.silent = true })
		slow.set(func() { slow.full = network.ErrResourceLimitExceeded })
		w.pass(2*defaultProbeTime + defaultSettleDelay)
		require.ElementsMatch(t, []string{"alive", "alive", "unknown", "alive", "silent"}, pathsOf(w))
		require.Equal(t, quic.id, w.steered())
		require.True(t, w.m.steer.silent(dead), "and none goes to what does not answer")
		require.False(t, w.m.steer.silent(slow))
		w.m.sched.mu.Lock()
		w.m.sched.most = 0 // no round any more
		w.m.sched.mu.Unlock()
		require.Nil(t, w.m.serves.agreeToLose(quic, time.Minute).GetRefused())
		require.Equal(t, tcp.id, w.steered())
		require.Nil(t, w.m.serves.agreeToLose(tcp, time.Minute).GetRefused())
		require.Equal(t, relay.id, w.steered(), "an answer counts for more than a direct path")
		require.Nil(t, w.m.serves.agreeToLose(relay, time.Minute).GetRefused())
		require.Equal(t, slow.id, w.steered(), "what is not known may work")
		require.Equal(t, "no other connection answers", w.m.serves.agreeToLose(slow, time.Minute).GetRefused().GetReason())
		require.Equal(t, slow.id, w.steered())
	})
}

// A connection that no new streams go to is about to go: they stay where they are.
func TestNewStreamsStayWhereTheyAre(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, lower)
		w.connect(tcpAddr)
		other, quic := w.connect(tcpAddr), w.connect(quicAddr)
		w.pass(2 * defaultSettleDelay)
		w.m.sched.mu.Lock()
		w.m.sched.most = 0 // no round any more
		w.m.sched.mu.Unlock()
		require.Nil(t, w.m.serves.agreeToLose(other, time.Minute).GetRefused())
		require.Equal(t, quic.id, w.steered())
	})
}
