package migrate

import (
	"io"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
	. "github.com/go-portage/portage/internal/rawpeer"
)

// Both ends tell how long a migration has taken so far.
func TestEventsTellHowLongItTook(t *testing.T) {
	j := newJourney(t, path{first: TCP, second: QUIC})
	a, b := j.open(t, testID, 0)
	require.NoError(t, j.migrate(testCtx(t), 0, a, 1))
	for _, s := range []*Stream{a, b} {
		j.steps.await(t, s, Finished)
		j.steps.mu.Lock()
		var started Event
		for _, e := range j.steps.seen {
			switch {
			case e.Stream != s:
			case e.Kind == Started:
				started = e
				require.Zero(t, e.Took)
			default:
				require.Equal(t, e.Time.Sub(started.Time), e.Took, e.Kind)
				require.Positive(t, e.Took)
			}
		}
		j.steps.mu.Unlock()
	}
	j.closed(t, [2]*Stream{a, b})
}

// TestEventsTellWhatWasDrained: what an application has not read when its stream moves comes
// over the old connection all the same, and waits in memory until it is read.
func TestEventsTellWhatWasDrained(t *testing.T) {
	var buffered, most atomic.Int64
	j := newJourney(t, path{first: TCP, second: QUIC}, WithBufferObserver(func(more int) {
		if now := buffered.Add(int64(more)); now > most.Load() {
			most.Store(now)
		}
	}))
	s := j.start(t)
	unread := make([]byte, 100<<10)
	_, err := s[0].Write(unread)
	require.NoError(t, err)
	require.NoError(t, j.move(t, 0, s))
	for side, want := range []uint64{0, uint64(len(unread))} {
		j.steps.await(t, s[side], Finished)
		require.Equal(t, want, j.steps.event(s[side], Finished).Drained, "at the %s", endName(side))
	}
	require.GreaterOrEqual(t, most.Load(), int64(len(unread)))
	require.Equal(t, int64(len(unread)), buffered.Load())
	_, err = io.ReadFull(s[1], unread)
	require.NoError(t, err)
	require.Zero(t, buffered.Load(), "all that was reserved has been given back")
	j.closed(t, s)
}

// A stream that outlives its connection is reported as lost, and as what becomes of it, with what
// is sent again.
func TestEventsOfResumption(t *testing.T) {
	var st steps
	p := meeting{kind: resuming, opts: []Option{WithResumption(), WithTracer(st.trace)}}.meet(t)
	s, old := p.hostAcceptsResumable()
	first := s.Conn()
	p.writes(s, "abc")
	next := p.resumes(old, epoch(1), 1+1) // it has "?a"
	next.Wants(Prelude, ackReceivedBytes(1), "bc")
	st.await(t, s, Resumed)
	lost, resumed := st.event(s, Lost), st.event(s, Resumed)
	require.Error(t, lost.Err)
	require.Equal(t, first, lost.From)
	require.Zero(t, lost.Took)
	require.Equal(t, lost.From, resumed.From)
	require.Equal(t, s.Conn(), resumed.To)
	require.NotEqual(t, first, resumed.To)
	require.False(t, resumed.Initiator, "the peer has attempted")
	require.EqualValues(t, len("bc"), resumed.Again)
	require.Positive(t, resumed.Took)

	p.host.resumer.get(p.ID(), old.Label).lose(nil, errTooLate)
	require.NoError(t, s.Reset())
	st.await(t, s, GivenUp)
	require.NoError(t, st.event(s, GivenUp).Err, "the application has ended it")
}
