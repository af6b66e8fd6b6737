package sim

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/migrate"
)

// One seed is one run of two whole hosts in virtual time: what they are joined by, what
// their applications do, what migrates when, and what goes wrong, all follow from it.
//
//	go test ./integration/sim -run TestSeeds                     a fixed set, and a few fresh ones
//	go test ./integration/sim -run TestSeeds -seed=N             one, as a failure prints it
//	go test ./integration/sim -run TestSeeds -seeds=N -from=M    N of them, from M on
//
// How far a replay goes: everything that the run decides follows from the seed, and does
// not depend on who runs first, since every actor has random numbers of its own; time is
// virtual. What does not follow from it is the order in which goroutines run that are
// ready at the same instant, the keys of the connections, and what the hosts draw for
// themselves. So a failure that hangs on such an order comes again in a part of the
// runs only: use -count, and GOMAXPROCS=1, which makes the order more regular.
var (
	seedFlag  = flag.Uint64("seed", 0, "run this seed alone, and print what happens in it")
	seedsFlag = flag.Uint64("seeds", 0, "how many seeds to run; 0: the fixed set and a few fresh ones")
	fromFlag  = flag.Uint64("from", 1, "the first seed, with -seeds")
)

const (
	fixedSeeds = 400
	freshSeeds = 20
)

// plan is all that follows from a seed.
type plan struct {
	name       string // of a run without a seed
	seed       uint64
	swapped    bool // the sides have each other's IPs, and keys
	links      []linkPlan
	relayLimit int64 // what the relay lets through each way, in bytes; 0: everything
	bandwidth  int   // bits per second; 0: no bound
	buffer     int   // of a TCP socket; 0: the default
	denial     float64
	draft      int  // the side that has only the draft; -1: neither
	strict     bool // Portage's hosts insist on the verified handover
	streams    []streamPlan
	moves      []movePlan
	faults     []faultPlan

	onStep func(w *world, side int, st *simStream, e migrate.Event)
}

type linkPlan struct {
	via    string
	over   Transport // of a relayed one
	oneWay time.Duration
}

func (p plan) again() string {
	if p.name != "" {
		return fmt.Sprintf("To run it again:\n  go test ./integration/sim -run '%s'", p.name)
	}
	return fmt.Sprintf("To run it again:\n  go test ./integration/sim -run TestSeeds -seed=%d", p.seed)
}

func (p plan) String() string {
	var b strings.Builder
	for i, l := range p.links {
		fmt.Fprintf(&b, "connection %d: %s, %v one way", i, l.via, l.oneWay)
		if l.via == relayed {
			fmt.Fprintf(&b, ", over %s, limit %d", l.over, p.relayLimit)
		}
		b.WriteByte('\n')
	}
	fmt.Fprintf(&b, "swapped %t, bandwidth %d, buffer %d, denial %.2f\n", p.swapped, p.bandwidth, p.buffer, p.denial)
	if p.draft >= 0 {
		fmt.Fprintf(&b, "%s has only the draft; the other insists on more: %t\n", sideName(p.draft), p.strict)
	}
	for i, s := range p.streams {
		fmt.Fprintf(&b, "stream %d: %s\n", i, s)
	}
	for _, m := range p.moves {
		fmt.Fprintln(&b, m)
	}
	for _, f := range p.faults {
		fmt.Fprintln(&b, f)
	}
	return b.String()
}

// pick returns one of choices.
func pick[T any](r *rand.Rand, choices ...T) T { return choices[r.IntN(len(choices))] }

// chance says yes with that probability.
func chance(r *rand.Rand, p float64) bool { return r.Float64() < p }

// upTo returns a duration below most.
func upTo(r *rand.Rand, most time.Duration) time.Duration {
	return time.Duration(r.Int64N(int64(most)))
}

