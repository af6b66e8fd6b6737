package connmgr

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
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
	"github.com/libp2p/go-libp2p/p2p/protocol/ping"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/multiformats/go-multistream"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

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
	require.NoError(t, w.m.claim(h))
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
	n := &fakeNet{conns: make(map[peer.ID][]*fakeConn), protocols: make(map[peer.ID][]protocol.ID)}
	n.notifiee = m.Notifee()
	n.identify(p)
	return &world{t: t, m: m, net: n, peer: p, logs: logs}
}

// connect opens a connection to the leading peer.
func (w *world) connect(addr string) *fakeConn { return w.net.connect(w.peer, addr, false) }

func (w *world) connectLimited() *fakeConn { return w.net.connect(w.peer, relayAddr, true) }

// pass lets virtual time pass.
func (w *world) pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// due returns the peers that a round is due for.
func (w *world) due() dueHeap {
	w.m.mu.Lock()
	defer w.m.mu.Unlock()
	return slices.Clone(w.m.due)
}

// messages returns the log from info level up.
func (w *world) messages() []string {
	var lines []string
	for _, e := range w.logs.Filter(func(e observer.LoggedEntry) bool { return e.Level >= zap.InfoLevel }).All() {
		lines = append(lines, e.Message)
	}
	return lines
}

// fakeNet is a network.Network of which only what a Manager uses works.
type fakeNet struct {
	network.Network
	notifiee network.Notifiee

	mu        sync.Mutex
	conns     map[peer.ID][]*fakeConn
	serial    int
	protocols map[peer.ID][]protocol.ID
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

func (n *fakeNet) Peers() []peer.ID {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Collect(maps.Keys(n.conns))
}

// identify is what identify does: from then on p's protocols are known.
func (n *fakeNet) identify(p peer.ID, more ...protocol.ID) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.protocols[p] = append([]protocol.ID{"/ipfs/id/1.0.0"}, more...)
}

// forget makes p one that has not been identified.
func (n *fakeNet) forget(p peer.ID) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.protocols, p)
}

