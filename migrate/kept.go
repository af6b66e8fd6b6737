package migrate

import (
	"errors"
	"io"
	"os"
	"time"

	"github.com/libp2p/go-libp2p/core/network"

	"github.com/go-portage/portage/internal/aside"
)

// The halves of a resumable stream, where they differ from others'. What is written is in the
// ring before an underlying stream gets it: the ring borrows it, and copies what is not
// confirmed before Write returns. As long as the half is sendOpen or sendPaused, and no Write is
// inside, cur has taken all that is in the ring.

// largestPiece is how much of a Write the underlying stream gets at once, at most: where that is
// lost, so much may have to be kept that it has not taken.
const largestPiece = 1 << 20

// replayed is how much of the ring a new underlying stream gets at once.
const replayed = 32 << 10

// writeKept is Write of a resumable stream.
func (h *sendHalf) writeKept(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.takeTurn(); err != nil {
		return 0, err
	}
	ring := &h.resumption.ring
	defer func() {
		ring.keep()
		h.turn = false
		h.changed.broadcast()
	}()
	most := min(largestPiece, ring.of.window/2)
	for n, entered := 0, false; ; {
		switch {
		case h.state == sendFailed:
			return n, h.err
		case entered && n == len(p):
			return n, nil
		case h.closed && len(p) > 0:
			return n, errWriteClosed
		case h.state == sendLost && len(p) == 0:
			return 0, nil
		case h.state == sendLost:
			m := ring.put(p[n:], false)
			n, entered = n+m, true
			if m == 0 && !h.changed.wait(&h.mu, h.deadline) {
				return n, os.ErrDeadlineExceeded
			}
			continue
		case h.state != sendOpen:
			if !h.changed.wait(&h.mu, h.deadline) {
				return n, os.ErrDeadlineExceeded
			}
			continue
		}
		on, piece := h.cur, p[n:min(len(p), n+most)]
		ring.lend(piece)
		m, err := h.enter(piece)
		entered = true
		switch {
		case h.state == sendFailed:
			return n + m, h.err
		case m == len(piece) && (m > 0 || err == nil), h.state == sendLost, h.cur != on:
			n += len(piece) // once the stream is lost, the ring has them
			ring.keep()
			continue
		case err == nil: // the opening has left, and what follows it has not
			ring.giveBack(len(piece) - m)
			ring.keep()
			n += m
			continue
		}
		ended := h.state == sendOpen && !h.closed && !isDeadline(err, on)
		if ended && h.opening == nil && h.losing(on, err) {
			h.inside = true // where the writing ends is not known yet
			h.mu.Unlock()
			h.resumption.ended(on, err)
			h.mu.Lock()
			if h.cur == on {
				h.inside = false
				h.changed.broadcast()
			}
			if h.cur != on || h.state != sendOpen && h.state != sendPaused {
				if h.state == sendFailed {
					return n + m, h.err
				}
				n += len(piece)
				ring.keep()
				continue
			}
		}
		ring.giveBack(len(piece) - m)
		ring.keep()
		n += m
		for ended && h.held && h.state == sendOpen && h.cur == on { // an exchange may save the rest, as in goOn
			h.kept = h.kept || lostWith(err, on)
			if !h.changed.wait(&h.mu, h.deadline) {
				return n, os.ErrDeadlineExceeded
			}
		}
		switch {
		case h.state != sendOpen || h.cur != on:
		case h.closed && isDeadline(err, on):
			return n, errWriteClosed
		default:
			if ended && (aside.IsClosed(on.Conn()) || lostWith(err, on)) {
				h.lost, h.err = true, err
			}
			return n, err
		}
	}
}

// losing says whether err, which a Write of u reported, ends more than this direction: where the
// other end has closed its reading, only that is over (S13). On WebTransport that looks like
// u given up; the other end tells of it, too, or does when the stream is resumed. mu must be held.
func (h *sendHalf) losing(u network.Stream, err error) bool {
	var by *network.StreamError
	if aside.IsClosed(u.Conn()) || lostWith(err, u) {
		return true
	}
	if !errors.As(err, &by) || !by.Remote {
		return false
	}
	return by.ErrorCode == codeGivenUp || !carriesCodes(u) && h.resumption.ring.confirmed != everything
}

