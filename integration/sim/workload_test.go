package sim

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"

	"github.com/go-portage/portage/migrate"
)

// kind is what the two applications of a stream do.
type kind int

const (
	kindBulk       kind = iota // both write and read at once
	kindPingPong               // each waits for the other
	kindRequest                // request, half-close, reply
	kindWriteOnly              // a handler that never reads
	kindReadOnly               // a handler that never writes
	kindConcurrent             // several goroutines write to one end at once
	kinds
)

func (k kind) String() string {
	return [...]string{"bulk", "ping-pong", "request", "write-only handler", "read-only handler", "concurrent writes"}[k]
}

// disturbance is what an application does beside all that, at any time.
type disturbance struct {
	side int
	at   time.Duration // after the stream came to that side
	what string        // CloseRead, CloseWrite, Close, Reset
}

// streamPlan is a stream's part of a plan.
type streamPlan struct {
	kind      kind
	opener    int
	at        time.Duration
	after     bool // at, and the times of its migrations, count from the last restart or redial on
	link      int
	labelled  bool
	known     bool   // the opener knows from identify that the acceptor speaks its protocol
	size      [2]int // bytes that each side writes
	chunk     int    // the largest Write
	buffer    int    // the largest Read
	pause     time.Duration
	pauses    float64 // how often an application pauses between calls
	pausesFor time.Duration
	deadlines [2]float64 // how often it sets one before a Write, and before a Read
	disturb   []disturbance
}

func (p streamPlan) String() string {
	s := fmt.Sprintf("%s, %s opens at %v on %d, %d and %d bytes, Write %d, Read %d, pause %v (%.2f), deadlines %.2f",
		p.kind, sideName(p.opener), p.at, p.link, p.size[0], p.size[1], p.chunk, p.buffer, p.pause, p.pauses, p.deadlines)
	if p.after {
		s += ", after the last restart or redial"
	}
	if !p.labelled {
		s += ", without label"
	}
	if !p.known {
		s += ", protocol not known"
	}
	for _, d := range p.disturb {
		s += fmt.Sprintf("; %s calls %s after %v", sideName(d.side), d.what, d.at)
	}
	return s
}

const (
	// patience is how long a Write may block before the application gives up and resets
	// the stream: longer than any transport takes to find out that its path is dead.
	patience = 100 * time.Second

	// noticed is how long after the last that has happened to its connections both ends
	// of a stream know what has become of it: the longest of the transports' own timeouts
	// is some 45 s (QUIC's idle timeout and a keep-alive before it; yamux's keep-alive and
	// write timeout), and the stall timeout of a handover is 30 s.
	noticed = 80 * time.Second

	maxRecord = 4 << 10
)

// open opens the stream and runs the opener's application.
func (st *simStream) open() {
	w, opener := st.w, st.plan.opener
	w.awaitBirth(st.id)
	time.Sleep(st.plan.at)
	l := w.link(st.plan.link)
	h, far := w.host(opener), w.node(1-opener).ID()
	ctx := network.WithAllowLimitedConn(w.t.Context(), "test")
	ctx = network.WithNoDial(ctx, "the run makes its connections")
	ctx = context.WithValue(ctx, onLink{}, l.ends[opener])
	if !st.plan.labelled {
		ctx = migrate.WithoutLabel(ctx)
	}
	if !st.plan.known {
		_ = w.node(opener).Peerstore().RemoveProtocols(far, st.pid)
	}
	s, err := h.NewStream(ctx, far, st.pid)
	if err != nil {
		w.logf("stream %d: not opened: %v", st.id, err)
		w.tally.add("streams not opened", 1)
		// The acceptor may have reset it. One without a label goes where go-libp2p likes, and
		// one that is asked onto a limited connection goes onto one without a limit instead.
		elsewhere := !st.plan.labelled || l.ends[opener].Stat().Limited
		if st.end(1-opener) == nil && st.wasHarmed() == "" && !w.anyHurt(l, elsewhere) {
			w.failf("cause", "stream %d cannot be opened: %v", st.id, err)
		}
		return
	}
	w.tally.add("streams", 1)
	st.run(st.enter(opener, s))
}

