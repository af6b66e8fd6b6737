package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-yamux/v5"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
	. "github.com/go-portage/portage/internal/rawpeer"
)

// Attempts to resume a stream, of either end, and what becomes of the stream.

// Which label the stream has from then on, whoever asked.
func TestResumedStreamsHaveTheNewLabel(t *testing.T) {
	p := meetResuming(t)
	s, old := p.hostAcceptsResumable()
	require.Equal(t, []uint64{old.Label}, p.labelled())
	next := p.resumes(old, epoch(1), 1)
	next.Wants(Prelude, ackReceivedBytes(1))
	p.talk(s, next)
	require.Equal(t, next.Label, s.Label())
	require.Equal(t, []uint64{next.Label}, p.labelled())

	p.host.Leave(p.Ends[1])
	failed := p.arrivesAfter(old)
	require.NoError(t, failed.Reset())
	again := p.arrivesAfter(old)
	again.Sends(Prelude, ackReceivedBytes(1+4))
	p.talk(s, again)
	require.Equal(t, again.Label, s.Label())
	require.Equal(t, []uint64{again.Label}, p.labelled(), "that of the attempt that failed is free")
	require.NoError(t, s.Reset())
	p.nothingLeft()
}

// A peer that answers with what it must not harms its own stream.
func TestViolationsOfAnswersToAttempts(t *testing.T) {
	for name, answer := range map[string]string{
		"an ack of a migration":   AckVerified,
		"no ack":                  LabelBytes(2),
		"no message":              Lengthy("\x00\x00"),
		"more received than sent": ackReceivedBytes(1 << 40),
	} {
		t.Run(name, func(t *testing.T) {
			p := meetResuming(t)
			s, old := p.hostAcceptsResumable()
			other, otherOld := p.hostAcceptsResumable()
			p.host.resumer.get(p.ID(), old.Label).lose(nil, errors.New("test"))
			next := p.arrivesAfter(old)
			next.Sends(Prelude, answer)
			p.failed(s)
			_, err := s.Read(make([]byte, 1))
			require.ErrorIs(t, err, errViolation)
			p.talk(other, otherOld)
		})
	}
}

// Whoever resets a stream resets what asks for it, too.
func TestResetOfAStreamThatIsAsked(t *testing.T) {
	p := meetResuming(t)
	s, old := p.hostAcceptsResumable()
	p.host.resumer.get(p.ID(), old.Label).lose(nil, errors.New("test"))
	next := p.arrivesAfter(old)
	require.NoError(t, s.ResetWithError(7))
	next.WantsReset(7)
	p.nothingLeft()
}

// What was received before a stream was given up is read, and the error behind it.
func TestWhatWasReceivedIsRead(t *testing.T) {
	p := meetResuming(t)
	s, old := p.hostAcceptsResumable()
	s.recv.mu.Lock()
	s.recv.cur.got.add([]byte("abc")) // as a migration has it that was lost
	s.recv.mu.Unlock()
	p.host.resumer.get(p.ID(), old.Label).lose(nil, errors.New("test"))
	next := p.arrivesAfter(old)
	next.Sends(Prelude, AckDenied)
	WaitFor(t, "the stream to be given up", func() bool { return p.host.resumer.get(p.ID(), old.Label) == nil })
	require.Equal(t, "abc", p.readsEnd(s, network.ErrReset))
	p.nothingLeft()
}

// Who was told by a Write that the stream has ended with its connection is not told of a clean end
// later: it does not migrate any more.
func TestStreamThatHasEndedDoesNotMigrate(t *testing.T) {
	p := meeting{kind: resuming, first: QUIC, second: TCP, opts: []Option{WithResumption()}}.meet(t)
	s, _ := p.hostAcceptsResumable()
	require.NoError(t, p.Conns[0].CloseWithError(network.ConnShutdown)) // which TCP may lose
	WaitFor(t, "the host to know", p.Ends[0].IsClosed)
	WaitFor(t, "Writes to fail", func() bool {
		_, err := s.Write([]byte{'x'})
		return err != nil
	})
	require.ErrorIs(t, p.host.Migrate(t.Context(), s, p.Ends[1]), ErrClosed)
	require.NoError(t, s.Reset())
}

