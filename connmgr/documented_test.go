package connmgr

import (
	"fmt"
	"os"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestLocalChoicesAreDocumented: what section 7 of docs/protocol.md says of draining here.
func TestLocalChoicesAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../docs/protocol.md")
	require.NoError(t, err)
	cfg := defaultConfig()
	for _, says := range []string{
		fmt.Sprintf("no answer | it is given up after %.0f s |", openTimeout.Seconds()),
		fmt.Sprintf("(K1) | are moved by A, %.0f s after `Kept` |", theirsAfter.Seconds()),
		fmt.Sprintf("(D1, D2) | %.0f s |", cfg.quietTime.Seconds()),
		fmt.Sprintf("%.0f s at most; without one after %.0f s, and then up to %.0f s |", cfg.interval.Seconds(), (2 * cfg.firstRetry).Seconds(), cfg.interval.Seconds()),
		fmt.Sprintf("once in %.0f s |", turnPause.Seconds()),
		fmt.Sprintf("after %.0f s, then twice as long each time, up to %.0f min |", cfg.firstRetry.Seconds(), cfg.maxRetry.Minutes()),
		fmt.Sprintf("takes over | after %.0f s,", cfg.takeover.Seconds()),
		fmt.Sprintf("Missing or 0: %.0f. More than %.0f is taken for %.0f |", shortLease.Seconds(), longLease.Seconds(), longLease.Seconds()),
	} {
		require.Contains(t, string(text), says)
	}
	require.Equal(t, 5, turnsAtOnce, "five times at once")
}
