package connmgr

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/go-portage/portage/migrate"
	"github.com/go-portage/portage/policy"
)

// A round
//
//	look       which connections there are, and what is on them
//	elect      the winner, by the policy, among those that answer (probe.go); new
//	           streams go there from here on (steer.go)
//	decide     whether it is ours to go on (controller.go)
//	move       all labelled streams of all losers at once; those that something
//	           was in the way of, again after the others
//	prune      losers that both sides have done with (drain.go, prune.go)
//	next       when to look again
//
// What a round learns outlives it in the peer's entry (duplicates): the ranking in
// force, what is in motion, what cannot move or has to wait, since when a loser is
// quiet, what the peer has agreed to.

// connState is what is kept of one connection of a peer with duplicates.
type connState struct {
	conn   network.Conn     // immutable
	base   policy.Candidate // immutable: what does not change while the connection lives
	opened time.Time        // immutable

	// Guarded by Manager.mu.
	quiet   time.Time     // since when there has been no stream; zero: there is one
	moved   int           // streams moved from here
	took    time.Duration // by the rounds that moved them, without the time between
	closing bool          // it is being closed by us

	drain   *drain // ours; nil: none
	drains  int    // that did not succeed
	refused string // what the peer said to the last one
	plain   bool   // the peer does not speak the drain protocol after all

	alive   time.Time     // when the last ping was sent that was answered
	silent  time.Time     // when one was not
	rtt     time.Duration // smoothed, by pings; 0: not known
	rttAt   time.Time     // when measuring it began last
	pinging bool          // to measure
	probes  int           // pings under way, of any kind
}

// standing is what earlier rounds of a peer found. Guarded by Manager.mu.
type standing struct {
	conns      []*connState
	ranking    policy.Ranking // in force; of conns
	winner     *connState     // of ranking; nil before the first
	atOnce     bool           // the next ranking is in force at once
	challenger network.Conn   // ranked first in the last round, but is not in force yet; nil: none
	challenged time.Time      // since when
	moving     map[network.Stream]motion
	held       map[network.Stream]hold
}

// motion is a migration that has not returned.
type motion struct{ from, to *connState }

func (mo motion) touches(cs *connState) bool { return mo.from == cs || mo.to == cs }

// hold keeps a stream where it is: for good if the peer denied, else until the next
// attempt.
type hold struct {
	denied   bool
	until    time.Time
	failures int
}

// view is the connections of a peer at one moment, oldest first as the network has
// them.
type view struct {
	at       time.Time
	mover    mover // nil without Wrap
	supports bool  // the peer migrates streams
	conns    []connView
}

type connView struct {
	*connState
	candidate policy.Candidate
	labelled  []network.Stream
	exempt    string // why nothing is done about it; empty: something is
}

// candidates returns those that are not in out.
func (v *view) candidates(out map[*connState]string) []policy.Candidate {
	cs := make([]policy.Candidate, 0, len(v.conns))
	for _, c := range v.conns {
		if _, is := out[c.connState]; !is {
			cs = append(cs, c.candidate)
		}
	}
	return cs
}

// find returns the connection that a policy calls id, or nil.
func (v *view) find(id string) *connView {
	for i := range v.conns {
		if v.conns[i].base.ID == id {
			return &v.conns[i]
		}
	}
	return nil
}

func openConns(n network.Network, p peer.ID) []network.Conn {
	if n == nil {
		return nil
	}
	return slices.DeleteFunc(n.ConnsToPeer(p), network.Conn.IsClosed)
}

func newConnState(c network.Conn) *connState {
	stat := c.Stat()
	cs := &connState{conn: c, opened: stat.Opened}
	cs.base.ID = c.ID()
	cs.base.SetAddr(c.RemoteMultiaddr())
	if local := c.LocalMultiaddr(); local != nil {
		cs.base.SetLocalAddr(local)
	}
	cs.base.Limited = stat.Limited
	cs.base.Direction = stat.Direction
	return cs
}

