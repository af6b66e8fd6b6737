package connmgr

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/migrate"
	"github.com/go-portage/portage/policy"
)

// tally is a MetricsTracer that adds up.
type tally struct {
	mu       sync.Mutex
	peers    PeerMetrics
	pinned   map[protocol.ID]int
	counts   map[string]int
	waited   []time.Duration
	finished []string
	buffered int
}

func newTally() *tally {
	return &tally{pinned: make(map[protocol.ID]int), counts: make(map[string]int)}
}

func (t *tally) do(f func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	f()
}

func (t *tally) PeerChanged(b, a PeerMetrics) {
	t.do(func() {
		t.peers.Duplicates += a.Duplicates - b.Duplicates
		t.peers.Surplus += a.Surplus - b.Surplus
		t.peers.Alive += a.Alive - b.Alive
		t.peers.Silent += a.Silent - b.Silent
		t.peers.Unknown += a.Unknown - b.Unknown
		t.peers.Pinned += a.Pinned - b.Pinned
		t.peers.Waiting += a.Waiting - b.Waiting
		t.peers.Moving += a.Moving - b.Moving
		t.peers.Draining += a.Draining - b.Draining
	})
}

func (t *tally) PinnedStreams(id protocol.ID, more int) {
	t.do(func() {
		if t.pinned[id] += more; t.pinned[id] == 0 {
			delete(t.pinned, id)
		}
	})
}

func (t *tally) count(what string)            { t.do(func() { t.counts[what]++ }) }
func (t *tally) RoundFinished(outcome string) { t.count("round " + outcome) }
func (t *tally) DrainAnswered(answer string)  { t.count("drain " + answer) }
func (t *tally) TookOver()                    { t.count("took over") }
func (t *tally) Violation()                   { t.count("violation") }

func (t *tally) UpgradeStarted()                { t.count("upgrade started") }
func (t *tally) UpgradeFinished(outcome string) { t.count("upgrade " + outcome) }
func (t *tally) Buffered(more int)              { t.do(func() { t.buffered += more }) }

func (t *tally) MigrationFinished(outcome string, initiator bool, from, to network.Conn, took time.Duration, drained uint64) {
	t.do(func() {
		t.finished = append(t.finished, fmt.Sprintf("%s %v %s to %s in %v, drained %d", outcome, initiator, connLabel(from), connLabel(to), took, drained))
	})
}

func (t *tally) ResumptionFinished(outcome string, took time.Duration, again uint64) {
	t.count(fmt.Sprintf("%s after %v, %d again", outcome, took, again))
}

func (t *tally) ConnectionPruned(by, rule string, waited time.Duration) {
	t.do(func() {
		t.counts["pruned by "+by+", rule "+rule]++
		t.waited = append(t.waited, waited)
	})
}

// now returns what is measured of all peers.
func (t *tally) now() (peers PeerMetrics) {
	t.do(func() { peers = t.peers })
	return peers
}

// pinnedNow returns the protocols of what cannot move.
func (t *tally) pinnedNow() (pinned map[protocol.ID]int) {
	t.do(func() { pinned = maps.Clone(t.pinned) })
	return pinned
}

func (t *tally) has(what string) (n int) {
	t.do(func() { n = t.counts[what] })
	return n
}

