package connmgr

import (
	"reflect"
	"testing"
	"time"

	coreevent "github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	"github.com/stretchr/testify/require"
)

func TestController(t *testing.T) {
	const unknown, plain, managed = "unknown", "plain", "managed"
	for _, c := range []struct {
		wrapped bool
		peer    peer.ID
		runs    string
		decides bool
	}{
		{true, higher, managed, true},
		{true, higher, plain, true},
		{true, higher, unknown, true},
		{true, lower, managed, false},
		{true, lower, plain, true},
		{true, lower, unknown, false},
		{false, higher, managed, false},
		{false, higher, plain, true},
		{false, higher, unknown, true},
		{false, lower, managed, false},
		{false, lower, plain, false},
		{false, lower, unknown, false},
	} {
		w := newBareWorld(t, c.peer)
		w.net.notifiee.Connected(w.net, &fakeConn{remote: "another"}) // by which it gets the network
		switch c.runs {
		case unknown:
			w.net.forget(c.peer)
		case managed:
			w.net.identify(c.peer, DrainID)
		}
		decides, reason := w.m.controller(c.peer, c.wrapped)
		require.Equal(t, c.decides, decides, "%+v: %s", c, reason)
		require.NotEmpty(t, reason)
	}
}

func TestFollowerOnlySteers(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, lower)
		relay := w.connectLimited()
		relay.open(2)
		direct := w.connect(quicAddr)
		tcp := w.connect(tcpAddr)
		w.pass(defaultSettleDelay + 5*time.Second)
		require.Empty(t, w.mover.made(), "it does not migrate")
		require.Equal(t, direct, w.m.steer(t.Context(), lower).(*fakeConn), "it steers by its own ranking")

		// The controller does its work.
		for _, s := range []*fakeStream{relay.labelled[0], relay.labelled[1]} {
			s.moveTo(direct)
		}
		w.pass(defaultQuietTime)
		relay.Close()
		w.pass(defaultQuietTime)
		tcp.Close()
		w.pass(time.Hour)
		require.Empty(t, w.mover.made())
		require.False(t, relay.pruned() || tcp.pruned(), "it does not close connections")
	})
}

const (
	// takeoverDelay is from when duplicates come to when a follower takes over.
	takeoverDelay = (1 + defaultTakeover) * defaultSettleDelay
	// takeoverQuiet is how long a connection must be quiet for a follower to close it.
	takeoverQuiet = defaultPlainQuietTime + defaultTakeover*defaultSettleDelay
)

func TestFollowerTakesOver(t *testing.T) {
	for name, c := range map[string]struct {
		noDrain bool
		quiet   time.Duration
	}{
		"a peer that can be asked":             {false, defaultQuietTime},
		"a peer that only says that it can be": {true, takeoverQuiet},
	} {
		t.Run(name, func(t *testing.T) { followerTakesOver(t, c.noDrain, c.quiet) })
	}
}

func followerTakesOver(t *testing.T, noDrain bool, quiet time.Duration) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, lower)
		relay := w.connectLimited()
		relay.set(func() { relay.noDrain = noDrain })
		s := relay.open(1)[0]
		direct := w.connect(quicAddr)
		start := time.Now()
		w.pass(takeoverDelay + rtt)
		require.Equal(t, []time.Duration{takeoverDelay}, w.mover.callTimes(s, start))
		require.Equal(t, 1, direct.count())
		require.Equal(t, "peer "+shortID(lower)+": took over, nothing had happened for 10.1 s", w.messages()[0])

		w.pass(quiet - time.Millisecond)
		require.False(t, relay.IsClosed(), "the controller may have something to read there")
		w.pass(maxQuietGap)
		require.True(t, relay.pruned())
		require.False(t, direct.IsClosed())
	})
}

func TestFollowerTakesOverEmptyConnections(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, lower)
		w.connect(quicAddr).open(1)
		tcp := w.connect(tcpAddr)
		w.pass(takeoverDelay - time.Millisecond)
		require.False(t, tcp.IsClosed())
		require.Zero(t, tcp.timesAsked(), "the controller is to ask")
		w.pass(maxQuietGap)
		require.True(t, tcp.pruned())
	})
}

