package connmgr

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"go.uber.org/zap"

	"github.com/go-portage/portage/internal/punch"
	"github.com/go-portage/portage/internal/sampled"
	"github.com/go-portage/portage/migrate"
	"github.com/go-portage/portage/policy"
)

// teller says what is done, each time where it takes effect: in the log, as events of the
// host's bus, to the metrics and for the status page. In the log it is a sentence for people,
// with the same in fields for machines. Sentences are made only if somebody reads them.
type teller struct {
	log     *zap.Logger   // what the history gets, too
	metrics MetricsTracer // nil: nothing is measured
	events  emitter
	totals  totals
	history history
	outages outages

	bareOnce sync.Once
	silences sampled.Lines // which lines about peers are logged; see sampled
	refusals sampled.Lines
	stays    sampled.Lines
	deeds    sampled.Lines
}

func newTeller(cfg *config) *teller {
	t := &teller{metrics: cfg.metrics, events: emitter{log: cfg.log}}
	t.log = t.history.beside(cfg.log)
	t.totals.since = time.Now()
	t.silences.Every, t.refusals.Every, t.stays.Every = sampleEvery, sampleEvery, sampleEvery
	t.deeds.Every, t.deeds.AtOnce = sampleEvery, deedsAtOnce
	return t
}

// migrated is told of each step of each migration, and of each resumption.
func (t *teller) migrated(e migrate.Event) {
	t.resumed(e)
	t.totals.migrated(e)
	t.measureMigration(e)
	t.emitMigrated(e)
}

// answered tells what came of a request to lose a connection.
func (t *teller) answered(p peer.ID, loser ConnInfo, phase drainPhase, err error) {
	if t.metrics != nil {
		t.metrics.DrainAnswered(phase.outcome())
	}
	if err != nil {
		t.log.Debug("drain: no answer", zap.Stringer("peer", p), zap.Stringer("connection", loser), zap.Error(err))
	}
}

// bare says that there is no host.
func (t *teller) bare() {
	t.bareOnce.Do(func() {
		t.log.Warn("connection manager without a host: it can only close connections that carry no stream; call Wrap right after libp2p.New")
	})
}

// policyFailed is for a policy that does not do what it should: said once for each policy.
func (t *teller) policyFailed(d *peerState, by *ranker, err error) {
	if d == nil || !by.blamed.CompareAndSwap(false, true) {
		return
	}
	t.log.Error("policy failed; nothing is done about peers that it fails for. Mend it, or set another one with SetPolicy",
		zap.Stringer("peer", d.peer), zap.String("policy", by.name()), zap.Error(err))
}

func (t *teller) silent(p peer.ID, c ConnInfo, waited time.Duration) {
	t.sampled(&t.silences, p, func() (string, []zap.Field) {
		return fmt.Sprintf("%s does not answer", c.Kind), []zap.Field{zap.Stringer("connection", c), zap.Duration("waited", waited)}
	})
}

// hearing tells the event bus which connections do not answer any more, and which do again.
func (t *teller) hearing(d *peerState, v *view) {
	var told []EvtConnectionSilent
	d.mu.Lock()
	alone := true
	for i := range v.conns {
		alone = alone && !v.conns[i].path.alive()
	}
	for i := range v.conns {
		cs := v.conns[i].connState
		silent := cs.silent
		switch cs.path.health {
		case pathSilent:
			silent = true
		case pathAlive:
			silent = false
		}
		if silent == cs.silent {
			continue
		}
		cs.silent = silent
		e := EvtConnectionSilent{Peer: d.peer, Conn: cs.info(), Silent: silent, Alone: alone, Since: cs.path.lost}
		if !silent {
			e.Since = cs.path.at
		}
		told = append(told, e)
	}
	d.mu.Unlock()
	for _, e := range told {
		t.events.emit(e)
	}
}

// refused is said for a reason that the peer has not given for the connection before.
func (t *teller) refused(p peer.ID, loser ConnInfo, reason string) {
	t.sampled(&t.refusals, p, func() (string, []zap.Field) {
		return fmt.Sprintf("kept %s, the peer refused to let it go: %q", loser.Kind, reason),
			[]zap.Field{zap.Stringer("connection", loser), zap.String("reason", reason)}
	})
}

