package policy

import (
	"slices"
	"strings"
)

// Chain returns the policy that compares two candidates by each of rules in
// turn: the first one that tells them apart decides. Each loser is judged
// against the winner.
//
// Candidates that no rule tells apart, as with no rules at all, rank by ID, the
// lower one first, and the decision names the rule "id". That has no meaning
// beyond making the ranking independent of the order of its input.
//
// If each rule is a strict weak order, then so is the chain. Its String has the
// String of each rule: "chain(unlimited, direct)".
func Chain(rules ...Rule) Policy {
	return chain(slices.Clone(rules))
}

type chain []Rule

func (c chain) Rank(candidates []Candidate) Ranking {
	if len(candidates) == 0 {
		return Ranking{}
	}
	order := slices.Clone(candidates)
	slices.SortFunc(order, func(a, b Candidate) int {
		_, worse := c.compare(b, a)
		return worse
	})
	winner, losers := order[0], order[1:]
	decisions := make([]Decision, 0, len(losers))
	for _, loser := range losers {
		rule, _ := c.compare(winner, loser)
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

// compare compares as Rule.Compare does, and also returns the rule that decided.
func (c chain) compare(a, b Candidate) (Rule, int) {
	for _, rule := range c {
		if n := rule.Compare(a, b); n != 0 {
			return rule, n
		}
	}
	return tieBreak{}, tieBreak{}.Compare(a, b)
}

func (c chain) String() string {
	texts := make([]string, len(c))
	for i, rule := range c {
		texts[i] = rule.String()
	}
	return "chain(" + strings.Join(texts, ", ") + ")"
}

// tieBreak is the rule after the last.
type tieBreak struct{}

func (tieBreak) Name() string               { return "id" }
func (tieBreak) Compare(a, b Candidate) int { return strings.Compare(b.ID, a.ID) }
func (tieBreak) Value(c Candidate) string   { return c.ID }
func (tieBreak) String() string             { return "id" }
