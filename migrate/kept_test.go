package migrate

import (
	"bufio"
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/multiformats/go-varint"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/rawpeer"
)

// What the halves of a stream do with what may have to be sent again, over fake streams, in virtual time.

// keepingOn has a host accept a stream on old of which so many bytes are kept.
func keepingOn(t *testing.T, old *fakeStream, window int) (*Stream, *resumption) {
	s, r := resumableOn(t, old)
	r.of.memory.window = window
	return s, r
}

// resumedBy has the stream, which may be lost already, resumed by a peer that has received so
// much. It returns what the stream goes on with.
func resumedBy(t *testing.T, s *Stream, received uint64) *fakeStream {
	t.Helper()
	next := newFake()
	next.conn = &fakeConn{remote: playerLow}
	next.feeds(Prelude+ackReceivedBytes(received), nil)
	asked := false
	next.conn.open = func(context.Context) (network.Stream, error) {
		if asked {
			return nil, errNoRoom // for reports
		}
		asked = true
		return next, nil
	}
	s.host.Host.(*bare).conns = []network.Conn{next.conn}
	r := s.send.resumption
	r.lose(nil, errors.New("test"))
	r.of.wake()
	time.Sleep(acceptorWaits)
	synctest.Wait()
	require.Equal(t, next.conn, s.Conn())
	return next
}

// appData is what was written to u, which a stream goes on with, of the application's.
func appData(t *testing.T, u *fakeStream) string {
	t.Helper()
	synctest.Wait()
	in := bufio.NewReader(strings.NewReader(strings.TrimPrefix(u.taken(), Prelude)))
	n, err := varint.ReadUvarint(in)
	require.NoError(t, err)
	_, err = in.Discard(int(n))
	require.NoError(t, err)
	rest, err := io.ReadAll(in)
	require.NoError(t, err)
	return string(rest)
}

// wrote is what a Write has returned, once nothing else happens.
func wrote(t *testing.T, w chan writeResult) writeResult {
	t.Helper()
	synctest.Wait()
	require.Len(t, w, 1, "the Write has to return")
	return <-w
}

// numbered is so many bytes of which none looks like its neighbours.
func numbered(n int) string {
	all := make([]byte, n)
	for i := range all {
		all[i] = byte(i * 7 >> (i & 3))
	}
	return string(all)
}

// Behind its end nothing is written, whether the stream is lost or not; and a Write of nothing is none.
func TestWritesBehindTheEnd(t *testing.T) {
	for _, lost := range []bool{false, true} {
		virtual(t, func(t *testing.T) {
			s, r := keepingOn(t, newFake(), 8<<10)
			if lost {
				r.loses()
				n, err := s.Write(nil)
				require.NoError(t, err)
				require.Zero(t, n)
			}
			_, err := s.Write([]byte("abc"))
			require.NoError(t, err)
			require.NoError(t, s.CloseWrite())
			n, err := s.Write([]byte("def"))
			require.ErrorIs(t, err, errWriteClosed)
			require.Zero(t, n)
			require.Equal(t, "abc", appData(t, resumedBy(t, s, 0)))
		})
	}
}

// As long as the stream is lost Writes take what there is room for, and wait for more. Nothing is
// dropped, and all of it is sent in order.
func TestWritesOfAStreamThatIsLost(t *testing.T) {
	virtual(t, func(t *testing.T) {
		old := newFake()
		s, r := keepingOn(t, old, 8<<10)
		data := numbered(16 << 10)
		_, err := s.Write([]byte(data[:2<<10]))
		require.NoError(t, err)
		before := old.taken()
		r.loses()
		require.NoError(t, s.SetWriteDeadline(time.Now().Add(time.Second)))
		w := writing(&s.send, data[2<<10:])
		time.Sleep(time.Second - time.Nanosecond)
		synctest.Wait()
		notYet(t, w, "the Write")
		time.Sleep(time.Nanosecond)
		require.Equal(t, writeResult{6 << 10, os.ErrDeadlineExceeded}, wrote(t, w))
		require.NoError(t, s.SetWriteDeadline(time.Time{}))
		w = writing(&s.send, data[8<<10:])
		synctest.Wait()
		notYet(t, w, "the Write")
		r.confirmed(1 << 10)
		synctest.Wait()
		notYet(t, w, "the Write")
		next := resumedBy(t, s, 2<<10)
		require.Equal(t, writeResult{8 << 10, nil}, wrote(t, w))
		require.Equal(t, data[2<<10:], appData(t, next))
		require.Equal(t, before, old.taken())
	})
}

