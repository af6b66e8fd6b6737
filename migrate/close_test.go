package migrate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
	. "github.com/go-portage/portage/internal/rawpeer"
)

// TestClose: S7. Either end closes the stream for good, at any moment of a migration by
// either end. All that it wrote arrives, then EOF, however late it is read; and nothing
// is left of the stream once the other end has closed, too.
func TestClose(t *testing.T) {
	eachPath(t, usualPaths, func(t *testing.T, j *journey) {
		for _, mover := range ends {
			for _, closer := range ends {
				for _, m := range everyMoment {
					name := fmt.Sprintf("%s migrates, %s closes, %s", endName(mover), endName(closer), m)
					t.Run(name, func(t *testing.T) { closeFor(t, j, mover, closer, m) })
				}
			}
		}
	})
}

func closeFor(t *testing.T, j *journey, mover, closer int, m moment) {
	s := j.start(t)
	gone, other := s[closer], s[1-closer]
	said := content(1, 40_000)
	write(t, gone, said[:30_000])
	write(t, other, content(2, 10_000)) // lost, as without a migration
	err := j.duringMove(t, mover, s, m, func() {
		if _, err := gone.Write(said[30_000:]); err != nil {
			t.Errorf("Write: %v", err)
		}
		if err := gone.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		if n, err := gone.Read(make([]byte, 10)); n != 0 || err == nil {
			t.Errorf("a Read behind Close returns %d bytes, %v", n, err)
		}
		if n, err := gone.Write([]byte{1}); n != 0 || err == nil {
			t.Errorf("a Write behind Close takes %d bytes, %v", n, err)
		}
		if err := gone.Close(); err != nil {
			t.Errorf("Close again: %v", err)
		}
	})
	switch {
	case m.kind == beforehand && mover == closer:
		require.ErrorIs(t, err, ErrClosed)
	case m.kind == beforehand || m.kind == Started && closer != mover:
		// The responder no longer has the stream, or is about to close it.
		if err != nil {
			require.ErrorIs(t, err, ErrDenied)
		}
	default:
		require.NoError(t, err, "Close does not abort a migration")
	}
	n, err := gone.Read(make([]byte, 10))
	require.Zero(t, n)
	require.Error(t, err)
	_, err = gone.Write([]byte{1})
	require.Error(t, err)
	wantEnd(t, other, said)
	j.closed(t, s)
}

// TestCloseAtBothEnds: S7. Both ends close in the middle of a migration, at once: what
// each wrote is lost, as without one, and nothing is left.
func TestCloseAtBothEnds(t *testing.T) {
	eachPath(t, usualPaths, func(t *testing.T, j *journey) {
		for _, mover := range ends {
			for _, m := range everyMoment {
				t.Run(fmt.Sprintf("%s migrates, %s", endName(mover), m), func(t *testing.T) {
					s := j.start(t)
					for _, st := range s {
						write(t, st, content(1, 10_000))
					}
					_ = j.duringMove(t, mover, s, m, func() {
						_ = s[0].Close()
						_ = s[1].Close()
					})
					j.nothingLeft(t)
				})
			}
		}
	})
}

// TestCloseWhileTheNewStreamOpens: S7. A connection that has no room for the new stream does not
// hold up what Close has to send on the old one.
func TestCloseWhileTheNewStreamOpens(t *testing.T) {
	virtual(t, func(t *testing.T) {
		h, old, other := verifyingHost(), newFake(), &fakeConn{remote: playerLow}
		s := acceptedOn(t, h, old)
		other.open = func(ctx context.Context) (network.Stream, error) { <-ctx.Done(); return nil, ctx.Err() }
		moved := make(chan error, 1)
		go func() { moved <- h.Migrate(context.Background(), s, other) }()
		synctest.Wait()
		require.NoError(t, s.Close())
		synctest.Wait()
		require.Len(t, moved, 1, "and nothing of the second that it may have to open")
		require.ErrorIs(t, <-moved, ErrTryLater)
		require.True(t, old.isClosed)
	})
}

