package policy

import (
	"math"
	"net/netip"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	ma "github.com/multiformats/go-multiaddr"
)

const ms = time.Millisecond

func TestRules(t *testing.T) {
	for _, tt := range []struct {
		name          string
		rule          Rule
		better, worse Candidate
		decision      string
	}{
		{"unlimited beats limited", Unlimited(),
			Candidate{}, Candidate{Limited: true}, "rule unlimited: true over false"},
		{"direct beats relayed", Direct(),
			Candidate{}, Candidate{Relayed: true}, "rule direct: true over false"},

		{"loopback beats private", ReachOrder(),
			Candidate{Reach: Loopback}, Candidate{Reach: Private}, "rule reach: loopback over private"},
		{"private beats public", ReachOrder(),
			Candidate{Reach: Private}, Candidate{Reach: Public}, "rule reach: private over public"},
		{"an unknown reach is last", ReachOrder(),
			Candidate{Reach: Public}, Candidate{}, "rule reach: public over unknown"},
		{"reach in an order of one's own", ReachOrder(Public, Loopback),
			Candidate{Reach: Public}, Candidate{Reach: Loopback}, "rule reach: public over loopback"},
		{"a reach left out is last", ReachOrder(Public, Loopback),
			Candidate{Reach: Loopback}, Candidate{Reach: Private}, "rule reach: loopback over private"},

		{"QUIC beats WebTransport", TransportOrder(),
			Candidate{Transport: QUIC}, Candidate{Transport: WebTransport}, "rule transport: quic over webtransport"},
		{"WebTransport beats WebRTC", TransportOrder(),
			Candidate{Transport: WebTransport}, Candidate{Transport: WebRTC}, "rule transport: webtransport over webrtc"},
		{"WebRTC beats TCP", TransportOrder(),
			Candidate{Transport: WebRTC}, Candidate{Transport: TCP}, "rule transport: webrtc over tcp"},
		{"TCP beats WebSocket", TransportOrder(),
			Candidate{Transport: TCP}, Candidate{Transport: WebSocket}, "rule transport: tcp over websocket"},
		{"any other transport is last", TransportOrder(),
			Candidate{Transport: WebSocket}, Candidate{}, "rule transport: websocket over other"},
		{"transports in an order of one's own", TransportOrder(TCP, QUIC),
			Candidate{Transport: TCP}, Candidate{Transport: QUIC}, "rule transport: tcp over quic"},
		{"a transport left out is last", TransportOrder(TCP, QUIC),
			Candidate{Transport: QUIC}, Candidate{Transport: WebTransport}, "rule transport: quic over webtransport"},
		{"a transport named twice counts where it is first", TransportOrder(TCP, QUIC, TCP),
			Candidate{Transport: TCP}, Candidate{Transport: QUIC}, "rule transport: tcp over quic"},

		{"IPv6 beats IPv4", IPVersionOrder(),
			Candidate{IPVersion: 6}, Candidate{IPVersion: 4}, "rule ip: v6 over v4"},
		{"an unknown IP version is last", IPVersionOrder(),
			Candidate{IPVersion: 4}, Candidate{}, "rule ip: v4 over unknown"},
		{"IP versions in an order of one's own", IPVersionOrder(4, 6),
			Candidate{IPVersion: 4}, Candidate{IPVersion: 6}, "rule ip: v4 over v6"},
		{"unknown named first", IPVersionOrder(0, 6),
			Candidate{}, Candidate{IPVersion: 6}, "rule ip: unknown over v6"},

		{"outbound beats inbound", DirectionOrder(),
			Candidate{Direction: network.DirOutbound}, Candidate{Direction: network.DirInbound}, "rule direction: outbound over inbound"},
		{"an unknown direction is last", DirectionOrder(),
			Candidate{Direction: network.DirInbound}, Candidate{}, "rule direction: inbound over unknown"},
		{"directions in an order of one's own", DirectionOrder(network.DirInbound),
			Candidate{Direction: network.DirInbound}, Candidate{Direction: network.DirOutbound}, "rule direction: inbound over outbound"},

		{"the incumbent stays", Incumbent(),
			Candidate{Incumbent: true}, Candidate{Streams: 9}, "rule incumbent: true over false"},

		{"pinned streams stay", PinnedStreams(),
			Candidate{Pinned: 2}, Candidate{Pinned: 1, Streams: 9}, "rule pinned: 2 over 1"},
		{"fewer streams have to move", MoreStreams(),
			Candidate{Streams: 10}, Candidate{Streams: 9}, "rule streams: 10 over 9"},

		{"older beats younger", Older(),
			Candidate{Age: 2 * time.Minute}, Candidate{Age: time.Second}, "rule older: 2m0s over 1s"},
		{"by a nanosecond", Older(),
			Candidate{Age: time.Hour + 1}, Candidate{Age: time.Hour}, "rule older: 1h0m0.000000001s over 1h0m0s"},
		{"an unknown age is last", Older(),
			Candidate{Age: 1}, Candidate{}, "rule older: 1ns over unknown"},

		{"younger beats older", Younger(),
			Candidate{Age: time.Second}, Candidate{Age: 2 * time.Minute}, "rule younger: 1s over 2m0s"},
		{"an unknown age is last there too", Younger(),
			Candidate{Age: math.MaxInt64}, Candidate{}, "rule younger: 2562047h47m16.854775807s over unknown"},

		{"a prefix of the remote address", Prefer(RemoteIn(netip.MustParsePrefix("10.0.0.0/8"))),
			Candidate{Remote: "/ip4/10.1.2.3/tcp/1"}, Candidate{Remote: "/ip4/11.0.0.1/tcp/1", Local: "/ip4/10.0.0.1/tcp/1"},
			"rule prefer: cidr 10.0.0.0/8 over no match"},
		{"an unknown address is in no prefix", Prefer(RemoteIn(netip.MustParsePrefix("0.0.0.0/0"))),
			Candidate{Remote: "/ip4/10.1.2.3/tcp/1"}, Candidate{}, "rule prefer: cidr 0.0.0.0/0 over no match"},
		{"IPv4 is not in an IPv6 prefix", Prefer(RemoteIn(netip.MustParsePrefix("::/0"))),
			Candidate{Remote: "/ip6/fd00::1/tcp/1"}, Candidate{Remote: "/ip4/10.0.0.1/tcp/1"}, "rule prefer: cidr ::/0 over no match"},
		{"a zone does not hide an address", Prefer(RemoteIn(netip.MustParsePrefix("fe80::/10"))),
			Candidate{Remote: "/ip6zone/eth0/ip6/fe80::1/tcp/1"}, Candidate{Remote: "/ip6/fd00::1/tcp/1"},
			"rule prefer: cidr fe80::/10 over no match"},
		{"a prefix counts without its other bits", Prefer(RemoteIn(netip.MustParsePrefix("10.9.9.9/8"))),
			Candidate{Remote: "/ip4/10.1.2.3/tcp/1"}, Candidate{}, "rule prefer: cidr 10.0.0.0/8 over no match"},
		{"a prefix of IPv4 inside IPv6 is one of IPv4", Prefer(RemoteIn(netip.MustParsePrefix("::ffff:10.0.0.0/104"))),
			Candidate{Remote: "/ip6/::ffff:10.1.2.3/tcp/1"}, Candidate{}, "rule prefer: cidr 10.0.0.0/8 over no match"},
		{"a prefix of the local address", Never(LocalIn(netip.MustParsePrefix("10.0.0.0/8"))),
			Candidate{Remote: "/ip4/10.1.2.3/tcp/1"}, Candidate{Local: "/ip4/10.1.2.3/tcp/1"},
			"rule never: no match over local cidr 10.0.0.0/8"},
		{"a remote multiaddr", Never(RemotePrefix(ma.StringCast("/ip4/192.0.2.1/tcp/4001"))),
			Candidate{Remote: "/ip4/192.0.2.1/udp/4001/quic-v1", Local: "/ip4/192.0.2.1/tcp/4001"}, Candidate{Remote: "/ip4/192.0.2.1/tcp/4001/ws"},
			"rule never: no match over addr /ip4/192.0.2.1/tcp/4001"},
		{"a local multiaddr", Prefer(LocalPrefix(ma.StringCast("/ip4/192.0.2.1"))),
			Candidate{Local: "/ip4/192.0.2.1/tcp/4001"}, Candidate{Remote: "/ip4/192.0.2.1/tcp/4001", Local: "/ip4/192.0.2.10/tcp/4001"},
			"rule prefer: local addr /ip4/192.0.2.1 over no match"},
		{"never this interface", Never(OnInterface("wwan0")),
			Candidate{Interface: "wwan01"}, Candidate{Interface: "wwan0"}, "rule never: no match over interface wwan0"},
		{"an interface that is not known is none", Prefer(OnInterface("eth 0")),
			Candidate{Interface: "eth 0"}, Candidate{}, "rule prefer: interface \"eth 0\" over no match"},
		{"any of the matches, and the first that holds is shown", Prefer(OnInterface("eth0"), OnInterface("eth1"), LocalIn(netip.MustParsePrefix("::/0"))),
			Candidate{Interface: "eth1", Local: "/ip6/::1"}, Candidate{Interface: "wwan0"}, "rule prefer: interface eth1 over no match"},

		{"a lower RTT", RTTBand(),
			Candidate{RTT: 20 * ms}, Candidate{RTT: 80 * ms}, "rule rtt: 20ms over 80ms"},
		{"the first band ends at 5 ms", RTTBand(),
			Candidate{RTT: 5 * ms}, Candidate{RTT: 5*ms + 1}, "rule rtt: 5ms over 5.000001ms"},
		{"the second band ends at 7.5 ms", RTTBand(),
			Candidate{RTT: 7500 * time.Microsecond}, Candidate{RTT: 7500*time.Microsecond + 1}, "rule rtt: 7.5ms over 7.500001ms"},
		{"the third band ends at 11.25 ms", RTTBand(),
			Candidate{RTT: 11250 * time.Microsecond}, Candidate{RTT: 11250*time.Microsecond + 1}, "rule rtt: 11.25ms over 11.250001ms"},
		{"an unknown RTT is last", RTTBand(),
			Candidate{RTT: math.MaxInt64}, Candidate{}, "rule rtt: 2562047h47m16.854775807s over unknown"},
		{"the incumbent beats what is a little faster", RTTBand(),
			Candidate{RTT: 80 * ms, Incumbent: true}, Candidate{RTT: 60 * ms}, "rule rtt: 80ms (incumbent) over 60ms"},
		{"the incumbent yields to what is much faster", RTTBand(),
			Candidate{RTT: 35 * ms}, Candidate{RTT: 80 * ms, Incumbent: true}, "rule rtt: 35ms over 80ms (incumbent)"},
		{"an incumbent of unknown RTT is last", RTTBand(),
			Candidate{RTT: 80 * ms}, Candidate{Incumbent: true}, "rule rtt: 80ms over unknown"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.rule.Compare(tt.better, tt.worse); got <= 0 {
				t.Errorf("Compare(better, worse) = %d, want more than 0", got)
			}
			if got := tt.rule.Compare(tt.worse, tt.better); got >= 0 {
				t.Errorf("Compare(worse, better) = %d, want less than 0", got)
			}
			got := Decision{Rule: tt.rule.Name(), WinnerValue: tt.rule.Value(tt.better), LoserValue: tt.rule.Value(tt.worse)}
			if got.String() != tt.decision {
				t.Errorf("decision %q, want %q", got, tt.decision)
			}
		})
	}
}

