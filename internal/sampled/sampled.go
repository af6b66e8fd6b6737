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

// Lines are the lines of one kind. Of each peer the first one is logged at once, and from then
// on one in Every. Safe for concurrent use; Every is set before the first use.
type Lines struct {
	Every time.Duration

	mu     sync.Mutex // guards all below
	peers  map[peer.ID]*sample
	others sample
}

type sample struct {
	logged time.Time // zero: never
	left   int       // how many were not since then
}

// Take says whether a line about p at this time is logged, and how many before it were not.
func (l *Lines) Take(p peer.ID, now time.Time) (left int, logged bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.peers[p]
	if s == nil {
		s = l.room(p, now)
	}
	if !s.logged.IsZero() && now.Sub(s.logged) < l.Every {
		s.left++
		return 0, false
	}
	left = s.left
	s.logged, s.left = now, 0
	return left, true
}

// room makes room for p. mu must be held.
func (l *Lines) room(p peer.ID, now time.Time) *sample {
	if len(l.peers) == MaxPeers {
		for q, s := range l.peers {
			if now.Sub(s.logged) >= l.Every {
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
