// Package hosttest makes real hosts on loopback, with several connections between
// them, for the tests of the other packages.
package hosttest

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/control"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	ma "github.com/multiformats/go-multiaddr"
)

// Patience is how long a test waits for what must happen, on a machine that is busy with
// other things too. It never decides how a test ends that passes.
const Patience = 2 * time.Minute

// PatientDials has a host's dials end by their context. By themselves they end after 5 s
// on loopback, which a busy machine can take for a handshake.
func PatientDials() libp2p.Option {
	return libp2p.SwarmOpts(swarm.WithDialTimeout(Patience), swarm.WithDialTimeoutLocal(Patience))
}

// Transport names a transport of go-libp2p.
type Transport string

// The transports that New listens on, and Relay, for which there is Node.DialRelayed.
const (
	TCP          Transport = "tcp"
	QUIC         Transport = "quic"
	WebSocket    Transport = "ws"
	WebTransport Transport = "webtransport"
	WebRTC       Transport = "webrtc"
	Relay        Transport = "relay"
)

var listenAddrs = map[Transport]string{
	TCP:          "/ip4/127.0.0.1/tcp/0",
	QUIC:         "/ip4/127.0.0.1/udp/0/quic-v1",
	WebSocket:    "/ip4/127.0.0.1/tcp/0/ws",
	WebTransport: "/ip4/127.0.0.1/udp/0/quic-v1/webtransport",
	WebRTC:       "/ip4/127.0.0.1/udp/0/webrtc-direct",
}

// Of returns the transport of an address.
func Of(addr ma.Multiaddr) Transport {
	s := addr.String()
	switch {
	case strings.Contains(s, "/p2p-circuit"):
		return Relay
	case strings.Contains(s, "/webtransport"):
		return WebTransport
	case strings.Contains(s, "/quic-v1"):
		return QUIC
	case strings.Contains(s, "/ws"):
		return WebSocket
	case strings.Contains(s, "/tcp"):
		return TCP
	default:
		return WebRTC
	}
}

// Node is a host, and a gate that can hold its dials back.
type Node struct {
	host.Host
	gate *gate
}

// virtualOnly is the environment variable that, where it is set, has every test skip itself
// which makes a host of this package. What is left of a package are its tests in virtual time,
// whatever they are called, so that they can be run apart from those in real time.
const virtualOnly = "VIRTUAL_TIME_ONLY"

// New returns a host that listens on the given transports on loopback, with go-libp2p's
// default resource limits. It is closed with the test. A libp2p.SwarmOpts among opts takes
// the place of PatientDials. See virtualOnly.
func New(t testing.TB, transports []Transport, opts ...libp2p.Option) *Node {
	t.Helper()
	if os.Getenv(virtualOnly) != "" {
		t.Skipf("in real time, and %s is set", virtualOnly)
	}
	var listen []string
	for _, tr := range transports {
		if a, ok := listenAddrs[tr]; ok {
			listen = append(listen, a)
		}
	}
	g := &gate{}
	h, err := libp2p.New(append([]libp2p.Option{
		libp2p.ListenAddrStrings(listen...),
		libp2p.ConnectionGater(g),
		libp2p.DisableIdentifyAddressDiscovery(),
		PatientDials(),
	}, opts...)...)
	if err != nil {
		t.Fatalf("new host: %v", err)
	}
	t.Cleanup(func() { _ = h.Close() })
	return &Node{Host: h, gate: g}
}

// Addr returns the node's address of that transport.
func (n *Node) Addr(t testing.TB, tr Transport) ma.Multiaddr {
	t.Helper()
	for _, a := range n.Network().ListenAddresses() {
		if Of(a) == tr {
			if tr == WebTransport || tr == WebRTC { // Addrs has the certificates' hashes
				for _, full := range n.Addrs() {
					if Of(full) == tr {
						return full
					}
				}
			}
			return a
		}
	}
	t.Fatalf("host does not listen on %s", tr)
	return nil
}