// look looks at the open connections of p. d is nil if p has no entry.
func (m *Manager) look(p peer.ID, d *duplicates) view {
	conns := openConns(m.watch.network(), p)
	v := view{conns: make([]connView, len(conns))}
	m.mu.Lock()
	v.mover = m.mover
	if d != nil {
		for i, c := range conns {
			v.conns[i].connState = d.state(c)
		}
	}
	m.mu.Unlock()

	v.at = time.Now()
	v.supports = v.mover != nil && v.mover.Supports(p)
	use := m.policy().use
	rtts := make([]time.Duration, len(conns))
	exempt := m.exemptPeer(p)
	for i, c := range conns {
		cv := &v.conns[i]
		if cv.connState == nil {
			cv.connState = newConnState(c)
		}
		cv.candidate = cv.base
		if !cv.opened.IsZero() {
			cv.candidate.Age = max(v.at.Sub(cv.opened), 1)
		}
		if v.supports {
			cv.labelled = v.mover.Streams(c)
		}
		cv.candidate.Streams = c.Stat().NumStreams
		cv.candidate.Labelled = len(cv.labelled)
		if use.RTT {
			rtts[i] = transportRTT(c)
		}
		if use.Interface {
			cv.candidate.Interface = m.interfaces.of(c.LocalMultiaddr(), v.at)
		}
		if cv.exempt = exempt; exempt == "" {
			cv.exempt = m.exemptConn(c)
		}
	}

	m.mu.Lock()
	defer m.mu.Unlock()
	if use.RTT {
		v.measure(rtts)
	}
	for i := range v.conns {
		cv := &v.conns[i]
		cv.candidate.Streams = max(0, cv.candidate.Streams-m.oursOn(cv.conn))
		cv.candidate.Pinned = cv.candidate.Streams - cv.candidate.Labelled
		if d != nil {
			cv.candidate.Incumbent = d.winner == cv.connState
			for _, s := range cv.labelled {
				if d.held[s].denied {
					cv.candidate.Pinned++
				}
			}
			// A stream in motion has an underlying stream on both connections, whether
			// it is listed there or not.
			cv.candidate.Pinned -= d.touching(cv.connState)
			for _, s := range cv.labelled {
				if mo, ok := d.moving[s]; ok && mo.touches(cv.connState) {
					cv.candidate.Pinned++
				}
			}
		}
		cv.candidate.Pinned = max(cv.candidate.Pinned, 0)
	}
	return v
}

func (st *standing) state(c network.Conn) *connState {
	i := slices.IndexFunc(st.conns, func(cs *connState) bool { return cs.conn == c })
	if i < 0 {
		return nil
	}
	return st.conns[i]
}

// touching returns the number of migrations from or to cs that have not returned.
func (st *standing) touching(cs *connState) int {
	n := 0
	for _, mo := range st.moving {
		if mo.touches(cs) {
			n++
		}
	}
	return n
}

var (
	errNoWinner = errors.New("the policy names no connection of the peer")
	errSilent   = errors.New("no connection of the peer answers")
)

// round runs one round for d, whose turn the caller holds, and returns when the next
// one should be; zero if the peer has no duplicates any more. A forced round is
// Consolidate's: it moves whoever is the controller, tries again what has to wait, and
// waits for every stream until ctx is done. The error is ctx's, errNoWinner, errSilent
// or ErrExempt.
func (m *Manager) round(ctx context.Context, d *duplicates, forced bool) (Report, time.Time, error) {
	v := m.look(d.peer, d)
	report := Report{Peer: d.peer}
	if len(v.conns) < 2 {
		if len(v.conns) == 1 {
			report.Winner = v.conns[0].info()
		}
		return report, time.Time{}, nil
	}
	if v.mover == nil {
		m.warnBare()
	}

	changed := m.remember(d, v)
	if m.exemptPeer(d.peer) != "" {
		m.withdraw(d)
		m.steering.drop(d.peer)
		return report, v.at.Add(m.cfg.interval), ErrExempt
	}
	if m.ping(ctx, d, v) {
		v = m.look(d.peer, d) // with what is known now
		if m.remember(d, v); len(v.conns) < 2 {
			return report, v.at, nil // the next round sees to it
		}
	}
	ranking, winner, err := m.elect(ctx, d, v, changed || forced)
	if err != nil {
		m.withdraw(d)
		m.steering.drop(d.peer)
		return report, v.at.Add(m.cfg.interval), err
	}
	m.steering.set(d.peer, winner.connState)
	report.Winner = winner.info()

	role := m.roleFor(d, v, winner, forced)
	b := newBatch(d, v, winner)
	if role.moves {
		m.move(ctx, b, forced)
	}
	losers, firstErr := m.losersOf(b, ranking)
	report.Losers = losers
	if b.started > 0 {
		m.tookPart(d, role)
		m.logMoved(report, firstErr)
	}
	m.noteQuiet(d, v, winner)
	if !role.prunes {
		m.withdraw(d)
	}
	err = cmp.Or(ctx.Err(), m.ctx.Err())
	if err == nil && role.prunes {
		m.prune(ctx, d, v, winner, ranking, role, &report)
	}
	report.Duration = time.Since(v.at)
	return report, m.next(d, v, winner, role), err
}

