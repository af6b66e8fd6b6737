package policy

import (
	"errors"
	"math"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	ma "github.com/multiformats/go-multiaddr"
)

// FuzzStrictWeakOrder checks the definition on three candidates at a time: for
// each rule alone, for Default, and for a chain and a weighted policy of random
// rules; and that a ranking does not depend on the order of its input, and shows
// two values that differ.
func FuzzStrictWeakOrder(f *testing.F) {
	f.Add([]byte{}, []byte{})
	// RTTs: unknown beside known; neighbours; and a row in which each is near
	// the next (50, 75, 90 ms) but the first not near the last.
	f.Add(fuzzBytes([3]fuzzed{{rtt: 0, streams: 1}, {rtt: 4, streams: 2}, {rtt: 5, flags: incumbentFlag, streams: 0}}), []byte{0, 1, 2})
	f.Add(fuzzBytes([3]fuzzed{{rtt: 6, age: 1}, {rtt: 0, age: 2}, {rtt: 8, age: 3}}), []byte{18, 9, 16, 3, 15, 1})
	f.Add(fuzzBytes([3]fuzzed{{rtt: 7}, {rtt: 8}, {rtt: 9}}), []byte{18, 255})
	f.Add(fuzzBytes([3]fuzzed{{rtt: 10}, {rtt: 11}, {rtt: 12}}), []byte{18, 1, 16, 1})
	f.Add(fuzzBytes([3]fuzzed{{rtt: 10}, {rtt: 11, flags: incumbentFlag}, {rtt: 12}}), []byte{18, 2, 2, 1})
	// Ages: unknown, below 0, and close together.
	f.Add(fuzzBytes([3]fuzzed{{age: 0, streams: 1}, {age: 1, streams: 2}, {age: 2}}), []byte{16, 200, 17, 100, 15, 20})
	f.Add(fuzzBytes([3]fuzzed{{age: 3}, {age: 4}, {age: 5}}), []byte{17, 9})
	f.Add(fuzzBytes([3]fuzzed{{age: 6}, {age: 6}, {age: 7}}), []byte{16, 9})
	// What the address and the relay say.
	f.Add(fuzzBytes([3]fuzzed{{flags: limitedFlag | relayedFlag}, {flags: relayedFlag}, {transport: 1, reach: 2}}), []byte{1, 1, 6, 3})
	f.Add(fuzzBytes([3]fuzzed{{transport: 0, reach: 3}, {transport: 5, reach: 0}, {transport: 4, reach: 1, pinned: 2}}), []byte{14, 7, 3, 7})
	f.Add(fuzzBytes([3]fuzzed{{remote: 1, ip: 4}, {remote: 2, local: 3, ip: 6}, {remote: 4, iface: 1}}), []byte{19, 1, 20, 2, 21, 3, 22, 4, 9, 5})

	rules := someRules()
	f.Fuzz(func(t *testing.T, candidateData, policyData []byte) {
		c := fuzzCandidates(candidateData)
		for _, rule := range rules {
			if err := CheckRule(rule, c[:]...); err != nil {
				t.Fatal(err)
			}
		}
		var chosen []Rule
		var terms []Term
		for ; len(policyData) >= 2 && len(terms) < 8; policyData = policyData[2:] {
			rule := rules[int(policyData[0])%len(rules)]
			chosen = append(chosen, rule)
			terms = append(terms, Times(rule, uint16(policyData[1])*257))
		}
		for _, policy := range []Policy{Default(), Chain(chosen...), Weighted(terms...)} {
			if err := CheckRule(asRule(policy), c[:]...); err != nil {
				t.Fatalf("%v: %v", policy, err)
			}
			want := policy.Rank(c[:])
			for _, decision := range want.Decisions {
				if decision.WinnerValue == decision.LoserValue {
					t.Fatalf("%v: decision %q does not show what differs between\n%+v\n%+v", policy, decision, decision.Winner, decision.Loser)
				}
			}
			permutations(c[:], func(candidates []Candidate) {
				if got := policy.Rank(candidates); !reflect.DeepEqual(got, want) {
					t.Fatalf("%v: given as %q: %q; given as %q: %q", policy, ids(candidates), ids(got.Order), ids(c[:]), ids(want.Order))
				}
			})
		}
	})
}

