package migrate

import (
	"context"
	"errors"
	"io"
	"runtime"
	"sync"
	"testing"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	. "github.com/go-portage/portage/internal/hosttest"
)

// TestDefaultLimits: under go-libp2p's default limits, with only the application's own
// protocol allowed 200 streams from a peer, 200 labelled streams open, move, and come back,
// although each has two underlying streams meanwhile. Nothing is left of them.
func TestDefaultLimits(t *testing.T) {
	const streams = 200
	var nodes [2]*Node
	for i := range nodes {
		nodes[i] = New(t, []Transport{TCP, QUIC}, libp2p.ResourceManager(limited(t, echoID, streams)))
	}
	p := &pair{nodes: nodes}
	for i := range nodes {
		h, err := Wrap(nodes[i])
		require.NoError(t, err)
		p.hosts[i] = h
	}
	c0, c1 := Join(t, nodes[0], nodes[1], TCP, QUIC)
	p.conns = [2][2]network.Conn{{c0, c1}, {Far(t, nodes[1], c0), Far(t, nodes[1], c1)}}
	before := goleak.IgnoreCurrent()

	p.hosts[1].SetStreamHandler(echoID, func(s network.Stream) {
		_, _ = io.Copy(s, s)
		_ = s.Close()
	})
	var all []*Stream
	for range streams {
		s := p.openOn(t, echoID, 0)
		echoes(t, s)
		all = append(all, s)
	}
	for _, to := range []int{1, 0} {
		var wg sync.WaitGroup
		for _, s := range all {
			wg.Go(func() {
				// Where a limit stands in the way, the others have to finish first.
				WaitFor(t, "a stream to move", func() bool {
					err := p.migrate(context.Background(), 0, s, to)
					if err != nil && !errors.Is(err, ErrTryLater) {
						t.Errorf("migrate: %v", err)
						return true
					}
					return err == nil
				})
			})
		}
		wg.Wait()
		for i, n := range nodes {
			WaitFor(t, "every stream to be charged to its protocol, once", func() bool {
				var stat network.ScopeStat
				err := n.Network().ResourceManager().ViewProtocol(echoID, func(scope network.ProtocolScope) error {
					stat = scope.Stat()
					return nil
				})
				return err == nil && [2]int{stat.NumStreamsOutbound, stat.NumStreamsInbound}[i] == streams
			})
		}
		for _, s := range all {
			require.Equal(t, p.conns[0][to], s.Conn())
			echoes(t, s)
		}
	}
	for _, s := range all {
		require.NoError(t, s.CloseWrite())
		_, err := io.ReadAll(s)
		require.NoError(t, err)
		require.NoError(t, s.Close())
	}
	p.nothingLeft(t)
	WaitFor(t, "the goroutines of the streams to end", func() bool { return goleak.Find(before) == nil })
}

// limited is go-libp2p's default resource manager, but for one protocol's limit.
func limited(t *testing.T, id protocol.ID, streams int) network.ResourceManager {
	t.Helper()
	own := rcmgr.ResourceLimits{
		Streams:        rcmgr.LimitVal(2 * streams),
		StreamsInbound: rcmgr.LimitVal(streams), StreamsOutbound: rcmgr.LimitVal(streams),
	}
	cfg := rcmgr.PartialLimitConfig{
		Protocol:     map[protocol.ID]rcmgr.ResourceLimits{id: own},
		ProtocolPeer: map[protocol.ID]rcmgr.ResourceLimits{id: own},
	}
	scaled := rcmgr.DefaultLimits
	libp2p.SetDefaultServiceLimits(&scaled)
	m, err := rcmgr.NewResourceManager(rcmgr.NewFixedLimiter(cfg.Build(scaled.AutoScale())))
	require.NoError(t, err)
	return m
}

func echoes(t testing.TB, s io.ReadWriter) {
	t.Helper()
	_, err := s.Write([]byte{42})
	require.NoError(t, err)
	var b [1]byte
	_, err = io.ReadFull(s, b[:])
	require.NoError(t, err)
	require.Equal(t, byte(42), b[0])
}

// TestAllocations: between migrations, a Read and a Write allocate what the underlying
// stream's do. The halves are measured on a stream that allocates nothing.
func TestAllocations(t *testing.T) {
	if !Alone(t) {
		return
	}
	s := &Stream{}
	var u still
	s.send.cur, s.recv.cur = &u, &source{stream: &u}
	buf := make([]byte, 1<<10)
	require.Zero(t, testing.AllocsPerRun(1000, func() {
		_, _ = s.Write(buf)
		_, _ = s.Read(buf)
	}))
}

// still is an underlying stream that takes and gives everything at once.
type still struct{ network.Stream }

func (*still) Read(p []byte) (int, error)  { return len(p), nil }
func (*still) Write(p []byte) (int, error) { return len(p), nil }

// TestNoGoroutinePerStream: an idle labelled stream that has migrated has no goroutine of
// its own at either end; its handler's is the application's.
func TestNoGoroutinePerStream(t *testing.T) {
	const streams = 50
	p := newPair(t, TCP, QUIC)
	held := make(chan network.Stream, streams)
	p.hosts[1].SetStreamHandler(echoID, func(s network.Stream) { held <- s })
	before := runtime.NumGoroutine()
	for range streams {
		s := p.openOn(t, echoID, 0)
		_, err := s.Write([]byte{1})
		require.NoError(t, err)
		far := <-held
		_, err = io.ReadFull(far, make([]byte, 1))
		require.NoError(t, err)
		require.NoError(t, p.migrate(testCtx(t), 0, s, 1))
	}
	WaitFor(t, "the goroutines of the migrations to end", func() bool { return runtime.NumGoroutine() < before+streams/2 })
}