func TestFollowerWaitsWhileSomethingHappens(t *testing.T) {
	t.Run("connections", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, lower)
			relay := w.connectLimited()
			relay.open(1)
			w.connect(quicAddr)
			w.pass(takeoverDelay - 2*time.Second)
			w.connect(tcpAddr)
			w.pass(takeoverDelay - time.Millisecond)
			require.Empty(t, w.mover.made())
			w.pass(time.Millisecond)
			require.Len(t, w.mover.made(), 1)
		})
	})
	t.Run("streams", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, lower)
			relay := w.connectLimited()
			streams := relay.open(3)
			direct := w.connect(quicAddr)
			w.pass(takeoverDelay - 2*time.Second)
			streams[0].moveTo(direct) // by the controller
			w.pass(takeoverDelay - time.Second)
			require.Empty(t, w.mover.made())
			w.pass(defaultInterval)
			require.Len(t, w.mover.made(), 2)
		})
	})
}

// A controller that has moved everything, and waits for streams that cannot move, is at
// work, for as long as it asks for what is left.
func TestFollowerLeavesAControllerThatWaits(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, lower)
		w.connect(quicAddr)
		tcp := w.connect(tcpAddr)
		tcp.setPlain(1)
		w.pass(2 * defaultSettleDelay)
		s := w.asked(tcp)
		require.NoError(t, writeDrain(s, drainMessage()))
		w.pass(time.Hour)
		require.Zero(t, tcp.timesAsked())
		require.NoError(t, s.pipe.Close())
		w.pass(defaultTakeover*defaultSettleDelay + defaultInterval)
		require.Equal(t, 1, tcp.timesAsked())
	})
}

func TestTakeoversOfTheSameConnectionsGetRarer(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, lower)
		relay := w.connectLimited()
		s := relay.open(1)[0]
		w.connect(quicAddr)
		start := time.Now()
		for range 60 * 60 { // a controller that moves it back every second
			w.pass(time.Second)
			s.moveTo(relay)
		}
		times := w.mover.callTimes(s, start)
		require.LessOrEqual(t, len(times), 10, "two sides of different opinion must not move streams to and fro: %v", times)
		require.GreaterOrEqual(t, len(times), 6)
		for i := 2; i < len(times); i++ {
			require.GreaterOrEqual(t, times[i]-times[i-1], times[i-1]-times[i-2])
		}
		require.False(t, relay.IsClosed())
	})
}

func TestFollowerOfAPeerWithoutManagerActsAtOnce(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, lower)
		w.net.identify(lower)
		relay := w.connectLimited()
		relay.open(1)
		direct := w.connect(quicAddr)
		w.pass(defaultSettleDelay + rtt)
		require.Equal(t, 1, direct.count())
	})
}

func TestPeerThatIsIdentifiedLate(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, lower)
		w.net.forget(lower)
		w.mover.setSupports(false)
		relay := w.connectLimited()
		relay.open(1)
		direct := w.connect(quicAddr)
		w.pass(2 * defaultSettleDelay)
		require.Empty(t, w.mover.made(), "what it runs is not known yet")
		w.net.identify(lower)
		w.mover.setSupports(true)
		w.pass(defaultInterval + rtt)
		require.Equal(t, 1, direct.count(), "it runs no manager")
	})
}

func TestTwoBareManagersDoNotCloseBothConnections(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		// Both halves of a simultaneous dial look the same at either end, but each end
		// may find another one the older.
		a, b := newBareWorld(t, higher), newBareWorld(t, lower)
		a.connect(quicAddr)
		b.connect(quicAddr)
		a.pass(time.Millisecond)
		a.connect(quicAddr)
		b.connect(quicAddr)
		a.pass(defaultSettleDelay + defaultPlainQuietTime)
		require.Len(t, a.net.ConnsToPeer(higher), 1, "the one with the lower ID decides")
		require.Len(t, b.net.ConnsToPeer(lower), 2, "the other one does not, at the same time")
	})
}

// What a peer speaks decides, so a round follows when that is known, not only when the
// interval is over: here, that a peer with the lower ID runs no manager.
func TestIdentifyIsFollowedByARound(t *testing.T) {
	for _, e := range []any{
		coreevent.EvtPeerIdentificationCompleted{Peer: lower},
		coreevent.EvtPeerProtocolsUpdated{Peer: lower},
	} {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, lower, WithInterval(time.Hour), WithTakeover(10_000))
			bus := eventbus.NewBus()
			events, err := bus.Subscribe(identifyEvents)
			require.NoError(t, err)
			w.m.follow(events)
			emitter, err := bus.Emitter(reflect.New(reflect.TypeOf(e)).Interface())
			require.NoError(t, err)
			w.net.forget(lower)
			relay := w.connectLimited()
			relay.open(1)
			direct := w.connect(quicAddr)
			w.pass(time.Minute)
			require.Zero(t, direct.count(), "what it runs is not known yet")
			w.net.identify(lower)
			require.NoError(t, emitter.Emit(e))
			w.pass(rtt)
			require.Equal(t, 1, direct.count())
		})
	}
}
