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

	mu     sync.Mutex       // guards all below
	routes map[string]route // by the IP that is dialled
	held   chan struct{}    // closed when dials may go on; nil: they may
}

// route is how a node dials an IP: from which one of its own, and how long after it
// was told to.
type route struct {
	from  string
	after time.Duration
}

// NewNode returns a host that listens on TCP and QUIC at each of ips. Its key, and so
// its peer ID, follows from the first of them. It is closed with the test.
func (n *Net) NewNode(ips []string, opts ...libp2p.Option) *Node {
	n.t.Helper()
	return n.newNode(ips[0], ips, []Transport{TCP, QUIC}, opts)
}

// NewReplica returns a host with the key, and so the peer ID, of the node whose first IP
// is of, at IPs of its own.
func (n *Net) NewReplica(of string, ips []string, opts ...libp2p.Option) *Node {
	n.t.Helper()
	return n.newNode(of, ips, []Transport{TCP, QUIC}, opts)
}

// NewTCPNode returns one without QUIC, which private networks do not allow.
func (n *Net) NewTCPNode(ips []string, opts ...libp2p.Option) *Node {
	n.t.Helper()
	return n.newNode(ips[0], ips, []Transport{TCP}, opts)
}

func (n *Net) newNode(keyed string, ips []string, transports []Transport, opts []libp2p.Option) *Node {
	n.t.Helper()
	d := &Node{net: n, ips: ips, routes: make(map[string]route)}
	key, err := keyOf(keyed)
	if err != nil {
		n.t.Fatalf("key of %s: %v", keyed, err)
	}
	d.cm, err = d.quic()
	if err != nil {
		n.t.Fatalf("QUIC of %s: %v", ips[0], err)
	}
	var listen []ma.Multiaddr
	for _, ip := range ips {
		for _, tr := range transports {
			listen = append(listen, Addr(tr, ip))
		}
	}
	all := []libp2p.Option{
		libp2p.Identity(key),
		libp2p.ListenAddrs(listen...),
		libp2p.Transport(func(u transport.Upgrader, rcmgr network.ResourceManager) *tcpTransport {
			return &tcpTransport{d, u, rcmgr}
		}),
		libp2p.DisableIdentifyAddressDiscovery(), // it keeps virtual time from passing
		libp2p.DisableMetrics(),
	}
	if slices.Contains(transports, QUIC) {
		all = append(all, libp2p.QUICReuse(func() *quicreuse.ConnManager { return d.cm }),
			libp2p.Transport(libp2pquic.NewTransport))
	}
	d.Host, err = libp2p.New(append(all, opts...)...)
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

// IPs returns the node's IPs.
func (d *Node) IPs() []string { return slices.Clone(d.ips) }

// Addr returns the address of a node's IP.
func Addr(tr Transport, ip string) ma.Multiaddr {
	if tr == TCP {
		return ma.StringCast("/ip4/" + ip + "/tcp/4001")
	}
	return ma.StringCast("/ip4/" + ip + "/udp/4001/quic-v1")
}

// secret is what a node whose first IP this is keeps to itself.
func secret(purpose byte, ip string) [32]byte {
	return sha256.Sum256(append([]byte{purpose}, ip...))
}

func keyOf(ip string) (crypto.PrivKey, error) {
	seed := secret(0, ip)
	std := ed25519.NewKeyFromSeed(seed[:])
	key, _, err := crypto.KeyPairFromStdKey(&std)
	return key, err
}

// ID returns the peer ID of the node whose first IP this is.
func (n *Net) ID(ip string) peer.ID {
	n.t.Helper()
	key, err := keyOf(ip)
	if err != nil {
		n.t.Fatalf("key of %s: %v", ip, err)
	}
	id, err := peer.IDFromPrivateKey(key)
	if err != nil {
		n.t.Fatalf("peer ID of %s: %v", ip, err)
	}
	return id
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
	r, ok := d.routes[to]
	d.mu.Unlock()
	if !ok {
		return d.ips[0]
	}
	time.Sleep(r.after)
	return r.from
}

// Dial connects d to other over path, like Net.Dial, and returns d's side as soon as it is
// there. It is for tests in which a dial may fail.
func (d *Node) Dial(ctx context.Context, other *Node, path Path) (network.Conn, error) {
	return d.dial(ctx, other, path, 0)
}

// dial does so after a while.
func (d *Node) dial(ctx context.Context, other *Node, path Path, after time.Duration) (network.Conn, error) {
	d.mu.Lock()
	d.routes[path.To] = route{path.From, after}
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
	for _, err := range n.DialTogether(
		Attempt{From: a, To: b, Path: first},
		Attempt{From: b, To: a, Path: second},
	) {
		if err != nil {
			n.t.Fatalf("join over %s and %s: %v", first, second, err)
		}
	}
	identified(a, b)
	return n.side(a, b, first), n.side(a, b, Path{second.Transport, second.To, second.From})
}

// Attempt is a dial from one node to another, over a path between their IPs.
type Attempt struct {
	From, To *Node
	Path     Path
	// After is how long after the others its first packet leaves. Of attempts of one
	// node to one IP, that of the last counts, and so does its Path.From.
	After time.Duration
}

// DialTogether makes all attempts, none of which finds the connection of another one,
// since none has left when the last begins. An attempt of a node that has tried the same
// peer already adds an address to what it dials. It returns the errors of all, in order,
// when the last has ended.
func (n *Net) DialTogether(attempts ...Attempt) []error {
	n.t.Helper()
	held := make(chan struct{})
	hold := func(ch chan struct{}) {
		for _, at := range attempts {
			at.From.mu.Lock()
			at.From.held = ch
			at.From.mu.Unlock()
		}
	}
	hold(held)

	// A peer's next address must be told when the last one has been seen.
	var turns [][]int
	count := make(map[[2]*Node]int)
	for i, at := range attempts {
		pair := [2]*Node{at.From, at.To}
		turn := count[pair]
		count[pair]++
		if turn == len(turns) {
			turns = append(turns, nil)
		}
		turns[turn] = append(turns[turn], i)
	}
	errs := make([]error, len(attempts))
	var dials sync.WaitGroup
	for _, turn := range turns {
		for _, i := range turn {
			at := attempts[i]
			dials.Go(func() { _, errs[i] = at.From.dial(n.ctx(), at.To, at.Path, at.After) })
		}
		synctest.Wait()
	}
	hold(nil)
	close(held)
	dials.Wait()
	return errs
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
	n.Reserve(b, r, tr)
	n.Reach(a, r, tr)
	c, err := a.DialThrough(n.ctx(), b, r, tr)
	if err != nil {
		n.t.Fatalf("dial through the relay: %v", err)
	}
	identified(a, b)
	return c
}

// JoinRelayed connects a and b through r twice: both dial at the same time. They must be
// some latency away from it.
func (n *Net) JoinRelayed(a, b, r *Node, tr Transport) {
	n.t.Helper()
	n.Reserve(a, r, tr)
	n.Reserve(b, r, tr)
	results := make(chan error, 2)
	for _, p := range [][2]*Node{{a, b}, {b, a}} {
		go func() {
			_, err := p[0].DialThrough(n.ctx(), p[1], r, tr)
			results <- err
		}()
	}
	for range cap(results) {
		if err := <-results; err != nil {
			n.t.Fatalf("dial through the relay: %v", err)
		}
	}
	identified(a, b)
	if count := len(a.Network().ConnsToPeer(b.ID())); count != 2 {
		n.t.Fatalf("%d relayed connections, not 2", count)
	}
}

// Reach connects d to the relay.
func (n *Net) Reach(d, r *Node, tr Transport) {
	n.t.Helper()
	if _, err := d.Dial(n.ctx(), r, Path{tr, d.ips[0], r.ips[0]}); err != nil {
		n.t.Fatalf("dial the relay: %v", err)
	}
}

// Reserve lets others reach d through the relay.
func (n *Net) Reserve(d, r *Node, tr Transport) {
	n.t.Helper()
	n.Reach(d, r, tr)
	info := peer.AddrInfo{ID: r.ID(), Addrs: []ma.Multiaddr{Addr(tr, r.ips[0])}}
	if _, err := client.Reserve(n.ctx(), d.Host, info); err != nil {
		n.t.Fatalf("reserve at the relay: %v", err)
	}
}

// DialThrough connects d to other through the relay r, and returns d's side as soon as it
// is there: d has reached the relay, and other has a reservation.
func (d *Node) DialThrough(ctx context.Context, other, r *Node, tr Transport) (network.Conn, error) {
	d.Peerstore().ClearAddrs(other.ID())
	d.Peerstore().AddAddr(other.ID(), ma.StringCast(fmt.Sprintf("%s/p2p/%s/p2p-circuit", Addr(tr, r.ips[0]), r.ID())), peerstore.PermanentAddrTTL)
	return d.Network().DialPeer(network.WithAllowLimitedConn(ctx, "test"), other.ID())
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
			pair[0].AwaitIdentify(c)
		}
	}
	time.Sleep(settled)
	synctest.Wait()
}

// AwaitIdentify waits until d knows what its peer on c speaks, or does not answer.
func (d *Node) AwaitIdentify(c network.Conn) {
	<-d.Host.(interface{ IDService() identify.IDService }).IDService().IdentifyWait(c)
}

// settled is enough for a handshake and for identify over any latency below 100 ms.
const settled = time.Second
