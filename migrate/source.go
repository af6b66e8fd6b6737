package migrate

import (
	"fmt"
	"io"
	"strings"

	msmux "github.com/multiformats/go-multistream"
	"github.com/multiformats/go-varint"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
)

// source is an underlying stream as a receiving half reads it: the present one, or the one
// that a handover leads to. The half's mu guards it.
type source struct {
	stream network.Stream
	expect string // opener: the acceptor's answer to the opening, until it was read
	count  uint64 // application bytes that were read from stream
	got    chunks // what the application has not read yet, of stream and of those before it
	end    error  // how stream ended, where that is not yet settled
	reader reader
	gone   bool   // disowned: what a Read brings that is still inside belongs to nobody
	seen   uint32 // how many bytes of expect were read
}

// reader is who has the read token of a source: nobody else may be inside its stream's Read.
type reader uint8

const (
	byNobody reader = iota
	byApplication
	byPump // the exchange's, in the application's stead
)

// pull reads from src into p. The caller has the read token; mu must be held, and is given
// up meanwhile.
func (h *receiveHalf) pull(src *source, p []byte) (n int, err error) {
	expect, seen := src.expect, int(src.seen)
	h.mu.Unlock()
	n, seen, err = readBehind(src.stream, expect, seen, p)
	h.mu.Lock()
	src.note(seen)
	return n, err
}

// note notes that seen bytes of the answer were read. mu must be held.
func (src *source) note(seen int) {
	if src.seen = uint32(seen); seen == len(src.expect) {
		src.expect, src.seen = "", 0
	}
}

// readFrom is a Read of s that leaves an EOF which comes along with data for the next
// Read. A true EOF comes again. One with data from yamux is not the other end's: its session
// is down, so that it cannot tell of the room that the Read has made, and more may be there.
func readFrom(s network.Stream, p []byte) (int, error) {
	n, err := s.Read(p)
	if n > 0 && err == io.EOF {
		return n, nil
	}
	return n, err
}

// readBehind reads the rest of expect, of which seen bytes were read before, from s, and then
// into p what comes behind it. It returns how much of expect was read by now; as long as
// that is not all, n is 0.
func readBehind(s network.Stream, expect string, seen int, p []byte) (n, now int, err error) {
	rest := expect[seen:]
	if rest == "" {
		n, err = readFrom(s, p)
		return n, seen, err
	}
	buf := p
	if len(p) < len(rest) {
		buf = make([]byte, len(rest))
	}
	n, err = readFrom(s, buf)
	k := min(n, len(rest))
	if string(buf[:k]) != rest[:k] {
		return 0, seen, refusal(buf[:k], expect, seen)
	}
	if k < len(rest) && err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return copy(p, buf[k:n]), seen + k, err
}

// refusal says what got means, which is not what has to come behind the first seen bytes
// of expect: that the peer lacks a protocol, or nothing that it may say.
func refusal(got []byte, expect string, seen int) error {
	all := expect[:seen] + string(got)
	for at := 0; at < len(expect); {
		length, n, err := varint.FromUvarint([]byte(expect[at:]))
		if err != nil {
			break
		}
		end := at + n + int(length)
		if !strings.HasPrefix(all, expect[:end]) { // it is this token
			if answer := all[at:]; len(answer) > 0 && strings.HasPrefix(notAvailable, answer[:min(len(answer), len(notAvailable))]) {
				return msmux.ErrNotSupported[protocol.ID]{Protos: []protocol.ID{protocol.ID(expect[at+n : end-1])}}
			}
			break
		}
		at = end
	}
	return fmt.Errorf("unexpected answer to the opening: %q", got)
}
