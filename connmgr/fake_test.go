package connmgr

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/connmgr"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	identifypb "github.com/libp2p/go-libp2p/p2p/protocol/identify/pb"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/multiformats/go-multistream"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"google.golang.org/protobuf/encoding/protodelim"

	"github.com/go-portage/portage/internal/hosttest"
	"github.com/go-portage/portage/migrate"
	"github.com/go-portage/portage/pb"
)

func TestMain(m *testing.M) { hosttest.Main(m) }

// inVirtualTime runs f where time passes only when nothing else can happen.
func inVirtualTime(t *testing.T, f func(t *testing.T)) {
	if raceEnabled && runtime.GOMAXPROCS(0) > 1 {
		t.Skip("the race runtime crashes on testing/synctest now and then, but with GOMAXPROCS=1: golang/go#78156")
	}
	synctest.Test(t, f)
}

const (
	us     peer.ID = "peer m"
	lower  peer.ID = "peer a" // decides for both
	higher peer.ID = "peer z"

	quicAddr  = "/ip4/1.2.3.4/udp/4001/quic-v1"
	tcpAddr   = "/ip4/1.2.3.4/tcp/4001"
	wsAddr    = "/ip4/1.2.3.4/tcp/4002/ws"
	relayAddr = "/ip4/5.6.7.8/udp/4001/quic-v1/p2p/12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA/p2p-circuit"

	// rtt is how long a fake migration takes.
	rtt = 100 * time.Millisecond
)

// world is a manager in a network of fakes, with one peer in the leading part.
type world struct {
	t     *testing.T
	m     *Manager
	net   *fakeNet
	mover *fakeMover
	peer  peer.ID
	logs  *observer.ObservedLogs
}

// newWorld makes a wrapped manager for a peer that migrates and runs a manager too.
func newWorld(t *testing.T, p peer.ID, opts ...Option) *world {
	w := newBareWorld(t, p, opts...)
	w.mover = newFakeMover()
	h := &fakeHost{net: w.net, cm: w.m, handlers: make(map[protocol.ID]network.StreamHandler)}
	require.NoError(t, w.m.adopt(h))
	w.m.attach(h, w.mover)
	w.net.identify(p, DrainID)
	return w
}

// newBareWorld makes a manager that is not wrapped, for a peer that runs none.
func newBareWorld(t *testing.T, p peer.ID, opts ...Option) *world {
	core, logs := observer.New(zapcore.DebugLevel)
	m, err := New(connmgr.NullConnMgr{}, append([]Option{WithLogger(zap.New(core))}, opts...)...)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	n := &fakeNet{conns: make(map[peer.ID][]*fakeConn), protocols: make(map[peer.ID][]protocol.ID), done: make(chan struct{})}
	t.Cleanup(func() { close(n.done) })
	n.notifiee = m.Notifee()
	n.identify(p)
	return &world{t: t, m: m, net: n, peer: p, logs: logs}
}

// connect opens a connection to the leading peer.
func (w *world) connect(addr string) *fakeConn { return w.net.connect(w.peer, addr, false) }

func (w *world) connectLimited() *fakeConn { return w.net.connect(w.peer, relayAddr, true) }

// relayedIn has the leading peer open a limited relayed connection.
func (w *world) relayedIn() *fakeConn {
	return w.net.connectFrom(network.DirInbound, w.peer, relayAddr, true)
}

// setInner has the manager decorate another connection manager. Its notifiee is not called.
func (w *world) setInner(inner connmgr.ConnManager) {
	w.m.inner, w.m.looks.inner, w.m.looks.exempt.inner, w.m.serves.exempt.inner = inner, inner, inner, inner
}

// pass lets virtual time pass.
func (w *world) pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// due returns the peers that a round is due for.
func (w *world) due() dueHeap {
	w.m.sched.mu.Lock()
	defer w.m.sched.mu.Unlock()
	return slices.Clone(w.m.sched.due)
}

// steered returns the ID of the connection that new streams to the leading peer go to; empty:
// the swarm chooses.
func (w *world) steered() string {
	if c := w.m.steer.choose(w.t.Context(), w.peer); c != nil {
		return c.ID()
	}
	return ""
}

// messages returns the log from info level up.
func (w *world) messages() []string {
	var lines []string
	for _, e := range w.logs.Filter(func(e observer.LoggedEntry) bool { return e.Level >= zap.InfoLevel }).All() {
		lines = append(lines, e.Message)
	}
	return lines
}

