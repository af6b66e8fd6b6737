package connmgr

import (
	"errors"
	"html"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	identifypb "github.com/libp2p/go-libp2p/p2p/protocol/identify/pb"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/internal/punch"
	"github.com/go-portage/portage/pb"
	"github.com/go-portage/portage/policy"
)

// still is a peer that stays on a relay, or keeps a connection that could go.
type still struct {
	name   string
	peer   peer.ID // default: higher, so that this side decides
	bare   bool
	opts   []Option
	set    func(w *world) *fakeConn // returns the connection that the question is about
	reason Reason
	says   string // a regular expression for all of the answer
}

const aTime = `(\d+ ms|\d[\d.]* s|\d+ m \d+ s)\b`

var anyTime = regexp.MustCompile(aTime)

// apart takes the times out of an answer: it is given at several moments.
func apart(answer string) string { return anyTime.ReplaceAllString(answer, "T") }

// relayAndQUIC has the peer reached both ways. The relay has a limit.
func relayAndQUIC(f func(w *world, relay *fakeConn)) func(w *world) *fakeConn {
	return func(w *world) *fakeConn {
		relay := w.connectLimited()
		f(w, relay)
		w.connect(quicAddr)
		return relay
	}
}

func plainPeerOf(w *world) {
	w.net.identify(w.peer)
	w.mover.setSupports(false)
}

