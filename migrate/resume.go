package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-yamux/v5"
	"github.com/quic-go/quic-go"

	"go.uber.org/zap"

	"github.com/go-portage/portage/internal/aside"
)

// A stream that outlives its connection. Where it stands is its resumeState:
//
//	          lose                 begin (attempt.go)
//	attached ------> lost --------------------------> asking
//	   ^              | ^                               |
//	   |       answer | | failed, stale                 | failed, stale: lost
//	   |              v |                               | ack: attached
//	   +---------- answering <-- answer ----------------+
//	     attach
//
// and from everywhere to over, which is final. Nothing of an underlying stream that came
// before the present one is ever read or written again: lose disowns it.
//
// While a stream is not attached no migration of it is under way: lose drops the one that is,
// and who attaches waits until it has ended.

type resumeState uint8

const (
	resumeAttached  resumeState = iota // both halves are on an underlying stream
	resumeLost                         // they are on none; see attempt.go for what comes next
	resumeAsking                       // an attempt of ours is open
	resumeAnswering                    // one of the peer's has been promised, and is about to be acked
	resumeOver                         // nothing is left of it: closed and confirmed, reset, denied, or too late
)

var (
	errDropped      = errors.New("the stream has lost its connection, and is to be resumed")
	errTooLate      = errors.New("the connection was lost, and no other was found in time")
	errGone         = errors.New("the connection was lost, and the other end has given the stream up")
	errCrowded      = errors.New("the stream was closed, its connection lost, and too much waits to be delivered to that peer")
	errDroppedBytes = errors.New("the connection was lost, and what has to be sent again is not kept any more")
)

// codeGivenUp is what an underlying stream is reset with whose logical stream lives on.
const codeGivenUp = network.StreamSupplanted

// resumption is what a stream has in addition that may outlive its connection.
type resumption struct {
	s      *Stream
	of     *resumePeer
	origin uint64 // the label that the stream was opened with

	ring     ring     // guarded by s.send.mu
	incoming incoming // guarded by s.recv.mu

	// Guarded by s.mu.
	state    resumeState
	promised uint64   // the highest epoch that was promised: ours, or the peer's
	heard    uint64   // the highest that was heard of
	waits    *waiting // of one that is on no underlying stream, or was closed; else nil
}

// waiting is what a stream has, beside that, which waits for an attempt or a confirmation.
type waiting struct {
	since time.Time   // the loss, the Close, or the last confirmation
	timer *time.Timer // of the patience, which begins then

	// Of one that was lost.
	away      network.Conn   // the connection
	tries     uint32         // how many attempts have failed
	notBefore time.Time      // of resumeLost: when to attempt, at the earliest
	attempt   network.Stream // of resumeAsking, once it is open
	asked     uint64         // the label of the last attempt, either end's; 0: none. It is in the table
}

// incoming is what a resumable stream has received.
type incoming struct {
	base     uint64 // the offset of the first byte of the present underlying stream
	reported uint64 // what the peer has been told last
	total    uint64 // where the peer's writing ends, if told
	told     bool
	pending  bool // more has been received than reported, and the peer is about to be told
	urgent   bool // at once
	over     bool // the end of the present source is the application's, whatever it is
}

// received is how much of the stream was received: R2's N. mu must be held.
func (h *receiveHalf) received() uint64 {
	switch {
	case h.closed:
		return everything
	case h.given:
		return h.resumption.incoming.base + h.cur.count + 1
	}
	return h.resumption.incoming.base + h.cur.count
}

// progressed notes that something was received; the peer is told of it soon, or at once where
// it was much. mu must be held.
func (h *receiveHalf) progressed() {
	r := h.resumption
	in := &r.incoming
	if h.received() <= in.reported {
		return
	}
	urgent := in.base+h.cur.count >= in.reported+r.of.every ||
		h.closed && !carriesCodes(h.cur.stream) // there it looks like a loss (losing)
	if in.pending && (in.urgent || !urgent) {
		return
	}
	in.pending, in.urgent = true, urgent
	r.of.report(r, urgent)
}

