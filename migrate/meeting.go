package migrate

import (
	"errors"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
)

// Where two exchanges of one stream meet: both ends ask at once (M1), or one asks while the
// other has not done with the last one (M2). A stream has one exchange at a time; the
// peer's wait for their turn, and come before any of ours.

// waiter is a responder's exchange, which may have to wait for its turn.
type waiter struct {
	x        *exchange
	next     *waiter
	turn     chan struct{} // closed when x has begun, or never will
	promised bool          // an attempt of ours gave way to it (M1): it is owed the ack
}

var (
	errOursFirst = errors.New("our own migration of the stream goes first")
	errNotEnded  = errors.New("the last migration of the stream has not ended")
)

// enterResponder begins x on s, if an exchange of our own does not go first (M1) and
// the last one ends in time (M2).
func (h *Host) enterResponder(s *Stream, x *exchange) error {
	w, err := s.beginNext(x, h.ID() < s.peer)
	if w == nil {
		return err
	}
	timer := time.NewTimer(h.cfg.busyWait)
	defer timer.Stop()
	err = ErrClosed
	select {
	case <-w.turn:
	case <-timer.C:
		err = errNotEnded
	case <-h.ctx.Done():
		err = h.ctx.Err()
	}
	if s.stopWaiting(w) {
		return nil
	}
	return err
}

// beginNext enters a responder's exchange, or has it begin as soon as that which is under
// way ends: then it returns a waiter. No exchange of our own comes between, so that one that
// has yielded (M1) and is tried again at once cannot keep the peer waiting for ever. An
// attempt of ours that is under way yields. With oursFirst it goes first instead, as soon as
// it has a stream to ask on: until then the peer does not know of it.
//
// Once ours has yielded x owes the ack (M1): else the peer, having read a denial, could
// answer ours while its reset is on its way. So x has to be able to keep that promise
// before that.
//
// Only migrations of the same label meet. A peer that names another one can have that from
// our Migrate only: it has acked ours, and x overtook the ack. Were ours to yield, the
// stream would be lost although nothing had failed (S8); x waits for it instead (M2).
func (s *Stream) beginNext(x *exchange, oursFirst bool) (*waiter, error) {
	s.mu.Lock()
	s.verifies = s.verifies || x.verified
	ours := s.ex
	switch {
	case s.dead():
		s.mu.Unlock()
		return nil, ErrClosed
	case s.send.resumption.detached():
		s.mu.Unlock()
		return nil, errDropped
	case ours == nil:
		s.enter(x)
		s.mu.Unlock()
		return nil, nil
	}
	w := &waiter{x: x, turn: make(chan struct{})}
	var dropped network.Stream
	if ours.initiator && ours.phase <= phaseYielded && ours.from == x.from {
		if ours.new != nil {
			err := errOursFirst
			if !oursFirst {
				err = x.canPromise(s)
			}
			if err != nil {
				s.mu.Unlock()
				return nil, err
			}
			w.promised = true
		}
		dropped = ours.yield()
	}
	last := &ours.waiting
	for *last != nil {
		last = &(*last).next
	}
	*last = w
	s.mu.Unlock()
	if dropped != nil {
		_ = breakOff(dropped, network.StreamNoError)
	}
	return w, nil
}

// giveTurn lets the next responder begin that waits for x to end. Where the stream is over,
// only one does that was promised it, and none after a reset: closing the stream in between
// does not abort what the peer takes for agreed (S7). The stream's mu must be held, and x be
// its exchange no more.
func (x *exchange) giveTurn() {
	s, w := x.s, x.waiting
	x.waiting = nil
	if w != nil && !s.told() && !s.send.resumption.detached() &&
		(s.life == lifeOpen || w.promised && s.life != lifeReset) {
		w.x.waiting, w.next = w.next, nil
		s.enter(w.x)
		close(w.turn)
		return
	}
	for ; w != nil; w = w.next {
		close(w.turn)
	}
}

// stopWaiting takes w out of those that wait. It says whether its exchange has begun instead.
func (s *Stream) stopWaiting(w *waiter) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ex == nil || s.ex == w.x {
		return s.ex != nil
	}
	for at := &s.ex.waiting; *at != nil; at = &(*at).next {
		if *at == w {
			*at = w.next
			break
		}
	}
	return false
}
