// Package sim tests whole hosts in virtual time, where a round trip takes exactly as
// long as the test says: how long a migration takes, in round trips, and what the
// application sees of it.
package sim

import (
	"context"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	msmux "github.com/multiformats/go-multistream"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/migrate"
)

const (
	testID   protocol.ID = "/test/1.0.0"
	rawID    protocol.ID = "/test/raw/1.0.0"
	warmUpID protocol.ID = "/test/warm-up/1.0.0"
)

// Both nodes have two IPs, so that each of two paths between them has a link of its own:
//
//	 1.0.0.1 ------------- 1.0.1.1
//	a                             b
//	 1.0.0.2 ------------- 1.0.1.2
//
// A relayed path goes from 1.0.0.1 over 1.0.2.1 to 1.0.1.1.
var (
	ipsOfA  = []string{"1.0.0.1", "1.0.0.2"}
	ipsOfB  = []string{"1.0.1.1", "1.0.1.2"}
	ipRelay = "1.0.2.1"
)

// way says what a connection runs over, and how long it takes one way.
type way struct {
	via    string
	oneWay time.Duration
}

const (
	tcp     = string(TCP)
	quic    = string(QUIC)
	relayed = "relay"
)

// pair is two wrapped hosts with two connections between them. Of every array, index 0
// is a's, who opens the streams, and 1 is b's.
type pair struct {
	*Net
	t     *testing.T
	ways  [2]way
	nodes [2]*Node
	hosts [2]*migrate.Host
	conns [2][2]network.Conn // conns[side][i] is the side's end of connection i
	logs  [2]*events

	mu   sync.Mutex // guards open
	open int        // the connection that streams are opened on
}

func newPair(t *testing.T, n *Net, first, second way, opts ...libp2p.Option) *pair {
	t.Helper()
	p := newPlainPair(t, n, first, second, opts...)
	for i := range p.nodes {
		p.wrap(i)
	}
	return p
}

// wrap wraps the side's host, and waits until identify has told the peer.
func (p *pair) wrap(side int) {
	p.t.Helper()
	p.logs[side] = new(events)
	h, err := migrate.Wrap(p.nodes[side],
		migrate.WithTracer(p.logs[side].add),
		migrate.WithConnSelector(func(context.Context, peer.ID) network.Conn {
			p.mu.Lock()
			defer p.mu.Unlock()
			return p.conns[side][p.open]
		}))
	require.NoError(p.t, err)
	p.t.Cleanup(func() { _ = h.Close() })
	p.hosts[side] = h
	time.Sleep(time.Second)
}

// newPlainPair returns a pair whose hosts are not wrapped.
func newPlainPair(t *testing.T, n *Net, first, second way, opts ...libp2p.Option) *pair {
	t.Helper()
	p := &pair{Net: n, t: t, ways: [2]way{first, second}}
	for i, ips := range [][]string{ipsOfA, ipsOfB} {
		p.nodes[i] = n.NewNode(ips, opts...)
	}
	var c [2]network.Conn
	p.setLatency(0, first.oneWay)
	p.setLatency(1, second.oneWay)
	if first.via == relayed {
		r := n.NewRelay(ipRelay, relay.WithInfiniteLimits())
		c[0] = n.DialRelayed(p.nodes[0], p.nodes[1], r, QUIC)
		c[1] = n.Dial(p.nodes[0], p.nodes[1], Path{Transport: Transport(second.via), From: ipsOfA[1], To: ipsOfB[1]})
	} else {
		c[0], c[1] = n.Join(p.nodes[0], p.nodes[1],
			Path{Transport: Transport(first.via), From: ipsOfA[0], To: ipsOfB[0]},
			Path{Transport: Transport(second.via), From: ipsOfB[1], To: ipsOfA[1]})
	}
	p.conns[0] = c
	p.conns[1] = [2]network.Conn{n.Far(p.nodes[1], c[0]), n.Far(p.nodes[1], c[1])}
	return p
}

// setLatency sets how long connection i takes one way.
func (p *pair) setLatency(i int, oneWay time.Duration) {
	if i == 0 && p.ways[0].via == relayed {
		p.SetLatency(ipsOfA[0], ipRelay, oneWay/2)
		p.SetLatency(ipRelay, ipsOfB[0], oneWay-oneWay/2)
		return
	}
	p.SetLatency(ipsOfA[i], ipsOfB[i], oneWay)
}