func TestRulesThatDoNotTellApart(t *testing.T) {
	for _, tt := range []struct {
		name string
		rule Rule
		a, b Candidate
	}{
		{"limited is not relayed", Unlimited(), Candidate{Relayed: true}, Candidate{}},
		{"relayed is not limited", Direct(), Candidate{Limited: true}, Candidate{}},
		{"reaches left out", ReachOrder(Public), Candidate{Reach: Loopback}, Candidate{}},
		{"transports left out", TransportOrder(QUIC), Candidate{Transport: TCP}, Candidate{Transport: WebSocket}},
		{"labelled streams are not pinned", PinnedStreams(), Candidate{Streams: 9, Labelled: 9}, Candidate{}},
		{"all streams count, not the pinned ones again", MoreStreams(), Candidate{Streams: 3, Pinned: 3}, Candidate{Streams: 3, Labelled: 3}},
		{"an age below 0 is unknown", Older(), Candidate{Age: -1}, Candidate{}},
		{"RTTs within the first band", RTTBand(), Candidate{RTT: 1}, Candidate{RTT: 5 * ms}},
		{"RTTs within a band", RTTBand(), Candidate{RTT: 60 * ms}, Candidate{RTT: 80 * ms}},
		{"an incumbent a band slower", RTTBand(), Candidate{RTT: 100 * ms, Incumbent: true}, Candidate{RTT: 66 * ms}},
		{"nothing was measured", RTTBand(), Candidate{Incumbent: true}, Candidate{}},
		{"an RTT below 0 is unknown", RTTBand(), Candidate{RTT: -ms}, Candidate{}},
		{"an age below 0 is unknown to younger", Younger(), Candidate{Age: -1}, Candidate{}},
		{"IP versions left out", IPVersionOrder(6), Candidate{IPVersion: 4}, Candidate{}},
		{"there is no IPv5", IPVersionOrder(0, 4), Candidate{IPVersion: 5}, Candidate{}},
		{"directions left out", DirectionOrder(network.DirInbound), Candidate{Direction: network.DirOutbound}, Candidate{}},
		{"nor a third direction", DirectionOrder(network.DirUnknown), Candidate{Direction: 3}, Candidate{}},
		{"one match or another", Never(OnInterface("eth0"), OnInterface("eth1")), Candidate{Interface: "eth0"}, Candidate{Interface: "eth1"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.rule.Compare(tt.a, tt.b); got != 0 {
				t.Errorf("Compare(a, b) = %d, want 0", got)
			}
			if got := tt.rule.Compare(tt.b, tt.a); got != 0 {
				t.Errorf("Compare(b, a) = %d, want 0", got)
			}
		})
	}
}

