package connmgr

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/connmgr"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	basic "github.com/libp2p/go-libp2p/p2p/net/connmgr"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/internal/hosttest"
)

// comeAndGo has a peer's only connection open and close.
func comeAndGo(n network.Notifiee, net network.Network, c network.Conn) func() {
	return func() {
		n.Connected(net, c)
		n.Disconnected(net, c)
	}
}

func TestCallbacksDoNotAllocate(t *testing.T) {
	if !hosttest.Alone(t) {
		return
	}
	inner, err := basic.NewConnManager(160, 192)
	require.NoError(t, err)
	defer inner.Close()
	for name, inner := range map[string]connmgr.ConnManager{"basic": inner, "null": connmgr.NullConnMgr{}} {
		t.Run(name, func(t *testing.T) {
			m, err := New(inner)
			require.NoError(t, err)
			defer m.Close()
			net := &fakeNet{conns: make(map[peer.ID][]*fakeConn)}
			c := &fakeConn{net: net, remote: higher, id: "conn", addr: ma.StringCast(quicAddr)}
			bare := testing.AllocsPerRun(1000, comeAndGo(inner.Notifee(), net, c))
			decorated := testing.AllocsPerRun(1000, comeAndGo(m.Notifee(), net, c))
			require.Equal(t, bare, decorated, "allocations over inner's")
			require.Empty(t, m.watch.events)
			require.False(t, m.sched.awake.Load(), "no goroutine is started for peers without duplicates")
		})
	}
}

func TestNothingIsKeptForPeersWithOneConnection(t *testing.T) {
	if !hosttest.Alone(t) {
		return
	}
	m, err := New(connmgr.NullConnMgr{})
	require.NoError(t, err)
	defer m.Close()
	net := &fakeNet{conns: make(map[peer.ID][]*fakeConn)}
	conns := make([]*fakeConn, 50_000) // nearly as many as there are counters: many share one
	for i := range conns {
		conns[i] = &fakeConn{net: net, remote: peer.ID(fmt.Sprintf("peer %d", i))}
	}
	before := heapObjects()
	for _, c := range conns {
		m.watch.Connected(net, c)
	}
	for len(m.watch.take(nil)) > 0 { // what shares a counter is looked at, and dropped
		runtime.Gosched()
	}
	after := heapObjects()
	runtime.KeepAlive(conns)
	require.InDelta(t, before, after, 500, "objects on the heap with 50,000 peers")
	m.sched.mu.Lock()
	defer m.sched.mu.Unlock()
	require.Empty(t, m.sched.peers)
}

func heapObjects() int {
	runtime.GC()
	runtime.GC() // also what the first one finalized
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return int(stats.HeapObjects)
}

func TestCounters(t *testing.T) {
	net := &fakeNet{conns: make(map[peer.ID][]*fakeConn)}
	c := &fakeConn{net: net, remote: higher}
	newTestWatcher := func() *watcher { return newWatcher(nil, func() {}, func(network.Conn) {}) }
	t.Run("second connection", func(t *testing.T) {
		w := newTestWatcher()
		w.Connected(net, c)
		require.Empty(t, w.take(nil))
		w.Connected(net, c)
		require.Equal(t, []event{{higher, true}}, w.take(nil))
		w.Disconnected(net, c)
		require.Equal(t, []event{{higher, false}}, w.take(nil))
		w.Disconnected(net, c)
		require.Empty(t, w.take(nil), "the last one to go is nothing to consolidate")
	})
	t.Run("more than a counter can count", func(t *testing.T) {
		w := newTestWatcher()
		for range 300 {
			w.Connected(net, c)
		}
		for range 298 {
			w.Disconnected(net, c)
		}
		w.take(nil)
		w.Disconnected(net, c)
		require.NotEmpty(t, w.take(nil), "it must not be taken for zero")
	})
	t.Run("fewer than none", func(t *testing.T) {
		w := newTestWatcher()
		w.Disconnected(net, c) // a connection from before
		w.Connected(net, c)
		require.Empty(t, w.take(nil), "one connection is none too many")
		w.Connected(net, c)
		require.NotEmpty(t, w.take(nil))
	})
}

func BenchmarkComeAndGo(b *testing.B) {
	inner, err := basic.NewConnManager(160, 192)
	require.NoError(b, err)
	m, err := New(inner)
	require.NoError(b, err)
	defer m.Close()
	net := &fakeNet{conns: make(map[peer.ID][]*fakeConn)}
	c := &fakeConn{net: net, remote: higher, id: "conn", addr: ma.StringCast(quicAddr)}
	for name, n := range map[string]network.Notifiee{"inner": inner.Notifee(), "manager": m.Notifee()} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			f := comeAndGo(n, net, c)
			for b.Loop() {
				f()
			}
		})
	}
}

// BenchmarkDuplicates is what peers cost that keep their duplicates: a first round
// each, and the memory that stays.
func BenchmarkDuplicates(b *testing.B) {
	for _, peers := range []int{100, 1_000, 10_000} {
		b.Run(fmt.Sprintf("peers=%d", peers), func(b *testing.B) {
			var kept int
			for b.Loop() {
				b.StopTimer()
				m, err := New(connmgr.NullConnMgr{}, WithSettleDelay(time.Millisecond))
				require.NoError(b, err)
				net := &fakeNet{
					conns:     make(map[peer.ID][]*fakeConn),
					protocols: make(map[peer.ID][]protocol.ID),
					notifiee:  network.GlobalNoopNotifiee,
				}
				m.watch.scan(net)
				var conns []*fakeConn
				for i := range peers {
					for _, addr := range []string{tcpAddr, quicAddr} {
						c := net.connect(peer.ID(fmt.Sprintf("peer z%d", i)), addr, false)
						c.plain = 1
						conns = append(conns, c)
					}
				}
				before := heapBytes()
				b.StartTimer()
				for _, c := range conns {
					m.watch.Connected(net, c)
				}
				for m.steer.count.Load() < int32(peers) {
					runtime.Gosched()
				}
				b.StopTimer()
				kept += heapBytes() - before
				require.NoError(b, m.Close())
				b.StartTimer()
			}
			b.ReportMetric(float64(kept)/float64(b.N*peers), "B/peer")
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*peers), "ns/peer")
		})
	}
}

func heapBytes() int {
	runtime.GC()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return int(stats.HeapAlloc)
}
