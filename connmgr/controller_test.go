package connmgr

import (
	"reflect"
	"testing"
	"time"

	coreevent "github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/pb"
)

func TestController(t *testing.T) {
	const unidentified, plain, manager = "not identified", "plain", "manager"
	for _, c := range []struct {
		wrapped bool
		peer    peer.ID
		runs    string
		decides bool
	}{
		{true, higher, manager, true},
		{true, higher, plain, true},
		{true, higher, unidentified, true},
		{true, lower, manager, false},
		{true, lower, plain, true},
		{true, lower, unidentified, false},
		{false, higher, manager, false},
		{false, higher, plain, true},
		{false, higher, unidentified, true},
		{false, lower, manager, false},
		{false, lower, plain, false},
		{false, lower, unidentified, false},
	} {
		inVirtualTime(t, func(t *testing.T) {
			w := newBareWorld(t, c.peer)
			if c.wrapped {
				w = newWorld(t, c.peer)
			}
			w.net.identify(c.peer)
			switch c.runs {
			case unidentified:
				w.net.forget(c.peer)
			case manager:
				w.net.identify(c.peer, DrainID)
			}
			w.connect(quicAddr)
			w.connect(tcpAddr)
			w.pass(time.Millisecond)
			e := w.m.Explain(c.peer)
			require.Equal(t, c.decides, e.Controller, "%+v: %s", c, e.Reason)
			require.NotEmpty(t, e.Reason)
		})
	}
}

// Identify is what tells: other entries of the book come from streams that were opened to
// the peer, and say nothing of what else it speaks.
func TestKnownFromIdentifyMeansThat(t *testing.T) {
	w := newBareWorld(t, lower)
	w.net.set(lower, "/some/protocol/1.0.0")
	require.Equal(t, unknown, managed(w.net, lower))
	w.net.set(lower, "/some/protocol/1.0.0", identify.ID)
	require.Equal(t, no, managed(w.net, lower))
	w.net.set(lower, "/some/protocol/1.0.0", identify.IDPush)
	require.Equal(t, no, managed(w.net, lower))
	w.net.set(lower, DrainID)
	require.Equal(t, yes, managed(w.net, lower))
	w.net.forget(lower)
	require.Equal(t, unknown, managed(w.net, lower))
}

// Once known as one that runs a manager, a peer stays one while it is connected, whatever
// becomes of its entry in the book.
func TestManagerIsKnownWhileConnected(t *testing.T) {
	for name, learn := range map[string]func(w *world, c *fakeConn){
		"from identify":  func(w *world, _ *fakeConn) { w.m.disp.identified(lower) },
		"from a request": func(w *world, c *fakeConn) { w.net.identify(lower); w.request(c, drainMessage(0)) },
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, lower)
				quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
				quic.setPlain(1)
				tcp.setPlain(1)
				w.pass(time.Millisecond)
				learn(w, tcp)
				w.net.identify(lower) // with another list
				require.False(t, w.m.Explain(lower).Controller)
				tcp.Close()
				w.pass(defaultInterval)
				w.connect(tcpAddr)
				w.pass(time.Millisecond)
				require.True(t, w.m.Explain(lower).Controller, "it is asked anew when it has come anew")
			})
		})
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
		require.Equal(t, direct, w.m.steer.choose(t.Context(), lower).(*fakeConn), "it steers by its own ranking")

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

