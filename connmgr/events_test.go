package connmgr

import (
	"testing"
	"testing/synctest"
	"time"

	coreevent "github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
)

// subscribe gives the world's manager an event bus, and returns what comes.
func (w *world) subscribe(size int, kinds ...any) coreevent.Subscription {
	bus := eventbus.NewBus()
	require.NoError(w.t, w.m.tells.events.start(bus))
	sub, err := bus.Subscribe(kinds, eventbus.BufSize(size))
	require.NoError(w.t, err)
	w.t.Cleanup(func() { _ = sub.Close() })
	return sub
}

// all returns the events that have come.
func all(sub coreevent.Subscription) (events []any) {
	synctest.Wait()
	for {
		select {
		case e := <-sub.Out():
			events = append(events, e)
		default:
			return events
		}
	}
}

func TestEventPathChanged(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		sub := w.subscribe(16, new(EvtPathChanged), new(EvtConnectionPruned))
		relay := w.connectLimited()
		w.pass(time.Minute)
		require.Empty(t, all(sub), "the first connection is no change")

		direct := w.connect(quicAddr)
		w.pass(time.Second)
		require.Equal(t, []any{EvtPathChanged{
			Peer: higher, From: infoOf(relay), To: infoOf(direct), Direct: true,
		}}, all(sub), "the peer is reached directly, long before the relay is closed")

		w.pass(time.Minute)
		require.True(t, relay.pruned())
		pruned := all(sub)
		require.Len(t, pruned, 1)
		e := pruned[0].(EvtConnectionPruned)
		require.Equal(t, "unlimited", e.Decision.Rule)
		require.Equal(t, infoOf(relay), e.Conn)
		require.Equal(t, infoOf(direct), e.Kept)
		require.False(t, e.ByPeer)

		second := w.connect(tcpAddr)
		w.pass(2 * time.Second)
		require.Empty(t, all(sub), "one that loses is no change")
		require.NoError(t, direct.Close())
		w.net.notifiee.Disconnected(w.net, direct)
		w.pass(2 * time.Second)
		require.Equal(t, []any{EvtPathChanged{
			Peer: higher, From: infoOf(direct), To: infoOf(second), Direct: true, WasDirect: true,
		}}, all(sub), "the only one that is left carries everything")
	})
}

func TestEventConnectionSilent(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		sub := w.subscribe(16, new(EvtConnectionSilent))
		direct, relay := w.connect(quicAddr), w.net.connect(higher, relayAddr, false)
		direct.setPlain(1)
		relay.setPlain(1)
		w.pass(time.Minute)
		require.Empty(t, all(sub), "both work")
		fell := func(c *fakeConn, silent bool) { c.set(func() { c.silent = silent }) }
		next := func(c *fakeConn, silent, alone bool) {
			t.Helper()
			got := all(sub)
			require.Len(t, got, 1)
			e := got[0].(EvtConnectionSilent)
			require.WithinDuration(t, time.Now(), e.Since, time.Minute)
			e.Since = time.Time{}
			require.Equal(t, EvtConnectionSilent{Peer: higher, Conn: infoOf(c), Silent: silent, Alone: alone}, e)
		}
		fell(direct, true)
		w.pass(time.Minute)
		next(direct, true, false)
		fell(relay, true)
		w.pass(time.Minute)
		next(relay, true, true)
		fell(direct, false)
		w.pass(time.Minute)
		next(direct, false, false)
		w.pass(time.Minute)
		require.Empty(t, all(sub), "each is told once")
	})
}

func TestEventsThatNobodyReads(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		sub := w.subscribe(1, new(EvtConnectionPruned))
		for range maxEvents + 10 {
			w.m.tells.events.emit(EvtConnectionPruned{Peer: higher})
			w.pass(0)
		}
		// One is read by the subscription, and one is being emitted.
		require.Len(t, w.m.tells.events.queue, maxEvents)
		got := 0
		for len(all(sub)) > 0 {
			got++
		}
		require.Positive(t, got)
		w.pass(0)
		require.Equal(t, 1, w.logs.FilterMessageSnippet("events dropped").FilterLevelExact(zap.WarnLevel).Len())
		require.NoError(t, w.m.Close())
		w.m.tells.events.emit(EvtConnectionPruned{})
		require.Empty(t, all(sub), "nothing is emitted after Close")
	})
}

// A subscriber that does not read holds up nothing, not even Close.
func TestEventsDoNotHoldUp(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		sub := w.subscribe(0, new(EvtPathChanged), new(EvtConnectionPruned))
		relay := w.connectLimited()
		relay.open(3)
		direct := w.connect(quicAddr)
		w.pass(time.Minute)
		require.True(t, relay.pruned())
		require.Equal(t, 3, direct.count())
		start := time.Now()
		require.NoError(t, w.m.Close())
		require.Zero(t, time.Since(start))
		require.NoError(t, sub.Close()) // releases what is being emitted
	})
}
