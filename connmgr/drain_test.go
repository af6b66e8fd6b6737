package connmgr

import (
	"bufio"
	"context"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/pb"
	"github.com/go-portage/portage/policy"
)

// D2: what the other end has not read keeps the connection.
func TestUnreadAtThePeerKeepsTheConnection(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		w.connect(quicAddr)
		loser := w.connect(tcpAddr)
		loser.set(func() { loser.unread = 1 })
		w.pass(time.Hour)
		require.False(t, loser.IsClosed())
		require.Contains(t, w.m.Explain(higher).Conns[1].State, "waiting for the peer to have done with it")
		require.Equal(t, 1, loser.timesAsked(), "it is asked once")
		loser.set(func() { loser.unread = 0 })
		w.pass(time.Second)
		require.True(t, loser.pruned(), "as soon as the peer says that it has done")
	})
}

// D3: a stream that comes after Drained cancels nothing, but what came of it the peer
// may not have read, so it is asked again.
func TestStreamAfterDrained(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		w.connect(quicAddr)
		loser := w.connect(tcpAddr)
		w.pass(defaultSettleDelay + defaultQuietTime/2)
		require.Equal(t, 1, loser.timesAsked(), "fake peers answer at once")
		loser.setPlain(1)
		w.pass(maxQuietGap)
		loser.set(func() { loser.plain, loser.unread = 0, 1 })
		w.pass(time.Hour)
		require.False(t, loser.IsClosed())
		require.Equal(t, 2, loser.timesAsked())
		loser.set(func() { loser.unread = 0 })
		w.pass(time.Second)
		require.True(t, loser.pruned())
	})
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
		require.Contains(t, w.m.Explain(higher).Conns[1].State, "kept: the peer refused: we like")
		said := w.logs.FilterMessageSnippet("refused").All()
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
		w.connect(quicAddr)
		loser := w.connect(tcpAddr)
		loser.set(func() { loser.noDrain = true })
		w.pass(defaultSettleDelay + defaultPlainQuietTime - time.Millisecond)
		require.False(t, loser.IsClosed())
		w.pass(maxQuietGap)
		require.True(t, loser.pruned(), "the quiet time of plain peers holds")
	})
}

// The drain is off where the loser wins after all.
func TestWinnerIsNotDrained(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		quic := w.connect(quicAddr)
		tcp := w.connect(tcpAddr)
		tcp.set(func() { tcp.unread = 1 })
		w.pass(2 * defaultSettleDelay)
		require.Len(t, tcp.pipes(), 1, "it is asked")
		quic.Close()
		w.pass(time.Millisecond)
		require.Empty(t, tcp.pipes(), "the last connection is not drained")
		require.False(t, tcp.IsClosed())
	})
}

// A message that was not asked for, or is none, ends the drain, and nothing else.
func TestWrongAnswersToDrain(t *testing.T) {
	for name, answers := range map[string][]*pb.DrainMessage{
		"drain":               {drainMessage()},
		"no member":           {{}},
		"drained twice":       {drainedMessage(), drainedMessage()},
		"drained, many times": {drainedMessage(), drainedMessage(), drainedMessage(), drainedMessage(), drainedMessage()},
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, higher)
				w.connect(quicAddr).open(1)
				loser := w.connect(tcpAddr)
				loser.setPlain(1) // so that an answer changes nothing yet
				loser.set(func() { loser.answers = answers })
				w.pass(time.Minute)
				require.Empty(t, loser.pipes(), "it is off, until the next attempt")
				require.False(t, loser.IsClosed())
				loser.set(func() { loser.answers, loser.plain = nil, 0 })
				w.pass(defaultMaxRetry + defaultInterval + defaultQuietTime)
				require.True(t, loser.pruned())
			})
		})
	}
}

// asked opens the peer's drain stream on c: the manager under test is the peer of the
// one that drains. It returns the other end.
func (w *world) asked(c *fakeConn) *fakePipe {
	here, there := net.Pipe()
	s := &fakePipe{pipe: here, conn: c}
	c.mu.Lock()
	c.streams = append(c.streams, s)
	c.mu.Unlock()
	go w.m.handleDrain(s)
	w.t.Cleanup(func() { _ = there.Close() })
	return &fakePipe{pipe: there, conn: c}
}

