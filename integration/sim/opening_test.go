package sim

import (
	"io"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/metrics"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/migrate"
)

// cost is what opening a stream, and the first exchange on it, took. The bytes are those
// that the opener and the acceptor sent, on streams, and on the link with all headers and
// acknowledgements.
type cost struct {
	took                time.Duration
	there, back         int
	linkThere, linkBack int
}

// byteCount counts what a host writes to streams.
type byteCount struct {
	metrics.Reporter
	sent atomic.Int64
}

func (c *byteCount) LogSentMessage(n int64)                           { c.sent.Add(n) }
func (c *byteCount) LogRecvMessage(int64)                             {}
func (c *byteCount) LogSentMessageStream(int64, protocol.ID, peer.ID) {}
func (c *byteCount) LogRecvMessageStream(int64, protocol.ID, peer.ID) {}

// opening is one way to begin a conversation. known says that the opener knows from
// identify that the acceptor speaks the protocol.
type opening struct {
	name    string
	known   bool
	trips   int // round trips until the opener has the first byte
	begin   func(t *testing.T, s network.Stream)
	handler network.StreamHandler
}

var openings = []opening{
	{"opener speaks first", true, 1, ask(1), answer(1)},
	{"opener speaks first, 1 KiB", true, 1, ask(1 << 10), answer(1 << 10)},
	{"acceptor speaks first", true, 1, ask(0), answer(0)},
	{"protocol to be negotiated", false, 2, ask(1), answer(1)},
}

// ask sends size bytes and reads one.
func ask(size int) func(*testing.T, network.Stream) {
	return func(t *testing.T, s network.Stream) {
		if size > 0 {
			_, err := s.Write(make([]byte, size))
			require.NoError(t, err)
		}
		_, err := io.ReadFull(s, make([]byte, 1))
		require.NoError(t, err)
	}
}

// answer reads size bytes and sends one.
func answer(size int) network.StreamHandler {
	return func(s network.Stream) {
		if _, err := io.ReadFull(s, make([]byte, size)); err == nil {
			_, _ = s.Write(make([]byte, 1))
		}
	}
}

// measure opens a stream from a to b, who have had a connection for a while.
func (o opening) measure(t *testing.T, n *Net, via Transport, oneWay time.Duration, wrapped bool) cost {
	t.Helper()
	ipA, ipB := ipsOfA[0], ipsOfB[0]
	n.SetLatency(ipA, ipB, oneWay)
	var countA, countB byteCount
	nodeA := n.NewNode([]string{ipA}, libp2p.BandwidthReporter(&countA))
	nodeB := n.NewNode([]string{ipB}, libp2p.BandwidthReporter(&countB))
	a, b := host.Host(nodeA), host.Host(nodeB)
	if wrapped {
		var err error
		a, err = migrate.Wrap(nodeA)
		require.NoError(t, err)
		b, err = migrate.Wrap(nodeB)
		require.NoError(t, err)
	}
	b.SetStreamHandler(testID, o.handler)
	n.Dial(nodeA, nodeB, Path{Transport: via, From: ipA, To: ipB})
	if !o.known {
		require.NoError(t, a.Peerstore().RemoveProtocols(b.ID(), testID))
	}
	sent := func() cost {
		return cost{
			there: int(countA.sent.Load()), back: int(countB.sent.Load()),
			linkThere: n.Sent(ipA, ipB).Bytes, linkBack: n.Sent(ipB, ipA).Bytes,
		}
	}
	before := sent()
	start := time.Now()
	s, err := a.NewStream(t.Context(), b.ID(), testID)
	require.NoError(t, err)
	o.begin(t, s)
	took := time.Since(start)
	_, labelled := s.(*migrate.Stream)
	require.Equal(t, wrapped, labelled)
	time.Sleep(time.Second) // acknowledgements count, too
	after := sent()
	return cost{
		took:      took,
		there:     after.there - before.there,
		back:      after.back - before.back,
		linkThere: after.linkThere - before.linkThere,
		linkBack:  after.linkBack - before.linkBack,
	}
}

// Opening a labelled stream takes the round trips of a raw one, and at most 64 bytes
// more from the opener and 48 from the acceptor (W1).
func TestOpeningCostsNoRoundTrip(t *testing.T) {
	for _, via := range []Transport{TCP, QUIC} {
		for _, o := range openings {
			t.Run(string(via)+" "+o.name, func(t *testing.T) {
				const oneWay = 25 * time.Millisecond
				var raw, labelled cost
				Run(t, func(t *testing.T, n *Net) { raw = o.measure(t, n, via, oneWay, false) })
				Run(t, func(t *testing.T, n *Net) { labelled = o.measure(t, n, via, oneWay, true) })
				t.Logf("raw %+v, labelled %+v", raw, labelled)
				require.Equal(t, 2*oneWay*time.Duration(o.trips), raw.took)
				require.Equal(t, raw.took, labelled.took, "opening costs no round trip")
				require.LessOrEqual(t, labelled.there-raw.there, 64, "bytes that the opener sends more")
				require.LessOrEqual(t, labelled.back-raw.back, 48, "bytes that the acceptor sends more")
				if via == TCP { // how QUIC makes packets of writes is chance
					require.Equal(t, labelled.there-raw.there, labelled.linkThere-raw.linkThere, "no frame more")
					require.Equal(t, labelled.back-raw.back, labelled.linkBack-raw.linkBack, "no frame more")
				}
			})
		}
	}
}
