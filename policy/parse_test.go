package policy

import (
	"errors"
	"strings"
	"testing"
)

// parsed has texts and, where it differs, what the policy's String is.
var parsed = []struct{ text, want string }{
	{"default", Default().String()},
	{"chain()", ""},
	{"chain(unlimited, direct, incumbent, pinned, streams, older, younger, rtt)", ""},
	{"chain(reach, transport, ip, direction)",
		"chain(reach(loopback, private, public), transport(quic, webtransport, webrtc, tcp, websocket), ip(v6, v4), direction(outbound, inbound))"},
	{"chain(reach(unknown, public, private, loopback))", ""},
	{"chain(transport(other, websocket, tcp, webrtc, webtransport, quic))", ""},
	{"chain(ip(unknown, v4, v6), direction(inbound, unknown, outbound))", ""},
	{"chain(default)", Default().String()},
	{"chain(never(interface wwan0), default, ip)",
		"chain(never(interface wwan0), " + strings.TrimSuffix(strings.TrimPrefix(Default().String(), "chain("), ")") + ", ip(v6, v4))"},
	{"chain(direct, direct)", ""}, // of no use, and no harm
	{"chain(prefer(cidr 10.0.0.0/8, local cidr fd00::/8, addr /ip4/192.0.2.1/tcp/4001, local addr /ip4/192.0.2.1, interface eth0))", ""},
	{"chain(never(remote cidr 10.1.2.3/8, remote addr /ip6/0:0::1))", "chain(never(cidr 10.0.0.0/8, addr /ip6/::1))"},
	{"chain(never(cidr ::ffff:10.0.0.0/104, cidr 192.0.2.1/32))", "chain(never(cidr 10.0.0.0/8, cidr 192.0.2.1/32))"},
	{`chain(never(interface "Ethernet 2", interface "vEthernet (WSL)", interface "\"", interface "\x00"))`, ""},
	{`chain(never(interface "eth0", interface en:0, interface 日本))`, `chain(never(interface eth0, interface en:0, interface 日本))`},
	{`chain(never(interface "\xff"))`, ""},
	{"weighted()", ""},
	{"weighted(direct*10, rtt*3)", ""},
	{"weighted(reach(public)*0, never(cidr 10.0.0.0/8)*65535, older)", "weighted(reach(public)*0, never(cidr 10.0.0.0/8)*65535, older*1)"},
	{"weighted(direct * 010)", "weighted(direct*10)"},
	{" \tchain (\n\tdirect ,rtt\u00a0)\r\n", "chain(direct, rtt)"},
}

func TestParse(t *testing.T) {
	for _, tt := range parsed {
		t.Run(tt.text, func(t *testing.T) {
			policy, err := Parse(tt.text)
			if err != nil {
				t.Fatal(err)
			}
			want := tt.want
			if want == "" {
				want = tt.text
			}
			if got := policy.String(); got != want {
				t.Errorf("policy %q, want %q", got, want)
			}
			again, err := Parse(policy.String())
			if err != nil {
				t.Fatalf("the text of the policy: %v", err)
			}
			checkSame(t, tt.text, policy, again)
		})
	}
}

func TestParseMakesThePoliciesOfThisPackage(t *testing.T) {
	for _, policy := range append(somePolicies(), Chain(), Weighted()) {
		t.Run(policy.String(), func(t *testing.T) {
			again, err := Parse(policy.String())
			if err != nil {
				t.Fatal(err)
			}
			checkSame(t, policy.String(), policy, again)
		})
	}
}

const knownRules = "\nknown here: direct, direction, incumbent, ip, never, older, pinned, prefer, reach, rtt, streams, transport, unlimited, younger"

