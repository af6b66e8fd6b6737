package connmgr

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"

	"github.com/go-portage/portage/policy"
)

// Report says what one round did for a peer.
type Report struct {
	Peer   peer.ID
	Winner ConnInfo
	// Losers are the other connections, the best first.
	Losers   []Loser
	Duration time.Duration
}

// Loser says what a round did about one connection.
type Loser struct {
	Conn ConnInfo
	// Decision says which rule it lost by. Its zero value means that the policy gave
	// none.
	Decision policy.Decision
	// Moved streams are on the winner now. Failed ones are where they were and are
	// tried again later. Moving ones had not finished when the round did, and go on.
	Moved, Failed, Moving int
	// Pinned streams cannot move: they are not labelled, or the peer denied to migrate
	// them. The connection is kept for them until they end.
	Pinned int
	// RuledOut says why the connection was not ranked at all: it does not answer, or the
	// peer is about to close it. Empty if it was.
	RuledOut string
	// Kept says what forbids to close the connection; empty if nothing does.
	Kept string
	// Pruned connections have been closed.
	Pruned bool

	took time.Duration // from the start of the round to the last stream that moved
}

// ConnInfo names a connection.
type ConnInfo struct {
	ID     string // as network.Conn.ID
	Kind   string // for people: "quic direct", "relay", "limited relay"
	Remote ma.Multiaddr
}

// String returns kind, address and ID.
func (c ConnInfo) String() string {
	if c.Remote == nil {
		return fmt.Sprintf("%s (%s)", c.Kind, c.ID)
	}
	return fmt.Sprintf("%s %s (%s)", c.Kind, c.Remote, c.ID)
}

func (cs *connState) info() ConnInfo { return cs.name }

func kind(c policy.Candidate) string {
	switch {
	case c.Relayed && c.Limited:
		return "limited relay"
	case c.Relayed:
		return "relay"
	case c.Limited:
		return c.Transport.String() + " limited"
	default:
		return c.Transport.String() + " direct"
	}
}

// String returns a line for the winner and one for each loser.
func (r Report) String() string {
	var sb strings.Builder
	fmt.Fprintf(&sb, "peer %s: kept %s, in %s", r.Peer, r.Winner, inWords(r.Duration))
	for _, l := range r.Losers {
		fmt.Fprintf(&sb, "\n  %s", l.Conn)
		switch {
		case l.Decision.Rule != "":
			fmt.Fprintf(&sb, ", %s", l.Decision)
		case l.RuledOut != "":
			fmt.Fprintf(&sb, ", ruled out: %s", l.RuledOut)
		}
		fmt.Fprintf(&sb, ": %s moved", streams(l.Moved))
		for _, part := range []struct {
			n    int
			what string
		}{{l.Failed, "failed"}, {l.Moving, "still moving"}, {l.Pinned, "pinned"}} {
			if part.n > 0 {
				fmt.Fprintf(&sb, ", %d %s", part.n, part.what)
			}
		}
		switch {
		case l.Pruned:
			sb.WriteString("; closed")
		case l.Kept != "":
			fmt.Fprintf(&sb, "; kept: %s", l.Kept)
		}
	}
	return sb.String()
}

// Consolidate runs a round for p now: without a settle delay, whoever is the
// controller, and without regard to backoff. It blocks until every stream that can move
// has moved, failed or been denied, and returns what was done. Losers are closed by
// later rounds, once the peer has agreed or they have been quiet for long enough, and by
// this one only if that is so already; that, too, is then done whoever is the controller,
// until the peer gets another connection.
//
// A peer with one connection is no error, and the report then has no losers. With none
// the error is network.ErrNoConn, for an exempt one [ErrExempt]. When ctx is done, Consolidate
// returns its error and what has been done by then; migrations under way are not interrupted.
// After Close the error is [ErrClosed], and before the manager has met a network
// [ErrNoNetwork].
func (m *Manager) Consolidate(ctx context.Context, p peer.ID) (Report, error) {
	report, err := m.rounds.consolidate(ctx, p)
	if err != nil {
		return report, fmt.Errorf("consolidate %s: %w", p, err)
	}
	return report, nil
}

func (r *rounds) consolidate(ctx context.Context, p peer.ID) (Report, error) {
	if !r.tasks.begin() {
		return Report{Peer: p}, ErrClosed
	}
	defer r.tasks.done()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(r.tasks.ctx, cancel)()

	n := r.look.network()
	if n == nil {
		return Report{Peer: p}, ErrNoNetwork
	}
	start := time.Now()
	report := Report{Peer: p}
	for {
		switch conns := openConns(n, p); len(conns) {
		case 0:
			return report, network.ErrNoConn
		case 1:
			report.Winner = newConnState(conns[0]).info()
			return report, nil
		}
		d, err := r.sched.take(ctx, p)
		if err != nil {
			return report, r.orClosed(err)
		}
		v, plan, b := r.run(d, true)
		came, stir := r.sched.endRoundStirred(d, plan.next)
		if b == nil && plan.asks && plan.err == nil && ctx.Err() == nil {
			if came { // what the round has started may have an outcome already
				continue
			}
			select {
			case <-stir:
				continue
			case <-ctx.Done():
			}
		}
		if b != nil {
			select {
			case <-b.done:
			case <-ctx.Done():
			}
		}
		if len(v.conns) < 2 {
			continue
		}
		report = reportOf(d, v, plan, b)
		report.Duration = time.Since(start)
		return report, r.orClosed(errOf(ctx, plan))
	}
}

// orClosed returns ErrClosed in place of err if the manager being closed is what is
// behind it.
func (r *rounds) orClosed(err error) error {
	if err != nil && r.tasks.ctx.Err() != nil {
		return ErrClosed
	}
	return err
}