// remember takes the connections of v into d, and says whether they are others than
// before. If so, what stood in the way of moving a stream may be gone.
func (m *Manager) remember(d *duplicates, v view) (changed bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d.unsettled = time.Time{}
	changed, grown := len(v.conns) != len(d.conns), false
	here := make(map[network.Stream]struct{})
	conns := make([]*connState, len(v.conns))
	for i, cv := range v.conns {
		conns[i] = cv.connState
		grown = grown || !slices.Contains(d.conns, cv.connState)
		for _, s := range cv.labelled {
			here[s] = struct{}{}
		}
	}
	changed = changed || grown
	for s, h := range d.held {
		if _, ok := here[s]; !ok || changed && !h.denied {
			delete(d.held, s)
		}
	}
	d.conns = conns
	if changed {
		d.takeover = takeover{progress: v.at, forced: d.forced && !grown}
	}
	return changed
}

// withdraw takes back all that was asked of the peer.
func (m *Manager) withdraw(d *duplicates) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, cs := range d.conns {
		cs.cancelDrain()
	}
}

// elect returns the ranking in force and its winner.
func (m *Manager) elect(ctx context.Context, d *duplicates, v view, atOnce bool) (policy.Ranking, *connView, error) {
	var newest time.Time
	for _, cv := range v.conns {
		newest = later(newest, cv.opened)
	}
	m.mu.Lock()
	atOnce = atOnce || d.atOnce
	d.atOnce = false
	m.mu.Unlock()
	for {
		m.mu.Lock()
		out := m.ruledOut(v)
		m.mu.Unlock()
		candidates := v.candidates(out)
		if len(candidates) == 0 {
			return policy.Ranking{}, nil, errSilent
		}
		ranked := m.policy().Rank(candidates)
		ranking, winner := m.choose(d, v, ranked, out, atOnce)
		if winner == nil {
			m.logWrong(d.peer, ranked)
			return policy.Ranking{}, nil, errNoWinner
		}
		if m.answers(ctx, winner.connState, newest) {
			m.mu.Lock()
			defer m.mu.Unlock()
			d.ranking, d.winner = ranking, winner.connState
			winner.cancelDrain()
			return ranking, winner, nil
		}
	}
}

// ruledOut returns the connections of v that cannot win now, and why. It must be called
// with mu held.
func (m *Manager) ruledOut(v view) map[*connState]string {
	out := make(map[*connState]string)
	for _, cv := range v.conns {
		switch {
		case m.pledged(cv.connState):
			out[cv.connState] = "the peer wants to close it"
		case !cv.silent.IsZero() && time.Since(cv.silent) < silentTime:
			out[cv.connState] = "it does not answer"
		}
	}
	return out
}

// choose decides which ranking is to be in force: the new one if its winner is the one
// there was, or if at once is set, or if it has been the same new winner for a while;
// else the one that has been. The winner is nil if the policy names none.
func (m *Manager) choose(d *duplicates, v view, ranked policy.Ranking, out map[*connState]string, atOnce bool) (policy.Ranking, *connView) {
	first, _ := ranked.Winner()
	best := v.find(first.ID)

	m.mu.Lock()
	defer m.mu.Unlock()
	if best == nil {
		return policy.Ranking{}, nil
	}
	var incumbent *connView
	if d.winner != nil && out[d.winner] == "" {
		incumbent = v.find(d.winner.base.ID)
	}
	if !atOnce && incumbent != nil && best != incumbent {
		if d.challenger != best.conn {
			d.challenger, d.challenged = best.conn, v.at
		}
		if v.at.Sub(d.challenged) < patienceIntervals*m.cfg.interval {
			return d.ranking, incumbent
		}
	}
	d.challenger, d.challenged = nil, time.Time{}
	return ranked, best
}

