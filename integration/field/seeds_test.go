package field

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	"github.com/libp2p/go-libp2p/p2p/protocol/ping"

	"github.com/go-portage/portage/connmgr"
	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/migrate"
)

// One seed is one situation: which connections there are and when they come, what the
// applications do, and what is wrong with the paths. It is played on plain hosts, with
// Portage at both ends and at one of them; what lives on plain hosts has to live on the
// others.
//
//	go test ./integration/field -run TestNeverWorse                     a fixed set, and some that are new
//	go test ./integration/field -run TestNeverWorse -seed=N -v          one, as a failure prints it
//	go test ./integration/field -run TestNeverWorse -seeds=N -from=M    N of them, from M on
//	 -only=swallows                                                    of these, those with that in their plan
//
// Everything follows from the seed but the order of goroutines that are ready at the same
// instant, and what the hosts draw for themselves.
//
// What is not in it: a path that has been good for long, and dies after the other
// connection was closed for it. There a plain host may do better by luck; Portage leaves
// one connection, and somebody has to choose.
var (
	seedFlag  = flag.Uint64("seed", 0, "run this seed of TestNeverWorse alone")
	seedsFlag = flag.Uint64("seeds", 0, "how many seeds to run; 0: the fixed set, and some that are new")
	fromFlag  = flag.Uint64("from", 1, "the first seed, with -seeds")
	onlyFlag  = flag.String("only", "", "of the seeds, run those alone whose plan has this text")
)

const (
	fixedSeeds = 30
	freshSeeds = 5 // that nobody has seen before; a failure says how to run it again

	horizon = 2 * time.Minute
)

// plan is all that follows from a seed.
type plan struct {
	seed    uint64
	on      choice        // where streams are opened, in a run of plain hosts
	base    string        // which connections come
	second  time.Duration // when the second one comes
	slow    bool          // the second networks carry 256 kB a second
	chats   []chatPlan
	uploads int
	fill    int           // streams that are opened on the QUIC connection
	ask     time.Duration // how often there is a request from each end
	faults  []faultPlan
	hostile int
	flip    bool // who has the lower peer ID
	single  int  // who has Portage where one has: 0 or 1
}

type chatPlan struct {
	at    time.Duration
	back  bool
	size  int
	every time.Duration
}

type faultPlan struct {
	at   time.Duration
	what string
	link int // of the IPs; 2: both ends' with the relay
	last time.Duration
}

// A choice is the connection on which streams are opened while there are two. Plain hosts
// leave it to how many streams each has at that moment, and to which is newer: whether a
// stream finds itself on the one whose path fails is luck. So there is a run of plain hosts
// with each, and where it matters the luckless one counts.
type choice string

const (
	hostsChoice choice = "the host's"
	olderOne    choice = "the older one"
	newerOne    choice = "the newer one"
)

// opener returns how streams are opened.
func (p plan) opener() opener {
	return func(ctx context.Context, from, to *end, id protocol.ID) (network.Stream, error) {
		conns := from.conns(to)
		if p.on == hostsChoice || len(conns) < 2 {
			return from.host.NewStream(ctx, to.ID(), id)
		}
		slices.SortFunc(conns, func(c, d network.Conn) int { return c.Stat().Opened.Compare(d.Stat().Opened) })
		if p.on == newerOne {
			slices.Reverse(conns)
		}
		return openOn(ctx, conns[0], id)
	}
}

// The bases: what comes first, and what after it.
const (
	unlimitedThenTCP  = "unlimited relay, then TCP"
	unlimitedThenQUIC = "unlimited relay, then QUIC"
	limitedThenTCP    = "limited relay, then TCP"
	limitedThenQUIC   = "limited relay, then QUIC"
	tcpThenQUIC       = "TCP, then QUIC"
	quicThenTCP       = "QUIC, then TCP"
)

// The faults.
const (
	hiccup  = "nothing passes for some seconds"
	young   = "the second path dies soon after it came"
	swallow = "the second path swallows what is large"
	old     = "the first path dies before the second one comes"
	lag     = "everything takes longer"
)

