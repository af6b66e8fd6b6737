package migrate

import (
	"bufio"
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protodelim"

	. "github.com/go-portage/portage/internal/rawpeer"
	"github.com/go-portage/portage/pb"
)

// What a host asks, when, and what it makes of the answers, over fake streams, in virtual time.

// attempts are what a host makes on a connection to resume a stream. The first ones have
// an answer, in order; the others have none.
type attempts struct {
	*fakeConn
	of      *resumption
	begun   time.Time
	answers []string

	mu   sync.Mutex // guards what follows
	list []*fakeStream
	at   []time.Duration
}

// lostOn has the stream lost, and another connection there.
func lostOn(s *Stream, answers ...string) *attempts {
	a := attemptsOn(&fakeConn{remote: playerLow}, s.send.resumption, answers...)
	s.host.Host.(*bare).conns = []network.Conn{a.fakeConn}
	a.of.lose(nil, errors.New("test"))
	return a
}

// attemptsOn are those for the stream of r on c from here on.
func attemptsOn(c *fakeConn, r *resumption, answers ...string) *attempts {
	a := &attempts{fakeConn: c, of: r, begun: time.Now(), answers: answers}
	a.opening(func(context.Context) (network.Stream, error) { return a.opens(), nil })
	return a
}

// opening sets how streams are opened.
func (a *attempts) opening(open func(context.Context) (network.Stream, error)) {
	a.fakeConn.mu.Lock()
	defer a.fakeConn.mu.Unlock()
	a.open = open
}

func (a *attempts) opens() *fakeStream {
	u := newFake()
	u.conn = a.fakeConn
	a.mu.Lock()
	defer a.mu.Unlock()
	if n := len(a.list); n < len(a.answers) {
		u.feeds(a.answers[n], nil).ends(network.ErrReset)
	}
	a.list, a.at = append(a.list, u), append(a.at, time.Since(a.begun))
	return u
}

// all are those that were made, once nothing else happens, and when.
func (a *attempts) all() ([]*fakeStream, []time.Duration) {
	synctest.Wait()
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.list), slices.Clone(a.at)
}

func (a *attempts) streams() []*fakeStream {
	all, _ := a.all()
	return all
}

// resetCode is what the stream was reset with, or nil.
func (f *fakeStream) resetCode() *network.StreamErrorCode {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.resetWith
}

// made waits until so many have been made, and returns the last, and what was asked there.
func (a *attempts) made(t *testing.T, n int) (*fakeStream, *pb.Migrate) {
	t.Helper()
	for end := time.Now().Add(time.Minute); len(a.streams()) < n && time.Now().Before(end); {
		time.Sleep(firstPause / 4)
	}
	all := a.streams()
	require.GreaterOrEqual(t, len(all), n)
	u, m := all[n-1], new(pb.StreamMigration)
	require.NoError(t, protodelim.UnmarshalFrom(bufio.NewReader(strings.NewReader(strings.TrimPrefix(u.taken(), Prelude))), m))
	return u, m.GetMigrate()
}

