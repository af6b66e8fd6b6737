package connmgr

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/go-portage/portage/migrate"
	"github.com/go-portage/portage/policy"
)

// Moving
//
// The streams of a round move at once, each in a goroutine of its own, and the round does not
// wait for them. A stream that found something in its way which may pass with the others, such
// as a resource limit, is tried once more when these have finished; what fails then waits
// (WithRetry). There is one deadline for all of them: then the batch is reported as it stands,
// and what is left goes on.

// batch is the migrations that one round has started. Guarded by the lock of the peer, but
// for the first four.
type batch struct {
	d      *peerState
	mover  mover
	to     *connState
	start  time.Time
	losers map[*connState]*count

	started int // migrations; those that are tried again are not counted twice
	pending int // migrations that have not returned
	again   []toMove
	passed  bool          // of those started last, one has returned without anything in its way
	done    chan struct{} // closed when none is pending and none is tried again
	late    bool          // the deadline has passed
	err     error         // of the first migration that failed
}

// count is what became of the streams of one loser.
type count struct {
	decision              policy.Decision
	moved, failed, denied int
	moving                int // have not returned
	took                  time.Duration
}

// toMove is a stream to move, and where it is.
type toMove struct {
	s    network.Stream
	from *connState
}

// migrations moves streams, and knows what the peer moves.
type migrations struct {
	cfg   *config
	tasks *tasks
	sched *scheduler
	tells *teller
	usage *usage
}

// mayMove returns the streams that the plan moves.
func (d *peerState) mayMove(v *view, p *plan) []toMove {
	var list []toMove
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, verdict := range p.verdicts {
		if verdict.move == moveNone {
			continue
		}
		for _, s := range v.conns[i].labelled {
			b := d.backoff[s.Stream]
			_, moves := d.moving[s.Stream]
			switch {
			case moves, b.denied, !v.facts.forced && v.facts.now.Before(b.until):
			case verdict.move == moveOwn && s.theirs:
			default:
				list = append(list, toMove{s.Stream, v.conns[i].connState})
			}
		}
	}
	if p.room >= 0 && len(list) > p.room {
		list = list[:p.room]
	}
	return list
}

// move starts to migrate the streams of a plan. It returns nil where there are none.
func (mg *migrations) move(d *peerState, v *view, p *plan) *batch {
	streams := d.mayMove(v, p)
	if len(streams) == 0 {
		return nil
	}
	b := &batch{
		d: d, mover: v.mover, to: v.conns[p.winner].connState, start: v.facts.now,
		losers: make(map[*connState]*count), started: len(streams), done: make(chan struct{}),
	}
	for i := range v.conns {
		if i != p.winner {
			b.losers[v.conns[i].connState] = &count{decision: p.verdicts[i].decision}
		}
	}
	d.mu.Lock()
	mg.begin(b, streams)
	d.mu.Unlock()
	if !mg.tasks.start(func() { mg.await(b) }) {
		return nil
	}
	return b
}

// await tells of a batch when it is done, or its time is over.
func (mg *migrations) await(b *batch) {
	timer := time.NewTimer(moveWait)
	defer timer.Stop()
	select {
	case <-b.done:
	case <-timer.C:
	case <-mg.tasks.ctx.Done():
	}
	b.d.mu.Lock()
	b.late = b.pending > 0
	for _, r := range b.again {
		b.failed(r, mg.cfg)
	}
	b.again = nil
	moved := b.report()
	err := b.err
	b.d.mu.Unlock()
	mg.sched.schedule(b.d, time.Now())
	mg.tells.moved(b.d.peer, b.to.info(), moved, err)
}

// report returns what became of the losers so far. It must be called with the peer's lock
// held.
func (b *batch) report() []Loser {
	losers := make([]Loser, 0, len(b.losers))
	for cs, c := range b.losers {
		losers = append(losers, Loser{Conn: cs.info(), Decision: c.decision,
			Moved: c.moved, Failed: c.failed, Moving: c.moving, took: c.took})
	}
	slices.SortFunc(losers, func(a, b Loser) int { return cmp.Compare(a.Conn.ID, b.Conn.ID) })
	return losers
}

// begin starts migrations. It must be called with the peer's lock held.
func (mg *migrations) begin(b *batch, streams []toMove) {
	b.pending, b.passed = 0, false
	if b.d.moving == nil {
		b.d.moving = make(map[network.Stream]motion)
	}
	for _, r := range streams {
		if !mg.tasks.start(func() { mg.migrate(b, r) }) {
			break
		}
		b.d.moving[r.s] = motion{r.from, b.to}
		b.losers[r.from].moving++
		b.pending++
	}
	if b.pending == 0 {
		close(b.done)
	}
}

