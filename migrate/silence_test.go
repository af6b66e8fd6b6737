package migrate

import (
	"context"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/rawpeer"
)

// silentExchange is a stream whose other end has yet to answer: to Migrate, or to the ack.
type silentExchange struct {
	h         *Host
	s         *Stream
	old, next *fakeStream
	over      chan error // what the exchange has come to
	failed    *Event
}

func newSilentExchange(t *testing.T, initiator bool) *silentExchange {
	x := &silentExchange{old: newFake(), next: newFake(), over: make(chan error, 1)}
	x.h = verifyingHost(WithTracer(func(e Event) {
		if e.Kind == Failed {
			x.failed = &e
		}
	}))
	x.s = acceptedOn(t, x.h, x.old)
	x.next.conn.remote = playerLow
	if initiator {
		x.next.conn.open = func(context.Context) (network.Stream, error) { return x.next, nil }
		go func() { x.over <- x.h.Migrate(context.Background(), x.s, x.next.conn) }()
	} else {
		label := x.s.Label()
		x.next.feeds(Prelude+MigrateBytes(label+2, label), nil)
		go func() {
			x.h.handleStream(x.next)
			x.over <- nil
		}()
	}
	synctest.Wait()
	t.Cleanup(func() {
		_ = x.s.Reset()
		synctest.Wait()
		x.h.cancel()
		require.Empty(t, x.h.flows.of, "nobody looks at a path any more")
	})
	return x
}

// reading begins a Read of the application.
func (x *silentExchange) reading() chan readResult {
	got := make(chan readResult, 1)
	go func() {
		b := make([]byte, 10)
		n, err := x.s.Read(b)
		got <- readResult{string(b[:n]), err}
	}()
	synctest.Wait()
	return got
}

// TestReadInsideADeadPath: a Read that is inside the old stream goes on with the new one at once,
// although letting go of the old one takes long.
func TestReadInsideADeadPath(t *testing.T) {
	for role, initiator := range map[string]bool{"initiator": true, "responder": false} {
		bubble(t, role, func(t *testing.T) {
			x := newSilentExchange(t, initiator)
			x.old.dead = make(chan struct{})
			got := x.reading()
			if initiator {
				x.next.feeds(Prelude+AckVerified, nil)
			}
			x.next.feeds(FinalSizeBytes(0)+"new", nil)
			require.Equal(t, readResult{"new", nil}, now(t, got, "the Read"))
			later(t, x.over, "the exchange")
			close(x.old.dead)
			require.NoError(t, now(t, x.over, "the exchange"))
			require.True(t, x.old.isClosed)
		})
	}
}

