package connmgr_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	coreconnmgr "github.com/libp2p/go-libp2p/core/connmgr"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	corerouting "github.com/libp2p/go-libp2p/core/routing"
	"github.com/libp2p/go-libp2p/core/transport"
	"github.com/libp2p/go-libp2p/p2p/host/autorelay"
	"github.com/libp2p/go-libp2p/p2p/host/peerstore/pstoremem"
	routedhost "github.com/libp2p/go-libp2p/p2p/host/routed"
	basic "github.com/libp2p/go-libp2p/p2p/net/connmgr"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/stretchr/testify/require"
	"go.uber.org/fx"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/go-portage/portage/connmgr"
	"github.com/go-portage/portage/internal/hosttest"
	"github.com/go-portage/portage/migrate"
)

const echoID = "/test/echo"

func echo(s network.Stream) {
	defer s.Close()
	_, _ = io.Copy(s, s)
}

// onLoopback are the options of a host that is quick to make.
func onLoopback(opts ...libp2p.Option) []libp2p.Option {
	return append([]libp2p.Option{
		libp2p.ListenAddrStrings("/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"),
		libp2p.DisableMetrics(), hosttest.PatientDials(),
	}, opts...)
}

func newEnabled(t *testing.T, opts ...libp2p.Option) host.Host {
	t.Helper()
	h, err := libp2p.New(opts...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = h.Close() })
	h.SetStreamHandler(echoID, echo)
	return h
}

func connect(t *testing.T, from, to host.Host) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), hosttest.Patience)
	defer cancel()
	require.NoError(t, from.Connect(ctx, peer.AddrInfo{ID: to.ID(), Addrs: to.Network().ListenAddresses()}))
}

// requireMovable opens a stream that can move, and uses it.
func requireMovable(t *testing.T, from host.Host, to peer.ID) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), hosttest.Patience)
	defer cancel()
	s, err := from.NewStream(ctx, to, echoID)
	require.NoError(t, err)
	require.IsType(t, (*migrate.Stream)(nil), s)
	_, err = s.Write([]byte("hello"))
	require.NoError(t, err)
	require.NoError(t, s.CloseWrite())
	got, err := io.ReadAll(s)
	require.NoError(t, err)
	require.Equal(t, "hello", string(got))
	require.NoError(t, s.Close())
}

// With one option, a stream that was opened over a relay goes on over the direct connection
// that comes later, and the relayed one is closed.
func TestEnable(t *testing.T) {
	both := []hosttest.Transport{hosttest.TCP, hosttest.QUIC}
	a, b := hosttest.New(t, both, connmgr.Enable()), hosttest.New(t, both, connmgr.Enable())
	b.SetStreamHandler(echoID, echo)
	relayed := hosttest.DialRelayed(t, a, b, hosttest.NewRelay(t))
	ctx, cancel := context.WithTimeout(network.WithAllowLimitedConn(t.Context(), "test"), hosttest.Patience)
	defer cancel()
	s, err := a.NewStream(ctx, b.ID(), echoID)
	require.NoError(t, err)
	require.Equal(t, relayed, s.Conn())
	_, err = s.Write([]byte("over "))
	require.NoError(t, err)
	_, err = io.ReadFull(s, make([]byte, len("over ")))
	require.NoError(t, err)
	direct := hosttest.Dial(t, a, b, hosttest.QUIC)
	hosttest.WaitFor(t, "the relayed connection to be closed", func() bool {
		return len(a.Network().ConnsToPeer(b.ID())) == 1 && len(b.Network().ConnsToPeer(a.ID())) == 1
	})
	require.True(t, relayed.IsClosed())
	require.Equal(t, direct, s.Conn())
	_, err = s.Write([]byte("and over"))
	require.NoError(t, err)
	require.NoError(t, s.CloseWrite())
	got, err := io.ReadAll(s)
	require.NoError(t, err)
	require.Equal(t, "and over", string(got))
	require.NoError(t, s.Close())
	requireMovable(t, a, b.ID())
}

