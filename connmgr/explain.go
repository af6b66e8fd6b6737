package connmgr

import (
	"cmp"
	"fmt"
	"slices"
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
	// Upgrade says what is done about a direct connection, in words, where all connections
	// are relayed; empty if one is not. NextUpgrade is when one is asked for next; zero: this
	// end does not, as things are.
	Upgrade     string
	NextUpgrade time.Time
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
	// RuledOut says why the connection was not ranked at all; empty if it was.
	RuledOut string
	// Reason is why the connection is still there, and State what becomes of it, in words.
	Reason Reason
	State  string
	// Until is when what State waits for is over by itself; zero if nobody knows.
	Until time.Time
	// Path is what is known of the path: "alive", "silent" or "unknown". It is unknown as
	// long as the peer has no other connection.
	Path string
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
	if e.Upgrade != "" {
		fmt.Fprintf(&sb, "; %s", e.Upgrade)
	}
	for i, c := range e.Conns {
		fmt.Fprintf(&sb, "\n  %d. %s, %s (%d labelled, %d pinned)", i+1,
			c.Conn, streams(c.Candidate.Streams), c.Candidate.Labelled, c.Candidate.Pinned)
		switch {
		case c.Decision.Rule != "":
			fmt.Fprintf(&sb, ", %s", c.Decision)
		case c.RuledOut != "" && c.RuledOut != c.State:
			fmt.Fprintf(&sb, ", ruled out: %s", c.RuledOut)
		}
		fmt.Fprintf(&sb, ": %s", c.State)
	}
	return sb.String()
}

// Explain returns what the manager thinks of p: its connections as the policy ranks
// them now, the rule that decided on each, who decides, and what is being waited for.
// It changes nothing. It does not block, unless the policy does, and then for a second at
// most. A peer that is not connected has no connections in its explanation.
func (m *Manager) Explain(p peer.ID) Explanation {
	e, _, _ := m.explain(p, m.policies.of)
	return e
}

func (m *Manager) explain(p peer.ID, by func(*peerState) rank) (Explanation, *view, *plan) {
	e := Explanation{Peer: p}
	d, closed := m.sched.known(p), m.tasks.over()
	v := m.looks.look(p, d)
	plan := decide(m.cfg, by(d), &v.facts)
	e.State = plan.state
	switch {
	case closed:
		e.State = "the manager is closed"
	case m.watch.network() == nil:
		e.State = "the manager has not met a network yet"
	case len(v.conns) > 1 && d == nil:
		e.State = "duplicates that have only just come"
	}
	if !closed {
		e.Controller, e.Reason = plan.role.decides, plan.role.reason
		e.Upgrade, e.NextUpgrade = plan.upgrade.why, plan.upgrade.at
	}
	for i := range v.conns {
		cv, verdict := &v.conns[i], plan.verdicts[i]
		e.Conns = append(e.Conns, ExplainedConn{
			Conn: cv.info(), Candidate: cv.facts.candidate, Winner: i == plan.winner,
			Decision: verdict.decision, RuledOut: verdict.out, Reason: verdict.reason, State: verdict.why, Until: verdict.until,
			Path: cv.facts.path.health.String(),
		})
	}
	place := plan.places()
	slices.SortStableFunc(e.Conns, func(a, b ExplainedConn) int { return cmp.Compare(place(a.Conn.ID), place(b.Conn.ID)) })
	return e, v, &plan
}
