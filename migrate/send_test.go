package migrate

import (
	"errors"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
)

// The sending half, over fake streams.

type writeResult struct {
	n   int
	err error
}

func writing(h *sendHalf, p string) chan writeResult {
	done := make(chan writeResult, 1)
	go func() {
		n, err := h.write([]byte(p))
		done <- writeResult{n, err}
	}()
	return done
}

func notYet[T any](t *testing.T, ch chan T, what string) {
	t.Helper()
	select {
	case v := <-ch:
		t.Fatalf("%s has to wait, and returned %v", what, v)
	default:
	}
}

// TestInterruptedFirstWrite at each byte: the count is exact, and no byte of the opening
// or of the data is lost or doubled (W1).
func TestInterruptedFirstWrite(t *testing.T) {
	open := string(opening(600, echoID))
	for _, data := range []string{"", "hello", strings.Repeat("x", openingRoom), strings.Repeat("x", openingRoom+1)} {
		all := open + data
		for _, errs := range []error{os.ErrDeadlineExceeded, timeoutError{}, errors.New("broken")} {
			for cut := range all {
				u := newFake()
				h := &sendHalf{cur: u, opening: []byte(open)}
				u.grants(cut, errs)
				n, err := h.write([]byte(data))
				require.Equal(t, errs, err)
				require.Equal(t, max(0, cut-len(open)), n, "cut at %d", cut)
				require.Equal(t, all[:cut], u.taken())
				require.Equal(t, uint64(n), h.written, "the opening does not count as the application's (S12)")

				// And again, at the next byte.
				u.grants(1, errs)
				m, err := h.write([]byte(data[n:]))
				if cut+1 < len(all) {
					require.Equal(t, errs, err)
				}
				n += m
				u.grants(-1, nil)
				m, err = h.write([]byte(data[n:]))
				require.NoError(t, err)
				require.Equal(t, len(data), n+m)
				require.Equal(t, all, u.taken(), "cut at %d", cut)
				require.Equal(t, uint64(len(data)), h.written)
				require.Nil(t, h.opening)
			}
			if len(data) >= openingRoom {
				break // 1,300 times is enough
			}
		}
	}
}

// TestFlush sends the opening, once, without data.
func TestFlush(t *testing.T) {
	open := string(opening(600, echoID))
	u := newFake()
	h := &sendHalf{cur: u, opening: []byte(open)}
	u.grants(10, os.ErrDeadlineExceeded)
	require.ErrorIs(t, h.flush(), os.ErrDeadlineExceeded)
	u.grants(-1, nil)
	require.NoError(t, h.flush())
	require.NoError(t, h.flush())
	require.Equal(t, open, u.taken())
	_, err := h.write([]byte("hello"))
	require.NoError(t, err)
	require.Equal(t, open+"hello", u.taken())
	require.Equal(t, uint64(5), h.written)

	u = newFake()
	h = &sendHalf{cur: u, opening: []byte(open)}
	require.NoError(t, h.closeWrite())
	require.Equal(t, open, u.taken(), "the acceptor learns of a stream that carries nothing")
	require.True(t, u.writeClosed)
}

// TestFlushDespiteDeadline: the application's write deadline, whether it was set before or
// meanwhile, does not keep the opening back; and it is the application's again behind it.
func TestFlushDespiteDeadline(t *testing.T) {
	open := string(opening(600, echoID))
	u := newFake()
	h := &sendHalf{cur: u, opening: []byte(open)}
	require.NoError(t, h.setDeadline(past))
	u.grants(10, nil)
	done := make(chan error, 1)
	go func() { done <- h.flush() }()
	u.awaitWriter()
	require.NoError(t, h.setDeadline(past))
	notYet(t, done, "flush")
	u.grants(len(open), nil)
	require.NoError(t, Take(t, done, "flush"))
	require.Equal(t, open, u.taken())
	n, err := h.write([]byte("hello"))
	require.Equal(t, os.ErrDeadlineExceeded, err)
	require.Zero(t, n)
	require.Equal(t, open, u.taken())
}

