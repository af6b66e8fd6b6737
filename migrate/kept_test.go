package migrate

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/multiformats/go-varint"
	"github.com/quic-go/quic-go"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
	. "github.com/go-portage/portage/internal/rawpeer"
)

// What the halves of a stream do with what may have to be sent again, over fake streams, in virtual time.

// keepingOn has a host accept a stream on old of which so many bytes are kept.
func keepingOn(t *testing.T, old *fakeStream, window int) (*Stream, *resumption) {
	s, r := resumableOn(t, old)
	r.of.memory.window = window
	return s, r
}

// asking is a stream that takes the first Write, with which the host asks, and then so many bytes; or
// whose Writes return what they are told, where returns is set.
type asking struct {
	*fakeStream
	room    int
	returns chan writeResult
	once    sync.Once
}

func (u *asking) Write(p []byte) (n int, err error) {
	u.once.Do(func() {
		n, err = u.fakeStream.Write(p)
		u.grants(u.room, nil)
		p = nil
	})
	switch {
	case p == nil:
		return n, err
	case u.returns != nil:
		r := <-u.returns
		return r.n, r.err
	}
	return u.fakeStream.Write(p)
}

// resumedBy has the stream, which may be lost already, resumed by a peer that has received so
// much. It returns what the stream goes on with.
func resumedBy(t *testing.T, s *Stream, received uint64) *fakeStream {
	t.Helper()
	return resumedSlowly(t, s, received, -1)
}

// resumedSlowly is resumedBy where the new stream takes so many bytes; negative: any number.
func resumedSlowly(t *testing.T, s *Stream, received uint64, room int) *fakeStream {
	t.Helper()
	next := &asking{fakeStream: newFake(), room: room}
	resumedOn(t, s, received, next)
	return next.fakeStream
}