// why are the answers to "why is this connection still there?".
var why = []still{
	{name: "the peer does not speak the protocol", set: relayAndQUIC(func(w *world, relay *fakeConn) {
		plainPeerOf(w)
		relay.setPlain(2)
	}), reason: ReasonPinned, says: `kept until 2 streams that cannot move \(2 of /test/plain/1\.0\.0\), since the peer does not migrate streams, have ended`},
	{name: "this host is not wrapped", bare: true, set: relayAndQUIC(func(_ *world, relay *fakeConn) { relay.setPlain(1) }),
		reason: ReasonPinned, says: `kept until 1 stream that cannot move \(1 of /test/plain/1\.0\.0\), since this host is not wrapped, has ended`},
	{name: "a stream without a label", set: relayAndQUIC(func(_ *world, relay *fakeConn) { relay.setPlain(1) }),
		reason: ReasonPinned, says: `kept until 1 stream that cannot move \(1 of /test/plain/1\.0\.0\) has ended(, the peer has not done with it \(asked for T\))?`},
	{name: "denied streams beside others", set: relayAndQUIC(func(w *world, relay *fakeConn) {
		relay.open(2)
		relay.setPlain(1)
		w.mover.setAnswer(func(*fakeStream) error { return errDeniedByFake })
	}), reason: ReasonPinned, says: `kept until 3 streams that cannot move \(2 of /test/labelled/1\.0\.0, denied by the peer; 1 of /test/plain/1\.0\.0\) have ended`},
	{name: "streams of many protocols", set: relayAndQUIC(func(_ *world, relay *fakeConn) {
		for _, id := range []protocol.ID{"/b", "/a", "/A\u202e\"", "/d", "/a"} {
			near, _ := newPipe(relay)
			near.id = id
			relay.set(func() { relay.streams = append(relay.streams, near) })
		}
	}), reason: ReasonPinned, says: `kept until 5 streams that cannot move \(2 of /a; 1 of "/A\\u202e\\""; 1 of /b; others\) have ended`},
	{name: "exempt peer", opts: []Option{WithExempt(ExemptPeer(higher))}, set: relayAndQUIC(func(_ *world, relay *fakeConn) { relay.open(1) }),
		reason: ReasonExempt, says: `kept: the peer is exempt`},
	{name: "exempt connection", opts: []Option{WithExempt(ExemptConn("relays are mine", func(c network.Conn) bool { return c.Stat().Limited }))},
		set: relayAndQUIC(func(_ *world, relay *fakeConn) { relay.open(1) }), reason: ReasonExempt, says: `kept: relays are mine`},
	{name: "the other side decides", peer: lower, opts: []Option{WithTakeover(time.Hour)}, set: relayAndQUIC(func(*world, *fakeConn) {}),
		reason: ReasonPeerDecides, says: `the peer decides`},
	{name: "the other side has yet to say where to", peer: lower, opts: []Option{WithTakeover(time.Hour)},
		set:    relayAndQUIC(func(_ *world, relay *fakeConn) { relay.openTheirs(3) }),
		reason: ReasonPeerDecides, says: `3 streams to move, once the peer says where to`},
	{name: "draining", set: relayAndQUIC(func(_ *world, relay *fakeConn) { relay.set(func() { relay.unread = 1 }) }),
		reason: ReasonDraining, says: `quiet for T, closed next, the peer has not done with it \(asked for T\)`},
	{name: "the peer does not say whether it has done", set: relayAndQUIC(func(_ *world, relay *fakeConn) {
		relay.set(func() { relay.answer = func(*pb.DrainMessage) *pb.DrainMessage { return nil } })
	}), reason: ReasonNoAnswer, says: `quiet for T, closed next; the peer did not answer, it is asked again in T`},
	{name: "the peer refuses", set: relayAndQUIC(func(_ *world, relay *fakeConn) { relay.set(func() { relay.refuses = "it is \"mine\"" }) }),
		reason: ReasonRefused, says: `kept: the peer refused: "it is \\"mine\\""`},
	{name: "backing off", set: relayAndQUIC(func(w *world, relay *fakeConn) {
		relay.open(2)
		w.mover.setAnswer(func(*fakeStream) error { return errFakeReset })
	}), reason: ReasonBackingOff, says: `2 streams failed to move, next attempt in T`},
	{name: "migrations that take long", set: relayAndQUIC(func(w *world, relay *fakeConn) {
		relay.open(2)
		w.mover.setAnswer(func(*fakeStream) error { return errHang })
	}), reason: ReasonMoving, says: `2 streams moving`},
	{name: "the winner has no room", set: func(w *world) *fakeConn {
		relay := w.connectLimited()
		relay.open(2)
		direct := w.connect(quicAddr)
		direct.set(func() { direct.coming = quicStreams })
		return relay
	}, reason: ReasonNoRoom, says: `2 streams to move when the winner has room for more`},
	{name: "the winner has yet to prove itself", set: func(w *world) *fakeConn {
		relay := w.connect(relayAddr)
		relay.open(2)
		w.connect(quicAddr)
		return relay
	}, reason: ReasonProving, says: `2 streams to move when the winner has proved itself, in T`},
	{name: "nothing on it, and the winner has yet to prove itself", set: func(w *world) *fakeConn {
		relay := w.connect(relayAddr)
		w.connect(quicAddr)
		return relay
	}, reason: ReasonProving, says: `quiet for T; closed when the winner has proved itself, in T`},
	{name: "quiet", set: relayAndQUIC(func(w *world, _ *fakeConn) { plainPeerOf(w) }),
		reason: ReasonQuiet, says: `quiet for T of T, then closed`},
	{name: "the peer has not been identified", set: relayAndQUIC(func(w *world, _ *fakeConn) { w.net.forget(w.peer) }),
		reason: ReasonUnidentified, says: `quiet for T; the peer has not been identified, so that it stays`},
	{name: "replicas that share a key", opts: []Option{WithPlainQuietTime(time.Second)}, set: func(w *world) *fakeConn {
		plainPeerOf(w)
		relay := w.connectLimited()
		relay.identity = &identifypb.Identify{SignedPeerRecord: []byte("another record")}
		w.connect(quicAddr)
		return relay
	}, reason: ReasonOtherProcess, says: `kept: it is not known to lead to the same process as the winner`},
	{name: "it stands by", opts: []Option{WithStandby()}, set: func(w *world) *fakeConn {
		relay := w.connect(relayAddr)
		w.connect(quicAddr)
		return relay
	}, reason: ReasonStandby, says: `kept: it stands by`},
	{name: "only relays that limit it", set: func(w *world) *fakeConn {
		w.connectLimited()
		return w.connectLimited()
	}, reason: ReasonLimited, says: `kept: its relay limits it, as the others`},
	{name: "the direct connection does not answer", set: func(w *world) *fakeConn {
		w.connectLimited().setPlain(1)
		direct := w.connect(quicAddr)
		direct.set(func() { direct.silent = true })
		return direct
	}, reason: ReasonSilent, says: `it does not answer; kept: it is unlimited, and the winner is not`},
	{name: "no connection answers", set: func(w *world) *fakeConn {
		relay, direct := w.connect(relayAddr), w.connect(quicAddr)
		relay.set(func() { relay.silent = true })
		direct.set(func() { direct.silent = true })
		return relay
	}, reason: ReasonSilent, says: `it does not answer`},
	{name: "the policy fails", opts: []Option{WithPolicy(panicking{})}, set: relayAndQUIC(func(*world, *fakeConn) {}),
		reason: ReasonUndecided, says: `the policy panicked: of all things`},
	{name: "the policy prefers the relay", opts: []Option{WithPolicy(policy.Chain(notRule{policy.Direct()}))}, set: func(w *world) *fakeConn {
		w.connect(relayAddr)
		return w.connect(quicAddr)
	}, reason: ReasonBetter, says: `kept: it is direct, and the winner is not`},
	{name: "the peer wants to close it", peer: lower, opts: []Option{WithTakeover(time.Hour)}, set: func(w *world) *fakeConn {
		tcp := w.connect(tcpAddr)
		w.connect(quicAddr)
		w.pass(defaultSettleDelay + 100*time.Millisecond)
		w.request(tcp, drainMessage(600))
		return tcp
	}, reason: ReasonPeerCloses, says: `the peer wants to close it`},
	{name: "a transport that blocks in closing", set: func(w *world) *fakeConn {
		relay := w.connectLimited()
		relay.blocks = make(chan struct{})
		w.t.Cleanup(func() { close(relay.blocks) })
		w.connect(quicAddr)
		return relay
	}, reason: ReasonClosing, says: `it is being closed`},
}

