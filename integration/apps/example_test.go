package apps_test

import (
	"context"
	"fmt"
	"time"

	"github.com/libp2p/go-libp2p"
	pubsub "github.com/libp2p/go-libp2p-pubsub"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/go-portage/portage/connmgr"
)

// Gossipsub on hosts with Portage: the option is all there is to it. Its streams go wherever
// the better connection is.
func Example_gossipsub() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	newNode := func() (host.Host, *pubsub.Topic) {
		h := must(libp2p.New(libp2p.ListenAddrStrings("/ip4/127.0.0.1/udp/0/quic-v1"), connmgr.Enable()))
		return h, must(must(pubsub.NewGossipSub(ctx, h)).Join("news"))
	}
	a, from := newNode()
	defer a.Close()
	b, to := newNode()
	defer b.Close()

	news := must(to.Subscribe())
	if err := a.Connect(ctx, peer.AddrInfo{ID: b.ID(), Addrs: b.Addrs()}); err != nil {
		panic(err)
	}
	_ = must(must(from.EventHandler()).NextPeerEvent(ctx)) // b has subscribed
	if err := from.Publish(ctx, []byte("streams move")); err != nil {
		panic(err)
	}
	fmt.Printf("%s\n", must(news.Next(ctx)).Data)
	// Output:
	// streams move
}

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}
