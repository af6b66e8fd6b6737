package migrate

import (
	"context"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
)

// labels knows every labelled stream of a host by (remote peer, label), never by label
// alone (L3). A label is here exactly as long as its stream lives (L5), and nothing is
// kept for a peer that has none.
type labels struct {
	self    peer.ID
	counter atomic.Uint64

	mu    sync.Mutex // guards all below
	peers map[peer.ID]*peerLabels
	// ended remembers labels that are gone, as hashes; see find. A newer one takes the
	// place of an older.
	ended [endedLabels]uint64
	seed  maphash.Seed
	spare *peerLabels // an entry for the next peer that has none, or nil
}

// endedLabels is how many labels that are gone are remembered: all that end while a
// Migrate is on its way, on a host that ends ten thousand streams a second at 100 ms
// of distance. It is 8 KiB of a host's memory.
const endedLabels = 1 << 10

type peerLabels struct {
	streams map[uint64]*Stream
	// waiting holds who waits for a label that a Migrate has overtaken (L4).
	waiting  map[uint64]chan struct{}
	nWaiting int
	many     bool // it has had more than maxSpare streams at once
}

// maxSpare is how many streams an entry may have had that is used again: a map keeps the
// room that it once had.
const maxSpare = 8

// maxWaiting is how many Migrates of one peer may wait for a label. A connection that
// comes up moves all streams of another at once, and those that were just opened may
// be overtaken: 256 is four times what a protocol may have open by default.
const maxWaiting = 256

func newLabels(self peer.ID) *labels {
	l := &labels{self: self, peers: make(map[peer.ID]*peerLabels), seed: maphash.MakeSeed()}
	// L2: a process that was restarted must not reuse what its peers may still hold.
	l.counter.Store(uint64(rand.Uint32()))
	return l
}

// parity is the lowest bit of every label that p gives to streams with us, or that we
// give to streams with p, where ours is set (L1).
func (l *labels) parity(p peer.ID, ours bool) uint64 {
	if (l.self < p) == ours {
		return 0
	}
	return 1
}

// fresh returns a label for a stream with p.
func (l *labels) fresh(p peer.ID) uint64 {
	return l.counter.Add(1)<<1 | l.parity(p, true)
}

// check says whether p may give the label (L1).
func (l *labels) check(p peer.ID, label uint64) error {
	if label&1 != l.parity(p, false) {
		return fmt.Errorf("%w: label %d has the wrong parity", errViolation, label)
	}
	return nil
}

// add enters a stream. It says false, and does nothing, where the label is alive (L2).
func (l *labels) add(p peer.ID, label uint64, s *Stream) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	pl := l.of(p)
	if _, alive := pl.streams[label]; alive {
		return false
	}
	if pl.streams == nil {
		pl.streams = make(map[uint64]*Stream)
	}
	pl.streams[label] = s
	pl.many = pl.many || len(pl.streams) > maxSpare
	if place, hash := l.place(p, label); *place == hash {
		*place = 0
	}
	if ch, ok := pl.waiting[label]; ok {
		close(ch)
		delete(pl.waiting, label)
	}
	return true
}

// remove takes a label out, if it is the stream's.
func (l *labels) remove(p peer.ID, label uint64, s *Stream) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if pl := l.peers[p]; pl != nil && pl.streams[label] == s {
		delete(pl.streams, label)
		l.tidy(p, pl)
		place, hash := l.place(p, label)
		*place = hash
	}
}

// end remembers a label as one that has ended, though no stream of it was seen: one that
// comes later is refused (R9).
func (l *labels) end(p peer.ID, label uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	place, hash := l.place(p, label)
	*place = hash
}

// hasEnded says whether a label is remembered as one that has ended.
func (l *labels) hasEnded(p peer.ID, label uint64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	place, hash := l.place(p, label)
	return *place == hash
}

