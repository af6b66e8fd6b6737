package connmgr

import (
	"cmp"
	"context"
	"errors"
	"hash/maphash"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"

	"github.com/libp2p/go-libp2p/core/connmgr"
	coreevent "github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/protocol/holepunch"
	ma "github.com/multiformats/go-multiaddr"

	"github.com/go-portage/portage/internal/punch"
)

// Upgrading
//
// go-libp2p punches a hole when a relayed connection comes in, three times at most, and
// never again on that connection. Where a firewall opens a minute later, or an address
// changes, the peers would stay on the relay. So this end asks again:
//
//	watcher, dispatcher --all connections are relayed, one of them came in--> entry
//	dispatcher --an entry is due--> sweep: look (look.go), decide (upgradeOf in plan.go)
//	                                  |
//	                                  +--> attempt (internal/punch), a few at a time
//	addresses or reachability change here, or the peer says that its have --> entries are due
//
// Only the end that the relayed connection came in at can ask: DCUtR is refused by the
// other one. Of a peer with a direct connection there is no entry.

// puncher asks a peer for a direct connection. It returns nil if there is one.
type puncher func(ctx context.Context, h host.Host, p peer.ID) error

// upgrades are the peers that are reached only over relays, as far as this end can ask them
// for a direct connection.
type upgrades struct {
	count atomic.Int32 // of peers: no lock is taken while there are none

	mu       sync.RWMutex // a leaf
	peers    map[peer.ID]*upgrading
	sweep    time.Time // when the next one is due; zero: never
	sweeping bool
	running  int // attempts
}

// upgrading is what is kept of such a peer.
type upgrading struct {
	used atomic.Int64 // when a stream began or was seen last, in Unix nanoseconds

	// Guarded by upgrades.mu.
	upgradeFacts
	look  time.Time // when to look at the peer next
	knows uint64    // what the peer has told of itself that matters; 0: nothing yet
}

// of returns what is known of the attempts to upgrade p.
func (u *upgrades) of(p peer.ID) upgradeFacts {
	if u.count.Load() == 0 {
		return upgradeFacts{}
	}
	u.mu.RLock()
	defer u.mu.RUnlock()
	e := u.peers[p]
	if e == nil {
		return upgradeFacts{}
	}
	f := e.upgradeFacts
	f.full = !f.running && u.running >= upgradesAtOnce
	if ns := e.used.Load(); ns != 0 {
		f.used = time.Unix(0, ns)
	}
	return f
}

