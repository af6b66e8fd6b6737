package migrate

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	ma "github.com/multiformats/go-multiaddr"

	"github.com/go-portage/portage/internal/aside"
)

// What the other end of a connection speaks
//
// The peerstore knows protocols by peer, and that is not enough. Hosts that share a key,
// and so a peer ID, need not run the same program, and the one identified last overwrites
// the others. And NewStream adds what it has negotiated, so that a peer of which identify
// knows nothing seems to be known. So what identify has told on each connection is kept here,
// for the few protocols that matter.

// maxWatched is how many protocols a told can tell of.
const maxWatched = 8

// told is what the identify of a connection has told. Bit i is about the protocol
// watched[i].
type told struct {
	known, speaks uint8
	ended         bool // nobody need wait for it
}

// identified keeps that for each open connection: 19 bytes and the map's share, together
// between 30 and 60.
type identified struct {
	watched []protocol.ID      // immutable
	net     network.Network    // immutable; nil: nothing is kept
	events  event.Subscription // immutable

	mu     sync.RWMutex // a leaf; guards all below
	conns  map[network.Conn]told
	run    *run // while there are connections
	last   *run // the run before
	closed bool
}

// run is the goroutine that takes the events. It lives while there are connections: whoever
// closes the wrapped host itself leaves nothing behind.
type run struct {
	asks chan chan struct{} // see settle
	stop chan struct{}      // closed when it is to end
	done chan struct{}      // closed when it has
}

// follow keeps what identify tells, until close.
func (i *identified) follow(h *Host) error {
	sub, err := h.EventBus().Subscribe(new(event.EvtPeerIdentificationCompleted),
		eventbus.BufSize(64), eventbus.Name("portage/migrate"))
	if err != nil {
		return err
	}
	i.events, i.net = sub, h.Network()
	i.conns = make(map[network.Conn]told)
	i.net.Notify((*identifiedNotifiee)(i))
	i.seed(h)
	return nil
}

func (i *identified) close() {
	i.mu.Lock()
	i.closed = true
	i.mu.Unlock()
	if i.net != nil {
		i.net.StopNotify((*identifiedNotifiee)(i))
		_ = i.events.Close()
	}
}

// identifiedNotifiee is identified as a network.Notifiee.
type identifiedNotifiee identified

func (*identifiedNotifiee) Listen(network.Network, ma.Multiaddr)      {}
func (*identifiedNotifiee) ListenClose(network.Network, ma.Multiaddr) {}
func (n *identifiedNotifiee) Connected(_ network.Network, c network.Conn) {
	(*identified)(n).tell(c, told{})
}

func (n *identifiedNotifiee) Disconnected(_ network.Network, c network.Conn) {
	i := (*identified)(n)
	i.mu.Lock()
	defer i.mu.Unlock()
	delete(i.conns, c)
	if len(i.conns) == 0 && i.run != nil {
		close(i.run.stop)
		i.last, i.run = i.run, nil
	}
}

// take takes events for as long as r lives, after the run before.
func (i *identified) take(r, before *run) {
	defer close(r.done)
	if before != nil {
		<-before.done
	}
	for {
		select {
		case e, open := <-i.events.Out():
			if !open {
				return
			}
			i.handle(e)
		case settled := <-r.asks:
			for n := len(i.events.Out()); n > 0; n-- {
				i.handle(<-i.events.Out())
			}
			close(settled)
		case <-r.stop:
			return
		}
	}
}

func (i *identified) handle(e any) {
	if e, ok := e.(event.EvtPeerIdentificationCompleted); ok && e.Conn != nil { // others emit it, too
		t := i.from(e.Protocols)
		t.ended = true
		i.tell(e.Conn, t)
	}
}

// settle waits until everything that has been told by now is noted. c is a connection that is
// open: who is called before our notifiee may be here before it was entered.
func (i *identified) settle(c network.Conn) {
	i.tell(c, told{})
	i.mu.RLock()
	r := i.run
	i.mu.RUnlock()
	if r == nil {
		return
	}
	settled := make(chan struct{})
	select {
	case r.asks <- settled:
		<-settled
	case <-r.done:
	}
}

// seed takes what the peerstore knows of peers that were connected before: where there is
// one connection, that has told it.
func (i *identified) seed(h *Host) {
	ids := h.identify()
	for _, p := range i.net.Peers() {
		conns := i.net.ConnsToPeer(p)
		for _, c := range conns {
			i.tell(c, told{})
		}
		if len(conns) != 1 || ids == nil {
			continue
		}
		select {
		case <-ids.IdentifyWait(conns[0]):
			if all, err := h.Peerstore().GetProtocols(p); err == nil && slices.Contains(all, identify.ID) {
				t := i.from(all)
				t.ended = true
				i.tell(conns[0], t)
			}
		default:
		}
	}
}