// incoming has the peer open a stream of the drain protocol on c, and returns its end.
func (w *world) incoming(c *fakeConn) *fakePipe {
	near, far := newPipe(c)
	near.id = DrainID
	c.set(func() { c.streams = append(c.streams, near) })
	go w.m.serves.handle(near)
	return far
}

// request has the peer send a request on c, and returns the answer; nil: there is none.
func (w *world) request(c *fakeConn, m *pb.DrainMessage) *pb.DrainMessage {
	far := w.incoming(c)
	require.NoError(w.t, writeDrain(far, m))
	synctest.Wait()
	answer, _ := readDrain(far)
	return answer
}

func drainMessage(lease uint32) *pb.DrainMessage {
	m := new(pb.Drain)
	if lease > 0 {
		m.Lease = &lease
	}
	return &pb.DrainMessage{Type: &pb.DrainMessage_Drain{Drain: m}}
}

func keepMessage() *pb.DrainMessage {
	return &pb.DrainMessage{Type: &pb.DrainMessage_Keep{Keep: &pb.Keep{}}}
}

// fakeNet is a network.Network of which only what a Manager uses works.
type fakeNet struct {
	network.Network
	notifiee network.Notifiee
	done     chan struct{} // closed at the end of the test

	mu        sync.Mutex
	conns     map[peer.ID][]*fakeConn
	serial    int
	protocols map[peer.ID][]protocol.ID
	limit     map[any]any // what the relay tells of limited connections that come
}

func (n *fakeNet) LocalPeer() peer.ID             { return us }
func (n *fakeNet) Peerstore() peerstore.Peerstore { return fakeBook{net: n} }

func (n *fakeNet) ConnsToPeer(p peer.ID) []network.Conn {
	n.mu.Lock()
	defer n.mu.Unlock()
	conns := make([]network.Conn, len(n.conns[p]))
	for i, c := range n.conns[p] {
		conns[i] = c
	}
	return conns
}

func (n *fakeNet) Conns() []network.Conn {
	n.mu.Lock()
	defer n.mu.Unlock()
	var conns []network.Conn
	for _, of := range n.conns {
		for _, c := range of {
			conns = append(conns, c)
		}
	}
	return conns
}

func (n *fakeNet) Peers() []peer.ID {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Collect(maps.Keys(n.conns))
}

// identify is what identify does: from then on p's protocols are known.
func (n *fakeNet) identify(p peer.ID, more ...protocol.ID) {
	n.set(p, append([]protocol.ID{identify.ID}, more...)...)
}

// set sets what the book has of p.
func (n *fakeNet) set(p peer.ID, ids ...protocol.ID) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.protocols[p] = ids
}

// forget makes p one that has not been identified.
func (n *fakeNet) forget(p peer.ID) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.protocols, p)
}

func (n *fakeNet) connect(p peer.ID, addr string, limited bool) *fakeConn {
	return n.connectFrom(network.DirOutbound, p, addr, limited)
}

func (n *fakeNet) connectFrom(dir network.Direction, p peer.ID, addr string, limited bool) *fakeConn {
	n.mu.Lock()
	n.serial++
	c := &fakeConn{
		net: n, id: fmt.Sprintf("conn-%d", n.serial), remote: p,
		addr: ma.StringCast(addr), limited: limited, opened: time.Now(), dir: dir,
	}
	if limited {
		c.extra = n.limit
	}
	n.conns[p] = append(n.conns[p], c)
	n.mu.Unlock()
	n.notifiee.Connected(n, c)
	return c
}

type fakeBook struct {
	peerstore.Peerstore
	net *fakeNet
}

func (b fakeBook) GetProtocols(p peer.ID) ([]protocol.ID, error) {
	b.net.mu.Lock()
	defer b.net.mu.Unlock()
	return slices.Clone(b.net.protocols[p]), nil
}

func (b fakeBook) SupportsProtocols(p peer.ID, ids ...protocol.ID) ([]protocol.ID, error) {
	all, err := b.GetProtocols(p)
	return slices.DeleteFunc(all, func(id protocol.ID) bool { return !slices.Contains(ids, id) }), err
}

