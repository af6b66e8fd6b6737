package connmgr

import (
	"context"
	"errors"
	"maps"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/policy"
)

// A peer that reconnects before the old connection is noticed to be dead.
func TestDeadConnectionDoesNotWin(t *testing.T) {
	for name, opts := range map[string][]Option{
		"by the default policy":                    nil, // for which round-trip times are measured first
		"by one that asks for no round-trip times": {WithPolicy(policy.Chain(policy.TransportOrder()))},
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, higher, opts...)
				dead := w.connect(quicAddr)
				streams := dead.open(2)
				dead.set(func() { dead.silent = true })
				w.pass(time.Minute)
				alive := w.connect(tcpAddr) // which ranks lower
				w.pass(defaultSettleDelay + defaultProbeTime + rtt)
				require.Equal(t, alive, w.m.steer(t.Context(), higher))
				require.Equal(t, 1, w.logs.FilterMessageSnippet("quic direct does not answer").Len())
				require.Equal(t, 2, alive.count(), "its streams move to the one that works")
				require.Equal(t, alive, streams[0].Conn())
				w.pass(time.Hour)
				require.False(t, alive.IsClosed())
			})
		})
	}
}

func TestConnectionThatAnswersAgainMayWin(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		quic := w.connect(quicAddr)
		quic.set(func() { quic.silent = true })
		quic.setPlain(1)
		w.pass(time.Minute)
		w.connect(tcpAddr).setPlain(1)
		w.pass(defaultSettleDelay + defaultProbeTime)
		e := w.m.Explain(higher)
		require.Contains(t, e.Conns[1].State, "it does not answer; ")
		quic.set(func() { quic.silent = false })
		w.pass(silentTime + (patienceIntervals+1)*defaultInterval)
		require.Equal(t, quic, w.m.steer(t.Context(), higher), "it ranks higher")
	})
}

func TestNothingIsDoneWhereNoConnectionAnswers(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		quic := w.connect(quicAddr)
		w.pass(time.Millisecond)
		tcp := w.connect(tcpAddr)
		w.pass(time.Second)
		quic.set(func() { quic.silent = true })
		tcp.set(func() { tcp.silent = true })
		tcp.open(1)
		w.pass(time.Hour)
		require.False(t, quic.IsClosed() && tcp.IsClosed())
		require.Empty(t, w.net.ConnsToPeer(higher)[0].(*fakeConn).code)
	})
}

// An error is an answer, or none of the connection's business: only silence counts.
func TestProbeThatFails(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		w.m.probe = func(context.Context, network.Conn) (time.Duration, error) {
			return 0, errors.New("no stream is to be had")
		}
		quic := w.connect(quicAddr)
		w.pass(time.Second)
		tcp := w.connect(tcpAddr)
		w.pass(defaultSettleDelay + defaultQuietTime + time.Second)
		require.True(t, tcp.pruned())
		require.False(t, quic.IsClosed())
	})
}

// Connections whose transport measures no round-trip time are pinged, at a bounded rate,
// if the policy looks at it.
func TestRoundTripTimes(t *testing.T) {
	pings := func(t *testing.T, policy policy.Policy, took func(*fakeConn) time.Duration) (w *world, pinged func() map[*fakeConn]int) {
		w = newWorld(t, higher, WithPolicy(policy))
		var mu sync.Mutex
		counts := make(map[*fakeConn]int)
		pinged = func() map[*fakeConn]int {
			mu.Lock()
			defer mu.Unlock()
			return maps.Clone(counts)
		}
		w.m.probe = func(_ context.Context, c network.Conn) (time.Duration, error) {
			fc := c.(*fakeConn)
			time.Sleep(took(fc))
			mu.Lock()
			defer mu.Unlock()
			counts[fc]++
			return took(fc), nil
		}
		return w, pinged
	}
	t.Run("decide", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w, _ := pings(t, policy.Chain(policy.RTTBand()), func(c *fakeConn) time.Duration {
				return time.Duration(len(c.addr.Protocols())) * 50 * time.Millisecond // TCP has the shorter address
			})
			w.connect(quicAddr).setPlain(1)
			tcp := w.connect(tcpAddr)
			w.pass(defaultSettleDelay + (patienceIntervals+2)*defaultInterval)
			require.Equal(t, tcp, w.m.steer(t.Context(), higher))
			require.Contains(t, w.m.Explain(higher).String(), "rtt")
		})
	})
	t.Run("at a bounded rate", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w, pinged := pings(t, policy.Chain(policy.RTTBand()), func(*fakeConn) time.Duration { return rtt })
			quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
			quic.setPlain(1)
			tcp.setPlain(1)
			w.pass(time.Hour)
			require.Len(t, pinged(), 2, "all of them")
			for _, n := range pinged() {
				require.InDelta(t, time.Hour/rttInterval, n, 5)
			}
		})
	})
	t.Run("unasked", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w, pinged := pings(t, policy.Chain(policy.Direct(), policy.TransportOrder()), func(*fakeConn) time.Duration { return rtt })
			w.connect(quicAddr).setPlain(1)
			tcp := w.connect(tcpAddr)
			tcp.setPlain(1)
			w.pass(time.Hour)
			require.Zero(t, pinged()[tcp])
		})
	})
}

func TestRoundTripTimesOfAllOrNone(t *testing.T) {
	v := view{conns: []connView{{connState: &connState{rtt: 7}}, {connState: &connState{}}, {connState: &connState{rtt: 9}}}}
	v.measure([]time.Duration{5, 0, 0})
	for i := range v.conns {
		require.Zero(t, v.conns[i].candidate.RTT)
	}
	v.measure([]time.Duration{5, 6, 0})
	for i, want := range []time.Duration{5, 6, 9} {
		require.Equal(t, want, v.conns[i].candidate.RTT)
	}
}

func TestPingsAreSmoothed(t *testing.T) {
	var cs connState
	cs.pinged(800)
	cs.pinged(1600)
	require.Equal(t, time.Duration(900), cs.rtt, "an eighth of the new one, RFC 6298")
	var none connState
	none.pinged(0)
	require.NotZero(t, none.rtt, "zero would mean that it is not known")
}

func TestInterfaces(t *testing.T) {
	var in interfaces
	now := time.Now()
	require.NotEmpty(t, in.of(ma.StringCast("/ip4/127.0.0.1/tcp/1"), now))
	require.Empty(t, in.of(ma.StringCast("/ip4/203.0.113.7/tcp/1"), now), "an address that this machine does not have")
	require.Empty(t, in.of(nil, now))
	require.Empty(t, in.of(ma.StringCast("/dns4/example.com/tcp/1"), now))
}
