package simtest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/transport"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

// Streams of bytes that behave like TCP: ordered, never lost, and blocking when the
// socket's buffer is full. Each direction of a connection is a wire:
//
//	Write -> pipe -> take -> sending -> send: black hole, bandwidth
//	                      -> flying  -> deliver: latency -> pipe -> Read
//
// The kernel's TCP cannot be used: virtual time stands still while anybody waits for it.

// maxSegment is how many bytes travel together at most.
const maxSegment = 16 << 10

var (
	errRefused = errors.New("connection refused")
	errReset   = errors.New("connection reset by peer")
)

type segment struct {
	data []byte
	at   time.Time // when it arrives
}

// queue is where segments wait, first in, first out. It has no bound of its own and
// takes no room while it is empty: a test may have thousands of wires.
type queue struct {
	mu    sync.Mutex // guards what follows
	more  *sync.Cond
	items []segment
	ended bool
}

func newQueue() *queue {
	q := new(queue)
	q.more = sync.NewCond(&q.mu)
	return q
}

func (q *queue) put(s segment) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.items = append(q.items, s)
	q.more.Signal()
}

// end has take say false once all has been taken.
func (q *queue) end() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.ended = true
	q.more.Signal()
}

// take waits for a segment.
func (q *queue) take() (segment, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.items) == 0 {
		if q.ended {
			return segment{}, false
		}
		q.more.Wait()
	}
	s := q.items[0]
	if q.items = q.items[1:]; len(q.items) == 0 {
		q.items = nil
	}
	return s, true
}

// wire carries bytes from src, where a host writes them, to dst, where the other reads.
type wire struct {
	net      *Net
	from, to string
	src, dst net.Conn
	room     chan struct{} // told when bytes have arrived
	sending  *queue
	flying   *queue

	mu      sync.Mutex // guards pending
	pending int        // bytes taken, and not arrived
}

func (n *Net) newWire(from, to string, src, dst net.Conn) {
	w := &wire{
		net: n, from: from, to: to, src: src, dst: dst,
		room:    make(chan struct{}, 1),
		sending: newQueue(),
		flying:  newQueue(),
	}
	n.mu.Lock()
	buffer := n.buffer
	n.mu.Unlock()
	n.wires.Go(func() { w.take(buffer) })
	n.wires.Go(w.send)
	n.wires.Go(w.deliver)
}

func (w *wire) take(buffer int) {
	defer w.sending.end()
	data := make([]byte, maxSegment)
	for {
		for w.add(0) >= buffer {
			select {
			case <-w.room:
			case <-w.net.done:
				return
			}
		}
		m, err := w.src.Read(data)
		if m > 0 {
			w.net.count(w.from, w.to, m)
			w.add(m)
			w.sending.put(segment{data: slices.Clone(data[:m])})
		}
		if err != nil {
			return
		}
	}
}

func (w *wire) add(bytes int) (pending int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pending += bytes
	return w.pending
}

func (w *wire) send() {
	defer w.flying.end()
	rate := 0
	for _, ip := range []string{w.from, w.to} {
		if r, bounded := w.net.rateOf(ip); bounded && (rate == 0 || r < rate) {
			rate = r
		}
	}
	var last time.Time
	for s, ok := w.sending.take(); ok; s, ok = w.sending.take() {
		if !w.awaitThaw(len(s.data)) {
			continue
		}
		if rate > 0 {
			time.Sleep(time.Duration(float64(len(s.data)*8) / float64(rate) * float64(time.Second)))
		}
		s.at = time.Now().Add(w.net.delay(w.from, w.to))
		if s.at.Before(last) {
			s.at = last // the latency has dropped; the order stays
		}
		last = s.at
		w.flying.put(s)
	}
	w.awaitThaw(0) // the end is told as late as the rest
}

// awaitThaw waits until the link carries so many bytes together. It says false when the
// test has ended.
func (w *wire) awaitThaw(bytes int) bool {
	for {
		thawed := w.net.thawed(w.from, w.to)
		if thawed == nil {
			thawed = w.net.swallowed(w.from, w.to, bytes)
		}
		if thawed == nil {
			return true
		}
		select {
		case <-thawed:
		case <-w.net.done:
			return false
		}
	}
}

func (w *wire) deliver() {
	defer w.dst.Close()
	for s, ok := w.flying.take(); ok; s, ok = w.flying.take() {
		time.Sleep(time.Until(s.at))
		// An error says that the reader has closed: its own wire ends, too, and
		// what is left of this one goes nowhere.
		_, _ = w.dst.Write(s.data)
		w.add(-len(s.data))
		select {
		case w.room <- struct{}{}:
		default:
		}
	}
	time.Sleep(w.net.delay(w.from, w.to))
}

// tcpConn is one end of a connection.
type tcpConn struct {
	net.Conn          // the host's end of a pipe
	far      net.Conn // the wires' end of it
	net      *Net
	from, to string
	local    ma.Multiaddr
	remote   ma.Multiaddr

	mu      sync.Mutex // guards severed
	severed bool
}

func (c *tcpConn) LocalMultiaddr() ma.Multiaddr  { return c.local }
func (c *tcpConn) RemoteMultiaddr() ma.Multiaddr { return c.remote }
func (c *tcpConn) LocalAddr() net.Addr           { return netAddr(c.local) }
func (c *tcpConn) RemoteAddr() net.Addr          { return netAddr(c.remote) }

func netAddr(m ma.Multiaddr) net.Addr {
	a, err := manet.ToNetAddr(m)
	if err != nil {
		panic(err) // this package made it
	}
	return a
}

