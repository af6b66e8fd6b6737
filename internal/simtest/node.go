package simtest

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/core/transport"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	libp2pquic "github.com/libp2p/go-libp2p/p2p/transport/quic"
	"github.com/libp2p/go-libp2p/p2p/transport/quicreuse"
	ma "github.com/multiformats/go-multiaddr"
)

// Transport names a transport.
type Transport string

// The transports that every node listens on, at each of its IPs.
const (
	TCP  Transport = "tcp"
	QUIC Transport = "quic"
)

// Path is a way from one node to another: whoever dials, From is its IP.
type Path struct {
	Transport Transport
	From, To  string
}

// String returns the path as a test name.
func (p Path) String() string { return fmt.Sprintf("%s %s-%s", p.Transport, p.From, p.To) }

// Node is a host on a Net.
type Node struct {
	host.Host
	net *Net
	ips []string
	cm  *quicreuse.ConnManager

	stop sync.Once

	mu     sync.Mutex        // guards all below
	routes map[string]string // from which IP the node dials which
	held   chan struct{}     // closed when dials may go on; nil: they may
}

// NewNode returns a host that listens on TCP and QUIC at each of ips. Its key, and so
// its peer ID, follows from the first of them. It is closed with the test.
func (n *Net) NewNode(ips []string, opts ...libp2p.Option) *Node {
	n.t.Helper()
	d := &Node{net: n, ips: ips, routes: make(map[string]string)}
	seed := d.secret(0)
	std := ed25519.NewKeyFromSeed(seed[:])
	key, _, err := crypto.KeyPairFromStdKey(&std)
	if err != nil {
		n.t.Fatalf("key of %s: %v", ips[0], err)
	}
	d.cm, err = d.quic()
	if err != nil {
		n.t.Fatalf("QUIC of %s: %v", ips[0], err)
	}
	var listen []ma.Multiaddr
	for _, ip := range ips {
		listen = append(listen, Addr(TCP, ip), Addr(QUIC, ip))
	}
	d.Host, err = libp2p.New(append([]libp2p.Option{
		libp2p.Identity(key),
		libp2p.ListenAddrs(listen...),
		libp2p.QUICReuse(func() *quicreuse.ConnManager { return d.cm }),
		libp2p.Transport(libp2pquic.NewTransport),
		libp2p.Transport(func(u transport.Upgrader, rcmgr network.ResourceManager) *tcpTransport {
			return &tcpTransport{d, u, rcmgr}
		}),
		libp2p.DisableIdentifyAddressDiscovery(), // it keeps virtual time from passing
		libp2p.DisableMetrics(),
	}, opts...)...)
	if err != nil {
		n.t.Fatalf("host at %s: %v", ips[0], err)
	}
	n.t.Cleanup(d.Stop)
	return d
}

// Stop ends the node. Another that is made with the same IPs takes its place: it has the
// same key, and nothing of what the first one knew.
func (d *Node) Stop() {
	d.stop.Do(func() {
		_ = d.Close()
		_ = d.cm.Close() // a host leaves one that it has not made itself
	})
}

// Addr returns the address of a node's IP.
func Addr(tr Transport, ip string) ma.Multiaddr {
	if tr == TCP {
		return ma.StringCast("/ip4/" + ip + "/tcp/4001")
	}
	return ma.StringCast("/ip4/" + ip + "/udp/4001/quic-v1")
}

func (d *Node) secret(purpose byte) [32]byte {
	return sha256.Sum256(append([]byte{purpose}, d.ips[0]...))
}

