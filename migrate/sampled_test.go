package migrate

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
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
		h.violations.every = sampleEvery
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

// TestViolationsOfManyPeers: peers that come and go are remembered to a bound, and share what
// is left of the log.
func TestViolationsOfManyPeers(t *testing.T) {
	l := samples{every: sampleEvery}
	now := time.Now()
	logged := 0
	for i := range 10 * maxSampled {
		if _, ok := l.take(peer.ID(fmt.Sprint(i)), now); ok {
			logged++
		}
	}
	require.Equal(t, maxSampled+1, logged)
	require.Len(t, l.peers, maxSampled)
	now = now.Add(sampleEvery)
	left, ok := l.take("new", now)
	require.True(t, ok)
	require.Zero(t, left)
	require.Len(t, l.peers, 1, "the others had their line long ago")
}
