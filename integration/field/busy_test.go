package field

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/libp2p/go-libp2p/p2p/protocol/ping"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/simtest"
)

// A direct connection is so busy that nothing new is answered on it for seconds: uploads
// without end go through a slow path. It is healthy, and stays; so do the streams on it. (An upload
// whose opening the path does not take at once is opened on the relay, and may stay there: the last
// few, now and then.)
func TestBusyDirectConnection(t *testing.T) {
	for _, tr := range []Transport{TCP, QUIC} {
		for _, uploads := range []int{8, 24} {
			if tr == QUIC && uploads > 8 {
				continue
			}
			t.Run(fmt.Sprintf("%s, %d uploads", tr, uploads), func(t *testing.T) {
				compare(t, func(w *world) { busy(w, tr, uploads) })
			})
		}
	}
}

func busy(w *world, tr Transport, uploads int) {
	const bytesPerSecond = 256 << 10
	for i := 1; i <= 2; i++ {
		w.SetBandwidth(ips(i)[1], 8*bytesPerSecond)
		w.SetBandwidth(ips(i)[0], 2*8*bytesPerSecond)
	}
	w.SetBuffer(1 << 20) // what the socket takes lasts for four seconds
	w.hosts(setup{})
	w.relayed(false)
	chats := w.chats(1)
	direct := w.direct(tr, 1)
	var all []*upload
	began := make(map[*upload]bool) // on the direct connection
	for range uploads {
		u := w.upload(w.a, w.b)
		all = append(all, u)
		if u.s.Conn() == direct {
			began[u] = true
		}
	}
	assert.GreaterOrEqual(w, len(began), uploads/2, "uploads that begin on the direct connection")
	time.Sleep(30 * time.Second)
	w.holds("the direct connection stays", !direct.IsClosed() && w.b.on(tr, w.a) != nil, names(w.a.conns(w.b)))
	most := 0
	for i, u := range all {
		w.is(fmt.Sprintf("upload %d goes on", i), u.state())
		w.holds(fmt.Sprintf("upload %d stays on the direct connection", i), !began[u] || u.s.Conn() == direct, "it is on ", name(u.s.Conn()))
		most = max(most, migrations(u.s))
	}
	assert.LessOrEqual(w, most, 1, "moves of one upload")
	for i, c := range chats {
		w.is(fmt.Sprintf("chat %d", i), c.state(30*time.Second))
	}
}

// A QUIC connection carries as many streams as its peer allows, 256 from one end. That is
// no reason to leave it; and when there is room again, new streams use it, not a limited
// relay.
func TestFullConnection(t *testing.T) {
	for name, beside := range map[string]func(w *world){
		"unlimited relay beside": func(w *world) { w.relayed(false) },
		"limited relay beside":   func(w *world) { w.relayed(true) },
		"TCP beside":             func(*world) {},
	} {
		t.Run(name, func(t *testing.T) {
			compare(t, func(w *world) {
				w.hosts(setup{})
				if name == "TCP beside" {
					w.dial(w.attempt(QUIC, 1, 0), w.back(TCP, 0, 8*time.Second))
				} else {
					beside(w)
					w.direct(QUIC, 1)
				}
				full(w)
			})
		})
	}
}

func full(w *world) {
	quic := w.a.on(QUIC, w.b)
	var chats []*chat
	for range 256 { // some are spent already, for a while
		ctx, cancel := context.WithTimeout(allowing(w.ctx), 500*time.Millisecond)
		s, err := w.a.host.NewStream(ctx, w.b.ID(), chatID)
		cancel()
		if err != nil {
			break
		}
		if s.Conn() != quic {
			_ = s.Reset()
			break
		}
		chats = append(chats, w.talk(w.a, w.b, s, 100, 5*time.Second))
	}
	require.Greater(w, len(chats), 200)
	time.Sleep(5 * time.Second)
	w.noteRequest("request of the end that has room", w.b, w.a, 10*time.Second, time.Second)
	time.Sleep(30 * time.Second)
	w.noteAll("stream", chats[:200], 10*time.Second, 2*time.Second) // the managers may have had the last ones
	w.holds("the QUIC connection stays", !quic.IsClosed(), names(w.a.conns(w.b)))
	assert.LessOrEqual(w, mostMoved(chats), 1, "moves of one stream")

	for i, c := range chats[:20] {
		w.is(fmt.Sprintf("end of stream %d", i), c.finish(10*time.Second))
	}
	for i := range 10 {
		for _, p := range [][2]*end{{w.a, w.b}, {w.b, w.a}} {
			ctx, cancel := context.WithTimeout(allowing(w.ctx), 5*time.Second)
			s, err := p[0].host.NewStream(ctx, p[1].ID(), requestID)
			limited := false
			if err == nil {
				limited = s.Conn().Stat().Limited
				err = ask(ctx, s)
			}
			cancel()
			what := fmt.Sprintf("request %d when there is room", i)
			if p[0] == w.b {
				what = fmt.Sprintf("request back %d when there is room", i)
			}
			w.is(what, err)
			w.holds(what+", not on a limited connection", err == nil && !limited)
		}
	}
}

