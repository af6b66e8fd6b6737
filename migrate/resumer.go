package migrate

import (
	"cmp"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	ma "github.com/multiformats/go-multiaddr"
)

// resumer has all resumable streams of a host, by peer and origin. Safe for concurrent use.
type resumer struct {
	host   *Host
	budget ringBudget

	mu      sync.Mutex // guards all below, and what is in peers; before resumePeer.mu
	peers   map[peer.ID]*resumePeer
	opening map[named]struct{} // streams that this host opens, and negotiates still
	buried  int                // what the rings of all tombstones took
}

// named is what names a stream.
type named struct {
	peer   peer.ID
	origin uint64
}

// resumePeer are the resumable streams with a peer, and what is done for them.
type resumePeer struct {
	host   *Host
	id     peer.ID
	memory ringMemory
	every  uint64 // after so many bytes the peer is told at once that they have come
	// Guarded by resumer.mu.
	streams map[uint64]*resumption
	tombs   []tombstone // the oldest first
	buried  int         // what their rings took

	mu         sync.Mutex // a leaf; guards all below
	recovering bool       // recover runs
	woken      chan struct{}
	dialling   bool
	dialled    bool                  // since recover has begun
	silent     map[network.Conn]bool // they are open, and have brought nothing
	dials      uint32
	dialAfter  time.Time
	addrs      []ma.Multiaddr // of connections that were lost
	tell       telling
}

// tombstone is a stream that was closed.
type tombstone struct {
	of   *resumption
	size int // what its ring took when it became one
}

func newResumer(h *Host) *resumer {
	return &resumer{
		host: h, peers: make(map[peer.ID]*resumePeer), opening: make(map[named]struct{}),
		budget: ringBudget{perPeer: h.cfg.resumes.perPeer, perHost: h.cfg.resumes.perHost, manager: h.Network().ResourceManager()},
	}
}

// add makes s resumable, under its present label. It says false where there is such a stream
// already.
func (rs *resumer) add(s *Stream) bool {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	p := rs.peers[s.peer]
	if p == nil {
		cfg := rs.host.cfg.resumes
		p = &resumePeer{host: rs.host, id: s.peer, every: uint64(min(cfg.window/4, reportAfter)), streams: make(map[uint64]*resumption), woken: make(chan struct{}, 1)}
		p.memory = ringMemory{host: &rs.budget, window: cfg.window}
		rs.peers[s.peer] = p
	}
	if p.streams[s.label] != nil {
		return false
	}
	r := &resumption{s: s, of: p, origin: s.label}
	r.ring.of = &p.memory
	p.streams[s.label] = r
	s.send.resumption, s.recv.resumption = r, r
	return true
}

// opens notes that a stream is being negotiated, until the function is called that it returns:
// the acceptor may have it already.
func (rs *resumer) opens(p peer.ID, origin uint64) (opened func()) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	rs.opening[named{p, origin}] = struct{}{}
	return func() {
		rs.mu.Lock()
		defer rs.mu.Unlock()
		delete(rs.opening, named{p, origin})
	}
}

func (rs *resumer) isOpening(p peer.ID, origin uint64) bool {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	_, is := rs.opening[named{p, origin}]
	return is
}

func (rs *resumer) get(p peer.ID, origin uint64) *resumption {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if of := rs.peers[p]; of != nil {
		return of.streams[origin]
	}
	return nil
}

func (rs *resumer) all(p peer.ID) (all []*resumption) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if of := rs.peers[p]; of != nil {
		for _, r := range of.streams {
			all = append(all, r)
		}
	}
	return all
}

func (p *resumePeer) remove(r *resumption) {
	rs := p.host.resumer
	rs.mu.Lock()
	defer rs.mu.Unlock()
	p.unbury(r)
	delete(p.streams, r.origin)
	p.dropLocked()
}

// dropUnused forgets the peer where there is nothing to know of it any more. A stream of reports is
// worth to be kept for a while: the peer's next stream may be opened soon.
func (p *resumePeer) dropUnused() {
	rs := p.host.resumer
	rs.mu.Lock()
	defer rs.mu.Unlock()
	p.dropLocked()
}

