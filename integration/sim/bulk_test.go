package sim

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	msmux "github.com/multiformats/go-multistream"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/simtest"
)

const mbps = 1_000_000

// A bulk transfer that moves from a slow path to a fast one has the fast one's full speed
// soon: what is still under way on the slow one takes less than two of its round trips.
func TestBulkTransferSpeedsUpSoon(t *testing.T) {
	for _, tc := range []struct {
		name             string
		old, new         way
		oldRate, newRate int // bits per second; 0: no bound
		before           time.Duration
		queued           bool // more is written than the path carries
	}{
		{"QUIC to QUIC", way{quic, ms(50)}, way{quic, ms(5)}, 20 * mbps, 100 * mbps, 2 * time.Second, false},
		{"QUIC to TCP", way{quic, ms(50)}, way{tcp, ms(5)}, 20 * mbps, 100 * mbps, 2 * time.Second, false},
		// TCP is slow here because its path is long, and yamux has not opened its
		// window yet.
		{"TCP to QUIC", way{tcp, ms(50)}, way{quic, ms(5)}, 0, 100 * mbps, 0, false},
		{"TCP to TCP", way{tcp, ms(50)}, way{tcp, ms(5)}, 0, 100 * mbps, 0, false},
		// Where it is narrow, yamux takes up to its window more than the path carries,
		// and all that has to arrive first, as it would before an EOF.
		{"narrow TCP to TCP", way{tcp, ms(50)}, way{tcp, ms(5)}, 20 * mbps, 100 * mbps, time.Second, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			eachSide(t, func(t *testing.T, initiator int) {
				Run(t, func(t *testing.T, n *Net) {
					const window = 200 * time.Millisecond
					p := newBoundedPair(t, n, tc.old, tc.new, tc.oldRate, tc.newRate)
					p.warmUp()

					raw := p.rawTransfer(1)
					time.Sleep(window)
					full := raw.during(window)
					raw.stop()

					s := p.stream(0)
					bulk := startTransfer(s[0], s[1])
					time.Sleep(tc.before)
					before := bulk.during(window)
					moved := make(chan error, 1)
					queue := bulk.given.Load() - bulk.received.Load()
					go func() { moved <- p.migrate(initiator, s, 1) }()
					time.Sleep(4 * tc.old.oneWay)
					if tc.queued {
						time.Sleep(time.Duration(queue*8) * time.Second / time.Duration(tc.oldRate))
					}
					after := bulk.during(window)
					t.Logf("in %v: %d KiB before, %d KiB after, %d KiB raw; %d KiB under way", window, before>>10, after>>10, full>>10, queue>>10)
					require.NoError(t, <-moved)
					require.GreaterOrEqual(t, after*100, full*95,
						"bytes in %v, beginning two round trips of the old path after the migration began", window)
					bulk.stop()
				})
			})
		})
	}
}

// newBoundedPair returns a pair whose connections have a bandwidth; 0 is none.
func newBoundedPair(t *testing.T, n *Net, first, second way, firstRate, secondRate int) *pair {
	t.Helper()
	for i, rate := range []int{firstRate, secondRate} {
		if rate > 0 {
			n.SetBandwidth(ipsOfA[i], rate)
			n.SetBandwidth(ipsOfB[i], rate)
		}
	}
	return newPair(t, n, first, second, unlimited(t))
}

// transfer writes to one end of a stream as fast as it can, and reads at the other.
type transfer struct {
	from, to        network.MuxedStream
	given, received atomic.Int64  // given to Write
	ended           chan struct{} // told by both
}

func startTransfer(from, to network.MuxedStream) *transfer {
	tr := &transfer{from: from, to: to, ended: make(chan struct{}, 2)}
	go func() {
		defer func() { tr.ended <- struct{}{} }()
		buf := make([]byte, 64<<10)
		for {
			tr.given.Add(int64(len(buf)))
			if _, err := from.Write(buf); err != nil {
				return
			}
		}
	}()
	go func() {
		defer func() { tr.ended <- struct{}{} }()
		buf := make([]byte, 64<<10)
		for {
			n, err := to.Read(buf)
			tr.received.Add(int64(n))
			if err != nil {
				return
			}
		}
	}()
	return tr
}

// during lets time pass, and returns how many bytes were received meanwhile.
func (tr *transfer) during(d time.Duration) int64 {
	before := tr.received.Load()
	time.Sleep(d)
	return tr.received.Load() - before
}

func (tr *transfer) stop() {
	_ = tr.from.Reset()
	_ = tr.to.Reset()
	<-tr.ended
	<-tr.ended
	time.Sleep(time.Second)
}

// rawTransfer begins a transfer from a to b over a raw stream of connection i.
func (p *pair) rawTransfer(i int) *transfer {
	p.t.Helper()
	accepted := make(chan network.Stream, 1)
	p.nodes[1].SetStreamHandler(rawID, func(s network.Stream) { accepted <- s })
	u, err := p.conns[0][i].NewStream(p.t.Context())
	require.NoError(p.t, err)
	require.NoError(p.t, msmux.SelectProtoOrFail(rawID, u))
	return startTransfer(u, <-accepted)
}
