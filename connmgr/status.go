package connmgr

import (
	"cmp"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/go-portage/portage/internal/aside"
	"github.com/go-portage/portage/migrate"
)

// What the status page shows (page.go), and how it is found out. The verdicts are those of
// Explain, and the history is the log.

const (
	// historySize is how many lines of the log are remembered: those of an hour on a host
	// with some ten peers that come and go, in less than 200 kB.
	historySize = 512

	// maxHistoryLine is how much of one is kept, in bytes.
	maxHistoryLine = 400

	// maxStreamsShown is how many streams of one connection are listed.
	maxStreamsShown = 100
)

// Totals is what a Manager has done since it was made.
type Totals struct {
	Since time.Time `json:"since"`
	// Streams that have moved, moved by whichever end.
	Moved uint64 `json:"streams_moved"`
	// Migrations that were denied, that found something in the way, and that reset the stream.
	Denied uint64 `json:"migrations_denied"`
	Later  uint64 `json:"migrations_to_be_tried_again"`
	Reset  uint64 `json:"migrations_reset"`
	// Streams that have lost their connection and go on over another, with migrate.WithResumption.
	Resumed uint64 `json:"streams_resumed"`
	// Connections that are gone since nothing was left on them.
	Closed       uint64 `json:"connections_closed"`
	ClosedByPeer uint64 `json:"connections_closed_by_peers"`
}

// totals counts for Totals.
type totals struct {
	since                               time.Time // immutable
	moved, denied, later, reset, closed atomic.Uint64
	byPeer, resumed                     atomic.Uint64
}

func (t *totals) migrated(e migrate.Event) {
	switch outcome, over := outcomeOf(e); {
	case !over:
	case outcome == MigrationMoved:
		t.moved.Add(1)
	case outcome == MigrationDenied:
		t.denied.Add(1)
	case outcome == MigrationLater:
		t.later.Add(1)
	default:
		t.reset.Add(1)
	}
}

func (t *totals) report() Totals {
	return Totals{
		Since: t.since, Moved: t.moved.Load(), Denied: t.denied.Load(), Later: t.later.Load(), Reset: t.reset.Load(),
		Resumed: t.resumed.Load(), Closed: t.closed.Load(), ClosedByPeer: t.byPeer.Load(),
	}
}

// Happening is a line of the log.
type Happening struct {
	Time time.Time `json:"time"`
	Peer string    `json:"peer,omitempty"`
	What string    `json:"what"`
	// Took is how long what is told of has taken, in words; empty where that means nothing.
	Took string `json:"took,omitempty"`
}

// history remembers the last lines of the log from info level up. It is a core of the
// manager's logger that takes nothing until somebody wants to see it, so that no sentence is
// made before.
type history struct {
	on atomic.Bool

	mu    sync.Mutex // a leaf
	lines [historySize]Happening
	n     int // lines so far
}

var _ zapcore.Core = (*history)(nil)

// beside returns a logger that writes to the history, too.
func (h *history) beside(log *zap.Logger) *zap.Logger {
	return log.WithOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core { return zapcore.NewTee(c, h) }))
}

func (h *history) Enabled(l zapcore.Level) bool      { return h.on.Load() && l >= zap.InfoLevel }
func (h *history) With([]zapcore.Field) zapcore.Core { return h }
func (h *history) Sync() error                       { return nil }
func (h *history) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if h.Enabled(e.Level) {
		return ce.AddCore(e, h)
	}
	return ce
}