// planOf is the plan of a seed.
func planOf(seed uint64) plan {
	p := plan{seed: seed, draft: -1}
	r := p.rand("plan")
	if chance(r, 0.15) {
		p.draft = r.IntN(2)
		p.strict = chance(r, 0.1)
	}
	direct := 2
	if chance(r, 0.3) {
		p.links = append(p.links, linkPlan{via: relayed, over: pick(r, QUIC, TCP)})
		direct = 1 + r.IntN(2)
		if chance(r, 0.25) {
			p.relayLimit = 10_000 + r.Int64N(150_000)
		}
	}
	for range direct {
		p.links = append(p.links, linkPlan{via: pick(r, tcp, quic)})
	}
	for i := range p.links {
		p.links[i].oneWay = pick(r, 100*time.Microsecond, ms(1), ms(5), ms(20), ms(60), ms(150))
	}
	if chance(r, 0.2) {
		p.bandwidth = pick(r, 8_000_000, 50_000_000)
	}
	if chance(r, 0.2) {
		p.buffer = pick(r, 4<<10, 64<<10)
	}
	if chance(r, 0.1) {
		p.denial = pick(r, 0.3, 1)
	}
	horizon := pick(r, 300*time.Millisecond, time.Second, 4*time.Second)
	for _, l := range p.links {
		horizon = max(horizon, 10*l.oneWay)
	}
	for range 2 + r.IntN(6) {
		p.streams = append(p.streams, p.planStream(r, horizon))
	}
	p.planMoves(r, horizon)
	p.planFaults(r, horizon)
	p.planAfter(horizon)
	p.swapped = chance(p.rand("swapped"), 0.5)
	if p.mayClog() {
		// A relayed connection that is closed resets its stream at the relay. On a yamux
		// connection that is clogged this waits, under a lock; see boot.
		p.links[0].over = QUIC
	}
	for i := range p.faults {
		if f := &p.faults[i]; f.what == faultHiccup && p.links[f.link].over == QUIC {
			f.last /= 2 // QUIC tries again as much later, at most, and yamux waits for 5 s
		}
	}
	return p
}

// mayClog says whether a TCP connection may come to take nothing any more: where it takes
// little by itself, or would have to hold much while its path is frozen.
func (p *plan) mayClog() bool {
	const room = 3 << 20 // of the 4 MiB that it takes: headers, and what go-libp2p sends itself
	total := 0
	for _, s := range p.streams {
		total += s.size[0] + s.size[1]
	}
	return p.buffer > 0 || total > room
}

func (p *plan) planStream(r *rand.Rand, horizon time.Duration) streamPlan {
	s := streamPlan{
		kind:     kind(r.IntN(int(kinds))),
		opener:   r.IntN(2),
		at:       upTo(r, horizon/2),
		link:     r.IntN(len(p.links)),
		labelled: !chance(r, 0.06),
		known:    !chance(r, 0.15),
		chunk:    pick(r, 1, 100, 2000, 20_000, 200_000),
		buffer:   pick(r, 1, 100, 4096, 64<<10),
		pauses:   pick(r, 0.2, 0.5, 1), pausesFor: 2 * horizon,
	}
	for side := range s.size {
		s.size[side] = pick(r, 0, 1, 10, 500, 5000, 30_000, 30_000, 100_000)
		if chance(r, 0.08) {
			s.size[side] = 300_000 + r.IntN(700_000)
		}
		if s.size[side] > 0 {
			s.size[side] = 1 + r.IntN(s.size[side])
		}
	}
	// The number of calls is bounded, and so is what all pauses take together.
	largest := max(s.size[0], s.size[1], 1)
	s.chunk = max(s.chunk, largest/100)
	s.buffer = max(s.buffer, largest/100)
	if !chance(r, 0.15) {
		calls := float64(2 * largest / min(s.chunk, s.buffer))
		s.pause = min(horizon, time.Duration(float64(2*horizon)/(1+calls*s.pauses)))
	}
	if s.labelled {
		if chance(r, 0.2) {
			s.deadlines[0] = pick(r, 0.1, 0.7)
		}
		// A read deadline may cost a yamux stream its window for good (docs/reliability.md,
		// 1), but only after half a window.
		if largest < 100_000 && chance(r, 0.2) {
			s.deadlines[1] = pick(r, 0.1, 0.7)
		}
	}
	if !s.labelled || p.strict {
		// On a stream of go-libp2p's own, two Writes at once can break a yamux connection
		// (docs/reliability.md, 10), and a deadline the negotiation (4).
		if s.kind == kindConcurrent {
			s.kind = kindBulk
		}
		s.deadlines = [2]float64{}
	}
	if chance(r, 0.25) {
		for range 1 + r.IntN(2) {
			s.disturb = append(s.disturb, disturbance{
				side: r.IntN(2), at: upTo(r, horizon),
				what: pick(r, "CloseRead", "CloseWrite", "Close", "Reset"),
			})
		}
	}
	return s
}