// What the doc comment of RTTBand promises.
func TestRTTTakesOverFromTheIncumbent(t *testing.T) {
	rule := RTTBand()
	for incumbent := ms; incumbent <= 300*ms; incumbent += ms {
		for challenger := ms; challenger <= 300*ms; challenger += ms {
			takesOver := rule.Compare(Candidate{RTT: challenger}, Candidate{RTT: incumbent, Incumbent: true}) > 0
			switch {
			case takesOver && incumbent <= 7500*time.Microsecond:
				t.Fatalf("%v takes over from the incumbent's %v, which is good enough", challenger, incumbent)
			case takesOver && 3*challenger >= 2*incumbent:
				t.Fatalf("%v takes over from the incumbent's %v: not less than two thirds", challenger, incumbent)
			case !takesOver && 9*challenger <= 4*incumbent && incumbent > 7500*time.Microsecond:
				t.Fatalf("%v does not take over from the incumbent's %v: not more than four ninths", challenger, incumbent)
			}
		}
	}
}

func TestRTTNoiseDoesNotFlap(t *testing.T) {
	// Two connections over one path, each measured anew 20 % too low or too
	// high: whichever is the incumbent stays.
	rule := RTTBand()
	for rtt := ms; rtt <= time.Second; rtt += ms / 4 {
		low, high := Candidate{RTT: rtt * 8 / 10}, Candidate{RTT: rtt * 12 / 10, Incumbent: true}
		if rule.Compare(low, high) > 0 {
			t.Fatalf("path of %v: measured as %v, takes over from the incumbent measured as %v", rtt, low.RTT, high.RTT)
		}
	}
}

