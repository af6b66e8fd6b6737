package migrate

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"go.uber.org/zap"
)

// exchange is one migration of one stream, on either side. initiator.go and
// responder.go tell what happens in which order; here is what both sides share.
type exchange struct {
	s         *Stream
	initiator bool
	old       network.Stream
	from, id  uint64        // the label before, and after; id is set before begin, and a responder's from
	done      chan struct{} // closed when another exchange may begin
	turn      chan struct{} // responder that waits: closed when it has begun, or never will
	promised  bool          // responder that waits: an attempt of ours gave way to it (M1)

	// Guarded by s.mu.
	new     network.Stream // nil until it is open
	entered bool           // id is in the table of labels
	acked   bool           // there is no way back (S10)
	drop    bool           // the peer's exchange goes first (M1)
	stop    func()         // ends the opening of new; nil until that begins

	unpaid bool // new is not charged to the application's protocol yet; guarded by s.mu
}

// maxUnpaid is how many streams of one peer may be without a place under the limit of their
// protocol, because their old streams have it still. They stand among the streams that have
// not been negotiated, of which a host has 128 by default for all of its peers: a peer that
// never finishes must not take them from the others (M4).
const maxUnpaid = 16

// begin enters x as the stream's exchange, or returns the one that is under way.
func (s *Stream) begin(x *exchange) (busy *exchange, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.dead():
		return nil, ErrClosed
	case s.ex != nil:
		return s.ex, nil
	}
	s.enter(x)
	return nil, nil
}

// dead says whether the stream is not to move any more: it was closed or reset, or the
// application was told that its connection has failed (S8). mu must be held.
func (s *Stream) dead() bool { return s.over || s.lost || s.told() }

func (s *Stream) told() bool { return s.send.hasLost() || s.recv.hasFailed() }

// enter makes x the stream's exchange. mu must be held, and no other be under way.
func (s *Stream) enter(x *exchange) {
	if s.id == "" {
		s.id = s.send.stream().ID()
	}
	x.s, x.old, x.from, x.done = s, s.send.stream(), s.label, make(chan struct{})
	s.ex = x
}

// beginNext enters a responder's exchange, or has it begin as soon as that which is under
// way ends: no exchange of our own comes between, so that one that is dropped (M1) and
// tried again at once cannot keep the peer waiting for ever. An attempt of ours that is
// under way is dropped. With oursFirst it goes first instead, as soon as it has a stream
// to ask on: until then the peer does not know of it. x has begun when it is the stream's
// exchange after x.turn was closed.
//
// Once ours has given way x owes the ack (M1): else the peer, having read a denial, could
// answer ours while its reset is on its way. So a draft-only peer's x has to have its proof
// (S3) in sight before that, and keeps it though the application closes its reading.
//
// Only migrations of the same label meet. A peer that names another one can have that from
// our Migrate only: it has acked ours, and x overtook the ack. A draft-only peer, which needs
// no FinalSize, may have moved by then. Were ours dropped, the stream would be lost although
// nothing had failed (S8); x waits for it instead (M2).
func (s *Stream) beginNext(x *exchange, oursFirst, verified bool) error {
	s.mu.Lock()
	s.verifies = s.verifies || verified
	x.turn = make(chan struct{})
	ours := s.ex
	switch {
	case s.dead():
		s.mu.Unlock()
		return ErrClosed
	case ours == nil:
		s.enter(x)
		close(x.turn)
		s.mu.Unlock()
		return nil
	}
	var dropped network.Stream
	if ours.initiator && !ours.acked && ours.from == x.from {
		dropped = ours.new
		if dropped != nil && oursFirst {
			s.mu.Unlock()
			return errOursFirst
		}
		if dropped != nil && !verified && !s.recv.awaitProof() {
			s.mu.Unlock()
			return errNoProof
		}
		ours.drop = true
		ours.interrupt()
		x.promised = dropped != nil
	}
	s.waiting = append(s.waiting, x)
	s.mu.Unlock()
	if dropped != nil {
		_ = breakOff(dropped, network.StreamNoError)
	}
	return nil
}

