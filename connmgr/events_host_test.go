package connmgr_test

import (
	"io"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/connmgr"
	"github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/policy"
)

// Both ends are told of what one of them has done, each as it sees it.
func TestEventsOfBothEnds(t *testing.T) {
	simtest.Run(t, func(t *testing.T, n *simtest.Net) {
		slow := []connmgr.Option{connmgr.WithSettleDelay(time.Minute)} // until the policy says what is better
		p := newDuo(t, n, slow, slow)
		var subs [2]event.Subscription
		for i, h := range p.hosts {
			var err error
			subs[i], err = h.EventBus().Subscribe([]any{new(connmgr.EvtStreamMigrated), new(connmgr.EvtConnectionPruned)}, eventbus.BufSize(64))
			require.NoError(t, err)
			defer subs[i].Close()
		}
		p.hosts[1].SetStreamHandler(plainID, func(s network.Stream) { _, _ = io.Copy(s, s) })
		p.join()
		s, err := p.hosts[0].NewStream(t.Context(), p.nodes[1].ID(), plainID)
		require.NoError(t, err)
		_, err = s.Write([]byte("portage"))
		require.NoError(t, err)
		pass(100 * time.Millisecond)
		from, to, better := "tcp direct", "quic direct", policy.QUIC
		if _, err := s.Conn().RemoteMultiaddr().ValueForProtocol(ma.P_TCP); err != nil {
			from, to, better = to, from, policy.TCP
		}
		require.NoError(t, p.mgrs[0].SetPolicy(policy.Chain(policy.TransportOrder(better))))
		pass(2 * time.Minute)
		require.Len(t, p.conns(0), 1)
		for i, sub := range subs {
			moved := (<-sub.Out()).(connmgr.EvtStreamMigrated)
			require.Equal(t, p.nodes[1-i].ID(), moved.Peer)
			require.Equal(t, plainID, moved.Protocol)
			require.Equal(t, from, moved.From.Kind)
			require.Equal(t, to, moved.To.Kind)
			require.Equal(t, i == 0, moved.Initiator, "each end moves what it has opened")
			require.Positive(t, moved.Took)
			pruned := (<-sub.Out()).(connmgr.EvtConnectionPruned)
			require.Equal(t, i == 1, pruned.ByPeer)
			require.Equal(t, from, pruned.Conn.Kind)
			require.Equal(t, to, pruned.Kept.Kind)
			require.Empty(t, sub.Out())
		}
		require.NoError(t, s.Reset())
	})
}

// bufferTracer knows what handovers hold.
type bufferTracer struct {
	connmgr.MetricsTracer
	now, most atomic.Int64
}

func (b *bufferTracer) Buffered(more int) { b.most.Store(max(b.most.Load(), b.now.Add(int64(more)))) }

// What an application has not read when its stream moves is measured for as long as it waits.
func TestBuffersAreMeasured(t *testing.T) {
	simtest.Run(t, func(t *testing.T, n *simtest.Net) {
		held := &bufferTracer{MetricsTracer: connmgr.NewMetricsTracer(connmgr.WithRegisterer(prometheus.NewRegistry()))}
		opts := []connmgr.Option{connmgr.WithSettleDelay(time.Minute), connmgr.WithMetricsTracer(held)}
		p := newDuo(t, n, opts, opts)
		accepted := make(chan network.Stream, 1)
		p.hosts[1].SetStreamHandler(plainID, func(s network.Stream) { accepted <- s })
		p.join()
		s, err := p.hosts[0].NewStream(t.Context(), p.nodes[1].ID(), plainID)
		require.NoError(t, err)
		unread := make([]byte, 100<<10)
		_, err = s.Write(unread)
		require.NoError(t, err)
		pass(time.Second)
		better := policy.QUIC
		if _, err := s.Conn().RemoteMultiaddr().ValueForProtocol(ma.P_TCP); err != nil {
			better = policy.TCP
		}
		require.NoError(t, p.mgrs[0].SetPolicy(policy.Chain(policy.TransportOrder(better))))
		pass(time.Minute)
		require.GreaterOrEqual(t, held.most.Load(), int64(len(unread)))
		far := <-accepted
		_, err = io.ReadFull(far, unread)
		require.NoError(t, err)
		require.Zero(t, held.now.Load())
		require.NoError(t, far.Reset())
		require.NoError(t, s.Reset())
	})
}
