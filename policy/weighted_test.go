package policy

import (
	"testing"
	"time"
)

func TestWeightedDecides(t *testing.T) {
	for _, tt := range []struct {
		name          string
		policy        Policy
		winner, loser Candidate
		decision      string
	}{
		{"a rule of great weight beats two of small weight",
			Weighted(Times(Direct(), 10), Times(RTTBand(), 3), Times(IPVersionOrder(), 3)),
			Candidate{RTT: time.Minute}, Candidate{Relayed: true, RTT: ms, IPVersion: 6},
			"score 1000 over 600, most by rule direct: true over false"},
		{"two rules of small weight beat one of greater weight",
			Weighted(Times(Direct(), 5), Times(RTTBand(), 3), Times(IPVersionOrder(), 3)),
			Candidate{Relayed: true, RTT: ms, IPVersion: 6}, Candidate{RTT: time.Minute},
			"score 600 over 500, most by rule rtt: 1ms over 1m0s"},
		{"of equal contributions the first is named",
			Weighted(Times(IPVersionOrder(), 3), Times(Direct(), 3)),
			Candidate{IPVersion: 6}, Candidate{Relayed: true},
			"score 600 over 0, most by rule ip: v6 over unknown"},
		{"a rule that speaks for the loser is not named",
			Weighted(Times(Older(), 1), Times(Direct(), 9)),
			Candidate{}, Candidate{Relayed: true, Age: time.Hour},
			"score 900 over 50, most by rule direct: true over false"},
		{"a weight of 0 has no effect",
			Weighted(Times(Direct(), 0), Times(MoreStreams(), 1)),
			Candidate{Relayed: true, Streams: 1}, Candidate{},
			"score 10 over 0, most by rule streams: 1 over 0"},
		{"scores that differ little do not look the same",
			Weighted(Times(Older(), 1)),
			Candidate{Age: time.Hour + time.Second}, Candidate{Age: time.Hour},
			"score 50.01 over 50.00, most by rule older: 1h0m1s over 1h0m0s"},
		{"the incumbent's discount has the weight of its rule",
			Weighted(Times(RTTBand(), 2), Times(IPVersionOrder(), 1)),
			Candidate{RTT: 80 * ms, Incumbent: true, IPVersion: 4}, Candidate{RTT: 60 * ms, IPVersion: 4},
			"score 190 over 180, most by rule rtt: 80ms (incumbent) over 60ms"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.winner.ID, tt.loser.ID = "b", "a" // not for the ID
			ranking := tt.policy.Rank([]Candidate{tt.loser, tt.winner})
			decision := ranking.Decisions[0]
			if decision.Winner != tt.winner || decision.Loser != tt.loser {
				t.Errorf("decision is on %+v over %+v", decision.Winner, decision.Loser)
			}
			if got := decision.String(); got != tt.decision {
				t.Errorf("decision %q, want %q", got, tt.decision)
			}
		})
	}
}

func TestWeightedFindsTheSameRuleEitherWay(t *testing.T) {
	policy := weighted{Times(Older(), 1), Times(Direct(), 9)}
	better, worse := Candidate{ID: "b"}, Candidate{ID: "a", Relayed: true, Age: time.Hour}
	if rule, order := policy.compare(better, worse); order <= 0 || rule.Name() != "direct" {
		t.Errorf("better and worse: %d by %s, want more than 0 by direct", order, rule)
	}
	if rule, order := policy.compare(worse, better); order >= 0 || rule.Name() != "direct" {
		t.Errorf("worse and better: %d by %s, want less than 0 by direct", order, rule)
	}
}

func TestDecisionWithoutScoresAndWithEqualOnes(t *testing.T) {
	d := Decision{Rule: "id", WinnerValue: "a", LoserValue: "b"}
	if got, want := d.String(), "rule id: a over b"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	for score, want := range map[float64]string{
		300:         "equal scores of 300, rule id: a over b",
		0.5:         "equal scores of 0.5, rule id: a over b",
		400.0 / 3:   "equal scores of 133.33, rule id: a over b",
		65535 * 100: "equal scores of 6553500, rule id: a over b",
	} {
		d.WinnerScore, d.LoserScore = score, score
		if got := d.String(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestWeightedDoesNotFlapWithAge(t *testing.T) {
	// Another rule has the younger one ahead by a little less than the older
	// one is ahead in age at first. With time that lead melts away: one change
	// of the winner, and never back.
	policy := Weighted(Times(Older(), 10), Times(MoreStreams(), 1))
	incumbent, changes := "old", 0
	for minute := time.Duration(1); minute < 10_000; minute++ {
		old := Candidate{ID: "old", Age: minute*time.Minute + 10*time.Minute, Incumbent: incumbent == "old"}
		young := Candidate{ID: "young", Age: minute * time.Minute, Streams: 9, Incumbent: incumbent == "young"}
		winner, _ := policy.Rank([]Candidate{old, young}).Winner()
		if winner.ID != incumbent {
			incumbent, changes = winner.ID, changes+1
		}
	}
	if changes != 1 || incumbent != "young" {
		t.Errorf("%d changes of the winner, to %s at last; want 1, to young", changes, incumbent)
	}
}

func TestWeightedDoesNotKeepItsArguments(t *testing.T) {
	terms := []Term{Times(Direct(), 1), Times(Older(), 2)}
	policy := Weighted(terms...)
	terms[0] = Times(Unlimited(), 9)
	if got, want := policy.String(), "weighted(direct*1, older*2)"; got != want {
		t.Errorf("the policy changed with the caller's slice: %q, want %q", got, want)
	}
}

func TestWeightedString(t *testing.T) {
	for want, policy := range map[string]Policy{
		"weighted()":                             Weighted(),
		"weighted(direct*10, rtt*3)":             Weighted(Times(Direct(), 10), Times(RTTBand(), 3)),
		"weighted(reach(public)*65535, older*0)": Weighted(Times(ReachOrder(Public), 65535), Times(Older(), 0)),
	} {
		if got := policy.String(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