func (p plan) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s after %v; slow %v, %d uploads, %d streams more on QUIC, a request each %v, %d hostile peers, flip %v, single %d\n",
		p.base, p.second, p.slow, p.uploads, p.fill, p.ask, p.hostile, p.flip, p.single)
	for _, c := range p.chats {
		fmt.Fprintf(&b, "chat at %v, back %v, %d bytes each %v\n", c.at, c.back, c.size, c.every)
	}
	for _, f := range p.faults {
		fmt.Fprintf(&b, "at %v for %v, link %d: %s\n", f.at, f.last, f.link, f.what)
	}
	return b.String()
}

// upTo returns a duration below most, in milliseconds.
func upTo(r *rand.Rand, most time.Duration) time.Duration {
	return time.Duration(r.Int64N(most.Milliseconds())) * time.Millisecond
}

func pick[T any](r *rand.Rand, choices ...T) T { return choices[r.IntN(len(choices))] }

// overQUIC says whether the second connection is one of QUIC.
func (p plan) overQUIC() bool { return strings.HasSuffix(p.base, "QUIC") }

func (p plan) relayed() bool { return strings.Contains(p.base, "relay") }

// planOf is the plan of a seed.
func planOf(seed uint64) plan {
	r := rand.New(rand.NewPCG(seed, 1))
	p := plan{
		seed:   seed,
		on:     hostsChoice,
		base:   pick(r, unlimitedThenTCP, unlimitedThenQUIC, limitedThenTCP, limitedThenQUIC, tcpThenQUIC, quicThenTCP),
		second: 4*time.Second + upTo(r, 5*time.Second),
		ask:    pick(r, time.Second, 3*time.Second, 7*time.Second),
		flip:   r.IntN(2) == 0,
		single: r.IntN(2),
	}
	if r.IntN(4) == 0 {
		p.hostile = 1 + r.IntN(4)
	}
	size := []int{10, 100, 2000}
	for range pick(r, 0, 1, 1, 2) {
		f := faultPlan{at: upTo(r, horizon-20*time.Second)}
		switch f.what = pick(r, hiccup, hiccup, young, young, swallow, old, lag); f.what {
		case hiccup:
			f.link, f.last = r.IntN(3), 500*time.Millisecond+upTo(r, 7500*time.Millisecond)
		case lag:
			f.link, f.last = r.IntN(3), 50*time.Millisecond+upTo(r, 400*time.Millisecond)
		case young:
			if strings.HasPrefix(p.base, "limited") { // whoever stays there is cut by the relay
				continue
			}
			f.at, f.link, f.last = p.second+500*time.Millisecond+upTo(r, pick(r, 2*time.Second, 20*time.Second)), p.link(), time.Hour
		case swallow:
			if p.overQUIC() || strings.HasPrefix(p.base, "limited") {
				continue // QUIC finds out what passes
			}
			f.at, f.link, f.last = 0, p.link(), time.Hour
			size = []int{100, 20_000}
		case old:
			if p.relayed() {
				continue
			}
			f.at, f.link, f.last = 2500*time.Millisecond+upTo(r, p.second-2500*time.Millisecond), 1-p.link(), time.Hour
		}
		if slices.ContainsFunc(p.faults, func(g faultPlan) bool { return g.what == f.what || g.last == time.Hour || f.last == time.Hour }) {
			continue // both paths at once are nobody's fault
		}
		p.faults = append(p.faults, f)
	}
	for range pick(r, 1, 2, 6, 30) {
		p.chats = append(p.chats, chatPlan{
			at: upTo(r, pick(r, 3*time.Second, time.Minute)), back: r.IntN(2) == 0,
			size: pick(r, size...), every: pick(r, 200*time.Millisecond, time.Second, 4*time.Second),
		})
	}
	if len(p.faults) == 0 {
		switch r.IntN(4) {
		case 0, 1: // without a bound there would be no end to what is sent in an instant
			p.slow, p.uploads = true, pick(r, 1, 4, 8, 20)
		case 2:
			if p.base != unlimitedThenTCP && p.base != limitedThenTCP {
				p.fill = min(100+r.IntN(160), p.room())
			}
		}
	}
	return p
}

