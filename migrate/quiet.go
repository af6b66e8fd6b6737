package migrate

import (
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
)

// patience is how many times as long as the stall timeout an old stream may bring nothing
// while other streams of its connection bring something.
const patience = 10

// quiet is how long an old stream that owes bytes has brought none (M4). That alone is no
// stall: on a slow path what was written for other streams may come first, all of it. So
// these are looked at, too: soon, for most handovers end sooner, and when the time has
// passed.
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

// over says whether to wait no longer, where the other streams were looked at just now, and
// have last been seen to bring something at the time others.
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

// oldPaths are the old connections of handovers that take long. Safe for concurrent use.
type oldPaths struct {
	mu sync.Mutex // guards all below
	of map[network.Conn]*oldPath
}

// oldPath is what the streams of a connection have brought, for all handovers from it.
type oldPath struct {
	watchers int // guarded by oldPaths.mu

	mu    sync.Mutex // guards all below
	last  map[*receiveHalf]arrived
	looks int

	// When a stream was last seen to have brought something since the look before, and
	// which; and when one was that is another than that.
	alive, aliveToo time.Time
	by              *receiveHalf
}

// arrived is how many bytes a stream had brought at a look.
type arrived struct {
	bytes uint64
	look  int
}

func (ps *oldPaths) watch(c network.Conn) *oldPath {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	p := ps.of[c]
	if p == nil {
		if ps.of == nil {
			ps.of = make(map[network.Conn]*oldPath)
		}
		p = new(oldPath)
		ps.of[c] = p
	}
	p.watchers++
	return p
}

func (ps *oldPaths) leave(c network.Conn) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	p := ps.of[c]
	if p.watchers--; p.watchers == 0 {
		delete(ps.of, c)
	}
}

// look looks at the streams that are on c, of all that there are with the peer, and returns
// when any but own were last seen to have brought something, or all that they had to.
func (p *oldPath) look(c network.Conn, own *receiveHalf, all []*Stream) time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.last == nil {
		p.last = make(map[*receiveHalf]arrived)
	}
	p.looks++
	now := time.Now()
	for _, s := range all {
		h := &s.recv
		h.mu.Lock()
		on, bytes := h.cur.Conn() == c, h.count
		h.mu.Unlock()
		before, known := p.last[h]
		if on {
			p.last[h] = arrived{bytes, p.looks}
		}
		more := on && bytes > before.bytes || known && !on // it has switched
		if !more || p.looks == 1 {
			continue
		}
		if p.by != h {
			p.by, p.aliveToo = h, p.alive
		}
		p.alive = now
	}
	for h, a := range p.last {
		if a.look != p.looks {
			delete(p.last, h)
		}
	}
	if p.by == own {
		return p.aliveToo
	}
	return p.alive
}

// watch is an exchange's view of its old connection. Its zero value but for x is ready.
type watch struct {
	x *exchange
	p *oldPath // nil until it looks
}

func (w *watch) look() time.Time {
	h, c := w.x.s.host, w.x.old.Conn()
	if w.p == nil {
		w.p = h.paths.watch(c)
	}
	return w.p.look(c, &w.x.s.recv, h.labels.all(w.x.s.peer))
}

func (w *watch) end() {
	if w.p != nil {
		w.x.s.host.paths.leave(w.x.old.Conn())
	}
}
