package migrate

import "github.com/libp2p/go-libp2p/core/network"

// Traffic is what the labelled streams on a connection have carried there so far: evidence
// that its path works. Streams that have ended or moved away do not count any more, so it
// may become less.
type Traffic struct {
	Received uint64 // application bytes that have been read from the connection
	Sent     uint64 // application bytes that the connection has taken
	Blocked  bool   // a Write is inside the connection's stream at this moment
	Of       uint64 // a checksum of the streams that are counted: the same for the same streams
}

// Traffic returns what the labelled streams whose underlying stream is on c have carried
// there. It does not block.
func (h *Host) Traffic(c network.Conn) Traffic {
	var t Traffic
	for _, s := range h.Streams(c) {
		t.Of += 1 + s.Label()<<8
		s.send.mu.Lock()
		if s.send.cur.Conn() == c {
			t.Sent += s.send.written
			t.Blocked = t.Blocked || s.send.inside
		}
		s.send.mu.Unlock()
		s.recv.mu.Lock()
		if s.recv.cur.stream.Conn() == c {
			t.Received += s.recv.cur.count
		}
		s.recv.mu.Unlock()
	}
	return t
}
