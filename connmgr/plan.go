package connmgr

import (
	"fmt"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/network"

	"github.com/go-portage/portage/policy"
)

// The plan
//
// Why does a connection live or die? This file answers that, and no other has a rule of
// its own. decide takes what is known of one peer at one moment (facts) and says what
// becomes of each of its connections (verdict):
//
//	look (look.go) --facts--> decide --plan--> act (round.go): probe, steer, move, ask, close
//	                                  |
//	                                  +------> Explain, Report and the log print it
//
// decide is pure: no clock, no network, no lock; the same facts give the same plan. What
// an invariant forbids is forbidden here (fuzzed in plan_fuzz_test.go):
//
//   - The last usable connection is never closed.
//   - Nothing moves from an unlimited connection to a limited one, and nothing from one
//     limited connection to another, unless the first is about to end.
//   - Nothing is closed, and nothing moves, because of what is not known. A connection that
//     could not be asked whether its path works (pathUnknown) loses to no older one, and no
//     direct one to a relayed one.
//   - No unlimited direct connection is closed for a relayed one.

// knowledge is what is known of a question.
type knowledge uint8

const (
	unknown knowledge = iota
	yes
	no
)

// facts is what is known of a peer at one moment.
type facts struct {
	now      time.Time
	lower    bool      // this side has the lower peer ID of the two
	wrapped  bool      // false: a bare manager, which can move nothing and ask nobody
	manages  knowledge // whether the peer runs a manager
	migrates bool      // whether streams with the peer can move
	forced   bool      // Consolidate wants it done now
	exempt   string    // why the peer is left alone; empty: it is not

	conns []connFacts // as the network lists them

	came      time.Time // when a connection came last
	firstOf   time.Time // when the first came of those that have come since the last decision
	winner    string    // the winner so far; "": none
	ranking   policy.Ranking
	atOnce    bool      // the decision does not wait for anything that may still come
	fresh     bool      // connections have come or gone since the last decision: a better one wins at once
	measuring bool      // the first round-trip times that the policy asks for are on their way
	better    string    // ranked first last time, but has yet to stay there; "": none
	since     time.Time // when better was ranked first
	takeover  takeover
	// deaths is how many winners of a kind have died young of late.
	deaths  map[pathKind]int
	upgrade upgradeFacts
}

// connFacts is what is known of one connection.
type connFacts struct {
	candidate policy.Candidate
	opened    time.Time
	exempt    string    // why it is left alone; empty: it is not
	ends      time.Time // when its relay cuts it; zero: not known, or it has no limit
	spent     bool      // most of the data that its relay allows has been carried
	path      path
	closing   bool      // this side is closing it
	pledged   bool      // this side has agreed to lose it
	named     bool      // the peer has said that it keeps it (K1)
	quiet     time.Time // since when there has been no stream; zero: there is one
	used      time.Time // when a stream began last, as far as is known; zero: never
	own       int       // labelled streams that this side opened and that may move now
	theirs    int       // and that the peer opened
	retries   int       // streams whose migration failed
	retryAt   time.Time // when the first of them may be tried again
	moving    int       // migrations from or to it that have not returned
	room      int       // streams that this side may still open on it; negative: no limit is known
	drain     drain     // what the peer was asked about it
	told      telling   // whether the peer knows that it is kept
	instance  uint64    // the process that its other end is; 0: not known
	serves    bool      // its other end has answered a manager's request
	lacks     bool      // its other end serves none, whatever the peer advertises
	same      sameness  // whether a plain peer's process is the winner's
	pinned    string    // what the streams on it speak that cannot move, in words; empty: not known
	waits     time.Time // since when streams wait and nothing comes; zero: it is not to be asked
	detour    detourFacts
}

func (c *connFacts) id() string      { return c.candidate.ID }
func (c *connFacts) limited() bool   { return c.candidate.Limited }
func (c *connFacts) unlimited() bool { return !c.candidate.Limited }

// ending says whether its relay, which limits it, is about to cut it.
func (c *connFacts) ending(now time.Time) bool {
	return c.spent || !c.ends.IsZero() && c.ends.Sub(now) < endingSoon
}

// livesSince is from when on c has answered whenever it was asked.
func (c *connFacts) livesSince() time.Time { return later(c.opened, c.path.since) }

// fate is what becomes of a connection.
type fate uint8

const (
	fateKeep    fate = iota // it stays
	fateWait                // it goes once something has passed
	fateAsk                 // it goes: the peer is asked whether it has done with it
	fateConfirm             // both have done with it: the peer is asked once more
	fateCompare             // it is idle: a plain peer is asked whether it is the same process
	fateClose               // nothing keeps it
)

// moves says which labelled streams leave a connection.
type moves uint8

const (
	moveNone moves = iota
	moveOwn        // those that this side opened
	moveAll
)

// verdict is what becomes of one connection, and why.
type verdict struct {
	fate     fate
	reason   Reason          // why, for programs
	why      string          // and in words, for people
	until    time.Time       // when what is waited for is over by itself; zero: nobody knows
	decision policy.Decision // the rule by which it lost; the zero value where it was not ranked
	out      string          // why it was not ranked; empty: it was
	kept     string          // what forbids to close it; empty: nothing does
	move     moves
}

// role is what this side may do about a peer, and why.
type role struct {
	decides bool   // it is the controller
	reason  string // why it is, or is not
	over    bool   // it is not, but has taken over
	moves   bool   // it moves streams to its choice, and tells the peer
	prunes  bool   // it closes the others
}

// plan is what is to be done about a peer.
type plan struct {
	state    string // in words
	role     role
	winner   int // in facts.conns; -1: there is none
	ranking  policy.Ranking
	decided  bool  // there is a winner that can be acted on
	left     bool  // there is none, since all are left alone on purpose
	err      error // why there is none, where something is wrong
	better   string
	since    time.Time
	settled  time.Time  // until when connections may still come; not after facts.now: they have
	steer    bool       // new streams go to the winner
	tell     bool       // the peer is told that the winner is kept
	asks     bool       // what can be decided depends on answers that are on their way
	probe    []question // put to connections: whether their path works
	room     int        // streams that may move to the winner now; negative: no limit is known
	verdicts []verdict  // of facts.conns
	upgrade  upgrade
	cleared  bool      // the only connection has come to work, or is left alone
	detour   bool      // the peer is dialled beside its only connection
	closed   []int     // that were closed, once the plan has been acted on
	next     time.Time // when to look again if nothing is heard; zero: never
}

// question is one that a connection is asked: whether its path works.
type question struct {
	conn  int  // in facts.conns
	large bool // and carries what is larger than a packet
}