// from is what a list of protocols tells. One that is empty tells nothing: a peer that is
// asked speaks identify at least. go-libp2p takes a list for empty that was cut short.
func (i *identified) from(all []protocol.ID) told {
	var t told
	if len(all) == 0 {
		return t
	}
	for bit, id := range i.watched {
		t.known |= 1 << bit
		if slices.Contains(all, id) {
			t.speaks |= 1 << bit
		}
	}
	return t
}

// only is what tells of one protocol.
func (i *identified) only(id protocol.ID, speaks bool) told {
	t := told{known: 1 << slices.Index(i.watched, id)}
	if speaks {
		t.speaks = t.known
	}
	return t
}

// tell notes that c is open, and what was told on it.
func (i *identified) tell(c network.Conn, t told) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.net == nil || i.closed || aside.IsClosed(c) { // closed: nobody may tell of its end any more
		return
	}
	old := i.conns[c]
	i.conns[c] = told{old.known | t.known, old.speaks&^t.known | t.speaks, old.ended || t.ended}
	if i.run == nil {
		i.run = &run{make(chan chan struct{}), make(chan struct{}), make(chan struct{})}
		go i.take(i.run, i.last)
		i.last = nil
	}
}

// on returns what was told on c.
func (i *identified) on(c network.Conn) told {
	i.mu.RLock()
	defer i.mu.RUnlock()
	return i.conns[c]
}

// speaks says whether the other end of c speaks id, and whether its own identify has told.
func (i *identified) speaks(c network.Conn, id protocol.ID) (speaks, known bool) {
	bit := slices.Index(i.watched, id)
	if bit < 0 {
		return false, false
	}
	t := i.on(c)
	return t.speaks>>bit&1 == 1, t.known>>bit&1 == 1
}

// Speaks says whether the other end of c speaks id, as far as identify has told on that very
// connection: known is false before, or where it has told nothing. What is known of a peer
// from another connection, or from streams that were opened, does not count; hosts that
// share a key may differ. id is ID, FinalSizeID or one given to WithPeerProtocols; of others
// nothing is known. Safe for concurrent use; it does not block.
func (h *Host) Speaks(c network.Conn, id protocol.ID) (speaks, known bool) {
	return h.told.speaks(c, id)
}

// identify returns the host's identify service, or nil where it has none, or hides it.
func (h *Host) identify() identify.IDService {
	if ih, ok := h.Host.(interface{ IDService() identify.IDService }); ok {
		return ih.IDService()
	}
	return nil
}

// awaitIdentify waits until the identify of c has ended.
func (h *Host) awaitIdentify(ctx context.Context, c network.Conn) error {
	if ids := h.identify(); ids != nil {
		select {
		case <-ids.IdentifyWait(c):
			return nil
		case <-ctx.Done():
			return fmt.Errorf("identify failed to complete: %w", ctx.Err())
		}
	}
	if h.told.on(c).ended || !slices.Contains(h.Mux().Protocols(), identify.ID) {
		return nil
	}
	// The host hides the service. But it waits for it when it opens a stream, and has it
	// begin: who waits here may be called by the swarm before the service is. A stream
	// without a protocol is as far as it goes, and nothing is sent on it.
	if s, err := h.Host.NewStream(network.WithNoDial(ctx, "identify"), c.RemotePeer()); err == nil {
		_ = s.Reset()
	}
	if ctx.Err() != nil {
		return fmt.Errorf("identify failed to complete: %w", ctx.Err())
	}
	h.told.settle(c)
	h.told.tell(c, told{ended: true})
	return nil
}

// labelling says whether the streams that are opened on a connection can be labelled.
type labelling uint8

const (
	never   labelling = iota // its own identify has said so, or nobody has said that they can
	ask                      // the peer is known to migrate, but from elsewhere
	certain                  // its own identify has said so
)

// labellingOn is for a connection whose identify has ended, if it is known when it does.
func (h *Host) labellingOn(c network.Conn) labelling {
	if !h.told.on(c).ended {
		h.told.settle(c)
	}
	l := h.answerOf(c, ID)
	if h.cfg.verified {
		l = min(l, h.answerOf(c, FinalSizeID))
	}
	return l
}

func (h *Host) answerOf(c network.Conn, id protocol.ID) labelling {
	speaks, known := h.told.speaks(c, id)
	switch {
	case known && speaks:
		return certain
	case !known && h.speaks(c.RemotePeer(), id):
		return ask
	default:
		return never
	}
}
