package connmgr

import (
	"cmp"
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/quic-go/quic-go"

	"github.com/go-portage/portage/internal/aside"
)

// Paths
//
// A connection whose path is gone looks like any other until its transport notices, which
// takes half a minute. A peer that has lost its network and reconnects has two connections
// then, and the older one is dead. So connections are asked whether they work (question.go).
//
// An answer that is late says little: eight uploads may be queued before the question. What
// counts is evidence, and there are three outcomes:
//
//	alive     something came from the peer since it was asked: the answer, or any byte
//	silent    it was asked, the question could be put, and nothing at all came in time
//	unknown   it could not be asked (no stream to be had, a full queue), or has not been yet
//
//	           ask                 evidence
//	unknown ---------> (asking) ---------------> alive
//	   ^                  | in time: nothing came       | asked again, and so on
//	   |  not put         v
//	   +------------------+----> silent --- a late answer ---> alive

// health is what is known of a path.
type health uint8

const (
	pathUnknown health = iota
	pathAlive
	pathSilent
)

func (h health) String() string {
	switch h {
	case pathAlive:
		return "alive"
	case pathSilent:
		return "silent"
	default:
		return "unknown"
	}
}

// path is what is known of the path of a connection.
type path struct {
	health health
	at     time.Time // alive: when what was answered was asked
	since  time.Time // how long it has worked goes back to here; zero: it has never been silent
	asked  time.Time // last; zero: never
	lost   time.Time // when the first was put of the questions in a row without an answer
	wide   bool      // it has carried what is larger than a packet
	denied int       // how often in a row it was asked to, and has not
	asking bool      // the answer is awaited
	tries  int       // in a row without an answer
}

func (p path) alive() bool { return p.health == pathAlive }

// gaveUp says whether the question has been out for so long that its outcome is known.
func (p path) gaveUp(now time.Time, wait time.Duration) bool { return !now.Before(p.asked.Add(wait)) }

func (p *path) ask(now time.Time) { p.asked, p.asking = now, true }

// goneAt is when p has been silent for so long that a stream had better be anywhere else.
func (p path) goneAt(wait time.Duration) time.Time { return p.lost.Add(2 * wait) }

// hear notes evidence that the path worked at some time.
func (p *path) hear(at time.Time) {
	if p.health == pathSilent {
		p.since = at
	}
	p.health, p.at, p.tries, p.lost = pathAlive, later(p.at, at), 0, time.Time{}
}

// miss notes that the last question has brought no evidence.
func (p *path) miss(put bool) {
	if p.tries++; p.tries == 1 {
		p.lost = p.asked
	}
	if put {
		p.health, p.since = pathSilent, p.asked
	} else {
		p.health = pathUnknown
	}
}

// carried notes whether what was larger than a packet came back.
func (p *path) carried(all bool) {
	if all {
		p.wide, p.denied = true, 0
	} else {
		p.denied++
	}
}

func (p *path) end() { p.asking = false }

// reprobe is how long after a question without an answer the next one is put. A path that is
// down for some seconds again and again works again with the next packet that is sent while it
// is up, and QUIC itself waits twice as long each time; so it is asked often at first.
func reprobe(tries int, wait time.Duration) time.Duration {
	return max(min(lateFactor*wait<<max(0, min(tries, 12)-oftenTries), maxReprobe), lateFactor*wait)
}

// traffic is what a connection has carried, as far as this side can know.
type traffic struct {
	packets  uint64 // received: all, on QUIC
	received uint64 // by labelled streams, in bytes
	sent     uint64 // of labelled streams, in bytes that the transport has taken
	blocked  bool   // a Write of a labelled stream waits for room
	freed    uint64 // Writes that have waited for room, and got it
	of       uint64 // which streams these are: a checksum
}

// heard says whether what came between two looks shows that the path works. Where packets are
// counted, they alone do: QUIC sends what is new with its probes of a path from which nothing
// comes, so that a Write goes on all the same. Elsewhere it is anything that was received, or
// that a Write went on that had waited for room, since only the other end makes it. What else
// was sent meanwhile shows nothing: buffers took it.
func (before traffic) heard(after traffic) bool {
	if before.packets > 0 {
		return after.packets > before.packets
	}
	return after.received > before.received || after.freed > before.freed
}

func trafficOn(mv mover, c network.Conn) traffic {
	var t traffic
	if mv != nil {
		t = mv.Traffic(c)
	}
	t.packets = packetsOn(c)
	return t
}

// packetsOn returns how many packets have been received on c; 0 where only QUIC knows.
func packetsOn(c network.Conn) uint64 {
	var q *quic.Conn
	if !c.As(&q) {
		return 0
	}
	return q.ConnectionStats().PacketsReceived
}