// planner makes one plan.
type planner struct {
	cfg *config
	f   *facts
	rank
	survey
	manages knowledge  // facts.manages, unless its manager has been switched off
	stands  *connFacts // the best other unlimited connection than the winner; nil: there is none
	plan
}

// survey is what the connections have in common. It is found in one pass, since a peer may
// have hundreds of them, and have them looked at as often as it likes.
type survey struct {
	at             map[string]int // where in facts.conns
	oldest, newest time.Time      // when the first and the last one came
	ruled          []ruling       // whether each is ranked
	given          []bool         // which of them the policy is given
	steady         int            // that work, as far as is known, and are not about to be cut
	unlimited      int            // without a limit
	staying        int            // of them: not being closed
	usable         int            // of them: ranked
	relays         int            // of them: relayed
}

// rank is the policy, as decide sees it.
type rank func([]policy.Candidate) (policy.Ranking, error)

// decide says what is to be done about a peer with these connections.
func decide(cfg *config, by rank, f *facts) plan {
	pl := &planner{cfg: cfg, f: f, rank: by}
	pl.winner, pl.room, pl.settled = -1, -1, f.now
	pl.verdicts = make([]verdict, len(f.conns))
	pl.better, pl.since = f.better, f.since
	pl.decide()
	pl.upgrade = upgradeOf(cfg, f)
	return pl.plan
}

func (pl *planner) decide() {
	f := pl.f
	switch len(f.conns) {
	case 0:
		pl.state = "no connection"
		return
	case 1:
		pl.alone()
		if c := &f.conns[0]; !c.waits.IsZero() {
			pl.inVain(c)
		}
		return
	}
	pl.take()
	pl.look(f.now.Add(pl.cfg.interval))
	split, off := pl.process()
	if pl.manages = f.manages; off {
		pl.manages = no
	}
	pl.role = pl.roleOf()
	if f.exempt != "" {
		pl.state, pl.err = f.exempt, ErrExempt
		pl.all(verdict{reason: ReasonExempt, why: "kept: " + f.exempt, kept: f.exempt})
		return
	}
	pl.askPaths()
	if split {
		pl.left = true
		pl.state = "its connections lead to different processes that share its key, so that all are kept"
		pl.all(verdict{reason: ReasonOtherProcess, why: "kept: the peer's connections lead to different processes", kept: "the peer's connections lead to different processes"})
		return
	}
	if !pl.elect() {
		return
	}
	pl.decided = true
	w := &f.conns[pl.winner]
	pl.steer = w.unlimited() || !slices.ContainsFunc(f.conns, pl.outranks)
	pl.tell = pl.role.moves && f.wrapped && pl.manages == yes && w.told.due(f.now)
	pl.room = w.room
	pl.stands = pl.standby(w)
	pl.verdicts[pl.winner] = verdict{reason: ReasonKept, why: "kept"}
	for i := range f.conns {
		if i != pl.winner {
			pl.verdicts[i] = pl.judge(i, w)
		}
	}
	pl.state = pl.inWords()
}

// outranks says whether new streams are not steered to a limited connection because of c: it
// is unlimited. Where it has been silent for long, those that can move back from a limited
// one are.
func (pl *planner) outranks(c connFacts) bool {
	if c.limited() || c.closing {
		return false
	}
	if pl.f.migrates && c.path.health == pathSilent {
		gone := c.path.goneAt(pl.cfg.probeTime)
		pl.look(gone)
		return gone.After(pl.f.now)
	}
	return true
}

// take takes the survey.
func (pl *planner) take() {
	f := pl.f
	pl.at = make(map[string]int, len(f.conns))
	pl.ruled, pl.given = make([]ruling, len(f.conns)), make([]bool, len(f.conns))
	pl.oldest = f.conns[0].opened
	for i := range f.conns {
		c := &f.conns[i]
		pl.at[c.id()] = i
		pl.oldest, pl.newest = earlier(pl.oldest, c.opened), later(pl.newest, c.opened)
		if !c.closing && c.path.health != pathSilent && !c.ending(f.now) {
			pl.steady++
		}
	}
	for i := range f.conns {
		c := &f.conns[i]
		pl.ruled[i] = pl.ruledOut(c)
		if c.limited() {
			continue
		}
		pl.unlimited++
		if !c.closing {
			pl.staying++
		}
		if pl.ruled[i].out == "" {
			pl.usable++
		}
		if c.candidate.Relayed {
			pl.relays++
		}
	}
}

// ruling says why a connection is not ranked.
type ruling struct {
	out    string // empty: it is
	reason Reason
}

// alone is a peer with one connection.
func (pl *planner) alone() {
	c := &pl.f.conns[0]
	pl.winner = 0
	pl.state = "one connection, nothing to do"
	v := verdict{reason: ReasonOnly, why: "the only one"}
	if c.limited() {
		pl.state = "one connection, through a relay that limits it"
		v.why = "the only one; the relay cuts it when its limit is reached, and streams on it end then unless a direct connection comes before"
		if !c.ends.IsZero() {
			v.why = fmt.Sprintf("the only one; the relay cuts it in %s at the latest, and streams on it end then unless a direct connection comes before", inWords(c.ends.Sub(pl.f.now)))
			v.until = c.ends
		}
	} else if c.candidate.Relayed {
		pl.state = "one connection, through a relay"
	}
	pl.verdicts[0] = v
}

// process says whether the connections of a peer that advertises a manager lead to one: what
// it advertises may be another one's, since replicas may share a key (split), and it may have
// been switched off (off).
func (pl *planner) process() (split, off bool) {
	if pl.f.manages != yes {
		return false, false
	}
	serve, lack, dead, instance := 0, 0, 0, uint64(0)
	for i := range pl.f.conns {
		if of := pl.f.conns[i].instance; of != 0 && !pl.dead(i) {
			split = split || instance != 0 && instance != of
			instance = of
		}
	}
	if split {
		return true, false
	}
	for i := range pl.f.conns {
		switch c := &pl.f.conns[i]; {
		case pl.dead(i):
			dead++
		case c.serves && c.lacks:
			return false, true
		case c.serves:
			serve++
		case c.lacks:
			lack++
		}
	}
	return serve > 0 && lack > 0, lack > 0 && lack+dead == len(pl.f.conns)
}

// dead says whether a connection says nothing of who the peer is now: its process may have
// started anew.
func (pl *planner) dead(i int) bool {
	return pl.f.conns[i].closing || pl.f.conns[i].path.health == pathSilent
}

func (pl *planner) all(v verdict) {
	for i := range pl.verdicts {
		pl.verdicts[i] = v
	}
}

