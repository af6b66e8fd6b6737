package connmgr

import (
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/metricshelper"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/go-portage/portage/migrate"
)

// Metrics
//
// As go-libp2p's own: the manager tells a MetricsTracer what happens, and where there is
// none, nothing is counted. What a label can be is bounded, whatever peers and policies
// think of; series whose labels are known are there from the start, since a rate over a
// series that begins at one misses it.

const metricNamespace = "libp2p_portage"

// What RoundFinished says of a round.
const (
	RoundAlone     = "alone"     // there is one connection, or none
	RoundWaiting   = "waiting"   // nothing is decided yet: connections may still come, or answers
	RoundLeft      = "left"      // all connections are left alone on purpose
	RoundUndecided = "undecided" // nothing can be decided: no connection answers, or the policy failed
	RoundDecided   = "decided"   // there is a connection to keep
	RoundMoved     = "moved"     // there is, and streams move to it
	RoundPruned    = "pruned"    // there is, and a connection is closed
)

// What MigrationFinished says of a migration.
const (
	MigrationMoved  = "moved"
	MigrationDenied = "denied" // the stream stays where it is for good
	MigrationLater  = "later"  // it stays where it is, and something was in the way
	MigrationReset  = "reset"  // it was reset
)

// What ResumptionFinished says of a stream that had lost its connection.
const (
	StreamResumed = "resumed"  // it goes on over another one
	StreamGivenUp = "given up" // there was no other in time, or the other end has given it up
	StreamEnded   = "ended"    // nobody needed it any more
)

// What DrainAnswered says of a request.
const (
	DrainDrained = "drained" // the peer has done with the connection
	DrainBusy    = "busy"    // not yet
	DrainRefused = "refused" // it wants to keep it
	DrainFailed  = "failed"  // there was no answer
	DrainVoid    = "void"    // the answer does not matter any more
)

// What UpgradeFinished says of an attempt to get a direct connection.
const (
	UpgradedDirect     = "direct"      // there is one
	UpgradeNoHole      = "no hole"     // none came
	UpgradeUnsupported = "unsupported" // the peer does not punch holes
	UpgradeImpossible  = "impossible"  // this host does not punch holes, or has no public address that it knows
	UpgradeGone        = "gone"        // the relayed connection is gone
	UpgradeEnded       = "ended"       // the manager was closed
)

// Who has closed a connection.
const (
	ByThisSide = "this side"
	ByPeer     = "peer"
)

// PeerMetrics is what is measured of a peer that has more than one connection. Its zero
// value is that of any other peer.
type PeerMetrics struct {
	Duplicates int // 1
	Surplus    int // connections beside the one that is kept
	// Connections by what is known of their paths.
	Alive, Silent, Unknown int
	Pinned                 int // streams that cannot move and that keep a connection open
	Waiting                int // streams that failed to move and are going to be tried again
	Moving                 int // migrations that this side has begun
	Draining               int // connections that the peer was asked to let go of
}

// MetricsTracer is told what a [Manager] does. Its methods are called concurrently and must
// not block. Several managers may share one.
type MetricsTracer interface {
	// PeerChanged is called when what is measured of a peer has changed.
	PeerChanged(before, after PeerMetrics)
	// PinnedStreams is called when a peer has so many more pinned streams of a protocol,
	// or, if negative, fewer.
	PinnedStreams(id protocol.ID, more int)
	// RoundFinished is called when a round has looked at a peer and has done what it could.
	RoundFinished(outcome string)
	// MigrationFinished is called when a migration is over that either end has begun. took
	// is 0 where it has failed before the peer was asked. to is nil where there was no
	// stream to move to. drained is how many bytes came over the old connection since it
	// began, where it has succeeded.
	MigrationFinished(outcome string, initiator bool, from, to network.Conn, took time.Duration, drained uint64)
	// ResumptionFinished is called when a stream that had lost its connection has found another
	// one or is over. took is the time since it was lost, and again how many bytes this side
	// sends again.
	ResumptionFinished(outcome string, took time.Duration, again uint64)
	// Buffered is called when handovers hold so many more bytes for applications that do not
	// read, or, if negative, fewer.
	Buffered(more int)
	// DrainAnswered is called when the peer was asked whether it has done with a connection.
	DrainAnswered(answer string)
	// ConnectionPruned is called when a connection was closed that carried nothing any more.
	// rule is the one by which it lost; empty: it was not ranked, or the peer has decided.
	// waited is the time since the peer was asked first; 0: it was not.
	ConnectionPruned(by, rule string, waited time.Duration)
	// TookOver is called when this side has moved streams that the peer should have moved.
	TookOver()
	// Violation is called when a peer broke the stream-migration protocol.
	Violation()
	// UpgradeStarted is called when a direct connection is asked for to a peer that has none,
	// and UpgradeFinished when that is over.
	UpgradeStarted()
	UpgradeFinished(outcome string)
}

