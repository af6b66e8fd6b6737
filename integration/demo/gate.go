package main

import (
	"sync"

	"github.com/libp2p/go-libp2p/core/connmgr"
	"github.com/libp2p/go-libp2p/core/control"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

// gate holds dials to a peer until it is opened.
//
// A host that has a direct connection to a peer does not dial another: DialPeer
// returns the one that is there. Two come about in real life when both dial at
// once. The gate arranges that moment at will: it holds one host's dial behind
// the last look at what connections there are, while the other host dials and
// connects. Its place is the address check of a connection gater, which the swarm
// asks at just that point.
type gate struct {
	reached chan struct{} // closed when a dial has come to the gate
	opened  chan struct{} // closed when it may pass
	reach   sync.Once
	release sync.Once
}

var _ connmgr.ConnectionGater = (*gate)(nil)

func newGate() *gate {
	return &gate{reached: make(chan struct{}), opened: make(chan struct{})}
}

// open lets all dials pass, now and later.
func (g *gate) open() { g.release.Do(func() { close(g.opened) }) }

// InterceptAddrDial blocks until the gate is open.
func (g *gate) InterceptAddrDial(peer.ID, ma.Multiaddr) bool {
	g.reach.Do(func() { close(g.reached) })
	<-g.opened
	return true
}

func (g *gate) InterceptPeerDial(peer.ID) bool                                           { return true }
func (g *gate) InterceptAccept(network.ConnMultiaddrs) bool                              { return true }
func (g *gate) InterceptSecured(network.Direction, peer.ID, network.ConnMultiaddrs) bool { return true }
func (g *gate) InterceptUpgraded(network.Conn) (bool, control.DisconnectReason)          { return true, 0 }