// Dial connects a to b over tr, and returns a's side of the connection.
func Dial(t testing.TB, a, b *Node, tr Transport) network.Conn {
	t.Helper()
	TellsAll(t, a.Host)
	TellsAll(t, b.Host)
	ctx, cancel := patiently()
	defer cancel()
	a.Know(b, b.Addr(t, tr))
	c, err := a.Network().DialPeer(network.WithForceDirectDial(ctx, "test"), b.ID())
	if err != nil {
		t.Fatalf("dial over %s: %v", tr, err)
	}
	if got := Of(c.RemoteMultiaddr()); got != tr && tr != WebRTC {
		t.Fatalf("dialled %s, got a connection over %s", tr, got)
	}
	identified(t, a, b)
	return c
}

// Join connects a and b over two transports, and returns a's side of both connections.
// A second dial would be given the first connection; so a's dial is under way, held back
// by its gate, while b dials a.
func Join(t testing.TB, a, b *Node, first, second Transport) (network.Conn, network.Conn) {
	t.Helper()
	if first == Relay || second == Relay {
		t.Fatal("Join: use JoinRelayed")
	}
	// Where a dial fails, go-libp2p returns the other connection in its place. On a machine
	// that is busy a QUIC handshake can: its limit of 5 s of silence cannot be set.
	for range 3 {
		if c0, c1 := join(t, a, b, first, second); c0 != nil {
			return c0, c1
		}
		_ = a.Network().ClosePeer(b.ID())
		WaitFor(t, "the connections to close", func() bool {
			return len(a.Network().ConnsToPeer(b.ID())) == 0 && len(b.Network().ConnsToPeer(a.ID())) == 0
		})
	}
	t.Fatalf("no two connections over %s and %s", first, second)
	return nil, nil
}

// join is Join. It returns nil if there is one connection only.
func join(t testing.TB, a, b *Node, first, second Transport) (network.Conn, network.Conn) {
	t.Helper()
	TellsAll(t, a.Host)
	TellsAll(t, b.Host)
	ctx, cancel := patiently()
	defer cancel()
	a.Know(b, b.Addr(t, first))
	release := a.gate.hold()
	defer release() // else a host whose dial waits would not close
	result := make(chan error, 1)
	go func() {
		_, err := a.Network().DialPeer(ctx, b.ID())
		result <- err
	}()
	a.gate.awaitHeld(t, ctx)
	b.Know(a, a.Addr(t, second))
	if _, err := b.Network().DialPeer(ctx, a.ID()); err != nil {
		t.Fatalf("dial over %s: %v", second, err)
	}
	WaitFor(t, "the connection that was dialled first", func() bool {
		return len(a.Network().ConnsToPeer(b.ID())) == 1
	})
	release()
	if err := <-result; err != nil {
		t.Fatalf("dial over %s: %v", first, err)
	}
	identified(t, a, b)
	conns := a.Network().ConnsToPeer(b.ID())
	if len(conns) != 2 {
		return nil, nil
	}
	// The dial that was held back ends last.
	return conns[1], conns[0]
}

// NewRelay returns a relay. Without options its limits are go-libp2p's defaults.
func NewRelay(t testing.TB, opts ...relay.Option) *Node {
	t.Helper()
	n := New(t, []Transport{TCP, QUIC}, libp2p.ForceReachabilityPublic())
	r, err := relay.New(n.Host, opts...)
	if err != nil {
		t.Fatalf("new relay: %v", err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return n
}

// DialRelayed connects a to b through r, and returns a's side of the connection.
func DialRelayed(t testing.TB, a, b, r *Node) network.Conn {
	t.Helper()
	TellsAll(t, a.Host)
	TellsAll(t, b.Host)
	ctx, cancel := patiently()
	defer cancel()
	info := peer.AddrInfo{ID: r.ID(), Addrs: r.Addrs()}
	if err := b.Connect(ctx, info); err != nil {
		t.Fatalf("connect to the relay: %v", err)
	}
	if _, err := client.Reserve(ctx, b.Host, info); err != nil {
		t.Fatalf("reserve at the relay: %v", err)
	}
	addr := ma.StringCast(fmt.Sprintf("%s/p2p/%s/p2p-circuit", r.Addr(t, TCP), r.ID()))
	a.Know(b, addr)
	c, err := a.Network().DialPeer(network.WithAllowLimitedConn(ctx, "test"), b.ID())
	if err != nil {
		t.Fatalf("dial through the relay: %v", err)
	}
	identified(t, a, b)
	return c
}

// patiently returns the context of what may take as long as Patience, dials included.
func patiently() (context.Context, context.CancelFunc) {
	ctx := network.WithDialPeerTimeout(context.Background(), Patience)
	return context.WithTimeout(ctx, Patience)
}

// Know makes addr the only address at which n dials other, whatever identify tells it.
func (n *Node) Know(other *Node, addr ma.Multiaddr) {
	n.gate.restrict(other.ID(), addr)
	n.Peerstore().ClearAddrs(other.ID())
	n.Peerstore().AddAddr(other.ID(), addr, peerstore.PermanentAddrTTL)
}

// Take returns what comes from ch, which is to come.
func Take[E any](t testing.TB, ch <-chan E, what string) E {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(Patience):
		t.Fatalf("waited in vain for %s", what)
		panic("unreachable")
	}
}

// WaitFor waits until cond holds, and fails the test when it does not within Patience.
func WaitFor(t testing.TB, what string, cond func() bool) {
	t.Helper()
	deadline := time.After(Patience)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("timed out waiting for: %s", what)
		}
	}
}

