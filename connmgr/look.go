package connmgr

import (
	"slices"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p/core/connmgr"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"

	"github.com/go-portage/portage/internal/aside"
	"github.com/go-portage/portage/migrate"
	"github.com/go-portage/portage/policy"
)

// view is the facts of a peer, with the connections and streams that they are of.
type view struct {
	facts facts
	mover mover // nil without Wrap
	conns []connView
}

type connView struct {
	*connState
	facts    *connFacts // in view.facts
	labelled []labelledStream
	denied   []network.Stream // of them: the peer denies to move them
	pinned   []pinnedBy       // the streams that cannot move, by what they speak; most come first
}

// labelledStream is a stream that can move.
type labelledStream struct {
	network.Stream
	theirs bool // the peer opened it
}

func openConns(n network.Network, p peer.ID) []network.Conn {
	if n == nil {
		return nil
	}
	return slices.DeleteFunc(n.ConnsToPeer(p), aside.IsClosed)
}

// looker finds the facts of a peer.
type looker struct {
	cfg        *config
	network    func() network.Network // nil before there is one
	home       *home
	inner      connmgr.ConnManager
	policies   *policies
	exempt     exemptions
	upgrades   *upgrades
	detours    *detours
	young      *young
	interfaces interfaces
}

// look looks at the open connections of p. d is nil if p has no entry. It does not block.
func (l *looker) look(p peer.ID, d *peerState) *view {
	net := l.network()
	conns := openConns(net, p)
	v := &view{mover: l.home.mover(), conns: make([]connView, len(conns))}
	f := &v.facts
	f.conns = make([]connFacts, len(conns))
	sticky := false
	if d != nil {
		d.mu.Lock()
		sticky = d.manages
		state := d.states()
		for i, c := range conns {
			v.conns[i].connState = state(c)
		}
		d.mu.Unlock()
	}
	for i, c := range conns {
		if v.conns[i].facts = &f.conns[i]; v.conns[i].connState == nil {
			v.conns[i].connState = newConnState(c)
		}
	}

	f.now = time.Now()
	f.wrapped = v.mover != nil
	f.migrates = f.wrapped && v.mover.Supports(p)
	if net != nil {
		f.lower = strings.Compare(string(net.LocalPeer()), string(p)) < 0
		if f.manages = managed(net, p); sticky {
			f.manages = yes
		}
	}
	f.exempt = l.exempt.peer(p)
	if f.upgrade = l.upgrades.of(p); f.upgrade.tracked {
		f.upgrade.wanted = wantedFor(l.inner, p)
	}
	use := l.policies.policy().use
	rtts := make([]time.Duration, len(conns))
	open := make([]streamCount, len(conns))
	carried := make([]traffic, len(conns))
	for i, c := range conns {
		cv, cf := &v.conns[i], &f.conns[i]
		cf.candidate, cf.opened, cf.ends = cv.base, cv.opened, cv.ends
		if !cv.opened.IsZero() {
			cf.candidate.Age = max(f.now.Sub(cv.opened), 1)
		}
		if f.migrates {
			for _, s := range v.mover.Streams(c) {
				cv.labelled = append(cv.labelled, labelledStream{s, s.Stat().Direction == network.DirInbound})
			}
		}
		if open[i] = streamsOn(c); len(conns) > 1 && open[i].others > len(cv.labelled) {
			cv.pinned = cv.unlabelledOn()
		}
		cf.candidate.Labelled = len(cv.labelled)
		if use.RTT {
			rtts[i] = transportRTT(c)
		}
		if use.Interface {
			cf.candidate.Interface = l.interfaces.of(c.LocalMultiaddr(), f.now)
		}
		if cf.exempt = f.exempt; cf.exempt == "" {
			cf.exempt = l.exempt.conn(c)
		}
		carried[i] = trafficOn(v.mover, c)
		cf.room = cv.room()
		cf.waits, cf.detour = l.detours.of(c)
	}

	l.lookAtKept(d, v, open, carried, rtts)
	for i := range v.conns {
		v.conns[i].pin()
	}
	return v
}

// lookAtKept fills in what is kept of the peer and its connections.
func (l *looker) lookAtKept(d *peerState, v *view, open []streamCount, carried []traffic, rtts []time.Duration) {
	f := &v.facts
	var moving map[*connState]int
	if d != nil {
		d.mu.Lock()
		defer d.mu.Unlock()
		moving = d.motions()
	}
	for i := range v.conns {
		v.conns[i].facts.moving = moving[v.conns[i].connState]
		v.lookAt(d, i, open[i], carried[i])
	}
	if l.policies.policy().use.RTT {
		f.measuring = slices.ContainsFunc(v.conns, func(cv connView) bool {
			return cv.path.asking && cv.rtt == 0 && cv.path.tries == 0 && !cv.path.gaveUp(f.now, l.cfg.probeTime)
		})
		v.measure(rtts)
	}
	if d != nil {
		f.came, f.firstOf = d.came, d.firstOf
		f.ranking, f.atOnce, f.fresh, f.better, f.since = d.ranking, d.atOnce, d.fresh, d.better, d.since
		f.takeover = d.takeover
		if d.winner != nil {
			f.winner = d.winner.base.ID
		}
	}
	if len(v.conns) > 0 {
		f.deaths = l.young.of(v.conns[0].conn.RemotePeer(), f.now)
	}
}

