package apps

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/connmgr"
	. "github.com/go-portage/portage/internal/hosttest"
	"github.com/go-portage/portage/migrate"
	"github.com/go-portage/portage/policy"
)

// world is some hosts, and pairs of them that are connected. Where it moves, each pair is
// given a second connection as soon as it has one: the newer one wins, all streams move
// there, and the older one is closed.
type world struct {
	t      *testing.T
	nodes  []*Node
	pairs  [][2]int
	moving bool

	migrations atomic.Int64 // of streams, that are complete
	closings   atomic.Int64 // of the older connection of a pair
}

// play runs the same on plain hosts and on hosts whose streams move. Each host is connected
// with those that come the given steps after it, once run has called connect.
func play(t *testing.T, hosts int, steps []int, run func(t *testing.T, ctx context.Context, w *world)) {
	for _, moving := range []bool{false, true} {
		name := "plain"
		if moving {
			name = "moving"
		}
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), Patience)
			defer cancel()
			w := newWorld(t, hosts, steps, moving)
			defer func() {
				t.Logf("%d migrations, %d connections closed", w.migrations.Load(), w.closings.Load())
			}()
			run(t, ctx, w)
		})
	}
}

func newWorld(t *testing.T, hosts int, steps []int, moving bool) *world {
	w := &world{t: t, moving: moving}
	for range hosts {
		opts := []libp2p.Option{libp2p.DisableRelay()}
		if moving {
			opts = append(opts, w.enable())
		}
		w.nodes = append(w.nodes, New(t, []Transport{TCP, QUIC}, opts...))
	}
	for i := range hosts {
		for _, step := range steps {
			w.pairs = append(w.pairs, [2]int{i, (i + step) % hosts})
		}
	}
	return w
}

// enable has everything happen at once.
func (w *world) enable() libp2p.Option {
	newest, err := policy.Parse("chain(younger)")
	require.NoError(w.t, err)
	return connmgr.Enable(
		connmgr.WithPolicy(newest),
		connmgr.WithSettleDelay(20*time.Millisecond),
		connmgr.WithQuietTime(50*time.Millisecond),
		connmgr.WithProof(100*time.Millisecond),
		connmgr.WithInterval(100*time.Millisecond),
		connmgr.WithMigrateOptions(migrate.WithTracer(w.count)),
	)
}

func (w *world) count(e migrate.Event) {
	if e.Kind == migrate.Finished && e.Initiator {
		w.migrations.Add(1)
	}
}

// connect connects the pairs. From then on the connections are doubled, until the test ends.
func (w *world) connect() {
	for _, p := range w.pairs {
		Dial(w.t, w.nodes[p[0]], w.nodes[p[1]], TCP)
	}
	if !w.moving {
		return
	}
	doublers := make([]*Doubler, len(w.nodes))
	for i, n := range w.nodes {
		doublers[i] = NewDoubler(w.t, n.Host)
	}
	ctx, cancel := context.WithCancel(context.Background())
	dials := make(chan struct{}, 4) // at a time
	var wg sync.WaitGroup
	for _, p := range w.pairs {
		a, b := w.nodes[p[0]], w.nodes[p[1]]
		wg.Go(func() {
			if err := w.double(ctx, dials, doublers[p[0]], a, b); err != nil && ctx.Err() == nil {
				w.t.Errorf("hosts %d and %d: %v", p[0], p[1], err)
			}
		})
	}
	w.t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
}

// double gives a and b a second connection whenever they have one, over the other
// transport. It returns when ctx ends, or with an error.
func (w *world) double(ctx context.Context, dials chan struct{}, d *Doubler, a, b *Node) error {
	var gone atomic.Int64 // connections of a to b
	notifee := &network.NotifyBundle{DisconnectedF: func(_ network.Network, c network.Conn) {
		if c.RemotePeer() == b.ID() {
			gone.Add(1)
		}
	}}
	a.Network().Notify(notifee)
	defer a.Network().StopNotify(notifee)
	next := Transport(QUIC)
	for want := int64(1); ctx.Err() == nil; want++ {
		dials <- struct{}{}
		err := d.Dial(ctx, b.ID(), b.Addr(w.t, next))
		<-dials
		if err != nil { // on a busy machine QUIC's handshake can fail: its 5 s cannot be set
			want--
			continue
		}
		if err := until(ctx, func() bool {
			return gone.Load() >= want && len(a.Network().ConnsToPeer(b.ID())) == 1 && len(b.Network().ConnsToPeer(a.ID())) == 1
		}); err != nil {
			return fmt.Errorf("two connections remain; it says: %s", explain(a, b.ID()))
		}
		w.closings.Add(1)
		if next == QUIC {
			next = TCP
		} else {
			next = QUIC
		}
	}
	return nil
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

func explain(n *Node, p peer.ID) string {
	m, ok := connmgr.Of(n.Host)
	if !ok {
		return "no manager"
	}
	return m.Explain(p).String()
}

// after returns a function that says whether n streams have moved since, which is what a
// program has to work through; on plain hosts it is true at once.
func (w *world) after(n int) func() bool {
	start := w.migrations.Load()
	return func() bool { return !w.moving || w.migrations.Load() >= start+int64(n) }
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
