package connmgr

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
)

// A round
//
//	look      what is known of the peer                          (look.go)
//	remember  which connections have come and gone
//	decide    what becomes of each                               (plan.go)
//	act       ask paths (path.go), steer (steer.go), tell and ask the peer
//	          (drain_ask.go), move (move.go), close
//
// A round waits for nothing. What it starts asks for another round when it has an outcome,
// and what is learnt is kept with the peer (peerState).

// rounds runs rounds. Whoever acts for a round knows of nothing but what it acts on.
type rounds struct {
	cfg      *config
	tasks    *tasks
	sched    *scheduler
	look     *looker
	policies *policies
	tells    *teller

	// What is kept of a peer elsewhere, too.
	usage *usage
	young *young

	// Who acts.
	paths *pathAsker
	steer *steering
	asks  *asker
	moves *migrations
	close *closer

	detours *detourer
}

// run runs one round for d, whose right to it the caller holds.
func (r *rounds) run(d *peerState, forced bool) (*view, *plan, *batch) {
	v := r.look.look(d.peer, d)
	v.facts.forced = forced
	if v.mover == nil && len(v.conns) > 1 {
		r.tells.bare()
	}
	gone, ended := r.remember(d, v)
	if ended != nil && !closedOnPurpose(ended.conn) {
		r.young.died(d.peer, ended, v.facts.now)
	}
	v.facts.deaths = r.young.of(d.peer, v.facts.now)
	lines, untold := d.movedByPeer(v.facts.now)
	r.tells.byPeer(d.peer, append(gone, lines...))
	p := decide(r.cfg, r.policies.of(d), &v.facts)
	if errors.Is(p.err, errNoWinner) {
		r.tells.policyFailed(d, r.policies.policy(), p.err)
	}
	if !untold.IsZero() && !p.next.IsZero() {
		p.next = earlier(p.next, untold)
	}
	d.apply(v, &p)
	b := r.act(d, v, &p)
	r.tells.measure(d, v, &p, r.tasks.over())
	r.tells.path(d, v, &p)
	r.tells.stay(d, v, &p)
	r.tells.hearing(d, v)
	return v, &p, b
}

// runInPlace runs a round in a place.
func (r *rounds) runInPlace(d *peerState) {
	_, p, b := r.run(d, false)
	r.sched.endRound(d, p.next)
	inTime := true
	if b != nil {
		timer := time.NewTimer(placeTime)
		select {
		case <-b.done:
		case <-r.tasks.ctx.Done():
		case <-timer.C:
			inTime = false
		}
		timer.Stop()
	}
	d.mu.Lock()
	still := len(d.moving) > 0
	d.mu.Unlock()
	r.sched.leave(d, inTime, still)
}

// forget drops what is kept of a peer elsewhere: it has no entry any more. It must be called
// with d's lock held.
func (r *rounds) forget(d *peerState) {
	for _, cs := range d.conns {
		r.usage.drop(cs)
	}
	if len(d.conns) == 1 && d.winner == d.conns[0] && !d.winner.died {
		r.young.watch(d.winner, time.Now())
	}
	r.steer.drop(d.peer)
}