// late is how much longer than on plain hosts something may take. Streams that have moved to
// the second connection meet what befalls its path: that is no fault of whoever chose it. But
// they move there only when it has proved itself, or off a relay that is going to cut them;
// and they go on as soon as it does.
//
// Streams that outlive their connection have one where those of plain hosts have ended: when a relay
// has cut, hosts dial one another on both of their networks. So they may meet what befalls either.
func (p plan) late(lasting bool) time.Duration {
	const soon = 2 * time.Second
	if p.slow {
		return 15 * time.Second // streams leave a relay for a direct path that is busy
	}
	moves := p.second + proof
	if strings.HasPrefix(p.base, "limited") {
		moves = p.second
	}
	for _, f := range p.faults {
		if f.what == hiccup && (f.link == p.link() && f.at+f.last > moves || lasting) {
			return f.last + soon
		}
	}
	return soon
}

// proof is how long a path has to have worked before streams leave one for it that is in no
// danger.
const proof = 30 * time.Second

// link is the number of the IPs between which the second connection is.
func (p plan) link() int {
	if p.overQUIC() || p.relayed() {
		return 1
	}
	return 0
}

// play plays the plan.
func (p plan) play(w *world) {
	if p.slow {
		for i := 1; i <= 2; i++ {
			w.SetBandwidth(ips(i)[0], 2*8*(256<<10))
			w.SetBandwidth(ips(i)[1], 8*(256<<10))
		}
		w.SetBuffer(1 << 20)
	}
	w.hosts(setup{manager: []connmgr.Option{connmgr.WithConcurrency(2)}})
	wait := p.late(w.cast.lasting)
	start := time.Now()
	for _, f := range p.faults {
		if f.what == swallow {
			w.inflict(f)
		}
	}
	p.connect(w)
	for _, f := range p.faults {
		if f.what != swallow {
			w.work.Go(func() {
				if w.sleep(f.at - time.Since(start)) {
					w.inflict(f)
				}
			})
		}
	}
	p.besiege(w)

	chats := make([]*chat, len(p.chats))
	opened := make([]error, len(p.chats))
	tried := make([]bool, len(p.chats))
	for i, c := range p.chats {
		w.work.Go(func() {
			if !w.sleep(c.at) {
				return
			}
			from, to := w.a, w.b
			if c.back {
				from, to = w.b, w.a
			}
			ctx, cancel := context.WithTimeout(allowing(w.ctx), 20*time.Second)
			defer cancel()
			begun := time.Now()
			tried[i] = p.onTrial(begun.Sub(start))
			s, err := p.opener()(ctx, from, to, chatID)
			if opened[i] = err; err == nil {
				chats[i] = w.talk(from, to, s, c.size, c.every)
				chats[i].waitedFor(time.Since(begun)) // some of the openers negotiate first
			}
		})
	}
	var uploads []*upload
	if p.uploads > 0 {
		time.Sleep(p.second + time.Second - time.Since(start))
		for range p.uploads {
			uploads = append(uploads, w.upload(w.a, w.b))
		}
	}
	if p.fill > 0 {
		p.fillUp(w, start)
	}
	for n := 0; ; n++ {
		at := time.Duration(n+1) * p.ask
		if at >= horizon {
			break
		}
		if at < p.begins() {
			continue
		}
		if p.timesOut(at) {
			continue
		}
		time.Sleep(time.Until(start.Add(at)))
		w.holds(fmt.Sprintf("a connection is there at %d", n), len(w.a.conns(w.b)) > 0 && len(w.b.conns(w.a)) > 0)
		for i, q := range [][2]*end{{w.a, w.b}, {w.b, w.a}} {
			w.work.Go(func() { // so that one that waits holds no other one up
				limit := 12 * time.Second
				if w.cast.lasting { // where an upload fills the path, the end of a request is told behind that
					limit = 15 * time.Second
				}
				took, err := w.requestBy(p.opener(), allowing(w.ctx), q[0], q[1], limit)
				w.seen.add(observation{what: fmt.Sprintf("request %d of end %d", n, i), err: err, took: took, allow: wait, luck: p.inDoubt(at, q[0].mgr == nil)})
			})
		}
	}
	time.Sleep(15 * time.Second)
	for i, c := range chats {
		if tried[i] {
			continue
		}
		if c == nil {
			w.seen.add(observation{what: fmt.Sprintf("stream %d", i), err: fmt.Errorf("open: %w", opened[i]), luck: true})
			continue
		}
		w.seen.add(observation{what: fmt.Sprintf("stream %d", i), err: c.state(10 * time.Second), took: c.wait(), allow: wait, luck: true, note: c.waited})
	}
	for i, u := range uploads {
		w.is(fmt.Sprintf("upload %d", i), u.state())
	}
}