// resumedOn is resumedBy with the stream to go on with.
func resumedOn(t *testing.T, s *Stream, received uint64, next *asking) {
	t.Helper()
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
	time.Sleep(longestPause)
	synctest.Wait()
	require.Equal(t, next.conn, s.Conn())
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
			old := newFake()
			s, r := keepingOn(t, old, 8<<10)
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
			require.Equal(t, !lost, old.writeClosed, "what was lost is not touched")
			if !lost {
				_, err = s.Write(nil)
				require.Error(t, err)
				require.NotErrorIs(t, err, errWriteClosed, "it is the underlying stream's to judge")
			}
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
		for _, says := range []writeResult{{0, network.ErrReset}, {2, network.ErrReset}, {2, os.ErrDeadlineExceeded}, {6, nil}} {
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
				require.NoError(t, s.CloseWrite(), "nobody is inside any more")
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
		"connection, which looks like a reset": func(old *fakeStream) {
			old.conn.dies()
			old.grants(1<<10, &network.StreamError{ErrorCode: 7, Remote: true})
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
	closing := errors.New("closed for writing")
	for reported, seen := range map[error]error{os.ErrDeadlineExceeded: errWriteClosed, closing: closing} {
		bubble(t, reported.Error(), func(t *testing.T) {
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
			require.Equal(t, writeResult{2, seen}, wrote(t, w))
			require.NoError(t, <-closed)
			require.True(t, old.writeClosed)
			require.True(t, r.attached())
			r.confirmed(2 + 1)
			require.True(t, r.lives(), "the other end has all, and its end")
		})
	}
}

// Of a Write that fails for good as an exchange is under way the exchange may save the rest; else it
// fails, at its deadline at the latest. That the connection is gone is kept for the next exchange.
func TestWriteThatAnExchangeMaySave(t *testing.T) {
	shutdown := &network.ConnError{ErrorCode: network.ConnShutdown}
	begin := func(t *testing.T, fails error) (*Stream, chan writeResult) {
		old := newFake()
		s, _ := keepingOn(t, old, 8<<10)
		old.grants(1, fails)
		s.send.hold(true)
		require.NoError(t, s.SetWriteDeadline(time.Now().Add(time.Second)))
		w := writing(&s.send, "abc")
		synctest.Wait()
		notYet(t, w, "the Write")
		require.Equal(t, fails == shutdown, s.send.keepsError())
		return s, w
	}
	for name, fails := range map[string]error{
		"the connection is closed":    shutdown,
		"the other end reads no more": &network.StreamError{ErrorCode: 7, Remote: true},
	} {
		bubble(t, name+", saved", func(t *testing.T) {
			s, w := begin(t, fails)
			n, err := s.send.pause()
			require.NoError(t, err)
			require.EqualValues(t, 1, n)
			next := newFake()
			_, err = s.send.resume(next)
			require.NoError(t, err)
			require.Equal(t, writeResult{3, nil}, wrote(t, w))
			require.Equal(t, "bc", next.taken())
		})
		bubble(t, name+", too late", func(t *testing.T) {
			_, w := begin(t, fails)
			time.Sleep(time.Second)
			require.Equal(t, writeResult{1, os.ErrDeadlineExceeded}, wrote(t, w))
		})
		bubble(t, name+", given up", func(t *testing.T) {
			s, w := begin(t, fails)
			s.send.hold(false)
			require.Equal(t, writeResult{1, fails}, wrote(t, w))
			require.Equal(t, fails == shutdown, s.told())
		})
		if fails == shutdown {
			continue // nothing is resumed then
		}
		bubble(t, name+", resumed", func(t *testing.T) {
			s, w := begin(t, fails)
			require.NoError(t, s.SetWriteDeadline(time.Time{}))
			next := resumedBy(t, s, 0)
			require.Equal(t, writeResult{3, nil}, wrote(t, w))
			require.Equal(t, "abc", appData(t, next))
			next.grants(1, fails)
			_, err := s.Write([]byte("def"))
			require.Equal(t, fails, err, "there is no exchange any more")
		})
	}
}

// What a Write gave to the stream before the stream moved is kept as well as what it gave to the next one.
func TestWriteThatMovesIsKept(t *testing.T) {
	virtual(t, func(t *testing.T) {
		old, next := newFake(), newFake()
		s, _ := keepingOn(t, old, 8<<10)
		old.grants(2, nil)
		w := writing(&s.send, "abcdef")
		synctest.Wait()
		n, err := s.send.pause()
		require.NoError(t, err)
		require.EqualValues(t, 2, n)
		_, err = s.send.resume(next)
		require.NoError(t, err)
		require.Equal(t, writeResult{6, nil}, wrote(t, w))
		require.Equal(t, "cdef", next.taken())
		require.Equal(t, "bcdef", appData(t, resumedBy(t, s, 1)))
	})
}

// A first Write that is too long to leave with the opening is kept once.
func TestFirstWriteIsKept(t *testing.T) {
	p := meetResuming(t)
	s, err := p.hostBegins(0, echoID)
	require.NoError(t, err)
	data := numbered(3 * openingRoom)
	p.writes(s, data)
	u := p.Arrives()
	u.Label = s.Label()
	u.Wants(Prelude, resumableLabelBytes(u.Label), MultistreamToken, EchoToken, data)
	u.Sends(Prelude, MultistreamToken, EchoToken)
	next := p.resumes(u, epoch(1), 1)
	next.Wants(Prelude, ackReceivedBytes(0), data[1:])
	p.talk(s, next)
}

// A stream whose opening was not sent has nothing to resume.
func TestStreamThatWasNotOpenedIsNotResumed(t *testing.T) {
	p := meetResuming(t)
	s, err := p.hostBegins(0, echoID)
	require.NoError(t, err)
	r := p.host.resumer.get(p.ID(), s.Label())
	r.lose(nil, errors.New("test"))
	require.False(t, r.lives())
	_, err = s.Write([]byte("x"))
	require.Error(t, err)
	p.nothingLeft()
}

// webTransport and overQUIC are fake streams on connections of which something else is known.
type (
	webTransport     struct{ *fakeStream }
	webTransportConn struct{ *fakeConn }
	overQUIC         struct{ *fakeStream }
	quicConn         struct{ *fakeConn }
)

func (u webTransport) Conn() network.Conn { return webTransportConn{u.conn} }
func (u overQUIC) Conn() network.Conn     { return quicConn{u.conn} }

func (webTransportConn) ConnState() network.ConnectionState {
	return network.ConnectionState{Transport: "webtransport"}
}

func (quicConn) As(target any) bool {
	_, is := target.(**quic.Conn)
	return is
}

// On WebTransport a reset carries no code, and may be a loss, unless the other end is known to read no more.
func TestWriteThatIsResetWithoutACode(t *testing.T) {
	for _, readsNoMore := range []bool{false, true} {
		bubble(t, fmt.Sprintf("reads no more %t", readsNoMore), func(t *testing.T) {
			old := newFake()
			s, r := keepingOn(t, old, 8<<10)
			s.send.mu.Lock()
			s.send.cur = webTransport{old}
			s.send.mu.Unlock()
			if readsNoMore {
				r.confirmed(everything)
			}
			reset := &network.StreamError{Remote: true}
			old.grants(0, reset)
			n, err := s.Write([]byte("abc"))
			require.Equal(t, readsNoMore, r.attached())
			if readsNoMore {
				require.Equal(t, reset, err)
				require.Zero(t, n)
			} else {
				require.NoError(t, err)
				require.Equal(t, "abc", appData(t, resumedBy(t, s, 0)))
			}
		})
	}
}

// R12: where the muxer may have reported an end that is none the peer is told at once, unless it wants
// no more; soon where the muxer can still do so.
func TestHowSoonAnEndIsTold(t *testing.T) {
	for name, test := range map[string]struct {
		quic, yamux, down, lost, unwanted bool
		within                            time.Duration
	}{
		"as a rule":                    {within: 0},
		"on QUIC":                      {quic: true, within: reportWithin},
		"on yamux":                     {yamux: true, within: endWithin},
		"on yamux, its session down":   {yamux: true, down: true, within: 0},
		"lost":                         {lost: true, within: 0},
		"lost on QUIC":                 {quic: true, lost: true, within: 0},
		"lost on yamux":                {yamux: true, lost: true, within: 0},
		"unwanted":                     {unwanted: true, within: reportWithin},
		"unwanted on yamux":            {yamux: true, unwanted: true, within: reportWithin},
		"lost on QUIC, and not wanted": {quic: true, lost: true, unwanted: true, within: reportWithin},
	} {
		bubble(t, name, func(t *testing.T) {
			old := newFake()
			if test.yamux {
				old.conn.muxer = session(t, !test.down)
			}
			s, r := keepingOn(t, old, 8<<10)
			if test.quic {
				s.send.mu.Lock()
				s.send.cur = overQUIC{old}
				s.send.mu.Unlock()
			}
			_, err := s.Write([]byte("abc"))
			require.NoError(t, err)
			if test.unwanted {
				r.confirmed(everything)
			}
			if test.lost {
				r.loses()
			}
			r.of.mu.Lock()
			r.of.tell.busy = true // so that nothing leaves
			r.of.mu.Unlock()
			told := func() bool {
				synctest.Wait()
				r.of.mu.Lock()
				defer r.of.mu.Unlock()
				require.Contains(t, r.of.tell.due, r)
				return r.of.tell.now
			}
			require.NoError(t, s.CloseWrite())
			if test.within > 0 {
				time.Sleep(test.within - time.Nanosecond)
				require.False(t, told())
				time.Sleep(time.Nanosecond)
			}
			require.True(t, told())
		})
	}
}

// refusing is a stream that cannot be closed for writing.
type refusing struct {
	*fakeStream
	err error
}

func (u refusing) CloseWrite() error { return u.err }

// Where the end of writing does not leave since the connection was closed on purpose, it never will.
func TestEndThatDoesNotLeaveForGood(t *testing.T) {
	virtual(t, func(t *testing.T) {
		old := newFake()
		s, r := keepingOn(t, old, 8<<10)
		shutdown := &network.ConnError{ErrorCode: network.ConnShutdown}
		s.send.mu.Lock()
		s.send.cur = refusing{old, shutdown}
		s.send.mu.Unlock()
		require.Equal(t, shutdown, s.CloseWrite())
		require.False(t, r.lives())
	})
}

// A Write that does not hear that it is called out for the end is called out again.
func TestEndCallsWritesOutAgain(t *testing.T) {
	virtual(t, func(t *testing.T) {
		old := newFake()
		s, _ := keepingOn(t, old, 8<<10)
		s.send.mu.Lock()
		s.send.cur = &deaf{fakeStream: old, deaf: 2}
		s.send.mu.Unlock()
		old.grants(1, nil)
		w := writing(&s.send, "abc")
		synctest.Wait()
		begun := time.Now()
		require.NoError(t, s.CloseWrite())
		require.Equal(t, kickInterval, time.Since(begun))
		require.Equal(t, writeResult{1, errWriteClosed}, wrote(t, w))
		require.True(t, old.writeClosed)
	})
}

// What is sent again goes on on another stream where the stream moves meanwhile, and Writes behind it.
func TestReplayThatMoves(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := keepingOn(t, newFake(), 8<<10)
		_, err := s.Write([]byte("abcdefgh"))
		require.NoError(t, err)
		first := resumedSlowly(t, s, 0, 3)
		w := writing(&s.send, "ij")
		moves := func(n uint64, room int) *fakeStream {
			t.Helper()
			s.send.hold(true)
			written, err := s.send.pause()
			require.NoError(t, err)
			require.Equal(t, n, written)
			next := newFake()
			next.grants(room, nil)
			closed, err := s.send.resume(next)
			require.NoError(t, err)
			require.False(t, closed)
			synctest.Wait()
			return next
		}
		second := moves(3, 2)
		notYet(t, w, "the Write")
		third := moves(2, -1)
		require.Equal(t, writeResult{2, nil}, wrote(t, w))
		require.Equal(t, "abc", appData(t, first))
		require.Equal(t, "de", second.taken())
		require.Equal(t, "fghij", third.taken())
		reset := &network.StreamError{ErrorCode: 7, Remote: true}
		third.grants(0, reset)
		_, err = s.Write([]byte("x"))
		require.Equal(t, reset, err, "there is no exchange any more")
		require.True(t, r.attached())
		require.Equal(t, "bcdefghij", appData(t, resumedBy(t, s, 1)))
	})
}

