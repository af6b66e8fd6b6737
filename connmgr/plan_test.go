package connmgr

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/internal/punch"
	"github.com/go-portage/portage/policy"
)

// The plan's table: what is known of a peer on the left, what becomes of its connections on
// the right. Times are counted from noon, when the facts are.
var noon = time.Date(2030, 1, 1, 12, 0, 0, 0, time.UTC)

func ago(d time.Duration) time.Time { return noon.Add(-d) }
func in(d time.Duration) time.Time  { return noon.Add(d) }

// aConn is a connection that has been there for a minute, works, and has been quiet for half
// of that.
func aConn(id, addr string, change ...func(*connFacts)) connFacts {
	c := connFacts{opened: ago(time.Minute), quiet: ago(30 * time.Second), room: -1}
	c.candidate.ID = id
	c.candidate.SetAddr(ma.StringCast(addr))
	c.path = path{health: pathAlive, at: ago(time.Millisecond), since: ago(time.Minute), asked: ago(time.Millisecond), wide: true}
	for _, f := range change {
		f(&c)
	}
	c.candidate.Age = noon.Sub(c.opened)
	return c
}

func quicConn(change ...func(*connFacts)) connFacts { return aConn("quic", quicAddr, change...) }
func tcpConn(change ...func(*connFacts)) connFacts  { return aConn("tcp", tcpAddr, change...) }
func relayConn(change ...func(*connFacts)) connFacts {
	return aConn("relay", relayAddr, change...)
}

func limitedConn(change ...func(*connFacts)) connFacts {
	return aConn("limited", relayAddr, append([]func(*connFacts){limited}, change...)...)
}

func limited(c *connFacts) { c.candidate.Limited = true }
func silent(c *connFacts) {
	c.path = path{health: pathSilent, asked: ago(3 * time.Second), tries: 1}
}
func notAsked(c *connFacts) { c.path = path{} }
func asked(before time.Duration) func(*connFacts) {
	return func(c *connFacts) { c.path = path{asking: true, asked: ago(before)} }
}
func asking(c *connFacts) { c.path = path{asking: true, asked: ago(time.Second)} }
func notToBeAsked(c *connFacts) {
	c.path = path{health: pathUnknown, at: ago(4 * time.Second), asked: ago(3 * time.Second), tries: 1, wide: true}
}
func narrow(c *connFacts) { c.path.wide = false }
func named(c *connFacts)  { c.named = true }
func serves(c *connFacts) { c.serves = true }
func lacks(c *connFacts)  { c.lacks = true }
func pledged(c *connFacts) {
	c.pledged = true
}

func opened(before time.Duration) func(*connFacts) {
	return func(c *connFacts) {
		c.opened, c.path.since = ago(before), ago(before)
		c.quiet = later(c.quiet, c.opened)
	}
}

func quietFor(d time.Duration) func(*connFacts) {
	return func(c *connFacts) { c.quiet = ago(d) }
}

// carries puts labelled streams on a connection: of this side, and of the peer.
func carries(own, theirs int) func(*connFacts) {
	return func(c *connFacts) {
		c.own, c.theirs = own, theirs
		c.candidate.Labelled = own + theirs
		c.candidate.Streams = c.candidate.Labelled + c.candidate.Pinned
		c.quiet = time.Time{}
	}
}

func pins(n int) func(*connFacts) {
	return func(c *connFacts) {
		c.candidate.Pinned = n
		c.candidate.Streams = c.candidate.Labelled + n
		c.quiet = time.Time{}
	}
}

func room(n int) func(*connFacts) { return func(c *connFacts) { c.room = n } }

func drains(phase drainPhase, asked time.Duration) func(*connFacts) {
	return func(c *connFacts) {
		c.drain = drain{phase: phase, since: ago(asked), sent: ago(asked), at: ago(asked), lease: shortLease, until: ago(0), asks: 1}
	}
}

func told(t telling) func(*connFacts) { return func(c *connFacts) { c.told = t } }
func lost(since time.Duration) func(*connFacts) {
	return func(c *connFacts) { c.path.lost = ago(since) }
}
func waits(since time.Duration) func(*connFacts) {
	return func(c *connFacts) { c.waits = ago(since) }
}
func detoured(tries int, since time.Duration, running bool) func(*connFacts) {
	return func(c *connFacts) { c.detour = detourFacts{running, tries, ago(since), errNoOther} }
}
func same(s sameness) func(*connFacts) {
	return func(c *connFacts) { c.same = s }
}

// between makes facts of a peer that runs a manager and of which this side decides.
func between(conns ...connFacts) *facts {
	return &facts{
		now: noon, lower: true, wrapped: true, manages: yes, migrates: true, conns: conns,
		takeover: takeover{progress: ago(time.Second)},
	}
}

func (f *facts) with(change func(*facts)) *facts {
	change(f)
	return f
}

func follower(f *facts)    { f.lower = false }
func plainPeer(f *facts)   { f.manages, f.migrates = no, false }
func unheardOf(f *facts)   { f.manages, f.migrates = unknown, false }
func bareManager(f *facts) { f.wrapped, f.migrates, f.manages = false, false, no }
func winner(id string) func(*facts) {
	return func(f *facts) { f.winner = id }
}

// settling has the last connection come a while ago.
func settling(since time.Duration) func(*facts) {
	return func(f *facts) { f.came, f.firstOf = ago(since), ago(since) }
}

// want is what a plan should be. What is not set does not matter.
type want struct {
	winner string // "-": none
	steer  *bool
	to     string // where new streams are steered
	probes []string
	tell   *bool
	detour *bool
	fates  map[string]fate
	moves  map[string]moves
	why    map[string]string // a part of it
	state  string            // a part of it
	next   time.Duration     // the next look is at the latest then

	notBefore time.Duration // and not before
}

var (
	isSo    = func() *bool { b := true; return &b }()
	isNotSo = func() *bool { b := false; return &b }()
)

type fates = map[string]fate

func testConfig(change ...func(*config)) *config {
	cfg := defaultConfig()
	for _, f := range change {
		f(&cfg)
	}
	return &cfg
}

func byDefault(cs []policy.Candidate) (policy.Ranking, error) { return policy.Default().Rank(cs), nil }

