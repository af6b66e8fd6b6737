package faults

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	ma "github.com/multiformats/go-multiaddr"
	msmux "github.com/multiformats/go-multistream"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/internal/faultproxy"
	. "github.com/go-portage/portage/internal/hosttest"
	"github.com/go-portage/portage/migrate"
)

// Two hosts with two connections between them, each over a path that can fail:
//
//	        .---- proxy ---- old ----.
//	opener <                          > acceptor
//	        '---- proxy ---- new ----'
//
// Where a connection is relayed, the relay stands behind the proxy, and both hosts reach
// it through that.

// testID is the protocol of the streams that migrate.
const testID protocol.ID = "/test/fault/1.0.0"

// attempt is how long join waits for its connections before it begins again. What got
// lost does not come any more.
const attempt = 30 * time.Second

// The ends of a stream, and the connections of a link, as indices.
const (
	opener   = 0
	acceptor = 1

	oldConn = 0
	newConn = 1
)

func endName(side int) string { return []string{"opener", "acceptor"}[side] }
func connName(i int) string   { return []string{"old", "new"}[i] }

// link is the two hosts.
type link struct {
	steps
	over  [2]Transport // of each connection
	lasts bool         // its streams may outlive a connection
	nodes [2]*Node
	hosts [2]*migrate.Host
	relay *Node // nil where no connection is relayed

	paths    [2]*faultproxy.Proxy
	conns    [2][2]network.Conn // conns[side][i] is the side's end of connection i
	opensOn  atomic.Int32       // the connection that new streams are opened on
	accepted chan *migrate.Stream
}

// newLink wraps two hosts. They are not connected yet.
func newLink(t testing.TB, from, to Transport, opts ...migrate.Option) *link {
	t.Helper()
	l := newNodes(t, from, to, libp2p.Muxer(yamux.ID, patientYamux()))
	for side := range l.nodes {
		l.wrap(t, side, opts...)
	}
	return l
}

// newNodes is newLink without the wrapping, and with a muxer.
func newNodes(t testing.TB, from, to Transport, muxer libp2p.Option) *link {
	t.Helper()
	l := &link{over: [2]Transport{from, to}, accepted: make(chan *migrate.Stream, 100)}
	listen := []Transport{from}
	if from != to {
		listen = append(listen, to)
	}
	for side := range l.nodes {
		l.nodes[side] = New(t, listen, libp2p.DisableMetrics(), muxer)
	}
	for _, tr := range l.over {
		if tr == Relay {
			l.relay = newRelay(t)
		}
	}
	return l
}

// patientYamux does not close a connection whose path takes nothing for 10 s, as yamux does
// otherwise: on a busy machine a path stays frozen for longer while a test goes on beside
// it. What has to be given up the tests give up themselves.
func patientYamux() *yamux.Transport {
	cfg := *yamux.DefaultTransport.Config()
	cfg.ConnectionWriteTimeout = time.Hour
	return (*yamux.Transport)(&cfg)
}

// newRelay returns a relay that has no limits, and is as patient as the hosts.
func newRelay(t testing.TB) *Node {
	t.Helper()
	n := New(t, []Transport{TCP}, libp2p.ForceReachabilityPublic(), libp2p.Muxer(yamux.ID, patientYamux()))
	r, err := relay.New(n.Host, relay.WithInfiniteLimits())
	require.NoError(t, err)
	t.Cleanup(func() { _ = r.Close() })
	return n
}

func (l *link) wrap(t testing.TB, side int, opts ...migrate.Option) {
	t.Helper()
	opts = append([]migrate.Option{
		migrate.WithTracer(l.trace),
		migrate.WithNegotiationTimeout(Patience), // a new stream is open while its exchange is held
		migrate.WithConnSelector(func(context.Context, peer.ID) network.Conn { return l.conns[side][l.opensOn.Load()] }),
	}, opts...)
	h, err := migrate.Wrap(l.nodes[side], opts...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = h.Close() })
	l.hosts[side] = h
	if side == acceptor {
		h.SetStreamHandler(testID, func(s network.Stream) { l.accepted <- s.(*migrate.Stream) })
	}
}

// joined is newLink, with both connections.
func joined(t testing.TB, from, to Transport, opts ...migrate.Option) *link {
	t.Helper()
	l := newLink(t, from, to, opts...)
	l.join(t)
	return l
}