// TestLargeFirstWriteThatBlocks: the opening has left before such a Write waits for its
// window, and nobody waits for that Write to be sure of it: neither CloseWrite nor a
// migration.
func TestLargeFirstWriteThatBlocks(t *testing.T) {
	open, data := string(opening(600, echoID)), strings.Repeat("x", openingRoom+1)
	old, next := newFake(), newFake()
	h := &sendHalf{cur: old, opening: []byte(open)}
	old.grants(len(open)+3, nil)
	w := writing(h, data)
	old.awaitWriter()
	flushed := make(chan error, 1)
	go func() { flushed <- h.flush() }()
	require.NoError(t, Take(t, flushed, "flush"))
	n, err := h.pause()
	require.NoError(t, err)
	require.Equal(t, uint64(3), n)
	_, err = h.resume(next)
	require.NoError(t, err)
	require.Equal(t, writeResult{len(data), nil}, Take(t, w, "the Write"))
	require.Equal(t, open+data[:3], old.taken())
	require.Equal(t, data[3:], next.taken())
}

// keeping keeps a Write that is blocked although it is closed for writing, as QUIC does.
type keeping struct{ *fakeStream }

func (*keeping) CloseWrite() error { return nil }

// TestCloseWriteCallsWriteOut: a Write that is blocked when its stream is closed returns,
// with its exact count, also where that of the underlying stream would not (QUIC).
func TestCloseWriteCallsWriteOut(t *testing.T) {
	u := &keeping{newFake()}
	h := &sendHalf{cur: u}
	u.grants(2, nil)
	w := writing(h, "hello")
	u.awaitWriter()
	require.NoError(t, h.closeWrite())
	require.NoError(t, h.setDeadline(time.Time{}), "does not let that Write go on")
	require.Equal(t, writeResult{2, errWriteClosed}, Take(t, w, "the Write"))
}

// TestSwitchBetweenWrites: what was written so far is counted, and the count begins anew
// on the next stream (S2, S12).
func TestSwitchBetweenWrites(t *testing.T) {
	old, next := newFake(), newFake()
	h := &sendHalf{cur: old}
	for range 3 {
		_, err := h.write([]byte("old"))
		require.NoError(t, err)
	}
	n, err := h.pause()
	require.NoError(t, err)
	require.Equal(t, uint64(9), n)
	w := writing(h, "new")
	notYet(t, w, "a Write of a half that is paused")
	closed, err := h.resume(next)
	require.NoError(t, err)
	require.False(t, closed)
	require.Equal(t, writeResult{3, nil}, Take(t, w, "the Write"))
	require.Equal(t, "oldoldold", old.taken())
	require.Equal(t, "new", next.taken())
	require.Same(t, next, h.stream())
	n, err = h.pause()
	require.NoError(t, err)
	require.Equal(t, uint64(3), n)
}

// TestKick: a Write that is blocked inside the old stream is called out at each byte, and
// goes on where it was (S2).
func TestKick(t *testing.T) {
	const data = "hello, world"
	for cut := range len(data) {
		old, next := newFake(), newFake()
		h := &sendHalf{cur: old}
		old.grants(cut, nil)
		w := writing(h, data)
		old.awaitWriter()
		n, err := h.pause()
		require.NoError(t, err)
		require.Equal(t, uint64(cut), n)
		old.grants(-1, nil)
		notYet(t, w, "a Write that was called out")
		_, err = h.resume(next)
		require.NoError(t, err)
		require.Equal(t, writeResult{len(data), nil}, Take(t, w, "the Write"))
		require.Equal(t, data[:cut], old.taken())
		require.Equal(t, data[cut:], next.taken())
	}
}

// deaf ignores some write deadlines, as WebRTC does now and then.
type deaf struct {
	*fakeStream
	mu   sync.Mutex
	deaf int
}

func (d *deaf) SetWriteDeadline(t time.Time) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.deaf--; d.deaf >= 0 {
		return nil
	}
	return d.fakeStream.SetWriteDeadline(t)
}

// TestKickAgain: a stream that does not hear the first call is called again.
func TestKickAgain(t *testing.T) {
	old, next := &deaf{fakeStream: newFake(), deaf: 2}, newFake()
	h := &sendHalf{cur: old}
	old.grants(2, nil)
	w := writing(h, "hello")
	old.awaitWriter()
	n, err := h.pause()
	require.NoError(t, err)
	require.Equal(t, uint64(2), n)
	_, err = h.resume(next)
	require.NoError(t, err)
	require.Equal(t, writeResult{5, nil}, Take(t, w, "the Write"))
	require.Equal(t, "llo", next.taken())
}

// generous takes everything, and reports a deadline all the same, as QUIC may.
type generous struct {
	*fakeStream
	inside, go_ chan struct{}
}

