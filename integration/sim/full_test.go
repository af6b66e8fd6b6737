package sim

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	msmux "github.com/multiformats/go-multistream"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/migrate"
)

// fill opens raw streams on connection i, from the side, until the muxer lets no further
// one in: QUIC allows 256 at a time.
func (p *pair) fill(side, i int) (all []network.Stream) {
	p.t.Helper()
	p.nodes[1-side].SetStreamHandler(rawID, func(network.Stream) {})
	for {
		ctx, cancel := context.WithTimeout(p.t.Context(), 5*time.Second)
		u, err := p.conns[side][i].NewStream(ctx)
		cancel()
		if err != nil {
			require.ErrorIs(p.t, err, context.DeadlineExceeded)
			return all
		}
		require.NoError(p.t, msmux.SelectProtoOrFail(rawID, u))
		all = append(all, u)
	}
}

// A connection that takes no further stream is one that a stream cannot migrate to now,
// from this end: the other one has room of its own, and need not wait.
func TestNewConnectionIsFull(t *testing.T) {
	eachSide(t, func(t *testing.T, initiator int) {
		Run(t, func(t *testing.T, n *Net) {
			p := newPair(t, n, way{tcp, ms(10)}, way{quic, ms(10)}, unlimited(t))
			s := p.stream(0)
			reader := p.readBoth(s)
			p.fill(initiator, 1)

			start := time.Now()
			require.ErrorIs(t, p.migrate(initiator, s, 1), migrate.ErrTryLater)
			require.LessOrEqual(t, time.Since(start), time.Second, "whoever moves many streams has others to see to")
			p.requireWorksOn(0, s, reader)

			moved := make(chan error, 1)
			go func() { moved <- p.migrate(initiator, s, 1) }()
			synctest.Wait()
			start = time.Now()
			require.NoError(t, p.migrate(1-initiator, s, 1), "the peer's migration goes first")
			require.Equal(t, 4*p.ways[1].oneWay, time.Since(start))
			require.Error(t, <-moved)
			p.requireWorks(s, reader)
			p.requireEnds(s, reader)
		})
	})
}

// Closing a stream does not wait for a connection that takes no further stream.
func TestCloseWhileNewConnectionIsFull(t *testing.T) {
	eachSide(t, func(t *testing.T, initiator int) {
		Run(t, func(t *testing.T, n *Net) {
			p := newPair(t, n, way{tcp, ms(10)}, way{quic, ms(10)}, unlimited(t))
			s := p.stream(0)
			p.fill(initiator, 1)
			moved := make(chan error, 1)
			go func() { moved <- p.migrate(initiator, s, 1) }()
			synctest.Wait()
			require.NoError(t, s[0].Close())
			require.NoError(t, s[1].Close())
			time.Sleep(time.Second)
			for i := range s {
				require.Empty(t, p.hosts[i].Streams(p.conns[i][0]), "side %d has let go of the stream", i)
			}
			require.Error(t, <-moved)
		})
	})
}
