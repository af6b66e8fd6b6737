package policy

import (
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	ma "github.com/multiformats/go-multiaddr"
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

func TestTiesStayWithTheIncumbent(t *testing.T) {
	candidates := []Candidate{{ID: "c"}, {ID: "b", Incumbent: true}, {ID: "a"}}
	for name, tt := range map[string]struct {
		policy    Policy
		decisions []string // on a and on c
	}{
		"chain": {Chain(Direct()),
			[]string{"rule incumbent: true over false", "rule incumbent: true over false"}},
		"weighted": {Weighted(Times(Direct(), 3)),
			[]string{"equal scores of 300, rule incumbent: true over false", "equal scores of 300, rule incumbent: true over false"}},
		"function": {Func("none", func(a, b Candidate) int { return 0 }),
			[]string{"rule incumbent: true over false", "rule incumbent: true over false"}},
	} {
		t.Run(name, func(t *testing.T) {
			ranking := tt.policy.Rank(candidates)
			if got := ids(ranking.Order); got != "bac" {
				t.Errorf("order %q, want %q: the incumbent, then by ID", got, "bac")
			}
			for i, want := range tt.decisions {
				if got := ranking.Decisions[i].String(); got != want {
					t.Errorf("decision %q, want %q", got, want)
				}
			}
		})
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
	for _, policy := range append(somePolicies(), Chain(), Weighted()) {
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

// someRules returns each rule of this package, with the arguments that matter.
func someRules() []Scored {
	return []Scored{
		Unlimited(), Direct(), Incumbent(),
		ReachOrder(), ReachOrder(Public), ReachOrder(UnknownReach, Public),
		TransportOrder(), TransportOrder(TCP, QUIC), TransportOrder(OtherTransport),
		IPVersionOrder(), IPVersionOrder(4), IPVersionOrder(0, 4, 6),
		DirectionOrder(), DirectionOrder(network.DirInbound),
		PinnedStreams(), MoreStreams(), Older(), Younger(), RTTBand(),
		Prefer(RemoteIn(netip.MustParsePrefix("10.0.0.0/8"))),
		Prefer(LocalIn(netip.MustParsePrefix("fd00::/8")), OnInterface("wwan0")),
		Never(RemotePrefix(ma.StringCast("/ip4/10.0.0.1/tcp/4001"))),
		Never(LocalPrefix(ma.StringCast("/ip4/10.0.0.1"))),
	}
}

// somePolicies returns a chain of each single rule, a weighted policy of each,
// Default, and weighted policies of several rules.
func somePolicies() []Policy {
	policies := []Policy{Default()}
	var even, uneven []Term
	for i, rule := range someRules() {
		policies = append(policies, Chain(rule), Weighted(Times(rule, 7)))
		even = append(even, Times(rule, 1))
		uneven = append(uneven, Times(rule, uint16(i*i)))
	}
	return append(policies, Weighted(even...), Weighted(uneven...))
}
