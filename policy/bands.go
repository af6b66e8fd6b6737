package policy

import (
	"fmt"
	"math"
	"math/bits"
	"strings"
	"time"
)

// perBand is what a band is worth in the score of a measurement. With 20 bands
// from 0 to 100, RTTs from 5 ms to 11 s and throughputs from 1 kB/s to 524 MB/s
// are told apart, which is about all there is between two hosts.
const perBand = 5

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
//
// The first band scores 100 and each other 5 less than the one before, down to 0
// from 11.1 s on. An unknown RTT scores 0.
func RTTBand() Scored {
	return byWorth{
		name:  "rtt",
		text:  "rtt",
		worth: rttWorth,
		score: func(c Candidate) float64 {
			if c.RTT <= 0 {
				return 0
			}
			return max(0, maxScore+perBand*float64(rttWorth(c)))
		},
		value: func(c Candidate) string { return measured(c, c.RTT > 0, c.RTT) },
		use:   Use{RTT: true},
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

// ThroughputBand returns the rule "throughput": a connection whose Throughput
// lies in a higher band is better. Bands are fixed: the first is all below
// 1 kB/s, and each other ends at twice the end of the one before (2 kB/s,
// 4 kB/s, 8 kB/s, and so on; 1 kB is 1000 bytes). The incumbent counts one band
// higher than its throughput, as if that were double.
//
// So a connection takes over from the incumbent only with more than twice its
// throughput, and surely with four times, if that is 2 kB/s or more. The change
// is undone only when the ratio of the two has moved by a factor of 4.
//
// A connection of unknown throughput comes last, behind any that was measured,
// be it the incumbent or not. Since a connection that carries nothing cannot be
// measured, this keeps streams where they are, and where that is not meant,
// another rule has to come first.
//
// The first band scores 0 and each other 5 more than the one before, up to 100
// from 524 MB/s on. An unknown throughput scores 0.
func ThroughputBand() Scored {
	return byWorth{
		name:  "throughput",
		text:  "throughput",
		worth: throughputWorth,
		score: func(c Candidate) float64 {
			return min(maxScore, perBand*float64(max(0, throughputWorth(c))))
		},
		value: func(c Candidate) string { return measured(c, c.Throughput > 0, byteRate(c.Throughput)) },
		use:   Use{Throughput: true},
	}
}

// throughputFloor is the end of the first band, in bytes per second. Less than
// that is what pings and other upkeep make, and tells nothing of the path.
const throughputFloor = 1000

// throughputWorth is the number of the band, counted in doublings of
// throughputFloor, and one more for the incumbent. A measured throughput wanders
// more than an RTT, with what else uses the path: with the incumbent's a third
// too low and another's a third too high, the other's is double, which must not
// suffice.
func throughputWorth(c Candidate) int64 {
	if c.Throughput == 0 {
		return -1
	}
	band := int64(bits.Len64(c.Throughput / throughputFloor))
	if c.Incumbent {
		band++
	}
	return band
}

// measured returns a measurement as text, with a mark if the candidate's being the
// incumbent has favoured it.
func measured(c Candidate, isKnown bool, value fmt.Stringer) string {
	switch {
	case !isKnown:
		return "unknown"
	case c.Incumbent:
		return value.String() + " (incumbent)"
	default:
		return value.String()
	}
}

// byteRate is in bytes per second.
type byteRate uint64

// String is the rate in the greatest unit that leaves no 0 before the point, in
// full: two that differ must not look the same.
func (r byteRate) String() string {
	unit, name := byteRate(1), "B/s"
	for _, next := range []string{"kB/s", "MB/s", "GB/s"} {
		if r/unit < 1000 {
			break
		}
		unit, name = unit*1000, next
	}
	text := fmt.Sprint(uint64(r / unit))
	if rest := uint64(r % unit); rest > 0 {
		digits := len(fmt.Sprint(uint64(unit))) - 1
		text += "." + strings.TrimRight(fmt.Sprintf("%0*d", digits, rest), "0")
	}
	return text + " " + name
}