func (g *generous) Write(p []byte) (int, error) {
	close(g.inside)
	<-g.go_
	n, err := g.fakeStream.Write(p)
	if err == nil {
		err = os.ErrDeadlineExceeded
	}
	return n, err
}

func (g *generous) SetWriteDeadline(time.Time) error {
	select {
	case <-g.go_:
	default:
		close(g.go_)
	}
	return nil
}

// TestKickThatComesTooLate: the count decides, and not the error.
func TestKickThatComesTooLate(t *testing.T) {
	old, next := &generous{newFake(), make(chan struct{}), make(chan struct{})}, newFake()
	h := &sendHalf{cur: old}
	w := writing(h, "hello")
	<-old.inside
	n, err := h.pause()
	require.NoError(t, err)
	require.Equal(t, uint64(5), n)
	require.Equal(t, writeResult{5, nil}, Take(t, w, "the Write"), "everything was taken: nothing is left to wait for")
	_, err = h.resume(next)
	require.NoError(t, err)
	require.Empty(t, next.taken())
}

// TestWriteErrorWhileHeld: with a verified handover ahead, a Write that the old stream
// fails waits for the new one; without one, it fails (S5, S12).
func TestWriteErrorWhileHeld(t *testing.T) {
	t.Run("resumed", func(t *testing.T) {
		old, next := newFake(), newFake()
		h := &sendHalf{cur: old}
		h.hold(true)
		old.grants(3, network.ErrReset)
		w := writing(h, "hello")
		WaitFor(t, "the old stream to fail", old.sees(func() bool { return len(old.writes) == 1 }))
		n, err := h.pause()
		require.NoError(t, err)
		require.Equal(t, uint64(3), n)
		notYet(t, w, "the Write")
		_, err = h.resume(next)
		require.NoError(t, err)
		require.Equal(t, writeResult{5, nil}, Take(t, w, "the Write"))
		require.Equal(t, "lo", next.taken())
		require.False(t, h.held, "on the new stream an error is an error again")
	})
	t.Run("released", func(t *testing.T) {
		old := newFake()
		h := &sendHalf{cur: old}
		h.hold(true)
		old.grants(3, network.ErrReset)
		w := writing(h, "hello")
		WaitFor(t, "the old stream to fail", old.sees(func() bool { return len(old.writes) == 1 }))
		notYet(t, w, "the Write")
		h.hold(false)
		require.Equal(t, writeResult{3, network.ErrReset}, Take(t, w, "the Write"))
	})
	t.Run("not held", func(t *testing.T) {
		old := newFake()
		h := &sendHalf{cur: old}
		h.hold(false)
		old.grants(3, network.ErrReset)
		n, err := h.write([]byte("hello"))
		require.Equal(t, 3, n)
		require.Equal(t, network.ErrReset, err)
	})
	t.Run("deadline", func(t *testing.T) {
		// The application's own.
		old := newFake()
		h := &sendHalf{cur: old}
		h.hold(true)
		old.grants(3, nil)
		w := writing(h, "hello")
		old.awaitWriter()
		require.NoError(t, h.setDeadline(past))
		require.Equal(t, writeResult{3, os.ErrDeadlineExceeded}, Take(t, w, "the Write"))
	})
	t.Run("failed", func(t *testing.T) {
		old := newFake()
		h := &sendHalf{cur: old}
		h.hold(true)
		old.grants(3, network.ErrReset)
		w := writing(h, "hello")
		WaitFor(t, "the old stream to fail", old.sees(func() bool { return len(old.writes) == 1 }))
		gone := errors.New("gone")
		h.fail(gone)
		require.Equal(t, writeResult{3, gone}, Take(t, w, "the Write"))
	})
}

