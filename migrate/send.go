package migrate

import (
	"errors"
	"os"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"

	"github.com/go-portage/portage/internal/aside"
)

// The sending half of a stream. Where a byte goes:
//
//	Write -> cur.Write, one Write call at a time, as long as the half is sendOpen.
//
// A migration moves it in two steps, both taken by the exchange:
//
//	pause   no Write enters cur any more; one that is blocked inside is called
//	        out with a write deadline, and waits with the rest of its buffer.
//	        From here on it is certain how many bytes cur has taken (S12).
//	resume  cur is the new stream; the Write that waited goes on there.
//
// Nothing that may block on a dead path is called with mu held.

// sendState is where Writes go. Its transitions are pause, resume and fail, and for a resumable
// stream disown, takeUp and replay, and no other.
type sendState uint8

const (
	sendOpen   sendState = iota // Writes go to cur
	sendPaused                  // Writes wait for the next underlying stream
	sendLost                    // there is no underlying stream; Writes go to the ring (kept.go)
	sendReplay                  // what the ring has goes to cur first; Writes wait
	sendFailed                  // over, with err
)

// errWriteClosed is what Write returns after CloseWrite or Close.
var errWriteClosed = errors.New("write on a closed stream")

// kickInterval is how often a Write that does not leave a stream is called out
// again. Once is enough on every transport but WebRTC, where one in 460 was not.
const kickInterval = 250 * time.Millisecond

// openingRoom is how many bytes of a first Write leave in one underlying Write with
// the opening (W1). It is what fits one packet; a larger Write gains nothing.
const openingRoom = 1200

type sendHalf struct {
	mu       sync.Mutex // guards all below
	changed  cond       // broadcast when a field changes that someone may wait for
	cur      network.Stream
	written  uint64 // application bytes that cur has taken
	deadline time.Time
	opening  []byte // W1: what must precede the first application byte, not yet sent
	err      error  // of sendFailed, or lost

	state    sendState
	turn     bool // a Write call is under way; others wait, so that buffers never mix
	inside   bool // that call is inside cur.Write
	flushing bool // it is no Write, but flush
	closed   bool // CloseWrite or Close was called
	closing  bool // Close was, but the opening has to be sent first
	held     bool // an exchange is under way that may save a Write which cur fails
	kept     bool // a Write that cur has failed, its connection being gone, is kept for that exchange
	lost     bool // the application was told that cur's connection is gone, with err

	// What the last looks of Traffic have seen. Beside the fields above these cost no room.
	blocked bool
	freed   uint32 // how often what was blocked went on
	seen    sendLook

	resumption *resumption // of a resumable stream; immutable
}

func (h *sendHalf) write(p []byte) (int, error) {
	if h.resumption != nil {
		return h.writeKept(p)
	}
	h.mu.Lock()
	if h.state != sendOpen || h.turn || h.closed || h.closing || h.opening != nil {
		defer h.mu.Unlock()
		return h.writeInTurn(p)
	}
	h.turn, h.inside = true, true
	cur := h.cur
	h.mu.Unlock()

	n, err := cur.Write(p)

	h.mu.Lock()
	h.inside = false
	h.written += uint64(n)
	h.changed.broadcast()
	if err != nil {
		defer h.mu.Unlock()
		return h.goOn(p, n, err)
	}
	h.turn = false
	h.mu.Unlock()
	return n, nil
}

// writeInTurn waits for its turn and writes p. mu must be held.
func (h *sendHalf) writeInTurn(p []byte) (int, error) {
	if err := h.takeTurn(); err != nil {
		return 0, err
	}
	return h.goOn(p, 0, nil)
}

// takeTurn waits for the Writes before this one. mu must be held.
func (h *sendHalf) takeTurn() error {
	for h.turn && !h.closing {
		if !h.changed.wait(&h.mu, h.deadline) {
			return os.ErrDeadlineExceeded
		}
	}
	switch {
	case h.closing && h.state == sendFailed:
		return h.err
	case h.closing:
		return errWriteClosed
	}
	h.turn = true
	return nil
}

