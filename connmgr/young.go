package connmgr

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-yamux/v5"
	"github.com/quic-go/quic-go"
)

// young remembers which paths died soon after they had won: a UDP path that flaps, a path
// through a middlebox that drops what is large. The next one of that kind to the same peer
// has to live for longer before it wins over a connection that works, twice as long each
// time (facts.deaths). Nothing is kept of peers whose winners live. A connection that one of
// its ends has closed has not died: connection managers trim, and applications close a peer
// and dial it again.
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
		if !closedOnPurpose(c) {
			y.diedLocked(c.RemotePeer(), was, time.Now())
		}
	}
}

// closedOnPurpose says whether c, which is gone from the network, was closed by one of its
// ends, as far as can be told: that the other end has closed a connection with yamux, without
// giving a reason, looks like a path that was cut. The network forgets a connection before it
// closes it, unless the transport has failed already.
func closedOnPurpose(c network.Conn) bool {
	var session *yamux.Session
	if c.As(&session) {
		if !session.IsClosed() {
			return true
		}
		_, err := session.OpenStream(context.Background()) // returns at once: why it is closed
		var away *yamux.GoAwayError
		return errors.As(err, &away)
	}
	var conn *quic.Conn
	if c.As(&conn) {
		var closed *quic.ApplicationError
		return conn.Context().Err() == nil || errors.As(context.Cause(conn.Context()), &closed)
	}
	return false
}
