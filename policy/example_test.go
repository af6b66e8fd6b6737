package policy_test

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/go-portage/portage/policy"
	ma "github.com/multiformats/go-multiaddr"
)

func Example() {
	relayed := policy.Candidate{ID: "relayed", Limited: true, Streams: 12, Age: time.Hour}
	relayed.SetAddr(ma.StringCast("/ip4/203.0.113.7/udp/4001/quic-v1/p2p/12D3KooWGzxzKZYveHXtpG6AsrUJBcWxHBFS2HsEoGTxrMLvKXtf/p2p-circuit"))
	tcp := policy.Candidate{ID: "tcp", Streams: 3, Age: 2 * time.Second}
	tcp.SetAddr(ma.StringCast("/ip4/198.51.100.2/tcp/4001"))
	quic := policy.Candidate{ID: "quic", Age: time.Second}
	quic.SetAddr(ma.StringCast("/ip4/198.51.100.2/udp/4001/quic-v1"))

	ranking := policy.Default().Rank([]policy.Candidate{relayed, tcp, quic})
	winner, _ := ranking.Winner()
	fmt.Println("keep", winner.ID)
	for _, decision := range ranking.Decisions {
		fmt.Printf("drop %s by %s\n", decision.Loser.ID, decision)
	}
	// Output:
	// keep quic
	// drop tcp by rule transport: quic over tcp
	// drop relayed by rule unlimited: true over false
}

func ExampleParse() {
	p, err := policy.Parse("chain(unlimited, direct, rtt, older)")
	fmt.Println(p, err)
	_, err = policy.Parse("chain(unlimited, direkt, rtt, older)")
	fmt.Println(err)
	// Output:
	// chain(unlimited, direct, rtt, older) <nil>
	// policy: column 18: there is no rule "direkt"; did you mean "direct"?
	//   chain(unlimited, direkt, rtt, older)
	//                    ^^^^^^
	// known here: direct, direction, incumbent, ip, never, older, pinned, prefer, reach, rtt, streams, transport, unlimited, younger, default
}

func ExampleWeighted() {
	p := policy.Weighted(policy.Times(policy.Direct(), 10), policy.Times(policy.RTTBand(), 50))
	ranking := p.Rank([]policy.Candidate{
		{ID: "direct", RTT: 200 * time.Millisecond},
		{ID: "relayed", RTT: 20 * time.Millisecond, Relayed: true},
	})
	winner, _ := ranking.Winner()
	fmt.Println(p, "keeps", winner.ID)
	fmt.Println(ranking.Decisions[0])
	// Output:
	// weighted(direct*10, rtt*50) keeps relayed
	// score 4000 over 3500, most by rule rtt: 20ms over 200ms
}

func ExampleFunc() {
	// Only labelled streams move, so the connection that has more of them stays,
	// whatever else the two carry. The rule "streams" counts all.
	labelled := policy.Func("labelled",
		func(a, b policy.Candidate) int { return cmp.Compare(a.Labelled, b.Labelled) },
		policy.WithValue(func(c policy.Candidate) string { return strconv.Itoa(c.Labelled) }))

	p, err := policy.Parse("chain(unlimited, direct, labelled, default)", labelled)
	if err != nil {
		fmt.Println(err)
		return
	}
	ranking := p.Rank([]policy.Candidate{
		{ID: "a", Streams: 5, Labelled: 1, Age: time.Hour},
		{ID: "b", Streams: 3, Labelled: 3},
	})
	fmt.Println(ranking.Decisions[0])
	// Output:
	// rule labelled: 3 over 1
}

func ExampleCheckRule() {
	// Equal within 10 ms is no order: 10 equals 18, 18 equals 26, but 10 does
	// not equal 26.
	tolerant := policy.Func("tolerant", func(a, b policy.Candidate) int {
		if difference := b.RTT - a.RTT; difference.Abs() > 10*time.Millisecond {
			return cmp.Compare(difference, 0)
		}
		return 0
	})
	err := policy.CheckRule(tolerant,
		policy.Candidate{ID: "a", RTT: 10 * time.Millisecond},
		policy.Candidate{ID: "b", RTT: 18 * time.Millisecond},
		policy.Candidate{ID: "c", RTT: 26 * time.Millisecond})
	problem, _, _ := strings.Cut(err.Error(), "\n")
	fmt.Println(problem)
	// Output:
	// rule tolerant: a is equal to b and b is equal to c, but a is not equal to c:
}

func ExampleUses() {
	for _, text := range []string{"default", "chain(unlimited, direct, older)"} {
		p, err := policy.Parse(text)
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Printf("%s: measure the RTT: %t\n", text, policy.Uses(p).RTT)
	}
	// Output:
	// default: measure the RTT: true
	// chain(unlimited, direct, older): measure the RTT: false
}