// lose takes the stream off its connection (R1) if it is on u still.
func (r *resumption) lose(u network.Stream, cause error) {
	s := r.s
	s.mu.Lock()
	on := u == nil || s.send.stream() == u || s.recv.source().stream == u ||
		s.ex != nil && (s.ex.old == u || s.ex.new == u)
	lost := r.state == resumeAttached && on
	unsent := lost && s.send.opens()
	if lost && !unsent {
		event := r.loseLocked(cause)
		s.mu.Unlock()
		r.trace(event)
		r.of.wake()
		return
	}
	s.mu.Unlock()
	if unsent { // the acceptor knows nothing of it
		_ = s.abort(forGood(cause), network.StreamNoError)
	}
}

// shared says whether the other end is known to have the stream: an acceptor has told that by its
// answer to the opening, or by what it has received since.
func (r *resumption) shared() bool {
	if r.s.dir == network.DirInbound || !r.s.recv.owesAnswer() {
		return true
	}
	r.s.send.mu.Lock()
	defer r.s.send.mu.Unlock()
	return r.ring.confirmed > 0
}

// trace reports a step of the resumption. s.mu must not be held.
func (r *resumption) trace(e Event) {
	if tracer := r.s.host.cfg.tracer; tracer != nil {
		e.Time, e.Peer, e.Stream = time.Now(), r.s.peer, r.s
		tracer(e)
	}
}

// loseLocked is lose where the stream is attached. It returns what is to be traced. s.mu must be held.
func (r *resumption) loseLocked(cause error) Event {
	s := r.s
	r.state = resumeLost
	now := time.Now()
	w := r.arm(now)
	w.away, w.tries, w.notBefore = s.send.stream().Conn(), 0, now
	if s.dir == network.DirInbound {
		w.notBefore = now.Add(acceptorWaits)
	}
	streams := []network.Stream{s.send.disown(), s.recv.disown()}
	if ex := s.ex; ex != nil {
		streams = append(streams, ex.old, ex.new)
		if ex.phase < phaseCommitted {
			ex.phase = phaseYielded
		}
		ex.interrupt()
	}
	breakOffAll(streams, codeGivenUp)
	s.host.log.Debug("stream lost", zap.Stringer("peer", s.peer), zap.Uint64("origin", r.origin), zap.Error(cause))
	return Event{Kind: Lost, From: w.away, Err: cause}
}

func breakOffAll(streams []network.Stream, code network.StreamErrorCode) {
	done := make(map[network.Stream]bool, len(streams))
	for _, u := range streams {
		if u != nil && !done[u] {
			done[u] = true
			go breakOff(u, code)
		}
	}
}

// arm has the stream wait, with all of its patience from now on (R11). s.mu must be held.
func (r *resumption) arm(now time.Time) *waiting {
	if r.waits == nil {
		r.waits = new(waiting)
	} else {
		r.waits.timer.Stop()
	}
	r.waits.since = now
	r.waits.timer = time.AfterFunc(r.of.host.cfg.resumes.patience, func() { r.expire(now) })
	return r.waits
}

// disarm ends that. s.mu must be held.
func (r *resumption) disarm() {
	r.waits.timer.Stop()
	r.waits = nil
}

// expire is the end of a patience that has begun at since.
func (r *resumption) expire(since time.Time) {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	if r.waits != nil && r.waits.since.Equal(since) {
		r.leaveLocked(errTooLate)
	}
}

// leave gives the stream up for that cause. What the muxer still has of one that was closed
// may yet arrive.
func (r *resumption) leave(cause error) {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	r.leaveLocked(cause)
}

// leaveLocked is leave. s.mu must be held.
func (r *resumption) leaveLocked(cause error) {
	if r.state == resumeAttached && r.s.life == lifeClosed && !r.s.send.replays() {
		r.endLocked(nil, codeGivenUp)
		return
	}
	if settle := r.failLocked(cause); settle != nil {
		go settle()
	}
}

// end ends the entry of a stream whose underlying one, if any, lives on.
func (r *resumption) end() {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	r.endLocked(nil, codeGivenUp)
}