// What cannot be pinged is asked in another way which connections work: of two that serve no
// ping the better connection stays, and their streams move there.
func TestEnableWithoutPing(t *testing.T) {
	both := []hosttest.Transport{hosttest.TCP, hosttest.QUIC}
	opts := []libp2p.Option{libp2p.Ping(false), connmgr.Enable(connmgr.WithProof(100 * time.Millisecond))}
	a, b := hosttest.New(t, both, opts...), hosttest.New(t, both, opts...)
	b.SetStreamHandler(echoID, echo)
	older := hosttest.Dial(t, a, b, hosttest.TCP)
	s, err := a.NewStream(t.Context(), b.ID(), echoID)
	require.NoError(t, err)
	_, err = s.Write([]byte("over TCP"))
	require.NoError(t, err)
	require.Equal(t, older, s.Conn())
	require.NoError(t, hosttest.NewDoubler(t, a.Host).Dial(t.Context(), b.ID(), b.Addr(t, hosttest.QUIC)))
	hosttest.WaitFor(t, "the older connection to be closed", func() bool {
		return older.IsClosed() && len(b.Network().ConnsToPeer(a.ID())) == 1
	})
	require.Equal(t, hosttest.Transport(hosttest.QUIC), hosttest.Of(s.Conn().RemoteMultiaddr()))
	require.NoError(t, s.CloseWrite())
	got, err := io.ReadAll(s)
	require.NoError(t, err)
	require.Equal(t, "over TCP", string(got))
}

func TestEnableAmongOtherOptions(t *testing.T) {
	private := libp2p.PrivateNetwork([]byte("0123456789abcdef0123456789abcdef"))
	tcpOnly := libp2p.ListenAddrStrings("/ip4/127.0.0.1/tcp/0")
	relays := libp2p.EnableAutoRelayWithPeerSource(func(context.Context, int) <-chan peer.AddrInfo {
		none := make(chan peer.AddrInfo)
		close(none)
		return none
	}, autorelay.WithMinInterval(time.Hour))
	enable := connmgr.Enable()

	for name, opts := range map[string][]libp2p.Option{
		"alone":               onLoopback(enable),
		"first":               append([]libp2p.Option{enable}, onLoopback()...),
		"with metrics":        {libp2p.ListenAddrStrings("/ip4/127.0.0.1/tcp/0"), enable},
		"no relay":            onLoopback(libp2p.DisableRelay(), enable),
		"a relay":             onLoopback(libp2p.EnableRelayService(), libp2p.ForceReachabilityPublic(), enable),
		"autorelay":           onLoopback(relays, libp2p.ForceReachabilityPrivate(), enable),
		"hole punching":       onLoopback(libp2p.EnableHolePunching(), enable),
		"AutoNAT service":     onLoopback(libp2p.EnableNATService(), enable),
		"AutoNATv2":           onLoopback(libp2p.EnableAutoNATv2(), enable),
		"no ping":             onLoopback(libp2p.Ping(false), enable),
		"shared TCP listener": onLoopback(libp2p.ShareTCPListener(), enable),
		"manager before":      onLoopback(libp2p.ConnectionManager(coreconnmgr.NullConnMgr{}), enable),
		"manager after":       onLoopback(enable, libp2p.ConnectionManager(coreconnmgr.NullConnMgr{})),
		"private network":     {tcpOnly, libp2p.DisableMetrics(), private, enable},
		"everything": onLoopback(libp2p.EnableRelayService(), libp2p.EnableHolePunching(), relays, libp2p.EnableNATService(),
			libp2p.EnableAutoNATv2(), libp2p.ConnectionManager(coreconnmgr.NullConnMgr{}), noRouting, enable),
	} {
		t.Run(name, func(t *testing.T) {
			before := goleak.IgnoreCurrent()
			a, err := libp2p.New(opts...)
			require.NoError(t, err)
			defer a.Close()
			peerOpts := onLoopback(connmgr.Enable())
			if name == "private network" {
				peerOpts = []libp2p.Option{tcpOnly, libp2p.DisableMetrics(), private, connmgr.Enable()}
			}
			b, err := libp2p.New(peerOpts...)
			require.NoError(t, err)
			defer b.Close()
			b.SetStreamHandler(echoID, echo)
			connect(t, a, b)
			requireMovable(t, a, b.ID())
			m, ok := connmgr.Of(a)
			require.True(t, ok)
			_, ok = m.Host()
			require.True(t, ok)
			require.NoError(t, a.Close())
			require.NoError(t, a.Close(), "a second time")
			require.Equal(t, "the manager is closed", m.Explain(b.ID()).State, "with its host")
			require.NoError(t, b.Close())
			requireNothingLeft(t, before)
		})
	}

	for name, opts := range map[string][]libp2p.Option{
		"no listen addresses": {libp2p.NoListenAddrs, libp2p.DisableMetrics(), enable},
		"no transports":       {libp2p.NoTransports, libp2p.NoListenAddrs, libp2p.DisableMetrics(), enable},
	} {
		t.Run(name, func(t *testing.T) {
			before := goleak.IgnoreCurrent()
			h, err := libp2p.New(opts...)
			require.NoError(t, err)
			_, ok := connmgr.Of(h)
			require.True(t, ok)
			require.NoError(t, h.Close())
			requireNothingLeft(t, before)
		})
	}
}

