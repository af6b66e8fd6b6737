package sim

import (
	"context"
	"errors"
	"fmt"
	"slices"
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
	link int // the path; what is hit is the newest connection over it
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
	faultRedial    faultKind = "redial"           // not a fault: new connections, where none is left
)

// renews says whether connections are made again with it.
func (k faultKind) renews() bool { return k == faultRestart || k == faultCrash || k == faultRedial }

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
		w.hurt(l, false)
		_ = l.ends[f.side].Close()
	case faultCloseBoth:
		w.hurt(l, false)
		w.task("close", func() { _ = l.ends[f.side].Close() })
		time.Sleep(f.last)
		_ = l.ends[1-f.side].Close()
	case faultSever:
		w.hurt(l, false)
		if l.via == tcp {
			w.hurtPath(l.path, false)
			w.SeverEnd(from, to)
		} else {
			_ = l.ends[f.side].Close()
		}
	case faultVanish:
		w.freezes(l.path)
		w.Freeze(from, to)
		_ = l.ends[f.side].Close()
		if f.last > 0 {
			time.Sleep(f.last)
			w.Thaw(from, to)
			w.thaws(l.path)
		}
	case faultFreeze:
		w.freezes(l.path)
		w.Freeze(from, to)
		if f.last > 0 {
			time.Sleep(f.last)
			w.Thaw(from, to)
			w.thaws(l.path)
		}
	case faultHiccup:
		w.slows(l.path, harmless)
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
			w.hurtPath(0, false)
			_ = w.relay.Network().ClosePeer(w.node(f.side).ID())
		}
	case faultRestart:
		w.restart(f.side, false, 0)
	case faultCrash:
		w.restart(f.side, true, f.last)
	case faultRedial:
		w.redial(f.side)
	}
	if f.what.renews() {
		w.renewed()
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
	paths := len(w.plan.links)
	for path := range paths {
		w.hurtPath(path, crash)
	}
	for _, st := range w.streams {
		if st.end(0) != nil || st.end(1) != nil {
			st.harm("a restart")
		}
	}
	if crash {
		for path := range paths {
			w.Freeze(w.hop(side, path))
		}
	}
	w.node(side).Stop()
	if crash {
		time.Sleep(silence)
		for path := range paths {
			w.Thaw(w.hop(side, path))
			w.thaws(path)
		}
	}
	w.boot(side)
	w.redial(side) // the other one may not know yet that its connections are gone
}

// redial has a side dial the other over all direct paths. Where one of its direct
// connections stands, it is that which a dial returns.
func (w *world) redial(side int) {
	w.redials <- struct{}{} // two at once would be given the same connections
	defer func() { <-w.redials }()
	near, far := w.node(side), w.node(1-side)
	began := time.Now()
	var attempts []Attempt
	for i, l := range w.plan.links {
		if l.via != relayed {
			path := Path{Transport: Transport(l.via), From: w.ip(side, i), To: w.ip(1-side, i)}
			attempts = append(attempts, Attempt{From: near, To: far, Path: path})
		}
	}
	for i, err := range w.DialTogether(attempts...) {
		if err != nil {
			w.logf("redial over %s: %v", attempts[i].Path, err)
		}
	}
	for _, c := range near.Network().ConnsToPeer(far.ID()) {
		if w.linkOf(c) < 0 {
			w.enter(side, c, began)
		}
	}
}

// enter enters a connection, of which c is the side's end, when both ends have identified
// each other. What has happened to the path since it began may have hit it already.
func (w *world) enter(side int, c network.Conn, began time.Time) {
	var d network.Conn
	there := w.wait(5*time.Second, func() bool {
		for _, d = range w.node(1 - side).Network().ConnsToPeer(c.LocalPeer()) {
			// One that a crashed process has left may have the same addresses.
			if w.linkOf(d) < 0 && d.RemoteMultiaddr().Equal(c.LocalMultiaddr()) && d.LocalMultiaddr().Equal(c.RemoteMultiaddr()) {
				return true
			}
		}
		return false
	})
	if !there {
		w.logf("redial: the other end has no such connection as %v", c)
		_ = c.Close()
		return
	}
	w.node(side).AwaitIdentify(c)
	w.node(1 - side).AwaitIdentify(d)
	w.mu.Lock()
	defer w.mu.Unlock()
	for path, plan := range w.plan.links {
		if !strings.HasPrefix(c.LocalMultiaddr().String(), "/ip4/"+w.ip(side, path)+"/") {
			continue
		}
		l := &simLink{path: path, via: plan.via}
		l.ends[side], l.ends[1-side] = c, d
		if w.icy[path] || w.struck[path].After(began) {
			w.hurtLocked(l, true)
		}
		w.links = append(w.links, l)
		w.logLocked("connection %d is new, over path %d", len(w.links)-1, path)
	}
}

// renewed notes that a restart or redial is over.
func (w *world) renewed() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.renewals--; w.renewals == 0 {
		close(w.again)
	}
}

// awaitBirth waits until the time of a stream of the plan begins.
func (w *world) awaitBirth(stream int) {
	if w.plan.streams[stream].after {
		<-w.again
	}
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
	h, l := w.host(side), w.link(to)
	w.logf("stream %d: %s calls Migrate, to %d", id, sideName(side), w.linkOf(l.ends[side]))
	began := time.Now()
	st.tries(side, 1)
	defer st.tries(side, -1)
	err := h.Migrate(ctx, e.s, l.ends[side])
	w.logf("stream %d: Migrate of %s returns %v", id, sideName(side), err)
	outcome := "other"
	switch {
	case err == nil:
		outcome = "succeeded"
	case errors.Is(err, migrate.ErrNotLabelled):
		outcome = "not labelled"
		if labelled(e.s) && e.host == h {
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
	// The other end's Reset may overtake its ack.
	if errors.Is(err, migrate.ErrTryLater) && st.isCalm(l) && !e.ended() && !st.end(1-side).wasReset() {
		if st.triedSince(1-side, began) {
			st.meets(began)
		} else if full := w.plan.buffer > 0 && strings.Contains(err.Error(), "no room for a stream"); full {
			w.tally.add("migrations: no room on a connection that is full", 1)
		} else {
			w.failf("moves", "stream %d: Migrate of %s fails without a cause: %v", id, sideName(side), err)
		}
	}
	if errors.Is(err, migrate.ErrDenied) && st.isCalm(l) && !st.end(1-side).ended() {
		w.failf("moves", "stream %d: Migrate of %s is denied without a cause: %v", id, sideName(side), err)
	}
	return err
}

// isCalm says whether nothing has gone wrong that may keep the stream from moving to l.
func (st *simStream) isCalm(l *simLink) bool {
	p := st.w.plan
	if p.draft >= 0 || p.denial > 0 {
		return false
	}
	st.w.mu.Lock()
	hurt := l != nil && !l.hurt.IsZero()
	st.w.mu.Unlock()
	last, _ := st.trouble()
	return !hurt && last.IsZero()
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
// that its request may have been on its way; or has not ended an earlier migration (M2).
func (st *simStream) triedSince(side int, since time.Time) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.trying[side] > 0 || !st.triedAt[side].Before(since.Add(-time.Second)) ||
		slices.ContainsFunc(st.attempts[side], func(a *attempt) bool {
			return a.left.IsZero() && (a.initiator || a.came.Before(since))
		})
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

func (e *end) wasReset() bool {
	if e == nil {
		return false
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return !e.resetAt.IsZero()
}
