//go:build linux

package nat

import (
	"fmt"
	"testing"
	"time"

	"github.com/go-portage/portage/internal/natbed"
)

// The direct path dies before anything has moved there. A stream on the relay need not know.
func TestDirectPathDiesBeforeTheMove(t *testing.T) {
	needAll(t)
	t.Parallel()
	results := newTable("done", "longest gap")
	t.Cleanup(func() { results.print(t) })
	for name, limit := range map[string]*natbed.Limit{"relay without limits": nil, "relay with limits": byDefault} {
		for _, p := range paths() {
			name := fmt.Sprintf("%s, %s, %v", name, p.transports, p.roundTrip)
			repeat(t, name, func(t *testing.T) {
				var done [2]time.Duration
				besidePlain(t, func(t *testing.T, i int, h hosts) {
					w := newWorld(t, setup{path: p, limit: limit, hosts: h, streamFirst: true})
					w.dial(natbed.A)
					// Ten seconds, which is longer than anybody takes to ask the new path.
					w.openRelayed(natbed.A, natbed.Stream{Name: "s", Size: 80 << 10, Rate: 8 << 10, Chunk: 256})
					opened := time.Now()
					w.punched()
					w.onBoth(func(side natbed.Side) error { return w.net.Cut(side, natbed.Direct) })
					cut := time.Now()
					pair := w.result(natbed.A, "s")
					if w.movingBefore(cut) {
						t.Log("the stream was on its way before the path was cut")
						results.missed(name + ", " + h.String())
						return
					}
					whole := pair.Whole()
					if whole != nil {
						t.Errorf("the relay carried the stream all the time, and %v", whole)
					}
					done[i] = max(pair.Opener.Ended.Sub(opened), pair.Acceptor.Ended.Sub(opened))
					results.add(name+", "+h.String(), whole == nil, map[string]time.Duration{"done": done[i], "longest gap": pair.Gap()})
				})
				if done[0] > slack(p, done[1]) {
					t.Errorf("the stream has ended after %v; on plain hosts after %v", done[0], done[1])
				}
			})
		}
	}
}

// movingBefore says whether a migration had begun by then.
func (w *world) movingBefore(then time.Time) bool {
	for _, node := range w.node {
		for _, e := range node.Events() {
			if e.Kind == natbed.Move && e.At.Before(then) {
				return true
			}
		}
	}
	return false
}

// besidePlain runs a case with Portage, and at the same time with plain hosts.
func besidePlain(t *testing.T, run func(t *testing.T, i int, h hosts)) {
	t.Run("beside plain", func(t *testing.T) {
		for i, h := range []hosts{portage, plain} {
			t.Run(h.String(), func(t *testing.T) {
				t.Parallel()
				run(t, i, h)
			})
		}
	})
}

// A path dies under a stream. What is under way is lost, with Portage and without; what is
// measured is when the two ends know, and when a new stream works again.

// fall is what is done to a world whose stream is on the direct path, and what is left.
type fall struct {
	name string
	fell func(*world) error
}

var falls = []fall{
	{"direct path dies", func(w *world) error {
		if err := w.net.Cut(natbed.A, natbed.Direct); err != nil {
			return err
		}
		return w.net.Cut(natbed.B, natbed.Direct)
	}},
	{"router of A gets another address", func(w *world) error { return w.net.MoveRouter(natbed.A) }},
	{"router of B gets another address", func(w *world) error { return w.net.MoveRouter(natbed.B) }},
	{"host A gets another address", func(w *world) error { return w.net.MoveHost(natbed.A) }},
	{"host B gets another address", func(w *world) error { return w.net.MoveHost(natbed.B) }},
}

// span is when something happened at the two ends, since the fall.
type span [2]time.Duration

// aftermath is what became of a world after a fall.
type aftermath struct {
	whole   error
	known   span // that the stream is lost
	reached span // by a new stream
}

// inUse is a stream whose connection has carried some data at once before, so that TCP's send
// buffer has grown, as it has with Portage by the question whether a path carries what is
// large. What is written then fills it in more than 40 s. A buffer that has never grown is
// full after some 10 s, and go-yamux gives its connection up 5 to 10 s after that.
var inUse = natbed.Stream{Name: "s", Rate: 8 << 10, Chunk: 256, Burst: 64 << 10}

// after makes a world with a stream on the direct path, lets it fall, and measures.
func after(t *testing.T, s setup, f fall, relayLeft bool) aftermath {
	w := newWorld(t, s)
	w.dial(natbed.A)
	if s.hosts == portage {
		w.openRelayed(natbed.A, inUse)
		w.punched()
		if relayLeft {
			w.both("the move", func(_ natbed.Side, e natbed.Event) bool { return e.Kind == natbed.Move && e.Text == "finished" })
		} else {
			w.relayedDown()
		}
	} else {
		// What plain go-libp2p opens on the relay stays there, and what it opens now does not.
		w.punched()
		if on := w.open(natbed.A, inUse); on == natbed.Relayed {
			t.Fatal("a stream is on the relay although there is a direct connection")
		}
	}
	w.onBoth(func(side natbed.Side) error { return w.node[side].Call(w.ctx, "flowing", "s", nil) })
	var m aftermath
	fell := time.Now()
	if err := f.fell(w); err != nil {
		t.Fatal(err)
	}
	w.onBoth(func(side natbed.Side) error {
		var c natbed.Conn
		err := w.node[side].Call(w.ctx, "reach", w.relayed(side.Other()), &c)
		m.reached[side] = time.Since(fell)
		return err
	})
	pair := w.result(natbed.A, "s")
	m.known = span{pair.Opener.Ended.Sub(fell), pair.Acceptor.Ended.Sub(fell)}
	m.whole = pair.Whole()
	return m
}