// asRule returns the rule that compares as policy does, except by ID. So it can
// be wrong about a candidate and itself, and candidates can be equal to it.
func asRule(policy Policy) Rule {
	p := policy.(interface {
		compare(a, b Candidate) (Rule, int)
	})
	return Func("policy", func(a, b Candidate) int {
		a.ID, b.ID = "", ""
		_, order := p.compare(a, b)
		return order
	})
}

const (
	limitedFlag = 1 << iota
	relayedFlag
	incumbentFlag
)

// fuzzed is a candidate in the fuzzer's bytes: indices into small tables, so that
// ties and neighbours are frequent.
type fuzzed struct {
	flags, transport, reach, ip, direction, rtt, age, streams, pinned, remote, local, iface byte
}

const fuzzedSize = 12

var fuzzRTTs = []time.Duration{
	0, -ms, 1, ms, rttFloor, rttFloor + 1, 7500 * time.Microsecond, 7500*time.Microsecond + 1,
	11250 * time.Microsecond, 11250*time.Microsecond + 1, 50 * ms, 75 * ms, 90 * ms, 113 * ms, time.Second, time.Hour, math.MaxInt64,
}

var fuzzAges = []time.Duration{
	0, -time.Second, 1, time.Second, time.Second + 1, time.Hour, 1e15, 1e15 + 1, math.MaxInt64 - 1, math.MaxInt64, math.MinInt64,
}

var fuzzCounts = []int{0, 1, 2, 3, 4, 511, 512, 513, math.MaxInt, -1, math.MinInt}

var fuzzAddrs = []Addr{
	"", "/ip4/10.0.0.1/tcp/4001", "/ip4/10.0.0.1/tcp/40010", "/ip6/fd00::1/udp/1/quic-v1", "/ip6/::ffff:10.0.0.1/tcp/1", "/dns4/example.com", "/ip4/",
}

func fuzzBytes(candidates [3]fuzzed) []byte {
	var data []byte
	for _, c := range candidates {
		data = append(data, c.flags, c.transport, c.reach, c.ip, c.direction, c.rtt, c.age, c.streams, c.pinned, c.remote, c.local, c.iface)
	}
	return data
}

// fuzzCandidates reads three candidates from data, and zeros past its end.
func fuzzCandidates(data []byte) [3]Candidate {
	data = append(data[:len(data):len(data)], make([]byte, 3*fuzzedSize)...)
	var candidates [3]Candidate
	for i := range candidates {
		b := data[i*fuzzedSize:]
		candidates[i] = Candidate{
			ID:        string(rune('a' + i)),
			Limited:   b[0]&limitedFlag != 0,
			Relayed:   b[0]&relayedFlag != 0,
			Incumbent: b[0]&incumbentFlag != 0,
			Transport: Transport(b[1]) % (WebSocket + 2), // and one that does not exist
			Reach:     Reach(b[2]) % (Public + 2),
			IPVersion: int(b[3] % 8),
			Direction: network.Direction(b[4] % 4),
			RTT:       pick(fuzzRTTs, b[5]),
			Age:       pick(fuzzAges, b[6]),
			Streams:   pick(fuzzCounts, b[7]),
			Pinned:    pick(fuzzCounts, b[8]),
			Remote:    pick(fuzzAddrs, b[9]),
			Local:     pick(fuzzAddrs, b[10]),
			Interface: pick([]string{"", "wwan0", "eth0"}, b[11]),
		}
	}
	return candidates
}

func pick[T any](from []T, index byte) T { return from[int(index)%len(from)] }

// FuzzParse checks that Parse of any text returns a policy or says where the text
// is wrong, and that a policy's text makes the same policy.
func FuzzParse(f *testing.F) {
	for _, tt := range parsed {
		f.Add(tt.text)
	}
	for _, tt := range parseErrors {
		f.Add(tt.text)
	}
	labelled := Func("labelled", byLabelled, WithUse(Use{Interface: true}))
	price := ScoreFunc("price", func(c Candidate) float64 { return float64(c.Streams) })
	f.Fuzz(func(t *testing.T, text string) {
		policy, err := Parse(text, labelled, price)
		if err != nil {
			checkParseError(t, text, err)
			return
		}
		again, err := Parse(policy.String(), labelled, price)
		if err != nil {
			t.Fatalf("%q is the policy %q, which does not parse: %v", text, policy, err)
		}
		checkSame(t, text, policy, again)
	})
}

