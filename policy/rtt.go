package policy

import (
	"math"
	"time"
)

// perBand is what a band is worth in the score. With 20 bands from 0 to 100, RTTs
// from 5 ms to 11 s are told apart, which is about all there is between two hosts.
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
		value: func(c Candidate) string {
			if c.RTT > 0 && c.Incumbent {
				return known(c.RTT) + " (incumbent)" // which has favoured it
			}
			return known(c.RTT)
		},
		use: Use{RTT: true},
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