// Behind what is sent again comes the end, where the application has ended its writing, and it is
// told once more; the stream is closed if the application has closed it.
func TestReplayBehindTheEnd(t *testing.T) {
	for name, end := range map[string]func(s *Stream) error{"CloseWrite": (*Stream).CloseWrite, "Close": (*Stream).Close} {
		for received := range uint64(4) {
			bubble(t, fmt.Sprintf("%s, %d received", name, received), func(t *testing.T) {
				s, r := keepingOn(t, newFake(), 8<<10)
				_, err := s.Write([]byte("abc"))
				require.NoError(t, err)
				r.loses()
				require.NoError(t, end(s))
				time.Sleep(reportWithin)
				r.of.mu.Lock()
				r.of.tell.busy, r.of.tell.due = true, nil // so that nothing leaves
				r.of.mu.Unlock()
				next := resumedSlowly(t, s, received, 0)
				if received < 3 {
					require.False(t, next.writeClosed)
					next.grants(-1, nil)
				}
				require.Equal(t, "abc"[received:], appData(t, next))
				require.True(t, next.writeClosed)
				require.Equal(t, name == "Close", next.isClosed)
				r.of.mu.Lock()
				require.Contains(t, r.of.tell.due, r)
				r.of.mu.Unlock()
				r.confirmed(3 + 1)
				require.Equal(t, name == "CloseWrite", r.lives())
			})
		}
	}
}