func TestPlan(t *testing.T) {
	kept := telling{phase: tellKept, until: ago(0)}
	fresh := telling{phase: tellKept, until: in(time.Second)}
	for _, tc := range []struct {
		name  string
		facts *facts
		cfg   *config
		rank  rank
		want  want
	}{
		// One connection.
		{name: "alone", facts: between(quicConn()), want: want{winner: "quic", state: "nothing to do"}},
		{name: "alone, and streams wait: it is asked", facts: between(quicConn(waits(2*time.Second), notAsked)),
			want: want{winner: "quic", state: "asking whether it works", probes: []string{"quic"}, detour: isNotSo}},
		{name: "alone, and the answer is awaited", facts: between(quicConn(waits(3*time.Second), asking)),
			want: want{state: "asking whether it works", probes: []string{}, detour: isNotSo, next: defaultProbeTime - time.Second}},
		{name: "alone, and it works", facts: between(quicConn(waits(time.Second), func(c *connFacts) { c.path = path{health: pathAlive, at: ago(0), asked: ago(0)} })),
			want: want{state: "nothing to do", probes: []string{}, detour: isNotSo, why: map[string]string{"quic": "and it works"}}},
		{name: "alone, and silent: the peer is dialled beside it", facts: between(quicConn(waits(5*time.Second), silent)),
			want: want{state: "does not answer: the peer is dialled beside it", probes: []string{}, fates: fates{"quic": fateKeep}, detour: isSo}},
		{name: "but by the other end first, where that can", facts: between(quicConn(waits(5*time.Second), silent)).with(follower),
			want: want{state: "dialled beside it in 1.5 s", detour: isNotSo, next: detourSecond}},
		{name: "which a plain peer cannot", facts: between(quicConn(waits(5*time.Second), silent)).with(follower).with(plainPeer),
			want: want{detour: isSo}},
		{name: "alone, silent, and the dial runs", facts: between(quicConn(waits(5*time.Second), silent, detoured(1, 0, true))),
			want: want{state: "the peer is dialled beside it", detour: isNotSo}},
		{name: "alone, silent, and the dial has failed", facts: between(quicConn(waits(9*time.Second), silent, detoured(1, detourPause-time.Second, false))),
			want: want{state: "dialled beside it in 1 s", detour: isNotSo, next: time.Second}},
		{name: "alone, silent, and the dial may be repeated", facts: between(quicConn(waits(9*time.Second), silent, detoured(1, detourPause, false))),
			want: want{detour: isSo}},
		{name: "alone, silent, and all dials have failed", facts: between(quicConn(waits(time.Minute), silent, detoured(detourTries, time.Minute, false))),
			want: want{state: "there is no other: none of its addresses", detour: isNotSo, fates: fates{"quic": fateKeep}}},
		{name: "alone, and it cannot be asked", facts: between(quicConn(waits(9*time.Second), notToBeAsked)),
			want: want{detour: isNotSo, fates: fates{"quic": fateKeep}}},
		{name: "alone, silent before, and something has come since", facts: between(quicConn(waits(time.Second), silent)),
			want: want{probes: []string{"quic"}, detour: isNotSo}},
		{name: "alone, silent and exempt", facts: between(quicConn(waits(9*time.Second), silent, func(c *connFacts) { c.exempt = "it is ours" })),
			want: want{probes: []string{}, detour: isNotSo}},
		{name: "alone on a limited relay", facts: between(limitedConn(func(c *connFacts) { c.ends = in(time.Minute) })),
			want: want{winner: "limited", state: "through a relay that limits it", why: map[string]string{"limited": "the relay cuts it in 1 m 0 s"}}},

		// Settling.
		{name: "settles", facts: between(quicConn(opened(time.Second/2)), tcpConn(carries(2, 0))).with(settling(time.Second / 2)),
			want: want{state: "settling for another 500 ms", moves: map[string]moves{"tcp": moveNone}, next: 500 * time.Millisecond}},
		{name: "a fast stream does not wait for long on a limited relay",
			facts: between(limitedConn(carries(1, 1)), quicConn(opened(50*time.Millisecond))).with(settling(50 * time.Millisecond)),
			want:  want{state: "settling for another 50 ms", next: 50 * time.Millisecond}},
		{name: "and moves then", facts: between(limitedConn(carries(1, 1)), quicConn(opened(110*time.Millisecond))).with(settling(110 * time.Millisecond)),
			want: want{winner: "quic", moves: map[string]moves{"limited": moveOwn}, tell: isSo}},
		{name: "a follower moves its own at once, too, since nobody can think otherwise",
			facts: between(limitedConn(carries(1, 1)), quicConn(opened(110*time.Millisecond))).with(settling(110 * time.Millisecond)).with(follower),
			want:  want{winner: "quic", moves: map[string]moves{"limited": moveOwn}, tell: isNotSo}},
		{name: "but from one limited one to another only when the peer says so",
			facts: between(limitedConn(carries(1, 1), ends(time.Second)), secondRelay(), quicConn(func(c *connFacts) { c.closing = true })).with(follower),
			want:  want{winner: "limited2", moves: map[string]moves{"limited": moveNone}}},
		{name: "two direct ones settle for as long as ever",
			facts: between(limitedConn(carries(1, 1)), quicConn(opened(110*time.Millisecond)), tcpConn(opened(110*time.Millisecond))).with(settling(110 * time.Millisecond)),
			want:  want{state: "settling for another 890 ms"}},
		{name: "also where one of them does not answer, or is being closed",
			facts: between(tcpConn(silent), quicConn(opened(110*time.Millisecond)), limitedConn(func(c *connFacts) { c.closing = true })).with(settling(110 * time.Millisecond)),
			want:  want{state: "settling for another 890 ms"}},
		{name: "and where the peer, which decides, keeps the limited one",
			facts: between(limitedConn(named, carries(1, 1)), quicConn(opened(110*time.Millisecond))).with(settling(110 * time.Millisecond)).with(follower),
			want:  want{state: "settling for another 890 ms"}},
		{name: "a relay's end does not wait", facts: between(limitedConn(carries(1, 0), func(c *connFacts) { c.ends = in(5 * time.Second) }),
			quicConn(opened(time.Millisecond))).with(settling(time.Millisecond)),
			want: want{winner: "quic", moves: map[string]moves{"limited": moveOwn}}},
		{name: "unless it is being closed anyway", facts: between(limitedConn(func(c *connFacts) { c.ends, c.closing = in(5*time.Second), true }), quicConn(opened(time.Millisecond)), tcpConn()).with(settling(time.Millisecond)),
			want: want{winner: "-", state: "settling for another 999 ms"}},

		// Paths.
		{name: "all are asked when one has come", facts: between(quicConn(notAsked), tcpConn(notAsked, carries(1, 0))),
			want: want{winner: "-", probes: []string{"quic", "tcp"}, moves: map[string]moves{"tcp": moveNone}}},
		{name: "an answer from before is none", facts: between(quicConn(func(c *connFacts) { c.path.at, c.path.asked = ago(time.Minute), ago(time.Minute) }), tcpConn(opened(time.Second))),
			want: want{winner: "-", probes: []string{"quic"}}},
		{name: "nothing moves while the winner is asked", facts: between(limitedConn(carries(1, 1)), quicConn(opened(time.Second), asking)),
			want: want{winner: "-", state: "asking", moves: map[string]moves{"limited": moveNone}}},
		{name: "a newer one that works beats one that does not answer", facts: between(quicConn(silent, carries(2, 0)), tcpConn(opened(5*time.Second))),
			want: want{winner: "tcp", moves: map[string]moves{"quic": moveOwn}}},
		{name: "a direct one that does not answer is not closed for a relayed one", facts: between(quicConn(silent, quietFor(time.Hour), opened(2*time.Hour)), relayConn(opened(time.Minute))),
			want: want{winner: "relay", fates: fates{"quic": fateKeep}, why: map[string]string{"quic": "direct"}}},
		{name: "a busy direct one that could not be asked loses to no older one",
			facts: between(relayConn(opened(time.Hour), carries(3, 0)), quicConn(notToBeAsked, carries(8, 0))),
			want:  want{winner: "-", state: "not known", moves: map[string]moves{"quic": moveNone, "relay": moveNone}}},
		{name: "nor to a newer relayed one", facts: between(quicConn(notToBeAsked, carries(8, 0), opened(time.Hour)), relayConn()),
			want: want{winner: "-", moves: map[string]moves{"quic": moveNone}, fates: fates{"quic": fateKeep}}},
		{name: "but to a newer direct one that works", facts: between(quicConn(notToBeAsked, carries(8, 0), opened(time.Hour)), tcpConn()),
			want: want{winner: "tcp", moves: map[string]moves{"quic": moveOwn}}},
		{name: "an unlimited relay that could not be asked loses to no limited one", facts: between(relayConn(notToBeAsked, opened(time.Hour)), limitedConn()),
			want: want{winner: "-", state: "not known"}},
		{name: "but to a newer unlimited one", facts: between(aConn("old", relayAddr, notToBeAsked, carries(1, 0), opened(time.Hour)), relayConn()),
			want: want{winner: "relay"}},
		{name: "a limited one that could not be asked loses to a newer one, where there has to be a choice",
			facts: between(limitedConn(ends(5*time.Second)), aConn("old", relayAddr, limited, notToBeAsked, carries(1, 0), opened(time.Hour)), secondRelay()),
			want:  want{winner: "limited2"}},
		{name: "a path that swallows what is large is none", facts: between(relayConn(opened(time.Hour), carries(3, 0)), quicConn(narrow)),
			want: want{winner: "-", moves: map[string]moves{"relay": moveNone}}},
		{name: "the oldest has carried what there was", facts: between(quicConn(narrow, opened(time.Hour)), tcpConn()),
			want: want{winner: "quic"}},
		{name: "none answers", facts: between(quicConn(silent, carries(1, 0)), tcpConn(silent)),
			want: want{winner: "-", state: "no connection answers", fates: fates{"quic": fateKeep, "tcp": fateKeep}, steer: isNotSo}},
		{name: "one that the peer wants to close is better than one that does not answer", facts: between(quicConn(silent, carries(1, 1)), tcpConn(pledged)).with(follower),
			want: want{winner: "tcp", steer: isSo}},
		{name: "or one that is being closed, or that its relay is about to cut", facts: between(quicConn(pledged, func(c *connFacts) { c.closing = true }), aConn("old", quicAddr, pledged, silent), limitedConn(ends(time.Second)), tcpConn(pledged)),
			want: want{winner: "tcp", why: map[string]string{"quic": "being closed", "old": "the peer wants to close it", "limited": "about to cut it"}}},
		{name: "one that the peer wants to close, and keeps all the same, is as good as any", facts: between(quicConn(pledged, named), tcpConn(drains(drainConfirmed, 0))),
			want: want{winner: "quic", fates: fates{"tcp": fateClose}}},
		{name: "what is used is asked again soon", facts: between(quicConn(pins(1), func(c *connFacts) {
			c.path.at, c.path.asked, c.used = ago(2*time.Second), ago(2*time.Second), ago(time.Second)
		}), tcpConn(pins(1))).with(winner("quic")),
			want: want{winner: "quic", probes: []string{"quic"}}},
		{name: "by a follower as well", facts: between(quicConn(pins(1), func(c *connFacts) {
			c.path.at, c.path.asked, c.used = ago(2*time.Second), ago(2*time.Second), ago(time.Second)
		}), tcpConn(pins(1))).with(winner("quic")).with(follower),
			want: want{winner: "quic", probes: []string{"quic"}}},
		{name: "a path that carries only what is small so far is asked for more, while new streams go elsewhere", facts: between(tcpConn(opened(time.Hour)), quicConn(narrow)),
			want: want{winner: "-", state: "asking", steer: isSo, probes: []string{"quic (large)"}}},
		{name: "streams that are well leave for what works now, not for what worked before", facts: between(tcpConn(opened(time.Hour), carries(2, 2)), quicConn(func(c *connFacts) { c.path.at = ago(time.Second) })),
			want: want{winner: "quic", moves: map[string]moves{"tcp": moveNone}, probes: []string{"quic"}}},
		{name: "what is idle is not asked all the time", facts: between(quicConn(func(c *connFacts) { c.path.at, c.path.asked = ago(20*time.Second), ago(20*time.Second) }), tcpConn(quietFor(time.Second))).with(winner("quic")),
			want: want{winner: "quic", probes: []string{}}},

		// Who moves what.
		{name: "each end moves what it opened", facts: between(limitedConn(carries(2, 3)), quicConn(told(fresh))),
			want: want{winner: "quic", moves: map[string]moves{"limited": moveOwn}, tell: isNotSo, next: time.Second}},
		{name: "what the peer leaves, this side moves", facts: between(limitedConn(carries(2, 3)), quicConn(told(kept))),
			want: want{moves: map[string]moves{"limited": moveAll}}},
		{name: "a peer that only migrates moves nothing", facts: between(limitedConn(carries(2, 3)), quicConn()).with(func(f *facts) { f.manages = no }),
			want: want{moves: map[string]moves{"limited": moveAll}, tell: isNotSo}},
		{name: "one of which nothing is known cannot be told, and is not waited for in a takeover", facts: between(tcpConn(carries(1, 1)), quicConn()).with(follower).with(func(f *facts) { f.manages, f.takeover.progress = unknown, ago(defaultTakeover) }),
			want: want{winner: "quic", tell: isNotSo, moves: map[string]moves{"tcp": moveAll}}},
		{name: "what the peer has to move does not hurry a side that has moved its own", facts: between(limitedConn(carries(2, 0)), quicConn(told(kept))),
			want: want{moves: map[string]moves{"limited": moveOwn}, notBefore: time.Second}},
		{name: "a follower moves its own to the connection that the peer names", facts: between(tcpConn(named, told(telling{})), quicConn(carries(2, 2))).with(follower),
			want: want{winner: "tcp", moves: map[string]moves{"quic": moveOwn}}},
		{name: "no more than that after a takeover, until the next one", facts: between(tcpConn(named, told(kept)), quicConn(carries(2, 2))).with(follower).with(func(f *facts) { f.takeover.times = 1 }),
			want: want{winner: "tcp", moves: map[string]moves{"quic": moveOwn}}},
		{name: "the one that decides does not follow", facts: between(quicConn(), tcpConn(named, carries(1, 1))),
			want: want{winner: "quic", moves: map[string]moves{"tcp": moveOwn}}},
		{name: "and nothing before", facts: between(tcpConn(carries(1, 1)), quicConn()).with(follower),
			want: want{winner: "quic", moves: map[string]moves{"tcp": moveNone}, fates: fates{"tcp": fateWait}, why: map[string]string{"tcp": "stream"}}},
		{name: "a follower takes over", facts: between(tcpConn(carries(1, 1)), quicConn()).with(follower).with(func(f *facts) { f.takeover.progress = ago(defaultTakeover) }),
			want: want{winner: "quic", moves: map[string]moves{"tcp": moveNone}, tell: isSo}},
		{name: "once it has told, and nobody objects", facts: between(tcpConn(carries(1, 1)), quicConn(told(fresh))).with(follower).with(func(f *facts) { f.takeover.progress = ago(defaultTakeover) }),
			want: want{winner: "quic", moves: map[string]moves{"tcp": moveAll}, tell: isNotSo}},
		{name: "or nobody answers", facts: between(tcpConn(carries(1, 1)), quicConn(told(telling{phase: tellFailed, until: in(time.Second)}))).with(follower).with(func(f *facts) { f.takeover.progress = ago(defaultTakeover) }),
			want: want{winner: "quic", moves: map[string]moves{"tcp": moveAll}}},
		{name: "not where the one that decides is there", facts: between(tcpConn(carries(1, 1)), quicConn(told(telling{phase: tellRefused, until: in(time.Second)}))).with(follower).with(func(f *facts) { f.takeover.progress = ago(defaultTakeover) }),
			want: want{winner: "quic", moves: map[string]moves{"tcp": moveNone}}},
		{name: "later each time", facts: between(tcpConn(carries(1, 1)), quicConn()).with(follower).with(func(f *facts) {
			f.takeover.progress, f.takeover.times = ago(defaultTakeover), 1
		}), want: want{winner: "quic", moves: map[string]moves{"tcp": moveNone}}},
		{name: "the winner has no room", facts: between(tcpConn(carries(100, 0)), quicConn(room(0))),
			want: want{winner: "quic", moves: map[string]moves{"tcp": moveOwn}, why: map[string]string{"tcp": "room"}}},

		// Who decides.
		{name: "a follower without the peer's word tells what it waits for", facts: between(tcpConn(carries(2, 1)), quicConn()).with(follower),
			want: want{why: map[string]string{"tcp": "3 streams to move, once the peer says where to"}}},
		{name: "a follower looks again when it may take over", facts: between(tcpConn(carries(1, 1)), quicConn()).with(follower).with(func(f *facts) { f.takeover.progress = ago(defaultTakeover - time.Second) }),
			want: want{state: "following, takes over in 1 s", next: time.Second}},
		{name: "a peer without a manager is decided for, whatever its ID", facts: between(quicConn(opened(time.Hour)), tcpConn(opened(time.Hour), quietFor(time.Minute), same(sameYes))).with(plainPeer).with(follower),
			want: want{fates: fates{"tcp": fateClose}}},
		{name: "a bare manager leaves it to a peer that runs one", facts: between(quicConn(opened(time.Hour)), tcpConn(opened(time.Hour), quietFor(time.Hour))).with(bareManager).with(func(f *facts) { f.manages = yes }),
			want: want{fates: fates{"tcp": fateWait}, why: map[string]string{"tcp": "the peer decides"}}},
		{name: "unless it is told to, and then it asks nobody", facts: between(quicConn(opened(time.Hour)), tcpConn(opened(time.Hour))).with(bareManager).with(func(f *facts) { f.manages, f.forced = yes, true }),
			want: want{tell: isNotSo, fates: fates{"tcp": fateWait}, why: map[string]string{"tcp": "quiet for 30 s of 1 m 0 s"}}},
		{name: "and to a lower one that may be bare, too", facts: between(quicConn(opened(time.Hour)), tcpConn(opened(time.Hour), quietFor(time.Hour))).with(bareManager).with(follower),
			want: want{fates: fates{"tcp": fateWait}, why: map[string]string{"tcp": "the peer decides"}}},
		{name: "after a takeover it goes on closing, and moves nothing before the next one", facts: between(tcpConn(opened(time.Hour), quietFor(time.Hour), drains(drainConfirmed, 0)), quicConn(opened(time.Hour))).with(follower).with(func(f *facts) { f.takeover.times = 1 }),
			want: want{state: "taken over", tell: isNotSo, fates: fates{"tcp": fateClose}}},
		{name: "so it does after Consolidate", facts: between(tcpConn(opened(time.Hour), quietFor(time.Hour), drains(drainConfirmed, 0)), quicConn(opened(time.Hour))).with(follower).with(func(f *facts) { f.takeover.forced = true }),
			want: want{tell: isNotSo, fates: fates{"tcp": fateClose}}},
		{name: "Consolidate does not wait for the one that decides", facts: between(limitedConn(carries(1, 1)), quicConn(opened(time.Millisecond))).with(settling(time.Millisecond)).with(follower).with(func(f *facts) { f.forced = true }),
			want: want{winner: "quic", tell: isSo, moves: map[string]moves{"limited": moveAll}}},
		{name: "nor for a winner to prove itself", facts: between(relayConn(opened(time.Hour), carries(1, 0)), quicConn(opened(time.Second))).with(func(f *facts) { f.forced, f.deaths = true, map[pathKind]int{{udp: true}: 3} }),
			want: want{winner: "quic", moves: map[string]moves{"relay": moveOwn}}},

		// What is known of processes.
		{name: "a connection that does not answer says nothing of who the peer is now", facts: between(tcpConn(silent, func(c *connFacts) { c.instance = 1 }), quicConn(opened(5*time.Second), func(c *connFacts) { c.instance = 2 })),
			want: want{winner: "quic", steer: isSo}},
		{name: "nor one that is being closed", facts: between(tcpConn(lacks, func(c *connFacts) { c.closing = true }), quicConn(serves)),
			want: want{winner: "quic", fates: fates{"tcp": fateKeep}, why: map[string]string{"tcp": "being closed"}}},
		{name: "two processes are asked all the same whether they are there", facts: between(quicConn(notAsked, func(c *connFacts) { c.instance = 1 }), tcpConn(notAsked, func(c *connFacts) { c.instance = 2 })),
			want: want{winner: "-", probes: []string{"quic", "tcp"}}},
		{name: "two processes, however many connections the last one has", facts: between(quicConn(func(c *connFacts) { c.instance = 1 }), tcpConn(func(c *connFacts) { c.instance = 2 }), aConn("third", "/ip4/9.9.9.9/tcp/1", func(c *connFacts) { c.instance = 2 })),
			want: want{winner: "-", state: "different processes"}},
		{name: "one process", facts: between(quicConn(func(c *connFacts) { c.instance = 1 }), tcpConn(func(c *connFacts) { c.instance = 1 }), aConn("third", "/ip4/9.9.9.9/tcp/1")),
			want: want{winner: "quic"}},

		// When paths are asked again.
		{name: "a large question that was not answered is not put all the time", facts: between(tcpConn(opened(time.Hour)), quicConn(narrow, func(c *connFacts) { c.path.denied, c.path.asked = 1, ago(time.Second) })),
			want: want{winner: "-", steer: isSo, probes: []string{}, next: lateFactor*defaultProbeTime - time.Second}},
		{name: "but again", facts: between(tcpConn(opened(time.Hour)), quicConn(narrow, func(c *connFacts) { c.path.denied, c.path.asked = 1, ago(lateFactor*defaultProbeTime) })),
			want: want{winner: "-", probes: []string{"quic (large)"}}},
		{name: "a TCP connection in use to a plain peer is asked nothing large: it would not survive that on a path that swallows it",
			facts: between(relayConn(opened(time.Hour)), tcpConn(narrow, used(2*time.Second), at(2*time.Second, 2*time.Second))).with(plainPeer),
			want:  want{winner: "-", state: "not known", steer: isNotSo, probes: []string{"tcp"}}},
		{name: "nor with a stream on it", facts: between(limitedConn(opened(time.Hour)), tcpConn(narrow, pins(1), at(time.Minute, time.Minute))).with(plainPeer),
			want: want{winner: "-", state: "not known", probes: []string{"tcp"}}},
		{name: "nor where one was denied", facts: between(relayConn(opened(time.Hour)), tcpConn(denied(1), used(2*time.Second), at(2*time.Second, 2*time.Second))).with(plainPeer),
			want: want{probes: []string{"tcp"}}},
		{name: "nor one whose peer is not known yet", facts: between(relayConn(opened(time.Hour)), tcpConn(narrow, used(2*time.Second), at(2*time.Second, 2*time.Second))).with(func(f *facts) { f.manages, f.migrates = unknown, false }),
			want: want{winner: "-", probes: []string{"tcp"}}},
		{name: "but one that has not been used for long", facts: between(relayConn(opened(time.Hour)), tcpConn(narrow, quietFor(defaultPlainQuietTime), at(2*time.Second, 2*time.Second))).with(plainPeer),
			want: want{winner: "-", probes: []string{"tcp (large)"}}},
		{name: "unless another one has been chosen, and works", facts: between(quicConn(opened(time.Hour)), tcpConn(narrow, quietFor(defaultPlainQuietTime), at(time.Minute, time.Minute))).with(plainPeer).with(winner("quic")),
			want: want{winner: "quic", probes: []string{"tcp"}}},
		{name: "which one that could not be asked is not known to do", facts: between(quicConn(notToBeAsked, opened(time.Hour)), tcpConn(narrow, quietFor(defaultPlainQuietTime), at(time.Minute, time.Minute))).with(plainPeer).with(winner("quic")),
			want: want{winner: "-", probes: []string{"tcp (large)"}}},
		{name: "nor can it be chosen for itself", facts: between(quicConn(opened(time.Hour)), tcpConn(narrow, quietFor(defaultPlainQuietTime), at(time.Minute, time.Minute))).with(plainPeer).with(winner("tcp")),
			want: want{probes: []string{"tcp (large)"}}},
		{name: "nor where another one does not answer: what is new may be lost there", facts: between(quicConn(opened(time.Hour), silent), tcpConn(narrow, used(2*time.Second), at(2*time.Second, 2*time.Second))).with(plainPeer),
			want: want{probes: []string{"tcp (large)"}}},
		{name: "which does not matter once that is being closed", facts: between(quicConn(opened(time.Hour), silent, func(c *connFacts) { c.closing = true }), relayConn(opened(time.Hour)), tcpConn(narrow, used(2*time.Second), at(2*time.Second, 2*time.Second))).with(plainPeer),
			want: want{probes: []string{"tcp"}}},
		{name: "and one of QUIC, which finds out what passes", facts: between(relayConn(opened(time.Hour)), quicConn(narrow, used(2*time.Second), at(2*time.Second, 2*time.Second))).with(plainPeer),
			want: want{winner: "-", probes: []string{"quic (large)"}}},
		{name: "a TCP connection in use is asked nothing large by peers that both steer, while new streams of both go elsewhere",
			facts: between(relayConn(opened(time.Hour)), tcpConn(narrow, opened(3*time.Second), quietFor(700*time.Millisecond), used(700*time.Millisecond))),
			want:  want{winner: "-", state: "not known", steer: isSo, to: "relay", probes: []string{}, next: 300 * time.Millisecond}},
		{name: "whether the peer runs a manager", facts: between(relayConn(opened(time.Hour)), tcpConn(narrow, opened(3*time.Second), pins(1))).with(func(f *facts) { f.migrates = false }),
			want: want{winner: "-", steer: isSo, to: "relay", probes: []string{}}},
		{name: "or only moves streams", facts: between(relayConn(opened(time.Hour)), tcpConn(narrow, opened(3*time.Second), pins(1))).with(func(f *facts) { f.manages = no }),
			want: want{winner: "-", steer: isSo, to: "relay", probes: []string{}}},
		{name: "but once it is not in use", facts: between(relayConn(opened(time.Hour)), tcpConn(narrow, opened(3*time.Second), quietFor(time.Second), used(time.Second))),
			want: want{winner: "-", steer: isSo, to: "relay", probes: []string{"tcp (large)"}}},
		{name: "which a shorter quiet time says, too", cfg: testConfig(func(c *config) { c.quietTime = 50 * time.Millisecond }),
			facts: between(relayConn(opened(time.Hour)), tcpConn(narrow, opened(3*time.Second), quietFor(50*time.Millisecond), used(50*time.Millisecond))),
			want:  want{winner: "-", steer: isSo, to: "relay", probes: []string{"tcp (large)"}}},
		{name: "and no earlier than that", cfg: testConfig(func(c *config) { c.quietTime = 50 * time.Millisecond }),
			facts: between(relayConn(opened(time.Hour)), tcpConn(narrow, opened(3*time.Second), quietFor(40*time.Millisecond), used(40*time.Millisecond))),
			want:  want{probes: []string{}}},
		{name: "or has been for long", facts: between(relayConn(opened(time.Hour)), tcpConn(narrow, opened(largeWithin), pins(1), used(time.Millisecond))),
			want: want{winner: "-", steer: isSo, to: "relay", probes: []string{"tcp (large)"}}},
		{name: "nor where the peer, which decides, keeps it: its streams go there", facts: between(relayConn(opened(time.Hour)), tcpConn(narrow, named, opened(3*time.Second), used(time.Millisecond))).with(follower),
			want: want{probes: []string{"tcp (large)"}}},
		{name: "nor while another one is asked that may yet answer", facts: between(aConn("old", relayAddr, opened(time.Hour), asked(900*time.Millisecond)), relayConn(opened(time.Minute)), tcpConn(narrow, opened(3*time.Second), used(time.Millisecond))),
			want: want{probes: []string{}}},
		{name: "nor for one that is being closed, limited or not", facts: between(limitedConn(func(c *connFacts) { c.closing = true }), relayConn(opened(time.Minute)), tcpConn(narrow, opened(3*time.Second), used(time.Millisecond))),
			want: want{probes: []string{}}},
		{name: "but where it has not answered for a second", facts: between(aConn("old", relayAddr, opened(time.Hour), asked(1100*time.Millisecond)), relayConn(opened(time.Minute)), tcpConn(narrow, opened(3*time.Second), used(time.Millisecond))),
			want: want{probes: []string{"tcp (large)"}}},
		{name: "or could not be asked", facts: between(aConn("old", relayAddr, opened(time.Hour), func(c *connFacts) { c.path = path{asked: ago(900 * time.Millisecond), tries: 1} }), relayConn(opened(time.Minute)), tcpConn(narrow, opened(3*time.Second), used(time.Millisecond))),
			want: want{probes: []string{"tcp (large)"}}},
		{name: "and not where a limit is waiting", facts: between(limitedConn(opened(time.Hour)), tcpConn(narrow, opened(3*time.Second), used(time.Millisecond))),
			want: want{winner: "-", steer: isNotSo, probes: []string{"tcp (large)"}}},
		{name: "nor where another one does not answer", facts: between(aConn("old", "/ip4/9.9.9.9/tcp/1", silent, opened(time.Hour)), relayConn(opened(time.Minute)), tcpConn(narrow, opened(3*time.Second), used(time.Millisecond))),
			want: want{winner: "-", steer: isSo, to: "relay", probes: []string{"tcp (large)"}}},
		{name: "a relay takes no new streams beside one of QUIC, which survives the question", facts: between(relayConn(opened(time.Hour)), quicConn(narrow)),
			want: want{winner: "-", steer: isNotSo, probes: []string{"quic (large)"}}},
		{name: "nor beside one of TCP that could not be asked", facts: between(relayConn(opened(time.Hour)), tcpConn(notToBeAsked)),
			want: want{winner: "-", steer: isNotSo}},
		{name: "an answer that is long overdue is not waited for, whatever was asked", facts: between(tcpConn(opened(time.Hour)), quicConn(narrow, func(c *connFacts) { c.path.asking, c.path.asked = true, ago(defaultProbeTime) })),
			want: want{winner: "-", state: "not known", probes: []string{}}},
		{name: "what does not answer is asked nothing large", facts: between(tcpConn(opened(time.Hour)), quicConn(silent, func(c *connFacts) { c.path.asked = ago(lateFactor * defaultProbeTime) })),
			want: want{winner: "tcp", probes: []string{"quic"}}},
		{name: "the oldest is asked nothing large", facts: between(quicConn(narrow, opened(time.Hour), at(time.Minute, time.Minute)), tcpConn()),
			want: want{probes: []string{"quic"}}},
		{name: "what is silent is asked again after twice the time", facts: between(quicConn(silent), tcpConn(opened(5*time.Second))),
			want: want{probes: []string{}, next: lateFactor*defaultProbeTime - 3*time.Second}},
		{name: "what is being asked is not asked once more", facts: between(quicConn(asking), tcpConn()), want: want{probes: []string{}}},
		{name: "nor what is being closed", facts: between(quicConn(), tcpConn(notAsked, func(c *connFacts) { c.closing = true })), want: want{winner: "quic", probes: []string{}}},

		// Limited connections.
		{name: "no stream goes from an unlimited to a limited one, whatever the policy says", facts: between(quicConn(carries(1, 1)), limitedConn()),
			rank: func(cs []policy.Candidate) (policy.Ranking, error) {
				p, _ := policy.Parse("chain(streams, younger)")
				r := p.Rank([]policy.Candidate{cs[1], cs[0]})
				return r, nil
			},
			want: want{winner: "quic"}},
		{name: "limited ones are left alone", facts: between(limitedConn(carries(1, 0)), aConn("other", relayAddr, limited, carries(0, 1))),
			want: want{winner: "-", state: "budget", fates: fates{"limited": fateKeep, "other": fateKeep}, moves: map[string]moves{"limited": moveNone, "other": moveNone}}},
		{name: "but for one that is about to end", facts: between(limitedConn(carries(1, 0), func(c *connFacts) { c.ends = in(5 * time.Second) }), aConn("other", relayAddr, limited)),
			want: want{winner: "other", moves: map[string]moves{"limited": moveOwn}, fates: fates{"limited": fateWait}}},
		{name: "or has spent what it may carry", facts: between(limitedConn(carries(1, 0), func(c *connFacts) { c.spent = true }), aConn("other", relayAddr, limited)),
			want: want{winner: "other", moves: map[string]moves{"limited": moveOwn}, fates: fates{"limited": fateWait}}},
		{name: "which stays the winner where the others are no better", facts: between(limitedConn(ends(5*time.Second)), aConn("closing", relayAddr, limited, func(c *connFacts) { c.closing = true }), aConn("silent", relayAddr, limited, silent), aConn("other", relayAddr, limited, carries(1, 1), ends(3*time.Second))),
			want: want{winner: "other", fates: fates{"limited": fateWait}}},
		{name: "streams leave a limited one at once that the peer wants to lose", facts: between(limitedConn(carries(1, 0), func(c *connFacts) { c.pledged = true }), quicConn(func(c *connFacts) { c.named = true })).with(follower).with(settling(fastSettle)),
			want: want{winner: "quic", steer: isSo, moves: map[string]moves{"limited": moveOwn}}},
		{name: "nothing is steered to a limited one beside an unlimited one", facts: between(quicConn(func(c *connFacts) { c.path = path{} }), limitedConn(opened(time.Second))),
			want: want{winner: "-", steer: isNotSo}},
		{name: "where the unlimited one does not answer, streams that can move back are", facts: between(quicConn(silent, lost(2*defaultProbeTime)), limitedConn(opened(time.Second))),
			want: want{steer: isSo, winner: "limited", moves: map[string]moves{"quic": moveNone}}},
		{name: "but not at once", facts: between(quicConn(silent, lost(2*defaultProbeTime-time.Second)), limitedConn(opened(time.Second))),
			want: want{steer: isNotSo, winner: "limited", next: time.Second}},
		{name: "and others are not", facts: between(quicConn(silent, lost(time.Minute)), limitedConn(opened(time.Second))).with(plainPeer),
			want: want{steer: isNotSo, winner: "limited"}},

		{name: "an unlimited one that is being closed does not count for steering", facts: between(limitedConn(), quicConn(func(c *connFacts) { c.closing = true })),
			want: want{steer: isNotSo}},
		{name: "where one of the limited ones is about to end, that is", facts: between(limitedConn(ends(time.Second)), secondRelay(), quicConn(func(c *connFacts) { c.closing = true })),
			want: want{winner: "limited2", steer: isSo}},
		{name: "one that the peer wants to close, and may work, does", facts: between(limitedConn(), quicConn(pledged, notToBeAsked)),
			want: want{winner: "limited", steer: isNotSo}},
		{name: "while nothing is decided, new streams leave what is about to end", facts: between(limitedConn(ends(time.Second)), secondRelay(), quicConn(func(c *connFacts) { c.closing = true })).with(func(f *facts) { f.measuring = true }),
			want: want{winner: "-", steer: isSo, to: "limited2"}},
		{name: "and what does not answer", facts: between(limitedConn(silent), secondRelay()).with(func(f *facts) { f.measuring = true }),
			want: want{winner: "-", steer: isSo, to: "limited2"}},
		{name: "what has moved from a limited one is not closed for another", facts: between(limitedConn(drains(drainConfirmed, 0), func(c *connFacts) { c.ends = in(5 * time.Second) }), aConn("other", relayAddr, limited)),
			want: want{winner: "other", fates: fates{"limited": fateWait}, why: map[string]string{"limited": "about to cut it"}}},
		{name: "limited ones are looked at before the first ends", facts: between(limitedConn(func(c *connFacts) { c.ends = in(endingSoon + 2*time.Second) }), aConn("other", relayAddr, limited)),
			want: want{winner: "-", next: 2 * time.Second}},

		// Pruning, where the peer is asked.
		{name: "a peer that did not answer is asked again when it is time", facts: between(quicConn(), limitedConn(drains(drainFailed, time.Second))), want: want{fates: fates{"limited": fateAsk}}},
		{name: "not before", facts: between(quicConn(), limitedConn(drains(drainFailed, time.Second), func(c *connFacts) { c.drain.until = in(100 * time.Millisecond) })),
			want: want{fates: fates{"limited": fateWait}, why: map[string]string{"limited": "did not answer, it is asked again in 100 ms"}, next: 100 * time.Millisecond}},
		{name: "nor one that has refused", facts: between(quicConn(), limitedConn(drains(drainRefused, time.Second), func(c *connFacts) { c.drain.until = in(100 * time.Millisecond) })),
			want: want{fates: fates{"limited": fateKeep}, next: 100 * time.Millisecond}},
		{name: "nor while it is being asked", facts: between(quicConn(), limitedConn(pins(1), drains(drainAsked, shortLease))),
			want: want{fates: fates{"limited": fateWait}, notBefore: time.Second}},
		{name: "a stream that is just being opened keeps it", facts: between(quicConn(), limitedConn(drains(drainConfirmed, 0), func(c *connFacts) { c.quiet = time.Time{} })),
			want: want{fates: fates{"limited": fateWait}, why: map[string]string{"limited": "no stream"}}},
		{name: "a refusal ends", facts: between(quicConn(), limitedConn(drains(drainRefused, time.Second))), want: want{fates: fates{"limited": fateAsk}}},
		{name: "an agreement is renewed", facts: between(quicConn(), limitedConn(pins(1), drains(drainAgreed, shortLease/3))), want: want{fates: fates{"limited": fateAsk}}},
		{name: "also once it is confirmed", facts: between(quicConn(), limitedConn(pins(1), drains(drainConfirmed, shortLease/3))), want: want{fates: fates{"limited": fateAsk}}},
		{name: "a migration that has not returned keeps it", facts: between(quicConn(), limitedConn(drains(drainConfirmed, 0), func(c *connFacts) { c.moving = 1 })), want: want{fates: fates{"limited": fateWait}, why: map[string]string{"limited": "1 stream moving"}}},
		{name: "streams that failed are tried again", facts: between(quicConn(), limitedConn(pins(1), func(c *connFacts) { c.retries, c.retryAt = 1, in(700*time.Millisecond) })),
			want: want{state: "1 stream failed to move, next attempt in 700 ms", why: map[string]string{"limited": "1 stream failed to move, next attempt in 700 ms"}, next: 700 * time.Millisecond}},
		{name: "the peer is asked at once", facts: between(quicConn(), limitedConn(pins(1))), want: want{fates: fates{"limited": fateAsk}}},
		{name: "and again when both are quiet", facts: between(quicConn(), limitedConn(drains(drainBusy, 5*time.Second))), want: want{fates: fates{"limited": fateAsk}}},
		{name: "not while there is a stream here", facts: between(quicConn(), limitedConn(pins(1), drains(drainBusy, 5*time.Second))), want: want{fates: fates{"limited": fateWait}}},
		{name: "but to renew its lease", facts: between(quicConn(), limitedConn(pins(1), drains(drainBusy, shortLease/3))), want: want{fates: fates{"limited": fateAsk}}},
		{name: "the winner answers before the last question", facts: between(quicConn(func(c *connFacts) { c.path.at = ago(3 * time.Second) }), limitedConn(drains(drainAgreed, 2*time.Second))),
			want: want{fates: fates{"limited": fateWait}, probes: []string{"quic"}}},
		{name: "once, however many go", facts: between(quicConn(func(c *connFacts) { c.path.at = ago(3 * time.Second) }), limitedConn(drains(drainAgreed, 2*time.Second)), tcpConn(notToBeAsked, at(7*time.Second, 7*time.Second), drains(drainAgreed, 2*time.Second))),
			want: want{fates: fates{"limited": fateWait, "tcp": fateWait}, probes: []string{"tcp", "quic"}}},
		{name: "and not again while its answer is awaited", facts: between(quicConn(func(c *connFacts) { c.path.at, c.path.asking = ago(3*time.Second), true }), limitedConn(drains(drainAgreed, 2*time.Second))),
			want: want{fates: fates{"limited": fateWait}, probes: []string{}}},
		{name: "then it is put", facts: between(quicConn(), limitedConn(drains(drainAgreed, 2*time.Second))), want: want{fates: fates{"limited": fateConfirm}}},
		{name: "and the loser closed", facts: between(quicConn(), limitedConn(drains(drainConfirmed, 100*time.Millisecond))), want: want{fates: fates{"limited": fateClose}}},
		{name: "unless the answer is old", facts: between(quicConn(), limitedConn(drains(drainConfirmed, 5100*time.Millisecond))), want: want{fates: fates{"limited": fateAsk}}},
		{name: "which it is not so soon", facts: between(quicConn(), limitedConn(drains(drainConfirmed, 4900*time.Millisecond))), want: want{fates: fates{"limited": fateClose}}},
		{name: "or it has not been quiet for long", facts: between(quicConn(), limitedConn(quietFor(time.Second), drains(drainConfirmed, 100*time.Millisecond))),
			want: want{fates: fates{"limited": fateWait}, why: map[string]string{"limited": "quiet for 1 s of 2 s"}}},
		{name: "a refusal is kept to", facts: between(quicConn(), limitedConn(drains(drainRefused, time.Second), func(c *connFacts) { c.drain.until, c.drain.reason = in(time.Minute), "it is mine" })),
			want: want{fates: fates{"limited": fateKeep}, why: map[string]string{"limited": `kept: the peer refused: "it is mine"`}}},
		{name: "a follower asks nothing", facts: between(quicConn(), limitedConn()).with(follower), want: want{fates: fates{"limited": fateWait}, why: map[string]string{"limited": "the peer decides"}}},
		{name: "nothing is closed while the peer may close the winner", facts: between(quicConn(), tcpConn(drains(drainConfirmed, 0)), aConn("third", "/ip4/9.9.9.9/tcp/1", pledged)).with(func(f *facts) {
			f.conns[0].pledged = true
			f.conns[0].named = false
		}), want: want{winner: "tcp"}},

		// A winner proves itself.
		{name: "a winner has to live before the last relay goes", facts: between(relayConn(opened(time.Hour), drains(drainConfirmed, 0)), quicConn(opened(20*time.Second))),
			want: want{winner: "quic", fates: fates{"relay": fateWait}, why: map[string]string{"relay": "proved itself, in 10 s"}}},
		{name: "and to answer once more then", facts: between(relayConn(opened(time.Hour), drains(drainConfirmed, 0)), quicConn(opened(31*time.Second), at(2*time.Second, 2*time.Second))),
			want: want{winner: "quic", fates: fates{"relay": fateWait}, probes: []string{"quic"}}},
		{name: "and streams stay there until then", facts: between(relayConn(opened(time.Hour), carries(2, 2)), quicConn(opened(20*time.Second))),
			want: want{winner: "quic", steer: isSo, moves: map[string]moves{"relay": moveNone}, why: map[string]string{"relay": "proved itself, in 10 s"}}},
		{name: "then they move", facts: between(relayConn(opened(time.Hour), carries(2, 2)), quicConn(opened(31*time.Second))),
			want: want{winner: "quic", moves: map[string]moves{"relay": moveOwn}}},
		{name: "at once, not at the next look", facts: between(relayConn(opened(time.Hour), carries(2, 2)), quicConn(opened(29900*time.Millisecond))),
			want: want{winner: "quic", moves: map[string]moves{"relay": moveNone}, next: 100 * time.Millisecond}},
		{name: "a second relay has to live as well", facts: between(relayConn(opened(time.Hour), carries(2, 2)), aConn("relay2", relayAddr, opened(20*time.Second), carries(9, 9))),
			want: want{winner: "relay2", moves: map[string]moves{"relay": moveNone}, why: map[string]string{"relay": "proved itself, in 10 s"}}},
		{name: "Consolidate does not wait to close the relay, either", facts: between(relayConn(opened(time.Hour), drains(drainConfirmed, 0)), quicConn(opened(2*time.Second))).with(func(f *facts) { f.forced = true }),
			want: want{winner: "quic", fates: fates{"relay": fateClose}}},
		{name: "a direct one can be dialled again, and waits for a tenth", facts: between(tcpConn(opened(5*time.Second), drains(drainConfirmed, 0)), quicConn(opened(2900*time.Millisecond))),
			want: want{winner: "quic", fates: fates{"tcp": fateWait}}},
		{name: "no longer", facts: between(tcpConn(opened(5*time.Second), drains(drainConfirmed, 0)), quicConn(opened(3100*time.Millisecond), func(c *connFacts) { c.path.at = ago(0) })),
			want: want{winner: "quic", fates: fates{"tcp": fateClose}}},
		{name: "streams move at once between what came together", facts: between(tcpConn(opened(5*time.Second), carries(2, 2)), quicConn(opened(2900*time.Millisecond))),
			want: want{winner: "quic", moves: map[string]moves{"tcp": moveOwn}}},
		{name: "a direct one that has proved itself is not left before the winner has, too", facts: between(tcpConn(opened(time.Hour), carries(2, 2)), quicConn(opened(20*time.Second))),
			want: want{winner: "quic", steer: isSo, moves: map[string]moves{"tcp": moveNone}, why: map[string]string{"tcp": "proved itself, in 10 s"}}},
		{name: "nor closed", facts: between(tcpConn(opened(time.Hour), drains(drainConfirmed, 0)), quicConn(opened(20*time.Second))),
			want: want{winner: "quic", fates: fates{"tcp": fateWait}, why: map[string]string{"tcp": "proved itself, in 10 s"}}},
		{name: "then it is left", facts: between(tcpConn(opened(time.Hour), carries(2, 2)), quicConn(opened(31*time.Second))),
			want: want{winner: "quic", moves: map[string]moves{"tcp": moveOwn}}},
		{name: "at once if it does not answer", facts: between(tcpConn(opened(time.Hour), carries(2, 2), silent), quicConn(opened(20*time.Second))),
			want: want{winner: "quic", moves: map[string]moves{"tcp": moveOwn}}},
		{name: "or has been silent since the winner came", facts: between(tcpConn(opened(time.Hour), carries(2, 2), func(c *connFacts) { c.path.since = ago(10 * time.Second) }), quicConn(opened(20*time.Second))),
			want: want{winner: "quic", moves: map[string]moves{"tcp": moveOwn}}},
		{name: "or is of the winner's kind, which fails as it does", facts: between(aConn("ws", "/ip4/9.9.9.9/tcp/1/ws", opened(time.Hour), carries(2, 2)), tcpConn(opened(20*time.Second))),
			want: want{winner: "tcp", moves: map[string]moves{"ws": moveOwn}}},
		{name: "a silence starts it again", facts: between(relayConn(opened(time.Hour), carries(2, 2)), quicConn(opened(time.Hour/2), func(c *connFacts) { c.path.since = ago(5 * time.Second) })),
			want: want{winner: "quic", moves: map[string]moves{"relay": moveNone}}},
		{name: "with a third one nothing has to be proved to close", facts: between(tcpConn(opened(time.Hour), drains(drainConfirmed, 0)), quicConn(opened(2*time.Second)), aConn("third", "/ip4/9.9.9.9/tcp/1", opened(time.Hour))),
			want: want{winner: "quic", fates: fates{"tcp": fateClose}}},
		{name: "which one that does not answer is not", facts: between(tcpConn(opened(time.Hour), drains(drainConfirmed, 0)), quicConn(opened(2*time.Second)), aConn("third", "/ip4/9.9.9.9/tcp/1", opened(time.Hour), silent)),
			want: want{winner: "quic", fates: fates{"tcp": fateWait}, why: map[string]string{"tcp": "proved itself, in 28 s"}}},
		{name: "and which counts for one that the peer wants to close, too", facts: between(tcpConn(pledged, opened(time.Hour), drains(drainConfirmed, 0)), quicConn(opened(2*time.Second)), aConn("third", "/ip4/9.9.9.9/tcp/1", opened(time.Hour))),
			want: want{winner: "quic", fates: fates{"tcp": fateClose}}},
		{name: "one that died young is not relied on at once", facts: between(tcpConn(opened(time.Hour), carries(2, 2)), quicConn(opened(20*time.Second))).with(func(f *facts) { f.deaths = map[pathKind]int{{udp: true}: 1} }),
			want: want{winner: "tcp", moves: map[string]moves{"tcp": moveNone}, why: map[string]string{"quic": "died young"}}},
		{name: "twice as long each time", facts: between(tcpConn(opened(time.Hour)), quicConn(opened(100*time.Second))).with(func(f *facts) { f.deaths = map[pathKind]int{{udp: true}: 2} }),
			want: want{winner: "tcp"}},
		{name: "then it wins", facts: between(tcpConn(opened(time.Hour)), quicConn(opened(130*time.Second))).with(func(f *facts) { f.deaths = map[pathKind]int{{udp: true}: 2} }),
			want: want{winner: "quic"}},
		{name: "a limited relay is left whatever died", facts: between(limitedConn(carries(1, 1)), quicConn(opened(time.Second))).with(func(f *facts) { f.deaths = map[pathKind]int{{udp: true}: 5} }),
			want: want{winner: "quic", moves: map[string]moves{"limited": moveOwn}}},
		{name: "and a limited one has to prove itself beside any other", facts: between(limitedConn(opened(10*time.Second)), quicConn()).with(func(f *facts) { f.deaths = map[pathKind]int{{udp: true, relayed: true}: 1} }),
			want: want{winner: "quic", why: map[string]string{"limited": "died young"}}},
		{name: "one that may win is looked at when it has proved itself", facts: between(tcpConn(), quicConn(opened(59500*time.Millisecond))).with(follower).with(func(f *facts) { f.deaths = map[pathKind]int{{udp: true}: 1} }),
			want: want{winner: "tcp", next: 500 * time.Millisecond}},
		{name: "one stands by", cfg: testConfig(func(c *config) { c.standby = true }), facts: between(quicConn(), tcpConn(drains(drainConfirmed, 0)), aConn("third", "/ip4/9.9.9.9/tcp/1", drains(drainConfirmed, 0))),
			want: want{winner: "quic", fates: fates{"tcp": fateKeep, "third": fateClose}, why: map[string]string{"tcp": "stands by"}}},
		{name: "the one that ranks first, where another one is still kept", cfg: testConfig(func(c *config) { c.standby = true }), facts: between(quicConn(), tcpConn()).with(winner("tcp")),
			want: want{winner: "tcp", fates: fates{"quic": fateKeep}, why: map[string]string{"quic": "stands by"}}},
		{name: "not one that has gone, is limited, or does not answer", cfg: testConfig(func(c *config) { c.standby = true }), facts: between(quicConn(), tcpConn(), limitedConn(), aConn("old", "/ip4/9.9.9.9/tcp/1", silent)).with(winner("tcp")).with(func(f *facts) {
			f.ranking.Order = []policy.Candidate{f.conns[1].candidate, {ID: "gone"}, f.conns[2].candidate, f.conns[3].candidate, f.conns[0].candidate}
		}),
			want: want{winner: "tcp", fates: fates{"quic": fateKeep, "limited": fateAsk, "old": fateAsk}, why: map[string]string{"quic": "stands by"}}},
		{name: "whatever is on it, that is why it stays", cfg: testConfig(func(c *config) { c.standby = true }), facts: between(quicConn(), tcpConn(carries(1, 1))),
			want: want{winner: "quic", moves: map[string]moves{"tcp": moveOwn}, why: map[string]string{"tcp": "stands by"}}},

		// Peers that cannot be asked.
		{name: "a plain peer's loser needs a minute", facts: between(quicConn(opened(time.Hour)), tcpConn(opened(time.Hour), quietFor(59*time.Second))).with(plainPeer),
			want: want{winner: "quic", fates: fates{"tcp": fateWait}, why: map[string]string{"tcp": "quiet for 59 s of 1 m 0 s"}}},
		{name: "and to lead to the same process", facts: between(quicConn(opened(time.Hour)), tcpConn(opened(time.Hour), quietFor(time.Minute))).with(plainPeer),
			want: want{winner: "quic", fates: fates{"tcp": fateCompare}}},
		{name: "which it does not", facts: between(quicConn(opened(time.Hour)), tcpConn(opened(time.Hour), quietFor(time.Minute), same(sameNot))).with(plainPeer),
			want: want{winner: "quic", fates: fates{"tcp": fateKeep}, why: map[string]string{"tcp": "same process"}}},
		{name: "or does", facts: between(quicConn(opened(time.Hour)), tcpConn(opened(time.Hour), quietFor(time.Minute), same(sameYes))).with(plainPeer),
			want: want{winner: "quic", fates: fates{"tcp": fateClose}}},
		{name: "what connections have answered does not make it a plain one", facts: between(quicConn(opened(time.Hour), lacks), tcpConn(opened(time.Hour), quietFor(time.Hour), same(sameYes), lacks)).with(unheardOf),
			want: want{fates: fates{"tcp": fateWait}, why: map[string]string{"tcp": "not been identified"}}},
		{name: "a peer of which nothing is known keeps all", facts: between(quicConn(opened(time.Hour)), tcpConn(opened(time.Hour), quietFor(time.Hour), same(sameYes))).with(unheardOf),
			want: want{fates: fates{"tcp": fateWait}, why: map[string]string{"tcp": "not been identified"}}},
		{name: "also where it decides", facts: between(quicConn(opened(time.Hour)), tcpConn(opened(time.Hour), quietFor(time.Hour), same(sameYes))).with(unheardOf).with(follower).with(func(f *facts) { f.takeover.progress = ago(time.Hour) }),
			want: want{fates: fates{"tcp": fateWait}}},
		{name: "a bare manager goes by what it sees", facts: between(quicConn(opened(time.Hour)), tcpConn(opened(time.Hour), quietFor(time.Minute))).with(bareManager),
			want: want{winner: "quic", fates: fates{"tcp": fateClose}}},

		{name: "replicas that share a key, one of them with a manager", facts: between(quicConn(carries(1, 1), told(telling{phase: tellFailed}), lacks), tcpConn(drains(drainAgreed, time.Second), serves)),
			want: want{winner: "-", steer: isNotSo, state: "different processes", fates: fates{"quic": fateKeep, "tcp": fateKeep}, moves: map[string]moves{"quic": moveNone, "tcp": moveNone}}},

		{name: "replicas that share a key, both with a manager", facts: between(quicConn(carries(1, 1), func(c *connFacts) { c.instance = 1 }), tcpConn(drains(drainConfirmed, 0), func(c *connFacts) { c.instance = 2 })),
			want: want{winner: "-", steer: isNotSo, state: "different processes", fates: fates{"quic": fateKeep, "tcp": fateKeep}, moves: map[string]moves{"quic": moveNone, "tcp": moveNone}}},
		{name: "a manager that has been switched off", facts: between(quicConn(opened(time.Hour)), tcpConn(opened(time.Hour), quietFor(2*time.Minute), same(sameYes), serves, lacks)),
			want: want{winner: "quic", fates: fates{"tcp": fateClose}, tell: isNotSo}},
		{name: "or was never there", facts: between(quicConn(opened(time.Hour), lacks), tcpConn(opened(time.Hour), quietFor(2*time.Minute), same(sameYes), lacks)),
			want: want{winner: "quic", fates: fates{"tcp": fateClose}, tell: isNotSo}},

		// Policies.
		{name: "a policy that names what it was not given", rank: func([]policy.Candidate) (policy.Ranking, error) {
			return policy.Ranking{Order: []policy.Candidate{{ID: "gone"}}}, nil
		}, facts: between(quicConn(), tcpConn(carries(1, 1))), want: want{winner: "-", state: "names no connection", steer: isNotSo, moves: map[string]moves{"tcp": moveNone}}},
		{name: "or nothing", rank: func([]policy.Candidate) (policy.Ranking, error) { return policy.Ranking{}, nil },
			facts: between(quicConn(), tcpConn(carries(1, 1))), want: want{winner: "-", state: "names no connection", fates: fates{"quic": fateKeep, "tcp": fateKeep}}},
		{name: "or one that does not answer, which it was not given", rank: func([]policy.Candidate) (policy.Ranking, error) {
			return policy.Ranking{Order: []policy.Candidate{{ID: "quic"}}}, nil
		}, facts: between(quicConn(silent), tcpConn(opened(5*time.Second)), relayConn()), want: want{winner: "-", state: "names no connection"}},
		{name: "what it says of others is passed over", rank: func(cs []policy.Candidate) (policy.Ranking, error) {
			return policy.Ranking{Order: cs, Decisions: []policy.Decision{{Winner: cs[0], Loser: policy.Candidate{ID: "gone"}}}}, nil
		}, facts: between(quicConn(), tcpConn()), want: want{winner: "quic"}},
		{name: "also where the winner so far is kept", rank: func(cs []policy.Candidate) (policy.Ranking, error) {
			return policy.Ranking{Order: cs, Decisions: []policy.Decision{{Winner: cs[0], Loser: cs[1]}}}, nil
		}, facts: between(quicConn(), tcpConn()).with(winner("tcp")).with(func(f *facts) {
			f.ranking = policy.Ranking{Order: []policy.Candidate{f.conns[1].candidate}, Decisions: []policy.Decision{{Winner: f.conns[1].candidate, Loser: policy.Candidate{ID: "gone"}}}}
		}), want: want{winner: "tcp"}},
		{name: "or fails", rank: func([]policy.Candidate) (policy.Ranking, error) { return policy.Ranking{}, errors.New("oh") },
			facts: between(quicConn(), tcpConn(carries(1, 1))), want: want{winner: "-", state: "oh"}},
		{name: "new streams avoid what does not answer all the same", rank: func([]policy.Candidate) (policy.Ranking, error) { return policy.Ranking{}, errors.New("oh") },
			facts: between(quicConn(silent, carries(1, 1)), tcpConn(opened(5*time.Second))), want: want{winner: "-", state: "oh", steer: isSo, moves: map[string]moves{"quic": moveNone}}},
		{name: "for one that is known to work", rank: func([]policy.Candidate) (policy.Ranking, error) { return policy.Ranking{}, errors.New("oh") },
			facts: between(quicConn(silent), aConn("quic2", quicAddr, notToBeAsked), tcpConn()), want: want{winner: "-", steer: isSo, to: "tcp"}},
		{name: "and has no limit", rank: func([]policy.Candidate) (policy.Ranking, error) { return policy.Ranking{}, errors.New("oh") },
			facts: between(quicConn(silent), limitedConn()), want: want{winner: "-", steer: isNotSo}},
		{name: "a better one has to stay better", facts: between(quicConn(), tcpConn(carries(1, 1))).with(winner("tcp")),
			want: want{winner: "tcp", state: "ranks first now", next: patienceIntervals * defaultInterval}},
		{name: "and wins then", facts: between(quicConn(pins(1)), tcpConn(pins(1))).with(winner("tcp")).with(func(f *facts) {
			f.better, f.since = "quic", ago(patienceIntervals*defaultInterval-200*time.Millisecond)
		}), want: want{winner: "tcp", next: 200 * time.Millisecond}},
		{name: "where nothing has come or gone", facts: between(quicConn(), tcpConn(carries(1, 1))).with(winner("tcp")).with(func(f *facts) { f.fresh = true }),
			want: want{winner: "quic"}},

		// What is exempt.
		{name: "an exempt peer", facts: between(quicConn(), tcpConn(carries(1, 1), drains(drainConfirmed, 0))).with(func(f *facts) { f.exempt = "it is ours" }),
			want: want{winner: "-", steer: isNotSo, fates: fates{"quic": fateKeep, "tcp": fateKeep}, state: "it is ours"}},
		{name: "an exempt connection", facts: between(quicConn(), tcpConn(carries(1, 1), drains(drainConfirmed, 0), func(c *connFacts) { c.exempt = "it is ours" })),
			want: want{winner: "quic", fates: fates{"tcp": fateKeep}, moves: map[string]moves{"tcp": moveNone}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg, by := tc.cfg, tc.rank
			if cfg == nil {
				cfg = testConfig()
			}
			if by == nil {
				by = byDefault
			}
			p := decide(cfg, by, tc.facts)
			index := func(id string) int {
				for i := range tc.facts.conns {
					if tc.facts.conns[i].id() == id {
						return i
					}
				}
				t.Fatalf("there is no connection %q", id)
				return -1
			}
			got := "-"
			if p.winner >= 0 && (p.decided || len(tc.facts.conns) == 1) {
				got = tc.facts.conns[p.winner].id()
			}
			if tc.want.winner != "" {
				require.Equal(t, tc.want.winner, got, "the winner; %s", p.state)
			}
			if tc.want.steer != nil {
				require.Equal(t, *tc.want.steer, p.steer, "new streams are steered")
			}
			if tc.want.to != "" {
				require.Equal(t, index(tc.want.to), p.winner, "where new streams are steered")
			}
			if tc.want.tell != nil {
				require.Equal(t, *tc.want.tell, p.tell, "the peer is told")
			}
			if tc.want.detour != nil {
				require.Equal(t, *tc.want.detour, p.detour, "the peer is dialled beside its connection: %s", p.state)
			}
			if tc.want.probes != nil {
				probes := []string{}
				for _, q := range p.probe {
					what := tc.facts.conns[q.conn].id()
					if q.large {
						what += " (large)"
					}
					probes = append(probes, what)
				}
				require.ElementsMatch(t, tc.want.probes, probes, "connections that are asked")
			}
			for id, want := range tc.want.fates {
				require.Equal(t, want, p.verdicts[index(id)].fate, "fate of %s: %s", id, p.verdicts[index(id)].why)
			}
			for id, want := range tc.want.moves {
				require.Equal(t, want, p.verdicts[index(id)].move, "moves from %s: %s", id, p.verdicts[index(id)].why)
			}
			for id, want := range tc.want.why {
				require.Contains(t, p.verdicts[index(id)].why, want, "what is said of %s", id)
			}
			require.Contains(t, p.state, tc.want.state)
			if tc.want.next > 0 {
				require.False(t, p.next.After(in(tc.want.next)), "the next look is in %v", p.next.Sub(noon))
			}
			require.False(t, p.next.Before(in(tc.want.notBefore)) && tc.want.notBefore > 0, "the next look is in %v", p.next.Sub(noon))
			mustHold(t, tc.facts, &p)
		})
	}
}

