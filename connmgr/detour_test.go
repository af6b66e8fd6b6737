package connmgr

import (
	"context"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/migrate"
)

// What the streams of a connection carry, second by second, and when it is asked.
func TestWhenAConnectionIsAsked(t *testing.T) {
	type look struct {
		traffic
		idle bool // nobody waits
		asks bool
	}
	sent := func(n uint64) look { return look{traffic: traffic{sent: n}} }
	got := func(sent, received uint64) look { return look{traffic: traffic{sent: sent, received: received}} }
	asks := func(l look) look { l.asks = true; return l }
	idle := func(l look) look { l.idle = true; return l }
	packets := func(n uint64, l look) look { l.packets = n; return l }
	for name, looks := range map[string][]look{
		"nothing was sent":                        {sent(0), sent(0), sent(0), sent(0), sent(0)},
		"a request without an answer":             {sent(1), sent(1), asks(sent(1)), asks(sent(1))},
		"its answer, and then nothing":            {sent(1), got(1, 1), got(1, 1), got(1, 1), got(1, 1), got(1, 1)},
		"nobody waits for an answer":              {idle(sent(1)), idle(sent(1)), idle(sent(1)), idle(sent(1))},
		"packets came that show that it is there": {sent(1), packets(1, sent(1)), packets(1, sent(1)), asks(packets(1, sent(1)))},
		"messages that come now and then":         {got(0, 1), got(0, 1), got(0, 1), got(0, 2), got(0, 2), got(0, 2), got(0, 2)},
		"a transfer that stops":                   {got(0, 1), got(0, 2), got(0, 3), got(0, 4), got(0, 4), asks(got(0, 4))},
		"a Write that does not return": {{traffic: traffic{blocked: true}}, {traffic: traffic{blocked: true}},
			{traffic: traffic{blocked: true}, asks: true}},
		"other streams, on which something may be sent": {sent(0), {traffic: traffic{of: 7}}, {traffic: traffic{of: 7}}, {traffic: traffic{of: 7}, asks: true}},
	} {
		t.Run(name, func(t *testing.T) {
			now := time.Now()
			w := waiting{since: now}
			for i, l := range looks {
				now = now.Add(time.Second)
				come := l.packets
				require.Equal(t, l.asks, w.look(now, l.traffic, !l.idle, func() uint64 { return come }), "look %d", i)
			}
		})
	}
}

// A peer that answers every question, and whose streams bring nothing, is asked less and less
// often; but not where it does answer a request.
func TestQuestionsBackOff(t *testing.T) {
	var d detours
	now := time.Now()
	var asked []time.Duration
	var c network.Conn = &fakeConn{}
	start := now
	for i := range 120 { // a message is sent each second, and nothing comes back
		now = now.Add(time.Second)
		if d.seesOne(now, c, traffic{sent: uint64(i)}) {
			asked = append(asked, now.Sub(start))
			d.cleared(c)
		}
	}
	require.Greater(t, len(asked), 6)
	require.Less(t, len(asked), 12)
	require.Equal(t, maxDetourWait+detourLook, asked[len(asked)-1]-asked[len(asked)-2])

	now = now.Add(time.Second)
	require.False(t, d.seesOne(now, c, traffic{sent: 200}))
	now = now.Add(time.Second)
	require.False(t, d.seesOne(now, c, traffic{sent: 200, received: 1}), "an answer")
	now = now.Add(time.Second)
	require.False(t, d.seesOne(now, c, traffic{sent: 201, received: 1}))
	now = now.Add(detourWait)
	require.True(t, d.seesOne(now, c, traffic{sent: 201, received: 1}), "this is not usual here")
	since, _ := d.of(c)
	require.Equal(t, now.Add(-detourWait), since)
	require.False(t, d.seesOne(now.Add(time.Second), c, traffic{sent: 201, received: 2}))
	since, _ = d.of(c)
	require.True(t, since.IsZero(), "something has come")
	require.Zero(t, d.suspect.Load())
}

func (d *detours) seesOne(now time.Time, c network.Conn, t traffic) bool {
	all := map[network.Conn]*migrate.Traffic{c: {Received: t.received, Sent: t.sent, Waits: true}}
	return len(d.sees(now, all, func(network.Conn) uint64 { return 0 })) > 0
}

// A host dials a peer that it is connected to, and has both connections then. Nothing else in
// it sees the first one closed.
func TestDialBesideAConnection(t *testing.T) {
	m, err := New(nil)
	require.NoError(t, err)
	a, b := newNode(t, libp2p.ConnectionManager(m), m.Detours()), newNode(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	require.NoError(t, a.Connect(ctx, peer.AddrInfo{ID: b.ID(), Addrs: b.Addrs()}))
	conns := a.Network().ConnsToPeer(b.ID())
	require.Len(t, conns, 1)
	a.Peerstore().AddAddrs(b.ID(), b.Addrs(), peerstore.PermanentAddrTTL)
	s, err := a.NewStream(ctx, b.ID(), echo)
	require.NoError(t, err)
	defer s.Reset()

	require.NoError(t, m.detours.asides.dial(ctx, a.Network(), b.ID(), conns))
	require.Len(t, a.Network().ConnsToPeer(b.ID()), 2)
	require.False(t, conns[0].IsClosed())
	require.Equal(t, network.Connected, a.Network().Connectedness(b.ID()))
	_, err = s.Write([]byte("still here"))
	require.NoError(t, err)
	_, err = s.Read(make([]byte, 5))
	require.NoError(t, err)

	require.ErrorIs(t, m.detours.asides.dial(ctx, b.Network(), a.ID(), b.Network().ConnsToPeer(a.ID())), errOther,
		"a host without Detours has none to set aside")
	require.Empty(t, m.detours.asides.dialled)
}

// A dial that fails leaves everything as it was, and the next dial is not put off by it.
func TestDialBesideThatFails(t *testing.T) {
	m, err := New(nil)
	require.NoError(t, err)
	a, b := newNode(t, libp2p.ConnectionManager(m), m.Detours()), newNode(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	require.NoError(t, a.Connect(ctx, peer.AddrInfo{ID: b.ID(), Addrs: b.Addrs()}))
	conns := a.Network().ConnsToPeer(b.ID())
	nobody := ma.StringCast("/ip4/127.0.0.1/tcp/1")
	a.Peerstore().ClearAddrs(b.ID())
	a.Peerstore().AddAddr(b.ID(), nobody, peerstore.PermanentAddrTTL)
	require.Error(t, m.detours.asides.dial(ctx, a.Network(), b.ID(), conns))
	require.Equal(t, conns, a.Network().ConnsToPeer(b.ID()))
	require.False(t, conns[0].IsClosed())
	require.False(t, a.Network().(*swarm.Swarm).Backoff().Backoff(b.ID(), nobody))
}

// Enable has detours in it, unless it is told otherwise.
func TestEnableHasDetours(t *testing.T) {
	for name, test := range map[string]struct {
		opts []Option
		has  bool
	}{
		"by default": {nil, true},
		"without":    {[]Option{WithoutDetours()}, false},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := newNode(t, Enable(test.opts...)), newNode(t)
			m, ok := Of(a.Host)
			require.True(t, ok)
			require.NoError(t, a.Connect(t.Context(), peer.AddrInfo{ID: b.ID(), Addrs: b.Addrs()}))
			_, aside := asideOf(a.Network().ConnsToPeer(b.ID())[0])
			require.Equal(t, test.has, aside)
			require.Equal(t, test.has, m.detours.asides.wrapped.Load())
		})
	}
}