// dropLocked is dropUnused. resumer.mu must be held.
func (p *resumePeer) dropLocked() {
	rs := p.host.resumer
	if len(p.streams) > 0 || rs.peers[p.id] != p {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if t := &p.tell; !t.busy && len(t.due) == 0 && len(t.on) == 0 {
		delete(rs.peers, p.id)
	}
}

// bury notes that r is a tombstone from here on, whose ring takes so much memory. Where the
// peer's are too many, or their rings or those of all peers take too much, its oldest go: one
// that confirms nothing must not pile them up. It says false where that does not help.
func (p *resumePeer) bury(r *resumption, size int) bool {
	rs := p.host.resumer
	rs.mu.Lock()
	defer rs.mu.Unlock()
	cfg := p.host.cfg.resumes
	crowded := func() bool {
		return len(p.tombs) >= cfg.tombstones || p.buried+size > cfg.perPeer/2 || rs.buried+size > cfg.perHost/2
	}
	for len(p.tombs) > 0 && crowded() {
		oldest := p.tombs[0].of
		p.unbury(oldest)
		go oldest.leave(errCrowded)
	}
	if crowded() {
		return false
	}
	p.tombs = append(p.tombs, tombstone{r, size})
	p.buried += size
	rs.buried += size
	return true
}

// unbury takes r from the tombstones, if it is one. resumer.mu must be held.
func (p *resumePeer) unbury(r *resumption) {
	if i := slices.IndexFunc(p.tombs, func(t tombstone) bool { return t.of == r }); i >= 0 {
		size := p.tombs[i].size
		p.tombs = slices.Delete(p.tombs, i, i+1)
		p.buried -= size
		p.host.resumer.buried -= size
	}
}

// close ends everything that is under way.
func (rs *resumer) close() {
	rs.mu.Lock()
	var all []*resumption
	for _, p := range rs.peers {
		for _, r := range p.streams {
			all = append(all, r)
		}
	}
	rs.mu.Unlock()
	for _, r := range all {
		r.s.mu.Lock()
		done := r.state == resumeAttached && r.s.life == lifeOpen
		r.s.mu.Unlock()
		if done {
			continue // it ends with its connection
		}
		r.fail(errors.New("the host is closed"))
	}
	rs.budget.tidy()
}

// connected is called when there is a connection to a peer.
func (rs *resumer) connected(c network.Conn) {
	rs.mu.Lock()
	p := rs.peers[c.RemotePeer()]
	rs.mu.Unlock()
	if p != nil {
		p.wakeIfRecovering()
	}
}

// disconnected is called when c is gone.
func (rs *resumer) disconnected(c network.Conn) {
	err := errors.New("the connection is closed")
	all := rs.all(c.RemotePeer())
	for _, r := range all {
		send, recv := r.s.send.stream(), r.s.recv.source().stream
		switch {
		case send.Conn() == c:
			r.ended(send, err)
		case recv.Conn() == c:
			r.ended(recv, err)
		}
	}
	if len(all) > 0 {
		all[0].of.hears(c)
		all[0].of.reportAgain(all)
	}
}

// Leave takes all streams off c that may be resumed, as if it had been lost: they go on over
// another connection. It is for a connection that is open and brings nothing, while another is
// known to work. Streams of which the other end may not have heard stay: the connection may
// bring their opening yet. Without WithResumption it does nothing. It does not block.
func (h *Host) Leave(c network.Conn) {
	if h.resumer == nil {
		return
	}
	for _, r := range h.resumer.all(c.RemotePeer()) {
		if send, recv := r.s.send.stream(), r.s.recv.source().stream; send.Conn() == c || recv.Conn() == c {
			r.of.isSilent(c)
			if r.shared() {
				r.lose(nil, errSilent)
			}
		}
	}
}

func (p *resumePeer) wakeIfRecovering() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.recovering {
		p.signal()
	}
}

// signal has recover look. mu must be held.
func (p *resumePeer) signal() {
	select {
	case p.woken <- struct{}{}:
	default:
	}
}

// wake sees to it that the streams that are lost are resumed.
func (p *resumePeer) wake() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.recovering {
		p.signal()
		return
	}
	p.recovering = true
	go p.recover()
}

// recover makes attempts for the streams that are lost, and dials where there is no connection
// to make them on, for as long as there are such streams.
func (p *resumePeer) recover() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for p.host.ctx.Err() == nil {
		lost := p.lost()
		if len(lost) == 0 && p.retire() {
			return
		}
		conns := p.hopeful(p.usable())
		now := time.Now()
		next := now.Add(longestPause)
		futile := false
		for _, r := range lost {
			r.s.mu.Lock()
			if r.waits == nil { // resumed meanwhile, or over
				r.s.mu.Unlock()
				continue
			}
			state, w := r.state, *r.waits
			r.s.mu.Unlock()
			switch {
			case state != resumeLost:
			case w.notBefore.After(now):
				next = earlier(next, w.notBefore)
			case len(conns) > 0:
				go r.ask(choose(conns, w.away, w.tries))
			}
			futile = futile || int(w.tries) >= len(conns)
		}
		if futile {
			next = earlier(next, p.dial(lost))
		}
		timer.Reset(time.Until(next))
		select {
		case <-p.woken:
		case <-timer.C:
		case <-p.host.ctx.Done():
		}
	}
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// retire ends recover, unless there is something new to do.
func (p *resumePeer) retire() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.woken:
		return false
	default:
	}
	p.recovering, p.dials, p.dialled, p.addrs = false, 0, false, nil
	return true
}

