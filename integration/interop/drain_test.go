package interop

import (
	"io"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/crypto"

	"github.com/go-portage/portage/connmgr"
	"github.com/go-portage/portage/migrate"
	"github.com/go-portage/portage/policy"
)

// newManaged is newPair, with a connection manager at both ends that keeps the younger
// connection. There is one connection, and the other ends of streams are served.
func newManaged(t *testing.T, lower string) *pair {
	t.Helper()
	requireNode(t)
	mine, other := identities(t)
	if lower == "js" {
		mine, other = other, mine
	}
	return newManagedPair(t, managedHost(t, mine), managedNode(t, other))
}

func newManagedPair(t *testing.T, h *migrate.Host, n *node) *pair {
	t.Helper()
	p := &pair{host: h, node: n, held: make(chan *migrate.Stream, 100)}
	p.serve()
	p.conns[0] = n.dial(t, h)
	eventually(t, "identify has run at the Go host", func() bool { return h.Supports(n.info.ID) })
	return p
}

func managedHost(t *testing.T, key crypto.PrivKey) *migrate.Host {
	t.Helper()
	mgr, err := connmgr.New(nil,
		connmgr.WithPolicy(policy.Chain(policy.Younger())),
		connmgr.WithSettleDelay(200*time.Millisecond),
		connmgr.WithQuietTime(300*time.Millisecond),
		connmgr.WithProof(time.Second),
		connmgr.WithTakeover(time.Minute),
		connmgr.WithSlog(slog.New(slog.NewTextHandler(t.Output(), nil))))
	check(t, err)
	h, err := mgr.Wrap(newHost(t, key, libp2p.ConnectionManager(mgr)))
	check(t, err)
	return h
}

func managedNode(t *testing.T, key crypto.PrivKey) *node {
	t.Helper()
	return startNode(t, key, args{"drain": args{"settle": 200, "quiet": 300, "others": 1000, "takeover": 60000}})
}

// Of two connections one is left, in seconds, whoever decides. Streams of both ends, which
// are on the other one to begin with, move and go on.
func TestDrain(t *testing.T) {
	for _, lower := range []string{"go", "js"} {
		t.Run("decided by "+lower, func(t *testing.T) {
			p := newManaged(t, lower)
			s, id := p.heldByJS(t)
			theirs, theirID := p.heldByGo(t)
			goLoad, jsLoad := startLoad(p.openGo(t, "/echo/1.0.0")), p.loadJS(t)

			p.conns[1] = p.node.dial(t, p.host)
			begin := time.Now()
			eventually(t, "one connection is left at both ends", func() bool {
				return len(p.host.Network().ConnsToPeer(p.node.info.ID)) == 1 && len(p.node.must(t, "conns", nil).Conns) == 1
			})
			t.Logf("one connection is left after %v", time.Since(begin))
			if left := p.host.Network().ConnsToPeer(p.node.info.ID)[0]; left.ID() != p.conns[1].ID() {
				t.Errorf("connection %s is left, not the younger one", left.ID())
			}
			a := p.node.must(t, "conns", nil)
			if want := map[string]string{"go": "peer", "js": "us"}[lower]; a.Conns[0].Conn != p.conns[1].js || a.By != want {
				t.Errorf("the Node process has %+v, decided by %q, not %q", a.Conns, a.By, want)
			}
			p.settled(t, s, id)
			p.talk(t, s, id)
			p.settled(t, theirs, theirID)
			p.talk(t, theirs, theirID)
			// Each end has moved the streams that it had opened: who moves a stream gives the label.
			even := map[bool]uint64{true: 0, false: 1}
			if got := s.Label() % 2; got != even[lower == "go"] {
				t.Error("the Node process has moved a stream of the Go host")
			}
			if got := theirs.Label() % 2; got != even[lower == "js"] {
				t.Error("the Go host has moved a stream of the Node process")
			}
			check(t, goLoad.finish(t))
			p.finishJS(t, jsLoad)
		})
	}
}

