package policy

import (
	"math"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
)

// FuzzChainIsStrictWeakOrder checks the definition on three candidates at a
// time, for Default and for each rule alone, and that each decision shows two
// values that differ.
func FuzzChainIsStrictWeakOrder(f *testing.F) {
	f.Add([]byte{})
	// RTTs: unknown beside known; neighbours; and a row in which each is near
	// the next (50, 75, 90 ms) but the first not near the last.
	f.Add(fuzzBytes([3]fuzzed{{rtt: 0, streams: 1}, {rtt: 4, streams: 2}, {rtt: 5, flags: incumbentFlag, streams: 0}}))
	f.Add(fuzzBytes([3]fuzzed{{rtt: 6, age: 1}, {rtt: 0, age: 2}, {rtt: 8, age: 3}}))
	f.Add(fuzzBytes([3]fuzzed{{rtt: 7}, {rtt: 8}, {rtt: 9}}))
	f.Add(fuzzBytes([3]fuzzed{{rtt: 10}, {rtt: 11}, {rtt: 12}}))
	f.Add(fuzzBytes([3]fuzzed{{rtt: 10}, {rtt: 11, flags: incumbentFlag}, {rtt: 12}}))
	// Ages: unknown, below 0, and close together.
	f.Add(fuzzBytes([3]fuzzed{{age: 0, streams: 1}, {age: 1, streams: 2}, {age: 2}}))
	f.Add(fuzzBytes([3]fuzzed{{age: 3}, {age: 4}, {age: 5}}))
	// What the address and the relay say.
	f.Add(fuzzBytes([3]fuzzed{{flags: limitedFlag | relayedFlag}, {flags: relayedFlag}, {transport: 1, reach: 2}}))
	f.Add(fuzzBytes([3]fuzzed{{transport: 0, reach: 3}, {transport: 5, reach: 0}, {transport: 4, reach: 1, pinned: 2}}))

	policies := append(singles(), Default())
	f.Fuzz(func(t *testing.T, data []byte) {
		c := fuzzCandidates(data)
		for _, policy := range policies {
			// order is positive if the policy has c[i] over c[j], and 0 if no
			// rule tells them apart.
			var order [3][3]int
			for i := range c {
				for j := range c {
					order[i][j] = verdict(t, policy, c[i], c[j])
				}
			}
			for i := range c {
				if order[i][i] != 0 {
					t.Fatalf("%v: not irreflexive: %+v over itself", policy, c[i])
				}
				for j := range c {
					if order[i][j] != -order[j][i] {
						t.Fatalf("%v: not asymmetric: %d and %d between\n%+v\n%+v", policy, order[i][j], order[j][i], c[i], c[j])
					}
					for k := range c {
						if order[i][j] > 0 && order[j][k] > 0 && order[i][k] <= 0 {
							t.Fatalf("%v: better is not transitive over\n%+v\n%+v\n%+v", policy, c[i], c[j], c[k])
						}
						if order[i][j] == 0 && order[j][k] == 0 && order[i][k] != 0 {
							t.Fatalf("%v: equal is not transitive over\n%+v\n%+v\n%+v", policy, c[i], c[j], c[k])
						}
					}
				}
			}
		}
	})
}

// verdict returns 1 if policy has a over b, -1 for the reverse, and 0 if no rule
// tells them apart. It names them anew, so that the tie-break cannot hide a rule
// that is wrong about a candidate and itself.
func verdict(t *testing.T, policy Policy, a, b Candidate) int {
	t.Helper()
	a.ID, b.ID = "a", "b"
	decision := policy.Rank([]Candidate{a, b}).Decisions[0]
	if decision.WinnerValue == decision.LoserValue {
		t.Fatalf("%v: decision %q does not show what differs between\n%+v\n%+v", policy, decision, a, b)
	}
	switch {
	case decision.Rule == "id":
		return 0
	case decision.Winner.ID == "a":
		return 1
	default:
		return -1
	}
}

const (
	limitedFlag = 1 << iota
	relayedFlag
	incumbentFlag
	outboundFlag
)

// fuzzed is a candidate in the fuzzer's bytes: indices into small tables, so that
// ties and neighbours are frequent.
type fuzzed struct {
	flags, transport, reach, rtt, age, streams, pinned byte
}

const fuzzedSize = 7

var fuzzRTTs = []time.Duration{
	0, -ms, 1, ms, rttFloor, rttFloor + 1, 7500 * time.Microsecond, 7500*time.Microsecond + 1,
	11250 * time.Microsecond, 11250*time.Microsecond + 1, 50 * ms, 75 * ms, 90 * ms, 113 * ms, time.Second, time.Hour, math.MaxInt64,
}

var fuzzAges = []time.Duration{0, -time.Second, 1, time.Second, time.Second + 1, time.Hour, math.MaxInt64, math.MinInt64}

func fuzzBytes(candidates [3]fuzzed) []byte {
	var data []byte
	for _, c := range candidates {
		data = append(data, c.flags, c.transport, c.reach, c.rtt, c.age, c.streams, c.pinned)
	}
	return data
}

// fuzzCandidates reads three candidates from data, and zeros past its end.
func fuzzCandidates(data []byte) [3]Candidate {
	data = append(data[:len(data):len(data)], make([]byte, 3*fuzzedSize)...)
	var candidates [3]Candidate
	for i := range candidates {
		b := data[i*fuzzedSize:]
		c := Candidate{
			Limited:   b[0]&limitedFlag != 0,
			Relayed:   b[0]&relayedFlag != 0,
			Incumbent: b[0]&incumbentFlag != 0,
			Direction: network.DirInbound,
			Transport: Transport(b[1]) % (WebSocket + 1),
			Reach:     Reach(b[2]) % (Public + 1),
			RTT:       fuzzRTTs[int(b[3])%len(fuzzRTTs)],
			Age:       fuzzAges[int(b[4])%len(fuzzAges)],
			Streams:   int(b[5] % 4),
			Pinned:    int(b[6] % 4),
		}
		if b[0]&outboundFlag != 0 {
			c.Direction = network.DirOutbound
		}
		candidates[i] = c
	}
	return candidates
}