// remember takes the connections of v into d. Where they are others than before, what stood
// in the way of moving a stream may be gone. It returns those that the peer has closed, and
// the winner if it has ended, which may be a death.
func (r *rounds) remember(d *peerState, v *view) (gone []byPeerLine, ended *connState) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := v.facts.now
	changed, grown := false, false
	here := make(map[network.Stream]struct{})
	conns, kept := make([]*connState, len(v.conns)), make(map[*connState]struct{}, len(v.conns))
	state := d.states()
	for i := range v.conns {
		cv := &v.conns[i]
		if cs := state(cv.conn); cs != nil && cs != cv.connState {
			// The peer has asked about it since the look: what was said to it holds.
			cv.connState, cv.facts.pledged = cs, now.Before(cs.pledged)
		}
		conns[i], kept[cv.connState] = cv.connState, struct{}{}
		if !cv.met {
			cv.met, grown = true, true
			r.usage.add(cv.connState)
		}
		for _, s := range cv.labelled {
			here[s.Stream] = struct{}{}
		}
	}
	for _, cs := range d.conns {
		if _, ok := kept[cs]; !ok {
			changed = true
			r.usage.drop(cs)
			lines, died := d.lost(cs, now)
			if gone = append(gone, lines...); died {
				ended = cs
			}
		}
	}
	changed = changed || grown
	for s, b := range d.backoff {
		if _, ok := here[s]; !ok || changed && !b.denied {
			delete(d.backoff, s)
		}
	}
	if w := d.winner; w != nil && w.path.health == pathSilent && !w.died {
		w.died = true
		r.young.died(d.peer, w, now)
	}
	d.conns = conns
	if d.named != nil && !slices.Contains(conns, d.named) {
		d.named = nil
	}
	if changed {
		d.fresh = true
		d.seen = false
		d.takeover = takeover{progress: now, forced: d.takeover.forced && !grown}
	}
	movable := 0
	for i := range v.facts.conns {
		c := &v.facts.conns[i]
		if v.conns[i].connState != d.winner {
			movable += c.own + c.theirs + c.retries
		}
	}
	if !d.seen || movable < d.left {
		if d.seen {
			d.progress = now // somebody moved some, or they have ended
		}
		d.seen, d.left = true, movable
	}
	if slices.ContainsFunc(d.conns, func(cs *connState) bool { return now.Before(cs.pledged) }) {
		d.progress = now // the controller is at work: it renews what it has asked for
	}
	d.takeover.forced = d.takeover.forced || v.facts.forced
	d.manages = d.manages || v.facts.manages == yes
	v.facts.takeover, v.facts.fresh = d.takeover, d.fresh
	return gone, ended
}

// lost returns what there is to tell of a connection that is gone, and whether it was the
// winner and did not end as agreed. It must be called with d's lock held.
func (d *peerState) lost(cs *connState, now time.Time) (lines []byPeerLine, ended bool) {
	agreed := now.Before(cs.pledged) && !cs.closing && cs.drained.After(cs.lastUse())
	ended = cs == d.winner && !cs.closing && !cs.died && !agreed
	b := cs.byPeer
	if cs.closing || !agreed && b.streams == b.told {
		return nil, ended
	}
	to := cmp.Or(b.to, d.named, d.winner)
	streams, took := b.streams, b.last.Sub(b.first)
	if agreed { // the line sums up what was done about it
		streams, took = cs.left()
	}
	return []byPeerLine{{cs, to, streams, took, agreed}}, ended
}

// byPeerLine is what the peer has done to a connection, to be told in the log.
type byPeerLine struct {
	cs, to  *connState
	streams int // that it moved; where it is closed, that have moved
	took    time.Duration
	closed  bool
}

// movedByPeer returns what is to be told of the streams that the peer has moved, and when
// there is more to tell if nothing happens until then; zero: there is none.
func (d *peerState) movedByPeer(now time.Time) (lines []byPeerLine, next time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, cs := range d.conns {
		b := &cs.byPeer
		switch at := b.last.Add(byPeerPause); {
		case b.streams == b.told:
		case now.Before(at):
			if next.IsZero() || at.Before(next) {
				next = at
			}
		default:
			lines = append(lines, byPeerLine{cs, b.to, b.streams - b.told, b.last.Sub(b.first), false})
			b.told = b.streams
		}
	}
	return lines, next
}

// apply takes what a plan says into d, so that the next one builds on it.
func (d *peerState) apply(v *view, p *plan) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := v.facts.now
	d.better, d.since = p.better, p.since
	if !p.settled.After(now) && !p.asks {
		d.firstOf, d.atOnce = time.Time{}, false
	}
	if p.decided {
		w := v.conns[p.winner].connState
		if w != d.winner {
			for _, cs := range d.conns { // what was said of them was said for another winner
				cs.same = sameUnknown
				if cs != w {
					cs.told = telling{}
				}
			}
			d.seen = false // what can move is counted without the winner's
		}
		d.ranking, d.winner, d.fresh = p.ranking, w, false
		w.drain.off()
	}
	for i := range v.conns {
		cs := v.conns[i].connState
		if p.decided && i != p.winner && (p.verdicts[i].kept != "" && cs.drain.phase != drainRefused || !p.role.prunes) {
			cs.drain.off()
		}
	}
}