func (n *fakeNet) connect(p peer.ID, addr string, limited bool) *fakeConn {
	n.mu.Lock()
	n.serial++
	c := &fakeConn{
		net: n, id: fmt.Sprintf("conn-%d", n.serial), remote: p,
		addr: ma.StringCast(addr), limited: limited, opened: time.Now(),
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
// ones.
type fakeConn struct {
	network.Conn
	net     *fakeNet
	id      string
	remote  peer.ID
	addr    ma.Multiaddr
	limited bool
	opened  time.Time
	blocks  chan struct{} // if set, CloseWithError does not return before it is closed
	local   ma.Multiaddr

	mu       sync.Mutex
	plain    int
	labelled []*fakeStream
	closed   bool
	closings int
	code     network.ConnErrorCode
	silent   bool               // nothing that is opened is answered
	pings    int                // that were answered
	refuses  string             // what the peer answers to drains, if anything
	unread   int                // streams that only the other end has
	drains   int                // messages that asked to drain
	answers  []*pb.DrainMessage // if set, what the peer answers to the first Drain
	noDrain  bool               // the peer does not serve it, whatever it advertises
	streams  []*fakePipe
	changed  chan struct{}
}

func (c *fakeConn) ID() string                    { return c.id }
func (c *fakeConn) RemotePeer() peer.ID           { return c.remote }
func (c *fakeConn) RemoteMultiaddr() ma.Multiaddr { return c.addr }
func (c *fakeConn) LocalMultiaddr() ma.Multiaddr  { return c.local }
func (c *fakeConn) As(any) bool                   { return false }

func (c *fakeConn) IsClosed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

func (c *fakeConn) Stat() network.ConnStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	return network.ConnStats{
		Stats:      network.Stats{Direction: network.DirOutbound, Opened: c.opened, Limited: c.limited},
		NumStreams: c.plain + len(c.labelled) + len(c.streams),
	}
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

// open opens n labelled streams.
func (c *fakeConn) open(n int) []*fakeStream {
	streams := make([]*fakeStream, n)
	for i := range streams {
		streams[i] = &fakeStream{conn: c}
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

// pipes returns the streams that the manager has open.
func (c *fakeConn) pipes() []*fakePipe {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.streams)
}

// NewStream opens a stream to the other end, which serves ping, and drain if it has been
// identified so.
func (c *fakeConn) NewStream(ctx context.Context) (network.Stream, error) {
	if allowed, _ := network.GetAllowLimitedConn(ctx); c.limited && !allowed {
		return nil, network.ErrLimitedConn
	}
	here, there := net.Pipe()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, network.ErrReset
	}
	s := &fakePipe{pipe: here, conn: c}
	c.streams = append(c.streams, s)
	if !c.silent {
		go c.serve(there, s)
	}
	return s, nil
}

// serve is the other end of a stream.
func (c *fakeConn) serve(s net.Conn, near *fakePipe) {
	defer s.Close()
	c.mu.Lock()
	noDrain := c.noDrain
	c.mu.Unlock()
	mux := multistream.NewMultistreamMuxer[protocol.ID]()
	mux.AddHandler(ping.ID, nil)
	if got, _ := (fakeBook{net: c.net}).SupportsProtocols(c.remote, DrainID); len(got) > 0 && !noDrain {
		mux.AddHandler(DrainID, nil)
	}
	id, _, err := mux.Negotiate(s)
	switch {
	case err != nil:
	case id == ping.ID:
		c.mu.Lock()
		c.pings++
		c.mu.Unlock()
		_, _ = io.Copy(s, s)
	default:
		c.serveDrain(s, near)
	}
}

func (c *fakeConn) serveDrain(s net.Conn, near *fakePipe) {
	out := &fakePipe{pipe: s, conn: c}
	for r := bufio.NewReader(s); ; {
		if _, err := readDrain(r); err != nil {
			return
		}
		c.mu.Lock()
		c.drains++
		refuses, answers := c.refuses, c.answers
		c.mu.Unlock()
		for _, m := range answers {
			if writeDrain(out, m) != nil {
				return
			}
		}
		if answers != nil {
			continue
		}
		if refuses != "" {
			_ = writeDrain(out, refusedMessage(refuses))
			return
		}
		for changed := c.busy(near); changed != nil; changed = c.busy(near) {
			<-changed
		}
		if writeDrain(out, drainedMessage()) != nil {
			return
		}
	}
}

// busy returns nil if the other end has nothing on c but the stream s, or s is gone, and
// else a channel that is closed when that may have changed.
func (c *fakeConn) busy(s *fakePipe) <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.unread == 0 || !slices.Contains(c.streams, s) {
		return nil
	}
	if c.changed == nil {
		c.changed = make(chan struct{})
	}
	return c.changed
}

// notify must be called with mu held.
func (c *fakeConn) notify() {
	if c.changed != nil {
		close(c.changed)
		c.changed = nil
	}
}

// set changes something of c.
func (c *fakeConn) set(change func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change()
	c.notify()
}

// fakePipe is a stream that carries something.
type fakePipe struct {
	network.Stream
	pipe net.Conn
	conn *fakeConn
}

func (s *fakePipe) Conn() network.Conn                           { return s.conn }
func (s *fakePipe) Read(p []byte) (int, error)                   { return s.pipe.Read(p) }
func (s *fakePipe) Write(p []byte) (int, error)                  { return s.pipe.Write(p) }
func (s *fakePipe) SetReadDeadline(t time.Time) error            { return s.pipe.SetReadDeadline(t) }
func (s *fakePipe) SetProtocol(protocol.ID) error                { return nil }
func (s *fakePipe) ResetWithError(network.StreamErrorCode) error { return s.Reset() }
func (s *fakePipe) Close() error                                 { return s.Reset() }

func (s *fakePipe) Reset() error {
	s.conn.mu.Lock()
	s.conn.streams = slices.DeleteFunc(s.conn.streams, func(other *fakePipe) bool { return other == s })
	s.conn.notify()
	s.conn.mu.Unlock()
	return s.pipe.Close()
}

type fakeStream struct {
	network.Stream
	mu   sync.Mutex
	conn *fakeConn
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

var errFakeReset = errors.New("reset by a fake")

func (f *fakeMover) Migrate(ctx context.Context, s network.Stream, to network.Conn) error {
	limited, _ := network.GetAllowLimitedConn(ctx)
	f.mu.Lock()
	f.calls = append(f.calls, call{s, to, time.Now(), limited})
	f.running++
	f.most = max(f.most, f.running)
	answer := f.answer
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		f.running--
		f.mu.Unlock()
	}()
	select {
	case <-time.After(rtt):
	case <-ctx.Done():
		return ctx.Err()
	}
	fs, target := s.(*fakeStream), to.(*fakeConn)
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
