package connmgr

import (
	"context"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/connmgr"
	"github.com/libp2p/go-libp2p/core/control"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/multiformats/go-multistream"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/internal/hosttest"
)

const echo = "/test/echo"

// node is a real host on loopback, whose dials can be held back.
type node struct {
	host.Host
	gate *dialGate
}

func newNode(t *testing.T, opts ...libp2p.Option) *node {
	g := &dialGate{}
	h, err := libp2p.New(append(opts,
		libp2p.ListenAddrStrings("/ip4/127.0.0.1/udp/0/quic-v1", "/ip4/127.0.0.1/tcp/0"),
		libp2p.ConnectionGater(g), libp2p.DisableMetrics(), hosttest.PatientDials())...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = h.Close() })
	h.SetStreamHandler(echo, func(s network.Stream) {
		defer s.Close()
		_, _ = io.Copy(s, s)
	})
	return &node{h, g}
}

// newBareNode returns one with a bare manager that does not take long.
func newBareNode(t *testing.T, opts ...Option) (*node, *Manager) {
	m, err := New(nil, append(opts, WithSettleDelay(100*time.Millisecond), WithPlainQuietTime(time.Second), WithInterval(100*time.Millisecond))...)
	require.NoError(t, err)
	return newNode(t, libp2p.ConnectionManager(m)), m
}

// dialGate is a connection gater that lets everything through, dials once they may. A
// dial that waits here has found no connection to its peer, and does not look again.
type dialGate struct {
	mu   sync.Mutex
	hold chan struct{} // nil: nothing is held back
	held chan struct{} // closed by the first dial that waits
}

func (g *dialGate) InterceptAddrDial(peer.ID, ma.Multiaddr) bool {
	g.mu.Lock()
	hold, held := g.hold, g.held
	g.held = nil
	g.mu.Unlock()
	if held != nil {
		close(held)
	}
	if hold != nil {
		<-hold
	}
	return true
}

func (g *dialGate) InterceptPeerDial(peer.ID) bool                                  { return true }
func (g *dialGate) InterceptAccept(network.ConnMultiaddrs) bool                     { return true }
func (g *dialGate) InterceptUpgraded(network.Conn) (bool, control.DisconnectReason) { return true, 0 }

func (g *dialGate) InterceptSecured(network.Direction, peer.ID, network.ConnMultiaddrs) bool {
	return true
}

// address returns n's address with that protocol.
func (n *node) address(t *testing.T, protocol int) ma.Multiaddr {
	for _, a := range n.Network().ListenAddresses() {
		if _, err := a.ValueForProtocol(protocol); err == nil {
			return a
		}
	}
	t.Fatal("no such address")
	return nil
}

// join connects a to b over QUIC while b connects to a over TCP, and returns a's side
// of both connections. Otherwise the second dial would be given the connection of the
// first. What has to be on the TCP connection before a manager sees two onTCP puts there;
// it may be nil.
func join(t *testing.T, a, b *node, onTCP func(tcp network.Conn)) (quic, tcp network.Conn) {
	ctx, cancel := context.WithTimeout(network.WithDialPeerTimeout(t.Context(), hosttest.Patience), hosttest.Patience)
	defer cancel()
	hosttest.TellsAll(t, a)
	hosttest.TellsAll(t, b)
	hold, held := make(chan struct{}), make(chan struct{})
	release := sync.OnceFunc(func() { close(hold) })
	defer release() // else a host whose dial waits would not close
	a.gate.mu.Lock()
	a.gate.hold, a.gate.held = hold, held
	a.gate.mu.Unlock()
	a.Peerstore().AddAddr(b.ID(), b.address(t, ma.P_QUIC_V1), peerstore.PermanentAddrTTL)
	b.Peerstore().AddAddr(a.ID(), a.address(t, ma.P_TCP), peerstore.PermanentAddrTTL)
	dialled := make(chan error, 1)
	go func() {
		c, err := a.Network().DialPeer(ctx, b.ID())
		quic = c
		dialled <- err
	}()
	select {
	case <-held:
	case <-ctx.Done():
		t.Fatal("the dial does not begin")
	}
	_, err := b.Network().DialPeer(ctx, a.ID())
	require.NoError(t, err)
	waitFor(t, "a's side of the TCP connection", func() bool { return len(a.Network().ConnsToPeer(b.ID())) == 1 })
	tcp = a.Network().ConnsToPeer(b.ID())[0]
	if onTCP != nil {
		onTCP(tcp)
	}
	release()
	require.NoError(t, <-dialled)
	require.NotSame(t, quic, tcp)
	return quic, tcp
}