var noRouting = libp2p.Routing(func(host.Host) (corerouting.PeerRouting, error) { return routing{}, nil })

func requireNothingLeft(t *testing.T, before goleak.Option) {
	t.Helper()
	hosttest.WaitFor(t, "all goroutines to end", func() bool { return goleak.Find(before) == nil })
}

// What libp2p.New would have used is underneath, and nothing else is different.
func TestEnableKeepsTheInnerManager(t *testing.T) {
	for name, opts := range map[string]func(inner libp2p.Option) []libp2p.Option{
		"before": func(inner libp2p.Option) []libp2p.Option { return []libp2p.Option{inner, connmgr.Enable()} },
		"after":  func(inner libp2p.Option) []libp2p.Option { return []libp2p.Option{connmgr.Enable(), inner} },
	} {
		t.Run(name, func(t *testing.T) {
			inner, err := basic.NewConnManager(7, 9)
			require.NoError(t, err)
			m, ok := connmgr.Of(newEnabled(t, onLoopback(opts(libp2p.ConnectionManager(inner))...)...))
			require.True(t, ok)
			require.Same(t, inner, m.Inner())
		})
	}
	t.Run("go-libp2p's default", func(t *testing.T) {
		plain, err := libp2p.New(onLoopback()...)
		require.NoError(t, err)
		defer plain.Close()
		want := plain.ConnManager().(*basic.BasicConnMgr).GetInfo()
		m, ok := connmgr.Of(newEnabled(t, onLoopback(connmgr.Enable())...))
		require.True(t, ok)
		got := m.Inner().(*basic.BasicConnMgr).GetInfo()
		require.Equal(t, []any{want.LowWater, want.HighWater, want.GracePeriod}, []any{got.LowWater, got.HighWater, got.GracePeriod})
	})
	t.Run("none", func(t *testing.T) {
		h, err := libp2p.NewWithoutDefaults(libp2p.NoListenAddrs, libp2p.NoTransports, libp2p.DisableRelay(), libp2p.DisableMetrics(),
			libp2p.RandomIdentity, libp2p.DefaultPeerstore, libp2p.ResourceManager(&network.NullResourceManager{}), connmgr.Enable())
		require.NoError(t, err)
		defer h.Close()
		m, ok := connmgr.Of(h)
		require.True(t, ok)
		require.Equal(t, coreconnmgr.NullConnMgr{}, m.Inner(), "as go-libp2p does")
	})
	t.Run("one option for several hosts", func(t *testing.T) {
		enable := connmgr.Enable()
		m0, ok := connmgr.Of(newEnabled(t, onLoopback(enable)...))
		require.True(t, ok)
		m1, ok := connmgr.Of(newEnabled(t, onLoopback(enable)...))
		require.True(t, ok)
		require.NotSame(t, m0, m1)
	})
}

// What libp2p.New builds on the host opens streams that move.
func TestEnableReachesTheRouting(t *testing.T) {
	var inside host.Host
	a := newEnabled(t, onLoopback(libp2p.Routing(func(h host.Host) (corerouting.PeerRouting, error) {
		inside = h
		return routing{}, nil
	}), connmgr.Enable())...)
	b := newEnabled(t, onLoopback(connmgr.Enable())...)
	connect(t, a, b)
	requireMovable(t, a, b.ID())
	requireMovable(t, inside, b.ID())
	m, ok := connmgr.Of(inside)
	require.True(t, ok)
	wrapped, ok := m.Host()
	require.True(t, ok)
	require.Same(t, wrapped, inside)
}

