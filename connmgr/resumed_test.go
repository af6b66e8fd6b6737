package connmgr

import (
	"errors"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap/zapcore"

	"github.com/go-portage/portage/migrate"
)

func TestResumptionsAreTold(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		mt := newTally()
		w := newWorld(t, higher, WithMetricsTracer(mt))
		sub := w.subscribe(16, new(EvtStreamResumed))
		tcp, quic := w.connect(tcpAddr), w.connect(quicAddr)
		step := func(p peer.ID, kind migrate.EventKind, took time.Duration, again uint64, err error) {
			w.m.moves.migrated(migrate.Event{Kind: kind, Peer: p, Stream: new(migrate.Stream), From: tcp, To: quic, Took: took, Again: again, Err: err})
		}
		said := func() (all []string) {
			for _, e := range w.logs.TakeAll() {
				if e.Level == zapcore.InfoLevel {
					all = append(all, e.Message)
				}
			}
			return all
		}
		cut := errors.New("connection reset by peer")
		for range 3 {
			step(higher, migrate.Lost, 0, 0, cut)
		}
		step(lower, migrate.Lost, 0, 0, cut)
		step(higher, migrate.Resumed, 300*time.Millisecond, 1<<20, nil)
		step(higher, migrate.Resumed, 400*time.Millisecond, 200<<10, nil)
		require.Empty(t, said(), "one is lost still")
		step(higher, migrate.Resumed, 350*time.Millisecond, 0, nil)
		require.Equal(t, []string{"peer " + shortID(higher) + ": lost tcp direct, resumed 3 streams on quic direct after 400 ms, 1.2 MiB sent again"}, said())
		require.Len(t, all(sub), 3)

		step(lower, migrate.GivenUp, 30*time.Second, 0, errors.New("no other was found in time"))
		require.Equal(t, []string{"peer " + shortID(lower) + ": lost tcp direct, gave up 1 stream: no other was found in time"}, said())

		// An end that is told of the loss late, and an application that does not wait.
		step(higher, migrate.Resumed, time.Second, 0, nil)
		step(higher, migrate.Lost, 0, 0, cut)
		require.Equal(t, []string{"peer " + shortID(higher) + ": lost tcp direct, resumed 1 stream on quic direct after 1 s"}, said())
		step(higher, migrate.Lost, 0, 0, cut)
		step(higher, migrate.GivenUp, time.Second, 0, nil)
		require.Empty(t, said(), "nobody has missed anything")
		require.Empty(t, w.m.tells.outages.peers)

		require.EqualValues(t, 4, w.m.tells.totals.report().Resumed)
		require.Equal(t, 1, mt.has("resumed after 400ms, 204800 again"))
		require.Equal(t, 1, mt.has("given up after 30s, 0 again"))
		require.Equal(t, 1, mt.has("ended after 1s, 0 again"))
	})
}

// What a peer can have logged by losing connections is bounded.
func TestResumptionsAreSampled(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		tcp := w.connect(tcpAddr)
		for range 100 {
			w.m.moves.migrated(migrate.Event{Kind: migrate.Lost, Peer: higher, From: tcp})
			w.m.moves.migrated(migrate.Event{Kind: migrate.Resumed, Peer: higher, From: tcp, To: tcp})
		}
		require.Equal(t, deedsAtOnce, w.logs.FilterMessageSnippet("resumed 1 stream").Len())
	})
}

func TestSizesInWords(t *testing.T) {
	for n, want := range map[uint64]string{0: "0 B", 1023: "1023 B", 1 << 10: "1.0 KiB", 99 << 10: "99 KiB", 1 << 20: "1.0 MiB", 5 << 30: "5.0 GiB", 5 << 50: "5120 TiB"} {
		require.Equal(t, want, sizeInWords(n))
	}
}
