package migrate

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"
)

// onto takes the stream, which is lost, to u, whose other end has received nothing.
func (r *resumption) onto(t *testing.T, u network.Stream, start uint64) {
	t.Helper()
	r.s.mu.Lock()
	r.state = resumeAsking
	r.s.mu.Unlock()
	require.True(t, r.attach(u, r.promised, 0, start))
}

// TestStreamThatEndsWhileItIsSentAgain: R1, R4. What the ring had is gone once the stream has
// ended for good, so that it cannot go on behind that: who writes is told, and does not wait for ever.
func TestStreamThatEndsWhileItIsSentAgain(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := resumableOn(t, newFake())
		r.loses()
		_, err := s.Write([]byte(strings.Repeat("x", 3*replayed)))
		require.NoError(t, err)
		next := newFake()
		next.conn = s.Conn().(*fakeConn)
		next.grants(0, nil)
		r.onto(t, next, 0)
		wrote := writing(&s.send, "more")
		synctest.Wait()
		require.Empty(t, wrote)
		r.ended(next, &network.StreamError{ErrorCode: 7, Remote: true}) // a Read has seen the reset
		require.False(t, r.lives())
		next.grants(replayed, nil) // of which the Write does not know yet
		time.Sleep(time.Hour)
		synctest.Wait()
		require.Len(t, wrote, 1, "the Write waits for ever")
		require.Error(t, (<-wrote).err)
	})
}

// TestMoreIsConfirmedThanWasSent: R4, R12. A peer that confirms, while something is sent again, what it has
// not got yet must not get a gap: the stream ends at both ends.
func TestMoreIsConfirmedThanWasSent(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := resumableOn(t, newFake())
		r.loses()
		_, err := s.Write([]byte(strings.Repeat("x", 3*replayed)))
		require.NoError(t, err)
		next := newFake()
		next.conn = s.Conn().(*fakeConn)
		next.grants(0, nil)
		r.onto(t, next, 0)
		r.confirmed(2 * replayed)
		next.grants(replayed, nil)
		synctest.Wait()
		require.False(t, r.lives())
		require.NotNil(t, next.resetWith)
		_, err = s.Write([]byte("more"))
		require.ErrorIs(t, err, network.ErrReset)
		_, err = s.Read(make([]byte, 1))
		require.ErrorIs(t, err, network.ErrReset)
	})
}

// TestStreamThatEndsWhileAReplayMoves: the same where a migration moves the stream meanwhile.
func TestStreamThatEndsWhileAReplayMoves(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := resumableOn(t, newFake())
		r.loses()
		_, err := s.Write([]byte(strings.Repeat("x", 3*replayed)))
		require.NoError(t, err)
		old, next := newFake(), newFake()
		old.conn = s.Conn().(*fakeConn)
		old.grants(0, nil)
		r.onto(t, old, 0)
		synctest.Wait()
		_, err = s.send.pause()
		require.NoError(t, err)
		r.ended(old, &network.ConnError{ErrorCode: network.ConnGarbageCollected})
		require.False(t, r.lives())
		_, err = s.send.resume(next)
		require.NoError(t, err)
		wrote := writing(&s.send, "more")
		time.Sleep(time.Hour)
		synctest.Wait()
		require.Len(t, wrote, 1, "the Write waits for ever")
		require.Error(t, (<-wrote).err)
	})
}

// TestResumedWhileItIsBeingClosed: R8. An opener that closes waits for the acceptor's answer first. If
// the stream is resumed meanwhile its end has yet to be confirmed all the same.
func TestResumedWhileItIsBeingClosed(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := resumableOn(t, newFake())
		_, err := s.Write([]byte("abc"))
		require.NoError(t, err)
		r.loses()
		s.mu.Lock()
		require.True(t, s.shut(), "as Close does, before it waits for the answer")
		s.mu.Unlock()
		next := newFake()
		next.conn = s.Conn().(*fakeConn)
		r.confirmed(3)
		r.onto(t, next, 3)
		synctest.Wait()
		require.True(t, r.lives(), "nobody has confirmed the end")
		require.False(t, next.isClosed)
	})
}