// begins is when there are requests: in every run everything has begun by then.
func (p plan) begins() time.Duration { return p.second + 4*time.Second }

// timesOut says whether QUIC may give up a dead path at a moment, before which a request on it is
// lost. That is 30 s after the first packet that was sent in vain, which on some hosts is a stream's
// that on others has moved, and else that of a request.
func (p plan) timesOut(at time.Duration) bool {
	const after = 30 * time.Second
	return slices.ContainsFunc(p.faults, func(f faultPlan) bool {
		return (f.what == young || f.what == old) && at > f.at+after-time.Second && at < max(f.at, p.begins())+after+p.ask+time.Second
	})
}

// inDoubt says whether a request at a moment would meet a fault that has just begun: on
// plain hosts it is luck on which connection it finds itself. A plain host goes on choosing the one
// with the most streams, and those count that hang on a dead one: for it that is so until QUIC gives
// the path up.
func (p plan) inDoubt(at time.Duration, plain bool) bool {
	return slices.ContainsFunc(p.faults, func(f faultPlan) bool {
		until := f.at + 2*silence + min(f.last, 10*time.Second)
		switch f.what {
		case young, old:
			if plain {
				until = max(until, f.at+30*time.Second)
			}
		case hiccup:
		default:
			return false
		}
		return at > f.at-2*time.Second && at < until
	})
}

// onTrial says whether a stream that is opened at a moment may be on a TCP connection that has
// just come, before both ends know of it. That connection does not survive the question whether
// its path carries what is large, and after 10 s it is asked, with that stream on it.
func (p plan) onTrial(at time.Duration) bool {
	const unknown = time.Second // a dial, and identify
	return strings.HasSuffix(p.base, "relay, then TCP") && at > p.second-unknown && at < p.second+unknown &&
		slices.ContainsFunc(p.faults, func(f faultPlan) bool { return f.what == swallow && f.link == p.link() })
}

// room is how many streams QUIC takes from a beside those that a has otherwise. Plain hosts have
// more, where some streams are older than the QUIC connection: they stay on the other one.
func (p plan) room() int {
	const quicStreams, requests = 256, 4
	room := quicStreams - requests
	for _, c := range p.chats {
		if !c.back {
			room--
		}
	}
	return room
}

// sleep sleeps, and says false when the situation ends first.
func (w *world) sleep(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-w.ctx.Done():
		return false
	}
}

// connect makes the first connection, and the second one in the background.
func (p plan) connect(w *world) {
	w.Helper()
	if !p.relayed() {
		if p.base == tcpThenQUIC {
			w.dial(w.attempt(TCP, 0, 0), w.back(QUIC, 1, p.second))
		} else {
			w.dial(w.attempt(QUIC, 1, 0), w.back(TCP, 0, p.second))
		}
		return
	}
	var opts []relay.Option
	if strings.HasPrefix(p.base, "unlimited") {
		opts = append(opts, relay.WithInfiniteLimits())
	}
	start := time.Now()
	w.DialRelayed(w.a.Node, w.b.Node, w.NewRelay(ipRelay, opts...), TCP)
	tr := TCP
	if p.overQUIC() {
		tr = QUIC
	}
	w.work.Go(func() {
		if w.sleep(p.second - time.Since(start)) {
			ctx, cancel := context.WithTimeout(w.ctx, 30*time.Second)
			defer cancel()
			_, _ = w.a.Dial(ctx, w.b.Node, w.path(tr, 1)) // a fault may be in its way
		}
	})
}

