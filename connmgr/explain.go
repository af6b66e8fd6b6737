package connmgr

import (
	"fmt"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/go-portage/portage/policy"
)

// Explanation is what a Manager thinks of a peer at one moment, and why.
type Explanation struct {
	Peer peer.ID
	// Controller is whether this side decides for both. Reason says why, and is empty
	// if there is nothing to decide.
	Controller bool
	Reason     string
	// State is what the manager is doing about the peer, in words.
	State string
	// Conns are the connections, the best first.
	Conns []ExplainedConn
}

// ExplainedConn is one connection in an Explanation.
type ExplainedConn struct {
	Conn      ConnInfo
	Candidate policy.Candidate
	// Winner is whether this is the connection to keep.
	Winner bool
	// Decision says which rule it lost by. It is the zero value for the winner.
	Decision policy.Decision
	// State is what becomes of the connection, in words.
	State string
}

// String returns the explanation for people: a line for the peer, and one for each
// connection.
func (e Explanation) String() string {
	var sb strings.Builder
	fmt.Fprintf(&sb, "peer %s: %s", e.Peer, e.State)
	if e.Reason != "" {
		who := "the peer decides"
		if e.Controller {
			who = "this side decides"
		}
		fmt.Fprintf(&sb, "; %s: %s", who, e.Reason)
	}
	for i, c := range e.Conns {
		fmt.Fprintf(&sb, "\n  %d. %s, %s (%d labelled, %d pinned)", i+1,
			c.Conn, streams(c.Candidate.Streams), c.Candidate.Labelled, c.Candidate.Pinned)
		if c.Decision.Rule != "" {
			fmt.Fprintf(&sb, ", %s", c.Decision)
		}
		fmt.Fprintf(&sb, ": %s", c.State)
	}
	return sb.String()
}

// Explain returns what the manager thinks of p: its connections as the policy ranks
// them now, the rule that decided on each, who decides, and what is being waited for.
// It changes nothing and does not block. A peer that is not connected has no
// connections in its explanation.
func (m *Manager) Explain(p peer.ID) Explanation {
	e := Explanation{Peer: p}
	m.mu.Lock()
	d, closed := m.peers[p], m.closed
	m.mu.Unlock()
	v := m.look(p, d)
	switch {
	case closed:
		e.State = "the manager is closed"
	case m.watch.network() == nil:
		e.State = "the manager has not met a network yet"
	case len(v.conns) == 0:
		e.State = "no connection"
	case len(v.conns) == 1:
		e.State = "one connection, nothing to do"
	case d == nil:
		e.State = "duplicates that have only just come"
	}
	if len(v.conns) == 0 {
		return e
	}
	m.mu.Lock()
	out := m.ruledOut(v)
	m.mu.Unlock()
	candidates := v.candidates(out)
	if len(candidates) == 0 {
		candidates = v.candidates(nil)
	}
	ranking := m.policy().Rank(candidates)
	first, _ := ranking.Winner()
	winner := v.find(first.ID)
	drains := false // the peer can be asked
	if len(v.conns) > 1 && m.watch.network() != nil {
		e.Controller, e.Reason = m.controller(p, v.mover != nil)
		advertises, _ := managed(m.watch.network(), p)
		drains = v.mover != nil && advertises
	}
	exempt := m.exemptPeer(p)

	m.mu.Lock()
	defer m.mu.Unlock()
	if d != nil && d.winner != nil && d.challenger != nil && v.find(d.winner.base.ID) != nil {
		ranking, winner = d.ranking, v.find(d.winner.base.ID)
	}
	if exempt != "" && len(v.conns) > 1 {
		e.State = exempt
	}
	if winner == nil {
		e.State = "the policy names no connection that there is"
	} else if e.State == "" {
		e.State = m.stateOf(d, v, winner, e.Controller)
	}
	listed := make(map[*connState]bool)
	add := func(cv *connView) {
		if cv == nil || listed[cv.connState] {
			return
		}
		listed[cv.connState] = true
		ec := ExplainedConn{Conn: cv.info(), Candidate: cv.candidate, Winner: cv == winner}
		ec.State = m.connStateOf(d, v, cv, winner, e.Controller, drains)
		if why := out[cv.connState]; why != "" {
			ec.State = why + "; " + ec.State
		}
		if !ec.Winner {
			ec.Decision = decisionOn(ranking, cv.base.ID)
		}
		e.Conns = append(e.Conns, ec)
	}
	for _, c := range ranking.Order {
		add(v.find(c.ID))
	}
	for i := range v.conns { // those that the policy left out
		add(&v.conns[i])
	}
	return e
}

// stateOf must be called with mu held.
func (m *Manager) stateOf(d *duplicates, v view, winner *connView, decides bool) string {
	retries, soonest := 0, time.Time{}
	for _, h := range d.held {
		if !h.denied && h.until.After(v.at) {
			if retries++; retries == 1 || h.until.Before(soonest) {
				soonest = h.until
			}
		}
	}
	switch {
	case d.settled.After(v.at):
		return "settling for another " + inWords(d.settled.Sub(v.at))
	case len(d.moving) > 0:
		return streams(len(d.moving)) + " moving"
	case d.challenger != nil:
		return "another connection ranks first now, and wins if it still does in " +
			inWords(d.challenged.Add(patienceIntervals*m.cfg.interval).Sub(v.at))
	case retries > 0 && decides:
		return fmt.Sprintf("%s failed to move, next attempt in %s", streams(retries), inWords(soonest.Sub(v.at)))
	case !decides && d.times > 0:
		return "taken over, since the peer did nothing"
	case !decides && d.winner != nil:
		return "following, takes over in " + inWords(d.takesOverAt(&m.cfg).Sub(v.at)) + " if nothing happens"
	default:
		return "consolidating"
	}
}

// connStateOf must be called with mu held.
func (m *Manager) connStateOf(d *duplicates, v view, cv, winner *connView, decides, drains bool) string {
	movable := len(cv.labelled)
	if d != nil {
		for _, s := range cv.labelled {
			if d.held[s].denied {
				movable--
			}
		}
	}
	switch {
	case cv == winner && len(v.conns) == 1:
		return "the only one"
	case cv == winner:
		return "kept"
	case winner == nil || d == nil:
		return "not decided on"
	}
	if kept := m.keptFor(cv, winner.connState); kept != "" {
		return "kept: " + kept
	}
	switch {
	case movable > 0:
		return streams(movable) + " to move"
	case cv.candidate.Streams > 0:
		return "kept until " + streams(cv.candidate.Streams) + " that cannot move have ended"
	case cv.quiet.IsZero():
		return "no stream"
	}
	quietFor := "quiet for " + inWords(v.at.Sub(cv.quiet))
	drains = drains && !cv.plain
	switch {
	case !decides && d.times == 0 && !d.forced:
		return quietFor
	case drains && cv.drain != nil && !cv.drain.ended && !cv.drain.drained:
		return quietFor + ", waiting for the peer to have done with it"
	case drains:
		return quietFor + " of " + inWords(m.cfg.quietTime) + ", then closed"
	}
	quiet := m.cfg.plainQuietTime
	if !decides && d.times > 0 {
		quiet += m.cfg.takeoverDelay()
	}
	return quietFor + " of " + inWords(quiet) + ", then closed"
}