// act does what a plan says.
func (r *rounds) act(d *peerState, v *view, p *plan) *batch {
	for _, q := range p.probe {
		r.paths.ask(d, v.conns[q.conn].connState, v.mover, q.large)
	}
	if len(v.conns) == 1 {
		r.detours.act(d, v.conns[0].conn, p)
	}
	if p.steer {
		r.steer.set(d.peer, v.steered(p))
	} else {
		r.steer.drop(d.peer)
	}
	if !p.decided {
		return nil
	}
	winner := v.conns[p.winner].connState
	if p.tell {
		r.asks.keep(d, winner)
	}
	b := r.moves.move(d, v, p)
	if b != nil {
		r.tookPart(d, p.role)
	}
	for i, verdict := range p.verdicts {
		switch loser := v.conns[i].connState; verdict.fate {
		case fateAsk, fateConfirm:
			r.asks.drain(d, loser, verdict.fate == fateConfirm)
		case fateCompare:
			r.asks.compare(d, loser, winner)
		case fateClose:
			r.close.close(d, v, p, i)
		}
	}
	return b
}

// steered is where a plan sends new streams.
func (v *view) steered(p *plan) steered {
	to := steered{winner: v.conns[p.winner].connState}
	for _, cv := range v.conns {
		if cv.facts.path.health == pathSilent {
			to.silent = append(to.silent, cv.conn)
		}
	}
	return to
}

// tookPart notes that this side has moved streams. After a takeover, the controller gets
// time again to show that it is there, and twice as much.
func (r *rounds) tookPart(d *peerState, by role) {
	d.mu.Lock()
	now := time.Now()
	waited := now.Sub(d.progress)
	if by.moves {
		d.progress = now
	}
	if by.over {
		d.times++
	}
	d.mu.Unlock()
	if by.over {
		r.tells.tookOver(d.peer, waited)
	}
}

// reportOf is what a round did, for people. b may be nil.
func reportOf(d *peerState, v *view, p *plan, b *batch) Report {
	r := Report{Peer: d.peer}
	if p.winner >= 0 {
		r.Winner = v.conns[p.winner].info()
	}
	if !p.decided && !p.left {
		return r
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range v.conns {
		if i == p.winner {
			continue
		}
		cv, verdict := &v.conns[i], p.verdicts[i]
		l := Loser{
			Conn: cv.info(), Decision: verdict.decision, RuledOut: verdict.out, Kept: verdict.kept,
			Pinned: cv.facts.candidate.Pinned, Pruned: slices.Contains(p.closed, i),
		}
		if b != nil {
			if c := b.losers[cv.connState]; c != nil {
				l.Moved, l.Failed, l.Moving, l.took = c.moved, c.failed, c.moving, c.took
				l.Pinned += c.denied
			}
		}
		r.Losers = append(r.Losers, l)
	}
	place := p.places()
	slices.SortStableFunc(r.Losers, func(a, b Loser) int { return cmp.Compare(place(a.Conn.ID), place(b.Conn.ID)) })
	return r
}

// places says where a connection stands in the ranking; those that were not ranked come last.
func (p *plan) places() func(id string) int {
	at := make(map[string]int, len(p.ranking.Order))
	for i, c := range slices.Backward(p.ranking.Order) {
		at[c.ID] = i
	}
	return func(id string) int {
		if i, ok := at[id]; ok {
			return i
		}
		return len(p.ranking.Order)
	}
}

var errUnknown = errors.New("it is not known which connections of the peer work")

// errOf is why a plan decides nothing.
func errOf(ctx context.Context, p *plan) error {
	switch {
	case p.err != nil:
		return p.err
	case ctx.Err() != nil:
		return ctx.Err()
	case !p.decided && !p.left && len(p.verdicts) > 1:
		return errUnknown
	}
	return nil
}