// batch is the migrations of one round. Guarded by Manager.mu, but for the first three.
type batch struct {
	d      *duplicates
	v      view
	winner *connView

	losers   map[*connState]*loserCount
	started  int // migrations, those that are tried again not counted twice
	pending  int // migrations that have not returned
	again    []retry
	finished bool          // of those started last, one has returned without anything in its way
	done     chan struct{} // closed when none is pending
	left     bool          // the round has gone on without the pending ones
	err      error         // of the first migration that failed
}

// loserCount is what became of the streams of one loser.
type loserCount struct {
	moved, failed, denied int
	moving                int // have not returned
	took                  time.Duration
}

type retry struct {
	s    network.Stream
	from *connState
}

func newBatch(d *duplicates, v view, winner *connView) *batch {
	b := &batch{d: d, v: v, winner: winner, losers: make(map[*connState]*loserCount)}
	for _, cv := range v.conns {
		if cv.connState != winner.connState {
			b.losers[cv.connState] = &loserCount{}
		}
	}
	return b
}

// mayFollow says whether what is on a loser may go to the winner, and the loser be
// closed: never from an unlimited connection to a limited one.
func mayFollow(winner, loser *connState) bool { return loser.base.Limited || !winner.base.Limited }

// movable returns the streams of v that are to move to the winner now.
func (m *Manager) movable(d *duplicates, v view, winner *connState, forced bool) []retry {
	var list []retry
	for _, cv := range v.conns {
		if cv.connState == winner || !mayFollow(winner, cv.connState) || cv.exempt != "" {
			continue
		}
		for _, s := range cv.labelled {
			list = append(list, retry{s, cv.connState})
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.DeleteFunc(list, func(r retry) bool {
		h, held := d.held[r.s]
		_, moves := d.moving[r.s]
		return moves || h.denied || held && !forced && v.at.Before(h.until)
	})
}

// move migrates the streams of all losers and waits for them: until ctx is done if
// forced, else no longer than moveWait. Those that are left go on.
func (m *Manager) move(ctx context.Context, b *batch, forced bool) {
	streams := m.movable(b.d, b.v, b.winner.connState, forced)
	b.started = len(streams)
	var timeout <-chan time.Time
	if !forced {
		timer := time.NewTimer(moveWait)
		defer timer.Stop()
		timeout = timer.C
	}
	for len(streams) > 0 {
		m.start(b, streams)
		select {
		case <-b.done:
		case <-ctx.Done():
		case <-timeout:
		}
		m.mu.Lock()
		streams, b.again = b.again, nil
		if b.pending > 0 || !b.finished {
			for _, r := range streams {
				m.failed(b, r)
			}
			streams = nil
		}
		b.left = b.pending > 0
		m.mu.Unlock()
	}
}

// start starts the migration of streams, each in a goroutine of its own.
func (m *Manager) start(b *batch, streams []retry) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b.done = make(chan struct{})
	if m.closed {
		close(b.done)
		return
	}
	b.pending, b.finished = len(streams), false
	if b.d.moving == nil {
		b.d.moving = make(map[network.Stream]motion)
	}
	for _, r := range streams {
		b.d.moving[r.s] = motion{r.from, b.winner.connState}
		b.losers[r.from].moving++
		m.wg.Add(1)
		go m.migrate(b, r)
	}
}

// migrate moves one stream and notes what came of it. A cancelled context would only
// end the waiting, not the migration; so only the manager's own is used, and what is in
// motion is known for as long as it is.
func (m *Manager) migrate(b *batch, r retry) {
	defer m.wg.Done()
	ctx := m.ctx
	if r.from.base.Limited && b.winner.base.Limited {
		ctx = network.WithAllowLimitedConn(ctx, "stream migration")
	}
	err := b.v.mover.Migrate(ctx, r.s, b.winner.conn)
	elsewhere := err != nil && r.s.Conn() != r.from.conn // the peer moved it, or it is closed
	now := time.Now()

	m.mu.Lock()
	delete(b.d.moving, r.s)
	count := b.losers[r.from]
	count.moving--
	switch {
	case err == nil:
		b.finished = true
		delete(b.d.held, r.s)
		count.moved++
		r.from.moved++
		if took := now.Sub(b.v.at); took > count.took {
			r.from.took += took - count.took
			count.took = took
		}
	case errors.Is(err, migrate.ErrDenied):
		b.finished = true
		count.denied++
		b.d.hold(r.s, hold{denied: true})
	case m.ctx.Err() != nil:
	case elsewhere, errors.Is(err, migrate.ErrClosed), errors.Is(err, migrate.ErrNotLabelled):
		b.finished = true
		delete(b.d.held, r.s)
	default:
		if b.err == nil {
			b.err = err
		}
		if passes(err) && !b.left {
			b.again = append(b.again, r)
		} else {
			b.finished = true
			m.failed(b, r)
		}
	}
	b.pending--
	if b.pending == 0 {
		close(b.done)
	}
	late := b.left
	if late {
		m.schedule(b.d, now)
	}
	m.mu.Unlock()
	if late {
		m.wakeUp()
	}
}

// passes says whether what stood in the way of a migration may be gone once others have
// finished.
func passes(err error) bool {
	var reset *network.StreamError
	return errors.Is(err, migrate.ErrTryLater) ||
		errors.Is(err, network.ErrResourceLimitExceeded) ||
		errors.As(err, &reset) && reset.ErrorCode == network.StreamResourceLimitExceeded
}

// failed has a stream wait for its next attempt. It must be called with mu held.
func (m *Manager) failed(b *batch, r retry) {
	b.losers[r.from].failed++
	h := b.d.held[r.s]
	wait := m.cfg.maxRetry
	if shift := h.failures; shift < 32 {
		wait = min(wait, m.cfg.firstRetry<<shift)
	}
	h.failures++
	h.until = time.Now().Add(wait)
	b.d.hold(r.s, h)
}

func (st *standing) hold(s network.Stream, h hold) {
	if st.held == nil {
		st.held = make(map[network.Stream]hold)
	}
	st.held[s] = h
}

// losersOf reports what became of the losers, the best first, and the first error.
func (m *Manager) losersOf(b *batch, ranking policy.Ranking) ([]Loser, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	losers := make([]Loser, 0, len(b.losers))
	out := m.ruledOut(b.v)
	for i := range b.v.conns {
		cv := &b.v.conns[i]
		count, ok := b.losers[cv.connState]
		if !ok {
			continue
		}
		l := Loser{
			Conn:     cv.info(),
			Decision: decisionOn(ranking, cv.base.ID),
			Moved:    count.moved,
			Failed:   count.failed,
			Moving:   count.moving,
			Pinned:   cv.candidate.Pinned + count.denied,
			took:     count.took,
		}
		l.Kept = m.keptFor(cv, b.winner.connState)
		if l.Decision.Rule == "" {
			l.RuledOut = out[cv.connState]
		}
		losers = append(losers, l)
	}
	rank := func(l Loser) int {
		return slices.IndexFunc(ranking.Order, func(c policy.Candidate) bool { return c.ID == l.Conn.ID })
	}
	slices.SortStableFunc(losers, func(a, b Loser) int { return rank(a) - rank(b) })
	return losers, b.err
}

const keptUnlimited = "it is unlimited, and the winner is not"

// keptFor says what forbids to close a loser; empty if nothing does. It must be called
// with mu held.
func (m *Manager) keptFor(loser *connView, winner *connState) string {
	switch {
	case !mayFollow(winner, loser.connState):
		return keptUnlimited
	case loser.exempt != "":
		return loser.exempt
	case loser.refused != "" && !m.pledged(loser.connState):
		return "the peer refused: " + loser.refused
	}
	return ""
}

func decisionOn(ranking policy.Ranking, loser string) policy.Decision {
	for _, d := range ranking.Decisions {
		if d.Loser.ID == loser {
			return d
		}
	}
	return policy.Decision{}
}

// next returns when to look at the peer again if nothing is heard of it.
func (m *Manager) next(d *duplicates, v view, winner *connView, role role) time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	at := now.Add(m.cfg.interval)
	for _, cs := range d.conns {
		if cs == winner.connState || cs.quiet.IsZero() || !role.prunes || !mayFollow(winner.connState, cs) || cs.refused != "" {
			continue
		}
		quiet := role.quietFor(cs)
		gap := min(maxQuietGap, quiet/quietLooks)
		if left := cs.quiet.Add(quiet).Sub(now); left > 0 {
			gap = min(gap, left)
		}
		at = earlier(at, now.Add(gap))
	}
	if role.moves {
		for _, h := range d.held {
			if !h.denied {
				at = earlier(at, h.until)
			}
		}
	}
	if !role.moves {
		at = earlier(at, d.takesOverAt(&m.cfg))
	}
	return later(at, now.Add(time.Millisecond))
}