// look has the peer looked at again at the given time at the latest.
func (pl *planner) look(at time.Time) {
	at = later(at, pl.f.now.Add(minRoundGap))
	if pl.next.IsZero() || at.Before(pl.next) {
		pl.next = at
	}
}

// Who decides
//
//	this side   the peer runs a manager   lower ID   decides
//	wrapped     any                       ours       this side
//	wrapped     yes                       theirs     the peer
//	wrapped     no                        theirs     this side
//	wrapped     not known                 theirs     the peer
//	bare        yes                       any        the peer: it does not see us, and decides
//	bare        no                        ours       this side
//	bare        no                        theirs     the peer: it may be a bare manager too
//
// A bare manager has no host to advertise itself on, so two of them cannot see each other;
// the last two rows keep them from each closing the connection that the other one keeps.
//
// The one that does not decide takes over when nothing has happened for a while.
func (pl *planner) roleOf() role {
	f := pl.f
	var r role
	switch {
	case f.lower && (f.wrapped || pl.manages != yes):
		r.decides, r.reason = true, "it has the lower peer ID"
	case f.wrapped && pl.manages == no:
		r.decides, r.reason = true, "the peer runs no manager"
	case f.wrapped && pl.manages == unknown:
		r.reason = "the peer has the lower peer ID and has not been identified"
	case !f.wrapped && pl.manages == yes:
		r.reason = "the peer runs a manager, and this one is bare"
	default:
		r.reason = "the peer has the lower peer ID"
	}
	t := f.takeover
	switch {
	case r.decides, f.forced:
		r.moves, r.prunes = true, true
	case !f.now.Before(t.due(pl.cfg)):
		r.over, r.moves, r.prunes = true, true, true
	case t.times > 0:
		r.over, r.prunes = true, true
	case t.forced:
		r.prunes = true
	}
	if !r.moves {
		pl.look(t.due(pl.cfg))
	}
	return r
}

// takeover is what a follower waits with.
type takeover struct {
	progress time.Time // when something happened last
	times    int       // takeovers, of these connections
	forced   bool      // Consolidate has been called for these connections
}

// due returns when a follower takes over if nothing happens.
func (t takeover) due(cfg *config) time.Time {
	return t.progress.Add(cfg.takeover << min(t.times, maxTakeoverDoublings))
}

// askPaths has connections asked whether they work: all of them when one has come, since
// it may have come because another one is dead; and every now and then those that streams
// depend on. All are asked at once, and nobody waits in a round for the answers.
func (pl *planner) askPaths() {
	f := pl.f
	for i := range f.conns {
		c := &f.conns[i]
		if c.closing {
			continue
		}
		at := pl.dueProbe(c)
		if until := pl.sparedUntil(c); pl.narrow(c) && until.After(f.now) {
			pl.look(until)
		}
		if at.After(f.now) {
			pl.look(at)
		} else if !c.path.asking {
			pl.probe = append(pl.probe, question{i, pl.asksLarge(c)})
		}
	}
}

// dueProbe returns when c is to be asked next.
func (pl *planner) dueProbe(c *connFacts) time.Time {
	f := pl.f
	switch p := c.path; {
	case p.asked.Before(pl.newest):
		return f.now // not since the last one came
	case p.health != pathAlive:
		return p.asked.Add(reprobe(p.tries, pl.cfg.probeTime))
	case pl.asksLarge(c) && p.denied > 0:
		return p.asked.Add(reprobe(p.denied, pl.cfg.probeTime))
	case pl.asksLarge(c):
		return f.now
	case f.now.Sub(c.used) < pl.cfg.interval:
		return later(p.asked, p.at).Add(useProbe) // something depends on it
	case c.quiet.IsZero() && (f.now.Sub(c.used) < idleProbe || p.at.Sub(p.asked) > useProbe):
		return later(p.asked, p.at).Add(pl.cfg.interval) // a stream began, or more came than was asked for
	case c.quiet.IsZero():
		return later(p.asked, p.at).Add(idleProbe / 2)
	case pl.proving(c):
		return p.asked.Add(pl.cfg.interval)
	default:
		return later(p.asked, p.at).Add(idleProbe)
	}
}

// narrow says whether c works, and has yet to show that it carries what is large.
func (pl *planner) narrow(c *connFacts) bool {
	return c.path.alive() && !c.path.wide && c.unlimited() && !pl.first(c)
}

// asksLarge says whether c, when it is asked, is asked for that. It costs no relay's budget: a
// limited connection is never asked, nor the oldest, which has carried what there was.
func (pl *planner) asksLarge(c *connFacts) bool {
	return pl.narrow(c) && !pl.sparedUntil(c).After(pl.f.now)
}

// sparedUntil is until when c is not asked for that, as things are. A TCP connection whose
// path swallows what is large does not survive the question, and takes along what is on it. So
// it is asked when it has not been used for a while. That is long for a peer without Portage,
// which goes on using it; nothing is lost by that: no streams move, and nothing is closed,
// before they have been idle, too. A peer with Portage has its new streams go elsewhere
// meanwhile, as this side has. There it is asked in any case after some time, and at once
// where the peer has moved to it, or another one has a limit or does not answer.
func (pl *planner) sparedUntil(c *connFacts) time.Time {
	f := pl.f
	idle := pl.cfg.plainQuietTime
	switch {
	case kindOf(c.candidate).udp:
		return time.Time{}
	case pl.steersBoth():
		idle = min(useProbe, pl.cfg.quietTime)
		if c.named || !pl.allWell() {
			return time.Time{}
		}
	case slices.ContainsFunc(f.conns, func(o connFacts) bool { return !o.closing && o.path.health == pathSilent }):
		return time.Time{} // new streams of this side may be lost on that one
	default: // nothing is gained by it where another one has been chosen and works
		if w := pl.find(f.winner); w != nil && w != c && w.path.alive() {
			return f.now.Add(idle)
		}
	}
	until := f.now.Add(idle)
	if !c.quiet.IsZero() {
		until = later(c.quiet, c.used).Add(idle)
	}
	if pl.steersBoth() {
		until = earlier(until, c.livesSince().Add(largeWithin))
	}
	return until
}

// allWell says whether all connections work, or may yet answer, and none has a limit.
func (pl *planner) allWell() bool {
	return !slices.ContainsFunc(pl.f.conns, func(c connFacts) bool {
		asked := c.path.asking && pl.f.now.Before(c.path.asked.Add(useProbe))
		return !c.closing && (c.limited() || !c.path.alive() && !asked)
	})
}

// steersBoth says whether the peer, too, has a say in where its new streams go.
func (pl *planner) steersBoth() bool { return pl.manages == yes || pl.f.migrates }

