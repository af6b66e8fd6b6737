// Package sampled says which lines about peers are logged. What a peer can have logged once it
// can have logged thousands of times a second.
package sampled

import (
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
)

// MaxPeers is of how many peers is remembered when they were last logged. Whoever comes
// while there are as many has to share one place with all others that do.
const MaxPeers = 256

// Lines are the lines of one kind. Of each peer one is logged in Every, the first at once; or
// as many as AtOnce says, if that is set. Safe for concurrent use; both are set before the
// first use.
type Lines struct {
	Every  time.Duration
	AtOnce int

	mu     sync.Mutex // guards all below
	peers  map[peer.ID]*sample
	others sample
}

type sample struct {
	from   time.Time // when the present Every began; zero: never
	logged int       // since then
	left   int       // how many were not since the last one that was
}

// Take says whether a line about p at this time is logged, and how many before it were not.
func (l *Lines) Take(p peer.ID, now time.Time) (left int, logged bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.peers[p]
	if s == nil {
		s = l.room(p, now)
	}
	if s.from.IsZero() || now.Sub(s.from) >= l.Every {
		s.from, s.logged = now, 0
	}
	if s.logged >= max(l.AtOnce, 1) {
		s.left++
		return 0, false
	}
	left = s.left
	s.logged++
	s.left = 0
	return left, true
}

// room makes room for p. mu must be held.
func (l *Lines) room(p peer.ID, now time.Time) *sample {
	if len(l.peers) == MaxPeers {
		for q, s := range l.peers {
			if now.Sub(s.from) >= l.Every {
				delete(l.peers, q)
			}
		}
	}
	if len(l.peers) == MaxPeers {
		return &l.others
	}
	if l.peers == nil {
		l.peers = make(map[peer.ID]*sample)
	}
	s := new(sample)
	l.peers[p] = s
	return s
}