// A connection on which a stream cannot move is drained when that is over, and not before.
func TestDrainWaits(t *testing.T) {
	for _, lower := range []string{"go", "js"} {
		t.Run("decided by "+lower, func(t *testing.T) {
			p := newManaged(t, lower)
			p.node.must(t, "accept", args{"on": false}) // it denies, so that the stream stays
			s := p.openGo(t, "/held/1.0.0")
			write(t, s, "begin")
			id := wait(t, "a stream", p.node.streams).Stream
			p.readJS(t, id, "begin")
			plain, err := p.conns[0].NewStream(withLimit(t))
			check(t, err)
			hello := "\x13/multistream/1.0.0\n\x0c/echo/1.0.0\n"
			write(t, plain, hello) // without a label: it cannot move at all
			read(t, plain, hello)

			p.conns[1] = p.node.dial(t, p.host)
			times := map[string]int{"go": 1, "js": 3}[lower] // it asks that often in the time that there is
			eventually(t, "it was asked for, and is busy", func() bool {
				write(t, plain, "still here")
				read(t, plain, "still here")
				return p.node.must(t, "conns", nil).Busy >= times
			})
			if n := len(p.host.Network().ConnsToPeer(p.node.info.ID)); n != 2 {
				t.Fatalf("there are %d connections, though one carries a stream", n)
			}
			check(t, plain.CloseWrite())
			if rest, err := io.ReadAll(plain); err != nil || len(rest) > 0 {
				t.Fatalf("%d bytes at the end, %v", len(rest), err)
			}
			check(t, plain.Close())
			check(t, s.Close())
			p.node.must(t, "closeStream", args{"stream": id})
			eventually(t, "one connection is left", func() bool {
				return len(p.host.Network().ConnsToPeer(p.node.info.ID)) == 1 && len(p.node.must(t, "conns", nil).Conns) == 1
			})
		})
	}
}

// Two processes that share a key look like one peer with two connections. Nothing moves
// between them and neither connection is closed, whoever decides.
func TestReplicas(t *testing.T) {
	requireNode(t)
	lower, higher := identities(t)
	// hold opens a stream of the Node process, and returns what shows that it has not moved.
	hold := func(t *testing.T, p *pair) (stays func()) {
		t.Helper()
		s, id := p.heldByGo(t)
		label := s.Label()
		return func() {
			t.Helper()
			if s.Label() != label || s.Conn().ID() != p.conns[0].ID() {
				t.Error("a stream has moved")
			}
			p.talk(t, s, id)
		}
	}
	t.Run("of Go, decided by js", func(t *testing.T) {
		n := managedNode(t, lower)
		a := newManagedPair(t, managedHost(t, higher), n)
		aStays := hold(t, a)
		b := newManagedPair(t, managedHost(t, higher), n)
		bStays := hold(t, b)
		eventually(t, "the Node process has found out, twice", func() bool { return n.must(t, "conns", nil).Split >= 2 })
		aStays()
		bStays()
		if got := len(n.must(t, "conns", nil).Conns); got != 2 {
			t.Errorf("%d connections are left, not both", got)
		}
	})
	t.Run("of js, decided by Go", func(t *testing.T) {
		h := managedHost(t, lower)
		a := newManagedPair(t, h, managedNode(t, higher))
		aStays := hold(t, a)
		b := newManagedPair(t, h, managedNode(t, higher))
		bStays := hold(t, b)
		m, ok := connmgr.Of(h)
		if !ok {
			t.Fatal("the host has no manager")
		}
		eventually(t, "the Go host has found out", func() bool {
			return strings.Contains(m.Explain(a.node.info.ID).String(), "different processes")
		})
		aStays()
		bStays()
		if got := len(h.Network().ConnsToPeer(a.node.info.ID)); got != 2 {
			t.Errorf("%d connections are left, not both", got)
		}
	})
}
