package policy

import (
	"cmp"
	"math"
	"math/bits"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
)

// Rule compares two candidates by one property. An implementation must be pure
// and safe for concurrent use.
//
// Compare must be a strict weak order: no candidate is better than itself, and
// both "better than" and "neither is better" are transitive. The sure way is to
// compare what each candidate is worth by itself, with a worth for missing
// values too. CheckRule tests for it.
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

// Scored is a rule that can say how good a candidate is by itself, which is what
// [Weighted] adds up. All rules of this package are.
type Scored interface {
	Rule
	// Score is from 0, the worst, to 100. It must not contradict Compare:
	// candidates that Compare does not tell apart have the same score, and a
	// better one has no lower score.
	Score(c Candidate) float64
}

// maxScore is the greatest score. Any number would do; of 100 one can speak as of
// per cent.
const maxScore = 100

// byWorth compares what each candidate is worth by itself, which makes it a
// strict weak order.
type byWorth struct {
	name, text string
	worth      func(Candidate) int64   // more is better
	score      func(Candidate) float64 // worth, brought into the range of a score
	value      func(Candidate) string
	use        Use
}

func (r byWorth) Name() string               { return r.name }
func (r byWorth) Compare(a, b Candidate) int { return cmp.Compare(r.worth(a), r.worth(b)) }
func (r byWorth) Score(c Candidate) float64  { return r.score(c) }
func (r byWorth) Value(c Candidate) string   { return r.value(c) }
func (r byWorth) String() string             { return r.text }
func (r byWorth) Uses() Use                  { return r.use }

// Unlimited returns the rule "unlimited": a connection that is not Limited is
// better. It scores 100, any other 0.
func Unlimited() Scored {
	return yesRule("unlimited", func(c Candidate) bool { return !c.Limited })
}

// Direct returns the rule "direct": a connection that is not Relayed is better.
// It scores 100, any other 0.
func Direct() Scored {
	return yesRule("direct", func(c Candidate) bool { return !c.Relayed })
}

// Incumbent returns the rule "incumbent": the Incumbent is better. It scores 100,
// any other 0.
//
// A policy prefers the incumbent to its equals without this rule. In a chain it
// says that what follows is only for a peer that has no incumbent, in a weighted
// policy by how much another connection has to be better.
func Incumbent() Scored {
	return yesRule("incumbent", func(c Candidate) bool { return c.Incumbent })
}

// ReachOrder returns the rule "reach": a connection whose Reach comes earlier in
// order is better. Those that order does not name come last and are equal.
// Default: Loopback, Private, Public. The scores are evenly spaced, from 100 for
// the first in order to 0 for those that it does not name.
func ReachOrder(order ...Reach) Scored {
	if len(order) == 0 {
		order = []Reach{Loopback, Private, Public}
	}
	return orderRule("reach", order, Reach.String, func(c Candidate) Reach { return c.Reach })
}

// TransportOrder returns the rule "transport": a connection whose Transport
// comes earlier in order is better. Those that order does not name come last and
// are equal. Default: QUIC, WebTransport, WebRTC, TCP, WebSocket; first those
// where a lost packet holds up one stream and not all, and of each kind first
// the one with the fewest layers. The scores are as for [ReachOrder].
func TransportOrder(order ...Transport) Scored {
	if len(order) == 0 {
		order = []Transport{QUIC, WebTransport, WebRTC, TCP, WebSocket}
	}
	return orderRule("transport", order, Transport.String, func(c Candidate) Transport { return c.Transport })
}

// IPVersionOrder returns the rule "ip": a connection whose IPVersion, 4 or 6,
// comes earlier in order is better. Those that order does not name come last and
// are equal; any other number stands for a version that is not known. Default: 6,
// 4, since IPv6 has seldom a NAT on the way that could forget the connection.
// The scores are as for [ReachOrder].
func IPVersionOrder(order ...int) Scored {
	if len(order) == 0 {
		order = []int{6, 4}
	}
	return orderRule("ip", order, ipVersionName, func(c Candidate) int { return c.IPVersion })
}

func ipVersionName(version int) string {
	switch version {
	case 4:
		return "v4"
	case 6:
		return "v6"
	default:
		return "unknown"
	}
}

// DirectionOrder returns the rule "direction": a connection whose Direction comes
// earlier in order is better. Those that order does not name come last and are
// equal. Default: outbound, inbound, since an address that this host has dialled
// it can dial again. The scores are as for [ReachOrder].
//
// The two ends of a connection see opposite directions, except after a hole
// punch: then both see an outbound one.
func DirectionOrder(order ...network.Direction) Scored {
	if len(order) == 0 {
		order = []network.Direction{network.DirOutbound, network.DirInbound}
	}
	return orderRule("direction", order, directionName, func(c Candidate) network.Direction { return c.Direction })
}

func directionName(d network.Direction) string {
	switch d {
	case network.DirOutbound:
		return "outbound"
	case network.DirInbound:
		return "inbound"
	default:
		return "unknown"
	}
}

// PinnedStreams returns the rule "pinned": a connection with more Pinned streams
// is better. They cannot move to another connection, so this one has to stay for
// as long as they do. None score 0, one 10, and each doubling 10 more, up to 100
// for 512 and more.
func PinnedStreams() Scored {
	return countRule("pinned", func(c Candidate) int { return c.Pinned })
}

