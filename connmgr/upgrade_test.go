package connmgr

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/connmgr"
	coreevent "github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	"github.com/libp2p/go-libp2p/p2p/protocol/holepunch"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/internal/punch"
)

// fakePunch stands for internal/punch. An attempt takes 15 s, as one that nobody answers
// does, and fails.
type fakePunch struct {
	mu      sync.Mutex
	takes   time.Duration
	outcome func(p peer.ID) error // nil: no hole
	times   map[peer.ID][]time.Time
	running int
	most    int // at the same time
}

var errNoHole = errors.New("no hole")

// punches has the manager's attempts made by a fake.
func (w *world) punches() *fakePunch {
	f := &fakePunch{takes: 15 * time.Second, times: make(map[peer.ID][]time.Time)}
	w.m.upgrades.punch = f.again
	return f
}

func (f *fakePunch) again(ctx context.Context, _ host.Host, p peer.ID) error {
	f.mu.Lock()
	f.times[p] = append(f.times[p], time.Now())
	f.running++
	f.most = max(f.most, f.running)
	takes, outcome := f.takes, f.outcome
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		f.running--
		f.mu.Unlock()
	}()
	select {
	case <-time.After(takes):
	case <-ctx.Done():
		return ctx.Err()
	}
	if outcome == nil {
		return errNoHole
	}
	return outcome(p)
}

func (f *fakePunch) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// since returns when attempts for p began.
func (f *fakePunch) since(p peer.ID, start time.Time) []time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	var times []time.Duration
	for _, t := range f.times[p] {
		times = append(times, t.Sub(start))
	}
	return times
}

// The whole of it: a stream on a relay, a firewall that opens after three minutes, and a
// stream that then leaves the relay.
func TestUpgradeIsAskedForAgain(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		f := w.punches()
		start := time.Now()
		relay := w.relayedIn()
		relay.open(1)
		w.pass(30 * time.Second)
		require.Equal(t, "no direct connection: asking for one", w.m.Explain(higher).Upgrade)
		w.pass(10 * time.Second)
		e := w.m.Explain(higher)
		require.Regexp(t, `^no direct connection: last attempt \S+ m?s ago: no hole, next in \S+ m?s$`, e.Upgrade)
		require.Contains(t, e.String(), e.Upgrade)
		require.WithinRange(t, e.NextUpgrade, time.Now(), start.Add(65*time.Second))
		w.pass(140 * time.Second)
		opens := time.Now()
		var direct *fakeConn
		f.set(func() {
			f.outcome = func(peer.ID) error {
				direct = w.connect(quicAddr)
				return nil
			}
		})
		w.pass(time.Minute)
		times := f.since(higher, start)
		require.GreaterOrEqual(t, times[0], 20*time.Second, "go-libp2p's own attempts are over")
		require.Less(t, times[0], 23*time.Second)
		for i := 1; i < len(times); i++ {
			require.LessOrEqual(t, times[i]-times[i-1], 40*time.Second+2*sweepGap)
			require.GreaterOrEqual(t, times[i]-times[i-1], 20*time.Second)
		}
		require.NotNil(t, direct, "it is asked for within a minute after it can be")
		require.Less(t, direct.opened.Sub(opens), time.Minute)
		require.Equal(t, 1, direct.count(), "the stream has moved")
		w.pass(time.Hour)
		require.Len(t, f.since(higher, start), len(times), "and no attempt follows")
		require.Zero(t, w.m.upgrades.of.count.Load(), "nothing is kept of a peer with a direct connection")
		require.Empty(t, w.m.Explain(higher).Upgrade)
		require.Contains(t, strings.Join(w.messages(), "\n"), fmt.Sprintf("got a direct connection in attempt %d", len(times)))
	})
}