// Where the other end wants no more while something is sent again, the rest is not; and where that
// is not kept any more a gap is not sent.
func TestReplayOfWhatIsNotKept(t *testing.T) {
	begin := func(t *testing.T) (*Stream, *resumption, *fakeStream) {
		s, r := keepingOn(t, newFake(), 128<<10)
		_, err := s.Write([]byte(numbered(replayed + 100)))
		require.NoError(t, err)
		return s, r, resumedSlowly(t, s, 0, 1)
	}
	bubble(t, "unwanted", func(t *testing.T) {
		s, r, next := begin(t)
		r.confirmed(everything)
		next.grants(-1, nil)
		require.Equal(t, numbered(replayed), appData(t, next))
		n, err := s.Write([]byte("x"))
		require.NoError(t, err)
		require.Equal(t, 1, n)
		require.Equal(t, numbered(replayed)+"x", appData(t, next))
		require.Nil(t, next.resetCode())
	})
	bubble(t, "not kept", func(t *testing.T) {
		_, r, next := begin(t)
		r.confirmed(replayed + 100) // of which it cannot have received all
		next.grants(-1, nil)
		require.Equal(t, numbered(replayed), appData(t, next))
		require.NotNil(t, next.resetCode())
		require.Equal(t, network.StreamNoError, *next.resetCode())
	})
}

