package sim

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	"github.com/libp2p/go-libp2p/p2p/security/noise"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/migrate"
)

// world is one run: two hosts, connections between them, streams, and what goes wrong.
// plan says what happens in it, and when; oracle_test.go says what must come of it.
//
//	1.0.0.1 ---- [1.0.2.1] ---- 1.0.1.1     path 0, relayed or not
//	1.0.0.2 ------------------- 1.0.1.2     path 1
//	1.0.0.3 ------------------- 1.0.1.3     path 2
//
// A key follows from the IPs: where plan.swapped, a is on the right, and has the other peer
// ID, so that either side may be the one whose ID is lower (M1).
//
// Everything that acts has a source of random numbers of its own, which follows from the
// seed and its name: what it decides does not depend on who runs first.
type world struct {
	*Net
	t     *testing.T
	plan  plan
	tally *tally
	start time.Time

	relay   *Node
	streams []*simStream
	redials chan struct{} // holds a token while connections are made again
	again   chan struct{} // closed when the last restart or redial of the plan is over
	tasks

	mu       sync.Mutex // guards all below
	nodes    [2]*Node
	hosts    [2]wrapped
	stopped  []wrapped // hosts of processes that have been restarted
	links    []*simLink
	icy      [maxLinks]bool      // paths that are frozen
	struck   [maxLinks]time.Time // when something has happened to connections over the path last
	log      []string
	failures []string
	renewals int // restarts and redials that are not over
}

// wrapped is a host whose streams migrate: Portage's, or one that has only the draft.
type wrapped interface {
	NewStream(context.Context, peer.ID, ...protocol.ID) (network.Stream, error)
	Migrate(context.Context, network.Stream, network.Conn) error
}

// simLink is one connection. world.mu guards its times.
type simLink struct {
	path int
	via  string
	ends [2]network.Conn

	hurt   time.Time     // since then it may harm the streams on it; zero: it does not
	silent time.Time     // and its ends may not hear of each other
	last   time.Time     // when something has happened to it, or ended, last
	slow   time.Duration // how long it was held up without harm
}

// lives says whether neither end has closed it, or heard that it is gone.
func (l *simLink) lives() bool { return !l.ends[0].IsClosed() && !l.ends[1].IsClosed() }

const maxLinks = 3

func (w *world) ip(side, path int) string {
	if w.plan.swapped {
		side = 1 - side
	}
	return fmt.Sprintf("1.0.%d.%d", side, path+1)
}

// rand returns the source of random numbers of the actor that is so named.
func (p *plan) rand(format string, args ...any) *rand.Rand {
	return rand.New(rand.NewPCG(p.seed, nameHash(fmt.Sprintf(format, args...))))
}

func nameHash(name string) uint64 {
	h := uint64(14695981039346656037) // FNV-1a
	for _, b := range []byte(name) {
		h = (h ^ uint64(b)) * 1099511628211
	}
	return h
}

// newWorld makes what the plan says: nodes, connections, handlers.
func newWorld(t *testing.T, n *Net, p plan, tally *tally) *world {
	w := &world{Net: n, t: t, plan: p, tally: tally, start: time.Now(),
		redials: make(chan struct{}, 1), again: make(chan struct{})}
	for _, f := range p.faults {
		if f.what.renews() {
			w.renewals++
		}
	}
	for i := range p.streams {
		w.streams = append(w.streams, newSimStream(w, i))
	}
	if p.bandwidth > 0 {
		for side := range 2 {
			for path := range maxLinks {
				w.SetBandwidth(w.ip(side, path), p.bandwidth)
			}
		}
	}
	if p.buffer > 0 {
		w.SetBuffer(p.buffer)
	}
	for side := range 2 {
		w.boot(side)
	}
	a, b := w.nodes[0], w.nodes[1]
	var conns []network.Conn
	direct := p.links
	if direct[0].via == relayed {
		limits := relay.WithInfiniteLimits()
		if p.relayLimit > 0 {
			limits = relay.WithLimit(&relay.RelayLimit{Duration: time.Hour, Data: p.relayLimit})
		}
		w.relay = n.NewRelay(ipRelay, limits)
		conns = append(conns, n.DialRelayed(a, b, w.relay, direct[0].over))
		direct = direct[1:]
	}
	path := func(i, from int) Path {
		return Path{Transport: Transport(p.links[i].via), From: w.ip(from, i), To: w.ip(1-from, i)}
	}
	first := len(conns)
	if len(direct) == 2 {
		c, d := n.Join(a, b, path(first, 0), path(first+1, 1))
		conns = append(conns, c, d)
	} else {
		conns = append(conns, n.Dial(a, b, path(first, 0)))
	}
	for i, c := range conns {
		w.links = append(w.links, &simLink{path: i, via: p.links[i].via, ends: [2]network.Conn{c, n.Far(b, c)}})
	}
	if p.relayLimit > 0 {
		w.watchRelay()
	}
	for i, l := range p.links {
		w.setOneWay(i, l.oneWay)
	}
	w.start = time.Now()
	return w
}

