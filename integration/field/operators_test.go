package field

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	coreconnmgr "github.com/libp2p/go-libp2p/core/connmgr"
	"github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	basicconnmgr "github.com/libp2p/go-libp2p/p2p/net/connmgr"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/simtest"
)

// What those report who run such nodes: connection managers that trim, events that come and
// go, options of NewStream, tags, peers that are closed and dialled again.

// trims is go-libp2p's connection manager, with marks so low that it has something to do.
func trims(low, high int, grace time.Duration) func() (coreconnmgr.ConnManager, error) {
	return func() (coreconnmgr.ConnManager, error) {
		return basicconnmgr.NewConnManager(low, high, basicconnmgr.WithGracePeriod(grace), basicconnmgr.WithSilencePeriod(time.Second))
	}
}

// A connection manager trims, every now and then, while a peer that it values has duplicates
// which are being consolidated. That peer's streams do not notice, and there is no less left of
// the others than on plain hosts, where duplicates count, too.
func TestTrimmingBesideDuplicates(t *testing.T) {
	compare(t, func(w *world) {
		w.hostsWith(setup{inner: trims(4, 6, time.Second)}, setup{})
		others := w.crowd(8, func(name string, at []string) *end { return w.newEnd(name, at, false, small()) })
		cm := w.a.Node.ConnManager()
		cm.TagPeer(w.b.ID(), "field", 100)
		var attempts []Attempt
		for i, o := range others {
			cm.TagPeer(o.ID(), "field", i)
			attempts = append(attempts, Attempt{From: o.Node, To: w.a.Node,
				Path: Path{Transport: TCP, From: o.IPs()[0], To: w.a.IPs()[0]}, After: time.Duration(i) * 400 * time.Millisecond})
		}
		w.dial(append(attempts, w.attempt(TCP, 0, 0), w.back(QUIC, 1, 300*time.Millisecond))...)
		chats := w.chats(3)
		for i := range 50 {
			if i%3 == 0 {
				cm.TrimOpenConns(w.ctx)
			}
			time.Sleep(100 * time.Millisecond)
			w.noteRequest(fmt.Sprint("request ", i), []*end{w.a, w.b}[i%2], []*end{w.b, w.a}[i%2], 5*time.Second, 200*time.Millisecond)
		}
		time.Sleep(10 * time.Second)
		w.noteAll("stream", chats, 5*time.Second, 200*time.Millisecond)
		left := 0
		for _, o := range others {
			if len(w.a.conns(o)) > 0 {
				left++
			}
		}
		require.Less(w, left, len(others), "it does trim")
		w.counts("other peers that are left", left)
		w.holds("there is a connection", len(w.a.conns(w.b)) > 0)
	})
}

// The connection manager closes all connections of a peer while these are being consolidated,
// and the peer comes back at once. It is a peer like any other then.
func TestTrimmedInTheMiddle(t *testing.T) {
	for _, after := range []time.Duration{500 * time.Millisecond, 1010 * time.Millisecond, 1060 * time.Millisecond, 1150 * time.Millisecond, 2900 * time.Millisecond} {
		t.Run(after.String(), func(t *testing.T) {
			compare(t, func(w *world) {
				w.hosts(setup{inner: trims(1, 2, 0)})
				w.doubled(0)
				w.chats(3)
				time.Sleep(after)
				w.a.Node.ConnManager().TrimOpenConns(w.ctx)
				w.until("all are gone", time.Second, func() bool { return len(w.a.conns(w.b))+len(w.b.conns(w.a)) == 0 })
				w.a.Node.ConnManager().Protect(w.b.ID(), "field")
				w.b.Node.ConnManager().Protect(w.a.ID(), "field")
				w.anew("")
			})
		})
	}
}