// onTrial says whether c is a TCP connection that may not survive what it is to be asked.
func (pl *planner) onTrial(c *connFacts) bool {
	return pl.narrow(c) && !kindOf(c.candidate).udp && pl.steersBoth()
}

// proving says whether c has yet to show that it lives for long enough.
func (pl *planner) proving(c *connFacts) bool {
	deaths := pl.f.deaths[kindOf(c.candidate)]
	return c.unlimited() && pl.f.now.Before(c.livesSince().Add(pl.cfg.proof(true, deaths))) &&
		(deaths > 0 && pl.unlimited > 1 || pl.relays > 0 && !c.candidate.Relayed ||
			slices.ContainsFunc(pl.f.conns, func(o connFacts) bool { return o.unlimited() && pl.betterProven(&o, c) }))
}

// ruledOut says why c is not ranked; empty if it is.
func (pl *planner) ruledOut(c *connFacts) ruling {
	switch {
	case c.closing:
		return ruling{"it is being closed", ReasonClosing}
	case c.pledged && !c.named:
		return ruling{"the peer wants to close it", ReasonPeerCloses}
	case c.path.health == pathSilent:
		return ruling{"it does not answer", ReasonSilent}
	case c.ending(pl.f.now) && pl.steady > 0:
		return ruling{"its relay is about to cut it", ReasonEnding}
	}
	return ruling{reason: ReasonUndecided}
}

// ranks says whether c is ranked.
func (pl *planner) ranks(c *connFacts) bool { return pl.ruled[pl.index(c.id())].out == "" }

// elect finds the winner, and says whether there is one that can be acted on.
func (pl *planner) elect() bool {
	f := pl.f
	var candidates []policy.Candidate
	limited := true // all that are not closing
	for i := range f.conns {
		c := &f.conns[i]
		limited = limited && (c.limited() || c.closing)
		v := &pl.verdicts[i]
		if v.out, v.reason = pl.ruled[i].out, pl.ruled[i].reason; v.out == "" {
			candidates, pl.given[i] = append(candidates, c.candidate), true
			v.why = "not decided on"
		} else {
			v.why = v.out
		}
	}
	if len(candidates) == 0 { // then one that the peer wants to close is better than none
		for i := range f.conns {
			if c := &f.conns[i]; c.pledged && !c.closing && c.path.health != pathSilent {
				candidates, pl.given[i] = append(candidates, c.candidate), true
				pl.verdicts[i].out, pl.verdicts[i].why, pl.verdicts[i].reason = "", "not decided on", ReasonUndecided
			}
		}
	}
	if len(candidates) == 0 {
		pl.state, pl.err = "no connection answers; nothing is done until one does", errSilent
		return false
	}
	ranking, err := pl.rank(candidates)
	if err == nil {
		err = pl.check(ranking)
	}
	if err != nil {
		pl.state, pl.err = err.Error(), err
		pl.avoidSilent(candidates)
		return false
	}
	pl.ranking = ranking
	order := make([]*connFacts, 0, len(candidates))
	for _, c := range ranking.Order {
		order = append(order, pl.find(c.ID))
	}
	for _, d := range ranking.Decisions {
		if i := pl.index(d.Loser.ID); i >= 0 {
			pl.verdicts[i].decision = d
		}
	}
	best := pl.present(pl.proved(order))
	settled, why := pl.settles(best, order)
	if pl.settled = settled; settled.After(f.now) && !f.forced {
		pl.look(settled)
		pl.state = "settling for another " + inWords(settled.Sub(f.now)) + why
		pl.steerMeanwhile(order)
		return false
	}
	if f.measuring && !f.forced {
		pl.asks = true
		pl.state = "measuring round-trip times"
		pl.steerMeanwhile(order)
		return false
	}
	if limited && !slices.ContainsFunc(f.conns, func(c connFacts) bool { return c.ending(f.now) }) {
		pl.left = true
		pl.state = "only limited connections, each with a budget of its own: all are left, and streams leave one that is about to be cut"
		for i := range f.conns {
			c, v := &f.conns[i], &pl.verdicts[i]
			v.reason, v.kept = ReasonLimited, "its relay limits it, as the others"
			v.why = "kept: " + v.kept
			if !c.ends.IsZero() {
				v.until = c.ends
				v.why += fmt.Sprintf(", and cuts it in %s at the latest", inWords(c.ends.Sub(f.now)))
				pl.look(c.ends.Add(-endingSoon))
			}
		}
		return false
	}
	pick, waits := pl.vouched(best, order)
	if pick == nil {
		pl.state = waits
		pl.steerMeanwhile(order)
		return false
	}
	pl.choose(pick, ranking)
	return true
}

// check says what is wrong with a ranking.
func (pl *planner) check(r policy.Ranking) error {
	if len(r.Order) == 0 {
		return errNoWinner
	}
	for _, c := range r.Order {
		if i := pl.index(c.ID); i < 0 || !pl.given[i] {
			return errNoWinner
		}
	}
	return nil
}

// present returns the order in which to consider connections: as ranked, except that a
// follower considers first the one that the peer has named, and that the winner so far comes
// first until a better one has stayed better for a while. The one that comes first is there
// twice, then.
func (pl *planner) present(order []*connFacts) []*connFacts {
	f := pl.f
	first := func(c *connFacts) []*connFacts { return append([]*connFacts{c}, order...) }
	if !pl.role.moves {
		if i := slices.IndexFunc(order, func(c *connFacts) bool { return c.named }); i >= 0 {
			pl.better, pl.since = "", time.Time{}
			return first(order[i])
		}
	}
	i := slices.IndexFunc(order, func(c *connFacts) bool { return c.id() == f.winner })
	if i <= 0 || f.fresh || f.atOnce || f.forced {
		pl.better, pl.since = "", time.Time{}
		return order
	}
	if pl.better != order[0].id() {
		pl.better, pl.since = order[0].id(), f.now
	}
	over := pl.since.Add(patienceIntervals * pl.cfg.interval)
	if !f.now.Before(over) {
		pl.better, pl.since = "", time.Time{}
		return order
	}
	pl.look(over)
	return first(order[i])
}

// settles returns until when connections may still come that change the decision: nothing
// outranks the only unlimited connection among limited ones, and the end of a relay's limit
// does not wait.
func (pl *planner) settles(best, order []*connFacts) (time.Time, string) {
	f := pl.f
	if f.atOnce {
		return f.now, ""
	}
	delay, why := pl.cfg.settleDelay, ""
	unlimited := 0
	for _, c := range order {
		if c.unlimited() {
			unlimited++
		}
	}
	if slices.ContainsFunc(f.conns, func(c connFacts) bool { return c.ending(f.now) && !c.closing }) {
		return f.now, ""
	}
	// One that the peer wants to lose is none of order, and yet all streams may be on it.
	limited := slices.ContainsFunc(f.conns, func(c connFacts) bool { return c.limited() && !c.closing })
	if unlimited == 1 && limited && best[0].unlimited() {
		delay = min(delay, fastSettle)
		why = ", since all others are limited"
	}
	return earlier(f.came.Add(delay), f.firstOf.Add(maxSettleDelays*delay)), why
}