// mustHold asserts what holds for every plan, whatever the facts.
func mustHold(t *testing.T, f *facts, p *plan) {
	t.Helper()
	usable := 0 // connections that are left, whose path is not known to be dead
	for i := range f.conns {
		c := &f.conns[i]
		if p.verdicts[i].fate != fateClose && !c.closing && c.path.health != pathSilent && !(c.pledged && !c.named) {
			usable++
		}
	}
	for i := range f.conns {
		l, v := &f.conns[i], p.verdicts[i]
		require.NotEmpty(t, v.why, "there is a reason for everything")
		require.True(t, strings.ToValidUTF8(v.why, "") == v.why)
		if v.fate == fateClose || v.move != moveNone || v.fate == fateAsk || v.fate == fateConfirm {
			require.True(t, p.decided, "nothing is done without a winner")
			require.NotEqual(t, i, p.winner, "the winner is not left, asked about or closed")
			require.Empty(t, l.exempt)
			require.Empty(t, f.exempt)
			w := &f.conns[p.winner]
			require.True(t, w.path.alive(), "and only for one whose path is known to work")
			require.False(t, w.candidate.Limited && !l.candidate.Limited, "nothing leaves an unlimited connection for a limited one")
			if w.candidate.Limited {
				require.True(t, l.ending(f.now), "nothing leaves a limited connection for another, unless it is about to end")
			}
		}
		if v.fate == fateCompare || v.fate == fateConfirm || v.fate == fateClose {
			require.Zero(t, l.candidate.Streams, "nothing is on what is closed, or asked about for the last time")
			require.Zero(t, l.moving)
			require.False(t, l.quiet.IsZero())
		}
		if v.fate == fateClose {
			w := &f.conns[p.winner]
			require.Positive(t, usable, "a connection is left")
			require.NotEqual(t, unknown, f.manages, "nothing is closed for what is not known")
			require.False(t, w.candidate.Limited, "nothing is closed for a limited connection")
			require.False(t, !l.candidate.Relayed && !l.candidate.Limited && w.candidate.Relayed, "no direct connection is closed for a relayed one")
			require.False(t, w.closing || w.pledged && !w.named, "nor for one that goes itself")
		}
	}
	if p.steer {
		w := &f.conns[p.winner]
		require.True(t, w.path.alive())
		for i := range f.conns {
			c := &f.conns[i]
			gone := f.migrates && c.path.health == pathSilent && !f.now.Before(c.path.goneAt(testConfig().probeTime))
			require.False(t, w.candidate.Limited && c.unlimited() && !c.closing && !gone,
				"no new stream is steered to a limited connection while an unlimited one is open that may work, or the stream could not come back")
		}
	}
	if !p.decided && !p.steer && len(f.conns) != 1 {
		require.Equal(t, -1, p.winner, "what is not decided names no connection")
	}
	asked := make(map[int]bool)
	for _, q := range p.probe {
		require.False(t, asked[q.conn], "no connection is asked twice")
		asked[q.conn] = true
		require.False(t, f.conns[q.conn].path.asking, "nor while its answer is awaited")
	}
	if p.detour {
		require.Len(t, f.conns, 1, "a peer is dialled beside its only connection")
		c := &f.conns[0]
		require.False(t, c.waits.IsZero(), "where streams wait")
		require.Equal(t, pathSilent, c.path.health, "and it was asked, and does not answer")
		require.False(t, c.path.asked.Before(c.waits), "since then")
		require.Empty(t, c.exempt)
		require.False(t, c.detour.running || c.detour.tries >= detourTries)
		require.False(t, p.cleared)
	}
	if p.upgrade.due || !p.upgrade.at.IsZero() {
		require.NotEmpty(t, p.upgrade.why)
		require.Empty(t, f.exempt)
		in := false
		for i := range f.conns {
			require.True(t, f.conns[i].candidate.Relayed, "no direct connection is asked for where there is one")
			in = in || f.conns[i].candidate.Direction == network.DirInbound
		}
		require.True(t, in, "nor by the end that has dialled")
		require.False(t, f.upgrade.running, "nor twice at a time")
		require.True(t, p.upgrade.look.After(f.now) || p.upgrade.due, "it is not looked at all the time")
	}
	if len(f.conns) > 1 {
		require.False(t, p.next.IsZero(), "a peer with duplicates is looked at again")
		require.True(t, p.next.After(f.now) || len(p.probe) > 0 || p.decided, "and not all the time")
	}
}

