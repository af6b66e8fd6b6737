package connmgr

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
)

// young remembers which paths died soon after they had won: a UDP path that flaps, a path
// through a middlebox that drops what is large. The next one of that kind to the same peer
// has to live for longer before it wins over a connection that works, twice as long each
// time (facts.deaths). Nothing is kept of peers whose winners live.
//
// It has two parts: deaths, and the winners that are young. Of the latter nothing else
// remembers once their peer has one connection.
type young struct {
	count  atomic.Int32 // of fresh
	mu     sync.Mutex   // a leaf
	deaths map[peer.ID]map[pathKind]deaths
	fresh  map[network.Conn]youngConn
}

// youngConn is what is remembered of a connection that is the only one of its peer: not its
// connState, since there may be many of them.
type youngConn struct {
	kind   pathKind
	opened time.Time
}

// deaths are those of a kind of path.
type deaths struct {
	n    int
	last time.Time
}

// of returns how many winners of each kind have died young of late; nil: none.
func (y *young) of(p peer.ID, now time.Time) map[pathKind]int {
	y.mu.Lock()
	defer y.mu.Unlock()
	var n map[pathKind]int
	for kind, d := range y.deaths[p] {
		if now.Sub(d.last) < deathsFor {
			if n == nil {
				n = make(map[pathKind]int)
			}
			n[kind] = d.n
		}
	}
	return n
}

// died notes that a winner is dead, if it was young.
func (y *young) died(p peer.ID, cs *connState, now time.Time) {
	y.mu.Lock()
	defer y.mu.Unlock()
	if !cs.base.Limited { // else its relay ends it, in any case
		y.diedLocked(p, youngConn{kindOf(cs.base), cs.opened}, now)
	}
}

func (y *young) diedLocked(p peer.ID, c youngConn, now time.Time) {
	of := y.deaths[p]
	d := of[c.kind]
	if now.Sub(d.last) >= deathsFor {
		d.n = 0
	}
	if now.Sub(c.opened) >= youngFor<<min(d.n, maxProofDoublings) {
		return
	}
	if of == nil {
		if y.deaths == nil {
			y.deaths = make(map[peer.ID]map[pathKind]deaths)
		}
		y.makeRoom(now)
		of = make(map[pathKind]deaths, 1)
		y.deaths[p] = of
	}
	of[c.kind] = deaths{d.n + 1, now}
}

// makeRoom keeps deaths bounded: what is over goes, and if need be anything.
func (y *young) makeRoom(now time.Time) {
	if len(y.deaths) < maxDeaths {
		return
	}
	for p, of := range y.deaths {
		for kind, d := range of {
			if now.Sub(d.last) >= deathsFor {
				delete(of, kind)
			}
		}
		if len(of) == 0 {
			delete(y.deaths, p)
		}
	}
	for p := range y.deaths {
		if len(y.deaths) < maxDeaths {
			return
		}
		delete(y.deaths, p)
	}
}

// watch remembers a winner that is the only connection left, while it is young.
func (y *young) watch(cs *connState, now time.Time) {
	y.mu.Lock()
	defer y.mu.Unlock()
	for c, other := range y.fresh {
		if now.Sub(other.opened) >= youngFor {
			delete(y.fresh, c)
		}
	}
	if !cs.base.Limited && now.Sub(cs.opened) < youngFor && len(y.fresh) < maxDeaths {
		if y.fresh == nil {
			y.fresh = make(map[network.Conn]youngConn)
		}
		y.fresh[cs.conn] = youngConn{kindOf(cs.base), cs.opened}
	}
	y.count.Store(int32(len(y.fresh)))
}

// resume forgets the winners of p: a second connection has come, and from here on peerState
// knows of them. One that is closed for a better one has not died.
func (y *young) resume(p peer.ID) {
	if y.count.Load() == 0 {
		return
	}
	y.mu.Lock()
	defer y.mu.Unlock()
	for c := range y.fresh {
		if c.RemotePeer() == p {
			delete(y.fresh, c)
		}
	}
	y.count.Store(int32(len(y.fresh)))
}

// disconnected is told of each connection that is gone.
func (y *young) disconnected(c network.Conn) {
	if y.count.Load() == 0 {
		return
	}
	y.mu.Lock()
	defer y.mu.Unlock()
	if was, ok := y.fresh[c]; ok {
		delete(y.fresh, c)
		y.count.Store(int32(len(y.fresh)))
		y.diedLocked(c.RemotePeer(), was, time.Now())
	}
}