// anew connects a and b over two ways again, and notes that all is as the first time: what is
// opened at once works, and where both have Portage one connection is left soon.
func (w *world) anew(what string) {
	w.Helper()
	w.doubled(0)
	for _, p := range [][2]*end{{w.a, w.b}, {w.b, w.a}} {
		w.noteRequest(fmt.Sprintf("%srequest of %s", what, p[0].name), p[0], p[1], 5*time.Second, 100*time.Millisecond)
	}
	chats := w.chats(2)
	time.Sleep(2 * time.Second)
	w.noteAll(what+"stream", chats, 5*time.Second, 100*time.Millisecond)
	if w.cast.a && w.cast.b {
		begun := time.Now()
		assert.True(w, w.within(10*time.Second, func() bool { return len(w.a.conns(w.b)) == 1 && len(w.b.conns(w.a)) == 1 }),
			"%sstill several connections after %v: %s", what, time.Since(begun), w.a.mgr.Explain(w.b.ID()))
		w.noteAll(what+"stream, then", chats, 5*time.Second, 100*time.Millisecond)
	}
}

// sightings are what an application sees of its connections to a peer.
type sightings struct {
	mu     sync.Mutex
	states []network.Connectedness // as the events say
	errs   []error                 // what must never be seen
	open   map[network.Conn]bool   // of those that were told of; false: it is gone
}

func (s *sightings) add(format string, a ...any) { s.errs = append(s.errs, fmt.Errorf(format, a...)) }

