package connmgr

import (
	"container/heap"
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
// and starts rounds that are due, a bounded number at a time. The round of a peer is
// run by whoever holds its turn: the goroutine that the dispatcher started, or
// Consolidate.

// duplicates is what is kept of a peer while it has two connections or more.
type duplicates struct {
	peer peer.ID       // immutable
	turn chan struct{} // capacity 1; whoever put the value in may run a round

	// When the next round is. Guarded by Manager.mu, like all that follows.
	index     int       // in Manager.due; -1 while not there
	at        time.Time // of the next round
	asked     time.Time // for when a next round was asked while one ran; zero: was not
	settled   time.Time // no round before
	unsettled time.Time // when the first connection came since the last round; zero: none did
	gone      bool      // not in Manager.peers any more

	standing
	takeover
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
		if wait, waiting := m.startDue(); waiting {
			timer.Reset(wait)
		} else {
			timer.Stop()
		}
	}
}

// admit settles when a round follows from an event.
func (m *Manager) admit(e event) {
	m.mu.Lock()
	d := m.peers[e.peer]
	m.mu.Unlock()
	if d == nil {
		if len(openConns(m.watch.network(), e.peer)) < 2 {
			return
		}
		e.opened = true // whatever it was: what there is now is new to us
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	d = m.entry(e.peer)
	now := time.Now()
	if e.opened {
		if d.unsettled.IsZero() {
			d.unsettled = now
		}
		d.settled = earlier(now.Add(m.cfg.settleDelay), d.unsettled.Add(maxSettleDelays*m.cfg.settleDelay))
		if d.index >= 0 && d.at.Before(d.settled) {
			d.at = d.settled
			heap.Fix(&m.due, d.index)
		}
	}
	m.schedule(d, now)
}

// entry returns the entry of p, made if need be. It must be called with mu held.
func (m *Manager) entry(p peer.ID) *duplicates {
	d := m.peers[p]
	if d == nil {
		d = &duplicates{peer: p, turn: make(chan struct{}, 1), index: -1}
		m.peers[p] = d
	}
	return d
}

// schedule has d's next round at the given time at the latest, but not before its
// connections have settled. It must be called with mu held.
func (m *Manager) schedule(d *duplicates, at time.Time) {
	at = later(at, d.settled)
	switch {
	case d.gone:
	case d.index >= 0:
		if at.Before(d.at) {
			d.at = at
			heap.Fix(&m.due, d.index)
		}
	case len(d.turn) > 0: // giveTurnBack will see to it
		if d.asked.IsZero() || at.Before(d.asked) {
			d.asked = at
		}
	default:
		d.at = at
		heap.Push(&m.due, d)
	}
}

// startDue starts rounds. If one is due later, it returns in how long.
func (m *Manager) startDue() (time.Duration, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for !m.closed && m.running < m.cfg.concurrency && len(m.due) > 0 {
		d := m.due[0]
		if wait := time.Until(d.at); wait > 0 {
			return wait, true
		}
		heap.Pop(&m.due)
		select {
		case d.turn <- struct{}{}:
			m.running++
			m.wg.Add(1)
			go m.runRound(d)
		default: // Consolidate has just taken it
			d.asked = time.Now()
		}
	}
	return 0, false // nothing to wait for, or the end of a round
}

func (m *Manager) runRound(d *duplicates) {
	defer m.wg.Done()
	_, next, _ := m.round(m.ctx, d, false)
	m.mu.Lock()
	m.running--
	m.giveTurnBack(d, next)
	m.mu.Unlock()
	m.wakeUp()
}

// giveTurnBack ends a round. The next one is at next; if that is zero, the peer has no
// duplicates any more and is forgotten, unless there has been an event meanwhile. It
// must be called with mu held.
func (m *Manager) giveTurnBack(d *duplicates, next time.Time) {
	<-d.turn
	asked := d.asked
	d.asked = time.Time{}
	switch {
	case !asked.IsZero() && (next.IsZero() || asked.Before(next)):
		next = asked
	case next.IsZero():
		d.gone = true
		for _, cs := range d.conns {
			cs.cancelDrain()
		}
		delete(m.peers, d.peer)
		m.steering.drop(d.peer)
		return
	}
	m.schedule(d, next)
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
type dueHeap []*duplicates

func (h dueHeap) Len() int           { return len(h) }
func (h dueHeap) Less(i, j int) bool { return h[i].at.Before(h[j].at) }

func (h dueHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

func (h *dueHeap) Push(x any) {
	d := x.(*duplicates)
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