// goOn carries on with a Write that has its turn, of whose buffer p cur has taken n
// bytes before it reported err. mu must be held.
func (h *sendHalf) goOn(p []byte, n int, err error) (int, error) {
	defer func() {
		h.turn = false
		h.changed.broadcast()
	}()
	for entered, on := err != nil, h.cur; ; entered = true {
		if h.state == sendFailed {
			return n, h.err
		}
		if h.cur != on {
			err = nil // the stream that reported it is history
		}
		// While an exchange is under way, neither a deadline of its own nor the
		// death of the old stream is the application's: the rest of the buffer
		// may yet take the new stream. The count n is exact in both cases.
		saved := h.state == sendPaused || h.held && err != nil && !isDeadline(err, on)
		h.kept = h.kept || h.held && err != nil && lostWith(err, on)
		switch {
		case err != nil && !saved && !(h.closed && isDeadline(err, on)):
			// Of a stream that was closed meanwhile WebRTC reports that, and in no type of
			// its own.
			if aside.IsClosed(on.Conn()) || !h.closed && lostWith(err, on) {
				h.lost, h.err = true, err
			}
			return n, err
		case entered && n == len(p):
			return n, nil // QUIC may take everything and report a deadline all the same
		case h.closed && !(len(p) == 0 && h.state == sendOpen): // one of nothing is cur's to judge
			return n, errWriteClosed
		case saved:
			if !h.changed.wait(&h.mu, h.deadline) {
				return n, os.ErrDeadlineExceeded
			}
			continue
		}
		on = h.cur
		var m int
		m, err = h.enter(p[n:])
		n += m
	}
}

// lostWith says whether err, which a Write of u reported, means that its connection is gone:
// QUIC wakes the streams before it says so of the connection itself. What else ends a
// stream is a deadline, or the other end, by a reset or for having closed its reading (S13).
func lostWith(err error, u network.Stream) bool {
	var by *network.StreamError
	return !isDeadline(err, u) && !(errors.As(err, &by) && by.Remote)
}

// flights are buffers for an opening and what leaves with it.
var flights = sync.Pool{New: func() any { return new([]byte) }}

// enter writes p to cur, behind the opening where that has not been sent. mu must be
// held; it is given up meanwhile.
func (h *sendHalf) enter(p []byte) (n int, err error) {
	cur, opening := h.cur, h.opening
	h.inside = true
	h.mu.Unlock()
	m := 0
	switch {
	case len(opening) == 0:
		n, err = cur.Write(p)
	case len(p) <= openingRoom:
		flight := flights.Get().(*[]byte)
		*flight = append(append((*flight)[:0], opening...), p...)
		m, err = cur.Write(*flight)
		flights.Put(flight)
		n = max(0, m-len(opening))
		m -= n
	default:
		m, err = cur.Write(opening) // p follows, when it is noted that the opening has left
	}
	h.mu.Lock()
	if h.cur != cur { // disowned meanwhile
		return n, err
	}
	h.inside = false
	h.written += uint64(n)
	if opening != nil {
		if h.opening = opening[m:]; len(h.opening) == 0 {
			h.opening = nil
		}
	}
	h.changed.broadcast()
	return n, err
}

// flush sends the opening, if that has not been sent. It may block. The application's
// write deadline does not hold for it: one that has passed must keep neither Reads nor
// migrations from a stream of which the acceptor has yet to learn.
func (h *sendHalf) flush() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for h.turn && h.opening != nil {
		h.changed.wait(&h.mu, time.Time{})
	}
	if h.opening == nil || h.closed {
		return nil
	}
	h.turn, h.flushing = true, true
	cur := h.cur
	if !h.deadline.IsZero() {
		_ = cur.SetWriteDeadline(time.Time{})
	}
	_, err := h.goOn(nil, 0, nil)
	h.flushing = false
	if h.state == sendOpen && h.cur == cur && !h.deadline.IsZero() {
		_ = cur.SetWriteDeadline(h.deadline)
	}
	return err
}

// shut is the part of closeWrite that does not block: no Write begins any more. Where the
// opening has yet to be sent closeWrite sends it.
func (h *sendHalf) shut() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.state == sendFailed {
		return
	}
	if h.opening == nil {
		h.closed = true
	} else {
		h.closing = true
	}
	h.changed.broadcast()
}

// closeWrite ends the application's writing. While the half is paused the exchange
// closes the new stream in its stead (S6). It may block on a dead path.
func (h *sendHalf) closeWrite() error {
	cur, open, err := h.end()
	switch {
	case err == nil && h.resumption != nil:
		return h.endKept(cur, open, cur.CloseWrite)
	case open:
		return h.notEnded(cur, cur.CloseWrite())
	}
	return err
}