func waitFor(t *testing.T, what string, condition func() bool) {
	t.Helper()
	require.Eventually(t, condition, hosttest.Patience, 2*time.Millisecond, what)
}

// plainStream opens a stream on a connection of one's choice.
func plainStream(t *testing.T, c network.Conn) network.Stream {
	s, err := c.NewStream(t.Context())
	require.NoError(t, err)
	require.NoError(t, multistream.SelectProtoOrFail(echo, s))
	return s
}

func requireEcho(t *testing.T, s network.Stream) {
	_, err := s.Write([]byte("hello"))
	require.NoError(t, err)
	buf := make([]byte, 5)
	_, err = io.ReadFull(s, buf)
	require.NoError(t, err)
	require.Equal(t, "hello", string(buf))
}

func TestBareManagerOnRealHosts(t *testing.T) {
	// With the higher ID it follows even a plain peer, which may be a bare manager.
	a, m := newBareNode(t, WithTakeover(time.Millisecond))
	b := newNode(t)
	m.Protect(b.ID(), "test")
	var onTCP network.Stream
	// The stream is there first: a loser without one would be closed.
	quic, tcp := join(t, a, b, func(tcp network.Conn) { onTCP = plainStream(t, tcp) })
	onQUIC := plainStream(t, quic)
	waitFor(t, "the stream on the loser to be waited for", func() bool {
		e := m.Explain(b.ID())
		return len(e.Conns) == 2 && e.Conns[0].Conn.Kind == "quic direct" &&
			e.Conns[1].Reason == ReasonPinned
	})
	requireEcho(t, onQUIC)
	requireEcho(t, onTCP)

	require.NoError(t, onTCP.Close())
	waitFor(t, "the loser to be closed", func() bool { return len(a.Network().ConnsToPeer(b.ID())) == 1 })
	require.True(t, tcp.IsClosed())
	require.False(t, quic.IsClosed())
	requireEcho(t, onQUIC)
	waitFor(t, "the other end to see it", func() bool { return len(b.Network().ConnsToPeer(a.ID())) == 1 })

	require.Same(t, m, a.ConnManager())
	require.True(t, m.IsProtected(b.ID(), "test"))
	waitFor(t, "inner to hear of the connection that is gone", func() bool { return len(m.GetTagInfo(b.ID()).Conns) == 1 })
	require.NoError(t, a.Close())
	require.Equal(t, "the manager is closed", m.Explain(b.ID()).State, "with its host")
}

func TestTwoBareManagersOnRealHosts(t *testing.T) {
	a, am := newBareNode(t)
	b, bm := newBareNode(t)
	join(t, a, b, nil)
	waitFor(t, "one connection", func() bool {
		return len(a.Network().ConnsToPeer(b.ID())) == 1 && len(b.Network().ConnsToPeer(a.ID())) == 1
	})
	require.Equal(t, network.Connected, a.Network().Connectedness(b.ID()))
	for m, p := range map[*Manager]peer.ID{am: b.ID(), bm: a.ID()} {
		waitFor(t, "the peer to be forgotten", func() bool {
			m.sched.mu.Lock()
			defer m.sched.mu.Unlock()
			return len(m.sched.peers) == 0
		})
		require.Equal(t, "one connection, nothing to do", m.Explain(p).State)
	}
}

func TestWrapNeedsItsOwnHost(t *testing.T) {
	m, err := New(connmgr.NullConnMgr{})
	require.NoError(t, err)
	defer m.Close()
	_, err = m.Wrap(newNode(t))
	require.ErrorIs(t, err, ErrNotManager)
}
