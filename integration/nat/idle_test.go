//go:build linux

package nat

import (
	"testing"
	"time"

	"github.com/go-portage/portage/internal/natbed"
)

// A stream that has left the relay carries nothing for minutes, longer than the relay keeps
// a connection and a NAT keeps a flow that nobody uses. Then it goes on.
func TestIdleForMinutes(t *testing.T) {
	needLong(t)
	t.Parallel()
	results := newTable("longest gap")
	t.Cleanup(func() { results.print(t) })
	for _, p := range paths() {
		s := setup{path: p, limit: byDefault, hosts: portage, streamFirst: true}
		repeat(t, s.String(), func(t *testing.T) {
			w := newWorld(t, s)
			w.dial(natbed.A)
			// One Write now, and the next four minutes later.
			const pause = 4 * time.Minute
			w.openRelayed(natbed.A, natbed.Stream{Name: "s", Size: 3 * 240, Rate: int64(240 / pause.Seconds()), Chunk: 240})
			w.relayedDown()
			pair := w.result(natbed.A, "s")
			whole := pair.Whole()
			if whole != nil {
				t.Error(whole)
			}
			results.add(s.String(), whole == nil, map[string]time.Duration{"longest gap": pair.Gap()})
		})
	}
}

// The default limits of time, two minutes, and a stream that is slow enough for those of
// bytes.
func TestSlowStreamOutlivesTheRelaysTime(t *testing.T) {
	needLong(t)
	t.Parallel()
	results := newTable("longest gap")
	t.Cleanup(func() { results.print(t) })
	for _, p := range paths() {
		for _, h := range []hosts{portage, plain} {
			s := setup{path: p, limit: byDefault, hosts: h, streamFirst: true}
			repeat(t, s.String(), func(t *testing.T) {
				w := newWorld(t, s)
				w.dial(natbed.A)
				w.openRelayed(natbed.A, natbed.Stream{Name: "s", Size: 65 << 10, Rate: 512, Chunk: 64})
				w.punched()
				pair := w.result(natbed.A, "s")
				whole := pair.Whole()
				if whole != nil && h == portage {
					t.Error(whole)
				}
				results.add(s.String(), whole == nil, map[string]time.Duration{"longest gap": pair.Gap()})
			})
		}
	}
}