// A Write that waits for another one returns at its deadline, without having written.
func TestWriteWhoseTurnDoesNotCome(t *testing.T) {
	virtual(t, func(t *testing.T) {
		old := newFake()
		s, _ := keepingOn(t, old, 8<<10)
		s.send.mu.Lock()
		s.send.cur = &deaf{fakeStream: old, deaf: 100}
		s.send.mu.Unlock()
		before := old.taken()
		old.grants(1, nil)
		first := writing(&s.send, "abc")
		synctest.Wait()
		require.NoError(t, s.SetWriteDeadline(time.Now().Add(time.Second)))
		second := writing(&s.send, "def")
		time.Sleep(time.Second)
		require.Equal(t, writeResult{0, os.ErrDeadlineExceeded}, wrote(t, second))
		notYet(t, first, "the Write that is inside")
		require.NoError(t, s.SetWriteDeadline(time.Time{}))
		third := writing(&s.send, "ghi")
		synctest.Wait()
		notYet(t, third, "the Write behind it")
		old.grants(-1, nil)
		require.Equal(t, writeResult{3, nil}, wrote(t, first))
		require.Equal(t, writeResult{3, nil}, wrote(t, third))
		require.Equal(t, before+"abcghi", old.taken())
	})
}

// A Write that waits as the stream moves goes nowhere before that has moved, whatever else happens, and
// returns at its deadline.
func TestWriteWaitsAsLongAsTheStreamMoves(t *testing.T) {
	virtual(t, func(t *testing.T) {
		old := newFake()
		s, r := keepingOn(t, old, 8<<10)
		before := old.taken()
		_, err := s.send.pause()
		require.NoError(t, err)
		require.NoError(t, s.SetWriteDeadline(time.Now().Add(time.Second)))
		w := writing(&s.send, "abc")
		synctest.Wait()
		s.send.mu.Lock()
		s.send.changed.broadcast()
		s.send.mu.Unlock()
		time.Sleep(time.Second - time.Nanosecond)
		synctest.Wait()
		notYet(t, w, "the Write")
		require.Equal(t, before, old.taken())
		time.Sleep(time.Nanosecond)
		require.Equal(t, writeResult{0, os.ErrDeadlineExceeded}, wrote(t, w))
		require.Equal(t, before, old.taken())
		require.True(t, r.attached())
	})
}

// tardy is a stream whose Writes return when they are told what, whatever becomes of it.
type tardy struct {
	*fakeStream
	returns chan writeResult
}

func (u tardy) Write([]byte) (int, error) {
	r := <-u.returns
	return r.n, r.err
}

// A Write that is inside as the stream is lost has written all that it gave to the old stream,
// whenever that lets go of it and whatever that says.
func TestWriteThatIsInsideAsTheStreamIsLost(t *testing.T) {
	for _, resumed := range []bool{false, true} {
		for _, says := range []writeResult{{0, network.ErrReset}, {2, network.ErrReset}, {6, nil}} {
			virtual(t, func(t *testing.T) {
				old := newFake()
				s, r := keepingOn(t, old, 8<<10)
				inside := tardy{old, make(chan writeResult)}
				s.send.mu.Lock()
				s.send.cur = inside
				s.send.mu.Unlock()
				first := writing(&s.send, "abcdef")
				synctest.Wait()
				second := writing(&s.send, "ghi")
				synctest.Wait()
				r.loses()
				var next *fakeStream
				if resumed {
					next = resumedBy(t, s, 1)
				}
				synctest.Wait()
				notYet(t, first, "the Write that is inside")
				notYet(t, second, "the Write behind it")
				inside.returns <- says
				require.Equal(t, writeResult{6, nil}, wrote(t, first))
				require.Equal(t, writeResult{3, nil}, wrote(t, second))
				if !resumed {
					next = resumedBy(t, s, 1)
				}
				require.Equal(t, "bcdefghi", appData(t, next))
			})
		}
	}
}

// A Write that learns that the connection is lost takes it for written what the old stream has not
// taken, and goes on. However long it is, what the peer lacks is kept.
func TestWriteThatMeetsALoss(t *testing.T) {
	for name, gone := range map[string]func(old *fakeStream){
		"connection": func(old *fakeStream) {
			old.conn.dies()
			old.grants(1<<10, os.ErrDeadlineExceeded)
		},
		"stream": func(old *fakeStream) { old.grants(1<<10, errors.New("a failure of the network")) },
		"given up": func(old *fakeStream) {
			old.grants(1<<10, &network.StreamError{ErrorCode: codeGivenUp, Remote: true})
		},
	} {
		bubble(t, name, func(t *testing.T) {
			old := newFake()
			s, r := keepingOn(t, old, 8<<10)
			data := numbered(32 << 10)
			_, err := s.Write([]byte(data[:1]))
			require.NoError(t, err)
			gone(old)
			w := writing(&s.send, data[1:])
			synctest.Wait()
			require.False(t, r.attached())
			notYet(t, w, "the Write")
			next := resumedBy(t, s, 0)
			require.Equal(t, writeResult{len(data) - 1, nil}, wrote(t, w))
			require.Equal(t, data, appData(t, next))
		})
	}
}