// join makes both connections, over new proxies. On a busy machine a dial times out, and
// once in a while one end of a WebRTC connection is up and the other never is; then it
// begins again.
func (l *link) join(t testing.TB) {
	t.Helper()
	for range 5 {
		if l.tryJoin(t) {
			return
		}
		t.Log("the hosts do not get two connections; once more")
		l.part(t)
	}
	t.Fatal("the hosts do not get two connections")
}

func (l *link) tryJoin(t testing.TB) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), attempt)
	defer cancel()
	a, b := l.nodes[opener], l.nodes[acceptor]
	for _, n := range l.nodes {
		TellsAll(t, n.Host)
	}
	switch {
	case l.relay != nil:
		relayed := oldConn
		if l.over[newConn] == Relay {
			relayed = newConn
		}
		if err := l.dialRelayed(t, ctx, relayed); err != nil {
			t.Log(err)
			return false
		}
		direct := 1 - relayed
		l.paths[direct] = faultproxy.New(t, b.Addr(t, l.over[direct]))
		a.Know(b, l.paths[direct].Addr())
		if _, err := a.Network().DialPeer(network.WithForceDirectDial(ctx, "test"), b.ID()); err != nil {
			t.Log(err)
			return false
		}
		for side, n := range l.nodes {
			for i, tr := range l.over {
				l.conns[side][i] = find(ctx, n, l.nodes[1-side], func(c network.Conn) bool {
					return (Of(c.RemoteMultiaddr()) == Relay) == (tr == Relay)
				})
			}
		}
	default:
		l.paths[oldConn] = faultproxy.New(t, b.Addr(t, l.over[oldConn]))
		l.paths[newConn] = faultproxy.New(t, a.Addr(t, l.over[newConn]))
		if err := l.dialBoth(t, ctx); err != nil {
			t.Log(err)
			return false
		}
		for side, n := range l.nodes {
			for i, dir := range []network.Direction{network.DirOutbound, network.DirInbound} {
				if side == acceptor {
					dir = network.DirOutbound + network.DirInbound - dir
				}
				l.conns[side][i] = find(ctx, n, l.nodes[1-side], func(c network.Conn) bool {
					return c.Stat().Direction == dir
				})
			}
		}
	}
	for side, n := range l.nodes {
		for _, c := range l.conns[side] {
			if c == nil {
				return false
			}
			select {
			case <-n.Host.(interface{ IDService() identify.IDService }).IDService().IdentifyWait(c):
			case <-ctx.Done():
				t.Log("the hosts do not identify each other")
				return false
			}
		}
		// IdentifyWait returns where identify has failed, too.
		other := l.nodes[1-side]
		if !soon(ctx, func() bool {
			handled := other.Mux().Protocols()
			known, err := n.Peerstore().SupportsProtocols(other.ID(), handled...)
			return err == nil && len(known) == len(handled)
		}) {
			t.Log("the hosts do not learn of each other's protocols")
			return false
		}
	}
	return true
}

// dialBoth makes the acceptor and the opener dial each other. A dial that begins when
// there is a connection already returns that; so one of them is held back on its path
// until the other is done.
func (l *link) dialBoth(t testing.TB, ctx context.Context) error {
	t.Helper()
	// Datagrams that were held back are sent again only after a while.
	held := oldConn
	if l.paths[oldConn].Datagrams() {
		held = newConn
	}
	dial := func(i int) error {
		from, to := l.nodes[i], l.nodes[1-i] // the opener dials the old one
		from.Know(to, l.paths[i].Addr())
		_, err := from.Network().DialPeer(ctx, to.ID())
		return err
	}
	l.paths[held].Freeze()
	result := make(chan error, 1)
	go func() { result <- dial(held) }()
	WaitFor(t, "the dial that is held back", func() bool { return l.paths[held].Dialled() > 0 })
	if err := dial(1 - held); err != nil {
		l.paths[held].Cut()
		<-result
		return err
	}
	for side, n := range l.nodes {
		if !soon(ctx, func() bool { return len(n.Network().ConnsToPeer(l.nodes[1-side].ID())) == 1 }) {
			l.paths[held].Cut()
			<-result
			return errors.New("the first connection has one end only")
		}
	}
	l.paths[held].Thaw()
	return <-result
}

