//go:build linux

package nat

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-portage/portage/internal/natbed"
)

// missing is why nothing here can run; "" if it can.
var missing = sync.OnceValue(natbed.Missing)

// hosts says which sides run Portage.
type hosts struct{ a, b bool }

var (
	portage = hosts{true, true}
	plain   = hosts{false, false}
	onlyA   = hosts{a: true}
	onlyB   = hosts{b: true}
)

func (h hosts) String() string {
	switch h {
	case portage:
		return "Portage"
	case plain:
		return "plain"
	case onlyA:
		return "Portage at A"
	default:
		return "Portage at B"
	}
}

// path is what is between the two networks.
type path struct {
	transports string // quic, tcp or both
	roundTrip  time.Duration
}

const delayed = 50 * time.Millisecond

var (
	allPaths = []path{{"quic", 0}, {"quic", delayed}, {"tcp", 0}, {"tcp", delayed}, {"both", 0}, {"both", delayed}}
	// somePaths are enough to see each transport, and each delay.
	somePaths = []path{{"quic", delayed}, {"tcp", 0}}
)

// paths are those that most cases are run on.
func paths() []path {
	if *long {
		return allPaths
	}
	return somePaths
}

// setup is what a case varies.
type setup struct {
	path
	limit       *natbed.Limit // of the relay; nil: none
	hosts       hosts
	unpunchable bool
	// streamFirst has no direct connection come before the first stream.
	streamFirst bool
	// punchTimeout is how long each of go-libp2p's attempts to punch takes; 0: its default.
	punchTimeout time.Duration
	// resumption is how long streams outlive their connection, with Portage.
	resumption time.Duration
}

const byDefaultData = 128 << 10

// byDefault are the limits of go-libp2p's relay.
var byDefault = &natbed.Limit{Duration: 2 * time.Minute, Data: byDefaultData}

// generous are limits that nothing here comes near, but limits all the same: from a relay
// without any, streams move only when the direct connection has proved itself, which takes
// half a minute.
var generous = &natbed.Limit{Duration: time.Hour, Data: 1 << 30}

// String is the setup as part of the name of a case.
func (s setup) String() string { return fmt.Sprintf("%s, %v, %v", s.transports, s.roundTrip, s.hosts) }

// world is a Net with its relay and hosts.
type world struct {
	t    *testing.T
	ctx  context.Context
	net  *natbed.Net
	node [2]*natbed.Node
	info [2]natbed.Info // with the relayed addresses
}

// patience is how long a case waits for what must happen.
const patience = 3 * time.Minute

func listenOn(ip, transports string) []string {
	quic, tcp := "/ip4/"+ip+"/udp/4001/quic-v1", "/ip4/"+ip+"/tcp/4001"
	switch transports {
	case "quic":
		return []string{quic}
	case "tcp":
		return []string{tcp}
	default:
		return []string{quic, tcp}
	}
}

// newWorld returns hosts that have a reservation with the relay and are ready to punch:
// a relayed connection that comes before that is not upgraded at all.
func newWorld(t *testing.T, s setup) *world {
	t.Helper()
	if why := missing(); why != "" {
		t.Skip("real NATs: " + why)
	}
	limit := patience
	if *long {
		limit *= 3
	}
	ctx, cancel := context.WithTimeoutCause(t.Context(), limit, fmt.Errorf("did not happen within %v", limit))
	t.Cleanup(cancel)
	n, err := natbed.New(natbed.Options{RoundTrip: s.roundTrip, Unpunchable: s.unpunchable})
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, ctx: ctx, net: n}
	t.Cleanup(w.end)
	relay, err := n.Start(ctx, natbed.Relay, natbed.Config{IsRelay: true, Listen: listenOn("45.0.0.10", s.transports), Limit: s.limit})
	if err != nil {
		t.Fatal(err)
	}
	cfg := natbed.Config{Listen: listenOn("0.0.0.0", s.transports), PunchTimeout: s.punchTimeout, StreamFirst: s.streamFirst, Resumption: s.resumption}
	for _, a := range listenOn("45.0.0.10", s.transports) {
		cfg.Relay = append(cfg.Relay, a+"/p2p/"+relay.ID)
	}
	w.onBoth(func(side natbed.Side) error {
		cfg := cfg
		cfg.Portage = [2]bool{s.hosts.a, s.hosts.b}[side]
		node, err := n.Start(ctx, side.Host(), cfg)
		if err != nil {
			return err
		}
		w.node[side] = node
		if err := node.Call(ctx, "reserved", nil, &w.info[side]); err != nil {
			return err
		}
		return node.Call(ctx, "punchable", nil, nil)
	})
	return w
}

