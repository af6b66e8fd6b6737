package faults

import (
	"fmt"
	"testing"

	"github.com/libp2p/go-libp2p/core/network"

	. "github.com/go-portage/portage/internal/hosttest"
	"github.com/go-portage/portage/migrate"
)

// TestStreamsOutliveEveryFault is TestFaultAtEveryStep with resumption: no stream dies of what
// befalls a path, whichever, at whatever step of its migration. All that was written arrives.
// Where an end closes a connection for good its streams may end, with errors at both ends.
func TestStreamsOutliveEveryFault(t *testing.T) {
	defer summary(t)()
	t.Run("ways", func(t *testing.T) {
		for n, w := range ways() {
			t.Run(w.String(), func(t *testing.T) {
				t.Parallel()
				l := newLink(t, w.from, w.to, migrate.WithResumption())
				done.pair(w)
				for i := range l.paths {
					for m, f := range everyFault {
						l.join(t)
						if f.possible(l.paths[i]) {
							t.Run(fmt.Sprintf("%s %s", connName(i), f.name), func(t *testing.T) { l.outlive(t, f, i, n+m) })
						}
						l.part(t)
						l.forget()
					}
				}
			})
		}
	})
}

// outlive is suffer for streams that outlive their connections.
func (l *link) outlive(t *testing.T, f fault, i, turn int) {
	noticed := f.noticed(l.paths[i])
	var talks []*held
	for n, at := range everyStep {
		for k := range kinds {
			c := n*int(kinds) + int(k)
			if !*all && (c+turn)%4 != 1 {
				continue // another fault's
			}
			talks = append(talks, l.prepare(t, at, k, (c/4+turn)%2, uint64(c)))
		}
	}
	for _, h := range talks {
		WaitFor(t, "the first bytes: "+h.name, h.caughtUp)
	}
	for _, h := range talks {
		if !h.kind.idles() {
			h.allow(during)
		}
		h.hold = l.hold(t, point{h.ends[h.side()], h.at.initiator, h.at.kind})
		h.result = l.moving(h.initiator, h.ends[h.initiator], newConn)
	}
	for _, h := range talks {
		await(t, h.hold.reached, "the step: "+h.name)
		done.step(h.at)
	}
	for _, h := range talks {
		if !h.kind.idles() {
			h.allow(struck)
		}
	}
	f.strike(l, i)
	done.faults.Add(1)
	for _, h := range talks {
		h.hold.release()
	}
	if !noticed && !f.slow {
		// What is known where another path is alive, and then by the transport itself.
		for side, h := range l.hosts {
			h.Leave(l.conns[side][i])
		}
		for side := range l.hosts {
			_ = l.conns[side][i].CloseWithError(network.ConnSupplanted)
		}
	}
	for _, h := range talks {
		h.allowAll()
	}
	for _, h := range talks {
		h.end(t)
		err := await(t, h.result, "Migrate to return: "+h.name)
		if f.forGood() || h.survived() {
			continue
		}
		t.Errorf("it is to survive: %v\tMigrate: %v; initiator: %v; responder: %v", h.talk, err,
			l.failure(h.ends[h.initiator], true), l.failure(h.ends[1-h.initiator], false))
	}
	l.nothingLeft(t)
}

// forGood says whether an end has closed the connection on purpose.
func (f fault) forGood() bool { return f.name == closed.name || f.name == closedB.name }
