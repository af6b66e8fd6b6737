package faults

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/internal/faultproxy"
	. "github.com/go-portage/portage/internal/hosttest"
	"github.com/go-portage/portage/migrate"
)

// fault is something that befalls the path of a connection.
type fault struct {
	name   string
	strike func(l *link, i int)
	slow   bool // everything arrives all the same
	silent bool // nobody notices before the transport's own timeouts, on any transport
	path   bool // it befalls the path, not an end: over datagrams nobody notices
	stream bool // only TCP has it
}

// stutter is how long a path that stutters passes nothing: longer than an exchange takes,
// and shorter than any transport's patience.
const stutter = 100 * time.Millisecond

var (
	cut      = fault{name: "cut", path: true, strike: func(l *link, i int) { l.paths[i].Cut() }}
	frozen   = fault{name: "frozen", silent: true, strike: func(l *link, i int) { l.paths[i].Freeze() }}
	stutters = fault{name: "stutters", slow: true, strike: func(l *link, i int) {
		p := l.paths[i]
		p.Freeze()
		time.AfterFunc(stutter, p.Thaw)
	}}
	slowed  = fault{name: "slowed", slow: true, strike: func(l *link, i int) { l.paths[i].Slow(20*time.Millisecond, 4<<20) }}
	ended   = fault{name: "ended towards the target", stream: true, strike: func(l *link, i int) { l.paths[i].End(faultproxy.ToTarget) }}
	endedBy = fault{name: "ended towards the dialler", stream: true, strike: func(l *link, i int) { l.paths[i].End(faultproxy.ToDialler) }}
	closed  = fault{name: "closed by the opener", strike: func(l *link, i int) { _ = l.conns[opener][i].Close() }}
	closedB = fault{name: "closed by the acceptor", strike: func(l *link, i int) { _ = l.conns[acceptor][i].Close() }}
)

var everyFault = []fault{cut, frozen, stutters, slowed, ended, endedBy, closed, closedB}

// possible says whether the fault exists on that path.
func (f fault) possible(p *faultproxy.Proxy) bool { return !f.stream || !p.Datagrams() }

// noticed says whether at least one end learns of it at once.
func (f fault) noticed(p *faultproxy.Proxy) bool {
	return !f.slow && !f.silent && !(f.path && p.Datagrams())
}

// kind is how a stream is used when the fault strikes.
type kind int

const (
	busy          kind = iota // both ends write
	idle                      // nothing is under way
	openerEnded               // the opener has ended its writing, and the EOF was read; the acceptor writes
	acceptorEnded             // the other way round
	unread                    // the opener has written and ended, and nothing of that was read; the acceptor writes
	idleEnded                 // the opener has ended its writing, the EOF was read, and nothing is under way
	kinds
)

func (k kind) String() string {
	return []string{"busy", "idle", "ended by opener", "ended by acceptor", "ended and unread", "idle, ended by opener"}[k]
}

// idles says whether nothing is under way on the stream.
func (k kind) idles() bool { return k == idle || k == idleEnded }

// step is where an exchange is held when the fault strikes.
type step struct {
	initiator bool
	kind      migrate.EventKind
}

func (s step) String() string {
	if s.initiator {
		return "initiator " + s.kind.String()
	}
	return "responder " + s.kind.String()
}

var everyStep = func() (all []step) {
	for _, kind := range []migrate.EventKind{migrate.Started, migrate.Acked, migrate.SendSwitched, migrate.ReceiveSwitched, migrate.Finished} {
		all = append(all, step{true, kind}, step{false, kind})
	}
	return all
}()

// fate is what must become of a stream.
type fate int

const (
	either   fate = iota
	survives      // on one connection or the other
	fails         // with an error at both ends
)