// lookAt fills in what is kept of a connection. It must be called with d's lock held, if d is
// not nil.
func (v *view) lookAt(d *peerState, i int, open streamCount, carried traffic) {
	cv := &v.conns[i]
	f, cf := &v.facts, cv.facts
	if !cv.seen.IsZero() && cv.traffic.heard(carried) {
		cv.path.hear(cv.seen)
	}
	cv.traffic, cv.seen = carried, f.now
	cf.path, cf.closing = cv.path, cv.closing
	cf.pledged = f.now.Before(cv.pledged)
	cv.drain.lapse(f.now)
	cf.drain, cf.told, cf.same, cf.serves, cf.lacks, cf.instance = cv.drain, cv.told, cv.same, cv.serves, cv.lacks, cv.instance
	cv.carried = max(cv.carried, carried.received, carried.sent)
	cf.spent = cv.budget > 0 && cv.carried >= cv.budget-cv.budget/spentShare
	if cv.lastUse().After(cv.drain.at) {
		cv.drain.void(f.now)
		cf.drain = cv.drain
	}
	cf.candidate.Streams = open.without(cv.requests)
	cf.candidate.Pinned = cf.candidate.Streams - cf.candidate.Labelled
	if d == nil {
		cf.candidate.Pinned = max(cf.candidate.Pinned, 0)
		return
	}
	cf.named, cf.used = d.named == cv.connState, cv.lastUse()
	cf.candidate.Incumbent = d.winner == cv.connState
	switch {
	case cf.candidate.Streams > 0 || cf.moving > 0:
		cv.quiet = time.Time{}
	case cv.quiet.IsZero():
		cv.quiet = f.now
	}
	if cf.quiet = cv.quiet; !cf.quiet.IsZero() {
		cf.quiet = later(cf.quiet, cv.lastUse())
	}
	// A stream in motion has an underlying stream on both connections, whether it is listed
	// there or not.
	cf.candidate.Pinned -= cf.moving
	for _, s := range cv.labelled {
		b, waits := d.backoff[s.Stream]
		mo, moves := d.moving[s.Stream]
		switch {
		case moves:
			if mo.touches(cv.connState) {
				cf.candidate.Pinned++
			}
		case b.denied:
			cf.candidate.Pinned++
			cv.denied = append(cv.denied, s.Stream)
		case waits && f.now.Before(b.until):
			if cf.retries++; cf.retries == 1 || b.until.Before(cf.retryAt) {
				cf.retryAt = b.until
			}
		case s.theirs:
			cf.theirs++
		default:
			cf.own++
		}
	}
	cf.candidate.Pinned = max(cf.candidate.Pinned, 0)
}

// pin names what cannot move. No lock must be held: streams are asked.
func (cv *connView) pin() {
	if cv.facts.candidate.Pinned == 0 {
		cv.pinned = nil
		return
	}
	cv.pinned = pin(cv.pinned, cv.denied)
	cv.facts.pinned = pinnedInWords(cv.pinned)
}

// streamCount counts the streams on a connection.
type streamCount struct {
	others  int // that are not the managers' own, as far as their protocol tells
	unnamed int // of them: have no protocol yet
}

// without returns how many streams are left when this manager's own requests are subtracted.
func (n streamCount) without(requests int) int {
	return n.others - min(requests, n.unnamed)
}

// streamsOn counts the streams on c. What managers ask each other is not counted, whichever of
// the two asks.
func streamsOn(c network.Conn) streamCount {
	var n streamCount
	if n.others = c.Stat().NumStreams; n.others == 0 || n.others > fewStreams {
		return n
	}
	n.others = 0
	for _, s := range c.GetStreams() {
		switch id := s.Protocol(); {
		case ownProtocol(id):
			continue
		case id == "":
			n.unnamed++
		}
		n.others++
	}
	return n
}

// ownProtocol says whether a stream of this protocol is the managers' own, or of a kind that
// each connection has for itself.
func ownProtocol(id protocol.ID) bool {
	return id == DrainID || id == PathID || id == migrate.ResumeID || id == identify.ID || id == identify.IDPush
}

// room returns how many streams this side may still open on a connection, without those that
// are left for new ones; negative where no limit is known. go-libp2p's QUIC takes 256 from
// each end.
func (cs *connState) room() int {
	if cs.base.Relayed || cs.base.Transport != policy.QUIC && cs.base.Transport != policy.WebTransport {
		return -1
	}
	out := cs.conn.Stat().NumStreams // at most
	if out > quicStreams/4 {         // counting is not for nothing
		out = 0
		for _, s := range cs.conn.GetStreams() {
			if s.Stat().Direction == network.DirOutbound {
				out++
			}
		}
	}
	return max(0, quicStreams-headroom-out)
}

// managed says whether p advertises a manager. That is known once it has been identified:
// there may be other entries for p in the book, of protocols that streams were opened for,
// but whoever has been identified is listed with identify itself.
func managed(n network.Network, p peer.ID) knowledge {
	all, err := n.Peerstore().GetProtocols(p)
	if err != nil {
		return unknown
	}
	told := unknown
	for _, id := range all {
		switch id {
		case DrainID:
			return yes
		case identify.ID, identify.IDPush:
			told = no
		}
	}
	return told
}
