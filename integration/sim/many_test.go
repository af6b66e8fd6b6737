package sim

import (
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/network"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	msmux "github.com/multiformats/go-multistream"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/migrate"
)

// unlimited takes the resource manager's limits away, which allow a peer 64 streams of
// one protocol.
func unlimited(t *testing.T) libp2p.Option {
	m, err := rcmgr.NewResourceManager(rcmgr.NewFixedLimiter(rcmgr.InfiniteLimits))
	require.NoError(t, err)
	return libp2p.ResourceManager(m)
}

// backlog lets yamux open that many streams at once that the other end has not
// acknowledged; beyond 256, its default, each batch waits for the one before.
func backlog(streams int) libp2p.Option {
	cfg := *yamux.DefaultTransport.Config()
	cfg.AcceptBacklog = streams
	return libp2p.Muxer(yamux.ID, (*yamux.Transport)(&cfg))
}

// Streams of one connection that migrate at once do not wait for each other: all of them
// together take the round trips of one. Where the muxer makes streams wait that are
// opened at once, migrations wait as long, and no longer.
func TestManyStreamsTakeTheRoundTripsOfOne(t *testing.T) {
	for _, tc := range []struct {
		name     string
		streams  int
		old, new way
		opts     []libp2p.Option
	}{
		{"100 TCP to QUIC", 100, way{tcp, ms(25)}, way{quic, ms(25)}, nil},
		{"100 QUIC to TCP", 100, way{quic, ms(25)}, way{tcp, ms(25)}, nil},
		{"240 QUIC to QUIC", 240, way{quic, ms(25)}, way{quic, ms(25)}, nil}, // of 256 that QUIC allows
		{"1000 TCP to TCP", 1000, way{tcp, ms(25)}, way{tcp, ms(25)}, nil},
		{"1000 TCP to TCP with a large backlog", 1000, way{tcp, ms(25)}, way{tcp, ms(25)}, []libp2p.Option{backlog(2000)}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			eachSide(t, func(t *testing.T, initiator int) {
				Run(t, func(t *testing.T, n *Net) {
					p := newPair(t, n, tc.old, tc.new, append(tc.opts, unlimited(t))...)
					p.warmUp()
					one := p.migrateAll(initiator, p.streams(1))
					require.Equal(t, 4*tc.new.oneWay, one, "one stream")
					muxer := p.openRaw(tc.streams) - p.openRaw(1)
					many := p.streams(tc.streams)
					all := p.migrateAll(initiator, many)
					t.Logf("one: %v; %d: %v, of which the muxer %v", one, tc.streams, all, muxer)
					require.LessOrEqual(t, all, one*105/100+muxer, "%d streams", tc.streams)
					for i, s := range many {
						word := fmt.Sprint(i)
						_, err := s[0].Write([]byte(word))
						require.NoError(t, err)
						got := make([]byte, len(word))
						_, err = io.ReadFull(s[1], got)
						require.NoError(t, err)
						require.Equal(t, word, string(got), "streams were mixed up")
					}
				})
			})
		})
	}
}

// openRaw opens raw streams on connection 1 at once, and returns how long it took until
// all of them had an answer.
func (p *pair) openRaw(count int) time.Duration {
	p.t.Helper()
	p.nodes[1].SetStreamHandler(rawID, func(s network.Stream) { answer(1)(s); _ = s.Close() })
	results := make(chan error, count)
	start := time.Now()
	for range count {
		go func() {
			u, err := p.conns[0][1].NewStream(p.t.Context())
			if err == nil {
				lazy := msmux.NewMSSelect(u, rawID)
				if _, err = lazy.Write([]byte{0}); err == nil {
					_, err = io.ReadFull(lazy, make([]byte, 1))
				}
				defer u.Close()
			}
			results <- err
		}()
	}
	for range count {
		require.NoError(p.t, <-results)
	}
	took := time.Since(start)
	time.Sleep(time.Second)
	return took
}

// streams opens streams on connection 0.
func (p *pair) streams(count int) (all [][2]*migrate.Stream) {
	p.t.Helper()
	far := make(map[uint64]*migrate.Stream)
	accepted := make(chan network.Stream)
	p.hosts[1].SetStreamHandler(testID, func(s network.Stream) { accepted <- s })
	for range count {
		s := p.openOn(0)
		_, err := s.Write([]byte{'!'})
		require.NoError(p.t, err)
		all = append(all, [2]*migrate.Stream{s})
		a := (<-accepted).(*migrate.Stream)
		_, err = io.ReadFull(a, make([]byte, 1))
		require.NoError(p.t, err)
		far[a.Label()] = a
	}
	for i := range all {
		all[i][1] = far[all[i][0].Label()]
	}
	time.Sleep(time.Second)
	return all
}

// migrateAll moves all streams to connection 1 at once, and returns how long it took.
func (p *pair) migrateAll(initiator int, all [][2]*migrate.Stream) time.Duration {
	p.t.Helper()
	start := time.Now()
	results := make(chan error, len(all))
	for _, s := range all {
		go func() { results <- p.migrate(initiator, s, 1) }()
	}
	for range all {
		require.NoError(p.t, <-results)
	}
	return time.Since(start)
}
