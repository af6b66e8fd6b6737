//go:build linux

package nat

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/go-portage/portage/internal/natbed"
)

// Nobody can punch a hole here. The hosts stay on the relay, as plain ones do, and lose
// nothing of what it allows them.
func TestUnpunchable(t *testing.T) {
	needAll(t)
	t.Parallel()
	results := newTable("longest gap")
	t.Cleanup(func() { results.print(t) })
	for _, p := range paths() {
		for _, h := range []hosts{portage, plain} {
			s := setup{path: p, limit: byDefault, hosts: h, unpunchable: true, punchTimeout: time.Second}
			repeat(t, s.String(), func(t *testing.T) {
				w := newWorld(t, s)
				w.onBoth(func(side natbed.Side) error { // two relayed connections
					return w.node[side].Call(w.ctx, "connect", w.relayed(side.Other()), nil)
				})
				w.openRelayed(natbed.A, natbed.Stream{Name: "s", Rate: 8 << 10, Chunk: 512})
				w.gaveUp(natbed.B)
				before := w.conns(natbed.A)
				pair := w.finish(natbed.A, "s")
				whole := pair.Whole()
				if whole != nil {
					t.Error(whole)
				}
				if after := w.conns(natbed.A); len(after) < len(before) || !hasRelayed(after) {
					t.Errorf("connections: %+v; after the stream: %+v; each relayed one has a budget of its own", before, after)
				}
				results.add(s.String(), whole == nil, map[string]time.Duration{"longest gap": pair.Gap()})
			})
		}
	}
}

// The first attempt fails, the second does not. The stream has been on the relay all that
// time.
func TestSecondAttemptSucceeds(t *testing.T) {
	needAll(t)
	t.Parallel()
	results := newTable("moved after direct", "longest gap")
	t.Cleanup(func() { results.print(t) })
	for _, p := range paths() {
		for _, h := range []hosts{portage, plain} {
			// Longer than it takes TCP to send its first packet again.
			s := setup{path: p, limit: byDefault, hosts: h, punchTimeout: 3 * time.Second}
			repeat(t, s.String(), func(t *testing.T) {
				w := newWorld(t, s)
				w.onBoth(func(side natbed.Side) error { return w.net.Cut(side, natbed.Direct) })
				w.dial(natbed.A)
				size := int64(64 << 10)
				if h == portage {
					size = 160 << 10 // more than the relay carries
				}
				w.openRelayed(natbed.A, natbed.Stream{Name: "s", Size: size, Rate: 16 << 10, Chunk: 512})
				w.await(natbed.B, "an attempt to punch that fails", func(e natbed.Event) bool {
					return e.Kind == natbed.Punch && strings.HasPrefix(e.Text, "EndHolePunch ")
				})
				w.onBoth(w.net.Mend)
				up := w.punched()
				pair := w.result(natbed.A, "s")
				whole := pair.Whole()
				if whole != nil {
					t.Error(whole)
				}
				cells := map[string]time.Duration{"longest gap": pair.Gap()}
				if h == portage {
					w.relayedDown()
					if moved, did := w.moved(); did {
						cells["moved after direct"] = moved.Sub(up)
					}
				}
				results.add(s.String(), whole == nil, cells)
			})
		}
	}
}

// go-libp2p has given up when the path opens. What package punch does then leads to a direct
// connection, also between plain hosts, but only at the end that was dialled.
func TestPunchAgain(t *testing.T) {
	t.Parallel()
	results := newTable("direct after the call")
	t.Cleanup(func() { results.print(t) })
	for _, p := range paths() {
		s := setup{path: p, limit: byDefault, hosts: plain, punchTimeout: time.Second}
		repeat(t, s.String(), func(t *testing.T) {
			w := newWorld(t, s)
			w.onBoth(func(side natbed.Side) error { return w.net.Cut(side, natbed.Direct) })
			w.dial(natbed.A)
			w.gaveUp(natbed.B)
			w.onBoth(w.net.Mend)
			if err := w.node[natbed.A].Call(w.ctx, "punch", w.info[natbed.B].ID, nil); err == nil {
				t.Error("the end that has dialled has started a punch; the other end should have refused it")
			}
			called := time.Now()
			w.call(natbed.B, "punch", w.info[natbed.A].ID, nil)
			results.add(s.String(), true, map[string]time.Duration{"direct after the call": w.directUp().Sub(called)})
		})
	}
}

// The direct path is blocked for a minute, longer than go-libp2p tries. A stream has been on
// the relay all that time, and is on a direct connection within a minute after the path opens.
func TestUpgradeAfterAMinute(t *testing.T) {
	needLong(t)
	t.Parallel()
	results := newTable("direct after it opens", "moved after direct", "longest gap")
	t.Cleanup(func() { results.print(t) })
	for _, p := range paths() {
		// The end that was dialled asks; the other one need not run Portage.
		for _, h := range []hosts{portage, onlyB} {
			s := setup{path: p, limit: &natbed.Limit{Duration: 10 * time.Minute, Data: 128 << 20}, hosts: h}
			repeat(t, s.String(), func(t *testing.T) {
				w := newWorld(t, s)
				w.onBoth(func(side natbed.Side) error { return w.net.Cut(side, natbed.Direct) })
				w.dial(natbed.A)
				w.openRelayed(natbed.A, natbed.Stream{Name: "s", Rate: 8 << 10, Chunk: 512})
				blocked := time.NewTimer(time.Minute)
				defer blocked.Stop()
				select {
				case <-blocked.C:
				case <-w.ctx.Done():
					t.Fatal(context.Cause(w.ctx))
				}
				w.onBoth(w.net.Mend)
				opened := time.Now()
				up := w.directUp()
				if took := up.Sub(opened); took > time.Minute {
					t.Errorf("direct %v after the path has opened; want a minute at most", took)
				}
				cells := map[string]time.Duration{"direct after it opens": up.Sub(opened)}
				if h == portage {
					w.relayedDown()
					if moved, did := w.moved(); did {
						cells["moved after direct"] = moved.Sub(up)
					}
				}
				pair := w.finish(natbed.A, "s")
				whole := pair.Whole()
				if whole != nil {
					t.Error(whole)
				}
				cells["longest gap"] = pair.Gap()
				results.add(s.String(), whole == nil, cells)
			})
		}
	}
}