// vouched returns the first connection whose path is known to work. One that could not be
// asked is passed over only for a newer one, which may have come because it is dead; and a
// direct one never for a relayed one. Else it says what is waited for.
func (pl *planner) vouched(best, order []*connFacts) (*connFacts, string) {
	f := pl.f
	var passed []*connFacts
	for _, c := range best {
		if c.path.alive() && !c.path.at.Before(pl.newest) && (c.path.wide || c.limited() || pl.first(c)) {
			for _, u := range passed {
				if !c.opened.After(u.opened) || u.unlimited() && c.limited() || !u.candidate.Relayed && c.candidate.Relayed {
					return nil, "it is not known whether " + kind(u.candidate) + " works: nothing is done until it is"
				}
			}
			return c, ""
		}
		if c.path.asking && !c.path.gaveUp(f.now, pl.cfg.probeTime) || c.path.asked.Before(pl.newest) || pl.asksLarge(c) && !c.path.asking && c.path.denied == 0 {
			pl.asks = true
			return nil, "asking which connections work"
		}
		passed = append(passed, c)
	}
	if len(passed) == 0 {
		return nil, "the only connection that could win has yet to prove itself"
	}
	return nil, "it is not known which connections work: nothing is done until it is"
}

// first says whether no connection is older than c. The oldest one has carried what there
// was; any other has to show that it carries what is large before it is relied on.
func (pl *planner) first(c *connFacts) bool { return !pl.oldest.Before(c.opened) }

// proved returns order without the connections that have yet to live for longer, since
// winners of their kind have died young of late.
func (pl *planner) proved(order []*connFacts) []*connFacts {
	unlimited := 0
	for _, c := range order {
		if c.unlimited() {
			unlimited++
		}
	}
	return slices.DeleteFunc(slices.Clone(order), func(c *connFacts) bool {
		others := unlimited
		if c.unlimited() {
			others--
		}
		at, deaths := pl.proves(c, others)
		if !at.After(pl.f.now) {
			return false
		}
		pl.look(at)
		pl.leaveOut(c, fmt.Sprintf("%s of this kind died young of late: it wins if it still works in %s", times(deaths), inWords(at.Sub(pl.f.now))))
		return true
	})
}

func (pl *planner) leaveOut(c *connFacts, why string) {
	v := &pl.verdicts[pl.index(c.id())]
	v.out, v.why, v.reason = why, why, ReasonProving
}

// proves returns when c, of a kind of which deaths winners have died young, has lived for
// long enough to win over so many other unlimited connections.
func (pl *planner) proves(c *connFacts, others int) (time.Time, int) {
	deaths := pl.f.deaths[kindOf(c.candidate)]
	if deaths == 0 || pl.f.forced || others == 0 {
		return time.Time{}, 0
	}
	return c.livesSince().Add(pl.cfg.proof(true, deaths)), deaths
}

// choose makes c the winner.
func (pl *planner) choose(c *connFacts, ranking policy.Ranking) {
	f := pl.f
	pl.winner = pl.index(c.id())
	if top, _ := ranking.Winner(); top.ID == c.id() {
		return
	}
	// The decisions of this ranking name the connection that was passed over as the winner.
	// Those of the ranking in force still hold if they name c.
	if top, _ := f.ranking.Winner(); top.ID == c.id() {
		pl.ranking = f.ranking
	}
	for i := range pl.verdicts {
		pl.verdicts[i].decision = policy.Decision{}
	}
	for _, d := range pl.ranking.Decisions {
		if i := pl.index(d.Loser.ID); i >= 0 && d.Winner.ID == c.id() {
			pl.verdicts[i].decision = d
		}
	}
}

// steerMeanwhile says where new streams go while nothing can be decided: to the winner so far,
// or else to another connection that has answered since the last one came. The newest one is
// not one of them as long as it has only carried what is small; nor is a relayed one beside a
// direct one that may work: the swarm would not choose it either. But it is where the direct one
// is on trial.
func (pl *planner) steerMeanwhile(order []*connFacts) {
	f := pl.f
	good := func(c *connFacts) bool {
		return c != nil && pl.verdicts[pl.index(c.id())].out == "" && c.path.alive() && !c.path.at.Before(pl.newest) && !pl.narrow(c)
	}
	direct := slices.ContainsFunc(f.conns, func(c connFacts) bool {
		return !c.candidate.Relayed && !c.closing && c.path.health != pathSilent && !pl.onTrial(&c)
	})
	if pl.staying == 0 && !slices.ContainsFunc(f.conns, func(c connFacts) bool { return c.path.health == pathSilent || c.ending(f.now) }) {
		return // each has a budget of its own: the swarm chooses, as it does for a plain host
	}
	for _, c := range append([]*connFacts{pl.find(f.winner)}, order...) {
		if good(c) && (c.unlimited() || pl.staying == 0) && (!c.candidate.Relayed || !direct) {
			pl.steer, pl.winner = true, pl.index(c.id())
			return
		}
	}
}

// avoidSilent sends new streams to a connection that works where the policy cannot say which
// is best and one is known not to work: that much needs no policy.
func (pl *planner) avoidSilent(usable []policy.Candidate) {
	f := pl.f
	if !slices.ContainsFunc(f.conns, func(c connFacts) bool { return c.path.health == pathSilent }) {
		return
	}
	for _, c := range policy.Default().Rank(usable).Order {
		if i := pl.index(c.ID); f.conns[i].path.alive() && f.conns[i].unlimited() {
			pl.steer, pl.winner = true, i
			return
		}
	}
}

// index returns where in facts.conns a connection is; -1: nowhere.
func (pl *planner) index(id string) int {
	if i, ok := pl.at[id]; ok {
		return i
	}
	return -1
}

func (pl *planner) find(id string) *connFacts {
	if i := pl.index(id); i >= 0 {
		return &pl.f.conns[i]
	}
	return nil
}

