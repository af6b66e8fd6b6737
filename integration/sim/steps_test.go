package sim

import (
	"flag"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/migrate"
)

// Every fault at every step of the exchange, one run each: seeds come upon most of these
// by chance, these tests upon all of them by order. The oracle is the same.

var allSteps = flag.Bool("allsteps", false, "run every fault at every step with every transport, workload and initiator, not each with one of them")

// stepFault is something that happens at an exact moment of one migration.
type stepFault struct {
	name string
	do   func(m *stepRun)
}

// stepRun is the migration of one stream, from connection 0 to connection 1.
type stepRun struct {
	*world
	initiator int
	st        *simStream
	once      sync.Once
	happened  atomic.Bool
}

const (
	oldLink = 0
	newLink = 1
)

// at is the side that has the role: 0 is the initiator's.
func (m *stepRun) at(role int) int { return m.initiator ^ role }

var roles = []string{"initiator", "responder"}

// stepFaults are all faults. Freezes take effect before anything further is sent; calls
// that may block are made on a goroutine of their own, at the same virtual instant.
func stepFaults() (all []stepFault) {
	add := func(name string, do func(m *stepRun)) { all = append(all, stepFault{name, do}) }
	later := func(f faultPlan) func(m *stepRun) {
		return func(m *stepRun) { m.task(f.String(), func() { m.inflict(f) }) }
	}
	for _, l := range []struct {
		name string
		link int
	}{{"old", oldLink}, {"new", newLink}} {
		add("freeze "+l.name, func(m *stepRun) { m.inflict(faultPlan{what: faultFreeze, link: l.link}) })
		add("freeze "+l.name+" for 2 s", func(m *stepRun) {
			m.inflict(faultPlan{what: faultHiccup, link: l.link, last: -1})
			m.task("thaw", func() {
				time.Sleep(2 * time.Second)
				m.Thaw(m.hop(0, m.link(l.link).path))
			})
		})
		for role, who := range roles {
			byRole := func(f faultPlan) func(m *stepRun) {
				return func(m *stepRun) {
					g := f
					g.side = m.at(role)
					later(g)(m)
				}
			}
			add(fmt.Sprintf("%s closes %s", who, l.name), byRole(faultPlan{what: faultClose, link: l.link}))
			add(fmt.Sprintf("%s severs %s", who, l.name), byRole(faultPlan{what: faultSever, link: l.link}))
			add(fmt.Sprintf("%s vanishes from %s", who, l.name), byRole(faultPlan{what: faultVanish, link: l.link}))
			add(fmt.Sprintf("%s vanishes from %s for 5 s", who, l.name), byRole(faultPlan{what: faultVanish, link: l.link, last: 5 * time.Second}))
			add(fmt.Sprintf("%s's stream on %s is reset", who, l.name), byRole(faultPlan{what: faultReset, link: l.link}))
		}
	}
	add("freeze both", func(m *stepRun) {
		for _, l := range []int{oldLink, newLink} {
			m.inflict(faultPlan{what: faultFreeze, link: l})
		}
	})
	for role, who := range roles {
		add(who+" closes both connections", func(m *stepRun) {
			for _, l := range []int{oldLink, newLink} {
				later(faultPlan{what: faultClose, link: l, side: m.at(role)})(m)
			}
		})
		for _, call := range []string{"Close", "CloseWrite", "CloseRead", "Reset"} {
			add(who+" calls "+call, func(m *stepRun) {
				m.task(call, func() { m.st.end(m.at(role)).do(call) })
			})
		}
	}
	return all
}

// stepWorkloads are what the applications do meanwhile. The first size is the opener's.
var stepWorkloads = []streamPlan{
	{kind: kindBulk, size: [2]int{30_000, 30_000}},
	{kind: kindRequest, size: [2]int{300, 30_000}},
	{kind: kindPingPong, size: [2]int{25, 25}},
	{kind: kindWriteOnly, size: [2]int{30_000, 30_000}},
	{kind: kindReadOnly, size: [2]int{30_000, 0}},
}

