package migrate

import (
	"errors"
	"fmt"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"go.uber.org/zap"

	"github.com/go-portage/portage/pb"
)

// The responder's side of a migration, in the order of events:
//
//	read Migrate, find the stream, decide
//	hold back an end of the old stream (S1), send the ack
//	-- from here on there is no way back (S10) --
//	wait for the proof that the ack arrived (S3): FinalSize on the new stream
//	pause writing, send FinalSize, go on writing on the new stream, close the old
//	one for writing
//	read the old stream up to the initiator's final size, go on reading on the new
//	let go of the old stream
//
// With a peer that has only the draft, the proof is EOF on the old stream, read after
// the ack was sent, or where that had ended before, whatever comes first on the new.
//
// All of it happens on the goroutine on which the swarm delivered the new stream.

// respond answers Migrate, which came on n's stream. Its error is a violation.
func (h *Host) respond(n *negotiator, m *pb.Migrate) error {
	u := n.stream
	p := u.Conn().RemotePeer()
	id, from := m.GetId(), m.GetFrom()
	if err := h.labels.check(p, id); err != nil {
		return err
	}
	if len(n.rest()) > 0 {
		return fmt.Errorf("%w: data before the ack", errViolation) // S2
	}
	if h.cfg.negotiation > 0 {
		if err := u.SetDeadline(time.Time{}); err != nil {
			_ = u.Reset()
			return nil
		}
	}
	later := func(code network.StreamErrorCode, err error) error {
		h.log.Debug("migration refused for now",
			zap.Stringer("peer", p), zap.Uint64("label", from), zap.Error(err))
		_ = u.ResetWithError(code)
		return nil
	}
	s, err := h.labels.find(h.ctx, p, from, h.cfg.labelWait)
	if err != nil {
		return later(network.StreamRateLimited, err)
	}
	x := &exchange{id: id, from: from}
	if s == nil {
		return h.deny(n, x, "unknown label", from)
	}
	// An attempt of ours gives way only to one that is not denied (M1). Else the peer
	// could answer it, having read the denial, while our reset is on its way: S8.
	verified := m.GetFinalSize()
	if why := h.refuses(s, u, verified); why != "" {
		x.s, x.old, x.new = s, s.send.stream(), u
		x.trace(Started, nil)
		return h.deny(n, x, why, from)
	}
	switch err := h.enterResponder(s, x, verified); {
	case errors.Is(err, ErrClosed):
		return h.deny(n, x, "the stream is closed", from)
	case errors.Is(err, errNoProof):
		return h.deny(n, x, err.Error(), from)
	case err != nil:
		return later(network.StreamNoError, err)
	}
	if x.from != from {
		x.fallBack(false)
		return later(network.StreamNoError, errors.New("the stream has another label by now"))
	}
	if !x.attach(u) {
		x.fallBack(false)
		return fmt.Errorf("%w: label %d is alive", errViolation, id)
	}
	x.trace(Started, nil)

	why := ""
	switch {
	case !x.hold(verified): // S1
		why = "the stream was reset, or its application told that the connection has failed"
	case !verified && !s.recv.awaitProof(): // no more, since it waited for its turn
		why = errNoProof.Error()
	}
	if why != "" {
		defer x.fallBack(false)
		return h.deny(n, x, why, from)
	}
	if err := x.charge(u); err != nil {
		x.fallBack(false)
		return later(network.StreamResourceLimitExceeded, err)
	}
	x.answer(n, verified)
	return nil
}

// refuses says why s must not migrate to u, if so.
func (h *Host) refuses(s *Stream, u network.Stream, verified bool) (why string) {
	_, closed := s.recv.view()
	switch {
	case h.cfg.acceptor != nil && !h.cfg.acceptor(s, u.Conn()):
		return "the acceptor says no"
	case !verified && h.cfg.verified:
		return "the handover would not be verified"
	case !verified && closed:
		return errNoProof.Error()
	}
	return ""
}

// enterResponder begins x on s, if an exchange of our own does not go first (M1) and
// the last one ends in time (M2).
func (h *Host) enterResponder(s *Stream, x *exchange, verified bool) error {
	if err := s.beginNext(x, h.ID() < s.peer, verified); err != nil {
		return err
	}
	timer := time.NewTimer(h.cfg.busyWait)
	defer timer.Stop()
	err := ErrClosed
	select {
	case <-x.turn:
	case <-timer.C:
		err = errors.New("the last migration of the stream has not ended")
	case <-h.ctx.Done():
		err = h.ctx.Err()
	}
	if s.stopWaiting(x) {
		return nil
	}
	return err
}

// deny answers that the stream is not to be migrated (M3).
func (h *Host) deny(n *negotiator, x *exchange, why string, from uint64) error {
	u := n.stream
	h.log.Debug("migration denied", zap.Stringer("peer", u.Conn().RemotePeer()),
		zap.Uint64("label", from), zap.String("why", why))
	if whole, _ := n.finish(denyMessage(), h.cfg.negotiation); whole {
		_ = u.Close()
	} else {
		_ = u.Reset()
	}
	if x.s != nil {
		x.trace(Denied, nil)
	}
	return nil
}

// answer sends the ack and carries the stream over. hold was called (S1).
func (x *exchange) answer(n *negotiator, verified bool) {
	s, u := x.s, n.stream
	ended := s.recv.hasEnded()
	x.commit()
	if whole, err := n.finish(ackMessage(verified), s.host.cfg.negotiation); !whole {
		// It has not left whole, so the initiator cannot have read it.
		x.trace(Failed, err)
		_ = u.Reset()
		x.fallBack(false)
		return
	}
	x.trace(Acked, nil)
	var err error
	if verified {
		err = x.carryVerified(u)
	} else {
		err = x.carryDraft(u, ended)
	}
	if err != nil {
		x.trace(Failed, err)
		_ = x.fail(err)
	}
}

// carryVerified moves both directions to u once the initiator's final size is there.
func (x *exchange) carryVerified(u network.Stream) error {
	final, err := readFinalSize(u)
	if err != nil {
		return fmt.Errorf("final size: %w", err)
	}
	oldClosed, err := x.switchSending(u, true)
	if err != nil {
		return err
	}
	if err := x.switchReceiving(u, final, true); err != nil {
		return err
	}
	x.finish(u, oldClosed)
	return nil
}

// carryDraft does the same for an initiator that has only the draft (S3). ended says that
// the old stream had ended before the ack was sent. While the ack leaves, it may arrive,
// and the initiator, with nothing to send, answer with no more than its EOF.
func (x *exchange) carryDraft(u network.Stream, ended bool) error {
	s := x.s
	// Memory for what is read from the old stream is reserved on the new one, since the old
	// one's scope ends with its connection, which may hold data still.
	x.moveScope(u)
	if ended {
		// That EOF does not prove that the ack has arrived; what comes on the new
		// stream does.
		if err := s.recv.firstOfNext(u); err != nil {
			return err
		}
	}
	if err := x.switchReceiving(u, 0, false); err != nil {
		return err
	}
	oldClosed, err := x.switchSending(u, false)
	if err != nil {
		return err
	}
	x.finish(u, oldClosed)
	return nil
}
