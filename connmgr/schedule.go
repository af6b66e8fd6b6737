package connmgr

import (
	"container/heap"
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
)

// Scheduling
//
//	watcher --event--> dispatcher --due--> round, in a goroutine of its own
//	                       ^                 |
//	                       +---- schedule ---+
//
// A peer with duplicates is an entry in scheduler.peers, and while it has no round, in
// scheduler.due, a heap by the time of its next round. No goroutine waits for it. The
// dispatcher (dispatch.go), one goroutine that starts with the first event, moves events into
// entries and starts rounds that are due, a bounded number at a time.
//
// A round waits for nothing, and the next one of the same peer is some time after it,
// whatever asks for it. One that has started to move streams keeps its place for a moment
// (placeTime), so that not all peers' streams are in motion at once; those that are not done
// by then go on without it, and stand behind the others the next time.

// scheduler knows which peers have an entry, and when the next round of each is.
type scheduler struct {
	tasks  *tasks
	most   int                // rounds at a time
	loop   func()             // the dispatcher's, started by the first wakeUp
	forget func(d *peerState) // told of an entry that is gone; called with its lock and mu held

	wake  chan struct{} // to the dispatcher; capacity 1
	awake atomic.Bool   // the dispatcher runs

	// mu guards what follows and the schedule of each peer. It comes after the lock of a
	// peer and before those of usage, young and steering.
	mu     sync.Mutex
	peers  map[peer.ID]*peerState
	due    dueHeap // the peers that wait for their next round
	places int     // taken by rounds, not counting those of Consolidate
}

// schedule is when a peer's next round is. Guarded by scheduler.mu.
type schedule struct {
	index   int       // in scheduler.due; -1 while not there
	at      time.Time // of the next round
	wanted  time.Time // for when a next round was asked while one ran; zero: was not
	last    time.Time // when the last one ended
	running bool
	stir    chan struct{} // if not nil, closed when a round is asked for
	waited  int           // rounds in a row that used up their place
	gone    bool          // not in scheduler.peers any more; set with the peer's lock held, too
}

func newScheduler(t *tasks, most int) *scheduler {
	return &scheduler{tasks: t, most: most, wake: make(chan struct{}, 1), peers: make(map[peer.ID]*peerState)}
}

// wakeUp has the dispatcher look at events and at what is due. It does not block.
func (s *scheduler) wakeUp() {
	if !s.awake.Load() && s.awake.CompareAndSwap(false, true) {
		s.tasks.start(s.loop)
	}
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// known returns the entry of p; nil: there is none.
func (s *scheduler) known(p peer.ID) *peerState {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.peers[p]
}

// all returns the entries.
func (s *scheduler) all() []*peerState {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]*peerState, 0, len(s.peers))
	for _, d := range s.peers {
		list = append(list, d)
	}
	return list
}

// lock returns the entry of p, made if need be, with its lock held.
func (s *scheduler) lock(p peer.ID) *peerState {
	for {
		s.mu.Lock()
		d := s.entry(p)
		s.mu.Unlock()
		if d.lock() {
			return d
		}
	}
}

// lockKnown returns the entry of p with its lock held; nil: there is none.
func (s *scheduler) lockKnown(p peer.ID) *peerState {
	for {
		d := s.known(p)
		if d == nil || d.lock() {
			return d
		}
	}
}

// lock takes the lock of d. It is false if d is no entry any more, and the lock is not held
// then.
func (d *peerState) lock() bool {
	d.mu.Lock()
	if d.gone {
		d.mu.Unlock()
		return false
	}
	return true
}

// entry must be called with mu held.
func (s *scheduler) entry(p peer.ID) *peerState {
	d := s.peers[p]
	if d == nil {
		now := time.Now()
		d = &peerState{peer: p, schedule: schedule{index: -1}, came: now, firstOf: now}
		d.progress = now
		s.peers[p] = d
	}
	return d
}

// schedule has d's next round at the given time at the latest, but some time after the last
// one. It does not block.
func (s *scheduler) schedule(d *peerState, at time.Time) {
	s.mu.Lock()
	s.set(d, at)
	s.mu.Unlock()
	s.wakeUp()
}