// The upgrade's table: when a direct connection is asked for next, and what is said of it.
func TestPlanOfUpgrade(t *testing.T) {
	cameIn := func(before time.Duration, change ...func(*connFacts)) connFacts {
		return limitedConn(append([]func(*connFacts){opened(before), func(c *connFacts) { c.candidate.Direction = network.DirInbound }}, change...)...)
	}
	wentOut := func(before time.Duration) connFacts {
		return aConn("other", relayAddr, limited, opened(before), func(c *connFacts) { c.candidate.Direction = network.DirOutbound })
	}
	// tracked is a peer that nothing has been tried with, without chance.
	tracked := func(change ...func(*upgradeFacts)) func(*facts) {
		return func(f *facts) {
			f.upgrade = upgradeFacts{tracked: true, since: f.conns[0].opened}
			for _, c := range change {
				c(&f.upgrade)
			}
		}
	}
	// failed is the last of so many attempts, which took 15 s.
	failed := func(failures int, ended time.Duration, err error) func(*upgradeFacts) {
		return func(u *upgradeFacts) {
			u.attempts, u.failures, u.err = failures, failures, err
			u.started, u.ended = ago(ended+15*time.Second), ago(ended)
		}
	}
	changed := func(before time.Duration) func(*upgradeFacts) {
		return func(u *upgradeFacts) { u.changed = ago(before) }
	}
	wanted := func(u *upgradeFacts) { u.wanted = "it is protected" }
	used := func(before time.Duration) func(*upgradeFacts) {
		return func(u *upgradeFacts) { u.used = ago(before) }
	}
	byChance := func(u *upgradeFacts) { u.jitter = 1 }
	refused := errors.New("refused")
	const never = time.Hour
	for _, tc := range []struct {
		name  string
		facts *facts
		next  time.Duration // never: this end does not ask
		why   string        // a part of it
	}{
		{"a direct connection", between(quicConn(), cameIn(time.Minute, carries(1, 0))).with(tracked()), never, ""},
		{"no connection", between(), never, ""},
		{"switched off", between(cameIn(time.Minute, carries(1, 0))), never, "none is asked for"},
		{"dialled from here", between(wentOut(time.Minute)).with(tracked(wanted)), never, "only the peer, which was dialled over the relay, can ask"},
		{"an exempt peer", between(cameIn(time.Minute, carries(1, 0))).with(tracked(wanted)).with(func(f *facts) { f.exempt = "it is ours" }), never, "it is ours"},
		{"nothing uses it", between(cameIn(time.Hour)).with(tracked(used(time.Hour))), never, "nothing uses the peer"},
		{"under way", between(cameIn(time.Minute, carries(1, 0))).with(tracked(func(u *upgradeFacts) { u.running = true })), never, "asking for one"},

		{"go-libp2p's own attempts come first", between(cameIn(5*time.Second, carries(1, 0))).with(tracked()), 15 * time.Second, "first attempt in 15 s"},
		{"chance comes on top", between(cameIn(5*time.Second, carries(1, 0))).with(tracked(byChance)), 16 * time.Second, "first attempt in 16 s"},
		{"also where something changes meanwhile", between(cameIn(5*time.Second, carries(1, 0))).with(tracked(changed(time.Second))), 15 * time.Second, "first attempt"},
		{"then this end asks", between(cameIn(21*time.Second, carries(1, 0))).with(tracked()), 0, "first attempt in 0 ms"},
		{"when there is a place", between(cameIn(21*time.Second, carries(1, 0))).with(tracked(func(u *upgradeFacts) { u.full = true })), 0, "when there is a place for it"},
		{"which does not matter before", between(cameIn(5*time.Second, carries(1, 0))).with(tracked(func(u *upgradeFacts) { u.full = true })), 15 * time.Second, "no direct connection: first attempt in 15 s"},
		{"the end with the higher peer ID as well, where it alone can", between(cameIn(21*time.Second, carries(1, 0))).with(tracked()).with(follower), 0, ""},
		{"soon after the direct one has gone", between(cameIn(time.Hour, carries(1, 0))).with(tracked(func(u *upgradeFacts) { u.since = ago(0) })), time.Second, "first attempt in 1 s"},
		{"streams that cannot move count as well", between(cameIn(time.Minute, pins(1))).with(tracked()), 0, ""},
		{"so does what is wanted", between(cameIn(time.Minute)).with(tracked(wanted)), 0, ""},
		{"and what was used", between(cameIn(time.Minute)).with(tracked(used(9 * time.Minute))), 0, ""},

		{"with streams: at first", between(cameIn(time.Minute, carries(1, 0))).with(tracked(failed(1, time.Second, refused))), 6500 * time.Millisecond, "last attempt 1 s ago: refused, next in 6.5 s"},
		{"with streams: later", between(cameIn(time.Minute, carries(1, 0))).with(tracked(failed(5, time.Second, refused))), 24 * time.Second, ""},
		{"with streams: by chance", between(cameIn(time.Minute, carries(1, 0))).with(tracked(failed(5, time.Second, refused), byChance)), 14 * time.Second, ""},
		{"with streams: however often it has failed", between(cameIn(time.Hour, carries(1, 0))).with(tracked(failed(500, time.Second, refused))), 24 * time.Second, ""},
		{"a moment ago there was one", between(cameIn(time.Hour)).with(tracked(failed(9, time.Second, refused), used(59*time.Second))), 24 * time.Second, ""},
		{"a while ago there was one", between(cameIn(time.Hour)).with(tracked(failed(9, time.Second, refused), used(61*time.Second))), 284 * time.Second, ""},
		{"only wanted", between(cameIn(time.Hour)).with(tracked(failed(3, time.Second, refused), wanted)), 64 * time.Second, ""},
		{"only wanted, however often it has failed", between(cameIn(time.Hour)).with(tracked(failed(500, time.Second, refused), wanted)), 284 * time.Second, ""},

		{"something has changed", between(cameIn(time.Hour)).with(tracked(failed(9, time.Minute, refused), wanted, changed(0))), time.Second, "next in 1 s"},
		{"something has changed while an attempt was under way", between(cameIn(time.Hour)).with(tracked(failed(9, time.Second, refused), wanted, changed(5*time.Second))), 6500 * time.Millisecond, ""},
		{"something changes all the time", between(cameIn(time.Hour)).with(tracked(failed(1, 0, refused), wanted, changed(0))), 7500 * time.Millisecond, ""},
		{"an attempt that has found nothing wrong says nothing", between(cameIn(time.Hour, carries(1, 0))).with(tracked(failed(1, time.Second, nil))), 6500 * time.Millisecond, "no direct connection: next in 6.5 s"},
		{"a direct one has just gone", between(cameIn(time.Hour)).with(tracked(failed(9, time.Hour, refused), wanted, func(u *upgradeFacts) { u.since = ago(0) })), time.Second, ""},
		{"something had changed before", between(cameIn(time.Hour)).with(tracked(failed(9, time.Second, refused), wanted, changed(time.Minute))), 284 * time.Second, ""},

		{"what does not pass by itself", between(cameIn(time.Hour, carries(1, 0))).with(tracked(failed(1, time.Minute, punch.ErrUnsupported))), never, "asked for again when something has changed"},
		{"until something has changed", between(cameIn(time.Hour, carries(1, 0))).with(tracked(failed(1, time.Minute, punch.ErrUnsupported), changed(time.Second))), 0, ""},
		{"this host may punch at any time", between(cameIn(time.Hour, carries(1, 0))).with(tracked(failed(9, time.Second, punch.ErrOff))), 24 * time.Second, ""},

		{"both can ask: the lower one does", between(cameIn(20*time.Second, carries(1, 0)), wentOut(time.Minute)).with(tracked()), 0, ""},
		{"and the higher one when the other has had its time", between(cameIn(20*time.Second, carries(1, 0)), wentOut(time.Minute)).with(tracked()).with(follower), 80 * time.Second, ""},
		{"and more seldom", between(cameIn(time.Hour, carries(1, 0)), wentOut(time.Minute)).with(tracked(failed(9, time.Second, refused))).with(follower), 284 * time.Second, ""},
		{"unless the other runs no manager", between(cameIn(20*time.Second, carries(1, 0)), wentOut(time.Minute)).with(tracked()).with(plainPeer).with(follower), 0, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			up := decide(testConfig(), byDefault, tc.facts).upgrade
			require.Contains(t, up.why, tc.why)
			if tc.next == never {
				require.Equal(t, tc.why == "", up.why == "", up.why)
				require.Zero(t, up.at, up.why)
				require.False(t, up.due)
				return
			}
			require.Equal(t, tc.next, max(0, up.at.Sub(noon)), up.why)
			require.Equal(t, tc.next == 0, up.due)
			require.Equal(t, earlier(up.at, in(upgradeLook)), up.look, "it is looked at in time, and not all the time")
		})
	}
}