// There is no gap: what either end opens as soon as there is a connection can move.
func TestEnableBeforeTheFirstConnection(t *testing.T) {
	type opened struct {
		by  string
		s   network.Stream
		err error
	}
	got := make(chan opened, 2)
	newHost := func(name string) host.Host {
		h := newEnabled(t, onLoopback(connmgr.Enable())...)
		h.Network().Notify(&network.NotifyBundle{ConnectedF: func(_ network.Network, c network.Conn) {
			go func() {
				ctx, cancel := context.WithTimeout(context.Background(), hosttest.Patience)
				defer cancel()
				s, err := h.NewStream(ctx, c.RemotePeer(), echoID)
				got <- opened{name, s, err}
			}()
		}})
		return h
	}
	connect(t, newHost("dialler"), newHost("listener"))
	for range 2 {
		o := <-got
		require.NoError(t, o.err, o.by)
		require.IsType(t, (*migrate.Stream)(nil), o.s, o.by)
		require.NoError(t, o.s.Reset())
	}
}

// Whatever programs assert on the host that libp2p.New returns, they can with Enable, too.
func TestEnableHidesNothing(t *testing.T) {
	plain, enabled := newEnabled(t, onLoopback()...), newEnabled(t, onLoopback(connmgr.Enable())...)
	for m := range reflect.TypeOf(plain).NumMethod() {
		method := reflect.TypeOf(plain).Method(m)
		_, has := reflect.TypeOf(enabled).MethodByName(method.Name)
		require.True(t, has, method.Name)
	}
	all := enabled.(interface{ AllAddrs() []ma.Multiaddr }).AllAddrs()
	require.NotEmpty(t, all)
	m, ok := connmgr.Of(enabled)
	require.True(t, ok)
	wrapped, ok := m.Host()
	require.True(t, ok)
	require.Equal(t, all, wrapped.AllAddrs())
}

// Without a Routing, dials fail as they do without Enable.
func TestEnableKeepsTheErrorsOfDials(t *testing.T) {
	nobody, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	closed := fmt.Sprintf("/ip4/127.0.0.1/tcp/%d", nobody.Addr().(*net.TCPAddr).Port)
	require.NoError(t, nobody.Close())
	stranger := newEnabled(t, onLoopback()...).ID()
	plain := newEnabled(t, onLoopback()...)
	enabled := newEnabled(t, onLoopback(connmgr.Enable())...)

	t.Run("no addresses", func(t *testing.T) {
		want := plain.Connect(t.Context(), peer.AddrInfo{ID: stranger})
		require.Error(t, want)
		require.EqualError(t, enabled.Connect(t.Context(), peer.AddrInfo{ID: stranger}), want.Error())
		_, want = plain.NewStream(t.Context(), stranger, echoID)
		_, got := enabled.NewStream(t.Context(), stranger, echoID)
		require.EqualError(t, got, want.Error())
		require.Equal(t, errorTypes(want), errorTypes(got))
	})
	t.Run("nobody there", func(t *testing.T) {
		at := peer.AddrInfo{ID: stranger, Addrs: []ma.Multiaddr{ma.StringCast(closed)}}
		want, got := plain.Connect(t.Context(), at), enabled.Connect(t.Context(), at)
		require.EqualError(t, got, want.Error())
		require.Equal(t, errorTypes(want), errorTypes(got))
	})
	t.Run("no dial allowed", func(t *testing.T) {
		ctx := network.WithNoDial(t.Context(), "test")
		_, want := plain.NewStream(ctx, stranger, echoID)
		_, got := enabled.NewStream(ctx, stranger, echoID)
		require.EqualError(t, got, want.Error())
	})
}

func errorTypes(err error) (types []string) {
	for ; err != nil; err = errors.Unwrap(err) {
		types = append(types, fmt.Sprintf("%T", err))
	}
	return types
}

