package connmgr

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/network"

	"github.com/go-portage/portage/policy"
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

// round runs one round for d, whose right to it the caller holds.
func (m *Manager) runRound(d *peerState, forced bool) (*view, *plan, *batch) {
	v := m.look(d.peer, d)
	v.facts.forced = forced
	if v.mover == nil && len(v.conns) > 1 {
		m.warnBare()
	}
	gone := m.remember(d, v)
	untold := m.tellByPeer(d, gone, v.facts.now)
	p := decide(&m.cfg, m.ranked(d), &v.facts)
	if errors.Is(p.err, errNoWinner) {
		m.logPolicy(d, m.policy(), p.err)
	}
	if !untold.IsZero() && !p.next.IsZero() {
		p.next = earlier(p.next, untold)
	}
	m.apply(d, v, &p)
	b := m.act(d, v, &p)
	m.measure(d, v, &p)
	m.tellPath(d, v, &p)
	return v, &p, b
}

// remember takes the connections of v into d. Where they are others than before, what stood
// in the way of moving a stream may be gone. It returns those that the peer has closed.
func (m *Manager) remember(d *peerState, v *view) (gone []byPeerLine) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := v.facts.now
	changed, grown := len(v.conns) != len(d.conns), false
	here := make(map[network.Stream]struct{})
	conns := make([]*connState, len(v.conns))
	for i, cv := range v.conns {
		conns[i] = cv.connState
		if !slices.Contains(d.conns, cv.connState) {
			grown = true
			m.usage.add(cv.connState)
		}
		for _, s := range cv.labelled {
			here[s] = struct{}{}
		}
	}
	for _, cs := range d.conns {
		if !slices.Contains(conns, cs) {
			changed = true
			m.usage.drop(cs)
			gone = append(gone, m.lost(d, cs, now)...)
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
		m.young.died(d.peer, w, now)
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
	v.facts.deaths = m.young.of(d.peer, now)
	return gone
}

// lost notes that a connection is gone, and returns what there is to tell of it. It must be
// called with mu held.
func (m *Manager) lost(d *peerState, cs *connState, now time.Time) []byPeerLine {
	agreed := now.Before(cs.pledged) && !cs.closing && cs.drained.After(cs.lastUse())
	if cs == d.winner && !cs.closing && !cs.died && !agreed {
		m.young.died(d.peer, cs, now)
	}
	b := cs.byPeer
	if cs.closing || !agreed && b.streams == b.told {
		return nil
	}
	to := cmp.Or(b.to, d.named, d.winner)
	return []byPeerLine{{cs, to, b.streams, b.last.Sub(b.first), agreed}}
}

// byPeerLine is what the peer has done to a connection, to be told in the log.
type byPeerLine struct {
	cs, to  *connState
	streams int // that it moved
	took    time.Duration
	closed  bool
}

// tellByPeer tells in the log what the peer has done. It returns when there is more to tell,
// if nothing happens until then; zero: there is none.
func (m *Manager) tellByPeer(d *peerState, lines []byPeerLine, now time.Time) (next time.Time) {
	m.mu.Lock()
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
	m.mu.Unlock()
	for _, l := range lines {
		if mt := m.cfg.metrics; mt != nil && l.closed {
			mt.ConnectionPruned(ByPeer, "", 0)
		}
		if l.closed {
			e := EvtConnectionPruned{Peer: d.peer, Conn: l.cs.info(), ByPeer: true}
			if l.to != nil {
				e.Kept = l.to.info()
			}
			m.totals.byPeer.Add(1)
			m.events.emit(e)
		}
		m.logByPeer(d.peer, l)
	}
	return next
}

// apply takes what a plan says into d, so that the next one builds on it.
func (m *Manager) apply(d *peerState, v *view, p *plan) {
	m.mu.Lock()
	defer m.mu.Unlock()
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
func (m *Manager) act(d *peerState, v *view, p *plan) *batch {
	for _, i := range p.probe {
		m.startProbe(d, v, i)
	}
	if p.steer {
		m.steering.set(d.peer, v.conns[p.winner].connState)
	} else {
		m.steering.drop(d.peer)
	}
	if !p.decided {
		return nil
	}
	winner := v.conns[p.winner].connState
	if p.tell && m.begin() {
		m.mu.Lock()
		winner.told.phase = tellAsked
		winner.requests++
		m.mu.Unlock()
		go m.tellKeep(d, winner)
	}
	b := m.move(d, v, p)
	if b != nil {
		m.tookPart(d, p.role)
	}
	for i, verdict := range p.verdicts {
		loser := v.conns[i].connState
		switch verdict.fate {
		case fateAsk, fateConfirm:
			if !m.begin() {
				continue
			}
			m.mu.Lock()
			loser.drain.ask(time.Now(), verdict.fate == fateConfirm)
			loser.requests++
			lease := loser.drain.lease
			m.mu.Unlock()
			go m.askDrain(d, loser, lease)
		case fateCompare:
			if !m.begin() {
				continue
			}
			m.mu.Lock()
			loser.same = sameAsked
			loser.requests++
			winner.requests++
			m.mu.Unlock()
			go m.compare(d, loser, winner)
		case fateClose:
			m.close(d, v, p, i)
		}
	}
	return b
}

// startProbe asks a connection whether its path works: once it has answered, with more than
// a packet until that has been answered, too, where it costs no relay's budget.
func (m *Manager) startProbe(d *peerState, v *view, i int) {
	if !m.begin() {
		return
	}
	cs := v.conns[i].connState
	m.mu.Lock()
	full := cs.path.alive() && !cs.path.wide && !cs.base.Limited
	cs.path.ask(time.Now())
	cs.requests++
	m.mu.Unlock()
	go m.probePath(d, cs, v.mover, full)
}

// close closes a loser if it still may be: this is looked at once more, with the claim.
func (m *Manager) close(d *peerState, v *view, p *plan, i int) {
	loser, winner := v.conns[i].connState, v.conns[p.winner].connState
	if !m.claim(d, v, p, i) || !m.begin() {
		return
	}
	p.verdicts[i].why, p.verdicts[i].kept = "closed", ""
	p.closed = append(p.closed, i)
	go func() { // a transport may block in closing
		defer m.wg.Done()
		err := loser.conn.CloseWithError(network.ConnSupplanted)
		m.mu.Lock()
		moved, took := loser.moved+loser.byPeer.streams, loser.took
		asked := loser.drain.since
		m.mu.Unlock()
		m.totals.closed.Add(1)
		m.measurePruned(p.verdicts[i], asked)
		m.events.emit(EvtConnectionPruned{Peer: d.peer, Conn: loser.info(), Kept: winner.info(), Decision: p.verdicts[i].decision})
		m.logPruned(d.peer, winner.info(), loser.info(), p.verdicts[i].decision, moved, took, err)
	}()
}

// claim says whether a loser can be closed at this moment: nothing is on it and nothing has
// been since the plan, and the winner is there and not about to be closed by the peer. If
// so, from here on the loser counts for nothing any more (D4).
func (m *Manager) claim(d *peerState, v *view, p *plan, i int) bool {
	loser, winner := v.conns[i].connState, v.conns[p.winner].connState
	if !slices.Contains(openConns(m.watch.network(), d.peer), winner.conn) || loser.conn.IsClosed() {
		return false
	}
	open := streamsOn(loser.conn, v.facts.manages == yes)
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	switch {
	case m.closed, winner.closing, now.Before(winner.pledged) && d.named != winner:
		return false
	case winner.path.health != pathAlive:
		return false
	case open.others > 0, loser.requests > 0, d.touching(loser) > 0, winner == loser:
		return false
	case loser.lastUse().After(v.facts.now), loser.drain.phase != v.facts.conns[i].drain.phase:
		return false
	}
	loser.closing = true
	return true
}

// tookPart notes that this side has moved streams. After a takeover, the controller gets
// time again to show that it is there, and twice as much.
func (m *Manager) tookPart(d *peerState, r role) {
	m.mu.Lock()
	now := time.Now()
	waited := now.Sub(d.progress)
	if r.moves {
		d.progress = now
	}
	if r.over {
		d.times++
	}
	m.mu.Unlock()
	if r.over {
		if mt := m.cfg.metrics; mt != nil {
			mt.TookOver()
		}
		m.logTookOver(d.peer, waited)
	}
}

// ranked is the policy for decide. It is a program's own code: where it panics, or does not
// return for a second, that is this peer's ranking and nobody else's trouble.
func (m *Manager) ranked(d *peerState) rank {
	return func(candidates []policy.Candidate) (policy.Ranking, error) {
		by := m.policy()
		m.mu.Lock()
		stuck := d != nil && d.stuck
		m.mu.Unlock()
		if stuck {
			return policy.Ranking{}, errStuck
		}
		type outcome struct {
			ranking policy.Ranking
			err     error
		}
		came := make(chan outcome, 1)
		go func() {
			var out outcome
			defer func() {
				if r := recover(); r != nil {
					out = outcome{err: fmt.Errorf("%w: %v", errPanic, r)}
				}
				came <- out
			}()
			out.ranking = by.Rank(slices.Clone(candidates))
		}()
		timer := time.NewTimer(policyWait)
		defer timer.Stop()
		select {
		case out := <-came:
			if out.err != nil {
				m.logPolicy(d, by, out.err)
			}
			return out.ranking, out.err
		case <-timer.C:
		}
		m.logPolicy(d, by, errStuck)
		if d != nil && m.begin() {
			m.mu.Lock()
			d.stuck = true
			m.mu.Unlock()
			go func() {
				defer m.wg.Done()
				select {
				case <-came:
				case <-m.ctx.Done():
				}
				m.mu.Lock()
				d.stuck = false
				m.schedule(d, time.Now())
				m.mu.Unlock()
				m.wakeUp()
			}()
		}
		return policy.Ranking{}, errStuck
	}
}

// report is what a round did, for people. b may be nil.
func (m *Manager) report(d *peerState, v *view, p *plan, b *batch) Report {
	r := Report{Peer: d.peer}
	if p.winner >= 0 {
		r.Winner = v.conns[p.winner].info()
	}
	if !p.decided && !p.left {
		return r
	}
	m.mu.Lock()
	defer m.mu.Unlock()
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
	slices.SortStableFunc(r.Losers, func(a, b Loser) int { return cmp.Compare(p.place(a.Conn.ID), p.place(b.Conn.ID)) })
	return r
}

// place is where a connection stands in the ranking; those that were not ranked come last.
func (p *plan) place(id string) int {
	i := slices.IndexFunc(p.ranking.Order, func(c policy.Candidate) bool { return c.ID == id })
	if i < 0 {
		return len(p.ranking.Order)
	}
	return i
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
