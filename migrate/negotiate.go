package migrate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	msmux "github.com/multiformats/go-multistream"
	"go.uber.org/zap"

	"github.com/go-portage/portage/pb"
)

// How a stream begins. The opener sends everything in one flight, with the first byte
// of the application (W1):
//
//	multistream, ID, Label, multistream, application's protocol
//
// and the acceptor answers likewise, without the label. Where the opener does not know
// which protocol the acceptor speaks, the part behind the label is an ordinary
// negotiation, with its round trips.

// negotiationBuffer holds all that precedes the application's first byte, for protocol
// IDs of usual length.
const negotiationBuffer = 512

// open negotiates a labelled stream over u, which was just opened. pref is the one of
// pids that the peer is known to speak, or empty.
func (h *Host) open(ctx context.Context, u network.Stream, pref protocol.ID, pids []protocol.ID) (*Stream, error) {
	return h.openBehind(ctx, u, prelude, pref, pids)
}

// openBehind is open where a part of the prelude has been negotiated, and before is left.
func (h *Host) openBehind(ctx context.Context, u network.Stream, before string, pref protocol.ID, pids []protocol.ID) (*Stream, error) {
	p := u.Conn().RemotePeer()
	label := h.labels.fresh(p)
	negotiated := len(prelude) - len(before)
	resumes := h.resumes(u.Conn(), pref, pids)
	begin := openingOf(label, pref, resumes)[negotiated:]
	if pref == "" {
		var err error
		if resumes {
			defer h.resumer.opens(p, label)()
		}
		if pref, err = h.selectOneOf(ctx, pids, &labelled{Stream: u, before: begin, expect: before}); err != nil {
			return nil, err
		}
		_ = h.Peerstore().AddProtocols(p, pref) // as the plain host: helpful, not critical
		if err := u.SetProtocol(pref); err != nil {
			return nil, err
		}
		s := newStream(h, u, pref, label)
		return s, h.enterResumable(s, resumes)
	}
	if err := u.SetProtocol(pref); err != nil {
		return nil, err
	}
	s := newStream(h, u, pref, label)
	s.send.opening = begin
	s.recv.cur.expect = answer(pref)[negotiated:]
	s.opening.begin()
	return s, h.enterResumable(s, resumes)
}

// enter enters a stream that this host opens.
func (h *Host) enter(s *Stream) error {
	s.verifies = h.cfg.verified // without that the stream would have no label
	if !h.labels.add(s.peer, s.label, s) {
		return fmt.Errorf("label %d is taken", s.label) // after 2^63 streams, or by a peer that lies
	}
	s.noteGone()
	return nil
}

// enterResumable is enter where resumes says whether the stream may outlive its connection.
func (h *Host) enterResumable(s *Stream, resumes bool) error {
	if resumes && !h.resumer.add(s) {
		return fmt.Errorf("label %d is taken", s.label)
	}
	err := h.enter(s)
	if r := s.send.resumption; err != nil && r != nil {
		r.end()
	}
	return err
}

// labelled puts the opening before what is written, and takes the answer to it from
// before what is read.
type labelled struct {
	network.Stream
	mu     sync.Mutex // guards before: the negotiation reads and writes at once
	before []byte
	expect string
	err    error // the answer was another
}

func (l *labelled) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	before := len(l.before)
	n, err := l.Stream.Write(append(l.before, p...))
	l.before = nil
	return max(0, n-before), err
}

func (l *labelled) Read(p []byte) (int, error) {
	if l.expect != "" {
		err := readExpected(l.Stream, l.expect, 0)
		if l.expect = ""; err != nil {
			// Wrapped, since an answer that lacks ID says nothing of the protocol that
			// is negotiated behind it; and for good, since nothing more will come: the
			// negotiation reads on.
			l.err = fmt.Errorf("%s: %w", ID, err)
		}
	}
	if l.err != nil {
		return 0, l.err
	}
	return l.Stream.Read(p)
}