// endLocked is end, for that cause where the stream has failed. The attempt that is open, if any, is
// reset with code. s.mu must be held.
func (r *resumption) endLocked(cause error, code network.StreamErrorCode) {
	if r.state == resumeOver {
		return
	}
	if w := r.waits; w != nil {
		if r.detached() {
			go r.trace(Event{Kind: GivenUp, From: w.away, Err: cause, Took: time.Since(w.since)})
		}
		r.unname()
		if w.attempt != nil {
			go breakOff(w.attempt, code)
		}
		r.disarm()
	}
	r.state = resumeOver
	r.of.remove(r)
	r.s.send.mu.Lock()
	r.ring.release()
	r.s.send.mu.Unlock()
}

// fail ends a stream that cannot be resumed (R9, R11). The application reads what was
// received, and then the error.
func (r *resumption) fail(cause error) {
	r.s.mu.Lock()
	settle := r.failLocked(cause)
	r.s.mu.Unlock()
	if settle != nil {
		settle()
	}
}

// failLocked is fail but for what it returns, which is to be called without s.mu; nil where the
// stream is over already. s.mu must be held.
func (r *resumption) failLocked(cause error) (settle func()) {
	if r.state == resumeOver {
		return nil
	}
	s := r.s
	r.endLocked(cause, network.StreamNoError)
	closed := s.life == lifeClosed
	s.kill(network.StreamNoError)
	return func() {
		err := reset(cause)
		s.send.fail(err)
		s.recv.endWith(err)
		u := s.send.stream()
		go breakOff(u, network.StreamNoError)
		s.forget()
		s.settle()
		if !closed {
			s.host.log.Debug("stream not resumed", zap.Stringer("peer", s.peer), zap.Uint64("origin", r.origin), zap.Error(cause))
		}
	}
}

// violated ends a stream about which the peer has sent what it must not.
func (r *resumption) violated(err error) {
	r.s.host.warnViolation(r.s.peer, err, zap.Uint64("origin", r.origin))
	_ = r.s.abort(reset(err), network.StreamProtocolViolation)
}

// closed is called when the application has closed the stream and no migration is under way:
// it is a tombstone from here on, until its end of writing is confirmed (R8).
// r may be nil.
func (r *resumption) closed() {
	if r == nil {
		return
	}
	s := r.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.state == resumeOver || s.life != lifeClosed {
		return
	}
	if r.finished() || !r.of.bury(r, r.memory()) {
		r.endLocked(nil, codeGivenUp)
		return
	}
	if r.state == resumeAttached {
		r.arm(time.Now())
	}
}

// memory is what the ring takes. s.mu must be held.
func (r *resumption) memory() (size int) {
	r.s.send.mu.Lock()
	defer r.s.send.mu.Unlock()
	for _, b := range r.ring.blocks {
		size += cap(b)
	}
	return size
}

// finished says whether all that was written, and its end, is confirmed. s.mu must be held.
func (r *resumption) finished() bool {
	h := &r.s.send
	h.mu.Lock()
	defer h.mu.Unlock()
	return r.ring.confirmed == everything || h.closed && !h.inside && r.ring.confirmed > r.ring.end
}

// needed says whether the stream has a use for an underlying one (R8). s.mu must be held.
func (r *resumption) needed() bool {
	if !r.finished() {
		return r.s.life == lifeClosed || r.s.life == lifeOpen
	}
	if r.s.life != lifeOpen {
		return false
	}
	r.s.send.mu.Lock()
	writes := !r.s.send.closed
	r.s.send.mu.Unlock()
	given, closed := r.s.recv.view()
	return writes || !given && !closed
}

// confirmed takes note of what the peer has received (R12).
func (r *resumption) confirmed(received uint64) {
	h := &r.s.send
	h.mu.Lock()
	err := r.checkReceived(received)
	more := err == nil && received > r.ring.confirmed
	if more {
		r.ring.confirm(received)
		h.changed.broadcast()
	}
	h.mu.Unlock()
	if err != nil {
		r.violated(err)
		return
	}
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	switch {
	case r.s.life != lifeClosed || r.state == resumeOver || r.s.ex != nil:
	case r.finished():
		r.endLocked(nil, codeGivenUp)
	case more && r.state == resumeAttached: // the other end reads on
		r.arm(time.Now())
	}
}