func (p *plan) planMoves(r *rand.Rand, horizon time.Duration) {
	for range r.IntN(4 * len(p.streams)) {
		id := r.IntN(len(p.streams))
		m := movePlan{
			at: p.streams[id].at + upTo(r, horizon), side: pick(r, 0, 0, 1, 1, 2), stream: id,
			to: r.IntN(len(p.links)), other: r.IntN(len(p.links)),
		}
		if chance(r, 0.1) {
			m.timeout = 1 + upTo(r, horizon/4)
		}
		p.moves = append(p.moves, m)
		if s := &p.streams[id]; chance(r, 0.12) { // an application that ends meanwhile
			s.disturb = append(s.disturb, disturbance{
				side: r.IntN(2), at: m.at - s.at + upTo(r, 4*p.links[m.to].oneWay),
				what: pick(r, "CloseRead", "CloseWrite", "Close", "Reset", "Reset"),
			})
		}
		if chance(r, 0.2) { // there and back, at once
			m.to = (m.to + 1) % len(p.links)
			m.at += upTo(r, ms(50))
			p.moves = append(p.moves, m)
		}
	}
}

func (p *plan) planFaults(r *rand.Rand, horizon time.Duration) {
	kinds := []faultKind{
		faultClose, faultClose, faultCloseBoth, faultSever, faultSever, faultVanish, faultVanish,
		faultFreeze, faultFreeze, faultHiccup, faultHiccup, faultLatency, faultLatency, faultReset, faultReset,
	}
	if p.links[0].via == relayed {
		kinds = append(kinds, faultRelay, faultRelay, faultRelay)
	}
	for range pick(r, 0, 0, 1, 1, 1, 2, 3) {
		f := faultPlan{
			at: upTo(r, horizon*5/4), what: pick(r, kinds...), link: r.IntN(len(p.links)), side: r.IntN(2),
			stream: r.IntN(len(p.streams)),
		}
		switch f.what {
		case faultCloseBoth:
			f.last = pick(r, 0, upTo(r, ms(100)))
		case faultVanish, faultFreeze:
			f.last = pick(r, 0, 50*time.Millisecond+upTo(r, 10*time.Second), 10*time.Second+upTo(r, 50*time.Second))
		case faultHiccup:
			f.last = 1 + upTo(r, harmless)
		case faultLatency:
			f.last = upTo(r, ms(300))
		}
		p.faults = append(p.faults, f)
	}
	if chance(r, 0.06) {
		p.faults = append(p.faults, faultPlan{
			at: upTo(r, horizon), what: pick(r, faultRestart, faultCrash), side: r.IntN(2),
			last: upTo(r, pick(r, ms(100), 40*time.Second)),
		})
	}
	if len(p.faults) > 0 && chance(r, 0.3) {
		p.faults = append(p.faults, faultPlan{at: upTo(r, 2*horizon), what: faultRedial, side: r.IntN(2)})
	}
}

// planAfter plans streams for the time after all restarts and redials. The labels of a
// process that was restarted may meet those that its peer still holds (L2).
func (p *plan) planAfter(horizon time.Duration) {
	if !slices.ContainsFunc(p.faults, func(f faultPlan) bool { return f.what.renews() }) {
		return
	}
	r := p.rand("after")
	for range 2 + r.IntN(3) {
		s := p.planStream(r, horizon)
		s.after = true
		p.streams = append(p.streams, s)
		for range r.IntN(4) {
			p.moves = append(p.moves, movePlan{
				at: s.at + upTo(r, horizon), side: r.IntN(3), stream: len(p.streams) - 1,
				to: r.IntN(len(p.links)), other: r.IntN(len(p.links)),
			})
		}
	}
}

