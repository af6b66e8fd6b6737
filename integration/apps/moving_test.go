package apps

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/x/simlibp2p"
	"github.com/marcopolo/simnet"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/connmgr"
	"github.com/go-portage/portage/integration/apps/moving"
	. "github.com/go-portage/portage/internal/hosttest"
)

// world is some hosts, and pairs of them that are connected. Where it moves, each pair is
// given a second connection as soon as it has one: the newer one wins, all streams move
// there, and the older one is closed.
type world struct {
	t      *testing.T
	nodes  []host.Host
	over   []Transport // of the connections of a pair, in turn
	pairs  [][2]int
	pause  time.Duration // of a pair that has one connection, before it is doubled
	moving bool

	migrations atomic.Int64   // of streams, that are complete
	closings   []atomic.Int64 // of the older connection of each pair
}

// play runs the same on plain hosts and on hosts whose streams move. Each host is connected
// with those that come the given steps after it, once run has called connect. In real time
// that is over TCP and WebSocket: a QUIC dial ends after 5 s without a packet, which cannot
// be set, and which a machine with other work to do can take for a handshake.
func play(t *testing.T, hosts int, steps []int, run func(t *testing.T, ctx context.Context, w *world)) {
	each(t, func(t *testing.T, moves bool) {
		w := newWorld(t, hosts, steps, moves, TCP, WebSocket)
		for range hosts {
			opts := append([]libp2p.Option{libp2p.DisableRelay()}, w.enable()...)
			w.nodes = append(w.nodes, New(t, w.over, opts...))
		}
		w.play(run)
	})
}

// playQUIC is play in virtual time, over a network that is simulated, where all connections
// are QUIC's. However busy the machine is, nothing comes late.
func playQUIC(t *testing.T, hosts int, steps []int, run func(t *testing.T, ctx context.Context, w *world)) {
	each(t, func(t *testing.T, moves bool) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, hosts, steps, moves, QUIC)
			w.pause = time.Second // virtual time costs nothing, and connections do
			link := simnet.LinkSettings{BitsPerSecond: 100 * simlibp2p.OneMbps}
			net := &simnet.Simnet{LatencyFunc: simnet.StaticLatency(5 * time.Millisecond)}
			t.Cleanup(net.Close)
			for i := range hosts {
				h, err := moving.SimHost(net, i, simnet.NodeBiDiLinkSettings{Downlink: link, Uplink: link}, w.enable()...)
				require.NoError(t, err)
				t.Cleanup(func() { _ = h.Close() })
				w.nodes = append(w.nodes, h)
			}
			net.Start()
			w.play(run)
		})
	})
}

func each(t *testing.T, run func(t *testing.T, moves bool)) {
	t.Run("plain", func(t *testing.T) { run(t, false) })
	t.Run("moving", func(t *testing.T) { run(t, true) })
}

func newWorld(t *testing.T, hosts int, steps []int, moves bool, over ...Transport) *world {
	w := &world{t: t, moving: moves, over: over}
	for i := range hosts {
		for _, step := range steps {
			if 2*step != hosts || i < step { // else the other way round
				w.pairs = append(w.pairs, [2]int{i, (i + step) % hosts})
			}
		}
	}
	w.closings = make([]atomic.Int64, len(w.pairs))
	return w
}

func (w *world) enable() []libp2p.Option {
	if !w.moving {
		return nil
	}
	return []libp2p.Option{connmgr.Enable(moving.Options(&w.migrations)...)}
}

func (w *world) play(run func(t *testing.T, ctx context.Context, w *world)) {
	ctx, cancel := context.WithTimeout(w.t.Context(), Patience)
	defer cancel()
	run(w.t, ctx, w)
	all, least := w.closed()
	w.t.Logf("%d migrations, %d connections closed, at least %d of each of %d pairs", w.migrations.Load(), all, least, len(w.pairs))
	if w.moving {
		require.Positive(w.t, w.migrations.Load(), "streams have moved")
		require.Positive(w.t, least, "connections of each pair were closed")
	}
}

