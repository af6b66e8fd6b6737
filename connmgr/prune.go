package connmgr

import (
	"context"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/network"

	"github.com/go-portage/portage/policy"
)

// Pruning
//
// A loser is closed when neither side has anything on it. Of the other side only the
// other side knows: a stream that was closed here may be unread there, where it dies with
// the connection. A peer that runs a manager is asked (drain.go). Of any other nothing
// can be known, and the connection has to have been without a stream for long.
//
// A quiet time there is in both cases: what was written to a stream that has been closed
// may still be on its way, and no muxer tells when it has arrived. It starts again with
// each stream that a look finds.

// noteQuiet notes which connections are quiet, whoever is to close them.
func (m *Manager) noteQuiet(d *duplicates, v view, winner *connView) {
	for _, cv := range v.conns {
		streams := m.streamsOn(cv.conn)
		m.mu.Lock()
		switch {
		case cv.connState == winner.connState, streams > 0, d.touching(cv.connState) > 0:
			cv.quiet = time.Time{}
		case cv.quiet.IsZero():
			cv.quiet = time.Now()
		}
		m.mu.Unlock()
	}
}

// prune has the peer agree to close the losers, closes those that nothing keeps any more,
// and says so in the report.
func (m *Manager) prune(ctx context.Context, d *duplicates, v view, winner *connView, ranking policy.Ranking, r role, report *Report) {
	for i := range v.conns {
		cv := &v.conns[i]
		loser := cv.connState
		if loser == winner.connState {
			continue
		}
		if !mayFollow(winner.connState, loser) || cv.exempt != "" {
			m.mu.Lock()
			loser.cancelDrain()
			m.mu.Unlock()
			continue
		}
		asks := r.drains && !loser.plain
		if asks && !m.drained(d, loser, m.streamsOn(loser.conn), r.quiet) || !m.mayClose(d, winner.connState, loser, r, false) {
			continue
		}
		if !asks || !m.confirmed(loser, winner.connState) {
			if !m.ask(ctx, winner.connState, m.cfg.probeTime) {
				return // the next round finds another winner
			}
			if asks {
				// That took time, in which streams may have come and gone. The next
				// Drained is acted on at once.
				m.confirm(loser, winner.connState)
				continue
			}
		}
		if ctx.Err() != nil || !m.mayClose(d, winner.connState, loser, r, true) {
			continue
		}
		err := loser.conn.CloseWithError(network.ConnSupplanted)
		m.mu.Lock()
		moved, took := loser.moved, loser.took
		m.mu.Unlock()
		m.logPruned(d.peer, winner.info(), loser.info(), decisionOn(ranking, loser.base.ID), moved, took, err)
		for i := range report.Losers {
			if report.Losers[i].Conn.ID == loser.base.ID {
				report.Losers[i].Pruned, report.Losers[i].Kept = true, ""
			}
		}
	}
}

// mayClose says whether a loser can be closed at this moment: it has been quiet and is
// still, the peer has agreed where it can be asked, and the winner is there, to the
// network and to its transport, and not about to be closed by the peer. With claim, from
// here on the loser counts for nothing any more (D4).
func (m *Manager) mayClose(d *duplicates, winner, loser *connState, r role, claim bool) bool {
	if !slices.Contains(openConns(m.watch.network(), d.peer), winner.conn) ||
		loser.conn.IsClosed() || m.streamsOn(loser.conn) > 0 {
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.closed, m.pledged(winner), winner.closing,
		loser.probes > 0, // whose end could hide the beginning of another stream
		loser.quiet.IsZero(), time.Since(loser.quiet) < r.quietFor(loser), d.touching(loser) > 0:
		return false
	case r.drains && !loser.plain && (loser.drain == nil || !loser.drain.drained || loser.drain.stale):
		return false
	}
	loser.closing = claim
	return true
}
