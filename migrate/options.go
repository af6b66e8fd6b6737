package migrate

import (
	"context"
	"errors"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"go.uber.org/zap"
)

// Option configures Wrap.
type Option func(*config) error

type config struct {
	log         *zap.Logger
	selector    ConnSelector
	acceptor    Acceptor
	tracer      func(Event)
	inbound     []func(network.Conn)
	verified    bool // RequireVerifiedHandover
	negotiation time.Duration
	labelWait   time.Duration
	busyWait    time.Duration
	stall       time.Duration
}

func defaults() config {
	return config{
		log:         zap.NewNop(),
		negotiation: 10 * time.Second, // go-libp2p's own default
		labelWait:   5 * time.Second,  // far more than one path can lag behind another
		busyWait:    10 * time.Second, // as a negotiation
		stall:       30 * time.Second, // when QUIC gives up an idle connection, too
	}
}

// ConnSelector names the connection on which NewStream opens a stream to p. It is
// called on every NewStream, concurrently, and must not block. nil, or a connection
// that is closed, leaves the choice to the host's swarm.
type ConnSelector func(ctx context.Context, p peer.ID) network.Conn

// WithConnSelector steers new streams. Default: the swarm's own choice.
func WithConnSelector(selector ConnSelector) Option {
	return func(c *config) error {
		if selector == nil {
			return errors.New("WithConnSelector: nil; leave the option out for the swarm's own choice")
		}
		c.selector = selector
		return nil
	}
}

// Acceptor decides whether the peer may move s to the connection to. It is called by
// the responder before the migration begins, concurrently, and must not block. false
// denies for good: the peer will not ask again for this stream (M3).
type Acceptor func(s *Stream, to network.Conn) bool

// WithAcceptor sets the acceptor. Default: every migration is accepted.
func WithAcceptor(acceptor Acceptor) Option {
	return func(c *config) error {
		if acceptor == nil {
			return errors.New("WithAcceptor: nil; leave the option out to accept every migration")
		}
		c.acceptor = acceptor
		return nil
	}
}

// WithLogger sets the logger. Each migration is logged at debug level, what a peer does
// wrong at warn level. Default: nothing is logged.
func WithLogger(log *zap.Logger) Option {
	return func(c *config) error {
		if log == nil {
			return errors.New("WithLogger: nil; leave the option out to log nothing")
		}
		c.log = log
		return nil
	}
}

// WithTracer has every step of every migration reported to trace, on the goroutine of
// the migration: it is called concurrently and must not block. Default: none.
func WithTracer(trace func(Event)) Option {
	return func(c *config) error {
		if trace == nil {
			return errors.New("WithTracer: nil; leave the option out to trace nothing")
		}
		c.tracer = trace
		return nil
	}
}

// WithInbound has seen called for each stream, of any protocol, that a peer opens on a
// connection, before anything is read from it. It is called concurrently and must not
// block. It may be given several times, and all are called. Default: none.
func WithInbound(seen func(network.Conn)) Option {
	return func(c *config) error {
		if seen == nil {
			return errors.New("WithInbound: nil; leave the option out to watch nothing")
		}
		c.inbound = append(c.inbound, seen)
		return nil
	}
}

// RequireVerifiedHandover refuses, in both roles, to migrate streams with peers that
// have only the draft: streams with them are not labelled, and their migrations are
// denied. Default: they are served, with the guarantees that the draft allows; what
// these lack is in docs/protocol.md.
func RequireVerifiedHandover() Option {
	return func(c *config) error {
		c.verified = true
		return nil
	}
}

// WithNegotiationTimeout bounds the negotiation of a stream: all of an inbound one, and
// NewStream where its context has no deadline. Zero: no bound. Default: 10 s, as
// go-libp2p's own hosts.
func WithNegotiationTimeout(d time.Duration) Option {
	return func(c *config) error {
		if d < 0 {
			return errors.New("WithNegotiationTimeout: negative; use 0 for no bound")
		}
		c.negotiation = d
		return nil
	}
}

// WithStallTimeout bounds how long the old connection may make no progress at all once
// the other end has told how much is still to come over it. After that the stream is
// reset, at both ends, so that the data that wait on the new connection do not hold its
// window for ever (M4). Where more than 4 MiB wait there, and other streams share that
// window (on any connection but yamux's), it is 5 s at the most. While only other labelled
// streams of the old connection make progress, which on a slow path may come first, it is
// ten times as long. Default: 30 s, after which QUIC, too, takes a silent connection for
// dead.
func WithStallTimeout(d time.Duration) Option {
	return func(c *config) error {
		if d <= 0 {
			return errors.New("WithStallTimeout: must be positive")
		}
		c.stall = d
		return nil
	}
}

type withoutLabel struct{}

// WithoutLabel makes NewStream open a stream as the plain host does: without a label,
// so that it cannot migrate, and never will.
func WithoutLabel(ctx context.Context) context.Context {
	return context.WithValue(ctx, withoutLabel{}, true)
}