// connect connects the pairs. From then on the connections are doubled, until the test ends.
func (w *world) connect() {
	for _, p := range w.pairs {
		to := peer.AddrInfo{ID: w.nodes[p[1]].ID(), Addrs: []ma.Multiaddr{w.addr(p[1], 0)}}
		require.NoError(w.t, w.nodes[p[0]].Connect(network.WithDialPeerTimeout(w.t.Context(), Patience), to))
	}
	if !w.moving {
		return
	}
	doublers := make([]*Doubler, len(w.nodes))
	for i, n := range w.nodes {
		doublers[i] = NewDoubler(w.t, n)
	}
	ctx, cancel := context.WithCancel(context.Background())
	dials := make(chan struct{}, 4) // at a time
	var wg sync.WaitGroup
	for i, p := range w.pairs {
		wg.Go(func() {
			if err := w.double(ctx, dials, doublers[p[0]], i); err != nil && ctx.Err() == nil {
				w.t.Errorf("hosts %d and %d: %v", p[0], p[1], err)
			}
		})
	}
	w.t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
}

// addr is the address of a host that its connections are dialled at in the given turn.
func (w *world) addr(i, turn int) ma.Multiaddr {
	addr, err := moving.Addr(w.nodes[i], w.over[turn%len(w.over)])
	require.NoError(w.t, err)
	return addr
}

// double gives a pair a second connection whenever it has one. It returns when ctx ends, or
// with an error.
func (w *world) double(ctx context.Context, dials chan struct{}, d *Doubler, pair int) error {
	a, b := w.nodes[w.pairs[pair][0]], w.nodes[w.pairs[pair][1]]
	var gone atomic.Int64 // connections of a to b
	notifee := &network.NotifyBundle{DisconnectedF: func(_ network.Network, c network.Conn) {
		if c.RemotePeer() == b.ID() {
			gone.Add(1)
		}
	}}
	a.Network().Notify(notifee)
	defer a.Network().StopNotify(notifee)
	for turn := 1; ; turn++ {
		select {
		case <-time.After(w.pause):
		case <-ctx.Done():
			return nil
		}
		dials <- struct{}{}
		err := d.Dial(ctx, b.ID(), w.addr(w.pairs[pair][1], turn))
		<-dials
		if err != nil {
			return err
		}
		if err := until(ctx, func() bool {
			return gone.Load() >= int64(turn) && len(a.Network().ConnsToPeer(b.ID())) == 1 && len(b.Network().ConnsToPeer(a.ID())) == 1
		}); err != nil {
			return fmt.Errorf("two connections remain; it says: %s", explain(a, b.ID()))
		}
		w.closings[pair].Add(1)
	}
}

// until waits until cond holds, as long as Patience.
func until(ctx context.Context, cond func() bool) error { return waitFor(ctx, Patience, cond) }

func waitFor(ctx context.Context, d time.Duration, cond func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func explain(h host.Host, p peer.ID) string {
	m, ok := connmgr.Of(h)
	if !ok {
		return "no manager"
	}
	return m.Explain(p).String()
}

// closed returns how many connections were closed, and of how many at least of each pair.
func (w *world) closed() (all, least int64) {
	least = w.closings[0].Load()
	for i := range w.closings {
		n := w.closings[i].Load()
		all, least = all+n, min(least, n)
	}
	return all, least
}

// after returns a function that says whether n streams have moved since, and a connection
// of each pair was closed, which is what a program has to work through; on plain hosts it
// is true at once.
func (w *world) after(n int) func() bool {
	start := w.migrations.Load()
	_, before := w.closed()
	return func() bool {
		_, least := w.closed()
		return !w.moving || w.migrations.Load() >= start+int64(n) && least > before
	}
}

// together runs fs at the same time, and returns what went wrong.
func together(fs ...func() error) error {
	errs := make([]error, len(fs))
	var wg sync.WaitGroup
	for i, f := range fs {
		wg.Go(func() { errs[i] = f() })
	}
	wg.Wait()
	return errors.Join(errs...)
}
