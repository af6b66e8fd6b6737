package migrate

import (
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
)

var relayUnlimited = relay.WithInfiniteLimits()
