package migrate

import (
	"errors"
	"io"
	"os"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/rawpeer"
)

// The receiving half, over fake streams, in virtual time.

// virtual runs the test in a bubble with a clock of its own. Under the race detector the
// test is skipped, unless GOMAXPROCS is 1: else the race runtime crashes on such bubbles
// now and then.
func virtual(t *testing.T, test func(t *testing.T)) {
	if raceEnabled && runtime.GOMAXPROCS(0) > 1 {
		t.Skip("the race runtime crashes on testing/synctest now and then, but with GOMAXPROCS=1")
	}
	synctest.Test(t, test)
}

// bubble is virtual as a subtest.
func bubble(t *testing.T, name string, test func(t *testing.T)) {
	t.Run(name, func(t *testing.T) { virtual(t, test) })
}

type readResult struct {
	data string
	err  error
}

// receiver is a receiving half on its way from old to next.
type receiver struct {
	*receiveHalf
	old, next *fakeStream
	scope     *fakeScope
	awaited   chan error
	stream    *Stream
	path      *flow
	all       []*Stream // with the same peer
}

func newReceiver(t *testing.T) *receiver {
	r := &receiver{old: newFake(), next: newFake(), scope: new(fakeScope), stream: new(Stream), path: new(flow)}
	r.receiveHalf, r.all = &r.stream.recv, []*Stream{r.stream}
	r.cur = &source{stream: r.old}
	t.Cleanup(r.ends)
	return r
}

// hands begins the handover; verified where final is not negative.
func (r *receiver) hands(final int, stall time.Duration) {
	r.hold()
	var g goal = untilEOF{}
	if final >= 0 {
		g = finalSize(final)
	}
	r.handover(&source{stream: r.next}, g)
	r.reserveIn(r.scope)
	r.awaited = make(chan error, 1)
	go func() {
		err := r.await(stall, maxHold, r.look)
		if err != nil {
			r.fail(reset(err)) // as the exchange does, when it has reset the stream
		}
		r.awaited <- err
	}()
	synctest.Wait()
}

func (r *receiver) look() time.Time { return r.path.look(r.old.conn, r.receiveHalf, r.peers()) }

// waitsAhead is how much has been read of the next stream.
func (r *receiver) waitsAhead() int {
	_, ahead := r.waiting()
	return ahead
}

// peers are all streams with the same peer. The test may change that at the same moment of
// virtual time.
func (r *receiver) peers() []*Stream {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.all
}

// kept is how much has been read of the old stream, or since the switch, and not taken.
func (r *receiver) kept() int {
	now, _ := r.waiting()
	return now
}

// begins begins a Read of up to size bytes.
func (r *receiver) begins(size int) chan readResult {
	ch := make(chan readResult, 1)
	go func() {
		p := make([]byte, size)
		n, err := r.read(p)
		ch <- readResult{string(p[:n]), err}
	}()
	synctest.Wait()
	return ch
}

func (r *receiver) wants(t *testing.T, data string) {
	t.Helper()
	var got strings.Builder
	for got.Len() < len(data) {
		select {
		case v := <-r.begins(len(data) - got.Len()):
			require.NoError(t, v.err)
			got.WriteString(v.data)
		default:
			t.Fatalf("Read blocks after %q", got.String())
		}
	}
	require.Equal(t, data, got.String())
}

func now[T any](t *testing.T, ch chan T, what string) (v T) {
	t.Helper()
	synctest.Wait()
	select {
	case v = <-ch:
	default:
		t.Fatalf("%s has to return by now", what)
	}
	return v
}

func later[T any](t *testing.T, ch chan T, what string) {
	t.Helper()
	synctest.Wait()
	notYet(t, ch, what)
}

// ends lets everything end that is still inside a stream.
func (r *receiver) ends() {
	r.fail(errors.New("the test is over"))
	_, _ = r.old.Reset(), r.next.Reset()
	synctest.Wait()
}

// TestReadOfOpenHalf: what the stream says, as it says it, outside of an exchange.
func TestReadOfOpenHalf(t *testing.T) {
	u := newFake().feeds("hello", nil).feeds("", nil).feeds("end", io.EOF).feeds("!", nil).feeds("", io.EOF)
	u.lies = true
	h := receivingFrom(u, "")
	p := make([]byte, 3)
	for _, want := range []string{"hel", "lo"} {
		n, err := h.read(p)
		require.NoError(t, err)
		require.Equal(t, want, string(p[:n]))
	}
	n, err := h.read(p) // one that brings nothing is not passed on
	require.NoError(t, err, "an EOF that comes along with data may be none (S12)")
	require.Equal(t, "end", string(p[:n]))
	n, err = h.read(p)
	require.NoError(t, err)
	require.Equal(t, "!", string(p[:n]))
	for range 2 {
		_, err = h.read(p)
		require.Equal(t, io.EOF, err, "one that was given stays given (S6)")
	}
	require.Equal(t, uint64(9), h.reads())

	broken := errors.New("broken")
	u = newFake().feeds("", os.ErrDeadlineExceeded).feeds("x", broken)
	h = receivingFrom(u, "")
	_, err = h.read(p)
	require.Equal(t, os.ErrDeadlineExceeded, err)
	n, err = h.read(p)
	require.Equal(t, "x", string(p[:n]))
	require.Equal(t, broken, err)
	u.feeds("more", nil)
	n, err = h.read(p)
	require.Zero(t, n)
	require.Equal(t, broken, err, "an error that was given stays given")

	h = receivingFrom(newFake().feeds("more", nil), "")
	_ = h.closeRead()
	_, err = h.read(p)
	require.ErrorIs(t, err, errReadClosed)
}