// TestCloseBeforeTheOpeningIsSent: S7, W1. Close comes while a migration waits for the
// opening to be sent, on a connection that has no room for it. No Write is taken any more;
// and the acceptor learns of the stream, and that it is over, once there is room.
func TestCloseBeforeTheOpeningIsSent(t *testing.T) {
	virtual(t, func(t *testing.T) {
		h, old, other := verifyingHost(), newFake(), new(fakeConn)
		old.conn.remote, other.remote = playerLow, playerLow
		old.grants(0, nil)
		s, err := h.open(context.Background(), old, echoID, []protocol.ID{echoID})
		require.NoError(t, err)
		label := s.Label()
		other.open = func(ctx context.Context) (network.Stream, error) { <-ctx.Done(); return nil, ctx.Err() }
		moved := make(chan error, 1)
		go func() { moved <- h.Migrate(context.Background(), s, other) }()
		synctest.Wait()
		require.NoError(t, s.Close())
		for range 2 {
			n, err := s.Write([]byte("late"))
			require.ErrorIs(t, err, errWriteClosed)
			require.Zero(t, n)
			n, err = s.Read(make([]byte, 1))
			require.ErrorIs(t, err, errReadClosed)
			require.Zero(t, n)
			synctest.Wait()
			old.grants(-1, nil) // and again, with the opening sent
			synctest.Wait()
		}
		require.Equal(t, Prelude+LabelBytes(label)+MultistreamToken+EchoToken, old.taken())
		require.ErrorIs(t, <-moved, ErrTryLater)
		require.True(t, old.writeClosed)
		require.Empty(t, h.labels.peers, "nothing may be left (L5)")
	})
}

// TestReset: S8, S7. Either end resets the stream, at any moment of a migration by either
// end. Both ends' Reads and Writes fail with network.ErrReset, those that wait and those
// that come later; no end is ever given a clean EOF; the code reaches the other end; and
// nothing is left, at the end that did nothing once it has closed.
func TestReset(t *testing.T) {
	eachPath(t, usualPaths, func(t *testing.T, j *journey) {
		for _, mover := range ends {
			for _, resetter := range ends {
				for _, m := range everyMoment {
					name := fmt.Sprintf("%s migrates, %s resets, %s", endName(mover), endName(resetter), m)
					t.Run(name, func(t *testing.T) { resetFor(t, j, mover, resetter, m) })
				}
			}
		}
	})
}

func resetFor(t *testing.T, j *journey, mover, resetter int, m moment) {
	const code network.StreamErrorCode = 0x77
	s := j.start(t)
	for side, st := range s {
		write(t, st, content(uint64(side), 10_000))
	}
	// At both ends a Read waits, behind all that was sent.
	var waiting [2]chan error
	for side, st := range s {
		require.Equal(t, content(uint64(1-side), 10_000), readN(t, st, 10_000))
		waiting[side] = make(chan error, 1)
		go func() {
			_, err := st.Read(make([]byte, 1))
			waiting[side] <- err
		}()
	}
	_ = j.duringMove(t, mover, s, m, func() {
		if err := s[resetter].ResetWithError(code); err != nil {
			t.Errorf("ResetWithError: %v", err)
		}
	})
	for side, st := range s {
		var err error
		within(t, fmt.Sprintf("the %s's Read to be called out", endName(side)), func() { err = <-waiting[side] })
		require.ErrorIs(t, err, network.ErrReset, "the %s's Read that waited", endName(side))
		wantReset(t, st, "the "+endName(side))
	}
	_, err := s[1-resetter].Read(make([]byte, 1))
	var se *network.StreamError
	require.True(t, errors.As(err, &se), "%v has no code", err)
	require.Equal(t, code, se.ErrorCode, "the code of the reset")
	_ = s[1-resetter].Close()
	j.nothingLeft(t)
}

// TestCodeOfAReset: S7. The application's Reset calls out the exchange, which waits on the
// new stream for the peer. It may be the first to reset that, and does so with the
// application's code: for all the initiator knows the peer has acked, and takes the reset
// for the end of the stream.
func TestCodeOfAReset(t *testing.T) {
	const code network.StreamErrorCode = 0x77
	answer := Prelude
	for name, fed := range map[string]string{
		"while the initiator waits for the answer":         "",
		"while the initiator waits for the ack":            answer,
		"while the initiator waits for the final size":     answer + AckVerified,
		"while the initiator waits for the old stream":     answer + AckVerified + FinalSizeBytes(10),
		"while the initiator waits for part of the answer": answer[:len(answer)-1],
	} {
		bubble(t, name, func(t *testing.T) {
			h, old, next := verifyingHost(), newFake(), newFake()
			s := acceptedOn(t, h, old)
			next.conn.remote = playerLow
			next.feeds(fed, nil)
			next.conn.open = func(context.Context) (network.Stream, error) { return slowToReset{next}, nil }
			moved := make(chan error, 1)
			go func() { moved <- h.Migrate(context.Background(), s, next.conn) }()
			synctest.Wait()
			require.NotEmpty(t, next.taken(), "the exchange must be under way")
			require.NoError(t, s.ResetWithError(code))
			require.Error(t, <-moved)
			synctest.Wait()
			for what, u := range map[string]*fakeStream{"old": old, "new": next} {
				require.NotNil(t, u.resetWith, "the %s stream must be reset", what)
				require.Equal(t, code, *u.resetWith, "the code of the %s stream's reset", what)
			}
			require.Empty(t, h.labels.peers, "nothing may be left (L5)")
		})
	}
}

