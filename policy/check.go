package policy

import (
	"cmp"
	"errors"
	"fmt"
)

// CheckRule returns an error if, among candidates, rule breaks what [Rule] or
// [Scored] demands of it. The error says what it breaks, and by which candidates.
// It is for the tests of a rule of your own, best in a fuzz test that draws the
// candidates at random, with many of equal, extreme and missing values: a rule that
// is no order usually shows it where one value is missing, or where three lie
// close together.
//
// It compares each three candidates, so 100 take a million comparisons.
func CheckRule(rule Rule, candidates ...Candidate) error {
	for _, a := range candidates {
		if rule.Compare(a, a) != 0 {
			return fmt.Errorf("rule %s: a candidate is not equal to itself: %+v", rule.Name(), a)
		}
		for _, b := range candidates {
			if err := checkPair(rule, a, b); err != nil {
				return fmt.Errorf("rule %s: %w:\na = %+v\nb = %+v", rule.Name(), err, a, b)
			}
			for _, c := range candidates {
				if err := checkTriple(rule, a, b, c); err != nil {
					return fmt.Errorf("rule %s: %w:\na = %+v\nb = %+v\nc = %+v", rule.Name(), err, a, b, c)
				}
			}
		}
	}
	scored, ok := rule.(Scored)
	if !ok {
		return nil
	}
	for _, a := range candidates {
		for _, b := range candidates {
			if err := checkScores(scored, a, b); err != nil {
				return fmt.Errorf("rule %s: %w:\na = %+v\nb = %+v", rule.Name(), err, a, b)
			}
		}
	}
	return nil
}

func checkPair(rule Rule, a, b Candidate) error {
	order := cmp.Compare(rule.Compare(a, b), 0)
	if reverse := cmp.Compare(rule.Compare(b, a), 0); order != -reverse {
		return fmt.Errorf("one of a and b must be better if the other is worse, but Compare(a, b) is %d and Compare(b, a) is %d", order, reverse)
	}
	if va, vb := rule.Value(a), rule.Value(b); order != 0 && va == vb {
		return fmt.Errorf("Compare tells a and b apart, but both have the value %q", va)
	}
	return nil
}

func checkTriple(rule Rule, a, b, c Candidate) error {
	ab, bc, ac := rule.Compare(a, b), rule.Compare(b, c), rule.Compare(a, c)
	if ab > 0 && bc > 0 && ac <= 0 {
		return errors.New("a is better than b and b is better than c, but a is not better than c")
	}
	if ab == 0 && bc == 0 && ac != 0 {
		return errors.New("a is equal to b and b is equal to c, but a is not equal to c")
	}
	return nil
}

func checkScores(rule Scored, a, b Candidate) error {
	order, sa, sb := rule.Compare(a, b), rule.Score(a), rule.Score(b)
	switch {
	case !(sa >= 0 && sa <= maxScore): // NaN is neither
		return fmt.Errorf("the score of a is %v, not from 0 to %v", sa, maxScore)
	case order == 0 && sa != sb:
		return fmt.Errorf("Compare(a, b) is 0, but their scores are %v and %v", sa, sb)
	case order > 0 && sa < sb:
		return fmt.Errorf("a is better than b, but its score is %v and that of b is %v", sa, sb)
	}
	return nil
}
