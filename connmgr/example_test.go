package connmgr_test

import (
	"bufio"
	"context"
	"fmt"
	"log/slog"
	"strings"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/network"

	"github.com/go-portage/portage/connmgr"
	"github.com/go-portage/portage/migrate"
	"github.com/go-portage/portage/policy"
)

// A stream that was opened over a relay goes on over the direct connection that comes
// later. The application that holds it does nothing for that.
func Example() {
	a, b := newExampleNode(connmgr.Enable()), newExampleNode(connmgr.Enable())
	defer a.Close()
	defer b.Close()
	b.SetStreamHandler("/echo", echo)
	closed := make(chan network.Conn, 1)
	a.Network().Notify(&network.NotifyBundle{DisconnectedF: func(_ network.Network, c network.Conn) {
		if c.RemotePeer() == b.ID() {
			closed <- c
		}
	}})

	stop := connectThroughRelay(a, b)
	defer stop()
	ctx := network.WithAllowLimitedConn(context.Background(), "example")
	s := must(a.NewStream(ctx, b.ID(), "/echo"))
	answers := bufio.NewScanner(s)
	say := func(words string) {
		_ = must(fmt.Fprintln(s, words))
		answers.Scan()
		fmt.Printf("%s, over a limited connection: %t\n", answers.Text(), s.Conn().Stat().Limited)
	}
	say("hello")
	connectDirectly(a, b)
	<-closed // the manager has moved the stream, and closed the relayed connection
	say("hello again")
	_ = s.Close()
	// Output:
	// hello, over a limited connection: true
	// hello again, over a limited connection: false
}

// A node: nothing but one option is different from one without.
func ExampleEnable() {
	h, err := libp2p.New(
		libp2p.ListenAddrStrings("/ip4/127.0.0.1/udp/0/quic-v1"),
		connmgr.Enable(),
	)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer h.Close()
	m, ok := connmgr.Of(h)
	fmt.Printf("%t, over a %T\n", ok, m.Inner())
	// Output:
	// true, over a *connmgr.BasicConnMgr
}

// A policy of one's own: not over the mobile network where there is another way.
func ExampleWithPolicy() {
	mobile := func(c policy.Candidate) bool { return strings.HasPrefix(c.Interface, "wwan") }
	unmetered := policy.ScoreFunc("unmetered", func(c policy.Candidate) float64 {
		if mobile(c) {
			return 0
		}
		return 1
	}, policy.WithUse(policy.Use{Interface: true}))
	p, err := policy.Parse("chain(unlimited, unmetered, default)", unmetered)
	if err != nil {
		fmt.Println(err)
		return
	}

	h := must(libp2p.New(libp2p.NoListenAddrs, connmgr.Enable(connmgr.WithPolicy(p))))
	defer h.Close()
	m, _ := connmgr.Of(h)
	fmt.Println(m.SetPolicy(policy.Default())) // another one, while the host runs
	// Output:
	// <nil>
}

// A host that somebody else has made, with the manager as its connection manager.
func ExampleManager_Wrap() {
	mgr, err := connmgr.New(nil) // nil: go-libp2p's own manager stays underneath
	if err != nil {
		fmt.Println(err)
		return
	}
	h, err := libp2p.New(libp2p.NoListenAddrs, libp2p.ConnectionManager(mgr))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer h.Close()
	wrapped, err := mgr.Wrap(h) // use this one from here on
	if err != nil {
		fmt.Println(err)
		return
	}
	var _ *migrate.Host = wrapped
	_, again := mgr.Wrap(h)
	fmt.Println(again != nil)
	// Output:
	// true
}

// What the manager decides is logged: as a sentence for people, and in attributes.
func ExampleWithSlog() {
	decided := make(decisions, 1)
	a, b := newExampleNode(connmgr.Enable(connmgr.WithSlog(slog.New(decided)))), newExampleNode(connmgr.Enable(connmgr.WithSlog(slog.New(decided))))
	defer a.Close()
	defer b.Close()
	b.SetStreamHandler("/echo", echo)
	stop := connectThroughRelay(a, b)
	defer stop()
	s := must(a.NewStream(network.WithAllowLimitedConn(context.Background(), "example"), b.ID(), "/echo"))
	defer s.Close()
	_ = must(s.Write([]byte("hello")))
	connectDirectly(a, b)
	fmt.Println(<-decided)
	// Output:
	// moved 1, by rule unlimited: true over false
}

// A program that is told when a peer that was reached over a relay is reached directly.
func ExampleEvtPathChanged() {
	a, b := newExampleNode(connmgr.Enable()), newExampleNode(connmgr.Enable())
	defer a.Close()
	defer b.Close()
	sub := must(a.EventBus().Subscribe(new(connmgr.EvtPathChanged)))
	defer sub.Close()

	stop := connectThroughRelay(a, b)
	defer stop()
	connectDirectly(a, b)
	for e := range sub.Out() {
		if e := e.(connmgr.EvtPathChanged); e.Direct && !e.WasDirect {
			fmt.Printf("%t: over %s instead of %s\n", e.Peer == b.ID(), e.To.Kind, e.From.Kind)
			break
		}
	}
	// Output:
	// true: over quic direct instead of limited relay
}