func (c *tcpConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	return n, c.explain(err)
}

func (c *tcpConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	return n, c.explain(err)
}

func (c *tcpConn) explain(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil && c.severed {
		return errReset
	}
	return err
}

func (c *tcpConn) Close() error {
	c.net.mu.Lock()
	delete(c.net.tcp, c)
	c.net.mu.Unlock()
	return c.Conn.Close()
}

func (c *tcpConn) sever() {
	c.mu.Lock()
	c.severed = true
	c.mu.Unlock()
	_ = c.far.Close()
	_ = c.Close()
}

// newTCP makes a connection, and returns both ends.
func (n *Net) newTCP(local, remote ma.Multiaddr, from, to string) (near, far *tcpConn) {
	nearHost, nearNet := net.Pipe()
	farHost, farNet := net.Pipe()
	near = &tcpConn{Conn: nearHost, far: nearNet, net: n, from: from, to: to, local: local, remote: remote}
	far = &tcpConn{Conn: farHost, far: farNet, net: n, from: to, to: from, local: remote, remote: local}
	n.newWire(from, to, nearNet, farNet)
	n.newWire(to, from, farNet, nearNet)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.tcp[near], n.tcp[far] = struct{}{}, struct{}{}
	return near, far
}

// tcpTransport is a go-libp2p transport over such connections.
type tcpTransport struct {
	node     *Node
	upgrader transport.Upgrader
	rcmgr    network.ResourceManager
}

var _ transport.Transport = (*tcpTransport)(nil)

// Dial implements transport.Transport.
func (t *tcpTransport) Dial(ctx context.Context, raddr ma.Multiaddr, p peer.ID) (transport.CapableConn, error) {
	scope, err := t.rcmgr.OpenConnection(network.DirOutbound, true, raddr)
	if err != nil {
		return nil, err
	}
	c, err := t.dial(ctx, raddr)
	if err != nil {
		scope.Done()
		return nil, err
	}
	if err := scope.SetPeer(p); err != nil {
		scope.Done()
		_ = c.Close()
		return nil, err
	}
	return t.upgrader.Upgrade(ctx, t, c, network.DirOutbound, p, scope)
}

func (t *tcpTransport) dial(ctx context.Context, raddr ma.Multiaddr) (manet.Conn, error) {
	n := t.node.net
	to, err := raddr.ValueForProtocol(ma.P_IP4)
	if err != nil {
		return nil, err
	}
	from := t.node.source(to)
	n.mu.Lock()
	l := n.listeners[raddr.String()]
	n.port++
	local := ma.StringCast(fmt.Sprintf("/ip4/%s/tcp/%d", from, 40000+n.port))
	n.mu.Unlock()
	for range 2 { // SYN, SYN and ACK
		if err := n.travel(ctx, from, to); err != nil {
			return nil, err
		}
	}
	if l == nil {
		return nil, errRefused
	}
	near, far := n.newTCP(local, raddr, from, to)
	select {
	case l.incoming <- far:
		select {
		case <-l.closed:
			l.refuse()
		default:
		}
		return near, nil
	case <-l.closed:
		near.sever()
		far.sever()
		return nil, errRefused
	}
}

// travel waits as long as something takes from one IP to another.
func (n *Net) travel(ctx context.Context, from, to string) error {
	for thawed := n.thawed(from, to); thawed != nil; thawed = n.thawed(from, to) {
		select {
		case <-thawed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	timer := time.NewTimer(n.delay(from, to))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// CanDial implements transport.Transport.
func (t *tcpTransport) CanDial(a ma.Multiaddr) bool {
	_, err := a.ValueForProtocol(ma.P_TCP)
	return err == nil && !strings.Contains(a.String(), "/p2p-circuit")
}

// Listen implements transport.Transport.
func (t *tcpTransport) Listen(a ma.Multiaddr) (transport.Listener, error) {
	l := &listener{net: t.node.net, addr: a, incoming: make(chan manet.Conn, 16), closed: make(chan struct{})}
	l.net.mu.Lock()
	l.net.listeners[a.String()] = l
	l.net.mu.Unlock()
	return t.upgrader.UpgradeGatedMaListener(t, t.upgrader.GateMaListener(l)), nil
}

// Protocols implements transport.Transport.
func (t *tcpTransport) Protocols() []int { return []int{ma.P_TCP} }

// Proxy implements transport.Transport.
func (t *tcpTransport) Proxy() bool { return false }

type listener struct {
	net      *Net
	addr     ma.Multiaddr
	incoming chan manet.Conn
	once     sync.Once
	closed   chan struct{}
}

var _ manet.Listener = (*listener)(nil)

// Accept implements manet.Listener.
func (l *listener) Accept() (manet.Conn, error) {
	select {
	case c := <-l.incoming:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close implements manet.Listener.
func (l *listener) Close() error {
	l.once.Do(func() {
		close(l.closed)
		l.net.mu.Lock()
		delete(l.net.listeners, l.addr.String())
		l.net.mu.Unlock()
		l.refuse()
	})
	return nil
}

// refuse closes what nobody will accept any more.
func (l *listener) refuse() {
	for {
		select {
		case c := <-l.incoming:
			_ = c.Close()
		default:
			return
		}
	}
}

// Multiaddr implements manet.Listener.
func (l *listener) Multiaddr() ma.Multiaddr { return l.addr }

// Addr implements manet.Listener.
func (l *listener) Addr() net.Addr { return netAddr(l.addr) }
