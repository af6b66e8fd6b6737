package migrate

import (
	"errors"
	"fmt"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"go.uber.org/zap"
)

// exchange is one migration of one stream, on either side. initiator.go and
// responder.go tell what happens in which order; here is what both sides share.
type exchange struct {
	s         *Stream
	initiator bool
	verified  bool // the handover is (S12); until the initiator has the ack: the peer is known to have it
	old       network.Stream
	oldSource *source       // the receiving half's view of old, from its handover on
	oldClosed chan struct{} // closed when old is closed for writing; nil: it is, or finish does it
	from, id  uint64        // the label before, and after; id is set before begin, and a responder's from
	done      chan struct{} // closed when another exchange may begin

	// Guarded by s.mu.
	phase  phase
	new    network.Stream // from phaseAsked on; id is in the table of labels as long
	unpaid bool           // new is not charged to the application's protocol yet; see charging.go
	stop   func()         // ends the opening of new; nil until that begins
	// The peer's exchanges that begin when this one has ended, before any of ours: the
	// first of a list.
	waiting *waiter

	silence silence
	started time.Time // when Started was told of, where anybody is; see trace
	before  uint64    // bytes that old had brought when the exchange began to hold back its end
}

// phase is how far an exchange has come. Its transitions are begin, attach, yield, commit
// and end, and no other.
type phase uint8

const (
	phaseOpening   phase = iota // the peer knows of nothing yet, or its Migrate has come just now
	phaseAsked                  // there is a stream to move to: Migrate is about to leave, or was taken up
	phaseYielded                // never asked, or in vain: the peer's exchange goes first (M1)
	phaseCommitted              // the ack has come, or is about to leave: there is no way back (S10)
	phaseOver                   // another exchange may begin
)

// begin enters x as the stream's exchange, or returns the one that is under way.
func (s *Stream) begin(x *exchange) (busy *exchange, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.dead():
		return nil, ErrClosed
	case s.send.resumption.detached():
		return nil, fmt.Errorf("%w: %w", ErrTryLater, errDropped)
	case s.ex != nil:
		return s.ex, nil
	}
	s.enter(x)
	return nil, nil
}

// dead says whether the stream is not to move any more: it was closed or reset, or the
// application was told that its connection has failed (S8). mu must be held.
func (s *Stream) dead() bool { return s.life != lifeOpen || s.told() }

func (s *Stream) told() bool { return s.send.hasLost() || s.recv.hasFailed() }

// enter makes x the stream's exchange. mu must be held, and no other be under way.
func (s *Stream) enter(x *exchange) {
	x.s, x.old, x.from, x.done = s, s.send.stream(), s.label, make(chan struct{})
	s.ex = x
}

// attach tells which stream the exchange moves to, and enters its label. It says false
// where the label is alive (L2), or the exchange has yielded meanwhile.
func (x *exchange) attach(u network.Stream) bool {
	x.s.mu.Lock()
	defer x.s.mu.Unlock()
	if x.phase != phaseOpening || !x.s.host.labels.add(x.s.peer, x.id, x.s) {
		return false
	}
	x.phase, x.new = phaseAsked, u
	return true
}

// yield lets the peer's exchange go first (M1), and returns the stream to reset on which
// ours has asked, or nil. There must be a way back yet. s.mu must be held.
func (x *exchange) yield() network.Stream {
	x.phase = phaseYielded
	x.interrupt()
	return x.new
}

// commit passes the point of no return, unless the exchange has yielded.
func (x *exchange) commit() bool {
	x.s.mu.Lock()
	defer x.s.mu.Unlock()
	if x.phase == phaseYielded {
		return false
	}
	x.phase = phaseCommitted
	return true
}

// mayStop says how to end the opening of the stream to move to. A connection may have no
// room for it for a long time; whoever closes or resets the logical stream, or takes
// precedence (M1), does not wait for that.
func (x *exchange) mayStop(stop func()) {
	x.s.mu.Lock()
	defer x.s.mu.Unlock()
	x.stop = stop
	if x.phase == phaseYielded || x.s.life != lifeOpen {
		stop()
	}
}

// interrupt ends the opening. It does nothing later on (S7, S10). s.mu must be held.
func (x *exchange) interrupt() {
	if x.stop != nil {
		x.stop()
	}
}