// fakeConn is a connection with plain streams, which are only a number, and labelled
// ones. Its other end serves identify, and what a manager serves if the peer has been identified
// so.
type fakeConn struct {
	network.Conn
	net     *fakeNet
	id      string
	remote  peer.ID
	addr    ma.Multiaddr
	limited bool
	dir     network.Direction
	opened  time.Time
	extra   map[any]any
	blocks  chan struct{} // if set, CloseWithError does not return before it is closed
	local   ma.Multiaddr
	called  func(what string) // if set, told of each call

	mu       sync.Mutex
	plain    int
	labelled []*fakeStream
	coming   int         // underlying streams of migrations that are under way
	streams  []*fakePipe // of the manager's own, and of the peer's
	closed   bool
	closings int
	code     network.ConnErrorCode

	// The path.
	silent bool          // what is written arrives nowhere
	stuck  bool          // what is written is not taken: a Write does not return
	full   error         // no stream is to be had
	delay  time.Duration // of each answer
	moved  traffic       // what labelled streams have carried

	// The peer.
	pings    int                     // questions that were answered
	resets   network.StreamErrorCode // them, in place of an answer; 0: none
	asked    int                     // questions that came, answered or not
	refuses  string
	unread   int                                             // streams that only the other end has
	drains   int                                             // requests
	leases   []uint32                                        // that they asked for
	keeps    int                                             // requests
	answer   func(request *pb.DrainMessage) *pb.DrainMessage // if set, in place of what the peer answers
	instance uint64                                          // of the process at the other end; 0: 1
	noDrain  bool                                            // the peer does not serve it, whatever it advertises
	identity *identifypb.Identify
}

func (c *fakeConn) ID() string                    { return c.id }
func (c *fakeConn) RemotePeer() peer.ID           { return c.remote }
func (c *fakeConn) RemoteMultiaddr() ma.Multiaddr { c.tell("RemoteMultiaddr"); return c.addr }
func (c *fakeConn) LocalMultiaddr() ma.Multiaddr  { return c.local }
func (c *fakeConn) As(any) bool                   { return false }

func (c *fakeConn) tell(what string) {
	if c.called != nil {
		c.called(what)
	}
}

func (c *fakeConn) IsClosed() bool {
	c.tell("IsClosed")
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

func (c *fakeConn) Stat() network.ConnStats {
	c.tell("Stat")
	c.mu.Lock()
	defer c.mu.Unlock()
	return network.ConnStats{
		Stats:      network.Stats{Direction: c.dir, Opened: c.opened, Limited: c.limited, Extra: c.extra},
		NumStreams: c.plain + len(c.labelled) + c.coming + len(c.streams),
	}
}

func (c *fakeConn) GetStreams() []network.Stream {
	c.tell("GetStreams")
	c.mu.Lock()
	defer c.mu.Unlock()
	var streams []network.Stream
	for range c.plain {
		streams = append(streams, fakePlain{dir: network.DirInbound})
	}
	for range c.coming {
		streams = append(streams, fakePlain{dir: network.DirOutbound})
	}
	for _, s := range c.labelled {
		streams = append(streams, s)
	}
	for _, s := range c.streams {
		streams = append(streams, fakePlain{id: s.id})
	}
	return streams
}

func (c *fakeConn) Close() error { return c.CloseWithError(network.ConnNoError) }

func (c *fakeConn) CloseWithError(code network.ConnErrorCode) error {
	if c.blocks != nil {
		<-c.blocks
	}
	c.mu.Lock()
	c.closings++
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed, c.code = true, code
	streams := slices.Clone(c.streams)
	c.mu.Unlock()
	for _, s := range streams {
		_ = s.Reset()
	}
	c.net.mu.Lock()
	c.net.conns[c.remote] = slices.DeleteFunc(c.net.conns[c.remote], func(other *fakeConn) bool { return other == c })
	c.net.mu.Unlock()
	go c.net.notifiee.Disconnected(c.net, c)
	return nil
}

// pruned says whether the manager has closed it.
func (c *fakeConn) pruned() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed && c.code == network.ConnSupplanted
}

// setPlain sets the number of streams that are not labelled.
func (c *fakeConn) setPlain(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.plain = n
}

// open opens n labelled streams from this side.
func (c *fakeConn) open(n int) []*fakeStream { return c.openFrom(network.DirOutbound, n) }

// openTheirs opens n labelled streams from the peer's side.
func (c *fakeConn) openTheirs(n int) []*fakeStream { return c.openFrom(network.DirInbound, n) }