func TestScores(t *testing.T) {
	const hour = time.Hour
	for _, tt := range []struct {
		rule      Scored
		candidate Candidate
		want      float64
	}{
		{Unlimited(), Candidate{}, 100},
		{Unlimited(), Candidate{Limited: true}, 0},
		{Direct(), Candidate{}, 100},
		{Direct(), Candidate{Relayed: true}, 0},
		{Incumbent(), Candidate{Incumbent: true}, 100},
		{Incumbent(), Candidate{}, 0},
		{TransportOrder(), Candidate{Transport: QUIC}, 100},
		{TransportOrder(), Candidate{Transport: WebTransport}, 80},
		{TransportOrder(), Candidate{Transport: WebSocket}, 20},
		{TransportOrder(), Candidate{}, 0},
		{TransportOrder(TCP, TCP, QUIC), Candidate{Transport: QUIC}, 50}, // the repetition does not count
		{IPVersionOrder(), Candidate{IPVersion: 4}, 50},
		{PinnedStreams(), Candidate{}, 0},
		{PinnedStreams(), Candidate{Pinned: 1}, 10},
		{PinnedStreams(), Candidate{Pinned: 2}, 20},
		{PinnedStreams(), Candidate{Pinned: 3}, 20},
		{PinnedStreams(), Candidate{Pinned: 511}, 90},
		{PinnedStreams(), Candidate{Pinned: 512}, 100},
		{PinnedStreams(), Candidate{Pinned: math.MaxInt}, 100},
		{MoreStreams(), Candidate{Streams: -1}, 0},
		{MoreStreams(), Candidate{Streams: 4}, 30},
		{Older(), Candidate{}, 0},
		{Older(), Candidate{Age: hour}, 50},
		{Older(), Candidate{Age: 3 * hour}, 75},
		{Younger(), Candidate{}, 0},
		{Younger(), Candidate{Age: hour}, 50},
		{Younger(), Candidate{Age: 3 * hour}, 25},
		{Prefer(OnInterface("eth0")), Candidate{Interface: "eth0"}, 100},
		{Prefer(OnInterface("eth0")), Candidate{}, 0},
		{Never(OnInterface("eth0")), Candidate{Interface: "eth0"}, 0},
		{Never(OnInterface("eth0")), Candidate{}, 100},
		{RTTBand(), Candidate{}, 0},
		{RTTBand(), Candidate{RTT: 5 * ms}, 100},
		{RTTBand(), Candidate{RTT: 7 * ms}, 95},
		{RTTBand(), Candidate{RTT: 7 * ms, Incumbent: true}, 100},
		{RTTBand(), Candidate{RTT: 11 * time.Second}, 5},
		{RTTBand(), Candidate{RTT: 11100 * ms}, 0},
		{RTTBand(), Candidate{RTT: time.Hour}, 0},
	} {
		if got := tt.rule.Score(tt.candidate); got != tt.want {
			t.Errorf("%v scores %v, want %v, for %+v", tt.rule, got, tt.want, tt.candidate)
		}
	}
}