// TestErrorComesBehindTheReset: S8. A handover fails, and an application that closes as soon
// as it is told must not be faster than the reset: its EOF would look to the other end as
// if all was well.
func TestErrorComesBehindTheReset(t *testing.T) {
	const answer = Prelude
	for name, goesWrong := range map[string]func(old, next *fakeStream){
		"the old stream fails": func(old, next *fakeStream) {
			next.feeds(FinalSizeBytes(10), nil)
			synctest.Wait()
			old.ends(errors.New("gone"))
		},
		"the old stream ends too early": func(old, next *fakeStream) {
			next.feeds(FinalSizeBytes(10), nil)
			old.feeds("some", io.EOF)
		},
		"the old stream brings too much": func(old, next *fakeStream) {
			next.feeds(FinalSizeBytes(10), nil)
			synctest.Wait()
			old.feeds("all of it, and more", nil)
		},
		"the old stream has brought too much": func(old, next *fakeStream) {
			old.feeds("all of it, and more", nil)
			synctest.Wait()
			next.feeds(FinalSizeBytes(10), nil)
		},
		"the old stream stalls": func(_, next *fakeStream) { next.feeds(FinalSizeBytes(10), nil) },
		"the new stream fails": func(_, next *fakeStream) {
			next.feeds(FinalSizeBytes(10), nil)
			synctest.Wait()
			next.ends(errors.New("gone"))
		},
	} {
		for how, ends := range map[string]func(s *Stream) error{
			"Close": (*Stream).Close, "CloseWrite": (*Stream).CloseWrite,
		} {
			bubble(t, name+", "+how, func(t *testing.T) {
				slowly := WithTracer(func(e Event) {
					if e.Kind == Failed {
						time.Sleep(time.Minute) // of the bubble: the application gets its chance
					}
				})
				h, old, next := verifyingHost(slowly), newFake(), newFake()
				s := acceptedOn(t, h, old)
				next.conn.remote = playerLow
				next.conn.open = func(context.Context) (network.Stream, error) { return next, nil }
				next.feeds(answer+AckVerified, nil)
				moved, read := make(chan error, 1), make(chan error, 1)
				go func() { moved <- h.Migrate(context.Background(), s, next.conn) }()
				go func() {
					err := os.ErrDeadlineExceeded
					for errors.Is(err, os.ErrDeadlineExceeded) { // not inside the old stream all the time
						_ = s.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
						_, err = io.Copy(io.Discard, s)
					}
					_ = ends(s)
					read <- err
				}()
				synctest.Wait()
				goesWrong(old, next)
				require.ErrorIs(t, <-moved, network.ErrReset)
				require.ErrorIs(t, <-read, network.ErrReset)
				synctest.Wait()
				require.NotNil(t, next.resetWith)
				require.False(t, next.writeClosed, "the other end is given an EOF")
				require.Empty(t, h.labels.peers, "nothing may be left (L5)")
			})
		}
	}
}

// slowToReset is a stream on which whoever a deadline calls out is faster than a reset that
// follows upon it.
type slowToReset struct{ *fakeStream }

func (s slowToReset) SetDeadline(t time.Time) error {
	err := s.fakeStream.SetDeadline(t)
	time.Sleep(time.Millisecond) // of the bubble: until all the others wait
	return err
}

// TestResetUntyped: as TestReset, where the transports' errors are
// not typed, at the moments that differ most.
func TestResetUntyped(t *testing.T) {
	eachPath(t, []path{tcpWebT, webTTCP, quicWebRTC, webRTCQUIC}, func(t *testing.T, j *journey) {
		for _, mover := range ends {
			for _, resetter := range ends {
				for _, m := range everyMoment {
					name := fmt.Sprintf("%s migrates, %s resets, %s", endName(mover), endName(resetter), m)
					t.Run(name, func(t *testing.T) {
						s := j.start(t)
						_ = j.duringMove(t, mover, s, m, func() { _ = s[resetter].Reset() })
						for side, st := range s {
							_, err := readAll(t, st)
							require.Error(t, err, "the %s must not be given a clean EOF", endName(side))
							within(t, "Write to fail", func() {
								for err = nil; err == nil; {
									_, err = st.Write([]byte{1})
								}
							})
						}
						_ = s[1-resetter].Close()
						j.nothingLeft(t)
					})
				}
			}
		}
	})
}