func (c *fakeConn) openFrom(dir network.Direction, n int) []*fakeStream {
	streams := make([]*fakeStream, n)
	for i := range streams {
		streams[i] = &fakeStream{conn: c, dir: dir}
		c.add(streams[i])
	}
	return streams
}

func (c *fakeConn) add(s *fakeStream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.labelled = append(c.labelled, s)
}

func (c *fakeConn) remove(s *fakeStream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.labelled = slices.DeleteFunc(c.labelled, func(other *fakeStream) bool { return other == s })
}

// count returns the number of labelled streams.
func (c *fakeConn) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.labelled)
}

// timesAsked returns how often the manager has asked to drain c.
func (c *fakeConn) timesAsked() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.drains
}

// timesAskedPath returns how often the manager has asked whether c works.
func (c *fakeConn) timesAskedPath() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.asked
}

// timesKept returns how often the manager has told the peer to keep c.
func (c *fakeConn) timesKept() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.keeps
}

// pipes returns the streams that the manager and its peer have open.
func (c *fakeConn) pipes() []*fakePipe {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.streams)
}

// set changes something of c.
func (c *fakeConn) set(change func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change()
}

// NewStream opens a stream to the other end.
func (c *fakeConn) NewStream(ctx context.Context) (network.Stream, error) {
	if allowed, _ := network.GetAllowLimitedConn(ctx); c.limited && !allowed {
		return nil, network.ErrLimitedConn
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.closed:
		return nil, network.ErrReset
	case c.full != nil:
		return nil, c.full
	}
	near, far := newPipe(c)
	near.write.stuck = c.stuck
	c.streams = append(c.streams, near)
	if c.silent {
		go func() { _, _ = io.Copy(io.Discard, far) }()
	} else if !c.stuck {
		go c.serve(far)
	}
	return near, nil
}

// serve is the other end of a stream.
func (c *fakeConn) serve(s *fakePipe) {
	defer s.Close()
	c.mu.Lock()
	noDrain, delay, identity := c.noDrain, c.delay, c.identity
	c.mu.Unlock()
	if delay > 0 {
		select {
		case <-time.After(delay):
		case <-c.net.done:
			return
		}
	}
	mux := multistream.NewMultistreamMuxer[protocol.ID]()
	mux.AddHandler(identify.ID, nil)
	got, _ := fakeBook{net: c.net}.SupportsProtocols(c.remote, DrainID)
	manages, asked := len(got) > 0 && !noDrain, false
	if manages {
		mux.AddHandler(DrainID, nil)
	}
	mux.AddHandlerWithFunc(PathID, func(id protocol.ID) bool {
		if id != PathID || asked { // or it is asked again
			return id == PathID && manages
		}
		asked = true
		c.mu.Lock()
		c.asked++
		resets := c.resets
		if resets == 0 {
			c.pings++
		}
		c.mu.Unlock()
		if resets != 0 {
			_ = s.ResetWithError(resets)
		}
		return manages && resets == 0
	}, nil)
	id, _, err := mux.Negotiate(s)
	switch {
	case err != nil:
	case id == PathID:
		_, _ = io.Copy(s, s)
	case id == identify.ID:
		if identity == nil {
			identity = &identifypb.Identify{SignedPeerRecord: []byte("record of " + c.remote)}
		}
		_, _ = protodelim.MarshalTo(s, identity)
	default:
		request, err := readDrain(s)
		if err != nil {
			_ = s.Reset()
			return
		}
		if answer := c.decide(request); answer != nil {
			_ = writeDrain(s, answer)
		}
	}
}

// decide is what the peer answers.
func (c *fakeConn) decide(request *pb.DrainMessage) *pb.DrainMessage {
	if request.GetHello() != nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.pings++ // it shows that the path works, as a question does
		return helloMessage(cmp.Or(c.instance, 1))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if request.GetKeep() != nil {
		c.keeps++
	} else {
		c.drains++
		c.leases = append(c.leases, request.GetDrain().GetLease())
	}
	switch {
	case c.answer != nil:
		return c.answer(request)
	case c.refuses != "":
		return refusedMessage(c.refuses)
	case request.GetKeep() != nil:
		return keptMessage()
	case c.unread > 0:
		return busyMessage(0)
	default:
		return drainedMessage()
	}
}

// fakePipe is one end of a stream that carries something.
type fakePipe struct {
	network.Stream
	conn        *fakeConn
	id          protocol.ID // guarded by conn.mu
	read, write *half
}

