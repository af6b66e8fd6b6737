package connmgr

import (
	"flag"
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

var crowdFlag = flag.Int("crowd", 100, "peers of TestCrowd: the table of docs/performance.md has 100, 1000 and 10000")

// What peers cost the manager of a host: those with one connection, those that come with a
// second one all at once, and when they have one again. The peers are fakes, whose answers take
// a round trip of virtual time and no work, so that what is measured is the manager, with its
// goroutines. The processor's time does not depend on what else the machine does.
//
//	go test ./connmgr -run TestCrowd -v -crowd 10000
func TestCrowd(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		n := *crowdFlag
		w := newWorld(t, higher, WithLogger(zap.NewNop()))
		watching := w.net.notifiee
		w.net.notifiee = network.GlobalNoopNotifiee // the callbacks are measured by themselves
		var peers []peer.ID
		var conns []*fakeConn
		for i := range n {
			p := peer.ID(fmt.Sprintf("z, peer %d", i)) // higher, so that this side decides
			peers = append(peers, p)
			w.net.identify(p, DrainID)
			conns = append(conns, w.net.connect(p, tcpAddr, false))
		}
		table := func(what string, total float64, unit string) {
			t.Logf("%s: %.3g %s, %.3g a peer", what, total, unit, total/float64(n))
		}
		micros := func(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

		begun := processTime(t)
		for _, c := range conns {
			watching.Connected(w.net, c)
		}
		callbacks := processTime(t) - begun
		w.pass(time.Minute)
		table("one connection each: the callback", micros(callbacks), "µs")
		require.Empty(t, w.m.sched.peers, "nothing is kept of a peer with one connection")

		// The fakes' memory is not the manager's: the second connections are there before it hears of them.
		conns = conns[:0]
		for _, p := range peers {
			conns = append(conns, w.net.connect(p, quicAddr, false))
		}
		fakes := heldMemory()
		w.net.notifiee = watching
		came := time.Now()
		begun = processTime(t)
		for _, c := range conns {
			watching.Connected(w.net, c)
		}
		single := func() bool {
			for _, p := range peers {
				if len(openConns(w.net, p)) > 1 {
					return false
				}
			}
			return true
		}
		w.pass(20 * time.Second) // all have been asked, and none has proved itself
		took := processTime(t) - begun
		table("held meanwhile", float64(heldMemory()-fakes), "bytes")
		begun = processTime(t)
		for !single() && time.Since(came) < 10*time.Minute {
			w.pass(250 * time.Millisecond)
		}
		took += processTime(t) - begun
		require.True(t, single(), "each peer has one connection again")
		t.Logf("a second connection each, all at once: one again after %v", time.Since(came).Round(time.Millisecond))
		table("until then", micros(took), "µs")

		w.pass(time.Minute)
		require.Empty(t, w.m.sched.peers, "nothing is kept of a peer that is settled")
		require.Empty(t, w.due())
		require.Zero(t, w.m.steer.count.Load())
		require.LessOrEqual(t, w.m.rounds.young.count.Load(), int32(maxDeaths))
		table("held when settled", float64(heldMemory()-fakes), "bytes")

		begun = processTime(t)
		w.pass(time.Minute)
		table("an idle minute", micros(processTime(t)-begun), "µs")
	})
}

// heldMemory is what the process holds in objects that are reachable, and in stacks.
func heldMemory() int64 {
	var m runtime.MemStats
	for range 3 { // what a pool gives back goes with the second
		runtime.GC()
	}
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse)
}

// processTime is the processor's time that the process has had.
func processTime(t *testing.T) time.Duration {
	var ts unix.Timespec
	require.NoError(t, unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts))
	return time.Duration(ts.Nano())
}
