package field

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/connmgr"
	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/policy"
)

// Two processes share a key, and are one peer to others: one of them may have Portage, or
// both. Nothing that a third host does with them fails, and neither loses its connection
// to it, in use or not.
func TestReplicasThatShareAKey(t *testing.T) {
	for name, c := range map[string]struct {
		first, second   Transport
		portage, active bool // of the second one
		late            bool // the first one comes last
	}{
		"an idle plain one on TCP":         {first: QUIC, second: TCP},
		"an idle plain one on QUIC":        {first: TCP, second: QUIC},
		"an idle plain one that was first": {first: TCP, second: QUIC, late: true},
		"a busy plain one on TCP":          {first: QUIC, second: TCP, active: true},
		"a busy plain one on QUIC":         {first: TCP, second: QUIC, active: true},
		"a busy plain one that was first":  {first: TCP, second: QUIC, active: true, late: true},
		"both have Portage, one idle":      {first: TCP, second: QUIC, portage: true},
		"both have Portage":                {first: TCP, second: QUIC, portage: true, active: true},
	} {
		t.Run(name, func(t *testing.T) {
			compare(t, func(w *world) {
				w.hosts(setup{})
				at := ips(3)
				w.link(w.a.IPs(), at)
				again := w.makeEnd("b again", c.portage && w.cast.b, setup{}, func(opts ...libp2p.Option) *Node {
					return w.NewReplica(w.b.IPs()[0], at, opts...)
				})
				dialed := make(map[*end]network.Conn)
				order := []*end{w.b, again}
				if c.late {
					slices.Reverse(order)
				}
				for _, e := range order {
					k, tr := 0, c.first
					if e == again {
						k, tr = 1, c.second
					}
					ctx, cancel := context.WithTimeout(w.ctx, 10*time.Second)
					conn, err := e.Dial(ctx, w.a.Node, Path{Transport: tr, From: e.IPs()[k], To: w.a.IPs()[k]})
					cancel()
					require.NoError(w, err)
					e.AwaitIdentify(conn)
					dialed[e] = conn
					time.Sleep(200 * time.Millisecond)
				}
				time.Sleep(500 * time.Millisecond)
				chats := []*chat{w.chat(w.b, w.a, 100, time.Second)}
				if c.active {
					chats = append(chats, w.chat(again, w.a, 100, time.Second))
				}
				for i := range 40 {
					w.noteRequest(fmt.Sprintf("request %d", i), w.a, w.b, 5*time.Second, time.Second)
					w.noteRequest(fmt.Sprintf("request of one replica %d", i), w.b, w.a, 5*time.Second, time.Second)
					if c.active {
						w.noteRequest(fmt.Sprintf("request of the other replica %d", i), again, w.a, 5*time.Second, time.Second)
					}
					time.Sleep(4 * time.Second)
				}
				w.noteAll("chat", chats, 5*time.Second, 2*time.Second)
				w.holds("one replica has its connection", !dialed[w.b].IsClosed())
				w.holds("the other replica has its connection", !dialed[again].IsClosed())
			})
		})
	}
}

