// Package policy ranks the connections to one peer, so that the best of them
// can be kept.
//
// It is pure: a connection comes in as a [Candidate], a value that whoever
// calls has filled; out comes a [Ranking], the candidates best first and, for
// each one that lost, the rule that decided and what it saw:
//
//	rule direct: true over false
//
// Nothing here does I/O, reads a clock or knows a host, so the same candidates
// always rank the same, in whatever order they are given.
//
// A [Policy] is usually a [Chain] of rules, the most important one first.
// Each rule only has to say what a candidate is worth to it: two candidates
// that are worth the same are left to the next rule. [Default] is the chain to
// start from. [Weighted] adds up what the rules say instead, [Func] makes a
// policy or a rule of a function, and [Parse] reads a policy from one line of
// text, which is also what its String writes:
//
//	chain(unlimited, direct, never(cidr 10.0.0.0/8), rtt, older)
//
// docs/policies.md has all rules, when to use which, and worked examples.
//
// Some of what a rule may look at costs something to find out, such as a
// round-trip time. [Uses] tells whether a policy looks at it at all.
//
// # Nothing may flap
//
// Moving to another winner costs a migration of every stream, so a ranking has
// to be an order, and has to hold still. Every rule here is a strict weak
// order, with missing values too, because it compares what each candidate is
// worth by itself and never judges a pair: an unknown value has a place (the
// last), noise is dealt with by fixed bands, and what favours the present winner
// is a discount on its own measurement. "As good within 20 %" and "not
// comparable while unknown" are no orders: by them A can beat B, B beat C, and
// C beat A. Candidates that are worth the same in everything are no reason to
// move, so the present winner comes before its equals.
package policy

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
)

// Policy ranks the connections to one peer. An implementation must be pure and
// safe for concurrent use, must not modify or keep what it is given, and must
// rank the same candidates the same whatever their order.
type Policy interface {
	// Rank ranks candidates, of which there may be any number. Their IDs
	// must be distinct. It does not block.
	Rank(candidates []Candidate) Ranking
	// String is the policy in one line, for logs and for Parse.
	String() string
}

// Ranking is the outcome of [Policy.Rank]. It shares no memory with what was
// ranked.
type Ranking struct {
	// Order has all candidates, best first.
	Order []Candidate
	// Decisions has one entry for each loser, in the order of Order:
	// Decisions[i] says why Order[i+1] lost to the winner, Order[0].
	Decisions []Decision
}

// Winner returns the best candidate. It is false when there were none.
func (r Ranking) Winner() (Candidate, bool) {
	if len(r.Order) == 0 {
		return Candidate{}, false
	}
	return r.Order[0], true
}

// Decision says why a candidate lost to the winner.
type Decision struct {
	Winner, Loser Candidate
	// Rule is the name of the rule that decided; for a Weighted policy, of the
	// rule that contributed most to the difference.
	Rule string
	// WinnerValue and LoserValue are what the rule saw in each.
	WinnerValue, LoserValue string
	// WinnerScore and LoserScore are the total scores, if the policy is
	// Weighted. A Chain leaves both 0.
	WinnerScore, LoserScore float64
}

// String is the decision as a sentence: "rule direct: true over false". If there
// are scores, they come first: "score 1300 over 305, most by rule direct: true
// over false", or "equal scores of 1300, rule incumbent: true over false".
func (d Decision) String() string {
	rule := fmt.Sprintf("rule %s: %s over %s", d.Rule, d.WinnerValue, d.LoserValue)
	winner, loser := tellApart(d.WinnerScore, d.LoserScore)
	switch {
	case d.WinnerScore == 0 && d.LoserScore == 0:
		return rule
	case d.WinnerScore == d.LoserScore:
		return fmt.Sprintf("equal scores of %s, %s", winner, rule)
	default:
		return fmt.Sprintf("score %s over %s, most by %s", winner, loser, rule)
	}
}

// tellApart returns a and b as texts: if they differ, with as few decimals as show
// that, else with up to two.
func tellApart(a, b float64) (string, string) {
	if a == b {
		text := strconv.FormatFloat(math.Round(a*100)/100, 'f', -1, 64)
		return text, text
	}
	for decimals := 0; ; decimals++ {
		textA := strconv.FormatFloat(a, 'f', decimals, 64)
		textB := strconv.FormatFloat(b, 'f', decimals, 64)
		if textA != textB {
			return textA, textB
		}
	}
}

// rank ranks candidates by compare, which is like Rule.Compare and also returns
// the rule that decided. It must tell any two candidates of different ID apart.
func rank(candidates []Candidate, compare func(a, b Candidate) (Rule, int)) Ranking {
	if len(candidates) == 0 {
		return Ranking{}
	}
	order := slices.Clone(candidates)
	slices.SortFunc(order, func(a, b Candidate) int {
		_, worse := compare(b, a)
		return worse
	})
	winner, losers := order[0], order[1:]
	decisions := make([]Decision, 0, len(losers))
	for _, loser := range losers {
		rule, _ := compare(winner, loser)
		decisions = append(decisions, Decision{
			Winner:      winner,
			Loser:       loser,
			Rule:        rule.Name(),
			WinnerValue: rule.Value(winner),
			LoserValue:  rule.Value(loser),
		})
	}
	return Ranking{Order: order, Decisions: decisions}
}

// breakTie compares candidates that a policy's rules do not tell apart: the
// incumbent first, since a change for nothing costs a migration of every stream,
// then the lower ID, which has no meaning beyond making the ranking independent
// of the order of its input.
func breakTie(a, b Candidate) (Rule, int) {
	if n := staysIncumbent.Compare(a, b); n != 0 {
		return staysIncumbent, n
	}
	return byID{}, byID{}.Compare(a, b)
}

// The rules after the last.
var staysIncumbent = Incumbent()

type byID struct{}

func (byID) Name() string               { return "id" }
func (byID) Compare(a, b Candidate) int { return strings.Compare(b.ID, a.ID) }
func (byID) Value(c Candidate) string   { return c.ID }
func (byID) String() string             { return "id" }

// Default returns the policy that fits most hosts. The first rule that tells
// two connections apart decides:
//
//  1. [Unlimited]: what the relay may cut at any moment is the last choice
//  2. [Direct]: a relay costs a detour, and its operator's bandwidth
//  3. [ReachOrder]: loopback, private, public; the shorter way
//  4. [TransportOrder]: QUIC, WebTransport, WebRTC, TCP, WebSocket
//  5. [PinnedStreams]: keep what cannot move
//  6. [RTTBand]: clearly faster
//  7. [MoreStreams]: the fewest migrations
//  8. [Older]: the least change
//
// What cannot change while a connection lives stands before what can, so that
// most rankings are settled for good when the connection opens.
func Default() Policy { return Chain(DefaultRules()...) }

// DefaultRules returns the rules of [Default], in order, for a chain that only
// puts a rule before them or after:
//
//	rules := append([]policy.Rule{policy.Never(policy.OnInterface("wwan0"))}, policy.DefaultRules()...)
//
// In text that is chain(never(interface wwan0), default).
func DefaultRules() []Rule {
	return []Rule{
		Unlimited(),
		Direct(),
		ReachOrder(),
		TransportOrder(),
		PinnedStreams(),
		RTTBand(),
		MoreStreams(),
		Older(),
	}
}