// panicking is a policy that does.
type panicking struct{ policy.Policy }

func (panicking) Rank([]policy.Candidate) policy.Ranking { panic("of all things") }
func (panicking) String() string                         { return "panicking" }

// TestWhyStillThere: Explain, the log, the event, the page and its JSON give one answer, in
// the same words.
func TestWhyStillThere(t *testing.T) {
	for _, test := range why {
		t.Run(test.name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				p := test.peer
				if p == "" {
					p = higher
				}
				make := newWorld
				if test.bare {
					make = newBareWorld
				}
				w := make(t, p, test.opts...)
				sub := w.subscribe(256, new(EvtConnectionStays))
				page := Handler(w.m)
				conn := test.set(w)

				var told EvtConnectionStays
				for start := time.Now(); told.Peer == ""; w.pass(minRoundGap) {
					require.Less(t, time.Since(start), time.Minute, "no event in time; what is explained is:\n%s", w.m.Explain(p))
					for _, e := range all(sub) {
						if e := e.(EvtConnectionStays); e.Conn.ID == conn.id && e.Reason == test.reason {
							told = e
						}
					}
				}
				require.Regexp(t, "^"+test.says+"$", apart(told.Why), "the event")

				e := w.m.Explain(p)
				i := slices.IndexFunc(e.Conns, func(c ExplainedConn) bool { return c.Conn.ID == conn.id })
				answer := e.Conns[i].State
				if test.reason == ReasonUndecided {
					answer = e.State
				}
				require.Equal(t, test.reason, e.Conns[i].Reason)
				require.Equal(t, apart(told.Why), apart(answer), "Explain")
				require.Contains(t, e.String(), answer)

				line := "peer " + shortID(p) + ": " + told.Conn.Kind + " stays: " + told.Why
				require.Contains(t, w.messages(), line, "the log")

				s := getStatus(t, page, "")
				require.Equal(t, e.State, s.Peers[0].State)
				require.Equal(t, e.Conns[i].State, s.Peers[0].Conns[i].State, "the JSON")
				require.Equal(t, test.reason, s.Peers[0].Conns[i].Reason)
				require.Equal(t, e.Conns[i].Until.IsZero(), s.Peers[0].Conns[i].Until == nil)
				require.Contains(t, peersOf(t, page), answer, "the page")
			})
		})
	}
}

// peersOf is the page without the history, which has the log.
func peersOf(t *testing.T, page http.Handler) string {
	text, _, found := strings.Cut(get(t, page, ""), `id="history"`)
	require.True(t, found)
	return html.UnescapeString(text)
}

// Each reason has a test, but for those that are none to ask about, or pass sooner than they
// are told.
func TestEachReasonIsTested(t *testing.T) {
	tested := map[Reason]bool{ReasonOnly: true, ReasonKept: true, ReasonEnding: true}
	for _, test := range why {
		tested[test.reason] = true
	}
	require.ElementsMatch(t, knownReasons, slices.Collect(maps.Keys(tested)))
}

