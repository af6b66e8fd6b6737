package connmgr

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/connmgr"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/core/routing"
	routed "github.com/libp2p/go-libp2p/p2p/host/routed"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	"github.com/libp2p/go-libp2p/p2p/transport/quicreuse"
	"go.uber.org/fx"

	"github.com/go-portage/portage/migrate"
)

// Enabling
//
// libp2p.New builds a host from parts that it finds by their type. Enable changes two of
// them: the connection manager, which the host is made with, and the host.Host that
// everything else is built on, which becomes the wrapped one. What libp2p.New returns is
// the basic host itself, whose NewStream cannot be changed, unless there is a Routing:
// then it is a routed host over the host.Host of the parts. So there always is one.
//
// None of this is promised by go-libp2p. Where it changes, libp2p.New returns an error
// (ErrNotManager), or TestEnableRests says what is different.

// Errors of Enable, which libp2p.New returns, to test for with errors.Is.
var (
	ErrEnabledTwice   = errors.New("connmgr.Enable was given twice; give it once, with all of its options")
	ErrEnabledManager = errors.New("connmgr.Enable makes a Manager of its own, and the connection manager is one already; " +
		"give the options of connmgr.New to Enable and leave libp2p.ConnectionManager out, or keep it, leave Enable out and call Manager.Wrap")
	ErrDecorated = errors.New("another option decorates host.Host with fx.Decorate, which only one can; leave connmgr.Enable out, " +
		"make the manager with connmgr.New, pass it to libp2p.ConnectionManager, and call Manager.Wrap with what libp2p.New returns")
)

// Enable is the option of libp2p.New that makes a host of which streams move and that
// keeps one good connection to each peer:
//
//	h, err := libp2p.New(connmgr.Enable(connmgr.WithLogger(logger)))
//
// Streams that h opens can move, and so can those of all that libp2p.New itself builds on
// the host, such as the DHT of a libp2p.Routing. There is no time in which a peer can meet
// the host without a manager. [Of] returns the manager.
//
// The connection manager that libp2p.New would have used becomes the inner one: that of
// libp2p.ConnectionManager, or else go-libp2p's default. All other options work as before.
// Enable comes after libp2p.Routing: where it comes first, libp2p.New says "cannot specify
// multiple routing options". It can be given once ([ErrEnabledTwice]), not beside a Manager
// ([ErrEnabledManager]), and not beside an fx.Decorate of host.Host ([ErrDecorated]; where
// that one comes after Enable, the error is fx's own). The option may be used for several
// hosts; each gets a manager of its own.
//
// The host closes the manager and the inner one, also where libp2p.New fails.
//
// Its metrics are registered as go-libp2p's own are, with libp2p.PrometheusRegisterer, unless
// libp2p.DisableMetrics is given. [WithMetricsTracer] sets another tracer.
//
// What libp2p.New returns is a routed host, also without libp2p.Routing. It differs from
// a basic one in that Connect does not take over the addresses of a peer that is connected,
// and that NewStream without a deadline waits for a dial as long as Connect does.
func Enable(opts ...Option) libp2p.Option {
	return func(cfg *libp2p.Config) error {
		own, err := configure(opts)
		if err != nil {
			return fmt.Errorf("connmgr.Enable: %w", err)
		}
		e := &enabling{node: cfg, cfg: own}
		if slices.ContainsFunc(cfg.UserFxOptions, isEnabling) {
			return ErrEnabledTwice
		}
		if _, ours := cfg.ConnManager.(*Manager); ours {
			return ErrEnabledManager
		}
		if decorated(cfg.UserFxOptions) {
			return ErrDecorated
		}
		parts := []fx.Option{fx.Decorate(e.decorateQUIC, e.decorateSwarm, e.decorateHost), fx.ErrorHook(e)}
		if cfg.Routing == nil {
			cfg.Routing = func(host.Host) (routing.PeerRouting, error) { return findsNothing{}, nil }
			parts = append(parts, fx.Decorate(dialOnce))
		}
		if e.cfg.detours {
			e.cfg.asides = new(asides)
			parts = append(parts, e.cfg.asides.decorate())
		}
		return cfg.Apply(libp2p.WithFxOption(parts...))
	}
}

// findsNothing is the routing of a host that has none. It finds nothing and reports no error,
// so that the host's own error is returned: that it has no addresses, or that they do not answer.
type findsNothing struct{}

func (findsNothing) FindPeer(_ context.Context, p peer.ID) (peer.AddrInfo, error) {
	return peer.AddrInfo{ID: p}, nil
}

// dialOnce is the routed host of a host that has no routing. Its NewStream connects, and then
// so does that of the host below: where a peer takes a connection and closes it at once, as
// its gater may, that would be a second dial, which a basic host does not make.
func dialOnce(_ *routed.RoutedHost, h host.Host, r routing.PeerRouting) *routed.RoutedHost {
	return routed.Wrap(connected{h}, r)
}