func TestMatchString(t *testing.T) {
	for want, match := range map[string]Match{
		"cidr 10.0.0.0/8":           RemoteIn(netip.MustParsePrefix("10.0.0.0/8")),
		"local cidr fd00::/8":       LocalIn(netip.MustParsePrefix("fd00::/8")),
		"addr /ip4/192.0.2.1":       RemotePrefix(ma.StringCast("/ip4/192.0.2.1")),
		"local addr /ip4/192.0.2.1": LocalPrefix(ma.StringCast("/ip4/192.0.2.1")),
		`interface "Ethernet 2"`:    OnInterface("Ethernet 2"),
	} {
		if got := match.String(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestMatchesOfNothingPanic(t *testing.T) {
	for name, build := range map[string]func(){
		"remote CIDR":      func() { RemoteIn(netip.Prefix{}) },
		"local CIDR":       func() { LocalIn(netip.Prefix{}) },
		"remote multiaddr": func() { RemotePrefix(nil) },
		"local multiaddr":  func() { LocalPrefix(nil) },
		"interface":        func() { OnInterface("") },
	} {
		t.Run(name, func(t *testing.T) { mustPanic(t, build) })
	}
}

func mustPanic(t *testing.T, f func()) {
	t.Helper()
	defer func() {
		if recover() == nil {
			t.Error("no panic: a mistake in a program goes unseen")
		}
	}()
	f()
}
