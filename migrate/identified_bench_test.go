package migrate

import (
	"fmt"
	"runtime"
	"testing"

	"github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/stretchr/testify/require"
)

// BenchmarkKnownConnection: what a connection costs here that is opened, identified and
// closed, while 50,000 others are open. B/conn is what is kept of each of those.
func BenchmarkKnownConnection(b *testing.B) {
	one, perConn := knownConnections()
	b.ReportAllocs()
	for b.Loop() {
		one()
	}
	b.ReportMetric(perConn, "B/conn")
}

// TestKnownConnectionDoesNotAllocate: nor is much kept of one that is open.
func TestKnownConnectionDoesNotAllocate(t *testing.T) {
	one, perConn := knownConnections()
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	require.Zero(t, testing.AllocsPerRun(1000, one))
	require.LessOrEqual(t, perConn, 60.0)
}

// knownConnections opens 50,000 connections, and returns what opens, identifies and closes
// another, and how many bytes are kept of each of the 50,000.
func knownConnections() (one func(), perConn float64) {
	i := &identified{watched: []protocol.ID{ID, FinalSizeID}, net: new(struct{ network.Network }), conns: make(map[network.Conn]told)}
	i.run = new(run) // nobody takes events
	all := make([]protocol.ID, 30)
	for n := range all {
		all[n] = protocol.ID(fmt.Sprintf("/test/protocol/%d", n))
	}
	all = append(all, ID, FinalSizeID)
	conns := make([]network.Conn, 50_001)
	for n := range conns {
		conns[n] = &fakeConn{remote: playerLow}
	}
	kept := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	n := (*identifiedNotifiee)(i)
	before := kept()
	for _, c := range conns[1:] {
		n.Connected(nil, c)
	}
	perConn = float64(kept()-before) / float64(len(conns)-1)
	return func() {
		n.Connected(nil, conns[0])
		i.handle(event.EvtPeerIdentificationCompleted{Conn: conns[0], Protocols: all})
		n.Disconnected(nil, conns[0])
	}, perConn
}