// source is the IP from which the node dials another. Every dial asks for it first, and
// waits here while dials are held back.
func (d *Node) source(to string) string {
	d.mu.Lock()
	held := d.held
	d.mu.Unlock()
	if held != nil {
		<-held
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if from, ok := d.routes[to]; ok {
		return from
	}
	return d.ips[0]
}

// Dial connects d to other over path, like Net.Dial, and returns d's side as soon as it is
// there. It is for tests in which a dial may fail.
func (d *Node) Dial(ctx context.Context, other *Node, path Path) (network.Conn, error) {
	d.mu.Lock()
	d.routes[path.To] = path.From
	d.mu.Unlock()
	d.Peerstore().ClearAddrs(other.ID())
	d.Peerstore().AddAddr(other.ID(), Addr(path.Transport, path.To), peerstore.PermanentAddrTTL)
	return d.Network().DialPeer(network.WithForceDirectDial(ctx, "test"), other.ID())
}

// Dial connects a to b over path, and returns a's side. Between the two there must be no
// other connection than relayed ones: go-libp2p would return that.
func (n *Net) Dial(a, b *Node, path Path) network.Conn {
	n.t.Helper()
	if _, err := a.Dial(n.ctx(), b, path); err != nil {
		n.t.Fatalf("dial over %s: %v", path, err)
	}
	identified(a, b)
	return n.side(a, b, path)
}

// Join connects a and b twice, over first, which a dials, and over second, which b
// dials at the same time, since a dial that begins later would be given the connection
// that is there. It returns a's side of both.
func (n *Net) Join(a, b *Node, first, second Path) (network.Conn, network.Conn) {
	n.t.Helper()
	held := make(chan struct{})
	hold := func(ch chan struct{}) {
		for _, d := range []*Node{a, b} {
			d.mu.Lock()
			d.held = ch
			d.mu.Unlock()
		}
	}
	hold(held)
	results := make(chan error, 2)
	dial := func(from, to *Node, path Path) {
		_, err := from.Dial(n.ctx(), to, path)
		results <- err
	}
	go dial(a, b, first)
	go dial(b, a, second)
	synctest.Wait() // both have seen that there is no connection
	hold(nil)
	close(held)
	for range cap(results) {
		if err := <-results; err != nil {
			n.t.Fatalf("join over %s and %s: %v", first, second, err)
		}
	}
	identified(a, b)
	return n.side(a, b, first), n.side(a, b, Path{second.Transport, second.To, second.From})
}

// side returns a's side of its connection to b over path.
func (n *Net) side(a, b *Node, path Path) network.Conn {
	n.t.Helper()
	has := func(m ma.Multiaddr, ip string) bool {
		s := m.String()
		return strings.HasPrefix(s, "/ip4/"+ip+"/") && strings.HasSuffix(s, "/quic-v1") == (path.Transport == QUIC) &&
			!strings.Contains(s, "/p2p-circuit")
	}
	conns := a.Network().ConnsToPeer(b.ID())
	for _, c := range conns {
		if has(c.LocalMultiaddr(), path.From) && has(c.RemoteMultiaddr(), path.To) {
			return c
		}
	}
	n.t.Fatalf("no connection over %s among %v", path, conns)
	return nil
}

// Far returns b's side of a's connection c.
func (n *Net) Far(b *Node, c network.Conn) network.Conn {
	n.t.Helper()
	conns := b.Network().ConnsToPeer(c.LocalPeer())
	i := slices.IndexFunc(conns, func(d network.Conn) bool {
		if relayed(c) || relayed(d) {
			return relayed(c) && relayed(d)
		}
		return d.RemoteMultiaddr().Equal(c.LocalMultiaddr()) && d.LocalMultiaddr().Equal(c.RemoteMultiaddr())
	})
	if i < 0 {
		n.t.Fatalf("no other side of %v among %v", c, conns)
	}
	return conns[i]
}

func relayed(c network.Conn) bool {
	return strings.Contains(c.RemoteMultiaddr().String(), "/p2p-circuit")
}

// NewRelay returns a node that relays. Without options its limits are go-libp2p's
// defaults.
func (n *Net) NewRelay(ip string, opts ...relay.Option) *Node {
	n.t.Helper()
	d := n.NewNode([]string{ip}, libp2p.ForceReachabilityPublic())
	r, err := relay.New(d.Host, opts...)
	if err != nil {
		n.t.Fatalf("relay at %s: %v", ip, err)
	}
	n.t.Cleanup(func() { _ = r.Close() })
	return d
}

// DialRelayed connects a to b through the relay r, both of which reach it over tr from
// their first IP, and returns a's side.
func (n *Net) DialRelayed(a, b, r *Node, tr Transport) network.Conn {
	n.t.Helper()
	ctx := n.ctx()
	at := Addr(tr, r.ips[0])
	for _, d := range []*Node{a, b} {
		if _, err := d.Dial(ctx, r, Path{tr, d.ips[0], r.ips[0]}); err != nil {
			n.t.Fatalf("dial the relay: %v", err)
		}
	}
	if _, err := client.Reserve(ctx, b.Host, peer.AddrInfo{ID: r.ID(), Addrs: []ma.Multiaddr{at}}); err != nil {
		n.t.Fatalf("reserve at the relay: %v", err)
	}
	a.Peerstore().ClearAddrs(b.ID())
	a.Peerstore().AddAddr(b.ID(), ma.StringCast(fmt.Sprintf("%s/p2p/%s/p2p-circuit", at, r.ID())), peerstore.PermanentAddrTTL)
	c, err := a.Network().DialPeer(network.WithAllowLimitedConn(ctx, "test"), b.ID())
	if err != nil {
		n.t.Fatalf("dial through the relay: %v", err)
	}
	identified(a, b)
	return c
}

func (n *Net) ctx() context.Context {
	ctx, cancel := context.WithTimeout(n.t.Context(), time.Minute)
	n.t.Cleanup(cancel)
	return ctx
}

// identified waits until a and b have identified each other on all connections, and
// nothing is under way any more.
func identified(a, b *Node) {
	time.Sleep(settled)
	for _, pair := range [][2]*Node{{a, b}, {b, a}} {
		for _, c := range pair[0].Network().ConnsToPeer(pair[1].ID()) {
			<-pair[0].Host.(interface{ IDService() identify.IDService }).IDService().IdentifyWait(c)
		}
	}
	time.Sleep(settled)
	synctest.Wait()
}

// settled is enough for a handshake and for identify over any latency below 100 ms.
const settled = time.Second
