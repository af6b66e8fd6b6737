package migrate

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	msmux "github.com/multiformats/go-multistream"

	"github.com/libp2p/go-libp2p/core/network"
)

// The receiving half of a stream. Where a byte comes from:
//
//	Read <- what others have read ahead for it <- cur.Read
//
// One goroutine at a time is inside cur.Read: it has the read token (reading). A
// migration moves the half in two steps, both taken by the exchange:
//
//	hold      an end of cur, EOF or error, is kept back, since the exchange alone
//	          can tell what it means (S5, S12). Data flow as before.
//	handover  the next stream is known. cur is read to its end, then next (S4).
//	          Where the application does not read, a drain goroutine takes the
//	          token and reads into a bounded buffer, from which later Reads are
//	          served first.
//
// The switch happens in one place, switchOver. With a verified handover it needs no
// EOF: once the bytes of FinalSize are there, a Read that is still inside the old
// stream waits for nothing, and is called out by closing that stream for reading.
// Never with a read deadline: on yamux and WebRTC that loses data.
//
// Nothing that may block on a dead path is called with mu held.

type receiveState uint8

const (
	receiveOpen     receiveState = iota // Reads come from cur
	receiveHeld                         // and an end of cur is kept back
	receiveHandover                     // cur to its end, then next
	receiveBroken                       // the handover has failed, with err; see lose
	receiveFailed                       // over, with err
)

var (
	// errReadClosed is what Read returns after CloseRead or Close.
	errReadClosed = errors.New("read on a closed stream")

	errLost         = errors.New("the old stream ended before all of its data came")
	errTooMuch      = fmt.Errorf("%w: the old stream carried more than its final size", errViolation) // S12
	errStalled      = errors.New("the old stream made no progress")
	errUnproven     = errors.New("the new connection is closed, and nothing shows that the ack has arrived")
	errUntrustedEnd = errors.New("EOF after a migration whose outcome is unknown")
)

const (
	// readChunk is how much the drain reads at once: 32 KiB, as io.Copy does.
	readChunk = 32 << 10

	// maxDrained bounds what is kept for an application that does not read: the
	// largest window that a muxer of go-libp2p opens (yamux, 16 MiB), hence all
	// that can be in flight on the old stream when its writer has stopped.
	maxDrained = 16 << 20

	// maxAhead bounds what is read from the next stream before the old one has
	// ended, so that what waits there does not hold the window that all streams of
	// a QUIC connection share (768 KiB at first), or the buffer of a WebRTC one. It
	// is more than most messages; and 16 such streams are all that the resource
	// manager grants a peer by default (64 MiB).
	maxAhead = 4 << 20

	// stallNotice is how long a handover takes before the next stream is read ahead
	// (M4), so that this is rare: an ordinary handover takes a round trip.
	stallNotice = time.Second

	// maxHold is how long the old stream may make no progress while no more is
	// read ahead, and what waits in the new one may hold up all others of its
	// connection. It is long enough for TCP to repeat what was lost, more than once.
	maxHold = 5 * time.Second

	// rereads and rereadAfter are how often, and after how long at first, a stream
	// whose end came too early is read again: a muxer that goes down can report
	// EOF while data are still on their way into its buffer. 10 ms doubled 6 times
	// is 630 ms in all.
	rereads     = 6
	rereadAfter = 10 * time.Millisecond
)

