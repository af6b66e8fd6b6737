package connmgr

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// manyConns makes facts of a peer with many connections of all kinds.
func manyConns(n int) *facts {
	var conns []connFacts
	for i := range n {
		c := aConn(fmt.Sprint(i), []string{quicAddr, tcpAddr, relayAddr, relayAddr}[i%4], opened(time.Minute-time.Duration(i)*time.Millisecond))
		if i%4 == 3 {
			c.candidate.Limited = true
			c.ends = in(time.Duration(i%20) * time.Second)
		}
		if i%5 == 0 {
			carries(2, 2)(&c)
		}
		conns = append(conns, c)
	}
	f := between(conns...)
	f.deaths = map[pathKind]int{{udp: true}: 2}
	return f
}

// lookedAt returns what it takes to look at a peer with many connections, and to remember them.
func lookedAt(t testing.TB, n int) func() {
	m, err := New(nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	m.sched.awake.Store(true) // no dispatcher: nothing happens by itself
	net := &fakeNet{conns: make(map[peer.ID][]*fakeConn), notifiee: m.Notifee()}
	for i := range n {
		net.connect(higher, strings.Replace(quicAddr, "4001", fmt.Sprint(1+i), 1), false)
	}
	d, err := m.sched.take(t.Context(), higher)
	require.NoError(t, err)
	return func() { m.rounds.remember(d, m.looks.look(higher, d)) }
}

// What a round costs for a peer with many connections: it has one up to 40 times a second if
// it wants to.
func BenchmarkManyConnections(b *testing.B) {
	for _, n := range []int{2, 64, 512} {
		b.Run(fmt.Sprint("decide/", n), func(b *testing.B) {
			f, cfg := manyConns(n), testConfig(func(c *config) { c.standby = true })
			for b.Loop() {
				decide(cfg, byDefault, f)
			}
		})
		b.Run(fmt.Sprint("look/", n), func(b *testing.B) {
			look := lookedAt(b, n)
			for b.Loop() {
				look()
			}
		})
	}
}

// It does not grow with the square of their number. Measured is the processor's time, which
// does not depend on what else the machine does.
func TestCostOfManyConnections(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cost := func(f func()) time.Duration {
		least := time.Hour
		for range 10 {
			before := threadTime(t)
			for range 4 {
				f()
			}
			least = min(least, threadTime(t)-before)
		}
		return least
	}
	const few, many = 64, 1024
	for name, of := range map[string]func(n int) func(){
		"decide": func(n int) func() {
			f, cfg := manyConns(n), testConfig(func(c *config) { c.standby = true })
			return func() { decide(cfg, byDefault, f) }
		},
		"look": func(n int) func() { return lookedAt(t, n) },
	} {
		growth := float64(cost(of(many))) / float64(cost(of(few)))
		t.Logf("%s: %.1f times as much for %d times as many", name, growth, many/few)
		require.Less(t, growth, 4.0*many/few, "%s: what the square would be is %d", name, many/few*many/few)
	}
}

func threadTime(t *testing.T) time.Duration {
	var ts unix.Timespec
	require.NoError(t, unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts))
	return time.Duration(ts.Nano())
}
