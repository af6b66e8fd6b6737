package connmgr

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/policy"
)

// inFull is a plan, as one line for the peer and one for each connection.
func inFull(f *facts, p *plan) string {
	var sb strings.Builder
	when := func(what string, at time.Time) {
		if !at.IsZero() {
			fmt.Fprintf(&sb, " %s %v", what, at.Sub(noon))
		}
	}
	sb.WriteString(p.state)
	for _, is := range []struct {
		so   bool
		what string
	}{{p.left, "left"}, {p.asks, "asks"}, {p.tell, "tells"}, {p.role.over, "has taken over"}} {
		if is.so {
			sb.WriteString("; " + is.what)
		}
	}
	if p.steer {
		sb.WriteString("; steers to " + f.conns[p.winner].id())
	}
	if p.better != "" {
		sb.WriteString("; better is " + p.better)
		when("since", p.since)
	}
	sb.WriteString(";")
	when("next look in", p.next)
	for i, v := range p.verdicts {
		fmt.Fprintf(&sb, "\n%s: %s", f.conns[i].id(), []string{"keep", "wait", "ask", "confirm", "compare", "close"}[v.fate])
		if v.move != moveNone {
			sb.WriteString([]string{"", ", own streams move", ", all streams move"}[v.move])
		}
		fmt.Fprintf(&sb, ", %s: %s", v.reason, v.why)
		if v.decision.Rule != "" {
			fmt.Fprintf(&sb, " (%s over %s by %s)", v.decision.Winner.ID, v.decision.Loser.ID, v.decision.Rule)
		}
		when("until", v.until)
		for _, q := range p.probe {
			if q.conn == i {
				sb.WriteString(", is asked")
				if q.large {
					sb.WriteString(" for what is large")
				}
			}
		}
	}
	return sb.String()
}

func at(ago1, ago2 time.Duration) func(*connFacts) { // what was answered last, and asked last
	return func(c *connFacts) { c.path.at, c.path.asked = ago(ago1), ago(ago2) }
}
func used(before time.Duration) func(*connFacts) { return func(c *connFacts) { c.used = ago(before) } }
func ends(in1 time.Duration) func(*connFacts)    { return func(c *connFacts) { c.ends = in(in1) } }
func closing(c *connFacts)                       { c.closing = true }
func retries(n int, next time.Duration) func(*connFacts) {
	return func(c *connFacts) {
		c.retries, c.retryAt = n, in(next)
		c.candidate.Labelled += n
		c.candidate.Streams += n
		c.quiet = time.Time{}
	}
}
func moving(n int) func(*connFacts) {
	return func(c *connFacts) { c.moving, c.quiet = n, time.Time{} }
}
func denied(n int) func(*connFacts) {
	return func(c *connFacts) { c.path.wide, c.path.denied = false, n }
}
func lives(d time.Duration) func(*connFacts) { return func(c *connFacts) { c.path.since = ago(d) } }

func secondRelay(change ...func(*connFacts)) connFacts {
	return aConn("limited2", relayAddr, append([]func(*connFacts){limited}, change...)...)
}

func tcpFirst(cs []policy.Candidate) (policy.Ranking, error) {
	return policy.Chain(policy.TransportOrder(policy.TCP, policy.QUIC)).Rank(cs), nil
}