func TestFollowerTakesOver(t *testing.T) {
	for name, c := range map[string]struct {
		noDrain bool
		quiet   time.Duration // for how long a connection must have had no stream
	}{
		"a peer that can be asked":             {false, defaultQuietTime},
		"a peer that only says that it can be": {true, defaultPlainQuietTime},
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, lower)
				relay := w.connectLimited()
				s := relay.openTheirs(1)[0]
				direct := w.connect(quicAddr)
				for _, conn := range []*fakeConn{relay, direct} {
					conn.set(func() { conn.noDrain = c.noDrain })
				}
				start := time.Now()
				if !c.noDrain { // else it is found out at once that there is nobody to take over from
					w.pass(defaultTakeover - time.Millisecond)
					require.Zero(t, direct.timesKept())
					require.Empty(t, w.mover.made())
				} else {
					w.pass(fastSettle)
				}
				w.pass(2*minRoundGap + 2*rtt)
				require.Len(t, w.mover.callTimes(s, start), 1)
				require.Equal(t, 1, direct.count())
				if !c.noDrain {
					require.Equal(t, "peer "+shortID(lower)+": took over, nothing had happened for 10 s", w.messages()[0])
				}

				w.pass(c.quiet - 2*minRoundGap - 2*rtt)
				require.False(t, relay.IsClosed(), "the controller may have something to read there")
				w.pass(2*maxQuietGap + 2*minRoundGap + 2*rtt)
				require.True(t, relay.pruned())
				require.False(t, direct.IsClosed())
			})
		})
	}
}

func TestFollowerTakesOverEmptyConnections(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, lower)
		w.connect(quicAddr).open(1)
		tcp := w.connect(tcpAddr)
		w.pass(defaultTakeover - time.Millisecond)
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
			relay.openTheirs(1)
			w.connect(quicAddr)
			w.pass(defaultTakeover - 2*time.Second)
			w.connect(tcpAddr)
			w.pass(defaultTakeover - time.Millisecond)
			require.Empty(t, w.mover.made())
			w.pass(4 * minRoundGap) // the peer is told first
			require.Len(t, w.mover.made(), 1)
		})
	})
	t.Run("streams", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, lower)
			relay := w.connectLimited()
			streams := relay.openTheirs(3)
			direct := w.connect(quicAddr)
			w.pass(defaultTakeover - 2*time.Second)
			streams[0].moveTo(direct) // by the controller
			w.pass(defaultTakeover - time.Second)
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
		for range 60 {
			require.NotNil(t, w.request(tcp, drainMessage(60)).GetBusy())
			w.pass(time.Minute - time.Second)
		}
		require.Zero(t, tcp.timesAsked())
		w.pass(time.Second + defaultTakeover + defaultInterval)
		require.Equal(t, 1, tcp.timesAsked(), "the last lease has ended, and nothing has happened since")
	})
}

func TestTakeoversOfTheSameConnectionsGetRarer(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, lower)
		relay := w.connectLimited()
		s := relay.openTheirs(1)[0]
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

// Each end moves what it opened: a follower once it has been told which connection is kept,
// and at once where nobody could keep another one.
func TestFollowerMovesItsOwnStreams(t *testing.T) {
	t.Run("when it is told", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, lower)
			quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
			ours, theirs := quic.open(2), quic.openTheirs(3)
			w.pass(2 * defaultSettleDelay)
			require.Equal(t, quic, w.m.steer.choose(t.Context(), lower), "its own ranking")
			require.Empty(t, w.mover.made())
			require.NotNil(t, w.request(tcp, keepMessage()).GetKept())
			w.pass(minRoundGap)
			require.Equal(t, tcp, w.m.steer.choose(t.Context(), lower))
			w.pass(rtt)
			require.Len(t, w.mover.made(), 2)
			for _, s := range ours {
				require.Equal(t, network.Conn(tcp), s.Conn())
			}
			for _, s := range theirs {
				require.Equal(t, network.Conn(quic), s.Conn(), "the peer moves what it opened")
			}
			require.NotNil(t, w.request(quic, keepMessage()).GetKept(), "the newer one holds")
			w.pass(3*minRoundGap + 2*rtt) // it is asked once more whether it works
			for _, s := range ours {
				require.Equal(t, network.Conn(quic), s.Conn())
			}
		})
	})
	t.Run("off limited connections, at once", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, lower)
			relay := w.connectLimited()
			relay.open(2)
			relay.openTheirs(1)
			direct := w.connect(quicAddr)
			w.pass(fastSettle + rtt)
			require.Equal(t, 2, direct.count())
			require.Equal(t, 1, relay.count())
			require.Zero(t, relay.timesAsked(), "it does not close it")
			w.pass(defaultTakeover / 2)
			require.False(t, relay.IsClosed())
		})
	})
	t.Run("not from one limited connection to another", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, lower)
			w.connectLimited().open(2)
			second := w.connectLimited()
			w.pass(defaultSettleDelay)
			require.NotNil(t, w.request(second, keepMessage()).GetKept())
			w.pass(time.Minute)
			require.Empty(t, w.mover.made())
		})
	})
}

