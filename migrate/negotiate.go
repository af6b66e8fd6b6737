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
	begin := opening(label, pref)[negotiated:]
	if pref == "" {
		var err error
		if pref, err = h.selectOneOf(ctx, pids, &labelled{Stream: u, before: begin, expect: before}); err != nil {
			return nil, err
		}
		_ = h.Peerstore().AddProtocols(p, pref) // as the plain host: helpful, not critical
		if err := u.SetProtocol(pref); err != nil {
			return nil, err
		}
		s := newStream(h, u, pref, label)
		return s, h.enter(s)
	}
	if err := u.SetProtocol(pref); err != nil {
		return nil, err
	}
	s := newStream(h, u, pref, label)
	s.send.opening = begin
	s.recv.cur.expect = answer(pref)[negotiated:]
	s.opening.begin()
	return s, h.enter(s)
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
func (h *Host) handleStream(u network.Stream) {
	if h.cfg.negotiation > 0 {
		if err := u.SetDeadline(time.Now().Add(h.cfg.negotiation)); err != nil {
			_ = u.Reset()
			return
		}
	}
	// The peer need not wait for our header, but it may. Nearly every one sends everything in
	// one flight; then the header leaves with the answer.
	greets := &greeting{stream: u}
	timer := time.AfterFunc(answerDelay, greets.send)
	defer timer.Stop()

	// Nothing of an ordinary stream may be read ahead, since the application gets
	// the raw stream: the first two tokens are read to the byte.
	first := make([]byte, len(prelude))
	n := len(header) + 1
	if _, err := io.ReadFull(u, first[:n]); err != nil {
		h.refuse(u, err)
		return
	}
	labelled := false
	if string(first[:n]) == prelude[:n] {
		m, err := io.ReadFull(u, first[n:])
		n += m
		if err != nil {
			h.refuse(u, err)
			return
		}
		labelled = string(first) == prelude
	}
	timer.Stop()
	sent, err := greets.claim()
	// An error of it shows when we read, but for a deadline: what it has lost would be
	// missing from the answer for good.
	if err != nil && isDeadline(err, u) {
		h.refuse(u, err)
		return
	}
	if labelled {
		h.handleLabelled(u, prelude[sent:])
		return
	}
	in := &replay{Stream: u, in: first[:n], drop: sent}
	proto, handle, err := h.Mux().Negotiate(in)
	if err == nil {
		err = in.late
	}
	if err != nil {
		h.refuse(u, err)
		return
	}
	if proto == ID { // it was not the opener's first choice
		h.handleLabelled(u, "")
		return
	}
	if h.accept(u, proto) {
		h.observe(u.Conn(), proto, network.DirInbound)
		_ = handle(proto, u)
	}
}

// greeting is the header of an inbound stream that may leave before the peer has spoken.
type greeting struct {
	stream network.Stream
	mu     sync.Mutex // guards all below, and is held while the header is written
	over   bool       // it is sent, or will be by whom claim has told so
	sent   int
	err    error
}

func (g *greeting) send() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.over {
		g.over, g.sent = true, len(header)
		_, g.err = io.WriteString(g.stream, header)
	}
}

// claim returns how many bytes of the header were sent, all or none, and keeps the rest from
// being sent by itself.
func (g *greeting) claim() (sent int, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.over = true
	return g.sent, g.err
}

// refuse ends a stream whose negotiation failed.
func (h *Host) refuse(u network.Stream, err error) {
	h.log.Debug("inbound stream: negotiation failed",
		zap.Stringer("peer", u.Conn().RemotePeer()), zap.Error(err))
	_ = u.ResetWithError(network.StreamProtocolNegotiationFailed)
}