var (
	errOursFirst = errors.New("our own migration of the stream goes first")

	// errNoProof is why a draft-only peer is denied whom nobody listens to (S3).
	errNoProof = errors.New("without a final size there is no proof of the ack once reading is closed, or has failed")
)

// giveTurn lets the next responder that waits begin. Where the stream is over, only one
// does that was promised it, and none after a reset: closing the stream in between does
// not abort what the peer takes for agreed (S7). mu must be held.
func (s *Stream) giveTurn() {
	if len(s.waiting) > 0 && !s.told() && (!s.over || s.waiting[0].promised && !s.aborted) {
		x := s.waiting[0]
		s.waiting = s.waiting[1:]
		s.enter(x)
		close(x.turn)
		return
	}
	for _, x := range s.waiting {
		close(x.turn)
	}
	s.waiting = nil
}

// stopWaiting takes x out of those that wait. It says whether x has begun instead.
func (s *Stream) stopWaiting(x *exchange) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waiting = slices.DeleteFunc(s.waiting, func(w *exchange) bool { return w == x })
	if len(s.waiting) == 0 {
		s.waiting = nil
	}
	return s.ex == x
}

// attach tells which stream the exchange moves to, and enters its label. It says false
// where the label is alive (L2), or the exchange was superseded meanwhile.
func (x *exchange) attach(u network.Stream) bool {
	entered := x.s.host.labels.add(x.s.peer, x.id, x.s)
	x.s.mu.Lock()
	defer x.s.mu.Unlock()
	x.new, x.entered = u, entered
	return entered && !x.drop
}

// opening is the context for opening the stream to move to. A connection may have no room
// for it for a long time; whoever closes or resets the logical stream, or takes precedence
// (M1), does not wait for that.
func (x *exchange) opening(ctx context.Context) context.Context {
	x.s.mu.Lock()
	defer x.s.mu.Unlock()
	ctx, x.stop = context.WithCancel(ctx)
	if x.drop || x.s.over {
		x.stop()
	}
	return ctx
}

// interrupt ends the opening. It does nothing later on (S7, S10). s.mu must be held.
func (x *exchange) interrupt() {
	if x.stop != nil {
		x.stop()
	}
}

func (x *exchange) next() network.Stream {
	x.s.mu.Lock()
	defer x.s.mu.Unlock()
	return x.new
}

