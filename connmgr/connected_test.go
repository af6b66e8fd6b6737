package connmgr_test

import (
	"context"
	"sync/atomic"
	"testing"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/control"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	corerouting "github.com/libp2p/go-libp2p/core/routing"
	routedhost "github.com/libp2p/go-libp2p/p2p/host/routed"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/connmgr"
	"github.com/go-portage/portage/internal/hosttest"
	"github.com/go-portage/portage/migrate"
)

// A stream that is opened within a Connected notifiee can move, however the host has got its
// manager. One end opens one: no end is served before its notifiees have returned.
func TestStreamInConnected(t *testing.T) {
	wrapped := func(t *testing.T, around func(host.Host) host.Host) host.Host {
		m, err := connmgr.New(nil)
		require.NoError(t, err)
		h, err := m.Wrap(around(newEnabled(t, onLoopback(libp2p.ConnectionManager(m))...)))
		require.NoError(t, err)
		h.SetStreamHandler(echoID, echo)
		return h
	}
	hosts := map[string]func(t *testing.T) host.Host{
		"Enable": func(t *testing.T) host.Host { return newEnabled(t, onLoopback(connmgr.Enable())...) },
		"Enable, and a routing": func(t *testing.T) host.Host {
			return newEnabled(t, onLoopback(libp2p.Routing(func(host.Host) (corerouting.PeerRouting, error) { return routing{}, nil }), connmgr.Enable())...)
		},
		"Wrap": func(t *testing.T) host.Host { return wrapped(t, func(h host.Host) host.Host { return h }) },
		"Wrap of a routed host": func(t *testing.T) host.Host {
			return wrapped(t, func(h host.Host) host.Host { return routedhost.Wrap(h, routing{}) })
		},
		"a routed host over Wrap": func(t *testing.T) host.Host {
			return routedhost.Wrap(wrapped(t, func(h host.Host) host.Host { return h }), routing{})
		},
	}
	for name, newHost := range hosts {
		for end, by := range []string{"dialler", "listener"} {
			t.Run(name+", by the "+by, func(t *testing.T) {
				ends := []host.Host{newHost(t), newHost(t)}
				type opened struct {
					s   network.Stream
					err error
				}
				hosttest.TellsAll(t, ends[1-end])
				got := make(chan opened, 1)
				ends[end].Network().Notify(&network.NotifyBundle{ConnectedF: func(_ network.Network, c network.Conn) {
					ctx, cancel := context.WithTimeout(context.Background(), hosttest.Patience)
					defer cancel()
					s, err := ends[end].NewStream(ctx, c.RemotePeer(), echoID)
					got <- opened{s, err}
				}})
				connect(t, ends[0], ends[1])
				o := <-got
				require.NoError(t, o.err)
				require.IsType(t, (*migrate.Stream)(nil), o.s)
				require.NoError(t, o.s.Reset())
			})
		}
	}
}

// closesAll is a gater of a host that takes each connection and closes it at once.
type closesAll struct{ taken atomic.Int64 }

func (g *closesAll) InterceptPeerDial(peer.ID) bool               { return true }
func (g *closesAll) InterceptAddrDial(peer.ID, ma.Multiaddr) bool { return true }
func (g *closesAll) InterceptAccept(network.ConnMultiaddrs) bool  { g.taken.Add(1); return false }
func (g *closesAll) InterceptUpgraded(network.Conn) (bool, control.DisconnectReason) {
	return true, 0
}

func (g *closesAll) InterceptSecured(network.Direction, peer.ID, network.ConnMultiaddrs) bool {
	return true
}

// Where a peer takes a connection and closes it at once, NewStream fails, and has dialled once.
func TestEnableDialsOnce(t *testing.T) {
	for name, opts := range map[string][]libp2p.Option{"plain": nil, "enabled": {connmgr.Enable()}} {
		t.Run(name, func(t *testing.T) {
			gater := new(closesAll)
			far := newEnabled(t, libp2p.ListenAddrStrings("/ip4/127.0.0.1/udp/0/quic-v1"), libp2p.ConnectionGater(gater), libp2p.DisableMetrics())
			near := newEnabled(t, onLoopback(opts...)...)
			near.Peerstore().AddAddrs(far.ID(), far.Addrs(), hosttest.Patience)
			_, err := near.NewStream(t.Context(), far.ID(), echoID)
			require.Error(t, err)
			require.EqualValues(t, 1, gater.taken.Load())
		})
	}
}