// What a plan says in full: what becomes of each connection, why, until when, what is asked
// and when it is looked at again.
func TestPlanInFull(t *testing.T) {
	over := func(f *facts) { f.takeover.progress = ago(defaultTakeover) }
	deaths := func(n int) func(*facts) {
		return func(f *facts) { f.deaths = map[pathKind]int{{udp: true}: n} }
	}
	better := func(id string, since time.Duration) func(*facts) {
		return func(f *facts) { f.better, f.since = id, ago(since) }
	}
	standby := testConfig(func(c *config) { c.standby = true })
	for _, tc := range []struct {
		name  string
		facts *facts
		cfg   *config
		rank  rank
		want  string
	}{
		{name: "none", facts: between(),
			want: `no connection;`},
		{name: "alone", facts: between(quicConn()),
			want: `one connection, nothing to do;
quic: keep, only: the only one`},
		{name: "alone, through a relay", facts: between(relayConn()),
			want: `one connection, through a relay;
relay: keep, only: the only one`},
		{name: "alone, limited", facts: between(limitedConn()),
			want: `one connection, through a relay that limits it;
limited: keep, only: the only one; the relay cuts it when its limit is reached, and streams on it end then unless a direct connection comes before`},
		{name: "alone, limited until", facts: between(limitedConn(ends(time.Minute))),
			want: `one connection, through a relay that limits it;
limited: keep, only: the only one; the relay cuts it in 1 m 0 s at the latest, and streams on it end then unless a direct connection comes before until 1m0s`},
		{name: "idle", facts: between(quicConn(), tcpConn(quietFor(time.Second))),
			want: `consolidating; tells; steers to quic; next look in 1s
quic: keep, kept: kept
tcp: ask, quiet: quiet for 1 s of 2 s, then closed (quic over tcp by transport) until 1s`},
		{name: "idle, and quiet for long enough", facts: between(quicConn(), tcpConn()),
			want: `consolidating; tells; steers to quic; next look in 400ms
quic: keep, kept: kept
tcp: ask, quiet: quiet for 30 s, closed next (quic over tcp by transport) until -28s`},
		{name: "used", facts: between(quicConn(pins(1), used(time.Second)), tcpConn(pins(2), used(20*time.Second))),
			want: `consolidating; tells; steers to quic; next look in 999ms
quic: keep, kept: kept
tcp: ask, pinned: kept until 2 streams that cannot move have ended (quic over tcp by transport)`},
		{name: "used, and not asked for a while", facts: between(quicConn(pins(1), used(time.Second), at(1100*time.Millisecond, 1200*time.Millisecond)), tcpConn(pins(2), used(20*time.Second), at(5100*time.Millisecond, 6*time.Second))),
			want: `consolidating; tells; steers to quic; next look in 5s
quic: keep, kept: kept, is asked
tcp: ask, pinned: kept until 2 streams that cannot move have ended (quic over tcp by transport), is asked`},
		{name: "streams that have not been used for long", facts: between(quicConn(pins(1), used(time.Hour)), tcpConn(pins(2), used(time.Hour), at(31*time.Second, 31*time.Second)), relayConn(opened(time.Hour))),
			want: `consolidating; tells; steers to quic; next look in 400ms
quic: keep, kept: kept
tcp: ask, pinned: kept until 2 streams that cannot move have ended (quic over tcp by transport), is asked
relay: ask, quiet: quiet for 30 s, closed next (quic over relay by direct) until -28s`},
		{name: "not asked since another one came", facts: between(quicConn(at(20*time.Second, 20*time.Second)), tcpConn(opened(10*time.Second))),
			want: `asking which connections work; asks; steers to tcp; next look in 4.999s
quic: keep, undecided: not decided on, is asked
tcp: keep, undecided: not decided on (quic over tcp by transport)`},
		{name: "silent, asked again", facts: between(quicConn(), tcpConn(func(c *connFacts) { c.path = path{health: pathSilent, asked: ago(7 * time.Second), tries: 1} }, pins(1))),
			want: `consolidating; tells; steers to quic; next look in 5s
quic: keep, kept: kept
tcp: ask, silent: it does not answer, is asked`},
		{name: "silent, asked a moment ago", facts: between(quicConn(), tcpConn(silent, carries(2, 1))),
			want: `consolidating; tells; steers to quic; next look in 3s
quic: keep, kept: kept
tcp: ask, own streams move, moving: 3 streams to move`},
		{name: "unknown", facts: between(tcpConn(opened(time.Hour)), quicConn(notToBeAsked)),
			want: `it is not known whether quic direct works: nothing is done until it is; steers to tcp; next look in 3s
tcp: keep, undecided: not decided on (quic over tcp by transport)
quic: keep, undecided: not decided on`},
		{name: "narrow, denied a moment ago", facts: between(tcpConn(opened(time.Hour)), quicConn(denied(1), at(2*time.Second, 2*time.Second))),
			want: `it is not known whether quic direct works: nothing is done until it is; steers to tcp; next look in 4s
tcp: keep, undecided: not decided on (quic over tcp by transport)
quic: keep, undecided: not decided on`},
		{name: "narrow, denied long ago", facts: between(tcpConn(opened(time.Hour)), quicConn(denied(1), at(7*time.Second, 7*time.Second))),
			want: `it is not known whether quic direct works: nothing is done until it is; steers to tcp; next look in 5s
tcp: keep, undecided: not decided on (quic over tcp by transport)
quic: keep, undecided: not decided on, is asked for what is large`},
		{name: "narrow, asking", facts: between(tcpConn(opened(time.Hour)), quicConn(narrow, func(c *connFacts) { c.path.asking = true })),
			want: `asking which connections work; asks; steers to tcp; next look in 5s
tcp: keep, undecided: not decided on (quic over tcp by transport)
quic: keep, undecided: not decided on`},
		{name: "a limited one has to carry nothing large", facts: between(limitedConn(opened(time.Hour), ends(5*time.Second)), secondRelay(narrow, ends(time.Hour))),
			want: `consolidating; tells; steers to limited2; next look in 5s
limited: wait, ending: its relay is about to cut it
limited2: keep, kept: kept`},
		{name: "asking", facts: between(tcpConn(opened(time.Hour)), quicConn(func(c *connFacts) { c.path = path{asking: true, asked: ago(2 * time.Second)} })),
			want: `asking which connections work; asks; steers to tcp; next look in 4s
tcp: keep, undecided: not decided on (quic over tcp by transport)
quic: keep, undecided: not decided on`},
		{name: "asking for long", facts: between(tcpConn(opened(time.Hour)), quicConn(func(c *connFacts) { c.path = path{asking: true, asked: ago(4 * time.Second)} })),
			want: `it is not known whether quic direct works: nothing is done until it is; steers to tcp; next look in 2s
tcp: keep, undecided: not decided on (quic over tcp by transport)
quic: keep, undecided: not decided on`},
		{name: "unknown, an older unlimited one beside a limited one", facts: between(quicConn(notToBeAsked, opened(time.Hour)), limitedConn()),
			want: `it is not known whether quic direct works: nothing is done until it is; next look in 3s
quic: keep, undecided: not decided on
limited: keep, undecided: not decided on (quic over limited by unlimited)`},
		{name: "unknown, an older relay beside a newer one", facts: between(aConn("relay2", relayAddr, notToBeAsked, opened(time.Hour)), relayConn(carries(1, 0))),
			want: `consolidating; tells; steers to relay; next look in 400ms
relay2: ask, quiet: quiet for 30 s, closed next (relay over relay2 by streams) until -28s
relay: keep, kept: kept`},
		{name: "unknown, an older relay beside a direct one", facts: between(relayConn(notToBeAsked, opened(time.Hour), carries(1, 1)), quicConn()),
			want: `consolidating; tells; steers to quic; next look in 3s
relay: ask, own streams move, moving: 2 streams to move (quic over relay by direct)
quic: keep, kept: kept`},
		{name: "unknown and older, limited, beside an unlimited one", facts: between(limitedConn(notToBeAsked, opened(time.Hour), carries(1, 1)), relayConn()),
			want: `consolidating; tells; steers to relay; next look in 3s
limited: ask, own streams move, moving: 2 streams to move (relay over limited by unlimited)
relay: keep, kept: kept`},
		{name: "settling, to the winner so far", facts: between(quicConn(opened(time.Second/2), at(0, 0)), tcpConn(carries(2, 0))).with(settling(time.Second / 2)).with(winner("tcp")),
			want: `settling for another 500 ms; steers to tcp; better is quic since 0s; next look in 500ms
quic: keep, undecided: not decided on
tcp: keep, undecided: not decided on (quic over tcp by transport)`},
		{name: "settling, the winner so far does not answer", facts: between(quicConn(opened(time.Second/2), at(0, 0)), tcpConn(silent, carries(2, 0)), relayConn()).with(settling(time.Second / 2)).with(winner("tcp")),
			want: `settling for another 500 ms; steers to quic; next look in 500ms
quic: keep, undecided: not decided on
tcp: keep, silent: it does not answer, is asked
relay: keep, undecided: not decided on (quic over relay by direct)`},
		{name: "settling, a relay beside a direct one", facts: between(quicConn(opened(time.Second/2), asking), relayConn(carries(2, 0))).with(settling(time.Second / 2)).with(winner("relay")),
			want: `settling for another 500 ms; better is quic since 0s; next look in 500ms
quic: keep, undecided: not decided on
relay: keep, undecided: not decided on (quic over relay by direct)`},
		{name: "settling, a relay beside a direct one that is being closed", facts: between(quicConn(closing), relayConn(carries(2, 0)), aConn("relay2", relayAddr)).with(settling(time.Second / 2)).with(winner("relay")),
			want: `settling for another 500 ms; steers to relay; next look in 500ms
quic: keep, closing: it is being closed
relay: keep, undecided: not decided on
relay2: keep, undecided: not decided on (relay over relay2 by streams)`},
		{name: "settling, a relay beside a direct one that does not answer", facts: between(quicConn(silent), relayConn(carries(2, 0)), aConn("relay2", relayAddr)).with(settling(time.Second / 2)).with(winner("relay")),
			want: `settling for another 500 ms; steers to relay; next look in 500ms
quic: keep, silent: it does not answer
relay: keep, undecided: not decided on
relay2: keep, undecided: not decided on (relay over relay2 by streams)`},
		{name: "settling, a limited one beside one that is being closed", facts: between(quicConn(closing), limitedConn(carries(2, 0)), secondRelay()).with(settling(time.Second / 20)),
			want: `settling for another 950 ms; next look in 950ms
quic: keep, closing: it is being closed
limited: keep, undecided: not decided on
limited2: keep, undecided: not decided on (limited over limited2 by streams)`},
		{name: "settling, none has answered since the last one came", facts: between(quicConn(opened(time.Second/2), asking), tcpConn(at(time.Second, time.Second))).with(settling(time.Second / 2)).with(winner("tcp")),
			want: `settling for another 500 ms; better is quic since 0s; next look in 500ms
quic: keep, undecided: not decided on
tcp: keep, undecided: not decided on (quic over tcp by transport), is asked`},
		{name: "settling off limited relays", facts: between(limitedConn(carries(1, 0)), quicConn(opened(50*time.Millisecond))).with(settling(50 * time.Millisecond)),
			want: `settling for another 50 ms, since all others are limited; steers to quic; next look in 50ms
limited: keep, undecided: not decided on (quic over limited by unlimited)
quic: keep, undecided: not decided on`},
		{name: "settling at once, by order", facts: between(quicConn(), tcpConn(carries(1, 0))).with(settling(time.Second / 2)).with(func(f *facts) { f.atOnce = true }),
			want: `consolidating; tells; steers to quic; next look in 5s
quic: keep, kept: kept
tcp: ask, own streams move, moving: 1 stream to move (quic over tcp by transport)`},
		{name: "measuring", facts: between(quicConn(), tcpConn(carries(1, 0))).with(func(f *facts) { f.measuring = true }).with(winner("tcp")),
			want: `measuring round-trip times; asks; steers to tcp; better is quic since 0s; next look in 5s
quic: keep, undecided: not decided on
tcp: keep, undecided: not decided on (quic over tcp by transport)`},
		{name: "measuring, forced", facts: between(quicConn(), tcpConn(carries(1, 0))).with(func(f *facts) { f.measuring, f.forced = true, true }),
			want: `consolidating; tells; steers to quic; next look in 5s
quic: keep, kept: kept
tcp: ask, own streams move, moving: 1 stream to move (quic over tcp by transport)`},
		{name: "only limited ones", facts: between(limitedConn(carries(1, 0)), secondRelay(ends(time.Minute))),
			want: `only limited connections, each with a budget of its own: all are left, and streams leave one that is about to be cut; left; next look in 5s
limited: keep, limited: kept: its relay limits it, as the others
limited2: keep, limited: kept: its relay limits it, as the others, and cuts it in 1 m 0 s at the latest (limited over limited2 by streams) until 1m0s`},
		{name: "only limited ones, one about to end", facts: between(limitedConn(carries(1, 1), ends(5*time.Second)), secondRelay(ends(time.Minute)), aConn("limited3", relayAddr, limited, ends(2*time.Minute))),
			want: `consolidating; tells; steers to limited2; next look in 5s
limited: wait, own streams move, ending: its relay is about to cut it
limited2: keep, kept: kept
limited3: keep, limited: kept: its relay limits it, as the winner (limited2 over limited3 by id) until 2m0s`},
		{name: "better, for a while", facts: between(quicConn(), tcpConn(carries(2, 0))).with(winner("tcp")).with(better("quic", 9*time.Second)),
			want: `another connection ranks first now, and wins if it still does in 1 s; tells; steers to tcp; better is quic since -9s; next look in 400ms
quic: ask, quiet: quiet for 30 s, closed next until -28s
tcp: keep, kept: kept`},
		{name: "better, for long enough", facts: between(quicConn(), tcpConn(carries(2, 0))).with(winner("tcp")).with(better("quic", 10*time.Second)),
			want: `consolidating; tells; steers to quic; next look in 5s
quic: keep, kept: kept
tcp: ask, own streams move, moving: 2 streams to move (quic over tcp by transport)`},
		{name: "better, another one than before", facts: between(quicConn(), tcpConn(carries(2, 0))).with(winner("tcp")).with(better("relay", 9*time.Second)),
			want: `another connection ranks first now, and wins if it still does in 10 s; tells; steers to tcp; better is quic since 0s; next look in 400ms
quic: ask, quiet: quiet for 30 s, closed next until -28s
tcp: keep, kept: kept`},
		{name: "better, by order", facts: between(quicConn(), tcpConn(carries(2, 0))).with(winner("tcp")).with(better("quic", time.Second)).with(func(f *facts) { f.atOnce = true }),
			want: `consolidating; tells; steers to quic; next look in 5s
quic: keep, kept: kept
tcp: ask, own streams move, moving: 2 streams to move (quic over tcp by transport)`},
		{name: "better, forced", facts: between(quicConn(), tcpConn(carries(2, 0))).with(winner("tcp")).with(better("quic", time.Second)).with(func(f *facts) { f.forced = true }),
			want: `consolidating; tells; steers to quic; next look in 5s
quic: keep, kept: kept
tcp: ask, own streams move, moving: 2 streams to move (quic over tcp by transport)`},
		{name: "better, since others have come", facts: between(quicConn(), tcpConn(carries(2, 0))).with(winner("tcp")).with(better("quic", time.Second)).with(func(f *facts) { f.fresh = true }),
			want: `consolidating; tells; steers to quic; next look in 5s
quic: keep, kept: kept
tcp: ask, own streams move, moving: 2 streams to move (quic over tcp by transport)`},
		{name: "better, but another one is named", facts: between(quicConn(), tcpConn(carries(2, 0), named)).with(winner("quic")).with(better("quic", time.Second)).with(follower),
			want: `following, takes over in 9 s if nothing happens; steers to tcp; next look in 5s
quic: wait, peer decides: the peer decides
tcp: keep, kept: kept`},
		{name: "better, while the paths are unknown", facts: between(quicConn(notToBeAsked), tcpConn(notToBeAsked)).with(better("quic", time.Second)),
			want: `it is not known which connections work: nothing is done until it is; next look in 3s
quic: keep, undecided: not decided on
tcp: keep, undecided: not decided on (quic over tcp by transport)`},
		{name: "the winner so far keeps the decisions that were made for it", facts: between(quicConn(), tcpConn(carries(2, 0)), relayConn()).with(winner("tcp")).with(better("quic", time.Second)).with(func(f *facts) {
			f.ranking, _ = tcpFirst([]policy.Candidate{f.conns[0].candidate, f.conns[1].candidate, f.conns[2].candidate})
		}),
			want: `another connection ranks first now, and wins if it still does in 9 s; tells; steers to tcp; better is quic since -1s; next look in 400ms
quic: ask, quiet: quiet for 30 s, closed next (tcp over quic by transport) until -28s
tcp: keep, kept: kept
relay: ask, quiet: quiet for 30 s, closed next (tcp over relay by transport) until -28s`},
		{name: "passed over", facts: between(quicConn(notToBeAsked, opened(time.Hour)), tcpConn(), relayConn()),
			want: `consolidating; tells; steers to tcp; next look in 400ms
quic: ask, quiet: quiet for 30 s, closed next until -28s
tcp: keep, kept: kept
relay: ask, quiet: quiet for 30 s, closed next until -28s`},
		{name: "died young", facts: between(quicConn(opened(10*time.Second), lives(10*time.Second)), tcpConn()).with(deaths(1)),
			want: `consolidating; tells; steers to tcp; next look in 400ms
quic: ask, proving: 1 connection of this kind died young of late: it wins if it still works in 50 s until -8s
tcp: keep, kept: kept`},
		{name: "died young, both of a kind", facts: between(quicConn(opened(10*time.Second)), aConn("quic2", quicAddr, opened(10*time.Second))).with(deaths(1)),
			want: `the only connection that could win has yet to prove itself; next look in 4.999s
quic: keep, proving: 1 connection of this kind died young of late: it wins if it still works in 50 s
quic2: keep, proving: 1 connection of this kind died young of late: it wins if it still works in 50 s (quic over quic2 by id)`},
		{name: "died young, beside a limited one", facts: between(quicConn(opened(10*time.Second)), limitedConn(carries(1, 0))).with(deaths(1)),
			want: `consolidating; tells; steers to quic; next look in 5s
quic: keep, kept: kept
limited: ask, own streams move, moving: 1 stream to move (quic over limited by unlimited)`},
		{name: "died young long ago", facts: between(quicConn(opened(time.Hour)), tcpConn()).with(deaths(1)),
			want: `consolidating; tells; steers to quic; next look in 400ms
quic: keep, kept: kept
tcp: ask, quiet: quiet for 30 s, closed next (quic over tcp by transport) until -28s`},
		{name: "being closed", facts: between(quicConn(), tcpConn(closing)),
			want: `consolidating; tells; steers to quic; next look in 5s
quic: keep, kept: kept
tcp: keep, closing: it is being closed`},
		{name: "exempt", facts: between(quicConn(), tcpConn(carries(1, 0), func(c *connFacts) { c.exempt = "it is mine" })),
			want: `consolidating; tells; steers to quic; next look in 5s
quic: keep, kept: kept
tcp: keep, exempt: kept: it is mine (quic over tcp by transport)`},
		{name: "silent, unlimited, beside a limited one", facts: between(quicConn(silent), limitedConn()),
			want: `consolidating; tells; steers to limited; next look in 25ms
quic: keep, silent: it does not answer; kept: it is unlimited, and the winner is not
limited: keep, kept: kept`},
		{name: "silent, direct, beside a relay", facts: between(quicConn(silent), relayConn()),
			want: `consolidating; tells; steers to relay; next look in 3s
quic: keep, silent: it does not answer; kept: it is direct, and the winner is not
relay: keep, kept: kept`},
		{name: "limited, to one that ends later", facts: between(limitedConn(carries(2, 2), ends(time.Second)), secondRelay()),
			want: `consolidating; tells; steers to limited2; next look in 5s
limited: wait, own streams move, ending: its relay is about to cut it
limited2: keep, kept: kept`},
		{name: "unlimited relay, the winner has yet to prove itself", facts: between(relayConn(carries(2, 1)), quicConn(opened(10*time.Second))),
			want: `consolidating; tells; steers to quic; next look in 4.999s
relay: ask, proving: 3 streams to move when the winner has proved itself, in 20 s (quic over relay by direct) until 20s
quic: keep, kept: kept`},
		{name: "unlimited relay that does not answer", facts: between(relayConn(silent, carries(2, 1)), quicConn(opened(time.Second))),
			want: `consolidating; tells; steers to quic; next look in 4.999s
relay: ask, own streams move, moving: 3 streams to move, is asked
quic: keep, kept: kept`},
		{name: "unlimited relay, idle, the winner has yet to prove itself", facts: between(relayConn(), quicConn(opened(10*time.Second))),
			want: `consolidating; tells; steers to quic; next look in 4.999s
relay: ask, proving: quiet for 30 s; closed when the winner has proved itself, in 20 s (quic over relay by direct) until 20s
quic: keep, kept: kept`},
		{name: "direct, idle, the winner has yet to prove itself", facts: between(tcpConn(opened(time.Hour), quietFor(time.Minute)), quicConn(opened(2*time.Second))),
			want: `consolidating; tells; steers to quic; next look in 4.999s
tcp: ask, proving: quiet for 1 m 0 s; closed when the winner has proved itself, in 28 s (quic over tcp by transport) until 28s
quic: keep, kept: kept`},
		{name: "direct, idle, the winner has proved itself since", facts: between(tcpConn(opened(time.Hour), quietFor(time.Minute)), quicConn(opened(31*time.Second), at(2*time.Second, 2*time.Second))),
			want: `consolidating; tells; steers to quic; next look in 400ms
tcp: ask, proving: quiet for 1 m 0 s; the winner is asked once more (quic over tcp by transport) until -1s
quic: keep, kept: kept, is asked`},
		{name: "direct, idle, a third one besides", facts: between(tcpConn(opened(time.Hour), quietFor(time.Minute)), quicConn(opened(2*time.Second)), relayConn(opened(time.Hour))),
			want: `consolidating; tells; steers to quic; next look in 400ms
tcp: ask, quiet: quiet for 1 m 0 s, closed next (quic over tcp by transport) until -58s
quic: keep, kept: kept
relay: ask, quiet: quiet for 30 s, closed next (quic over relay by direct) until -28s`},
		{name: "limited, idle, the winner is new", facts: between(limitedConn(), quicConn(opened(2*time.Second))),
			want: `consolidating; tells; steers to quic; next look in 400ms
limited: ask, quiet: quiet for 30 s, closed next (quic over limited by unlimited) until -28s
quic: keep, kept: kept`},
		{name: "forced, the winner is new", facts: between(relayConn(carries(1, 1)), quicConn(opened(2*time.Second))).with(func(f *facts) { f.forced = true }),
			want: `consolidating; tells; steers to quic; next look in 4.999s
relay: ask, all streams move, moving: 2 streams to move (quic over relay by direct)
quic: keep, kept: kept`},
		{name: "to move", facts: between(tcpConn(opened(time.Hour), carries(2, 1)), quicConn(told(telling{phase: tellKept, until: in(time.Second)}), at(200*time.Millisecond, 200*time.Millisecond))),
			want: `consolidating; steers to quic; next look in 1s
tcp: ask, own streams move, moving: 3 streams to move (quic over tcp by transport)
quic: keep, kept: kept`},
		{name: "to move, the winner answered a while ago", facts: between(tcpConn(opened(time.Hour), carries(2, 1)), quicConn(at(300*time.Millisecond, 300*time.Millisecond))),
			want: `consolidating; asks; tells; steers to quic; next look in 5s
tcp: ask, moving: 3 streams to move (quic over tcp by transport)
quic: keep, kept: kept, is asked`},
		{name: "to move, the winner answered a while ago, off a limited one", facts: between(limitedConn(opened(time.Hour), carries(2, 1)), quicConn(at(300*time.Millisecond, 300*time.Millisecond))),
			want: `consolidating; tells; steers to quic; next look in 5s
limited: ask, own streams move, moving: 3 streams to move (quic over limited by unlimited)
quic: keep, kept: kept`},
		{name: "to move, the winner answered a while ago, off a silent one", facts: between(tcpConn(silent, opened(time.Hour), carries(2, 1)), quicConn(at(300*time.Millisecond, 300*time.Millisecond))),
			want: `consolidating; tells; steers to quic; next look in 3s
tcp: ask, own streams move, moving: 3 streams to move
quic: keep, kept: kept`},
		{name: "to move, none can", facts: between(tcpConn(carries(2, 1)), quicConn()).with(func(f *facts) { f.migrates = false }),
			want: `consolidating; tells; steers to quic; next look in 5s
tcp: ask, moving: 3 streams to move (quic over tcp by transport)
quic: keep, kept: kept`},
		{name: "to move, no room", facts: between(tcpConn(carries(2, 1)), quicConn(room(0))),
			want: `consolidating; tells; steers to quic; next look in 5s
tcp: ask, own streams move, no room: 3 streams to move when the winner has room for more (quic over tcp by transport)
quic: keep, kept: kept`},
		{name: "failed to move", facts: between(tcpConn(retries(2, 3*time.Second)), quicConn()),
			want: `2 streams failed to move, next attempt in 3 s; tells; steers to quic; next look in 3s
tcp: ask, backing off: 2 streams failed to move, next attempt in 3 s (quic over tcp by transport) until 3s
quic: keep, kept: kept`},
		{name: "failed to move, others can", facts: between(tcpConn(carries(1, 0), retries(2, 3*time.Second)), quicConn()),
			want: `2 streams failed to move, next attempt in 3 s; tells; steers to quic; next look in 3s
tcp: ask, own streams move, moving: 3 streams to move (quic over tcp by transport)
quic: keep, kept: kept`},
		{name: "moving", facts: between(tcpConn(moving(2)), quicConn(moving(2))),
			want: `2 streams moving; tells; steers to quic; next look in 5s
tcp: ask, moving: 2 streams moving (quic over tcp by transport)
quic: keep, kept: kept`},
		{name: "pinned", facts: between(tcpConn(pins(2)), quicConn()),
			want: `consolidating; tells; steers to quic; next look in 5s
tcp: ask, pinned: kept until 2 streams that cannot move have ended (quic over tcp by transport)
quic: keep, kept: kept`},
		{name: "failed to move, and no room", facts: between(tcpConn(retries(2, 3*time.Second)), quicConn(room(0))),
			want: `2 streams failed to move, next attempt in 3 s; tells; steers to quic; next look in 3s
tcp: ask, backing off: 2 streams failed to move, next attempt in 3 s (quic over tcp by transport) until 3s
quic: keep, kept: kept`},
		{name: "pinned, by what", facts: between(tcpConn(pins(1), func(c *connFacts) { c.pinned = "/a/1.0.0" }), quicConn()),
			want: `consolidating; tells; steers to quic; next look in 5s
tcp: ask, pinned: kept until 1 stream that cannot move (/a/1.0.0) has ended (quic over tcp by transport)
quic: keep, kept: kept`},
		{name: "pinned, the peer migrates nothing", facts: between(tcpConn(pins(2)), quicConn()).with(plainPeer),
			want: `consolidating; steers to quic; next look in 5s
tcp: wait, pinned: kept until 2 streams that cannot move, since the peer does not migrate streams, have ended (quic over tcp by transport)
quic: keep, kept: kept`},
		{name: "pinned, a bare manager", facts: between(tcpConn(pins(2)), quicConn()).with(bareManager),
			want: `consolidating; steers to quic; next look in 5s
tcp: wait, pinned: kept until 2 streams that cannot move, since this host is not wrapped, have ended (quic over tcp by transport)
quic: keep, kept: kept`},
		{name: "ranked first, and kept beside a relay", facts: between(quicConn(), relayConn()).with(winner("relay")),
			want: `another connection ranks first now, and wins if it still does in 10 s; tells; steers to relay; better is quic since 0s; next look in 5s
quic: keep, better: kept: it is direct, and the winner is not
relay: keep, kept: kept`},
		{name: "the decisions are those of now", facts: between(quicConn(), tcpConn()).with(winner("quic")).with(func(f *facts) {
			f.ranking = policy.Chain(policy.MoreStreams()).Rank([]policy.Candidate{f.conns[0].candidate, f.conns[1].candidate})
		}),
			want: `consolidating; tells; steers to quic; next look in 400ms
quic: keep, kept: kept
tcp: ask, quiet: quiet for 30 s, closed next (quic over tcp by transport) until -28s`},
		{name: "a TCP connection that has carried what is large", facts: between(quicConn(opened(time.Hour)), tcpConn(opened(9*time.Second), pins(1), used(8*time.Second))),
			want: `consolidating; tells; steers to quic; next look in 4.999s
quic: keep, kept: kept
tcp: ask, pinned: kept until 1 stream that cannot move has ended (quic over tcp by transport)`},
		{name: "follower", facts: between(tcpConn(carries(2, 1)), quicConn()).with(follower),
			want: `following, takes over in 9 s if nothing happens; steers to quic; next look in 5s
tcp: wait, peer decides: 3 streams to move, once the peer says where to (quic over tcp by transport)
quic: keep, kept: kept`},
		{name: "follower, streams move", facts: between(tcpConn(carries(2, 1), moving(1)), quicConn(moving(1))).with(follower),
			want: `1 stream moving; steers to quic; next look in 5s
tcp: wait, moving: 1 stream moving (quic over tcp by transport)
quic: keep, kept: kept`},
		{name: "follower, idle", facts: between(tcpConn(), quicConn()).with(follower),
			want: `following, takes over in 9 s if nothing happens; steers to quic; next look in 5s
tcp: wait, peer decides: the peer decides (quic over tcp by transport)
quic: keep, kept: kept`},
		{name: "follower, of one that cannot be asked", facts: between(tcpConn(carries(1, 0)), quicConn()).with(follower).with(unheardOf),
			want: `following, takes over in 9 s if nothing happens; steers to quic; next look in 5s
tcp: wait, moving: 1 stream to move (quic over tcp by transport)
quic: keep, kept: kept`},
		{name: "follower, pledged", facts: between(tcpConn(pledged, quietFor(time.Second)), quicConn()).with(follower),
			want: `following, takes over in 9 s if nothing happens; steers to quic; next look in 400ms
tcp: wait, peer may close: the peer wants to close it
quic: keep, kept: kept`},
		{name: "follower, pledged, busy", facts: between(tcpConn(pledged, carries(1, 1)), quicConn()).with(follower),
			want: `following, takes over in 9 s if nothing happens; steers to quic; next look in 5s
tcp: wait, peer decides: 2 streams to move, once the peer says where to
quic: keep, kept: kept`},
		{name: "follower, off a limited one", facts: between(limitedConn(carries(2, 1)), quicConn()).with(follower),
			want: `following, takes over in 9 s if nothing happens; steers to quic; next look in 5s
limited: wait, own streams move, peer decides: 3 streams to move, once the peer says where to (quic over limited by unlimited)
quic: keep, kept: kept`},
		{name: "follower, off a limited one beside two unlimited ones", facts: between(limitedConn(carries(2, 1)), quicConn(), tcpConn()).with(follower),
			want: `following, takes over in 9 s if nothing happens; steers to quic; next look in 5s
limited: wait, peer decides: 3 streams to move, once the peer says where to (quic over limited by unlimited)
quic: keep, kept: kept
tcp: wait, peer decides: the peer decides (quic over tcp by transport)`},
		{name: "follower, off a limited one that ends", facts: between(limitedConn(carries(2, 1), ends(time.Second)), secondRelay()).with(follower),
			want: `following, takes over in 9 s if nothing happens; steers to limited2; next look in 5s
limited: wait, ending: its relay is about to cut it
limited2: keep, kept: kept`},
		{name: "follower, takes over", facts: between(tcpConn(carries(2, 1)), quicConn(told(telling{phase: tellKept, until: in(time.Second)}))).with(follower).with(over),
			want: `taken over, since the peer did nothing; has taken over; steers to quic; next look in 5s
tcp: ask, all streams move, moving: 3 streams to move (quic over tcp by transport)
quic: keep, kept: kept`},
		{name: "follower, took over before", facts: between(tcpConn(), quicConn()).with(follower).with(func(f *facts) { f.takeover.times = 1 }),
			want: `taken over, since the peer did nothing; has taken over; steers to quic; next look in 400ms
tcp: ask, quiet: quiet for 30 s, closed next (quic over tcp by transport) until -28s
quic: keep, kept: kept`},
		{name: "follower, took over, of a plain peer", facts: between(tcpConn(quietFor(65*time.Second), opened(time.Hour)), quicConn()).with(follower).with(func(f *facts) {
			f.manages, f.takeover.times = yes, 1
			f.conns[0].lacks = true
			f.conns[1].serves = false
		}),
			want: `taken over, since the peer did nothing; has taken over; steers to quic; next look in 5s
tcp: wait, quiet: quiet for 1 m 5 s of 1 m 10 s, then closed (quic over tcp by transport) until 5s
quic: keep, kept: kept`},
		{name: "not identified", facts: between(tcpConn(quietFor(time.Hour), opened(2*time.Hour)), quicConn()).with(unheardOf),
			want: `consolidating; steers to quic; next look in 5s
tcp: wait, unidentified: quiet for 60 m 0 s; the peer has not been identified, so that it stays (quic over tcp by transport)
quic: keep, kept: kept`},
		{name: "not identified, pinned", facts: between(tcpConn(pins(2)), quicConn()).with(unheardOf),
			want: `consolidating; steers to quic; next look in 5s
tcp: wait, pinned: kept until 2 streams that cannot move, since the peer has not been identified, have ended; the peer has not been identified, so that it stays (quic over tcp by transport)
quic: keep, kept: kept`},
		{name: "plain", facts: between(tcpConn(quietFor(50*time.Second), opened(time.Hour)), quicConn()).with(plainPeer),
			want: `consolidating; steers to quic; next look in 5s
tcp: wait, quiet: quiet for 50 s of 1 m 0 s, then closed (quic over tcp by transport) until 10s
quic: keep, kept: kept`},
		{name: "plain, compared", facts: between(tcpConn(quietFor(61*time.Second), opened(time.Hour)), quicConn()).with(plainPeer),
			want: `consolidating; steers to quic; next look in 1s
tcp: compare, other process: quiet for 1 m 1 s, closed next: asking whether it leads to the same process (quic over tcp by transport) until -1s
quic: keep, kept: kept`},
		{name: "plain, being compared", facts: between(tcpConn(quietFor(61*time.Second), opened(time.Hour), same(sameAsked)), quicConn()).with(plainPeer),
			want: `consolidating; steers to quic; next look in 1s
tcp: wait, other process: quiet for 1 m 1 s, closed next: asking whether it leads to the same process (quic over tcp by transport) until -1s
quic: keep, kept: kept`},
		{name: "plain, another process", facts: between(tcpConn(quietFor(61*time.Second), opened(time.Hour), same(sameNot)), quicConn()).with(plainPeer),
			want: `consolidating; steers to quic; next look in 1s
tcp: keep, other process: kept: it is not known to lead to the same process as the winner (quic over tcp by transport) until -1s
quic: keep, kept: kept`},
		{name: "plain, the same", facts: between(tcpConn(quietFor(61*time.Second), opened(time.Hour), same(sameYes)), quicConn(at(1900*time.Millisecond, 1900*time.Millisecond))).with(plainPeer),
			want: `consolidating; steers to quic; next look in 1s
tcp: close, quiet: quiet for 1 m 1 s, closed next (quic over tcp by transport) until -1s
quic: keep, kept: kept`},
		{name: "plain, the same, the winner answered a while ago", facts: between(tcpConn(quietFor(61*time.Second), opened(time.Hour), same(sameYes)), quicConn(at(2100*time.Millisecond, 2100*time.Millisecond))).with(plainPeer),
			want: `consolidating; steers to quic; next look in 1s
tcp: wait, quiet: quiet for 1 m 1 s, closed next (quic over tcp by transport) until -1s
quic: keep, kept: kept, is asked`},
		{name: "bare", facts: between(tcpConn(quietFor(61*time.Second), opened(time.Hour)), quicConn()).with(bareManager),
			want: `consolidating; steers to quic; next look in 1s
tcp: close, quiet: quiet for 1 m 1 s, closed next (quic over tcp by transport) until -1s
quic: keep, kept: kept`},
		{name: "the peer may close the winner", facts: between(tcpConn(), quicConn(closing)).with(winner("quic")),
			want: `consolidating; tells; steers to tcp; next look in 5s
tcp: keep, kept: kept
quic: keep, closing: it is being closed`},
		{name: "the peer wants to close both", facts: between(tcpConn(pledged), quicConn(pledged)),
			want: `consolidating; tells; steers to quic; next look in 400ms
tcp: wait, peer may close: the peer may close the winner (quic over tcp by transport) until -28s
quic: keep, kept: kept`},
		{name: "standby", facts: between(quicConn(), tcpConn(), relayConn()), cfg: standby,
			want: `consolidating; tells; steers to quic; next look in 400ms
quic: keep, kept: kept
tcp: keep, standby: kept: it stands by (quic over tcp by transport)
relay: ask, quiet: quiet for 30 s, closed next (quic over relay by direct) until -28s`},
		{name: "standby, limited", facts: between(quicConn(), limitedConn(), tcpConn(silent), relayConn()), cfg: standby,
			want: `consolidating; tells; steers to quic; next look in 400ms
quic: keep, kept: kept
limited: ask, quiet: quiet for 30 s, closed next (quic over limited by unlimited) until -28s
tcp: ask, silent: it does not answer until -28s
relay: keep, standby: kept: it stands by (quic over relay by direct)`},
		{name: "asked", facts: between(tcpConn(drains(drainAsked, time.Second)), quicConn()),
			want: `consolidating; tells; steers to quic; next look in 400ms
tcp: wait, draining: quiet for 30 s, closed next, waiting for the peer's answer (quic over tcp by transport) until -28s
quic: keep, kept: kept`},
		{name: "asked, busy here", facts: between(tcpConn(pins(1), drains(drainAsked, time.Second)), quicConn()),
			want: `consolidating; tells; steers to quic; next look in 5s
tcp: wait, pinned: kept until 1 stream that cannot move has ended, waiting for the peer's answer (quic over tcp by transport)
quic: keep, kept: kept`},
		{name: "refused", facts: between(tcpConn(drains(drainRefused, time.Second), func(c *connFacts) { c.drain.until, c.drain.reason = in(2*time.Second), "no" }), quicConn()),
			want: `consolidating; tells; steers to quic; next look in 400ms
tcp: keep, refused: kept: the peer refused: "no" (quic over tcp by transport) until 2s
quic: keep, kept: kept`},
		{name: "refused long ago", facts: between(tcpConn(drains(drainRefused, time.Second)), quicConn()),
			want: `consolidating; tells; steers to quic; next look in 400ms
tcp: ask, quiet: quiet for 30 s, closed next (quic over tcp by transport) until -28s
quic: keep, kept: kept`},
		{name: "not answered", facts: between(tcpConn(drains(drainFailed, time.Second), func(c *connFacts) { c.drain.until = in(500 * time.Millisecond) }), quicConn()),
			want: `consolidating; tells; steers to quic; next look in 400ms
tcp: wait, no answer: quiet for 30 s, closed next; the peer did not answer, it is asked again in 500 ms (quic over tcp by transport) until -28s
quic: keep, kept: kept`},
		{name: "not answered long ago", facts: between(tcpConn(drains(drainFailed, time.Second)), quicConn()),
			want: `consolidating; tells; steers to quic; next look in 400ms
tcp: ask, no answer: quiet for 30 s, closed next; the peer did not answer, it is asked again in 0 ms (quic over tcp by transport) until -28s
quic: keep, kept: kept`},
		{name: "the peer is busy", facts: between(tcpConn(drains(drainBusy, time.Second), func(c *connFacts) { c.drain.until = in(300 * time.Millisecond) }), quicConn()),
			want: `consolidating; tells; steers to quic; next look in 300ms
tcp: wait, draining: quiet for 30 s, closed next, the peer has not done with it (asked for 1 s) (quic over tcp by transport) until -28s
quic: keep, kept: kept`},
		{name: "the peer was busy", facts: between(tcpConn(drains(drainBusy, time.Second)), quicConn()),
			want: `consolidating; tells; steers to quic; next look in 400ms
tcp: ask, draining: quiet for 30 s, closed next, the peer has not done with it (asked for 1 s) (quic over tcp by transport) until -28s
quic: keep, kept: kept`},
		{name: "both are busy", facts: between(tcpConn(pins(1), drains(drainBusy, time.Second)), quicConn()),
			want: `consolidating; tells; steers to quic; next look in 5s
tcp: wait, pinned: kept until 1 stream that cannot move has ended, the peer has not done with it (asked for 1 s) (quic over tcp by transport)
quic: keep, kept: kept`},
		{name: "both are busy, renewed", facts: between(tcpConn(pins(1), drains(drainBusy, 21*time.Second)), quicConn()),
			want: `consolidating; tells; steers to quic; next look in 25ms
tcp: ask, pinned: kept until 1 stream that cannot move has ended, the peer has not done with it (asked for 21 s) (quic over tcp by transport)
quic: keep, kept: kept`},
		{name: "agreed", facts: between(tcpConn(drains(drainAgreed, time.Second)), quicConn()),
			want: `consolidating; tells; steers to quic; next look in 400ms
tcp: confirm, quiet: quiet for 30 s, closed next (quic over tcp by transport) until -28s
quic: keep, kept: kept`},
		{name: "agreed, the winner has not answered since", facts: between(tcpConn(drains(drainAgreed, time.Second)), quicConn(at(2*time.Second, 2*time.Second))),
			want: `consolidating; tells; steers to quic; next look in 400ms
tcp: wait, quiet: quiet for 30 s, closed next (quic over tcp by transport) until -28s
quic: keep, kept: kept, is asked`},
		{name: "agreed, busy here", facts: between(tcpConn(pins(1), drains(drainAgreed, time.Second)), quicConn()),
			want: `consolidating; tells; steers to quic; next look in 5s
tcp: wait, pinned: kept until 1 stream that cannot move has ended (quic over tcp by transport)
quic: keep, kept: kept`},
		{name: "agreed long ago", facts: between(tcpConn(drains(drainAgreed, 21*time.Second)), quicConn()),
			want: `consolidating; tells; steers to quic; next look in 25ms
tcp: ask, quiet: quiet for 30 s, closed next (quic over tcp by transport) until -28s
quic: keep, kept: kept`},
		{name: "confirmed", facts: between(tcpConn(drains(drainConfirmed, 4*time.Second)), quicConn()),
			want: `consolidating; tells; steers to quic; next look in 400ms
tcp: close, quiet: quiet for 30 s, closed next (quic over tcp by transport) until -28s
quic: keep, kept: kept`},
		{name: "confirmed a while ago", facts: between(tcpConn(drains(drainConfirmed, 6*time.Second)), quicConn()),
			want: `consolidating; tells; steers to quic; next look in 400ms
tcp: ask, quiet: quiet for 30 s, closed next (quic over tcp by transport) until -28s
quic: keep, kept: kept`},
		{name: "confirmed long ago", facts: between(tcpConn(drains(drainConfirmed, 21*time.Second)), quicConn()),
			want: `consolidating; tells; steers to quic; next look in 25ms
tcp: ask, quiet: quiet for 30 s, closed next (quic over tcp by transport) until -28s
quic: keep, kept: kept`},
		{name: "another process, by what serves", facts: between(tcpConn(serves, carries(1, 0)), quicConn(lacks)),
			want: `its connections lead to different processes that share its key, so that all are kept; left; next look in 5s
tcp: keep, other process: kept: the peer's connections lead to different processes
quic: keep, other process: kept: the peer's connections lead to different processes`},
		{name: "switched off", facts: between(tcpConn(lacks, carries(1, 1)), quicConn(lacks)).with(follower),
			want: `consolidating; steers to quic; next look in 5s
tcp: wait, all streams move, moving: 2 streams to move (quic over tcp by transport)
quic: keep, kept: kept`},
		{name: "switched off, as far as it answers", facts: between(tcpConn(silent, carries(1, 1)), quicConn(lacks)).with(follower),
			want: `consolidating; steers to quic; next look in 3s
tcp: wait, all streams move, moving: 2 streams to move
quic: keep, kept: kept`},
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
			require.Equal(t, tc.want, inFull(tc.facts, &p))
			mustHold(t, tc.facts, &p)
		})
	}
}
