package policy

import (
	"cmp"
	"math"
	"strings"
	"testing"
)

// broken is a rule of which each part can be broken.
type broken struct {
	Scored
	compare func(a, b Candidate) int
	score   func(Candidate) float64
	value   func(Candidate) string
}

func (r broken) Compare(a, b Candidate) int { return r.compare(a, b) }
func (r broken) Score(c Candidate) float64  { return r.score(c) }
func (r broken) Value(c Candidate) string   { return r.value(c) }

func TestCheckRule(t *testing.T) {
	sound := MoreStreams()
	within := func(tolerance int) func(a, b Candidate) int {
		return func(a, b Candidate) int {
			if d := a.Streams - b.Streams; d > tolerance || d < -tolerance {
				return d
			}
			return 0
		}
	}
	for _, tt := range []struct {
		name   string
		breaks func(*broken)
		want   string // part of the error
	}{
		{"sound", func(*broken) {}, ""},
		{"compare by magnitude", func(r *broken) { r.compare = func(a, b Candidate) int { return 1000 * (a.Streams - b.Streams) } }, ""},
		{"better than itself", func(r *broken) { r.compare = func(a, b Candidate) int { return 1 } },
			"a candidate is not equal to itself"},
		{"both better", func(r *broken) { r.compare = func(a, b Candidate) int { return max(within(0)(a, b), within(0)(b, a)) } },
			"but Compare(a, b) is 1 and Compare(b, a) is 1"},
		{"only one way", func(r *broken) { r.compare = func(a, b Candidate) int { return max(0, within(0)(a, b)) } },
			"Compare(a, b) is 0 and Compare(b, a) is 1"},
		{"as good within 1", func(r *broken) { r.compare = within(1) },
			"a is equal to b and b is equal to c, but a is not equal to c"},
		{"paper, scissors, stone", func(r *broken) {
			r.compare = func(a, b Candidate) int { return []int{0, 1, -1}[(a.Streams-b.Streams+3)%3] }
		}, "a is better than b and b is better than c, but a is not better than c"},
		{"one value", func(r *broken) { r.value = func(Candidate) string { return "same" } },
			`both have the value "same"`},
		{"too great a score", func(r *broken) { r.score = func(Candidate) float64 { return 100.5 } },
			"the score of a is 100.5, not from 0 to 100"},
		{"a score below 0", func(r *broken) { r.score = func(Candidate) float64 { return -1 } },
			"the score of a is -1, not from 0 to 100"},
		{"a score that is no number", func(r *broken) { r.score = func(Candidate) float64 { return math.NaN() } },
			"the score of a is NaN, not from 0 to 100"},
		{"a score against the order", func(r *broken) { r.score = func(c Candidate) float64 { return float64(10 - c.Streams) } },
			"but its score is"},
		{"different scores of equals", func(r *broken) {
			r.compare = func(a, b Candidate) int { return cmp.Compare(a.Streams/2, b.Streams/2) }
		}, "Compare(a, b) is 0, but their scores are"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rule := broken{sound, sound.Compare, func(c Candidate) float64 { return float64(c.Streams) }, sound.Value}
			tt.breaks(&rule)
			err := CheckRule(rule, Candidate{}, Candidate{Streams: 1}, Candidate{Streams: 2})
			switch {
			case tt.want == "" && err != nil:
				t.Errorf("a sound rule: %v", err)
			case tt.want != "" && err == nil:
				t.Errorf("no error, want one with %q", tt.want)
			case tt.want != "" && !strings.Contains(err.Error(), tt.want):
				t.Errorf("error %q, want one with %q", err, tt.want)
			}
		})
	}
}

func TestCheckRuleOfARuleWithoutScore(t *testing.T) {
	if err := CheckRule(Func("labelled", byLabelled), Candidate{ID: "a"}, Candidate{ID: "b", Labelled: 1}, Candidate{ID: "c", Labelled: 2}); err != nil {
		t.Error(err)
	}
}