// handleStream is the network's stream handler. It negotiates as the host's own would,
// byte for byte, for all streams but those that speak ID.
//
// What the resource manager does goes deep. So it is called from here, where little of the
// stack is in use: else it would have to grow for nearly every stream, which costs as much
// as a twentieth of opening one.
func (h *Host) handleStream(u network.Stream) {
	n := h.negotiator(u)
	in, ok := h.hear(n)
	switch {
	case !ok:
		n.free()
	case in.migrate != nil:
		defer n.free()
		h.observe(u.Conn(), ID, network.DirInbound)
		respond := h.respond
		if in.migrate.Resume != nil {
			respond = h.answerResume
		}
		if err := respond(n, in.migrate); err != nil {
			h.violation(u, err)
		}
	default:
		rest, inTime := bytes.Clone(n.rest()), n.inTime()
		n.free()
		if !inTime {
			_ = u.Reset()
			return
		}
		if err := u.SetProtocol(in.proto); err != nil { // and charge it to that
			_ = u.ResetWithError(network.StreamResourceLimitExceeded)
			return
		}
		if !in.labelled {
			h.observe(u.Conn(), in.proto, network.DirInbound)
			_ = in.handle(in.proto, u)
			return
		}
		s := newStream(h, u, in.proto, in.label)
		if a := h.admit(s, rest, in.resumes); a != nil {
			s.serve(a, in.handle)
		}
	}
}

// inbound is what the peer wants of a stream that it has opened: Migrate, or one of the
// application's protocols, with a label or without.
type inbound struct {
	migrate  *pb.Migrate
	labelled bool
	label    uint64
	resumes  bool // the stream may outlive its connection
	proto    protocol.ID
	handle   msmux.HandlerFunc[protocol.ID]
}

// hear finds out what the peer wants. It says false where the stream was reset.
func (h *Host) hear(n *negotiator) (in inbound, ok bool) {
	u := n.stream
	if err := n.begin(); err != nil {
		_ = u.Reset()
		return in, false
	}
	// The peer need not wait for our header, but it may. Nearly every one sends everything in
	// one flight; then the header leaves with the answer.
	_, _ = io.WriteString(n, header)
	n.soon()

	// Nothing of an ordinary stream may be read ahead, since the application gets
	// the raw stream: the first two tokens are read to the byte.
	first := n.in[:len(prelude)]
	begun := len(header) + 1
	if _, err := io.ReadFull(u, first[:begun]); err != nil {
		h.refuse(u, err)
		return in, false
	}
	if string(first[:begun]) == prelude[:begun] {
		m, err := io.ReadFull(u, first[begun:])
		begun += m
		if err != nil {
			h.refuse(u, err)
			return in, false
		}
		in.labelled = string(first) == prelude
	}
	if !in.labelled {
		sent, err := n.claim()
		replay := &replay{Stream: u, in: first[:begun], drop: sent}
		if err == nil {
			in.proto, in.handle, err = h.Mux().Negotiate(replay)
		}
		if err == nil {
			err = replay.late
		}
		if err != nil {
			h.refuse(u, err)
			return in, false
		}
		if in.labelled = in.proto == ID; !in.labelled {
			return in, true
		}
		// It was not the opener's first choice.
	} else {
		_, _ = io.WriteString(n, prelude[len(header):])
	}
	err := h.hearLabelled(n, &in)
	switch {
	case errors.Is(err, errViolation):
		h.violation(u, err)
	case err != nil:
		h.refuse(u, err)
	}
	return in, err == nil
}

// hearLabelled is hear where the stream speaks ID.
func (h *Host) hearLabelled(n *negotiator, in *inbound) error {
	body, err := readBody(n, n.body[:])
	if err != nil {
		return err
	}
	if label, ok := parseNumber(fieldLabel, body); ok {
		in.label = label
	} else {
		m, err := parseMessage(body)
		switch {
		case err != nil:
			return err
		case m.GetMigrate() != nil:
			in.migrate = m.GetMigrate()
			n.settle()
			return nil
		case m.GetLabel() == nil:
			return fmt.Errorf("%w: a stream begins with Label or Migrate, not %T", errViolation, m.Type)
		}
		in.label, in.resumes = m.GetLabel().GetId(), h.resumer != nil && m.GetLabel().GetResumes()
	}
	p := n.stream.Conn().RemotePeer()
	if err := h.labels.check(p, in.label); err != nil {
		return err
	}
	if h.labels.alive(p, in.label) {
		return fmt.Errorf("%w: label %d is alive", errViolation, in.label)
	}
	if in.resumes && h.labels.hasEnded(p, in.label) {
		return errors.New("the stream was denied before it came")
	}
	in.proto, in.handle, err = h.Mux().Negotiate(n)
	if err != nil {
		_ = n.flush() // the refusals so far tell the opener more than a reset
		return err
	}
	if in.proto == ID {
		return fmt.Errorf("%w: nested %s", errViolation, ID) // W5
	}
	// The opener may have closed for reading already. But where the answer met the deadline a
	// part of it is missing, and the application's bytes would follow in its place.
	if err := n.flush(); err != nil && isDeadline(err, n.stream) {
		return err
	}
	return nil
}