// resumableOn has a host of the test's bubble accept a stream that may be resumed. Nobody can be
// dialled, and nothing be told beside it.
func resumableOn(t *testing.T, old *fakeStream) (*Stream, *resumption) {
	t.Helper()
	h := verifyingHost(WithResumption(), WithRedial(func(context.Context, peer.AddrInfo) error { return errors.New("nobody there") }))
	h.resumer = newResumer(h)
	old.conn.open = func(context.Context) (network.Stream, error) { return nil, errNoRoom }
	s := acceptedWith(t, h, old, resumableLabelBytes)
	t.Cleanup(func() {
		_ = s.Reset()
		h.cancel()
	})
	s.dir = network.DirInbound
	r := s.send.resumption
	require.NotNil(t, r)
	return s, r
}

// loses takes the stream off its connection, and has nobody look for another.
func (r *resumption) loses() {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	r.loseLocked(errors.New("test"))
}

// TestWriteThatWaitsForAMigrationIsKept: a Write that waits for the stream to move goes to the
// ring when that is lost, and returns.
func TestWriteThatWaitsForAMigrationIsKept(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := resumableOn(t, newFake())
		_, err := s.send.pause()
		require.NoError(t, err)
		wrote := make(chan error, 1)
		go func() {
			_, err := s.Write([]byte("abc"))
			wrote <- err
		}()
		synctest.Wait()
		require.Empty(t, wrote)
		r.loses()
		synctest.Wait()
		require.Len(t, wrote, 1)
		require.NoError(t, <-wrote)
		require.EqualValues(t, 3, r.ring.end)
	})
}

// TestWriteThatFailsForGoodWhileTheStreamMoves: S12. Where an exchange pauses the half while the end of
// its connection is judged, what the old stream has not taken goes to the new one.
func TestWriteThatFailsForGoodWhileTheStreamMoves(t *testing.T) {
	old, next := newFake(), newFake()
	s, _ := resumableOn(t, old)
	old.grants(1, &network.ConnError{ErrorCode: network.ConnNoError})
	h := &s.send
	is := func(cond func() bool) func() bool {
		return func() bool {
			h.mu.Lock()
			defer h.mu.Unlock()
			return cond()
		}
	}
	s.mu.Lock() // who judges waits for it
	type result struct {
		n   int
		err error
	}
	wrote, paused := make(chan result, 1), make(chan result, 1)
	go func() {
		n, err := s.Write([]byte("abc"))
		wrote <- result{n, err}
	}()
	WaitFor(t, "the end to be judged", is(func() bool { return h.written == 1 && h.inside }))
	go func() {
		n, err := h.pause()
		paused <- result{int(n), err}
	}()
	WaitFor(t, "the half to be paused", is(func() bool { return h.state == sendPaused }))
	s.mu.Unlock()
	require.Equal(t, result{n: 1}, Take(t, paused, "the pause"))
	_, err := h.resume(next)
	require.NoError(t, err)
	require.Equal(t, result{n: 3}, Take(t, wrote, "the Write"))
	require.Equal(t, "bc", next.taken())
}

// TestWriteThatFailsBeforeItsConnectionSaysSo: R1, S1. On QUIC the streams fail before the connection
// is closed. An application that was told then may do nothing more: its stream must not migrate.
func TestWriteThatFailsBeforeItsConnectionSaysSo(t *testing.T) {
	virtual(t, func(t *testing.T) {
		old := newFake()
		s, r := resumableOn(t, old)
		old.grants(0, &network.ConnError{ErrorCode: network.ConnNoError})
		_, err := s.Write([]byte("abc"))
		require.ErrorAs(t, err, new(*network.ConnError))
		require.False(t, r.lives(), "it was closed on purpose")
		require.True(t, s.told())
		_, err = s.send.pause()
		require.Error(t, err)
	})
}