// onBoth does something at both sides at once.
func (w *world) onBoth(do func(natbed.Side) error) {
	w.t.Helper()
	var errs [2]error
	var wg sync.WaitGroup
	for side := range errs {
		wg.Go(func() { errs[side] = do(natbed.Side(side)) })
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			w.t.Fatal(err)
		}
	}
}

// end removes everything, and says what happened if the case has failed.
func (w *world) end() {
	if w.t.Failed() {
		for side, node := range w.node {
			if node != nil {
				w.t.Logf("host %v (%s):\n%s%s\nits log:\n%s",
					natbed.Side(side), node.ID, history(node), w.explain(natbed.Side(side)), node.Log())
			}
		}
	}
	if err := w.net.Close(); err != nil {
		w.t.Error(err)
	}
}

// explain returns what the manager of a side thinks of the other.
func (w *world) explain(side natbed.Side) string {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(w.ctx), 10*time.Second)
	defer cancel()
	var text string
	if err := w.node[side].Call(ctx, "explain", w.info[side.Other()].ID, &text); err != nil {
		return err.Error()
	}
	return text
}

func history(n *natbed.Node) string {
	var b strings.Builder
	for _, e := range n.Events() {
		fmt.Fprintf(&b, "%s  %-12s %s", e.At.Format("15:04:05.000"), e.Kind, e.Text)
		if e.Conn != nil {
			fmt.Fprintf(&b, " %+v", *e.Conn)
		}
		if e.Stream != nil {
			fmt.Fprintf(&b, " %+v", *e.Stream)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

func (w *world) call(side natbed.Side, do string, args, result any) {
	w.t.Helper()
	if err := w.node[side].Call(w.ctx, do, args, result); err != nil {
		w.t.Fatal(err)
	}
}

// dial has a side dial the other's relayed address.
func (w *world) dial(from natbed.Side) {
	w.t.Helper()
	w.call(from, "connect", w.relayed(from.Other()), nil)
}

// relayed is where a side is reached over the relay.
func (w *world) relayed(side natbed.Side) natbed.Info { return w.info[side].Relayed() }

// open has a side open a stream to the other, and returns what connection it is on.
func (w *world) open(from natbed.Side, s natbed.Stream) (transport string) {
	w.t.Helper()
	s.Peer = w.info[from.Other()].ID
	var r natbed.Result
	w.call(from, "open", s, &r)
	return r.First
}

// openRelayed opens a stream, which has to start on the relay.
func (w *world) openRelayed(from natbed.Side, s natbed.Stream) {
	w.t.Helper()
	if on := w.open(from, s); on != natbed.Relayed {
		w.t.Fatalf("the stream starts on %s, not on the relay: the direct connection was faster", on)
	}
}

// result waits until both ends of a stream have ended.
func (w *world) result(from natbed.Side, name string) natbed.Pair {
	return w.outcome(from, name, "result")
}

// finish has a stream end, and returns what became of it.
func (w *world) finish(from natbed.Side, name string) natbed.Pair {
	return w.outcome(from, name, "finish")
}

func (w *world) outcome(from natbed.Side, name, do string) natbed.Pair {
	w.t.Helper()
	var p natbed.Pair
	w.call(from, do, name, &p.Opener)
	w.call(from.Other(), "result", name, &p.Acceptor)
	if err := p.Prefix(); err != nil {
		w.t.Errorf("stream %s: %v", name, err)
	}
	return p
}

func (w *world) await(side natbed.Side, what string, is func(natbed.Event) bool) natbed.Event {
	w.t.Helper()
	e, err := w.node[side].Await(w.ctx, what, is)
	if err != nil {
		w.t.Fatal(err)
	}
	return e
}

// about says whether an event is of a connection to the other host.
func (w *world) about(side natbed.Side, e natbed.Event, kind natbed.Kind, relayed bool) bool {
	return e.Kind == kind && e.Conn.Peer == w.info[side.Other()].ID && (e.Conn.Transport == natbed.Relayed) == relayed
}

// directUp waits until both sides have a direct connection, and returns when both had.
func (w *world) directUp() time.Time {
	w.t.Helper()
	return w.both("a direct connection", func(s natbed.Side, e natbed.Event) bool { return w.about(s, e, natbed.Connected, false) })
}

// punched is directUp where A has dialled. Now and then go-libp2p finds nothing: what B's
// identify tells can take away the address that A was given to punch to. Then B asks again.
func (w *world) punched() time.Time {
	w.t.Helper()
	failed := 0
	e := w.await(natbed.B, "a direct connection, or none", func(e natbed.Event) bool {
		if e.Kind == natbed.Punch && strings.Contains(e.Text, `"Success":false`) {
			failed++
		}
		return failed == 3 || w.about(natbed.B, e, natbed.Connected, false) ||
			e.Kind == natbed.Punch && strings.HasPrefix(e.Text, "ProtocolError ")
	})
	if e.Kind != natbed.Connected {
		w.t.Logf("go-libp2p has found no direct connection: %s", e.Text)
		w.call(natbed.B, "punch", w.info[natbed.A].ID, nil)
	}
	return w.directUp()
}

// directOrEnded waits until both sides have a direct connection, and returns when both had; or
// until a stream that A has opened has ended without that: false. That happens with plain
// hosts, too; see punched.
func (w *world) directOrEnded() (time.Time, bool) {
	w.t.Helper()
	e := w.await(natbed.A, "a direct connection, or the end of a stream", func(e natbed.Event) bool {
		return e.Kind == natbed.Ended || w.about(natbed.A, e, natbed.Connected, false)
	})
	if e.Kind == natbed.Ended {
		w.t.Log("go-libp2p has found no direct connection while there was a stream")
		return time.Time{}, false
	}
	return w.directUp(), true
}

// relayedDown waits until each side has lost a relayed connection, and returns when both had.
func (w *world) relayedDown() time.Time {
	w.t.Helper()
	return w.both("the end of a relayed connection", func(s natbed.Side, e natbed.Event) bool {
		return w.about(s, e, natbed.Disconnected, true)
	})
}

// gaveUp waits until the side that was dialled has made its three attempts to punch, or has been
// refused: where both have dialled, one punch can be in the way of the other.
func (w *world) gaveUp(side natbed.Side) {
	w.t.Helper()
	attempts := 0
	w.await(side, "three attempts to punch", func(e natbed.Event) bool {
		if e.Kind == natbed.Punch && strings.HasPrefix(e.Text, "EndHolePunch ") {
			attempts++
		}
		return attempts == 3 || e.Kind == natbed.Punch && strings.HasPrefix(e.Text, "ProtocolError ")
	})
}

// both waits for an event at each side, and returns when the later one was.
func (w *world) both(what string, is func(natbed.Side, natbed.Event) bool) time.Time {
	w.t.Helper()
	a := w.await(natbed.A, what, func(e natbed.Event) bool { return is(natbed.A, e) }).At
	b := w.await(natbed.B, what, func(e natbed.Event) bool { return is(natbed.B, e) }).At
	if a.After(b) {
		return a
	}
	return b
}

// moved returns when the last migration was done with at either side; false: there was none.
func (w *world) moved() (time.Time, bool) {
	var last time.Time
	for _, node := range w.node {
		for _, e := range node.Events() {
			if e.Kind == natbed.Move && e.Text == "finished" && e.At.After(last) {
				last = e.At
			}
		}
	}
	return last, !last.IsZero()
}

// conns returns a side's connections to the other.
func (w *world) conns(side natbed.Side) []natbed.Conn {
	w.t.Helper()
	var conns []natbed.Conn
	w.call(side, "conns", w.info[side.Other()].ID, &conns)
	return conns
}