// refuse ends a stream whose negotiation failed.
func (h *Host) refuse(u network.Stream, err error) {
	h.log.Debug("inbound stream: negotiation failed",
		zap.Stringer("peer", u.Conn().RemotePeer()), zap.Error(err))
	_ = u.ResetWithError(network.StreamProtocolNegotiationFailed)
}

// replay gives again what was read already, and drops what was written already.
type replay struct {
	network.Stream
	in   []byte
	drop int
	late error // a Write met the deadline: a part of the answer is missing
}

func (r *replay) Read(p []byte) (int, error) {
	if len(r.in) > 0 {
		n := copy(p, r.in)
		r.in = r.in[n:]
		return n, nil
	}
	return r.Stream.Read(p)
}

func (r *replay) Write(p []byte) (int, error) {
	k := min(r.drop, len(p))
	r.drop -= k
	if k == len(p) {
		return k, nil
	}
	n, err := r.Stream.Write(p[k:])
	if err != nil && isDeadline(err, r.Stream) {
		r.late = err
	}
	return k + n, err
}

// violation ends a stream on which the peer sent what it must not (W4).
func (h *Host) violation(u network.Stream, err error) {
	h.warnViolation(u.Conn().RemotePeer(), err)
	_ = u.ResetWithError(network.StreamProtocolViolation)
}

// admit enters a labelled stream that was accepted. rest is what has come of its data
// already. It returns what toServe does, or nil where it has reset the stream.
func (h *Host) admit(s *Stream, rest []byte, resumes bool) *accepting {
	if len(rest) > 0 {
		s.recv.cur.got.add(rest)
		s.recv.cur.count = uint64(len(rest))
	}
	a := s.toServe()
	u := s.send.stream()
	if resumes && !h.resumer.add(s) || !h.labels.add(s.peer, s.label, s) {
		if r := s.send.resumption; r != nil {
			r.end()
		}
		h.violation(u, fmt.Errorf("%w: label %d is alive", errViolation, s.label))
		return nil
	}
	if s.recv.resumption != nil && len(rest) > 0 {
		s.recv.mu.Lock()
		s.recv.progressed()
		s.recv.mu.Unlock()
	}
	h.observe(u.Conn(), s.proto, network.DirInbound)
	s.noteGone()
	return a
}

// negotiator buffers both directions of an inbound stream while it is negotiated: all
// tokens that came in one flight cost one Read, and their answers one Write. What was
// read too much stays in it.
type negotiator struct {
	host   *Host
	stream network.Stream
	in     [negotiationBuffer]byte
	r, w   int // in[r:w] is unread
	body   [usualMessage]byte
	limit  *time.Timer // calls out who reads, if the negotiation takes too long; nil: without a limit

	mu     longLock // guards all below, and is held while out is written
	out    []byte
	failed error       // of the first Write that failed: what follows would not be understood
	timer  *time.Timer // flushes
	armed  bool        // timer will
}

// negotiator returns one for u, until free.
func (h *Host) negotiator(u network.Stream) *negotiator {
	n, _ := h.negotiators.Get().(*negotiator)
	if n == nil {
		n = &negotiator{host: h, mu: make(longLock, 1)}
	}
	n.stream = u
	return n
}

// begin has the negotiation end in time. Reads get no deadline before it is due: on yamux
// one cannot be lifted once the opener has ended its writing, and would end the application's.
func (n *negotiator) begin() error {
	u, limit := n.stream, n.host.cfg.negotiation
	if limit <= 0 {
		return nil
	}
	n.limit = time.AfterFunc(limit, func() { _ = u.SetReadDeadline(past) })
	return u.SetWriteDeadline(time.Now().Add(limit))
}

// inTime ends the negotiation, and says whether that is in time.
func (n *negotiator) inTime() bool {
	return n.limit == nil || n.limit.Stop() && n.stream.SetWriteDeadline(time.Time{}) == nil
}

