package connmgr

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	"go.uber.org/zap"
)

// Reason is why a connection stays, or is about to go, for programs: [ExplainedConn.State]
// says the same for people, with what it is about.
type Reason string

// The reasons.
const (
	ReasonOnly         Reason = "only"           // the peer has no other
	ReasonKept         Reason = "kept"           // it is the winner
	ReasonUndecided    Reason = "undecided"      // nothing is decided yet, or nothing can be
	ReasonExempt       Reason = "exempt"         // it is left alone: see WithExempt
	ReasonPinned       Reason = "pinned"         // it carries streams that cannot move
	ReasonMoving       Reason = "moving"         // its streams move, or are about to
	ReasonBackingOff   Reason = "backing off"    // its streams failed to move, and are tried again later
	ReasonNoRoom       Reason = "no room"        // the winner takes no more streams at this moment
	ReasonProving      Reason = "proving"        // the winner, or this one, has yet to prove itself
	ReasonPeerDecides  Reason = "peer decides"   // the peer has the lower peer ID
	ReasonQuiet        Reason = "quiet"          // nothing is on it; it is closed when that has lasted
	ReasonDraining     Reason = "draining"       // the peer has not done with it, or has not said so yet
	ReasonRefused      Reason = "refused"        // the peer refuses to let it go
	ReasonNoAnswer     Reason = "no answer"      // the peer did not say whether it has done with it
	ReasonUnidentified Reason = "unidentified"   // it is not known what the peer speaks
	ReasonOtherProcess Reason = "other process"  // it does not lead, or is not known to lead, where the winner does
	ReasonStandby      Reason = "standby"        // it stands by: see WithStandby
	ReasonLimited      Reason = "limited"        // its relay limits it, as all others
	ReasonBetter       Reason = "better"         // it is unlimited or direct, and the winner is not
	ReasonEnding       Reason = "ending"         // its relay is about to cut it
	ReasonSilent       Reason = "silent"         // it does not answer
	ReasonPeerCloses   Reason = "peer may close" // the peer wants to close it, or the winner
	ReasonClosing      Reason = "closing"        // it is being closed
)

// knownReasons are all of them.
var knownReasons = []Reason{
	ReasonOnly, ReasonKept, ReasonUndecided, ReasonExempt, ReasonPinned, ReasonMoving, ReasonBackingOff, ReasonNoRoom,
	ReasonProving, ReasonPeerDecides, ReasonQuiet, ReasonDraining, ReasonRefused, ReasonNoAnswer, ReasonUnidentified,
	ReasonOtherProcess, ReasonStandby, ReasonLimited, ReasonBetter, ReasonEnding, ReasonSilent, ReasonPeerCloses, ReasonClosing,
}

// pinnedBy are the streams of one protocol on a connection that cannot move.
type pinnedBy struct {
	id     protocol.ID
	count  int
	denied int // of them: the peer denies to move them
}

const (
	// maxListed is how many streams of a connection are looked at for what they speak.
	maxListed = 1 << 10

	// maxNamed is how many protocols of pinned streams are named, and maxNamedLength how
	// much of a name is shown, in bytes.
	maxNamed       = 3
	maxNamedLength = 80
)

// unlabelledOn counts the streams on a connection by what they speak, but for the managers'
// own, and takes off those that are labelled.
func (cv *connView) unlabelledOn() []pinnedBy {
	count := make(map[protocol.ID]int)
	all := cv.conn.GetStreams()
	for _, s := range all[:min(len(all), maxListed)] {
		if id := s.Protocol(); !ownProtocol(id) {
			count[id]++
		}
	}
	for _, s := range cv.labelled {
		count[s.Protocol()]--
	}
	var list []pinnedBy
	for id, n := range count {
		if n > 0 {
			list = append(list, pinnedBy{id: id, count: n})
		}
	}
	return list
}

// pin takes what the peer denies to move into the list, and sorts it: most come first.
func pin(list []pinnedBy, denied []network.Stream) []pinnedBy {
	for _, s := range denied {
		id := s.Protocol()
		i := slices.IndexFunc(list, func(p pinnedBy) bool { return p.id == id })
		if i < 0 {
			i = len(list)
			list = append(list, pinnedBy{id: id})
		}
		list[i].count++
		list[i].denied++
	}
	slices.SortFunc(list, func(a, b pinnedBy) int {
		return cmp.Or(cmp.Compare(b.count, a.count), cmp.Compare(a.id, b.id))
	})
	return list
}

// pinnedInWords says what the streams on a connection speak that cannot move; empty: it is
// not known.
func pinnedInWords(list []pinnedBy) string {
	var parts []string
	for i, p := range list {
		if i == maxNamed {
			parts = append(parts, "others")
			break
		}
		part := fmt.Sprintf("%d of %s", p.count, quoted(p.id))
		switch {
		case p.denied == p.count:
			part += ", denied by the peer"
		case p.denied > 0:
			part += fmt.Sprintf(", %d denied by the peer", p.denied)
		}
		parts = append(parts, part)
	}
	return strings.Join(parts, "; ")
}

// quoted is a protocol's name as people may see it: a peer may have chosen it.
func quoted(id protocol.ID) string {
	text := string(id)
	if text == "" {
		return "no protocol yet"
	}
	if len(text) > maxNamedLength {
		text = text[:maxNamedLength] + "..."
	}
	if strings.ContainsFunc(text, func(r rune) bool { return r > unicode.MaxASCII || !unicode.IsGraphic(r) || r == '"' }) {
		return fmt.Sprintf("%q", text)
	}
	return text
}

// staysAfter is how long a connection is there for one reason before that is told: when a
// consolidation that nothing is in the way of is over.
const staysAfter = 10 * time.Second

// stay is the reason for which a connection is there.
type stay struct {
	reason Reason
	since  time.Time
	told   bool
}

// stay tells in the log, and the event bus, why connections beside the winner are still
// there: of each once, until there is another reason.
func (t *teller) stay(d *peerState, v *view, p *plan) {
	if len(v.conns) < 2 {
		return
	}
	now := v.facts.now
	var told []int
	d.mu.Lock()
	for i := range v.conns {
		cs := v.conns[i].connState
		switch r := p.verdicts[i].reason; {
		case p.decided && i == p.winner, slices.Contains(p.closed, i):
			cs.stays = stay{}
		case r != cs.stays.reason:
			cs.stays = stay{reason: r, since: now}
		case !cs.stays.told && now.Sub(cs.stays.since) >= staysAfter:
			cs.stays.told = true
			told = append(told, i)
		}
	}
	d.mu.Unlock()
	for _, i := range told {
		e := EvtConnectionStays{
			Peer: d.peer, Conn: v.conns[i].info(), Reason: p.verdicts[i].reason, Why: p.why(i), Until: p.verdicts[i].until,
		}
		if p.decided {
			e.Kept = v.conns[p.winner].info()
		}
		t.events.emit(e)
		t.logStay(e)
	}
}

// why is why a connection is there, in words. While nothing is decided, that is why not.
func (p *plan) why(i int) string {
	if v := &p.verdicts[i]; v.reason != ReasonUndecided {
		return v.why
	}
	return p.state
}

func (t *teller) logStay(e EvtConnectionStays) {
	t.sampled(&t.stays, e.Peer, func() (string, []zap.Field) {
		return fmt.Sprintf("%s stays: %s", e.Conn.Kind, e.Why),
			[]zap.Field{zap.Stringer("connection", e.Conn), zap.String("reason", string(e.Reason)), zap.Time("until", e.Until)}
	})
}