// awaitLast waits until no Write is inside cur: where the writing ends is known then. It says
// whether cur is to be closed for writing. mu must be held.
func (h *sendHalf) awaitLast() (open bool) {
	for h.state == sendOpen && h.inside {
		_ = h.cur.SetWriteDeadline(past)
		h.changed.wait(&h.mu, time.Now().Add(kickInterval))
	}
	return h.state == sendOpen
}

// endKept is called when the application has ended its writing: the other end is told where, and u
// is closed with closing, unless a replay has to do that.
func (h *sendHalf) endKept(u network.Stream, open bool, closing func() error) error {
	r := h.resumption
	h.announce(u, open)
	if !open {
		return nil
	}
	err := closing()
	if err != nil {
		r.ended(u, err)
	}
	h.mu.Lock()
	failed, why, over := h.state == sendFailed, h.err, r.ring.over
	h.mu.Unlock()
	switch {
	case failed:
		return why
	case !over:
		return nil // where u has failed, the end is sent again
	}
	return h.notEnded(u, err)
}

// announce has the other end told where the writing ends (R7). Where u closes it, on which an
// end is believed without that, or where the other end wants no more, that has time.
func (h *sendHalf) announce(u network.Stream, closes bool) {
	r := h.resumption
	h.mu.Lock()
	unwanted := r.ring.confirmed == everything
	h.mu.Unlock()
	switch c := u.Conn(); {
	case unwanted || closes && endsTruly(c):
		r.of.reportIn(r, reportWithin)
	case closes && sessionIsUp(c):
		r.of.reportIn(r, endWithin)
	default:
		r.of.reportIn(r, 0)
	}
}

// replays says whether the present stream has yet to get what was written before.
func (h *sendHalf) replays() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.state == sendReplay
}

// last returns the present stream where that is to be closed for an application that has closed. A
// replay does that itself, and where the stream is lost one may begin at any time.
func (h *sendHalf) last() network.Stream {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.state == sendReplay || h.state == sendLost {
		return nil
	}
	return h.cur
}

// opens says whether the opening has yet to be sent.
func (h *sendHalf) opens() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.opening != nil
}

// disown has nothing more written to the underlying stream, which it returns.
func (h *sendHalf) disown() network.Stream {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.state != sendFailed {
		ring := &h.resumption.ring
		handed := ring.end
		if h.state == sendReplay {
			handed = ring.base + h.written
		}
		ring.handed = max(ring.handed, handed)
		ring.keep()
		h.state, h.held, h.kept, h.inside = sendLost, false, false, false
		h.changed.broadcast()
	}
	return h.cur
}

// takeUp makes u the stream that Writes go to, behind what the ring has from offset start on.
// It says whether replay has something to do for that, and how much of it was handed to another
// underlying stream before.
func (h *sendHalf) takeUp(u network.Stream, start uint64) (replays bool, again uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.state == sendFailed {
		return false, 0
	}
	r := &h.resumption.ring
	again = max(min(r.handed, r.end), start) - start
	h.cur, h.written, h.opening, r.base = u, 0, nil, start
	replays = start < r.end || h.closed && r.confirmed <= r.end
	if replays {
		h.state = sendReplay
	} else {
		h.reopen()
	}
	h.changed.broadcast()
	return replays, again
}

// reopen has Writes go to cur. mu must be held.
func (h *sendHalf) reopen() {
	h.state = sendOpen
	if !h.deadline.IsZero() {
		_ = h.cur.SetWriteDeadline(h.deadline)
	}
	h.changed.broadcast()
}

