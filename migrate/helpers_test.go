package migrate

import (
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
)

type peerID = peer.ID

var relayUnlimited = relay.WithInfiniteLimits()