// TestWhyNoDirectConnection is the same for a peer that is reached only over relays.
func TestWhyNoDirectConnection(t *testing.T) {
	for _, test := range []struct {
		name    string
		opts    []Option
		set     func(w *world, relay *fakeConn)
		out     bool // the relayed connection was opened from here
		outcome error
		failed  bool // there is an attempt, which the log and the event tell of
		says    string
	}{
		{name: "an attempt has failed", outcome: errors.New("dial: nobody there"), failed: true,
			says: `no direct connection: last attempt T ago: dial: nobody there, next in T`},
		{name: "the peer punches no holes", outcome: punch.ErrUnsupported, failed: true,
			says: `no direct connection: last attempt T ago: the peer does not punch holes; asked for again when something has changed`},
		{name: "this host punches none", outcome: punch.ErrOff, failed: true,
			says: `no direct connection: last attempt T ago: this host does not punch holes, next in T`},
		{name: "nothing uses the peer", set: func(_ *world, relay *fakeConn) { relay.setPlain(0) },
			says: `no direct connection, and none is asked for: nothing uses the peer`},
		{name: "exempt", opts: []Option{WithExempt(ExemptPeer(higher))},
			says: `no direct connection, and none is asked for: the peer is exempt`},
		{name: "not to be asked for", opts: []Option{WithoutUpgrades()},
			says: `no direct connection, and none is asked for`},
		{name: "only the peer can ask", out: true,
			says: `no direct connection: only the peer, which was dialled over the relay, can ask for one`},
		{name: "under way", outcome: errHang,
			says: `no direct connection: asking for one`},
	} {
		t.Run(test.name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, higher, test.opts...)
				w.punches().outcome = func(peer.ID) error {
					if errors.Is(test.outcome, errHang) {
						time.Sleep(time.Minute)
					}
					return test.outcome
				}
				sub := w.subscribe(256, new(EvtUpgrade))
				page := Handler(w.m)
				dir := network.DirInbound
				if test.out {
					dir = network.DirOutbound
				}
				relay := w.net.connectFrom(dir, higher, relayAddr, true)
				relay.setPlain(1)
				if test.set != nil {
					test.set(w, relay)
				}
				w.pass(time.Second)
				e := w.m.Explain(higher)
				if test.failed {
					require.Regexp(t, `^no direct connection: first attempt in T$`, apart(e.Upgrade))
					require.NotZero(t, e.NextUpgrade)
					require.Equal(t, EvtUpgrade{Peer: higher, State: UpgradeStarted, Attempt: 1}, w.nextEvent(sub))
					told := w.nextEvent(sub).(EvtUpgrade)
					require.Equal(t, UpgradeFailed, told.State)
					require.Equal(t, test.outcome, told.Err)
					require.Equal(t, 15*time.Second, told.Took)
					e = w.m.Explain(higher)
					require.Equal(t, apart(e.Upgrade), apart(told.Why))
					require.Equal(t, e.NextUpgrade, told.Next)
					lines := w.logs.FilterMessage("peer " + shortID(higher) + ": " + told.Why)
					require.Equal(t, 1, lines.Len(), "the log")
				} else {
					w.pass(30 * time.Second)
					e = w.m.Explain(higher)
				}
				require.Regexp(t, "^"+test.says+"$", apart(e.Upgrade))
				require.Contains(t, e.String(), e.Upgrade)
				s := getStatus(t, page, "")
				require.Equal(t, e.Upgrade, s.Peers[0].Upgrade, "the JSON")
				require.Equal(t, e.NextUpgrade.IsZero(), s.Peers[0].NextUpgrade == nil)
				require.Contains(t, peersOf(t, page), e.Upgrade, "the page")
			})
		})
	}
}

// nextEvent lets time pass until there is an event.
func (w *world) nextEvent(sub interface{ Out() <-chan any }) any {
	for start := time.Now(); time.Since(start) < 10*time.Minute; w.pass(minRoundGap) {
		select {
		case e := <-sub.Out():
			return e
		default:
		}
	}
	require.Fail(w.t, "no event in time", "what is explained is:\n%s", w.m.Explain(w.peer))
	return nil
}

// A peer with a connection that stays is told of once, and again when the reason is another.
func TestStaysIsToldOnce(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		sub := w.subscribe(16, new(EvtConnectionStays))
		relay := w.connectLimited()
		relay.setPlain(1)
		w.connect(quicAddr)
		w.pass(time.Hour)
		require.Len(t, all(sub), 1)
		relay.set(func() { relay.plain, relay.unread = 0, 1 })
		w.pass(time.Hour)
		require.Len(t, all(sub), 1)
		stays := slices.DeleteFunc(w.messages(), func(line string) bool { return !strings.Contains(line, " stays: ") })
		require.Len(t, stays, 2)
		relay.set(func() { relay.unread = 0 })
		w.pass(time.Minute)
		require.True(t, relay.pruned())
	})
}

// One whose connections come to rest within 10 s is not told of at all.
func TestNothingIsToldOfWhatGoesWell(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		sub := w.subscribe(16, new(EvtConnectionStays))
		relay := w.connectLimited()
		relay.open(3)
		w.connect(quicAddr)
		w.pass(time.Minute)
		require.True(t, relay.pruned())
		require.Empty(t, all(sub))
	})
}
