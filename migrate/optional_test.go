package migrate

import (
	"context"
	"reflect"
	"testing"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/routing"
	"github.com/libp2p/go-libp2p/p2p/host/autonat"
	basichost "github.com/libp2p/go-libp2p/p2p/host/basic"
	blankhost "github.com/libp2p/go-libp2p/p2p/host/blank"
	routedhost "github.com/libp2p/go-libp2p/p2p/host/routed"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/stretchr/testify/require"
	"go.uber.org/fx"

	. "github.com/go-portage/portage/internal/hosttest"
)

type nowhereRouting struct{}

func (nowhereRouting) FindPeer(_ context.Context, p peer.ID) (peer.AddrInfo, error) {
	return peer.AddrInfo{ID: p}, nil
}

// methods returns the methods of t with their types, less the receiver.
func methods(t reflect.Type) map[string]string {
	has := make(map[string]string)
	for m := range t.NumMethod() {
		method := t.Method(m)
		in := make([]reflect.Type, 0, method.Type.NumIn())
		for i := range method.Type.NumIn() {
			if i > 0 || t.Kind() == reflect.Interface {
				in = append(in, method.Type.In(i))
			}
		}
		out := make([]reflect.Type, 0, method.Type.NumOut())
		for i := range method.Type.NumOut() {
			out = append(out, method.Type.Out(i))
		}
		has[method.Name] = reflect.FuncOf(in, out, method.Type.IsVariadic()).String()
	}
	return has
}

// A wrapped host has every method that go-libp2p's hosts have, and none of the kind beyond
// these. Where a new go-libp2p adds one, it has to be added to optional.go.
func TestNoMethodIsLost(t *testing.T) {
	newHost := func(opts ...libp2p.Option) host.Host {
		h, err := libp2p.New(append(opts, libp2p.NoListenAddrs, libp2p.DisableMetrics())...)
		require.NoError(t, err)
		t.Cleanup(func() { _ = h.Close() })
		return h
	}
	made := newHost()
	routed := newHost(libp2p.Routing(func(host.Host) (routing.PeerRouting, error) { return nowhereRouting{}, nil }))

	core := methods(reflect.TypeFor[host.Host]())
	// What libp2p.New returns happens to have these. Start is also a basic host's, and is
	// called once, by who makes one.
	notOfHosts := methods(reflect.TypeFor[*fx.App]())
	has := methods(reflect.TypeFor[*Host]())
	optional := make(map[string]bool)
	for _, theirs := range []reflect.Type{
		reflect.TypeFor[*basichost.BasicHost](), reflect.TypeFor[*routedhost.RoutedHost](), reflect.TypeFor[*blankhost.BlankHost](),
		reflect.TypeOf(made), reflect.TypeOf(routed),
	} {
		for name, is := range methods(theirs) {
			if _, other := notOfHosts[name]; other {
				continue
			}
			require.Equal(t, is, has[name], "%s has %s", theirs, name)
			if _, ok := core[name]; !ok {
				optional[name] = true
			}
		}
	}

	own := map[string]bool{"Leave": true, "Migrate": true, "Speaks": true, "Streams": true, "Supports": true, "Traffic": true, "TrafficOfAll": true, "Unlabelled": true}
	for name := range has {
		_, ofCore := core[name]
		require.True(t, ofCore || own[name] || optional[name], "%s: no host of go-libp2p's has it any more, and it is none of ours", name)
	}
}

// assertable is what programs ask of a host.
type assertable interface {
	host.Host
	IDService() identify.IDService
	AllAddrs() []ma.Multiaddr
	ConfirmedAddrs() (reachable, unreachable, unknown []ma.Multiaddr)
	Reachability() network.Reachability
	GetAutoNat() autonat.AutoNAT
	SetAutoNat(autonat.AutoNAT)
}