type receiveHalf struct {
	mu       sync.Mutex // guards all below
	changed  cond       // broadcast when a field changes that someone may wait for
	cur      network.Stream
	next     network.Stream // receiveHandover
	count    uint64         // application bytes that were read from cur
	final    uint64         // verified: how many there will have been
	deadline time.Time
	expect   string // opener: what is left of the acceptor's answer to the opening
	ready    chunks // read by others, not yet by the application
	ahead    chunks // of next
	budget   *span  // what ready and ahead have reserved
	ended    error  // how cur ended, where that is not yet settled
	err      error  // of receiveBroken and receiveFailed

	state     receiveState
	reading   bool // someone is inside cur.Read
	ours      bool // and it is not the application
	aheadOn   bool // readAhead has the read token of next
	aheadFull bool // it reads no more, for its bound or for want of memory
	starved   bool // the drain waits for memory
	verified  bool // final is known
	eof       bool // the application was given EOF
	closed    bool // CloseRead or Close was called
	proof     bool // S3: the end of cur is read, though the application may close its reading
	untrusted bool // S5: a draft-only responder may have acked an attempt on cur
	ownEnd    bool // the application has ended its writing
}

func (h *receiveHalf) read(p []byte) (int, error) {
	h.mu.Lock()
	if h.state != receiveOpen || h.reading || h.eof || h.closed || h.ready.len != 0 || h.expect != "" || h.ended != nil {
		defer h.mu.Unlock()
		return h.readSlowly(p)
	}
	h.reading = true
	cur := h.cur
	h.mu.Unlock()

	n, err := readFrom(cur, p)

	h.mu.Lock()
	defer h.mu.Unlock()
	return h.result(cur, p, n, err)
}

// readSlowly is Read in every state. mu must be held.
func (h *receiveHalf) readSlowly(p []byte) (int, error) {
	for {
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
		case h.ready.len != 0:
			n := h.ready.take(p)
			h.budget.release(n)
			h.changed.broadcast()
			return n, nil
		case h.eof:
			return 0, io.EOF
		case h.ended != nil && h.state == receiveOpen:
			return 0, h.end(h.ended) // it was kept back, and released
		case h.reading || h.ended != nil:
			if !h.changed.wait(&h.mu, h.deadline) {
				return 0, os.ErrDeadlineExceeded
			}
			continue
		case len(p) == 0:
			return 0, nil
		}
		h.reading = true
		cur, expect := h.cur, h.expect
		h.mu.Unlock()
		var n int
		var err error
		if expect == "" {
			n, err = readFrom(cur, p)
		} else {
			n, expect, err = readBehind(cur, expect, p)
		}
		h.mu.Lock()
		if h.cur == cur {
			h.expect = expect
		}
		if n == 0 && err == nil {
			h.give(cur, 0, nil)
			continue
		}
		return h.result(cur, p, n, err)
	}
}

