package connmgr

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"

	"github.com/go-portage/portage/migrate"
)

// Detours
//
// A path dies, and QUIC takes 30 s to notice, TCP up to 40. Until then go-libp2p opens new
// streams on the dead connection, and dials nothing. Nobody can tell a path that is dead from
// one that is back in ten seconds: so nothing is closed. Instead the peer is dialled again
// beside the connection, by whatever other way there is, and where that brings another
// connection, the manager does what it always does: streams go where something is answered,
// and whatever the old path still brings is taken.
//
//	streams wait --nothing comes--> asked (path.go) --silent--> dialled beside (aside.go)
//	                                      |                            |
//	                                      +--alive--> asked later      +--> a peer with two connections
//
// As long as there are labelled streams, what they have carried is looked at once a second. A
// question follows where something was sent, or was being received, and a Read or Write waits,
// and nothing comes for a while. Where all is idle there is none: it would wake the radio of a
// telephone. A peer that answers the question, and has nothing else to say, is asked after
// twice as long each time.

// detours are the connections on which streams wait.
type detours struct {
	on      atomic.Bool   // they are looked at
	begun   atomic.Uint64 // streams, so far
	suspect atomic.Int32  // connections that are being asked, or do not answer

	mu    sync.Mutex // a leaf
	conns map[network.Conn]*waiting
}

// waiting is what is known of such a connection.
type waiting struct {
	traffic traffic
	since   time.Time // when something came last, or was sent first that may be answered
	armed   bool      // something is to be expected
	sent    bool      // since something was sent, and not because a transfer has stopped
	flowing int       // looks in a row that found that something had come
	answers int       // questions in a row that were answered, where the streams brought nothing
	suspect bool      // it is to be asked, and the peer has an entry
	detourFacts
}

// detourFacts are the attempts to dial a peer beside a connection.
type detourFacts struct {
	running bool
	tries   int
	at      time.Time // the last attempt; zero: there was none
	err     error     // of it
}

// wait is how long nothing may come before it is asked.
func (w *waiting) wait() time.Duration { return min(detourWait<<min(w.answers, 10), maxDetourWait) }

// look notes what the streams have carried by now, and says whether to ask. packets is called
// where it matters what else has come.
func (w *waiting) look(now time.Time, t traffic, waits bool, packets func() uint64) bool {
	before := w.traffic
	w.traffic = t
	w.traffic.packets = before.packets
	others := t.of != before.of || t.received < before.received || t.sent < before.sent
	came := !others && t.received > before.received
	switch {
	case came:
		if w.flowing++; w.sent || w.flowing >= flowingLooks {
			w.answers = 0 // something does come here
		}
		// An answer is not followed by another one, a transfer is by more of it.
		w.since, w.sent, w.armed = now, false, w.flowing >= flowingLooks
		if w.armed {
			w.traffic.packets = packets()
		}
		return false
	case !waits:
		w.flowing, w.armed = 0, false
		return false
	case !w.armed && (others || t.sent > before.sent || t.blocked):
		w.since, w.sent, w.armed = now, true, true
		w.traffic.packets = packets()
	}
	w.flowing = 0
	if !w.armed {
		return false
	}
	if p := packets(); p > w.traffic.packets {
		w.traffic.packets, w.since = p, now
	}
	return now.Sub(w.since) >= w.wait()
}

