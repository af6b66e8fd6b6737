package migrate

import (
	"time"

	"github.com/libp2p/go-libp2p/core/network"
)

// Traffic is what the labelled streams on a connection have carried there so far: evidence
// that its path works. Streams that have ended or moved away do not count any more, so it
// may become less.
type Traffic struct {
	Received uint64 // application bytes that have been read from the connection
	Sent     uint64 // application bytes that the connection has taken
	Blocked  bool   // a Write has been inside its stream for some time, as one that waits for room
	Freed    uint64 // how many Writes were seen so, and then went on: only the other end makes room
	Waits    bool   // a Read or a Write is inside its stream at this moment
	Of       uint64 // a checksum of the streams that are counted: the same for the same streams
}

// Traffic returns what the labelled streams whose underlying stream is on c have carried
// there. It does not block.
func (h *Host) Traffic(c network.Conn) Traffic {
	var t Traffic
	now := time.Now()
	for _, s := range h.Streams(c) {
		s.traffic(now, func(on network.Conn) *Traffic {
			if on == c {
				return &t
			}
			return nil
		})
	}
	return t
}

// TrafficOfAll puts into traffic what all labelled streams have carried, by the connection
// that they are on now, and takes out what was there before. It does not block, and costs a
// look at each stream.
func (h *Host) TrafficOfAll(traffic map[network.Conn]*Traffic) {
	for _, t := range traffic {
		*t = Traffic{}
	}
	counted := func(on network.Conn) *Traffic {
		t := traffic[on]
		if t == nil {
			t = new(Traffic)
			traffic[on] = t
		}
		return t
	}
	now := time.Now()
	h.labels.each(func(s *Stream) { s.traffic(now, counted) })
	for c, t := range traffic {
		if t.Of == 0 {
			delete(traffic, c)
		}
	}
}

// traffic adds to what counted returns for the connections of the two halves; nil: they do
// not matter.
func (s *Stream) traffic(now time.Time, counted func(network.Conn) *Traffic) {
	of := 1 + s.Label()<<8
	s.send.mu.Lock()
	s.send.look(now)
	sends, sent, inside := s.send.cur.Conn(), s.send.written, s.send.inside
	blocked, freed := s.send.blocked, s.send.freed
	s.send.mu.Unlock()
	s.recv.mu.Lock()
	reads, received, waits := s.recv.cur.stream.Conn(), s.recv.cur.count, s.recv.cur.reader == byApplication
	s.recv.mu.Unlock()
	if t := counted(sends); t != nil {
		t.Of += of
		t.Sent += sent
		t.Blocked = t.Blocked || blocked
		t.Freed += uint64(freed)
		t.Waits = t.Waits || inside
	}
	if t := counted(reads); t != nil {
		if reads != sends {
			t.Of += of
		}
		t.Received += received
		t.Waits = t.Waits || waits
	}
}

// blockedFor is how long a Write is inside its stream before it counts as blocked. Any other is
// done with in less, also on a machine that is busy.
const blockedFor = 100 * time.Millisecond

// sendLook is when a look at a sending half has last seen something new.
type sendLook struct {
	at      int64  // since when written has been the same, and a Write inside; 0: none is
	written uint64 // then
}

// look notes whether the Write that is inside cur waits there. mu must be held.
func (h *sendHalf) look(now time.Time) {
	l := &h.seen
	if h.inside && l.at != 0 && h.written == l.written {
		h.blocked = now.UnixNano()-l.at >= int64(blockedFor)
		return
	}
	if h.blocked && h.written > l.written {
		h.freed++
	}
	l.at, l.written, h.blocked = 0, h.written, false
	if h.inside {
		l.at = now.UnixNano()
	}
}