// Where no stream is, one that is wanted is asked for less often, and one that is not not at
// all.
func TestUpgradeOfIdlePeers(t *testing.T) {
	for name, test := range map[string]struct {
		inner    wanting
		then     func(w *world, relay *fakeConn)
		from, to int // attempts in an hour
	}{
		"unwanted":  {wanting{}, func(*world, *fakeConn) {}, 0, 0},
		"protected": {wanting{protected: true}, func(*world, *fakeConn) {}, 13, 22},
		"tagged":    {wanting{tag: 1}, func(*world, *fakeConn) {}, 13, 22},
		"used for ten minutes after a short stream": {wanting{}, func(w *world, relay *fakeConn) {
			w.m.began(relay, "/test/short/1.0.0", network.DirInbound)
		}, 4, 9},
		"not by the manager's own streams": {wanting{}, func(w *world, relay *fakeConn) {
			for _, id := range []protocol.ID{DrainID, PathID, "/ipfs/id/1.0.0"} {
				w.m.began(relay, id, network.DirInbound)
			}
		}, 0, 0},
		"dialled from here": {wanting{}, func(w *world, relay *fakeConn) {
			relay.Close()
			w.connectLimited().open(1)
		}, 0, 0},
		"with a direct connection": {wanting{}, func(w *world, _ *fakeConn) { w.connect(quicAddr).open(1) }, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, higher)
				f := w.punches()
				w.setInner(&test.inner)
				start := time.Now()
				relay := w.relayedIn()
				w.pass(time.Millisecond) // in which it is noticed
				test.then(w, relay)
				w.pass(time.Hour)
				times := f.since(higher, start)
				require.GreaterOrEqual(t, len(times), test.from, "%v", times)
				require.LessOrEqual(t, len(times), test.to, "%v", times)
				for i := 1; i < len(times); i++ {
					require.LessOrEqual(t, times[i]-times[i-1], 5*time.Minute+2*sweepGap)
				}
			})
		})
	}
}

// wanting is an inner connection manager that wants its peers.
type wanting struct {
	connmgr.NullConnMgr
	protected bool
	tag       int
}

func (w *wanting) IsProtected(_ peer.ID, tag string) bool { return w.protected && tag == "" }
func (w *wanting) GetTagInfo(peer.ID) *connmgr.TagInfo    { return &connmgr.TagInfo{Value: w.tag} }

func TestUpgradeWhenSomethingChanges(t *testing.T) {
	push := func(addr string, protocols ...protocol.ID) coreevent.EvtPeerIdentificationCompleted {
		return coreevent.EvtPeerIdentificationCompleted{Peer: higher, ListenAddrs: []ma.Multiaddr{ma.StringCast(addr)}, Protocols: protocols}
	}
	for name, test := range map[string]struct {
		event any
		err   error // of the attempt before
		again bool
	}{
		"own addresses":                       {coreevent.EvtLocalAddressesUpdated{}, errNoHole, true},
		"own reachability":                    {coreevent.EvtLocalReachabilityChanged{}, errNoHole, true},
		"the peer's addresses":                {push(tcpAddr), errNoHole, true},
		"the peer punches holes by now":       {push(quicAddr, holepunch.Protocol), punch.ErrUnsupported, true},
		"what cannot be may be by now":        {coreevent.EvtLocalAddressesUpdated{}, punch.ErrUnsupported, true},
		"the peer says the same once more":    {push(quicAddr), errNoHole, false},
		"the peer's other protocols":          {push(quicAddr, "/test/1.0.0"), errNoHole, false},
		"another peer's addresses":            {coreevent.EvtPeerIdentificationCompleted{Peer: lower, ListenAddrs: []ma.Multiaddr{ma.StringCast(tcpAddr)}}, errNoHole, false},
		"and nothing, where it does not pass": {push(quicAddr), punch.ErrUnsupported, false},
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, higher, WithUpgrades(time.Hour, time.Hour))
				f := w.punches()
				f.outcome = func(peer.ID) error { return test.err }
				bus := eventbus.NewBus()
				sub, err := bus.Subscribe(events)
				require.NoError(t, err)
				w.m.listen(sub)
				emit := func(e any) {
					emitter, err := bus.Emitter(reflect.New(reflect.TypeOf(e)).Interface())
					require.NoError(t, err)
					require.NoError(t, emitter.Emit(e))
					require.NoError(t, emitter.Close())
				}
				start := time.Now()
				w.relayedIn().open(1)
				w.pass(time.Millisecond)
				emit(push(quicAddr))
				w.pass(12 * time.Minute) // the sixth attempt was a while ago, and the seventh comes later
				before := len(f.since(higher, start))
				require.NotZero(t, before)
				changed := time.Now()
				emit(test.event)
				w.pass(5 * time.Second)
				times := f.since(higher, changed)[before:]
				if !test.again {
					require.Empty(t, times)
					return
				}
				require.Len(t, times, 1)
				require.GreaterOrEqual(t, times[0], time.Second)
				require.LessOrEqual(t, times[0], 2*time.Second+2*sweepGap)
			})
		})
	}
}