// half is what a pipe carries in one direction. What is written waits there.
type half struct {
	mu       sync.Mutex
	changed  sync.Cond
	buf      []byte
	closed   bool // nothing more comes
	reset    error
	stuck    bool // nothing is taken
	deadline time.Time
}

func newPipe(c *fakeConn) (near, far *fakePipe) {
	a, b := new(half), new(half)
	a.changed.L, b.changed.L = &a.mu, &b.mu
	return &fakePipe{conn: c, read: a, write: b}, &fakePipe{conn: c, read: b, write: a}
}

func (h *half) change(f func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f()
	h.changed.Broadcast()
}

func (h *half) late() bool { return !h.deadline.IsZero() && !time.Now().Before(h.deadline) }

func (s *fakePipe) Read(p []byte) (int, error) {
	h := s.read
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		switch {
		case h.reset != nil:
			return 0, h.reset
		case len(h.buf) > 0:
			n := copy(p, h.buf)
			h.buf = h.buf[n:]
			return n, nil
		case h.closed:
			return 0, io.EOF
		case h.late():
			return 0, os.ErrDeadlineExceeded
		}
		h.changed.Wait()
	}
}

func (s *fakePipe) Write(p []byte) (int, error) {
	h := s.write
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		switch {
		case h.reset != nil:
			return 0, h.reset
		case h.closed:
			return 0, errors.New("write after close")
		case !h.stuck:
			h.buf = append(h.buf, p...)
			h.changed.Broadcast()
			return len(p), nil
		}
		h.changed.Wait()
	}
}

func (s *fakePipe) Conn() network.Conn { return s.conn }

func (s *fakePipe) Protocol() protocol.ID {
	s.conn.mu.Lock()
	defer s.conn.mu.Unlock()
	return s.id
}

func (s *fakePipe) SetProtocol(id protocol.ID) error {
	s.conn.set(func() { s.id = id })
	return nil
}

func (s *fakePipe) Scope() network.StreamScope { return fakeScope{} }
func (s *fakePipe) Reset() error               { return s.end(network.ErrReset) }

func (s *fakePipe) Stat() network.Stats { return network.Stats{Direction: network.DirOutbound} }

func (s *fakePipe) ResetWithError(code network.StreamErrorCode) error {
	return s.end(&network.StreamError{ErrorCode: code, Remote: true})
}

// SetDeadline sets that of Read; a Write waits for nothing that a deadline could end.
func (s *fakePipe) SetDeadline(t time.Time) error {
	s.read.change(func() { s.read.deadline = t })
	time.AfterFunc(time.Until(t), func() { s.read.change(func() {}) })
	return nil
}

func (s *fakePipe) Close() error {
	s.gone()
	s.write.change(func() { s.write.closed = true })
	return nil
}

// end resets both directions: why is what the other end gets to read.
func (s *fakePipe) end(why error) error {
	s.gone()
	s.write.change(func() { s.write.reset = cmp.Or(s.write.reset, why) })
	s.read.change(func() { s.read.reset = cmp.Or(s.read.reset, error(network.ErrReset)) })
	return nil
}

func (s *fakePipe) gone() {
	s.conn.mu.Lock()
	defer s.conn.mu.Unlock()
	s.conn.streams = slices.DeleteFunc(s.conn.streams, func(other *fakePipe) bool { return other == s })
}

// fakePlain is a stream of which only the protocol is known.
type fakePlain struct {
	network.Stream
	id  protocol.ID
	dir network.Direction
}

func (s fakePlain) Protocol() protocol.ID { return cmp.Or(s.id, "/test/plain/1.0.0") }
func (s fakePlain) Stat() network.Stats   { return network.Stats{Direction: s.dir} }

type fakeScope struct{ network.StreamScope }

func (fakeScope) SetService(string) error        { return nil }
func (fakeScope) ReserveMemory(int, uint8) error { return nil }
func (fakeScope) ReleaseMemory(int)              {}

type fakeStream struct {
	network.Stream
	dir network.Direction

	mu   sync.Mutex
	conn *fakeConn
}

func (s *fakeStream) Protocol() protocol.ID { return "/test/labelled/1.0.0" }

func (s *fakeStream) Stat() network.Stats {
	s.Conn().(*fakeConn).tell("Stream.Stat")
	return network.Stats{Direction: s.dir}
}

func (s *fakeStream) Conn() network.Conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.conn
}