// track makes an entry of p, or drops it, by its open connections.
func (u *upgrades) track(p peer.ID, conns []network.Conn, now time.Time) {
	relayed := askable(conns)
	if !relayed && u.count.Load() == 0 {
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	e := u.peers[p]
	switch {
	case !relayed && e != nil && !e.running:
		u.drop(p)
	case relayed && e == nil:
		if u.peers == nil {
			u.peers = make(map[peer.ID]*upgrading)
		}
		for other, o := range u.peers {
			if len(u.peers) < maxUpgrades {
				break
			}
			if !o.running {
				u.drop(other)
			}
		}
		e = &upgrading{upgradeFacts: upgradeFacts{tracked: true, since: now, jitter: rand.Float64()}}
		u.peers[p] = e
		u.count.Store(int32(len(u.peers)))
		u.due(e, now)
	}
}

// drop must be called with mu held.
func (u *upgrades) drop(p peer.ID) {
	delete(u.peers, p)
	u.count.Store(int32(len(u.peers)))
}

// due has e looked at at the given time at the latest. It must be called with mu held.
func (u *upgrades) due(e *upgrading, at time.Time) {
	if e.look.IsZero() || at.Before(e.look) {
		e.look = at
	}
	if u.sweep.IsZero() || e.look.Before(u.sweep) {
		u.sweep = e.look
	}
}

// note notes that a stream begins on c.
func (u *upgrades) note(c network.Conn) {
	if u.count.Load() == 0 {
		return
	}
	u.mu.RLock()
	defer u.mu.RUnlock()
	if e := u.peers[c.RemotePeer()]; e != nil {
		e.used.Store(time.Now().UnixNano())
	}
}

// disconnected is told of each connection that is gone: if it was the last one of its peer,
// nothing else tells. It says whether there is something to look at.
func (u *upgrades) disconnected(c network.Conn) bool {
	if u.count.Load() == 0 {
		return false
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	e := u.peers[c.RemotePeer()]
	if e != nil {
		u.due(e, time.Now())
	}
	return e != nil
}

// changed notes that an attempt may succeed now that would have failed before: at p, or if
// that is empty, at any peer. It says whether there is an entry.
func (u *upgrades) changed(p peer.ID, now time.Time) bool {
	if u.count.Load() == 0 {
		return false
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	found := false
	for id, e := range u.peers {
		if p == "" || p == id {
			if !e.changed.After(e.started) {
				e.changed = now
			}
			u.due(e, now)
			found = true
		}
	}
	return found
}

// told notes what identify has told of p, and whether that is something new which an attempt
// may succeed by: its addresses, or that it punches holes at all.
func (u *upgrades) told(e coreevent.EvtPeerIdentificationCompleted, seed maphash.Seed, now time.Time) bool {
	if u.count.Load() == 0 {
		return false
	}
	knows := uint64(1) // the order does not matter
	for _, a := range e.ListenAddrs {
		knows += maphash.Bytes(seed, a.Bytes())
	}
	if slices.Contains(e.Protocols, holepunch.Protocol) {
		knows += maphash.String(seed, string(holepunch.Protocol))
	}
	u.mu.Lock()
	entry := u.peers[e.Peer]
	// What comes soon after the connection is the first that it tells.
	news := entry != nil && entry.knows != knows && (entry.knows != 0 || now.Sub(entry.since) > openTimeout)
	if entry != nil {
		entry.knows = knows
	}
	u.mu.Unlock()
	return news && u.changed(e.Peer, now)
}

// askable says whether all of a peer's connections are relayed, and this end can ask for a
// direct one.
func askable(conns []network.Conn) bool {
	in := false
	for _, c := range conns {
		if !isRelayed(c.RemoteMultiaddr()) {
			return false
		}
		in = in || c.Stat().Direction == network.DirInbound
	}
	return in
}

func isRelayed(a ma.Multiaddr) bool {
	for i := range a {
		if a[i].Code() == ma.P_CIRCUIT {
			return true
		}
	}
	return false
}

// upgrader asks peers for a direct connection.
type upgrader struct {
	cfg   *config
	tasks *tasks
	sched *scheduler
	home  *home
	looks *looker
	tells *teller
	of    *upgrades
	punch puncher
}

// admit makes an entry of a peer that is reached only over relays. Without a host nobody can
// be asked.
func (up *upgrader) admit(p peer.ID, conns []network.Conn) {
	if up.cfg.upgrades && up.home.host() != nil {
		up.of.track(p, conns, time.Now())
	}
}

// changed is told that addresses or reachability have changed: of p, or if that is empty, of
// this host.
func (up *upgrader) changed(p peer.ID) {
	if up.of.changed(p, time.Now()) {
		up.sched.wakeUp()
	}
}

// told is told what identify has told of a peer.
func (up *upgrader) told(e coreevent.EvtPeerIdentificationCompleted, seed maphash.Seed) {
	if up.of.told(e, seed, time.Now()) {
		up.sched.wakeUp()
	}
}

// startSweep looks at the peers that are due. If there are none yet, it returns in how long
// there are.
func (up *upgrader) startSweep() (time.Duration, bool) {
	u := up.of
	if u.count.Load() == 0 {
		return 0, false
	}
	u.mu.Lock()
	wait := time.Until(u.sweep)
	free := !u.sweeping && !u.sweep.IsZero() && u.running < upgradesAtOnce
	u.sweeping = u.sweeping || free && wait <= 0
	u.mu.Unlock()
	switch {
	case !free:
		return 0, false // the end of a sweep or of an attempt wakes the dispatcher
	case wait > 0:
		return wait, true
	}
	up.tasks.start(up.sweep)
	return 0, false
}

// sweep looks at the peers that are due, those first that have been for longest, and
// starts attempts.
func (up *upgrader) sweep() {
	u := up.of
	type due struct {
		p peer.ID
		e *upgrading
		t time.Time
	}
	now := time.Now()
	var list []due
	u.mu.Lock()
	for p, e := range u.peers {
		if !e.running && !e.look.After(now) {
			list = append(list, due{p, e, e.look})
		}
	}
	u.mu.Unlock()
	slices.SortFunc(list, func(a, b due) int { return cmp.Or(a.t.Compare(b.t), strings.Compare(string(a.p), string(b.p))) })
	for _, d := range list {
		u.mu.RLock() // who comes later has to wait longer, also where a place becomes free meanwhile
		full := u.running >= upgradesAtOnce
		u.mu.RUnlock()
		if full || up.tasks.ctx.Err() != nil {
			break
		}
		if up.look(d.p, d.e) {
			up.tasks.start(func() { up.attempt(d.p, d.e) })
		}
	}
	u.mu.Lock()
	u.sweeping = false
	u.sweep = time.Time{}
	for _, e := range u.peers {
		if !e.running && (u.sweep.IsZero() || e.look.Before(u.sweep)) {
			u.sweep = e.look
		}
	}
	if !u.sweep.IsZero() {
		u.sweep = later(u.sweep, now.Add(sweepGap))
	}
	u.mu.Unlock()
	up.sched.wakeUp()
}

// look looks at one peer. It says whether an attempt is due that there is a place
// for, which it then has.
func (up *upgrader) look(p peer.ID, e *upgrading) (start bool) {
	v := up.looks.look(p, up.sched.known(p))
	next := upgradeOf(up.cfg, &v.facts)
	if next.busy {
		e.used.Store(v.facts.now.UnixNano())
	}
	u := up.of
	u.mu.Lock()
	defer u.mu.Unlock()
	switch {
	case u.peers[p] != e:
	case !next.asks:
		u.drop(p)
	case !next.due:
		e.look = next.look
	case u.running < upgradesAtOnce: // else it stays due
		u.running++
		if e.changed.After(e.started) {
			e.failures = 0
		}
		e.running, e.started = true, v.facts.now
		start = true
	}
	return start
}

// attempt asks for a direct connection to p.
func (up *upgrader) attempt(p peer.ID, e *upgrading) {
	u := up.of
	u.mu.RLock()
	attempt := e.attempts + 1
	u.mu.RUnlock()
	up.tells.upgradeStarted(p, attempt)
	ctx, cancel := context.WithTimeout(up.tasks.ctx, upgradeTimeout)
	err := up.punch(ctx, up.home.host(), p)
	cancel()
	now := time.Now()
	u.mu.Lock()
	u.running--
	e.running = false
	e.ended, e.err, e.jitter = now, err, rand.Float64()
	if e.failures++; err == nil {
		e.failures = 0
	}
	e.attempts = attempt
	took := now.Sub(e.started)
	e.look = time.Time{}
	u.due(e, now)
	u.mu.Unlock()
	up.ended(p, attempt, took, err)
	up.sched.wakeUp()
}

// ended tells what came of an attempt, and what is done next.
func (up *upgrader) ended(p peer.ID, attempt int, took time.Duration, err error) {
	e := EvtUpgrade{Peer: p, State: UpgradeDirect, Attempt: attempt, Took: took, Err: err}
	closed := up.tasks.ctx.Err() != nil
	if err != nil && !closed {
		next := upgradeOf(up.cfg, &up.looks.look(p, up.sched.known(p)).facts)
		e.State, e.Why, e.Next = UpgradeFailed, next.why, next.at
	}
	up.tells.upgradeEnded(e, closed)
}

// wantedFor says why a peer that nothing uses at this moment is wanted all the same; empty:
// it is not, as far as the inner connection manager knows.
func wantedFor(inner connmgr.ConnManager, p peer.ID) string {
	if inner.IsProtected(p, "") {
		return "it is protected"
	}
	if info := inner.GetTagInfo(p); info != nil && info.Value > 0 {
		return "it is tagged"
	}
	return ""
}

// briefly returns what an error says first, on one line. It may hold what a peer has said.
func briefly(err error) string {
	if inner := errors.Unwrap(err); inner != nil {
		err = inner // the peer is known
	}
	text, _, _ := strings.Cut(err.Error(), "\n")
	text = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(text, "?"))
	if runes := []rune(text); len(runes) > maxReason {
		text = string(runes[:maxReason]) + "..."
	}
	return text
}

// hopeless says whether an attempt has failed for a reason that does not pass by itself.
func hopeless(err error) bool {
	return errors.Is(err, punch.ErrUnsupported) || errors.Is(err, punch.ErrNotOurs)
}