func (l *link) dialRelayed(t testing.TB, ctx context.Context, i int) error {
	t.Helper()
	l.paths[i] = faultproxy.New(t, l.relay.Addr(t, TCP))
	info := peer.AddrInfo{ID: l.relay.ID(), Addrs: []ma.Multiaddr{l.paths[i].Addr()}}
	for _, n := range l.nodes {
		n.Know(l.relay, l.paths[i].Addr())
		if err := n.Connect(ctx, info); err != nil {
			return err
		}
	}
	if _, err := client.Reserve(ctx, l.nodes[acceptor].Host, info); err != nil {
		return err
	}
	l.nodes[opener].Know(l.nodes[acceptor], ma.StringCast(fmt.Sprintf("%s/p2p/%s/p2p-circuit", info.Addrs[0], info.ID)))
	_, err := l.nodes[opener].Network().DialPeer(ctx, l.nodes[acceptor].ID())
	return err
}

// find waits for a connection. It returns nil where none comes.
func find(ctx context.Context, n, other *Node, is func(network.Conn) bool) (found network.Conn) {
	soon(ctx, func() bool {
		for _, c := range n.Network().ConnsToPeer(other.ID()) {
			if is(c) {
				found = c
			}
		}
		return found != nil
	})
	return found
}

// soon waits until cond holds, and says whether that comes to pass.
func soon(ctx context.Context, cond func() bool) bool {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return false
		}
	}
	return true
}

// giveUp closes connection i at both ends, as a transport does once it has noticed that
// its path is dead.
func (l *link) giveUp(i int) {
	for side, n := range l.nodes {
		if l.over[i] == Relay {
			_ = n.Network().ClosePeer(l.relay.ID())
		}
		switch c := l.conns[side][i]; {
		case c == nil:
		case l.lasts: // Close would say that nobody wants its streams back
			_ = c.CloseWithError(network.ConnSupplanted)
		default:
			_ = c.Close()
		}
	}
}

// dialNobody is for hosts whose connections the test makes, and no other.
func dialNobody(context.Context, peer.AddrInfo) error { return errors.New("the test dials") }

// awaitDeath waits until both ends know that connection i is dead, and helps where one
// does not: the end of a WebRTC connection can get lost, and the other end then learns of
// it only after half a minute.
func (l *link) awaitDeath(i int) {
	for range 500 {
		if l.conns[opener][i].IsClosed() && l.conns[acceptor][i].IsClosed() {
			return
		}
		<-time.After(10 * time.Millisecond)
	}
	l.giveUp(i)
}

// part closes everything between the hosts, and waits until nothing is left of it.
func (l *link) part(t testing.TB) {
	t.Helper()
	defer func(lasts bool) { l.lasts = lasts }(l.lasts)
	l.lasts = false
	for i, p := range l.paths {
		l.giveUp(i)
		if p != nil {
			p.Close()
		}
	}
	for side, n := range l.nodes {
		_ = n.Network().ClosePeer(l.nodes[1-side].ID())
	}
	for side, n := range l.nodes {
		WaitFor(t, fmt.Sprintf("the %s's connections to end", endName(side)), func() bool {
			return len(n.Network().ConnsToPeer(l.nodes[1-side].ID())) == 0 &&
				(l.relay == nil || len(n.Network().ConnsToPeer(l.relay.ID())) == 0)
		})
	}
}

// open opens a labelled stream on connection i, and returns both ends.
func (l *link) open(t testing.TB, i int) (ends [2]*migrate.Stream) {
	t.Helper()
	s := l.newStream(t, i)
	_, err := s.Write([]byte{'!'})
	require.NoError(t, err)
	select {
	case far := <-l.accepted:
		ends = [2]*migrate.Stream{s, far}
	case <-time.After(Patience):
		t.Fatal("the stream does not arrive")
	}
	n, err := ends[acceptor].Read(make([]byte, 1))
	require.NoError(t, err)
	require.Equal(t, 1, n)
	return ends
}

// newStream opens a labelled stream on connection i. Nothing is sent before its first
// Write or Read. Where that does not take one at once, as on a busy machine, a host opens it on the
// other connection: such a one is not used.
func (l *link) newStream(t testing.TB, i int) *migrate.Stream {
	t.Helper()
	l.opensOn.Store(int32(i))
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	for {
		s, err := l.hosts[opener].NewStream(ctx, l.nodes[acceptor].ID(), testID)
		require.NoError(t, err)
		if s.Conn() == l.conns[opener][i] {
			return s.(*migrate.Stream)
		}
		require.NoError(t, s.Reset())
	}
}

// rawID is the protocol of streams that do not migrate.
const rawID protocol.ID = "/test/raw/1.0.0"

