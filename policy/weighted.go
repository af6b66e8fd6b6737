package policy

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Term is a rule and how much it weighs in a [Weighted] policy: see [Times].
type Term struct {
	rule   Scored
	weight uint16
}

// Times returns rule with a weight from 0, by which it has no effect, to 65535.
// In text it is direct*10.
func Times(rule Scored, weight uint16) Term { return Term{rule, weight} }

func (t Term) points(c Candidate) float64 { return float64(t.weight) * t.rule.Score(c) }

// Weighted returns the policy that gives each candidate a total score, the sum
// over terms of the rule's Score, which is from 0 to 100, times its weight. The
// greatest total wins. A decision shows the totals of winner and loser, and
// names the rule that contributed most to their difference; of two rules that
// did so equally, the first one.
//
// Unlike in a [Chain], several small advantages can outweigh a big one. A rule
// that nothing must outweigh needs a weight greater than that of all others
// together.
//
// A total depends on nothing but the candidate, so the ranking is a strict weak
// order whatever the rules are, and what favours the incumbent in a rule does so
// here, times the weight. Candidates of equal totals rank as those that no rule
// of a chain tells apart. The String of the policy is
// "weighted(direct*10, rtt*3)".
func Weighted(terms ...Term) Policy {
	return weighted(slices.Clone(terms))
}

type weighted []Term

func (w weighted) Rank(candidates []Candidate) Ranking {
	ranking := rank(candidates, w.compare)
	for i := range ranking.Decisions {
		d := &ranking.Decisions[i]
		d.WinnerScore, d.LoserScore = w.total(d.Winner), w.total(d.Loser)
	}
	return ranking
}

func (w weighted) total(c Candidate) float64 {
	var total float64
	for _, term := range w {
		// The conversion rounds the product, so that the total of equal points
		// is the same wherever the compiler adds it up.
		total += float64(term.points(c))
	}
	return total
}

func (w weighted) compare(a, b Candidate) (Rule, int) {
	order := cmp.Compare(w.total(a), w.total(b))
	if order == 0 {
		return breakTie(a, b)
	}
	var decisive Rule
	var most float64
	for _, term := range w {
		// Where the totals differ, some term does in the same direction.
		if by := (term.points(a) - term.points(b)) * float64(order); by > most {
			decisive, most = term.rule, by
		}
	}
	return decisive, order
}

func (w weighted) Uses() Use {
	var all Use
	for _, term := range w {
		all = all.or(usesOf(term.rule))
	}
	return all
}

func (w weighted) String() string {
	texts := make([]string, len(w))
	for i, term := range w {
		texts[i] = fmt.Sprintf("%s*%d", term.rule, term.weight)
	}
	return "weighted(" + strings.Join(texts, ", ") + ")"
}