func (w *world) inflict(f faultPlan) {
	type pair [2]string
	pairs := []pair{{w.a.IPs()[min(f.link, 1)], w.b.IPs()[min(f.link, 1)]}}
	if f.link == 2 {
		pairs = []pair{{w.a.IPs()[0], ipRelay}, {w.b.IPs()[0], ipRelay}}
	}
	for _, p := range pairs {
		switch f.what {
		case hiccup:
			w.Freeze(p[0], p[1])
			time.AfterFunc(f.last, func() { w.Thaw(p[0], p[1]) })
		case young, old:
			w.Sever(p[0], p[1])
			w.Freeze(p[0], p[1])
		case swallow:
			w.Narrow(p[0], p[1], 8000)
		case lag:
			w.SetLatency(p[0], p[1], f.last)
		}
	}
}

// fillUp opens streams on the QUIC connection when it is there.
func (p plan) fillUp(w *world, start time.Time) {
	w.Helper()
	time.Sleep(p.second + 4*time.Second - time.Since(start))
	quic := w.a.on(QUIC, w.b)
	if quic == nil {
		return
	}
	for range p.fill {
		ctx, cancel := context.WithTimeout(allowing(w.ctx), 200*time.Millisecond)
		s, err := quic.NewStream(ctx)
		cancel()
		if err != nil {
			return
		}
		if s.SetProtocol(sinkID) == nil {
			_, _ = s.Write([]byte(fmt.Sprintf("\x13/multistream/1.0.0\n%c%s\n", len(sinkID)+1, sinkID)))
		}
	}
}

// besiege has peers of a's that answer nothing.
func (p plan) besiege(w *world) {
	w.Helper()
	var attempts []Attempt
	for _, h := range w.crowd(p.hostile, func(name string, at []string) *end { return w.newEnd(name, at, false, small()) }) {
		for _, id := range []protocol.ID{ping.ID, connmgr.PathID, connmgr.DrainID, migrate.ID, migrate.FinalSizeID} {
			h.Node.SetStreamHandler(id, drop)
		}
		attempts = append(attempts,
			Attempt{From: w.a.Node, To: h.Node, Path: Path{Transport: QUIC, From: w.a.IPs()[1], To: h.IPs()[1]}},
			Attempt{From: h.Node, To: w.a.Node, Path: Path{Transport: TCP, From: h.IPs()[0], To: w.a.IPs()[0]}, After: time.Second})
	}
	if len(attempts) > 0 {
		w.work.Go(func() { _ = w.DialTogether(attempts...) })
	}
}

func TestNeverWorse(t *testing.T) {
	one := func(seed uint64) {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			p := planOf(seed)
			these := []cast{
				{name: "both", a: true, b: true, aFirst: p.flip},
				{name: "both, with resumption", a: true, b: true, aFirst: p.flip, lasting: true},
				{name: "one", a: p.single == 0, b: p.single == 1, aFirst: p.flip},
			}
			plainOn := func(t *testing.T, on choice) *outcome {
				p, o := p, new(outcome)
				p.on = on
				play(t, cast{name: "plain", aFirst: p.flip}, o, p.play)
				return o
			}
			plain := plainOn(t, hostsChoice)
			for _, c := range these {
				t.Run(c.name, func(t *testing.T) {
					here := new(outcome)
					did := play(t, c, here, p.play)
					worse := here.worseThan(plain)
					if len(worse) > 0 { // by luck, maybe
						worse = here.worseThan(plain, plainOn(t, olderOne), plainOn(t, newerOne))
					}
					if len(worse) > 0 {
						failAll(t, worse)
						t.Logf("To run it again:\n  go test ./integration/field -run TestNeverWorse -seed=%d\n%s\nwhat the managers did:\n%s", seed, p, did)
					}
				})
			}
		})
	}
	switch {
	case *seedFlag != 0:
		one(*seedFlag)
	case *seedsFlag != 0:
		for i := range *seedsFlag {
			if s := *fromFlag + i; strings.Contains(planOf(s).String(), *onlyFlag) {
				one(s)
			}
		}
	default:
		for i := range uint64(fixedSeeds) {
			one(1 + i)
		}
		from := uint64(time.Now().UnixNano())
		for i := range uint64(freshSeeds) {
			one(from + i)
		}
	}
}