// answered returns what the manager under test has answered, or nil if nothing, and
// whether it has ended the stream.
func answered(s *fakePipe) (m *pb.DrainMessage, ended bool) {
	_ = s.SetReadDeadline(time.Now().Add(time.Millisecond))
	m, err := readDrain(bufio.NewReader(s))
	synctest.Wait()
	if err != nil {
		return nil, err == io.EOF || strings.Contains(err.Error(), "closed")
	}
	return m, false
}

// D1: from Drain on, nothing is opened on the connection, and Drained comes when there is
// nothing else on it.
func TestPledge(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, lower, WithTakeover(1000))
		quic := w.connect(quicAddr)
		tcp := w.connect(tcpAddr)
		tcp.setPlain(1)
		quic.setPlain(1)
		w.pass(defaultSettleDelay)
		require.Equal(t, quic, w.m.steer(t.Context(), lower), "by its own policy")

		s := w.asked(quic)
		require.NoError(t, writeDrain(s, drainMessage()))
		synctest.Wait()
		require.Equal(t, tcp, w.m.steer(t.Context(), lower), "at once")
		require.Contains(t, w.m.Explain(lower).String(), "the peer wants to close it")
		w.pass(time.Minute)
		require.Equal(t, tcp, w.m.steer(t.Context(), lower), "it stays so")
		m, ended := answered(s)
		require.Nil(t, m, "there is a stream")
		require.False(t, ended)
		quic.setPlain(0)
		w.pass(defaultInterval + defaultQuietTime + maxQuietGap)
		m, _ = answered(s)
		require.NotNil(t, m.GetDrained())

		require.NoError(t, writeDrain(s, drainMessage()))
		w.pass(defaultQuietTime + maxQuietGap)
		m, _ = answered(s)
		require.NotNil(t, m.GetDrained(), "as often as it is asked")

		require.NoError(t, s.pipe.Close())
		w.pass(time.Millisecond)
		require.Equal(t, quic, w.m.steer(t.Context(), lower), "the drain is off")
		w.pass(time.Minute)
		require.Empty(t, w.m.pledges)
	})
}

// D1: at once also where a round is under way, which takes as long as its migrations.
func TestPledgeDuringARound(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, lower)
		quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
		tcp.open(1)
		w.pass(defaultSettleDelay)
		w.mover.setAnswer(func(*fakeStream) error { return errHang })
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_, _ = w.m.Consolidate(ctx, lower)
		}()
		synctest.Wait()
		require.Equal(t, quic, w.m.steer(t.Context(), lower))
		s := w.asked(quic)
		require.NoError(t, writeDrain(s, drainMessage()))
		w.pass(time.Second)
		require.Equal(t, tcp, w.m.steer(t.Context(), lower))
		cancel()
		<-ended
	})
}

// That the peer wants to close a loser is no reason to have another winner, and least of
// all at once: the streams of drains that begin look like ones that cannot move.
func TestPledgeForALoserLeavesTheWinner(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher, WithPolicy(policy.Chain(policy.PinnedStreams())))
		conns := []*fakeConn{w.connect(quicAddr), w.connect(quicAddr), w.connect(quicAddr)}
		for _, c := range conns {
			c.setPlain(1)
		}
		w.pass(defaultSettleDelay)
		var winner *fakeConn
		var losers []*fakeConn
		for _, c := range conns {
			if w.m.steer(t.Context(), higher) == network.Conn(c) {
				winner = c
			} else {
				losers = append(losers, c)
			}
		}
		require.Len(t, losers, 2)
		losers[0].setPlain(2) // for a moment
		s := w.asked(losers[1])
		require.NoError(t, writeDrain(s, drainMessage()))
		w.pass(time.Millisecond)
		require.Equal(t, winner, w.m.steer(t.Context(), higher))
		losers[0].setPlain(1)
		w.pass(time.Minute)
		require.Equal(t, winner, w.m.steer(t.Context(), higher))

		losers[0].setPlain(2)
		require.NoError(t, s.pipe.Close())
		w.pass(time.Millisecond)
		require.Equal(t, winner, w.m.steer(t.Context(), higher), "nor that it does not want to any more")
	})
}

