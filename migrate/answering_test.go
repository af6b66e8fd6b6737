package migrate

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/rawpeer"
)

// What a host answers to attempts of its peer, and what becomes of its own, over fake streams, in
// virtual time. The peer has the lower ID: its labels and epochs are even.

// asksFor has the peer ask with a label for the stream of origin, on a stream of its own.
func asksFor(h *Host, u network.Stream, f *fakeStream, id, origin, epoch, received uint64) {
	f.conn = &fakeConn{remote: playerLow}
	f.conn.open = func(context.Context) (network.Stream, error) { return nil, errNoRoom }
	f.feeds(Prelude+resumeBytes(id, origin, origin, epoch, received), nil)
	go h.handleStream(u)
	synctest.Wait()
}

// asks is asksFor where the host's stream is known, and has received nothing.
func asks(s *Stream, id, epoch uint64) *fakeStream {
	u := newFake()
	asksFor(s.host, u, u, id, s.send.resumption.origin, epoch, 0)
	return u
}

// noLabels says that a host has no label of any stream any more.
func noLabels(t *testing.T, h *Host) {
	t.Helper()
	h.labels.mu.Lock()
	defer h.labels.mu.Unlock()
	for p, of := range h.labels.peers {
		require.Empty(t, of.streams, "labels of %s", p)
	}
}

// TestEpochsOfThePeer: R2, R3, R5.
func TestEpochsOfThePeer(t *testing.T) {
	const acked, violation = "acked", "violation"
	stale := func(epoch uint64) string { return Prelude + ackStaleBytes(epoch, "\x00") }
	for name, test := range map[string]struct {
		heard  uint64 // of a stale attempt of ours; 0: of none
		epochs []uint64
		want   []string
	}{
		"none":                     {0, []uint64{0}, []string{violation}},
		"ours":                     {0, []uint64{1}, []string{violation}},
		"the first":                {0, []uint64{2, 4}, []string{acked, acked}},
		"twice":                    {0, []uint64{4, 4, 2}, []string{acked, stale(4), stale(4)}},
		"as far as it may be":      {0, []uint64{maxEpochJump}, []string{acked}},
		"further":                  {0, []uint64{maxEpochJump + 2}, []string{violation}},
		"as far again":             {0, []uint64{maxEpochJump, 2 * maxEpochJump, 3*maxEpochJump + 2}, []string{acked, acked, violation}},
		"below what was heard of":  {1000, []uint64{4, 2}, []string{acked, stale(1000)}},
		"below what was asked for": {6, []uint64{4, 2}, []string{acked, stale(6)}},
	} {
		bubble(t, name, func(t *testing.T) {
			s, r := resumableOn(t, newFake())
			if test.heard != 0 {
				a := lostOn(s, Prelude+ackStaleBytes(test.heard, "\x01"))
				a.made(t, 1)
			}
			for i, epoch := range test.epochs {
				u := asks(s, uint64(700+2*i), epoch)
				switch want := test.want[i]; want {
				case acked:
					require.Equal(t, Prelude+ackReceivedBytes(0), u.taken())
					require.Equal(t, u.conn, s.Conn())
					require.True(t, r.attached())
				case violation:
					require.Equal(t, network.StreamProtocolViolation, *u.resetCode())
				default:
					require.Equal(t, want, u.taken())
					require.True(t, u.isClosed)
				}
				require.True(t, r.lives())
			}
		})
	}
}

// The peer's attempt takes the place of ours, which is given up; epochs that were not acked count, too.
func TestPeerAsksWhileWeDo(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := resumableOn(t, newFake())
		a := lostOn(s, "")
		ours, m := a.made(t, 2)
		require.EqualValues(t, 3, m.GetResume().GetEpoch())
		late := asks(s, 700, 2)
		require.Equal(t, Prelude+ackStaleBytes(3, "\x01"), late.taken())
		require.Nil(t, ours.resetCode())
		u := asks(s, 702, 4)
		require.Equal(t, codeGivenUp, *ours.resetCode())
		require.Equal(t, u.conn, s.Conn())
		require.EqualValues(t, 702, s.Label())
		require.NoError(t, s.Reset())
		require.False(t, r.lives())
		noLabels(t, s.host)
	})
}

// unwelcomeApp is a stream that the resource manager does not admit as one of the application's.
type unwelcomeApp struct{ *fakeStream }

