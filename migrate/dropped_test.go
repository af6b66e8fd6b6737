package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
	. "github.com/go-portage/portage/internal/rawpeer"
)

// wedged is a stream whose reset does not leave, as on a path of yamux that takes nothing.
type wedged struct{ *fakeStream }

func (u wedged) Reset() error { return u.ResetWithError(0) }
func (u wedged) ResetWithError(code network.StreamErrorCode) error {
	err := u.fakeStream.ResetWithError(code)
	time.Sleep(10 * time.Second)
	return err
}

// TestResumedBesideAPathThatTakesNothing: R13. A migration that was dropped keeps nobody from resuming the
// stream though its own path takes not even a reset.
func TestResumedBesideAPathThatTakesNothing(t *testing.T) {
	virtual(t, func(t *testing.T) {
		old, next, third := newFake(), newFake(), newFake()
		s, r := resumableOn(t, old)
		next.conn = &fakeConn{remote: playerLow, open: func(context.Context) (network.Stream, error) { return wedged{next}, nil }}
		go func() { _ = s.host.Migrate(context.Background(), s, next.conn) }()
		synctest.Wait()
		r.lose(old, errors.New("test"))
		third.conn.remote = playerLow
		third.feeds(Prelude+resumeBytes(s.Label()+2, s.Label(), r.origin, 2, 0), nil)
		go s.host.handleStream(third)
		time.Sleep(time.Second)
		synctest.Wait()
		require.Equal(t, Prelude+ackReceivedBytes(0), third.taken())
		attached := r.attached()
		time.Sleep(time.Minute)
		require.True(t, attached, "it was acked a second ago")
	})
}

// TestMigrateOfAStreamThatIsLost: R13.
func TestMigrateOfAStreamThatIsLost(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := resumableOn(t, newFake())
		r.loses()
		next := newFake()
		next.conn.remote = playerLow
		next.feeds(Prelude+MigrateBytes(s.Label()+2, s.Label()), nil)
		s.host.handleStream(next)
		synctest.Wait()
		require.NotNil(t, next.resetWith)
		require.Equal(t, codeGivenUp, *next.resetWith)
	})
}

// TestBytesThatComeAsTheHandoverBreaks: R2, R13. What is counted as received reaches the application,
// also where it comes together with the error by which the handover breaks, as on yamux, or behind
// that. Else the other end, which is told of it, would not send it again.
func TestBytesThatComeAsTheHandoverBreaks(t *testing.T) {
	gone := &network.ConnError{ErrorCode: network.ConnSupplanted}
	begin := func(t *testing.T, reads bool) (s *Stream, r *resumption, old *fakeStream, got chan string) {
		old = newFake()
		s, r = resumableOn(t, old)
		got = make(chan string, 1)
		if reads {
			go func() {
				b := make([]byte, 10)
				n, _ := s.Read(b)
				got <- string(b[:n])
			}()
			synctest.Wait()
		}
		s.recv.hold()
		require.False(t, s.recv.handover(&source{stream: newFake()}, finalSize(10)))
		return s, r, old, got
	}
	// resumed checks that what the other end is told, and what the application gets, is the same.
	resumed := func(t *testing.T, s *Stream, r *resumption, got chan string) {
		r.loses() // as survives does
		s.recv.mu.Lock()
		received := s.recv.received()
		s.recv.mu.Unlock()
		require.NoError(t, s.SetReadDeadline(time.Now().Add(time.Second)))
		b := make([]byte, 10)
		n, _ := s.Read(b)
		all := string(b[:n])
		time.Sleep(time.Minute)
		synctest.Wait()
		if len(got) > 0 {
			all = <-got + all
		}
		require.Equal(t, "abc"[:received], all)
	}
	bubble(t, "with the error, a Read is inside", func(t *testing.T) {
		s, r, old, got := begin(t, true)
		old.feeds("abc", gone)
		synctest.Wait()
		resumed(t, s, r, got)
	})
	bubble(t, "behind the error, a Read is inside", func(t *testing.T) {
		s, r, old, got := begin(t, true)
		s.recv.mu.Lock()
		s.recv.lose(errors.New("the next one has failed"))
		s.recv.mu.Unlock()
		old.feeds("abc", nil)
		synctest.Wait()
		resumed(t, s, r, got)
	})
	bubble(t, "behind the error, a pump is inside", func(t *testing.T) {
		s, r, old, got := begin(t, false)
		go func() { _ = s.recv.await(time.Hour, time.Hour, time.Now) }()
		synctest.Wait()
		s.recv.mu.Lock()
		s.recv.lose(errors.New("the next one has failed"))
		s.recv.mu.Unlock()
		old.feeds("abc", nil)
		synctest.Wait()
		resumed(t, s, r, got)
	})
}