// fateOf is what must become of a stream of that kind whose exchange is held at the step
// while connection i suffers the fault.
func fateOf(f fault, noticed bool, i int, at step, k kind) fate {
	switch {
	case f.slow:
		return survives
	case i == newConn && f.stream:
		return either // for a moment the other direction still carries what it carries
	case i == newConn && at == step{true, migrate.Started}:
		return survives // nothing was sent: S9
	case i == newConn && at == step{false, migrate.Started}, i == newConn && at == step{false, migrate.Acked}:
		return either // whether the ack arrives decides
	case i == newConn:
		return fails // S8, S10
	case k.idles() && (at.kind != migrate.Started || !noticed):
		return survives // S12
	}
	// Where something was under way, it has arrived or not; where an end learnt that
	// the connection had died before the exchange began, its application may know.
	return either
}

// What a talk of the matrix writes, each way: early on; while its exchange is held; while
// the fault strikes; and in all. The sum over all streams is less than the window that
// the streams of a QUIC connection share.
const (
	early  = 4 << 10
	during = 8 << 10
	struck = 12 << 10
	total  = 32 << 10
)

// way is a pair of transports.
type way struct{ from, to Transport }

func (w way) String() string { return fmt.Sprintf("%s to %s", w.from, w.to) }

// everyWay is each transport to each other, those of one transport that a simultaneous
// dial makes, and a relay to and from all.
var everyWay = func() (all []way) {
	direct := []Transport{TCP, QUIC, WebSocket, WebTransport, WebRTC}
	for _, from := range direct {
		all = append(all, way{Relay, from}, way{from, Relay})
		for _, to := range direct {
			all = append(all, way{from, to})
		}
	}
	return all
}()

// someWays has each transport as the old and as the new one, and both that a hole punch
// leads to.
var someWays = []way{
	{Relay, QUIC}, {Relay, TCP}, {TCP, QUIC}, {QUIC, WebSocket}, {WebSocket, WebTransport}, {WebTransport, WebRTC}, {WebRTC, Relay},
}

// ways are those to test: all of them with -all.
func ways() []way {
	if *all {
		return everyWay
	}
	return someWays
}

// TestFaultAtEveryStep: on pairs of transports, every fault strikes either connection
// while streams of every kind are at every step of their migration.
func TestFaultAtEveryStep(t *testing.T) {
	defer summary(t)()
	t.Run("ways", func(t *testing.T) {
		for n, w := range ways() {
			t.Run(w.String(), func(t *testing.T) {
				t.Parallel()
				l := newLink(t, w.from, w.to)
				done.pair(w)
				for i := range l.paths {
					for m, f := range everyFault {
						l.join(t)
						if f.possible(l.paths[i]) {
							t.Run(fmt.Sprintf("%s %s", connName(i), f.name), func(t *testing.T) {
								l.suffer(t, f, i, n+m, everyStep)
							})
						}
						l.part(t)
						l.forget()
					}
				}
			})
		}
	})
}

// held is a talk whose exchange is held at a step.
type held struct {
	*talk
	kind      kind
	at        step
	initiator int // side
	fate      fate
	hold      *hold
	result    <-chan error
}

// suffer has one fault strike one connection, under streams that are held at the steps.
func (l *link) suffer(t *testing.T, f fault, i, turn int, steps []step) {
	noticed := f.noticed(l.paths[i])
	var talks []*held
	for n, at := range steps {
		for k := range kinds {
			c := n*int(kinds) + int(k)
			if !*all && (c+turn)%2 == 1 {
				continue // the next fault's
			}
			talks = append(talks, l.prepare(t, at, k, (c/2+turn)%2, uint64(c)))
		}
	}
	for _, h := range talks {
		h.fate = fateOf(f, noticed, i, h.at, h.kind)
		// An application that knows of a connection's death before the migration
		// begins gives the stream up.
		h.gives = i == oldConn && h.at.kind == migrate.Started
	}
	for _, h := range talks {
		WaitFor(t, "the first bytes: "+h.name, h.caughtUp)
	}
	for _, h := range talks {
		if !h.kind.idles() {
			h.allow(during)
		}
		h.hold = l.hold(t, point{h.ends[h.side()], h.at.initiator, h.at.kind})
		h.result = l.moving(h.initiator, h.ends[h.initiator], newConn)
	}
	for _, h := range talks {
		await(t, h.hold.reached, "the step: "+h.name)
	}
	for _, h := range talks {
		done.step(h.at)
		if !h.kind.idles() {
			h.allow(struck)
		}
		if i == oldConn && l.handedOver(h) {
			h.fate = survives // the old connection does not matter any more
		}
	}
	f.strike(l, i)
	done.faults.Add(1)
	for _, h := range talks {
		h.hold.release()
	}
	for _, h := range talks {
		// A stream that has nothing under way is to stay so until it has moved.
		if !h.kind.idles() || h.fate != survives {
			h.allowAll()
		}
	}
	if !noticed && !f.slow {
		l.awaitWhatNeedsNoNotice(t, talks, i)
		l.giveUp(i)
	} else if !f.slow && l.over[i] == WebRTC {
		l.awaitDeath(i)
	}
	for _, h := range talks {
		l.conclude(t, h, f, i)
	}
	l.nothingLeft(t)
}