// TestReadOfHeldHalf: data flow, and an end is kept back until it is released (S5).
func TestReadOfHeldHalf(t *testing.T) {
	virtual(t, func(t *testing.T) {
		for _, end := range []error{io.EOF, network.ErrReset} {
			r := newReceiver(t)
			r.hold()
			r.old.feeds("data", nil)
			r.wants(t, "data")
			r.old.feeds("last", end)
			r.wants(t, "last")
			got := r.begins(10)
			later(t, got, "the end")
			require.True(t, r.hasEnded())
			r.release()
			require.Equal(t, readResult{"", end}, now(t, got, "the end"))
		}
	})
}

// TestDeadlineOfHeldHalf: an application's deadline is none that is kept back.
func TestDeadlineOfHeldHalf(t *testing.T) {
	virtual(t, func(t *testing.T) {
		r := newReceiver(t)
		r.hold()
		got := r.begins(10)
		require.NoError(t, r.setDeadline(time.Now().Add(time.Second)))
		later(t, got, "the Read")
		time.Sleep(time.Second)
		require.Equal(t, readResult{"", os.ErrDeadlineExceeded}, now(t, got, "the Read"))
		require.False(t, r.hasEnded())

		// Of a Read that waits for the meaning of an end, too.
		require.NoError(t, r.setDeadline(time.Time{}))
		r.old.feeds("", io.EOF)
		got = r.begins(10)
		require.NoError(t, r.setDeadline(time.Now().Add(time.Second)))
		time.Sleep(time.Second)
		require.Equal(t, readResult{"", os.ErrDeadlineExceeded}, now(t, got, "the Read"))
		require.True(t, r.hasEnded())
	})
}

// TestSwitchOver: a reader that is blocked inside the old stream goes on with the new one
// (S4, S12).
func TestSwitchOver(t *testing.T) {
	bubble(t, "draft, at EOF", func(t *testing.T) {
		r := newReceiver(t)
		got := r.begins(10)
		r.hands(-1, time.Minute)
		r.next.feeds("new", nil)
		later(t, got, "the Read")
		r.old.feeds("", io.EOF)
		require.Equal(t, readResult{"new", nil}, now(t, got, "the Read"))
		require.NoError(t, now(t, r.awaited, "await"))
	})
	bubble(t, "draft, EOF with the last data", func(t *testing.T) {
		r := newReceiver(t)
		got := r.begins(10)
		r.hands(-1, time.Minute)
		r.old.feeds("old", io.EOF)
		require.Equal(t, readResult{"old", nil}, now(t, got, "the Read"), "the EOF is the migration's")
		r.next.feeds("new", nil)
		r.wants(t, "new")
	})
	bubble(t, "draft, an EOF that was held", func(t *testing.T) {
		r := newReceiver(t)
		r.hold()
		r.old.feeds("", io.EOF)
		got := r.begins(10)
		r.hands(-1, time.Minute)
		require.NoError(t, now(t, r.awaited, "await"))
		r.next.feeds("new", nil)
		require.Equal(t, readResult{"new", nil}, now(t, got, "the Read"))
	})
	bubble(t, "verified, at the final size", func(t *testing.T) {
		r := newReceiver(t)
		r.old.feeds("abc", nil)
		r.wants(t, "abc")
		got := r.begins(10)
		r.hands(5, time.Minute)
		later(t, r.awaited, "await")
		r.old.feeds("de", nil)
		require.Equal(t, readResult{"de", nil}, now(t, got, "the Read"))
		require.NoError(t, now(t, r.awaited, "await"))
		r.next.feeds("new", nil)
		r.wants(t, "new")
		require.Equal(t, uint64(3), r.reads(), "the count begins anew")
	})
	bubble(t, "verified, all there is was read", func(t *testing.T) {
		r := newReceiver(t)
		r.old.feeds("abc", nil)
		r.wants(t, "abc")
		got := r.begins(10)
		r.hands(3, time.Minute)
		require.NoError(t, now(t, r.awaited, "await"))
		// The Read is still inside the old stream. It is called out by CloseRead.
		r.next.feeds("new", nil)
		later(t, got, "a Read inside the old stream")
		_ = r.old.CloseRead()
		require.Equal(t, readResult{"new", nil}, now(t, got, "the Read"))
	})
	bubble(t, "verified, more than the final size", func(t *testing.T) {
		r := newReceiver(t)
		got := r.begins(10)
		r.hands(3, time.Minute)
		r.old.feeds("abcd", nil)
		v := now(t, got, "the Read")
		require.ErrorIs(t, v.err, network.ErrReset)
		require.ErrorIs(t, v.err, errViolation)
		require.Empty(t, v.data)
		require.ErrorIs(t, now(t, r.awaited, "await"), errTooMuch)
	})
	bubble(t, "verified, more after the switch", func(t *testing.T) {
		r := newReceiver(t)
		got := r.begins(10)
		r.hands(0, time.Minute)
		require.NoError(t, now(t, r.awaited, "await"))
		r.old.feeds("x", nil)
		require.ErrorIs(t, now(t, got, "the Read").err, network.ErrReset)
	})
	bubble(t, "verified, an error at the final size", func(t *testing.T) {
		r := newReceiver(t)
		r.hold()
		r.old.feeds("abc", network.ErrReset)
		r.wants(t, "abc")
		got := r.begins(10)
		r.hands(3, time.Minute)
		require.NoError(t, now(t, r.awaited, "await"))
		r.next.feeds("new", nil)
		require.Equal(t, readResult{"new", nil}, now(t, got, "the Read"))
	})
}

