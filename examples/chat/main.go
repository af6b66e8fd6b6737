// Chat is a conversation that moves off its relay.
//
// Two people meet through a relay, as behind two NATs, and talk over one stream. Then a
// direct connection comes up, as after a hole punch. The stream goes on over it, the
// relayed connection is closed, and neither of the two programs does anything for that:
// the only line that has to do with Portage is connmgr.Enable. All of it is on loopback.
//
//	go run ./examples/chat
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	ma "github.com/multiformats/go-multiaddr"

	"github.com/go-portage/portage/connmgr"
)

const chatID = "/chat/1.0.0"

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := run(ctx, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "chat:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, out io.Writer) (err error) {
	ctx = network.WithAllowLimitedConn(ctx, "chat")
	alice, err := newNode(connmgr.Enable())
	if err != nil {
		return err
	}
	defer closing(&err, alice)
	bob, err := newNode(connmgr.Enable())
	if err != nil {
		return err
	}
	defer closing(&err, bob)
	met, err := newNode(libp2p.ForceReachabilityPublic())
	if err != nil {
		return err
	}
	defer closing(&err, met)

	moved := relayedCloses(alice, bob.ID())
	bob.SetStreamHandler(chatID, answer)
	service, err := relay.New(met)
	if err != nil {
		return err
	}
	defer service.Close()
	if err := meet(ctx, alice, bob, met); err != nil {
		return err
	}
	s, err := alice.NewStream(ctx, bob.ID(), chatID)
	if err != nil {
		return err
	}
	defer s.Close()
	lines := bufio.NewScanner(s)
	say := func(words string) error {
		fmt.Fprintf(out, "%-18s alice: %s\n", over(s), words)
		if _, err := fmt.Fprintln(s, words); err != nil {
			return err
		}
		if !lines.Scan() {
			return errors.Join(io.ErrUnexpectedEOF, lines.Err())
		}
		fmt.Fprintf(out, "%-18s bob:   %s\n", over(s), lines.Text())
		return nil
	}

	if err := say("are you there?"); err != nil {
		return err
	}
	if err := connectDirectly(ctx, alice, bob); err != nil {
		return err
	}
	select {
	case <-moved:
	case <-ctx.Done():
		return fmt.Errorf("the relayed connection is still open: %w", ctx.Err())
	}
	return say("and now?")
}

func newNode(opts ...libp2p.Option) (host.Host, error) {
	return libp2p.New(append(opts, libp2p.ListenAddrStrings("/ip4/127.0.0.1/udp/0/quic-v1"),
		libp2p.DisableMetrics(), libp2p.DisableIdentifyAddressDiscovery())...)
}

func closing(err *error, h host.Host) { *err = errors.Join(*err, h.Close()) }

// answer is Bob.
func answer(s network.Stream) {
	defer s.Close()
	for lines := bufio.NewScanner(s); lines.Scan(); {
		if _, err := fmt.Fprintf(s, "yes, I can hear you (%q)\n", lines.Text()); err != nil {
			return
		}
	}
}

// over names the connection that s is on.
func over(s network.Stream) string {
	if s.Conn().Stat().Limited {
		return "[limited relay]"
	}
	return "[direct]"
}

// meet connects alice to bob through the relay that they both know.
func meet(ctx context.Context, alice, bob, met host.Host) error {
	if _, err := client.Reserve(ctx, bob, peer.AddrInfo{ID: met.ID(), Addrs: met.Addrs()}); err != nil {
		return err
	}
	circuit, err := ma.NewMultiaddr(fmt.Sprintf("%s/p2p/%s/p2p-circuit", met.Addrs()[0], met.ID()))
	if err != nil {
		return err
	}
	return alice.Connect(ctx, peer.AddrInfo{ID: bob.ID(), Addrs: []ma.Multiaddr{circuit}})
}

// connectDirectly does what a hole punch does.
func connectDirectly(ctx context.Context, alice, bob host.Host) error {
	alice.Peerstore().AddAddrs(bob.ID(), bob.Addrs(), peerstore.PermanentAddrTTL)
	_, err := alice.Network().DialPeer(network.WithForceDirectDial(ctx, "as after a hole punch"), bob.ID())
	return err
}

// relayedCloses tells when h's relayed connection to p is closed.
func relayedCloses(h host.Host, p peer.ID) <-chan struct{} {
	closed := make(chan struct{}, 1)
	h.Network().Notify(&network.NotifyBundle{DisconnectedF: func(_ network.Network, c network.Conn) {
		if c.RemotePeer() == p && c.Stat().Limited {
			closed <- struct{}{}
		}
	}})
	return closed
}
