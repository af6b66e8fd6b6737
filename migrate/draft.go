package migrate

import (
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/libp2p/go-libp2p/core/network"

	"github.com/go-portage/portage/internal/aside"
)

// What is needed only with peers that have the draft alone, without the verified handover:
// the proof that an ack has arrived (S3), and ends of the old stream that may be the
// application's or the migration's (S5).

var (
	// errNoProof is why a draft-only peer is denied where the application has closed its
	// reading (S3).
	errNoProof = errors.New("without a final size there is no proof of the ack once reading is closed, or has failed")

	errUnproven     = errors.New("the new connection is closed, and nothing shows that the ack has arrived")
	errUntrustedEnd = errors.New("EOF after a migration whose outcome is unknown")
)

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
	x.memory()
	x.moveScope(u)
	next := &source{stream: u}
	if ended {
		// That EOF does not prove that the ack has arrived; what comes on the new
		// stream does.
		if err := s.recv.prove(next); err != nil {
			return err
		}
	}
	if err := x.switchReceiving(next, untilEOF{}); err != nil {
		return err
	}
	if err := x.switchSending(u); err != nil {
		return err
	}
	x.closeOld()
	x.finish(u)
	return nil
}

// untilEOF is the goal of a handover without a final size.
type untilEOF struct{}

func (untilEOF) left(*source) uint64 { return math.MaxUint64 }

// due: the peer may end the old stream much later than it acks, namely when its application
// has read what we sent. It writes to the new stream then.
func (untilEOF) due(next *source) bool { return next.count > 0 }

func (untilEOF) reached(old *source, given bool) (bool, error) {
	switch {
	case given:
		return true, nil
	case old.end == nil:
		return false, nil
	case old.end != io.EOF:
		return false, old.end
	case aside.IsClosed(old.stream.Conn()):
		return false, errLost // nothing vouches for an EOF from a dead connection
	}
	return true, nil
}

// draftReading is what a receiving half remembers for peers that have only the draft. The
// half's mu guards it.
type draftReading struct {
	proof     bool // S3: the end of cur is read, though the application may close its reading
	untrusted bool // S5: the peer may have acked an attempt on cur
	ownEnd    bool // the application has ended its writing
}

// moved is what is left of it when the half has switched: the rest was about the end of
// the old stream.
func (d draftReading) moved() draftReading { return draftReading{ownEnd: d.ownEnd} }

// judge is what an EOF is worth outside of an exchange (S5).
func (d draftReading) judge(eof error) error {
	if d.untrusted && d.ownEnd {
		return reset(errUntrustedEnd)
	}
	return eof
}

// noteOwnEnd tells the half that the application has ended its writing (S5).
func (h *receiveHalf) noteOwnEnd() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.draft.ownEnd = true
}

// distrust notes that the peer may take an attempt that has failed for a migration (S5).
func (h *receiveHalf) distrust() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.draft.untrusted = true
}

// awaitProof has the end of cur read from here on, whether the application reads or not:
// it proves to a responder that its ack has arrived (S3). It says false where there is no
// such end to come: the application has closed its reading before, or cur has failed
// already, which was kept back during an attempt of ours.
func (h *receiveHalf) awaitProof() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if end := h.cur.end; h.state == receiveFailed || end != nil && end != io.EOF {
		h.dropProof()
		return false
	}
	h.draft.proof = h.draft.proof || !h.closed
	return h.draft.proof
}

// dropProof undoes awaitProof. mu must be held.
func (h *receiveHalf) dropProof() {
	if h.draft.proof && h.closed {
		go h.cur.stream.CloseRead() // which closeRead has left out
	}
	h.draft.proof = false
}

// hasEnded says whether the end of cur was read, and given to the application or kept
// back.
func (h *receiveHalf) hasEnded() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.given || h.cur.end != nil
}

// prove reads what proves that the ack has arrived (S3): the first bytes of next, which are
// kept, or its EOF, but not one from a connection that is closed, which may be none (S12).
func (h *receiveHalf) prove(next *source) error {
	buf := make([]byte, 1<<10)
	n, err := next.stream.Read(buf)
	if n == 0 && err == io.EOF && aside.IsClosed(next.stream.Conn()) {
		return errUnproven
	}
	if err != nil && err != io.EOF {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if n > 0 && h.given {
		return fmt.Errorf("%w: data after the end", errViolation) // S11
	}
	next.count = uint64(n)
	next.got.add(buf[:n])
	return nil
}