// slack is how late Portage may be where plain go-libp2p, beside which it runs, takes so
// long. On TCP a dead path is found by timers of which it is chance how far they are.
func slack(p path, plain time.Duration) time.Duration {
	if p.transports != "quic" {
		plain += 15 * time.Second
	}
	return plain + plain/4 + 3*time.Second
}

func TestPathDiesUnderAStream(t *testing.T) {
	needAll(t)
	t.Parallel()
	results := newTable("error at A", "error at B", "new stream of A", "new stream of B")
	t.Cleanup(func() { results.print(t) })
	for i, f := range falls {
		for _, p := range paths() {
			for _, relayLeft := range []bool{true, false} {
				// The relayed connection falls, too, when an address changes; and most of
				// what an address does shows on either side.
				if i > 0 && (relayLeft || !*long && (i+len(p.transports))%2 == 0) {
					continue
				}
				name := fmt.Sprintf("%s, %s, %v", f.name, p.transports, p.roundTrip)
				if relayLeft {
					name += ", just after the move"
				}
				repeat(t, name, func(t *testing.T) { fallBesidePlain(t, name, p, f, relayLeft, results) })
			}
		}
	}
}

func fallBesidePlain(t *testing.T, name string, p path, f fall, relayLeft bool, results *table) {
	var m [2]aftermath
	besidePlain(t, func(t *testing.T, i int, h hosts) {
		m[i] = after(t, setup{path: p, limit: generous, hosts: h, streamFirst: h == portage}, f, relayLeft)
		results.add(name+", "+h.String(), m[i].whole == nil, map[string]time.Duration{
			"error at A": m[i].known[natbed.A], "error at B": m[i].known[natbed.B],
			"new stream of A": m[i].reached[natbed.A], "new stream of B": m[i].reached[natbed.B],
		})
	})
	if t.Failed() {
		return
	}
	ours, theirs := m[0], m[1]
	if theirs.whole == nil && ours.whole != nil {
		t.Errorf("a plain stream survives; with Portage: %v", ours.whole)
	}
	for side := range ours.known {
		if ours.known[side] > slack(p, theirs.known[side]) {
			t.Errorf("%v hears after %v that the stream is lost; a plain host after %v", natbed.Side(side), ours.known[side], theirs.known[side])
		}
		if ours.reached[side] > slack(p, theirs.reached[side]) {
			t.Errorf("a new stream of %v works after %v; of a plain host after %v", natbed.Side(side), ours.reached[side], theirs.reached[side])
		}
	}
}

// The direct path dies while the stream is on its way there. It may be lost, since something
// may have been under way; then both ends hear of it, and a new stream works.
func TestDirectPathDiesDuringTheMove(t *testing.T) {
	needAll(t)
	t.Parallel()
	results := newTable("error at A", "error at B", "new stream of A", "new stream of B")
	t.Cleanup(func() { results.print(t) })
	for _, p := range paths() {
		s := setup{path: p, limit: generous, hosts: portage, streamFirst: true}
		repeat(t, s.String(), func(t *testing.T) {
			w := newWorld(t, s)
			w.dial(natbed.A)
			w.openRelayed(natbed.A, natbed.Stream{Name: "s", Rate: 32 << 10, Chunk: 256})
			w.punched()
			w.await(natbed.A, "the start of the move", func(e natbed.Event) bool { return e.Kind == natbed.Move })
			fell := time.Now()
			w.onBoth(func(side natbed.Side) error { return w.net.Cut(side, natbed.Direct) })
			var reached span
			w.onBoth(func(side natbed.Side) error {
				var c natbed.Conn
				err := w.node[side].Call(w.ctx, "reach", w.relayed(side.Other()), &c)
				reached[side] = time.Since(fell)
				return err
			})
			// If it has stayed on the relay, or come back, it ends well now.
			pair := w.finish(natbed.A, "s")
			whole := pair.Whole()
			if whole != nil && (pair.Opener.Error == "" || pair.Acceptor.Error == "") {
				t.Errorf("the stream is lost, and one end does not know: %v", whole)
			}
			results.add(s.String(), whole == nil, map[string]time.Duration{
				"error at A": pair.Opener.Ended.Sub(fell), "error at B": pair.Acceptor.Ended.Sub(fell),
				"new stream of A": reached[natbed.A], "new stream of B": reached[natbed.B],
			})
		})
	}
}
