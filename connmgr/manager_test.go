package connmgr

import (
	"context"
	"errors"
	"math"
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
		"concurrency":       WithConcurrency(0),
		"last before first": WithRetry(2*time.Second, time.Second),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := New(connmgr.NullConnMgr{}, opt)
			require.Error(t, err)
		})
	}
	m, err := New(connmgr.NullConnMgr{}, WithPolicy(policy.Default()), WithLogger(zap.NewNop()), WithSettleDelay(time.Second),
		WithQuietTime(2*time.Second), WithPlainQuietTime(3*time.Second), WithInterval(4*time.Second), WithConcurrency(5),
		WithTakeover(6*time.Second), WithRetry(7*time.Second, 8*time.Second), WithProof(9*time.Second), WithStandby(),
		WithMigrateOptions(migrate.RequireVerifiedHandover()))
	require.NoError(t, err)
	defer m.Close()
	got := m.cfg
	require.Equal(t, []time.Duration{time.Second, 2 * time.Second, 3 * time.Second, 4 * time.Second, 6 * time.Second, 7 * time.Second, 8 * time.Second, 9 * time.Second},
		[]time.Duration{got.settleDelay, got.quietTime, got.plainQuietTime, got.interval, got.takeover, got.firstRetry, got.maxRetry, got.proofTime})
	require.Equal(t, []any{5, true, 1}, []any{got.concurrency, got.standby, len(got.migrateOptions)})
}

// A time that is too short is a loop that never rests, and one that is too long overflows
// once it is doubled. Both are refused, and say what is possible.
func TestTimesAreBounded(t *testing.T) {
	for name, with := range map[string]func(time.Duration) Option{
		"settle delay":     WithSettleDelay,
		"quiet time":       WithQuietTime,
		"plain quiet time": WithPlainQuietTime,
		"interval":         WithInterval,
		"takeover":         WithTakeover,
		"proof":            WithProof,
		"first retry":      func(d time.Duration) Option { return WithRetry(d, max(d, time.Second)) },
		"last retry":       func(d time.Duration) Option { return WithRetry(min(d, time.Second), d) },
	} {
		t.Run(name, func(t *testing.T) {
			for _, d := range []time.Duration{math.MinInt64, -time.Second, 0, 1, time.Millisecond - 1, maxTime + 1, math.MaxInt64/128 + 1, math.MaxInt64} {
				if name == "last retry" && d < time.Millisecond {
					continue // it is the first one that is wrong then
				}
				_, err := New(connmgr.NullConnMgr{}, with(d))
				require.ErrorContains(t, err, name+" is "+d.String(), "%v", d)
				require.ErrorContains(t, err, "want 1ms to 24h0m0s")
			}
			for _, d := range []time.Duration{time.Millisecond, maxTime} {
				m, err := New(connmgr.NullConnMgr{}, with(d))
				require.NoError(t, err)
				require.NoError(t, m.Close())
			}
		})
	}
}

// What is doubled stays positive, and within its bound, at the longest times and after any
// number of failures.
func TestDoubledTimesDoNotOverflow(t *testing.T) {
	c := defaultConfig()
	c.takeover, c.proofTime, c.firstRetry, c.maxRetry, c.probeTime = maxTime, maxTime, maxTime, maxTime, maxTime
	now := time.Now()
	for n := range 100 {
		require.True(t, takeover{progress: now, times: n}.due(&c).After(now), "takeover %d", n)
		require.Positive(t, c.proof(true, n))
		require.Positive(t, c.proof(false, n))
		require.LessOrEqual(t, c.proof(true, n), maxTime)
		require.Positive(t, c.retryAfter(n))
		require.LessOrEqual(t, c.retryAfter(n), c.maxRetry)
		require.GreaterOrEqual(t, reprobe(n, c.probeTime), c.probeTime)
		require.Positive(t, reprobe(n, defaultProbeTime))
		require.LessOrEqual(t, reprobe(n, defaultProbeTime), maxReprobe)
	}
	c = defaultConfig()
	require.Equal(t, defaultTakeover, takeover{progress: now}.due(&c).Sub(now))
	require.Equal(t, 64*defaultTakeover, takeover{progress: now, times: 1000}.due(&c).Sub(now))
	require.Equal(t, 30*time.Second, c.proof(true, 0))
	require.Equal(t, 3*time.Second, c.proof(false, 0), "a direct one can be dialled again")
	require.Equal(t, time.Minute, c.proof(true, 1))
	require.Equal(t, time.Minute, c.proof(false, 1), "not where such winners die young")
	require.Equal(t, time.Hour, c.proof(true, 1000))
	c.proofTime = 2 * time.Hour
	require.Equal(t, 2*time.Hour, c.proof(true, 1000), "as set")
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
	require.NoError(t, w.m.adopt(h))
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
		require.NoError(t, w.m.adopt(h))
		w.m.attach(h, newFakeMover())
		w.pass(fastSettle + rtt)
		require.Equal(t, 1, direct.count())
	})
}

// TestConcurrentUse is for the race detector: it runs in real time, on everything at
// once.
func TestConcurrentUse(t *testing.T) {
	w := newWorld(t, higher, WithSettleDelay(time.Millisecond), WithQuietTime(time.Millisecond), WithPlainQuietTime(time.Millisecond),
		WithInterval(time.Millisecond), WithRetry(time.Millisecond, time.Millisecond), WithTakeover(time.Millisecond), WithProof(time.Millisecond), WithConcurrency(4))
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
				_ = w.m.steer.choose(t.Context(), p)
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