// TestHandoverEndsWithItsStream: R13. Whoever waits for the end of the old stream waits no longer
// when the stream is lost.
func TestHandoverEndsWithItsStream(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := resumableOn(t, newFake())
		s.recv.hold()
		s.recv.handover(&source{stream: newFake()}, finalSize(10))
		ended := make(chan error, 1)
		go func() { ended <- s.recv.await(time.Hour, time.Hour, func() time.Time { return time.Now() }) }()
		synctest.Wait()
		require.Empty(t, ended)
		r.loses()
		synctest.Wait()
		require.Len(t, ended, 1)
		require.Error(t, <-ended)
	})
}

// all is what a stream has brought, to its end.
type all struct {
	got string
	err error
}

func readingAll(s *Stream) chan all {
	read := make(chan all, 1)
	go func() {
		got, err := io.ReadAll(s)
		read <- all{string(got), err}
	}()
	return read
}

// TestEndIsBelievedAsSoonAsItIsAnnounced: R7. Where the announcement comes behind the EOF nothing
// more is waited for.
func TestEndIsBelievedAsSoonAsItIsAnnounced(t *testing.T) {
	virtual(t, func(t *testing.T) {
		old := newFake()
		s, r := resumableOn(t, old)
		old.feeds("abc", nil).ends(io.EOF)
		read := readingAll(s)
		synctest.Wait()
		require.Empty(t, read, "it may be false")
		r.ends(3)
		synctest.Wait()
		require.Len(t, read, 1)
		require.Equal(t, all{got: "abc"}, <-read)
	})
}

// TestEndsThatAreNotAnnounced: R7. Where a muxer may report an EOF for being closed, one that was
// not announced is believed a second later, if the connection is open still.
func TestEndsThatAreNotAnnounced(t *testing.T) {
	for _, dies := range []bool{false, true} {
		bubble(t, fmt.Sprintf("dies %t", dies), func(t *testing.T) {
			old := newFake()
			s, r := resumableOn(t, old)
			old.feeds("abc", nil).ends(io.EOF)
			read := readingAll(s)
			time.Sleep(eofVouched - time.Nanosecond)
			synctest.Wait()
			require.Empty(t, read)
			if dies {
				old.conn.dies()
			}
			time.Sleep(time.Nanosecond)
			synctest.Wait()
			if dies {
				require.Empty(t, read)
				require.False(t, r.attached())
			} else {
				require.Len(t, read, 1)
				require.Equal(t, all{got: "abc"}, <-read)
			}
		})
	}
}

// session is a session of yamux with nobody.
func session(t *testing.T, up bool) *yamux.Session {
	conn, other := net.Pipe()
	s, err := yamux.Client(conn, nil, nil)
	require.NoError(t, err)
	t.Cleanup(func() {
		_ = s.Close()
		_ = other.Close()
	})
	if !up {
		require.NoError(t, s.Close())
	}
	return s
}

// TestEndsOfASessionThatIsUp: R7. Yamux reports no EOF of its own before its session is down: until
// then one needs no announcement, however busy the connection is that has to bring that.
func TestEndsOfASessionThatIsUp(t *testing.T) {
	for _, up := range []bool{true, false} {
		bubble(t, fmt.Sprintf("up %t", up), func(t *testing.T) {
			old := newFake()
			old.conn.muxer = session(t, up)
			s, _ := resumableOn(t, old)
			old.feeds("abc", nil).ends(io.EOF)
			read := readingAll(s)
			synctest.Wait()
			if !up {
				require.Empty(t, read, "it may be false")
				return
			}
			require.Len(t, read, 1)
			require.Equal(t, all{got: "abc"}, <-read)
		})
	}
}