// judge says what becomes of a loser.
func (pl *planner) judge(i int, w *connFacts) verdict {
	f := pl.f
	l, v := &f.conns[i], pl.verdicts[i]
	v.why = v.out
	keep := func(r Reason, why string) verdict {
		v.fate, v.reason, v.why, v.kept = fateKeep, r, "kept: "+why, why
		return v
	}
	better := func(why string) verdict { // it would win, but for what it was ruled out by
		out, reason := v.out, v.reason
		if keep(ReasonBetter, why); out != "" {
			v.reason, v.why = reason, out+"; "+v.why
		}
		return v
	}
	switch {
	case l.closing:
		return v
	case l.exempt != "":
		return keep(ReasonExempt, l.exempt)
	case l.unlimited() && w.limited():
		return better("it is unlimited, and the winner is not")
	case w.limited() && !l.ending(f.now):
		v.until = l.ends
		return keep(ReasonLimited, "its relay limits it, as the winner")
	}
	v.move = pl.moves(l, w)
	if at := pl.movesAt(l, w); at.After(f.now) {
		pl.look(at)
	}
	if w.limited() {
		v.fate, v.reason, v.why = fateWait, ReasonEnding, "its relay is about to cut it"
		return v
	}
	if w.candidate.Relayed && !l.candidate.Relayed {
		return better("it is direct, and the winner is not")
	}
	v.fate = fateWait
	if l.pledged && !l.quiet.IsZero() {
		pl.look(f.now.Add(pl.gap(pl.cfg.quietTime))) // the peer is going to ask since when
	}
	if movable := l.own + l.theirs + l.retries; movable > 0 && pl.role.moves {
		v.reason, v.why = ReasonMoving, streams(movable)+" to move"
		if l.own+l.theirs == 0 {
			v.reason, v.until = ReasonBackingOff, l.retryAt
			v.why = fmt.Sprintf("%s failed to move, next attempt in %s", streams(l.retries), inWords(l.retryAt.Sub(f.now)))
		}
		if at := pl.movesAt(l, w); at.After(f.now) {
			v.reason, v.until = ReasonProving, at
			v.why += " when the winner has proved itself, in " + inWords(at.Sub(f.now))
		} else if v.move != moveNone && pl.room == 0 {
			v.reason = ReasonNoRoom
			v.why += " when the winner has room for more"
		}
		if l.retries > 0 {
			pl.look(l.retryAt)
		}
	}
	if !pl.role.prunes {
		if v.why == "" {
			if v.reason, v.why = pl.busyWith(l); v.why == "" {
				v.reason, v.why = ReasonPeerDecides, "the peer decides"
			}
		}
		if left := l.own + l.theirs; left > 0 && l.moving == 0 && pl.manages == yes {
			v.reason, v.why = ReasonPeerDecides, streams(left)+" to move, once the peer says where to"
		}
		return v
	}
	reason, why := v.reason, v.why
	v = pl.mayGo(v, l, w)
	if v.kept == "" && why != "" {
		v.reason, v.why = reason, why // what it carries matters more than what was asked
	}
	return v
}

// busyWith says what l carries; empty: nothing.
func (pl *planner) busyWith(l *connFacts) (Reason, string) {
	switch {
	case l.moving > 0:
		return ReasonMoving, streams(l.moving) + " moving"
	case l.candidate.Pinned > 0:
		return ReasonPinned, "kept until " + pl.pinnedOn(l) + " ended"
	case l.candidate.Streams > 0:
		return ReasonMoving, streams(l.candidate.Streams) + " to move"
	case l.quiet.IsZero():
		return ReasonQuiet, "no stream"
	}
	return "", ""
}

// pinnedOn names the streams that keep l open.
func (pl *planner) pinnedOn(l *connFacts) string {
	text := streams(l.candidate.Pinned) + " that cannot move"
	if l.pinned != "" {
		text += " (" + l.pinned + ")"
	}
	switch {
	case !pl.f.wrapped:
		text += ", since this host is not wrapped,"
	case !pl.f.migrates && pl.f.manages != unknown:
		text += ", since the peer does not migrate streams,"
	case !pl.f.migrates:
		text += ", since the peer has not been identified,"
	}
	if l.candidate.Pinned == 1 {
		return text + " has"
	}
	return text + " have"
}

// moves says which streams leave l for w now. Each end moves those that it opened: it has
// the muxer's credit for them. What a peer does not move, although it was told, this side
// moves after a while.
func (pl *planner) moves(l, w *connFacts) moves {
	f := pl.f
	if !f.migrates || pl.movesAt(l, w).After(f.now) || l.own+l.theirs == 0 {
		return moveNone
	}
	if l.unlimited() && l.path.health != pathSilent && f.now.Sub(w.path.at) > freshFor {
		pl.asks = true // they are well where they are: a moment ago is not good enough
		pl.probeWinner(w)
		return moveNone
	}
	others := l.theirs > 0 && (pl.manages != yes || f.forced || pl.role.over || w.told.over(f.now))
	if pl.role.over && pl.manages == yes && w.told.phase != tellKept && w.told.phase != tellFailed {
		return moveNone // the one that decides is told first: it may be there after all
	}
	switch {
	case pl.role.moves && others:
		return moveAll
	case pl.role.moves:
		if l.theirs > 0 && !w.told.until.IsZero() {
			pl.look(w.told.until)
		}
		return moveOwn
	case w.named, w.unlimited() && pl.unlimited == 1:
		return moveOwn // there is no other choice
	}
	return moveNone
}

// movesAt is from when on streams may leave l for w. Those on a relayed connection without a
// limit are in no danger, nor are those on a direct one that has proved itself, so that they
// wait until w has, too: were it to die before, they would have been better off where they were.
func (pl *planner) movesAt(l, w *connFacts) time.Time {
	if l.limited() || pl.f.forced || l.path.health == pathSilent || !l.candidate.Relayed && !pl.betterProven(l, w) {
		return time.Time{}
	}
	return w.livesSince().Add(pl.cfg.proof(true, pl.f.deaths[kindOf(w.candidate)]))
}

