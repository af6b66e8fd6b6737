package connmgr

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"go.uber.org/zap"

	"github.com/go-portage/portage/internal/slogcore"
	"github.com/go-portage/portage/migrate"
	"github.com/go-portage/portage/policy"
)

const (
	// The swarm staggers its dials by up to 500 ms for a relay, a dial and its security
	// handshake take two or three round trips, the halves of a simultaneous dial arrive
	// within one of each other, and identify takes one or two more. One second sees all
	// of that through on a path of 200 ms, and costs a peer with duplicates nothing but
	// one more second with them.
	defaultSettleDelay = time.Second

	// A connection that comes while others settle starts the delay again, but not for
	// ever, lest a peer that reconnects all the time put its first round off
	// indefinitely. Five times leaves room for a hole punch of several attempts.
	maxSettleDelays = 5

	// A stream that has been closed is not counted any more, at either end, while what
	// was written to it may still be on its way. Two seconds are time for a loss to be
	// noticed, twice, and repaired on a path of 300 ms (QUIC's probe timeout is about
	// three round trips, RFC 9002, section 6.2.1).
	defaultQuietTime = 2 * time.Second

	// A peer that cannot be asked may have read nothing yet of a stream that was closed
	// here. A minute is the usual limit of a whole request in libp2p protocols; it costs
	// an idle connection.
	defaultPlainQuietTime = time.Minute

	// How late the end of a stream that could not move is noticed. The connection has
	// to be quiet for that long anyway. 10,000 peers with duplicates that stay cost
	// 2,000 looks a second, of a few microseconds each.
	defaultInterval = 5 * time.Second

	// In a quiet time one looks more often, so that streams that are short do not go
	// unseen: five times, and at least every second.
	quietLooks  = 5
	maxQuietGap = time.Second

	// A round lasts about two round trips and hardly any CPU. With round trips of 100
	// ms, 32 at a time settle 10,000 peers in about a minute, and never have the
	// streams of more than 32 peers in motion.
	defaultConcurrency = 32

	// How long a round holds its place for streams that do not finish, because their
	// reader does not read. They go on without it.
	moveWait = 10 * time.Second

	// Ten settle delays are enough for the controller's own delay, its first attempt,
	// the attempts after 1, 2 and 4 s if that fails, or its first prune; and it leaves
	// most of the two minutes that a relay gives a connection.
	defaultTakeover = 10

	// Each takeover of the same connections doubles the delay of the next, up to 64
	// times, so that two sides with different ideas of the best connection do not move
	// streams to and fro.
	maxTakeoverDoublings = 6

	// What stands in the way of a migration (another one of the same stream, a resource
	// limit) passes in a few round trips, hence a second. A relay cuts a connection
	// after two minutes: with a minute at most between attempts, each stream gets
	// several.
	defaultFirstRetry = time.Second
	defaultMaxRetry   = time.Minute

	// A winner is replaced only when connections come or go, or when another one has
	// ranked first for two intervals: streams that come and go (identify, ping) are not
	// to move the others about.
	patienceIntervals = 2

	// openTimeout bounds what opens a stream of ours on a connection whose path may be
	// dead: as long as go-libp2p gives a negotiation.
	openTimeout = 10 * time.Second

	// How long a connection may take to answer before another one wins in its place. Paths
	// through a relay take less than a second; three of them are time for a retransmission
	// in either direction.
	defaultProbeTime = 3 * time.Second

	// For how long a connection that did not answer is left out. Transports notice by then
	// that a path is dead: QUIC after 30 s without a packet, yamux 40 s after its last
	// keepalive at the latest.
	silentTime = 30 * time.Second

	// Round-trip times that no transport measures are measured once a minute, by a
	// ping of 32 bytes on each connection of a peer with more than one.
	rttInterval = time.Minute

	// The list of network interfaces is read anew after this time.
	interfacesAge = 30 * time.Second

	// Close waits this long for rounds to end. They do at once, unless a transport
	// blocks in closing a connection; the host that closes its manager goes on to close
	// the transports, which releases them.
	closeWait = 500 * time.Millisecond

	// The watermarks that libp2p.New gives its own default manager.
	defaultLowWater  = 160
	defaultHighWater = 192
)

type config struct {
	policy         policy.Policy
	log            *zap.Logger
	settleDelay    time.Duration
	quietTime      time.Duration
	plainQuietTime time.Duration
	interval       time.Duration
	concurrency    int
	takeover       int
	firstRetry     time.Duration
	maxRetry       time.Duration
	probeTime      time.Duration
	exempt         []Exemption
	migrateOptions []migrate.Option
}

func defaultConfig() config {
	return config{
		policy:         policy.Default(),
		log:            zap.NewNop(),
		settleDelay:    defaultSettleDelay,
		quietTime:      defaultQuietTime,
		plainQuietTime: defaultPlainQuietTime,
		interval:       defaultInterval,
		concurrency:    defaultConcurrency,
		takeover:       defaultTakeover,
		firstRetry:     defaultFirstRetry,
		maxRetry:       defaultMaxRetry,
		probeTime:      defaultProbeTime,
	}
}

