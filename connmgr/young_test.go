package connmgr

import (
	"fmt"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/migrate"
	"github.com/go-portage/portage/policy"
)

var udpKind, tcpKind = pathKind{udp: true}, pathKind{}

// winnerOf is a connection that came at a time.
func winnerOf(opened time.Time, change ...func(c *policy.Candidate)) *connState {
	cs := &connState{conn: &fakeConn{remote: higher}, opened: opened}
	cs.base.Transport = policy.QUIC
	for _, f := range change {
		f(&cs.base)
	}
	return cs
}

func TestDeathsOfTheYoung(t *testing.T) {
	now := time.Now()
	var y young
	y.died(higher, winnerOf(now.Add(-youngFor)), now)
	require.Empty(t, y.of(higher, now), "it was old enough")
	y.died(higher, winnerOf(now, func(c *policy.Candidate) { c.Limited, c.Relayed = true, true }), now)
	require.Empty(t, y.of(higher, now), "its relay ends it in any case")
	y.died(higher, winnerOf(now), now)
	require.Equal(t, map[pathKind]int{udpKind: 1}, y.of(higher, now))
	require.Empty(t, y.of(lower, now), "of this peer alone")
	y.died(higher, winnerOf(now.Add(1-2*youngFor)), now)
	require.Equal(t, 2, y.of(higher, now)[udpKind], "what is young doubles, as what it has to prove")
	y.died(higher, winnerOf(now, func(c *policy.Candidate) { c.Transport = policy.TCP }), now)
	require.Equal(t, map[pathKind]int{udpKind: 2, tcpKind: 1}, y.of(higher, now), "each kind by itself")
	y.died(lower, winnerOf(now), now)
	require.Equal(t, map[pathKind]int{udpKind: 1}, y.of(lower, now))
	require.Equal(t, map[pathKind]int{udpKind: 2, tcpKind: 1}, y.of(higher, now), "and each peer")
	require.Equal(t, 2, y.of(higher, now.Add(deathsFor-1))[udpKind])
	require.Empty(t, y.of(higher, now.Add(deathsFor)), "it is forgotten")
	later := now.Add(deathsFor)
	y.died(higher, winnerOf(later), later)
	require.Equal(t, 1, y.of(higher, later)[udpKind], "and begins anew")
}

func TestDeathsAreBounded(t *testing.T) {
	now := time.Now()
	var y young
	for i := range 3 * maxDeaths {
		y.died(peer.ID(fmt.Sprintf("peer %d", i)), winnerOf(now), now)
		require.LessOrEqual(t, len(y.deaths), maxDeaths)
	}
	now = now.Add(deathsFor)
	y.died("when those are over", winnerOf(now), now)
	require.Len(t, y.deaths, 1, "what is over goes first")
	for i := range 3 * maxDeaths {
		y.died(peer.ID(fmt.Sprintf("peer %d", i)), winnerOf(now), now)
	}
	last := peer.ID(fmt.Sprintf("peer %d", 3*maxDeaths-1))
	require.Equal(t, 1, y.of(last, now)[udpKind])
	for range 1000 {
		y.died(last, winnerOf(now), now)
	}
	c := defaultConfig()
	require.Equal(t, time.Hour, c.proof(true, y.of(last, now)[udpKind]))
	for range 3 * maxDeaths {
		y.watch(winnerOf(now), now)
	}
	require.Equal(t, maxDeaths, len(y.fresh))
	y.watch(winnerOf(now), now.Add(youngFor))
	require.Empty(t, y.fresh, "they are not young any more")
	require.Zero(t, y.count.Load())
}

// A winner that is the only connection left is remembered while it is young, and by nobody
// else.
func TestOnlyConnectionThatDiesYoung(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		deaths := func() int { return w.m.rounds.young.of(higher, time.Now())[udpKind] }
		meet := func(after time.Duration) {
			relay, direct := w.connectLimited(), w.connect(quicAddr)
			w.pass(10 * time.Second)
			require.True(t, relay.pruned())
			require.Empty(t, w.m.sched.peers)
			w.pass(after)
			direct.Close()
			w.pass(time.Millisecond)
		}
		meet(2 * youngFor)
		require.Zero(t, deaths())
		meet(time.Second)
		require.Equal(t, 1, deaths())
		w.connect(quicAddr).Close()
		w.pass(time.Millisecond)
		require.Equal(t, 1, deaths(), "one that won over nothing is none of this")
	})
}