// goesOnReplaying is resume where a replay was paused. mu must be held.
func (h *sendHalf) goesOnReplaying(next network.Stream) bool {
	r := &h.resumption.ring
	r.base += h.written
	h.written = 0
	if r.base == r.end {
		return false
	}
	h.state, h.cur, h.held, h.kept = sendReplay, next, false, false
	h.changed.broadcast()
	go h.replay(next)
	return true
}

// replay writes to u what the ring has, and the end of writing where that is known, and lets
// Writes go on behind it.
func (h *sendHalf) replay(u network.Stream) {
	buf := make([]byte, replayed)
	h.mu.Lock()
	defer h.mu.Unlock()
	r := h.resumption
	for h.state == sendReplay && h.cur == u {
		at := r.ring.base + h.written
		if at == r.ring.end {
			h.reopen()
			if h.closed {
				h.mu.Unlock()
				h.announce(u, true)
				err := u.CloseWrite()
				r.s.mu.Lock()
				if r.s.life == lifeClosed && r.s.ex == nil {
					go u.Close()
				}
				r.s.mu.Unlock()
				if err != nil {
					r.ended(u, err)
				}
				h.mu.Lock()
			}
			return
		}
		if at < r.ring.low {
			if r.ring.confirmed != everything {
				// It is too late to send what is not kept any more, and a gap must not be sent. Where
				// the stream has ended for good nothing is kept.
				h.state, h.err = sendFailed, reset(errDroppedBytes)
				h.changed.broadcast()
				go breakOff(u, network.StreamNoError)
				go r.fail(errDroppedBytes)
				return
			}
			r.ring.base += r.ring.low - at // the other end wants no more
			continue
		}
		n := r.ring.copyFrom(at, buf)
		h.inside = true
		h.mu.Unlock()
		m, err := u.Write(buf[:n])
		h.mu.Lock()
		if h.cur != u {
			return
		}
		h.inside = false
		h.written += uint64(m)
		h.changed.broadcast()
		if err != nil && h.state == sendReplay {
			if h.losing(u, err) {
				h.mu.Unlock()
				r.ended(u, err)
				h.mu.Lock()
			}
			if h.state == sendReplay && h.cur == u { // it is final, or only this direction is over (S13)
				r.ring.base = r.ring.end - h.written
				h.reopen() // Writes shall see it
				return
			}
		}
	}
}

// disown has nothing more read from the underlying streams, and returns the present one. Reads
// go on with what was received, and wait then.
func (h *receiveHalf) disown() network.Stream {
	h.mu.Lock()
	defer h.mu.Unlock()
	old := h.cur
	if h.state == receiveFailed {
		return old.stream
	}
	old.gone = true
	if h.moving != nil {
		next := h.moving.next
		next.gone = true
		h.drop(next)
		h.moving = nil
	}
	h.resumption.incoming.base += old.count
	h.cur = &source{stream: old.stream, got: old.got}
	old.got = chunks{}
	h.state, h.err = receiveLost, nil
	h.draft = draftReading{ownEnd: h.draft.ownEnd}
	h.changed.broadcast()
	return old.stream
}

// takeUp makes u the stream that Reads come from. It says whether anybody reads.
func (h *receiveHalf) takeUp(u network.Stream) (reads bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.state != receiveLost {
		return h.state != receiveFailed && !h.closed
	}
	h.cur = &source{stream: u, got: h.cur.got}
	h.state = receiveOpen
	h.applyDeadline()
	h.changed.broadcast()
	return !h.closed
}

// endWith has Reads fail with err, behind what was received.
func (h *receiveHalf) endWith(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.state == receiveFailed {
		return
	}
	old := h.cur
	old.gone = true
	if h.moving != nil {
		h.moving.next.gone = true
		h.drop(h.moving.next)
		h.moving = nil
	}
	h.resumption.incoming.over = true
	h.resumption.incoming.base += old.count
	h.cur = &source{stream: old.stream, got: old.got, end: err}
	old.got = chunks{}
	h.state = receiveOpen
	if err == io.EOF || h.cur.got.len == 0 && !h.given {
		h.failLocked(err)
	}
	h.changed.broadcast()
}