// TestEndsThatAreNotBelieved (S8, S12).
func TestEndsThatAreNotBelieved(t *testing.T) {
	bubble(t, "draft, an error", func(t *testing.T) {
		r := newReceiver(t)
		r.hands(-1, time.Minute)
		r.old.feeds("abc", errors.New("broken"))
		require.ErrorContains(t, now(t, r.awaited, "await"), "broken")
		require.ErrorIs(t, now(t, r.begins(10), "Read").err, network.ErrReset)
	})
	bubble(t, "draft, EOF of a dead connection", func(t *testing.T) {
		r := newReceiver(t)
		r.hands(-1, time.Minute)
		r.old.conn.dies()
		r.old.feeds("abc", io.EOF)
		require.ErrorIs(t, now(t, r.awaited, "await"), errLost)
		require.ErrorIs(t, now(t, r.begins(10), "Read").err, network.ErrReset)
	})
	bubble(t, "draft, EOF of a dead connection that was held", func(t *testing.T) {
		r := newReceiver(t)
		r.hold()
		r.old.conn.dies()
		r.old.feeds("", io.EOF)
		got := r.begins(10)
		later(t, got, "the end")
		r.hands(-1, time.Minute)
		require.ErrorIs(t, now(t, r.awaited, "await"), errLost)
		require.ErrorIs(t, now(t, got, "Read").err, network.ErrReset)
	})
	bubble(t, "verified, an error too early", func(t *testing.T) {
		r := newReceiver(t)
		r.hands(5, time.Minute)
		r.old.feeds("abc", errors.New("broken"))
		err := now(t, r.awaited, "await")
		require.ErrorIs(t, err, errLost)
		require.ErrorContains(t, err, "broken")
		require.ErrorIs(t, err, network.ErrReset)
	})
	bubble(t, "verified, an EOF that the application was given", func(t *testing.T) {
		r := newReceiver(t)
		r.old.feeds("abc", nil).feeds("", io.EOF)
		r.wants(t, "abc")
		require.Equal(t, io.EOF, now(t, r.begins(10), "Read").err)
		r.hands(5, time.Minute)
		require.ErrorIs(t, now(t, r.awaited, "await"), errLost)
		require.ErrorIs(t, now(t, r.begins(10), "Read").err, network.ErrReset)
	})
	bubble(t, "verified, an EOF that was right", func(t *testing.T) {
		r := newReceiver(t)
		r.old.feeds("abc", nil).feeds("", io.EOF)
		r.wants(t, "abc")
		require.Equal(t, io.EOF, now(t, r.begins(10), "Read").err)
		r.hands(3, time.Minute)
		require.NoError(t, now(t, r.awaited, "await"))
		require.Equal(t, io.EOF, now(t, r.begins(10), "Read").err, "an EOF that was given stays given (S6)")
	})
	bubble(t, "untrusted", func(t *testing.T) {
		r := newReceiver(t)
		r.hold()
		r.distrust()
		r.release()
		r.noteOwnEnd()
		r.old.feeds("abc", io.EOF)
		v := now(t, r.begins(10), "Read")
		require.Equal(t, "abc", v.data)
		if v.err == nil {
			v = now(t, r.begins(10), "Read")
		}
		require.ErrorIs(t, v.err, network.ErrReset)
		require.ErrorIs(t, now(t, r.begins(10), "Read").err, errUntrustedEnd)
	})
}

// TestReread: a stream that reports EOF too early is read again, since a muxer that goes
// down may have more on its way into its buffer: 6 times, 630 ms in all (S12).
func TestReread(t *testing.T) {
	bubble(t, "comes", func(t *testing.T) {
		for eofs := range rereads + 1 {
			r := newReceiver(t)
			r.old.feeds("abc", io.EOF)
			for range eofs {
				r.old.feeds("", io.EOF)
			}
			r.old.feeds("de", io.EOF)
			if eofs == rereads {
				r.hands(5, time.Minute)
				start := time.Now()
				require.ErrorIs(t, <-r.awaited, errLost)
				require.Equal(t, 630*time.Millisecond, time.Since(start))
				continue
			}
			r.hands(5, time.Minute)
			require.NoError(t, <-r.awaited, "after %d false EOFs", 1+eofs)
			r.next.feeds("new", nil)
			r.wants(t, "abcdenew")
			require.Zero(t, r.scope.reserved())
		}
	})
	bubble(t, "progress begins anew", func(t *testing.T) {
		r := newReceiver(t)
		for range 5 {
			for range rereads {
				r.old.feeds("", io.EOF)
			}
			r.old.feeds("x", nil)
		}
		r.hands(5, time.Minute)
		require.NoError(t, <-r.awaited)
		r.wants(t, "xxxxx")
	})
	bubble(t, "for a reader", func(t *testing.T) {
		r := newReceiver(t)
		got := r.begins(10)
		r.hands(3, time.Minute)
		r.old.feeds("", io.EOF)
		later(t, got, "the Read")
		r.old.feeds("abc", nil)
		require.NoError(t, <-r.awaited)
		require.Equal(t, readResult{"abc", nil}, now(t, got, "the Read"))
	})
	bubble(t, "fails meanwhile", func(t *testing.T) {
		r := newReceiver(t)
		r.old.feeds("", io.EOF)
		r.hands(3, time.Minute)
		gone := errors.New("gone")
		r.fail(gone)
		require.Equal(t, gone, now(t, r.awaited, "await"))
	})
}

// TestDrain: the old stream is read though the application does not read, up to a bound,
// in reserved memory; application Reads are served first from what was drained (S4, M4).
func TestDrain(t *testing.T) {
	virtual(t, func(t *testing.T) {
		r := newReceiver(t)
		r.hands(-1, time.Hour)
		block := strings.Repeat("0123456789abcdef", 1<<12) // 64 KiB
		const blocks = 300                                 // 18.75 MiB
		for range blocks {
			r.old.feeds(block, nil)
		}
		r.old.feeds("", io.EOF)
		synctest.Wait()
		require.LessOrEqual(t, r.kept(), maxDrained)
		require.Greater(t, r.kept(), maxDrained-readChunk)
		require.Equal(t, r.kept(), r.scope.reserved())
		later(t, r.awaited, "await")
		time.Sleep(59 * time.Minute)
		later(t, r.awaited, "await") // a full buffer is no stall

		r.wants(t, block)
		synctest.Wait()
		require.Greater(t, r.kept(), maxDrained-readChunk, "what was read makes room")
		for range blocks - 1 {
			r.wants(t, block)
		}
		require.NoError(t, now(t, r.awaited, "await"))
		require.Zero(t, r.scope.reserved())
		require.LessOrEqual(t, r.scope.peak, maxDrained)
		r.next.feeds("new", nil)
		r.wants(t, "new")
	})
}