// TestEndIsNotKeptBackByASilentPath: S5. An initiator that waits long for the ack gives its application
// the end of the old stream, also where the stream is resumable and the end is known to be true.
func TestEndIsNotKeptBackByASilentPath(t *testing.T) {
	for name, told := range map[string]bool{"announced": true, "not announced": false} {
		bubble(t, name, func(t *testing.T) {
			old, next := newFake(), newFake()
			s, r := resumableOn(t, old)
			next.conn = &fakeConn{remote: playerLow, open: func(context.Context) (network.Stream, error) { return next, nil }}
			go func() { _ = s.host.Migrate(context.Background(), s, next.conn) }() // nobody answers
			synctest.Wait()
			old.feeds("abc", nil).ends(io.EOF)
			if told {
				r.ends(3)
			}
			read := readingAll(s)
			time.Sleep(time.Minute)
			synctest.Wait()
			require.Len(t, read, 1, "the end is kept back for ever")
			require.Equal(t, all{got: "abc"}, <-read)
		})
	}
}

// TestEndIsAnnouncedThatAMigrationSends: R7. CloseWrite comes while a migration calls a Write out of
// the old stream: where the writing ends is known once that is out.
func TestEndIsAnnouncedThatAMigrationSends(t *testing.T) {
	virtual(t, func(t *testing.T) {
		old, next := newFake(), newFake()
		s, r := resumableOn(t, old)
		told := make(chan string, 10)
		c := s.Conn().(*fakeConn)
		c.open = func(context.Context) (network.Stream, error) {
			u := newFake()
			u.conn = c
			return watchedWrites{u, told}, nil
		}
		next.conn = c
		stuck := &slowToLeave{fakeStream: old, leave: make(chan struct{})}
		s.send.cur = stuck
		old.grants(1, nil)
		go func() { _, _ = s.Write([]byte("abc")) }()
		synctest.Wait()
		x := &exchange{id: s.Label() + 1, verified: true}
		_, err := s.begin(x)
		require.NoError(t, err)
		require.True(t, x.attach(next))
		require.True(t, x.hold())
		moved := make(chan error, 1)
		go func() { moved <- x.switchSending(next) }()
		synctest.Wait()
		require.NoError(t, s.CloseWrite())
		time.Sleep(time.Second)
		close(stuck.leave)
		require.NoError(t, <-moved)
		require.True(t, next.writeClosed)
		time.Sleep(time.Minute)
		synctest.Wait()
		ends := 0
		for len(told) > 0 {
			if strings.Contains(<-told, endBytes(r.origin, 1)[1:]) {
				ends++
			}
		}
		require.NotZero(t, ends, "the end was not announced")
	})
}

type watchedWrites struct {
	*fakeStream
	to chan string
}

func (u watchedWrites) Write(p []byte) (int, error) {
	u.to <- string(p)
	return u.fakeStream.Write(p)
}

// slowToLeave is a stream whose Writes, called out, take a while to return.
type slowToLeave struct {
	*fakeStream
	leave chan struct{}
}

func (u *slowToLeave) Write(p []byte) (int, error) {
	n, err := u.fakeStream.Write(p)
	if err != nil {
		<-u.leave
	}
	return n, err
}

// cannotEnd is a stream whose closing for writing fails with err.
type cannotEnd struct {
	*fakeStream
	err error
}

func (u cannotEnd) CloseWrite() error { return u.err }

