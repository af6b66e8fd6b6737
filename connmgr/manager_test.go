package connmgr

import (
	"context"
	"errors"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/connmgr"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	basic "github.com/libp2p/go-libp2p/p2p/net/connmgr"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"github.com/go-portage/portage/migrate"
	"github.com/go-portage/portage/policy"
)

// recorder is an inner manager that notes each call of it.
type recorder struct {
	calls []any
	err   error
}

func (r *recorder) note(call ...any) { r.calls = append(r.calls, call) }

func (r *recorder) TagPeer(p peer.ID, tag string, v int)    { r.note("TagPeer", p, tag, v) }
func (r *recorder) UntagPeer(p peer.ID, tag string)         { r.note("UntagPeer", p, tag) }
func (r *recorder) TrimOpenConns(ctx context.Context)       { r.note("TrimOpenConns", ctx) }
func (r *recorder) Protect(p peer.ID, tag string)           { r.note("Protect", p, tag) }
func (r *recorder) Notifee() network.Notifiee               { return (*recorderNotifiee)(r) }
func (r *recorder) Close() error                            { r.note("Close"); return r.err }
func (r *recorder) CheckLimit(connmgr.GetConnLimiter) error { r.note("CheckLimit"); return r.err }

func (r *recorder) UpsertTag(p peer.ID, tag string, upsert func(int) int) {
	r.note("UpsertTag", p, tag, upsert(1))
}

func (r *recorder) GetTagInfo(p peer.ID) *connmgr.TagInfo {
	r.note("GetTagInfo", p)
	return &connmgr.TagInfo{Value: 5}
}

func (r *recorder) Unprotect(p peer.ID, tag string) bool {
	r.note("Unprotect", p, tag)
	return true
}

func (r *recorder) IsProtected(p peer.ID, tag string) bool {
	r.note("IsProtected", p, tag)
	return true
}

func (r *recorder) RegisterDecayingTag(name string, interval time.Duration, _ connmgr.DecayFn, _ connmgr.BumpFn) (connmgr.DecayingTag, error) {
	r.note("RegisterDecayingTag", name, interval)
	return nil, r.err
}

type recorderNotifiee recorder

func (n *recorderNotifiee) Listen(network.Network, ma.Multiaddr) { (*recorder)(n).note("Listen") }
func (n *recorderNotifiee) ListenClose(network.Network, ma.Multiaddr) {
	(*recorder)(n).note("ListenClose")
}
func (n *recorderNotifiee) Connected(network.Network, network.Conn) { (*recorder)(n).note("Connected") }
func (n *recorderNotifiee) Disconnected(network.Network, network.Conn) {
	(*recorder)(n).note("Disconnected")
}

func TestEverythingIsForwarded(t *testing.T) {
	failure := errors.New("inner's error")
	inner := &recorder{err: failure}
	m, err := New(inner)
	require.NoError(t, err)
	net := &fakeNet{conns: make(map[peer.ID][]*fakeConn)}
	c := &fakeConn{net: net, remote: higher}

	m.TagPeer(higher, "tag", 7)
	m.UntagPeer(higher, "tag")
	m.UpsertTag(higher, "tag", func(i int) int { return i + 1 })
	require.Equal(t, 5, m.GetTagInfo(higher).Value)
	m.TrimOpenConns(t.Context())
	m.Protect(higher, "tag")
	require.True(t, m.Unprotect(higher, "tag"))
	require.True(t, m.IsProtected(higher, "tag"))
	require.ErrorIs(t, m.CheckLimit(nil), failure)
	_, err = m.RegisterDecayingTag("tag", time.Second, nil, nil)
	require.ErrorIs(t, err, failure)
	require.Same(t, m.Notifee(), m.Notifee(), "it can be taken off a network again")
	m.Notifee().Listen(net, nil)
	m.Notifee().ListenClose(net, nil)
	m.Notifee().Connected(net, c)
	m.Notifee().Disconnected(net, c)
	require.ErrorIs(t, m.Close(), failure)
	require.ErrorIs(t, m.Close(), failure)
	m.Notifee().Disconnected(net, c) // the host goes on to close its connections

	require.Equal(t, []any{
		[]any{"TagPeer", higher, "tag", 7},
		[]any{"UntagPeer", higher, "tag"},
		[]any{"UpsertTag", higher, "tag", 2},
		[]any{"GetTagInfo", higher},
		[]any{"TrimOpenConns", t.Context()},
		[]any{"Protect", higher, "tag"},
		[]any{"Unprotect", higher, "tag"},
		[]any{"IsProtected", higher, "tag"},
		[]any{"CheckLimit"},
		[]any{"RegisterDecayingTag", "tag", time.Second},
		[]any{"Listen"},
		[]any{"ListenClose"},
		[]any{"Connected"},
		[]any{"Disconnected"},
		[]any{"Close"},
		[]any{"Disconnected"},
	}, inner.calls)

	// A method that a later go-libp2p adds to the interface has to be added to this
	// test too.
	require.Equal(t, 11, reflect.TypeFor[connmgr.ConnManager]().NumMethod())
}

func TestInnerWithoutDecayingTags(t *testing.T) {
	m, err := New(connmgr.NullConnMgr{})
	require.NoError(t, err)
	defer m.Close()
	_, err = m.RegisterDecayingTag("score", time.Second, nil, nil)
	require.ErrorIs(t, err, ErrNoDecay)
	require.ErrorContains(t, err, "NullConnMgr", "it says what inner is")
}