// sampled logs what a peer can have logged at a rate of its choice, which is all that is said
// of it from info level up. A line says how many were left out before it.
func (t *teller) sampled(of *sampled.Lines, p peer.ID, line func() (string, []zap.Field)) {
	ce := t.log.Check(zap.InfoLevel, "")
	if ce == nil {
		return
	}
	left, logged := of.Take(p, time.Now())
	if !logged {
		return
	}
	what, fields := line()
	ce.Message = fmt.Sprintf("peer %s: %s", shortID(p), what)
	fields = append(fields, zap.Stringer("peer", p))
	if left > 0 {
		fields = append(fields, zap.Int("more_since_last", left))
	}
	ce.Write(fields...)
}

func (t *teller) tookOver(p peer.ID, waited time.Duration) {
	if t.metrics != nil {
		t.metrics.TookOver()
	}
	t.sampled(&t.deeds, p, func() (string, []zap.Field) {
		return "took over, nothing had happened for " + inWords(waited), []zap.Field{zap.Duration("waited", waited)}
	})
}

// upgradeStarted tells that a direct connection is asked for.
func (t *teller) upgradeStarted(p peer.ID, attempt int) {
	if t.metrics != nil {
		t.metrics.UpgradeStarted()
	}
	t.events.emit(EvtUpgrade{Peer: p, State: UpgradeStarted, Attempt: attempt})
}

// upgradeEnded tells what came of it. closed: the manager is, which has ended it.
func (t *teller) upgradeEnded(e EvtUpgrade, closed bool) {
	if t.metrics != nil {
		t.metrics.UpgradeFinished(upgradeOutcome(e.Err, closed))
	}
	if closed {
		return
	}
	t.events.emit(e)
	t.upgrade(e)
}

// upgradeOutcome is what came of an attempt.
func upgradeOutcome(err error, closed bool) string {
	switch {
	case err == nil:
		return UpgradedDirect
	case closed:
		return UpgradeEnded
	case errors.Is(err, punch.ErrUnsupported):
		return UpgradeUnsupported
	case errors.Is(err, punch.ErrNotOurs):
		return UpgradeGone
	case errors.Is(err, punch.ErrOff), errors.Is(err, punch.ErrNoAddress):
		return UpgradeImpossible
	default:
		return UpgradeNoHole
	}
}

// upgrade tells of an attempt to get a direct connection. That it has failed, as most do
// where it cannot be, matters only to those who look for the reason.
func (t *teller) upgrade(e EvtUpgrade) {
	fields := []zap.Field{zap.Int("attempt", e.Attempt), zap.Duration("took", e.Took)}
	if e.Err == nil {
		t.sampled(&t.deeds, e.Peer, func() (string, []zap.Field) {
			return fmt.Sprintf("got a direct connection in attempt %d", e.Attempt), fields
		})
		return
	}
	ce := t.log.Check(zap.DebugLevel, "")
	if ce == nil {
		return
	}
	if ce.Message = fmt.Sprintf("peer %s: %s", shortID(e.Peer), e.Why); e.Why == "" { // it has got one all the same, or is gone
		ce.Message = fmt.Sprintf("peer %s: attempt %d to get a direct connection has failed: %s", shortID(e.Peer), e.Attempt, briefly(e.Err))
	}
	ce.Write(append(fields, zap.Stringer("peer", e.Peer), zap.Error(e.Err), zap.Time("next", e.Next))...)
}

// moved tells what a batch has moved from each loser, and what it could not.
func (t *teller) moved(p peer.ID, winner ConnInfo, losers []Loser, err error) {
	for _, l := range losers {
		if l.Moved+l.Failed+l.Moving == 0 {
			continue
		}
		t.sampled(&t.deeds, p, func() (string, []zap.Field) {
			var sb strings.Builder
			fmt.Fprintf(&sb, "moved %s from %s to %s%s in %s", streams(l.Moved), l.Conn.Kind, winner.Kind, because(l.Decision), inWords(l.took))
			fields := append(fieldsOf(winner, l.Conn, l.Decision, l.Moved, l.took),
				zap.Int("streams_failed", l.Failed), zap.Int("streams_moving", l.Moving))
			if l.Failed > 0 {
				fmt.Fprintf(&sb, ", %d to be tried again", l.Failed)
				fields = append(fields, zap.Error(err))
			}
			if l.Moving > 0 {
				fmt.Fprintf(&sb, ", %d still moving", l.Moving)
			}
			return sb.String(), fields
		})
	}
}

// detour tells what came of dialling a peer beside a connection that does not answer.
func (t *teller) detour(p peer.ID, c ConnInfo, err error) {
	level, what := zap.InfoLevel, "another connection has come beside it"
	if err != nil {
		level, what = zap.DebugLevel, "and none has come beside it: "+briefly(err)
	}
	if ce := t.log.Check(level, ""); ce != nil {
		ce.Message = fmt.Sprintf("peer %s: %s does not answer, %s", shortID(p), c.Kind, what)
		ce.Write(zap.Stringer("peer", p), zap.Stringer("connection", c))
	}
}