// giveUp resets u, which the exchange has asked on. That may take long on a path that takes nothing. A
// stream that may be resumed does not wait for it: who resumes it waits for the exchange to end.
func (x *exchange) giveUp(u network.Stream, code network.StreamErrorCode) {
	if x.s.send.resumption != nil {
		go breakOff(u, code)
	} else {
		_ = u.ResetWithError(code)
	}
}

func (x *exchange) next() network.Stream {
	x.s.mu.Lock()
	defer x.s.mu.Unlock()
	return x.new
}

// breakOff resets u, and calls out whoever is inside it. A reset alone does not do that
// on WebTransport while the session ends, nor on a yamux connection whose path is dead;
// a deadline does, and what it may destroy is lost anyway.
func breakOff(u network.Stream, code network.StreamErrorCode) error {
	_ = u.SetDeadline(past)
	return u.ResetWithError(code)
}

// ending is what became of an exchange.
type ending uint8

const (
	moved  ending = iota
	stays         // on the old stream (S9)
	broken        // both streams are reset (S8)
)

// end lets the next exchange begin. Where there is none, what was kept back is the
// application's; and if that has closed the stream in the meantime, its last underlying
// stream is closed now (S7).
func (x *exchange) end(how ending) {
	s := x.s
	s.mu.Lock()
	s.ex, x.phase = nil, phaseOver
	gone, entered := x.id, x.new != nil
	if how == moved {
		gone = x.from
		s.label = x.id
		s.migrations++
		if x.unpaid {
			s.scopeLocked().unpaid = x.new // until payLate
		} else if s.scope != nil && s.scope.own == nil {
			s.scope.unpaid = nil
		}
		if s.scope != nil && s.scope.spare() {
			s.scope = nil
		}
	}
	x.giveTurn()
	if how == stays && s.ex == nil {
		s.send.hold(false)
		s.recv.release()
	}
	over, life := s.life != lifeOpen && s.ex == nil, s.life
	s.mu.Unlock()
	if entered {
		s.host.labels.remove(s.peer, gone, s)
	}
	if over {
		if life == lifeClosed { // else a reset is on its way, which a FIN must not overtake
			_ = s.closeHalves()
			if u := s.send.last(); u != nil {
				_ = u.Close()
			}
		}
		s.forget()
		s.send.resumption.closed()
		s.settle()
	} else {
		s.noteGone()
	}
	close(x.done)
}

// hold keeps back from here on how the old stream ends (S5), with a peer that verifies the
// errors of Writes, too. It says false where the application has been told since the
// exchange began, so that the stream has to stay where it failed and the other end is told;
// or where the application has reset it, which did not reach the new stream (S7).
func (x *exchange) hold() bool {
	x.before = x.s.recv.hold()
	x.s.send.hold(x.verified)
	return !x.s.told()
}

// fail ends an exchange from which there is no way back: both streams are reset (S8, S10).
// It returns what the application sees, a network.ErrReset.
func (x *exchange) fail(cause error) error {
	if errors.Is(cause, errViolation) {
		x.s.host.warnViolation(x.s.peer, cause, zap.Uint64("label", x.from))
	} else if r := x.s.send.resumption; r != nil && r.survives(x, cause) {
		err := fmt.Errorf("%w: %w", ErrTryLater, cause)
		x.trace(Failed, err)
		x.end(stays)
		return err
	}
	err := reset(cause)
	x.trace(Failed, err)
	_ = x.s.abort(err, codeFor(cause))
	x.end(broken)
	return err
}

// switchSending lets Writes go to u, the new stream, behind the final size where the
// handover is verified (S2, S3, S12). The old one has to be closed for writing next.
func (x *exchange) switchSending(u network.Stream) error {
	s := x.s
	written, err := s.send.pause()
	if err != nil {
		return err
	}
	if x.verified {
		if err := writeMessage(u, finalSizeMessage(written)); err != nil {
			return fmt.Errorf("final size: %w", err)
		}
	}
	x.moveScope(u)
	closed, err := s.send.resume(u)
	if err != nil {
		return err
	}
	x.trace(SendSwitched, nil)
	if closed {
		if s.send.resumption != nil { // it was not known before, where a Write was inside the old stream
			s.send.announce(u, true)
		}
		_ = u.CloseWrite() // S6
	}
	return nil
}