// TestResetWakesWriter: a Write that is blocked, on the old stream or on its way to the
// new one, is called out by a reset at either end.
func TestResetWakesWriter(t *testing.T) {
	more := content(1, 32<<20) // than any window
	eachPath(t, mainPaths, func(t *testing.T, j *journey) {
		for _, writer := range ends {
			for _, resetter := range ends {
				for _, m := range everyMoment {
					t.Run(fmt.Sprintf("%s writes, %s resets, %s", endName(writer), endName(resetter), m), func(t *testing.T) {
						s := j.start(t)
						done := j.blocked(t, s[writer], more)
						_ = j.duringMove(t, opener, s, m, func() { _ = s[resetter].Reset() })
						w := result(t, done)
						require.ErrorIs(t, w.err, network.ErrReset, "Write returned %s", w)
						_ = s[1-resetter].Close()
						j.nothingLeft(t)
					})
				}
			}
		}
	})
}

// TestResetAfterCloseWrite: an end that has sent its EOF resets in the middle of a
// migration. The other end gets all of the data and then EOF, or an error: never an EOF
// behind fewer bytes (S8).
func TestResetAfterCloseWrite(t *testing.T) {
	eachPath(t, usualPaths, func(t *testing.T, j *journey) {
		for _, mover := range ends {
			for _, resetter := range ends {
				for _, m := range everyMoment {
					t.Run(fmt.Sprintf("%s migrates, %s resets, %s", endName(mover), endName(resetter), m), func(t *testing.T) {
						s := j.start(t)
						said := content(1, 100_000)
						write(t, s[resetter], said)
						require.NoError(t, s[resetter].CloseWrite())
						_ = j.duringMove(t, mover, s, m, func() { _ = s[resetter].Reset() })
						got, err := readAll(t, s[1-resetter])
						if err == nil {
							require.True(t, bytes.Equal(said, got), "EOF after %d of %d bytes", len(got), len(said))
						} else {
							require.ErrorIs(t, err, network.ErrReset)
							require.True(t, bytes.HasPrefix(said, got))
						}
						_ = s[1-resetter].Close()
						j.nothingLeft(t)
					})
				}
			}
		}
	})
}

// TestResetWhileMigrateIsCalled: Reset, Close and Migrate race from all sides, at no
// chosen moment. Whatever wins, all return and nothing is left.
func TestEndRacesMigrate(t *testing.T) {
	rounds := 150
	if testing.Short() {
		rounds = 30
	}
	eachPath(t, mainPaths, func(t *testing.T, j *journey) {
		for n := range rounds {
			s := j.start(t)
			write(t, s[n%2], content(1, 5000))
			wait := [2]func() error{j.moving(t, opener, s), func() error { return nil }}
			if n%3 == 0 {
				wait[1] = j.moving(t, acceptor, s)
			}
			switch end := s[n/2%2]; n % 5 {
			case 0, 1:
				_ = end.Reset()
			case 2:
				_ = end.Close()
			case 3:
				_ = s[0].Close()
				_ = s[1].Reset()
			case 4:
				_ = end.CloseWrite()
				_ = end.CloseRead()
				_ = end.Close()
			}
			_ = wait[0]()
			_ = wait[1]()
			for _, st := range s {
				_ = st.Close()
			}
		}
		j.nothingLeft(t)
	})
}

// TestCloseDelivers: S7. A writer that closes right after its last Write, and a reader
// that is slow, with a migration under way: all of it arrives, every time.
func TestCloseDelivers(t *testing.T) {
	rounds := 40
	if testing.Short() {
		rounds = 8
	}
	eachPath(t, usualPaths, func(t *testing.T, j *journey) {
		for n := range rounds {
			s := j.start(t)
			writer, reader := s[n%2], s[1-n%2]
			said := content(uint64(n), 300_000)
			wait := j.moving(t, n/2%2, s)
			go func() {
				if _, err := writer.Write(said); err != nil {
					t.Errorf("Write: %v", err)
				}
				if err := writer.Close(); err != nil {
					t.Errorf("Close: %v", err)
				}
			}()
			got, err := readAll(t, io.LimitReader(reader, 1000))
			require.NoError(t, err)
			_ = wait()
			rest, err := readAll(t, reader)
			require.NoError(t, err, "round %d", n)
			require.True(t, bytes.Equal(said, append(got, rest...)), "round %d: %d of %d bytes", n, len(got)+len(rest), len(said))
			_ = reader.Close()
		}
		j.nothingLeft(t)
	})
}

var _ = TCP