// TestDrainReadsNoFurther than the final size, so that what a peer sends beyond costs
// nothing.
func TestDrainReadsNoFurther(t *testing.T) {
	virtual(t, func(t *testing.T) {
		r := newReceiver(t)
		r.hands(5, time.Minute)
		r.old.feeds("abcdefgh", nil)
		require.NoError(t, now(t, r.awaited, "await"))
		require.Equal(t, 5, r.kept())
		require.Equal(t, 5, r.scope.reserved())
		r.wants(t, "abcde")
	})
}

// TestDrainWithoutMemory: where the resource manager refuses the drain, the application
// can still read, nothing is taken for a stall, and the drain goes on when there is
// memory (M4).
func TestDrainWithoutMemory(t *testing.T) {
	virtual(t, func(t *testing.T) {
		r := newReceiver(t)
		r.scope.limitTo(100)
		r.hands(50_000, time.Minute)
		r.old.feeds(strings.Repeat("x", 40_000), nil)
		synctest.Wait()
		require.Zero(t, r.kept())
		require.True(t, r.starves())
		time.Sleep(time.Hour)
		later(t, r.awaited, "await")

		r.wants(t, strings.Repeat("x", 10_000))
		require.Zero(t, r.scope.reserved())
		r.scope.limitTo(0)
		time.Sleep(stallNotice)
		synctest.Wait()
		require.Equal(t, 30_000, r.kept())
		r.old.feeds(strings.Repeat("y", 10_000), nil)
		require.NoError(t, now(t, r.awaited, "await"))
		r.wants(t, strings.Repeat("x", 30_000)+strings.Repeat("y", 10_000))
		r.next.feeds("new", nil)
		r.wants(t, "new") // whoever reads it, nothing is reserved for it any more
		require.Zero(t, r.scope.reserved())
	})
}

// TestStallBehindAWantOfMemory: memory is refused for a while, and then the application
// reads itself. From then on it is the path that is waited for, and no longer than it may
// stall (M4).
func TestStallBehindAWantOfMemory(t *testing.T) {
	virtual(t, func(t *testing.T) {
		r := newReceiver(t)
		r.scope.limit = 1
		r.hands(5, 10*time.Second)
		require.True(t, r.starves())
		r.begins(10)
		time.Sleep(time.Minute)
		require.ErrorIs(t, now(t, r.awaited, "the handover"), errStalled)
	})
}

// TestReadAheadWithoutMemory: what waits unread because memory is refused holds the window
// that others share as well, and for as long as if it were too much (M4).
func TestReadAheadWithoutMemory(t *testing.T) {
	virtual(t, func(t *testing.T) {
		r := newReceiver(t)
		r.hands(5, time.Minute)
		r.next.feeds(strings.Repeat("x", 10), nil)
		time.Sleep(stallNotice)
		synctest.Wait()
		require.True(t, r.readsAhead())
		r.scope.limitTo(1)
		r.next.feeds(strings.Repeat("x", readChunk), nil) // more than is reserved
		time.Sleep(maxHold)
		require.ErrorIs(t, now(t, r.awaited, "the handover"), errStalled)
	})
}

// TestReadAheadReservesSeldom: a Read brings a packet, and every reservation takes a lock of
// the resource manager's that the whole host shares, yamux's receiving included.
func TestReadAheadReservesSeldom(t *testing.T) {
	virtual(t, func(t *testing.T) {
		r := newReceiver(t)
		r.hands(5, time.Hour)
		time.Sleep(stallNotice)
		synctest.Wait()
		before := r.scope.reservations()
		const packet, packets = 1 << 10, 1 << 10
		for range packets {
			r.next.feeds(strings.Repeat("x", packet), nil)
			synctest.Wait()
		}
		require.Equal(t, packet*packets, r.waitsAhead())
		require.LessOrEqual(t, r.scope.reservations()-before, 2*packet*packets/readChunk)
		require.LessOrEqual(t, r.scope.reserved(), packet*packets+2*readChunk)
		r.old.feeds("first", nil)
		require.NoError(t, now(t, r.awaited, "await"))
		r.wants(t, "first"+strings.Repeat("x", packet*packets))
		r.ends()
		require.Zero(t, r.scope.reserved())
	})
}

// TestDeadlineFromBeforeCloseRead: a deadline that the application has set and could not
// lift any more, having closed its reading, is not the exchange's, which reads on (S3).
func TestDeadlineFromBeforeCloseRead(t *testing.T) {
	virtual(t, func(t *testing.T) {
		r := newReceiver(t)
		require.True(t, r.awaitProof())
		require.NoError(t, r.setDeadline(time.Now().Add(time.Second)))
		require.NoError(t, r.closeRead())
		require.NoError(t, r.setDeadline(time.Time{}))
		r.hands(-1, time.Minute)
		time.Sleep(2 * time.Second)
		r.old.ends(io.EOF)
		require.NoError(t, now(t, r.awaited, "the handover"))
	})
}