// closeOld closes the old stream for writing, which can take long on a dead path of yamux.
// A responder whose handover is over at once leaves it to finish, which closes the stream
// altogether.
func (x *exchange) closeOld() {
	if t := x.old.Conn().ConnState().Transport; t == "quic-v1" {
		_ = x.old.CloseWrite()
		return
	}
	x.oldClosed = make(chan struct{})
	go func() {
		defer close(x.oldClosed)
		_ = x.old.CloseWrite()
	}()
}

// switchReceiving waits until everything has been read from the old stream, as the goal
// tells, and lets Reads go to the next one (S4).
func (x *exchange) switchReceiving(next *source, g goal) error {
	s := x.s
	x.oldSource = s.recv.source()
	if !s.recv.handover(next, g) {
		if x.verified && !x.initiator {
			x.closeOld()
		}
		s.recv.reserveIn(x.memory())
	}
	hold := s.host.cfg.stall
	if sharesWindow(next.stream.Conn()) {
		hold = maxHold
	}
	w := watch{s: s, c: x.old.Conn(), own: &s.recv}
	defer w.end()
	if err := s.recv.await(s.host.cfg.stall, hold, w.look); err != nil {
		return err
	}
	x.trace(ReceiveSwitched, nil)
	return nil
}

// memory is what the receiving half reserves its buffers in.
func (x *exchange) memory() memory {
	x.s.mu.Lock()
	defer x.s.mu.Unlock()
	if seen := x.s.host.cfg.buffered; len(seen) > 0 {
		return watchedMemory{x.s.scopeLocked(), seen}
	}
	return x.s.scopeLocked()
}

// sharesWindow says whether what waits unread in a stream can keep data of the
// connection's other streams from coming. The streams of yamux have windows of their own.
func sharesWindow(c network.Conn) bool {
	switch c.ConnState().Transport {
	case "quic", "quic-v1", "webtransport", "webrtc-direct":
		return true
	}
	return false
}

// finish lets go of the old stream, whose both directions are done with.
func (x *exchange) finish(u network.Stream) {
	s := x.s
	if s.recv.isRead(x.oldSource) {
		// Calls it out, see handover.go. The deadline is for WebTransport, where CloseRead
		// does not while the session ends; nothing is left that it could destroy.
		_ = x.old.CloseRead()
		_ = x.old.SetReadDeadline(past)
	}
	eof, closed := s.recv.view()
	if closed {
		_ = u.CloseRead() // S6
	}
	x.end(moved)
	if x.oldClosed != nil {
		<-x.oldClosed
	}
	_ = x.old.Close()
	x.payLate()
	x.trace(Finished, nil)
	if eof && !closed {
		go x.expectEnd(u) // a peer that owes it must not hold up the caller
	}
}

// expectEnd reads the EOF that follows on u where the application was given its EOF
// before. Anything else is a violation (S11).
func (x *exchange) expectEnd(u network.Stream) {
	if n, _ := u.Read(make([]byte, 1)); n > 0 {
		err := fmt.Errorf("%w: data after the end", errViolation)
		x.s.host.warnViolation(x.s.peer, err, zap.Uint64("label", x.id))
		_ = x.s.abort(reset(err), network.StreamProtocolViolation)
	}
}

func (x *exchange) trace(kind EventKind, err error) {
	h, s := x.s.host, x.s
	if h.cfg.tracer == nil && !h.log.Core().Enabled(zap.DebugLevel) {
		return
	}
	e := Event{Kind: kind, Time: time.Now(), Peer: s.peer, Stream: s, Initiator: x.initiator, From: x.old.Conn(), Err: err}
	if kind == Started {
		x.started = e.Time
	} else if !x.started.IsZero() {
		e.Took = e.Time.Sub(x.started)
	}
	if kind == ReceiveSwitched || kind == Finished {
		e.Drained = s.recv.brought(x.oldSource) - x.before
	}
	to := zap.Skip()
	if u := x.next(); u != nil {
		e.To = u.Conn()
		to = zap.Stringer("to", e.To.RemoteMultiaddr())
	}
	h.log.Debug("migration "+kind.String(),
		zap.Stringer("peer", s.peer), zap.Uint64("from_label", x.from), zap.Uint64("label", x.id),
		zap.Bool("initiator", x.initiator), zap.Stringer("from", e.From.RemoteMultiaddr()), to, zap.Error(err))
	if h.cfg.tracer != nil {
		h.cfg.tracer(e)
	}
}