func (p *pair) freeze(i int) {
	if i == 0 && p.ways[0].via == relayed {
		p.Freeze(ipsOfA[0], ipRelay)
		return
	}
	p.Freeze(ipsOfA[i], ipsOfB[i])
}

func (p *pair) thaw(i int) {
	if i == 0 && p.ways[0].via == relayed {
		p.Thaw(ipsOfA[0], ipRelay)
		return
	}
	p.Thaw(ipsOfA[i], ipsOfB[i])
}

// sent is what the side has sent over connection i.
func (p *pair) sent(side, i int) Traffic {
	from, to := ipsOfA[i], ipsOfB[i]
	if i == 0 && p.ways[0].via == relayed {
		from, to = ipsOfA[0], ipRelay
		if side == 1 {
			to, from = ipsOfB[0], ipRelay
		}
	}
	if side == 1 {
		from, to = to, from
	}
	return p.Sent(from, to)
}

// stream opens a labelled stream on connection i, and returns both its ends.
func (p *pair) stream(i int) [2]*migrate.Stream {
	p.t.Helper()
	accepted := make(chan network.Stream, 1)
	p.hosts[1].SetStreamHandler(testID, func(s network.Stream) { accepted <- s })
	s := p.openOn(i)
	_, err := s.Write([]byte{'!'})
	require.NoError(p.t, err)
	far := (<-accepted).(*migrate.Stream)
	_, err = io.ReadFull(far, make([]byte, 1))
	require.NoError(p.t, err)
	time.Sleep(time.Second) // let acknowledgements pass
	return [2]*migrate.Stream{s, far}
}

// openOn opens a labelled stream on connection i. Nothing is sent yet.
func (p *pair) openOn(i int) *migrate.Stream {
	p.t.Helper()
	p.mu.Lock()
	p.open = i
	p.mu.Unlock()
	ctx := network.WithAllowLimitedConn(p.t.Context(), "test")
	s, err := p.hosts[0].NewStream(ctx, p.nodes[1].ID(), testID)
	require.NoError(p.t, err)
	require.Equal(p.t, p.conns[0][i], s.Conn())
	return s.(*migrate.Stream)
}

// warmUp lets the congestion windows of both connections grow, in both directions: a
// connection that is young sends less than the test asks of it.
func (p *pair) warmUp() {
	p.t.Helper()
	const size = 2 << 20
	for side, node := range p.nodes {
		for i, far := range p.conns[1-side] {
			done := make(chan int64, 1)
			node.SetStreamHandler(warmUpID, func(s network.Stream) {
				n, _ := io.Copy(io.Discard, s)
				_ = s.Close()
				done <- n
			})
			u, err := far.NewStream(p.t.Context())
			require.NoError(p.t, err)
			require.NoError(p.t, msmux.SelectProtoOrFail(warmUpID, u))
			_, err = u.Write(make([]byte, size))
			require.NoError(p.t, err, "warm up connection %d", i)
			require.NoError(p.t, u.Close())
			require.EqualValues(p.t, size, <-done)
		}
	}
	time.Sleep(time.Second)
}

// migrate moves the stream from the given side to connection i.
func (p *pair) migrate(side int, s [2]*migrate.Stream, i int) error {
	return p.hosts[side].Migrate(p.t.Context(), s[side], p.conns[side][i])
}

// events are the steps of migrations that a host has traced.
type events struct {
	mu   sync.Mutex // guards list
	list []migrate.Event
}

func (e *events) add(ev migrate.Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.list = append(e.list, ev)
}

// at returns when the host took that step for the first time.
func (e *events) at(t *testing.T, kind migrate.EventKind) time.Time {
	t.Helper()
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, ev := range e.list {
		if ev.Kind == kind {
			return ev.Time
		}
	}
	t.Fatalf("no step %q among %d", kind, len(e.list))
	return time.Time{}
}

// eachSide runs f once for each side of the stream as initiator.
func eachSide(t *testing.T, f func(t *testing.T, side int)) {
	for side, name := range []string{"opener", "acceptor"} {
		t.Run(name, func(t *testing.T) { f(t, side) })
	}
}

// ms is a duration in milliseconds.
func ms(n float64) time.Duration { return time.Duration(n * float64(time.Millisecond)) }
