// Package migrate carries live libp2p streams from one connection to another. It
// implements the libp2p stream-migration protocol, with a verified handover beside
// it that makes sure that nothing is lost on the way.
//
// Wrap a host; streams that are then opened with it, to a peer that has wrapped its
// host as well, can be moved at any time, by either end, to any other connection to
// the same peer:
//
//	h, err := libp2p.New()
//	mh, err := migrate.Wrap(h)
//	s, err := mh.NewStream(ctx, p, "/my/protocol")
//	err = mh.Migrate(ctx, s, betterConn)
//
// The application goes on reading and writing meanwhile, at both ends, and notices
// nothing: no byte is lost, doubled or reordered, and where the network really loses
// something, both ends see an error.
//
// # Where a byte goes
//
// A [Stream] is two independent halves, send.go and receive.go, over one underlying
// stream, or two while it migrates; handover.go reads both. negotiate.go opens and accepts
// streams; labels.go knows them by name; initiator.go and responder.go are the two sides of
// one migration, and tell the halves what their next underlying stream is. docs/protocol.md
// has the rules (W1, S12 and so on) that comments refer to; docs/design.md follows a byte
// through a migration.
package migrate

import (
	"errors"
	"fmt"
	"io"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
)

// ID is the protocol that precedes the application's on every labelled stream.
const ID protocol.ID = "/libp2p/stream-migration"

// FinalSizeID is advertised through identify by peers that have the verified handover
// (S12). Nothing is spoken over it: a stream opened on it is reset.
const FinalSizeID protocol.ID = "/portage/final-size/1.0.0"

// ResumeID is advertised through identify by peers that resume streams (WithResumption), and
// spoken beside these: how much of them was received, and where they end.
const ResumeID protocol.ID = "/portage/resume/1.0.0"

// perConnection are the protocols of libp2p itself that speak about the connection they
// run on. Their streams must not move.
var perConnection = map[protocol.ID]bool{
	"/ipfs/id/1.0.0":                   true,
	"/ipfs/id/push/1.0.0":              true,
	"/libp2p/circuit/relay/0.2.0/hop":  true,
	"/libp2p/circuit/relay/0.2.0/stop": true,
	"/libp2p/dcutr":                    true,
	"/libp2p/autonat/1.0.0":            true,
	"/libp2p/autonat/2/dial-request":   true,
	"/libp2p/autonat/2/dial-back":      true,
	ID:                                 true,
	FinalSizeID:                        true,
	ResumeID:                           true,
}

// Errors of Migrate. They are wrapped with the peer, the label and the step; test them
// with errors.Is.
var (
	// ErrNotLabelled: the stream was not opened or accepted as a labelled stream by
	// this host. It can never migrate.
	ErrNotLabelled = errors.New("stream is not labelled")

	// ErrNotSupported: the peer is not known to have the verified handover, and
	// RequireVerifiedHandover asks for it.
	ErrNotSupported = errors.New("peer does not support stream migration")

	// ErrDenied: the peer denied the migration. The stream stays where it is, works
	// as before, and is not to be migrated again (M3).
	ErrDenied = errors.New("peer denied the migration")

	// ErrTryLater: the migration did not happen, and the stream works as before on
	// its connection (S9, M1). It may be tried again later; ErrClosed is the answer
	// then if the application was told meanwhile that the connection has failed.
	ErrTryLater = errors.New("migration did not happen, try again later")

	// ErrClosed: the stream was closed or reset, by whichever end, or the application
	// was told that its connection has failed.
	ErrClosed = errors.New("stream is closed")
)

// reset is the error that the application sees when a migration fails for good (S8):
// a network.ErrReset.
func reset(cause error) error {
	if errors.Is(cause, network.ErrReset) {
		return forGood(cause)
	}
	if mistakable(cause) {
		cause = errors.New(cause.Error())
	}
	return &network.StreamError{
		ErrorCode:      network.StreamNoError,
		TransportError: fmt.Errorf("migration failed: %w", cause),
	}
}

// mistakable says whether err, with which a stream has ended for good, may pass for
// something else with those who look with errors.Is and errors.As: for a deadline, after
// which one may try again, since a connection that was silent for too long reports a timeout;
// or for a clean end, since yamux wraps io.EOF in what it reports of a lost connection.
func mistakable(err error) bool {
	var t interface{ Timeout() bool }
	return errors.Is(err, io.EOF) || errors.As(err, &t) && t.Timeout()
}

// forGood is err as the application may see it.
func forGood(err error) error {
	if !mistakable(err) {
		return err
	}
	plain := &network.StreamError{TransportError: errors.New(err.Error())}
	if of := (*network.StreamError)(nil); errors.As(err, &of) {
		plain.ErrorCode, plain.Remote = of.ErrorCode, of.Remote
	}
	return plain
}