func checkParseError(t *testing.T, text string, err error) {
	t.Helper()
	var parseError *ParseError
	if !errors.As(err, &parseError) {
		t.Fatalf("%q: error of type %T, want a *ParseError: %v", text, err, err)
	}
	if parseError.Text != text || parseError.Offset < 0 || parseError.Offset > len(text) {
		t.Fatalf("%q: error points to %d of %q", text, parseError.Offset, parseError.Text)
	}
	line, column := parseError.Position()
	lines := strings.Split(text, "\n")
	if line < 1 || line > len(lines) || column < 1 || column > len([]rune(lines[line-1]))+1 {
		t.Fatalf("%q: line %d, column %d is not in the text", text, line, column)
	}
	// The message, the line, the mark; and the known words, if there are any.
	shown := strings.Split(parseError.Error(), "\n")
	if want := 3 + min(1, len(parseError.Known)); len(shown) != want {
		t.Fatalf("%q: error of %d lines, want %d:\n%v", text, len(shown), want, parseError)
	}
	if mark := []rune(strings.TrimRight(shown[2], "^")); len(mark) != 2+column-1 {
		t.Fatalf("%q: the mark is not under column %d:\n%v", text, column, parseError)
	}
}

// checkSame checks that two policies show the same, use the same, and rank the
// same, as far as candidates that differ in many ways tell.
func checkSame(t *testing.T, text string, a, b Policy) {
	t.Helper()
	if a.String() != b.String() {
		t.Fatalf("%q: the policy %q becomes %q by its text", text, a, b)
	}
	if Uses(a) != Uses(b) {
		t.Fatalf("%q: the policy %q uses %+v and, by its text, %+v", text, a, Uses(a), Uses(b))
	}
	if ra, rb := a.Rank(varied()), b.Rank(varied()); !reflect.DeepEqual(ra, rb) {
		t.Fatalf("%q: the policy %q ranks %v and, by its text, %v", text, a, ids(ra.Order), ids(rb.Order))
	}
}

// varied returns candidates that differ by each rule.
func varied() []Candidate {
	candidates := mixed()
	for i, addr := range []string{
		"/ip4/10.0.0.1/tcp/4001", "/ip4/192.0.2.1/udp/4001/quic-v1", "/ip6/fd00::1/tcp/4001/ws", "/ip6/2001:db8::1/udp/1/webrtc-direct",
		"/dns4/example.com/tcp/443/tls/ws", "/ip4/8.8.8.8/udp/1/quic-v1/webtransport",
	} {
		c := &candidates[i]
		c.SetAddr(ma.StringCast(addr))
		c.SetLocalAddr(ma.StringCast([]string{"/ip4/10.0.0.1/tcp/4001", "/ip6zone/wwan0/ip6/fe80::1/tcp/1"}[i%2]))
		c.Direction = network.Direction(i % 3)
		c.Pinned = i % 4
		c.Labelled = i
	}
	return candidates
}

// FuzzQuoteWord checks that any interface name survives in a policy's text, and so
// does any multiaddr and any prefix.
func FuzzQuoteWord(f *testing.F) {
	for _, s := range []string{
		"eth0", "Ethernet 2", `vEthernet (WSL)`, `a"b`, `a\b`, "a*b,c", "日本", "\xff", "\x00", "\u2028", "//", "/unix/a, b", "/ip4/10.0.0.1/tcp/1", "10.0.0.0/8", "::/0",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var matches []Match
		if s != "" {
			matches = append(matches, OnInterface(s))
		}
		if addr, err := ma.NewMultiaddr(s); err == nil && len(addr) > 0 {
			matches = append(matches, RemotePrefix(addr), LocalPrefix(addr))
		}
		if prefix, err := netip.ParsePrefix(s); err == nil {
			matches = append(matches, RemoteIn(prefix), LocalIn(prefix))
		}
		for _, match := range matches {
			policy := Chain(Never(match))
			again, err := Parse(policy.String())
			if err != nil {
				t.Fatalf("%q: the policy %q does not parse: %v", s, policy, err)
			}
			checkSame(t, s, policy, again)
		}
	})
}