// TestCloseWriteThatFailsForGood: S1, S8. An application that was told by CloseWrite that the
// connection is gone may do nothing more: its stream must not migrate.
func TestCloseWriteThatFailsForGood(t *testing.T) {
	gone := &network.ConnError{ErrorCode: network.ConnNoError}
	for name, accept := range map[string]func(t *testing.T, old *fakeStream) *Stream{
		"resumable": func(t *testing.T, old *fakeStream) *Stream { s, _ := resumableOn(t, old); return s },
		"other":     func(t *testing.T, old *fakeStream) *Stream { return acceptedOn(t, verifyingHost(), old) },
	} {
		bubble(t, name, func(t *testing.T) {
			s := accept(t, newFake())
			s.send.cur = cannotEnd{s.send.cur.(*fakeStream), gone}
			require.ErrorIs(t, s.CloseWrite(), gone)
			require.True(t, s.told())
			_, err := s.send.pause()
			require.Error(t, err)
			_ = s.Reset()
		})
	}
}

// TestCloseWriteThatFailsWhileTheStreamMoves: S5. An error of the old stream is not the
// application's as long as the stream may move.
func TestCloseWriteThatFailsWhileTheStreamMoves(t *testing.T) {
	gone := &network.ConnError{ErrorCode: network.ConnNoError}
	for name, accept := range map[string]func(t *testing.T, old *fakeStream) *Stream{
		"resumable": func(t *testing.T, old *fakeStream) *Stream { s, _ := resumableOn(t, old); return s },
		"other":     func(t *testing.T, old *fakeStream) *Stream { return acceptedOn(t, verifyingHost(), old) },
	} {
		bubble(t, name, func(t *testing.T) {
			s, next := accept(t, newFake()), newFake()
			s.send.cur = cannotEnd{s.send.cur.(*fakeStream), gone}
			s.send.hold(true)
			closed := make(chan error, 1)
			go func() { closed <- s.CloseWrite() }()
			synctest.Wait()
			_, err := s.send.pause()
			require.NoError(t, err)
			_, err = s.send.resume(next)
			require.NoError(t, err)
			synctest.Wait()
			require.Len(t, closed, 1)
			require.NoError(t, <-closed, "the end leaves on the new stream")
			_ = s.Reset()
		})
	}
}

// TestLastStream: S7, R8. Who ends an exchange closes the present stream of an application that has
// closed, unless something has to be sent again before, or may have to.
func TestLastStream(t *testing.T) {
	virtual(t, func(t *testing.T) {
		old, next := newFake(), newFake()
		s, r := resumableOn(t, old)
		_, err := s.Write([]byte("abc"))
		require.NoError(t, err)
		require.Equal(t, old, s.send.last())
		r.loses()
		require.Nil(t, s.send.last(), "the next one")
		next.conn = s.Conn().(*fakeConn)
		next.grants(0, nil)
		r.onto(t, next, 0)
		require.Nil(t, s.send.last(), "nothing was sent again")
		next.grants(3, nil)
		synctest.Wait()
		require.Equal(t, next, s.send.last())
	})
}

// TestCountOfAWriteThatIsResetMeanwhile: S1. An application that resets its stream while a Write finds the
// connection lost is told how much of that a stream has taken.
func TestCountOfAWriteThatIsResetMeanwhile(t *testing.T) {
	virtual(t, func(t *testing.T) {
		old := newFake()
		s, _ := resumableOn(t, old)
		old.grants(1, errors.New("the connection is gone"))
		s.host.cfg.tracer = func(e Event) {
			if e.Kind == Lost {
				_ = s.Reset()
			}
		}
		n, err := s.Write([]byte("abc"))
		require.ErrorIs(t, err, network.ErrReset)
		require.Equal(t, 1, n)
	})
}

// TestPatienceThatEndsAsTheStreamIsResumed: R11. A stream that is resumed at the end of its patience is
// not ended by that.
func TestPatienceThatEndsAsTheStreamIsResumed(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := resumableOn(t, newFake())
		r.loses()
		s.mu.Lock()
		since := r.waits.since
		s.mu.Unlock()
		next := newFake()
		next.conn = s.Conn().(*fakeConn)
		r.onto(t, next, 0)
		r.expire(since)
		require.True(t, r.attached())
	})
}
