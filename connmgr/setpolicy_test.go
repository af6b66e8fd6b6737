package connmgr

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/policy"
)

func TestSetPolicy(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
		quic.open(2)
		tcp.setPlain(1)
		w.pass(time.Minute)
		require.Equal(t, quic, w.m.steer.choose(t.Context(), higher))

		require.Error(t, w.m.SetPolicy(nil))
		preferTCP, err := policy.Parse("chain(transport(tcp,quic))")
		require.NoError(t, err)
		require.NoError(t, w.m.SetPolicy(preferTCP))
		w.pass(minRoundGap + rtt)
		require.Equal(t, tcp, w.m.steer.choose(t.Context(), higher), "at once, although the other one is the incumbent")
		require.Equal(t, 2, tcp.count())
		require.Contains(t, w.m.Explain(higher).String(), "tcp over quic")
		w.pass(defaultQuietTime + defaultInterval)
		require.True(t, quic.pruned())
		require.False(t, tcp.IsClosed())
		require.Equal(t, 1, w.logs.FilterMessage("policy changed").Len())
	})
}

func TestSetPolicyOfAClosedManager(t *testing.T) {
	w := newBareWorld(t, higher)
	require.NoError(t, w.m.Close())
	require.NoError(t, w.m.SetPolicy(policy.Default()), "it does no harm")
}

// A policy that has not returned is not asked again about the same peer meanwhile.
func TestStuckPolicyIsNotAskedAgain(t *testing.T) {
	_, err := new(policies).of(&peerState{stuck: true})(nil)
	require.ErrorIs(t, err, errStuck)
}
