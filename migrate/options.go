package migrate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"go.uber.org/zap"

	"github.com/go-portage/portage/internal/slogcore"
)

// Option configures Wrap.
type Option func(*config) error

type config struct {
	log         *zap.Logger
	selector    ConnSelector
	silent      func(network.Conn) bool
	acceptor    Acceptor
	tracer      func(Event)
	observers   []func(network.Conn, protocol.ID, network.Direction)
	violated    []func(peer.ID)
	buffered    []func(int)
	verified    bool          // RequireVerifiedHandover
	negotiates  bool          // negotiation was given
	negotiation time.Duration // else the wrapped host's
	protocols   []protocol.ID // WithPeerProtocols
	labelWait   time.Duration
	busyWait    time.Duration
	stall       time.Duration
	resumes     *resumeConfig // nil: streams do not outlive their connections
	redial      func(context.Context, peer.AddrInfo) error
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

// ConnSelector names the connection that a new stream to p is to be opened on, labelled
// or not. It is called on every NewStream, but for the protocols of libp2p's own that
// speak about their connection, concurrently, maybe more than once, and must not block.
//
// nil, a connection that is closed, or one that ctx does not allow (a limited or relayed
// one) leaves the choice to the host's swarm. A limited connection is not used while an
// unlimited one is open, unless that is silent (WithSilent). Where the stream cannot be opened at once on the connection
// named, because of a limit of either end's or because it is about to close, it is opened
// on another that ctx allows; and if that is not possible at once on any, NewStream waits
// where the plain host would.
type ConnSelector func(ctx context.Context, p peer.ID) network.Conn

// WithConnSelector steers new streams. It can be given once. Default: the swarm's own
// choice.
func WithConnSelector(selector ConnSelector) Option {
	return func(c *config) error {
		if selector == nil {
			return errors.New("WithConnSelector: nil; leave the option out for the swarm's own choice")
		}
		if c.selector != nil {
			return errors.New("WithConnSelector: there is a selector already, which this one would silently replace; " +
				"leave one out (a connection manager sets its own)")
		}
		c.selector = selector
		return nil
	}
}

// WithSilent says of which connections nothing is heard although there should be something.
// Beside one that the selector names, streams are opened there only where no other connection
// that the context allows takes them; so a limited one is used that is named beside an
// unlimited one of these. It is called as the selector, and must not block. Default: none is.
func WithSilent(silent func(network.Conn) bool) Option {
	return func(c *config) error {
		if silent == nil {
			return errors.New("WithSilent: nil; leave the option out if none is")
		}
		c.silent = silent
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
// wrong at warn level: its first violation, and then one line in 10 s at most, with the
// number of those in between. Default: nothing is logged.
func WithLogger(log *zap.Logger) Option {
	return func(c *config) error {
		if log == nil {
			return errors.New("WithLogger: nil; leave the option out to log nothing")
		}
		c.log = log
		return nil
	}
}

// WithSlog is WithLogger for a logger of log/slog: each line becomes a record, and each of
// its fields an attribute. Of the two options the last one counts.
func WithSlog(log *slog.Logger) Option {
	return func(c *config) error {
		if log == nil {
			return errors.New("WithSlog: nil; leave the option out to log nothing")
		}
		c.log = slogcore.New(log.Handler())
		return nil
	}
}

// WithTracer has every step of every migration and resumption reported to trace, on the
// goroutine of it: it is called concurrently and must not block. It may be given several
// times, and all are called. Default: none.
func WithTracer(trace func(Event)) Option {
	return func(c *config) error {
		if trace == nil {
			return errors.New("WithTracer: nil; leave the option out to trace nothing")
		}
		if first := c.tracer; first != nil {
			c.tracer = func(e Event) {
				first(e)
				trace(e)
			}
			return nil
		}
		c.tracer = trace
		return nil
	}
}

// WithStreamObserver has begins called once for each stream, of any protocol, when it
// begins: for one that a peer opens when its protocol has been negotiated, before the
// handler runs; for one that this host opens when that is done, with the protocol agreed
// on or the one asked for first. A stream that takes the place of another in a migration
// begins, too, with ID. begins is called concurrently and must not block. The option may be
// given several times, and all are called. Default: none.
func WithStreamObserver(begins func(c network.Conn, id protocol.ID, dir network.Direction)) Option {
	return func(c *config) error {
		if begins == nil {
			return errors.New("WithStreamObserver: nil; leave the option out to observe nothing")
		}
		c.observers = append(c.observers, begins)
		return nil
	}
}

// WithViolationObserver has violated called each time that a peer breaks the protocol, also
// where the log leaves the line out. It is called concurrently and must not block. The option
// may be given several times, and all are called. Default: none.
func WithViolationObserver(violated func(p peer.ID)) Option {
	return func(c *config) error {
		if violated == nil {
			return errors.New("WithViolationObserver: nil; leave the option out to observe nothing")
		}
		c.violated = append(c.violated, violated)
		return nil
	}
}

// WithBufferObserver has changed called each time that handovers reserve so many more bytes
// of memory for what they read in place of an application that does not, or, if negative,
// give so many back. It is called concurrently, maybe with a lock held that a Read or Write
// needs, and must not block. The option may be given several times, and all are called.
// Default: none.
func WithBufferObserver(changed func(more int)) Option {
	return func(c *config) error {
		if changed == nil {
			return errors.New("WithBufferObserver: nil; leave the option out to observe nothing")
		}
		c.buffered = append(c.buffered, changed)
		return nil
	}
}

// WithPeerProtocols names protocols that Host.Speaks can be asked about, besides those of
// this package: six at most, all in all; five with WithResumption. Default: none.
func WithPeerProtocols(ids ...protocol.ID) Option {
	return func(c *config) error {
		c.protocols = append(c.protocols, ids...)
		if n := maxWatched - 2; len(c.protocols) > n {
			return fmt.Errorf("WithPeerProtocols: %d protocols; %d at most", len(c.protocols), n)
		}
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
// NewStream where its context has no deadline. Zero: no bound. Default: that of the
// wrapped host, where it is one of go-libp2p's; else 10 s, as go-libp2p's default.
func WithNegotiationTimeout(d time.Duration) Option {
	return func(c *config) error {
		if d < 0 {
			return errors.New("WithNegotiationTimeout: negative; use 0 for no bound")
		}
		c.negotiates, c.negotiation = true, d
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

// resumeConfig are the settings of WithResumption.
type resumeConfig struct {
	window           int
	patience         time.Duration
	perPeer, perHost int
	tombstones       int           // of a peer
	protocols        []protocol.ID // nil: all
}

// ResumeOption is a setting of WithResumption.
type ResumeOption func(*resumeConfig) error

// WithResumption has labelled streams outlive their connection. When that is lost (it was
// reset, fell silent, or its relay has cut it), a stream goes on over another connection to
// the peer, one that is there or one that is dialled, and nothing is lost, doubled or
// reordered. The application sees a pause; its deadlines hold. It sees an error where the
// other end has given the stream up, or no connection was found in time. What either end does
// on purpose ends a stream as ever: a Reset, a Close of the connection, a shutdown.
//
// Both ends need the option. What was written is kept until the other end has confirmed it,
// and Close returns at once while that is delivered. Default: off.
func WithResumption(opts ...ResumeOption) Option {
	return func(c *config) error {
		r := &resumeConfig{window: maxDrained, patience: 30 * time.Second, perPeer: 4 * maxDrained, perHost: 16 * maxDrained, tombstones: 1 << 10}
		for _, opt := range opts {
			if err := opt(r); err != nil {
				return fmt.Errorf("WithResumption: %w", err)
			}
		}
		c.resumes = r
		return nil
	}
}

// WithRedial has redial called, in place of the host's Connect, where streams that have lost
// their connection wait and those that are open do not resume them: that connects nobody to whom
// there is a connection, whether it works or not. It is called on a goroutine of its own, with
// the addresses of connections that were lost beside those that the host's peerstore has, and
// once at a time for each peer. Package connmgr gives it. Default: the host's Connect.
func WithRedial(redial func(ctx context.Context, p peer.AddrInfo) error) Option {
	return func(c *config) error {
		if redial == nil {
			return errors.New("WithRedial: nil; leave the option out to use the host's Connect")
		}
		c.redial = redial
		return nil
	}
}

// ResumeWindow is how many bytes that the other end has not confirmed a stream keeps in each
// direction, at most, rounded down to a power of two. Of more than these the oldest are not
// kept any more, and the stream is lost with its connection if it is these that have not
// arrived. All streams of a peer together keep four times as much, and all of a host sixteen
// times. Memory is taken as it is needed, and reserved in the resource manager's system scope, up to
// 2 MiB ahead.
// From 64 KiB to 1 GiB. Default: 16 MiB, the largest window of go-libp2p's muxers.
func ResumeWindow(bytes int) ResumeOption {
	return func(c *resumeConfig) error {
		if bytes < 64<<10 || bytes > 1<<30 {
			return errors.New("the window has to be from 64 KiB to 1 GiB")
		}
		c.window = 1 << (bits.Len(uint(bytes)) - 1)
		c.perPeer, c.perHost = 4*c.window, 16*c.window
		return nil
	}
}

// ResumePatience is how long a stream waits for another connection, and for how long one that
// was closed delivers what it has. Default: 30 s.
func ResumePatience(d time.Duration) ResumeOption {
	return func(c *resumeConfig) error {
		if d <= 0 {
			return errors.New("the patience has to be positive")
		}
		c.patience = d
		return nil
	}
}

// ResumeOnly names the protocols whose streams are to outlive their connection, of those that
// this host opens. What a peer opens is as the peer wants it. Default: all.
func ResumeOnly(ids ...protocol.ID) ResumeOption {
	return func(c *resumeConfig) error {
		if len(ids) == 0 {
			return errors.New("no protocol; leave the setting out for all")
		}
		c.protocols = append(c.protocols, ids...)
		return nil
	}
}

type withoutLabel struct{}

// WithoutLabel makes NewStream open a stream as the plain host does: without a label,
// so that it cannot migrate, and never will.
func WithoutLabel(ctx context.Context) context.Context {
	return context.WithValue(ctx, withoutLabel{}, true)
}
