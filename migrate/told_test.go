package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
	. "github.com/go-portage/portage/internal/rawpeer"
)

// What the application was told, and when: between the beginning of an exchange and the
// moment from which on an end of the old stream is kept back, at the end of one that gives
// way to another, and in the errors themselves.

// TestErrorsThatPassForSomethingElse: what ends a stream for good is no timeout, after which
// one may try again, and no EOF, for those who ask with errors.Is and errors.As.
func TestErrorsThatPassForSomethingElse(t *testing.T) {
	yamuxDown := fmt.Errorf("%w: connection closed: %w", network.ErrReset, io.EOF)
	for name, cause := range map[string]error{
		"EOF":                  fmt.Errorf("final size: %w", io.EOF),
		"EOF in a reset":       yamuxDown,
		"EOF of lost data":     fmt.Errorf("%w: %w", errLost, yamuxDown),
		"timeout":              fmt.Errorf("answer: %w", os.ErrDeadlineExceeded),
		"timeout in a reset":   &network.StreamError{ErrorCode: 7, Remote: true, TransportError: os.ErrDeadlineExceeded},
		"violation":            fmt.Errorf("%w: more", errViolation),
		"reset":                &network.StreamError{ErrorCode: 7, Remote: true},
		"what forGood returns": forGood(yamuxDown),
	} {
		t.Run(name, func(t *testing.T) {
			err := reset(cause)
			require.ErrorIs(t, err, network.ErrReset)
			require.NotErrorIs(t, err, io.EOF)
			var timeout interface{ Timeout() bool }
			require.False(t, errors.As(err, &timeout) && timeout.Timeout())
			require.Equal(t, errors.Is(cause, errViolation), errors.Is(err, errViolation))
			if of := (*network.StreamError)(nil); errors.As(cause, &of) {
				require.ErrorIs(t, err, &network.StreamError{ErrorCode: of.ErrorCode, Remote: of.Remote})
			}
			require.Contains(t, err.Error(), cause.Error())
		})
	}
	h := receivingFrom(newFake().feeds("", yamuxDown), "")
	_, err := h.read(make([]byte, 1))
	require.ErrorIs(t, err, network.ErrReset)
	require.NotErrorIs(t, err, io.EOF, "outside of a migration, too")
}

// TestToldWhileTheNewStreamOpens: the old connection fails while the new stream is being
// opened, which may take long, and the application is told. The stream stays where it
// failed: nothing is asked of the peer (S8).
func TestToldWhileTheNewStreamOpens(t *testing.T) {
	for name, tell := range map[string]func(s *Stream, old *fakeStream){
		"by Read": func(s *Stream, old *fakeStream) {
			old.ends(errors.New("gone"))
			_, err := s.Read(make([]byte, 1))
			require.Error(t, err)
		},
		"by Write": func(s *Stream, old *fakeStream) {
			old.grants(0, errors.New("gone"))
			_, err := s.Write([]byte("x"))
			require.Error(t, err)
		},
		"by its own Reset": func(s *Stream, _ *fakeStream) { require.NoError(t, s.Reset()) },
	} {
		bubble(t, name, func(t *testing.T) {
			h, old, next := verifyingHost(), newFake(), newFake()
			s := acceptedOn(t, h, old)
			next.conn.remote = playerLow
			next.conn.open = func(context.Context) (network.Stream, error) {
				tell(s, old)
				return next, nil
			}
			require.ErrorIs(t, h.Migrate(context.Background(), s, next.conn), ErrClosed)
			require.Empty(t, next.taken(), "nothing may be asked of the peer")
			require.NotNil(t, next.resetWith)
			require.NoError(t, s.Reset())
			require.Empty(t, h.labels.peers, "nothing may be left (L5)")
		})
		bubble(t, name+", and it does not open", func(t *testing.T) {
			h, old, other := verifyingHost(), newFake(), new(fakeConn)
			s := acceptedOn(t, h, old)
			other.remote = playerLow
			other.open = func(context.Context) (network.Stream, error) {
				tell(s, old)
				return nil, errors.New("no room")
			}
			err := h.Migrate(context.Background(), s, other)
			require.ErrorIs(t, err, ErrClosed)
			require.NotErrorIs(t, err, ErrTryLater, "there is nothing to try again")
		})
	}
}

// TestErrorIsKeptForTheNextExchange: the old connection fails while an attempt of ours is
// under way. It gives way to the peer's (M1), which saves the stream: the application is not
// told in between.
func TestErrorIsKeptForTheNextExchange(t *testing.T) {
	for range 20 { // it was a race between the application's Read and the peer's turn
		p := meeting{kind: verified, hostHigher: true}.meet(t)
		s, _ := p.hostOpens()
		got := reading(s)
		moved, _ := p.asked(s)
		require.NoError(t, p.Conns[0].Close())
		p.holds(s)
		next := p.Opens(1, Prelude, MigrateBytes(p.Fresh(), s.Label()))
		next.Wants(Prelude, AckVerified)
		moved.is(ErrTryLater)
		next.Sends(FinalSizeBytes(1), "new")
		next.Wants(FinalSizeBytes(1))
		require.Equal(t, "new", Take(t, got, "the Read"))
		require.NoError(t, s.Reset())
		p.nothingLeft()
	}
}

