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

	// How often to look in a quiet time: five times, and at least every second. Streams that are
	// opened with the plain host are seen only by looking.
	quietLooks  = 5
	maxQuietGap = time.Second

	// How many peers have a round at the same time, and for how long one keeps its place
	// while its streams move. 32 places of 50 ms are 640 peers a second at the least: 1,000
	// peers that reconnect at once, or 1,024 that use up all of their time, are through in
	// less than two seconds. Most have finished before.
	defaultConcurrency = 32
	placeTime          = 50 * time.Millisecond

	// The shortest time between two rounds of a peer, whatever asks for one: short against a
	// round trip, and at most 40 rounds a second for a peer that provokes them.
	minRoundGap = 25 * time.Millisecond

	// After how long a batch of migrations is reported even if it is not complete. Those whose
	// reader does not read go on.
	moveWait = 10 * time.Second

	// Nothing outranks the only unlimited connection among limited ones, so there is nothing
	// to wait for but a second direct dial, whose streams would move once more. A relay that
	// carries 205 kB/s has spent the 128 KiB that it allows after 640 ms.
	fastSettle = 100 * time.Millisecond

	// Streams leave a connection when its relay cuts it within this time, however limited
	// the other one is: more than a migration takes on the slowest path.
	endingSoon = 10 * time.Second

	// And when all but an eighth of what the relay allows has been carried, as far as this
	// side knows: what is left carries the migration.
	spentShare = 8

	// How long the peer has to move the streams that it opened, once it has been told which
	// connection is kept. It begins as soon as it has been told.
	theirsAfter = 3 * time.Second

	// A peer that has been asked this often to let go of a connection is in no hurry, whatever it
	// answers: from then on it is asked once an interval.
	busyAsks = 8

	// Of what a peer can have logged at a rate of its choice there is one line in this time.
	sampleEvery = time.Minute

	// And of what is done about a peer so many. To get from a relay to the best of several
	// connections takes less than ten; who has more in a minute is in motion all the time.
	deedsAtOnce = 20

	// The connection that the peer keeps may change so often at once, and then once in this
	// time, which is the patience with a better one at the default interval. Connections that
	// come one after the other, each better than the last, are four at the most: a relay, one
	// without a limit, TCP, QUIC.
	turnsAtOnce = 5
	turnPause   = 10 * time.Second

	// The end of what the peer moves is told in the log once nothing has moved for this long.
	byPeerPause = 250 * time.Millisecond

	// go-libp2p's QUIC takes 256 streams from each end. Some are left for new ones.
	quicStreams = 256
	headroom    = 32

	// Where there are more streams than this, those of the managers make no difference.
	fewStreams = 16

	// Ten seconds are enough for the controller's own delay, its first attempt, the attempts
	// after 1, 2 and 4 s if that fails, or its first prune; and it leaves most of the two
	// minutes that a relay gives a connection.
	defaultTakeover = 10 * time.Second

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

	// How long a connection may take to answer before it counts as silent, where nothing
	// else comes on it either. Paths through a relay take less than a second; three of them
	// are time for a retransmission in either direction.
	defaultProbeTime = 3 * time.Second

	// Before streams leave a connection that works, the winner's last answer must not be older
	// than this; else it is asked once more.
	freshFor = 250 * time.Millisecond

	// How often it is looked at what a connection carries while its answer is awaited.
	probeLooks = 12

	// A late answer has twice the time. Then a connection that did not answer is asked again,
	// and after so many times less and less often, up to this: transports notice
	// by then that a path is dead.
	lateFactor = 2
	oftenTries = 6
	maxReprobe = 30 * time.Second

	// How long nothing comes on a connection that streams depend on before it is asked, and
	// how often one is asked that carries nothing.
	useProbe  = time.Second
	idleProbe = time.Minute

	// What a connection is asked with the first time, in bytes: a burst of several packets,
	// beyond the 8 kB at which some paths begin to swallow what is sent, also where TLS makes
	// small records of the first ones. Each end asks once for each new connection of a peer
	// with more than one.
	fullProbe = 24 << 10

	// How long that question waits at most for a TCP connection to be unused. Streams that are
	// to leave another connection for this one wait for longer.
	largeWithin = 10 * time.Second

	// How long after a question for which there was no room it is put again; then twice as
	// long each time.
	refusedWait = 100 * time.Millisecond

	// A winner has to live for this long before the last other connection without a limit is
	// closed, where that is a relayed one: it is the way to peers behind NATs, and 30 s are
	// what QUIC takes to notice that a path is gone, and what the shortest-lived UDP mappings
	// last. A direct one can be dialled again in a round trip by whoever could before, so a
	// tenth of that is enough, unless the winner is another kind of path and came later than
	// that: then the loser is known to work, and the winner is not. What has died young is
	// waited for longer: twice as long each time, up to an hour.
	defaultProof      = 30 * time.Second
	directProofShare  = 10
	maxProofDoublings = 7

	// What young means, for how long a death is remembered, and of how many peers.
	youngFor  = time.Minute
	deathsFor = 2 * time.Hour
	maxDeaths = 1024

	// go-libp2p punches three times when a relayed connection comes in, 5 s each. An attempt
	// that overlaps with these fails.
	defaultUpgradeFirst = 20 * time.Second

	// How often a direct connection is asked for while there is none. A peer with streams is
	// to have one within a minute after it has become possible; where it is not, an attempt
	// takes 15 s. One that is only wanted is not missed at this moment.
	defaultUpgradeBusy = 40 * time.Second
	defaultUpgradeIdle = 5 * time.Minute

	// How long a peer counts as one with streams, and as one that is used, after the last
	// stream: conversations pause, and requests come one by one.
	upgradeBusyFor = time.Minute
	upgradeUsed    = 10 * time.Minute

	// How long after something has changed, or the direct connection has gone, an attempt is
	// made, and up to as long after that, by chance: addresses change one after another, and
	// the other end has to learn of it, too. A peer rests for a while between two attempts,
	// whatever it tells.
	upgradeNews = time.Second
	upgradeRest = 5 * time.Second

	// How long an attempt may take, how many run at a time, and how often peers are looked at
	// that none is due for: streams may have begun. An attempt costs some messages and a few
	// dials, and mostly waits.
	upgradeTimeout = 30 * time.Second
	upgradesAtOnce = 8
	upgradeLook    = 20 * time.Second
	sweepGap       = 100 * time.Millisecond

	// Of how many peers that are reached only over relays something is kept, some 300 bytes
	// each. Of more, chance decides.
	maxUpgrades = 4096

	// How often it is looked at what the streams have carried, and how long nothing may come
	// where something is to be expected before the connection is asked, as long as it answers:
	// longer than most servers think. A peer that has nothing to say is asked after up to eight
	// times as long.
	detourLook    = time.Second
	detourWait    = 2 * time.Second
	maxDetourWait = 8 * detourWait

	// What has come for so many looks in a row is a transfer, of which more is expected.
	flowingLooks = 3

	// How many looks there are without a labelled stream before there are no more.
	detourIdle = 30

	// How long the end with the higher peer ID leaves the dialling to the other one, how often
	// a peer is dialled beside a connection, how long after each other, and for how long. The
	// transport gives the connection up soon after the last.
	detourSecond  = 1500 * time.Millisecond
	detourTries   = 3
	detourPause   = 10 * time.Second
	detourTimeout = 15 * time.Second

	// How long a policy may take to rank before it counts as one that does not return.
	policyWait = time.Second

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
	takeover       time.Duration
	proofTime      time.Duration
	standby        bool
	firstRetry     time.Duration
	maxRetry       time.Duration
	probeTime      time.Duration
	upgrades       bool
	upgradeFirst   time.Duration
	upgradeBusy    time.Duration
	upgradeIdle    time.Duration
	detours        bool
	asides         *asides // nil: the manager makes its own
	exempt         []Exemption
	migrateOptions []migrate.Option
	metrics        MetricsTracer // nil: nobody measures
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
		proofTime:      defaultProof,
		firstRetry:     defaultFirstRetry,
		maxRetry:       defaultMaxRetry,
		probeTime:      defaultProbeTime,
		upgrades:       true,
		detours:        true,
		upgradeFirst:   defaultUpgradeFirst,
		upgradeBusy:    defaultUpgradeBusy,
		upgradeIdle:    defaultUpgradeIdle,
	}
}

