package migrate

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/multiformats/go-varint"
	"github.com/quic-go/quic-go"
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
			next := resumedBy(t, s, 0)
			require.Equal(t, writeResult{3, nil}, wrote(t, w))
			require.Equal(t, "abc", appData(t, next))
			require.False(t, s.send.keepsError())
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