// TestGivingWayToADraftOnlyPeer: once an attempt of ours has given way to a draft-only
// peer's, that is answered with an ack (M1), though the application closes its reading in
// between: what proves that the ack has arrived is read in its stead (S3). Where it had
// closed before, ours does not give way.
func TestGivingWayToADraftOnlyPeer(t *testing.T) {
	begin := func(t *testing.T) (s *Stream, old *fakeStream, ours, theirs *exchange) {
		old, next := newFake(), newFake()
		s = acceptedOn(t, verifyingHost(), old)
		ours, theirs = &exchange{initiator: true, id: 8}, &exchange{id: 9, from: s.Label()}
		_, err := s.begin(ours)
		require.NoError(t, err)
		require.True(t, ours.attach(next))
		require.True(t, ours.hold())
		return s, old, ours, theirs
	}
	t.Run("closed in between", func(t *testing.T) {
		s, old, ours, theirs := begin(t)
		w, err := s.beginNext(theirs, false)
		require.NoError(t, err)
		require.NoError(t, s.CloseRead())
		ours.doubt()
		ours.end(stays)
		<-w.turn
		require.True(t, s.stopWaiting(w), "theirs begins")
		require.True(t, theirs.hold())
		require.True(t, s.recv.awaitProof())
		require.False(t, old.readClosed)
		theirs.end(stays)
		old.wait(func() bool { return old.readClosed })
	})
	t.Run("closed before", func(t *testing.T) {
		s, _, ours, theirs := begin(t)
		require.NoError(t, s.CloseRead())
		_, err := s.beginNext(theirs, false)
		require.ErrorIs(t, err, errNoProof)
		require.True(t, ours.commit(), "ours goes on")
		ours.end(stays)
	})
}

// TestMigrateThatOvertakesTheAck: a draft-only peer that has read our end acks, has moved at
// once, and moves on, over a connection that is faster than the ack's. It names the label that
// ours gave, so that this is no meeting (M1): ours goes on, and theirs waits for it (M2),
// whichever ID is the lower.
func TestMigrateThatOvertakesTheAck(t *testing.T) {
	for name, higher := range map[string]bool{"host lower": false, "host higher": true} {
		t.Run(name, func(t *testing.T) {
			p := meeting{kind: draftOnly, hostHigher: higher, opts: []Option{withBusyWait(time.Hour)}}.meet(t)
			s, old := p.hostOpens()
			require.NoError(t, s.CloseWrite())
			old.WantsEOF()
			moved, next := p.asked(s)
			old.ClosesWrite()
			theirs := p.Opens(0, Prelude, MigrateDraftBytes(p.Fresh(), next.Label))
			WaitFor(t, "theirs to wait for its turn", func() bool { return s.queued() == 1 })
			next.Acks(AckDraft)
			next.WantsEOF()
			moved.is(nil)
			theirs.Wants(Prelude, AckDraft)
			next.Sends("1st")
			next.ClosesWrite()
			theirs.Sends("2nd")
			theirs.ClosesWrite()
			theirs.WantsEOF()
			require.Equal(t, "1st2nd", p.readsEnd(s, io.EOF))
			WaitFor(t, "the second migration to end", func() bool { return s.Migrations() == 2 })
			require.NoError(t, s.Close())
			p.nothingLeft()
		})
	}
}

// lossy is a stream of which one Write meets the deadline when it has taken three bytes.
type lossy struct {
	*fakeStream
	lost int // the number of that Write, from 1
	n    int
}

func (l *lossy) Write(p []byte) (int, error) {
	if l.n++; l.n == l.lost {
		n, _ := l.fakeStream.Write(p[:3])
		return n, os.ErrDeadlineExceeded
	}
	return l.fakeStream.Write(p)
}