// byPeer tells what the peer, which decides, has done: moved streams, closed connections.
func (t *teller) byPeer(p peer.ID, lines []byPeerLine) {
	for _, l := range lines {
		if l.closed {
			if t.metrics != nil {
				t.metrics.ConnectionPruned(ByPeer, "", 0)
			}
			e := EvtConnectionPruned{Peer: p, Conn: l.cs.info(), ByPeer: true}
			if l.to != nil {
				e.Kept = l.to.info()
			}
			t.totals.byPeer.Add(1)
			t.events.emit(e)
		}
		t.sampled(&t.deeds, p, l.inWords)
	}
}

func (l byPeerLine) inWords() (string, []zap.Field) {
	from := l.cs.info()
	var to ConnInfo
	if l.to != nil {
		to = l.to.info()
	}
	what := ""
	switch {
	case l.closed && l.to == nil:
		what = "the peer dropped " + from.Kind
	case l.closed:
		what = fmt.Sprintf("the peer kept %s, dropped %s, %s moved", to.Kind, from.Kind, streams(l.streams))
		if l.streams > 0 {
			what += " in " + inWords(l.took)
		}
	default:
		what = fmt.Sprintf("the peer moved %s from %s to %s in %s", streams(l.streams), from.Kind, to.Kind, inWords(l.took))
	}
	return what, fieldsOf(to, from, policy.Decision{}, l.streams, l.took)
}

// pruned is a loser that this side has closed.
type pruned struct {
	peer       peer.ID
	kept, conn ConnInfo
	verdict    verdict
	asked      time.Time // when the peer was asked to lose it; zero: it was not
	moved      int       // streams that have moved from it
	took       time.Duration
	err        error // of closing it
}

// pruned tells of a loser that is gone. The line sums up what was done about it.
func (t *teller) pruned(pr pruned) {
	t.totals.closed.Add(1)
	t.measurePruned(pr.verdict, pr.asked)
	t.events.emit(EvtConnectionPruned{Peer: pr.peer, Conn: pr.conn, Kept: pr.kept, Decision: pr.verdict.decision})
	t.sampled(&t.deeds, pr.peer, func() (string, []zap.Field) {
		what := fmt.Sprintf("kept %s, dropped %s%s, %s moved", pr.kept.Kind, pr.conn.Kind, because(pr.verdict.decision), streams(pr.moved))
		if pr.moved > 0 {
			what += " in " + inWords(pr.took)
		}
		fields := fieldsOf(pr.kept, pr.conn, pr.verdict.decision, pr.moved, pr.took)
		if pr.err != nil { // it is closed all the same
			fields = append(fields, zap.Error(pr.err))
		}
		return what, fields
	})
}

func fieldsOf(winner, loser ConnInfo, d policy.Decision, moved int, took time.Duration) []zap.Field {
	return []zap.Field{
		zap.Stringer("winner", winner),
		zap.Stringer("loser", loser),
		zap.String("rule", d.Rule),
		zap.String("winner_value", d.WinnerValue),
		zap.String("loser_value", d.LoserValue),
		zap.Int("streams_moved", moved),
		zap.Duration("took", took),
	}
}

// because returns the decision in brackets, or nothing if there is none.
func because(d policy.Decision) string {
	if d.Rule == "" {
		return ""
	}
	return " (" + d.String() + ")"
}

// shortID returns the two ends of a peer ID: the first characters are the same for most
// peers.
func shortID(p peer.ID) string {
	id := p.String()
	if len(id) <= 12 {
		return id
	}
	return id[:4] + ".." + id[len(id)-6:]
}

// times returns "1 connection", "3 connections".
func times(n int) string {
	if n == 1 {
		return "1 connection"
	}
	return fmt.Sprintf("%d connections", n)
}

// streams returns "1 stream", "14 streams".
func streams(n int) string {
	if n == 1 {
		return "1 stream"
	}
	return fmt.Sprintf("%d streams", n)
}

// inWords returns "221 ms", "4.2 s", "3 m 20 s".
func inWords(d time.Duration) string {
	d = max(d, 0)
	switch {
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Round(time.Millisecond).Milliseconds())
	case d < time.Minute:
		return fmt.Sprintf("%.3g s", d.Seconds())
	default:
		d = d.Round(time.Second)
		return fmt.Sprintf("%d m %d s", d/time.Minute, d%time.Minute/time.Second)
	}
}
