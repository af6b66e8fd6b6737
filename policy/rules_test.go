package policy

import (
	"math"
	"testing"
	"time"
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
