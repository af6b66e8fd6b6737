package migrate

import (
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// TestViolationsAreSampled: a peer that breaks the protocol all the time costs one line in
// ten seconds, and another peer's first line does not wait for that.
func TestViolationsAreSampled(t *testing.T) {
	virtual(t, func(t *testing.T) {
		core, lines := observer.New(zap.WarnLevel)
		h := verifyingHost(WithLogger(zap.New(core)))
		h.violations.Every = sampleEvery
		broken := errors.New("broken")
		for range 30_000 {
			h.warnViolation(playerLow, broken, zap.Uint64("label", 2))
			time.Sleep(time.Millisecond)
		}
		h.warnViolation(playHost, broken)
		all := lines.TakeAll()
		require.Equal(t, 4, len(all), "lines")
		var left []any
		for _, line := range all {
			left = append(left, line.ContextMap()["more_since_last"])
		}
		require.Equal(t, []any{nil, int64(9_999), int64(9_999), nil}, left)
		require.Equal(t, playHost.String(), all[3].ContextMap()["peer"])
	})
}
