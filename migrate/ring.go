package migrate

import (
	"math"
	"sync"

	"github.com/libp2p/go-libp2p/core/network"
)

// Offsets of a resumable stream are absolute: they count the application's bytes of one
// direction from the first one on, whatever underlying stream carries them. The end of writing
// counts as one more, behind the last byte.

// everything is how much an end has received that wants no more: greater than any offset (R10).
const everything = math.MaxUint64

// smallestRing is how much a ring that is not empty can hold at least.
const smallestRing = 4 << 10

// ring keeps what was written to a resumable stream and has not been confirmed yet, up to a
// window. Its zero value but for of is empty. The sending half's mu guards it.
type ring struct {
	of        *ringMemory
	buf       []byte // a power of two long, or nil; the byte at offset o is buf[o%len]
	low, end  uint64 // it has the bytes from low on, to end
	base      uint64 // the offset of the first byte of the present underlying stream
	handed    uint64 // up to where the underlying streams before that one were handed it
	confirmed uint64
	over      bool // nothing is kept any more
}

// confirm takes note that the other end has received everything up to an offset. It is never
// less than before.
func (r *ring) confirm(received uint64) {
	r.confirmed = max(r.confirmed, received)
	r.low = max(r.low, min(r.confirmed, r.end))
	if r.low == r.end {
		r.release()
	}
}

// put adds as much of p as there is room for. With drop it adds all of it, at the expense of
// the oldest bytes; a stream must have got these.
func (r *ring) put(p []byte, drop bool) int {
	if r.confirmed == everything { // nobody will ask for it
		r.end += uint64(len(p))
		r.low = r.end
		return len(p)
	}
	need := int(r.end-r.low) + len(p)
	for !r.over && need > len(r.buf) && r.grow() {
	}
	n := len(p)
	if over := need - len(r.buf); over > 0 && !drop {
		n -= over
	} else if over > 0 {
		r.low = min(r.low+uint64(over), r.end)
	}
	if n <= 0 {
		return 0
	}
	q := p[:n]
	if skip := n - len(r.buf); skip > 0 { // of this, too, only the end is kept
		r.end += uint64(skip)
		r.low, q = r.end, q[skip:]
	}
	r.write(r.buf, r.end, q)
	r.end += uint64(len(q))
	return n
}

// write puts p into buf, as what begins at offset.
func (*ring) write(buf []byte, offset uint64, p []byte) {
	if len(p) == 0 {
		return
	}
	at := int(offset % uint64(len(buf)))
	copy(buf, p[copy(buf[at:], p):])
}

// grow doubles what the ring can hold. It says whether it may.
func (r *ring) grow() bool {
	size := max(smallestRing, 2*len(r.buf))
	if size > r.of.window || !r.of.reserve(size-len(r.buf)) {
		return false
	}
	buf := make([]byte, size)
	for o := r.low; o < r.end; {
		n := r.chunk(o)
		r.write(buf, o, n)
		o += uint64(len(n))
	}
	r.buf = buf
	return true
}

// chunk is some of what the ring has from offset o on.
func (r *ring) chunk(o uint64) []byte {
	at := int(o % uint64(len(r.buf)))
	return r.buf[at:min(len(r.buf), at+int(r.end-o))]
}

// copyFrom copies what the ring has from offset o on to p.
func (r *ring) copyFrom(o uint64, p []byte) (n int) {
	for n < len(p) && o+uint64(n) < r.end {
		n += copy(p[n:], r.chunk(o+uint64(n)))
	}
	return n
}

// truncate takes back what was put behind an offset.
func (r *ring) truncate(end uint64) {
	r.end = end
	r.low = min(r.low, end)
	if r.low == r.end {
		r.release()
	}
}

// release frees the memory of the ring.
func (r *ring) release() {
	if len(r.buf) > 0 {
		r.of.release(len(r.buf))
		r.buf = nil
	}
}

// ringMemory is what the rings of a peer's streams may take. Safe for concurrent use.
type ringMemory struct {
	host   *ringBudget
	window int // of a stream

	mu   sync.Mutex // guards used; before host's
	used int
}

func (m *ringMemory) reserve(n int) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.used+n > m.host.perPeer || !m.host.reserve(n) {
		return false
	}
	m.used += n
	return true
}

func (m *ringMemory) release(n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.used -= n
	m.host.release(n)
}

// ringBudget is what all rings of a host may take. It is reserved in the system scope: a
// stream that is lost has no other. Safe for concurrent use.
type ringBudget struct {
	perPeer, perHost int
	manager          network.ResourceManager

	mu   sync.Mutex // guards all below
	used int
	span network.ResourceScopeSpan // nil as long as nothing is reserved
}

func (b *ringBudget) reserve(n int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.used+n > b.perHost {
		return false
	}
	if b.span == nil {
		err := b.manager.ViewSystem(func(system network.ResourceScope) (err error) {
			b.span, err = system.BeginSpan()
			return err
		})
		if err != nil {
			b.span = nil
			return false
		}
	}
	if b.span.ReserveMemory(n, network.ReservationPriorityMedium) != nil {
		b.tidy()
		return false
	}
	b.used += n
	return true
}

func (b *ringBudget) release(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used -= n
	b.span.ReleaseMemory(n)
	b.tidy()
}

// tidy ends the span where nothing is reserved in it. mu must be held.
func (b *ringBudget) tidy() {
	if b.used == 0 {
		b.span.Done()
		b.span = nil
	}
}