// TestDrainHasNoDeadline: the application's deadline holds for its Read, and never
// reaches a stream that the drain reads: on yamux and WebRTC that would lose data.
func TestDrainHasNoDeadline(t *testing.T) {
	virtual(t, func(t *testing.T) {
		r := newReceiver(t)
		r.hands(5, time.Hour)
		got := r.begins(10)
		before := len(r.old.deadlines)
		at := time.Now().Add(stallNotice / 2)
		require.NoError(t, r.setDeadline(at))
		time.Sleep(stallNotice / 2)
		require.Equal(t, readResult{"", os.ErrDeadlineExceeded}, now(t, got, "the Read"))
		require.Len(t, r.old.deadlines, before, "a deadline was set on a stream that the drain reads")
		later(t, r.awaited, "await")

		r.old.feeds("abcde", nil)
		require.NoError(t, now(t, r.awaited, "await"))
		require.Equal(t, []time.Time{at}, r.next.deadlines, "it holds across the switch")
		v := now(t, r.begins(10), "the Read")
		require.Equal(t, readResult{"abcde", nil}, v, "what is there is given, deadline or not")
		require.Equal(t, os.ErrDeadlineExceeded, now(t, r.begins(10), "the Read").err)
		require.NoError(t, r.setDeadline(time.Time{}))
		r.next.feeds("new", nil)
		r.wants(t, "new")
	})
}

// TestDeadlineBeforeTheDrain: one that was set before is taken off the old stream while
// the drain reads it.
func TestDeadlineBeforeTheDrain(t *testing.T) {
	virtual(t, func(t *testing.T) {
		r := newReceiver(t)
		at := time.Now().Add(stallNotice / 4)
		require.NoError(t, r.setDeadline(at))
		r.hands(5, time.Hour)
		require.Equal(t, []time.Time{at, {}}, r.old.deadlines)
		time.Sleep(stallNotice / 2)
		r.old.feeds("abcde", nil)
		require.NoError(t, now(t, r.awaited, "await"))
		require.Equal(t, []time.Time{at}, r.next.deadlines)
		r.wants(t, "abcde")
	})
}

// TestReadAheadOutlivesNextMigration: whoever reads ahead may still be inside that stream
// when the migration after this one is done with it, too, and is called out. That is no
// failure.
func TestReadAheadOutlivesNextMigration(t *testing.T) {
	virtual(t, func(t *testing.T) {
		r := newReceiver(t)
		r.hands(5, time.Minute)
		time.Sleep(2 * stallNotice)
		r.next.awaitReader()
		r.old.feeds("hello", nil)
		require.NoError(t, now(t, r.awaited, "await"))
		r.wants(t, "hello")
		last := newFake()
		r.hold()
		r.handover(&source{stream: last}, finalSize(0))
		r.reserveIn(r.scope)
		require.NoError(t, r.await(time.Minute, maxHold, r.look))
		require.NoError(t, r.next.Reset())
		synctest.Wait()
		last.feeds("world", nil)
		r.wants(t, "world")
		require.Zero(t, r.scope.reserved())
	})
}

// TestDeadlineThatCannotBeLifted: a yamux stream that has got its FIN keeps the deadline
// that it had, and reports it with data that are whole.
func TestDeadlineThatCannotBeLifted(t *testing.T) {
	virtual(t, func(t *testing.T) {
		r := newReceiver(t)
		r.old.feeds("hello, ", timeoutError{}).feeds("world", timeoutError{})
		r.hands(12, time.Minute)
		require.NoError(t, now(t, r.awaited, "await"))
		r.next.feeds("!", nil)
		r.wants(t, "hello, world!")
	})
}

// TestStallTimeout: no progress at all for that long, once the peer has told how much is
// still to come; a peer that drips makes progress (M4).
func TestStallTimeout(t *testing.T) {
	virtual(t, func(t *testing.T) {
		for _, stall := range []time.Duration{time.Millisecond, 30 * time.Second, time.Hour} {
			r := newReceiver(t)
			start := time.Now()
			r.hands(100, stall)
			for range 50 {
				time.Sleep(stall - time.Nanosecond)
				r.old.feeds("x", nil)
				later(t, r.awaited, "await")
			}
			drip := time.Since(start)
			require.ErrorIs(t, <-r.awaited, errStalled)
			require.Equal(t, drip+stall, time.Since(start))
			require.ErrorIs(t, now(t, r.begins(10), "Read").err, network.ErrReset)
			require.LessOrEqual(t, r.scope.peak, readChunk+100)
		}
	})
}