// WithMetricsTracer has tracer told what the manager does. Default: with [Enable] one of
// [NewMetricsTracer] for the host's Prometheus registerer, unless the host has metrics
// disabled; with [New] none.
func WithMetricsTracer(tracer MetricsTracer) Option {
	return func(c *config) error {
		if tracer == nil {
			return errors.New("metrics tracer is nil; leave the option out to measure nothing")
		}
		c.metrics = tracer
		return nil
	}
}

var (
	peersWithDuplicates = prometheus.NewGauge(prometheus.GaugeOpts{
		Namespace: metricNamespace, Name: "peers_with_duplicates",
		Help: "Peers with more than one connection",
	})
	surplusConnections = prometheus.NewGauge(prometheus.GaugeOpts{
		Namespace: metricNamespace, Name: "surplus_connections",
		Help: "Connections beside the one that is kept",
	})
	paths = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: metricNamespace, Name: "paths",
		Help: "Connections of peers with more than one, by what is known of their path",
	}, []string{"health"})
	pinnedStreams = prometheus.NewGauge(prometheus.GaugeOpts{
		Namespace: metricNamespace, Name: "pinned_streams",
		Help: "Streams that cannot move and keep a connection open",
	})
	pinnedByProtocol = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: metricNamespace, Name: "pinned_streams_by_protocol",
		Help: "Streams that cannot move and keep a connection open, by protocol; of the first 64 protocols, all others are \"other\"",
	}, []string{"protocol"})
	waitingStreams = prometheus.NewGauge(prometheus.GaugeOpts{
		Namespace: metricNamespace, Name: "waiting_streams",
		Help: "Streams that failed to move and are tried again later",
	})
	migrationsInProgress = prometheus.NewGauge(prometheus.GaugeOpts{
		Namespace: metricNamespace, Name: "migrations_in_progress",
		Help: "Migrations begun by the manager that have not finished",
	})
	drainsInProgress = prometheus.NewGauge(prometheus.GaugeOpts{
		Namespace: metricNamespace, Name: "drains_in_progress",
		Help: "Connections that the peer was asked to have done with",
	})
	roundsTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: metricNamespace, Name: "rounds_total",
		Help: "Looks at a peer with more than one connection, by what came of them",
	}, []string{"outcome"})
	migrationsTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: metricNamespace, Name: "migrations_total",
		Help: "Migrations of a stream, of either end, by outcome and by the connections that it left and was to go to",
	}, []string{"outcome", "from", "to"})
	migrationSeconds = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Namespace: metricNamespace, Name: "migration_duration_seconds",
		Help:    "From the beginning of a migration that succeeded until its old stream was done with",
		Buckets: prometheus.ExponentialBuckets(0.001, 2, 18),
	}, []string{"role"})
	drainedBytes = prometheus.NewCounter(prometheus.CounterOpts{
		Namespace: metricNamespace, Name: "drained_bytes_total",
		Help: "Bytes that came over the old connection between the beginning of a migration that succeeded and the switch to the new one",
	})
	bufferedBytes = prometheus.NewGauge(prometheus.GaugeOpts{
		Namespace: metricNamespace, Name: "buffered_bytes",
		Help: "Memory that handovers hold for applications that do not read",
	})
	resumptionsTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: metricNamespace, Name: "resumptions_total",
		Help: "Streams that had lost their connection, by what became of them",
	}, []string{"outcome"})
	resumptionSeconds = prometheus.NewHistogram(prometheus.HistogramOpts{
		Namespace: metricNamespace, Name: "resumption_duration_seconds",
		Help:    "From the loss of a stream's connection until it went on over another",
		Buckets: prometheus.ExponentialBuckets(0.001, 2, 16),
	})
	resentBytes = prometheus.NewCounter(prometheus.CounterOpts{
		Namespace: metricNamespace, Name: "resent_bytes_total",
		Help: "Bytes that resumed streams have sent again, since they had not arrived over the connection that was lost",
	})
	upgradesInProgress = prometheus.NewGauge(prometheus.GaugeOpts{
		Namespace: metricNamespace, Name: "upgrades_in_progress",
		Help: "Attempts under way to get a direct connection to a peer that has none",
	})
	upgradesTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: metricNamespace, Name: "upgrade_attempts_total",
		Help: "Attempts to get a direct connection to a peer that has none, by outcome",
	}, []string{"outcome"})
	drainAnswersTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: metricNamespace, Name: "drain_answers_total",
		Help: "Answers of peers to the question whether they have done with a connection",
	}, []string{"answer"})
	drainSeconds = prometheus.NewHistogram(prometheus.HistogramOpts{
		Namespace: metricNamespace, Name: "drain_duration_seconds",
		Help:    "From the first question to the peer until the connection was closed",
		Buckets: prometheus.ExponentialBuckets(0.25, 2, 16),
	})
	prunesTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: metricNamespace, Name: "prunes_total",
		Help: "Connections that this side has closed, by the rule by which they lost; of the first 64 rules, all others are \"other\"",
	}, []string{"rule"})
	savedTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: metricNamespace, Name: "connections_saved_total",
		Help: "Connections that are not there any more since nothing was left on them, by who has closed them",
	}, []string{"by"})
	takeoversTotal = prometheus.NewCounter(prometheus.CounterOpts{
		Namespace: metricNamespace, Name: "takeovers_total",
		Help: "Times that streams were moved in the stead of the peer, which should have",
	})
	violationsTotal = prometheus.NewCounter(prometheus.CounterOpts{
		Namespace: metricNamespace, Name: "violations_total",
		Help: "Times that a peer broke the stream-migration protocol",
	})

	collectors = []prometheus.Collector{
		peersWithDuplicates, surplusConnections, paths, pinnedStreams, pinnedByProtocol, waitingStreams,
		migrationsInProgress, drainsInProgress, roundsTotal, migrationsTotal, migrationSeconds,
		drainAnswersTotal, drainSeconds, prunesTotal, savedTotal, takeoversTotal, violationsTotal,
		drainedBytes, bufferedBytes, upgradesInProgress, upgradesTotal,
		resumptionsTotal, resumptionSeconds, resentBytes,
	}
)

