package migrate

import (
	"math"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"

	pool "github.com/libp2p/go-buffer-pool"
)

// Offsets of a resumable stream are absolute: they count the application's bytes of one
// direction from the first one on, whatever underlying stream carries them. The end of writing
// counts as one more, behind the last byte.

// everything is how much an end has received that wants no more: greater than any offset (R10).
const everything = math.MaxUint64

const (
	// smallestBlock is what a ring takes for its first bytes.
	smallestBlock = 2 << 10

	// largestBlock is what one takes that has much to keep. What it has done with goes back to a
	// pool in such pieces, and is soon in use again, while a processor still has it at hand.
	largestBlock = 64 << 10
)

// ring keeps what was written to a resumable stream and has not been confirmed yet, up to a
// window. Its zero value but for of is empty. The sending half's mu guards it.
//
// The buffer of a Write that is inside the underlying stream is lent to the ring: only what
// remains to be confirmed when that returns is copied, or when the stream is lost.
type ring struct {
	of        *ringMemory
	blocks    [][]byte // each but the last is full
	first     uint64   // the offset of the first byte of blocks
	lent      []byte   // what comes behind blocks
	low, end  uint64   // it has the bytes from low on, to end
	base      uint64   // the offset of the first byte of the present underlying stream
	handed    uint64   // up to where the underlying streams before that one were handed it
	confirmed uint64
	over      bool // nothing is kept any more
}

// confirm takes note that the other end has received everything up to an offset. It is never
// less than before.
func (r *ring) confirm(received uint64) {
	r.confirmed = max(r.confirmed, received)
	r.forget(min(r.confirmed, r.end))
}

// forget gives up what comes before an offset.
func (r *ring) forget(low uint64) {
	r.low = max(r.low, low)
	for len(r.blocks) > 0 && r.first+uint64(len(r.blocks[0])) <= r.low {
		r.dropFirst()
	}
}

func (r *ring) dropFirst() {
	b := r.blocks[0]
	r.first += uint64(len(b))
	r.low = max(r.low, r.first)
	if r.blocks = r.blocks[1:]; len(r.blocks) == 0 {
		r.blocks = nil
	}
	r.of.release(cap(b))
	pool.Put(b)
}

// lend adds p, which stays as it is until keep or giveBack. Nothing must be lent already.
func (r *ring) lend(p []byte) {
	r.lent = p
	r.end += uint64(len(p))
}

// giveBack takes back the last n bytes that were lent: no stream has taken them.
func (r *ring) giveBack(n int) {
	r.end -= uint64(n)
	r.low = min(r.low, r.end)
	if r.lent != nil {
		r.lent = r.lent[:len(r.lent)-n]
	}
}

// keep copies what was lent, at the expense of the oldest bytes; a stream must have got these.
func (r *ring) keep() {
	p := r.lent
	if p == nil {
		return
	}
	r.lent = nil
	r.end -= uint64(len(p))
	if n := r.low - min(r.low, r.end); n > 0 { // confirmed meanwhile
		p = p[n:]
		r.end = r.low
	}
	r.put(p, true)
}

// put adds as much of p as there is room for. With drop it adds all of it, at the expense of
// the oldest bytes; a stream must have got these.
func (r *ring) put(p []byte, drop bool) (n int) {
	if r.over && !drop {
		return 0
	}
	if r.over || r.confirmed == everything { // nobody will ask for it
		r.end += uint64(len(p))
		r.low = r.end
		return len(p)
	}
	window := uint64(r.of.window)
	if drop {
		if skip := len(p) - r.of.window; skip > 0 { // of this, too, only the end is kept
			r.end += uint64(skip)
			n, p = skip, p[skip:]
		}
		r.forget(r.end + uint64(len(p)) - min(window, r.end+uint64(len(p))))
	} else {
		p = p[:min(uint64(len(p)), window-(r.end-r.low))]
	}
	for len(p) > 0 {
		m := r.append(p)
		if m == 0 && !r.grow(len(p)) {
			switch {
			case !drop:
				return n
			case len(r.blocks) > 0:
				r.dropFirst()
			default: // there is no memory at all
				m = len(p)
				r.low = r.end + uint64(m)
			}
		}
		n, p = n+m, p[m:]
		r.end += uint64(m)
	}
	return n
}