// Far returns b's side of a's connection c.
func Far(t testing.TB, b *Node, c network.Conn) network.Conn {
	t.Helper()
	var far network.Conn
	WaitFor(t, "the other side of the connection", func() bool {
		for _, d := range b.Network().ConnsToPeer(c.LocalPeer()) {
			// The local address of a relayed connection is that of the one to the
			// relay, which a direct connection may share.
			relayed := Of(c.RemoteMultiaddr()) == Relay
			if relayed != (Of(d.RemoteMultiaddr()) == Relay) {
				continue
			}
			if relayed || d.RemoteMultiaddr().Equal(c.LocalMultiaddr()) || d.LocalMultiaddr().Equal(c.RemoteMultiaddr()) {
				far = d
				return true
			}
		}
		return false
	})
	return far
}

// gate is a connection gater that lets pass what comes, dials when it is told to, and to
// the addresses it is told.
type gate struct {
	mu    sync.Mutex // guards all below
	only  map[peer.ID]ma.Multiaddr
	held  chan struct{} // closed when dials may go on; nil: they may
	seen  chan struct{} // closed when one waits
	noted bool          // seen is closed
}

// hold holds back all dials from now on. release may be called more than once.
func (g *gate) hold() (release func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	held := make(chan struct{})
	g.held, g.seen, g.noted = held, make(chan struct{}), false
	return sync.OnceFunc(func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.held = nil
		close(held)
	})
}

func (g *gate) awaitHeld(t testing.TB, ctx context.Context) {
	t.Helper()
	g.mu.Lock()
	seen := g.seen
	g.mu.Unlock()
	select {
	case <-seen:
	case <-ctx.Done():
		t.Fatal("the dial does not begin")
	}
}

// restrict has p dialled at addr and nowhere else.
func (g *gate) restrict(p peer.ID, addr ma.Multiaddr) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.only == nil {
		g.only = make(map[peer.ID]ma.Multiaddr)
	}
	g.only[p] = addr
}

// InterceptAddrDial holds a dial back. The swarm asks it after it has looked, for the last
// time, whether there is a connection already.
func (g *gate) InterceptAddrDial(p peer.ID, addr ma.Multiaddr) bool {
	g.mu.Lock()
	if only := g.only[p]; only != nil && !only.Equal(addr) {
		g.mu.Unlock()
		return false
	}
	held, seen := g.held, g.seen
	if held != nil && !g.noted {
		close(seen)
		g.noted = true
	}
	g.mu.Unlock()
	if held != nil {
		<-held
	}
	return true
}

func (g *gate) InterceptPeerDial(peer.ID) bool              { return true }
func (g *gate) InterceptAccept(network.ConnMultiaddrs) bool { return true }
func (g *gate) InterceptSecured(network.Direction, peer.ID, network.ConnMultiaddrs) bool {
	return true
}
func (g *gate) InterceptUpgraded(network.Conn) (bool, control.DisconnectReason) { return true, 0 }
