package migrate

import (
	"testing"

	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
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
		require.NoError(t, s.Close())
	}
}
