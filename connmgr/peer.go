package connmgr

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"

	"github.com/go-portage/portage/policy"
)

// peerState is what is kept of a peer while it has two connections or more.
type peerState struct {
	peer peer.ID // immutable

	schedule // guarded by scheduler.mu

	// mu guards what follows, and everything in conns that is not said to be immutable. It
	// is held briefly, and never across a call to a host, a network, a connection or a
	// stream. Before scheduler.mu, never after it.
	mu      sync.Mutex
	came    time.Time // when a connection came last
	firstOf time.Time // when the first came of those that have come since the last decision

	manages bool // the peer is known to run a manager: it stays so while connected
	conns   []*connState
	ranking policy.Ranking // in force
	winner  *connState     // of ranking; nil before the first
	atOnce  bool           // see facts, as the next three
	fresh   bool
	better  string // see facts
	since   time.Time
	takeover
	left   int  // the fewest streams that were seen to be movable; only if seen is set
	seen   bool // left is set
	named  *connState
	turned time.Time // until when what the peer has named of late counts against it; see turns

	path     *connState          // carries what is new, as events tell; nil: nothing was told
	measured PeerMetrics         // what the metrics say of the peer
	pinned   map[protocol.ID]int // and of its pinned streams

	moving  map[network.Stream]motion
	backoff map[network.Stream]backoff
	stuck   bool // the policy has not returned
}

// motion is a migration that has not returned.
type motion struct{ from, to *connState }

func (mo motion) touches(cs *connState) bool { return mo.from == cs || mo.to == cs }

// backoff keeps a stream where it is: for good if the peer denied, else until the next
// attempt.
type backoff struct {
	denied   bool
	until    time.Time
	failures int
}

// connState is what is kept of one connection of a peer with duplicates.
type connState struct {
	conn   network.Conn     // immutable
	base   policy.Candidate // immutable: what does not change while the connection lives
	name   ConnInfo         // immutable
	opened time.Time        // immutable
	ends   time.Time        // immutable: when its relay cuts it; zero: not known
	budget uint64           // immutable: bytes each way that its relay allows; 0: not known

	used atomic.Int64 // when a stream began last, of whatever kind, in Unix nanoseconds

	// Guarded by the lock of the peer.
	met      bool // a round has taken it in
	path     path
	traffic  traffic       // at the last look
	seen     time.Time     // when that was; zero: never
	rtt      time.Duration // smoothed, by pings; 0: not known
	rttAt    time.Time
	quiet    time.Time     // since when there has been no stream; zero: there is one
	carried  uint64        // bytes that labelled streams have carried, the most that was seen
	moved    int           // streams that this side moved from here
	took     time.Duration // by the batches that moved them
	byPeer   byPeer        // streams that the peer moved from here
	died     bool          // as a winner, and that is noted
	closing  bool          // it is being closed by this side
	pledged  time.Time     // until when this side opens nothing on it (D1); zero: it may
	drained  time.Time     // when this side said last that it has done with it; zero: never
	drain    drain
	told     telling
	instance uint64 // the process that its other end is; 0: not known
	greeted  bool   // it was asked
	serves   bool   // the other end has answered a request
	lacks    bool   // it has not served the last one, whatever the peer advertises
	same     sameness
	stays    stay
	silent   bool // the event bus was told so

	requests int // streams of this manager's own that are on it
}

// byPeer counts what the peer has moved away, to be told in the log.
type byPeer struct {
	streams     int
	told        int // of them, in the log
	first, last time.Time
	to          *connState
}

// left returns how many streams have moved from here, whoever has moved them, and how long that
// took: both ends do it at the same time. d.mu must be held.
func (cs *connState) left() (streams int, took time.Duration) {
	b := &cs.byPeer
	return cs.moved + b.streams, max(cs.took, b.last.Sub(b.first))
}

func newConnState(c network.Conn) *connState {
	stat := c.Stat()
	cs := &connState{conn: c, opened: stat.Opened}
	cs.base.ID = c.ID()
	cs.base.SetAddr(c.RemoteMultiaddr())
	if local := c.LocalMultiaddr(); local != nil {
		cs.base.SetLocalAddr(local)
	}
	cs.base.Limited = stat.Limited
	cs.name = ConnInfo{ID: cs.base.ID, Kind: kind(cs.base), Remote: c.RemoteMultiaddr()}
	cs.base.Direction = stat.Direction
	if d, ok := stat.Extra[client.StatLimitDuration].(time.Duration); ok && d > 0 && stat.Limited {
		cs.ends = stat.Opened.Add(d)
	}
	if b, ok := stat.Extra[client.StatLimitData].(uint64); ok && stat.Limited {
		cs.budget = b
	}
	return cs
}

func (d *peerState) state(c network.Conn) *connState {
	i := slices.IndexFunc(d.conns, func(cs *connState) bool { return cs.conn == c })
	if i < 0 {
		return nil
	}
	return d.conns[i]
}

// states returns state for many connections.
func (d *peerState) states() func(network.Conn) *connState {
	if len(d.conns) <= 8 {
		return d.state
	}
	of := make(map[network.Conn]*connState, len(d.conns))
	for _, cs := range d.conns {
		of[cs.conn] = cs
	}
	return func(c network.Conn) *connState { return of[c] }
}

// touching returns the number of migrations from or to cs that have not returned.
func (d *peerState) touching(cs *connState) int { return d.motions()[cs] }

// motions returns the number of migrations that have not returned, by the connections that
// they are from or to; nil: there are none.
func (d *peerState) motions() map[*connState]int {
	if len(d.moving) == 0 {
		return nil
	}
	n := make(map[*connState]int)
	for _, mo := range d.moving {
		n[mo.from]++
		n[mo.to]++
	}
	return n
}

// lastUse returns when a stream began last on cs, as far as is known; zero: never.
func (cs *connState) lastUse() time.Time {
	if ns := cs.used.Load(); ns != 0 {
		return time.Unix(0, ns)
	}
	return time.Time{}
}
