package connmgr

import (
	"fmt"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"go.uber.org/zap"

	"github.com/go-portage/portage/internal/sampled"
	"github.com/go-portage/portage/policy"
)

// Each decision is logged where it takes effect: as a sentence for people, with the
// same in fields for machines. Sentences are made only if somebody reads them.

func (m *Manager) warnBare() {
	m.bareOnce.Do(func() {
		m.log.Warn("connection manager without a host: it can only close connections that carry no stream; call Wrap right after libp2p.New")
	})
}

// logPolicy is for a policy that does not do what it should: said once for each policy.
func (m *Manager) logPolicy(d *peerState, by *ranker, err error) {
	if d == nil || !by.blamed.CompareAndSwap(false, true) {
		return
	}
	m.log.Error("policy failed; nothing is done about peers that it fails for. Mend it, or set another one with SetPolicy",
		zap.Stringer("peer", d.peer), zap.String("policy", by.name()), zap.Error(err))
}

func (m *Manager) logSilent(p peer.ID, c ConnInfo, waited time.Duration) {
	m.logSampled(&m.silences, p, func() (string, []zap.Field) {
		return fmt.Sprintf("%s does not answer", c.Kind), []zap.Field{zap.Stringer("connection", c), zap.Duration("waited", waited)}
	})
}

// logRefused is said for a reason that the peer has not given for the connection before.
func (m *Manager) logRefused(p peer.ID, loser ConnInfo, reason string) {
	m.logSampled(&m.refusals, p, func() (string, []zap.Field) {
		return fmt.Sprintf("kept %s, the peer refused to let it go: %q", loser.Kind, reason),
			[]zap.Field{zap.Stringer("connection", loser), zap.String("reason", reason)}
	})
}

// logSampled logs what a peer can have logged at a rate of its choice: one line in
// sampleEvery, which says how many were left out before it.
func (m *Manager) logSampled(of *sampled.Lines, p peer.ID, line func() (string, []zap.Field)) {
	ce := m.log.Check(zap.InfoLevel, "")
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

func (m *Manager) logTookOver(p peer.ID, waited time.Duration) {
	if ce := m.log.Check(zap.InfoLevel, ""); ce != nil {
		ce.Message = fmt.Sprintf("peer %s: took over, nothing had happened for %s", shortID(p), inWords(waited))
		ce.Write(zap.Stringer("peer", p), zap.Duration("waited", waited))
	}
}

// logUpgrade tells of an attempt to get a direct connection. That it has failed, as most do
// where it cannot be, is nobody's business but of those who look for the reason.
func (m *Manager) logUpgrade(p peer.ID, attempts int, took time.Duration, err error) {
	level := zap.InfoLevel
	if err != nil {
		level = zap.DebugLevel
	}
	ce := m.log.Check(level, "")
	if ce == nil {
		return
	}
	ce.Message = fmt.Sprintf("peer %s: got a direct connection in attempt %d", shortID(p), attempts)
	fields := []zap.Field{zap.Stringer("peer", p), zap.Int("attempt", attempts), zap.Duration("took", took)}
	if err != nil {
		ce.Message = fmt.Sprintf("peer %s: no direct connection in attempt %d: %s", shortID(p), attempts, briefly(err))
		fields = append(fields, zap.Error(err))
	}
	ce.Write(fields...)
}

// logMoved tells what a batch has moved from each loser, and what it could not.
func (m *Manager) logMoved(p peer.ID, winner ConnInfo, losers []Loser, err error) {
	for _, l := range losers {
		if l.Moved+l.Failed+l.Moving == 0 {
			continue
		}
		ce := m.log.Check(zap.InfoLevel, "")
		if ce == nil {
			return
		}
		var sb strings.Builder
		fmt.Fprintf(&sb, "peer %s: moved %s from %s to %s%s in %s",
			shortID(p), streams(l.Moved), l.Conn.Kind, winner.Kind, because(l.Decision), inWords(l.took))
		fields := append(fieldsOf(p, winner, l.Conn, l.Decision, l.Moved, l.took),
			zap.Int("streams_failed", l.Failed), zap.Int("streams_moving", l.Moving))
		if l.Failed > 0 {
			fmt.Fprintf(&sb, ", %d to be tried again", l.Failed)
			fields = append(fields, zap.Error(err))
		}
		if l.Moving > 0 {
			fmt.Fprintf(&sb, ", %d still moving", l.Moving)
		}
		ce.Message = sb.String()
		ce.Write(fields...)
	}
}

// logByPeer tells what the peer, which decides, has done: moved streams, closed a
// connection, or both.
func (m *Manager) logByPeer(p peer.ID, l byPeerLine) {
	ce := m.log.Check(zap.InfoLevel, "")
	if ce == nil {
		return
	}
	from := l.cs.info()
	var to ConnInfo
	if l.to != nil {
		to = l.to.info()
	}
	switch {
	case l.closed && l.to == nil:
		ce.Message = fmt.Sprintf("peer %s: the peer dropped %s", shortID(p), from.Kind)
	case l.closed:
		ce.Message = fmt.Sprintf("peer %s: the peer kept %s, dropped %s, %s moved", shortID(p), to.Kind, from.Kind, streams(l.streams))
		if l.streams > 0 {
			ce.Message += " in " + inWords(l.took)
		}
	default:
		ce.Message = fmt.Sprintf("peer %s: the peer moved %s from %s to %s in %s", shortID(p), streams(l.streams), from.Kind, to.Kind, inWords(l.took))
	}
	ce.Write(fieldsOf(p, to, from, policy.Decision{}, l.streams, l.took)...)
}

// logPruned tells of a loser that is gone: the line that sums up what was done about
// it.
func (m *Manager) logPruned(p peer.ID, winner, loser ConnInfo, d policy.Decision, moved int, took time.Duration, err error) {
	ce := m.log.Check(zap.InfoLevel, "")
	if ce == nil {
		return
	}
	ce.Message = fmt.Sprintf("peer %s: kept %s, dropped %s%s, %s moved", shortID(p), winner.Kind, loser.Kind, because(d), streams(moved))
	if moved > 0 {
		ce.Message += " in " + inWords(took)
	}
	fields := fieldsOf(p, winner, loser, d, moved, took)
	if err != nil { // it is closed all the same
		fields = append(fields, zap.Error(err))
	}
	ce.Write(fields...)
}

func fieldsOf(p peer.ID, winner, loser ConnInfo, d policy.Decision, moved int, took time.Duration) []zap.Field {
	return []zap.Field{
		zap.Stringer("peer", p),
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