func (h *history) Write(e zapcore.Entry, fields []zapcore.Field) error {
	line := Happening{Time: e.Time, What: strings.ToValidUTF8(e.Message[:min(len(e.Message), maxHistoryLine)], "")}
	for _, f := range fields {
		switch {
		case f.Key == "peer" && f.Type == zapcore.StringerType:
			if p, ok := f.Interface.(peer.ID); ok {
				line.Peer = p.String()
			}
		case f.Key == "took" && f.Integer > 0:
			line.Took = inWords(time.Duration(f.Integer))
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.lines[h.n%historySize] = line
	h.n++
	return nil
}

// last returns the last lines about peers whose ID contains some text, the newest first.
func (h *history) last(most int, about string) []Happening {
	h.mu.Lock()
	defer h.mu.Unlock()
	found := []Happening{}
	for i := h.n - 1; i >= max(0, h.n-historySize) && len(found) < most; i-- {
		if line := h.lines[i%historySize]; strings.Contains(line.Peer, about) {
			found = append(found, line)
		}
	}
	return found
}

// Status is what the status page shows: see [Handler].
type Status struct {
	Self    string      `json:"self"`
	Time    time.Time   `json:"time"`
	Policy  string      `json:"policy"`
	Totals  Totals      `json:"totals"`
	Counts  Counts      `json:"counts"`
	Query   Query       `json:"query"`
	Found   int         `json:"found"` // peers that the query fits
	Pages   int         `json:"pages"`
	Peers   []PeerShown `json:"peers"` // of the page
	History []Happening `json:"history"`
}

// Counts says how many there are of what the page can show.
type Counts struct {
	Peers       int `json:"peers"`
	Duplicates  int `json:"peers_with_duplicates"`
	Relayed     int `json:"peers_reached_through_relays_only"`
	Limited     int `json:"peers_reached_through_limited_relays_only"`
	Connections int `json:"connections"`
}

// PeerShown is a peer on the status page: its explanation, as [Manager.Explain] gives it.
type PeerShown struct {
	Peer       string `json:"peer"`
	Sign       Sign   `json:"sign"`
	State      string `json:"state"`
	Controller bool   `json:"this_side_decides"`
	Reason     string `json:"reason,omitempty"`
	// Upgrade says what is done about a direct connection where there is none.
	Upgrade     string      `json:"upgrade,omitempty"`
	NextUpgrade *time.Time  `json:"next_upgrade,omitempty"`
	Conns       []ConnShown `json:"connections"`
}

// ConnShown is a connection on the status page.
type ConnShown struct {
	ID      string     `json:"id"`
	Sign    Sign       `json:"sign"`
	Kind    string     `json:"kind"`
	Address string     `json:"address"`
	Winner  bool       `json:"kept"`
	Reason  Reason     `json:"reason"`
	State   string     `json:"state"`
	Until   *time.Time `json:"until,omitempty"`
	// Due is the same in words.
	Due      string        `json:"due,omitempty"`
	Rule     string        `json:"rule,omitempty"`
	Values   string        `json:"values,omitempty"` // by which it lost
	RuledOut string        `json:"ruled_out,omitempty"`
	Path     string        `json:"path"`
	Age      string        `json:"age"`
	RTT      string        `json:"rtt,omitempty"`
	Streams  int           `json:"streams"`
	Labelled int           `json:"labelled"`
	Pinned   int           `json:"pinned"`
	List     []StreamShown `json:"list"` // 100 at most
}

// StreamShown is a stream on the status page.
type StreamShown struct {
	Protocol  string `json:"protocol"`
	Direction string `json:"direction"`
	// Pinned is why it cannot move; empty: it can.
	Pinned string `json:"pinned,omitempty"`
	Label  uint64 `json:"label,omitempty"`
	Moves  int    `json:"migrations,omitempty"`
	// Age is that of its present underlying stream.
	Age string `json:"age"`
}

// Level says how much something asks for attention.
type Level string

// The levels.
const (
	LevelGood      Level = "good"      // as it should be
	LevelBusy      Level = "busy"      // something is being done, and passes by itself
	LevelIdle      Level = "idle"      // left alone on purpose
	LevelAttention Level = "attention" // something is in the way
	LevelProblem   Level = "problem"   // streams are in danger, or nothing can be done
)

// Sign is the state of a peer or a connection at a glance.
type Sign struct {
	Level Level  `json:"level"`
	Text  string `json:"text"`
}

// signOf is the sign of a peer.
func signOf(e *Explanation, p *plan) Sign {
	switch {
	case len(e.Conns) == 0:
		return Sign{LevelIdle, "not connected"}
	case !slices.ContainsFunc(e.Conns, func(c ExplainedConn) bool { return c.Path != pathSilent.String() }):
		return Sign{LevelProblem, "no answer"}
	case !slices.ContainsFunc(e.Conns, func(c ExplainedConn) bool { return !c.Candidate.Limited }):
		return Sign{LevelProblem, "limited relay only"}
	}
	relayed := true
	level, text := LevelBusy, "consolidating"
	for i := range e.Conns {
		c := &e.Conns[i]
		relayed = relayed && c.Candidate.Relayed
		switch s := c.sign(); {
		case c.Winner && s.Level == LevelProblem && c.Candidate.Limited:
			return Sign{LevelProblem, "limited relay in use"}
		case s.Level == LevelAttention || s.Level == LevelProblem:
			level, text = LevelAttention, "held up"
		}
	}
	switch {
	case p.err != nil && !errors.Is(p.err, ErrExempt):
		return Sign{LevelProblem, "undecided"}
	case relayed && len(e.Conns) == 1:
		return Sign{LevelAttention, "relay only"}
	case len(e.Conns) == 1:
		return Sign{LevelGood, "direct"}
	case p.left, p.err != nil:
		return Sign{LevelIdle, "left alone"}
	}
	return Sign{level, text}
}

// sign is the sign of a connection.
func (c *ExplainedConn) sign() Sign {
	if c.Path == pathSilent.String() && c.Reason != ReasonClosing {
		return Sign{LevelProblem, string(ReasonSilent)}
	}
	switch c.Reason {
	case ReasonOnly, ReasonKept:
		switch {
		case c.Candidate.Limited:
			return Sign{LevelProblem, "limited"}
		case c.Candidate.Relayed:
			return Sign{LevelAttention, "relay"}
		}
		return Sign{LevelGood, "kept"}
	case ReasonLimited:
		return Sign{LevelProblem, "limited"}
	case ReasonSilent, ReasonEnding:
		return Sign{LevelProblem, string(c.Reason)}
	case ReasonPinned, ReasonBackingOff, ReasonNoRoom, ReasonRefused, ReasonNoAnswer:
		return Sign{LevelAttention, string(c.Reason)}
	case ReasonExempt, ReasonOtherProcess, ReasonStandby, ReasonBetter:
		return Sign{LevelIdle, string(c.Reason)}
	}
	return Sign{LevelBusy, string(c.Reason)}
}

// due says when something is over. In how long that is it says only where state does not.
func due(at, now time.Time, state string) string {
	text := "at " + at.UTC().Format("15:04:05 UTC")
	if left := inWords(at.Sub(now)); !strings.Contains(state, "in "+left) {
		text += ", in " + left
	}
	return text
}

// Query is what the page is asked for.
type Query struct {
	Show string `json:"show"` // all, duplicates, relayed or limited
	Text string `json:"text"` // what the peer's ID contains
	Sort string `json:"sort"` // connections, streams, oldest or peer
	Page int    `json:"page"` // from 1
	// Reload is after how many seconds the page is to be asked for again; 0: never.
	Reload int `json:"reload,omitempty"`
}

const peersOnPage = 50

// listed is what is looked at of each peer.
type listed struct {
	id      peer.ID
	conns   int
	streams int
	opened  time.Time
	relayed bool // it is reached through relays only
	limited bool // and all of them limit it
}

// status returns what the page shows. Of all peers it looks at what is cheap; those on the
// page are explained.
func (m *Manager) status(q Query) Status {
	now := time.Now()
	s := Status{Time: now, Policy: m.policies.policy().name(), Totals: m.tells.totals.report(), Query: q, Pages: 1, Peers: []PeerShown{}}
	n := m.watch.network()
	if n == nil {
		s.History = m.tells.history.last(peersOnPage, "")
		return s
	}
	s.Self = n.LocalPeer().String()
	byPeer := make(map[peer.ID]*listed)
	for _, c := range n.Conns() {
		if aside.IsClosed(c) {
			continue
		}
		p := byPeer[c.RemotePeer()]
		stat := c.Stat()
		if p == nil {
			p = &listed{id: c.RemotePeer(), opened: stat.Opened, relayed: true, limited: true}
			byPeer[p.id] = p
		}
		p.conns++
		p.streams += stat.NumStreams
		p.opened = earlier(p.opened, stat.Opened)
		label := connLabel(c)
		p.relayed = p.relayed && (label == limitedRelay || label == "relay")
		p.limited = p.limited && label == limitedRelay
		s.Counts.Connections++
	}
	found := make([]*listed, 0, len(byPeer))
	for _, p := range byPeer {
		s.Counts.Peers++
		if p.conns > 1 {
			s.Counts.Duplicates++
		}
		if p.relayed {
			s.Counts.Relayed++
		}
		if p.limited {
			s.Counts.Limited++
		}
		if q.Show == "duplicates" && p.conns < 2 || q.Show == "relayed" && !p.relayed || q.Show == "limited" && !p.limited {
			continue
		}
		if q.Text == "" || strings.Contains(p.id.String(), q.Text) {
			found = append(found, p)
		}
	}
	slices.SortFunc(found, func(a, b *listed) int {
		order := 0
		switch q.Sort {
		case "streams":
			order = cmp.Compare(b.streams, a.streams)
		case "oldest":
			order = a.opened.Compare(b.opened)
		case "peer":
		default:
			order = cmp.Compare(b.conns, a.conns)
		}
		return cmp.Or(order, cmp.Compare(a.id, b.id))
	})
	s.Found = len(found)
	s.Pages = max(1, (len(found)+peersOnPage-1)/peersOnPage)
	s.Query.Page = min(max(1, q.Page), s.Pages)
	from := (s.Query.Page - 1) * peersOnPage
	by := m.policies.hurry()
	for _, p := range found[from:min(len(found), from+peersOnPage)] {
		s.Peers = append(s.Peers, m.show(p.id, by))
	}
	s.History = m.tells.history.last(peersOnPage, q.Text)
	return s
}

// show explains a peer.
func (m *Manager) show(p peer.ID, by inHurry) PeerShown {
	e, v, plan := m.explain(p, by.of)
	now := v.facts.now
	shown := PeerShown{Peer: p.String(), Sign: signOf(&e, plan), State: e.State, Controller: e.Controller, Reason: e.Reason, Upgrade: e.Upgrade}
	if !e.NextUpgrade.IsZero() {
		shown.NextUpgrade = &e.NextUpgrade
	}
	for _, c := range e.Conns {
		cs := ConnShown{
			ID: c.Conn.ID, Sign: c.sign(), Kind: c.Conn.Kind, Winner: c.Winner, Reason: c.Reason, State: c.State, RuledOut: c.RuledOut, Path: c.Path,
			Streams: c.Candidate.Streams, Labelled: c.Candidate.Labelled, Pinned: c.Candidate.Pinned, Age: inWords(c.Candidate.Age),
		}
		if c.Conn.Remote != nil {
			cs.Address = c.Conn.Remote.String()
		}
		if !c.Until.IsZero() {
			until := c.Until
			cs.Until, cs.Due = &until, due(until, now, c.State)
		}
		if c.Decision.Rule != "" {
			cs.Rule, cs.Values = c.Decision.Rule, c.Decision.WinnerValue+" over "+c.Decision.LoserValue
		}
		if c.Candidate.RTT > 0 {
			if cs.RTT = inWords(c.Candidate.RTT); c.Candidate.RTT < time.Millisecond {
				cs.RTT = "under 1 ms"
			}
		}
		for i := range v.conns {
			if v.conns[i].base.ID == c.Conn.ID {
				cs.List = v.streams(i, now)
			}
		}
		shown.Conns = append(shown.Conns, cs)
	}
	return shown
}

// streams lists the streams on a connection: first those that cannot move, the oldest first.
func (v *view) streams(i int, now time.Time) []StreamShown {
	cv := &v.conns[i]
	list := []StreamShown{}
	add := func(s network.Stream, id protocol.ID, pinned string) *StreamShown {
		stat := s.Stat()
		shown := StreamShown{Protocol: string(id), Direction: strings.ToLower(stat.Direction.String()), Pinned: pinned}
		if !stat.Opened.IsZero() {
			shown.Age = inWords(now.Sub(stat.Opened))
		}
		list = append(list, shown)
		return &list[len(list)-1]
	}
	for _, s := range v.unlabelled(cv) {
		if id := s.Protocol(); !ownProtocol(id) && len(list) < maxStreamsShown {
			add(s, id, "it has no label")
		}
	}
	for _, denied := range []bool{true, false} {
		for _, s := range cv.labelled {
			if slices.Contains(cv.denied, s.Stream) != denied || len(list) >= maxStreamsShown {
				continue
			}
			why := ""
			if denied {
				why = "the peer denies to move it"
			}
			shown := add(s.Stream, s.Protocol(), why)
			if l, ok := s.Stream.(*migrate.Stream); ok {
				shown.Label, shown.Moves = l.Label(), l.Migrations()
			}
		}
	}
	return list
}

// unlabelled returns the streams on a connection that have no label.
func (v *view) unlabelled(cv *connView) []network.Stream {
	if v.mover == nil {
		return cv.conn.GetStreams()
	}
	return v.mover.Unlabelled(cv.conn)
}
