package migrate

import (
	"github.com/libp2p/go-libp2p/core/network"
)

// What tests see of the halves of a stream, and of the exchange.

// receivingFrom is a receiving half that reads u, behind expect.
func receivingFrom(u network.Stream, expect string) *receiveHalf {
	return &receiveHalf{cur: &source{stream: u, expect: expect}}
}

// reads is how many bytes of the application the present stream has brought.
func (h *receiveHalf) reads() uint64 {
	_, count := h.progress()
	return count
}

// waiting is how much was read of the present stream, and of the next one, and not by the
// application yet.
func (h *receiveHalf) waiting() (now, ahead int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.moving != nil {
		ahead = h.moving.next.got.len
	}
	return h.cur.got.len, ahead
}

// readsAhead says whether the next stream is being read.
func (h *receiveHalf) readsAhead() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.moving != nil && h.moving.pumping
}

// starves says whether the present stream is not read for want of memory.
func (h *receiveHalf) starves() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.moving != nil && h.moving.old == noMemory
}

// keepsBack says whether an end of the present stream is kept back.
func (h *receiveHalf) keepsBack() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.cur.end != nil
}

// writesInside says whether a Write is inside the present stream.
func (h *sendHalf) writesInside() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.inside
}

// isPaused says whether the half waits for its next stream.
func (h *sendHalf) isPaused() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.state == sendPaused
}

// exchange is the migration under way, or nil.
func (s *Stream) exchange() *exchange {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ex
}

// queued is how many of the peer's exchanges wait for that under way to end.
func (s *Stream) queued() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ex != nil {
		for w := s.ex.waiting; w != nil; w = w.next {
			n++
		}
	}
	return n
}
