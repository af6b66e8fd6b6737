package sampled

import (
	"fmt"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/stretchr/testify/require"
)

// TestManyPeers: peers that come and go are remembered to a bound, and share what
// is left of the log.
func TestManyPeers(t *testing.T) {
	const every = 10 * time.Second
	l := Lines{Every: every}
	now := time.Date(2030, 1, 1, 12, 0, 0, 0, time.UTC)
	logged := 0
	for i := range 10 * MaxPeers {
		if _, ok := l.Take(peer.ID(fmt.Sprint(i)), now); ok {
			logged++
		}
	}
	require.Equal(t, MaxPeers+1, logged)
	require.Len(t, l.peers, MaxPeers)
	now = now.Add(every)
	left, ok := l.Take("new", now)
	require.True(t, ok)
	require.Zero(t, left)
	require.Len(t, l.peers, 1, "the others had their line long ago")
}