// A peer that says something new all the time is not asked all the time.
func TestUpgradeIsNotProvoked(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		f := w.punches()
		f.takes = 0
		start := time.Now()
		w.relayedIn().open(1)
		w.pass(time.Minute)
		for range 600 {
			w.m.upgrades.changed(higher)
			w.pass(100 * time.Millisecond)
		}
		times := f.since(higher, start)
		require.LessOrEqual(t, len(times), 3+60/5)
		require.GreaterOrEqual(t, len(times), 60/8, "nor is it put off for ever")
	})
}

// A thousand peers share eight places, and all get one.
func TestUpgradesAtOnce(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		f := w.punches()
		f.takes = time.Second
		const peers = 1000
		start := time.Now()
		for i := range peers {
			p := peer.ID(fmt.Sprintf("peer %d", i))
			w.net.connectFrom(network.DirInbound, p, relayAddr, true).open(1)
		}
		w.pass(20*time.Second + peers/upgradesAtOnce*(time.Second+2*sweepGap) + 5*time.Second)
		require.Equal(t, upgradesAtOnce, f.most)
		for i := range peers {
			require.NotEmpty(t, f.since(peer.ID(fmt.Sprintf("peer %d", i)), start), "attempts for peer %d", i)
		}
	})
}

// What is kept is bounded, and goes with the connection.
func TestUpgradesAreBounded(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		w.punches()
		var conns []*fakeConn
		for i := range maxUpgrades + 100 {
			p := peer.ID(fmt.Sprintf("peer %d", i))
			conns = append(conns, w.net.connectFrom(network.DirInbound, p, relayAddr, true))
		}
		w.pass(time.Second)
		require.EqualValues(t, maxUpgrades, w.m.upgrades.of.count.Load())
		for _, c := range conns {
			c.Close()
		}
		w.pass(time.Second)
		require.Zero(t, w.m.upgrades.of.count.Load())
		w.relayedIn()
		w.pass(time.Second)
		require.EqualValues(t, 1, w.m.upgrades.of.count.Load())
	})
}

// A direct connection that dies leaves the relay, and is asked for at once.
func TestUpgradeAfterADirectConnection(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		f := w.punches()
		w.relayedIn().setPlain(1)
		direct := w.connect(quicAddr)
		w.pass(10 * time.Minute)
		died := time.Now()
		require.Empty(t, f.since(higher, died))
		direct.Close()
		w.pass(5 * time.Second)
		times := f.since(higher, died)
		require.Len(t, times, 1)
		require.LessOrEqual(t, times[0], 2*time.Second+2*sweepGap)
	})
}

// What is there before the manager gets its host is found.
func TestUpgradeOfWhatThereIs(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newBareWorld(t, higher)
		f := w.punches()
		start := time.Now()
		w.relayedIn().setPlain(1)
		w.pass(time.Hour)
		require.Empty(t, f.since(higher, start), "a bare manager has nobody to ask with")
		require.Zero(t, w.m.upgrades.of.count.Load())
		h := &fakeHost{net: w.net, cm: w.m, handlers: make(map[protocol.ID]network.StreamHandler)}
		require.NoError(t, w.m.adopt(h))
		w.m.attach(h, newFakeMover())
		w.pass(5 * time.Second)
		require.NotEmpty(t, f.since(higher, start))
	})
}