var parseErrors = []struct{ text, want string }{
	{"", `policy: column 1: expected a policy, found the end of the text
  
  ^
known here: default, chain, weighted`},
	{"chian(direct)", `policy: column 1: there is no policy "chian"; did you mean "chain"?
  chian(direct)
  ^^^^^
known here: default, chain, weighted`},
	{"direct", `policy: column 1: "direct" is a rule, which a policy has in its parentheses: chain(direct)
  direct
  ^^^^^^
known here: default, chain, weighted`},
	{"chain(direct, trnsport(quic), rtt)", `policy: column 15: there is no rule "trnsport"; did you mean "transport"?
  chain(direct, trnsport(quic), rtt)
                ^^^^^^^^` + knownRules + ", default"},
	{"chain(direct, transport(quic, UDP))", `policy: column 31: "UDP" is not known here
  chain(direct, transport(quic, UDP))
                                ^^^
known here: quic, webtransport, webrtc, tcp, websocket, other`},
	{"chain(transport(QUIC))", `policy: column 17: "QUIC" is not known here; did you mean "quic"?
  chain(transport(QUIC))
                  ^^^^
known here: quic, webtransport, webrtc, tcp, websocket, other`},
	{"chain(reach(public, public))", `policy: column 21: "public" stands here for the second time
  chain(reach(public, public))
                      ^^^^^^`},
	{"chain(reach())", `policy: column 13: expected one of the known words, found ")"
  chain(reach())
              ^
known here: loopback, private, public, unknown`},
	{"chain(ip(6))", `policy: column 10: "6" is not known here; did you mean "v6"?
  chain(ip(6))
           ^
known here: v6, v4, unknown`},
	{"chain(direction(in))", `policy: column 17: "in" is not known here
  chain(direction(in))
                  ^^
known here: outbound, inbound, unknown`},
	{"chain(direct rtt)", `policy: column 14: expected "," or ")", found "rtt"
  chain(direct rtt)
               ^^^`},
	{"chain(direct, )", `policy: column 15: expected a rule, found ")"
  chain(direct, )
                ^` + knownRules + ", default"},
	{"chain(direct", `policy: column 13: expected "," or ")", found the end of the text
  chain(direct
              ^`},
	{"chain", `policy: column 6: expected "(", found the end of the text
  chain
       ^`},
	{"chain(direct))", `policy: column 14: unexpected ")" after the end of the policy
  chain(direct))
               ^`},
	{"default default", `policy: column 9: unexpected "default" after the end of the policy
  default default
          ^^^^^^^`},
	{"chain(direct())", `policy: column 13: rule "direct" has no arguments
  chain(direct())
              ^`},
	{"chain(direct*3)", `policy: column 13: only a rule of "weighted" has a weight
  chain(direct*3)
              ^`},
	{"weighted(default)", `policy: column 10: there is no rule "default"
  weighted(default)
           ^^^^^^^` + knownRules},
	{"weighted(direct*)", `policy: column 17: expected a weight, which is a whole number from 0 to 65535, found ")"
  weighted(direct*)
                  ^`},
	{"weighted(direct*0.5)", `policy: column 17: expected a weight, which is a whole number from 0 to 65535, found "0.5"
  weighted(direct*0.5)
                  ^^^`},
	{"weighted(direct*65536)", `policy: column 17: expected a weight, which is a whole number from 0 to 65535, found "65536"
  weighted(direct*65536)
                  ^^^^^`},
	{"chain(never)", `policy: column 12: expected "(" and a match, found ")"
  chain(never)
             ^`},
	{"chain(never())", `policy: column 13: expected a match, found ")"
  chain(never())
              ^
known here: cidr, addr, interface, local, remote`},
	{"chain(never(10.0.0.0/8))", `policy: column 13: there is no match "10.0.0.0/8"; did you mean "cidr 10.0.0.0/8"?
  chain(never(10.0.0.0/8))
              ^^^^^^^^^^
known here: cidr, addr, interface, local, remote`},
	{"chain(never(local /ip4/10.0.0.1))", `policy: column 19: there is no match "/ip4/10.0.0.1"; did you mean "addr /ip4/10.0.0.1"?
  chain(never(local /ip4/10.0.0.1))
                    ^^^^^^^^^^^^^
known here: cidr, addr`},
	{"chain(never(local))", `policy: column 18: expected a match, found ")"
  chain(never(local))
                   ^
known here: cidr, addr`},
	{"chain(never(local interface eth0))", `policy: column 19: there is no match "interface"
  chain(never(local interface eth0))
                    ^^^^^^^^^
known here: cidr, addr`},
	{"chain(never(cidr 10.0.0.0))", `policy: column 18: expected a prefix such as 10.0.0.0/8 or fd00::/8, found "10.0.0.0"
  chain(never(cidr 10.0.0.0))
                   ^^^^^^^^`},
	{"chain(never(cidr))", `policy: column 17: expected a prefix such as 10.0.0.0/8 or fd00::/8, found ")"
  chain(never(cidr))
                  ^`},
	{"chain(never(addr 10.0.0.1))", `policy: column 18: expected a multiaddr such as /ip4/192.0.2.1/udp/4001, found "10.0.0.1"
  chain(never(addr 10.0.0.1))
                   ^^^^^^^^`},
	{"chain(never(addr /))", `policy: column 18: expected a multiaddr such as /ip4/192.0.2.1/udp/4001, found "/"
  chain(never(addr /))
                   ^`},
	{"chain(never(addr))", `policy: column 17: expected a multiaddr such as /ip4/192.0.2.1/udp/4001, found ")"
  chain(never(addr))
                  ^`},
	{`chain(never(interface ""))`, `policy: column 23: expected the name of a network interface, found ""
  chain(never(interface ""))
                        ^^`},
	{"chain(never(interface))", `policy: column 22: expected the name of a network interface, found ")"
  chain(never(interface))
                       ^`},
	{"chain(never(interface eth0 eth1))", `policy: column 28: expected "," or ")", found "eth1"
  chain(never(interface eth0 eth1))
                             ^^^^`},
	{`chain(never(interface "eth0))`, `policy: column 23: expected the name of a network interface, found a quote that does not end
  chain(never(interface "eth0))
                        ^`},
	// A column is a character, tabs stay tabs, and what would not show is replaced.
	{"chain(\tdirect,\tü\x00\x1b)", "policy: column 16: there is no rule \"ü\\x00\\x1b\"\n" +
		"  chain(\tdirect,\tü��)\n" +
		"        \t       \t^^^" + knownRules + ", default"},
	{`chain(never(interface "日本"), rt)`, `policy: column 30: there is no rule "rt"; did you mean "rtt"?
  chain(never(interface "日本"), rt)
                               ^^` + knownRules + ", default"},
	{"chain(\n  direct,\n  rt)", "policy: line 3, column 3: there is no rule \"rt\"; did you mean \"rtt\"?\n" +
		"    rt)\n" +
		"    ^^" + knownRules + ", default"},
	{"chain(direct\n)\n)", "policy: line 3, column 1: unexpected \")\" after the end of the policy\n  )\n  ^"},
}