// proof is how long a winner has to live before the last other unlimited connection, relayed
// or not, is closed, where so many winners of its kind have died young.
func (c *config) proof(relayed bool, deaths int) time.Duration {
	d := c.proofTime
	if !relayed && deaths == 0 {
		d /= directProofShare
	}
	return min(d<<min(deaths, maxProofDoublings), max(time.Hour, c.proofTime))
}

// retryAfter is how long to wait after so many failures in a row.
func (c *config) retryAfter(failures int) time.Duration {
	if failures >= 32 {
		return c.maxRetry
	}
	if wait := c.firstRetry << failures; wait > 0 {
		return min(c.maxRetry, wait)
	}
	return c.maxRetry
}

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

// WithSettleDelay sets how long a peer's connections have to be unchanged before anything
// is decided. Each new connection starts the delay again, but it ends five times d after the
// first at the latest. Where all connections but one are limited, it is 100 ms at most:
// nothing that may still come outranks that one. Default: 1 s, in which dials, the halves of
// a simultaneous dial and identify arrive.
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
// With the delay of a takeover on top for a follower that takes over. Each stream, however
// short, starts it again. Default: 1 min, the usual limit of a request, since the other end's
// reading is unknown.
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
// those of [Manager.Consolidate]. A round that moves streams counts for 50 ms at most.
// Default: 32.
func WithConcurrency(n int) Option {
	return func(c *config) error {
		if n < 1 {
			return fmt.Errorf("concurrency is %d: want 1 or more", n)
		}
		c.concurrency = n
		return nil
	}
}