// TestWriteLosesItsConnection: an application that was told that its connection is gone was
// told so whatever the connection itself says at that moment; QUIC's streams fail first. A
// Write that the other end has refused says nothing of the connection (S13).
func TestWriteLosesItsConnection(t *testing.T) {
	for name, test := range map[string]struct {
		err    error
		closed bool // the application ends its writing meanwhile
		lost   bool
	}{
		"connection closed by the peer": {&network.ConnError{Remote: true}, false, true},
		"untyped":                       {errors.New("session is gone"), false, true},
		"reset locally":                 {&network.StreamError{}, false, true},
		"other end reads no more":       {&network.StreamError{Remote: true}, false, false},
		"deadline":                      {os.ErrDeadlineExceeded, false, false},
		"closed meanwhile":              {errors.New("write after close"), true, false},
	} {
		t.Run(name, func(t *testing.T) {
			u := newFake()
			h := &sendHalf{cur: u}
			u.grants(3, nil)
			done := make(chan error, 1)
			go func() {
				_, err := h.write([]byte("hello"))
				done <- err
			}()
			u.awaitWriter()
			if test.closed {
				h.mu.Lock()
				h.closed = true
				h.mu.Unlock()
			}
			u.grants(0, test.err)
			require.Error(t, Take(t, done, "the Write"))
			require.Equal(t, test.lost, h.hasLost())
		})
	}
}

// TestWriteDeadlineWhilePaused holds, is not mistaken for a kick, and is set on the next
// stream.
func TestWriteDeadlineWhilePaused(t *testing.T) {
	old, next := newFake(), newFake()
	h := &sendHalf{cur: old}
	old.grants(2, nil)
	w := writing(h, "hello")
	old.awaitWriter()
	_, err := h.pause()
	require.NoError(t, err)
	require.NoError(t, h.setDeadline(past))
	require.Equal(t, writeResult{2, os.ErrDeadlineExceeded}, Take(t, w, "the Write"))
	_, err = h.resume(next)
	require.NoError(t, err)
	n, err := h.write([]byte("llo"))
	require.Zero(t, n)
	require.Equal(t, os.ErrDeadlineExceeded, err, "the deadline holds across the switch")
	require.NoError(t, h.setDeadline(time.Time{}))
	_, err = h.write([]byte("llo"))
	require.NoError(t, err)
	require.Equal(t, "llo", next.taken())

	// A deadline that the application takes away while a Write is called out does not
	// let that Write back into the old stream.
	old, next = newFake(), newFake()
	h = &sendHalf{cur: old}
	_, err = h.pause()
	require.NoError(t, err)
	require.NoError(t, h.setDeadline(time.Time{}))
	w = writing(h, "hello")
	_, err = h.resume(next)
	require.NoError(t, err)
	require.Equal(t, writeResult{5, nil}, Take(t, w, "the Write"))
	require.Empty(t, old.taken())
}

// TestCloseWriteWhilePaused: the exchange closes the new stream in its stead (S6), and
// never the old one before its final size is told.
func TestCloseWriteWhilePaused(t *testing.T) {
	old, next := newFake(), newFake()
	h := &sendHalf{cur: old}
	_, err := h.pause()
	require.NoError(t, err)
	require.NoError(t, h.closeWrite())
	require.False(t, old.writeClosed)
	_, err = h.write([]byte("x"))
	require.ErrorIs(t, err, errWriteClosed)
	closed, err := h.resume(next)
	require.NoError(t, err)
	require.True(t, closed)
	_, err = h.write([]byte("x"))
	require.ErrorIs(t, err, errWriteClosed)
	require.Empty(t, next.taken())
}

// TestWriterThatWaitsWhenClosed is told so, with its exact count.
func TestWriterThatWaitsWhenClosed(t *testing.T) {
	old := newFake()
	h := &sendHalf{cur: old}
	old.grants(2, nil)
	w := writing(h, "hello")
	old.awaitWriter()
	_, err := h.pause()
	require.NoError(t, err)
	require.NoError(t, h.closeWrite())
	require.Equal(t, writeResult{2, errWriteClosed}, Take(t, w, "the Write"))
}

// TestSendHalfThatFailed: everything reports why.
func TestSendHalfThatFailed(t *testing.T) {
	old := newFake()
	h := &sendHalf{cur: old, opening: []byte("opening")}
	gone, later := errors.New("gone"), errors.New("later")
	h.fail(gone)
	h.fail(later)
	_, err := h.write([]byte("x"))
	require.Equal(t, gone, err)
	require.Equal(t, gone, h.closeWrite())
	_, err = h.pause()
	require.Equal(t, gone, err)
	_, err = h.resume(newFake())
	require.Equal(t, gone, err)
	require.NoError(t, h.flush())
	require.Empty(t, old.taken(), "nothing leaves any more")
	require.False(t, old.writeClosed, "a FIN must not overtake the reset")

	// While pause waits for a Write that does not come out.
	old2 := &deaf{fakeStream: newFake(), deaf: 1 << 30}
	h = &sendHalf{cur: old2}
	old2.grants(0, nil)
	w := writing(h, "hello")
	old2.awaitWriter()
	paused := make(chan error, 1)
	go func() {
		_, err := h.pause()
		paused <- err
	}()
	WaitFor(t, "pause", h.isPaused)
	h.fail(gone)
	require.Equal(t, gone, Take(t, paused, "pause"))
	notYet(t, w, "a Write inside the stream")
	require.NoError(t, old2.Reset())
	require.Equal(t, writeResult{0, gone}, Take(t, w, "the Write"))
}