// What is sent again is lost again, or not wanted; or all that was to be sent is kept for another time.
func TestReplayThatFails(t *testing.T) {
	begin := func(t *testing.T) (*Stream, *resumption, *fakeStream) {
		s, r := keepingOn(t, newFake(), 8<<10)
		_, err := s.Write([]byte("abcdef"))
		require.NoError(t, err)
		return s, r, resumedSlowly(t, s, 0, 2)
	}
	bubble(t, "lost", func(t *testing.T) {
		s, r, next := begin(t)
		next.grants(1, errors.New("a failure of the network"))
		synctest.Wait()
		require.False(t, r.attached(), "nobody has to write for that")
		w := writing(&s.send, "gh")
		again := resumedBy(t, s, 2)
		require.Equal(t, "cdefgh", appData(t, again))
		require.Equal(t, writeResult{2, nil}, wrote(t, w))
	})
	bubble(t, "the other end reads no more", func(t *testing.T) {
		s, r, next := begin(t)
		w := writing(&s.send, "gh")
		reset := &network.StreamError{ErrorCode: 7, Remote: true}
		next.grants(1, reset)
		synctest.Wait()
		require.True(t, r.attached())
		require.Equal(t, writeResult{0, reset}, wrote(t, w))
		require.Equal(t, "abcdef", appData(t, resumedBy(t, s, 0)))
	})
	bubble(t, "the connection is closed", func(t *testing.T) {
		s, r, next := begin(t)
		w := writing(&s.send, "gh")
		shutdown := &network.ConnError{ErrorCode: network.ConnShutdown}
		next.grants(1, shutdown)
		require.Equal(t, writeResult{0, shutdown}, wrote(t, w))
		require.False(t, r.lives())
	})
}

// Who watches is told how much is sent again: what an underlying stream was handed before.
func TestHowMuchIsSentAgain(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := keepingOn(t, newFake(), 8<<10)
		var again []uint64
		s.host.cfg.tracer = func(e Event) {
			if e.Kind == Resumed {
				again = append(again, e.Again)
			}
		}
		_, err := s.Write([]byte("0123456789"))
		require.NoError(t, err)
		r.loses()
		_, err = s.Write([]byte("abcde"))
		require.NoError(t, err)
		resumedSlowly(t, s, 3, 4)
		resumedBy(t, s, 3)
		resumedBy(t, s, 5)
		r.loses()
		_, err = s.Write([]byte("fgh"))
		require.NoError(t, err)
		r.confirmed(everything)
		resumedBy(t, s, everything)
		require.Equal(t, []uint64{10 - 3, 10 - 3, 15 - 5, 0}, again)
	})
}

