package simtest

import (
	"io"
	"net"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	msmux "github.com/multiformats/go-multistream"
	"github.com/stretchr/testify/require"
)

const (
	ipA  = "1.0.0.1"
	ipA2 = "1.0.0.2"
	ipB  = "1.0.1.1"
	ipB2 = "1.0.1.2"
	ipR  = "1.0.2.1"

	echoID protocol.ID = "/test/echo/1.0.0"
)

// echo opens a stream on c to b, who sends back what comes.
func echo(t *testing.T, b *Node, c network.Conn) network.Stream {
	t.Helper()
	b.SetStreamHandler(echoID, func(s network.Stream) {
		_, _ = io.Copy(s, s)
		_ = s.Close()
	})
	s, err := c.NewStream(t.Context())
	require.NoError(t, err)
	require.NoError(t, msmux.SelectProtoOrFail(echoID, s))
	return s
}

// ping returns how long size bytes take there and back.
func ping(t *testing.T, s network.Stream, size int) time.Duration {
	t.Helper()
	start := time.Now()
	written := make(chan error, 1)
	go func() {
		_, err := s.Write(make([]byte, size))
		written <- err
	}()
	_, err := io.ReadFull(s, make([]byte, size))
	require.NoError(t, err)
	require.NoError(t, <-written)
	return time.Since(start)
}

var transports = []Transport{TCP, QUIC}

// join returns two nodes with a connection over each transport, the first in the list
// from ipA to ipB, the second between their other IPs.
func join(t *testing.T, n *Net) (a, b *Node, conns map[Transport]network.Conn) {
	t.Helper()
	a, b = n.NewNode([]string{ipA, ipA2}), n.NewNode([]string{ipB, ipB2})
	first, second := n.Join(a, b, Path{TCP, ipA, ipB}, Path{QUIC, ipB2, ipA2})
	return a, b, map[Transport]network.Conn{TCP: first, QUIC: second}
}

var ipsOf = map[Transport][2]string{TCP: {ipA, ipB}, QUIC: {ipA2, ipB2}}

func TestLatencyIsExact(t *testing.T) {
	Run(t, func(t *testing.T, n *Net) {
		_, b, conns := join(t, n)
		for _, tr := range transports {
			ips := ipsOf[tr]
			n.SetLatency(ips[0], ips[1], 7*time.Millisecond)
			s := echo(t, b, conns[tr])
			time.Sleep(time.Second)
			require.Equal(t, 14*time.Millisecond, ping(t, s, 100), tr)
			n.SetLatency(ips[1], ips[0], 40*time.Millisecond)
			require.Equal(t, 80*time.Millisecond, ping(t, s, 100), tr)
			require.NoError(t, s.Close())
		}
	})
}

// However many packets arrive in one instant, a socket is given a burst of them at most
// before the rest of the world has done with it.
func TestPacketsComeInBursts(t *testing.T) {
	const packets, latency = 10*burst + 1, 7 * time.Millisecond
	Run(t, func(t *testing.T, n *Net) {
		n.SetLatency(ipA, ipB, latency)
		a := n.listenUDP(&net.UDPAddr{IP: net.ParseIP(ipA), Port: 4001})
		b := n.listenUDP(&net.UDPAddr{IP: net.ParseIP(ipB), Port: 4001})
		defer a.Close()
		defer b.Close()
		for range 2 { // the second time long after the first
			start := time.Now()
			go func() {
				for i := range packets {
					_, _ = a.WriteTo([]byte{byte(i)}, b.LocalAddr())
				}
			}()
			at := make(map[time.Duration]int)
			for i := range packets {
				got := make([]byte, 2)
				size, _, err := b.ReadFrom(got)
				require.NoError(t, err)
				require.Equal(t, []byte{byte(i)}, got[:size])
				at[time.Since(start)-latency]++
			}
			want := make(map[time.Duration]int)
			for i := range packets {
				want[time.Duration(i/burst)*time.Nanosecond]++
			}
			require.Equal(t, want, at)
			time.Sleep(time.Second)
		}
	})
}

func TestFarIsTheOtherSide(t *testing.T) {
	Run(t, func(t *testing.T, n *Net) {
		a, b, conns := join(t, n)
		for _, c := range conns {
			far := n.Far(b, c)
			require.Equal(t, c.RemoteMultiaddr(), far.LocalMultiaddr())
			require.Equal(t, c, n.Far(a, far))
		}
	})
}

