package connmgr

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/transport"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	ma "github.com/multiformats/go-multiaddr"
	"go.uber.org/fx"

	"github.com/go-portage/portage/internal/aside"
)

// Dialling beside a connection
//
// go-libp2p dials no peer that it has a direct connection to, whether that works or not. It
// looks for one twice, when it is asked to dial, and passes over those that are closed. So
// connections are wrapped here, and say for that moment that they are:
//
//	set aside, DialPeer --the first address is dialled, or some milliseconds pass--> back
//
// What comes is a connection like any other, beside the first, with all that the dialling of
// the host takes into account: its gater, its limits, the order of addresses. Whoever opens a
// stream in that moment waits for the dial.

// asideTime is how long connections are set aside at most. What happens then takes less than
// a millisecond; a busy machine may take longer.
const asideTime = 100 * time.Millisecond

var (
	// errOther says that a connection cannot be set aside: it is relayed, or the host was
	// made without Detours.
	errOther   = errors.New("its connection does not come from a transport of Manager.Detours")
	errNoOther = errors.New("none of its addresses answers")
)

// asides are the peers that are being dialled beside their connections.
type asides struct {
	wrapped atomic.Bool // a host has transports that are wrapped
	mu      sync.Mutex  // guards dialled; a leaf
	dialled map[peer.ID]func()
}

// Detours returns an option of libp2p.New, beside libp2p.ConnectionManager with m: it lets m
// have a peer dialled again while the only connection to it brings nothing (see
// [WithoutDetours]). [Enable] has it in it. It decorates the host's transports with fx, which
// only one option can.
func (m *Manager) Detours() libp2p.Option { return libp2p.WithFxOption(m.detours.asides.decorate()) }

func (a *asides) decorate() fx.Option {
	const group = `group:"transport"`
	return fx.Decorate(fx.Annotate(func(all []transport.Transport) []transport.Transport {
		wrapped := make([]transport.Transport, len(all))
		for i, t := range all {
			wrapped[i] = &asideTransport{t, a}
		}
		a.wrapped.Store(len(all) > 0)
		return wrapped
	}, fx.ParamTags(group), fx.ResultTags(group)))
}

// dial has n dial p although there are conns, all that it has. It returns when there is
// another connection, or ctx ends.
func (a *asides) dial(ctx context.Context, n network.Network, p peer.ID, conns []network.Conn) error {
	var set []*asideConn
	for _, c := range conns {
		of, ok := asideOf(c)
		if !ok {
			return errOther
		}
		set = append(set, of)
	}
	back := sync.OnceFunc(func() {
		for _, c := range set {
			c.aside.Store(false)
		}
		a.mu.Lock()
		delete(a.dialled, p)
		a.mu.Unlock()
	})
	a.mu.Lock()
	if a.dialled == nil {
		a.dialled = make(map[peer.ID]func())
	}
	a.dialled[p] = back
	a.mu.Unlock()
	for _, c := range set {
		c.aside.Store(true)
	}
	timer := time.AfterFunc(asideTime, back)
	defer timer.Stop()
	defer back()
	got, err := n.DialPeer(ctx, p)
	if err == nil && !slices.Contains(conns, got) {
		return nil
	}
	// Nobody else has asked for this dial: the next one is not to be kept from these addresses
	// because of it.
	if s, ok := n.(interface{ Backoff() *swarm.DialBackoff }); ok {
		s.Backoff().Clear(p)
	}
	return cmp.Or(err, errNoOther)
}

// dialling is told of each address of p that is being dialled.
func (a *asides) dialling(p peer.ID) {
	a.mu.Lock()
	back := a.dialled[p]
	a.mu.Unlock()
	if back != nil {
		back()
	}
}

// asideConn is a connection that can be set aside.
type asideConn struct {
	transport.CapableConn
	aside atomic.Bool
}

var _ network.ConnStat = (*asideConn)(nil)

// IsClosed implements network.MuxedConn.
func (c *asideConn) IsClosed() bool { return c.aside.Load() || c.CapableConn.IsClosed() }

