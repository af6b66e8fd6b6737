package policy

import (
	"reflect"
	"slices"
	"testing"
	"time"
)

func TestChainJudgesEachLoserAgainstTheWinner(t *testing.T) {
	// c loses to b by streams and would beat a by streams; against the winner,
	// a, the first rule decides.
	a := Candidate{ID: "a", Streams: 1}
	b := Candidate{ID: "b", Streams: 5, Relayed: true}
	c := Candidate{ID: "c", Streams: 2, Relayed: true}
	ranking := Chain(Direct(), MoreStreams()).Rank([]Candidate{c, b, a})

	if got := ids(ranking.Order); got != "abc" {
		t.Fatalf("order %q, want %q", got, "abc")
	}
	want := []Decision{
		{Winner: a, Loser: b, Rule: "direct", WinnerValue: "true", LoserValue: "false"},
		{Winner: a, Loser: c, Rule: "direct", WinnerValue: "true", LoserValue: "false"},
	}
	if !slices.Equal(ranking.Decisions, want) {
		t.Errorf("decisions %v, want %v", ranking.Decisions, want)
	}
}

func TestChainWithoutRulesRanksByID(t *testing.T) {
	ranking := Chain().Rank([]Candidate{{ID: "c"}, {ID: "a", Limited: true}, {ID: "b"}})
	if got := ids(ranking.Order); got != "abc" {
		t.Errorf("order %q, want %q", got, "abc")
	}
	for i, want := range []string{"rule id: a over b", "rule id: a over c"} {
		if got := ranking.Decisions[i].String(); got != want {
			t.Errorf("decision %q, want %q", got, want)
		}
	}
}

func TestChainDoesNotKeepItsArguments(t *testing.T) {
	rules := []Rule{Direct(), Older()}
	order := []Transport{TCP, QUIC}
	chain, transport := Chain(rules...), TransportOrder(order...)
	rules[0], order[0] = Unlimited(), WebSocket
	if got, want := chain.String(), "chain(direct, older)"; got != want {
		t.Errorf("the chain changed with the caller's slice: %q, want %q", got, want)
	}
	if transport.Compare(Candidate{Transport: TCP}, Candidate{Transport: QUIC}) <= 0 {
		t.Error("the order changed with the caller's slice")
	}
}

func TestChainString(t *testing.T) {
	for want, policy := range map[string]Policy{
		"chain()":       Chain(),
		"chain(direct)": Chain(Direct()),
		"chain(reach(public), transport(tcp, other), rtt)": Chain(ReachOrder(Public), TransportOrder(TCP, OtherTransport), RTTBand()),
	} {
		if got := policy.String(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// mixed has candidates of which some tie by every rule of Default.
func mixed() []Candidate {
	return []Candidate{
		{ID: "a", Transport: QUIC, Reach: Public, RTT: 30 * ms, Age: time.Minute},
		{ID: "b", Transport: QUIC, Reach: Public, RTT: 27 * ms, Age: time.Minute},
		{ID: "c", Transport: QUIC, Reach: Public, Age: time.Minute},
		{ID: "d", Transport: TCP, Reach: Private, Incumbent: true, RTT: 90 * ms, Streams: 4},
		{ID: "e", Transport: TCP, Reach: Public, Relayed: true, Limited: true, Streams: 9},
		{ID: "f", Transport: TCP, Reach: Public, Relayed: true, Limited: true, Streams: 9},
	}
}

func TestRankingIsIndependentOfTheOrderOfItsInput(t *testing.T) {
	for _, policy := range append(singles(), Default(), Chain()) {
		t.Run(policy.String(), func(t *testing.T) {
			want := policy.Rank(mixed())
			permutations(mixed(), func(candidates []Candidate) {
				if got := policy.Rank(candidates); !reflect.DeepEqual(got, want) {
					t.Fatalf("given as %q: %q, %v; given as %q: %q, %v", ids(candidates), ids(got.Order), got.Decisions,
						ids(mixed()), ids(want.Order), want.Decisions)
				}
			})
		})
	}
}

func TestRankLeavesItsInputAlone(t *testing.T) {
	candidates := mixed()
	ranking := Default().Rank(candidates)
	if !slices.Equal(candidates, mixed()) {
		t.Errorf("Rank changed its input to %+v", candidates)
	}
	ranking.Order[0].ID = "changed"
	if !slices.Equal(candidates, mixed()) {
		t.Error("the ranking shares memory with the input")
	}
}

// singles returns a chain of each single rule.
func singles() []Policy {
	var policies []Policy
	for _, rule := range []Rule{
		Unlimited(), Direct(), ReachOrder(), ReachOrder(Public), TransportOrder(), TransportOrder(TCP, QUIC),
		PinnedStreams(), RTTBand(), MoreStreams(), Older(),
	} {
		policies = append(policies, Chain(rule))
	}
	return policies
}
