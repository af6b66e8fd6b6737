package migrate

import (
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"go.uber.org/zap"
)

// What a peer can have logged at warn level it can have logged thousands of times a second.
// Of each peer the first line is logged at once, and from then on one in sampleEvery, with
// the number of those in between.
const (
	sampleEvery = 10 * time.Second

	// maxSampled is of how many peers is remembered when they were last logged. Whoever comes
	// while there are as many has to share one place with all others that do.
	maxSampled = 256
)

// samples says which lines about peers are logged. Safe for concurrent use.
type samples struct {
	every time.Duration

	mu     sync.Mutex // guards all below
	peers  map[peer.ID]*sample
	others sample
}

type sample struct {
	logged time.Time // zero: never
	left   int       // how many were not since then
}

// take says whether a line about p at this time is logged, and how many before it were not.
func (l *samples) take(p peer.ID, now time.Time) (left int, logged bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.peers[p]
	if s == nil {
		s = l.room(p, now)
	}
	if !s.logged.IsZero() && now.Sub(s.logged) < l.every {
		s.left++
		return 0, false
	}
	left = s.left
	s.logged, s.left = now, 0
	return left, true
}

// room makes room for p. mu must be held.
func (l *samples) room(p peer.ID, now time.Time) *sample {
	if len(l.peers) == maxSampled {
		for q, s := range l.peers {
			if now.Sub(s.logged) >= l.every {
				delete(l.peers, q)
			}
		}
	}
	if len(l.peers) == maxSampled {
		return &l.others
	}
	if l.peers == nil {
		l.peers = make(map[peer.ID]*sample)
	}
	s := new(sample)
	l.peers[p] = s
	return s
}

// warn logs a line about p, or counts it.
func (l *samples) warn(log *zap.Logger, what string, p peer.ID, err error, fields ...zap.Field) {
	left, logged := l.take(p, time.Now())
	if !logged {
		return
	}
	fields = append(fields, zap.Stringer("peer", p), zap.Error(err))
	if left > 0 {
		fields = append(fields, zap.Int("more_since_last", left))
	}
	log.Warn(what, fields...)
}

// warnViolation logs that p broke the protocol (W4).
func (h *Host) warnViolation(p peer.ID, err error, fields ...zap.Field) {
	for _, violated := range h.cfg.violated {
		violated(p)
	}
	h.violations.warn(h.log, "peer broke the stream-migration protocol", p, err, fields...)
}