// watchRelay notes when a side has sent the relay as much as that lets through. It counts
// headers, too, so that the relay does not cut the connection before that.
func (w *world) watchRelay() {
	look := func(from, to string) {
		if to == ipRelay && int64(w.Sent(from, to).Bytes) >= w.plan.relayLimit {
			w.hurt(w.first(), false)
		}
	}
	w.Watch(look)
	for side := range 2 {
		look(w.ip(side, 0), ipRelay)
	}
}

func (w *world) first() *simLink {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.links[0]
}

// boot starts the node of a side, as at the beginning, or again after a stop.
func (w *world) boot(side int) {
	var ips []string
	for path := range maxLinks {
		ips = append(ips, w.ip(side, path))
	}
	limiter, err := rcmgr.NewResourceManager(rcmgr.NewFixedLimiter(rcmgr.InfiniteLimits))
	require.NoError(w.t, err)
	// Not TLS: its Close waits in virtual time for a path that is clogged, and the swarm
	// calls it under a lock; virtual time stands still while somebody waits for a lock.
	node := w.NewNode(ips, libp2p.ResourceManager(limiter), libp2p.Security(noise.ID, noise.New))
	var h wrapped
	if w.plan.draft == side {
		h = newDraftHost(w, side, node)
	} else {
		h = w.wrap(side, node)
	}
	for _, st := range w.streams {
		if st.plan.opener != side {
			node.SetStreamHandler(st.pid, func(s network.Stream) { st.accept(s) })
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if old := w.hosts[side]; old != nil {
		w.stopped = append(w.stopped, old)
	}
	w.nodes[side], w.hosts[side] = node, h
}

type onLink struct{}

func (w *world) wrap(side int, node *Node) *migrate.Host {
	opts := []migrate.Option{
		migrate.WithTracer(func(e migrate.Event) { w.trace(side, e) }),
		migrate.WithAcceptor(func(s *migrate.Stream, _ network.Conn) bool {
			return w.plan.denial == 0 || w.plan.rand("denial of %s", s.Protocol()).Float64() >= w.plan.denial
		}),
		migrate.WithConnSelector(func(ctx context.Context, _ peer.ID) network.Conn {
			c, _ := ctx.Value(onLink{}).(network.Conn)
			return c
		}),
	}
	if w.plan.strict {
		opts = append(opts, migrate.RequireVerifiedHandover())
	}
	h, err := migrate.Wrap(node, opts...)
	require.NoError(w.t, err)
	w.t.Cleanup(func() { _ = h.Close() })
	return h
}

func (w *world) host(side int) wrapped {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.hosts[side]
}

func (w *world) node(side int) *Node {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.nodes[side]
}

// link returns the connection over a path: the newest that lives, or the newest, since some
// are made again.
func (w *world) link(path int) (newest *simLink) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, l := range w.links {
		if l.path == path%len(w.plan.links) && (newest == nil || l.lives() || !newest.lives()) {
			newest = l
		}
	}
	return newest
}

// linkOf returns the number of the connection that c is an end of, or -1.
func (w *world) linkOf(c network.Conn) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.IndexFunc(w.links, func(l *simLink) bool { return l.ends[0] == c || l.ends[1] == c })
}

// hurt notes that from now on a connection may harm the streams that are on it. silent
// says that its ends may not hear of it.
func (w *world) hurt(l *simLink, silent bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.hurtLocked(l, silent)
}

