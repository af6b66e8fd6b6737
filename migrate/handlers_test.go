package migrate

import (
	"context"
	"fmt"
	"io"
	"runtime"
	"sync/atomic"
	"testing"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
)

const hangID = "/test/hang/1.0.0"

// charged returns how many streams of the protocol n counts: for the protocol, and for it
// with the peer, which must be the same.
func charged(t testing.TB, n host.Host, p peer.ID) (inbound, outbound int) {
	t.Helper()
	rm := n.Network().ResourceManager()
	require.NoError(t, rm.ViewProtocol(hangID, func(s network.ProtocolScope) error {
		stat := s.Stat()
		inbound, outbound = stat.NumStreamsInbound, stat.NumStreamsOutbound
		return nil
	}))
	return inbound, outbound
}

// ofPeer returns how many streams n counts for the peer, of whatever protocol.
func ofPeer(t testing.TB, n host.Host, p peer.ID) (count int) {
	t.Helper()
	require.NoError(t, n.Network().ResourceManager().ViewPeer(p, func(s network.PeerScope) error {
		stat := s.Stat()
		count = stat.NumStreamsInbound + stat.NumStreamsOutbound
		return nil
	}))
	return count
}

// TestHandlerThatHangsCosts: an accepted stream costs exactly one until its handler has
// returned, whatever becomes of the stream and its connection meanwhile, and wherever it
// has moved; and nothing after that.
func TestHandlerThatHangsCosts(t *testing.T) {
	moves := func(side, to int) func(*testing.T, *pair, [2]*Stream) {
		return func(t *testing.T, p *pair, s [2]*Stream) {
			require.NoError(t, p.migrate(context.Background(), side, s[side], to))
			WaitFor(t, "the old stream to be let go of", func() bool {
				return len(ofProtocol(p.conns[0][1-to])) == 0 && len(ofProtocol(p.conns[1][1-to])) == 0
			})
		}
	}
	closes := func(i int) func(*testing.T, *pair, [2]*Stream) {
		return func(t *testing.T, p *pair, _ [2]*Stream) {
			require.NoError(t, p.conns[0][i].Close())
			WaitFor(t, "the connection to be gone at the other end", func() bool {
				return len(p.hosts[1].Network().ConnsToPeer(p.hosts[0].ID())) == 1
			})
		}
	}
	over := func(t *testing.T, _ *pair, s [2]*Stream) { require.NoError(t, s[1].takeOver()) }
	for name, what := range map[string][]func(*testing.T, *pair, [2]*Stream){
		"nothing":                                  {},
		"the peer closes the connection":           {closes(0)},
		"the handler closes":                       {func(_ *testing.T, _ *pair, s [2]*Stream) { _ = s[1].Close() }},
		"the handler resets":                       {func(_ *testing.T, _ *pair, s [2]*Stream) { _ = s[1].Reset() }},
		"the peer resets":                          {func(_ *testing.T, _ *pair, s [2]*Stream) { _ = s[0].Reset() }},
		"it hangs long":                            {over},
		"it hangs long, and the connection closes": {over, closes(0)},
		"it hangs long, and the handler closes":    {over, func(_ *testing.T, _ *pair, s [2]*Stream) { _ = s[1].Close() }},
		"it hangs long and moves":                  {over, moves(opener, 1)},
		"the opener moves it":                      {moves(opener, 1)},
		"the acceptor moves it":                    {moves(acceptor, 1)},
		"it moves, and the new connection closes":  {moves(opener, 1), closes(1)},
		"it moves, and the old connection closes":  {moves(acceptor, 1), closes(0)},
		"it moves there and back":                  {moves(opener, 1), moves(acceptor, 0)},
		"it moves, and the handler closes": {moves(opener, 1),
			func(_ *testing.T, _ *pair, s [2]*Stream) { _ = s[1].Close() }},
		"it moves, and the handler resets": {moves(acceptor, 1),
			func(_ *testing.T, _ *pair, s [2]*Stream) { _ = s[1].Reset() }},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, TCP, QUIC)
			handles, returns := make(chan *Stream, 1), make(chan struct{})
			p.hosts[1].SetStreamHandler(hangID, func(s network.Stream) {
				_, _ = s.Read(make([]byte, 1))
				handles <- s.(*Stream)
				<-returns
			})
			near := p.openOn(t, hangID, 0)
			_, err := near.Write([]byte{1})
			require.NoError(t, err)
			s := [2]*Stream{near, <-handles}
			for _, do := range what {
				do(t, p, s)
				WaitFor(t, "one stream to be counted", func() bool {
					in, out := charged(t, p.hosts[1], p.hosts[0].ID())
					return in == 1 && out == 0 && ofPeer(t, p.hosts[1], p.hosts[0].ID()) == 1
				})
			}
			in, _ := charged(t, p.hosts[1], p.hosts[0].ID())
			require.Equal(t, 1, in)
			close(returns)
			_, _ = s[0].Close(), s[1].Close()
			for i, h := range p.hosts {
				WaitFor(t, "nothing to be counted any more", func() bool {
					in, out := charged(t, h, p.hosts[1-i].ID())
					return in == 0 && out == 0
				})
			}
			WaitFor(t, "nothing to be counted for the peer any more", func() bool {
				return ofPeer(t, p.hosts[1], p.hosts[0].ID()) == 0
			})
		})
	}
}