// free returns n. The timer may be flushing at this moment: whoever has n next, its answers
// leave one by one then.
func (n *negotiator) free() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.disarm()
	if n.limit != nil {
		n.limit.Stop()
	}
	n.stream, n.limit, n.r, n.w, n.out, n.failed = nil, nil, 0, 0, n.out[:0], nil
	n.host.negotiators.Put(n)
}

// answerDelay is how long an answer waits for the next one, to leave with it. Nearly every
// opener sends everything in one flight, and what it sent is here already; one that waits
// for each answer has it this much later.
const answerDelay = 2 * time.Millisecond

// soon has the answers so far leave if the next one does not come in time.
func (n *negotiator) soon() {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case n.armed || len(n.out) == 0:
		return
	case n.timer == nil:
		n.timer = time.AfterFunc(answerDelay, func() { _ = n.flush() }) // its error shows when we read
	default:
		n.timer.Reset(answerDelay)
	}
	n.armed = true
}

// settle keeps the answers so far until the next one, however long that takes.
func (n *negotiator) settle() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.disarm()
}

// disarm undoes soon. mu must be held.
func (n *negotiator) disarm() {
	if n.armed {
		n.timer.Stop()
		n.armed = false
	}
}

// claim takes back what has not left. It returns how many bytes have, all or none, of a
// header. The error is a deadline's: what that has kept from leaving would be missing from
// the answer for good. Any other shows when we read.
func (n *negotiator) claim() (sent int, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.failed != nil && isDeadline(n.failed, n.stream) {
		return 0, n.failed
	}
	sent = len(header) - len(n.out)
	n.out, n.failed = n.out[:0], nil
	return sent, nil
}

// fill makes sure that something is unread. The answers so far leave if it has to wait.
func (n *negotiator) fill() error {
	if n.r < n.w {
		return nil
	}
	n.soon()
	m, err := n.stream.Read(n.in[:])
	n.r, n.w = 0, m
	if m > 0 {
		return nil
	}
	return err
}

func (n *negotiator) Read(p []byte) (int, error) {
	if err := n.fill(); err != nil {
		return 0, err
	}
	m := copy(p, n.in[n.r:n.w])
	n.r += m
	return m, nil
}

func (n *negotiator) ReadByte() (byte, error) {
	for n.r == n.w {
		if err := n.fill(); err != nil {
			return 0, err
		}
	}
	n.r++
	return n.in[n.r-1], nil
}

func (n *negotiator) Write(p []byte) (int, error) { return put(n, p) }

func put[T string | []byte](n *negotiator, p T) (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	// A peer that proposes one unknown protocol after the other is answered as often, and
	// as long as it does not stop fill has no reason to wait.
	if len(n.out)+len(p) > negotiationBuffer {
		if err := n.flushLocked(); err != nil {
			return 0, err
		}
	}
	n.out = append(n.out, p...)
	return len(p), nil
}

// WriteString implements io.StringWriter.
func (n *negotiator) WriteString(s string) (int, error) { return put(n, s) }

// Close implements io.Closer for the negotiation, which closes what it refuses; the
// stream is reset instead.
func (n *negotiator) Close() error { return nil }

func (n *negotiator) flush() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.flushLocked()
}

// flushLocked is flush. mu must be held.
func (n *negotiator) flushLocked() error {
	n.disarm()
	if len(n.out) > 0 && n.failed == nil {
		_, n.failed = n.stream.Write(n.out)
	}
	n.out = n.out[:0]
	return n.failed
}

// finish sends the answers and m. It says whether they left whole. A peer that does not
// take them holds the stream, which is none of the application's yet, for no longer than
// timeout; zero: no bound.
func (n *negotiator) finish(m *pb.StreamMigration, timeout time.Duration) (whole bool, err error) {
	if timeout > 0 {
		_ = n.stream.SetWriteDeadline(time.Now().Add(timeout))
		defer func() { _ = n.stream.SetWriteDeadline(time.Time{}) }()
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.disarm()
	if n.failed != nil {
		return false, n.failed
	}
	n.out = appendMessage(n.out, m)
	sent, err := n.stream.Write(n.out)
	whole = sent == len(n.out)
	n.out = n.out[:0]
	return whole, err
}

// rest is what was read too much. It is valid until free.
func (n *negotiator) rest() []byte { return n.in[n.r:n.w] }
