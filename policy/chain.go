package policy

import (
	"slices"
	"strings"
)

// Chain returns the policy that compares two candidates by each of rules in
// turn: the first one that tells them apart decides. Each loser is judged
// against the winner.
//
// Of candidates that no rule tells apart, as with no rules at all, the incumbent
// comes first and the decision names the rule "incumbent"; the others rank by
// ID, the lower one first, and the decision names the rule "id".
//
// If each rule is a strict weak order, then so is the chain. Its String has the
// String of each rule: "chain(unlimited, direct)".
func Chain(rules ...Rule) Policy {
	return chain(slices.Clone(rules))
}

type chain []Rule

func (c chain) Rank(candidates []Candidate) Ranking { return rank(candidates, c.compare) }

func (c chain) compare(a, b Candidate) (Rule, int) {
	for _, rule := range c {
		if n := rule.Compare(a, b); n != 0 {
			return rule, n
		}
	}
	return breakTie(a, b)
}

func (c chain) Uses() Use {
	var all Use
	for _, rule := range c {
		all = all.or(usesOf(rule))
	}
	return all
}

func (c chain) String() string {
	texts := make([]string, len(c))
	for i, rule := range c {
		texts[i] = rule.String()
	}
	return "chain(" + strings.Join(texts, ", ") + ")"
}
