//go:build linux

package nat

import (
	"fmt"
	"testing"
	"time"

	"github.com/go-portage/portage/internal/natbed"
)

// The direct path is silent for some time, and then works again. A relayed connection is left
// beside it, since it has a stream that does not move. What lives through that on plain hosts
// lives; a new stream need not wait for the path.
func TestInterruption(t *testing.T) {
	needAll(t)
	t.Parallel()
	results := newTable("new stream of A", "new stream of B", "done after it is back")
	t.Cleanup(func() { results.print(t) })
	for _, silent := range []time.Duration{3 * time.Second, 8 * time.Second, 15 * time.Second, 25 * time.Second} {
		for _, p := range paths() {
			name := fmt.Sprintf("%v, %s, %v", silent, p.transports, p.roundTrip)
			repeat(t, name, func(t *testing.T) { interruptBesidePlain(t, name, p, silent, results) })
		}
	}
}

func interruptBesidePlain(t *testing.T, name string, p path, silent time.Duration, results *table) {
	var whole [2]error
	var reached [2]span
	besidePlain(t, func(t *testing.T, i int, h hosts) {
		w := newWorld(t, setup{path: p, limit: generous, hosts: h, streamFirst: true})
		w.dial(natbed.A)
		w.openRelayed(natbed.A, natbed.Stream{Name: "relayed", Rate: 100, Chunk: 50, Fixed: true})
		w.punched()
		if on := w.open(natbed.A, inUse); on == natbed.Relayed {
			t.Fatal("a stream is on the relay although there is a direct connection")
		}
		w.onBoth(func(side natbed.Side) error { return w.node[side].Call(w.ctx, "flowing", inUse.Name, nil) })
		w.onBoth(func(side natbed.Side) error { return w.net.Cut(side, natbed.Direct) })
		fell := time.Now()
		mended := make(chan time.Time, 1)
		time.AfterFunc(silent, func() {
			for _, side := range []natbed.Side{natbed.A, natbed.B} {
				if err := w.net.Mend(side); err != nil {
					t.Error(err)
				}
			}
			mended <- time.Now()
		})
		w.onBoth(func(side natbed.Side) error {
			var c natbed.Conn
			err := w.node[side].Call(w.ctx, "reach", w.relayed(side.Other()), &c)
			reached[i][side] = time.Since(fell)
			return err
		})
		back := <-mended
		pair := w.finish(natbed.A, inUse.Name)
		whole[i] = pair.Whole()
		relayed := w.finish(natbed.A, "relayed")
		if err := relayed.Whole(); err != nil {
			t.Errorf("the stream on the relay: %v", err)
		}
		cells := map[string]time.Duration{"new stream of A": reached[i][natbed.A], "new stream of B": reached[i][natbed.B]}
		if whole[i] == nil {
			cells["done after it is back"] = max(pair.Opener.Ended.Sub(back), pair.Acceptor.Ended.Sub(back), 0)
		}
		results.add(name+", "+h.String(), whole[i] == nil, cells)
	})
	if t.Failed() {
		return
	}
	// What lives through more is luck. TCP gives up 5 to 10 s after its buffer is full, or 40 s
	// after it has heard something, QUIC after 30 s; and both repeat what was lost twice as late
	// each time. (The same in virtual time, with 25 s: integration/field.)
	longest := 10 * time.Second
	if p.transports == "quic" {
		longest = 20 * time.Second
	}
	if silent < longest && whole[1] == nil && whole[0] != nil {
		t.Errorf("a plain stream survives; with Portage: %v", whole[0])
	}
	for side, took := range reached[0] {
		if took > slack(p, reached[1][side]) {
			t.Errorf("a new stream of %v works after %v; of a plain host after %v", natbed.Side(side), took, reached[1][side])
		}
	}
}
