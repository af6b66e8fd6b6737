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
// start from.
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
// C beat A.
package policy

import "fmt"

// Policy ranks the connections to one peer. An implementation must be pure and
// safe for concurrent use, must not modify or keep what it is given, and must
// rank the same candidates the same whatever their order.
type Policy interface {
	// Rank ranks candidates, of which there may be any number. Their IDs
	// must be distinct. It does not block.
	Rank(candidates []Candidate) Ranking
	// String is the policy in one line, for logs.
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
	// Rule is the name of the rule that decided.
	Rule string
	// WinnerValue and LoserValue are what the rule saw in each.
	WinnerValue, LoserValue string
}

// String is the decision as a sentence: "rule direct: true over false".
func (d Decision) String() string {
	return fmt.Sprintf("rule %s: %s over %s", d.Rule, d.WinnerValue, d.LoserValue)
}

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
func Default() Policy {
	return Chain(
		Unlimited(),
		Direct(),
		ReachOrder(),
		TransportOrder(),
		PinnedStreams(),
		RTTBand(),
		MoreStreams(),
		Older(),
	)
}
