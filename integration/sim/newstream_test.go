package sim

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/migrate"
)

// streamKinds are the streams that a wrapped host opens.
var streamKinds = []struct {
	name string
	ctx  func(context.Context) context.Context
}{
	{"labelled", func(ctx context.Context) context.Context { return ctx }},
	{"without a label", migrate.WithoutLabel},
}

// steer makes i the connection that streams are to be opened on.
func (p *pair) steer(i int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.open = i
}

// makeRoom has the side let go of some streams that the other end has opened: it is who
// gives the credit.
func (p *pair) makeRoom(side, i, streams int) {
	for _, u := range p.conns[side][i].GetStreams()[:streams] {
		_ = u.Reset()
	}
}

// opens opens a stream from that side, and says how long it took.
func (p *pair) opens(ctx context.Context, side int) (network.Stream, time.Duration) {
	p.t.Helper()
	start := time.Now()
	s, err := p.hosts[side].NewStream(ctx, p.nodes[1-side].ID(), testID)
	require.NoError(p.t, err)
	return s, time.Since(start)
}

// A connection whose credit for streams is used up, of which the selector does not know,
// costs the first stream a few milliseconds, and the others nothing: they go to the other
// connection, from where they can move later. When there is room again, it is used again.
func TestNewStreamBesideFullQUIC(t *testing.T) {
	const oneWay = 10 * time.Millisecond
	for _, kind := range streamKinds {
		eachSide(t, func(t *testing.T, side int) {
			t.Run(kind.name, func(t *testing.T) {
				Run(t, func(t *testing.T, n *Net) {
					p := newPair(t, n, way{tcp, oneWay}, way{quic, oneWay}, unlimited(t))
					p.hosts[1-side].SetStreamHandler(testID, answer(1))
					for i := range p.conns[side] { // it is known now that each can have labels
						p.steer(i)
						s, _ := p.opens(t.Context(), side)
						ask(1)(t, s)
						require.NoError(t, s.Close())
					}
					held := p.fill(side, 1)
					time.Sleep(time.Minute)

					ctx := kind.ctx(t.Context())
					for i := range 100 {
						s, took := p.opens(ctx, side)
						require.True(t, p.conns[side][0] == s.Conn(), "QUIC is full, and the stream is on %s", s.Conn().RemoteMultiaddr())
						if i == 0 {
							require.LessOrEqual(t, took, 4*oneWay, "no longer than it takes to be sure: QUIC never opens it")
						} else {
							require.Zero(t, took)
						}
						ask(1)(t, s)
						require.NoError(t, s.Reset())
					}

					p.makeRoom(1-side, 1, 10)
					time.Sleep(time.Second)
					for range 5 {
						s, took := p.opens(ctx, side)
						require.True(t, p.conns[side][1] == s.Conn(), "there is room on QUIC, and the stream is on %s", s.Conn().RemoteMultiaddr())
						require.Zero(t, took)
						ask(1)(t, s)
					}
					require.Len(t, p.conns[side][1].GetStreams(), len(held)+5, "an attempt that was late has left nothing")
				})
			})
		})
	}
}

// yamux lets 256 streams be opened within a round trip. The swarm prefers the connection
// that has the most, so a plain host waits there; a wrapped one goes elsewhere.
func TestNewStreamBeyondBacklog(t *testing.T) {
	const oneWay = 50 * time.Millisecond
	burst := func(t *testing.T, n *Net, wrapped bool) (took time.Duration) {
		p := newPlainPair(t, n, way{tcp, oneWay}, way{quic, oneWay}, unlimited(t))
		h := host.Host(p.nodes[0])
		p.nodes[1].SetStreamHandler(testID, answer(1))
		time.Sleep(time.Second)
		if wrapped {
			p.wrap(0)
			p.wrap(1)
			h = p.hosts[0]
		}
		for range 256 {
			_, err := p.conns[0][0].NewStream(t.Context())
			require.NoError(t, err)
		}
		start := time.Now()
		for range 200 {
			s, err := h.NewStream(migrate.WithoutLabel(t.Context()), p.nodes[1].ID(), testID)
			require.NoError(t, err)
			if wrapped {
				require.True(t, p.conns[0][1] == s.Conn(), "the other connection is free")
			}
		}
		return time.Since(start)
	}
	var plain, wrapped time.Duration
	Run(t, func(t *testing.T, n *Net) { plain = burst(t, n, false) })
	Run(t, func(t *testing.T, n *Net) { wrapped = burst(t, n, true) })
	require.GreaterOrEqual(t, plain, 2*oneWay, "or the test tests nothing")
	require.Less(t, wrapped, 2*oneWay, "a round trip, after which yamux takes the next")
}