// resumes says whether a stream of pref, which this host is about to open on c, can outlive
// its connection.
func (h *Host) resumes(c network.Conn, pref protocol.ID, pids []protocol.ID) bool {
	if h.resumer == nil || h.answerOf(c, ResumeID) != certain || h.answerOf(c, FinalSizeID) != certain {
		return false
	}
	only := h.cfg.resumes.protocols
	if only == nil {
		return true
	}
	if pref != "" {
		return slices.Contains(only, pref)
	}
	return !slices.ContainsFunc(pids, func(id protocol.ID) bool { return !slices.Contains(only, id) })
}

// detached says whether the stream has lost its connection, so that it cannot migrate. r may be
// nil. s.mu must be held.
func (r *resumption) detached() bool {
	return r != nil && r.state != resumeAttached && r.state != resumeOver
}

// lives says whether the stream may still be resumed. r may be nil.
func (r *resumption) lives() bool {
	if r == nil {
		return false
	}
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	return r.state != resumeOver
}

// survives says whether the stream lives on though the exchange x has failed after the ack
// (R13): then it is lost.
func (r *resumption) survives(x *exchange, cause error) bool {
	s := r.s
	s.mu.Lock()
	if r.state == resumeOver || s.life == lifeReset {
		s.mu.Unlock()
		return false
	}
	if r.state != resumeAttached {
		s.mu.Unlock()
		return true
	}
	event := r.loseLocked(cause)
	s.mu.Unlock()
	r.trace(event)
	r.of.wake()
	return true
}

// checkReceived says whether the peer may say that it has received so much. s.send.mu must
// be held.
func (r *resumption) checkReceived(received uint64) error {
	if received == everything || received <= r.ring.end || received == r.ring.end+1 && r.s.send.closed {
		return nil
	}
	return fmt.Errorf("%w: %d received of %d bytes", errViolation, received, r.ring.end)
}

// ends takes note of where the peer's writing ends (R7).
func (r *resumption) ends(total uint64) {
	h := &r.s.recv
	h.mu.Lock()
	in := &r.incoming
	var err error
	switch {
	case in.told && in.total != total:
		err = fmt.Errorf("%w: the end is at %d, and was at %d", errViolation, total, in.total)
	case !h.closed && h.state != receiveFailed && in.base+h.cur.count > total:
		err = fmt.Errorf("%w: the end is at %d, behind it came more", errViolation, total)
	default:
		in.told, in.total = true, total
	}
	doubt, src := h.state == receiveDoubt, h.cur
	h.mu.Unlock()
	if err != nil {
		r.violated(err)
	} else if doubt {
		r.settleEnd(src, false)
	}
}

// eofVouched is how long an EOF without an announcement is kept back where the muxer may have
// reported it for being closed: by then the connection is known to be closed.
const eofVouched = time.Second

// doubted is what the application's Read of src is to see that brought n bytes and err (R7):
// an end that has to be judged first. mu must be held.
func (h *receiveHalf) doubted(src *source, p []byte, n int, err error) (int, error) {
	src.end = err
	h.judge()
	if n > 0 || len(p) == 0 && h.state == receiveOpen {
		return n, nil
	}
	return h.readSlowly(p)
}

// judge looks at the end of the present source, which is the application's if anybody's. mu
// must be held, and the state be receiveOpen.
func (h *receiveHalf) judge() {
	r, src := h.resumption, h.cur
	switch eof := src.end == io.EOF; {
	case eof && r.believes(src), eof && r.incoming.over && !r.incoming.told && !aside.IsClosed(src.stream.Conn()):
		h.giveEnd()
	case eof && r.incoming.over:
		h.failLocked(reset(io.ErrUnexpectedEOF))
	case r.incoming.over:
		h.failLocked(forGood(src.end))
	default:
		h.state = receiveDoubt
		go r.settleEnd(src, false)
	}
}

// giveEnd has the application's Reads end cleanly. mu must be held.
func (h *receiveHalf) giveEnd() {
	h.state, h.given, h.cur.end = receiveOpen, true, nil
	h.changed.broadcast()
	h.progressed()
}

