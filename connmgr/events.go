package connmgr

import (
	"fmt"
	"sync"
	"time"

	coreevent "github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"go.uber.org/zap"

	"github.com/go-portage/portage/migrate"
	"github.com/go-portage/portage/policy"
)

// EvtStreamMigrated is emitted on the host's event bus when a stream has moved from one
// connection to another, and its old underlying stream is done with. Either end may have
// moved it.
type EvtStreamMigrated struct {
	Peer     peer.ID
	Protocol protocol.ID
	// Label is what both ends know the stream by now.
	Label    uint64
	From, To ConnInfo
	// Initiator is whether this end has moved it.
	Initiator bool
	// Took is the time from the beginning of the migration until the old stream was done
	// with. Bytes take the new connection long before.
	Took time.Duration
}

// EvtPathChanged is emitted on the host's event bus when another connection than before
// carries what is new to a peer: where hole punching has won a direct connection beside a
// relayed one, that one is To, and Direct is true.
//
// It is emitted for peers that have, or have just had, more than one connection. A peer that
// has lost its only one and gets another is told of by go-libp2p's
// event.EvtPeerConnectednessChanged.
type EvtPathChanged struct {
	Peer     peer.ID
	From, To ConnInfo
	// Direct is whether the peer is now reached without a relay, and WasDirect whether it
	// was before.
	Direct, WasDirect bool
}

// EvtConnectionPruned is emitted on the host's event bus when a connection was closed since
// another one is kept and nothing was left on it.
type EvtConnectionPruned struct {
	Peer peer.ID
	Conn ConnInfo
	// Kept is the connection that is kept; its ID is empty where the peer has decided and
	// has not told.
	Kept ConnInfo
	// ByPeer is whether the peer has closed it.
	ByPeer bool
	// Decision says which rule it lost by. It is the zero value where it was not ranked, and
	// where the peer has decided.
	Decision policy.Decision
}

// maxEvents is how many events may wait for subscribers that do not read: those of some
// hundred peers that move at once. More are dropped, and that is logged.
const maxEvents = 4096

// emitter emits on the host's event bus. That blocks while a subscriber has not read what it
// was told before, and nothing of the manager may wait for that. So one goroutine emits, and
// is there only while there is something to emit.
type emitter struct {
	log *zap.Logger

	mu      sync.Mutex // a leaf
	of      [3]coreevent.Emitter
	open    bool
	queue   []any
	running bool
	lost    int // since the last line about it
}

// start opens the emitters.
func (e *emitter) start(bus coreevent.Bus) error {
	var of [3]coreevent.Emitter
	for i, kind := range []any{new(EvtStreamMigrated), new(EvtPathChanged), new(EvtConnectionPruned)} {
		em, err := bus.Emitter(kind)
		if err != nil {
			for _, opened := range of[:i] {
				_ = opened.Close()
			}
			return fmt.Errorf("events: %w", err)
		}
		of[i] = em
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.of, e.open = of, true
	return nil
}

// stop drops what waits. It does not block.
func (e *emitter) stop() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.queue = nil
	if e.open && !e.running {
		e.closeAll()
	}
	e.open = false
}

func (e *emitter) closeAll() {
	for _, em := range e.of {
		_ = em.Close()
	}
}

// listens says whether there is an event bus.
func (e *emitter) listens() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.open
}

// emit has an event emitted. It does not block.
func (e *emitter) emit(ev any) {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case !e.open:
		return
	case len(e.queue) >= maxEvents:
		e.lost++
		return
	}
	e.queue = append(e.queue, ev)
	if !e.running {
		e.running = true
		go e.run()
	}
}

func (e *emitter) run() {
	for {
		e.mu.Lock()
		if len(e.queue) == 0 {
			e.running = false
			if !e.open {
				e.closeAll()
			}
			e.mu.Unlock()
			return
		}
		ev := e.queue[0]
		e.queue = e.queue[1:]
		lost := e.lost
		e.lost = 0
		e.mu.Unlock()
		if lost > 0 {
			e.log.Warn("events dropped, since a subscriber of the event bus does not read", zap.Int("events", lost))
		}
		i := 0
		switch ev.(type) {
		case EvtPathChanged:
			i = 1
		case EvtConnectionPruned:
			i = 2
		}
		_ = e.of[i].Emit(ev)
	}
}

// emitMigrated tells of a migration that has succeeded.
func (t *teller) emitMigrated(e migrate.Event) {
	if e.Kind != migrate.Finished || !t.events.listens() {
		return
	}
	t.events.emit(EvtStreamMigrated{
		Peer: e.Peer, Protocol: e.Stream.Protocol(), Label: e.Stream.Label(),
		From: infoOf(e.From), To: infoOf(e.To), Initiator: e.Initiator, Took: e.Took,
	})
}

// infoOf names a connection of which nothing is kept.
func infoOf(c network.Conn) ConnInfo { return newConnState(c).info() }

// path tells of another connection that carries what is new. The first time, the path
// before is the oldest connection: it was there alone.
func (t *teller) path(d *peerState, v *view, p *plan) {
	var now *connState
	switch {
	case len(v.conns) == 1:
		now = v.conns[0].connState
	case p.decided:
		now = v.conns[p.winner].connState
	}
	d.mu.Lock()
	if d.path == nil {
		for _, cv := range v.conns {
			if d.path == nil || cv.opened.Before(d.path.opened) {
				d.path = cv.connState
			}
		}
	}
	was := d.path
	if now != nil {
		d.path = now
	}
	d.mu.Unlock()
	if now == nil || was == now {
		return
	}
	t.events.emit(EvtPathChanged{
		Peer: d.peer, From: was.info(), To: now.info(),
		Direct: !now.base.Relayed, WasDirect: !was.base.Relayed,
	})
}