// All four connections come to be, at both ends, whoever is first.
func TestDialTogether(t *testing.T) {
	Run(t, func(t *testing.T, n *Net) {
		n.SetLatency(ipA, ipB, 50*time.Millisecond)
		a, b := n.NewNode([]string{ipA, ipA2}), n.NewNode([]string{ipB, ipB2})
		for _, err := range n.DialTogether(
			Attempt{From: a, To: b, Path: Path{TCP, ipA, ipB}, After: time.Second},
			Attempt{From: a, To: b, Path: Path{QUIC, ipA2, ipB2}},
			Attempt{From: b, To: a, Path: Path{TCP, ipB2, ipA2}, After: 3 * time.Second},
			Attempt{From: b, To: a, Path: Path{QUIC, ipB, ipA}},
		) {
			require.NoError(t, err)
		}
		identified(a, b)
		for _, pair := range [][2]*Node{{a, b}, {b, a}} {
			require.Len(t, pair[0].Network().ConnsToPeer(pair[1].ID()), 4)
		}
	})
}

func TestBandwidthOfTCP(t *testing.T) {
	Run(t, func(t *testing.T, n *Net) {
		n.SetBandwidth(ipA, 80_000_000)
		n.SetBandwidth(ipB, 8_000_000)
		_, b, conns := join(t, n)
		s := echo(t, b, conns[TCP])
		took := ping(t, s, 1_000_000)
		require.Greater(t, took, time.Second)
		require.Less(t, took, 1300*time.Millisecond, "a second there; but for its last frames the echo overlaps with that")
	})
}

func TestFrozenTCPGoesOn(t *testing.T) {
	Run(t, func(t *testing.T, n *Net) {
		_, b, conns := join(t, n)
		s := echo(t, b, conns[TCP])
		n.Freeze(ipB, ipA)
		time.AfterFunc(5*time.Second, func() { n.Thaw(ipA, ipB) })
		require.Equal(t, 5*time.Second, ping(t, s, 100))
	})
}

func TestFrozenQUICEnds(t *testing.T) {
	Run(t, func(t *testing.T, n *Net) {
		_, b, conns := join(t, n)
		s := echo(t, b, conns[QUIC])
		time.Sleep(time.Second)
		n.Freeze(ipA2, ipB2)
		start := time.Now()
		_, err := s.Read(make([]byte, 1))
		require.Error(t, err)
		took := time.Since(start)
		require.Greater(t, took, 30*time.Second, "QUIC's idle timeout")
		require.Less(t, took, 46*time.Second, "that, and a keep-alive before it that came to nothing")
		require.False(t, conns[TCP].IsClosed(), "the other link carries on")
	})
}

func TestSeveredTCPEndsAtOnce(t *testing.T) {
	Run(t, func(t *testing.T, n *Net) {
		_, b, conns := join(t, n)
		n.SetLatency(ipA, ipB, time.Hour)
		far := n.Far(b, conns[TCP])
		n.Sever(ipA, ipB)
		time.Sleep(time.Millisecond)
		require.True(t, conns[TCP].IsClosed())
		require.True(t, far.IsClosed())
		require.False(t, conns[QUIC].IsClosed())
	})
}

func TestSentCountsBothWays(t *testing.T) {
	Run(t, func(t *testing.T, n *Net) {
		_, b, conns := join(t, n)
		for _, tr := range transports {
			s := echo(t, b, conns[tr])
			time.Sleep(time.Second) // identify tells both ends of each handler that is set
			for i, from := range ipsOf[tr] {
				to := ipsOf[tr][1-i]
				before := n.Sent(from, to)
				ping(t, s, 10_000)
				after := n.Sent(from, to)
				require.InDelta(t, 10_400, after.Bytes-before.Bytes, 400, "%s %s-%s", tr, from, to)
				require.Greater(t, after.Packets, before.Packets)
			}
		}
	})
}

