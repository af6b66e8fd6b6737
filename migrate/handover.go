package migrate

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
)

// The handover of a receiving half: from the source that it reads to the next one. The old
// source is read to its end wherever the application does not, and the next one, too, where
// that takes long, each by a pump into a bounded buffer. Later Reads are served from there
// first.
//
// With a verified handover the switch needs no EOF: once the bytes of FinalSize are there, a
// Read that is still inside the old stream waits for nothing, and is called out by closing
// that stream for reading. Never with a read deadline: on yamux and WebRTC that loses data.

var (
	errLost    = errors.New("the old stream ended before all of its data came")
	errTooMuch = fmt.Errorf("%w: the old stream carried more than its final size", errViolation) // S12
	errStalled = errors.New("the old stream made no progress")
)

const (
	// readChunk is how much a pump reads at once: 32 KiB, as io.Copy does.
	readChunk = 32 << 10

	// maxDrained bounds what is kept of the old stream for an application that does not
	// read: the largest window that a muxer of go-libp2p opens (yamux, 16 MiB), hence all
	// that can be in flight there when its writer has stopped.
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

	// patience is how many times as long as the stall timeout an old stream may bring nothing
	// while other streams of its connection bring something.
	patience = 10

	// rereads and rereadAfter are how often, and after how long at first, a stream
	// whose end came too early is read again: a muxer that goes down can report
	// EOF while data are still on their way into its buffer. 10 ms doubled 6 times
	// is 630 ms in all.
	rereads     = 6
	rereadAfter = 10 * time.Millisecond
)

// handover is what a receiving half needs to know on its way to the next source.
type handover struct {
	next    *source
	goal    goal
	old     pumped
	ahead   pumped
	pumping bool // next is read ahead
}

// pumped is why a pump does not read.
type pumped uint8

const (
	enough   pumped = iota // it reads, or has no reason to
	noRoom                 // as much as there may be has been read and not been taken
	noMemory               // the resource manager refuses more
)

// goal tells when an old source is done with.
type goal interface {
	// left is how many bytes of it are yet to come, at most.
	left(old *source) uint64

	// reached says whether it is done with. given says that the application was given
	// an EOF of it. An error says that it never will be.
	reached(old *source, given bool) (bool, error)

	// due says whether the peer has ended it, so that what is missing must be on its way.
	due(next *source) bool
}

// finalSize is the goal of a verified handover: how many bytes the old stream carries (S12).
type finalSize uint64

func (f finalSize) left(old *source) uint64 { return uint64(f) - min(old.count, uint64(f)) }
func (f finalSize) due(*source) bool        { return true }
func (f finalSize) reached(old *source, given bool) (bool, error) {
	switch {
	case old.count > uint64(f):
		return false, errTooMuch
	case old.count == uint64(f):
		return true, nil
	case given:
		return false, errLost // that EOF was none, and the application has believed it
	case old.end == nil, old.end == io.EOF:
		return false, nil // after an EOF more may be on its way; await reads on
	}
	return false, fmt.Errorf("%w: %w", errLost, old.end)
}

// handover makes next the source that follows cur when the goal is reached. It says whether
// that is so already, or never will be: there is nothing to wait for.
func (h *receiveHalf) handover(next *source, g goal) (over bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.state == receiveFailed || h.state == receiveLost {
		return true
	}
	h.state, h.moving = receiveHandover, &handover{next: next, goal: g}
	h.changed.broadcast()
	h.settle()
	return h.moving == nil
}

// reserveIn has what waits for the application during the handover reserved in memory.
func (h *receiveHalf) reserveIn(in memory) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.moving == nil {
		return
	}
	if h.budget.empty() { // nor may it be in a scope that the stream has no more
		h.budget = &span{parent: in}
		_ = h.budget.reserve(h.cur.got.len) // a little that came with the opening
	}
}

// isRead says whether somebody is inside a Read of src.
func (h *receiveHalf) isRead(src *source) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return src.reader != byNobody
}

// source is what the half reads at the moment.
func (h *receiveHalf) source() *source {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.cur
}