// A connection cannot be pinged, for a reason that lies at this end, and its path is dead.
// Nobody knows that it lives; the other connection does, and stays.
func TestPingThatCannotBeOpened(t *testing.T) {
	for name, c := range map[string]struct {
		limits func() libp2p.Option
		hold   func(w *world) // by a
	}{
		"ping streams are used up": {
			func() libp2p.Option { return func(*libp2p.Config) error { return nil } },
			func(w *world) {
				for range 3 { // go-libp2p's limit for a peer
					answer, ok := <-ping.Ping(allowing(w.ctx), w.a.Node.Host, w.b.ID())
					require.True(w, ok)
					require.NoError(w, answer.Error)
				}
			},
		},
		"streams are used up": {
			func() libp2p.Option {
				limits := rcmgr.PartialLimitConfig{PeerDefault: rcmgr.ResourceLimits{StreamsOutbound: 12}}
				m, err := rcmgr.NewResourceManager(rcmgr.NewFixedLimiter(limits.Build(rcmgr.DefaultLimits.AutoScale())))
				if err != nil {
					panic(err)
				}
				return libp2p.ResourceManager(m)
			},
			func(w *world) {
				for i := 0; ; i++ {
					s, err := w.a.Node.NewStream(allowing(w.ctx), w.b.ID(), sinkID)
					if err != nil {
						require.Greater(w, i, 4)
						return
					}
					_, err = s.Write([]byte{1})
					require.NoError(w, err)
				}
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			compare(t, func(w *world) {
				w.hostsWith(setup{limited: true, host: []libp2p.Option{c.limits()}}, setup{})
				w.dial(w.attempt(QUIC, 1, 0), w.back(TCP, 0, 10*time.Second))
				time.Sleep(2 * time.Second) // identify's streams end
				c.hold(w)
				time.Sleep(5 * time.Second)
				w.Freeze(w.a.IPs()[1], w.b.IPs()[1])
				w.until("TCP", 20*time.Second, func() bool { return w.a.on(TCP, w.b) != nil && w.b.on(TCP, w.a) != nil })
				tcp := w.a.on(TCP, w.b)
				time.Sleep(25 * time.Second)
				w.holds("the connection that lives is kept", !tcp.IsClosed())
				time.Sleep(35 * time.Second) // the transport has noticed by now that the other one is dead
				w.holds("the connection that lives is kept when the other is gone", !tcp.IsClosed())
				w.noteRequest("request", w.a, w.b, 5*time.Second, time.Second)
				w.noteRequest("request back", w.b, w.a, 5*time.Second, time.Second)
			})
		})
	}
}

// Each end has many streams when a second connection comes. Whatever moves, there is room
// for new ones, at both ends.
func TestManyStreamsOfBothEnds(t *testing.T) {
	for _, each := range [][2]int{{160, 160}, {300, 0}, {0, 300}, {1, 1}} {
		t.Run(fmt.Sprintf("%d and %d", each[0], each[1]), func(t *testing.T) {
			compare(t, func(w *world) {
				w.hosts(setup{quietLog: true})
				w.doubled(10 * time.Second)
				var chats []*chat
				for i, p := range [][2]*end{{w.a, w.b}, {w.b, w.a}} {
					for range each[i] {
						chats = append(chats, w.chat(p[0], p[1], 100, 5*time.Second))
					}
				}
				w.until("QUIC", 20*time.Second, func() bool { return w.a.on(QUIC, w.b) != nil })
				for i := range 4 {
					time.Sleep(6 * time.Second)
					w.noteRequest(fmt.Sprintf("request %d", i), w.a, w.b, 5*time.Second, time.Second)
					w.noteRequest(fmt.Sprintf("request back %d", i), w.b, w.a, 5*time.Second, time.Second)
				}
				w.noteAll("stream", chats, 10*time.Second, 2*time.Second)
				// Streams that do not move at once move when there is room; none moves to and fro.
				assert.LessOrEqual(w, mostMoved(chats), 1, "moves of one stream")
				for i, c := range chats {
					w.is(fmt.Sprintf("end of stream %d", i), c.finish(15*time.Second))
				}
			})
		})
	}
}

// Whoever allows a limited connection does not want one while there is another.
func TestNewStreamsAreNotOnALimitedRelay(t *testing.T) {
	for _, tr := range []Transport{TCP, QUIC} {
		t.Run(string(tr), func(t *testing.T) {
			compare(t, func(w *world) {
				w.hosts(setup{})
				w.relayed(true)
				stay := w.pinned(w.a, w.b, w.a.conns(w.b)[0], 10, time.Second) // so that the relay stays
				w.direct(tr, 1)
				for i := range 40 {
					time.Sleep(250 * time.Millisecond)
					if i == 10 { // nothing is answered for a while, and no more
						w.Freeze(w.a.IPs()[1], w.b.IPs()[1])
						time.AfterFunc(6*time.Second, func() { w.Thaw(w.a.IPs()[1], w.b.IPs()[1]) })
					}
					for _, p := range [][2]*end{{w.a, w.b}, {w.b, w.a}} {
						s, err := p[0].host.NewStream(allowing(w.ctx), p[1].ID(), sinkID)
						what := fmt.Sprintf("stream %d", i)
						if p[0] == w.b {
							what += " back"
						}
						w.is(what, err)
						if err == nil {
							w.holds(what+" is on the direct connection", !s.Conn().Stat().Limited)
							_ = s.Reset()
						}
					}
				}
				w.is("the stream on the relay", stay.state(5*time.Second))
			})
		})
	}
}