func (r *resumption) attached() bool {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	return r.state == resumeAttached
}

// stubborn is a stream that cannot be closed for writing: the other end has given it up.
type stubborn struct{ *fakeStream }

func (u stubborn) CloseWrite() error {
	return &network.StreamError{ErrorCode: codeGivenUp, Remote: true}
}
func (u stubborn) Close() error { return u.CloseWrite() }

// TestEndThatDoesNotLeaveLosesTheStream: R1, R8. Nobody may be reading who would see it.
func TestEndThatDoesNotLeaveLosesTheStream(t *testing.T) {
	for name, end := range map[string]func(s *Stream) error{
		"CloseWrite": (*Stream).CloseWrite, "Close": (*Stream).Close,
	} {
		bubble(t, name, func(t *testing.T) {
			s, r := resumableOn(t, newFake())
			s.send.cur = stubborn{s.send.cur.(*fakeStream)}
			require.NoError(t, end(s), "it is sent again")
			require.False(t, r.attached())
		})
		bubble(t, name+" behind what is sent again", func(t *testing.T) {
			s, r := resumableOn(t, newFake())
			r.loses()
			_, err := s.Write([]byte("abc"))
			require.NoError(t, err)
			require.NoError(t, end(s))
			next := newFake()
			next.conn = s.Conn().(*fakeConn)
			s.mu.Lock()
			r.state = resumeAsking
			s.mu.Unlock()
			require.True(t, r.attach(stubborn{next}, r.promised, 0, 0))
			synctest.Wait()
			require.Equal(t, "abc", next.taken())
			require.False(t, r.attached())
		})
	}
}

// TestTombstonesThatWaitInVain: R8. They go a while after the last confirmation, and leave alone
// what has been given everything.
func TestTombstonesThatWaitInVain(t *testing.T) {
	const patience = 20 * time.Second
	gone := func(r *resumption) bool {
		synctest.Wait()
		return !r.lives()
	}
	bubble(t, "everything is sent", func(t *testing.T) {
		old := newFake()
		s, r := resumableOn(t, old)
		s.host.cfg.resumes.patience = patience
		_, err := s.Write([]byte("abc"))
		require.NoError(t, err)
		require.NoError(t, s.Close())
		time.Sleep(patience / 2)
		r.confirmed(2)
		time.Sleep(patience / 2)
		r.confirmed(2) // says nothing new
		require.False(t, gone(r))
		time.Sleep(patience/2 - time.Nanosecond)
		require.False(t, gone(r))
		time.Sleep(time.Nanosecond)
		require.True(t, gone(r))
		require.True(t, old.isClosed)
		require.Nil(t, old.resetWith)
	})
	bubble(t, "something is not", func(t *testing.T) {
		s, r := resumableOn(t, newFake())
		s.host.cfg.resumes.patience = patience
		r.loses()
		_, err := s.Write([]byte("abc"))
		require.NoError(t, err)
		next := newFake()
		next.conn = s.Conn().(*fakeConn)
		next.grants(1, nil)
		s.mu.Lock()
		r.state = resumeAsking
		s.mu.Unlock()
		require.True(t, r.attach(next, r.promised, 0, 0))
		require.NoError(t, s.Close())
		time.Sleep(patience - time.Nanosecond)
		require.False(t, gone(r))
		time.Sleep(time.Nanosecond)
		require.True(t, gone(r))
		require.NotNil(t, next.resetWith)
	})
}

