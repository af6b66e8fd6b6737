package migrate

import (
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"go.uber.org/zap"

	"github.com/go-portage/portage/internal/aside"
)

// Who is charged to the application's protocol. While a stream migrates it has two
// underlying streams. Where the protocol is at its limit the new one stays unpaid, among
// those that have not been negotiated, until a place becomes free: at the latest when the
// old one is gone.

// maxUnpaid is how many streams of one peer may be without a place under the limit of their
// protocol, because their old streams have it still. They stand among the streams that have
// not been negotiated, of which a host has 128 by default for all of its peers: a peer that
// never finishes must not take them from the others (M4).
const maxUnpaid = 16

// debts are the streams of a host that have moved and are unpaid.
type debts struct {
	mu   sync.Mutex           // guards of; held while unpaid streams are counted; before Stream.mu
	of   map[peer.ID]struct{} // peers with streams that have migrated and may be unpaid
	some atomic.Bool          // of is not empty; to be read without mu
}

// charge charges the new stream to the application's protocol. Where that is at its
// limit, because the old stream counts, too, the new one waits among those that have
// not been negotiated until the old one is gone; unless too many of the peer do.
func (x *exchange) charge(u network.Stream) error {
	if own, err := x.chargeOwn(u); own {
		x.s.host.oweIfUnpaid(x.s)
		return err
	}
	err := u.SetProtocol(x.s.proto)
	if err == nil {
		return nil
	}
	h := x.s.host
	h.debts.mu.Lock()
	defer h.debts.mu.Unlock()
	unpaid := make(map[any]bool)
	for _, s := range h.labels.all(x.s.peer) {
		s.mu.Lock()
		if s.scope != nil && s.scope.unpaid != nil {
			unpaid[s.scope.unpaid] = true
		}
		if s.ex != nil && s.ex.unpaid {
			unpaid[s.ex.new] = true
		}
		s.mu.Unlock()
	}
	if n := len(unpaid); n >= maxUnpaid {
		return fmt.Errorf("the limit of %s has no room, and %d streams wait for it: %w", x.s.proto, n, err)
	}
	x.s.mu.Lock()
	x.unpaid = true
	x.s.mu.Unlock()
	return nil
}

// moveScope moves what the application has reserved to the new stream.
func (x *exchange) moveScope(u network.Stream) {
	x.s.mu.Lock()
	sc, unpaid := x.s.scope, x.unpaid
	nothing := sc == nil || sc.own != nil
	x.s.mu.Unlock()
	if nothing {
		return
	}
	if err := sc.follow(u.Scope(), !unpaid); err != nil {
		x.s.warnUnaccounted(err)
	}
}

// payLate charges streams that wait for a place under the limit of their protocol, now
// that an old stream is gone. It does not matter whose that was: its place may go to a stream
// that begins to migrate, and the next free place then goes to one that has waited.
func (x *exchange) payLate() {
	x.s.host.oweIfUnpaid(x.s)
	x.s.host.payOwed()
}

// oweIfUnpaid has s charged by payOwed.
func (h *Host) oweIfUnpaid(s *Stream) {
	s.mu.Lock()
	unpaid := s.scope != nil && s.scope.unpaid != nil
	s.mu.Unlock()
	if !unpaid {
		return
	}
	h.debts.mu.Lock()
	defer h.debts.mu.Unlock()
	if h.debts.of == nil {
		h.debts.of = make(map[peer.ID]struct{})
	}
	h.debts.of[s.peer] = struct{}{}
	h.debts.some.Store(true)
}

// payOwed is called when a stream has ended, or an old one is gone.
func (h *Host) payOwed() {
	if !h.debts.some.Load() {
		return
	}
	h.debts.mu.Lock()
	defer h.debts.mu.Unlock()
	for p := range h.debts.of {
		if h.payAll(p) {
			delete(h.debts.of, p)
		}
	}
	h.debts.some.Store(len(h.debts.of) > 0)
}

// payAll charges those streams of p that there is room for, and says whether it was for
// all that wait. debts.mu must be held.
func (h *Host) payAll(p peer.ID) bool {
	all := true
	for _, s := range h.labels.all(p) {
		if !s.pay() {
			all = false
		}
	}
	return all
}

// pay charges the stream to its protocol, if it is not charged yet and there is room. It
// returns false if there is no room.
func (s *Stream) pay() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	sc := s.scope
	if sc == nil || sc.unpaid == nil {
		return true
	}
	var cur network.StreamScope = sc.own
	if u, ok := sc.unpaid.(network.Stream); ok {
		if aside.IsClosed(u.Conn()) { // a scope that has ended may not be charged
			return true
		}
		cur = u.Scope()
	}
	if sc.unpaid.SetProtocol(s.proto) != nil {
		return false
	}
	sc.unpaid = nil
	if err := sc.attached(cur); err != nil {
		s.warnUnaccounted(err)
	}
	return true
}

func (s *Stream) warnUnaccounted(err error) {
	warn(&s.host.unaccounted, s.host.log, "resource manager refused a part of what a migrated stream holds; the stream goes on",
		s.peer, err, zap.String("protocol", string(s.proto)))
}
