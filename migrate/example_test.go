package migrate_test

import (
	"bufio"
	"context"
	"fmt"
	"io"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	ma "github.com/multiformats/go-multiaddr"

	"github.com/go-portage/portage/migrate"
)

// Without a connection manager: the application says when a stream moves, and where to.
func Example() {
	a, b := must(migrate.Wrap(newNode())), must(migrate.Wrap(newNode()))
	defer a.Close()
	defer b.Close()
	b.SetStreamHandler("/echo", func(s network.Stream) {
		defer s.Close()
		_, _ = io.Copy(s, s)
	})
	stop := connectThroughRelay(a, b)
	defer stop()

	ctx := network.WithAllowLimitedConn(context.Background(), "example")
	s := must(a.NewStream(ctx, b.ID(), "/echo"))
	defer s.Close()
	answers := bufio.NewScanner(s)
	say := func(words string) {
		_ = must(fmt.Fprintln(s, words))
		answers.Scan()
		fmt.Printf("%s, over a limited connection: %t\n", answers.Text(), s.Conn().Stat().Limited)
	}
	say("hello")
	direct := connectDirectly(a, b)
	if err := a.Migrate(ctx, s, direct); err != nil {
		fmt.Println(err)
		return
	}
	say("hello again")
	// Output:
	// hello, over a limited connection: true
	// hello again, over a limited connection: false
}

// What the example needs beside what it shows.

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func newNode(opts ...libp2p.Option) host.Host {
	return must(libp2p.New(append(opts, libp2p.ListenAddrStrings("/ip4/127.0.0.1/udp/0/quic-v1"),
		libp2p.DisableMetrics(), libp2p.DisableIdentifyAddressDiscovery())...))
}

// connectThroughRelay connects a to b through a relay that ends with stop.
func connectThroughRelay(a, b host.Host) (stop func()) {
	ctx := network.WithAllowLimitedConn(context.Background(), "example")
	r := newNode(libp2p.ForceReachabilityPublic())
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
func connectDirectly(a, b host.Host) network.Conn {
	a.Peerstore().AddAddrs(b.ID(), b.Addrs(), peerstore.PermanentAddrTTL)
	return must(a.Network().DialPeer(network.WithForceDirectDial(context.Background(), "example"), b.ID()))
}