func (u unwelcomeApp) SetProtocol(id protocol.ID) error {
	if id == echoID {
		return network.ErrResourceLimitExceeded
	}
	return u.fakeStream.SetProtocol(id)
}

// Where the peer's attempt cannot be acked it has failed: others follow, of either end, and the
// patience is as long as ever.
func TestAttemptOfThePeerThatFails(t *testing.T) {
	for name, test := range map[string]struct {
		stream func(u *fakeStream) network.Stream
		takes  time.Duration
		code   network.StreamErrorCode
	}{
		"the ack does not leave": {func(u *fakeStream) network.Stream {
			u.grants(0, errors.New("a failure of the network"))
			return u
		}, 0, codeGivenUp},
		"the ack has no room": {func(u *fakeStream) network.Stream {
			u.grants(0, nil)
			return u
		}, attemptTimeout, codeGivenUp},
		"it is not admitted": {func(u *fakeStream) network.Stream { return unwelcomeApp{u} }, 0, network.StreamResourceLimitExceeded},
	} {
		bubble(t, name, func(t *testing.T) {
			s, r := resumableOn(t, newFake())
			s.host.cfg.resumes.patience = time.Minute
			begun := time.Now()
			a := lostOn(s)
			time.Sleep(acceptorWaits / 2)
			u := newFake()
			asksFor(s.host, test.stream(u), u, 700, r.origin, 2, 0)
			if test.takes > 0 {
				time.Sleep(test.takes - time.Nanosecond)
				synctest.Wait()
				require.Nil(t, u.resetCode())
				time.Sleep(time.Nanosecond)
				synctest.Wait()
			}
			require.NotNil(t, u.resetCode())
			require.Equal(t, test.code, *u.resetCode())
			require.False(t, r.attached())
			_, m := a.made(t, 1)
			require.EqualValues(t, 3, m.GetResume().GetEpoch(), "the one of the peer was promised")
			time.Sleep(time.Until(begun.Add(time.Minute)) - time.Nanosecond)
			synctest.Wait()
			require.True(t, r.lives())
			time.Sleep(time.Nanosecond)
			synctest.Wait()
			require.False(t, r.lives())
			noLabels(t, s.host)
		})
	}
}

// A peer that asks with a label which is alive violates the rules, and its attempt has failed.
func TestAttemptWithALabelThatIsAlive(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := resumableOn(t, newFake())
		a := lostOn(s)
		u := asks(s, r.origin, 2)
		require.Equal(t, network.StreamProtocolViolation, *u.resetCode())
		require.True(t, r.lives())
		a.made(t, 1)
		require.Equal(t, r.origin, s.Label())
	})
}

// Our own attempt that the resource manager does not admit asks nothing.
func TestAttemptThatIsNotAdmitted(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := resumableOn(t, newFake())
		a := lostOn(s)
		a.opening(func(context.Context) (network.Stream, error) { return unwelcomeApp{a.opens()}, nil })
		time.Sleep(acceptorWaits)
		synctest.Wait()
		require.Len(t, a.streams(), 1)
		require.Empty(t, a.streams()[0].taken())
		require.NotNil(t, a.streams()[0].resetCode())
		time.Sleep(firstPause)
		synctest.Wait()
		require.Len(t, a.streams(), 2)
		require.True(t, r.lives())
	})
}

// A peer that lacks what is not kept any more is denied, and the stream ends here, too.
func TestPeerThatLacksWhatIsNotKept(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := keepingOn(t, newFake(), 8<<10)
		_, err := s.Write([]byte(numbered(20 << 10)))
		require.NoError(t, err)
		u := asks(s, 700, 2)
		require.Equal(t, Prelude+AckDenied, u.taken())
		require.False(t, r.lives())
		_, err = s.Write([]byte("x"))
		require.ErrorIs(t, err, errDroppedBytes)
		noLabels(t, s.host)
	})
}