// TestStallWhileOthersMove: the old stream brings nothing, but others of its connection do:
// the path is alive, and what is owed may be behind them. The time counts from the look that
// has shown it, and has an end (M4).
func TestStallWhileOthersMove(t *testing.T) {
	const stall = 30 * time.Second
	begin := func(t *testing.T) (r, other *receiver) {
		r, other = newReceiver(t), newReceiver(t)
		other.old.conn = r.old.conn
		r.all = append(r.all, other.stream)
		return r, other
	}
	lostAfter := func(t *testing.T, r *receiver, d time.Duration) {
		t.Helper()
		start := time.Now()
		require.ErrorIs(t, <-r.awaited, errStalled)
		require.Equal(t, d, time.Since(start))
	}
	bubble(t, "arrives late", func(t *testing.T) {
		r, other := begin(t)
		r.hands(5, stall)
		for range patience - 1 {
			time.Sleep(stall - time.Nanosecond)
			other.old.feeds("x", nil)
			other.wants(t, "x")
			later(t, r.awaited, "await")
		}
		r.old.feeds("first", nil)
		require.NoError(t, now(t, r.awaited, "await"))
		r.wants(t, "first")
	})
	bubble(t, "and then no more", func(t *testing.T) {
		r, other := begin(t)
		r.hands(5, stall)
		time.Sleep(maxHold)
		other.old.feeds("x", nil)
		other.wants(t, "x")
		lostAfter(t, r, 2*stall-maxHold)
	})
	bubble(t, "before the first look", func(t *testing.T) {
		r, other := begin(t)
		r.hands(5, stall)
		time.Sleep(maxHold/2 - time.Nanosecond)
		other.old.feeds("x", nil)
		other.wants(t, "x")
		lostAfter(t, r, stall-maxHold/2+time.Nanosecond)
	})
	bubble(t, "for ever", func(t *testing.T) {
		r, other := begin(t)
		r.hands(5, stall)
		start := time.Now()
		ticks := time.NewTicker(time.Second)
		defer ticks.Stop()
		for {
			select {
			case err := <-r.awaited:
				require.ErrorIs(t, err, errStalled)
				require.Equal(t, patience*stall, time.Since(start))
				return
			case <-ticks.C:
				other.old.feeds("x", nil)
				other.wants(t, "x")
			}
		}
	})
	bubble(t, "all of another has come", func(t *testing.T) {
		r, other := begin(t)
		r.hands(5, stall)
		other.hands(3, stall)
		time.Sleep(maxHold)
		other.old.feeds("abc", nil)
		require.NoError(t, now(t, other.awaited, "the other's handover"))
		lostAfter(t, r, 2*stall-maxHold)
	})
	bubble(t, "another is lost", func(t *testing.T) {
		r, other := begin(t)
		r.hands(5, stall)
		other.hands(3, stall)
		time.Sleep(maxHold)
		other.old.ends(network.ErrReset)
		require.Error(t, now(t, other.awaited, "the other's handover"))
		r.mu.Lock()
		r.all = r.all[:1]
		r.mu.Unlock()
		lostAfter(t, r, stall-maxHold)
	})
	for i, name := range []string{"both", "both, the other way round"} {
		bubble(t, name, func(t *testing.T) {
			r, other := begin(t)
			r.all = [][]*Stream{{r.stream, other.stream}, {other.stream, r.stream}}[i]
			r.hands(5, stall)
			time.Sleep(maxHold)
			r.old.feeds("f", nil)
			time.Sleep(time.Second)
			other.old.feeds("x", nil)
			other.wants(t, "x")
			lostAfter(t, r, maxHold/2-time.Second+stall)
		})
	}
	bubble(t, "nobody has looked", func(t *testing.T) {
		// On a machine that is busy all the time may have passed before the first look.
		q := quietFromNow()
		time.Sleep(time.Hour)
		require.False(t, q.over(time.Time{}, stall))
		require.Equal(t, maxHold/2, time.Until(q.due(stall)))
		require.True(t, q.over(time.Time{}, stall))
	})
	bubble(t, "on another connection", func(t *testing.T) {
		r, other := begin(t)
		other.old.conn = new(fakeConn)
		r.hands(5, stall)
		time.Sleep(maxHold)
		other.old.feeds("x", nil)
		other.wants(t, "x")
		lostAfter(t, r, stall-maxHold)
	})
	bubble(t, "while more waits than is read ahead", func(t *testing.T) {
		r, other := begin(t)
		r.hands(5, stall)
		r.next.feeds(strings.Repeat("n", maxAhead+1), nil)
		for range patience - 1 {
			time.Sleep(maxHold - time.Nanosecond)
			other.old.feeds("x", nil)
			other.wants(t, "x")
			later(t, r.awaited, "await")
		}
		r.old.feeds("first", nil)
		require.NoError(t, now(t, r.awaited, "await"))
	})
}

// TestDraftHasNoStallTimeout before the peer is seen to write to the new stream: it ends
// the old one when its application has read what was sent, which may take any time. What
// it has written to the new one, it wrote after it ended the old one.
func TestDraftHasNoStallTimeout(t *testing.T) {
	virtual(t, func(t *testing.T) {
		r := newReceiver(t)
		r.hands(-1, 30*time.Second)
		time.Sleep(24 * time.Hour)
		later(t, r.awaited, "await")
		r.next.feeds("new", nil)
		synctest.Wait()
		time.Sleep(29 * time.Second)
		r.old.feeds("old", nil)
		time.Sleep(29 * time.Second)
		later(t, r.awaited, "await")
		r.old.feeds("", io.EOF)
		require.NoError(t, now(t, r.awaited, "await"))
		r.wants(t, "oldnew")

		r = newReceiver(t)
		r.hands(-1, 30*time.Second)
		time.Sleep(24 * time.Hour)
		start := time.Now()
		r.next.feeds("new", nil)
		require.ErrorIs(t, <-r.awaited, errStalled)
		require.Equal(t, 30*time.Second, time.Since(start))
	})
}

