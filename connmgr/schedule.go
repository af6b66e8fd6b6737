package connmgr

import (
	"container/heap"
	"context"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
)

// Scheduling
//
//	watcher --event--> dispatcher --due--> round, in a goroutine of its own
//	                       ^                 |
//	                       +---- schedule ---+
//
// A peer with duplicates is an entry in Manager.peers, and while it has no round, in
// Manager.due, a heap by the time of its next round. No goroutine waits for it. The
// dispatcher, one goroutine that starts with the first event, moves events into entries
// and starts rounds that are due, a bounded number at a time.
//
// A round waits for nothing, and the next one of the same peer is some time after it,
// whatever asks for it. One that has started to move streams keeps its place for a moment
// (placeTime), so that not all peers' streams are in motion at once; those that are not done
// by then go on without it, and stand behind the others the next time.

// schedule is when a peer's next round is. Guarded by Manager.mu.
type schedule struct {
	index   int       // in Manager.due; -1 while not there
	at      time.Time // of the next round
	wanted  time.Time // for when a next round was asked while one ran; zero: was not
	last    time.Time // when the last one ended
	running bool
}

// wakeUp has the dispatcher look at events and at what is due. It does not block.
func (m *Manager) wakeUp() {
	if !m.awake.Load() {
		m.mu.Lock()
		if !m.closed && m.awake.CompareAndSwap(false, true) {
			m.wg.Add(1)
			go m.dispatch()
		}
		m.mu.Unlock()
	}
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

func (m *Manager) dispatch() {
	defer m.wg.Done()
	timer := time.NewTimer(0)
	defer timer.Stop()
	var events []event
	for {
		select {
		case <-m.ctx.Done():
			return
		case <-m.wake:
		case <-timer.C:
		}
		events = m.watch.take(events)
		for _, e := range events {
			m.admit(e)
		}
		wait, waiting := m.startDue()
		if until, sweeps := m.startSweep(); sweeps && (!waiting || until < wait) {
			wait, waiting = until, true
		}
		if waiting {
			timer.Reset(wait)
		} else {
			timer.Stop()
		}
	}
}

// admit settles when a round follows from an event.
func (m *Manager) admit(e event) {
	conns := openConns(m.watch.network(), e.peer)
	m.admitUpgrade(e.peer, conns)
	m.mu.Lock()
	d := m.peers[e.peer]
	m.mu.Unlock()
	if d == nil {
		if len(conns) < 2 {
			return
		}
		e.opened = true // whatever it was: what there is now is new to us
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	d = m.entry(e.peer)
	now := time.Now()
	if e.opened {
		m.young.resume(e.peer)
		d.came = now
		if d.firstOf.IsZero() {
			d.firstOf = now
		}
	}
	m.schedule(d, now)
}

// entry returns the entry of p, made if need be. It must be called with mu held.
func (m *Manager) entry(p peer.ID) *peerState {
	d := m.peers[p]
	if d == nil {
		now := time.Now()
		d = &peerState{peer: p, schedule: schedule{index: -1}, came: now, firstOf: now}
		d.progress = now
		m.peers[p] = d
	}
	return d
}

// schedule has d's next round at the given time at the latest, but some time after the last
// one. It must be called with mu held.
func (m *Manager) schedule(d *peerState, at time.Time) {
	at = later(at, d.last.Add(d.rest()))
	if d.stir != nil {
		close(d.stir)
		d.stir = nil
	}
	switch {
	case d.gone:
	case d.index >= 0:
		if at.Before(d.at) {
			d.at = at
			heap.Fix(&m.due, d.index)
		}
	case d.running: // endRound will see to it
		if d.wanted.IsZero() || at.Before(d.wanted) {
			d.wanted = at
		}
	default:
		d.at = at
		heap.Push(&m.due, d)
	}
}

// rest is the shortest time until the next round: longer for a peer whose streams kept their
// place for all of its time, whatever asks for a round. It must be called with Manager.mu
// held.
func (d *peerState) rest() time.Duration {
	if d.waited > 0 {
		return placeTime << min(d.waited, 5)
	}
	return minRoundGap
}

// startDue starts rounds. If one is due later, it returns in how long.
func (m *Manager) startDue() (time.Duration, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for !m.closed && m.places < m.cfg.concurrency && len(m.due) > 0 {
		d := m.due[0]
		if wait := time.Until(d.at); wait > 0 {
			return wait, true
		}
		heap.Pop(&m.due)
		d.running = true
		m.places++
		m.wg.Add(1)
		go m.runDue(d)
	}
	return 0, false // nothing to wait for, or the end of a round
}

// runDue runs a round in a place.
func (m *Manager) runDue(d *peerState) {
	defer m.wg.Done()
	_, p, b := m.runRound(d, false)
	m.mu.Lock()
	m.endRound(d, p.next)
	m.mu.Unlock()
	m.wakeUp()
	inTime := true
	if b != nil {
		timer := time.NewTimer(placeTime)
		select {
		case <-b.done:
		case <-m.ctx.Done():
		case <-timer.C:
			inTime = false
		}
		timer.Stop()
	}
	m.mu.Lock()
	m.places--
	switch {
	case !inTime:
		d.waited++
	case len(d.moving) == 0: // else what was waited for is still going on
		d.waited = 0
	}
	m.mu.Unlock()
	m.wakeUp()
}

// endRound ends a round. The next one is at next; if that is zero, the peer has no
// duplicates any more and is forgotten, unless there has been an event meanwhile. It must
// be called with mu held.
func (m *Manager) endRound(d *peerState, next time.Time) {
	d.running = false
	d.last = time.Now()
	wanted := d.wanted
	d.wanted = time.Time{}
	switch {
	case !wanted.IsZero() && (next.IsZero() || wanted.Before(next)):
		next = wanted
	case next.IsZero():
		m.forget(d)
		return
	}
	m.schedule(d, next)
}

// forget drops the entry of a peer. It must be called with mu held.
func (m *Manager) forget(d *peerState) {
	d.gone = true
	for _, cs := range d.conns {
		m.usage.drop(cs)
	}
	if len(d.conns) == 1 && d.winner == d.conns[0] && !d.winner.died {
		m.young.watch(d.winner, time.Now())
	}
	delete(m.peers, d.peer)
	m.steering.drop(d.peer)
	if d.stir != nil {
		close(d.stir)
		d.stir = nil
	}
}

// takeRound waits until the caller may run a round for p, and says until when it may go on
// waiting for what a round has asked.
func (m *Manager) takeRound(ctx context.Context, p peer.ID) (*peerState, error) {
	for {
		m.mu.Lock()
		d := m.entry(p)
		if !d.running {
			d.running = true
			if d.index >= 0 {
				heap.Remove(&m.due, d.index)
			}
			m.mu.Unlock()
			return d, nil
		}
		stir := d.stirred()
		m.mu.Unlock()
		// A round is short, and asks for the next one at its end.
		select {
		case <-stir:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// stirred returns a channel that is closed when a round is asked for. It must be called with
// Manager.mu held.
func (d *peerState) stirred() <-chan struct{} {
	if d.stir == nil {
		d.stir = make(chan struct{})
	}
	return d.stir
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// dueHeap is a heap of peers by the time of their next round.
type dueHeap []*peerState

func (h dueHeap) Len() int           { return len(h) }
func (h dueHeap) Less(i, j int) bool { return h[i].at.Before(h[j].at) }

func (h dueHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

func (h *dueHeap) Push(x any) {
	d := x.(*peerState)
	d.index = len(*h)
	*h = append(*h, d)
}

func (h *dueHeap) Pop() any {
	last := len(*h) - 1
	d := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	d.index = -1
	return d
}