// append adds as much of p as the last block has room for.
func (r *ring) append(p []byte) int {
	if len(r.blocks) == 0 {
		return 0
	}
	last := &r.blocks[len(r.blocks)-1]
	n := min(len(p), cap(*last)-len(*last))
	*last = append(*last, p[:n]...)
	return n
}

// grow adds a block, with room for n bytes more or the largest there is. It says whether it may.
func (r *ring) grow(n int) bool {
	size := smallestBlock
	for most := min(largestBlock, r.of.window/4); size < most && size < n+int(r.end-r.low); {
		size *= 2
	}
	if !r.of.reserve(size) {
		return false
	}
	if len(r.blocks) == 0 {
		r.first = r.end
	}
	r.blocks = append(r.blocks, pool.Get(size)[:0])
	return true
}

// copyFrom copies what the ring has from offset o on to p.
func (r *ring) copyFrom(o uint64, p []byte) (n int) {
	at := r.first
	for _, b := range r.blocks {
		if n == len(p) {
			break
		}
		if next := at + uint64(len(b)); o < next {
			m := copy(p[n:], b[o-at:])
			n, o = n+m, o+uint64(m)
		}
		at += uint64(len(b))
	}
	return n
}

// release frees the memory of the ring, which keeps nothing from then on.
func (r *ring) release() {
	r.over = true
	r.forget(r.end)
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
// stream that is lost has no other. The resource manager is asked for more than a block at once,
// since it takes as long for that as copying one does; where that is refused, for what is needed.
// Safe for concurrent use.
type ringBudget struct {
	perPeer, perHost int
	manager          network.ResourceManager

	mu       sync.Mutex // guards all below
	used     int
	reserved int                       // used at least
	span     network.ResourceScopeSpan // nil as long as nothing is reserved
	tidying  bool                      // tidy is to be called
}

// spareTime is for how long memory stays reserved of which nothing is used.
const spareTime = time.Second

// ahead is how much is reserved at once. Up to two of it are reserved and not used.
func (b *ringBudget) ahead() int { return min(1<<20, b.perHost/16) }

func (b *ringBudget) reserve(n int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	need := b.used + n - b.reserved
	switch {
	case b.used+n > b.perHost:
		return false
	case need <= 0:
		b.used += n
		return true
	}
	if b.span == nil {
		err := b.manager.ViewSystem(func(system network.ResourceScope) (err error) {
			b.span, err = system.BeginSpan()
			return err
		})
		if err != nil {
			return false
		}
	}
	for _, more := range []int{max(need, b.ahead()), need} {
		if b.span.ReserveMemory(more, network.ReservationPriorityMedium) == nil {
			b.reserved += more
			b.used += n
			return true
		}
	}
	b.tidyLocked()
	return false
}

func (b *ringBudget) release(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used -= n
	if spare := b.reserved - b.used - b.ahead(); spare > b.ahead() {
		b.span.ReleaseMemory(spare)
		b.reserved -= spare
	}
	if b.used == 0 && !b.tidying { // the next stream may follow at once
		b.tidying = true
		time.AfterFunc(spareTime, b.tidy)
	}
}

// tidy gives back what is reserved where nothing of it is used.
func (b *ringBudget) tidy() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.tidying = false
	b.tidyLocked()
}

// tidyLocked is tidy. mu must be held.
func (b *ringBudget) tidyLocked() {
	if b.used == 0 && b.span != nil {
		b.span.Done()
		b.span, b.reserved = nil, 0
	}
}