// notEnded is what CloseWrite returns where the closing of cur has reported err. If its connection is
// gone an exchange may yet end the writing on the next stream (S5, S6), and else the application is
// told.
func (h *sendHalf) notEnded(cur network.Stream, err error) error {
	var gone *network.ConnError
	if err == nil || !aside.IsClosed(cur.Conn()) && !errors.As(err, &gone) {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for h.held && h.state == sendOpen && h.cur == cur {
		h.kept = true
		h.changed.wait(&h.mu, time.Time{})
	}
	for h.state == sendPaused {
		h.changed.wait(&h.mu, time.Time{})
	}
	switch {
	case h.state == sendFailed:
		return h.err
	case h.cur != cur || h.state != sendOpen:
		return nil
	}
	h.lost, h.err = true, err
	return err
}

// end is closeWrite up to the closing of cur, which is left to the caller where open says so.
func (h *sendHalf) end() (cur network.Stream, open bool, err error) {
	_ = h.flush() // where it fails, so does CloseWrite of cur, or the reader is told
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.state == sendFailed {
		return h.cur, false, h.err
	}
	h.closed = true
	h.changed.broadcast()
	if open = h.state == sendOpen; open && h.inside {
		// A Write returns when its stream is closed, with what was taken. QUIC would
		// keep it until the window opens, which may be never.
		_ = h.cur.SetWriteDeadline(past)
	}
	if h.resumption != nil {
		open = h.awaitLast()
	}
	return h.cur, open, nil
}

func (h *sendHalf) setDeadline(t time.Time) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.deadline = t
	h.changed.broadcast()
	if h.state != sendOpen || h.flushing || h.closed {
		return nil // resume or flush sets it; now it would undo the kick, or hinder flush
	}
	return h.cur.SetWriteDeadline(t)
}

// hold makes a Write that cur fails wait for the end of the exchange; with false,
// such a Write returns cur's error after all.
func (h *sendHalf) hold(held bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.held, h.kept = held, h.kept && held
	h.changed.broadcast()
}

// pause lets no further byte into cur and returns how many it has taken (S2, S12).
// There is no way back from it but resume or fail.
func (h *sendHalf) pause() (written uint64, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.state == sendFailed:
		return 0, h.err
	case h.lost:
		return 0, h.err
	case h.state == sendLost:
		return 0, errDropped
	}
	h.state = sendPaused
	h.changed.broadcast()
	for h.inside {
		_ = h.cur.SetWriteDeadline(past)
		h.changed.wait(&h.mu, time.Now().Add(kickInterval))
		if h.state == sendFailed {
			return 0, h.err
		}
	}
	if h.state != sendPaused {
		return 0, errDropped
	}
	return h.written, nil
}

// resume makes next the stream that Writes go to. closed says that the application
// has ended its writing: the caller has to close next for writing, too (S6).
func (h *sendHalf) resume(next network.Stream) (closed bool, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.state == sendFailed:
		return false, h.err
	case h.resumption != nil && h.state != sendPaused:
		return false, errDropped
	case h.resumption != nil && h.goesOnReplaying(next):
		return false, nil
	}
	h.state, h.cur, h.written, h.held, h.kept = sendOpen, next, 0, false, false
	h.seen, h.blocked, h.freed = sendLook{}, false, 0
	h.opening = nil // a peer that names a label which it was not sent has no use for the rest
	if !h.deadline.IsZero() {
		_ = next.SetWriteDeadline(h.deadline)
	}
	h.changed.broadcast()
	return h.closed, nil
}

// fail ends the half; Writes return err.
func (h *sendHalf) fail(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.state != sendFailed {
		h.state, h.err, h.opening = sendFailed, err, nil
		h.changed.broadcast()
	}
}

// keepsError says whether a Write waits that cur has failed.
func (h *sendHalf) keepsError() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.kept
}

// hasLost says whether the application was told that the connection is gone. What it
// wrote must not end cleanly any more: it may close now, and would look finished to the
// reader.
func (h *sendHalf) hasLost() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.lost
}

// stream returns the underlying stream that Writes go to.
func (h *sendHalf) stream() network.Stream {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.cur
}