// maxLabels is how many values a label can have that others think of.
const maxLabels = 64

// otherLabel stands for the values that come when there are as many.
const otherLabel = "other"

// boundedLabel is a label whose values come from peers or programs: the first maxLabels are
// values, and all others are one.
type boundedLabel struct {
	mu   sync.RWMutex // a leaf
	seen map[string]struct{}
}

func (b *boundedLabel) value(v string) string {
	b.mu.RLock()
	_, ok := b.seen[v]
	full := len(b.seen) >= maxLabels
	b.mu.RUnlock()
	switch {
	case ok:
		return v
	case full:
		return otherLabel
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.seen[v]; !ok && len(b.seen) >= maxLabels {
		return otherLabel
	}
	if b.seen == nil {
		b.seen = make(map[string]struct{})
	}
	b.seen[v] = struct{}{}
	return v
}

// They are for all tracers, as the series are.
var protocolLabel, ruleLabel boundedLabel

type metricsTracer struct{}

var _ MetricsTracer = &metricsTracer{}

type metricsTracerSetting struct {
	reg prometheus.Registerer
}

// MetricsTracerOption configures [NewMetricsTracer].
type MetricsTracerOption func(*metricsTracerSetting)

// WithRegisterer sets where the metrics are registered; nil changes nothing. Default:
// prometheus.DefaultRegisterer.
func WithRegisterer(reg prometheus.Registerer) MetricsTracerOption {
	return func(s *metricsTracerSetting) {
		if reg != nil {
			s.reg = reg
		}
	}
}

// The values of a connection's label. They are those of go-libp2p's own metrics, but for
// relays.
const (
	limitedRelay = "limited relay"
	unknownPath  = "unknown" // there was no connection
)

var (
	connLabels = []string{limitedRelay, "relay", "quic-v1", "webtransport", "webrtc-direct", "tcp", "ws", "wss"}
	// knownRules are those of package policy, and what stands for none.
	knownRules = []string{
		noRule, "unlimited", "direct", "reach", "transport", "ip", "direction", "prefer", "never", "pinned",
		"streams", "older", "younger", "rtt", "incumbent", "id",
	}
	roundOutcomes     = []string{RoundAlone, RoundWaiting, RoundLeft, RoundUndecided, RoundDecided, RoundMoved, RoundPruned}
	migrationOutcomes = []string{MigrationMoved, MigrationDenied, MigrationLater, MigrationReset}
	upgradeOutcomes   = []string{UpgradedDirect, UpgradeNoHole, UpgradeUnsupported, UpgradeImpossible, UpgradeGone, UpgradeEnded}
	resumeOutcomes    = []string{StreamResumed, StreamGivenUp, StreamEnded}
	drainAnswers      = []string{DrainDrained, DrainBusy, DrainRefused, DrainFailed, DrainVoid}
)

// noRule stands for a connection that was not ranked.
const noRule = "not ranked"

// connLabel names a connection. It does not allocate.
func connLabel(c network.Conn) string {
	if c == nil {
		return unknownPath
	}
	addr := c.RemoteMultiaddr()
	for i := range addr {
		if addr[i].Protocol().Code == ma.P_CIRCUIT {
			if c.Stat().Limited {
				return limitedRelay
			}
			return "relay"
		}
	}
	return metricshelper.GetTransport(addr)
}

// NewMetricsTracer returns a MetricsTracer for Prometheus, whose metrics are called
// libp2p_portage_…: docs/operations.md lists them. They are those of all managers of the
// process, as go-libp2p's are. It panics where other metrics have these names.
func NewMetricsTracer(opts ...MetricsTracerOption) MetricsTracer {
	setting := &metricsTracerSetting{reg: prometheus.DefaultRegisterer}
	for _, opt := range opts {
		opt(setting)
	}
	metricshelper.RegisterCollectors(setting.reg, collectors...)
	for _, health := range []health{pathAlive, pathSilent, pathUnknown} {
		paths.WithLabelValues(health.String())
	}
	for _, outcome := range roundOutcomes {
		roundsTotal.WithLabelValues(outcome)
	}
	for _, from := range connLabels {
		for _, to := range connLabels {
			for _, outcome := range migrationOutcomes {
				migrationsTotal.WithLabelValues(outcome, from, to)
			}
		}
		migrationsTotal.WithLabelValues(MigrationLater, from, unknownPath)
	}
	for _, role := range []string{"initiator", "responder"} {
		migrationSeconds.WithLabelValues(role)
	}
	for _, answer := range drainAnswers {
		drainAnswersTotal.WithLabelValues(answer)
	}
	for _, outcome := range resumeOutcomes {
		resumptionsTotal.WithLabelValues(outcome)
	}
	for _, outcome := range upgradeOutcomes {
		upgradesTotal.WithLabelValues(outcome)
	}
	for _, rule := range knownRules {
		prunesTotal.WithLabelValues(ruleLabel.value(rule))
	}
	pinnedByProtocol.WithLabelValues(otherLabel)
	for _, by := range []string{ByThisSide, ByPeer} {
		savedTotal.WithLabelValues(by)
	}
	return &metricsTracer{}
}

func (*metricsTracer) PeerChanged(before, after PeerMetrics) {
	add := func(g prometheus.Gauge, before, after int) {
		if before != after {
			g.Add(float64(after - before))
		}
	}
	add(peersWithDuplicates, before.Duplicates, after.Duplicates)
	add(surplusConnections, before.Surplus, after.Surplus)
	add(pinnedStreams, before.Pinned, after.Pinned)
	add(waitingStreams, before.Waiting, after.Waiting)
	add(migrationsInProgress, before.Moving, after.Moving)
	add(drainsInProgress, before.Draining, after.Draining)
	add(labelled(paths, pathAlive.String()), before.Alive, after.Alive)
	add(labelled(paths, pathSilent.String()), before.Silent, after.Silent)
	add(labelled(paths, pathUnknown.String()), before.Unknown, after.Unknown)
}

// labelled is the series of one label. It does not allocate.
func labelled(v *prometheus.GaugeVec, value string) prometheus.Gauge {
	tags := metricshelper.GetStringSlice()
	defer metricshelper.PutStringSlice(tags)
	*tags = append(*tags, value)
	return v.WithLabelValues(*tags...)
}

// increase counts one more in the series of some labels. It does not allocate.
func increase(v *prometheus.CounterVec, values ...string) {
	tags := metricshelper.GetStringSlice()
	defer metricshelper.PutStringSlice(tags)
	*tags = append(*tags, values...)
	v.WithLabelValues(*tags...).Inc()
}

func (*metricsTracer) PinnedStreams(id protocol.ID, more int) {
	labelled(pinnedByProtocol, protocolLabel.value(string(id))).Add(float64(more))
}

func (*metricsTracer) RoundFinished(outcome string) { increase(roundsTotal, outcome) }

func (*metricsTracer) MigrationFinished(outcome string, initiator bool, from, to network.Conn, took time.Duration, drained uint64) {
	increase(migrationsTotal, outcome, connLabel(from), connLabel(to))
	if outcome != MigrationMoved {
		return
	}
	tags := metricshelper.GetStringSlice()
	defer metricshelper.PutStringSlice(tags)
	role := "responder"
	if initiator {
		role = "initiator"
	}
	*tags = append(*tags, role)
	migrationSeconds.WithLabelValues(*tags...).Observe(took.Seconds())
	drainedBytes.Add(float64(drained))
}

func (*metricsTracer) ResumptionFinished(outcome string, took time.Duration, again uint64) {
	increase(resumptionsTotal, outcome)
	if outcome == StreamResumed {
		resumptionSeconds.Observe(took.Seconds())
		resentBytes.Add(float64(again))
	}
}

func (*metricsTracer) DrainAnswered(answer string) { increase(drainAnswersTotal, answer) }

func (*metricsTracer) ConnectionPruned(by, rule string, waited time.Duration) {
	increase(savedTotal, by)
	if by != ByThisSide {
		return
	}
	if rule == "" {
		rule = noRule
	}
	increase(prunesTotal, ruleLabel.value(rule))
	if waited > 0 {
		drainSeconds.Observe(waited.Seconds())
	}
}

func (*metricsTracer) TookOver() { takeoversTotal.Inc() }

func (*metricsTracer) Violation() { violationsTotal.Inc() }

func (*metricsTracer) Buffered(more int) { bufferedBytes.Add(float64(more)) }

func (*metricsTracer) UpgradeStarted() { upgradesInProgress.Inc() }

func (*metricsTracer) UpgradeFinished(outcome string) {
	upgradesInProgress.Dec()
	increase(upgradesTotal, outcome)
}

// measure tells the metrics what a round has found and done. over: it is the last one, so
// that nothing is left to measure.
func (t *teller) measure(d *peerState, v *view, p *plan, over bool) {
	mt := t.metrics
	if mt == nil {
		return
	}
	mt.RoundFinished(p.outcome())
	after, pinned := v.measured(p)
	if over {
		after, pinned = PeerMetrics{}, nil
	}
	d.mu.Lock()
	before, had := d.measured, d.pinned
	d.measured, d.pinned = after, pinned
	d.mu.Unlock()
	changed(mt, before, after, had, pinned)
}

// measureNothing takes all that was measured of peers back: the manager is closed.
func (t *teller) measureNothing(peers []*peerState) {
	mt := t.metrics
	if mt == nil {
		return
	}
	for _, d := range peers {
		d.mu.Lock()
		was, had := d.measured, d.pinned
		d.measured, d.pinned = PeerMetrics{}, nil
		d.mu.Unlock()
		changed(mt, was, PeerMetrics{}, had, nil)
	}
}

func changed(mt MetricsTracer, before, after PeerMetrics, had, has map[protocol.ID]int) {
	if before != after {
		mt.PeerChanged(before, after)
	}
	for id, n := range had {
		if more := has[id] - n; more != 0 {
			mt.PinnedStreams(id, more)
		}
	}
	for id, n := range has {
		if _, known := had[id]; !known {
			mt.PinnedStreams(id, n)
		}
	}
}

// measured is what is measured of the peer.
func (v *view) measured(p *plan) (PeerMetrics, map[protocol.ID]int) {
	var pm PeerMetrics
	if len(v.conns) < 2 {
		return pm, nil
	}
	pm.Duplicates, pm.Surplus = 1, len(v.conns)-1
	var pinned map[protocol.ID]int
	moving := 0
	for i := range v.conns {
		c := &v.facts.conns[i]
		switch c.path.health {
		case pathAlive:
			pm.Alive++
		case pathSilent:
			pm.Silent++
		default:
			pm.Unknown++
		}
		pm.Waiting += c.retries
		moving += c.moving
		if i == p.winner {
			continue
		}
		switch c.drain.phase {
		case drainAsked, drainBusy, drainAgreed, drainConfirmed:
			pm.Draining++
		}
		if n := c.candidate.Pinned; n > 0 {
			pm.Pinned += n
			if pinned == nil {
				pinned = make(map[protocol.ID]int)
			}
			for _, by := range v.conns[i].pinned {
				pinned[by.id] += by.count
			}
		}
	}
	pm.Moving = moving / 2 // each touches two
	return pm, pinned
}

// outcome is what came of a plan.
func (p *plan) outcome() string {
	switch {
	case len(p.verdicts) < 2:
		return RoundAlone
	case p.left, errors.Is(p.err, ErrExempt):
		return RoundLeft
	case p.err != nil:
		return RoundUndecided
	case !p.decided:
		return RoundWaiting
	case len(p.closed) > 0:
		return RoundPruned
	case slices.ContainsFunc(p.verdicts, func(v verdict) bool { return v.move != moveNone }):
		return RoundMoved
	default:
		return RoundDecided
	}
}

// measurePruned tells the metrics of a connection that this side has closed. asked is when
// the peer was asked first.
func (t *teller) measurePruned(v verdict, asked time.Time) {
	mt := t.metrics
	if mt == nil {
		return
	}
	var waited time.Duration
	if !asked.IsZero() {
		waited = time.Since(asked)
	}
	rule := v.decision.Rule
	if v.out != "" {
		rule = ""
	}
	mt.ConnectionPruned(ByThisSide, rule, waited)
}

// measureMigration tells the metrics of a migration that is over.
func (t *teller) measureMigration(e migrate.Event) {
	mt := t.metrics
	if mt == nil {
		return
	}
	if outcome, over := outcomeOf(e); over {
		mt.MigrationFinished(outcome, e.Initiator, e.From, e.To, e.Took, e.Drained)
	}
}

// outcomeOf says how a migration has ended, and whether it has.
func outcomeOf(e migrate.Event) (outcome string, over bool) {
	switch {
	case e.Kind == migrate.Finished:
		return MigrationMoved, true
	case e.Kind == migrate.Denied:
		return MigrationDenied, true
	case e.Kind != migrate.Failed:
		return "", false
	case errors.Is(e.Err, migrate.ErrTryLater), errors.Is(e.Err, migrate.ErrClosed):
		return MigrationLater, true
	default:
		return MigrationReset, true
	}
}

// outcome is what came of a request.
func (p drainPhase) outcome() string {
	switch p {
	case drainAgreed, drainConfirmed:
		return DrainDrained
	case drainBusy:
		return DrainBusy
	case drainRefused:
		return DrainRefused
	case drainFailed:
		return DrainFailed
	default:
		return DrainVoid
	}
}