// connected is a host whose NewStream is called when Connect has been.
type connected struct{ host.Host }

func (c connected) NewStream(ctx context.Context, p peer.ID, ids ...protocol.ID) (network.Stream, error) {
	return c.Host.NewStream(network.WithNoDial(ctx, "the routed host has dialled"), p, ids...)
}

// enabling is one use of Enable, in one libp2p.New. Everything is called on the goroutine
// of libp2p.New, and release when the host is closed.
type enabling struct {
	node *libp2p.Config
	cfg  config

	// What there is so far; nil before.
	manager *Manager
	quic    *quicreuse.ConnManager
	swarm   *swarm.Swarm
	host    host.Host // the basic one, then the wrapped one

	once sync.Once // release
}

// decorateQUIC makes the manager. It leaves QUIC as it is, and decorates it only to run at the
// right time: when all options have been applied, and before the swarm, which is built on QUIC,
// and the basic host, which is built on the swarm with node.ConnManager. What is appended to lc
// here is undone last, also if the swarm cannot listen.
func (e *enabling) decorateQUIC(quic *quicreuse.ConnManager, lc fx.Lifecycle) (*quicreuse.ConnManager, error) {
	e.quic = quic
	inner := e.node.ConnManager
	if _, ours := inner.(*Manager); ours {
		return nil, ErrEnabledManager
	}
	if inner == nil { // libp2p.NewWithoutDefaults
		inner = connmgr.NullConnMgr{}
	}
	if e.cfg.metrics == nil && !e.node.DisableMetrics {
		e.cfg.metrics = NewMetricsTracer(WithRegisterer(e.node.PrometheusRegisterer))
	}
	e.manager = newManager(inner, e.cfg)
	e.node.ConnManager = e.manager
	lc.Append(fx.StopHook(e.release))
	return quic, nil
}

func (e *enabling) decorateSwarm(s *swarm.Swarm) *swarm.Swarm {
	e.swarm = s
	return s
}

// decorateHost wraps the host.
func (e *enabling) decorateHost(h host.Host, lc fx.Lifecycle) (host.Host, error) {
	e.host = h
	wrapped, err := e.manager.Wrap(h)
	if err != nil {
		return nil, err
	}
	e.host = wrapped
	// The swarm has a hook already, so this one comes first: migrations end and the
	// manager is closed before the connections are, not because of it.
	lc.Append(fx.StopHook(e.release))
	return wrapped, nil
}

// HandleError is called where something cannot be made. It implements fx.ErrorHandler. The
// hooks are not called then, and libp2p.New leaves behind what it has made.
func (e *enabling) HandleError(error) {
	e.release()
	if e.host == nil {
		if e.swarm != nil {
			_ = e.swarm.Close()
		}
		for _, part := range []io.Closer{e.node.ConnManager, e.node.Peerstore, e.node.ResourceManager} {
			if part != nil {
				_ = part.Close()
			}
		}
	}
	if e.quic != nil {
		_ = e.quic.Close()
	}
}

// release closes the host, which closes the manager.
func (e *enabling) release() {
	e.once.Do(func() {
		if e.host != nil {
			_ = e.host.Close()
		}
	})
}

const enablingName = "portage/connmgr.Enable"

// String makes the option known to isEnabling.
func (e *enabling) String() string { return enablingName }

func isEnabling(o fx.Option) bool { return o != nil && strings.Contains(o.String(), enablingName) }

// decorated says whether one of opts decorates host.Host. Nothing of opts is run.
func decorated(opts []fx.Option) bool {
	err := fx.ValidateApp(fx.NopLogger, fx.Options(opts...),
		fx.Provide(func() host.Host { return nil }), fx.Decorate(func(h host.Host) host.Host { return h }))
	return err != nil && strings.Contains(err.Error(), "host.Host already decorated")
}

// Of returns the manager of h: of what libp2p.New returned with [Enable] or with
// libp2p.ConnectionManager, of what [Manager.Wrap] returned, and of a host that was built
// on one of these, such as a routed one. It is false where h has no Manager, or one that
// has another host.
func Of(h host.Host) (*Manager, bool) {
	if h == nil {
		return nil, false
	}
	m, ok := h.ConnManager().(*Manager)
	if !ok {
		return nil, false
	}
	own := m.home.host()
	if own != nil && own.Network() != h.Network() {
		return nil, false
	}
	return m, true
}

// Inner returns the connection manager that m decorates.
func (m *Manager) Inner() connmgr.ConnManager { return m.inner }

// Host returns the host of which streams can move: for Migrate, Streams and Supports. It is
// false before [Manager.Wrap].
func (m *Manager) Host() (*migrate.Host, bool) {
	wrapped := m.home.wrapped()
	return wrapped, wrapped != nil
}