// result books what the application's Read of the stream from brought, and returns
// what the application is to see of it. mu must be held.
func (h *receiveHalf) result(from network.Stream, p []byte, n int, err error) (int, error) {
	before := h.state
	kept := h.give(from, n, err)
	switch {
	case h.state == receiveFailed && before != receiveFailed:
		return 0, h.err
	case h.state == receiveBroken:
		return h.readSlowly(p) // these bytes may have broken the promise of the final size
	case h.state == receiveFailed && err != nil:
		return n, h.err
	case h.closed && kept:
		return n, errReadClosed // what ended may have been the old stream only
	case h.closed:
		return n, orElse(err, errReadClosed)
	case n > 0 && (kept || err == nil):
		return n, nil
	case kept || err == nil:
		return h.readSlowly(p)
	case errors.Is(err, os.ErrDeadlineExceeded):
		// The application's, whatever has become of the connection: that shows next.
	case err == io.EOF || !isDeadline(err, from):
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

// give returns the read token, with what a Read of the stream from brought. kept says
// that err is not the application's, at least not yet. mu must be held.
func (h *receiveHalf) give(from network.Stream, n int, err error) (kept bool) {
	h.changed.broadcast()
	if from != h.cur {
		// Called out of the old stream: all of it was there before, or nobody wants it.
		if n > 0 && !h.closed {
			h.lose(errTooMuch)
		}
		return true
	}
	h.reading = false
	// A read of ours has no deadline, but for the application's on a yamux stream that has
	// got its FIN: that cannot be lifted any more, and is reported with data.
	end := err != nil && (!h.closed || h.proof) && (h.ours && n == 0 || !isDeadline(err, from))
	if h.ours {
		h.ours = false
		if !h.closed && !h.deadline.IsZero() {
			_ = h.cur.SetReadDeadline(h.deadline)
		}
	}
	h.count += uint64(n)
	switch h.state {
	case receiveHeld:
		if end {
			h.ended = err
		}
		return end
	case receiveHandover:
		if end {
			h.ended = err
		}
		h.settle()
		return end || h.cur != from
	}
	return false
}

// end is what the application is told when cur ended with err outside of an exchange. After
// an error there is no way back to data, on whatever connection: the other end does not
// hear of what this one was told, unless the stream stays where it failed. mu must be held.
func (h *receiveHalf) end(err error) error {
	if err != io.EOF {
		h.failLocked(forGood(err))
		return h.err
	}
	if h.untrusted && h.ownEnd {
		h.failLocked(reset(errUntrustedEnd))
		return h.err
	}
	h.eof, h.ended = true, nil
	return err
}

// settle looks whether the old stream is done with, and switches. mu must be held,
// and the state be receiveHandover.
func (h *receiveHalf) settle() {
	switch {
	case h.verified && h.count > h.final:
		h.lose(errTooMuch)
	case h.closed && !h.proof:
		h.switchOver()
	case h.verified && h.count == h.final:
		h.switchOver()
	case h.ended == nil:
	case h.verified && h.ended == io.EOF:
		// More may be on its way; await reads on.
	case h.verified:
		h.lose(fmt.Errorf("%w: %w", errLost, h.ended))
	case h.ended != io.EOF:
		h.lose(h.ended)
	case h.cur.Conn().IsClosed():
		// Without a final size nothing vouches for an EOF from a dead connection.
		h.lose(errLost)
	default:
		h.switchOver()
	}
}

// switchOver makes next the stream that Reads come from. mu must be held.
func (h *receiveHalf) switchOver() {
	h.cur, h.next = h.next, nil
	h.count = uint64(h.ahead.len)
	if h.closed { // nobody will read it
		h.budget.release(h.ahead.len)
		h.ahead = chunks{}
	}
	h.ready.append(&h.ahead)
	h.state, h.ended, h.expect, h.verified, h.proof = receiveOpen, nil, "", false, false
	h.untrusted = false // S5: it was the old stream's end that could not be told
	// The token of the old stream is history; that of the new one may be taken.
	h.reading, h.ours, h.aheadOn, h.aheadFull = h.aheadOn, h.aheadOn, false, false
	// Who has closed has no use for a deadline; the exchange, which may read on, must not
	// meet it (S3).
	if !h.ours && !h.closed && !h.deadline.IsZero() {
		_ = h.cur.SetReadDeadline(h.deadline)
	}
	h.changed.broadcast()
}

// hold keeps back how cur ends, until release or handover. An exchange that follows right
// upon another finds it kept back already.
func (h *receiveHalf) hold() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.state == receiveOpen {
		h.state = receiveHeld
	}
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
	}
}

// dropProof undoes awaitProof. mu must be held.
func (h *receiveHalf) dropProof() {
	if h.proof && h.closed {
		go h.cur.CloseRead() // which closeRead has left out
	}
	h.proof = false
}

// distrust notes that the peer may take an attempt that has failed for a migration (S5).
func (h *receiveHalf) distrust() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.untrusted = true
}

// awaitProof has the end of cur read from here on, whether the application reads or not:
// it proves to a responder that its ack has arrived (S3). It says false where there is no
// such end to come: the application has closed its reading before, or cur has failed
// already, which was kept back during an attempt of ours.
func (h *receiveHalf) awaitProof() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.state == receiveFailed || h.ended != nil && h.ended != io.EOF {
		h.dropProof()
		return false
	}
	h.proof = h.proof || !h.closed
	return h.proof
}