// TestBothPathsDead: an exchange that waits for the other end, over a new path that is dead
// as well as the old one. Nothing can be undone (S10), but both streams can be reset, so
// that the application hears of it within 5 s, as it does without a migration.
func TestBothPathsDead(t *testing.T) {
	const bound = maxSilence + silenceLook
	roles := map[string]bool{"initiator": true, "responder": false}
	for role, initiator := range roles {
		each := func(name string, test func(t *testing.T, x *silentExchange)) {
			bubble(t, role+", "+name, func(t *testing.T) { test(t, newSilentExchange(t, initiator)) })
		}
		// told checks that the application hears of it in time, and both streams are reset.
		told := func(t *testing.T, x *silentExchange, since time.Time) {
			t.Helper()
			time.Sleep(time.Until(since.Add(bound)))
			synctest.Wait()
			err := now(t, x.over, "the exchange")
			if initiator {
				require.ErrorIs(t, err, errSilent)
				require.NotErrorIs(t, err, ErrTryLater)
			}
			require.NotNil(t, x.failed)
			require.ErrorIs(t, x.failed.Err, errSilent)
			require.ErrorIs(t, x.failed.Err, network.ErrReset, "what became of the stream")
			require.NotNil(t, x.old.resetWith)
			require.NotNil(t, x.next.resetWith)
		}
		each("a Read fails", func(t *testing.T, x *silentExchange) {
			got := x.reading()
			time.Sleep(time.Hour) // S10: as long as the old stream is there
			later(t, x.over, "the exchange")
			x.old.ends(network.ErrReset)
			since := time.Now()
			time.Sleep(maxSilence - time.Nanosecond)
			later(t, got, "the Read")
			told(t, x, since)
			require.ErrorIs(t, now(t, got, "the Read").err, errSilent)
			_, err := x.s.Write([]byte{1})
			require.ErrorIs(t, err, network.ErrReset)
		})
		each("a Write fails", func(t *testing.T, x *silentExchange) {
			x.old.grants(1, network.ErrReset)
			since := time.Now()
			wrote := make(chan writeResult, 1)
			go func() {
				n, err := x.s.Write([]byte("ab"))
				wrote <- writeResult{n, err}
			}()
			told(t, x, since)
			w := now(t, wrote, "the Write")
			require.Equal(t, 1, w.n)
			require.ErrorIs(t, w.err, errSilent)
		})
		each("the connection is closed", func(t *testing.T, x *silentExchange) {
			x.old.conn.dies()
			told(t, x, time.Now())
		})
		each("the new path has brought something just before it died", func(t *testing.T, x *silentExchange) {
			if initiator {
				x.next.feeds(MultistreamToken[:5], nil)
			} else {
				x.next.feeds(FinalSizeBytes(1)[:1], nil)
			}
			time.Sleep(silenceLook / 2)
			x.old.conn.dies()
			told(t, x, time.Now())
		})
		each("an end is no failure", func(t *testing.T, x *silentExchange) {
			got := x.reading()
			x.old.ends(io.EOF)
			time.Sleep(silenceLook - time.Nanosecond)
			later(t, got, "the Read")
			time.Sleep(time.Hour)
			if initiator {
				require.ErrorIs(t, now(t, got, "the Read").err, io.EOF, "the responder has not ended it because of the migration")
			} else {
				later(t, got, "the Read")
			}
			later(t, x.over, "the exchange")
			if initiator { // the answer comes after all
				x.next.feeds(Prelude+AckVerified+FinalSizeBytes(0), io.EOF)
				require.NoError(t, now(t, x.over, "the exchange"))
				require.Equal(t, readResult{"", io.EOF}, now(t, x.reading(), "the next Read"))
			}
		})
		each("an end, and the connection is gone", func(t *testing.T, x *silentExchange) {
			got := x.reading()
			x.old.ends(io.EOF)
			time.Sleep(silenceLook / 2)
			x.old.conn.dies()
			told(t, x, time.Now())
			require.ErrorIs(t, now(t, got, "the Read").err, errSilent, "that end was none")
		})
		each("the other end reads no more", func(t *testing.T, x *silentExchange) {
			x.old.grants(1, &network.StreamError{Remote: true}) // S13
			wrote := make(chan struct{})
			go func() {
				_, _ = x.s.Write([]byte("ab"))
				close(wrote)
			}()
			time.Sleep(time.Hour)
			later(t, wrote, "the Write")
			later(t, x.over, "the exchange")
		})
		each("the new stream brings something", func(t *testing.T, x *silentExchange) {
			x.old.ends(network.ErrReset)
			got := x.reading()
			answer := Prelude + AckVerified + FinalSizeBytes(0)
			if !initiator {
				answer = FinalSizeBytes(0)
			}
			for _, b := range []byte(answer) {
				time.Sleep(maxSilence - time.Nanosecond)
				later(t, x.over, "the exchange")
				x.next.feeds(string([]byte{b}), nil)
			}
			x.next.feeds("new", nil)
			require.Equal(t, readResult{"new", nil}, now(t, got, "the Read"))
			require.NoError(t, now(t, x.over, "the exchange"))
			require.Nil(t, x.failed)
		})
		each("others move on the new path", func(t *testing.T, x *silentExchange) {
			// A slow path is none that is dead.
			other := newFake()
			other.conn = x.next.conn
			s := newStream(x.h, other, echoID, 6002)
			require.NoError(t, x.h.enter(s))
			x.old.ends(network.ErrReset)
			got := x.reading()
			moving := time.Now()
			for range 20 {
				time.Sleep(maxSilence / 2)
				moving = time.Now()
				other.feeds("x", nil)
				readN(t, s, 1)
			}
			later(t, got, "the Read")
			told(t, x, moving.Add(silenceLook))
			require.NoError(t, s.Reset())
		})
	}
}

// TestFailedEvent tells what became of the stream, as Migrate does.
func TestFailedEvent(t *testing.T) {
	bubble(t, "before the ack", func(t *testing.T) {
		x := newSilentExchange(t, true)
		require.NoError(t, x.next.Reset())
		err := now(t, x.over, "Migrate")
		require.ErrorIs(t, err, ErrTryLater)
		require.NotNil(t, x.failed)
		require.ErrorIs(t, x.failed.Err, ErrTryLater)
		require.ErrorIs(t, x.failed.Err, network.ErrReset, "why")
	})
	bubble(t, "the application has reset it", func(t *testing.T) {
		x := newSilentExchange(t, true)
		require.NoError(t, x.s.Reset())
		require.ErrorIs(t, now(t, x.over, "Migrate"), ErrClosed)
		require.NotNil(t, x.failed)
		require.ErrorIs(t, x.failed.Err, ErrClosed)
	})
	bubble(t, "after the ack", func(t *testing.T) {
		x := newSilentExchange(t, false)
		require.NoError(t, x.next.Reset())
		require.NoError(t, now(t, x.over, "the exchange"))
		require.NotNil(t, x.failed)
		require.ErrorIs(t, x.failed.Err, network.ErrReset)
		require.NotErrorIs(t, x.failed.Err, ErrTryLater)
	})
}