// TestConcurrentWrites take turns: no buffer is torn, not even where a switch comes in
// between.
func TestConcurrentWrites(t *testing.T) {
	const writers, times, size = 4, 50, 10
	old := newFake()
	old.grants(0, nil) // so that no writer has done before the others begin
	h := &sendHalf{cur: old}
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			p := []byte(strings.Repeat(string(rune('a'+i)), size))
			for range times {
				if n, err := h.write(p); n != size || err != nil {
					t.Errorf("Write: %d, %v", n, err)
				}
			}
		})
	}
	streams := []*fakeStream{old}
	for i := range 20 {
		u := streams[len(streams)-1]
		// Take an odd number of bytes, and get stuck.
		u.grants(37+i, nil)
		u.awaitWriter()
		_, err := h.pause()
		require.NoError(t, err)
		next := newFake()
		next.grants(0, nil)
		_, err = h.resume(next)
		require.NoError(t, err)
		streams = append(streams, next)
	}
	streams[len(streams)-1].grants(-1, nil)
	wg.Wait()
	var all strings.Builder
	for _, u := range streams {
		all.WriteString(u.taken())
	}
	got := all.String()
	require.Len(t, got, writers*times*size)
	for i := 0; i < len(got); i += size {
		require.Equal(t, strings.Repeat(got[i:i+1], size), got[i:i+size], "a buffer was torn at %d", i)
	}
}

// TestWriteWaitsForItsTurn: of two Writes one at most is inside the stream, where two could
// overrun the window of a yamux stream; and the other has a deadline all the same.
func TestWriteWaitsForItsTurn(t *testing.T) {
	virtual(t, func(t *testing.T) {
		u := newFake()
		u.grants(3, nil)
		h := &sendHalf{cur: u}
		first := writing(h, "first")
		synctest.Wait()
		second := writing(h, "second")
		synctest.Wait()
		require.Equal(t, 1, u.writing)
		require.NoError(t, h.setDeadline(time.Now().Add(time.Second)))
		_ = u.SetWriteDeadline(time.Time{}) // as if it stayed inside
		require.Equal(t, writeResult{0, os.ErrDeadlineExceeded}, <-second)
		require.NoError(t, h.setDeadline(time.Time{}))
		third := writing(h, "third")
		synctest.Wait()
		u.grants(-1, nil)
		require.Equal(t, writeResult{5, nil}, <-first)
		require.Equal(t, writeResult{5, nil}, <-third)
		require.Equal(t, "firstthird", u.taken())
	})
}

// TestWriteAfterAResetThatFollowsClose: Close has to send the opening first; where the stream is
// reset meanwhile, that is what a Write is told.
func TestWriteAfterAResetThatFollowsClose(t *testing.T) {
	h := &sendHalf{cur: newFake(), opening: []byte("opening")}
	h.shut()
	_, err := h.write([]byte("x"))
	require.ErrorIs(t, err, errWriteClosed)
	h.fail(network.ErrReset)
	_, err = h.write([]byte("x"))
	require.ErrorIs(t, err, network.ErrReset)
}

// TestKeptError: that a Write waits which its stream has failed is so for as long as an exchange
// holds the half, and not for the next one.
func TestKeptError(t *testing.T) {
	virtual(t, func(t *testing.T) {
		gone := errors.New("gone")
		u := newFake()
		h := &sendHalf{cur: u}
		u.grants(0, gone)
		h.hold(true)
		require.False(t, h.keepsError())
		w := writing(h, "hello")
		synctest.Wait()
		require.True(t, h.keepsError())
		h.hold(true) // an exchange that follows upon another
		require.True(t, h.keepsError())
		h.hold(false)
		require.Equal(t, writeResult{0, gone}, <-w)
		require.False(t, h.keepsError())
	})
}