// A Write that fails although the connection works is no loss: what it has written counts, and no more.
func TestWriteThatFailsAlone(t *testing.T) {
	for name, test := range map[string]struct{ err, seen error }{
		"deadline":                    {os.ErrDeadlineExceeded, os.ErrDeadlineExceeded},
		"the other end reads no more": {&network.StreamError{ErrorCode: 7, Remote: true}, &network.StreamError{ErrorCode: 7, Remote: true}},
	} {
		bubble(t, name, func(t *testing.T) {
			old := newFake()
			s, r := keepingOn(t, old, 8<<10)
			before := old.taken()
			old.grants(2, test.err)
			n, err := s.Write([]byte("abc"))
			require.Equal(t, test.seen, err)
			require.Equal(t, 2, n)
			old.grants(-1, nil)
			_, err = s.Write([]byte("def"))
			require.NoError(t, err)
			require.Equal(t, before+"abdef", old.taken())
			require.True(t, r.attached())
			require.Equal(t, "bdef", appData(t, resumedBy(t, s, 1)))
		})
	}
}

// A Write of which all was taken has succeeded, even if a deadline is reported: QUIC does that.
func TestWriteOfWhichAllWasTaken(t *testing.T) {
	virtual(t, func(t *testing.T) {
		old := newFake()
		s, _ := keepingOn(t, old, 8<<10)
		old.grants(3, os.ErrDeadlineExceeded)
		u := tardy{old, make(chan writeResult, 2)}
		s.send.mu.Lock()
		s.send.cur = u
		s.send.mu.Unlock()
		u.returns <- writeResult{3, os.ErrDeadlineExceeded}
		n, err := s.Write([]byte("abc"))
		require.NoError(t, err)
		require.Equal(t, 3, n)
		u.returns <- writeResult{0, os.ErrDeadlineExceeded}
		_, err = s.Write(nil)
		require.ErrorIs(t, err, os.ErrDeadlineExceeded, "nothing was to be written")
	})
}

// A stream whose Write is called out for its end is not lost, whatever its muxer reports then.
func TestWriteThatIsClosedMeanwhile(t *testing.T) {
	for name, reported := range map[string]error{"a deadline": os.ErrDeadlineExceeded, "that it is closed": errors.New("closed for writing")} {
		bubble(t, name, func(t *testing.T) {
			old := newFake()
			s, r := keepingOn(t, old, 8<<10)
			u := tardy{old, make(chan writeResult)}
			s.send.mu.Lock()
			s.send.cur = u
			s.send.mu.Unlock()
			w := writing(&s.send, "abc")
			synctest.Wait()
			closed := make(chan error, 1)
			go func() { closed <- s.CloseWrite() }()
			time.Sleep(time.Minute)
			synctest.Wait()
			require.Empty(t, closed, "a Write is inside")
			u.returns <- writeResult{2, reported}
			got := wrote(t, w)
			require.Equal(t, 2, got.n)
			require.Error(t, got.err)
			require.NoError(t, <-closed)
			require.True(t, old.writeClosed)
			require.True(t, r.attached())
			r.confirmed(2 + 1)
			require.True(t, r.lives(), "the other end has all, and its end")
		})
	}
}

// Of a Write that fails for good as an exchange is under way the exchange may save the rest; else it
// fails, at its deadline at the latest.
func TestWriteThatAnExchangeMaySave(t *testing.T) {
	begin := func(t *testing.T) (*Stream, chan writeResult) {
		old := newFake()
		s, _ := keepingOn(t, old, 8<<10)
		old.grants(1, &network.ConnError{ErrorCode: network.ConnNoError})
		s.send.hold(true)
		require.NoError(t, s.SetWriteDeadline(time.Now().Add(time.Second)))
		w := writing(&s.send, "abc")
		synctest.Wait()
		notYet(t, w, "the Write")
		return s, w
	}
	bubble(t, "saved", func(t *testing.T) {
		s, w := begin(t)
		n, err := s.send.pause()
		require.NoError(t, err)
		require.EqualValues(t, 1, n)
		next := newFake()
		_, err = s.send.resume(next)
		require.NoError(t, err)
		require.Equal(t, writeResult{3, nil}, wrote(t, w))
		require.Equal(t, "bc", next.taken())
	})
	bubble(t, "late", func(t *testing.T) {
		_, w := begin(t)
		time.Sleep(time.Second)
		require.Equal(t, writeResult{1, os.ErrDeadlineExceeded}, wrote(t, w))
	})
	bubble(t, "given up", func(t *testing.T) {
		s, w := begin(t)
		s.send.hold(false)
		got := wrote(t, w)
		require.Equal(t, 1, got.n)
		require.ErrorAs(t, got.err, new(*network.ConnError))
		require.True(t, s.told())
	})
}