// place is where a label is remembered when it is gone, and what is kept there. mu must be
// held.
func (l *labels) place(p peer.ID, label uint64) (*uint64, uint64) {
	hash := maphash.Comparable(l.seed, struct {
		p     peer.ID
		label uint64
	}{p, label})
	return &l.ended[hash%endedLabels], hash
}

// alive says whether p has a stream of that label.
func (l *labels) alive(p peer.ID, label uint64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	pl := l.peers[p]
	return pl != nil && pl.streams[label] != nil
}

// find returns the stream of that label, waiting for it as long as timeout (L4). It
// returns nil where there is none, and an error where p has too many such questions.
//
// A label that was there is not waited for: the Migrate has crossed the end of its stream,
// and as long as it is not answered, that end is kept from p's application (S5).
func (l *labels) find(ctx context.Context, p peer.ID, label uint64, timeout time.Duration) (*Stream, error) {
	l.mu.Lock()
	pl := l.of(p)
	if s := pl.streams[label]; s != nil {
		l.mu.Unlock()
		return s, nil
	}
	if place, hash := l.place(p, label); *place == hash {
		l.tidy(p, pl)
		l.mu.Unlock()
		return nil, nil
	}
	defer func() {
		pl.nWaiting--
		l.tidy(p, pl)
		l.mu.Unlock()
	}()
	pl.nWaiting++
	if pl.nWaiting > maxWaiting {
		return nil, fmt.Errorf("more than %d migrations wait for an unknown label", maxWaiting)
	}
	ch, ok := pl.waiting[label]
	if !ok {
		ch = make(chan struct{})
		if pl.waiting == nil {
			pl.waiting = make(map[uint64]chan struct{})
		}
		pl.waiting[label] = ch
	}
	l.mu.Unlock()
	timer := time.NewTimer(timeout)
	select {
	case <-ch:
	case <-timer.C:
	case <-ctx.Done():
	}
	timer.Stop()
	l.mu.Lock()
	if pl.waiting[label] == ch {
		// The others that wait for it came later, but for the same label: it is as
		// unknown to them, and they ask again if need be.
		close(ch)
		delete(pl.waiting, label)
	}
	return pl.streams[label], nil
}

// of returns the entry of p, which may be new. mu must be held.
func (l *labels) of(p peer.ID) *peerLabels {
	pl := l.peers[p]
	if pl == nil {
		if pl, l.spare = l.spare, nil; pl == nil {
			pl = new(peerLabels)
		}
		l.peers[p] = pl
	}
	return pl
}

// tidy removes the entry of p if nothing is in it. mu must be held.
func (l *labels) tidy(p peer.ID, pl *peerLabels) {
	if len(pl.streams) == 0 && pl.nWaiting == 0 {
		delete(l.peers, p)
		if !pl.many && pl.waiting == nil {
			l.spare = pl
		}
	}
}

// any says whether there is a stream with p.
func (l *labels) any(p peer.ID) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	pl := l.peers[p]
	return pl != nil && len(pl.streams) > 0
}

// each calls f for each stream, without mu. One that comes, goes or moves meanwhile may be
// left out.
func (l *labels) each(f func(*Stream)) {
	type entry struct {
		label uint64
		s     *Stream
	}
	l.mu.Lock()
	n := 0
	for _, pl := range l.peers {
		n += len(pl.streams)
	}
	entries := make([]entry, 0, n)
	for _, pl := range l.peers {
		for label, s := range pl.streams {
			entries = append(entries, entry{label, s})
		}
	}
	l.mu.Unlock()
	for _, e := range entries {
		if e.s.Label() == e.label { // a stream that migrates is there twice
			f(e.s)
		}
	}
}

// all returns the streams with p.
func (l *labels) all(p peer.ID) []*Stream {
	l.mu.Lock()
	defer l.mu.Unlock()
	pl := l.peers[p]
	if pl == nil {
		return nil
	}
	streams := make([]*Stream, 0, len(pl.streams))
	for _, s := range pl.streams {
		streams = append(streams, s)
	}
	return streams
}
