package apps

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/ipfs/boxo/bitswap"
	"github.com/ipfs/boxo/bitswap/network/bsnet"
	"github.com/ipfs/boxo/blockstore"
	blocks "github.com/ipfs/go-block-format"
	"github.com/ipfs/go-cid"
	"github.com/ipfs/go-datastore"
	dssync "github.com/ipfs/go-datastore/sync"
	"github.com/stretchr/testify/require"
)

// One host has blocks, and three fetch them, from it and from each other. A block's hash is
// its name, so that each that arrives is whole.
func TestBitswap(t *testing.T) {
	const (
		hosts = 4
		fetch = 32 // blocks of 256 KiB in a round
		moves = 20
	)
	play(t, hosts, []int{1, 2}, func(t *testing.T, ctx context.Context, w *world) {
		swaps := make([]*bitswap.Bitswap, hosts)
		stores := make([]blockstore.Blockstore, hosts)
		for i, n := range w.nodes {
			stores[i] = blockstore.NewBlockstore(dssync.MutexWrap(datastore.NewMapDatastore()))
			swaps[i] = bitswap.New(ctx, bsnet.NewFromIpfsHost(n), nil, stores[i])
			t.Cleanup(func() { _ = swaps[i].Close() })
		}
		w.connect()
		random := rand.NewChaCha8([32]byte{1})
		enough := w.after(moves)
		round := 0
		for ; round < 2 || !enough(); round++ {
			keys := make([]cid.Cid, fetch)
			for k := range keys {
				data := make([]byte, 256<<10)
				_, _ = random.Read(data)
				b := blocks.NewBlock(data)
				keys[k] = b.Cid()
				require.NoError(t, stores[0].Put(ctx, b))
				require.NoError(t, swaps[0].NotifyNewBlocks(ctx, b))
			}
			var all []func() error
			for i := 1; i < hosts; i++ {
				all = append(all, func() error { return fetchAll(ctx, swaps[i], stores[i], keys) })
			}
			require.NoError(t, together(all...), "round %d", round)
			for _, k := range keys {
				for _, s := range stores {
					require.NoError(t, s.DeleteBlock(ctx, k))
				}
			}
		}
		t.Logf("%d rounds of %d blocks", round, fetch)
	})
}

func fetchAll(ctx context.Context, swap *bitswap.Bitswap, store blockstore.Blockstore, keys []cid.Cid) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	came, err := swap.NewSession(ctx).GetBlocks(ctx, keys)
	if err != nil {
		return err
	}
	n := 0
	for b := range came {
		if err := store.Put(ctx, b); err != nil {
			return err
		}
		n++
	}
	if n != len(keys) {
		return fmt.Errorf("%d blocks came of %d: %w", n, len(keys), ctx.Err())
	}
	return nil
}