func TestMetricsOfAPeer(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		mt := newTally()
		w := newWorld(t, higher, WithMetricsTracer(mt))
		relay := w.connectLimited()
		streams := relay.open(3)
		relay.setPlain(2)
		w.mover.setAnswer(func(s *fakeStream) error {
			switch s {
			case streams[0]:
				return errDeniedByFake
			case streams[1]:
				return errFakeReset
			}
			return nil
		})
		w.pass(time.Minute)
		require.Zero(t, mt.now(), "a peer with one connection is not measured")
		w.connect(quicAddr)
		w.pass(fastSettle + 50*time.Millisecond)
		require.Equal(t, 3, mt.now().Moving)
		w.pass(10 * time.Second)
		require.Equal(t, PeerMetrics{Duplicates: 1, Surplus: 1, Alive: 2, Pinned: 3, Waiting: 1, Draining: 1}, mt.now())
		require.Equal(t, map[protocol.ID]int{"/test/labelled/1.0.0": 1, "/test/plain/1.0.0": 2}, mt.pinnedNow())
		require.Positive(t, mt.has("round moved"))
		require.Zero(t, mt.has("round pruned"))

		relay.remove(streams[0])
		relay.remove(streams[1])
		relay.setPlain(0)
		w.pass(time.Minute)
		require.True(t, relay.pruned())
		require.Equal(t, 1, mt.has("pruned by this side, rule unlimited"))
		require.Equal(t, 1, mt.has("round pruned"))
		require.Positive(t, mt.has("drain "+DrainDrained))
		require.Greater(t, mt.waited[0], 10*time.Second, "the drain's time includes that of the pinned streams")
		require.Zero(t, mt.now(), "and nothing is left of the peer")
		require.Empty(t, mt.pinnedNow())
	})
}

func TestMetricsOfAManagerThatIsClosed(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		mt := newTally()
		w := newWorld(t, higher, WithMetricsTracer(mt))
		w.connect(tcpAddr).setPlain(1)
		w.connect(quicAddr)
		w.pass(5 * time.Second)
		require.Equal(t, 1, mt.now().Pinned)
		require.NoError(t, w.m.Close())
		w.pass(time.Minute)
		require.Zero(t, mt.now(), "gauges do not outlive what they are of")
		require.Empty(t, mt.pinnedNow())
	})
}

func TestMetricsOfMigrations(t *testing.T) {
	mt := newTally()
	m, err := New(nil, WithMetricsTracer(mt))
	require.NoError(t, err)
	defer m.Close()
	relay, quic := &fakeConn{addr: ma.StringCast(relayAddr), limited: true}, &fakeConn{addr: ma.StringCast(quicAddr)}
	for _, e := range []migrate.Event{
		{Kind: migrate.Started, From: relay, To: quic},
		{Kind: migrate.Acked, From: relay, To: quic},
		{Kind: migrate.Finished, From: relay, To: quic, Initiator: true, Took: time.Second, Drained: 1000},
		{Kind: migrate.Denied, From: quic, To: relay},
		{Kind: migrate.Failed, From: quic, Err: fmt.Errorf("no room: %w", migrate.ErrTryLater)},
		{Kind: migrate.Failed, From: relay, To: quic, Err: network.ErrReset},
	} {
		m.moves.migrated(e)
	}
	require.Equal(t, []string{
		"moved true limited relay to quic-v1 in 1s, drained 1000",
		"denied false quic-v1 to limited relay in 0s, drained 0",
		"later false quic-v1 to unknown in 0s, drained 0",
		"reset false limited relay to quic-v1 in 0s, drained 0",
	}, mt.finished)
}

// gathered returns the names of what a registry has of Portage, with the number of series.
func gathered(t *testing.T, reg *prometheus.Registry) map[string]*dto.MetricFamily {
	t.Helper()
	families, err := reg.Gather()
	require.NoError(t, err)
	found := make(map[string]*dto.MetricFamily)
	for _, f := range families {
		if len(f.GetName()) > len(metricNamespace) && f.GetName()[:len(metricNamespace)] == metricNamespace {
			found[f.GetName()] = f
		}
	}
	return found
}

func TestMetricsAreRegisteredAsTheHostsOwn(t *testing.T) {
	enabled := func(own Option, opts ...libp2p.Option) *Manager {
		h, err := libp2p.New(append(opts, Enable(own), libp2p.NoListenAddrs)...)
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, h.Close()) })
		m, _ := Of(h)
		return m
	}
	reg := prometheus.NewRegistry()
	enabled(nil, libp2p.PrometheusRegisterer(reg))
	found := gathered(t, reg)
	require.NotEmpty(t, found[metricNamespace+"_migrations_total"].GetMetric(), "its series are there before anything has happened")
	require.Contains(t, found, metricNamespace+"_peers_with_duplicates")
	require.NotPanics(t, func() { enabled(nil, libp2p.PrometheusRegisterer(reg)) }, "two hosts share them")

	own := newTally()
	reg = prometheus.NewRegistry()
	m := enabled(WithMetricsTracer(own), libp2p.PrometheusRegisterer(reg))
	require.Same(t, own, m.cfg.metrics)
	require.Empty(t, gathered(t, reg), "whoever has his own tracer has no other")

	m = enabled(nil, libp2p.DisableMetrics())
	require.Nil(t, m.cfg.metrics)
	m, err := New(nil)
	require.NoError(t, err)
	defer m.Close()
	require.Nil(t, m.cfg.metrics)
	_, err = New(nil, WithMetricsTracer(nil))
	require.ErrorContains(t, err, "metrics tracer is nil")
}