// watch has e's application watch its connections to other.
func (w *world) watch(e, other *end) *sightings {
	w.Helper()
	s := &sightings{open: make(map[network.Conn]bool)}
	sub, err := e.host.EventBus().Subscribe(new(event.EvtPeerConnectednessChanged), eventbus.BufSize(256))
	require.NoError(w, err)
	w.work.Go(func() {
		defer sub.Close()
		for {
			select {
			case ev := <-sub.Out():
				if c := ev.(event.EvtPeerConnectednessChanged); c.Peer == other.ID() {
					s.mu.Lock()
					s.states = append(s.states, c.Connectedness)
					s.mu.Unlock()
				}
			case <-w.ctx.Done():
				return
			}
		}
	})
	n := &network.NotifyBundle{
		ConnectedF: func(_ network.Network, c network.Conn) {
			if c.RemotePeer() != other.ID() {
				return
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			if _, known := s.open[c]; known {
				s.add("told twice that %s is there", name(c))
			}
			s.open[c] = true
		},
		DisconnectedF: func(n network.Network, c network.Conn) {
			if c.RemotePeer() != other.ID() {
				return
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			if !s.open[c] {
				s.add("told that %s is gone, which was not there", name(c))
			}
			s.open[c] = false
			if is := n.Connectedness(other.ID()); is != network.Connected {
				s.add("%s when %s is gone", is, name(c))
			}
			if !slices.ContainsFunc(n.ConnsToPeer(other.ID()), func(o network.Conn) bool { return !o.Stat().Limited && !o.IsClosed() }) {
				s.add("no connection without a limit when %s is gone", name(c))
			}
		},
	}
	e.host.Network().Notify(n)
	w.Cleanup(func() { e.host.Network().StopNotify(n) })
	return s
}

// While connections are consolidated, an application sees what it could see on plain hosts:
// a peer that is reached over a relay and then directly, and never one that is gone in between.
func TestConnectednessIsSteady(t *testing.T) {
	for _, tc := range []struct {
		name  string
		relay bool
	}{{"a limited relay, then QUIC and TCP", true}, {"TCP and QUIC", false}} {
		t.Run(tc.name, func(t *testing.T) {
			compare(t, func(w *world) {
				w.hosts(setup{})
				seen := []*sightings{w.watch(w.a, w.b), w.watch(w.b, w.a)}
				want := []network.Connectedness{network.Connected}
				if tc.relay {
					want = []network.Connectedness{network.Limited, network.Connected}
					w.relayed(true)
					time.Sleep(2 * time.Second)
				}
				w.doubled(500 * time.Millisecond)
				chats := w.chats(2)
				for range 400 {
					time.Sleep(100 * time.Millisecond)
					for _, p := range [][2]*end{{w.a, w.b}, {w.b, w.a}} {
						if is := p[0].host.Network().Connectedness(p[1].ID()); is != network.Connected {
							w.is("connectedness", errors.New(is.String()))
						}
					}
				}
				w.is("connectedness", nil)
				w.noteAll("stream", chats, 5*time.Second, 200*time.Millisecond)
				for i, s := range seen {
					s.mu.Lock()
					w.holds(fmt.Sprint("events of ", i), slices.Equal(s.states, want), s.states)
					w.is(fmt.Sprint("notifications of ", i), errors.Join(s.errs...))
					s.mu.Unlock()
				}
				if w.cast.a && w.cast.b {
					assert.Len(w, w.a.conns(w.b), 1, "they were consolidated: %s", w.a.mgr.Explain(w.b.ID()))
				}
			})
		})
	}
}

// Streams are opened with all that a context can ask for, while a relay gives way to a direct
// connection and that one to another.
func TestNewStreamOptionsWhileThingsMove(t *testing.T) {
	options := []struct {
		name string
		with func(ctx context.Context) context.Context
	}{
		{"default", func(ctx context.Context) context.Context { return ctx }},
		{"no dial", func(ctx context.Context) context.Context { return network.WithNoDial(ctx, "field") }},
		{"limited", func(ctx context.Context) context.Context { return network.WithAllowLimitedConn(ctx, "field") }},
		{"limited, no dial", allowing},
		{"direct", func(ctx context.Context) context.Context { return network.WithForceDirectDial(ctx, "field") }},
		{"direct, no dial", func(ctx context.Context) context.Context {
			return network.WithForceDirectDial(network.WithNoDial(ctx, "field"), "field")
		}},
	}
	compare(t, func(w *world) {
		w.hosts(setup{})
		w.relayed(true)
		var dials sync.WaitGroup
		dials.Go(func() {
			errs := w.DialTogether(w.attempt(TCP, 0, 3*time.Second), w.back(QUIC, 1, 3300*time.Millisecond))
			w.is("dials", errors.Join(errs...))
		})
		// Before, the requests would dial by themselves, and it is luck which of those that do so
		// at one moment finds an address.
		time.Sleep(3050 * time.Millisecond)
		for tick := range 48 {
			for _, o := range options {
				for _, p := range [][2]*end{{w.a, w.b}, {w.b, w.a}} {
					dials.Go(func() {
						took, err := w.requestWith(o.with(w.ctx), p[0], p[1], 4*time.Second)
						w.takes(fmt.Sprintf("%s, %s of %s", time.Duration(tick)*250*time.Millisecond, o.name, p[0].name), err, took, 200*time.Millisecond)
					})
				}
			}
			time.Sleep(250 * time.Millisecond)
		}
		dials.Wait()
	})
}

// A peer is tagged and protected, and some of that ends while its connections are being
// consolidated. What is said of it is what was said, of whatever connections.
func TestTagsStayWithThePeer(t *testing.T) {
	compare(t, func(w *world) {
		w.hosts(setup{inner: trims(10, 20, time.Second)})
		cm := w.a.Node.ConnManager()
		cm.Protect(w.b.ID(), "before")
		w.doubled(300 * time.Millisecond)
		cm.TagPeer(w.b.ID(), "first", 3)
		chats := w.chats(2)
		time.Sleep(1050 * time.Millisecond)
		cm.TagPeer(w.b.ID(), "second", 4)
		cm.Protect(w.b.ID(), "in the middle")
		w.holds("it is still protected", cm.Unprotect(w.b.ID(), "before"))
		time.Sleep(5 * time.Second)
		cm.UpsertTag(w.b.ID(), "second", func(n int) int { return 2 * n })
		time.Sleep(30 * time.Second)
		w.holds("it is protected", cm.IsProtected(w.b.ID(), "") && cm.IsProtected(w.b.ID(), "in the middle"))
		w.holds("it is not for what has ended", !cm.IsProtected(w.b.ID(), "before"))
		info := cm.GetTagInfo(w.b.ID())
		require.NotNil(w, info)
		w.holds("its tags", info.Value == 11 && info.Tags["first"] == 3 && info.Tags["second"] == 8, info)
		w.holds("its connections", len(info.Conns) == len(w.a.conns(w.b)), info.Conns, names(w.a.conns(w.b)))
		w.holds("it is not protected any more", !cm.Unprotect(w.b.ID(), "in the middle"))
		w.noteAll("stream", chats, 5*time.Second, 200*time.Millisecond)
		if w.cast.a && w.cast.b {
			assert.Len(w, w.a.conns(w.b), 1, "they were consolidated: %s", w.a.mgr.Explain(w.b.ID()))
		}
	})
}

// An application closes a peer in the middle of everything, and dials it again at once. That
// its connections have ended is no sign that their paths are bad.
func TestClosePeerAndRedial(t *testing.T) {
	for _, by := range []string{"a", "b", "both"} {
		t.Run("by "+by, func(t *testing.T) {
			compare(t, func(w *world) {
				w.hosts(setup{})
				for i, after := range []time.Duration{0, 300 * time.Millisecond, time.Second, 1040 * time.Millisecond, 1100 * time.Millisecond, 3020 * time.Millisecond, 5 * time.Second, 20 * time.Second} {
					w.doubled(0)
					w.chats(2)
					time.Sleep(after)
					var closing sync.WaitGroup
					for _, p := range [][2]*end{{w.a, w.b}, {w.b, w.a}} {
						if by == "both" || by == p[0].name {
							closing.Go(func() { assert.NoError(w, p[0].host.Network().ClosePeer(p[1].ID())) })
						}
					}
					closing.Wait()
					w.until("all are gone", time.Second, func() bool { return len(w.a.conns(w.b))+len(w.b.conns(w.a)) == 0 })
					w.holds(fmt.Sprint("no connection is said to be there ", i), w.a.host.Network().Connectedness(w.b.ID()) == network.NotConnected)
				}
				w.anew("at last, ")
			})
		})
	}
}

// Both ends dial each other at the same moment, over two transports, again and again. There is
// always a connection for what is opened then.
func TestSimultaneousDials(t *testing.T) {
	compare(t, func(w *world) {
		w.hosts(setup{})
		for i := range 50 {
			if i%10 == 9 {
				time.Sleep(time.Minute)
			}
			w.dial(w.attempt(TCP, 0, 0), w.back(QUIC, 1, 0), w.back(TCP, 1, time.Duration(i%5)*10*time.Millisecond), w.attempt(QUIC, 0, time.Duration(i%3)*20*time.Millisecond))
			for _, p := range [][2]*end{{w.a, w.b}, {w.b, w.a}} {
				w.noteRequest(fmt.Sprintf("%d, at once, of %s", i, p[0].name), p[0], p[1], 5*time.Second, 100*time.Millisecond)
			}
			chats := w.chats(1)
			if i == 49 {
				time.Sleep(15 * time.Second)
				if w.cast.a && w.cast.b {
					assert.Len(w, w.a.conns(w.b), 1, "%s", w.a.mgr.Explain(w.b.ID()))
				}
			}
			time.Sleep(time.Duration(500+i*70) * time.Millisecond)
			for _, p := range [][2]*end{{w.a, w.b}, {w.b, w.a}} {
				w.noteRequest(fmt.Sprintf("%d, then, of %s", i, p[0].name), p[0], p[1], 5*time.Second, 100*time.Millisecond)
			}
			w.noteAll(fmt.Sprint(i, ", stream"), chats, 5*time.Second, 200*time.Millisecond)
			w.holds(fmt.Sprint(i, ", the same connections at both ends"), w.within(200*time.Millisecond, func() bool { return len(w.a.conns(w.b)) == len(w.b.conns(w.a)) }))
			p := []*end{w.a, w.b}[i%2]
			require.NoError(w, p.host.Network().ClosePeer([]*end{w.b, w.a}[i%2].ID()))
			w.until("all are gone", time.Second, func() bool { return len(w.a.conns(w.b))+len(w.b.conns(w.a)) == 0 })
		}
	})
}