// raw opens a stream that is not labelled on connection i, and returns both ends.
func (l *link) raw(t testing.TB, i int) (ends [2]network.Stream) {
	t.Helper()
	accepted := make(chan network.Stream, 1)
	l.nodes[acceptor].SetStreamHandler(rawID, func(s network.Stream) { accepted <- s })
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	u, err := l.conns[opener][i].NewStream(ctx)
	require.NoError(t, err)
	require.NoError(t, msmux.SelectProtoOrFail(rawID, u))
	return [2]network.Stream{u, await(t, accepted, "the raw stream")}
}

// moving migrates a stream to connection i beside the test. The channel brings the result.
func (l *link) moving(side int, s *migrate.Stream, i int) <-chan error {
	done := make(chan error, 1)
	go func() { done <- l.hosts[side].Migrate(context.Background(), s, l.conns[side][i]) }()
	return done
}

// nothingLeft checks L5, and that every underlying stream is freed, on connections that
// live and on those that do not.
func (l *link) nothingLeft(t testing.TB) {
	t.Helper()
	for side, h := range l.hosts {
		if h == nil {
			continue
		}
		for i, c := range l.conns[side] {
			what := fmt.Sprintf("the %s to have nothing on the %s connection", endName(side), connName(i))
			WaitFor(t, what, func() bool { return len(h.Streams(c)) == 0 && len(ownStreams(c)) == 0 })
		}
	}
}

// ownStreams are the streams of a connection that are not libp2p's own.
func ownStreams(c network.Conn) (own []network.Stream) {
	for _, s := range c.GetStreams() {
		if p := s.Protocol(); p == testID || p == migrate.ID || p == "" && s.Stat().Direction == network.DirOutbound {
			own = append(own, s)
		}
	}
	return own
}

// goroutinesOf returns the stacks of all goroutines that have all of that in them, each with
// an empty line behind it.
func goroutinesOf(what ...string) string {
	buf := make([]byte, 16<<20)
	var stacks strings.Builder
	for g := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		if !slices.ContainsFunc(what, func(w string) bool { return !strings.Contains(g, w) }) {
			stacks.WriteString(strings.TrimSpace(g) + "\n\n")
		}
	}
	return stacks.String()
}

// steps lets tests hold an exchange at a step.
type steps struct {
	mu    sync.Mutex // guards all below
	holds map[point]*hold
	took  map[point]error
}

// point is a step of one side of the migration of a stream.
type point struct {
	s         *migrate.Stream
	initiator bool
	kind      migrate.EventKind
}

// hold stops an exchange.
type hold struct {
	reached chan struct{} // closed when the exchange is there
	release func()        // lets it go on
	on      chan struct{}
}

func (st *steps) trace(e migrate.Event) {
	if e.Kind == migrate.Finished && e.Initiator {
		done.moves.Add(1)
	}
	at := point{e.Stream, e.Initiator, e.Kind}
	st.mu.Lock()
	h := st.holds[at]
	delete(st.holds, at)
	if st.took == nil {
		st.took = make(map[point]error)
	}
	st.took[at] = e.Err
	st.mu.Unlock()
	if h != nil {
		close(h.reached)
		<-h.on
	}
}

// hold stops the exchange of one side when it takes the step for the first time from now.
func (st *steps) hold(t testing.TB, at point) *hold {
	h := &hold{reached: make(chan struct{}), on: make(chan struct{})}
	h.release = sync.OnceFunc(func() { close(h.on) })
	t.Cleanup(h.release)
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.holds == nil {
		st.holds = make(map[point]*hold)
	}
	st.holds[at] = h
	return h
}

// has says whether one side has taken a step, and with what error.
func (st *steps) has(at point) (bool, error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	err, ok := st.took[at]
	return ok, err
}

// failure is what the Failed step of a side said, nil where there was none.
func (st *steps) failure(s *migrate.Stream, initiator bool) error {
	_, err := st.has(point{s, initiator, migrate.Failed})
	return err
}

// forget drops what is known of streams that are gone.
func (st *steps) forget() {
	st.mu.Lock()
	defer st.mu.Unlock()
	clear(st.took)
	clear(st.holds)
}

// await waits for what must happen.
func await[T any](t testing.TB, ch <-chan T, what string) (v T) {
	t.Helper()
	timer := time.NewTimer(Patience)
	defer timer.Stop()
	select {
	case v = <-ch:
	case <-timer.C:
		t.Fatalf("timed out waiting for: %s", what)
	}
	return v
}
