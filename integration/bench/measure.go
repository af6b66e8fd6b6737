package main

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"syscall"
	"time"
)

// window is how long a turn lasts at least, in processor time and on the clock.
const window = 200 * time.Millisecond

// cost is what the process has spent, in nanoseconds: with both hosts in it, that is both
// ends.
type cost struct{ cpu, wall float64 }

func (c cost) minus(d cost) cost      { return cost{c.cpu - d.cpu, c.wall - d.wall} }
func (c cost) plus(d cost) cost       { return cost{c.cpu + d.cpu, c.wall + d.wall} }
func (c cost) times(f float64) cost   { return cost{c.cpu * f, c.wall * f} }
func (c cost) over(d cost) cost       { return cost{c.cpu / d.cpu, c.wall / d.wall} }
func (c cost) atLeast(d float64) bool { return c.cpu >= d && c.wall >= d }

var started = time.Now()

func spent() cost {
	var u syscall.Rusage
	must(syscall.Getrusage(syscall.RUSAGE_SELF, &u))
	return cost{float64(u.Utime.Nano() + u.Stime.Nano()), float64(time.Since(started))}
}

// arm does something n times, and returns what that has cost, without what it needed to
// prepare.
type arm func(n int) cost

// measured is an arm that prepares nothing.
func measured(do func(n int)) arm {
	return func(n int) cost {
		before := spent()
		do(n)
		return spent().minus(before)
	}
}

// result is one comparison: ratios, and what the plain arm costs.
type result struct {
	cpu, cpuAgain, wall, wallAgain interval
	raw                            cost
}

// compare has the arms take turns.
func compare(rounds int, raw, again, portage arm) result {
	arms := [3]arm{raw, again, portage}
	var times [3]int
	for i, run := range arms {
		times[i] = enough(run)
	}
	var ratios, ratiosAgain, raws []cost
	for range rounds {
		var per [3]cost
		for _, i := range rand.Perm(len(arms)) {
			runtime.GC() // none pays for another's garbage
			per[i] = arms[i](times[i]).times(1 / float64(times[i]))
		}
		plain := per[0].plus(per[1]).times(0.5)
		ratios = append(ratios, per[2].over(plain))
		ratiosAgain = append(ratiosAgain, per[1].over(per[0]))
		raws = append(raws, plain)
	}
	return result{
		cpu: ofMedian(cpuOf(ratios)), cpuAgain: ofMedian(cpuOf(ratiosAgain)),
		wall: ofMedian(wallOf(ratios)), wallAgain: ofMedian(wallOf(ratiosAgain)),
		raw: cost{ofMedian(cpuOf(raws)).median, ofMedian(wallOf(raws)).median},
	}
}

// enough returns how many times fill a window.
func enough(run arm) int {
	for n := 1; ; {
		c := run(n)
		if c.atLeast(float64(window)) {
			return n
		}
		// The first times are slow, so that more than ten times as often is a guess.
		least := max(min(c.cpu, c.wall), float64(window)/10)
		n = max(n+1, int(1.1*float64(n)*float64(window)/least))
	}
}

func cpuOf(all []cost) []float64 {
	var v []float64
	for _, c := range all {
		v = append(v, c.cpu)
	}
	return v
}

func wallOf(all []cost) []float64 {
	var v []float64
	for _, c := range all {
		v = append(v, c.wall)
	}
	return v
}

// interval is a median and where the true one is, with 95 %.
type interval struct{ low, median, high float64 }

func (i interval) String() string {
	return fmt.Sprintf("%.2f (%.2f–%.2f)", i.median, i.low, i.high)
}

// ofMedian returns the median of v and its interval, which is between two of v: how many of v
// are below the true median is a matter of tossing a coin, whatever v is distributed like.
// With fewer than six it is less than 95 % of certain.
func ofMedian(v []float64) interval {
	v = slices.Sorted(slices.Values(v))
	n := len(v)
	i := interval{median: (v[(n-1)/2] + v[n/2]) / 2}
	// The largest k for which fewer than k of n coins show heads with 2.5 % at the most.
	k, p, below := 0, 1.0, 0.0
	for range n {
		p /= 2
	}
	for below+p <= 0.025 {
		below += p
		p = p * float64(n-k) / float64(k+1)
		k++
	}
	k = max(k, 1)
	i.low, i.high = v[k-1], v[n-k]
	return i
}