// takeoverDelay is how long nothing must have happened for the first takeover.
func (c *config) takeoverDelay() time.Duration { return time.Duration(c.takeover) * c.settleDelay }

// Option configures a [Manager].
type Option func(*config) error

// WithPolicy sets how connections are ranked. Default: [policy.Default].
//
// Peers need not have the same policy, since one of them decides; but new streams that
// the other one opens go to the connection that its own policy likes best.
func WithPolicy(p policy.Policy) Option {
	return func(c *config) error {
		if p == nil {
			return errors.New("policy is nil")
		}
		c.policy = p
		return nil
	}
}

// WithLogger sets where decisions are logged, also those of the migrate.Host that
// [Manager.Wrap] makes. At info level there is one line for each set of streams moved
// and one for each connection closed. Default: nowhere.
func WithLogger(log *zap.Logger) Option {
	return func(c *config) error {
		if log == nil {
			return errors.New("logger is nil")
		}
		c.log = log
		return nil
	}
}

// WithSlog is [WithLogger] for a logger of log/slog, with which go-libp2p logs too: each
// line becomes a record, and each of its fields an attribute. Of the two options the last
// one counts.
func WithSlog(log *slog.Logger) Option {
	return func(c *config) error {
		if log == nil {
			return errors.New("logger is nil")
		}
		c.log = slogcore.New(log.Handler())
		return nil
	}
}

// WithSettleDelay sets how long a peer's connections have to be unchanged before the
// first round. Each new connection starts the delay again, but it ends five times d
// after the first at the latest. Default: 1 s, in which dials, the halves of a
// simultaneous dial and identify arrive.
func WithSettleDelay(d time.Duration) Option {
	return func(c *config) error { return positive("settle delay", d, &c.settleDelay) }
}

// WithQuietTime sets for how long both ends must have had no stream on a connection before
// it is closed, where the peer can be asked (see the package's documentation). Default:
// 2 s, for what is still on its way of streams that have been closed. Each end waits for
// its own quiet time.
func WithQuietTime(d time.Duration) Option {
	return func(c *config) error { return positive("quiet time", d, &c.quietTime) }
}

// WithPlainQuietTime sets for how long a connection must have had no stream at this end
// where the peer cannot be asked: it runs no manager, or this one has no [Manager.Wrap].
// With the delay of a takeover on top for a follower that takes over. Default: 1 min, the
// usual limit of a request, since the other end's reading is unknown.
func WithPlainQuietTime(d time.Duration) Option {
	return func(c *config) error { return positive("plain quiet time", d, &c.plainQuietTime) }
}

// WithInterval sets how often a peer that keeps its duplicates is looked at without
// anything having been heard of it: its streams may have ended, new ones may have come,
// or it may have been identified. Default: 5 s; at most every second while a connection
// is quiet.
func WithInterval(d time.Duration) Option {
	return func(c *config) error { return positive("interval", d, &c.interval) }
}

// WithConcurrency sets the number of peers that have a round at the same time, besides
// those of [Manager.Consolidate]. Default: 32.
func WithConcurrency(n int) Option {
	return func(c *config) error {
		if n < 1 {
			return fmt.Errorf("concurrency is %d: want 1 or more", n)
		}
		c.concurrency = n
		return nil
	}
}

// WithTakeover sets after how many settle delays in which nothing has happened, counted
// from the end of the first one, the peer with the higher ID takes over from the one
// with the lower ID. Default: 10; enough for the other's settle delay, a few attempts
// and its first prune, and soon enough to save streams from a relay's limit of two
// minutes. Each takeover of the same connections doubles it for the next one, up to 64
// times.
func WithTakeover(settleDelays int) Option {
	return func(c *config) error {
		if settleDelays < 1 {
			return fmt.Errorf("takeover after %d settle delays: want 1 or more", settleDelays)
		}
		c.takeover = settleDelays
		return nil
	}
}

// WithRetry sets when a stream whose migration failed is tried again: first after
// first, then after twice as long each time, at most after limit. Default: 1 s and 1
// min. A connection that comes or goes starts over. A stream that the peer denied to
// migrate is not tried again.
func WithRetry(first, limit time.Duration) Option {
	return func(c *config) error {
		if limit < first {
			return fmt.Errorf("retry after %v at first and %v at most", first, limit)
		}
		if err := positive("first retry", first, &c.firstRetry); err != nil {
			return err
		}
		return positive("last retry", limit, &c.maxRetry)
	}
}

// WithMigrateOptions passes options on to migrate.Wrap when [Manager.Wrap] calls it.
// They come after the manager's own. migrate.WithConnSelector is an error of Wrap: the
// manager sends new streams to the winner with it.
func WithMigrateOptions(opts ...migrate.Option) Option {
	return func(c *config) error {
		c.migrateOptions = append(c.migrateOptions, opts...)
		return nil
	}
}

func positive(name string, d time.Duration, to *time.Duration) error {
	if d <= 0 {
		return fmt.Errorf("%s is %v: want more than 0", name, d)
	}
	*to = d
	return nil
}