// TestEpochsOfAttempts: R2, R5. Each is above all that were promised or heard of. One that is
// absurdly high was not heard.
func TestEpochsOfAttempts(t *testing.T) {
	for name, test := range map[string]struct {
		answers []string
		epochs  []uint64
	}{
		"attempts that fail":       {[]string{"", "", Prelude}, []uint64{1, 3, 5, 7}},
		"overtaken":                {[]string{Prelude + ackStaleBytes(1000, "\x00"), ""}, []uint64{1, 1001, 1003}},
		"overtaken by the same":    {[]string{Prelude + ackStaleBytes(1, "\x00")}, []uint64{1, 3}},
		"overtaken, and then not":  {[]string{Prelude + ackStaleBytes(10, "\x00"), Prelude + ackStaleBytes(5, "\x00")}, []uint64{1, 11, 13}},
		"as far as it may be":      {[]string{Prelude + ackStaleBytes(1+maxEpochJump, "\x00")}, []uint64{1, 3 + maxEpochJump}},
		"further":                  {[]string{Prelude + ackStaleBytes(2+maxEpochJump, "\x00")}, []uint64{1, 3}},
		"as far again":             {[]string{Prelude + ackStaleBytes(1+maxEpochJump, "\x00"), Prelude + ackStaleBytes(3+2*maxEpochJump, "\x00")}, []uint64{1, 3 + maxEpochJump, 5 + 2*maxEpochJump}},
		"an ack that is no answer": {[]string{MultistreamToken + NAToken, Prelude + "\x05\x1a"}, []uint64{1, 3, 5}},
	} {
		bubble(t, name, func(t *testing.T) {
			s, r := resumableOn(t, newFake())
			label := s.Label()
			a := lostOn(s, test.answers...)
			ids := make(map[uint64]bool)
			for i, want := range test.epochs {
				_, m := a.made(t, i+1)
				require.Equal(t, want, m.GetResume().GetEpoch(), "attempt %d", i)
				require.Equal(t, r.origin, m.GetResume().GetOrigin())
				require.Equal(t, label, m.GetFrom())
				require.False(t, ids[m.GetId()], "each label is new")
				ids[m.GetId()] = true
			}
			require.True(t, r.lives())
		})
	}
}

// TestOneAttemptAtATime: R2.
func TestOneAttemptAtATime(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := resumableOn(t, newFake())
		a := lostOn(s)
		a.made(t, 1)
		r.ask(a.fakeConn)
		require.Len(t, a.streams(), 1)
	})
}

// An attempt that takes too long is given up, wherever it waits, and another is made.
func TestAttemptsThatTakeTooLong(t *testing.T) {
	for name, opens := range map[string]bool{"to be answered": true, "to be opened": false} {
		bubble(t, name, func(t *testing.T) {
			s, r := resumableOn(t, newFake())
			a := lostOn(s)
			if !opens {
				a.opening(func(ctx context.Context) (network.Stream, error) {
					a.opens()
					<-ctx.Done()
					return nil, ctx.Err()
				})
			}
			time.Sleep(acceptorWaits + attemptTimeout - time.Nanosecond)
			synctest.Wait()
			require.Len(t, a.streams(), 1)
			if opens {
				require.Nil(t, a.streams()[0].resetCode())
			}
			time.Sleep(time.Nanosecond)
			synctest.Wait()
			if opens {
				require.Equal(t, codeGivenUp, *a.streams()[0].resetCode())
			}
			time.Sleep(firstPause)
			synctest.Wait()
			require.Len(t, a.streams(), 2)
			_, at := a.all()
			require.GreaterOrEqual(t, at[1]-at[0], attemptTimeout+firstPause/2)
			require.True(t, r.lives())
		})
	}
}

// An attempt whose stream is open when the peer's own attempt has come is given up: nothing is
// asked there.
func TestAttemptThatIsOvertakenAsItOpens(t *testing.T) {
	for _, state := range []resumeState{resumeAnswering, resumeAsking} {
		virtual(t, func(t *testing.T) {
			s, r := resumableOn(t, newFake())
			a, opens := lostOn(s), make(chan struct{})
			a.opening(func(context.Context) (network.Stream, error) {
				<-opens
				return a.opens(), nil
			})
			time.Sleep(acceptorWaits)
			synctest.Wait()
			s.mu.Lock()
			require.Equal(t, resumeAsking, r.state)
			r.promised++
			r.state = state // asking again, or answering
			s.mu.Unlock()
			close(opens)
			synctest.Wait()
			require.Len(t, a.streams(), 1)
			require.Empty(t, a.streams()[0].taken())
			require.Equal(t, codeGivenUp, *a.streams()[0].resetCode())
		})
	}
}