// TestAttemptsForStreamsThatAreNotKnown: R9, L4. The Label of the peer's own stream may be on its way,
// and so may be the answer to an opening of ours.
func TestAttemptsForStreamsThatAreNotKnown(t *testing.T) {
	begin := func(origin uint64) (*Host, *fakeStream) {
		h := verifyingHost(WithResumption())
		h.resumer = newResumer(h)
		u := newFake()
		asksFor(h, u, u, 700, origin, 2, 0)
		return h, u
	}
	bubble(t, "its Label comes", func(t *testing.T) {
		h, u := begin(600)
		require.Empty(t, u.taken())
		old := newFake()
		old.conn.open = func(context.Context) (network.Stream, error) { return nil, errNoRoom }
		s := acceptedWith(t, h, old, resumableLabelBytes)
		synctest.Wait()
		require.Equal(t, Prelude+ackReceivedBytes(0), u.taken())
		require.Equal(t, u.conn, s.Conn())
		require.NoError(t, s.Reset())
		h.cancel()
	})
	bubble(t, "its Label does not come", func(t *testing.T) {
		h, u := begin(600)
		time.Sleep(h.cfg.labelWait - time.Nanosecond)
		synctest.Wait()
		require.Empty(t, u.taken())
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		require.Equal(t, Prelude+AckDenied, u.taken())
		require.True(t, u.isClosed)
	})
	bubble(t, "of ours", func(t *testing.T) {
		_, u := begin(601)
		require.Equal(t, Prelude+AckDenied, u.taken(), "at once")
		require.True(t, u.isClosed)
	})
	bubble(t, "that is being opened", func(t *testing.T) {
		h := verifyingHost(WithResumption())
		h.resumer = newResumer(h)
		opened := h.resumer.opens(playerLow, 601)
		u := newFake()
		asksFor(h, u, u, 700, 601, 2, 0)
		require.NotContains(t, u.taken(), AckDenied)
		require.Equal(t, codeGivenUp, *u.resetCode())
		opened()
		u = newFake()
		asksFor(h, u, u, 702, 601, 4, 0)
		require.Equal(t, Prelude+AckDenied, u.taken())
	})
	bubble(t, "too many", func(t *testing.T) {
		h := verifyingHost(WithResumption())
		h.resumer = newResumer(h)
		for n := range uint64(maxWaiting + 1) {
			u := newFake()
			asksFor(h, u, u, 700, 1000+2*n, 2, 0)
			if n < maxWaiting {
				require.Nil(t, u.resetCode())
			} else {
				require.Equal(t, network.StreamRateLimited, *u.resetCode())
			}
		}
		time.Sleep(h.cfg.labelWait)
	})
	bubble(t, "where the denial does not leave", func(t *testing.T) {
		h := verifyingHost(WithResumption())
		h.resumer = newResumer(h)
		u := newFake()
		u.grants(0, errors.New("a failure of the network"))
		asksFor(h, u, u, 700, 601, 2, 0)
		require.NotNil(t, u.resetCode())
		require.False(t, u.isClosed)
	})
}

// A stream that the application has closed has no label any more, whenever it was closed, and ends when
// its patience is over: that is counted from the loss on, or from the Close of one that was resumed.
func TestLabelsOfStreamsThatWereClosed(t *testing.T) {
	for name, when := range map[string]int{"before the loss": 0, "before the attempt": 1, "before the ack": 2, "behind the ack": 3} {
		bubble(t, name, func(t *testing.T) {
			s, r := resumableOn(t, newFake())
			_, err := s.Write([]byte("abc"))
			require.NoError(t, err)
			closes := func(at int) {
				if at == when {
					require.NoError(t, s.Close())
				}
			}
			closes(0)
			a := lostOn(s)
			begun := time.Now()
			closes(1)
			u, _ := a.made(t, 1)
			closes(2)
			u.feeds(Prelude+ackReceivedBytes(0), nil)
			synctest.Wait()
			require.True(t, r.attached())
			if when == 3 {
				time.Sleep(time.Second)
				begun = time.Now()
			}
			closes(3)
			patience := s.host.cfg.resumes.patience
			time.Sleep(time.Until(begun.Add(patience)) - time.Nanosecond)
			synctest.Wait()
			require.True(t, r.lives())
			noLabels(t, s.host)
			time.Sleep(patience)
			synctest.Wait()
			require.False(t, r.lives())
			noLabels(t, s.host)
		})
	}
}

// A stream that is resumed on a connection which is gone by then is lost again.
func TestResumedOnWhatIsGone(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := resumableOn(t, newFake())
		a := lostOn(s)
		u, _ := a.made(t, 1)
		a.dies()
		u.feeds(Prelude+ackReceivedBytes(0), nil)
		synctest.Wait()
		require.False(t, r.attached())
		require.True(t, r.lives())
		resumedBy(t, s, 0)
	})
}