// handover makes next the stream that follows cur. With verified, it does so once
// final bytes have been read from cur; without, once cur has ended. What is read
// meanwhile for the application is reserved in budget.
func (h *receiveHalf) handover(next network.Stream, final uint64, verified bool, budget *span) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.state == receiveFailed {
		return
	}
	h.budget.release(h.ready.len)
	h.budget = budget
	_ = h.budget.reserve(h.ready.len) // they are there already
	h.state, h.next, h.final, h.verified = receiveHandover, next, final, verified
	h.changed.broadcast()
	if h.eof && !verified {
		h.switchOver()
		return
	}
	if h.eof && h.ended == nil && h.count < final {
		// An earlier EOF was none, and the application has believed it.
		h.lose(errLost)
		return
	}
	h.settle()
}

// await waits until the half has switched, and sees to it that it does although the
// application does not read. stall is how long the old path may make no progress, and
// hold how long when more waits in the new stream than is read ahead. others looks at the
// streams of its connection, and says when they were last seen to bring something; it is
// called without mu.
func (h *receiveHalf) await(stall, hold time.Duration, others func() time.Time) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.state != receiveHandover {
		return h.err
	}
	go h.drain()
	var (
		again   = rereads
		backoff = rereadAfter
		count   = h.count
		path    = quietFromNow()
		began   = path.since // waiting for the path
		owed    = h.verified // the peer has ended the old stream, so its end is due
	)
	for h.state == receiveHandover {
		if h.count != count {
			count, again, backoff = h.count, rereads, rereadAfter
			path = quietFromNow()
		}
		if !owed && h.ahead.len > 0 {
			// One that has only the draft may do so much later than it acks, namely when
			// its application has read what we sent. It writes to the new stream then.
			owed, path = true, quietFromNow()
		}
		if h.ended != nil {
			if again == 0 {
				h.lose(errLost)
				break
			}
			retry := time.Now().Add(backoff)
			for h.state == receiveHandover && h.changed.wait(&h.mu, retry) {
			}
			again, backoff = again-1, backoff*2
			h.ended = nil
			h.changed.broadcast()
			continue
		}
		limit := stall
		if h.aheadFull {
			limit = min(stall, hold)
		}
		switch {
		case h.starved || h.ready.len+readChunk > maxDrained:
			path = quietFromNow() // for want of memory here, the path is not to blame
			began = path.since
		case owed && time.Since(path.due(limit)) >= 0:
			h.mu.Unlock()
			seen := others()
			h.mu.Lock()
			if h.state == receiveHandover && h.count == count && path.over(seen, limit) {
				h.lose(errStalled)
			}
			continue
		case time.Since(began) >= stallNotice && !h.aheadOn && h.ahead.len == 0:
			h.aheadOn = true
			go h.readAhead(h.next)
		}
		var wake time.Time
		if owed {
			wake = path.due(limit)
		}
		if at := began.Add(stallNotice); time.Since(at) < 0 && (!owed || at.Before(wake)) {
			wake = at
		}
		h.changed.wait(&h.mu, wake)
	}
	return h.err
}

// drain reads the old stream to its end wherever the application does not.
func (h *receiveHalf) drain() {
	h.mu.Lock()
	defer h.mu.Unlock()
	var spare []byte // a buffer that ready has not taken over
	for h.state == receiveHandover {
		size := readChunk
		if left := h.final - h.count; h.verified && left < readChunk {
			size = int(left)
		}
		if h.reading || h.ended != nil || h.ready.len+size > maxDrained {
			if h.starved { // it is the path that is waited for again
				h.starved = false
				h.changed.broadcast()
			}
			h.changed.wait(&h.mu, time.Time{})
			continue
		}
		budget := h.budget
		err := budget.reserve(size)
		if errors.Is(err, network.ErrResourceScopeClosed) {
			h.lose(err) // next is gone, in whose scope this is (S8)
			return
		}
		if h.starved = err != nil; h.starved {
			h.changed.wait(&h.mu, time.Now().Add(stallNotice))
			continue
		}
		h.reading, h.ours = true, true
		if !h.deadline.IsZero() || h.closed { // one that was set before it closed may be there still
			_ = h.cur.SetReadDeadline(time.Time{})
		}
		cur, expect := h.cur, h.expect
		h.mu.Unlock()
		if cap(spare) < size {
			spare = make([]byte, size)
		}
		buf := spare[:size]
		n, expect, err := readBehind(cur, expect, buf)
		h.mu.Lock()
		budget.release(size - n)
		if h.state >= receiveBroken || h.closed {
			budget.release(n)
			n = 0
		}
		if h.cur == cur {
			h.expect = expect
		}
		if h.keep(buf[:n], budget) {
			spare = nil
		}
		h.give(cur, n, err)
	}
}

