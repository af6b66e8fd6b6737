package apps

import (
	"context"
	"fmt"
	"testing"

	"github.com/ipfs/go-cid"
	dht "github.com/libp2p/go-libp2p-kad-dht"
	"github.com/multiformats/go-multihash"
	"github.com/stretchr/testify/require"
)

// A DHT of ten servers, all of which put, get, provide and find. Whatever was put or
// provided is found from everywhere, and no request fails.
func TestKadDHT(t *testing.T) {
	const (
		hosts  = 10
		rounds = 3
		moves  = 50
	)
	play(t, hosts, []int{1, 2, 3}, func(t *testing.T, ctx context.Context, w *world) {
		dhts := make([]*dht.IpfsDHT, hosts)
		for i, n := range w.nodes {
			d, err := dht.New(n, dht.Mode(dht.ModeServer), dht.ProtocolPrefix("/apps"),
				dht.NamespacedValidator("v", anything{}), dht.DisableAutoRefresh())
			require.NoError(t, err)
			t.Cleanup(func() { _ = d.Close() })
			dhts[i] = d
		}
		w.connect()
		for i, d := range dhts {
			require.NoError(t, until(ctx, func() bool { return d.RoutingTable().Size() >= 6 }),
				"host %d knows %d others", i, d.RoutingTable().Size())
		}
		enough := w.after(moves)
		round := 0
		for ; round < rounds || !enough(); round++ {
			var all []func() error
			for i, d := range dhts {
				all = append(all, func() error { return useDHT(ctx, d, dhts[(i+5)%hosts], fmt.Sprintf("%d of %d", round, i)) })
			}
			require.NoError(t, together(all...), "round %d", round)
		}
		t.Logf("%d rounds of %d hosts", round, hosts)
	})
}

// useDHT has one host put and provide something, and another one find both, and the first.
func useDHT(ctx context.Context, from, to *dht.IpfsDHT, what string) error {
	key := "/v/" + what
	if err := from.PutValue(ctx, key, []byte(what)); err != nil {
		return fmt.Errorf("put: %w", err)
	}
	if v, err := to.GetValue(ctx, key); err != nil || string(v) != what {
		return fmt.Errorf("get %q: %q, %w", what, v, err)
	}
	hash, err := multihash.Sum([]byte(what), multihash.SHA2_256, -1)
	if err != nil {
		return err
	}
	id := cid.NewCidV1(cid.Raw, hash)
	if err := from.Provide(ctx, id, true); err != nil {
		return fmt.Errorf("provide: %w", err)
	}
	found, err := to.FindProviders(ctx, id)
	if err != nil || len(found) != 1 || found[0].ID != from.PeerID() {
		return fmt.Errorf("find the provider: %v, %w", found, err)
	}
	if p, err := to.FindPeer(ctx, from.PeerID()); err != nil || p.ID != from.PeerID() {
		return fmt.Errorf("find the peer: %v, %w", p, err)
	}
	return nil
}

// anything is a validator of what the test puts.
type anything struct{}

func (anything) Validate(string, []byte) error        { return nil }
func (anything) Select(string, [][]byte) (int, error) { return 0, nil }