// ofProtocol returns the streams of the test's protocol on c, as the swarm lists them.
func ofProtocol(c network.Conn) (on []network.Stream) {
	for _, s := range c.GetStreams() {
		if s.Protocol() == hangID {
			on = append(on, s)
		}
	}
	return on
}

// TestLimitHoldsForHandlersThatHang: a host that may have ten streams has no more than ten
// handlers running, though every peer closes its connection as soon as its handler
// runs, or moves its stream before that, or the handler has closed the stream.
func TestLimitHoldsForHandlersThatHang(t *testing.T) {
	const limit = 10
	for _, tr := range []Transport{TCP, QUIC} {
		for _, closes := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, handler closes: %t", tr, closes), func(t *testing.T) {
				var cfg rcmgr.PartialLimitConfig
				cfg.System.Streams = limit
				rm, err := rcmgr.NewResourceManager(rcmgr.NewFixedLimiter(cfg.Build(rcmgr.InfiniteLimits)))
				require.NoError(t, err)
				server, err := Wrap(New(t, []Transport{tr}, libp2p.ResourceManager(rm)))
				require.NoError(t, err)
				var running atomic.Int32
				returns := make(chan struct{})
				server.SetStreamHandler(hangID, func(s network.Stream) {
					running.Add(1)
					defer running.Add(-1)
					_, _ = s.Write([]byte{42})
					if closes {
						_ = s.Close()
					}
					<-returns
				})
				connect := func() *Host {
					rm, err := rcmgr.NewResourceManager(rcmgr.NewFixedLimiter(rcmgr.InfiniteLimits))
					require.NoError(t, err)
					client, err := Wrap(New(t, nil, libp2p.ResourceManager(rm)))
					require.NoError(t, err)
					client.Peerstore().AddAddrs(server.ID(), server.Addrs(), peerstore.PermanentAddrTTL)
					return client
				}
				served := func(client *Host) bool {
					s, err := client.NewStream(context.Background(), server.ID(), hangID)
					if err != nil {
						return false
					}
					_, err = io.ReadFull(s, make([]byte, 1))
					return err == nil
				}
				// Identify needs a stream, too: who meets the limit there gets none.
				n := 0
				for range 4 * limit {
					client := connect()
					if served(client) {
						n++
					}
					require.NoError(t, client.Close())
					require.LessOrEqual(t, int(running.Load()), limit)
				}
				require.Equal(t, limit, n, "as many as the limit allows are served")
				require.Equal(t, limit, int(running.Load()))
				client := connect()
				require.False(t, served(client))
				close(returns)
				WaitFor(t, "a stream to be served again", func() bool { return served(client) })
			})
		}
	}
}

// TestHandlerThatEndsItsGoroutine: a handler may call runtime.Goexit, as a failing test does.
// What its stream costs comes to an end all the same.
func TestHandlerThatEndsItsGoroutine(t *testing.T) {
	p := newPair(t, TCP, QUIC)
	p.hosts[1].SetStreamHandler(hangID, func(s network.Stream) {
		_, _ = s.Read(make([]byte, 1))
		_ = s.Reset()
		runtime.Goexit()
	})
	s := p.openOn(t, hangID, 0)
	_, err := s.Write([]byte{1})
	require.NoError(t, err)
	_, err = io.ReadAll(s)
	require.Error(t, err)
	WaitFor(t, "nothing to be counted any more", func() bool {
		in, _ := charged(t, p.hosts[1], p.hosts[0].ID())
		return in == 0
	})
}