var stepLinks = [][2]linkPlan{
	{{via: tcp, oneWay: ms(5)}, {via: quic, oneWay: ms(20)}},
	{{via: quic, oneWay: ms(5)}, {via: tcp, oneWay: ms(20)}},
	{{via: quic, oneWay: ms(20)}, {via: quic, oneWay: ms(5)}},
	{{via: tcp, oneWay: ms(20)}, {via: tcp, oneWay: ms(5)}},
	{{via: relayed, over: QUIC, oneWay: ms(20)}, {via: tcp, oneWay: ms(5)}},
}

// stepCase is one run.
type stepCase struct {
	moment    string
	arm       func(m *stepRun, strike func())                                         // before the migration
	onStep    func(m *stepRun, strike func(), initiator bool, kind migrate.EventKind) // at each step
	fault     stepFault
	links     [2]linkPlan
	workload  streamPlan
	opener    int
	initiator int
	swapped   bool
	draft     string // the role that has only the draft, or neither
}

func (c stepCase) String() string {
	s := fmt.Sprintf("%s at %s, %s to %s, %s, %s opens, %s migrates",
		c.fault.name, c.moment, c.links[0].via, c.links[1].via, c.workload.kind, sideName(c.opener), sideName(c.initiator))
	if c.draft != "" {
		s += ", draft-only " + c.draft
	}
	return s
}

func (c stepCase) run(t *testing.T, tally *tally, mayMiss bool) {
	const begin = 150 * time.Millisecond
	stream := c.workload
	stream.labelled, stream.known = true, true
	stream.opener, stream.link = c.opener, oldLink
	if c.opener == 1 {
		stream.size[0], stream.size[1] = stream.size[1], stream.size[0]
	}
	stream.chunk, stream.buffer = 500, 500
	stream.pauses, stream.pause, stream.pausesFor = 1, ms(15), time.Second
	if stream.kind == kindPingPong {
		stream.pause = ms(100)
	}
	m := &stepRun{initiator: c.initiator}
	strike := func() {
		m.once.Do(func() {
			m.happened.Store(true)
			m.logf("THE MOMENT: %s", c.moment)
			c.fault.do(m)
		})
	}
	draft := -1
	if i := slices.Index(roles, c.draft); i >= 0 {
		draft = m.at(i)
	}
	p := plan{
		name:    t.Name(),
		seed:    1,
		draft:   draft,
		links:   c.links[:],
		streams: []streamPlan{stream},
		swapped: c.swapped,
		onStep: func(_ *world, _ int, _ *simStream, e migrate.Event) {
			if c.onStep != nil {
				c.onStep(m, strike, e.Initiator, e.Kind)
			}
		},
	}
	Run(t, func(t *testing.T, n *Net) {
		w := newWorld(t, n, p, tally)
		defer w.report()
		m.world, m.st = w, w.streams[0]
		w.task("opener", m.st.open)
		time.Sleep(begin)
		if c.arm != nil {
			c.arm(m, strike)
		}
		w.task("Migrate", func() { _ = w.moveStream(c.initiator, 0, newLink, 0) })
		w.finish()
		n.Watch(nil)
		if !m.happened.Load() && !mayMiss {
			w.failf("moment", "never came: %s", c.moment)
		}
	})
	tally.add("runs", 1)
	if m.happened.Load() {
		tally.add("runs whose fault came", 1)
	}
}

// stepVariants is how many combinations of links, workloads, openers and initiators there
// are.
var stepVariants = len(stepLinks) * len(stepWorkloads) * 4

// variantOf is the variant that a fault meets at a moment where it meets one only. Neither
// stride has a factor in common with the number of variants. So over the ten moments of
// TestStepsAndFaults each fault meets all links, all workloads, and everybody as opener
// and initiator, and so does each moment over the faults; TestVariants checks it.
func variantOf(moment, fault int) int { return (9*moment + 59*fault) % stepVariants }

// variant makes the case one of the variants.
func (c stepCase) variant(v int) stepCase {
	c.links = stepLinks[v%len(stepLinks)]
	v /= len(stepLinks)
	c.workload = stepWorkloads[v%len(stepWorkloads)]
	v /= len(stepWorkloads)
	c.opener, c.initiator = v&1, v>>1
	return c
}