// handedOver says whether both ends have received all that went over the old connection.
func (l *link) handedOver(h *held) bool {
	for side, s := range h.ends {
		if ok, _ := l.has(point{s, side == h.initiator, migrate.ReceiveSwitched}); !ok {
			return false
		}
	}
	return true
}

// side is the side whose exchange is held.
func (h *held) side() int {
	if h.at.initiator {
		return h.initiator
	}
	return 1 - h.initiator
}

// prepare opens a stream of that kind, and begins to talk.
func (l *link) prepare(t *testing.T, at step, k kind, initiator int, seed uint64) *held {
	sizes := [2]int{total, total}
	switch k {
	case openerEnded, unread, idleEnded:
		sizes[opener] = early
	case acceptorEnded:
		sizes[acceptor] = early
	}
	name := fmt.Sprintf("%s, %s, moved by the %s", at, k, endName(initiator))
	h := &held{
		talk: newTalk(name, l.open(t, oldConn), seed, sizes),
		kind: k, at: at, initiator: initiator,
	}
	for _, f := range h.flows {
		f.early = f.size == early
	}
	if k == unread {
		h.flows[opener].readable = false
	}
	h.allow(early)
	h.start()
	return h
}

// awaitWhatNeedsNoNotice waits for what has to happen while an end of the fault is not in
// sight.
func (l *link) awaitWhatNeedsNoNotice(t *testing.T, talks []*held, i int) {
	t.Helper()
	for _, h := range talks {
		switch {
		case h.fate != survives:
		case i == newConn:
			// The stream goes on where it is. Its EOF is kept back until it is clear
			// whether it migrates (S5).
			h.allowAll()
			WaitFor(t, "everything to arrive over the old connection: "+h.name,
				func() bool { return h.is(h.delivered) })
		default:
			l.arrive(t, h)
			h.allowAll()
			h.settle(t)
		}
	}
}

// arrive waits until both ends are on the new connection.
func (l *link) arrive(t *testing.T, h *held) {
	t.Helper()
	for side, s := range h.ends {
		WaitFor(t, fmt.Sprintf("the %s to be on the new connection: %s", endName(side), h.name),
			func() bool { return s.Migrations() == 1 })
	}
}

// conclude waits for the end of a talk, and checks that it is the right one.
func (l *link) conclude(t *testing.T, h *held, f fault, i int) {
	t.Helper()
	if h.fate == survives && i == newConn && !f.slow {
		err := await(t, h.result, "Migrate to give up: "+h.name)
		require.ErrorIs(t, err, migrate.ErrTryLater, h.name)
		h.allowAll()
		h.end(t)
	} else {
		if h.fate == survives {
			l.arrive(t, h)
			h.allowAll()
		}
		h.end(t)
		err := await(t, h.result, "Migrate to return: "+h.name)
		if h.fate == survives && err != nil {
			t.Errorf("%s: Migrate says %v", h.name, err)
		}
	}
	switch {
	case h.fate == survives && !h.survived():
		t.Errorf("it is to survive: %v\tinitiator: %v; responder: %v", h.talk,
			l.failure(h.ends[h.initiator], true), l.failure(h.ends[1-h.initiator], false))
	case h.fate == fails && h.survived():
		t.Errorf("it cannot have survived: %v", h.talk)
	}
}