// D1: the quiet time before Drained.
func TestDrainedComesAfterAQuietTime(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, lower)
		quic := w.connect(quicAddr)
		w.connect(tcpAddr)
		s := w.asked(quic)
		require.NoError(t, writeDrain(s, drainMessage()))
		w.pass(defaultQuietTime - 2*time.Millisecond)
		m, _ := answered(s)
		require.Nil(t, m)
		w.pass(2 * time.Millisecond)
		m, _ = answered(s)
		require.NotNil(t, m.GetDrained())
	})
}

func TestRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		peer   func(w *world) *fakeConn // returns the connection to drain
		opts   []Option
		reason string
	}{
		"last connection": {func(w *world) *fakeConn {
			return w.connect(quicAddr)
		}, nil, "there is no other connection that could take its place"},
		"unlimited, and the other one is not": {func(w *world) *fakeConn {
			w.connectLimited()
			return w.connect(quicAddr)
		}, nil, "there is no other connection that could take its place"},
		"the other one is about to be closed by the peer": {func(w *world) *fakeConn {
			tcp, quic := w.connect(tcpAddr), w.connect(quicAddr)
			require.NoError(w.t, writeDrain(w.asked(tcp), drainMessage()))
			synctest.Wait()
			return quic
		}, nil, "there is no other connection that could take its place"},
		"the other one is being closed by this side": {func(w *world) *fakeConn {
			quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
			tcp.blocks = make(chan struct{}) // closing it takes a while
			w.t.Cleanup(func() { close(tcp.blocks) })
			_, err := w.m.Consolidate(w.t.Context(), lower)
			require.NoError(w.t, err)
			w.pass(defaultQuietTime + time.Second)
			return quic
		}, nil, "there is no other connection that could take its place"},
		"exempt": {func(w *world) *fakeConn {
			w.connect(tcpAddr)
			return w.connect(quicAddr)
		}, []Option{WithExempt(ExemptConn("we measure it", func(c network.Conn) bool { return c.RemoteMultiaddr().String() == quicAddr }))}, "we measure it"},
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, lower, c.opts...)
				conn := c.peer(w)
				w.pass(defaultSettleDelay)
				s := w.asked(conn)
				require.NoError(t, writeDrain(s, drainMessage()))
				m, _ := answered(s)
				require.Equal(t, c.reason, m.GetRefused().GetReason())
				_, ended := answered(s)
				require.True(t, ended)
				require.Zero(t, w.m.pledges[conn])
			})
		})
	}
}

// A controller keeps what it keeps.
func TestControllerRefusesToLoseItsWinner(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
		tcp.set(func() { tcp.unread = 1 })
		w.pass(2 * defaultSettleDelay)
		s := w.asked(quic)
		require.NoError(t, writeDrain(s, drainMessage()))
		m, _ := answered(s)
		require.Equal(t, "this side decides, and keeps it", m.GetRefused().GetReason())
		s = w.asked(tcp)
		require.NoError(t, writeDrain(s, drainMessage()))
		tcp.set(func() { tcp.unread = 0 })
		w.pass(defaultQuietTime + time.Second)
		require.True(t, tcp.pruned(), "both may drain the same connection")
	})
}