// commit passes the point of no return, unless the exchange was dropped (M1).
func (x *exchange) commit() bool {
	x.s.mu.Lock()
	defer x.s.mu.Unlock()
	x.acked = !x.drop
	return x.acked
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
	s.ex = nil
	gone, remove := x.id, x.entered
	if how == moved {
		gone = x.from
		s.label = x.id
		s.migrations++
		if x.unpaid {
			s.scopeLocked().unpaid = x.new // until payLate
		} else if s.scope != nil && s.scope.own == nil {
			s.scope.unpaid = nil
		}
	}
	s.giveTurn()
	if how == stays && s.ex == nil {
		s.send.hold(false)
		s.recv.release()
	}
	over, aborted := s.over && s.ex == nil, s.aborted
	s.mu.Unlock()
	if remove {
		s.host.labels.remove(s.peer, gone, s)
	}
	if over {
		if !aborted { // else a reset is on its way, which a FIN must not overtake
			_ = s.closeHalves()
			_ = s.send.stream().Close()
		}
		s.forget()
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
func (x *exchange) hold(verifies bool) bool {
	x.s.recv.hold()
	x.s.send.hold(verifies)
	return !x.s.told()
}

// fallBack ends an exchange that was not acked: the stream stays where it was (S9).
// untrusted says that the peer may think otherwise (S5).
func (x *exchange) fallBack(untrusted bool) {
	if untrusted {
		x.s.recv.distrust()
	}
	x.end(stays)
}

// fail ends an exchange that was acked: both streams are reset (S8). It returns what the
// application sees, a network.ErrReset.
func (x *exchange) fail(cause error) error {
	if errors.Is(cause, errViolation) {
		x.s.host.log.Warn("peer broke the stream-migration protocol",
			zap.Stringer("peer", x.s.peer), zap.Uint64("label", x.from), zap.Error(cause))
	}
	err := reset(cause)
	_ = x.s.abort(err, codeFor(cause))
	x.end(broken)
	return err
}

// charge charges the new stream to the application's protocol. Where that is at its
// limit, because the old stream counts, too, the new one waits among those that have
// not been negotiated until the old one is gone; unless too many of the peer do.
func (x *exchange) charge(u network.Stream) error {
	if own, err := x.chargeOwn(u); own {
		x.s.host.oweIfUnpaid(x.s)
		return err
	}
	err := u.SetProtocol(x.s.proto)
	if err == nil {
		return nil
	}
	h := x.s.host
	h.charging.Lock()
	defer h.charging.Unlock()
	unpaid := make(map[any]bool)
	for _, s := range h.labels.all(x.s.peer) {
		s.mu.Lock()
		if s.scope != nil && s.scope.unpaid != nil {
			unpaid[s.scope.unpaid] = true
		}
		if s.ex != nil && s.ex.unpaid {
			unpaid[s.ex.new] = true
		}
		s.mu.Unlock()
	}
	if n := len(unpaid); n >= maxUnpaid {
		return fmt.Errorf("the limit of %s has no room, and %d streams wait for it: %w", x.s.proto, n, err)
	}
	x.s.mu.Lock()
	x.unpaid = true
	x.s.mu.Unlock()
	return nil
}

// moveScope moves what the application has reserved to the new stream.
func (x *exchange) moveScope(u network.Stream) {
	x.s.mu.Lock()
	sc, unpaid := x.s.scopeLocked(), x.unpaid
	own := sc.own != nil
	x.s.mu.Unlock()
	if own {
		return
	}
	if err := sc.follow(u.Scope(), !unpaid); err != nil {
		x.s.warnUnaccounted(err)
	}
}

// payLate charges streams that wait for a place under the limit of their protocol, now
// that an old stream is gone. Whose that was does not matter: a place that becomes free
// may go to a stream that begins to migrate, and the next one is for who has waited.
func (x *exchange) payLate() {
	x.s.host.oweIfUnpaid(x.s)
	x.s.host.payOwed()
}

// oweIfUnpaid has s charged by payOwed.
func (h *Host) oweIfUnpaid(s *Stream) {
	s.mu.Lock()
	unpaid := s.scope != nil && s.scope.unpaid != nil
	s.mu.Unlock()
	if !unpaid {
		return
	}
	h.charging.Lock()
	defer h.charging.Unlock()
	if h.owing == nil {
		h.owing = make(map[peer.ID]struct{})
	}
	h.owing[s.peer] = struct{}{}
	h.owes.Store(true)
}

// payOwed is called when a stream has ended, or an old one is gone.
func (h *Host) payOwed() {
	if !h.owes.Load() {
		return
	}
	h.charging.Lock()
	defer h.charging.Unlock()
	for p := range h.owing {
		if h.payAll(p) {
			delete(h.owing, p)
		}
	}
	h.owes.Store(len(h.owing) > 0)
}

// payAll charges those streams of p that there is room for, and says whether it was for
// all that wait. charging must be held.
func (h *Host) payAll(p peer.ID) bool {
	all := true
	for _, s := range h.labels.all(p) {
		if !s.pay() {
			all = false
		}
	}
	return all
}

// pay charges the stream to its protocol, if it is not charged yet and there is room. It
// says false where there is none.
func (s *Stream) pay() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	sc := s.scope
	if sc == nil || sc.unpaid == nil {
		return true
	}
	var cur network.StreamScope = sc.own
	if u, ok := sc.unpaid.(network.Stream); ok {
		if u.Conn().IsClosed() { // a scope that has ended may not be charged
			return true
		}
		cur = u.Scope()
	}
	if sc.unpaid.SetProtocol(s.proto) != nil {
		return false
	}
	sc.unpaid = nil
	if err := sc.attached(cur); err != nil {
		s.warnUnaccounted(err)
	}
	return true
}

func (s *Stream) warnUnaccounted(err error) {
	s.host.log.Warn("resource manager refused a part of what a migrated stream holds; the stream goes on",
		zap.Stringer("peer", s.peer), zap.String("protocol", string(s.proto)), zap.Error(err))
}

// budget is what the receive half reserves its buffers in.
func (x *exchange) budget() *span {
	x.s.mu.Lock()
	defer x.s.mu.Unlock()
	return &span{parent: x.s.scopeLocked()}
}

// switchSending lets Writes go to u, the new stream, behind the final size where the
// handover is verified (S2, S3, S12), and closes the old one for writing. The channel
// is closed when that is done, which can take long on a dead path.
func (x *exchange) switchSending(u network.Stream, verified bool) (<-chan struct{}, error) {
	s := x.s
	written, err := s.send.pause()
	if err != nil {
		return nil, err
	}
	if verified {
		if err := writeMessage(u, finalSizeMessage(written)); err != nil {
			return nil, fmt.Errorf("final size: %w", err)
		}
	}
	x.moveScope(u)
	closed, err := s.send.resume(u)
	if err != nil {
		return nil, err
	}
	x.trace(SendSwitched, nil)
	oldClosed := make(chan struct{})
	go func() {
		defer close(oldClosed)
		_ = x.old.CloseWrite()
	}()
	if closed {
		_ = u.CloseWrite() // S6
	}
	return oldClosed, nil
}

// switchReceiving waits until everything has been read from the old stream, and lets
// Reads go to u, the new one (S4).
func (x *exchange) switchReceiving(u network.Stream, final uint64, verified bool) error {
	s := x.s
	s.recv.handover(u, final, verified, x.budget())
	hold := s.host.cfg.stall
	if sharesWindow(u.Conn()) {
		hold = maxHold
	}
	w := watch{x: x}
	defer w.end()
	if err := s.recv.await(s.host.cfg.stall, hold, w.look); err != nil {
		return err
	}
	x.trace(ReceiveSwitched, nil)
	return nil
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
func (x *exchange) finish(u network.Stream, oldClosed <-chan struct{}) {
	s := x.s
	// Calls out a Read that is still inside, see receive.go. The deadline is for
	// WebTransport, where CloseRead does not while the session ends; nothing is left
	// that it could destroy.
	_ = x.old.CloseRead()
	_ = x.old.SetReadDeadline(past)
	eof, closed := s.recv.view()
	if closed {
		_ = u.CloseRead() // S6
	}
	x.end(moved)
	<-oldClosed
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
		x.s.host.log.Warn("peer broke the stream-migration protocol",
			zap.Stringer("peer", x.s.peer), zap.Uint64("label", x.id), zap.Error(err))
		_ = x.s.abort(reset(err), network.StreamProtocolViolation)
	}
}

func (x *exchange) trace(kind EventKind, err error) {
	h, s := x.s.host, x.s
	if h.cfg.tracer == nil && !h.log.Core().Enabled(zap.DebugLevel) {
		return
	}
	e := Event{Kind: kind, Time: time.Now(), Peer: s.peer, Stream: s, Initiator: x.initiator, From: x.old.Conn(), Err: err}
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

// perConnection are the protocols of libp2p itself that speak about the connection they
// run on. Their streams must not move.
var perConnection = map[protocol.ID]bool{
	"/ipfs/id/1.0.0":                   true,
	"/ipfs/id/push/1.0.0":              true,
	"/libp2p/circuit/relay/0.2.0/hop":  true,
	"/libp2p/circuit/relay/0.2.0/stop": true,
	"/libp2p/dcutr":                    true,
	"/libp2p/autonat/1.0.0":            true,
	"/libp2p/autonat/2/dial-request":   true,
	"/libp2p/autonat/2/dial-back":      true,
	ID:                                 true,
	FinalSizeID:                        true,
}