// readAhead reads next while the old stream has not ended, up to maxAhead (M4). It has
// next's read token.
func (h *receiveHalf) readAhead(next network.Stream) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var spare []byte // as in drain
	// A Read brings a packet, and the resource manager has one lock for the whole host: what
	// is reserved serves many Reads.
	budget, held := h.budget, 0 // held is reserved, and not read yet
	defer func() { budget.release(held) }()
	for h.state == receiveHandover && h.next == next && h.ahead.len < maxAhead {
		size := min(readChunk, maxAhead-h.ahead.len)
		if held < min(size, readChunk/8) {
			if budget.reserve(size-held) != nil {
				h.aheadFull = h.ahead.len > 0
				break
			}
			held = size
		}
		if cap(spare) < held {
			spare = make([]byte, size)
		}
		buf := spare[:held]
		h.mu.Unlock()
		n, err := readFrom(next, buf)
		h.mu.Lock()
		held -= n
		switch {
		case h.state >= receiveBroken:
			budget.release(n)
			return
		case h.next != next:
			// Switched meanwhile: this is an ordinary Read now. Or it is of a stream that
			// is history already, since the next migration has called it out.
			if h.closed {
				budget.release(n)
				n = 0
			}
			h.keep(buf[:n], budget)
			h.give(next, n, err)
			return
		}
		if n > 0 {
			if h.ahead.add(buf[:n]) {
				spare = nil
			}
			h.aheadFull = h.ahead.len == maxAhead
			h.changed.broadcast()
		}
		if err == io.EOF {
			break // next reports it again
		}
		if err != nil {
			h.lose(err) // S8
			return
		}
	}
	switch next {
	case h.next:
		h.aheadOn = false
	case h.cur:
		h.give(next, 0, nil)
	}
}

// keep adds b, which was reserved in budget, to what later Reads are served from. It says
// whether b was taken over.
func (h *receiveHalf) keep(b []byte, budget *span) (taken bool) {
	if budget != h.budget { // the next migration has begun
		budget.release(len(b))
		_ = h.budget.reserve(len(b)) // they are there already
	}
	return h.ready.add(b)
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
	if h.closed { // cur may be the next stream by now, on which the exchange waits (S3)
		return nil
	}
	h.closed = true
	h.budget.release(h.ready.len)
	h.ready = chunks{}
	old, proof := h.cur, h.proof
	if h.state == receiveHandover {
		h.settle()
	}
	h.changed.broadcast()
	if proof {
		return nil // the exchange closes it
	}
	return old
}

func (h *receiveHalf) setDeadline(t time.Time) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.deadline = t
	h.changed.broadcast()
	if h.ours || h.closed || h.state >= receiveBroken {
		return nil // give sets it, or nobody reads
	}
	return h.cur.SetReadDeadline(t)
}

// noteOwnEnd tells the half that the application has ended its writing (S5).
func (h *receiveHalf) noteOwnEnd() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ownEnd = true
}

