package connmgr

import (
	"fmt"
	"sync"

	"github.com/libp2p/go-libp2p/core/host"

	"github.com/go-portage/portage/migrate"
)

// home is the host that a manager works for, of which there can be one.
type home struct {
	mu        sync.Mutex    // a leaf
	of        host.Host     // that Wrap got; nil before
	wrap      *migrate.Host // that Wrap returned; nil before
	moves     mover         // nil without Wrap
	contested bool          // another host was to be wrapped, too
}

func (h *home) host() host.Host {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.of
}

func (h *home) wrapped() *migrate.Host {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.wrap
}

func (h *home) mover() mover {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.moves
}

func (h *home) setWrapped(w *migrate.Host) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.wrap = w
}

func (h *home) setMover(mv mover) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.moves = mv
}

// adopt makes of the manager's host.
func (h *home) adopt(of host.Host) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.of != nil {
		h.contested = h.contested || h.of.Network() != of.Network()
		return fmt.Errorf("%w: %s", ErrWrapped, h.of.Network().LocalPeer())
	}
	h.of = of
	return nil
}

// disown takes adopt back.
func (h *home) disown() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.of = nil
}

func (h *home) wasContested() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.contested
}