// TestConnectionsThatBringNothing: R6. One on which an attempt had no answer gets none before the
// peer was dialled in vain; one on which it has failed otherwise does.
func TestConnectionsThatBringNothing(t *testing.T) {
	begin := func(t *testing.T, answers ...string) (*attempts, chan error) {
		s, _ := resumableOn(t, newFake())
		dialled := make(chan error)
		s.host.cfg.redial = func(ctx context.Context, _ peer.AddrInfo) error {
			select {
			case err := <-dialled:
				return err
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return lostOn(s, answers...), dialled
	}
	bubble(t, "nothing", func(t *testing.T) {
		a, dialled := begin(t)
		time.Sleep(acceptorWaits + attemptTimeout + longestPause)
		synctest.Wait()
		require.Len(t, a.streams(), 1)
		dialled <- errors.New("nobody there")
		time.Sleep(longestPause)
		synctest.Wait()
		require.Greater(t, len(a.streams()), 1)
	})
	bubble(t, "something later", func(t *testing.T) {
		a, dialled := begin(t)
		time.Sleep(acceptorWaits + attemptTimeout)
		dialled <- errors.New("nobody there")
		u, _ := a.made(t, 2)
		u.feeds(Prelude+ackReceivedBytes(0), nil)
		synctest.Wait()
		require.True(t, a.of.attached())
		time.Sleep(longestPause)
		a.of.lose(nil, errors.New("test"))
		time.Sleep(acceptorWaits)
		synctest.Wait()
		require.Len(t, a.streams(), 3, "it works")
	})
	bubble(t, "a reset", func(t *testing.T) {
		a, _ := begin(t, "")
		time.Sleep(acceptorWaits + firstPause)
		synctest.Wait()
		require.Len(t, a.streams(), 2)
	})
	bubble(t, "a reset, late", func(t *testing.T) {
		a, _ := begin(t)
		time.Sleep(acceptorWaits)
		synctest.Wait()
		require.Len(t, a.streams(), 1)
		time.Sleep(attemptTimeout - time.Nanosecond)
		a.streams()[0].ends(network.ErrReset)
		time.Sleep(firstPause)
		synctest.Wait()
		require.Len(t, a.streams(), 2)
	})
}

// A stream of which the peer lacks what is not kept any more ends, rather than with a gap.
func TestAckOfWhatIsNotKept(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := keepingOn(t, newFake(), 8<<10)
		_, err := s.Write([]byte(numbered(20 << 10)))
		require.NoError(t, err)
		a := lostOn(s, Prelude+ackReceivedBytes(1))
		u, _ := a.made(t, 1)
		require.False(t, r.lives())
		require.NotNil(t, u.resetCode())
		_, err = s.Write([]byte("x"))
		require.ErrorIs(t, err, errDroppedBytes)
	})
}

// An ack that comes when the peer's own attempt has come gives that attempt up.
func TestAckThatDoesNotCountGivesUp(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := resumableOn(t, newFake())
		a := lostOn(s)
		u, _ := a.made(t, 1)
		s.mu.Lock()
		r.promised++
		r.state = resumeAnswering
		s.mu.Unlock()
		u.feeds(Prelude+ackReceivedBytes(0), nil)
		synctest.Wait()
		require.Equal(t, codeGivenUp, *u.resetCode())
	})
}

// A stream that the other end reads no more moves like another once it is resumed.
func TestStreamThatIsNotReadMoves(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, _ := keepingOn(t, newFake(), 8<<10)
		_, err := s.Write([]byte("abc"))
		require.NoError(t, err)
		resumedBy(t, s, everything)
		n, err := s.send.pause()
		require.NoError(t, err)
		require.Zero(t, n)
		next := newFake()
		_, err = s.send.resume(next)
		require.NoError(t, err)
		_, err = s.Write([]byte("def"))
		require.NoError(t, err)
		require.Equal(t, "def", next.taken())
	})
}