// Each wrong use is an error that says what to do, and leaves nothing behind.
func TestEnableRefuses(t *testing.T) {
	ours := func(t *testing.T) libp2p.Option {
		m, err := connmgr.New(coreconnmgr.NullConnMgr{})
		require.NoError(t, err)
		t.Cleanup(func() { _ = m.Close() })
		return libp2p.ConnectionManager(m)
	}
	decorate := libp2p.WithFxOption(fx.Decorate(func(h host.Host) host.Host { return h }))
	for name, tc := range map[string]struct {
		opts func(t *testing.T) []libp2p.Option
		is   error
		says string
	}{
		"twice": {
			opts: func(*testing.T) []libp2p.Option { return []libp2p.Option{connmgr.Enable(), connmgr.Enable()} },
			is:   connmgr.ErrEnabledTwice,
		},
		"after a Manager": {
			opts: func(t *testing.T) []libp2p.Option { return []libp2p.Option{ours(t), connmgr.Enable()} },
			is:   connmgr.ErrEnabledManager,
		},
		"before a Manager": {
			opts: func(t *testing.T) []libp2p.Option { return []libp2p.Option{connmgr.Enable(), ours(t)} },
			is:   connmgr.ErrEnabledManager,
		},
		"after another decorator": {
			opts: func(*testing.T) []libp2p.Option { return []libp2p.Option{decorate, connmgr.Enable()} },
			is:   connmgr.ErrDecorated,
		},
		"before a Routing": {
			opts: func(*testing.T) []libp2p.Option { return []libp2p.Option{connmgr.Enable(), noRouting} },
			says: "cannot specify multiple routing options", // go-libp2p's words, which Enable's documentation has
		},
		"an option that undoes the manager's own": {
			opts: func(*testing.T) []libp2p.Option {
				return []libp2p.Option{connmgr.Enable(connmgr.WithMigrateOptions(migrate.WithConnSelector(
					func(context.Context, peer.ID) network.Conn { return nil })))}
			},
			says: "WithConnSelector: there is a selector already",
		},
		"a wrong option": {
			opts: func(*testing.T) []libp2p.Option { return []libp2p.Option{connmgr.Enable(connmgr.WithConcurrency(0))} },
			says: "connmgr.Enable: concurrency is 0: want 1 or more",
		},
	} {
		t.Run(name, func(t *testing.T) {
			before := goleak.IgnoreCurrent()
			h, err := libp2p.New(append(tc.opts(t), libp2p.DisableMetrics(), libp2p.NoListenAddrs)...)
			require.Nil(t, h)
			require.Error(t, err)
			if tc.is != nil {
				require.ErrorIs(t, err, tc.is)
			}
			require.ErrorContains(t, err, tc.says)
			requireNothingLeft(t, before)
		})
	}
}

// Another decorator that comes after Enable is noticed by fx.
func TestEnableBeforeAnotherDecorator(t *testing.T) {
	peers, err := pstoremem.NewPeerstore()
	require.NoError(t, err)
	defer peers.Close()
	// With parts of its own, since go-libp2p does not close its defaults here, as it does not
	// without Enable.
	_, err = libp2p.New(connmgr.Enable(), libp2p.DisableMetrics(), libp2p.NoListenAddrs, libp2p.Peerstore(peers),
		libp2p.ConnectionManager(coreconnmgr.NullConnMgr{}), libp2p.ResourceManager(&network.NullResourceManager{}),
		libp2p.WithFxOption(fx.Decorate(func(h host.Host) host.Host { return h })))
	require.ErrorContains(t, err, "host.Host already decorated")
}