// leaveSilent has streams that may outlive their connection go on elsewhere at once, where
// theirs is silent while another is alive.
func leaveSilent(d *peerState, mv mover) {
	leaver, ok := mv.(interface{ Leave(c network.Conn) })
	if !ok {
		return
	}
	var silent []network.Conn
	alive := false
	d.mu.Lock()
	for _, cs := range d.conns {
		switch {
		case cs.path.health == pathSilent:
			silent = append(silent, cs.conn)
		case cs.path.alive() && !cs.conn.IsClosed():
			alive = true
		}
	}
	d.mu.Unlock()
	for _, c := range silent {
		if alive {
			leaver.Leave(c)
		}
	}
}

// refused says whether a question has failed at the resource manager of either end, which says
// nothing of the path.
func refused(err error) bool {
	var reset *network.StreamError
	return errors.Is(err, network.ErrResourceLimitExceeded) ||
		errors.As(err, &reset) && reset.Remote && reset.ErrorCode == network.StreamResourceLimitExceeded
}

// pathAsker asks connections whether their paths work.
type pathAsker struct {
	cfg   *config
	tasks *tasks
	sched *scheduler
	tells *teller
	probe prober
	greet greeter
}

// ask asks a connection of d whether its path works, with more than a packet if full. It does
// not wait for the answer.
func (pa *pathAsker) ask(d *peerState, cs *connState, mv mover, full bool) {
	d.mu.Lock()
	greets := pa.greet != nil && d.manages && !cs.greeted && !cs.lacks
	cs.greeted = cs.greeted || greets
	cs.path.ask(time.Now())
	cs.requests++
	d.mu.Unlock()
	pa.tasks.start(func() { pa.await(d, cs, mv, full, greets) })
}

// insist asks c, and again after a moment where there was no room for the question: where a peer
// has several connections, both ends ask all of them at the same moment.
func (pa *pathAsker) insist(ctx context.Context, c network.Conn, full bool, put func()) (time.Duration, error) {
	start := time.Now()
	for wait := refusedWait; ; wait *= 2 {
		took, err := pa.probe(ctx, c, full, put)
		if !refused(err) || time.Since(start)+wait >= pa.cfg.probeTime {
			return took, err
		}
		select {
		case <-ctx.Done():
			return took, err
		case <-time.After(wait):
		}
	}
}

// await asks cs and notes what comes of it. greets: it is asked which process it leads to,
// which shows that the path works, too.
func (pa *pathAsker) await(d *peerState, cs *connState, mv mover, full, greets bool) {
	start := time.Now()
	before := trafficOn(mv, cs.conn)
	var put atomic.Bool
	type outcome struct {
		took     time.Duration
		err      error
		instance uint64
	}
	came := make(chan outcome, 1)
	ctx, cancel := context.WithTimeout(pa.tasks.ctx, lateFactor*pa.cfg.probeTime)
	defer cancel()
	if greets { // that cannot be repeated; see nudge
		defer time.AfterFunc(useProbe, func() {
			pa.tasks.start(func() { _, _ = pa.probe(ctx, cs.conn, false, func() {}) })
		}).Stop()
	}
	go func() {
		var out outcome
		if greets {
			out.instance, out.took, out.err = pa.greet(ctx, cs.conn, func() { put.Store(true) })
		} else {
			out.took, out.err = pa.insist(ctx, cs.conn, full, func() { put.Store(true) })
		}
		came <- out
	}()
	// note is called once in time, and once more for an answer that is late.
	note := func(out *outcome, late bool) {
		heard := out != nil && answered(out.err) || before.heard(trafficOn(mv, cs.conn))
		closed := aside.IsClosed(cs.conn)
		d.mu.Lock()
		was := cs.path.health
		if out != nil && greets {
			cs.heard(out.err)
			cs.instance = cmp.Or(out.instance, cs.instance)
		}
		switch {
		case heard && !closed:
			cs.path.hear(start)
			if out != nil && out.err == nil {
				cs.pinged(out.took)
			}
		case late: // and no news
		case out != nil:
			cs.path.miss(false) // it could not be asked
		default:
			cs.path.miss(put.Load())
		}
		if out != nil {
			if full && !greets {
				cs.path.carried(out.err == nil)
			}
			cs.path.end()
			cs.requests--
		}
		silent := cs.path.health == pathSilent && was != pathSilent && !closed
		d.mu.Unlock()
		pa.sched.schedule(d, time.Now())
		if silent {
			pa.tells.silent(d.peer, cs.info(), time.Since(start))
		}
		leaveSilent(d, mv)
	}
	timer := time.NewTimer(pa.cfg.probeTime)
	defer timer.Stop()
	look := time.NewTicker(pa.cfg.probeTime / probeLooks)
	defer look.Stop()
	for waits := true; waits; {
		select {
		case out := <-came:
			note(&out, false)
			return
		case <-look.C:
			trafficOn(mv, cs.conn) // it takes two looks to see that a Write waits, and a third that it goes on
		case <-timer.C:
			note(nil, false)
			waits = false
		}
	}
	out := <-came
	note(&out, true)
}
