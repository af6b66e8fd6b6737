package migrate

import (
	"errors"
	"io"
	"os"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
)

// The receiving half of a stream. Where a byte comes from:
//
//	Read <- what others have read of cur <- Read of cur's stream
//
// One goroutine at a time is inside a Read of cur's stream: it has the read token. A
// migration moves the half in two steps, both taken by the exchange:
//
//	hold      an end of cur, EOF or error, is kept back, since the exchange alone
//	          can tell what it means (S5, S12). Data flow as before.
//	handover  the next source is known. cur is read to its end, then next (S4);
//	          where the application does not read, a pump does. See handover.go.
//
// Nothing that may block on a dead path is called with mu held.

// receiveState is what an end of cur means. Its transitions are hold, release, handover,
// switchOver, lose and failLocked, and for a resumable stream judge, giveEnd, endWith, disown
// and takeUp, and no other.
type receiveState uint8

const (
	receiveOpen     receiveState = iota // it is the application's
	receiveHeld                         // it is kept back
	receiveHandover                     // the handover under way tells
	receiveDoubt                        // of a resumable stream: it has yet to be judged (R7)
	receiveBroken                       // the handover has failed, with err; see lose
	receiveLost                         // there is none, nor any that may come: Reads wait for the next source
	receiveFailed                       // over, with err
)

// errReadClosed is what Read returns after CloseRead or Close: with every muxer a
// network.ErrReset of this end.
var errReadClosed error = &network.StreamError{TransportError: errors.New("read on a closed stream")}

type receiveHalf struct {
	mu       sync.Mutex // guards all below
	changed  cond       // broadcast when something changes that someone may wait for
	state    receiveState
	given    bool // the application was given EOF
	closed   bool // CloseRead or Close was called
	draft    draftReading
	cur      *source
	moving   *handover // of receiveHandover
	budget   *span     // what sources have got is reserved in it; nil where no handover has left any
	deadline time.Time
	err      error // of receiveBroken and receiveFailed

	resumption *resumption // of a resumable stream; immutable
}

func (h *receiveHalf) read(p []byte) (int, error) {
	h.mu.Lock()
	cur := h.cur
	if h.state != receiveOpen || h.given || h.closed || cur.reader != byNobody || cur.got.len != 0 || cur.expect != "" || cur.end != nil {
		defer h.mu.Unlock()
		return h.readSlowly(p)
	}
	cur.reader = byApplication
	h.mu.Unlock()

	n, err := readFrom(cur.stream, p)

	h.mu.Lock()
	defer h.mu.Unlock()
	return h.result(cur, p, n, err)
}

// readSlowly is Read in every state. mu must be held.
func (h *receiveHalf) readSlowly(p []byte) (int, error) {
	for {
		cur := h.cur
		switch {
		case h.state == receiveFailed:
			return 0, h.err
		case h.closed:
			return 0, errReadClosed
		case h.state == receiveBroken:
			if !h.changed.wait(&h.mu, h.deadline) {
				return 0, os.ErrDeadlineExceeded
			}
			continue
		case cur.got.len != 0:
			n := cur.got.take(p)
			h.unreserve(n)
			h.changed.broadcast()
			return n, nil
		case h.given:
			return 0, io.EOF
		case cur.end != nil && h.state == receiveOpen && h.resumption != nil:
			h.judge()
			continue
		case cur.end != nil && h.state == receiveOpen:
			return 0, h.end(cur.end) // it was kept back, and released
		case cur.reader != byNobody || cur.end != nil || h.state == receiveLost:
			if !h.changed.wait(&h.mu, h.deadline) {
				return 0, os.ErrDeadlineExceeded
			}
			continue
		}
		h.take(cur, byApplication)
		answering := cur.expect != ""
		n, err := h.pull(cur, p)
		if n == 0 && err == nil && (len(p) > 0 || answering) {
			h.book(cur, 0, nil)
			continue
		}
		return h.result(cur, p, n, err)
	}
}