// anyHurt says whether l may harm its streams, or any connection may.
func (w *world) anyHurt(l *simLink, any bool) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return !l.hurt.IsZero() || any && slices.ContainsFunc(w.links, func(l *simLink) bool { return !l.hurt.IsZero() })
}

// accept is the acceptor's handler.
func (st *simStream) accept(s network.Stream) {
	e := st.enter(1-st.plan.opener, s)
	st.w.task(fmt.Sprintf("stream %d: handler", st.id), func() { st.run(e) })
}

// run runs the application of one end, until it has closed that.
func (st *simStream) run(e *end) {
	for _, d := range st.plan.disturb {
		if d.side != e.side {
			continue
		}
		st.w.task(fmt.Sprintf("stream %d: %s of %s", st.id, d.what, sideName(d.side)), func() {
			time.Sleep(d.at)
			e.do(d.what)
		})
	}
	a := &app{
		end:   e,
		w:     st.w.plan.rand("stream %d: writer %d", st.id, e.side),
		r:     st.w.plan.rand("stream %d: reader %d", st.id, e.side),
		began: time.Now(),
	}
	opener := e.side == st.plan.opener
	size := st.plan.size[e.side]
	switch st.plan.kind {
	case kindBulk:
		a.both(func() { a.send(size); a.endWriting() }, a.drain)
	case kindPingPong:
		a.pingPong(opener, size, st.plan.size[1-e.side])
	case kindRequest:
		if opener {
			a.send(size)
			e.closeWrite()
			a.drain()
		} else {
			a.drain()
			a.send(size)
			a.finish()
		}
	case kindWriteOnly:
		if opener {
			a.send(min(size, 1000))
			a.drain()
		} else {
			a.send(size)
		}
	case kindReadOnly:
		if opener {
			a.send(size)
			a.finish()
		} else {
			a.drain()
		}
	case kindConcurrent:
		if opener {
			a.both(func() { a.sendRecords(size); e.closeWrite() }, a.drain)
		} else {
			a.both(func() { a.send(size); a.endWriting() }, a.drain)
		}
	}
	e.mu.Lock()
	gaveUp := e.impatient
	e.mu.Unlock()
	st.agree()
	if gaveUp {
		e.abort()
	}
	e.close()
}

func (e *end) do(what string) {
	e.st.w.logf("stream %d: %s interferes: %s", e.st.id, sideName(e.side), what)
	switch what {
	case "CloseRead":
		e.closeRead()
	case "CloseWrite":
		e.closeWrite()
	case "Close":
		e.close()
	case "Reset":
		e.abort()
	}
}

// app is the application of one end. Writing and reading decide apart from each other.
type app struct {
	*end
	w, r  *rand.Rand
	began time.Time
}

// both runs two parts of the application beside each other.
func (a *app) both(f, g func()) {
	var wg sync.WaitGroup
	wg.Go(f)
	g()
	wg.Wait()
}

func (a *app) pause(r *rand.Rand) {
	if p := a.st.plan; p.pause > 0 && r.Float64() < p.pauses && time.Since(a.began) < p.pausesFor {
		time.Sleep(time.Duration(r.Int64N(int64(p.pause))))
	}
}

// deadline is how long the next call may take, or 0.
func deadline(r *rand.Rand, often float64) time.Duration {
	if r.Float64() < often {
		return time.Duration(r.Int64N(int64(20 * time.Millisecond)))
	}
	return 0
}

