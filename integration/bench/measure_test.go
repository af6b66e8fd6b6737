package main

import (
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestIntervalOfMedian(t *testing.T) {
	count := func(n int) []float64 {
		v := make([]float64, n)
		for i, at := range rand.Perm(n) {
			v[at] = float64(i + 1)
		}
		return v
	}
	// The ranks are those of tables of the sign test.
	require.Equal(t, interval{1, 3.5, 6}, ofMedian(count(6)))
	require.Equal(t, interval{2, 5.5, 9}, ofMedian(count(10)))
	require.Equal(t, interval{8, 13, 18}, ofMedian(count(25)))
}

func TestIntervalHoldsTheMedian(t *testing.T) {
	const runs = 4000
	r := rand.New(rand.NewPCG(1, 2))
	held := 0
	for range runs {
		v := make([]float64, 15)
		for i := range v {
			v[i] = r.ExpFloat64() // its median is ln 2
		}
		if i := ofMedian(v); i.low <= 0.6931 && i.high >= 0.6931 {
			held++
		}
	}
	require.GreaterOrEqual(t, held, runs*95/100)
	require.LessOrEqual(t, held, runs*98/100, "wider than it need be")
}

func TestCompareDividesByTimes(t *testing.T) {
	const ms = 1e6
	costing := func(each float64) arm {
		return func(n int) cost { return cost{each * float64(n), 2 * each * float64(n)} }
	}
	r := compare(6, costing(ms), costing(ms), costing(3*ms))
	require.InDelta(t, 3, r.cpu.median, 1e-9)
	require.InDelta(t, 3, r.wall.median, 1e-9)
	require.InDelta(t, 1, r.cpuAgain.median, 1e-9)
	require.InDelta(t, ms, r.raw.cpu, 1e-3)
	require.InDelta(t, 2*ms, r.raw.wall, 1e-3)
}

func TestTurnsFillTheWindow(t *testing.T) {
	run := func(n int) cost { return cost{5e6 + 1e3*float64(n), 1e12} }
	require.True(t, run(enough(run)).atLeast(float64(window)))
}

func TestShort(t *testing.T) {
	require.Equal(t, "1.23 µs", short(1234))
	require.Equal(t, "999 ns", short(999))
	require.Equal(t, "1000 ns", short(999.9))
	require.Equal(t, "56.8 s", short(56.789e9))
}
