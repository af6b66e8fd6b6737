package connmgr

import (
	"slices"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
)

// Who decides
//
//	this side   the peer advertises   lower ID   decides
//	wrapped     any                   ours       this side
//	wrapped     yes                   theirs     the peer
//	wrapped     no                    theirs     this side: the peer runs no manager
//	wrapped     not known yet         theirs     the peer
//	bare        yes                   any        the peer: it does not see us, and decides
//	bare        no                    ours       this side
//	bare        no                    theirs     the peer: it may be a bare manager too
//
// A bare manager has no host to advertise itself on, so two of them cannot see each
// other; the last two rows keep them from each closing the connection that the other
// one keeps.
//
// The one that does not decide takes over when nothing has happened for a while.

// role is what this side may do about a peer in a round.
type role struct {
	decides bool   // is the controller
	reason  string // why it is, or is not
	over    bool   // is not, but has taken over
	moves   bool
	prunes  bool
	drains  bool          // the peer can be asked whether it has anything on a loser
	quiet   time.Duration // how long a loser must have been quiet, if so
	plain   time.Duration // and if not
}

// quietFor returns how long a loser must have been quiet. It must be called with
// Manager.mu held, or by the round.
func (r role) quietFor(loser *connState) time.Duration {
	if r.drains && !loser.plain {
		return r.quiet
	}
	return r.plain
}

// takeover is what a follower waits with. Guarded by Manager.mu.
type takeover struct {
	progress time.Time // when something happened last
	left     int       // the fewest streams that were seen to be movable; only if seen is set
	seen     bool
	times    int  // takeovers, of these connections
	forced   bool // Consolidate has been called for these connections
}

// takesOverAt returns when a follower takes over if nothing happens. It must be called
// with Manager.mu held.
func (t *takeover) takesOverAt(cfg *config) time.Time {
	return t.progress.Add(cfg.takeoverDelay() << min(t.times, maxTakeoverDoublings))
}

// controller says whether this side decides for both, and why.
func (m *Manager) controller(p peer.ID, wrapped bool) (bool, string) {
	n := m.watch.network()
	lower := strings.Compare(string(n.LocalPeer()), string(p)) < 0
	advertises, known := managed(n, p)
	switch {
	case wrapped && lower, !wrapped && lower && !advertises:
		return true, "it has the lower peer ID"
	case wrapped && known && !advertises:
		return true, "the peer runs no manager"
	case wrapped && !known:
		return false, "the peer has the lower peer ID and has not been identified"
	case !wrapped && advertises:
		return false, "the peer runs a manager, and this one is bare"
	default:
		return false, "the peer has the lower peer ID"
	}
}

// managed says whether p advertises a manager. That is known once it has been
// identified.
func managed(n network.Network, p peer.ID) (advertises, known bool) {
	book := n.Peerstore()
	if got, err := book.SupportsProtocols(p, DrainID); err == nil && len(got) > 0 {
		return true, true
	}
	all, err := book.GetProtocols(p)
	return false, err == nil && len(all) > 0
}

func (m *Manager) roleFor(d *duplicates, v view, winner *connView, forced bool) role {
	var r role
	r.decides, r.reason = m.controller(d.peer, v.mover != nil)
	advertises, _ := managed(m.watch.network(), d.peer)
	r.drains = v.mover != nil && advertises
	left := len(m.movable(d, v, winner.connState, true))

	m.mu.Lock()
	defer m.mu.Unlock()
	if !d.seen || left < d.left {
		if d.seen {
			d.progress = v.at // somebody moved some, or they have ended
		}
		d.seen, d.left = true, left
	}
	if left == 0 && slices.ContainsFunc(d.conns, m.pledged) {
		d.progress = v.at // the controller is at work: it waits for what cannot move
	}
	d.forced = d.forced || forced
	r.quiet, r.plain = m.cfg.quietTime, m.cfg.plainQuietTime
	switch {
	case r.decides:
		r.moves, r.prunes = true, true
	case forced:
		r.moves, r.prunes = true, true
	case !v.at.Before(d.takesOverAt(&m.cfg)):
		r.over, r.moves, r.prunes = true, true, true
	case d.times > 0:
		r.over, r.prunes = true, true
	case d.forced:
		r.prunes = true
	}
	if r.over {
		// That the controller has not closed it may mean that it has something to read
		// there. And if both sides closed a connection at the same moment, each another
		// one, none would be left: its turn has to be over.
		r.plain += m.cfg.takeoverDelay()
	}
	return r
}

// tookPart notes that this side has moved streams. After a takeover, the controller
// gets time again to show that it is there, and twice as much.
func (m *Manager) tookPart(d *duplicates, r role) {
	m.mu.Lock()
	now := time.Now()
	waited := now.Sub(d.progress)
	d.progress = now
	if r.over {
		d.times++
	}
	m.mu.Unlock()
	if r.over {
		m.logTookOver(d.peer, waited)
	}
}
