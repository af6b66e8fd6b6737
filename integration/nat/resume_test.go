//go:build linux

package nat

import (
	"fmt"
	"testing"
	"time"

	"github.com/go-portage/portage/internal/natbed"
)

// With resumption, a file arrives although each connection that it has been on is lost.

// keptFor is how long streams wait for another connection. A host whose address has changed
// hears of it from TCP after 40 s, and reaches nobody before.
const keptFor = 2 * time.Minute

// lostAndResumed returns how often streams of a side have lost their connection, and gone on.
func (w *world) lostAndResumed(side natbed.Side) (lost, resumed int) {
	for _, e := range w.node[side].Events() {
		if e.Kind == natbed.Resumption {
			switch e.Text {
			case "resumed":
				resumed++
			default:
				lost++
			}
		}
	}
	return lost, resumed
}

// The address of a router or a host changes in mid-transfer, so that the direct path is gone,
// and the way to the relay with it.
func TestFileOutlivesAnAddress(t *testing.T) {
	needAll(t)
	t.Parallel()
	results := newTable("done", "longest gap")
	t.Cleanup(func() { results.print(t) })
	for i, f := range falls[1:] {
		for j, p := range paths() {
			if !*long && (i+j)%2 == 1 { // most of what an address does shows on either side
				continue
			}
			name := fmt.Sprintf("%s, %s, %v", f.name, p.transports, p.roundTrip)
			repeat(t, name, func(t *testing.T) {
				besidePlain(t, func(t *testing.T, _ int, h hosts) {
					w := newWorld(t, setup{path: p, limit: generous, hosts: h, resumption: keptFor})
					w.dial(natbed.A)
					w.punched()
					file := natbed.Stream{Name: "file", Size: 4 << 20, Rate: 512 << 10, Chunk: 16 << 10, OneWay: true}
					if on := w.open(natbed.A, file); on == natbed.Relayed {
						t.Fatal("the stream is on the relay although there is a direct connection")
					}
					opened := time.Now()
					w.call(natbed.B, "flowing", file.Name, nil)
					if err := f.fell(w); err != nil {
						t.Fatal(err)
					}
					w.fileArrives(t, file, opened, name, h, results)
				})
			})
		}
	}
}

// There is no direct connection to be had, and the file is much larger than what the relay
// lets pass.
func TestFileOutlivesTheRelaysLimit(t *testing.T) {
	needAll(t)
	t.Parallel()
	results := newTable("done", "longest gap")
	t.Cleanup(func() { results.print(t) })
	for _, p := range paths() {
		for _, rate := range []int64{0, 64 << 10} {
			name := fmt.Sprintf("%s, %v, %d KiB/s", p.transports, p.roundTrip, rate>>10)
			if rate == 0 {
				name = fmt.Sprintf("%s, %v, at full speed", p.transports, p.roundTrip)
			}
			repeat(t, name, func(t *testing.T) {
				besidePlain(t, func(t *testing.T, _ int, h hosts) {
					w := newWorld(t, setup{path: p, limit: byDefault, hosts: h, unpunchable: true, punchTimeout: time.Second, resumption: keptFor})
					w.dial(natbed.A)
					file := natbed.Stream{Name: "file", Size: 8 * byDefaultData, Rate: rate, Chunk: 4 << 10, OneWay: true}
					opened := time.Now()
					w.openRelayed(natbed.A, file)
					w.fileArrives(t, file, opened, name, h, results)
				})
			})
		}
	}
}

// fileArrives waits for a file that A sends, which arrives with Portage alone.
func (w *world) fileArrives(t *testing.T, file natbed.Stream, opened time.Time, name string, h hosts, results *table) {
	pair := w.result(natbed.A, file.Name)
	whole := pair.Whole()
	lost, resumed := w.lostAndResumed(natbed.A)
	switch {
	case h == plain && whole == nil:
		t.Error("a plain stream arrives, too: nothing was lost that resumption could save")
	case h == portage && whole != nil:
		t.Error(whole)
	case h == portage && resumed == 0:
		t.Error("the stream was never resumed")
	}
	t.Logf("%v: lost its connection %d times, resumed %d times", h, lost, resumed)
	results.add(name+", "+h.String(), whole == nil, map[string]time.Duration{
		"done": pair.Acceptor.Ended.Sub(opened), "longest gap": pair.Gap(),
	})
}
