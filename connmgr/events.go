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

// EvtStreamResumed is emitted on the host's event bus when a stream that has lost its
// connection goes on over another one, which migrate.WithResumption allows.
type EvtStreamResumed struct {
	Peer     peer.ID
	Protocol protocol.ID
	// Label is what both ends know the stream by now.
	Label    uint64
	From, To ConnInfo
	// Initiator is whether this end has asked the other to go on.
	Initiator bool
	// Took is the time since this end has known that the connection is lost.
	Took time.Duration
	// Again is how many bytes of the application's this end sends again.
	Again uint64
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

// EvtConnectionStays is emitted on the host's event bus when a connection that is not the one
// to keep has been there for 10 s for one reason: once, until there is another reason.
type EvtConnectionStays struct {
	Peer peer.ID
	Conn ConnInfo
	// Kept is the connection to keep; its ID is empty where nothing is decided.
	Kept ConnInfo
	// Reason is why, and Why the same in words, as [Manager.Explain] has it.
	Reason Reason
	Why    string
	// Until is when it is over by itself; zero if nobody knows.
	Until time.Time
}

// EvtConnectionSilent is emitted on the host's event bus when a connection to a peer does not
// answer although something was asked or sent, and when it is heard of again. Its transport
// may take 40 s to give it up, and until then its streams bring neither data nor an error: a
// program may say meanwhile that the peer is not reached.
//
// A connection is asked where its peer has another one, or where labelled streams wait on it.
// No event tells of one that is closed while it is silent; go-libp2p's
// event.EvtPeerConnectednessChanged does where it was the last.
type EvtConnectionSilent struct {
	Peer peer.ID
	Conn ConnInfo
	// Silent is whether it does not answer; false: it was silent, and something has come.
	Silent bool
	// Alone is whether no other connection to the peer is known to work.
	Alone bool
	// Since is when the first question was asked that has not been answered, or, where
	// Silent is false, when what has been answered was asked.
	Since time.Time
}

// UpgradeState is how far an attempt to get a direct connection has come.
type UpgradeState string

// The states.
const (
	UpgradeStarted UpgradeState = "started"
	UpgradeFailed  UpgradeState = "failed"
	UpgradeDirect  UpgradeState = "direct" // there is a direct connection
)

// EvtUpgrade is emitted on the host's event bus when a direct connection is asked for to a
// peer that is reached only over relays, and when that has succeeded or failed. Attempts of
// go-libp2p's own are not among them.
type EvtUpgrade struct {
	Peer  peer.ID
	State UpgradeState
	// Attempt counts from 1, as long as the peer is reached only over relays.
	Attempt int
	// Took is how long the attempt took, and Err why it failed. Why says what is done next,
	// in words, as [Explanation.Upgrade] does.
	Took time.Duration
	Err  error
	Why  string
	// Next is when a direct connection is asked for next; zero: it is not, as things are.
	Next time.Time
}

// maxEvents is how many events may wait for subscribers that do not read: those of some
// hundred peers that move at once. More are dropped, and that is logged.
const maxEvents = 4096

// kindsOfEvents are the events, in the order of emitter.of.
var kindsOfEvents = [...]any{
	new(EvtStreamMigrated), new(EvtPathChanged), new(EvtConnectionPruned), new(EvtConnectionStays), new(EvtUpgrade), new(EvtStreamResumed),
	new(EvtConnectionSilent),
}

func kindOfEvent(ev any) int {
	switch ev.(type) {
	case EvtStreamMigrated:
		return 0
	case EvtPathChanged:
		return 1
	case EvtConnectionPruned:
		return 2
	case EvtConnectionStays:
		return 3
	case EvtUpgrade:
		return 4
	case EvtStreamResumed:
		return 5
	default:
		return 6
	}
}

// emitter emits on the host's event bus. That blocks while a subscriber has not read what it
// was told before, and nothing of the manager may wait for that. So one goroutine emits, and
// is there only while there is something to emit.
type emitter struct {
	log *zap.Logger

	mu      sync.Mutex // a leaf
	of      [len(kindsOfEvents)]coreevent.Emitter
	open    bool
	queue   []any
	running bool
	lost    int // since the last line about it
}

// start opens the emitters.
func (e *emitter) start(bus coreevent.Bus) error {
	var of [len(kindsOfEvents)]coreevent.Emitter
	for i, kind := range kindsOfEvents {
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
		_ = e.of[kindOfEvent(ev)].Emit(ev)
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
