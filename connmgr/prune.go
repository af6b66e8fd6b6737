package connmgr

import (
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/network"

	"github.com/go-portage/portage/policy"
)

// Pruning
//
// A loser is closed when it has had no stream for a quiet time. Only this side's
// streams can be counted here, and a stream that was closed here may be unread at the
// other end, where it dies with the connection: the quiet time is for that. It starts
// again with each stream that a look finds; one that comes and goes between two looks
// (maxQuietGap) is not seen.

// noteQuiet notes which connections are quiet, whoever is to close them.
func (m *Manager) noteQuiet(d *duplicates, v view, winner *connView) {
	for _, cv := range v.conns {
		streams := cv.conn.Stat().NumStreams
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

// prune closes the losers that have been quiet for long enough, and says so in the
// report.
func (m *Manager) prune(d *duplicates, v view, winner *connView, ranking policy.Ranking, r role, report *Report) {
	for _, cv := range v.conns {
		loser := cv.connState
		if loser == winner.connState || !mayFollow(winner.connState, loser) || !m.mayClose(d, winner.connState, loser, r.quiet) {
			continue
		}
		err := loser.conn.CloseWithError(network.ConnSupplanted)
		m.mu.Lock()
		moved, took := loser.moved, loser.took
		m.mu.Unlock()
		m.logPruned(d.peer, winner.info(), loser.info(), decisionOn(ranking, loser.base.ID), moved, took, err)
		for i := range report.Losers {
			if report.Losers[i].Conn.ID == loser.base.ID {
				report.Losers[i].Pruned = true
			}
		}
	}
}

// mayClose is asked right before a loser is closed. Has it been quiet, and is it still?
// Is the winner still there, to the network and to its transport?
func (m *Manager) mayClose(d *duplicates, winner, loser *connState, quiet time.Duration) bool {
	if !slices.Contains(openConns(m.watch.network(), d.peer), winner.conn) ||
		loser.conn.IsClosed() || loser.conn.Stat().NumStreams > 0 {
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return !m.closed && !loser.quiet.IsZero() && time.Since(loser.quiet) >= quiet && d.touching(loser) == 0
}