// result books what the application's Read of src brought, and returns what the application
// is to see of it. mu must be held.
func (h *receiveHalf) result(src *source, p []byte, n int, err error) (int, error) {
	before := h.state
	kept := h.book(src, n, err)
	switch {
	case h.state == receiveFailed && before != receiveFailed:
		return 0, h.err
	case h.state == receiveBroken && n > 0 && src == h.cur && h.resumption != nil && !errors.Is(h.err, errViolation):
		return n, nil // they count as received, and the stream may be resumed behind them
	case h.state == receiveBroken:
		return h.readSlowly(p) // these bytes may have broken the promise of the final size
	case h.state == receiveFailed && err != nil:
		return n, h.err
	case src.gone && h.closed:
		return 0, errReadClosed
	case src.gone: // what it brought is sent again
		return h.readSlowly(p)
	case h.closed && kept:
		return n, errReadClosed // what ended may have been the old stream only
	case h.closed:
		return n, orElse(err, errReadClosed)
	case n > 0 && (kept || err == nil), !kept && err == nil && len(p) == 0:
		return n, nil
	case kept || err == nil:
		return h.readSlowly(p)
	case errors.Is(err, os.ErrDeadlineExceeded):
		// The application's, whatever has become of the connection: that shows next.
	case err == io.EOF || !isDeadline(err, src.stream):
		if h.resumption != nil {
			return h.doubted(src, p, n, err)
		}
		return n, h.end(err)
	}
	return n, err
}

func orElse(err, other error) error {
	if err != nil {
		return err
	}
	return other
}

// take takes the read token of src, which must be free. mu must be held.
func (h *receiveHalf) take(src *source, by reader) {
	src.reader = by
	// One may be there still that the application has set before it closed.
	if by == byPump && src == h.cur && (!h.deadline.IsZero() || h.closed) {
		_ = src.stream.SetReadDeadline(time.Time{})
	}
}

// book gives back the read token of src, with what a Read brought. kept says that err is not
// the application's, at least not yet. mu must be held.
func (h *receiveHalf) book(src *source, n int, err error) (kept bool) {
	by := src.reader
	src.reader = byNobody
	src.count += uint64(n)
	h.changed.broadcast()
	switch {
	case h.moving != nil && src == h.moving.next:
		if err != nil && err != io.EOF { // next reports an EOF again
			h.lose(err) // S8
		}
		return true
	case src != h.cur:
		// Called out of the old stream: all of it was there before, or nobody wants it.
		if n > 0 && !h.closed && !src.gone {
			h.lose(errTooMuch)
		}
		return true
	}
	if h.resumption != nil {
		h.progressed()
	}
	if by == byPump {
		h.applyDeadline()
	}
	// A pump's Read has no deadline, but for the application's on a yamux stream that has got
	// its FIN: that cannot be lifted any more, and is reported with data.
	end := err != nil && h.listens() && (by == byPump && n == 0 || !isDeadline(err, src.stream))
	switch h.state {
	case receiveHeld:
		if end {
			src.end = err
		}
		return end
	case receiveHandover:
		if end {
			src.end = err
		}
		h.settle()
		return end || h.cur != src
	}
	return false
}

// applyDeadline sets the application's deadline on cur. No pump must be inside: on yamux and
// WebRTC that loses data. Who has closed has no use for a deadline; the exchange, which may
// read on, must not meet it (S3). mu must be held.
func (h *receiveHalf) applyDeadline() {
	if !h.closed && !h.deadline.IsZero() {
		_ = h.cur.stream.SetReadDeadline(h.deadline)
	}
}

// listens says whether somebody is to read cur to its end. mu must be held.
func (h *receiveHalf) listens() bool { return !h.closed || h.draft.proof }

// end is what the application is told when cur ended with err outside of an exchange. After
// an error there is no way back to data, on whatever connection: the other end does not
// hear of what this one was told, unless the stream stays where it failed. mu must be held.
func (h *receiveHalf) end(err error) error {
	if err == io.EOF {
		err = h.draft.judge(err)
	}
	if err != io.EOF {
		h.failLocked(forGood(err))
		return h.err
	}
	h.given, h.cur.end = true, nil
	return err
}

// hold keeps back how cur ends, until release or handover. An exchange that follows right
// upon another finds it kept back already. It returns how many bytes cur has brought.
func (h *receiveHalf) hold() uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.state == receiveOpen || h.state == receiveDoubt {
		h.state = receiveHeld
	}
	return h.cur.count
}

// brought is how many bytes a source has brought.
func (h *receiveHalf) brought(src *source) uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return src.count
}

// release ends hold without a migration: an end that was kept back is the
// application's (S5).
func (h *receiveHalf) release() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.dropProof()
	if h.state == receiveHeld {
		h.state = receiveOpen
		h.changed.broadcast()
		if h.cur.end != nil && h.resumption != nil {
			h.judge()
		}
	}
}

// switchOver makes next the source that Reads come from. mu must be held.
func (h *receiveHalf) switchOver() {
	old, next := h.cur, h.moving.next
	if h.resumption != nil {
		h.resumption.incoming.base += old.count
	}
	if old.got.len > 0 {
		old.got.append(&next.got)
		old.got, next.got = chunks{}, old.got
	}
	h.cur, h.moving, h.state, h.draft = next, nil, receiveOpen, h.draft.moved()
	if h.closed { // nobody will read it
		h.drop(h.cur)
	}
	if h.cur.reader != byPump {
		h.applyDeadline()
	}
	h.unreserve(0)
	if h.resumption != nil {
		h.progressed() // of what was read ahead
	}
	h.changed.broadcast()
}