// TestReadAhead: the new stream is read while a handover takes long, and no further than
// maxAhead (M4).
func TestReadAhead(t *testing.T) {
	bubble(t, "bound", func(t *testing.T) {
		r := newReceiver(t)
		r.hands(5, time.Hour)
		const piece, pieces = 20_001, 300
		for range pieces {
			r.next.feeds(strings.Repeat("n", piece), nil)
		}
		time.Sleep(stallNotice - time.Nanosecond)
		synctest.Wait()
		require.Zero(t, r.waitsAhead(), "an ordinary handover takes a round trip")
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		require.Equal(t, maxAhead, r.waitsAhead())
		require.Equal(t, maxAhead+5, r.scope.reserved())
		time.Sleep(maxHold / 2)
		synctest.Wait()
		require.Equal(t, maxAhead, r.waitsAhead())
		r.old.feeds("first", nil)
		require.NoError(t, now(t, r.awaited, "await"))
		r.wants(t, "first"+strings.Repeat("n", piece*pieces))
		require.Zero(t, r.scope.reserved())
		require.Equal(t, uint64(piece*pieces), r.reads())
	})
	bubble(t, "progress", func(t *testing.T) {
		// An old stream that drips does not keep the new one from being read.
		r := newReceiver(t)
		r.hands(100, time.Hour)
		r.next.feeds("new", nil)
		for n := range 100 {
			time.Sleep(stallNotice / 4)
			synctest.Wait()
			if n < 3 {
				require.Zero(t, r.waitsAhead())
			} else {
				require.Equal(t, len("new"), r.waitsAhead())
			}
			r.old.feeds("x", nil)
			synctest.Wait()
		}
		require.NoError(t, now(t, r.awaited, "await"))
	})
	for _, want := range []string{"room", "memory"} {
		bubble(t, "no "+want, func(t *testing.T) {
			// The rest waits in the window that others need: not for long.
			const stall = 30 * time.Second
			r := newReceiver(t)
			start := time.Now()
			r.hands(5, stall)
			if want == "memory" {
				r.scope.limitTo(2 * readChunk)
			}
			r.next.feeds(strings.Repeat("n", readChunk), nil)
			time.Sleep(maxHold - 1)
			later(t, r.awaited, "await")
			r.old.feeds("x", nil) // progress counts
			synctest.Wait()
			time.Sleep(maxHold - 1)
			later(t, r.awaited, "await")
			for range maxAhead / readChunk {
				r.next.feeds(strings.Repeat("n", readChunk), nil)
			}
			require.ErrorIs(t, <-r.awaited, errStalled)
			require.Equal(t, 2*maxHold-1, time.Since(start))
			r.ends()
			require.Zero(t, r.scope.reserved())

			// A shorter stall timeout holds all the same.
			r = newReceiver(t)
			start = time.Now()
			r.hands(5, 2*time.Second)
			for range 2 * maxAhead / readChunk {
				r.next.feeds(strings.Repeat("n", readChunk), nil)
			}
			require.ErrorIs(t, <-r.awaited, errStalled)
			require.Equal(t, 2*time.Second, time.Since(start))
			r.ends()
		})
	}
	bubble(t, "blocked at the switch", func(t *testing.T) {
		r := newReceiver(t)
		r.hands(5, time.Hour)
		time.Sleep(stallNotice)
		r.next.awaitReader()
		got := r.begins(100)
		r.old.feeds("first", nil)
		require.Equal(t, readResult{"first", nil}, now(t, got, "the Read"))
		got = r.begins(100)
		require.NoError(t, r.setDeadline(time.Now().Add(time.Second)))
		time.Sleep(time.Second)
		require.Equal(t, os.ErrDeadlineExceeded, now(t, got, "the Read").err, "a Read that waits for one that reads ahead")
		require.NoError(t, r.setDeadline(time.Time{}))
		got = r.begins(100)
		r.next.feeds("new", io.EOF)
		require.Equal(t, readResult{"new", nil}, now(t, got, "the Read"))
		r.next.feeds("", io.EOF) // as a stream does
		require.Equal(t, io.EOF, now(t, r.begins(100), "the Read").err)
		require.Zero(t, r.scope.reserved())
		require.Equal(t, uint64(3), r.reads())
	})
	bubble(t, "blocked until the switch after that", func(t *testing.T) {
		r := newReceiver(t)
		r.hands(5, time.Hour)
		time.Sleep(stallNotice)
		r.next.awaitReader()
		r.old.feeds("first", nil)
		require.NoError(t, now(t, r.awaited, "await"))
		r.wants(t, "first")

		passed, last := r.next, newFake()
		r.next = last
		r.hands(0, time.Hour)
		require.NoError(t, now(t, r.awaited, "await"))
		require.NoError(t, passed.CloseRead()) // the exchange does, and calls the Read out
		synctest.Wait()
		last.feeds("last", nil)
		r.wants(t, "last")
		require.Zero(t, r.scope.reserved())
		_ = last.Reset()
	})
	bubble(t, "blocked when the next migration begins", func(t *testing.T) {
		r := newReceiver(t)
		r.hands(5, time.Hour)
		time.Sleep(stallNotice)
		r.next.awaitReader()
		r.old.feeds("first", nil)
		require.NoError(t, now(t, r.awaited, "await"))
		r.wants(t, "first")

		second, last := r.next, newFake()
		r.next = last
		r.hands(6, time.Hour)
		second.feeds("second", nil)
		require.NoError(t, now(t, r.awaited, "await"))
		require.Equal(t, len("second"), r.scope.reserved())
		r.wants(t, "second")
		require.Zero(t, r.scope.reserved(), "what the first migration has reserved is given back to it")
		_ = last.Reset()
	})
	bubble(t, "closed at the switch", func(t *testing.T) {
		r := newReceiver(t)
		r.hands(5, time.Hour)
		time.Sleep(stallNotice)
		r.next.awaitReader()
		require.NoError(t, r.closeRead())
		require.NoError(t, now(t, r.awaited, "await"))
		r.next.feeds("new", nil)
		synctest.Wait()
		require.Zero(t, r.kept(), "nobody will read this")
		require.Zero(t, r.scope.reserved())
		require.ErrorIs(t, now(t, r.begins(10), "Read").err, errReadClosed)
	})
	bubble(t, "EOF", func(t *testing.T) {
		r := newReceiver(t)
		r.hands(5, time.Hour)
		for range 100 {
			r.next.feeds("", io.EOF)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		require.NotEmpty(t, r.next.in, "the EOF is read again and again")
		r.old.feeds("first", nil)
		require.NoError(t, now(t, r.awaited, "await"))
		r.wants(t, "first")
		require.Equal(t, io.EOF, now(t, r.begins(10), "Read").err)
	})
	bubble(t, "reset", func(t *testing.T) {
		r := newReceiver(t)
		r.hands(5, time.Hour)
		require.NoError(t, r.next.Reset())
		require.ErrorIs(t, <-r.awaited, network.ErrReset) // S8
		require.ErrorIs(t, now(t, r.begins(10), "Read").err, network.ErrReset)
		r.ends()
		require.Zero(t, r.scope.reserved())
	})
	bubble(t, "no memory", func(t *testing.T) {
		r := newReceiver(t)
		r.hands(5, time.Hour)
		r.scope.limitTo(100)
		r.next.feeds("new", nil)
		time.Sleep(time.Minute)
		synctest.Wait()
		require.Zero(t, r.waitsAhead())
		r.old.feeds("first", nil)
		require.NoError(t, now(t, r.awaited, "await"))
		r.wants(t, "firstnew")
	})
}

// TestCloseReadDuringHandover ends the half's part in it at once.
func TestCloseReadDuringHandover(t *testing.T) {
	virtual(t, func(t *testing.T) {
		r := newReceiver(t)
		r.hands(100, time.Hour)
		r.old.feeds("abc", nil)
		synctest.Wait()
		require.Equal(t, 3, r.kept())
		require.NoError(t, r.closeRead())
		require.NoError(t, now(t, r.awaited, "await"))
		require.True(t, r.old.readClosed)
		require.Zero(t, r.scope.reserved())
		require.ErrorIs(t, now(t, r.begins(10), "Read").err, errReadClosed)
	})
}

// TestFailDuringHandover: a reader, the drain and the exchange all end, and the memory is
// given back.
func TestFailDuringHandover(t *testing.T) {
	virtual(t, func(t *testing.T) {
		r := newReceiver(t)
		got := r.begins(10)
		r.hands(100, time.Hour)
		r.old.feeds("abc", nil)
		require.Equal(t, "abc", now(t, got, "the Read").data)
		r.old.feeds("abc", nil)
		time.Sleep(stallNotice)
		r.next.feeds("new", nil)
		synctest.Wait()
		require.NotZero(t, r.scope.reserved())
		gone := errors.New("gone")
		r.fail(gone)
		r.fail(errors.New("later"))
		require.Equal(t, gone, now(t, r.awaited, "await"))
		require.Equal(t, gone, now(t, r.begins(10), "Read").err)
		_, _ = r.old.Reset(), r.next.Reset()
		synctest.Wait()
		require.Zero(t, r.scope.reserved())
	})
}

// TestHandoverTwice: what the application has not read of one migration is there after
// the next, and reserved as long.
func TestHandoverTwice(t *testing.T) {
	virtual(t, func(t *testing.T) {
		r := newReceiver(t)
		r.old.feeds("one", io.EOF)
		r.hands(3, time.Hour)
		require.NoError(t, now(t, r.awaited, "await"))
		require.Equal(t, 3, r.scope.reserved())

		second := &receiver{receiveHalf: r.receiveHalf, old: r.next, next: newFake(), scope: r.scope, path: new(flow)}
		second.old.feeds("two", nil)
		second.hands(3, time.Hour)
		require.NoError(t, now(t, second.awaited, "await"))
		require.Equal(t, 6, r.scope.reserved())
		second.next.feeds("three", nil).feeds("", io.EOF)
		second.wants(t, "onetwothree")
		require.Equal(t, io.EOF, now(t, second.begins(10), "Read").err)
		require.Zero(t, second.scope.reserved())
	})
}

// TestCloseReadWakes: a Read that waits for what an end that is kept back is worth returns when
// the application closes its reading.
func TestCloseReadWakes(t *testing.T) {
	virtual(t, func(t *testing.T) {
		r := newReceiver(t)
		r.hold()
		r.old.feeds("", io.EOF)
		got := r.begins(1)
		later(t, got, "the Read")
		require.NoError(t, r.closeRead())
		require.Equal(t, readResult{"", errReadClosed}, now(t, got, "the Read"))
	})
}

// TestMemoryOfADraftHandover: what a responder reads of the old stream for a draft-only peer is
// reserved on the new one. The scope of the old one ends with its connection.
func TestMemoryOfADraftHandover(t *testing.T) {
	virtual(t, func(t *testing.T) {
		h, old, next := verifyingHost(), newFake(), newFake()
		s := acceptedOn(t, h, old)
		next.conn.remote = playerLow
		next.feeds(Prelude+MigrateDraftBytes(s.Label()+2, s.Label()), nil)
		go h.handleStream(next)
		synctest.Wait()
		old.feeds("data", nil)
		synctest.Wait()
		require.Zero(t, old.scope.reserved())
		require.NotZero(t, next.scope.reserved())
		require.NoError(t, s.Reset())
		synctest.Wait()
		require.Zero(t, next.scope.reserved())
	})
}

// TestProofOnTheNextStream: what proves that the ack has arrived is not lost (S3), and nothing may
// follow an end that was given (S11).
func TestProofOnTheNextStream(t *testing.T) {
	virtual(t, func(t *testing.T) {
		r := newReceiver(t)
		r.hold()
		r.old.feeds("", io.EOF)
		got := r.begins(10)
		r.next.feeds("new", nil)
		next := &source{stream: r.next}
		require.NoError(t, r.prove(next))
		later(t, got, "the Read")
		r.handover(next, untilEOF{})
		r.reserveIn(r.scope)
		require.NoError(t, r.await(time.Hour, time.Hour, r.look))
		require.Equal(t, readResult{"new", nil}, now(t, got, "the Read"))
		require.Zero(t, r.scope.reserved())

		given := receivingFrom(newFake().feeds("", io.EOF), "")
		_, err := given.read(make([]byte, 1))
		require.Equal(t, io.EOF, err)
		proves := func(u *fakeStream) error { return given.prove(&source{stream: u}) }
		require.NoError(t, proves(newFake().feeds("", io.EOF)))
		require.ErrorIs(t, proves(newFake().feeds("x", nil)), errViolation)
		require.ErrorIs(t, proves(newFake().feeds("", network.ErrReset)), network.ErrReset)
	})
}

// TestFalseProof: a muxer that goes down may report an EOF that is none. It does not
// prove that the ack has arrived (S3, S12): the initiator may have fallen back, and would
// take our end of the old stream for the application's.
func TestFalseProof(t *testing.T) {
	dead := func(data string, err error) *source {
		f := newFake().feeds(data, err)
		f.conn.dies()
		return &source{stream: f}
	}
	h := receivingFrom(newFake(), "")
	require.ErrorIs(t, h.prove(dead("", io.EOF)), errUnproven)
	require.NoError(t, h.prove(dead("x", io.EOF)), "data were sent after the ack, whatever became of the connection")
}
