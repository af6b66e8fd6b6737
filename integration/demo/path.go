package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/libp2p/go-libp2p/core/network"

	"github.com/go-portage/portage/policy"
)

// path is one way between the two hosts, as -from and -to name it. There is at
// most one connection on each, so a path names a connection at both ends.
type path string

const (
	relay        path = "relay"
	quic         path = "quic"
	webtransport path = "webtransport"
	tcp          path = "tcp"
	ws           path = "ws"
	otherPath    path = "other" // of no connection that the demo makes
)

// paths are all that can be asked for, in the order in which the default policy
// prefers them.
var paths = []path{quic, webtransport, tcp, ws, relay}

func parsePath(text string) (path, error) {
	p := path(strings.ToLower(text))
	if !slices.Contains(paths, p) {
		return "", fmt.Errorf("%q is not known; use relay, quic, webtransport, tcp or ws", text)
	}
	return p, nil
}

// pathOf returns the path that a connection takes.
func pathOf(conn network.Conn) path {
	var c policy.Candidate
	c.SetAddr(conn.RemoteMultiaddr())
	if c.Relayed {
		return relay
	}
	for p, transport := range transports {
		if transport == c.Transport {
			return p
		}
	}
	return otherPath
}

// transports are those of the direct paths.
var transports = map[path]policy.Transport{
	quic:         policy.QUIC,
	webtransport: policy.WebTransport,
	tcp:          policy.TCP,
	ws:           policy.WebSocket,
}

// title is the path's name for people.
func (p path) title() string {
	switch p {
	case relay:
		return "relayed"
	case quic:
		return "QUIC"
	case webtransport:
		return "WebTransport"
	case tcp:
		return "TCP"
	case ws:
		return "WebSocket"
	default:
		return string(p)
	}
}

// inWords names the path in a sentence.
func (p path) inWords() string {
	if p == relay {
		return "the relay"
	}
	return p.title()
}

// listenAddr is where a host that can be reached on this path listens.
func (p path) listenAddr() string {
	switch p {
	case quic:
		return "/ip4/127.0.0.1/udp/0/quic-v1"
	case webtransport:
		return "/ip4/127.0.0.1/udp/0/quic-v1/webtransport"
	case ws:
		return "/ip4/127.0.0.1/tcp/0/ws"
	default:
		return "/ip4/127.0.0.1/tcp/0"
	}
}