// TestWhenAttemptsAreMade: R6. The end that has accepted the stream leaves the first attempt to
// the other, and after each that fails some time passes.
func TestWhenAttemptsAreMade(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := resumableOn(t, newFake())
		c := &fakeConn{remote: playerLow}
		answers := []string{"", "", Prelude + ackStaleBytes(0, "\x00"), Prelude + ackStaleBytes(0, "\x01"), Prelude + ackReceivedBytes(0)}
		var at []time.Duration
		begun := time.Now()
		c.open = func(context.Context) (network.Stream, error) {
			u := newFake()
			u.conn = c
			if answer := answers[len(at)]; answer != "" {
				u.feeds(answer, nil)
			} else {
				u.ends(network.ErrReset)
			}
			at = append(at, time.Since(begun))
			return u, nil
		}
		s.host.Host.(*bare).conns = []network.Conn{c}
		r.lose(nil, errors.New("test"))
		time.Sleep(time.Minute)
		synctest.Wait()
		require.Len(t, at, len(answers))
		require.Equal(t, c, s.Conn())
		require.Equal(t, acceptorWaits, at[0])
		for i, pause := range []time.Duration{firstPause, 2 * firstPause, 4 * firstPause} {
			took := at[i+1] - at[i]
			require.LessOrEqual(t, took, pause, "pause %d", i)
			require.GreaterOrEqual(t, took, pause/2, "pause %d", i)
		}
		require.Equal(t, attemptTimeout, at[4]-at[3], "the other end's is about to come")
	})
}

// TestLostConnectionsAreDialledAgain: where no connection is left the peer is dialled, also at the
// address of the one that was lost, if that is where it was dialled before.
func TestLostConnectionsAreDialledAgain(t *testing.T) {
	for dir, known := range map[network.Direction]int{network.DirOutbound: 1, network.DirInbound: 0} {
		bubble(t, dir.String(), func(t *testing.T) {
			old := newFake()
			old.conn.dir = dir
			s, r := resumableOn(t, old)
			dialled := make(chan peer.AddrInfo, 100)
			s.host.cfg.redial = func(_ context.Context, p peer.AddrInfo) error {
				dialled <- p
				return errors.New("nobody there")
			}
			r.lose(nil, errors.New("test"))
			synctest.Wait()
			require.Len(t, dialled, 1, "at once")
			p := <-dialled
			require.Equal(t, playerLow, p.ID)
			require.Len(t, p.Addrs, known)
			if known > 0 {
				require.Equal(t, old.conn.RemoteMultiaddr(), p.Addrs[0])
			}
			time.Sleep(longestPause)
			synctest.Wait()
			require.NotEmpty(t, dialled, "again")
			require.Equal(t, p, <-dialled)
		})
	}
}

// asking loses the stream, and returns the one of the attempt that is made then.
func (r *resumption) asking(t *testing.T) *fakeStream {
	t.Helper()
	c, u := &fakeConn{remote: playerLow}, newFake()
	u.conn = c
	c.open = func(context.Context) (network.Stream, error) { return u, nil }
	r.s.host.Host.(*bare).conns = []network.Conn{c}
	r.lose(nil, errors.New("test"))
	time.Sleep(acceptorWaits)
	synctest.Wait()
	return u
}

// TestAnswersThatDoNotCount: R3, R5. Once the peer's own attempt has come, what it answers to ours
// decides nothing.
func TestAnswersThatDoNotCount(t *testing.T) {
	for name, answer := range map[string]string{
		"ack": ackReceivedBytes(0), "denial": AckDenied, "stale": ackStaleBytes(0, "\x01"), "violation": AckVerified,
		"more received than sent": ackReceivedBytes(1 << 40),
	} {
		bubble(t, name, func(t *testing.T) {
			s, r := resumableOn(t, newFake())
			u := r.asking(t)
			s.mu.Lock()
			require.Equal(t, resumeAsking, r.state)
			r.promised++
			r.state, r.waits.attempt = resumeAnswering, nil
			s.mu.Unlock()
			u.feeds(Prelude+answer, nil)
			synctest.Wait()
			s.mu.Lock()
			require.Equal(t, resumeAnswering, r.state)
			s.mu.Unlock()
			require.NotEqual(t, u.Conn(), s.Conn())
		})
	}
}