// accept ends the negotiation of u and charges it to proto.
func (h *Host) accept(u network.Stream, proto protocol.ID) bool {
	if h.cfg.negotiation > 0 {
		if err := u.SetDeadline(time.Time{}); err != nil {
			_ = u.Reset()
			return false
		}
	}
	if err := u.SetProtocol(proto); err != nil {
		_ = u.ResetWithError(network.StreamResourceLimitExceeded)
		return false
	}
	return true
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

// handleLabelled serves an inbound stream that speaks ID. owed is what has yet to be
// answered to that.
func (h *Host) handleLabelled(u network.Stream, owed string) {
	n := negotiators.Get().(*negotiator)
	defer n.free()
	n.stream = u
	_, _ = io.WriteString(n, owed)
	m, err := readMessage(n)
	if err != nil && !errors.Is(err, errViolation) {
		h.refuse(u, err)
		return
	}
	switch {
	case err != nil:
	case m.GetLabel() != nil:
		err = h.acceptStream(n, m.GetLabel().GetId())
	case m.GetMigrate() != nil:
		h.observe(u.Conn(), ID, network.DirInbound)
		err = h.respond(n, m.GetMigrate())
	default:
		err = fmt.Errorf("%w: a stream begins with Label or Migrate, not %T", errViolation, m.Type)
	}
	if err != nil {
		h.violation(u, err)
	}
}

// violation ends a stream on which the peer sent what it must not (W4).
func (h *Host) violation(u network.Stream, err error) {
	h.warnViolation(u.Conn().RemotePeer(), err)
	_ = u.ResetWithError(network.StreamProtocolViolation)
}

// acceptStream accepts a new labelled stream, and hands it to the application. Its
// error is a violation.
func (h *Host) acceptStream(n *negotiator, label uint64) error {
	u := n.stream
	p := u.Conn().RemotePeer()
	if err := h.labels.check(p, label); err != nil {
		return err
	}
	if h.labels.alive(p, label) {
		return fmt.Errorf("%w: label %d is alive", errViolation, label)
	}
	proto, handle, err := h.Mux().Negotiate(n)
	if err != nil {
		_ = n.flush() // the refusals so far tell the opener more than a reset
		h.refuse(u, err)
		return nil
	}
	if proto == ID {
		return fmt.Errorf("%w: nested %s", errViolation, ID) // W5
	}
	// The opener may have closed for reading already. But where the answer met the deadline a
	// part of it is missing, and the application's bytes would follow in its place.
	if err := n.flush(); err != nil && isDeadline(err, u) {
		h.refuse(u, err)
		return nil
	}
	if !h.accept(u, proto) {
		return nil
	}
	s := newStream(h, u, proto, label)
	if rest := n.rest(); len(rest) > 0 {
		s.recv.cur.got.add(bytes.Clone(rest))
		s.recv.cur.count = uint64(len(rest))
	}
	counted := s.toServe()
	if !h.labels.add(p, label, s) {
		return fmt.Errorf("%w: label %d is alive", errViolation, label)
	}
	h.observe(u.Conn(), proto, network.DirInbound)
	s.noteGone()
	s.serve(counted, proto, handle)
	return nil
}

// negotiator buffers both directions of an inbound stream while it is negotiated: all
// tokens that came in one flight cost one Read, and their answers one Write. What was
// read too much stays in it.
type negotiator struct {
	stream network.Stream
	in     [negotiationBuffer]byte
	r, w   int // in[r:w] is unread

	mu     sync.Mutex // guards both below, and is held while out is written
	out    []byte
	failed error // of the first Write that failed: what follows would not be understood
}

var negotiators = sync.Pool{New: func() any { return new(negotiator) }}

func (n *negotiator) free() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.stream, n.r, n.w, n.out, n.failed = nil, 0, 0, n.out[:0], nil
	negotiators.Put(n)
}

// answerDelay is how long an answer waits for the next one, to leave with it. Nearly every
// opener sends everything in one flight, and what it sent is here already; one that waits
// for each answer has it this much later.
const answerDelay = 2 * time.Millisecond

// fill makes sure that something is unread. The answers so far leave if it has to wait.
func (n *negotiator) fill() error {
	if n.r < n.w {
		return nil
	}
	if n.owes() {
		timer := time.AfterFunc(answerDelay, func() { _ = n.flush() }) // its error shows when we read
		defer timer.Stop()
	}
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

func (n *negotiator) Write(p []byte) (int, error) {
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
	if len(n.out) > 0 && n.failed == nil {
		_, n.failed = n.stream.Write(n.out)
	}
	n.out = n.out[:0]
	return n.failed
}

func (n *negotiator) owes() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.out) > 0
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
