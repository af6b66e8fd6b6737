package connmgr

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/internal/punch"
	"github.com/go-portage/portage/policy"
)

// anyFacts makes facts of a seed: any number of connections in any state, also such as never
// occur together.
func anyFacts(r *rand.Rand) *facts {
	someTime := func() time.Time {
		switch r.IntN(5) {
		case 0:
			return time.Time{}
		case 1:
			return in(time.Duration(r.Int64N(int64(2 * time.Minute))))
		default:
			return ago(time.Duration(r.Int64N(int64([]time.Duration{time.Second, 10 * time.Second, time.Minute, time.Hour}[r.IntN(4)]))))
		}
	}
	few := func() int { return max(0, r.IntN(6)-3) }
	rarely := func() bool { return r.IntN(8) == 0 }
	f := &facts{
		now: noon, lower: r.IntN(2) == 0, wrapped: !rarely(), manages: knowledge(r.IntN(3)), migrates: !rarely(),
		forced: rarely(), came: someTime(), firstOf: someTime(), atOnce: rarely(), fresh: rarely(), measuring: rarely(),
		since:    someTime(),
		takeover: takeover{progress: someTime(), times: few(), forced: rarely()},
	}
	if r.IntN(4) > 0 {
		f.firstOf, f.measuring = time.Time{}, false
	}
	if rarely() {
		f.exempt = "it is exempt"
	}
	for kind := range 4 {
		if rarely() {
			if f.deaths == nil {
				f.deaths = make(map[pathKind]int)
			}
			f.deaths[pathKind{kind&1 > 0, kind&2 > 0}] = 1 + r.IntN(10)
		}
	}
	for i := range r.IntN(6) {
		c := aConn(fmt.Sprint(i), []string{quicAddr, tcpAddr, relayAddr}[r.IntN(3)])
		c.candidate.Limited = c.candidate.Relayed && r.IntN(2) == 0
		c.candidate.Direction = network.Direction(r.IntN(3))
		c.used = someTime()
		c.opened, c.quiet, c.ends = later(ago(2*time.Hour), earlier(someTime(), noon)), someTime(), someTime()
		c.path = path{health: health(r.IntN(3)), at: someTime(), since: someTime(), asked: someTime(), asking: rarely(), wide: !rarely(), denied: few(), tries: few()}
		if r.IntN(4) > 0 {
			c.path = path{health: pathAlive, at: ago(time.Millisecond), since: c.opened, asked: ago(time.Millisecond), wide: true}
		}
		c.spent, c.closing, c.pledged, c.named = rarely(), rarely(), rarely(), rarely()
		if c.unlimited() {
			c.ends, c.spent = time.Time{}, false
		}
		if r.IntN(2) == 0 {
			c.own, c.theirs, c.retries, c.moving, c.candidate.Pinned = few(), few(), few(), few(), few()
		}
		c.candidate.Labelled = c.own + c.theirs + c.retries
		c.candidate.Streams = c.candidate.Labelled + c.candidate.Pinned
		c.retryAt = someTime()
		c.room = r.IntN(5) - 1
		c.drain = drain{phase: drainPhase(r.IntN(7)), since: someTime(), sent: someTime(), at: someTime(), until: someTime(),
			lease: shortLease, asks: few(), failures: few()}
		if p := c.drain.phase; p >= drainBusy && p <= drainConfirmed && c.drain.at.IsZero() { // these are answers
			c.drain.at = noon
		}
		c.serves, c.lacks, c.instance = rarely(), rarely(), uint64(few())
		c.told = telling{phase: tellPhase(r.IntN(4)), until: someTime()}
		c.same = sameness(r.IntN(4))
		c.path.lost = someTime()
		if r.IntN(2) == 0 {
			c.waits = someTime()
			c.detour = detourFacts{running: rarely(), tries: few(), at: someTime(), err: errNoOther}
		}
		if rarely() {
			c.exempt = "it is exempt"
		}
		f.conns = append(f.conns, c)
	}
	if r.IntN(2) == 0 {
		f.upgrade = upgradeFacts{
			tracked: true, wanted: []string{"", "it is tagged"}[r.IntN(2)], used: someTime(), since: someTime(), changed: someTime(),
			running: rarely(), full: rarely(), started: someTime(), ended: someTime(), failures: few(), jitter: r.Float64(),
		}
		if !f.upgrade.started.IsZero() {
			f.upgrade.err = []error{nil, errDeniedByFake, punch.ErrUnsupported}[r.IntN(3)]
		}
	}
	if len(f.conns) > 0 {
		if r.IntN(2) == 0 {
			f.winner = f.conns[r.IntN(len(f.conns))].id()
		}
		if rarely() {
			f.better = f.conns[r.IntN(len(f.conns))].id()
		}
	}
	return f
}

// anyPolicy ranks by chance, and not always what it was given.
func anyPolicy(r *rand.Rand) rank {
	seed := r.Uint64()
	lies := r.IntN(10) == 0
	if r.IntN(2) == 0 {
		return byDefault
	}
	return func(cs []policy.Candidate) (policy.Ranking, error) {
		r := rand.New(rand.NewPCG(seed, 1))
		order := slices.Clone(cs)
		r.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		if lies && len(order) > 0 {
			switch r.IntN(3) {
			case 0:
				order[0].ID = "another"
			case 1:
				order = order[:len(order)-1]
			default:
				order = append(order, order[0])
			}
		}
		ranking := policy.Ranking{Order: order}
		for i := 1; i < len(order); i++ {
			ranking.Decisions = append(ranking.Decisions, policy.Decision{Winner: order[0], Loser: order[i], Rule: "chance"})
		}
		return ranking, nil
	}
}

// What holds for every plan holds whatever the facts are, and the same facts give the same
// plan.
func FuzzDecide(f *testing.F) {
	for seed := range uint64(50) {
		f.Add(seed, seed)
	}
	f.Fuzz(func(t *testing.T, a, b uint64) {
		make2 := func() (*facts, rank) {
			r := rand.New(rand.NewPCG(a, b))
			return anyFacts(r), anyPolicy(r)
		}
		cfg := testConfig(func(c *config) { c.standby = b%3 == 0 })
		facts, by := make2()
		p := decide(cfg, by, facts)
		mustHold(t, facts, &p)
		again, by := make2()
		require.Equal(t, facts, again, "decide changes no facts")
		q := decide(cfg, by, again)
		require.Equal(t, p, q, "the same facts, the same plan")
	})
}

// The same, by many seeds.
func TestDecideHolds(t *testing.T) {
	seeds := uint64(30_000)
	if testing.Short() {
		seeds = 3_000
	}
	decided, closed, moved, steered := 0, 0, 0, 0
	for seed := range seeds {
		r := rand.New(rand.NewPCG(seed, 7))
		facts, by := anyFacts(r), anyPolicy(r)
		p := decide(testConfig(func(c *config) { c.standby = seed%3 == 0 }), by, facts)
		mustHold(t, facts, &p)
		if t.Failed() {
			t.Fatalf("seed %d: %+v\n%+v", seed, facts, p)
		}
		if p.decided {
			decided++
		}
		if p.steer {
			steered++
		}
		for _, v := range p.verdicts {
			if v.fate == fateClose {
				closed++
			}
			if v.move != moveNone {
				moved++
			}
		}
	}
	t.Logf("%d of %d plans decide; %d connections closed, %d left by streams; %d plans steer", decided, seeds, closed, moved, steered)
	require.Greater(t, decided, int(seeds/6))
	require.Greater(t, closed, int(seeds/1500))
	require.Greater(t, moved, int(seeds/25))
}
