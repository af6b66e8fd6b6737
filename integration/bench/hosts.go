package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"testing"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/multiformats/go-multistream"

	"github.com/go-portage/portage/internal/hosttest"
	"github.com/go-portage/portage/migrate"
)

// resumption says whether streams may outlive their connection.
var resumption bool

const benchID protocol.ID = "/bench/1.0.0"

var transports = []hosttest.Transport{hosttest.TCP, hosttest.QUIC}

var names = map[hosttest.Transport]string{hosttest.TCP: "TCP", hosttest.QUIC: "QUIC", hosttest.WebSocket: "WebSocket"}

// tb is a test's part in what hosttest does: there is no test.
type tb struct {
	testing.TB
	cleanups []func()
}

func (t *tb) Helper()                      {}
func (t *tb) Cleanup(f func())             { t.cleanups = append(t.cleanups, f) }
func (t *tb) Fatal(args ...any)            { log.Panic(args...) }
func (t *tb) Fatalf(f string, args ...any) { log.Panicf(f, args...) }

func (t *tb) end() {
	for i := len(t.cleanups) - 1; i >= 0; i-- {
		t.cleanups[i]()
	}
	t.cleanups = nil
}

// pair is two hosts with one or two connections between them; host 0 opens.
type pair struct {
	hosts [2]host.Host
	conns [2][]network.Conn // of a host
	named network.Conn      // where a host of Portage opens; nil: the swarm chooses
}

func plain(t *tb, over ...hosttest.Transport) *pair { return newPair(t, false, over) }

func portage(t *tb, over ...hosttest.Transport) *pair { return newPair(t, true, over) }

func newPair(t *tb, wrapped bool, over []hosttest.Transport) *pair {
	p := new(pair)
	var nodes [2]*hosttest.Node
	for i := range nodes {
		m, err := rcmgr.NewResourceManager(rcmgr.NewFixedLimiter(rcmgr.InfiniteLimits))
		must(err)
		nodes[i] = hosttest.New(t, over, libp2p.ResourceManager(m))
		p.hosts[i] = nodes[i]
		if !wrapped {
			continue
		}
		var opts []migrate.Option
		if resumption {
			opts = append(opts, migrate.WithResumption())
		}
		if i == 0 && len(over) > 1 {
			opts = append(opts, migrate.WithConnSelector(func(context.Context, peer.ID) network.Conn { return p.named }))
		}
		p.hosts[i], err = migrate.Wrap(nodes[i], opts...)
		must(err)
	}
	p.handle(func(network.Stream) {}) // before identify asks for it
	if len(over) == 1 {
		p.conns[0] = []network.Conn{hosttest.Dial(t, nodes[0], nodes[1], over[0])}
	} else {
		c0, c1 := hosttest.Join(t, nodes[0], nodes[1], over[0], over[1])
		p.conns[0] = []network.Conn{c0, c1}
	}
	for _, c := range p.conns[0] {
		p.conns[1] = append(p.conns[1], hosttest.Far(t, nodes[1], c))
	}
	return p
}

func (p *pair) handle(f network.StreamHandler) { p.hosts[1].SetStreamHandler(benchID, f) }

func (p *pair) migrating(i int) *migrate.Host { return p.hosts[i].(*migrate.Host) }

// open opens a stream as an application does.
func (p *pair) open() network.Stream {
	s, err := p.hosts[0].NewStream(context.Background(), p.hosts[1].ID(), benchID)
	must(err)
	return s
}

// openOn opens a labelled stream on connection i. On a machine that is busy one can end up
// elsewhere, and is not used.
func (p *pair) openOn(i int) network.Stream {
	p.named = p.conns[0][i]
	for {
		s := p.open()
		if s.Conn() == p.conns[0][i] {
			return s
		}
		_ = s.Reset()
	}
}

// rawOn opens a stream on connection i with no host's wrapper around it.
func (p *pair) rawOn(i int) network.Stream {
	s, err := p.conns[0][i].NewStream(context.Background())
	must(err)
	must(multistream.SelectProtoOrFail(benchID, s))
	return s
}

// both returns both ends of a stream that open opens, behind its negotiation.
func (p *pair) both(open func() network.Stream) (near, far network.Stream) {
	accepted := make(chan network.Stream, 1)
	p.handle(func(s network.Stream) { accepted <- s })
	near = open()
	write(near, 1)
	far = <-accepted
	read(far, 1)
	write(far, 1)
	read(near, 1)
	return near, far
}

func write(s io.Writer, n int) {
	_, err := s.Write(make([]byte, n))
	must(err)
}

func read(s io.Reader, n int) {
	_, err := io.ReadFull(s, make([]byte, n))
	must(err)
}

func to(from, to hosttest.Transport) string { return fmt.Sprintf("%s to %s", names[from], names[to]) }