// Where libp2p.New fails, the manager, the inner one and the host are closed, at whatever
// point that is.
func TestEnableWhereLibp2pFails(t *testing.T) {
	failure := errors.New("on purpose")
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer taken.Close()
	for name, opt := range map[string]libp2p.Option{
		"no place to listen":      libp2p.ListenAddrStrings(fmt.Sprintf("/ip4/127.0.0.1/tcp/%d", taken.Addr().(*net.TCPAddr).Port)),
		"the routing":             libp2p.Routing(func(host.Host) (corerouting.PeerRouting, error) { return nil, failure }),
		"options that contradict": libp2p.ChainOptions(libp2p.DisableRelay(), libp2p.EnableAutoRelayWithStaticRelays([]peer.AddrInfo{{}})),
		"a transport":             libp2p.Transport(func() (transport.Transport, error) { return nil, failure }),
		"an fx option":            libp2p.WithFxOption(fx.Invoke(func(host.Host) error { return failure })),
		"a start hook": libp2p.WithFxOption(fx.Invoke(func(lc fx.Lifecycle, _ host.Host) {
			lc.Append(fx.StartHook(func() error { return failure }))
		})),
	} {
		t.Run(name, func(t *testing.T) {
			before := goleak.IgnoreCurrent()
			inner := &closeCounter{}
			h, err := libp2p.New(libp2p.DisableMetrics(), opt, libp2p.ConnectionManager(inner), connmgr.Enable())
			require.Error(t, err)
			require.Nil(t, h)
			require.Positive(t, inner.closed)
			requireNothingLeft(t, before)
		})
	}
}

type closeCounter struct {
	coreconnmgr.NullConnMgr
	closed int
}

func (c *closeCounter) Close() error { c.closed++; return nil }

// A host that is closed while its streams move leaves nothing behind, and does not wait for
// them.
func TestEnableClosedInTheMiddle(t *testing.T) {
	before := goleak.IgnoreCurrent()
	at := connmgr.WithSettleDelay(time.Millisecond)
	a, b := newExampleNode(connmgr.Enable(at)), newExampleNode(connmgr.Enable(at))
	b.SetStreamHandler(echoID, echo)
	stop := connectThroughRelay(a, b)
	ctx, cancel := context.WithTimeout(network.WithAllowLimitedConn(t.Context(), "test"), hosttest.Patience)
	defer cancel()
	var streams []network.Stream
	for range 20 {
		s, err := a.NewStream(ctx, b.ID(), echoID)
		require.NoError(t, err)
		_, err = s.Write([]byte("hello"))
		require.NoError(t, err)
		streams = append(streams, s)
	}
	connectDirectly(a, b)
	hosttest.WaitFor(t, "a stream to have moved", func() bool {
		return slices.ContainsFunc(streams, func(s network.Stream) bool { return !s.Conn().Stat().Limited })
	})
	require.NoError(t, a.Close())
	require.NoError(t, b.Close())
	stop()
	for _, s := range streams {
		_, err := io.Copy(io.Discard, s)
		require.Error(t, err, "no end is told that is none")
	}
	requireNothingLeft(t, before)
}

func TestOf(t *testing.T) {
	enabled := newEnabled(t, onLoopback(connmgr.Enable())...)
	m, ok := connmgr.Of(enabled)
	require.True(t, ok)
	over, ok := connmgr.Of(routedhost.Wrap(enabled, routing{}))
	require.True(t, ok)
	require.Same(t, m, over)

	_, ok = connmgr.Of(newEnabled(t, onLoopback()...))
	require.False(t, ok, "a plain host has none")
	_, ok = connmgr.Of(nil)
	require.False(t, ok)
	_, ok = m.Host()
	require.True(t, ok)

	bare, err := connmgr.New(nil)
	require.NoError(t, err)
	h := newEnabled(t, onLoopback(libp2p.ConnectionManager(bare))...)
	_, ok = bare.Host()
	require.False(t, ok, "before Wrap")
	got, ok := connmgr.Of(h)
	require.True(t, ok)
	require.Same(t, bare, got)
	wrapped, err := bare.Wrap(h)
	require.NoError(t, err)
	own, ok := bare.Host()
	require.True(t, ok)
	require.Same(t, wrapped, own)
	for _, h := range []host.Host{h, wrapped, routedhost.Wrap(wrapped, routing{})} {
		got, ok := connmgr.Of(h)
		require.True(t, ok)
		require.Same(t, bare, got)
	}
}

