package migrate

import (
	"errors"

	"github.com/libp2p/go-libp2p/core/network"
)

// What only peers need that have the draft alone, without the verified handover: the proof
// that an ack has arrived (S3), and ends of the old stream that cannot be told apart (S5).

// errNoProof is why a draft-only peer is denied whom nobody listens to (S3).
var errNoProof = errors.New("without a final size there is no proof of the ack once reading is closed, or has failed")

// canPromise says whether x, a responder's exchange of s, can be promised the ack.
// A draft-only peer's has to have its proof in sight (S3), and keeps it from here on though
// the application closes its reading.
func (x *exchange) canPromise(s *Stream) error {
	if x.verified || s.recv.awaitProof() {
		return nil
	}
	return errNoProof
}

// refusesDraft says why s must not migrate with a peer that has only the draft, if so.
func (h *Host) refusesDraft(s *Stream) (why string) {
	_, closed := s.recv.view()
	switch {
	case h.cfg.verified:
		return "the handover would not be verified"
	case closed:
		return errNoProof.Error()
	}
	return ""
}

// doubt is called when an attempt of ours has ended by a reset: a draft-only peer may
// take it for a migration (S5).
func (x *exchange) doubt() {
	if !x.verified {
		x.s.recv.distrust()
	}
}

// draftCarrier returns what carries the responder's stream over when the ack has left. It is
// called before the ack leaves: while that is on its way, it may arrive, and the initiator,
// with nothing to send, answer with no more than its EOF.
func (x *exchange) draftCarrier() func(u network.Stream) error {
	ended := x.s.recv.hasEnded()
	return func(u network.Stream) error { return x.carryDraft(u, ended) }
}

// carryDraft moves both directions to u once there is proof that the ack has arrived.
// ended says that the old stream had ended before the ack was sent.
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
	if err := x.switchReceiving(u, 0); err != nil {
		return err
	}
	oldClosed, err := x.switchSending(u)
	if err != nil {
		return err
	}
	x.finish(u, oldClosed)
	return nil
}