// Where no connection opens a stream at once NewStream waits as the plain host does, on
// the connection of the swarm's choice, with all the time that its context has.
func TestNewStreamWhereAllAreFull(t *testing.T) {
	for _, kind := range streamKinds {
		t.Run(kind.name, func(t *testing.T) {
			Run(t, func(t *testing.T, n *Net) {
				p := newPair(t, n, way{quic, ms(10)}, way{quic, ms(10)}, unlimited(t))
				p.hosts[1].SetStreamHandler(testID, answer(1))
				time.Sleep(time.Second)
				p.fill(0, 0)
				p.fill(0, 1)
				time.Sleep(time.Minute)
				p.steer(0)
				for _, deadline := range []time.Duration{ms(100), 3 * time.Second} {
					ctx, cancel := context.WithTimeout(kind.ctx(t.Context()), deadline)
					start := time.Now()
					_, err := p.hosts[0].NewStream(ctx, p.nodes[1].ID(), testID)
					cancel()
					require.ErrorIs(t, err, context.DeadlineExceeded)
					require.Equal(t, deadline, time.Since(start))
				}
				go func() {
					time.Sleep(time.Second)
					p.makeRoom(1, 0, 4)
					p.makeRoom(1, 1, 4)
				}()
				start := time.Now()
				_, err := p.hosts[0].NewStream(kind.ctx(t.Context()), p.nodes[1].ID(), testID)
				require.NoError(t, err)
				require.Less(t, time.Since(start), 1100*time.Millisecond)
			})
		})
	}
}

// A peer that answers nothing, neither identify nor a negotiation, holds NewStream for as
// long as it would hold the plain host's.
func TestNewStreamToSilentPeer(t *testing.T) {
	whole := func(d *Node) host.Host { return d.Host }
	hiding := func(d *Node) host.Host { return d } // its identify service
	for _, via := range []Transport{TCP, QUIC} {
		for _, given := range []time.Duration{0, time.Second, 7 * time.Second} {
			t.Run(fmt.Sprintf("%s, deadline %s", via, given), func(t *testing.T) {
				silence := func(t *testing.T, n *Net, wraps func(*Node) host.Host) (took time.Duration, msg string) {
					a, b := n.NewNode(ipsOfA[:1]), n.NewNode(ipsOfB[:1])
					b.Network().SetStreamHandler(func(network.Stream) {})
					h := host.Host(a)
					if wraps != nil {
						mh, err := migrate.Wrap(wraps(a))
						require.NoError(t, err)
						h = mh
					}
					ctx := t.Context()
					if given > 0 {
						var cancel context.CancelFunc
						ctx, cancel = context.WithTimeout(ctx, given)
						defer cancel()
					}
					a.Peerstore().AddAddr(b.ID(), Addr(via, ipsOfB[0]), time.Hour)
					start := time.Now()
					_, err := h.NewStream(ctx, b.ID(), testID)
					require.Error(t, err)
					return time.Since(start), err.Error()
				}
				var plain time.Duration
				var plainMsg string
				Run(t, func(t *testing.T, n *Net) { plain, plainMsg = silence(t, n, nil) })
				for _, wraps := range []func(*Node) host.Host{whole, hiding} {
					Run(t, func(t *testing.T, n *Net) {
						took, msg := silence(t, n, wraps)
						require.Equal(t, plain, took)
						require.Equal(t, plainMsg, msg)
					})
				}
			})
		}
	}
}

// closesAtOnce is a notifiee that closes what comes, and counts it.
type closesAtOnce struct {
	network.NoopNotifiee
	n int
}

func (c *closesAtOnce) Connected(_ network.Network, conn network.Conn) {
	c.n++
	_ = conn.Close()
}

// A peer that takes a connection and closes it is dialled as often as by a plain host.
func TestNewStreamDialsOnce(t *testing.T) {
	dials := func(t *testing.T, n *Net, via Transport, wrapped bool) int {
		a, b := n.NewNode(ipsOfA[:1]), n.NewNode(ipsOfB[:1])
		n.SetLatency(ipsOfA[0], ipsOfB[0], ms(10))
		counts := new(closesAtOnce)
		b.Network().Notify(counts)
		h := host.Host(a)
		if wrapped {
			mh, err := migrate.Wrap(a)
			require.NoError(t, err)
			h = mh
		}
		a.Peerstore().AddAddr(b.ID(), Addr(via, ipsOfB[0]), time.Hour)
		_, err := h.NewStream(t.Context(), b.ID(), testID)
		require.Error(t, err)
		time.Sleep(time.Minute)
		return counts.n
	}
	for _, via := range []Transport{TCP, QUIC} {
		t.Run(string(via), func(t *testing.T) {
			Run(t, func(t *testing.T, n *Net) { require.Equal(t, 1, dials(t, n, via, false)) })
			Run(t, func(t *testing.T, n *Net) { require.Equal(t, 1, dials(t, n, via, true)) })
		})
	}
}