// WithTakeover sets after how long in which nothing has happened the peer with the higher
// ID takes over from the one with the lower ID. Default: 10 s; enough for the other's settle
// delay, a few attempts and its first prune, and soon enough to save streams from a relay's
// limit of two minutes. Each takeover of the same connections doubles it for the next one,
// up to 64 times.
func WithTakeover(d time.Duration) Option {
	return func(c *config) error { return positive("takeover", d, &c.takeover) }
}

// WithProof sets how long a winner has to live, and to answer, before streams leave the last
// other connection without a limit and it is closed. Where that one is direct, streams leave
// it at once and a tenth of d is enough to close it, unless it is known to be the better
// proven one: the winner is another kind of path (UDP, not TCP, or the other way about) and
// came by more than a tenth of d later. New streams use the winner meanwhile.
// Where a winner of the same kind to the same peer has died young, it takes twice as long
// each time, an hour at most, and nothing moves before. Default: 30 s.
func WithProof(d time.Duration) Option {
	return func(c *config) error { return positive("proof", d, &c.proofTime) }
}

// WithStandby keeps one second connection to each peer for good, where there is one without
// a limit: the best beside the winner. It carries nothing, and takes over at once when the
// winner dies. Default: none is kept.
func WithStandby() Option {
	return func(c *config) error {
		c.standby = true
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

// WithUpgrades sets how often a direct connection is asked for, at least, where a peer is
// reached only over relays: every busy while there are streams or were within a minute, every
// idle while it is protected or tagged, or was used within ten minutes. Between two attempts
// passes less at first, and chance takes off up to a quarter. An attempt is also made soon
// after addresses or reachability have changed at either end. The first comes 20 s after the
// relayed connection: go-libp2p makes its own until then. Default: 40 s and 5 min.
//
// It needs [Manager.Wrap] or [Enable], and libp2p.EnableHolePunching. Only the end that was
// dialled over the relay can ask; the other end need not run a manager. An attempt costs less
// than 3 KiB of what the relay allows.
func WithUpgrades(busy, idle time.Duration) Option {
	return func(c *config) error {
		if idle < busy {
			return fmt.Errorf("upgrades every %v while busy and %v while idle: want no less while idle", busy, idle)
		}
		c.upgrades = true
		if err := positive("upgrades while busy", busy, &c.upgradeBusy); err != nil {
			return err
		}
		return positive("upgrades while idle", idle, &c.upgradeIdle)
	}
}

// WithoutUpgrades leaves it to go-libp2p alone to get direct connections: it tries once,
// when a relayed connection comes in. Of this and [WithUpgrades] the last one counts.
func WithoutUpgrades() Option {
	return func(c *config) error {
		c.upgrades = false
		return nil
	}
}

// WithoutDetours has nothing done about a peer whose only connection brings nothing although
// streams wait on it. By default it is asked after 2 s whether it works, and where it does
// not answer within 3 s more, the peer is dialled again beside it, three times at most. The
// connection stays, since it may only be interrupted. It needs [Enable], or
// [Manager.Detours] beside [Manager.Wrap].
func WithoutDetours() Option {
	return func(c *config) error {
		c.detours = false
		return nil
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

// The times that options take. Less than the least is a loop that never rests.
const (
	minTime = time.Millisecond
	maxTime = 24 * time.Hour
)

func positive(name string, d time.Duration, to *time.Duration) error {
	if d < minTime || d > maxTime {
		return fmt.Errorf("%s is %v: want %v to %v", name, d, minTime, maxTime)
	}
	*to = d
	return nil
}
