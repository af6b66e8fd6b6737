package sim

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p/core/network"

	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/migrate"
)

// movePlan is a migration that a run tries.
type movePlan struct {
	at      time.Duration
	side    int // or 2: both at once
	stream  int
	to      int           // connection of a; of b, where both migrate at once, see other
	other   int           // where b migrates to at the same time
	timeout time.Duration // of the context; 0: none
}

func (m movePlan) String() string {
	if m.side == 2 {
		return fmt.Sprintf("at %v both move stream %d, a to %d and b to %d", m.at, m.stream, m.to, m.other)
	}
	return fmt.Sprintf("at %v %s moves stream %d to %d (timeout %v)", m.at, sideName(m.side), m.stream, m.to, m.timeout)
}

// faultPlan is something that goes wrong.
type faultPlan struct {
	at   time.Duration
	what faultKind
	link int
	side int
	last time.Duration // how long it lasts, or what is later is later by; 0: for ever
	// stream whose underlying stream is reset
	stream int
}

func (f faultPlan) String() string {
	return fmt.Sprintf("at %v %s: connection %d, side %s, %v, stream %d", f.at, f.what, f.link, sideName(f.side), f.last, f.stream)
}

type faultKind string

const (
	faultClose     faultKind = "close"            // one end closes the connection
	faultCloseBoth faultKind = "close at both"    // both ends do
	faultSever     faultKind = "sever"            // TCP's reset at one end; the other hears of it
	faultVanish    faultKind = "vanish"           // one end is gone, and the other does not hear of it
	faultFreeze    faultKind = "freeze"           // a black hole
	faultHiccup    faultKind = "short freeze"     // one that no connection dies of
	faultLatency   faultKind = "latency"          // jumps
	faultReset     faultKind = "underlying reset" // one stream of the muxer
	faultRelay     faultKind = "relay closes"     // the relay closes its connection to one end
	faultRestart   faultKind = "restart"          // one end's process
	faultCrash     faultKind = "crash"            // the same, and the other end does not hear of it
	faultRedial    faultKind = "redial"           // not a fault: a new connection in place of one that is gone
)

// harmless is the longest freeze that breaks no connection and no timeout.
const harmless = 3 * time.Second

// inflict does what the fault says.
func (w *world) inflict(f faultPlan) {
	l := w.link(f.link)
	w.logf("FAULT %s", f)
	w.tally.add("fault: "+string(f.what), 1)
	defer w.logf("done: %s", f.what)
	from, to := w.hop(f.side, l.path)
	switch f.what {
	case faultClose:
		w.hurt(f.link)
		_ = l.ends[f.side].Close()
	case faultCloseBoth:
		w.hurt(f.link)
		w.task("close", func() { _ = l.ends[f.side].Close() })
		time.Sleep(f.last)
		_ = l.ends[1-f.side].Close()
	case faultSever:
		w.hurt(f.link)
		if l.via == tcp {
			w.SeverEnd(from, to)
		} else {
			_ = l.ends[f.side].Close()
		}
	case faultVanish:
		w.hurtPath(l.path)
		defer w.thawed(l.path, f.last)
		w.Freeze(from, to)
		_ = l.ends[f.side].Close()
		if f.last > 0 {
			time.Sleep(f.last)
			w.Thaw(from, to)
		}
	case faultFreeze, faultHiccup:
		if f.what == faultFreeze {
			w.hurtPath(l.path)
			defer w.thawed(l.path, f.last)
		}
		w.Freeze(from, to)
		if f.last > 0 {
			time.Sleep(f.last)
			w.Thaw(from, to)
		}
	case faultLatency:
		w.setOneWay(l.path, f.last)
	case faultReset:
		w.resetUnderlying(f, l)
	case faultRelay:
		if w.relay != nil {
			w.hurtPath(0)
			_ = w.relay.Network().ClosePeer(w.node(f.side).ID())
		}
	case faultRestart:
		w.restart(f.side, false, 0)
	case faultCrash:
		w.restart(f.side, true, f.last)
	case faultRedial:
		w.redial(f.link)
	}
}

// resetUnderlying resets a stream under the logical one, as a muxer may.
func (w *world) resetUnderlying(f faultPlan, l *simLink) {
	st := w.streams[f.stream%len(w.streams)]
	for _, u := range l.ends[f.side].GetStreams() {
		if u.Protocol() == st.pid {
			st.harm("a reset of its underlying stream")
			w.logf("stream %d: underlying stream on %d reset at %s", st.id, w.linkOf(l.ends[0]), sideName(f.side))
			w.tally.add("fault: underlying reset that hit", 1)
			_ = u.Reset()
		}
	}
}

// restart ends a side's process and starts it again with the same key. Where it crashes,
// the other end hears of it only later, by silence.
func (w *world) restart(side int, crash bool, silence time.Duration) {
	w.mu.Lock()
	links := len(w.links)
	node := w.nodes[side]
	w.mu.Unlock()
	for i := range links {
		w.hurt(i)
	}
	for _, st := range w.streams {
		if st.end(0) != nil || st.end(1) != nil {
			st.harm("a restart")
		}
	}
	paths := len(w.plan.links)
	if crash {
		for path := range paths {
			w.Freeze(w.hop(side, path))
		}
	}
	node.Stop()
	if crash {
		time.Sleep(silence)
		for path := range paths {
			w.Thaw(w.hop(side, path))
		}
	}
	w.boot(side)
	w.redial(paths - 1)
}