func TestParseErrors(t *testing.T) {
	for _, tt := range parseErrors {
		t.Run(tt.text, func(t *testing.T) {
			policy, err := Parse(tt.text)
			if err == nil {
				t.Fatalf("the policy is %v, want an error", policy)
			}
			if policy != nil {
				t.Errorf("a policy beside an error: %v", policy)
			}
			if err.Error() != tt.want {
				t.Errorf("error\n%v\nwant\n%v", err, tt.want)
			}
			checkParseError(t, tt.text, err)
		})
	}
}

func TestParseErrorIsTheCallersOwn(t *testing.T) {
	for range 2 {
		_, err := Parse("chain(ip(6))")
		var parseError *ParseError
		if !errors.As(err, &parseError) || parseError.Known[0] != "v6" || parseError.Meant != "v6" {
			t.Fatalf("error %v, want one that knows v6 first", err)
		}
		parseError.Known[0] = "changed"
	}
}

func TestParseRulesOfOnesOwn(t *testing.T) {
	labelled := Func("labelled", byLabelled)
	price := ScoreFunc("price", func(c Candidate) float64 { return 1 })
	plain := silent{labelled} // a rule only
	for _, tt := range []struct {
		text  string
		own   []Rule
		want  string // "": as text
		error string // its first line
	}{
		{"labelled", []Rule{labelled}, "", ""},
		{"price", []Rule{labelled, price}, "", ""},
		{"chain(direct, labelled, default)", []Rule{labelled}, Chain(append([]Rule{Direct(), labelled}, DefaultRules()...)...).String(), ""},
		{"weighted(price*2, direct)", []Rule{price}, "weighted(price*2, direct*1)", ""},
		{"chain(labelled)", []Rule{plain}, "", ""},
		{"labelled", []Rule{plain}, "", `policy: column 1: "labelled" is a rule, which a policy has in its parentheses: chain(labelled)`},
		{"labelled", nil, "", `policy: column 1: there is no policy "labelled"`},
		{"chain(labelle)", []Rule{labelled}, "", `policy: column 7: there is no rule "labelle"; did you mean "labelled"?`},
		{"chain(labelled(1))", []Rule{labelled}, "", `policy: column 15: rule "labelled" has no arguments`},
		{"weighted(direct, labelled*2)", []Rule{labelled}, "", `policy: column 18: rule "labelled" has no score, which a rule of "weighted" needs`},
		{"default", []Rule{Direct()}, "", `policy: rule name "direct" already has a meaning`},
		{"default", []Rule{labelled, labelled}, "", `policy: two rules of the name "labelled"`},
		{"default", []Rule{renamed{Direct(), "Two Words"}}, "", `policy: rule name "Two Words" is not one word of lower-case letters, digits, "-" and "_"`},
	} {
		t.Run(tt.text, func(t *testing.T) {
			policy, err := Parse(tt.text, tt.own...)
			if tt.error != "" {
				if err == nil {
					t.Fatalf("the policy is %v, want an error", policy)
				}
				if got, _, _ := strings.Cut(err.Error(), "\n"); got != tt.error {
					t.Errorf("error %q, want %q", got, tt.error)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			want := tt.want
			if want == "" {
				want = tt.text
			}
			if got := policy.String(); got != want {
				t.Errorf("policy %q, want %q", got, want)
			}
		})
	}
}

// renamed is a rule by another name.
type renamed struct {
	Scored
	name string
}

func (r renamed) Name() string { return r.name }

func TestDidYouMean(t *testing.T) {
	known := []string{"direct", "direction", "older", "rtt", "transport", "incumbent", "v4", "v6"}
	for word, want := range map[string]string{
		"rtt":                      "rtt",
		"RTT":                      "rtt",
		"rt":                       "rtt",
		"trt":                      "rtt",
		"rttband":                  "rtt",
		"dirct":                    "direct",
		"driect":                   "direct",
		"driecct":                  "direct",
		"directo":                  "direct",
		"directin":                 "direction",
		"elder":                    "older",
		"tranport":                 "transport",
		"icumbetn":                 "incumbent",
		"trans":                    "transport",
		"ipv6":                     "v6",
		"4":                        "v4",
		"a":                        "",
		"":                         "",
		"t":                        "",
		"xyz":                      "",
		"port":                     "transport",
		"speed":                    "",
		"\xff":                     "",
		strings.Repeat("z", 1<<20): "",
	} {
		if got := nearest(word, known); got != want {
			t.Errorf("%.20q: %q, want %q", word, got, want)
		}
	}
}