// Who decides, and why: the table in plan.go.
func TestPlanRoles(t *testing.T) {
	const (
		ours    = "it has the lower peer ID"
		plain   = "the peer runs no manager"
		theirs  = "the peer has the lower peer ID"
		unheard = "the peer has the lower peer ID and has not been identified"
		bare    = "the peer runs a manager, and this one is bare"
	)
	for _, tc := range []struct {
		wrapped, lower bool
		manages        knowledge
		decides        bool
		reason         string
	}{
		{true, true, yes, true, ours},
		{true, true, no, true, ours},
		{true, true, unknown, true, ours},
		{true, false, yes, false, theirs},
		{true, false, no, true, plain},
		{true, false, unknown, false, unheard},
		{false, true, yes, false, bare},
		{false, true, no, true, ours},
		{false, true, unknown, true, ours},
		{false, false, yes, false, bare},
		{false, false, no, false, theirs},
		{false, false, unknown, false, theirs},
	} {
		for name, how := range map[string]func(*connFacts){"works": func(*connFacts) {}, "is silent": silent} {
			f := between(quicConn(how), tcpConn(how))
			f.wrapped, f.lower, f.manages = tc.wrapped, tc.lower, tc.manages
			r := decide(testConfig(), byDefault, f).role
			require.Equal(t, tc.reason, r.reason, "%+v, and all %s", tc, name)
			require.Equal(t, tc.decides, r.decides, "%+v, and all %s", tc, name)
			require.Equal(t, tc.decides, r.moves, "%+v, and all %s", tc, name)
			require.Equal(t, tc.decides, r.prunes, "%+v, and all %s", tc, name)
		}
	}
}