// TestAnswerThatMeetsTheDeadline: an answer of which a part has not left is never followed by
// what the application, or the next message, says: the opener would take that for the rest
// of it (W1).
func TestAnswerThatMeetsTheDeadline(t *testing.T) {
	for name, opening := range map[string]string{
		"labelled": Prelude + LabelBytes(600+newLabels(playHost).parity(playerLow, false)) + MultistreamToken + EchoToken,
		"ordinary": MultistreamToken + EchoToken,
	} {
		// An ordinary stream is answered token by token, as the plain host does it.
		writes := map[string]int{"labelled": 1, "ordinary": 2}[name]
		for lost := range writes + 1 {
			bubble(t, fmt.Sprintf("%s, Write %d", name, lost), func(t *testing.T) {
				h := verifyingHost()
				handled := make(chan network.Stream, 1)
				h.SetStreamHandler(echoID, func(s network.Stream) { handled <- s })
				u := &lossy{fakeStream: newFake(), lost: lost}
				u.conn.remote = playerLow
				u.feeds(opening, nil)
				h.handleStream(u)
				if lost == 0 {
					require.NoError(t, (<-handled).Reset())
					require.Equal(t, writes, u.n, "Writes")
					return
				}
				synctest.Wait()
				require.Empty(t, handled, "the application got the stream")
				require.NotNil(t, u.resetWith)
				require.Empty(t, h.labels.peers)
			})
		}
	}
	// An answer that the timer sends, and then the ack.
	u := newFake()
	u.grants(3, os.ErrDeadlineExceeded)
	n := verifyingHost().negotiator(u)
	_, _ = io.WriteString(n, MultistreamToken)
	require.Error(t, n.flush())
	u.grants(-1, nil)
	left, err := n.finish(ackMessage(true), 0)
	require.False(t, left)
	require.Error(t, err)
	require.Equal(t, MultistreamToken[:3], u.taken())
}

// TestReadsOfAnOpeningThatBlocks: an application that polls, with short deadlines, a stream
// whose opening cannot leave costs one goroutine.
func TestReadsOfAnOpeningThatBlocks(t *testing.T) {
	virtual(t, func(t *testing.T) {
		u := newFake()
		u.conn.remote = playerLow
		u.grants(0, nil)
		h := verifyingHost()
		s, err := h.open(context.Background(), u, echoID, []protocol.ID{echoID})
		require.NoError(t, err)
		for range 100 {
			require.NoError(t, s.SetReadDeadline(time.Now().Add(time.Millisecond)))
			_, err := s.Read(make([]byte, 1))
			require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		}
		buf := make([]byte, 1<<20)
		stacks := string(buf[:runtime.Stack(buf, true)])
		require.Equal(t, 1, strings.Count(stacks, "(*Stream).sendOpening(")-strings.Count(stacks, "created by github.com/go-portage/portage/migrate.(*Stream).sendOpening"))
		require.NoError(t, s.Reset())
		synctest.Wait()
	})
}

// TestOpeningThatIsSentAgain: where a Read cannot send the opening the next one does, from where
// that has stopped. Else the acceptor never learns of the stream.
func TestOpeningThatIsSentAgain(t *testing.T) {
	virtual(t, func(t *testing.T) {
		u := newFake()
		u.conn.remote = playerLow
		u.grants(3, os.ErrDeadlineExceeded)
		s, err := verifyingHost().open(context.Background(), u, echoID, []protocol.ID{echoID})
		require.NoError(t, err)
		polls := func() {
			require.NoError(t, s.SetReadDeadline(time.Now().Add(time.Millisecond)))
			_, err := s.Read(make([]byte, 1))
			require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		}
		polls()
		require.Equal(t, MultistreamToken[:3], u.taken())
		u.grants(-1, nil)
		polls()
		require.Equal(t, Prelude+LabelBytes(s.Label())+MultistreamToken+EchoToken, u.taken())
		require.NoError(t, s.Reset())
		synctest.Wait()
	})
}

// TestPlaceThatBecomesFree: a stream that has moved and waits for a place under the limit of
// its protocol gets the next one, also where that becomes free because a stream ends.
func TestPlaceThatBecomesFree(t *testing.T) {
	h := verifyingHost()
	full := true
	conn := &fakeConn{remote: playerLow}
	fake := func() *segment {
		g := &segment{fakeStream: newFake(), full: &full, index: 1}
		g.conn = conn
		return g
	}
	waits, other := fake(), newFake()
	other.conn = conn
	s, ends := newStream(h, waits, echoID, 602), newStream(h, other, echoID, 604)
	require.NoError(t, h.enter(s))
	require.NoError(t, h.enter(ends))
	s.scope = &scope{cur: waits.Scope(), unpaid: waits}
	x := &exchange{s: s, unpaid: true}
	x.payLate()
	require.NotNil(t, s.scope.unpaid)
	full = false
	require.NoError(t, ends.Close())
	require.Nil(t, s.scope.unpaid)
	require.Equal(t, echoID, waits.proto)
	require.False(t, h.debts.some.Load())

	// A stream whose connection is gone is not charged any more.
	s.scope.unpaid, waits.proto = waits, ""
	x.payLate()
	require.Equal(t, echoID, waits.proto)
	s.scope.unpaid, waits.proto = waits, ""
	conn.dies()
	x.payLate()
	require.Empty(t, waits.proto)
}