// lost are the streams that are not attached and have to be.
func (p *resumePeer) lost() (lost []*resumption) {
	for _, r := range p.host.resumer.all(p.id) {
		r.s.mu.Lock()
		if r.state != resumeAttached && r.state != resumeOver && r.needed() {
			lost = append(lost, r)
		}
		r.s.mu.Unlock()
	}
	return lost
}

// usable are the connections that an attempt can be made on, the best first.
func (p *resumePeer) usable() []network.Conn {
	conns := slices.DeleteFunc(p.host.Network().ConnsToPeer(p.id), func(c network.Conn) bool {
		if c.IsClosed() {
			return true
		}
		speaks, known := p.host.told.speaks(c, ResumeID)
		return known && !speaks
	})
	slices.SortStableFunc(conns, func(a, b network.Conn) int {
		x, y := a.Stat(), b.Stat()
		return cmp.Or(
			first(!x.Limited, !y.Limited),
			first(!relayed(a), !relayed(b)),
			y.Opened.Compare(x.Opened), // who was dialled last is known to have worked last
		)
	})
	return conns
}

// hopeful leaves out the connections that have brought nothing: it is for a dial to find another
// one. Once a dial is over they are tried, too.
func (p *resumePeer) hopeful(conns []network.Conn) []network.Conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	heard := slices.DeleteFunc(slices.Clone(conns), func(c network.Conn) bool { return p.silent[c] })
	if len(heard) > 0 || !p.dialled {
		return heard
	}
	return conns
}

// isSilent notes that c has brought nothing, and hears that it has.
func (p *resumePeer) isSilent(c network.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.silent == nil {
		p.silent = make(map[network.Conn]bool)
	}
	p.silent[c] = true
}

func (p *resumePeer) hears(c network.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.silent, c)
}

// choose returns the connection for an attempt after so many have failed. The one that the
// stream has left comes last.
func choose(conns []network.Conn, left network.Conn, tries uint32) network.Conn {
	order := slices.Clone(conns)
	slices.SortStableFunc(order, func(a, b network.Conn) int { return first(a != left, b != left) })
	return order[int(tries)%len(order)]
}

// dial dials the peer, if it is time to, and returns when to look again.
func (p *resumePeer) dial(lost []*resumption) time.Time {
	left := make(map[network.Conn]bool)
	for _, r := range lost {
		r.s.mu.Lock()
		if r.waits != nil {
			left[r.waits.away] = true
		}
		r.s.mu.Unlock()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.dialling {
		return time.Now().Add(longestPause)
	}
	if time.Until(p.dialAfter) > 0 {
		return p.dialAfter
	}
	for away := range left {
		if away != nil && away.Stat().Direction == network.DirOutbound && !slices.ContainsFunc(p.addrs, away.RemoteMultiaddr().Equal) {
			p.addrs = append(p.addrs, away.RemoteMultiaddr())
		}
	}
	p.dialling = true
	go p.connect(slices.Clone(p.addrs))
	return time.Now().Add(longestPause)
}

// connect dials the peer at all addresses that are known, of relays, too.
func (p *resumePeer) connect(addrs []ma.Multiaddr) {
	h := p.host
	ctx, cancel := context.WithTimeout(network.WithAllowLimitedConn(h.ctx, "resume"), dialTimeout)
	defer cancel()
	if s, ok := h.Network().(interface{ Backoff() *swarm.DialBackoff }); ok {
		s.Backoff().Clear(p.id) // which addresses have failed says little of a network that has changed
	}
	redial := h.cfg.redial
	if redial == nil {
		redial = h.Host.Connect
	}
	err := redial(ctx, peer.AddrInfo{ID: p.id, Addrs: addrs})
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dialling, p.dialled = false, true
	pause := min(firstPause<<min(p.dials, 8), longestPause)
	if err != nil {
		p.dials++
	}
	p.dialAfter = time.Now().Add(pause/2 + rand.N(pause/2))
	p.signal()
}

// dialTimeout bounds one dial of a peer with which streams are lost.
const dialTimeout = 10 * time.Second