// How long after the last answer a connection is asked again whether it works.
func TestPlanAsksAgain(t *testing.T) {
	old := tcpConn(opened(time.Hour), pins(1))
	for _, tc := range []struct {
		name  string
		facts *facts // the first is the one
		more  time.Duration
		after time.Duration // 0: not until the next one comes
	}{
		{name: "a stream began a moment ago", facts: between(quicConn(opened(time.Hour), pins(1), used(4900*time.Millisecond)), old), after: useProbe},
		{name: "also one that has ended", facts: between(quicConn(opened(time.Hour), used(4900*time.Millisecond)), old), after: useProbe},
		{name: "a while ago", facts: between(quicConn(opened(time.Hour), pins(1), used(5100*time.Millisecond)), old), after: defaultInterval},
		{name: "a minute ago", facts: between(quicConn(opened(time.Hour), pins(1), used(59*time.Second)), old), after: defaultInterval},
		{name: "longer ago", facts: between(quicConn(opened(time.Hour), pins(1), used(61*time.Second)), old), after: idleProbe / 2},
		{name: "and yet more comes than is asked for", facts: between(quicConn(opened(time.Hour), pins(1), used(time.Hour)), old), more: 1100 * time.Millisecond, after: defaultInterval},
		{name: "and only what is asked for comes", facts: between(quicConn(opened(time.Hour), pins(1), used(time.Hour)), old), more: 900 * time.Millisecond, after: idleProbe / 2},
		{name: "there is no stream any more", facts: between(quicConn(opened(time.Hour), used(20*time.Second)), old), after: idleProbe},
		{name: "it has yet to prove itself, before a relay without a limit goes", facts: between(quicConn(opened(20*time.Second)), relayConn(opened(21*time.Second), pins(1))), after: defaultInterval},
		{name: "or since its kind has died young", facts: between(quicConn(opened(20*time.Second)), tcpConn(opened(21*time.Second), pins(1))).with(func(f *facts) { f.deaths = map[pathKind]int{{udp: true}: 1} }), after: defaultInterval},
		{name: "which nothing depends on where both are direct", facts: between(quicConn(opened(20*time.Second)), tcpConn(opened(21*time.Second), pins(1)))},
		{name: "or both are relayed", facts: between(relayConn(opened(20*time.Second)), aConn("relay2", relayAddr, opened(21*time.Second), pins(1)))},
		{name: "or it is limited", facts: between(limitedConn(opened(20*time.Second)), quicConn(opened(21*time.Second), pins(1)), tcpConn(opened(21*time.Second), pins(1))).with(func(f *facts) { f.deaths = map[pathKind]int{{udp: true, relayed: true}: 1} })},
	} {
		t.Run(tc.name, func(t *testing.T) {
			asks := func(after time.Duration) bool {
				f := *tc.facts
				f.conns = append([]connFacts(nil), f.conns...)
				at(after, after+tc.more)(&f.conns[0])
				p := decide(testConfig(), byDefault, &f)
				mustHold(t, &f, &p)
				return slices.Contains(p.probe, question{conn: 0})
			}
			if tc.after == 0 {
				require.False(t, asks(19*time.Second))
				return
			}
			require.False(t, asks(tc.after-time.Millisecond))
			require.True(t, asks(tc.after))
		})
	}
}