// D4: both drain at once, each the connection that the other one keeps.
func TestBothDrainAtOnce(t *testing.T) {
	// The follower has been told to consolidate, so it drains although the peer decides.
	setUp := func(t *testing.T) (w *world, keep, drains *fakeConn) {
		w = newWorld(t, lower)
		quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
		tcp.set(func() { tcp.unread = 1 })
		w.pass(defaultSettleDelay)
		_, err := w.m.Consolidate(t.Context(), lower)
		require.NoError(t, err)
		synctest.Wait()
		require.Equal(t, 1, tcp.timesAsked())
		return w, quic, tcp
	}
	t.Run("the higher peer ID gives up its own", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w, quic, tcp := setUp(t)
			quic.set(func() { quic.unread = 1 }) // lest it be closed by this side, too
			s := w.asked(quic)
			require.NoError(t, writeDrain(s, drainMessage()))
			w.pass(defaultQuietTime + maxQuietGap)
			require.Empty(t, tcp.pipes(), "its own drain is off")
			m, _ := answered(s)
			require.NotNil(t, m.GetDrained(), "%v", m)
			tcp.set(func() { tcp.unread = 0 })
			w.pass(time.Hour)
			require.False(t, tcp.IsClosed(), "it is the one that is left when the peer closes the other")
			quic.Close()
			w.pass(time.Hour)
			require.False(t, tcp.IsClosed())
		})
	})
	t.Run("the lower peer ID refuses", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			w.net.identify(higher, DrainID)
			quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
			w.pass(defaultSettleDelay)
			tcp.set(func() { tcp.unread = 1 })
			w.pass(time.Millisecond)
			w.m.mu.Lock()
			w.m.peers[higher].winner = nil // as if it had changed its mind
			w.m.mu.Unlock()
			s := w.asked(quic)
			require.NoError(t, writeDrain(s, drainMessage()))
			m, _ := answered(s)
			require.Equal(t, "this side is draining the others", m.GetRefused().GetReason())
			require.Len(t, tcp.pipes(), 1, "its own drain goes on")
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
			s := w.asked(quic)
			require.NoError(t, writeDrain(s, drainMessage()))
			synctest.Wait()
			require.Equal(t, tcp, w.m.steer(t.Context(), lower))
			tcp.Close()
			w.pass(time.Second)
			require.NotEqual(t, tcp, w.m.steer(t.Context(), lower), "nothing is steered to a closed connection")
			require.False(t, quic.IsClosed())
		})
	})
	t.Run("silently", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
			w.pass(defaultSettleDelay)
			require.Equal(t, 1, tcp.timesAsked())
			quic.set(func() { quic.silent = true })
			w.pass(defaultQuietTime + defaultProbeTime + time.Second)
			require.False(t, tcp.IsClosed(), "the winner does not answer any more")
			require.Equal(t, tcp, w.m.steer(t.Context(), higher), "new streams go to the one that does")
		})
	})
}

// The wire: what is no Drain is a violation, and costs nothing but its stream.
func TestDrainFromAHostilePeer(t *testing.T) {
	for name, bytes := range map[string]string{
		"nothing":       "",
		"oversized":     "\xff\xff\x7f",
		"endless size":  strings.Repeat("\xff", 20),
		"no member":     "\x00",
		"drained":       "\x02\x12\x00",
		"refused":       "\x02\x1a\x00",
		"malformed":     "\x03\x0a\x05\x01",
		"half a drain":  "\x02\x0a",
		"unknown field": "\x03\xa2\x06\x00",
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, lower)
				quic := w.connect(quicAddr)
				w.connect(tcpAddr)
				s := w.asked(quic)
				go func() { _, _ = s.Write([]byte(bytes)) }()
				w.pass(openTimeout)
				m, ended := answered(s)
				require.Nil(t, m)
				require.True(t, ended)
				require.Empty(t, w.m.pledges)
				require.Empty(t, quic.pipes())
			})
		})
	}
	t.Run("many", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, lower)
			quic := w.connect(quicAddr)
			w.connect(tcpAddr)
			for range 100 {
				require.NoError(t, writeDrain(w.asked(quic), drainMessage()))
				synctest.Wait()
			}
			require.Len(t, w.m.pledges, 1, "one for each connection")
			require.Len(t, quic.pipes(), 1, "the last one's")
		})
	})
}

func TestCloseWhileDraining(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		w.connect(quicAddr)
		tcp := w.connect(tcpAddr)
		tcp.set(func() { tcp.unread = 1 })
		w.pass(2 * defaultSettleDelay)
		s := w.asked(tcp)
		require.NoError(t, writeDrain(s, drainMessage()))
		synctest.Wait()
		start := time.Now()
		require.NoError(t, w.m.Close())
		require.Zero(t, time.Since(start))
		synctest.Wait()
		require.Empty(t, tcp.pipes(), "all drains are off")
		s = w.asked(tcp)
		_, ended := answered(s)
		require.True(t, ended)
	})
}
