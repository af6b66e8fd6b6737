//go:build linux

package nat

import (
	"slices"
	"testing"
	"time"

	"github.com/go-portage/portage/internal/natbed"
)

// A stream starts on the relay, go-libp2p punches a hole, and from then on there is a direct
// connection beside the relayed one.

// workload is a stream, and what the relay allows it.
type workload struct {
	name   string
	limit  *natbed.Limit
	stream natbed.Stream
	// outlives says that the relay cuts the stream if it stays there.
	outlives bool
}

var workloads = []workload{
	{
		// 128 KiB each way are the budget, a second and a quarter at this pace.
		name: "paced beyond the relay's budget", limit: byDefault, outlives: true,
		stream: natbed.Stream{Size: 256 << 10, Rate: 100 << 10, Chunk: 1 << 10},
	},
	{
		name: "paced beyond the relay's time", limit: &natbed.Limit{Duration: 3 * time.Second, Data: 1 << 20}, outlives: true,
		stream: natbed.Stream{Size: 100 << 10, Rate: 20 << 10, Chunk: 512},
	},
	{
		name: "paced within the relay's limits", limit: byDefault,
		stream: natbed.Stream{Size: 64 << 10, Rate: 20 << 10, Chunk: 512},
	},
	{
		name: "unpaced", limit: generous,
		stream: natbed.Stream{Size: 64 << 20, Chunk: 64 << 10},
	},
}

func TestStreamLeavesTheRelay(t *testing.T) {
	for i, load := range workloads {
		t.Run(load.name, func(t *testing.T) {
			if i > 0 {
				needAll(t)
			}
			results := newTable("direct after dial", "moved after direct", "relay closed after direct", "longest gap")
			t.Cleanup(func() { results.print(t) })
			for _, p := range allPaths {
				for _, h := range []hosts{portage, plain, onlyA, onlyB} {
					switch {
					case *long, *all && slices.Contains(somePaths, p):
					case i > 0 || h != portage:
						continue
					}
					s := setup{path: p, limit: load.limit, hosts: h, streamFirst: true}
					repeat(t, s.String(), func(t *testing.T) { leaveRelay(t, s, load, results) })
				}
			}
		})
	}
}

func leaveRelay(t *testing.T, s setup, load workload, results *table) {
	fewAtOnce(t)
	w := newWorld(t, s)
	load.stream.Name = "s"
	dialled := time.Now()
	w.dial(natbed.A)
	w.openRelayed(natbed.A, load.stream)
	up, direct := w.directOrEnded()
	pair := w.result(natbed.A, "s")
	whole := pair.Whole()
	if !direct {
		results.missed(s.String())
		return
	}
	cells := map[string]time.Duration{"direct after dial": up.Sub(dialled), "longest gap": pair.Gap()}
	if moved, did := w.moved(); did {
		cells["moved after direct"] = moved.Sub(up)
	}
	if s.hosts == portage {
		if whole != nil {
			t.Errorf("with Portage at both ends: %v", whole)
		}
		cells["relay closed after direct"] = w.relayedDown().Sub(up)
		for _, side := range []natbed.Side{natbed.A, natbed.B} {
			if conns := w.conns(side); len(conns) != 1 || conns[0].Transport == natbed.Relayed {
				t.Errorf("%v is left with %+v; want one direct connection", side, conns)
			}
		}
	} else if !load.outlives && whole != nil {
		t.Errorf("the relay's limits allow it, and %v: %v", s.hosts, whole)
	}
	results.add(s.String(), whole == nil, cells)
}

// A stream of 205 kB a second each way spends the 128 KiB of the relay in 640 ms. Where the
// direct connection comes in time for a decision, nothing is lost.
func TestFastStreamLeavesTheRelayInTime(t *testing.T) {
	needAll(t)
	results := newTable("direct after dial", "moved after direct", "longest gap")
	t.Cleanup(func() { results.print(t) })
	const rate = 205_000
	const lasts = byDefaultData * time.Second / rate
	for _, p := range []path{{"quic", 0}, {"tcp", 0}} {
		s := setup{path: p, limit: byDefault, hosts: portage, streamFirst: true}
		repeat(t, s.String(), func(t *testing.T) {
			fewAtOnce(t)
			w := newWorld(t, s)
			dialled := time.Now()
			w.dial(natbed.A)
			w.openRelayed(natbed.A, natbed.Stream{Name: "s", Size: 4 * rate, Rate: rate, Chunk: 1 << 10})
			opened := time.Now()
			up, direct := w.directOrEnded()
			pair := w.result(natbed.A, "s")
			const decides = 250 * time.Millisecond // 100 ms of settling, and what a busy machine takes
			if left := lasts - up.Sub(opened); !direct || left < decides {
				t.Logf("the direct connection came %v before the budget was spent", left)
				results.missed(s.String())
				return
			}
			whole := pair.Whole()
			if whole != nil {
				t.Error(whole)
			}
			cells := map[string]time.Duration{"direct after dial": up.Sub(dialled), "longest gap": pair.Gap()}
			if moved, did := w.moved(); did {
				cells["moved after direct"] = moved.Sub(up)
			}
			results.add(s.String(), whole == nil, cells)
		})
	}
}

// Both hosts dial at once, and so there are two relayed connections, with a stream on each.
func TestBothDialAtOnce(t *testing.T) {
	needAll(t)
	results := newTable("longest gap")
	t.Cleanup(func() { results.print(t) })
	for _, p := range paths() {
		for _, h := range []hosts{portage, plain} {
			s := setup{path: p, limit: byDefault, hosts: h}
			repeat(t, s.String(), func(t *testing.T) { dialAtOnce(t, s, results) })
		}
	}
}

func dialAtOnce(t *testing.T, s setup, results *table) {
	fewAtOnce(t)
	w := newWorld(t, s)
	w.onBoth(func(side natbed.Side) error {
		return w.node[side].Call(w.ctx, "connect", w.relayed(side.Other()), nil)
	})
	size := int64(40 << 10) // both streams may be on one relayed connection
	if s.hosts == portage {
		size = 96 << 10 // more than a relayed connection carries of both
	}
	for _, from := range []natbed.Side{natbed.A, natbed.B} {
		w.open(from, natbed.Stream{Name: from.String(), Size: size, Rate: 24 << 10, Chunk: 512})
	}
	// Where both hosts have dialled both punch, and on TCP one punch can be in the way of the
	// other, so that go-libp2p gives up at once.
	_, direct := w.directOrEnded()
	whole := true
	var gap time.Duration
	for _, from := range []natbed.Side{natbed.A, natbed.B} {
		pair := w.result(from, from.String())
		if err := pair.Whole(); err != nil && (direct || s.hosts == plain) {
			t.Errorf("stream of %v: %v", from, err)
			whole = false
		}
		gap = max(gap, pair.Gap())
	}
	results.add(s.String(), whole && direct, map[string]time.Duration{"longest gap": gap})
	if s.hosts != portage || !direct {
		return
	}
	w.both("the last relayed connection to end", func(side natbed.Side, e natbed.Event) bool {
		return e.Kind == natbed.Disconnected && !hasRelayed(w.conns(side))
	})
}

func hasRelayed(conns []natbed.Conn) bool {
	for _, c := range conns {
		if c.Transport == natbed.Relayed {
			return true
		}
	}
	return false
}