// of returns since when nothing comes on c although streams wait; zero: it is not known of any.
func (d *detours) of(c network.Conn) (time.Time, detourFacts) {
	if d.suspect.Load() == 0 {
		return time.Time{}, detourFacts{}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if w := d.conns[c]; w != nil && w.suspect {
		return w.since, w.detourFacts
	}
	return time.Time{}, detourFacts{}
}

// cleared notes that c works.
func (d *detours) cleared(c network.Conn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if w := d.conns[c]; w != nil && w.suspect {
		d.clear(w)
		w.answers++
	}
}

// clear must be called with mu held.
func (d *detours) clear(w *waiting) {
	w.suspect, w.armed, w.detourFacts = false, false, detourFacts{}
	d.suspect.Add(-1)
}

// sees looks at all connections that streams are on, and returns those to be asked.
func (d *detours) sees(now time.Time, all map[network.Conn]*migrate.Traffic, packets func(network.Conn) uint64) []network.Conn {
	d.mu.Lock()
	defer d.mu.Unlock()
	for c, w := range d.conns {
		if all[c] == nil {
			if w.suspect {
				d.clear(w)
			}
			delete(d.conns, c)
		}
	}
	var ask []network.Conn
	for c, t := range all {
		w := d.conns[c]
		if w == nil {
			if d.conns == nil {
				d.conns = make(map[network.Conn]*waiting)
			}
			w = &waiting{since: now}
			d.conns[c] = w
		}
		due := w.look(now, trafficOf(t), t.Waits, func() uint64 { return packets(c) })
		switch {
		case due && !w.suspect:
			w.suspect = true
			d.suspect.Add(1)
			ask = append(ask, c)
		case !w.armed && w.suspect && !w.running:
			d.clear(w)
		}
	}
	return ask
}

// detourer looks at the connections that streams are on, and dials beside those that do not
// answer.
type detourer struct {
	cfg     *config
	tasks   *tasks
	sched   *scheduler
	network func() network.Network
	home    *home
	tells   *teller
	of      *detours
	asides  *asides
}

// began is told of each stream that begins: while there are any, the loop runs.
func (dt *detourer) began() {
	d := dt.of
	d.begun.Add(1)
	if dt.asides.wrapped.Load() && dt.cfg.detours && !d.on.Load() && d.on.CompareAndSwap(false, true) {
		dt.tasks.start(dt.loop)
	}
}

// loop looks until there have been no labelled streams for a while.
func (dt *detourer) loop() {
	d := dt.of
	timer := time.NewTimer(detourLook)
	defer timer.Stop()
	all := make(map[network.Conn]*migrate.Traffic)
	for idle, begun := 0, d.begun.Load(); ; {
		select {
		case <-dt.tasks.ctx.Done():
			return
		case <-timer.C:
		}
		timer.Reset(detourLook)
		dt.home.mover().TrafficOfAll(all)
		for _, c := range d.sees(time.Now(), all, packetsOn) {
			p := c.RemotePeer()
			if _, ok := asideOf(c); !ok || len(openConns(dt.network(), p)) != 1 {
				d.cleared(c) // rounds see to it, or nobody can
				continue
			}
			entry := dt.sched.lock(p)
			dt.sched.schedule(entry, time.Now())
			entry.mu.Unlock()
		}
		// A stream is told of before it is there.
		if n := d.begun.Load(); len(all) > 0 || n != begun {
			idle, begun = 0, n
		} else if idle++; idle >= detourIdle {
			d.on.Store(false)
			if d.begun.Load() == begun || !d.on.CompareAndSwap(false, true) {
				return
			}
		}
	}
}

// act does what a plan says of the only connection of a peer.
func (dt *detourer) act(d *peerState, c network.Conn, p *plan) {
	switch {
	case p.cleared:
		dt.of.cleared(c)
	case p.detour && dt.of.starts(c, time.Now()):
		dt.tasks.start(func() { dt.dial(d, c) })
	}
}

// dial dials the peer beside its only connection.
func (dt *detourer) dial(d *peerState, c network.Conn) {
	ctx, cancel := context.WithTimeout(dt.tasks.ctx, detourTimeout)
	err := dt.asides.dial(ctx, dt.network(), d.peer, []network.Conn{c})
	cancel()
	dt.of.ended(c, err)
	dt.sched.schedule(d, time.Now())
	if dt.tasks.ctx.Err() == nil {
		dt.tells.detour(d.peer, infoOf(c), err)
	}
}

// redial dials a peer whose streams have lost their connection, beside those connections that are
// open and resume none.
func (dt *detourer) redial(ctx context.Context, p peer.AddrInfo) error {
	n := dt.network()
	var direct []network.Conn
	for _, c := range openConns(n, p.ID) {
		if _, ok := asideOf(c); ok {
			direct = append(direct, c)
		} else { // a relay's: only a direct dial goes past that
			ctx = network.WithForceDirectDial(ctx, "resume")
		}
	}
	if len(direct) == 0 {
		return dt.home.host().Connect(ctx, p)
	}
	n.Peerstore().AddAddrs(p.ID, p.Addrs, peerstore.TempAddrTTL)
	return dt.asides.dial(ctx, n, p.ID, direct)
}

// inVain is what is done about the only connection of a peer, on which streams wait and
// nothing comes.
func (pl *planner) inVain(c *connFacts) {
	f := pl.f
	v := &pl.verdicts[0]
	v.why = "the only one; streams wait on it, and nothing has come for " + inWords(f.now.Sub(c.waits))
	pl.look(f.now.Add(pl.cfg.interval))
	p := c.path
	switch {
	case c.exempt != "":
		pl.cleared = true
		return
	case !p.asked.Before(c.waits) && p.alive() && !p.at.Before(c.waits):
		v.why = "the only one; streams wait on it, and it works"
		pl.cleared = true
		return
	case p.asking && !p.gaveUp(f.now, pl.cfg.probeTime):
		pl.state = "one connection: asking whether it works"
		pl.look(p.asked.Add(pl.cfg.probeTime))
	case p.asking:
	case p.asked.Before(c.waits), !p.asked.Add(reprobe(p.tries, pl.cfg.probeTime)).After(f.now):
		pl.state = "one connection: asking whether it works"
		pl.probe = append(pl.probe, question{conn: 0})
	default:
		pl.look(p.asked.Add(reprobe(p.tries, pl.cfg.probeTime)))
	}
	if p.health != pathSilent || p.asked.Before(c.waits) {
		return
	}
	pl.state, v.reason = "one connection, and it does not answer", ReasonSilent
	at := p.asked.Add(pl.cfg.probeTime)
	if !f.lower && f.manages != no { // the other end may be at it
		at = at.Add(detourSecond)
	}
	d := c.detour
	if !d.at.IsZero() {
		at = d.at.Add(detourPause)
	}
	switch {
	case d.running:
		pl.state += ": the peer is dialled beside it"
	case d.tries >= detourTries:
		pl.state += ", and there is no other: " + briefly(d.err)
	case at.After(f.now):
		pl.state += ": the peer is dialled beside it in " + inWords(at.Sub(f.now))
		pl.look(at)
	default:
		pl.state += ": the peer is dialled beside it"
		pl.detour = true
	}
}

// starts notes that an attempt begins, unless one is under way or c is gone.
func (d *detours) starts(c network.Conn, now time.Time) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	w := d.conns[c]
	if w == nil || w.running {
		return false
	}
	w.running, w.at = true, now
	w.tries++
	return true
}

func (d *detours) ended(c network.Conn, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if w := d.conns[c]; w != nil {
		w.running, w.err = false, err
	}
}