// What the peer does not move, although it was told, this side moves after a while; what it
// refuses to move, at once.
func TestControllerMovesWhatItsPeerLeaves(t *testing.T) {
	for name, c := range map[string]struct {
		answer *pb.DrainMessage
		after  time.Duration
	}{
		"it says that it will":      {keptMessage(), theirsAfter},
		"it refuses":                {refusedMessage("not now"), minRoundGap},
		"it answers something else": {drainedMessage(), minRoundGap},
		"it does not answer":        {nil, minRoundGap},
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, higher)
				relay := w.connectLimited()
				ours, theirs := relay.open(1)[0], relay.openTheirs(1)[0]
				direct := w.connect(quicAddr)
				direct.set(func() {
					direct.answer = func(*pb.DrainMessage) *pb.DrainMessage { return c.answer }
				})
				start := time.Now()
				w.pass(theirsAfter + defaultSettleDelay)
				require.Equal(t, []time.Duration{fastSettle}, w.mover.callTimes(ours, start))
				require.Equal(t, []time.Duration{fastSettle + c.after}, w.mover.callTimes(theirs, start))
			})
		})
	}
	t.Run("a peer without a manager", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			w.net.identify(higher)
			relay := w.connectLimited()
			s := relay.openTheirs(1)[0]
			direct := w.connect(quicAddr)
			start := time.Now()
			w.pass(defaultSettleDelay)
			require.Equal(t, []time.Duration{fastSettle}, w.mover.callTimes(s, start))
			require.Zero(t, direct.timesKept())
		})
	})
}

// The peer is told once, and again when another connection wins.
func TestPeerIsToldOnce(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		tcp := w.connect(tcpAddr)
		tcp.setPlain(1)
		relay := w.connectLimited()
		relay.setPlain(1)
		w.pass(time.Hour)
		require.Equal(t, 1, tcp.timesKept())
		require.Zero(t, relay.timesKept())
		quic := w.connect(quicAddr)
		w.pass(time.Hour)
		require.Equal(t, 1, quic.timesKept())
		require.Equal(t, 1, tcp.timesKept())
		quic.Close()
		w.pass(time.Hour)
		require.Equal(t, 2, tcp.timesKept(), "it had been told of another one")
	})
}

func TestFollowerOfAPeerWithoutManagerActsAtOnce(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, lower)
		w.net.identify(lower)
		relay := w.connectLimited()
		relay.open(1)
		direct := w.connect(quicAddr)
		w.pass(fastSettle + rtt)
		require.Equal(t, 1, direct.count())
	})
}

func TestPeerThatIsIdentifiedLate(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, lower)
		w.net.forget(lower)
		w.mover.setSupports(false)
		relay := w.connectLimited()
		relay.openTheirs(1)
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
			w := newWorld(t, lower, WithInterval(time.Hour), WithTakeover(maxTime))
			bus := eventbus.NewBus()
			events, err := bus.Subscribe(events)
			require.NoError(t, err)
			w.m.listen(events)
			emitter, err := bus.Emitter(reflect.New(reflect.TypeOf(e)).Interface())
			require.NoError(t, err)
			w.net.forget(lower)
			relay := w.connectLimited()
			relay.openTheirs(1)
			direct := w.connect(quicAddr)
			w.pass(time.Minute)
			require.Zero(t, direct.count(), "what it runs is not known yet")
			w.net.identify(lower)
			require.NoError(t, emitter.Emit(e))
			w.pass(minRoundGap + rtt)
			require.Equal(t, 1, direct.count())
		})
	}
}
