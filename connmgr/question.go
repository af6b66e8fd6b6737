package connmgr

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	multistream "github.com/multiformats/go-multistream"
)

// Questions
//
// A connection is asked whether it works by opening a stream there and proposing PathID. A
// peer with a manager serves it and echoes what comes. All others refuse it: that is an answer,
// too, and one that every implementation of libp2p gives, whatever it serves. It is not
// asked with libp2p's ping, since a peer lets another one ping in two streams at a time, and
// these are for applications.
//
//	this side                                   a manager        anybody else
//	/multistream/1.0.0, PathID  ------------>
//	                            <------------   the same         /multistream/1.0.0, na
//
//	and where it is to be more than a packet:
//	PathID, and 24 KiB of       ------------>
//	proposals                   <------------   the same         na for each of them

// PathID is the protocol by which a connection is asked whether its path works. A wrapped host
// advertises it through identify, and echoes what a stream of it brings.
const PathID protocol.ID = "/portage/path/1.0.0"

const (
	// multistreamID is what either end of a stream begins its negotiation with.
	multistreamID = "/multistream/1.0.0"

	// proposalSize is what one proposal of a large question has, in bytes. The refusals have
	// 1.5 KiB together then, more than a packet, in another 12 KiB of frames over TCP. They
	// cost their sender half of what the echo of such a ping did.
	proposalSize = 64

	// maxEcho is how much is echoed on a stream, in bytes: a large question, and what is
	// repeated of a small one.
	maxEcho   = 2 * fullProbe
	echoBlock = 4 << 10
)

// What a question is made of, as it is sent.
var (
	askedFirst   = append(framed(multistreamID), askedAgain...)
	askedAgain   = framed(string(PathID))
	askedAtLarge = []byte(strings.Repeat(string(framed(string(PathID)+"/"+strings.Repeat("-", proposalSize-len(PathID)-3))), fullProbe/proposalSize))
)

// framed returns a token of a negotiation as it is sent.
func framed(t string) []byte {
	return append(append(binary.AppendUvarint(nil, uint64(len(t)+1)), t...), '\n')
}

// prober asks whether a connection works, and returns how long the answer took. It calls
// put when the question has been handed to the transport. full asks with more than one
// packet, since there are paths that only swallow large ones.
type prober func(ctx context.Context, c network.Conn, full bool, put func()) (time.Duration, error)

// probe asks c, limited or not. While there is no answer it asks again, on the same stream:
// after a while in which nothing has passed, QUIC waits twice as long each time before it
// sends anything, and for as long again after anything else that it sends. What follows soon
// finds the path up when it is, and brings what was lost with it. It blocks for 10 s at most.
func probe(ctx context.Context, c network.Conn, full bool, put func()) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	s, err := openNamed(ctx, c, PathID)
	if err != nil {
		return 0, err
	}
	defer s.Reset()
	defer context.AfterFunc(ctx, func() { _ = s.Reset() })()
	start := time.Now()
	if _, err := s.Write(askedFirst); err != nil {
		return 0, orDone(ctx, err)
	}
	put()
	if full {
		if _, err := s.Write(askedAtLarge); err != nil { // all at once
			return 0, orDone(ctx, err)
		}
	}
	defer nudge(s)()
	r := bufio.NewReader(s)
	served, err := readAnswer(r)
	if err != nil {
		return 0, orDone(ctx, err)
	}
	took := time.Since(start)
	switch {
	case !full:
	case served:
		_, err = r.Discard(len(askedAtLarge))
	default:
		for range len(askedAtLarge) / proposalSize {
			if _, err = multistream.ReadNextTokenBytes(r); err != nil {
				break
			}
		}
	}
	return took, orDone(ctx, err)
}

// readAnswer reads the answer to the first proposal, and says whether it was accepted.
func readAnswer(r *bufio.Reader) (served bool, err error) {
	if _, err := multistream.ReadNextTokenBytes(r); err != nil {
		return false, err
	}
	answer, err := multistream.ReadNextToken[protocol.ID](r)
	return answer == PathID, err
}

// nudge repeats a question until it is called off, or the stream fails.
func nudge(s network.Stream) (stop func()) {
	over := make(chan struct{})
	go func() {
		t := time.NewTicker(useProbe)
		defer t.Stop()
		for {
			select {
			case <-t.C:
			case <-over:
				return
			}
			if _, err := s.Write(askedAgain); err != nil {
				return
			}
		}
	}()
	return func() { close(over) }
}

// orDone returns ctx's error in place of what its end made of a stream.
func orDone(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// answered says whether an error is something that came from the peer.
func answered(err error) bool {
	var reset *network.StreamError
	return err == nil || isNotSupported(err) || errors.As(err, &reset) && reset.Remote
}

// echoServer answers the questions of peers.
type echoServer struct {
	tasks *tasks
}

// handle is the handler of PathID.
func (es echoServer) handle(s network.Stream) {
	if !es.tasks.begin() {
		_ = s.Reset()
		return
	}
	defer es.tasks.done()
	if err := es.serve(s); err != nil {
		_ = s.Reset()
		return
	}
	_ = s.Close()
}

// serve echoes what comes until the peer closes its writing. It blocks for 10 s at most.
func (es echoServer) serve(s network.Stream) error {
	if err := s.Scope().SetService(ServiceName); err != nil {
		return err
	}
	if err := s.Scope().ReserveMemory(echoBlock, network.ReservationPriorityAlways); err != nil {
		return err
	}
	defer s.Scope().ReleaseMemory(echoBlock)
	if err := s.SetDeadline(time.Now().Add(openTimeout)); err != nil {
		return err
	}
	defer context.AfterFunc(es.tasks.ctx, func() { _ = s.Reset() })()
	block := make([]byte, echoBlock)
	for echoed := 0; echoed <= maxEcho; {
		n, err := s.Read(block)
		if _, err := s.Write(block[:n]); err != nil {
			return err
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
		echoed += n
	}
	return fmt.Errorf("question has more than %d bytes", maxEcho)
}