// send writes size bytes, in pieces. It says whether all of them were taken.
func (a *app) send(size int) bool {
	off := int64(0)
	a.out.mu.Lock()
	off = a.out.wrote
	a.out.mu.Unlock()
	for size > 0 {
		a.pause(a.w)
		p := make([]byte, min(size, 1+a.w.IntN(a.st.plan.chunk)))
		a.out.pattern(p, off)
		d := deadline(a.w, a.st.plan.deadlines[0])
		if d > 0 {
			_ = a.s.SetWriteDeadline(time.Now().Add(d))
		}
		n, err := a.write(p, d > 0)
		off += int64(n)
		size -= n
		a.mu.Lock()
		gaveUp := a.impatient
		a.mu.Unlock()
		if gaveUp {
			return false
		}
		if d > 0 {
			_ = a.s.SetWriteDeadline(time.Time{})
			if isTimeout(err) && !a.s.Conn().IsClosed() {
				continue // try again, as an application would
			}
		}
		if err != nil {
			return false
		}
	}
	return true
}

// sendRecords writes size bytes as records, from several goroutines at once.
func (a *app) sendRecords(size int) {
	const writers = 3
	var wg sync.WaitGroup
	for i := range writers {
		r := a.st.w.plan.rand("stream %d: concurrent writer %d", a.st.id, i)
		wg.Go(func() {
			for number, left := uint32(0), size/writers; left > 0; number++ {
				a.pause(r)
				b := record(uint64(a.st.id), byte(i), number, r.IntN(min(a.st.plan.chunk, maxRecord)))
				if _, err := a.write(b, false); err != nil {
					return
				}
				left -= len(b)
			}
		})
	}
	wg.Wait()
}

// fetch reads size bytes, or to the end where size is negative. It says whether it could.
func (a *app) fetch(size int) bool {
	idle := 0
	for size != 0 {
		a.pause(a.r)
		most := a.st.plan.buffer
		if size > 0 {
			most = min(most, size)
		}
		d := deadline(a.r, a.st.plan.deadlines[1])
		if d > 0 {
			_ = a.s.SetReadDeadline(time.Now().Add(d))
		}
		n, err := a.read(make([]byte, 1+a.r.IntN(most)), d > 0)
		if size > 0 {
			size -= n
		}
		if d > 0 {
			_ = a.s.SetReadDeadline(time.Time{})
			if isTimeout(err) && !a.s.Conn().IsClosed() {
				continue
			}
		}
		if err != nil {
			return size == 0
		}
		if idle++; n > 0 {
			idle = 0
		} else if idle > 100 {
			a.failf("live", "Read returns no bytes and no error, again and again")
			return false
		}
	}
	return true
}

// drain reads to the end, and once more: an end stays.
func (a *app) drain() {
	a.fetch(-1)
	a.in.mu.Lock()
	eof := a.in.eof && !a.in.lied // reading on behind a false EOF may yield the rest
	a.in.mu.Unlock()
	if !eof {
		return
	}
	if n, err := a.read(make([]byte, 1), false); n != 0 || err == nil {
		a.failf("end", "after EOF Read returns %d, %v", n, err)
	}
}

// endWriting ends it in one of the ways that applications have.
func (a *app) endWriting() {
	if a.w.IntN(10) == 0 {
		a.close() // which stops reading, too
	} else {
		a.closeWrite()
	}
}

// finish does so where the application is about to close anyway.
func (a *app) finish() {
	if a.w.IntN(2) == 0 {
		a.endWriting()
	}
}

// pingPong has both ends write in turn. Whoever cannot go on stops.
func (a *app) pingPong(first bool, mine, theirs int) {
	const rounds = 5
	for i := range rounds {
		part := func(size int) int { return size*(i+1)/rounds - size*i/rounds }
		send := func() bool { return a.send(part(mine)) }
		fetch := func() bool { return a.fetch(part(theirs)) }
		steps := []func() bool{send, fetch}
		if !first {
			steps = []func() bool{fetch, send}
		}
		for _, step := range steps {
			if !step() {
				return
			}
		}
	}
	if a.w.IntN(2) == 0 {
		a.closeWrite()
		a.drain()
	}
}