// A winner that is closed for a better one while it is young has not died.
func TestSupplantedWhileYoung(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		relay, tcp := w.connectLimited(), w.connect(tcpAddr)
		w.pass(4 * time.Second)
		require.True(t, relay.pruned())
		require.Empty(t, w.m.sched.peers, "only one is left")
		w.connect(quicAddr)
		w.pass(defaultProof + 5*time.Second)
		require.True(t, tcp.pruned())
		require.Empty(t, w.m.rounds.young.of(higher, time.Now()))
	})
}

// What the peer does is told here, too.
func TestFollowerTellsWhatThePeerDoes(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, lower)
		relay := w.connectLimited()
		streams := relay.openTheirs(3)
		direct := w.connect(quicAddr)
		direct.setPlain(1)
		w.pass(defaultSettleDelay)
		for _, s := range streams {
			w.m.moves.migrated(migrate.Event{Peer: lower, Kind: migrate.Started, From: relay, To: direct, Time: time.Now()})
			w.pass(50 * time.Millisecond)
			s.moveTo(direct)
			w.m.moves.migrated(migrate.Event{Peer: lower, Kind: migrate.Finished, From: relay, To: direct, Time: time.Now()})
		}
		require.Empty(t, w.messages(), "not one by one")
		w.pass(byPeerPause + 2*minRoundGap)
		require.Equal(t, []string{"peer " + shortID(lower) + ": the peer moved 3 streams from limited relay to quic direct in 150 ms"}, w.messages())
		w.pass(defaultQuietTime)
		require.NotNil(t, w.request(relay, drainMessage(0)).GetDrained())
		w.pass(time.Second)
		relay.Close()
		w.pass(minRoundGap)
		require.Equal(t, "peer "+shortID(lower)+": the peer kept quic direct, dropped limited relay, 3 streams moved in 150 ms", w.messages()[1])
		require.Len(t, w.messages(), 2)
	})
}

// Each end moves what it has opened, and the last line of each counts what both have moved.
func TestBothEndsCountAllStreamsThatMoved(t *testing.T) {
	migrateTheirs := func(w *world, p peer.ID, from, to *fakeConn, streams []*fakeStream) {
		for _, s := range streams {
			w.m.moves.migrated(migrate.Event{Peer: p, Kind: migrate.Started, From: from, To: to, Time: time.Now()})
			w.pass(20 * time.Millisecond)
			s.moveTo(to)
			w.m.moves.migrated(migrate.Event{Peer: p, Kind: migrate.Finished, From: from, To: to, Time: time.Now()})
		}
	}
	t.Run("decides", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			relay := w.connectLimited()
			theirs := relay.openTheirs(3)
			direct := w.connect(quicAddr)
			w.pass(20 * time.Millisecond)
			migrateTheirs(w, higher, relay, direct, theirs)
			w.pass(time.Minute)
			require.True(t, relay.pruned())
			last := w.messages()[len(w.messages())-1]
			require.Equal(t, "peer "+shortID(higher)+": kept quic direct, dropped limited relay (rule unlimited: true over false), 3 streams moved in 60 ms", last)
		})
	})
	t.Run("follows", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, lower)
			relay := w.connectLimited()
			relay.open(2)
			direct := w.connect(quicAddr)
			w.pass(5 * time.Second)
			require.Equal(t, 2, direct.count(), "off a limited relay each end moves its own")
			require.NotNil(t, w.request(relay, drainMessage(0)).GetDrained())
			w.pass(time.Second)
			relay.Close()
			w.pass(minRoundGap)
			last := w.messages()[len(w.messages())-1]
			require.Equal(t, "peer "+shortID(lower)+": the peer kept quic direct, dropped limited relay, 2 streams moved in 100 ms", last)
		})
	})
}
