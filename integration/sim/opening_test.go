package sim

import (
	"io"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/migrate"
)

// cost is what opening a stream, and the first exchange on it, took.
type cost struct {
	took        time.Duration
	there, back int // bytes that the opener and the acceptor sent
}

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
	nodeA, nodeB := n.NewNode([]string{ipA}), n.NewNode([]string{ipB})
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
	before := [2]Traffic{n.Sent(ipA, ipB), n.Sent(ipB, ipA)}
	start := time.Now()
	s, err := a.NewStream(t.Context(), b.ID(), testID)
	require.NoError(t, err)
	o.begin(t, s)
	took := time.Since(start)
	_, labelled := s.(*migrate.Stream)
	require.Equal(t, wrapped, labelled)
	time.Sleep(time.Second) // acknowledgements count, too
	return cost{
		took:  took,
		there: n.Sent(ipA, ipB).Bytes - before[0].Bytes,
		back:  n.Sent(ipB, ipA).Bytes - before[1].Bytes,
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
				if via == QUIC {
					return // how many packets it makes of two Writes is a matter of scheduling
				}
				require.LessOrEqual(t, labelled.there-raw.there, 64, "bytes that the opener sends more")
				require.LessOrEqual(t, labelled.back-raw.back, 48, "bytes that the acceptor sends more")
			})
		}
	}
}
