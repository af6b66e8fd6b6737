package connmgr_test

import (
	"context"
	"io"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	rhost "github.com/libp2p/go-libp2p/p2p/host/routed"
	basic "github.com/libp2p/go-libp2p/p2p/net/connmgr"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/connmgr"
	"github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/migrate"
)

// A relay's client that loses a duplicate of its connection to the relay keeps its
// reservation, and what is relayed over the loser meanwhile is waited for.
func TestRelayReservationIsKept(t *testing.T) {
	simtest.Run(t, func(t *testing.T, n *simtest.Net) {
		const ipRelay, ipOther = "1.0.2.1", "1.0.3.1"
		inner, err := basic.NewConnManager(100, 200)
		require.NoError(t, err)
		mgr, err := connmgr.New(inner)
		require.NoError(t, err)
		node := n.NewNode([]string{ip0}, libp2p.ConnectionManager(mgr))
		h, err := mgr.Wrap(node)
		require.NoError(t, err)
		relay, other := n.NewRelay(ipRelay), n.NewNode([]string{ipOther})
		tcp, _ := n.Join(node, relay,
			simtest.Path{Transport: simtest.TCP, From: ip0, To: ipRelay},
			simtest.Path{Transport: simtest.QUIC, From: ipRelay, To: ip0})

		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		at := simtest.Addr(simtest.TCP, ipRelay)
		_, err = client.Reserve(ctx, h, peer.AddrInfo{ID: relay.ID(), Addrs: []ma.Multiaddr{at}})
		require.NoError(t, err)
		circuit := ma.StringCast(at.String() + "/p2p/" + relay.ID().String() + "/p2p-circuit")
		dial := func() network.Conn {
			other.Peerstore().AddAddr(node.ID(), circuit, peerstore.PermanentAddrTTL)
			c, err := other.Network().DialPeer(network.WithAllowLimitedConn(ctx, "test"), node.ID())
			require.NoError(t, err)
			return c
		}
		first := dial()
		pass(90 * time.Second)
		require.False(t, first.IsClosed(), "the connection below it is kept for it")
		pass(5 * time.Minute) // the relay's limit of two minutes has ended it
		require.True(t, first.IsClosed())
		require.True(t, tcp.IsClosed(), "the relay is a plain peer, a minute is enough")
		require.Len(t, node.Network().ConnsToPeer(relay.ID()), 1)
		require.False(t, dial().IsClosed(), "the reservation holds")
	})
}

// routing finds one peer.
type routing struct{ info peer.AddrInfo }

func (r routing) FindPeer(context.Context, peer.ID) (peer.AddrInfo, error) { return r.info, nil }

// A routed host may be around the wrapped host, or inside.
func TestRoutedHost(t *testing.T) {
	for name, inside := range map[string]bool{"around": false, "inside": true} {
		t.Run(name, func(t *testing.T) {
			simtest.Run(t, func(t *testing.T, n *simtest.Net) {
				p := newDuo(t, n)
				p.hosts[1].SetStreamHandler("/test/x", func(network.Stream) {})
				routing := routing{peer.AddrInfo{ID: p.nodes[1].ID(), Addrs: []ma.Multiaddr{simtest.Addr(simtest.QUIC, ip1)}}}
				mgr, err := connmgr.New(nil)
				require.NoError(t, err)
				node := n.NewNode([]string{"1.0.5.1"}, libp2p.ConnectionManager(mgr))
				var opener host.Host
				if inside {
					opener, err = mgr.Wrap(rhost.Wrap(node, routing))
				} else {
					wrapped, werr := mgr.Wrap(node)
					opener, err = rhost.Wrap(wrapped, routing), werr
				}
				require.NoError(t, err)
				s, err := opener.NewStream(t.Context(), p.nodes[1].ID(), "/test/x")
				require.NoError(t, err)
				require.IsType(t, (*migrate.Stream)(nil), s)
				require.NoError(t, s.Reset())
			})
		})
	}
}

// A hole punch (DCUtR) begins over the relayed connection and ends with a direct one, which
// both ends may call outbound: the streams move there, and the relayed one is closed.
func TestHolePunch(t *testing.T) {
	simtest.Run(t, func(t *testing.T, n *simtest.Net) {
		const ipRelay = "1.0.2.1"
		n.SetLatency(ip0, ipRelay, 40*time.Millisecond)
		n.SetLatency(ip1, ipRelay, 40*time.Millisecond)
		p := newDuoWith(t, n, libp2p.EnableHolePunching())
		relay := n.NewRelay(ipRelay)
		relayed := n.DialRelayed(p.nodes[0], p.nodes[1], relay, simtest.QUIC)
		require.True(t, relayed.Stat().Limited)
		got := make(chan network.Stream, 1)
		p.hosts[1].SetStreamHandler("/test/x", func(s network.Stream) { got <- s })
		ctx := network.WithAllowLimitedConn(t.Context(), "test")
		s, err := p.hosts[0].NewStream(ctx, p.hosts[1].ID(), "/test/x")
		require.NoError(t, err)
		_, err = s.Write([]byte("through "))
		require.NoError(t, err)
		far := <-got
		pass(30 * time.Second)
		require.Len(t, p.conns(0), 1)
		require.False(t, p.conns(0)[0].Stat().Limited)
		require.True(t, relayed.IsClosed())
		_, err = s.Write([]byte("the hole"))
		require.NoError(t, err)
		require.NoError(t, s.CloseWrite())
		data, err := io.ReadAll(far)
		require.NoError(t, err)
		require.Equal(t, "through the hole", string(data))
		require.NoError(t, far.Close())
		require.NoError(t, s.Close())
	})
}
