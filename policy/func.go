package policy

import (
	"cmp"
	"fmt"
	"regexp"
	"strconv"
)

// FuncRule is a rule made of a function, by [Func]. It is a [Policy] too: the
// chain of this rule alone.
type FuncRule struct {
	name    string
	compare func(a, b Candidate) int
	value   func(Candidate) string
	use     Use
}

// FuncOption is an option of [Func] and [ScoreFunc].
type FuncOption func(*FuncRule)

// WithValue sets what the rule shows of a candidate in a decision. It must differ
// between candidates that the rule tells apart. Default: for Func the
// candidate's ID, for ScoreFunc the score.
func WithValue(value func(Candidate) string) FuncOption {
	return func(r *FuncRule) { r.value = value }
}

// WithUse declares what the function looks at, of what is only there when a
// policy asks for it: see [Uses]. Default: nothing.
func WithUse(use Use) FuncOption {
	return func(r *FuncRule) { r.use = use }
}

// Func returns the rule, and policy, that compares by a function: positive if a
// is better than b, negative if b is better, 0 if they are equal to it. The
// function must be pure and safe for concurrent use, and it must be a strict
// weak order, as [Rule] has it: a ranking by one that is not depends on the
// order of its input, its decisions may be wrong, and the winner may change
// with nothing else having changed. [CheckRule] tests for that.
//
// A [ScoreFunc] cannot be wrong in this way, and fits into [Weighted].
//
// The name must be one word of lower-case letters, digits, "-" and "_" that
// begins with a letter, and none that a text of this package uses for a rule or
// policy. Func panics otherwise, or if compare is nil. The rule's String is its
// name; [Parse] understands that if it is given the rule.
func Func(name string, compare func(a, b Candidate) int, opts ...FuncOption) FuncRule {
	if err := checkName(name); err != nil {
		panic(err)
	}
	if compare == nil {
		panic(fmt.Errorf("policy: rule %s has no function", name))
	}
	rule := FuncRule{
		name:    name,
		compare: compare,
		value:   func(c Candidate) string { return c.ID },
	}
	for _, opt := range opts {
		opt(&rule)
	}
	return rule
}

var ownName = regexp.MustCompile(`^[a-z][a-z0-9_-]*$`)

// checkName returns an error unless name can stand in the text of a policy for a
// rule that is not of this package.
func checkName(name string) error {
	if !ownName.MatchString(name) {
		return fmt.Errorf(`policy: rule name %q is not one word of lower-case letters, digits, "-" and "_"`, name)
	}
	if isReserved(name) {
		return fmt.Errorf("policy: rule name %q already has a meaning", name)
	}
	return nil
}

// Name is the name given to [Func].
func (r FuncRule) Name() string { return r.name }

// Compare is what the function returns.
func (r FuncRule) Compare(a, b Candidate) int { return r.compare(a, b) }

// Value is as set by [WithValue].
func (r FuncRule) Value(c Candidate) string { return r.value(c) }

// String is the name.
func (r FuncRule) String() string { return r.name }

// Uses is as set by [WithUse].
func (r FuncRule) Uses() Use { return r.use }

// Rank ranks by this rule alone, as the [Chain] of it does.
func (r FuncRule) Rank(candidates []Candidate) Ranking { return chain{r}.Rank(candidates) }

// ScoreRule is a rule made of a function, by [ScoreFunc].
type ScoreRule struct {
	FuncRule
	score func(Candidate) float64
}

// ScoreFunc returns the rule, and policy, that prefers candidates of a higher
// score. It is a strict weak order whatever the function is. The function must
// be pure and safe for concurrent use; what it returns is brought into the range
// of a score, 0 to 100, and NaN counts as 0. Name, options and panics are as with
// [Func].
func ScoreFunc(name string, score func(c Candidate) float64, opts ...FuncOption) ScoreRule {
	if score == nil {
		panic(fmt.Errorf("policy: rule %s has no function", name))
	}
	bounded := func(c Candidate) float64 {
		if points := score(c); points > 0 { // NaN is not
			return min(points, maxScore)
		}
		return 0
	}
	compare := func(a, b Candidate) int { return cmp.Compare(bounded(a), bounded(b)) }
	show := WithValue(func(c Candidate) string { return strconv.FormatFloat(bounded(c), 'g', -1, 64) })
	return ScoreRule{Func(name, compare, append([]FuncOption{show}, opts...)...), bounded}
}

// Score is what the function returned, from 0 to 100.
func (r ScoreRule) Score(c Candidate) float64 { return r.score(c) }