// A manager has one host. A second one is told so, and that closing it closes the manager of
// the first one is an error in the log.
func TestOneManagerForTwoHosts(t *testing.T) {
	core, logs := observer.New(zap.ErrorLevel)
	m, err := connmgr.New(coreconnmgr.NullConnMgr{}, connmgr.WithLogger(zap.New(core)))
	require.NoError(t, err)
	first := newEnabled(t, onLoopback(libp2p.ConnectionManager(m))...)
	_, err = m.Wrap(first)
	require.NoError(t, err)
	second := newEnabled(t, onLoopback(libp2p.ConnectionManager(m))...)
	_, err = m.Wrap(second)
	require.ErrorIs(t, err, connmgr.ErrWrapped)
	require.ErrorContains(t, err, first.ID().String(), "it says whose it is")
	_, ok := connmgr.Of(second)
	require.False(t, ok, "it is the first one's")
	require.Zero(t, logs.Len())
	require.NoError(t, second.Close())
	require.Equal(t, 1, logs.Len())
	require.Contains(t, logs.All()[0].Message, "given to two hosts")
	require.Equal(t, first.ID().String(), logs.All()[0].ContextMap()["host"])
}

// The same where the second host is never wrapped.
func TestOneManagerForTwoHostsUnnoticed(t *testing.T) {
	core, logs := observer.New(zap.ErrorLevel)
	m, err := connmgr.New(coreconnmgr.NullConnMgr{}, connmgr.WithLogger(zap.New(core)))
	require.NoError(t, err)
	first := newEnabled(t, onLoopback(libp2p.ConnectionManager(m))...)
	_, err = m.Wrap(first)
	require.NoError(t, err)
	second := newEnabled(t, onLoopback(libp2p.ConnectionManager(m))...)
	require.NoError(t, second.Close())
	require.Equal(t, 1, logs.Len())

	m, err = connmgr.New(coreconnmgr.NullConnMgr{}, connmgr.WithLogger(zap.New(core)))
	require.NoError(t, err)
	only := newEnabled(t, onLoopback(libp2p.ConnectionManager(m))...)
	_, err = m.Wrap(only)
	require.NoError(t, err)
	require.NoError(t, only.Close())
	require.Equal(t, 1, logs.Len(), "nothing is wrong with one")
}

// TestEnableRests names what Enable rests on that go-libp2p does not promise. Where a new
// go-libp2p fails here, connmgr/enable.go has to be read again.
func TestEnableRests(t *testing.T) {
	t.Run("with a Routing, what libp2p.New returns is routed", func(t *testing.T) {
		h := newEnabled(t, onLoopback(noRouting)...)
		_, basic := reflect.TypeOf(h).Elem().FieldByName("BasicHost")
		_, routed := reflect.TypeOf(h).Elem().FieldByName("RoutedHost")
		require.True(t, basic && routed, "%T", h)
	})
	t.Run("the routed host, and what else is built on the host, are built on the decorated one", func(t *testing.T) {
		var decorated, seen host.Host
		h := newEnabled(t, onLoopback(libp2p.WithFxOption(fx.Decorate(func(h host.Host) host.Host {
			decorated = &counting{Host: h}
			return decorated
		})), libp2p.Routing(func(h host.Host) (corerouting.PeerRouting, error) {
			seen = h
			return routing{}, nil
		}))...)
		require.Same(t, decorated, seen)
		opened := decorated.(*counting).opened
		_, err := h.NewStream(network.WithNoDial(t.Context(), "test"), h.ID(), echoID)
		require.Error(t, err)
		require.Equal(t, opened+1, decorated.(*counting).opened)
	})
	t.Run("the host is made before anything is started", func(t *testing.T) {
		var listening int
		newEnabled(t, onLoopback(noRouting, libp2p.DisableRelay(), libp2p.WithFxOption(fx.Decorate(func(h host.Host) host.Host {
			listening = len(h.Network().ListenAddresses())
			return h
		})))...)
		require.Zero(t, listening)
	})
	t.Run("the manager is read when the host is made", func(t *testing.T) {
		h := newEnabled(t, onLoopback(connmgr.Enable())...)
		require.IsType(t, (*connmgr.Manager)(nil), h.ConnManager())
	})
}

type counting struct {
	host.Host
	opened int
}

func (c *counting) NewStream(ctx context.Context, p peer.ID, ids ...protocol.ID) (network.Stream, error) {
	c.opened++
	return c.Host.NewStream(ctx, p, ids...)
}