// As finds c itself, too.
func (c *asideConn) As(target any) bool {
	switch t := target.(type) {
	case **asideConn:
		*t = c
	case *aside.Conn:
		*t = c
	default:
		return c.CapableConn.As(target)
	}
	return true
}

// Gone implements aside.Conn.
func (c *asideConn) Gone() bool { return c.CapableConn.IsClosed() }

// asideOf returns what c is in the swarm, if that can be set aside.
func asideOf(c network.Conn) (*asideConn, bool) {
	var a *asideConn
	ok := c.As(&a)
	return a, ok
}

// Stat implements network.ConnStat. What it returns where c has none is what the swarm takes
// then.
func (c *asideConn) Stat() network.ConnStats {
	if s, ok := c.CapableConn.(network.ConnStat); ok {
		return s.Stat()
	}
	return network.ConnStats{}
}

// asideTransport is a transport whose connections can be set aside. It has each method that
// the swarm looks for beside those of transport.Transport, and where its transport has none,
// does what the swarm does then.
type asideTransport struct {
	transport.Transport
	asides *asides
}

var (
	_ transport.DialUpdater  = (*asideTransport)(nil)
	_ transport.Resolver     = (*asideTransport)(nil)
	_ transport.SkipResolver = (*asideTransport)(nil)
	_ io.Closer              = (*asideTransport)(nil)
)

func wrapConn(c transport.CapableConn, err error) (transport.CapableConn, error) {
	if err != nil {
		return nil, err
	}
	return &asideConn{CapableConn: c}, nil
}

// Dial implements transport.Transport.
func (t *asideTransport) Dial(ctx context.Context, a ma.Multiaddr, p peer.ID) (transport.CapableConn, error) {
	t.asides.dialling(p)
	return wrapConn(t.Transport.Dial(ctx, a, p))
}

// DialWithUpdates implements transport.DialUpdater.
func (t *asideTransport) DialWithUpdates(ctx context.Context, a ma.Multiaddr, p peer.ID, updates chan<- transport.DialUpdate) (transport.CapableConn, error) {
	if u, ok := t.Transport.(transport.DialUpdater); ok {
		t.asides.dialling(p)
		return wrapConn(u.DialWithUpdates(ctx, a, p, updates))
	}
	return t.Dial(ctx, a, p)
}

// Listen implements transport.Transport.
func (t *asideTransport) Listen(a ma.Multiaddr) (transport.Listener, error) {
	l, err := t.Transport.Listen(a)
	if err != nil {
		return nil, err
	}
	return asideListener{l}, nil
}

// Resolve implements transport.Resolver.
func (t *asideTransport) Resolve(ctx context.Context, a ma.Multiaddr) ([]ma.Multiaddr, error) {
	if r, ok := t.Transport.(transport.Resolver); ok {
		return r.Resolve(ctx, a)
	}
	return []ma.Multiaddr{a}, nil
}

// SkipResolve implements transport.SkipResolver.
func (t *asideTransport) SkipResolve(ctx context.Context, a ma.Multiaddr) bool {
	r, ok := t.Transport.(transport.SkipResolver)
	return ok && r.SkipResolve(ctx, a)
}

// AddCertHashes adds the hashes of certificates to an address, where the transport has any.
func (t *asideTransport) AddCertHashes(a ma.Multiaddr) (ma.Multiaddr, bool) {
	if h, ok := t.Transport.(interface {
		AddCertHashes(ma.Multiaddr) (ma.Multiaddr, bool)
	}); ok {
		return h.AddCertHashes(a)
	}
	return a, true
}

// Close implements io.Closer.
func (t *asideTransport) Close() error {
	if c, ok := t.Transport.(io.Closer); ok {
		return c.Close()
	}
	return nil
}

// String returns that of the transport.
func (t *asideTransport) String() string {
	if s, ok := t.Transport.(fmt.Stringer); ok {
		return s.String()
	}
	return fmt.Sprintf("%T", t.Transport)
}

type asideListener struct{ transport.Listener }

// Accept implements transport.Listener.
func (l asideListener) Accept() (transport.CapableConn, error) { return wrapConn(l.Listener.Accept()) }