// MoreStreams returns the rule "streams": a connection with more Streams is
// better, since fewer have to move. The scores are as for [PinnedStreams].
func MoreStreams() Scored {
	return countRule("streams", func(c Candidate) int { return c.Streams })
}

// Older returns the rule "older": a connection with a greater Age is better.
// One of unknown age comes last. The score rises from 0 at first over 50 after an
// hour towards 100.
func Older() Scored {
	return byWorth{
		name:  "older",
		text:  "older",
		worth: func(c Candidate) int64 { return max(0, int64(c.Age)) },
		score: func(c Candidate) float64 { return maxScore - youth(c) },
		value: func(c Candidate) string { return known(c.Age) },
	}
}

// Younger returns the rule "younger": a connection with a smaller Age is better,
// as where the older ones may be left over from another network. One of unknown
// age comes last. The score falls from 100 at first over 50 after an hour towards
// 0.
func Younger() Scored {
	return byWorth{
		name: "younger",
		text: "younger",
		worth: func(c Candidate) int64 {
			if c.Age <= 0 {
				return math.MinInt64
			}
			return -int64(c.Age)
		},
		score: func(c Candidate) float64 {
			if c.Age <= 0 {
				return 0
			}
			return youth(c)
		},
		value: func(c Candidate) string { return known(c.Age) },
	}
}

// youth falls from maxScore at age 0 towards 0. It has no steps: at a step two
// connections would change places as each comes to it. It falls to half within
// ageScale, since most connections of a peer-to-peer network last minutes, and
// those that matter hours.
func youth(c Candidate) float64 {
	const ageScale = float64(time.Hour)
	return maxScore * (ageScale / (ageScale + float64(max(0, c.Age))))
}

// Prefer returns the rule "prefer": a connection for which at least one of the
// matches holds is better. It scores 100, any other 0. In text it is
// prefer(cidr 192.168.0.0/16, interface eth0).
func Prefer(match Match, more ...Match) Scored {
	return matchRule("prefer", maxScore, append([]Match{match}, more...))
}

// Never returns the rule "never": a connection for which at least one of the
// matches holds is worse. It scores 0, any other 100. In text it is
// never(cidr 10.0.0.0/8).
//
// It rules nothing out, since a peer may have no other connection: as the first
// rule of a chain it makes such a connection the last choice.
func Never(match Match, more ...Match) Scored {
	return matchRule("never", 0, append([]Match{match}, more...))
}

// matchRule gives candidates that match a score, and all others the opposite one.
func matchRule(name string, score float64, matches []Match) Scored {
	texts := make([]string, len(matches))
	var use Use
	for i, m := range matches {
		texts[i] = m.text
		use = use.or(m.use)
	}
	scoreOf := func(c Candidate) float64 {
		if slices.ContainsFunc(matches, func(m Match) bool { return m.holds(c) }) {
			return score
		}
		return maxScore - score
	}
	return byWorth{
		name:  name,
		text:  name + "(" + strings.Join(texts, ", ") + ")",
		worth: func(c Candidate) int64 { return int64(scoreOf(c)) },
		score: scoreOf,
		value: func(c Candidate) string {
			if i := slices.IndexFunc(matches, func(m Match) bool { return m.holds(c) }); i >= 0 {
				return texts[i]
			}
			return "no match"
		},
		use: use,
	}
}

// yesRule prefers candidates that are.
func yesRule(name string, is func(Candidate) bool) Scored {
	worth := func(c Candidate) int64 {
		if is(c) {
			return 1
		}
		return 0
	}
	return byWorth{
		name:  name,
		text:  name,
		worth: worth,
		score: func(c Candidate) float64 { return maxScore * float64(worth(c)) },
		value: func(c Candidate) string { return strconv.FormatBool(is(c)) },
	}
}

// countRule prefers candidates with a greater count.
func countRule(name string, count func(Candidate) int) Scored {
	return byWorth{
		name:  name,
		text:  name,
		worth: func(c Candidate) int64 { return int64(count(c)) },
		score: func(c Candidate) float64 {
			// The first stream matters more than the hundredth, and streams
			// come and go: so only doublings count.
			const perDoubling = 10
			return min(maxScore, perDoubling*float64(bits.Len(uint(max(0, count(c))))))
		},
		value: func(c Candidate) string { return strconv.Itoa(count(c)) },
	}
}

// orderRule prefers candidates of a kind that comes earlier in order. Kinds are
// the same if they have the same name; a kind that is named again counts where
// it is first.
func orderRule[Kind any](rule string, order []Kind, name func(Kind) string, kind func(Candidate) Kind) Scored {
	var names []string
	for _, k := range order {
		if !slices.Contains(names, name(k)) {
			names = append(names, name(k))
		}
	}
	worth := func(c Candidate) int64 {
		if i := slices.Index(names, name(kind(c))); i >= 0 {
			return int64(len(names) - i)
		}
		return 0
	}
	return byWorth{
		name:  rule,
		text:  rule + "(" + strings.Join(names, ", ") + ")",
		worth: worth,
		score: func(c Candidate) float64 { return maxScore * float64(worth(c)) / float64(len(names)) },
		value: func(c Candidate) string { return name(kind(c)) },
	}
}

// known returns d as text, in full: two that differ must not look the same.
func known(d time.Duration) string {
	if d <= 0 {
		return "unknown"
	}
	return d.String()
}