// mayGo says whether l can be closed now, or what is in the way.
//
//	the peer runs a manager   both have done with it: asked, quiet, and asked again after
//	                          the winner has shown that it works (D1, D2)
//	it runs none              no stream here for much longer; the winner has shown that it
//	                          works; and both connections lead to the same process
//	not known                 it stays
func (pl *planner) mayGo(v verdict, l, w *connFacts) verdict {
	f := pl.f
	reason, quietFor := pl.busyWith(l)
	busy := quietFor != ""
	if !busy {
		reason, quietFor = ReasonQuiet, "quiet for "+inWords(f.now.Sub(l.quiet))
	}
	if pl.cfg.standby && l == pl.stands {
		v.fate, v.reason, v.why, v.kept = fateKeep, ReasonStandby, "kept: it stands by", "it stands by"
		return v
	}
	if pl.manages == unknown {
		if v.reason = reason; reason == ReasonQuiet {
			v.reason = ReasonUnidentified
		}
		v.why = quietFor + "; the peer has not been identified, so that it stays"
		return v
	}
	quiet := pl.cfg.quietTime
	asks := f.wrapped && pl.manages == yes && !l.lacks
	if !asks {
		quiet = pl.cfg.plainQuietTime
		if pl.role.over {
			// The controller may not have closed it because it has something to read there. And
			// if both closed a connection at the same moment, each a different one, none would
			// be left. So the controller's turn has to be over.
			quiet += pl.cfg.takeover
		}
	}
	isQuiet := !busy && f.now.Sub(l.quiet) >= quiet
	proven := pl.provenAt(l, w)
	ready := later(l.quiet.Add(quiet), proven)
	if !l.quiet.IsZero() {
		pl.look(later(ready, f.now.Add(pl.gap(quiet))))
		v.until = ready
	}
	v.reason, v.why = reason, quietFor
	switch {
	case busy:
	case !isQuiet:
		v.why += " of " + inWords(quiet) + ", then closed"
	case f.now.Before(proven):
		v.reason = ReasonProving
		v.why += "; closed when the winner has proved itself, in " + inWords(proven.Sub(f.now))
		isQuiet = false
	case w.path.at.Before(proven):
		v.reason = ReasonProving
		v.why += "; the winner is asked once more"
		pl.probeWinner(w)
		isQuiet = false
	default:
		v.why += ", closed next"
	}
	if w.pledged && !w.named {
		v.reason, v.why = ReasonPeerCloses, "the peer may close the winner"
		return v
	}
	if !asks {
		return pl.idle(v, l, w, isQuiet)
	}
	return pl.drain(v, l, w, isQuiet)
}

// provenAt is when w has lived for long enough for l to be closed: it matters where l is
// the last other unlimited connection.
func (pl *planner) provenAt(l, w *connFacts) time.Time {
	f := pl.f
	if l.limited() || f.forced {
		return time.Time{}
	}
	others := pl.usable
	for _, c := range []*connFacts{l, w} {
		if pl.ranks(c) {
			others--
		}
	}
	if others > 0 {
		return time.Time{}
	}
	return w.livesSince().Add(pl.cfg.proof(l.candidate.Relayed || pl.betterProven(l, w), f.deaths[kindOf(w.candidate)]))
}

// betterProven says whether it is known of l that it works, and much less of w: w is another kind
// of path, and came when l had lived for a while. What has come with it, or is of its kind,
// may be dialled again where it could be before, and most likely fails where w does.
func (pl *planner) betterProven(l, w *connFacts) bool {
	return kindOf(l.candidate) != kindOf(w.candidate) &&
		w.livesSince().Sub(l.livesSince()) > pl.cfg.proof(false, 0)
}

// standby returns the connection that is kept beside w: the best other unlimited one.
func (pl *planner) standby(w *connFacts) *connFacts {
	for _, c := range pl.ranking.Order {
		if o := pl.find(c.ID); o != nil && o != w && o.unlimited() && pl.ranks(o) {
			return o
		}
	}
	return nil
}

// gap is how long to wait before the next look at a connection that has to be quiet.
func (pl *planner) gap(quiet time.Duration) time.Duration {
	return min(maxQuietGap, quiet/quietLooks)
}

func (pl *planner) probeWinner(w *connFacts) {
	i := pl.index(w.id())
	if !w.path.asking && !slices.ContainsFunc(pl.probe, func(q question) bool { return q.conn == i }) {
		pl.probe = append(pl.probe, question{i, pl.asksLarge(w)})
	}
}

// idle says what becomes of a loser to a peer that cannot be asked.
func (pl *planner) idle(v verdict, l, w *connFacts, isQuiet bool) verdict {
	f := pl.f
	if !isQuiet {
		return v
	}
	if f.wrapped {
		switch l.same {
		case sameUnknown:
			v.fate, v.reason, v.why = fateCompare, ReasonOtherProcess, v.why+": asking whether it leads to the same process"
			return v
		case sameAsked:
			v.fate, v.reason, v.why = fateWait, ReasonOtherProcess, v.why+": asking whether it leads to the same process"
			return v
		case sameNot:
			why := "it is not known to lead to the same process as the winner"
			v.fate, v.reason, v.why, v.kept = fateKeep, ReasonOtherProcess, "kept: "+why, why
			return v
		}
	}
	if f.now.Sub(w.path.at) > pl.cfg.quietTime {
		pl.probeWinner(w)
		return v
	}
	v.fate = fateClose
	return v
}

// drain says what becomes of a loser to a peer that is asked.
func (pl *planner) drain(v verdict, l, w *connFacts, isQuiet bool) verdict {
	f := pl.f
	d := l.drain
	renew := !f.now.Before(d.at.Add(d.lease / 3)) // of what it has answered
	waits := func(r Reason) {                     // unless what it carries is in the way, too
		if v.reason == ReasonQuiet {
			v.reason = r
		}
	}
	switch d.phase {
	case drainOff:
		v.fate = fateAsk
	case drainAsked:
		waits(ReasonDraining)
		v.why += ", waiting for the peer's answer"
	case drainRefused:
		if f.now.Before(d.until) {
			pl.look(d.until)
			why := fmt.Sprintf("the peer refused: %q", d.reason)
			v.fate, v.reason, v.why, v.kept, v.until = fateKeep, ReasonRefused, "kept: "+why, why, d.until
			return v
		}
		v.fate = fateAsk
	case drainFailed:
		waits(ReasonNoAnswer)
		v.why += fmt.Sprintf("; the peer did not answer, it is asked again in %s", inWords(d.until.Sub(f.now)))
		if !f.now.Before(d.until) {
			v.fate = fateAsk
		} else {
			pl.look(d.until)
		}
	case drainBusy:
		waits(ReasonDraining)
		v.why += fmt.Sprintf(", the peer has not done with it (asked for %s)", inWords(f.now.Sub(d.since)))
		switch {
		case renew, isQuiet && !f.now.Before(d.until):
			v.fate = fateAsk
		case isQuiet:
			pl.look(d.until)
		}
	case drainAgreed:
		switch {
		case renew:
			v.fate = fateAsk
		case !isQuiet:
		case w.path.at.After(d.at):
			v.fate = fateConfirm
		default:
			pl.probeWinner(w)
		}
	case drainConfirmed:
		switch {
		case renew:
			v.fate = fateAsk
		case !isQuiet:
		case f.now.Sub(d.at) > pl.cfg.quietTime+pl.cfg.probeTime:
			v.fate = fateAsk // too long ago for the winner's answer to mean anything
		default:
			v.fate = fateClose
		}
	}
	if !d.at.IsZero() && d.phase != drainAsked {
		pl.look(d.at.Add(d.lease / 3))
	}
	return v
}