// run runs the plan.
func (p plan) run(t *testing.T, tally *tally) {
	Run(t, func(t *testing.T, n *Net) {
		w := newWorld(t, n, p, tally)
		defer w.report()
		for i, st := range w.streams {
			w.task(fmt.Sprintf("stream %d: opener", i), st.open)
		}
		for _, m := range p.moves {
			w.task(m.String(), func() { w.awaitBirth(m.stream); time.Sleep(m.at); w.move(m) })
		}
		for _, f := range p.faults {
			w.task(f.String(), func() { time.Sleep(f.at); w.inflict(f) })
		}
		w.finish()
		if *seedFlag != 0 {
			w.mu.Lock()
			defer w.mu.Unlock()
			t.Logf("%s\n%s", p, strings.Join(w.log, "\n"))
		}
	})
	tally.add("runs", 1)
}

// finish waits until everything has ended, and judges what came of it.
func (w *world) finish() {
	// What a stream's opener has sent may arrive long after it has closed.
	w.wait(30*time.Second, func() bool { return len(w.unfinished()) == 0 && w.allAccepted() })
	// All timeouts that may follow on each other, and then some.
	if !w.wait(10*time.Minute, func() bool { return len(w.unfinished()) == 0 }) {
		w.failf("live", "does not end: %s", strings.Join(w.unfinished(), "; "))
		w.logf("%s", stacksIn("integration/sim.(*app)", "portage/migrate."))
		w.abandon()
		return
	}
	w.logf("all applications are done")
	for _, st := range w.streams {
		st.judge()
	}
	w.remains()
	w.empty()
	w.tally.add("virtual seconds", int(time.Since(w.start)/time.Second))
}

// allAccepted says whether all streams that were opened, and may get there, did.
func (w *world) allAccepted() bool {
	return !slices.ContainsFunc(w.streams, func(st *simStream) bool {
		opener := st.end(st.plan.opener)
		return opener != nil && st.end(1-st.plan.opener) == nil && opener.resetAt.IsZero() && st.wasHarmed() == ""
	})
}

// abandon ends what hangs, so that the run can report it.
func (w *world) abandon() {
	for side := range 2 {
		w.node(side).Stop()
		for _, st := range w.streams {
			if e := st.end(side); e != nil {
				go e.s.Reset()
			}
		}
	}
	synctest.Wait()
}

// tally counts what was done in all runs together.
type tally struct {
	mu     sync.Mutex
	counts map[string]int
}

func newTally() *tally { return &tally{counts: make(map[string]int)} }

func (t *tally) add(what string, n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.counts[what] += n
}

func (t *tally) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var b strings.Builder
	for _, what := range slices.Sorted(maps.Keys(t.counts)) {
		fmt.Fprintf(&b, "%12d %s\n", t.counts[what], what)
	}
	return b.String()
}

func TestSeeds(t *testing.T) {
	runSeeds(t, fixedSeeds, freshSeeds, func(t *testing.T, seed uint64, tally *tally) { planOf(seed).run(t, tally) })
}

// runSeeds runs what the flags say, or so many fixed and fresh seeds.
func runSeeds(t *testing.T, fixed, fresh uint64, run func(t *testing.T, seed uint64, tally *tally)) {
	tally := newTally()
	one := func(seed uint64) {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) { run(t, seed, tally) })
	}
	switch {
	case *seedFlag != 0:
		one(*seedFlag)
	case *seedsFlag != 0:
		for i := range *seedsFlag {
			one(*fromFlag + i)
		}
	default:
		for i := range fixed {
			one(1 + i)
		}
		if fresh == 0 {
			break
		}
		from := uint64(time.Now().UnixNano())
		fmt.Printf("fresh seeds: %d from %d on\n", fresh, from)
		for i := range fresh {
			one(from + i)
		}
	}
	fmt.Printf("seeds:\n%s", tally)
}