// lose ends a handover that cannot succeed. The application is told by abort, which takes its
// writing away first: told now it would close, and the other end take that for a clean end
// (S8). So Reads wait for that, and await returns the error. Outside of a handover, where
// no exchange waits, Reads fail at once. mu must be held.
func (h *receiveHalf) lose(cause error) {
	switch h.state {
	case receiveBroken, receiveLost, receiveFailed:
	case receiveHandover:
		h.drop(h.moving.next)
		if h.resumption == nil {
			h.drop(h.cur)
		}
		h.state, h.moving, h.err = receiveBroken, nil, reset(cause)
		h.changed.broadcast()
	default:
		h.failLocked(reset(cause))
	}
}

// fail ends the half; Reads return err.
func (h *receiveHalf) fail(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.failLocked(err)
}

func (h *receiveHalf) failLocked(err error) {
	if h.state == receiveFailed {
		return
	}
	h.dropAll()
	h.state, h.moving, h.err = receiveFailed, nil, err
	h.changed.broadcast()
}

// drop frees what was read of src for an application that will not read it. mu must be held.
func (h *receiveHalf) drop(src *source) {
	h.unreserve(src.got.len)
	src.got = chunks{}
}

// unreserve gives back n bytes of the budget, and the budget where nobody will use it. mu
// must be held.
func (h *receiveHalf) unreserve(n int) {
	h.budget.release(n)
	if h.moving == nil && h.budget.empty() {
		h.budget = nil
	}
}

func (h *receiveHalf) dropAll() {
	h.drop(h.cur)
	if h.moving != nil {
		h.drop(h.moving.next)
	}
}

// closeRead ends the application's reading. It may block.
func (h *receiveHalf) closeRead() error {
	if from := h.shut(); from != nil {
		return from.CloseRead()
	}
	return nil
}

// shut is the part of closeRead that does not block: Reads fail from here on. It returns the
// underlying stream that is to be closed for reading, if any.
func (h *receiveHalf) shut() network.Stream {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed { // cur may be the next source by now, on which the exchange waits (S3)
		return nil
	}
	h.closed = true
	h.drop(h.cur)
	old, listens := h.cur.stream, h.listens()
	if h.state == receiveHandover {
		h.settle()
	}
	if h.resumption != nil {
		h.progressed()
	}
	h.changed.broadcast()
	if listens {
		return nil // the exchange closes it
	}
	return old
}

func (h *receiveHalf) setDeadline(t time.Time) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.deadline = t
	h.changed.broadcast()
	if h.cur.reader == byPump || h.closed || h.state >= receiveBroken {
		return nil // book sets it, or nobody reads
	}
	return h.cur.stream.SetReadDeadline(t)
}

// awaitAnswer reads what is left of the acceptor's answer, unless somebody reads
// already. The stream is about to be closed: a read deadline does no harm any more.
func (h *receiveHalf) awaitAnswer(deadline time.Time) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	cur := h.cur
	if cur.reader != byNobody || cur.expect == "" || h.state != receiveOpen {
		return nil
	}
	h.take(cur, byApplication)
	expect, seen := cur.expect, int(cur.seen)
	_ = cur.stream.SetReadDeadline(deadline)
	h.mu.Unlock()
	err := readExpected(cur.stream, expect, seen)
	h.mu.Lock()
	cur.note(len(expect))
	h.book(cur, 0, err)
	return err
}

// owesAnswer says whether the acceptor's answer to the opening has yet to be read.
func (h *receiveHalf) owesAnswer() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.cur.expect != ""
}

// view is what the exchange needs to know of the application: whether it was given EOF, and
// whether it has closed its reading.
func (h *receiveHalf) view() (given, closed bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.given, h.closed
}

// keepsError says whether an error of cur is kept back.
func (h *receiveHalf) keepsError() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.state == receiveHeld && h.cur.end != nil && h.cur.end != io.EOF
}

// keepsEnd says whether an EOF of cur is kept back.
func (h *receiveHalf) keepsEnd() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.state == receiveHeld && h.cur.end == io.EOF
}

// hasFailed says whether the half is over with an error.
func (h *receiveHalf) hasFailed() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.state == receiveFailed
}

// progress is on which connection the half reads, and how many bytes that has brought.
func (h *receiveHalf) progress() (on network.Conn, count uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.cur.stream.Conn(), h.cur.count
}