func TestDefaultInner(t *testing.T) {
	m, err := New(nil)
	require.NoError(t, err)
	info := m.inner.(*basic.BasicConnMgr).GetInfo()
	require.Equal(t, 160, info.LowWater, "as libp2p.New makes it")
	require.Equal(t, 192, info.HighWater)
	require.Equal(t, time.Minute, info.GracePeriod)
	_, err = m.RegisterDecayingTag("score", time.Second, connmgr.DecayNone(), connmgr.BumpSumUnbounded())
	require.NoError(t, err)
	require.NoError(t, m.Close(), "it is ours to close; goleak sees to it")
}

func TestOptionsAreChecked(t *testing.T) {
	for name, opt := range map[string]Option{
		"nil policy":        WithPolicy(nil),
		"nil logger":        WithLogger(nil),
		"nil slog logger":   WithSlog(nil),
		"no settle delay":   WithSettleDelay(0),
		"no quiet time":     WithQuietTime(-1),
		"plain quiet time":  WithPlainQuietTime(0),
		"interval":          WithInterval(0),
		"concurrency":       WithConcurrency(0),
		"takeover":          WithTakeover(0),
		"first retry":       WithRetry(0, time.Second),
		"last before first": WithRetry(2, 1),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := New(connmgr.NullConnMgr{}, opt)
			require.Error(t, err)
		})
	}
	m, err := New(connmgr.NullConnMgr{}, WithPolicy(policy.Default()), WithLogger(zap.NewNop()), WithSettleDelay(1),
		WithQuietTime(2), WithPlainQuietTime(3), WithInterval(4), WithConcurrency(5), WithTakeover(6), WithRetry(7, 8),
		WithMigrateOptions(migrate.RequireVerifiedHandover()))
	require.NoError(t, err)
	defer m.Close()
	got := m.cfg
	require.Equal(t, []any{time.Duration(1), time.Duration(2), time.Duration(3), time.Duration(4), 5, 6, time.Duration(7), time.Duration(8), 1},
		[]any{got.settleDelay, got.quietTime, got.plainQuietTime, got.interval, got.concurrency, got.takeover, got.firstRetry, got.maxRetry, len(got.migrateOptions)})
}

func TestWrapRefuses(t *testing.T) {
	t.Run("no host", func(t *testing.T) {
		w := newBareWorld(t, higher)
		_, err := w.m.Wrap(nil)
		require.Error(t, err)
	})
	t.Run("a host with another manager", func(t *testing.T) {
		w := newBareWorld(t, higher)
		_, err := w.m.Wrap(&fakeHost{net: w.net, cm: connmgr.NullConnMgr{}})
		require.ErrorIs(t, err, ErrNotManager)
	})
	t.Run("a second time", func(t *testing.T) {
		w := newWorld(t, higher)
		_, err := w.m.Wrap(&fakeHost{net: w.net, cm: w.m})
		require.ErrorIs(t, err, ErrWrapped)
	})
	t.Run("after Close", func(t *testing.T) {
		w := newBareWorld(t, higher)
		require.NoError(t, w.m.Close())
		_, err := w.m.Wrap(&fakeHost{net: w.net, cm: w.m})
		require.ErrorIs(t, err, ErrClosed)
	})
}

func TestManagerIsAdvertised(t *testing.T) {
	w := newBareWorld(t, higher)
	h := &fakeHost{net: w.net, cm: w.m, handlers: make(map[protocol.ID]network.StreamHandler)}
	require.NoError(t, w.m.claim(h))
	w.m.attach(h, newFakeMover())
	require.NotNil(t, h.handler(DrainID))
	require.NoError(t, w.m.Close())
	require.Nil(t, h.handler(DrainID), "a closed manager does not advertise itself")
}

func TestConnectionsFromBeforeWrap(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newBareWorld(t, higher)
		n := w.net.notifiee
		w.net.notifiee = network.GlobalNoopNotifiee // they came unseen
		w.connectLimited().open(1)
		direct := w.connect(quicAddr)
		w.net.notifiee = n
		h := &fakeHost{net: w.net, cm: w.m, handlers: make(map[protocol.ID]network.StreamHandler)}
		require.NoError(t, w.m.claim(h))
		w.m.attach(h, newFakeMover())
		w.pass(defaultSettleDelay + rtt)
		require.Equal(t, 1, direct.count())
	})
}

// TestConcurrentUse is for the race detector: it runs in real time, on everything at
// once.
func TestConcurrentUse(t *testing.T) {
	w := newWorld(t, higher, WithSettleDelay(time.Millisecond), WithQuietTime(time.Millisecond), WithPlainQuietTime(time.Millisecond),
		WithInterval(time.Millisecond), WithRetry(time.Millisecond, time.Millisecond), WithTakeover(1), WithConcurrency(4))
	var turn int
	var mu sync.Mutex
	w.mover.setAnswer(func(*fakeStream) error {
		mu.Lock()
		defer mu.Unlock()
		turn++
		return []error{nil, nil, migrate.ErrTryLater, errDeniedByFake, errFakeReset, nil, migrate.ErrClosed}[turn%7]
	})
	var wg sync.WaitGroup
	for i := range 8 {
		p := []peer.ID{lower, higher}[i%2] + peer.ID(rune('0'+i))
		if i%3 > 0 {
			w.net.identify(p, DrainID)
		}
		wg.Go(func() {
			for range 5 {
				relay := w.net.connect(p, relayAddr, true)
				streams := relay.open(3)
				w.net.connect(p, quicAddr, false)
				tcp := w.net.connect(p, tcpAddr, false)
				tcp.open(1)
				_, _ = w.m.Consolidate(t.Context(), p)
				_ = w.m.Explain(p).String()
				_ = w.m.steer(t.Context(), p)
				for _, s := range streams {
					relay.remove(s)
				}
				tcp.Close()
			}
		})
	}
	wg.Wait()
	require.NoError(t, w.m.Close())
}
