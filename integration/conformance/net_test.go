package conformance

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/net/gostream"
	"golang.org/x/net/nettest"

	. "github.com/go-portage/portage/internal/hosttest"
)

const netID protocol.ID = "/conformance/net/1.0.0"

// TestNetConn runs the suite for implementations of net.Conn on streams that gostream makes
// into such. Most of it is about deadlines, and about calls that meet.
func TestNetConn(t *testing.T) {
	noLeaks(t)
	for _, s := range setups {
		t.Run(s.String(), func(t *testing.T) {
			var migrations int64
			for _, way := range []netWay{openerFirst, acceptorFirst, lazyOpener} {
				if way == lazyOpener && !s.moved {
					continue // see begin
				}
				t.Run(way.String(), func(t *testing.T) {
					n := newNet(t, s, way)
					nettest.TestConn(t, n.pipe)
					n.nothingLeft(netID)
					migrations += n.mover.moved.Load()
					t.Logf("%d migrations, %d attempts to be repeated", n.mover.moved.Load(), n.mover.later.Load())
				})
			}
			if s.moved {
				t.Logf("%d migrations", migrations)
				if migrations == 0 {
					t.Error("no stream has migrated")
				}
			}
		})
	}
}

// netWay is which ends of a stream the suite gets.
type netWay int

const (
	openerFirst   netWay = iota // it does the most with the end that has opened the stream,
	acceptorFirst               // with that which has accepted it,
	lazyOpener                  // or with one that tells nobody of the stream until it is used
)

func (w netWay) String() string {
	return [...]string{"opener", "acceptor", "lazy opener"}[w]
}

// netPair makes pipes between the two hosts of a pair.
type netPair struct {
	*pair
	way    netWay
	listen net.Listener
	now    atomic.Pointer[pipe] // which is being made, or used
}

func newNet(t *testing.T, s setup, way netWay) *netPair {
	n := &netPair{pair: newPair(t, s), way: way}
	var err error
	if n.listen, err = gostream.Listen(&tap{n.hosts[1], n, 1}, netID); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = n.listen.Close() })
	return n
}

// pipe is one stream, with both ends.
type pipe struct {
	over atomic.Bool // an end was closed
}

// pipe implements nettest.MakePipe.
func (n *netPair) pipe() (c1, c2 net.Conn, stop func(), err error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	n.now.Store(new(pipe))
	moved := n.mover.moved.Load()
	opener, err := gostream.Dial(ctx, &tap{n.hosts[0], n, 0}, n.hosts[1].ID(), netID)
	if err != nil {
		return nil, nil, nil, err
	}
	acceptor := &lateConn{ready: make(chan struct{})}
	go acceptor.accept(n.listen)
	if n.way != lazyOpener {
		if err := acceptor.await(); err != nil {
			return nil, nil, nil, err
		}
		if n.moved {
			// However short the subtest, its stream is not where it was opened.
			WaitFor(n.t, "a first migration", func() bool { return n.mover.moved.Load() > moved })
		}
	}
	stop = func() {
		_ = opener.Close()
		if err := acceptor.await(); err != nil {
			n.t.Error(err)
		}
		_ = acceptor.Close()
		n.await()
	}
	if n.way == acceptorFirst {
		return acceptor, opener, stop, nil
	}
	return opener, acceptor, stop, nil
}

// lateConn is a net.Conn that is yet to be accepted.
type lateConn struct {
	ready chan struct{} // closed when that is done
	net.Conn
	err error
}

func (c *lateConn) accept(l net.Listener) {
	defer close(c.ready)
	c.Conn, c.err = l.Accept()
}

func (c *lateConn) await() error {
	select {
	case <-c.ready:
		return c.err
	case <-time.After(patience):
		return errors.New("the stream does not arrive")
	}
}

func (c *lateConn) Read(p []byte) (int, error) {
	if err := c.await(); err != nil {
		return 0, err
	}
	return c.Conn.Read(p)
}

func (c *lateConn) Write(p []byte) (int, error) {
	if err := c.await(); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}

func (c *lateConn) Close() error {
	if err := c.await(); err != nil {
		return err
	}
	return c.Conn.Close()
}

// tap is the host that gostream sees. The streams that pass through begin to move.
type tap struct {
	host.Host
	n    *netPair
	side int
}

func (h *tap) NewStream(ctx context.Context, p peer.ID, pids ...protocol.ID) (network.Stream, error) {
	s, err := h.n.open(ctx, h.side, pids[0])
	if err == nil && h.n.way != lazyOpener {
		err = begin(s)
	}
	if err != nil {
		return nil, err
	}
	return h.tapped(s), nil
}

func (h *tap) SetStreamHandler(id protocol.ID, handler network.StreamHandler) {
	h.Host.SetStreamHandler(id, func(s network.Stream) { handler(h.tapped(s)) })
}

func (h *tap) tapped(s network.Stream) network.Stream {
	now := h.n.now.Load()
	h.n.move(h.side, s, func() bool { return true }, now.over.Load)
	return &netStream{Stream: s, pipe: now, setup: h.n.setup}
}

// netStream is one end of a pipe.
type netStream struct {
	network.Stream
	pipe  *pipe
	setup setup
}

func (s *netStream) Close() error {
	s.pipe.over.Store(true)
	err := s.Stream.Close()
	if err != nil && closeOfCancelled(s.setup, err) {
		return nil
	}
	return err
}
