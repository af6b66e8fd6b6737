package connmgr

import (
	"hash/maphash"
	"sync"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

// Watching
//
// The swarm calls Connected and Disconnected while a connection is being set up or torn
// down, and everybody waits for the slowest. So a callback counts, and where the count
// says that the peer may have two connections, it appends to a queue and wakes the
// dispatcher (schedule.go), which asks the network what there really is.
//
// Most peers have one connection. Of them nothing is kept, and no question is asked,
// since even the answer (Network.ConnsToPeer) is an allocation. But for those whose
// connection has come in over a relay: a direct one is asked for (upgrade.go).

// counters is the number of counters that all peers share. 64 KiB a host; with 1,000
// peers connected, 1.5 % of them share theirs with another, and with 10,000 it is 14 %.
// Sharing costs one look at the peer.
const counters = 1 << 16

// watcher is the notifiee of a Manager: inner's, with our eyes beside it.
type watcher struct {
	inner network.Notifiee
	wake  func()             // must not block, and is called without mu
	gone  func(network.Conn) // as wake; told of each connection that is gone

	seed maphash.Seed // random, so that nobody can choose peer IDs that share a counter

	mu     sync.Mutex // guards what follows; a leaf: no other lock is taken under it
	net    network.Network
	second bool            // there were callbacks from another network, too
	open   [counters]uint8 // connections of the peers whose hash this is; the highest value sticks
	events []event
	closed bool
}

// event says that a peer that may have two connections got one, or lost one, or that one
// has come in over a relay.
type event struct {
	peer   peer.ID
	opened bool
}

var _ network.Notifiee = (*watcher)(nil)

func newWatcher(inner network.Notifiee, wake func(), gone func(network.Conn)) *watcher {
	if inner == nil {
		inner = network.GlobalNoopNotifiee
	}
	return &watcher{inner: inner, wake: wake, gone: gone, seed: maphash.MakeSeed()}
}

func (w *watcher) Listen(n network.Network, a ma.Multiaddr) {
	w.inner.Listen(n, a)
	w.mu.Lock()
	w.meet(n)
	w.mu.Unlock()
}

func (w *watcher) ListenClose(n network.Network, a ma.Multiaddr) { w.inner.ListenClose(n, a) }

// meet must be called with mu held.
func (w *watcher) meet(n network.Network) {
	if w.net == nil {
		w.net = n
	}
	w.second = w.second || w.net != n
}

// metSecond says whether the manager was given to two hosts.
func (w *watcher) metSecond() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.second
}

func (w *watcher) Connected(n network.Network, c network.Conn) {
	w.inner.Connected(n, c)
	p := c.RemotePeer()
	count := &w.open[w.slot(p)]
	relayed := isRelayed(c.RemoteMultiaddr()) && c.Stat().Direction == network.DirInbound
	w.mu.Lock()
	w.meet(n)
	if *count < ^uint8(0) {
		*count++
	}
	heard := (*count > 1 || relayed) && w.enqueue(event{p, true})
	w.mu.Unlock()
	if heard {
		w.wake()
	}
}

func (w *watcher) Disconnected(n network.Network, c network.Conn) {
	w.inner.Disconnected(n, c)
	w.gone(c)
	p := c.RemotePeer()
	count := &w.open[w.slot(p)]
	w.mu.Lock()
	heard := *count > 1 && w.enqueue(event{p, false})
	if *count > 0 && *count < ^uint8(0) {
		*count--
	}
	w.mu.Unlock()
	if heard {
		w.wake()
	}
}

func (w *watcher) slot(p peer.ID) uint64 { return maphash.String(w.seed, string(p)) % counters }

// enqueue must be called with mu held.
func (w *watcher) enqueue(e event) bool {
	if w.closed {
		return false
	}
	w.events = append(w.events, e)
	return true
}

// take moves the events that have come into buf.
func (w *watcher) take(buf []event) []event {
	w.mu.Lock()
	defer w.mu.Unlock()
	buf = append(buf[:0], w.events...)
	clear(w.events)
	if cap(w.events) > 1024 { // a storm is over: let its memory go
		w.events = nil
	}
	w.events = w.events[:0]
	return buf
}

// network returns the network that callbacks came from, or that was set; nil before.
func (w *watcher) network() network.Network {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.net
}

// scan sets the network, and makes an event of every peer in it that has duplicates
// already, or is reached over a relay.
func (w *watcher) scan(n network.Network) {
	var events []event
	for _, p := range n.Peers() {
		if conns := n.ConnsToPeer(p); len(conns) > 1 || askable(conns) {
			events = append(events, event{p, true})
		}
	}
	w.mu.Lock()
	w.net = n
	heard := false
	for _, e := range events {
		heard = w.enqueue(e) || heard
	}
	w.mu.Unlock()
	if heard {
		w.wake()
	}
}

// close ends the watching. Callbacks go on to inner.
func (w *watcher) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	w.events = nil
}