// migrate moves one stream and notes what came of it. A cancelled context would only end
// the waiting, not the migration; so only the manager's own is used, and what is in motion
// is known for as long as it is.
func (mg *migrations) migrate(b *batch, r toMove) {
	ctx := mg.tasks.ctx
	if r.from.base.Limited && b.to.base.Limited {
		ctx = network.WithAllowLimitedConn(ctx, "stream migration")
	}
	err := b.mover.Migrate(ctx, r.s, b.to.conn)
	elsewhere := err != nil && r.s.Conn() != r.from.conn // the peer moved it, or it is closed
	now := time.Now()

	d := b.d
	d.mu.Lock()
	delete(d.moving, r.s)
	c := b.losers[r.from]
	c.moving--
	switch {
	case err == nil:
		b.passed = true
		delete(d.backoff, r.s)
		c.moved++
		r.from.moved++
		d.progress = now
		if took := now.Sub(b.start); took > c.took {
			r.from.took += took - c.took
			c.took = took
		}
	case errors.Is(err, migrate.ErrDenied):
		b.passed = true
		c.denied++
		d.wait(r.s, backoff{denied: true})
	case mg.tasks.ctx.Err() != nil:
	case elsewhere, errors.Is(err, migrate.ErrClosed), errors.Is(err, migrate.ErrNotLabelled):
		b.passed = true
		delete(d.backoff, r.s)
	default:
		if b.err == nil {
			b.err = err
		}
		if passes(err) && !b.late {
			b.again = append(b.again, r)
		} else {
			b.passed = true
			b.failed(r, mg.cfg)
		}
	}
	if b.pending--; b.pending == 0 && !b.late {
		if again := b.again; len(again) > 0 && b.passed {
			b.again = nil
			mg.begin(b, again)
		} else {
			close(b.done)
		}
	}
	late := b.late
	d.mu.Unlock()
	if late {
		mg.sched.schedule(d, now)
	}
}

// passes says whether what stood in the way of a migration may be gone once others have
// finished.
func passes(err error) bool {
	var reset *network.StreamError
	return errors.Is(err, migrate.ErrTryLater) ||
		errors.Is(err, network.ErrResourceLimitExceeded) ||
		errors.As(err, &reset) && reset.ErrorCode == network.StreamResourceLimitExceeded
}

// failed has a stream wait for its next attempt. It must be called with the peer's lock held.
func (b *batch) failed(r toMove, cfg *config) {
	b.losers[r.from].failed++
	w := b.d.backoff[r.s]
	w.until = time.Now().Add(cfg.retryAfter(w.failures))
	w.failures++
	b.d.wait(r.s, w)
}

func (d *peerState) wait(s network.Stream, b backoff) {
	if d.backoff == nil {
		d.backoff = make(map[network.Stream]backoff)
	}
	d.backoff[s] = b
}

// migrated is told of each step of each migration, of both ends. What the peer moves is
// told in this side's log, too.
func (mg *migrations) migrated(e migrate.Event) {
	mg.tells.migrated(e)
	if e.Initiator || e.Kind != migrate.Started && e.Kind != migrate.Finished || mg.usage.count.Load() == 0 {
		return
	}
	d := mg.sched.lockKnown(e.Peer)
	if d == nil {
		return
	}
	defer d.mu.Unlock()
	from, to := d.state(e.From), d.state(e.To)
	if from == nil || to == nil {
		return
	}
	b := &from.byPeer
	if b.to != to {
		*b = byPeer{first: e.Time, to: to}
	}
	if e.Kind == migrate.Started {
		return
	}
	b.streams++
	b.last = e.Time
	d.progress = e.Time
	mg.sched.schedule(d, e.Time.Add(byPeerPause))
}

// mover is what a Manager needs of a *migrate.Host.
type mover interface {
	// Supports says whether p migrates streams.
	Supports(p peer.ID) bool
	// Streams returns the labelled streams that are on c.
	Streams(c network.Conn) []network.Stream
	// Unlabelled returns the streams on c that have no label.
	Unlabelled(c network.Conn) []network.Stream
	// Migrate moves s, and returns when its old underlying stream is done with, or when
	// ctx is.
	Migrate(ctx context.Context, s network.Stream, to network.Conn) error
	// Traffic returns what the labelled streams on c have carried.
	Traffic(c network.Conn) traffic
	// TrafficOfAll puts what all labelled streams have carried into all.
	TrafficOfAll(all map[network.Conn]*migrate.Traffic)
}

var _ mover = hostMover{}

type hostMover struct{ *migrate.Host }

func (h hostMover) Streams(c network.Conn) []network.Stream {
	labelled := h.Host.Streams(c)
	streams := make([]network.Stream, len(labelled))
	for i, s := range labelled {
		streams[i] = s
	}
	return streams
}

func (h hostMover) Traffic(c network.Conn) traffic {
	t := h.Host.Traffic(c)
	return trafficOf(&t)
}

func trafficOf(t *migrate.Traffic) traffic {
	return traffic{received: t.Received, sent: t.Sent, blocked: t.Blocked, freed: t.Freed, of: t.Of}
}