func (w *world) hurtLocked(l *simLink, silent bool) {
	now := time.Now()
	if l.hurt.IsZero() {
		l.hurt = now
	}
	if silent && l.silent.IsZero() {
		l.silent = now
	}
	l.last, w.struck[l.path] = now, now
}

// hurtPath does so for all connections over a path.
func (w *world) hurtPath(path int, silent bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, l := range w.links {
		if l.path == path {
			w.hurtLocked(l, silent)
		}
	}
}

// freezes does so where the path carries nothing from now on: it harms connections that are
// made meanwhile, too.
func (w *world) freezes(path int) {
	w.hurtPath(path, true)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.icy[path] = true
}

// thaws notes that the path carries something again: connections that are made over it from
// now on come to no harm.
func (w *world) thaws(path int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.icy[path] = false
	for _, l := range w.links {
		if l.path == path && !l.hurt.IsZero() {
			l.last = time.Now()
		}
	}
}

// slows notes that connections over the path are held up for so long, without harm.
func (w *world) slows(path int, d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, l := range w.links {
		if l.path == path {
			l.slow += d
		}
	}
}

func (w *world) isRelayed(path int) bool { return path == 0 && w.plan.links[0].via == relayed }

func (w *world) setOneWay(path int, oneWay time.Duration) {
	if w.isRelayed(path) {
		w.SetLatency(w.ip(0, 0), ipRelay, oneWay/2)
		w.SetLatency(ipRelay, w.ip(1, 0), oneWay-oneWay/2)
		return
	}
	w.SetLatency(w.ip(0, path), w.ip(1, path), oneWay)
}

// hops are the two ends of what a side of a path can be frozen at.
func (w *world) hop(side, path int) (string, string) {
	if w.isRelayed(path) {
		return w.ip(side, 0), ipRelay
	}
	return w.ip(side, path), w.ip(1-side, path)
}

func (w *world) logf(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.logLocked(format, args...)
}

func (w *world) logLocked(format string, args ...any) {
	if len(w.log) < 20_000 {
		at := float64(time.Since(w.start)) / float64(time.Millisecond)
		w.log = append(w.log, fmt.Sprintf("%12.3fms  ", at)+fmt.Sprintf(format, args...))
	}
}

// failf notes that the run breaks a rule of oracle_test.go.
func (w *world) failf(rule, format string, args ...any) {
	text := rule + ": " + fmt.Sprintf(format, args...)
	w.logf("FAILURE %s", text)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.failures = append(w.failures, text)
}

// trace gets every step of every migration at a side.
func (w *world) trace(side int, e migrate.Event) {
	from, to := w.linkOf(e.From), -1
	if e.To != nil {
		to = w.linkOf(e.To)
	}
	role := "responder"
	if e.Initiator {
		role = "initiator"
	}
	note := ""
	if e.Err != nil {
		note = ": " + e.Err.Error()
	}
	st := w.streamOf(e.Stream.Protocol())
	w.logf("stream %d: %s (%s) %s, %d to %d%s", st.id, sideName(side), role, e.Kind, from, to, note)
	st.step(side, e.Initiator, e.Kind, from, to)
	if e.Kind == migrate.Failed && e.Initiator && w.plan.draft >= 0 {
		st.doubt()
	}
	if w.plan.onStep != nil {
		w.plan.onStep(w, side, st, e)
	}
}

func sideName(side int) string { return [2]string{"a", "b"}[side] }

// wait lets time pass until condition holds, but no longer than limit.
func (w *world) wait(limit time.Duration, condition func() bool) bool {
	end := time.Now().Add(limit)
	for step := 10 * time.Millisecond; !condition(); step = min(2*step, time.Second) {
		if time.Now().After(end) {
			return false
		}
		time.Sleep(step)
	}
	return true
}

// report tells what went wrong, and how to see it again.
func (w *world) report() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.failures) == 0 {
		return
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n\n%s\nWhat happened, in virtual time:\n", w.plan.again(), w.plan)
	for _, line := range w.log {
		fmt.Fprintln(&b, line)
	}
	fmt.Fprintf(&b, "\nWhat is wrong:\n")
	for _, f := range w.failures {
		fmt.Fprintf(&b, "  %s\n", f)
	}
	w.t.Error(b.String())
}
