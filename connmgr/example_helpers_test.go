package connmgr_test

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	ma "github.com/multiformats/go-multiaddr"
)

// What the examples need beside what they show.

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func newExampleNode(opts ...libp2p.Option) host.Host {
	return must(libp2p.New(append(opts, libp2p.ListenAddrStrings("/ip4/127.0.0.1/udp/0/quic-v1"),
		libp2p.DisableMetrics(), libp2p.DisableIdentifyAddressDiscovery())...))
}

// connectThroughRelay connects a to b through a relay that ends with stop.
func connectThroughRelay(a, b host.Host) (stop func()) {
	ctx := network.WithAllowLimitedConn(context.Background(), "example")
	r := newExampleNode(libp2p.ForceReachabilityPublic())
	service := must(relay.New(r))
	_ = must(client.Reserve(ctx, b, peer.AddrInfo{ID: r.ID(), Addrs: r.Addrs()}))
	circuit := ma.StringCast(fmt.Sprintf("%s/p2p/%s/p2p-circuit", r.Addrs()[0], r.ID()))
	if err := a.Connect(ctx, peer.AddrInfo{ID: b.ID(), Addrs: []ma.Multiaddr{circuit}}); err != nil {
		panic(err)
	}
	return func() {
		_ = service.Close()
		_ = r.Close()
	}
}

// connectDirectly does what a hole punch does.
func connectDirectly(a, b host.Host) {
	a.Peerstore().AddAddrs(b.ID(), b.Addrs(), peerstore.PermanentAddrTTL)
	_ = must(a.Network().DialPeer(network.WithForceDirectDial(context.Background(), "example"), b.ID()))
}

// decisions is a slog.Handler that passes on the first decision by which a stream moved.
type decisions chan string

func (decisions) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelInfo }

func (d decisions) Handle(_ context.Context, r slog.Record) error {
	attrs := make(map[string]string)
	r.Attrs(func(a slog.Attr) bool {
		attrs[a.Key] = a.Value.String()
		return true
	})
	// The one that does not decide tells, too, what has moved; by which rule it does not know.
	if moved := attrs["streams_moved"]; moved != "" && moved != "0" && attrs["rule"] != "" {
		select {
		case d <- fmt.Sprintf("moved %s, by rule %s: %s over %s", moved, attrs["rule"], attrs["winner_value"], attrs["loser_value"]):
		default:
		}
	}
	return nil
}

func (d decisions) WithAttrs([]slog.Attr) slog.Handler { return d }
func (d decisions) WithGroup(string) slog.Handler      { return d }