// lose ends a handover that cannot succeed. The application is told by abort, which takes its
// writing away first: told now it would close, and the other end take that for a clean end
// (S8). So Reads wait for that, and await returns the error. Outside of a handover, where
// no exchange waits, Reads fail at once. mu must be held.
func (h *receiveHalf) lose(cause error) {
	switch h.state {
	case receiveBroken, receiveFailed:
	case receiveHandover:
		h.drop()
		h.state, h.err = receiveBroken, reset(cause)
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
	h.drop()
	h.state, h.err = receiveFailed, err
	h.changed.broadcast()
}

// drop frees what was read for an application that will not read it. mu must be held.
func (h *receiveHalf) drop() {
	h.budget.release(h.ready.len + h.ahead.len)
	h.ready, h.ahead = chunks{}, chunks{}
}

// view is what the exchange needs to know of the half.
func (h *receiveHalf) view() (eof, closed bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.eof, h.closed
}

// readFrom is a Read of s that leaves an EOF which comes along with data for the next
// Read. A true one comes again; yamux's is none, but says that its session is down and
// the other end cannot be told of the room that the Read has made: more may be there.
func readFrom(s network.Stream, p []byte) (int, error) {
	n, err := s.Read(p)
	if n > 0 && err == io.EOF {
		return n, nil
	}
	return n, err
}

// readBehind reads the rest of expect from s, and then into p what comes behind it. It
// returns what is left of expect; as long as anything is, n is 0.
func readBehind(s network.Stream, expect string, p []byte) (n int, rest string, err error) {
	if expect == "" {
		n, err = readFrom(s, p)
		return n, "", err
	}
	buf := p
	if len(p) < len(expect) {
		buf = make([]byte, len(expect))
	}
	n, err = readFrom(s, buf)
	k := min(n, len(expect))
	if string(buf[:k]) != expect[:k] {
		return 0, expect, refusal(buf[:k], expect)
	}
	if rest = expect[k:]; rest != "" && err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return copy(p, buf[k:n]), rest, err
}

// refusal says what an answer to the opening means that is not the expected one.
func refusal(got []byte, expect string) error {
	for i := range got {
		if got[i] != expect[i] {
			if string(got[i:min(len(got), i+4)]) == notAvailable {
				break
			}
			return fmt.Errorf("unexpected answer to the opening: %q", got)
		}
	}
	return msmux.ErrNotSupported[string]{}
}

// awaitAnswer reads what is left of the acceptor's answer, unless somebody reads
// already. The stream is about to be closed: a read deadline does no harm any more.
func (h *receiveHalf) awaitAnswer(deadline time.Time) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.reading || h.expect == "" || h.state != receiveOpen {
		return nil
	}
	h.reading = true
	cur, expect := h.cur, h.expect
	_ = cur.SetReadDeadline(deadline)
	h.mu.Unlock()
	err := readExpected(cur, expect)
	h.mu.Lock()
	if h.cur == cur {
		h.expect = ""
	}
	h.give(cur, 0, err)
	return err
}

// hasFailed says whether the half is over with an error.
func (h *receiveHalf) hasFailed() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.state == receiveFailed
}

// hasEnded says whether the end of cur was read, and given to the application or kept
// back.
func (h *receiveHalf) hasEnded() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.eof || h.ended != nil
}

// firstOfNext waits for the first bytes or the EOF of next, and keeps the bytes.
func (h *receiveHalf) firstOfNext(next network.Stream) error {
	buf := make([]byte, 1<<10)
	n, err := readProof(next, buf)
	if err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if n > 0 && h.eof {
		return fmt.Errorf("%w: data after the end", errViolation) // S11
	}
	h.ahead.add(buf[:n])
	return nil
}

// readProof reads what proves that the ack has arrived (S3): bytes of next, or its EOF,
// but not one from a connection that is closed, which may be none (S12).
func readProof(next network.Stream, buf []byte) (n int, err error) {
	n, err = next.Read(buf)
	switch {
	case err == io.EOF && n == 0 && next.Conn().IsClosed():
		return 0, errUnproven
	case err == io.EOF:
		return n, nil
	}
	return n, err
}