func TestRelayedBesideDirect(t *testing.T) {
	for _, limited := range []bool{true, false} {
		for _, tr := range transports {
			Run(t, func(t *testing.T, n *Net) {
				n.SetLatency(ipA, ipR, 40*time.Millisecond)
				n.SetLatency(ipB, ipR, 60*time.Millisecond)
				var opts []relay.Option
				if !limited {
					opts = append(opts, relay.WithInfiniteLimits())
				}
				r := n.NewRelay(ipR, opts...)
				a, b := n.NewNode([]string{ipA}), n.NewNode([]string{ipB})
				relayed := n.DialRelayed(a, b, r, tr)
				require.Equal(t, limited, relayed.Stat().Limited)
				direct := n.Dial(a, b, Path{tr, ipA, ipB})
				ctx := network.WithAllowLimitedConn(t.Context(), "test")
				b.SetStreamHandler(echoID, func(s network.Stream) { _, _ = io.Copy(s, s); _ = s.Close() })
				for c, rtt := range map[network.Conn]time.Duration{relayed: 200 * time.Millisecond, direct: 0} {
					s, err := c.NewStream(ctx)
					require.NoError(t, err)
					require.NoError(t, msmux.SelectProtoOrFail(echoID, s))
					require.Equal(t, rtt, ping(t, s, 100))
					require.NoError(t, s.Close())
				}
			})
		}
	}
}

func TestSeveredEndIsToldToTheOther(t *testing.T) {
	Run(t, func(t *testing.T, n *Net) {
		_, b, conns := join(t, n)
		n.SetLatency(ipA, ipB, time.Second)
		far := n.Far(b, conns[TCP])
		n.SeverEnd(ipA, ipB)
		time.Sleep(time.Millisecond)
		require.True(t, conns[TCP].IsClosed())
		require.False(t, far.IsClosed(), "the news are on their way")
		time.Sleep(time.Second)
		require.True(t, far.IsClosed())
		require.False(t, conns[QUIC].IsClosed())
	})
}

func TestWatchSeesWhatIsAboutToBeSent(t *testing.T) {
	Run(t, func(t *testing.T, n *Net) {
		_, b, conns := join(t, n)
		for _, tr := range transports {
			s := echo(t, b, conns[tr])
			ping(t, s, 1)
			from, to := ipsOf[tr][0], ipsOf[tr][1]
			n.Watch(func(f, t string) {
				if f == from && t == to {
					n.Freeze(from, to)
				}
			})
			_, err := s.Write([]byte{1})
			require.NoError(t, err)
			require.NoError(t, s.SetReadDeadline(time.Now().Add(time.Second)))
			_, err = s.Read(make([]byte, 1))
			require.Error(t, err, "%s: frozen before it left", tr)
			n.Watch(nil)
			n.Thaw(from, to)
		}
	})
}

func TestNodeThatIsMadeAgain(t *testing.T) {
	Run(t, func(t *testing.T, n *Net) {
		a, b, conns := join(t, n)
		b.Stop()
		time.Sleep(time.Second)
		require.True(t, conns[TCP].IsClosed())
		require.True(t, conns[QUIC].IsClosed())
		again := n.NewNode([]string{ipB, ipB2})
		require.Equal(t, b.ID(), again.ID())
		for _, tr := range transports {
			c := n.Dial(a, again, Path{tr, ipsOf[tr][0], ipsOf[tr][1]})
			ping(t, echo(t, again, c), 100)
			require.NoError(t, c.Close())
			time.Sleep(time.Second)
		}
	})
}

func TestNarrowSwallowsWhatIsLarge(t *testing.T) {
	for _, tr := range transports {
		Run(t, func(t *testing.T, n *Net) {
			_, b, conns := join(t, n)
			s := echo(t, b, conns[tr])
			ping(t, s, 20_000)
			from, to := ipsOf[tr][0], ipsOf[tr][1]
			n.Narrow(from, to, 1000)
			ping(t, s, 100)
			start := time.Now()
			time.AfterFunc(5*time.Second, func() { n.Widen(to, from) })
			ping(t, s, 20_000)
			require.GreaterOrEqual(t, time.Since(start), 5*time.Second, "%s: what is large has passed", tr)
		})
	}
}

func TestReplicaHasTheKeyOfAnother(t *testing.T) {
	Run(t, func(t *testing.T, n *Net) {
		a, b := n.NewNode([]string{ipA}), n.NewNode([]string{ipB})
		again := n.NewReplica(ipB, []string{ipB2})
		require.Equal(t, b.ID(), again.ID())
		one, other := n.Dial(b, a, Path{TCP, ipB, ipA}), n.Dial(again, a, Path{TCP, ipB2, ipA})
		require.Len(t, a.Network().ConnsToPeer(b.ID()), 2)
		require.False(t, one.IsClosed())
		require.False(t, other.IsClosed())
	})
}
