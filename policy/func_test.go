package policy

import (
	"cmp"
	"math"
	"strconv"
	"testing"

	ma "github.com/multiformats/go-multiaddr"
)

func byBytes(a, b Candidate) int { return cmp.Compare(a.Bytes, b.Bytes) }

func TestFuncIsARuleAndAPolicy(t *testing.T) {
	bytes := func(c Candidate) string { return strconv.FormatUint(c.Bytes, 10) + " B" }
	candidates := []Candidate{{ID: "a", Bytes: 1}, {ID: "b", Bytes: 3, Relayed: true}, {ID: "c", Bytes: 2}}
	for _, tt := range []struct {
		name      string
		policy    Policy
		text      string
		order     string
		decisions []string
	}{
		{"policy", Func("volume", byBytes), "volume", "bca",
			[]string{"rule volume: b over c", "rule volume: b over a"}},
		{"rule", Chain(Direct(), Func("volume", byBytes, WithValue(bytes))), "chain(direct, volume)", "cab",
			[]string{"rule volume: 2 B over 1 B", "rule direct: true over false"}},
		{"score as policy", ScoreFunc("volume", func(c Candidate) float64 { return float64(c.Bytes) }), "volume", "bca",
			[]string{"rule volume: 3 over 2", "rule volume: 3 over 1"}},
		{"score as weighted rule",
			Weighted(Times(Direct(), 1), Times(ScoreFunc("volume", func(c Candidate) float64 { return float64(c.Bytes) }, WithValue(bytes)), 80)),
			"weighted(direct*1, volume*80)", "cba",
			[]string{"score 260 over 240, most by rule direct: true over false", "score 260 over 180, most by rule volume: 2 B over 1 B"}},
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
		"no name":              func() { Func("", byBytes) },
		"two words":            func() { Func("two words", byBytes) },
		"upper case":           func() { Func("Volume", byBytes) },
		"a digit first":        func() { Func("4volume", byBytes) },
		"the name of a rule":   func() { Func("direct", byBytes) },
		"the name of a policy": func() { Func("default", byBytes) },
		"the tie-break":        func() { Func("id", byBytes) },
		"no function":          func() { Func("volume", nil) },
		"no score function":    func() { ScoreFunc("volume", nil) },
		"a name for a score":   func() { ScoreFunc("rtt", func(Candidate) float64 { return 0 }) },
	} {
		t.Run(name, func(t *testing.T) { mustPanic(t, build) })
	}
}

// foreign is a policy and a rule of a type of its own.
type foreign struct{ FuncRule }

func (foreign) Uses() Use { return Use{Throughput: true} }

// silent is a rule that declares nothing.
type silent struct{ Rule }

// silentPolicy is a policy that declares nothing.
type silentPolicy struct{ Policy }

func TestUses(t *testing.T) {
	rtt, throughput, onInterface := Use{RTT: true}, Use{Throughput: true}, Use{Interface: true}
	own := Func("own", byBytes, WithUse(onInterface))
	for _, tt := range []struct {
		policy Policy
		want   Use
	}{
		{Default(), rtt},
		{Chain(), Use{}},
		{Chain(Unlimited(), Direct(), ReachOrder(), TransportOrder(), PinnedStreams(), MoreStreams(), Older(), Incumbent()), Use{}},
		{Chain(Direct(), RTTBand()), rtt},
		{Chain(ThroughputBand(), RTTBand()), Use{RTT: true, Throughput: true}},
		{Chain(Never(RemotePrefix(ma.StringCast("/ip4/192.0.2.1")))), Use{}},
		{Chain(Never(RemotePrefix(ma.StringCast("/ip4/192.0.2.1")), OnInterface("eth0"))), onInterface},
		{Chain(Prefer(OnInterface("eth0"))), onInterface},
		{Weighted(), Use{}},
		{Weighted(Times(ThroughputBand(), 3), Times(Direct(), 1)), throughput},
		{Weighted(Times(Direct(), 1), Times(RTTBand(), 3), Times(Prefer(OnInterface("eth0")), 1)), Use{RTT: true, Interface: true}},
		{Func("own", byBytes), Use{}},
		{own, onInterface},
		{Chain(Direct(), own), onInterface},
		{Weighted(Times(ScoreFunc("own", func(Candidate) float64 { return 0 }, WithUse(rtt)), 1)), rtt},
		{foreign{own}, throughput},
		{Chain(foreign{own}), throughput},
		{Chain(silent{RTTBand()}), Use{}},
		{silentPolicy{Default()}, Use{}},
	} {
		if got := Uses(tt.policy); got != tt.want {
			t.Errorf("%v uses %+v, want %+v", tt.policy, got, tt.want)
		}
	}
}