// believes says whether an EOF of src needs nothing more to be believed. s.recv.mu must be held.
func (r *resumption) believes(src *source) bool {
	if in := &r.incoming; in.told {
		return in.base+src.count == in.total
	}
	c := src.stream.Conn()
	return endsTruly(c) || sessionIsUp(c)
}

// sessionIsUp says whether c is of yamux, whose session is up: then it was when an EOF was read, too,
// which is the other end's. Yamux reports others only once its session is down.
func sessionIsUp(c network.Conn) bool {
	var session *yamux.Session
	return c.As(&session) && !session.IsClosed()
}

// endsTruly says whether streams of c end only where the other end has ended them, as those of QUIC,
// WebTransport and WebRTC do.
func endsTruly(c network.Conn) bool {
	return c.As(new(*quic.Conn)) || c.ConnState().Transport == "webrtc-direct"
}

// settleEnd decides what the end of src means, as far as that can be told. waited says that it
// was kept back for eofVouched.
func (r *resumption) settleEnd(src *source, waited bool) {
	h := &r.s.recv
	h.mu.Lock()
	err := src.end
	if h.cur != src || h.state != receiveDoubt || err == nil {
		h.mu.Unlock()
		return
	}
	if err == io.EOF {
		in := &r.incoming
		switch open := !aside.IsClosed(src.stream.Conn()); {
		case r.believes(src), !in.told && open && waited:
			h.giveEnd()
			h.mu.Unlock()
			return
		case !in.told && open:
			h.mu.Unlock()
			time.AfterFunc(eofVouched, func() { r.settleEnd(src, true) })
			return
		}
	}
	h.mu.Unlock()
	r.ended(src.stream, err)
}

// ended takes note that u has ended with err, which no application caused that closes its
// writing.
func (r *resumption) ended(u network.Stream, err error) {
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	if !final(u, err) {
		r.lose(u, err)
		return
	}
	s := r.s
	s.mu.Lock()
	on := r.state == resumeAttached && (s.send.stream() == u || s.recv.source().stream == u)
	if on {
		r.endLocked(nil, codeGivenUp)
	}
	s.mu.Unlock()
	if on {
		s.recv.endsHere()
	}
}

// endsHere has the present source be the last one: how that ends is how the stream ends.
func (h *receiveHalf) endsHere() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.resumption.incoming.over = true
	if h.state == receiveDoubt {
		h.state = receiveOpen
		h.judge()
	}
	h.changed.broadcast()
}

// final says whether err, which a Read or Write of u reported, is the end of the logical
// stream: the other end has reset that, or a connection was closed on purpose (R1).
func final(u network.Stream, err error) bool {
	c := u.Conn()
	if aside.IsClosed(c) {
		return closedForGood(c)
	}
	var reset *network.StreamError
	if errors.As(err, &reset) && reset.Remote {
		return reset.ErrorCode != codeGivenUp && carriesCodes(u)
	}
	var closed *network.ConnError
	if errors.As(err, &closed) {
		return closesStreams(closed.ErrorCode)
	}
	return false
}

// carriesCodes says whether a reset of u tells its code.
func carriesCodes(u network.Stream) bool { return u.Conn().ConnState().Transport != "webtransport" }

// closedForGood says whether c, which is closed, was closed by one of its ends on purpose, as
// far as can be told: then nobody wants its streams back.
func closedForGood(c network.Conn) bool {
	var session *yamux.Session
	if c.As(&session) {
		_, err := session.OpenStream(cancelled) // why it is closed
		// One that is wrapped is that of another session, which has carried this one: to a relay.
		away, is := err.(*yamux.GoAwayError)
		return is && closesStreams(network.ConnErrorCode(away.ErrorCode))
	}
	var conn *quic.Conn
	if c.As(&conn) {
		var closed *quic.ApplicationError
		return errors.As(context.Cause(conn.Context()), &closed) && closesStreams(network.ConnErrorCode(closed.ErrorCode))
	}
	return false
}

// cancelled is a context that is.
var cancelled = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()

// closesStreams says whether who closes a connection with that code has done with its streams.
func closesStreams(code network.ConnErrorCode) bool {
	switch code {
	case network.ConnNoError, network.ConnShutdown, network.ConnGated, network.ConnGarbageCollected:
		return true
	}
	return false
}