// TestHandoverThatBreaksGivesBackItsMemory: M4. What was read ahead of the next stream, and is thrown away
// when the handover breaks, is reserved no longer, also where the stream goes on.
func TestHandoverThatBreaksGivesBackItsMemory(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := resumableOn(t, newFake())
		next, scope := newFake(), new(fakeScope)
		s.recv.hold()
		require.False(t, s.recv.handover(&source{stream: next}, finalSize(10)))
		s.recv.reserveIn(scope)
		go func() { _ = s.recv.await(time.Hour, time.Hour, time.Now) }()
		next.feeds("read ahead", nil)
		time.Sleep(stallNotice)
		synctest.Wait()
		s.recv.mu.Lock()
		s.recv.lose(errors.New("test"))
		s.recv.mu.Unlock()
		r.loses()
		_ = next.Reset() // as for a stream of an exchange
		synctest.Wait()
		require.Zero(t, scope.reserved())
		s.recv.mu.Lock()
		defer s.recv.mu.Unlock()
		require.True(t, s.recv.budget.empty(), "the next handover reserves in a scope of its own")
	})
}

// TestRelayThatIsLeft: R1. Who closes its connection to a relay has not closed those that the relay carries
// for good: nobody has said that their streams are not wanted any more.
func TestRelayThatIsLeft(t *testing.T) {
	for _, side := range []int{0, 1} {
		t.Run(fmt.Sprint("by host ", side), func(t *testing.T) {
			p := newPair(t, Relay, QUIC, WithResumption())
			a, b := p.open(t, testID, 0)
			relay := slices.DeleteFunc(p.nodes[side].Network().Peers(), func(id peer.ID) bool { return id == p.nodes[1-side].ID() })
			require.Len(t, relay, 1)
			require.NoError(t, p.nodes[side].Network().ClosePeer(relay[0]))
			for _, from := range []*Stream{a, b} {
				to := map[*Stream]*Stream{a: b, b: a}[from]
				_, err := from.Write([]byte("abc"))
				require.NoError(t, err)
				got := make([]byte, 3)
				_, err = io.ReadFull(to, got)
				require.NoError(t, err)
				require.Equal(t, "abc", string(got))
			}
			require.Equal(t, p.conns[0][1], a.Conn())
		})
	}
}

// TestAttemptThatNobodyNeeds: R8. An attempt that is open when its stream needs no other any more is
// given up, and its stream freed.
func TestAttemptThatNobodyNeeds(t *testing.T) {
	for name, over := range map[string]func(s *Stream, r *resumption){
		"closed, and all confirmed": func(s *Stream, r *resumption) { r.confirmed(everything); _ = s.Close() },
		"confirmed, and closed":     func(s *Stream, r *resumption) { _ = s.Close(); r.confirmed(everything) },
		"reset":                     func(s *Stream, _ *resumption) { _ = s.Reset() },
		"failed":                    func(_ *Stream, r *resumption) { r.fail(errGone) },
		"too late":                  func(_ *Stream, r *resumption) { r.leave(errTooLate) },
	} {
		bubble(t, name, func(t *testing.T) {
			s, r := resumableOn(t, newFake())
			u := r.asking(t)
			require.Nil(t, u.resetWith)
			over(s, r)
			synctest.Wait()
			require.NotNil(t, u.resetWith)
			require.False(t, r.lives())
		})
	}
}