// redial makes a connection over the path of connection i, which has died. Where another
// direct connection stands it is that which a dial returns.
func (w *world) redial(i int) {
	path := w.link(i).path
	via := w.plan.links[path].via
	if via == relayed {
		return
	}
	w.redials <- struct{}{} // two at once would be given the same connection
	defer func() { <-w.redials }()
	ctx, cancel := context.WithTimeout(w.t.Context(), 10*time.Second)
	defer cancel()
	a, b := w.node(0), w.node(1)
	c, err := a.Dial(ctx, b, Path{Transport: Transport(via), From: ipOf(0, path), To: ipOf(1, path)})
	if err != nil {
		w.logf("redial: %v", err)
		return
	}
	if w.linkOf(c) >= 0 {
		return
	}
	time.Sleep(500 * time.Millisecond) // the other end has it, too, and identify is done
	for _, d := range b.Network().ConnsToPeer(a.ID()) {
		if d.RemoteMultiaddr().Equal(c.LocalMultiaddr()) && w.linkOf(d) < 0 {
			w.mu.Lock()
			l := &simLink{path: path, via: via, ends: [2]network.Conn{c, d}}
			if w.icy[path] {
				l.hurt = time.Now()
			}
			w.links = append(w.links, l)
			w.logLocked("connection %d is new, over path %d", len(w.links)-1, path)
			w.mu.Unlock()
			return
		}
	}
	w.logf("redial: the other end has no such connection")
	_ = c.Close()
}

// move tries a migration.
func (w *world) move(m movePlan) {
	sides := []int{m.side}
	if m.side == 2 {
		sides = []int{0, 1}
	}
	for _, side := range sides {
		to := m.to
		if m.side == 2 && side == 1 {
			to = m.other
		}
		w.task(fmt.Sprintf("Migrate of stream %d by %s", m.stream, sideName(side)), func() { w.moveStream(side, m.stream, to, m.timeout) })
	}
}

func (w *world) moveStream(side, id, to int, timeout time.Duration) error {
	st := w.streams[id]
	e := st.end(side)
	if e == nil {
		w.tally.add("migrations of streams not there yet", 1)
		return nil
	}
	ctx := network.WithAllowLimitedConn(w.t.Context(), "test")
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	w.logf("stream %d: %s calls Migrate, to %d", id, sideName(side), to)
	began := time.Now()
	st.tries(side, 1)
	defer st.tries(side, -1)
	err := w.host(side).Migrate(ctx, e.s, w.link(to).ends[side])
	w.logf("stream %d: Migrate of %s returns %v", id, sideName(side), err)
	outcome := "other"
	switch {
	case err == nil:
		outcome = "succeeded"
	case errors.Is(err, migrate.ErrNotLabelled):
		outcome = "not labelled"
		if labelled(e.s) && w.sameHost(side, e.s) {
			w.failf("live", "stream %d: %v", id, err)
		}
	case errors.Is(err, migrate.ErrDenied):
		outcome = "denied"
	case errors.Is(err, migrate.ErrTryLater):
		outcome = "failed before the ack (try later)"
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		outcome = "context ended"
	case errors.Is(err, migrate.ErrClosed):
		outcome = "stream closed"
	case errors.Is(err, network.ErrReset):
		outcome = "failed after the ack (reset)"
	case errors.Is(err, migrate.ErrNotSupported):
		outcome = "not supported"
	case strings.Contains(err.Error(), "leads to another peer"):
	default:
		w.failf("live", "stream %d: Migrate returns an error of no known kind: %v", id, err)
	}
	w.tally.add("migrations: "+outcome, 1)
	if errors.Is(err, migrate.ErrTryLater) && w.isCalm() && w.plan.denial == 0 && !e.ended() {
		if st.triedSince(1-side, began) {
			st.meets(began)
		} else {
			w.failf("moves", "stream %d: Migrate of %s fails without a cause: %v", id, sideName(side), err)
		}
	}
	if errors.Is(err, migrate.ErrDenied) && w.isCalm() && w.plan.denial == 0 && !st.end(1-side).ended() {
		w.failf("moves", "stream %d: Migrate of %s is denied without a cause: %v", id, sideName(side), err)
	}
	return err
}

// isCalm says whether nothing goes wrong in the run that may keep a stream from moving.
func (w *world) isCalm() bool {
	return len(w.plan.faults) == 0 && w.plan.relayLimit == 0 && w.plan.draft < 0
}

// tries notes that a side begins, or ends, to migrate the stream.
func (st *simStream) tries(side, delta int) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.trying[side] += delta
	st.triedAt[side] = time.Now()
}

// meets notes an attempt, just failed, that met one of the other end.
func (st *simStream) meets(began time.Time) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.met = append(st.met, meeting{began, time.Now()})
}

// triedSince says whether a side has tried to, at any time since then, or so shortly before
// that its request may have been on its way.
func (st *simStream) triedSince(side int, since time.Time) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.trying[side] > 0 || !st.triedAt[side].Before(since.Add(-time.Second)) || !st.under[side].IsZero()
}

// ended says whether the end has called Close or Reset, or was never there.
func (e *end) ended() bool {
	if e == nil {
		return true
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return !e.closedAt.IsZero()
}

// sameHost says whether s is of the host that a side has now: a restart makes another.
func (w *world) sameHost(side int, s network.Stream) bool {
	return w.linkOf(s.Conn()) >= 0 && !w.restarted(side)
}

func (w *world) restarted(side int) bool {
	for _, f := range w.plan.faults {
		if (f.what == faultRestart || f.what == faultCrash) && f.side == side {
			return true
		}
	}
	return false
}
