package hosttest

import (
	"context"
	"fmt"
	"net"
	"sync"
	"testing"

	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/transport"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	ma "github.com/multiformats/go-multiaddr"
)

// Doubler gives a host further connections to peers that it is connected with, however
// often. The swarm does not: it answers a dial with the connection that it has. So the
// transport is told to dial, and what it returns is handed to the swarm as if it had been
// accepted: its direction is inbound at both ends.
type Doubler struct {
	swarm *swarm.Swarm
	spare *spare
}

// NewDoubler returns the doubler of h, of which there can be one.
func NewDoubler(t testing.TB, h host.Host) *Doubler {
	t.Helper()
	s, ok := h.Network().(*swarm.Swarm)
	if !ok {
		t.Fatalf("the network of the host is a %T", h.Network())
	}
	d := &Doubler{swarm: s, spare: &spare{conns: make(chan transport.CapableConn), closed: make(chan struct{})}}
	if err := s.AddTransport(d.spare); err != nil {
		t.Fatalf("double: %v", err)
	}
	if err := s.AddListenAddr(nowhereElse); err != nil {
		t.Fatalf("double: %v", err)
	}
	return d
}

// Dial makes one more connection to p, at addr. It returns when it has been made; either
// swarm may learn of it a little later.
func (d *Doubler) Dial(ctx context.Context, p peer.ID, addr ma.Multiaddr) error {
	tr := d.swarm.TransportForDialing(addr)
	if tr == nil {
		return fmt.Errorf("double: no transport dials %s", addr)
	}
	c, err := tr.Dial(ctx, addr, p)
	if err != nil {
		return err
	}
	select {
	case d.spare.conns <- c:
		return nil
	case <-d.spare.closed:
		err = transport.ErrListenerClosed
	case <-ctx.Done():
		err = ctx.Err()
	}
	_ = c.Close()
	return err
}

// nowhereElse is an address of a transport that go-libp2p has not, and nobody dials.
var nowhereElse = ma.StringCast("/memory/1")

// spare is a transport, and its only listener, that accepts what it is given.
type spare struct {
	conns  chan transport.CapableConn
	closed chan struct{}
	once   sync.Once
}

func (s *spare) Dial(context.Context, ma.Multiaddr, peer.ID) (transport.CapableConn, error) {
	return nil, fmt.Errorf("nobody is at %s", nowhereElse)
}

func (s *spare) CanDial(ma.Multiaddr) bool                       { return false }
func (s *spare) Protocols() []int                                { return []int{ma.P_MEMORY} }
func (s *spare) Proxy() bool                                     { return false }
func (s *spare) Listen(ma.Multiaddr) (transport.Listener, error) { return s, nil }
func (s *spare) Addr() net.Addr                                  { return &net.UnixAddr{Name: nowhereElse.String(), Net: "unix"} }
func (s *spare) Multiaddr() ma.Multiaddr                         { return nowhereElse }

func (s *spare) Accept() (transport.CapableConn, error) {
	select {
	case c := <-s.conns:
		return c, nil
	case <-s.closed:
		return nil, transport.ErrListenerClosed
	}
}

func (s *spare) Close() error {
	s.once.Do(func() { close(s.closed) })
	return nil
}