// inWords is what is being done about the peer.
func (pl *planner) inWords() string {
	f := pl.f
	moving, retries, soonest := 0, 0, time.Time{}
	for i := range f.conns {
		c := &f.conns[i]
		moving += c.moving
		if c.retries > 0 {
			if retries += c.retries; soonest.IsZero() || c.retryAt.Before(soonest) {
				soonest = c.retryAt
			}
		}
	}
	switch {
	case moving > 0:
		return streams(moving/2) + " moving"
	case pl.better != "":
		return "another connection ranks first now, and wins if it still does in " +
			inWords(pl.since.Add(patienceIntervals*pl.cfg.interval).Sub(f.now))
	case retries > 0 && pl.role.moves:
		return fmt.Sprintf("%s failed to move, next attempt in %s", streams(retries), inWords(soonest.Sub(f.now)))
	case pl.role.over:
		return "taken over, since the peer did nothing"
	case !pl.role.decides && !f.forced:
		return "following, takes over in " + inWords(f.takeover.due(pl.cfg).Sub(f.now)) + " if nothing happens"
	default:
		return "consolidating"
	}
}

// upgradeFacts is what is known of the attempts to get a direct connection to a peer that is
// reached only over relays.
type upgradeFacts struct {
	tracked  bool      // attempts are made at all
	wanted   string    // why the inner connection manager wants the peer; empty: it does not
	used     time.Time // when a stream began last or there was one, as far as is known; zero: never
	since    time.Time // from when on all connections have been relayed
	changed  time.Time // when something changed first since the last attempt that the next one may succeed by
	running  bool      // an attempt is under way
	full     bool      // there is no place for another one at this moment
	started  time.Time // the last attempt; zero: there was none
	ended    time.Time
	err      error // of the last attempt
	attempts int   // so far
	failures int   // attempts in a row that have failed, the first after the last change
	jitter   float64
}

// upgrade is what is done about a direct connection to a peer that has none.
type upgrade struct {
	why  string    // in words; empty: there is one
	asks bool      // this end is the one that can ask for it
	busy bool      // there are streams
	due  bool      // it asks now
	at   time.Time // when it asks next; zero: it does not, as things are
	look time.Time // when to look at the peer again
}

// upgradeOf says whether a direct connection to a peer is asked for, and when.
//
//	there are streams, or were within a minute   soon, and at least every cfg.upgradeBusy
//	it is protected or tagged, or was used       less and less often, at least every
//	within ten minutes                           cfg.upgradeIdle
//	nothing uses it                              never
//	it cannot be, as the last attempt said       once something has changed
//
// The first attempt comes when go-libp2p has finished its own, and another one soon after
// something has changed at either end. Where both ends could ask, the one with the lower peer
// ID does, and the other one only seldom: two attempts at once fail each other.
func upgradeOf(cfg *config, f *facts) upgrade {
	var up upgrade
	var youngest time.Time // of those that came in
	out := false           // one was opened from here
	for i := range f.conns {
		c := &f.conns[i]
		if !c.candidate.Relayed {
			return upgrade{}
		}
		if c.candidate.Direction == network.DirInbound {
			up.asks = true
			youngest = later(youngest, c.opened)
		} else {
			out = true
		}
		up.busy = up.busy || c.candidate.Streams > 0
	}
	u := &f.upgrade
	switch {
	case len(f.conns) == 0:
		return upgrade{}
	case !up.asks:
		up.why = "no direct connection: only the peer, which was dialled over the relay, can ask for one"
		return up
	case !u.tracked:
		up.why = "no direct connection, and none is asked for"
		return up
	case u.running:
		up.why = "no direct connection: asking for one"
		return up
	}
	up.look = f.now.Add(upgradeLook)
	said := ""
	if u.err != nil {
		said = fmt.Sprintf("last attempt %s ago: %s", inWords(f.now.Sub(u.ended)), briefly(u.err))
	}
	news := u.changed.After(u.started)
	recently := f.now.Sub(u.used) < upgradeUsed
	switch {
	case f.exempt != "":
		up.why = "no direct connection, and none is asked for: " + f.exempt
		return up
	case !up.busy && u.wanted == "" && !recently:
		up.why = "no direct connection, and none is asked for: nothing uses the peer"
		return up
	case hopeless(u.err) && !news:
		up.why = "no direct connection: " + said + "; asked for again when something has changed"
		return up
	}
	soon := up.busy || f.now.Sub(u.used) < upgradeBusyFor
	limit, first := cfg.upgradeIdle, later(youngest.Add(cfg.upgradeFirst), u.since.Add(upgradeNews))
	seldom := out && !f.lower && f.manages != no
	switch {
	case seldom:
		first = first.Add(2 * cfg.upgradeBusy)
	case soon:
		limit = cfg.upgradeBusy
	}
	vary := func(d time.Duration) time.Duration { return time.Duration(float64(d) * u.jitter) }
	if u.started.IsZero() {
		up.at = first.Add(vary(upgradeNews))
	} else {
		// Counted from the start of the last one, which takes a while. It rests for half as
		// long as it took, so that no peer keeps a place for itself.
		pause := min(cfg.upgradeFirst<<min(max(u.failures-1, 0), 10), limit)
		rested := u.ended.Add(max(upgradeRest, u.ended.Sub(u.started)/2))
		up.at = later(u.started.Add(pause-vary(pause/4)), rested)
		if news {
			up.at = later(u.changed.Add(upgradeNews+vary(upgradeNews)), rested)
		}
		up.at = later(up.at, first)
	}
	up.due = !f.now.Before(up.at)
	up.look = earlier(up.look, up.at)
	next := "next in " + inWords(up.at.Sub(f.now))
	if u.started.IsZero() {
		next = "first attempt in " + inWords(up.at.Sub(f.now))
	}
	if up.due && u.full {
		next = "next when there is a place for it"
	}
	up.why = "no direct connection: " + next
	if said != "" {
		up.why = "no direct connection: " + said + ", " + next
	}
	return up
}

// pathKind is what paths have in common that die together: the UDP that a network drops,
// the relay that restarts.
type pathKind struct {
	udp, relayed bool
}

func kindOf(c policy.Candidate) pathKind {
	return pathKind{
		udp:     c.Transport != policy.TCP && c.Transport != policy.WebSocket,
		relayed: c.Relayed,
	}
}

func (k pathKind) String() string {
	switch {
	case k.relayed:
		return "relay"
	case k.udp:
		return "udp"
	default:
		return "tcp"
	}
}