// eachStep runs all combinations of the moments and faults, each with all variants, or
// with one of them in turn.
func eachStep(t *testing.T, moments []stepCase, faults []stepFault, mayMiss bool) {
	tally := newTally()
	for i, moment := range moments {
		for j, fault := range faults {
			chosen := []int{variantOf(i, j)}
			if *allSteps {
				chosen = chosen[:0]
				for v := range stepVariants {
					chosen = append(chosen, v)
				}
			}
			for _, v := range chosen {
				c := moment.variant(v)
				c.fault, c.swapped = fault, (i+j)%2 == 1
				t.Run(c.String(), func(t *testing.T) { c.run(t, tally, mayMiss) })
			}
		}
	}
	t.Logf("\n%s", tally)
}

// TestVariants: in a default run every fault meets every pair of connections, every
// workload, and everybody as opener and initiator, and so does every moment.
func TestVariants(t *testing.T) {
	moments, faults := len(stepsOf(roles[0]))*len(roles), len(stepFaults())
	complete := func(what string, n int, variant func(i int) int) {
		pairs, workloads, who := make(map[[2]linkPlan]bool), make(map[kind]bool), make(map[[2]int]bool)
		for i := range n {
			c := stepCase{}.variant(variant(i))
			pairs[c.links], workloads[c.workload.kind], who[[2]int{c.opener, c.initiator}] = true, true, true
		}
		require.Len(t, pairs, len(stepLinks), "pairs of connections that %s meets", what)
		require.Len(t, workloads, len(stepWorkloads), "workloads that %s meets", what)
		require.Len(t, who, 4, "openers and initiators that %s meets", what)
	}
	for j, f := range stepFaults() {
		complete(f.name, moments, func(i int) int { return variantOf(i, j) })
	}
	for i := range moments {
		complete(fmt.Sprintf("moment %d", i), faults, func(j int) int { return variantOf(i, j) })
	}
}

// TestStepsAndFaults: each fault at each step of either side.
func TestStepsAndFaults(t *testing.T) {
	eachStep(t, slices.Concat(stepsOf("initiator"), stepsOf("responder")), stepFaults(), false)
}

// TestStepsAndFaultsDraft: the same with a peer that has only the draft, at the steps of
// the other. Not every step is taken: that peer switches when its application reads.
func TestStepsAndFaultsDraft(t *testing.T) {
	var moments []stepCase
	for i, role := range roles {
		for _, m := range stepsOf(role) {
			m.draft = roles[1-i]
			moments = append(moments, m)
		}
	}
	eachStep(t, moments, stepFaults(), true)
}

// stepsOf are all steps of one side.
func stepsOf(role string) (moments []stepCase) {
	for kind := migrate.Started; kind <= migrate.Finished; kind++ {
		moments = append(moments, stepCase{
			moment: fmt.Sprintf("%s %s", role, kind),
			onStep: func(_ *stepRun, strike func(), initiator bool, k migrate.EventKind) {
				if initiator == (role == "initiator") && k == kind {
					strike()
				}
			},
		})
	}
	return moments
}

// TestPacketsAndFaults: each fault right before each packet that the exchange sends over
// the new path, and over the old one, by either side.
func TestPacketsAndFaults(t *testing.T) {
	var moments []stepCase
	for _, link := range []int{oldLink, newLink} {
		for role, who := range roles {
			for number := range 8 {
				moments = append(moments, stepCase{
					moment: fmt.Sprintf("packet %d of the %s on connection %d", number, who, link),
					arm: func(m *stepRun, strike func()) {
						from, to := m.hop(m.at(role), m.link(link).path)
						left := atomic.Int64{}
						left.Store(int64(number))
						m.Watch(func(f, t string) {
							if f == from && t == to && left.Add(-1) == -1 {
								strike()
							}
						})
					},
				})
			}
		}
	}
	var faults []stepFault
	for _, f := range stepFaults() {
		switch f.name {
		case "freeze old", "freeze new", "freeze both", "freeze old for 2 s", "freeze new for 2 s",
			"initiator severs old", "initiator severs new", "responder severs old", "responder severs new",
			"initiator vanishes from new", "responder vanishes from new",
			"initiator's stream on new is reset", "responder's stream on new is reset":
			faults = append(faults, f)
		}
	}
	eachStep(t, moments, faults, true)
}