func TestOptionalMethodsAreTheInnerOnes(t *testing.T) {
	// Some of the addresses are not advertised, and AutoNATv2 has not seen them.
	h := New(t, []Transport{TCP, QUIC}, libp2p.ForceReachabilityPrivate(), libp2p.EnableAutoNATv2(),
		libp2p.AddrsFactory(func(addrs []ma.Multiaddr) []ma.Multiaddr { return addrs[:min(len(addrs), 1)] }))
	inner := h.Host.(assertable)
	wrapped, err := Wrap(h.Host)
	require.NoError(t, err)
	var got assertable = wrapped

	require.Same(t, inner.IDService(), got.IDService())
	require.NotEqual(t, inner.Addrs(), inner.AllAddrs())
	require.Equal(t, inner.AllAddrs(), got.AllAddrs())
	for i, want := range confirmed(inner) {
		require.Equal(t, want, confirmed(got)[i])
	}
	require.NotNil(t, inner.GetAutoNat())
	require.Same(t, inner.GetAutoNat(), got.GetAutoNat())
	WaitFor(t, "the host to have heard of its reachability", func() bool {
		return inner.Reachability() == network.ReachabilityPrivate
	})
	require.Equal(t, network.ReachabilityPrivate, got.Reachability())
}

func confirmed(h assertable) [3][]ma.Multiaddr {
	reachable, unreachable, unknown := h.ConfirmedAddrs()
	return [3][]ma.Multiaddr{reachable, unreachable, unknown}
}

// fixedAddrs is a host with confirmed addresses, and nothing else of the kind.
type fixedAddrs struct{ host.Host }

var confirmedAddrs = [3][]ma.Multiaddr{
	{ma.StringCast("/ip4/1.1.1.1/tcp/1")}, {ma.StringCast("/ip4/1.1.1.1/tcp/2")}, {ma.StringCast("/ip4/1.1.1.1/tcp/3")},
}

func (fixedAddrs) ConfirmedAddrs() (reachable, unreachable, unknown []ma.Multiaddr) {
	return confirmedAddrs[0], confirmedAddrs[1], confirmedAddrs[2]
}

func TestConfirmedAddrsAreInOrder(t *testing.T) {
	h, err := Wrap(fixedAddrs{New(t, []Transport{TCP}).Host})
	require.NoError(t, err)
	require.Equal(t, confirmedAddrs, confirmed(h))
}

// holdsAutoNAT is a host that holds an AutoNAT service, and nothing else of the kind.
type holdsAutoNAT struct {
	host.Host
	service autonat.AutoNAT
}

func (h *holdsAutoNAT) SetAutoNat(a autonat.AutoNAT) { h.service = a }
func (h *holdsAutoNAT) GetAutoNat() autonat.AutoNAT  { return h.service }

func TestAutoNATIsTheInnerHosts(t *testing.T) {
	inner := &holdsAutoNAT{Host: New(t, []Transport{TCP}).Host}
	h, err := Wrap(inner)
	require.NoError(t, err)
	service := &fakeAutoNAT{}
	h.SetAutoNat(service)
	require.Same(t, service, inner.service)
	require.Same(t, service, h.GetAutoNat())
	require.NoError(t, h.Close())
	require.False(t, service.closed, "it is the inner host's to close")
}

// Where the wrapped host has no such methods, programs go on as if there were none.
func TestOptionalMethodsThatTheInnerHostHasNot(t *testing.T) {
	for name, inner := range map[string]host.Host{
		"routed": routedhost.Wrap(New(t, []Transport{TCP}).Host, nowhereRouting{}),
		"blank":  blankhost.NewBlankHost(New(t, []Transport{TCP}).Network()),
	} {
		t.Run(name, func(t *testing.T) {
			h, err := Wrap(inner)
			require.NoError(t, err)
			require.Equal(t, inner.Addrs(), h.AllAddrs())
			require.NotEmpty(t, h.AllAddrs())
			require.Equal(t, [3][]ma.Multiaddr{}, confirmed(h))
			require.Equal(t, network.ReachabilityUnknown, h.Reachability())
			ids := h.IDService()
			ids.Start()
			ids.IdentifyConn(nil)
			<-ids.IdentifyWait(nil)
			require.NoError(t, ids.Close())

			require.Nil(t, h.GetAutoNat())
			first, second := &fakeAutoNAT{}, &fakeAutoNAT{}
			h.SetAutoNat(first)
			h.SetAutoNat(second)
			require.Same(t, first, h.GetAutoNat(), "as a basic host does")
			require.NoError(t, h.Close())
			require.Equal(t, []bool{true, false}, []bool{first.closed, second.closed})
		})
	}
}

type fakeAutoNAT struct{ closed bool }

func (*fakeAutoNAT) Status() network.Reachability { return network.ReachabilityPublic }
func (a *fakeAutoNAT) Close() error               { a.closed = true; return nil }