// The deadlines of the application hold on whatever the stream goes on with, and so does that it has
// closed its reading.
func TestWhatHoldsOnTheNextStream(t *testing.T) {
	bubble(t, "deadlines", func(t *testing.T) {
		s, _ := keepingOn(t, newFake(), 8<<10)
		at := time.Now().Add(time.Minute)
		require.NoError(t, s.SetDeadline(at))
		next := resumedBy(t, s, 0)
		next.grants(0, nil)
		w := writing(&s.send, "abc")
		read := make(chan error, 1)
		go func() {
			_, err := s.Read(make([]byte, 1))
			read <- err
		}()
		time.Sleep(time.Until(at) - time.Nanosecond)
		synctest.Wait()
		notYet(t, w, "the Write")
		notYet(t, read, "the Read")
		time.Sleep(time.Nanosecond)
		require.Equal(t, writeResult{0, os.ErrDeadlineExceeded}, wrote(t, w))
		synctest.Wait()
		require.ErrorIs(t, Take(t, read, "the Read"), os.ErrDeadlineExceeded)
	})
	bubble(t, "that nobody reads", func(t *testing.T) {
		s, _ := keepingOn(t, newFake(), 8<<10)
		require.False(t, resumedBy(t, s, 0).readClosed)
		require.NoError(t, s.CloseRead())
		require.True(t, resumedBy(t, s, 0).readClosed)
	})
}

// A Write that is still inside a stream that is gone does not keep the writing from being ended.
func TestEndDoesNotWaitForWhatIsLost(t *testing.T) {
	virtual(t, func(t *testing.T) {
		old := newFake()
		s, r := keepingOn(t, old, 8<<10)
		inside := tardy{old, make(chan writeResult)}
		s.send.mu.Lock()
		s.send.cur = inside
		s.send.mu.Unlock()
		w := writing(&s.send, "abc")
		synctest.Wait()
		r.loses()
		next := resumedBy(t, s, 3)
		begun := time.Now()
		require.NoError(t, s.CloseWrite())
		require.Zero(t, time.Since(begun))
		require.True(t, next.writeClosed)
		inside.returns <- writeResult{0, network.ErrReset}
		require.Equal(t, writeResult{3, nil}, wrote(t, w))
	})
}

// What is inside a stream that is gone counts for nothing that comes behind it, when that lets go of it.
func TestReplayThatIsInsideAsTheStreamIsLost(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := keepingOn(t, newFake(), 8<<10)
		_, err := s.Write([]byte("abcdef"))
		require.NoError(t, err)
		first := &asking{fakeStream: newFake(), returns: make(chan writeResult)}
		resumedOn(t, s, 0, first)
		r.loses()
		second := resumedSlowly(t, s, 0, 2)
		first.returns <- writeResult{3, network.ErrReset}
		synctest.Wait()
		require.True(t, r.attached())
		second.grants(-1, nil)
		require.Equal(t, "abcdef", appData(t, second))
		n, err := s.send.pause()
		require.NoError(t, err)
		require.EqualValues(t, 6, n)
	})
}

// tardyReader is a stream whose Reads return when they are told what, whatever becomes of it.
type tardyReader struct {
	*fakeStream
	returns chan string
}

func (u tardyReader) Read(p []byte) (int, error) { return copy(p, <-u.returns), nil }

// What a stream that is lost brings after that is not read: the other end sends it again.
func TestReadThatIsInsideAsTheStreamIsLost(t *testing.T) {
	for _, resumed := range []bool{false, true} {
		bubble(t, fmt.Sprintf("resumed %t", resumed), func(t *testing.T) {
			s, r := keepingOn(t, newFake(), 8<<10)
			late := tardyReader{newFake(), make(chan string)}
			s.recv.mu.Lock()
			s.recv.cur.stream = late
			s.recv.mu.Unlock()
			got := make(chan string, 10)
			go func() {
				for buf := make([]byte, 10); ; {
					n, err := s.Read(buf)
					if err != nil {
						return
					}
					got <- string(buf[:n])
				}
			}()
			late.returns <- "ab"
			synctest.Wait()
			require.Equal(t, "ab", <-got)
			r.loses()
			var next *fakeStream
			if resumed {
				next = resumedBy(t, s, 0)
			}
			late.returns <- "cd"
			synctest.Wait()
			require.Empty(t, got)
			if !resumed {
				next = resumedBy(t, s, 0)
			}
			next.feeds("cdef", nil)
			synctest.Wait()
			require.Equal(t, "cdef", <-got)
			s.recv.mu.Lock()
			require.EqualValues(t, 6, s.recv.received())
			s.recv.mu.Unlock()
		})
	}
}