func (s *fakeStream) moveTo(c *fakeConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conn.remove(s)
	s.conn = c
	c.add(s)
}

// call is one call of Migrate.
type call struct {
	stream  network.Stream
	to      network.Conn
	at      time.Time
	limited bool // its context allows limited connections
}

// fakeMover migrates streams in one rtt.
type fakeMover struct {
	mu       sync.Mutex
	supports bool
	answer   func(s *fakeStream) error // in place of a migration; nil, or nil returned: migrate
	calls    []call
	running  int
	most     int // that were running at the same time
}

func newFakeMover() *fakeMover { return &fakeMover{supports: true} }

func (f *fakeMover) Supports(peer.ID) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.supports
}

func (f *fakeMover) Streams(c network.Conn) []network.Stream {
	fc := c.(*fakeConn)
	fc.mu.Lock()
	defer fc.mu.Unlock()
	streams := make([]network.Stream, len(fc.labelled))
	for i, s := range fc.labelled {
		streams[i] = s
	}
	return streams
}

func (f *fakeMover) Unlabelled(c network.Conn) []network.Stream {
	return slices.DeleteFunc(c.GetStreams(), func(s network.Stream) bool { _, ok := s.(*fakeStream); return ok })
}

func (f *fakeMover) Traffic(c network.Conn) traffic {
	fc := c.(*fakeConn)
	fc.mu.Lock()
	defer fc.mu.Unlock()
	return fc.moved
}

func (f *fakeMover) TrafficOfAll(map[network.Conn]*migrate.Traffic) {}

var errFakeReset = errors.New("reset by a fake")

func (f *fakeMover) Migrate(ctx context.Context, s network.Stream, to network.Conn) error {
	limited, _ := network.GetAllowLimitedConn(ctx)
	f.mu.Lock()
	f.calls = append(f.calls, call{s, to, time.Now(), limited})
	f.running++
	f.most = max(f.most, f.running)
	answer := f.answer
	f.mu.Unlock()
	target := to.(*fakeConn)
	target.set(func() { target.coming++ })
	defer func() {
		target.set(func() { target.coming-- })
		f.mu.Lock()
		f.running--
		f.mu.Unlock()
	}()
	select {
	case <-time.After(rtt):
	case <-ctx.Done():
		return ctx.Err()
	}
	fs := s.(*fakeStream)
	if answer != nil {
		if err := answer(fs); err != nil {
			if errors.Is(err, errHang) {
				<-ctx.Done()
				return ctx.Err()
			}
			return err
		}
	}
	switch {
	case target.IsClosed():
		return errFakeReset
	case target.limited && !limited:
		return network.ErrLimitedConn
	}
	fs.moveTo(target)
	return nil
}

// errHang as an answer is a migration that does not end.
var errHang = errors.New("hang")

func (f *fakeMover) setAnswer(answer func(s *fakeStream) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answer = answer
}

func (f *fakeMover) setSupports(supports bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.supports = supports
}

// made returns the calls so far.
func (f *fakeMover) made() []call {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.calls)
}

// callTimes returns when Migrate was called for s, since start.
func (f *fakeMover) callTimes(s network.Stream, start time.Time) []time.Duration {
	var times []time.Duration
	for _, c := range f.made() {
		if c.stream == s {
			times = append(times, c.at.Sub(start))
		}
	}
	return times
}

var _ mover = (*fakeMover)(nil)

type fakeHost struct {
	host.Host
	net *fakeNet
	cm  connmgr.ConnManager

	mu       sync.Mutex
	handlers map[protocol.ID]network.StreamHandler
}

func (h *fakeHost) Network() network.Network         { return h.net }
func (h *fakeHost) ConnManager() connmgr.ConnManager { return h.cm }
func (h *fakeHost) Mux() protocol.Switch             { return fakeMux{h: h} }

func (h *fakeHost) SetStreamHandler(id protocol.ID, handler network.StreamHandler) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.handlers[id] = handler
}

func (h *fakeHost) handler(id protocol.ID) network.StreamHandler {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.handlers[id]
}

type fakeMux struct {
	protocol.Switch
	h *fakeHost
}

func (m fakeMux) RemoveHandler(id protocol.ID) {
	m.h.mu.Lock()
	defer m.h.mu.Unlock()
	delete(m.h.handlers, id)
}

var errDeniedByFake = fmt.Errorf("fake peer: %w", migrate.ErrDenied)