func TestWithoutUpgrades(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher, WithoutUpgrades())
		f := w.punches()
		start := time.Now()
		w.relayedIn().open(1)
		w.pass(time.Hour)
		require.Empty(t, f.since(higher, start))
		require.Zero(t, w.m.upgrades.of.count.Load())
		require.Equal(t, "no direct connection, and none is asked for", w.m.Explain(higher).Upgrade)
	})
	for _, opt := range []Option{WithUpgrades(0, time.Minute), WithUpgrades(time.Minute, time.Second), WithUpgrades(time.Second, 25*time.Hour)} {
		_, err := New(connmgr.NullConnMgr{}, opt)
		require.Error(t, err)
	}
}

// Close ends an attempt.
func TestCloseEndsUpgrade(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		f := w.punches()
		f.takes = time.Hour
		w.relayedIn().open(1)
		w.pass(25 * time.Second)
		require.Equal(t, 1, f.running)
		before := time.Now()
		require.NoError(t, w.m.Close())
		require.Less(t, time.Since(before), closeWait)
		require.Zero(t, f.running)
	})
}

// An attempt that does not end gives its place back.
func TestUpgradeThatHangs(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		f := w.punches()
		f.takes = time.Hour
		w.relayedIn().open(1)
		w.pass(25*time.Second + upgradeTimeout)
		require.Zero(t, f.running)
		require.Contains(t, w.m.Explain(higher).Upgrade, "context deadline exceeded")
	})
}

// What an attempt has failed with may hold what the peer has said.
func TestUpgradeSaysNothingForged(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		f := w.punches()
		f.outcome = func(peer.ID) error {
			return fmt.Errorf("punch a hole: %w", errors.New("no\x1b[2J\u202e\xff"+strings.Repeat("x", 1000)+"\npeer xyz"))
		}
		w.relayedIn().open(1)
		w.pass(40 * time.Second)
		said := w.m.Explain(higher).Upgrade
		require.Contains(t, said, "no?[2J??xxx")
		require.Less(t, len(said), 400)
		require.NotContains(t, said, "\n")
	})
}

// Attempts are counted, by what came of them; also one that Close ends.
func TestUpgradesAreCounted(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		mt := newTally()
		w := newWorld(t, higher, WithMetricsTracer(mt))
		f := w.punches()
		w.relayedIn().open(1)
		w.pass(30 * time.Second)
		require.Equal(t, 1, mt.has("upgrade started"))
		require.Zero(t, mt.has("upgrade "+UpgradeNoHole), "it is under way")
		w.pass(10 * time.Second)
		require.Equal(t, 1, mt.has("upgrade "+UpgradeNoHole))
		f.set(func() { f.outcome = func(peer.ID) error { w.connect(quicAddr); return nil } })
		w.pass(time.Minute)
		require.Equal(t, 1, mt.has("upgrade "+UpgradedDirect))

		w = newWorld(t, higher, WithMetricsTracer(mt))
		w.punches()
		w.relayedIn().open(1)
		w.pass(30 * time.Second)
		require.NoError(t, w.m.Close())
		synctest.Wait()
		require.Equal(t, 1, mt.has("upgrade "+UpgradeEnded))
		require.Equal(t, 3, mt.has("upgrade started"))
	})
	for err, outcome := range map[error]string{
		punch.ErrUnsupported: UpgradeUnsupported, punch.ErrNotOurs: UpgradeGone, punch.ErrOff: UpgradeImpossible, punch.ErrNoAddress: UpgradeImpossible,
	} {
		require.Equal(t, outcome, upgradeOutcome(fmt.Errorf("attempt: %w", err), false))
	}
}
