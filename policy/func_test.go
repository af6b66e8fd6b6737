package policy

import (
	"cmp"
	"math"
	"strconv"
	"testing"

	ma "github.com/multiformats/go-multiaddr"
)

func byLabelled(a, b Candidate) int { return cmp.Compare(a.Labelled, b.Labelled) }

func TestFuncIsARuleAndAPolicy(t *testing.T) {
	labelled := func(c Candidate) string { return strconv.Itoa(c.Labelled) + " labelled" }
	candidates := []Candidate{{ID: "a", Labelled: 1}, {ID: "b", Labelled: 3, Relayed: true}, {ID: "c", Labelled: 2}}
	for _, tt := range []struct {
		name      string
		policy    Policy
		text      string
		order     string
		decisions []string
	}{
		{"policy", Func("labelled", byLabelled), "labelled", "bca",
			[]string{"rule labelled: b over c", "rule labelled: b over a"}},
		{"rule", Chain(Direct(), Func("labelled", byLabelled, WithValue(labelled))), "chain(direct, labelled)", "cab",
			[]string{"rule labelled: 2 labelled over 1 labelled", "rule direct: true over false"}},
		{"score as policy", ScoreFunc("labelled", func(c Candidate) float64 { return float64(c.Labelled) }), "labelled", "bca",
			[]string{"rule labelled: 3 over 2", "rule labelled: 3 over 1"}},
		{"score as weighted rule",
			Weighted(Times(Direct(), 1), Times(ScoreFunc("labelled", func(c Candidate) float64 { return float64(c.Labelled) }, WithValue(labelled)), 80)),
			"weighted(direct*1, labelled*80)", "cba",
			[]string{"score 260 over 240, most by rule direct: true over false", "score 260 over 180, most by rule labelled: 2 labelled over 1 labelled"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.policy.String(); got != tt.text {
				t.Errorf("text %q, want %q", got, tt.text)
			}
			ranking := tt.policy.Rank(candidates)
			if got := ids(ranking.Order); got != tt.order {
				t.Errorf("order %q, want %q", got, tt.order)
			}
			for i, want := range tt.decisions {
				if got := ranking.Decisions[i].String(); got != want {
					t.Errorf("decision %q, want %q", got, want)
				}
			}
		})
	}
}

func TestScoreFuncIsBounded(t *testing.T) {
	var returned float64
	rule := ScoreFunc("own", func(Candidate) float64 { return returned })
	for _, tt := range []struct{ returned, want float64 }{
		{0, 0}, {0.25, 0.25}, {100, 100}, {100.5, 100}, {math.Inf(1), 100}, {-1, 0}, {math.Inf(-1), 0}, {math.NaN(), 0},
	} {
		returned = tt.returned
		if got := rule.Score(Candidate{}); got != tt.want {
			t.Errorf("the function returns %v: score %v, want %v", tt.returned, got, tt.want)
		}
	}
}

func TestScoreFuncIsAStrictWeakOrderWhateverTheFunction(t *testing.T) {
	scores := []float64{math.NaN(), math.Inf(-1), -1, 0, 1e-300, 50, 100, 101, math.Inf(1)}
	rule := ScoreFunc("own", func(c Candidate) float64 { return scores[c.Streams] })
	var candidates []Candidate
	for i := range scores {
		candidates = append(candidates, Candidate{Streams: i})
	}
	if err := CheckRule(rule, candidates...); err != nil {
		t.Error(err)
	}
}

func TestFuncPanics(t *testing.T) {
	for name, build := range map[string]func(){
		"no name":              func() { Func("", byLabelled) },
		"two words":            func() { Func("two words", byLabelled) },
		"upper case":           func() { Func("Labelled", byLabelled) },
		"a digit first":        func() { Func("4labelled", byLabelled) },
		"the name of a rule":   func() { Func("direct", byLabelled) },
		"the name of a policy": func() { Func("default", byLabelled) },
		"the tie-break":        func() { Func("id", byLabelled) },
		"no function":          func() { Func("labelled", nil) },
		"no score function":    func() { ScoreFunc("labelled", nil) },
		"a name for a score":   func() { ScoreFunc("rtt", func(Candidate) float64 { return 0 }) },
	} {
		t.Run(name, func(t *testing.T) { mustPanic(t, build) })
	}
}

// foreign is a policy and a rule of a type of its own.
type foreign struct{ FuncRule }

func (foreign) Uses() Use { return Use{RTT: true} }

// silent is a rule that declares nothing.
type silent struct{ Rule }

// silentPolicy is a policy that declares nothing.
type silentPolicy struct{ Policy }

func TestUses(t *testing.T) {
	rtt, onInterface := Use{RTT: true}, Use{Interface: true}
	own := Func("own", byLabelled, WithUse(onInterface))
	for _, tt := range []struct {
		policy Policy
		want   Use
	}{
		{Default(), rtt},
		{Chain(), Use{}},
		{Chain(Unlimited(), Direct(), ReachOrder(), TransportOrder(), PinnedStreams(), MoreStreams(), Older(), Incumbent()), Use{}},
		{Chain(Direct(), RTTBand()), rtt},
		{Chain(RTTBand(), Prefer(OnInterface("eth0"))), Use{RTT: true, Interface: true}},
		{Chain(Never(RemotePrefix(ma.StringCast("/ip4/192.0.2.1")))), Use{}},
		{Chain(Never(RemotePrefix(ma.StringCast("/ip4/192.0.2.1")), OnInterface("eth0"))), onInterface},
		{Chain(Prefer(OnInterface("eth0"))), onInterface},
		{Weighted(), Use{}},
		{Weighted(Times(RTTBand(), 3), Times(Direct(), 1)), rtt},
		{Weighted(Times(Direct(), 1), Times(RTTBand(), 3), Times(Prefer(OnInterface("eth0")), 1)), Use{RTT: true, Interface: true}},
		{Func("own", byLabelled), Use{}},
		{own, onInterface},
		{Chain(Direct(), own), onInterface},
		{Weighted(Times(ScoreFunc("own", func(Candidate) float64 { return 0 }, WithUse(rtt)), 1)), rtt},
		{foreign{own}, rtt},
		{Chain(foreign{own}), rtt},
		{Chain(silent{RTTBand()}), Use{}},
		{silentPolicy{Default()}, Use{}},
	} {
		if got := Uses(tt.policy); got != tt.want {
			t.Errorf("%v uses %+v, want %+v", tt.policy, got, tt.want)
		}
	}
}