// settle looks whether the old source is done with, and switches. mu must be held,
// and the state be receiveHandover.
func (h *receiveHalf) settle() {
	done, err := h.moving.goal.reached(h.cur, h.given)
	switch {
	case err != nil && (h.listens() || h.given || errors.Is(err, errViolation)):
		h.lose(err)
	case done || !h.listens():
		h.switchOver()
	}
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
		return h.broke()
	}
	ho, old := h.moving, h.cur
	go h.pump(ho, old, &ho.old, maxDrained)
	var (
		again   = rereads
		backoff = rereadAfter
		count   = old.count
		path    = quietFromNow()
		began   = path.since // waiting for the path
		owed    = ho.goal.due(ho.next)
	)
	for h.moving == ho {
		if old.count != count {
			count, again, backoff = old.count, rereads, rereadAfter
			path = quietFromNow()
		}
		if !owed && ho.goal.due(ho.next) {
			owed, path = true, quietFromNow()
		}
		if old.end != nil {
			if again == 0 {
				h.lose(errLost)
				break
			}
			retry := time.Now().Add(backoff)
			for h.moving == ho && h.changed.wait(&h.mu, retry) {
			}
			again, backoff = again-1, backoff*2
			old.end = nil
			h.changed.broadcast()
			continue
		}
		limit := stall
		if ho.ahead != enough && ho.next.got.len > 0 {
			limit = min(stall, hold)
		}
		switch {
		case ho.old != enough:
			path = quietFromNow() // the path is not to blame
			began = path.since
		case owed && time.Since(path.due(limit)) >= 0:
			h.mu.Unlock()
			seen := others()
			h.mu.Lock()
			if h.moving == ho && old.count == count && path.over(seen, limit) {
				h.lose(errStalled)
			}
			continue
		case time.Since(began) >= stallNotice && !ho.pumping:
			ho.pumping = true
			go h.pump(ho, ho.next, &ho.ahead, maxAhead)
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
	return h.broke()
}

// broke is the error of a handover that has ended without a switch. mu must be held.
func (h *receiveHalf) broke() error {
	if h.state == receiveLost {
		return errDropped
	}
	return h.err
}

// pump reads src wherever the application does not, as long as the handover ho lasts, until
// bound bytes wait for the application.
func (h *receiveHalf) pump(ho *handover, src *source, lacks *pumped, bound int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var buf []byte // one that src has not taken over
	// A Read brings a packet, and the resource manager has one lock for the whole host: what
	// is reserved serves many Reads.
	held := 0 // is reserved, and not read yet
	release := func() { h.unreserve(held); held = 0 }
	defer release()
	pause := func(why pumped, until time.Time) {
		release()
		if *lacks != why {
			*lacks = why
			h.changed.broadcast()
		}
		h.changed.wait(&h.mu, until)
	}
	for h.moving == ho {
		chunk := readChunk
		if src == h.cur {
			chunk = int(min(ho.goal.left(src), readChunk))
		}
		size := min(chunk, bound-src.got.len)
		switch {
		case src.reader != byNobody || src.end != nil:
			pause(enough, time.Time{})
			continue
		case size == 0:
			pause(noRoom, time.Time{})
			continue
		}
		if held < min(size, readChunk/8) {
			switch err := h.budget.reserve(size - held); {
			case errors.Is(err, network.ErrResourceScopeClosed):
				h.lose(err) // next is gone, in whose scope this is (S8)
				return
			case err != nil:
				pause(noMemory, time.Now().Add(stallNotice))
				continue
			}
			held = size
		}
		*lacks = enough
		if buf == nil {
			buf = make([]byte, chunk)
		}
		h.take(src, byPump)
		n, err := h.pull(src, buf[:min(size, held)])
		if n > 0 && h.keeps(src) {
			held -= n
			if src.got.add(buf[:n]) {
				buf = nil
			}
		}
		h.book(src, n, err)
		if err == io.EOF && src == ho.next {
			return // whoever reads it next is told again
		}
	}
}

// keeps says whether what a pump brings of src is kept for the application. All is that counts as received,
// also where the handover has broken: a resumable stream goes on behind that. mu must be held.
func (h *receiveHalf) keeps(src *source) bool {
	return !h.closed && !src.gone &&
		(h.state < receiveBroken || h.state == receiveBroken && h.resumption != nil && src == h.cur)
}

// quiet is how long an old stream that owes bytes has brought none (M4). That alone is no
// stall: on a slow path, all that was written to other streams may come first. So the other
// streams are looked at, too: once early (most handovers have ended by then), and again when
// the time has passed.
type quiet struct {
	since  time.Time // the last byte of the stream, or when one became due
	alive  time.Time // when its path was last seen to be alive
	looked time.Time // when the others were; zero: not since then
}

func quietFromNow() quiet {
	now := time.Now()
	return quiet{since: now, alive: now}
}

// due is when to look at the other streams. limit is how long the path may bring nothing.
func (q *quiet) due(limit time.Duration) time.Time {
	soon := min(limit, maxHold) / 2
	if q.looked.IsZero() {
		return q.alive.Add(soon)
	}
	return latest(q.alive.Add(limit), q.looked.Add(soon)) // limit may be shorter than it was
}

// over says whether to give up. others is the result of a look at the other streams just
// now: when they last brought something.
func (q *quiet) over(others time.Time, limit time.Duration) bool {
	first := q.looked.IsZero()
	q.looked = time.Now()
	q.alive = latest(q.alive, others)
	return !first && (q.looked.Sub(q.alive) >= limit || q.looked.Sub(q.since) >= patience*limit)
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// flows are the connections that exchanges look at when they take long. Safe for concurrent
// use.
type flows struct {
	mu sync.Mutex // guards all below
	of map[network.Conn]*flow
}

// flow is what the streams of a connection have brought, for all exchanges that look at it.
type flow struct {
	watchers int // guarded by flows.mu

	mu    sync.Mutex // guards all below
	last  map[*receiveHalf]arrived
	looks int

	// alive is the last look at which a stream had brought something since the look before,
	// and by is that stream. aliveToo is the last such look for any other stream.
	alive, aliveToo time.Time
	by              *receiveHalf
}

// arrived is how many bytes a stream had brought at a look.
type arrived struct {
	bytes uint64
	look  int
}

func (fs *flows) watch(c network.Conn) *flow {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	f := fs.of[c]
	if f == nil {
		if fs.of == nil {
			fs.of = make(map[network.Conn]*flow)
		}
		f = new(flow)
		fs.of[c] = f
	}
	f.watchers++
	return f
}

func (fs *flows) leave(c network.Conn) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	f := fs.of[c]
	if f.watchers--; f.watchers == 0 {
		delete(fs.of, c)
	}
}

// look looks at those of all, the peer's streams, that are on c. It returns when one of them
// other than own was last found to have brought something, or to have moved on from c.
func (f *flow) look(c network.Conn, own *receiveHalf, all []*Stream) time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.last == nil {
		f.last = make(map[*receiveHalf]arrived)
	}
	f.looks++
	now := time.Now()
	for _, s := range all {
		h := &s.recv
		conn, bytes := h.progress()
		on := conn == c
		before, known := f.last[h]
		if on {
			f.last[h] = arrived{bytes, f.looks}
		}
		more := on && bytes > before.bytes || known && !on // it has switched
		if !more || f.looks == 1 {
			continue
		}
		if f.by != h {
			f.by, f.aliveToo = h, f.alive
		}
		f.alive = now
	}
	for h, a := range f.last {
		if a.look != f.looks {
			delete(f.last, h)
		}
	}
	if f.by == own {
		return f.aliveToo
	}
	return f.alive
}

// watch is an exchange's view of a connection. It costs nothing before it looks.
type watch struct {
	s   *Stream
	c   network.Conn
	own *receiveHalf // does not count; may be nil
	f   *flow        // nil until it looks
}

func (w *watch) look() time.Time {
	h := w.s.host
	if w.f == nil {
		w.f = h.flows.watch(w.c)
	}
	return w.f.look(w.c, w.own, h.labels.all(w.s.peer))
}

func (w *watch) end() {
	if w.f != nil {
		w.s.host.flows.leave(w.c)
		w.f = nil
	}
}