// poke has a round for p now, if it has an entry.
func (s *scheduler) poke(p peer.ID) {
	if d := s.known(p); d != nil {
		s.schedule(d, time.Now())
	}
}

// set is schedule. It must be called with mu held.
func (s *scheduler) set(d *peerState, at time.Time) {
	at = later(at, d.last.Add(d.rest()))
	d.stirUp()
	switch {
	case d.gone:
	case d.index >= 0:
		if at.Before(d.at) {
			d.at = at
			heap.Fix(&s.due, d.index)
		}
	case d.running: // endRound will see to it
		if d.wanted.IsZero() || at.Before(d.wanted) {
			d.wanted = at
		}
	default:
		d.at = at
		heap.Push(&s.due, d)
	}
}

// rest is the shortest time until the next round: longer for a peer whose streams kept their
// place for all of its time, whatever asks for a round.
func (sc *schedule) rest() time.Duration {
	if sc.waited > 0 {
		return placeTime << min(sc.waited, 5)
	}
	return minRoundGap
}

// startDue has rounds run, each in a goroutine of its own that calls endRound and leave. If
// one is due later, it returns in how long.
func (s *scheduler) startDue(run func(*peerState)) (time.Duration, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.places < s.most && len(s.due) > 0 {
		d := s.due[0]
		if wait := time.Until(d.at); wait > 0 {
			return wait, true
		}
		if !s.tasks.start(func() { run(d) }) {
			break
		}
		heap.Pop(&s.due)
		d.running = true
		s.places++
	}
	return 0, false // nothing to wait for, or the end of a round
}

// endRound ends a round. The next one is at next; if that is zero, the peer has no
// duplicates any more and is forgotten, unless there has been an event meanwhile.
func (s *scheduler) endRound(d *peerState, next time.Time) {
	d.mu.Lock()
	s.mu.Lock()
	s.end(d, next)
	s.mu.Unlock()
	d.mu.Unlock()
	s.wakeUp()
}

// endRoundStirred is endRound. It says whether a round was asked for while that one ran, and
// returns a channel that is closed when one is from here on.
func (s *scheduler) endRoundStirred(d *peerState, next time.Time) (came bool, stir <-chan struct{}) {
	d.mu.Lock()
	s.mu.Lock()
	came = !d.wanted.IsZero()
	s.end(d, next)
	stir = d.stirred()
	s.mu.Unlock()
	d.mu.Unlock()
	s.wakeUp()
	return came, stir
}

// end is endRound. It must be called with d's lock and mu held.
func (s *scheduler) end(d *peerState, next time.Time) {
	d.running = false
	d.last = time.Now()
	wanted := d.wanted
	d.wanted = time.Time{}
	switch {
	case !wanted.IsZero() && (next.IsZero() || wanted.Before(next)):
		next = wanted
	case next.IsZero():
		d.gone = true
		delete(s.peers, d.peer)
		d.stirUp()
		s.forget(d)
		return
	}
	s.set(d, next)
}

// leave gives the place of a round back. inTime: its streams have moved within placeTime.
// still: there are others that have not.
func (s *scheduler) leave(d *peerState, inTime, still bool) {
	s.mu.Lock()
	s.places--
	switch {
	case !inTime:
		d.waited++
	case !still:
		d.waited = 0
	}
	s.mu.Unlock()
	s.wakeUp()
}

// take waits until the caller may run a round for p, out of turn.
func (s *scheduler) take(ctx context.Context, p peer.ID) (*peerState, error) {
	for {
		s.mu.Lock()
		d := s.entry(p)
		if !d.running {
			d.running = true
			if d.index >= 0 {
				heap.Remove(&s.due, d.index)
			}
			s.mu.Unlock()
			return d, nil
		}
		stir := d.stirred()
		s.mu.Unlock()
		// A round is short, and asks for the next one at its end.
		select {
		case <-stir:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// stirred returns a channel that is closed when a round is asked for. It must be called with
// scheduler.mu held, as stirUp.
func (sc *schedule) stirred() <-chan struct{} {
	if sc.stir == nil {
		sc.stir = make(chan struct{})
	}
	return sc.stir
}

func (sc *schedule) stirUp() {
	if sc.stir != nil {
		close(sc.stir)
		sc.stir = nil
	}
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