// A peer can open streams of as many protocols as it likes where a handler matches them.
func TestLabelsOfMetricsAreBounded(t *testing.T) {
	reg := prometheus.NewRegistry()
	mt := NewMetricsTracer(WithRegisterer(reg))
	for i := range 1000 {
		mt.PinnedStreams(protocol.ID(fmt.Sprint("/invented/", i)), 1)
		mt.ConnectionPruned(ByThisSide, fmt.Sprint("invented", i), time.Second)
	}
	for _, name := range []string{"pinned_streams_by_protocol", "prunes_total"} {
		n := len(gathered(t, reg)[metricNamespace+"_"+name].GetMetric())
		require.LessOrEqual(t, n, maxLabels+1, name)
	}
}

// The metric of a rule is there before it has decided anything, and only that of a rule that
// there is.
func TestRulesOfMetricsAreThoseOfPackagePolicy(t *testing.T) {
	_, err := policy.Parse("chain(invented)")
	var parseError *policy.ParseError
	require.ErrorAs(t, err, &parseError)
	rules := slices.DeleteFunc(slices.Clone(parseError.Known), func(name string) bool { return name == "default" }) // a policy
	tie := policy.Chain().Rank([]policy.Candidate{{ID: "a"}, {ID: "b"}}).Decisions[0].Rule
	require.ElementsMatch(t, append(rules, tie, noRule), knownRules)
}

func TestMetricsDoNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	mt := NewMetricsTracer(WithRegisterer(prometheus.NewRegistry()))
	conns := []network.Conn{&fakeConn{addr: ma.StringCast(relayAddr), limited: true}, &fakeConn{addr: ma.StringCast(quicAddr)}, &fakeConn{addr: ma.StringCast(tcpAddr)}, nil}
	one := func(of []string) string { return of[rand.IntN(len(of))] }
	for name, f := range map[string]func(){
		"PeerChanged":   func() { mt.PeerChanged(PeerMetrics{Alive: rand.IntN(3)}, PeerMetrics{Alive: rand.IntN(3), Silent: 1}) },
		"PinnedStreams": func() { mt.PinnedStreams("/test/plain/1.0.0", 1); mt.PinnedStreams("/test/plain/1.0.0", -1) },
		"RoundFinished": func() { mt.RoundFinished(one(roundOutcomes)) },
		"MigrationFinished": func() {
			mt.MigrationFinished(one(migrationOutcomes), true, conns[rand.IntN(4)], conns[rand.IntN(4)], time.Second, 1000)
		},
		"DrainAnswered":      func() { mt.DrainAnswered(one(drainAnswers)) },
		"ConnectionPruned":   func() { mt.ConnectionPruned(ByThisSide, one(knownRules), time.Second) },
		"ResumptionFinished": func() { mt.ResumptionFinished(one(resumeOutcomes), time.Second, 1000) },
		"TookOver":           mt.TookOver,
		"Violation":          mt.Violation,
		"Buffered":           func() { mt.Buffered(1000); mt.Buffered(-1000) },
		"Upgrade":            func() { mt.UpgradeStarted(); mt.UpgradeFinished(one(upgradeOutcomes)) },
	} {
		t.Run(name, func(t *testing.T) {
			for range 1000 {
				f() // makes the series that are not there from the start
			}
			require.Zero(t, testing.AllocsPerRun(1000, f))
		})
	}
}
