package migrate

import (
	"fmt"
	"io"

	msmux "github.com/multiformats/go-multistream"

	"github.com/libp2p/go-libp2p/core/network"
)

// source is an underlying stream as a receiving half reads it: the present one, or the one
// that a handover leads to. The half's mu guards it.
type source struct {
	stream network.Stream
	expect string // opener: what is left of the acceptor's answer to the opening
	count  uint64 // application bytes that were read from stream
	got    chunks // what the application has not read yet, of stream and of those before it
	end    error  // how stream ended, where that is not yet settled
	reader reader
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
	expect := src.expect
	h.mu.Unlock()
	n, expect, err = readBehind(src.stream, expect, p)
	h.mu.Lock()
	src.expect = expect
	return n, err
}

// readFrom is a Read of s that leaves an EOF which comes along with data for the next
// Read. A true one comes again; yamux's is none, but says that its session is down and
// the other end cannot be told of the room that the Read has made: more may be there.
func readFrom(s network.Stream, p []byte) (int, error) {
	n, err := s.Read(p)
	if n > 0 && err == io.EOF {
		return n, nil
	}
	return n, err
}

// readBehind reads the rest of expect from s, and then into p what comes behind it. It
// returns what is left of expect; as long as anything is, n is 0.
func readBehind(s network.Stream, expect string, p []byte) (n int, rest string, err error) {
	if expect == "" {
		n, err = readFrom(s, p)
		return n, "", err
	}
	buf := p
	if len(p) < len(expect) {
		buf = make([]byte, len(expect))
	}
	n, err = readFrom(s, buf)
	k := min(n, len(expect))
	if string(buf[:k]) != expect[:k] {
		return 0, expect, refusal(buf[:k], expect)
	}
	if rest = expect[k:]; rest != "" && err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return copy(p, buf[k:n]), rest, err
}

// refusal says what an answer to the opening means that is not the expected one.
func refusal(got []byte, expect string) error {
	for i := range got {
		if got[i] != expect[i] {
			if string(got[i:min(len(got), i+4)]) == notAvailable {
				break
			}
			return fmt.Errorf("unexpected answer to the opening: %q", got)
		}
	}
	return msmux.ErrNotSupported[string]{}
}
