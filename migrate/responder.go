package migrate

import (
	"errors"
	"fmt"

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
// draft.go has what is different with a peer that has only the draft.
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
	if !n.inTime() {
		_ = u.Reset()
		return nil
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
	x := &exchange{id: id, from: from, verified: m.GetFinalSize()}
	if s == nil {
		return h.deny(n, x, "unknown label", from)
	}
	// An attempt of ours gives way only to one that is not denied (M1). Else the peer
	// could answer it, having read the denial, while our reset is on its way: S8.
	if why := h.refuses(s, u, x.verified); why != "" {
		x.s, x.old, x.new = s, s.send.stream(), u
		x.trace(Started, nil)
		return h.deny(n, x, why, from)
	}
	switch err := h.enterResponder(s, x); {
	case errors.Is(err, ErrClosed):
		return h.deny(n, x, "the stream is closed", from)
	case errors.Is(err, errNoProof):
		return h.deny(n, x, err.Error(), from)
	case errors.Is(err, errDropped):
		return later(codeGivenUp, err) // R13
	case err != nil:
		return later(network.StreamNoError, err)
	}
	if x.from != from {
		x.end(stays)
		return later(network.StreamNoError, errors.New("the stream has another label by now"))
	}
	if !x.attach(u) {
		x.end(stays)
		if s.send.resumption.detached() {
			return later(codeGivenUp, errDropped)
		}
		return fmt.Errorf("%w: label %d is alive", errViolation, id)
	}
	x.trace(Started, nil)

	if !x.hold() { // S1
		err = errTold
	} else {
		err = x.canPromise(s)
	}
	if err != nil {
		defer x.end(stays)
		return h.deny(n, x, err.Error(), from)
	}
	if err := x.charge(u); err != nil {
		x.end(stays)
		return later(network.StreamResourceLimitExceeded, err)
	}
	x.answer(n)
	return nil
}

var errTold = errors.New("the stream was reset, or its application told that the connection has failed")

// refuses says why s must not migrate to u, if so.
func (h *Host) refuses(s *Stream, u network.Stream, verified bool) (why string) {
	switch {
	case h.cfg.acceptor != nil && !h.cfg.acceptor(s, u.Conn()):
		return "the acceptor says no"
	case !verified:
		return h.refusesDraft(s)
	}
	return ""
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
func (x *exchange) answer(n *negotiator) {
	u := n.stream
	carry := x.carryVerified
	if !x.verified {
		carry = x.draftCarrier()
	}
	if !x.commit() && x.s.send.resumption != nil { // dropped
		x.giveUp(u, codeGivenUp)
		x.end(stays)
		return
	}
	if whole, err := n.finish(ackMessage(x.verified), x.s.host.cfg.negotiation); !whole {
		// It has not left whole, so the initiator cannot have read it.
		x.trace(Failed, x.unmoved(err))
		x.giveUp(u, network.StreamNoError)
		x.end(stays)
		return
	}
	x.trace(Acked, nil)
	if err := carry(u); err != nil {
		_ = x.fail(err)
	}
}

// carryVerified moves both directions to u once the initiator's final size is there.
func (x *exchange) carryVerified(u network.Stream) error {
	l := x.listen(u)
	final, err := readFinalSize(l)
	l.end()
	if err != nil {
		return fmt.Errorf("final size: %w", l.cause(err))
	}
	if err := x.switchSending(u); err != nil {
		return err
	}
	if err := x.switchReceiving(&source{stream: u}, finalSize(final)); err != nil {
		return err
	}
	x.finish(u)
	return nil
}
