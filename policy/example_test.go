package policy_test

import (
	"fmt"
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