// Identify tells nothing of a peer. What is not known is no reason to close anything that
// the peer may not have read, nor for two deciders that move streams to and fro.
func TestIdentifyTellsNothing(t *testing.T) {
	off := func(e *end) {
		e.Node.RemoveStreamHandler(identify.ID)
		e.Node.RemoveStreamHandler(identify.IDPush)
	}
	empty := func(w *world, from, to *end) {
		for _, c := range from.conns(to) {
			s, err := openOn(w.ctx, c, identify.IDPush)
			require.NoError(w, err)
			require.NoError(w, s.Close())
		}
		time.Sleep(time.Second)
	}
	for name, c := range map[string]struct{ before, after func(w *world) }{
		"off at this end":      {before: func(w *world) { off(w.a) }},
		"off at the other end": {before: func(w *world) { off(w.b) }},
		"off at both ends":     {before: func(w *world) { off(w.a); off(w.b) }},
		"an empty push":        {after: func(w *world) { empty(w, w.b, w.a) }},
		"an empty push back":   {after: func(w *world) { empty(w, w.a, w.b) }},
		"a list too long for it": {before: func(w *world) {
			for i := range 400 {
				w.b.Node.SetStreamHandler(protocol.ID(fmt.Sprintf("/test/of-many-protocols/%05d", i)), drop)
			}
		}},
	} {
		for _, text := range []string{"default", "chain(older)"} { // which has no effect where one end decides
			t.Run(name+", the other's policy is "+text, func(t *testing.T) {
				compareWith(t, bothCasts, func(w *world) {
					p, err := policy.Parse(text)
					require.NoError(w, err)
					w.hostsWith(setup{}, setup{manager: []connmgr.Option{connmgr.WithPolicy(p)}})
					if c.before != nil {
						c.before(w)
					}
					w.doubled(10 * time.Second)
					if c.after != nil {
						c.after(w)
					}
					for _, p := range [][2]*end{{w.a, w.b}, {w.b, w.a}} {
						for i := range 2 {
							w.is(fmt.Sprintf("post %d to %s", i, p[1].name), w.post(p[0], p[1]))
						}
					}
					w.noteRequest("request before", w.a, w.b, 15*time.Second, time.Second)
					w.noteRequest("request back before", w.b, w.a, 15*time.Second, time.Second)
					w.until("QUIC", 20*time.Second, func() bool { return w.a.on(QUIC, w.b) != nil && w.b.on(QUIC, w.a) != nil })
					var chats []*chat
					if text != "default" { // else the first connection is soon out of use
						chats = w.chats(2)
					}
					for i := range 40 {
						time.Sleep(6 * time.Second)
						w.noteRequest(fmt.Sprintf("request %d", i), w.a, w.b, 15*time.Second, time.Second)
						w.noteRequest(fmt.Sprintf("request back %d", i), w.b, w.a, 15*time.Second, time.Second)
					}
					w.a.noteLate(w, "what was posted to a is read", 2)
					w.b.noteLate(w, "what was posted to b is read", 2)
					w.noteAll("chat", chats, 5*time.Second, 2*time.Second)
					assert.LessOrEqual(w, mostMoved(chats), 2, "moves of one stream")
				})
			})
		}
	}
}

// A plain peer uses the connection that is not kept all the time, with streams that are
// short. It is not closed while that goes on; and goes some time after.
func TestPlainPeerUsesTheLoser(t *testing.T) {
	for _, every := range []time.Duration{150 * time.Millisecond, 990 * time.Millisecond, 5 * time.Second, 20 * time.Second} {
		t.Run(fmt.Sprintf("every %v", every), func(t *testing.T) {
			compareWith(t, casts[2:], func(w *world) {
				w.hosts(setup{})
				w.doubled(time.Second)
				portage, plain := w.a, w.b
				if w.cast.b {
					portage, plain = w.b, w.a
				}
				w.until("QUIC", 10*time.Second, func() bool { return plain.on(QUIC, portage) != nil })
				tcp := plain.on(TCP, portage)
				failed := 0
				var first error
				for begun := time.Now(); time.Since(begun) < 4*time.Minute; time.Sleep(every) {
					ctx, cancel := context.WithTimeout(w.ctx, 5*time.Second)
					s, err := openOn(ctx, tcp, requestID)
					if err == nil {
						err = ask(ctx, s)
					}
					cancel()
					if err != nil && failed == 0 {
						first = fmt.Errorf("after %v: %w", time.Since(begun), err)
					}
					if err != nil {
						failed++
					}
				}
				w.is("requests on the connection", first)
				if w.cast.a || w.cast.b {
					assert.True(w, w.within(5*time.Minute, func() bool { return tcp.IsClosed() }), "it is closed when it is out of use")
				}
			})
		})
	}
}

// New streams to a plain peer go to the connection that is kept, whichever has more
// streams; else the other one would never be out of use.
func TestNewStreamsToAPlainPeer(t *testing.T) {
	alone(t, func(w *world) {
		w.hosts(setup{})
		w.doubled(time.Second)
		portage, plain := w.a, w.b
		if w.cast.b {
			portage, plain = w.b, w.a
		}
		w.until("QUIC", 10*time.Second, func() bool { return portage.on(QUIC, plain) != nil })
		for range 5 { // the swarm would take the connection with more streams
			w.pinned(portage, plain, portage.on(TCP, plain), 10, time.Second)
		}
		time.Sleep(3 * time.Second)
		for range 10 {
			s, err := portage.host.NewStream(allowing(w.ctx), plain.ID(), sinkID)
			require.NoError(w, err)
			assert.True(w, s.Conn() == portage.on(QUIC, plain), "it is on %s", name(s.Conn()))
			_ = s.Reset()
			time.Sleep(time.Second)
		}
	})
}
