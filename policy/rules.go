package policy

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Rule compares two candidates by one property. An implementation must be pure
// and safe for concurrent use.
//
// Compare must be a strict weak order: no candidate is better than itself, and
// both "better than" and "neither is better" are transitive. The sure way is to
// compare what each candidate is worth by itself, with a worth for missing
// values too.
type Rule interface {
	// Name is the rule's name in decisions: one lower-case word.
	Name() string
	// Compare is positive if a is better than b, negative if b is better, and
	// 0 if the rule does not tell them apart.
	Compare(a, b Candidate) int
	// Value is what the rule sees in c, for people. It differs between
	// candidates that Compare tells apart.
	Value(c Candidate) string
	// String is the rule in the text of a policy: its name, with its arguments
	// if it has any.
	String() string
}

// byWorth compares what each candidate is worth by itself, which makes it a
// strict weak order.
type byWorth struct {
	name, text string
	worth      func(Candidate) int64 // more is better
	value      func(Candidate) string
}

func (r byWorth) Name() string               { return r.name }
func (r byWorth) Compare(a, b Candidate) int { return cmp.Compare(r.worth(a), r.worth(b)) }
func (r byWorth) Value(c Candidate) string   { return r.value(c) }
func (r byWorth) String() string             { return r.text }

// Unlimited returns the rule "unlimited": a connection that is not Limited is
// better.
func Unlimited() Rule {
	return yesRule("unlimited", func(c Candidate) bool { return !c.Limited })
}

// Direct returns the rule "direct": a connection that is not Relayed is better.
func Direct() Rule {
	return yesRule("direct", func(c Candidate) bool { return !c.Relayed })
}

// ReachOrder returns the rule "reach": a connection whose Reach comes earlier in
// order is better. Those that order does not name come last and are equal.
// Default: Loopback, Private, Public.
func ReachOrder(order ...Reach) Rule {
	if len(order) == 0 {
		order = []Reach{Loopback, Private, Public}
	}
	return orderRule("reach", order, func(c Candidate) Reach { return c.Reach })
}

// TransportOrder returns the rule "transport": a connection whose Transport
// comes earlier in order is better. Those that order does not name come last and
// are equal. Default: QUIC, WebTransport, WebRTC, TCP, WebSocket; first those
// where a lost packet holds up one stream and not all, and of each kind first
// the one with the fewest layers.
func TransportOrder(order ...Transport) Rule {
	if len(order) == 0 {
		order = []Transport{QUIC, WebTransport, WebRTC, TCP, WebSocket}
	}
	return orderRule("transport", order, func(c Candidate) Transport { return c.Transport })
}

// PinnedStreams returns the rule "pinned": a connection with more Pinned streams
// is better. They cannot move to another connection, so this one has to stay for
// as long as they do.
func PinnedStreams() Rule {
	return countRule("pinned", func(c Candidate) int { return c.Pinned })
}

// MoreStreams returns the rule "streams": a connection with more Streams is
// better, since fewer have to move.
func MoreStreams() Rule {
	return countRule("streams", func(c Candidate) int { return c.Streams })
}

// Older returns the rule "older": a connection with a greater Age is better.
// One of unknown age comes last.
func Older() Rule {
	return byWorth{
		name:  "older",
		text:  "older",
		worth: func(c Candidate) int64 { return max(0, int64(c.Age)) },
		value: func(c Candidate) string { return known(c.Age) },
	}
}

// RTTBand returns the rule "rtt": a connection whose RTT lies in a lower band is
// better. Bands are fixed: the first ends at 5 ms, each other at 1.5 times the
// end of the one before (7.5 ms, 11.25 ms, 16.875 ms, and so on). The incumbent's
// RTT counts for two thirds, which puts it one band lower.
//
// So a connection takes over from the incumbent only with less than two thirds
// of its RTT, and surely with four ninths, unless the incumbent's is 7.5 ms
// or less: that is never left for an RTT. The change is undone only when the
// ratio of the two has moved by a factor of 2.25.
//
// A connection of unknown RTT comes last, behind any that was measured, be it the
// incumbent or not: who measures should measure all candidates of a ranking, or
// leave all unknown.
func RTTBand() Rule {
	return byWorth{
		name:  "rtt",
		text:  "rtt",
		worth: rttWorth,
		value: func(c Candidate) string {
			if c.Incumbent && c.RTT > 0 {
				return known(c.RTT) + " (incumbent)"
			}
			return known(c.RTT)
		},
	}
}

// rttFloor is the end of the first band. Below 5 ms a measurement tells more of
// the scheduling of two hosts and their radios than of the path, and no
// application feels the difference.
const rttFloor = 5 * time.Millisecond

// lowerRTT returns two thirds of rtt, rounded up: the step from one band to the
// one below it, and the incumbent's discount. A smoothed RTT over an unchanged
// path wanders by up to a fifth; with the incumbent's a fifth too high and
// another's a fifth too low, the other's is two thirds, which must not suffice;
// and a path that does take less is worth moving to. The two are one number, so
// that the discount is a whole band wherever in its band an RTT lies.
func lowerRTT(rtt time.Duration) time.Duration { return rtt - rtt/3 }

func rttWorth(c Candidate) int64 {
	rtt := c.RTT
	if rtt <= 0 {
		return math.MinInt64
	}
	if c.Incumbent {
		rtt = lowerRTT(rtt)
	}
	band := int64(0)
	for ; rtt > rttFloor; rtt = lowerRTT(rtt) {
		band++
	}
	return -band
}

// yesRule prefers candidates that are.
func yesRule(name string, is func(Candidate) bool) Rule {
	return byWorth{
		name: name,
		text: name,
		worth: func(c Candidate) int64 {
			if is(c) {
				return 1
			}
			return 0
		},
		value: func(c Candidate) string { return strconv.FormatBool(is(c)) },
	}
}

// countRule prefers candidates with a greater count.
func countRule(name string, count func(Candidate) int) Rule {
	return byWorth{
		name:  name,
		text:  name,
		worth: func(c Candidate) int64 { return int64(count(c)) },
		value: func(c Candidate) string { return strconv.Itoa(count(c)) },
	}
}

// orderRule prefers candidates of a kind that comes earlier in order.
func orderRule[Kind interface {
	comparable
	fmt.Stringer
}](name string, order []Kind, kind func(Candidate) Kind) Rule {
	order = slices.Clone(order)
	names := make([]string, len(order))
	for i, k := range order {
		names[i] = k.String()
	}
	return byWorth{
		name: name,
		text: name + "(" + strings.Join(names, ", ") + ")",
		worth: func(c Candidate) int64 {
			if i := slices.Index(order, kind(c)); i >= 0 {
				return int64(len(order) - i)
			}
			return 0
		},
		value: func(c Candidate) string { return kind(c).String() },
	}
}

// known returns d as text, in full: two that differ must not look the same.
func known(d time.Duration) string {
	if d <= 0 {
		return "unknown"
	}
	return d.String()
}
