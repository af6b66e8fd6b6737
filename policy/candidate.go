package policy

import (
	"time"

	"github.com/libp2p/go-libp2p/core/network"
)

// Candidate describes one connection to a peer at one moment. It is a plain
// value: whoever ranks fills it and may copy it freely. The zero value of a
// field is what to leave there when it is not known.
type Candidate struct {
	// ID names the connection, as network.Conn.ID does. It must differ from
	// that of every other candidate in the same ranking.
	ID string

	// Remote, Transport, Relayed, Reach and IPVersion follow from the remote
	// address: see SetAddr.

	// Remote is the address of the other end. It begins with that of the
	// relay for a relayed connection.
	Remote Addr
	// Transport carries the connection; for a relayed one, the transport to
	// the relay.
	Transport Transport
	// Relayed is whether the connection passes through a relay, limited or
	// not.
	Relayed bool
	// Reach is how far away the remote address is; for a relayed connection,
	// the address of the relay.
	Reach Reach
	// IPVersion is 4 or 6, or 0 if not known; for a relayed connection, on
	// the way to the relay.
	IPVersion int

	// Local is the address of this end; for a relayed connection, on the way
	// to the relay. See SetLocalAddr.
	Local Addr
	// Interface is the name of the network interface that Local belongs to,
	// as the operating system has it. "": not known. A policy asks for it with
	// Use.Interface.
	Interface string

	// Limited is whether the connection may end after a time or an amount of
	// data that the relay sets (network.ConnStats.Limited). A relayed
	// connection need not be.
	Limited bool
	// Direction says who dialled. After a hole punch both ends say outbound.
	Direction network.Direction
	// Age is the time since the connection opened, for all candidates of a
	// ranking at the same instant. 0: not known.
	Age time.Duration
	// RTT is the round-trip time to the peer itself, not to a relay between,
	// and smoothed over several measurements. 0 or less: not known. A policy
	// asks for it with Use.RTT.
	RTT time.Duration

	// Streams is the number of open streams, of any kind. Labelled of them
	// are labelled. Pinned of them cannot migrate.
	Streams, Labelled, Pinned int

	// Incumbent is whether the previous ranking of the peer's connections
	// made this one the winner. At most one candidate of a ranking is.
	Incumbent bool
}

// Transport is the transport of a connection, as far as a ranking cares.
type Transport uint8

// The transports. WebSocket is both ws and wss.
const (
	OtherTransport Transport = iota
	QUIC
	WebTransport
	WebRTC
	TCP
	WebSocket
)

// String returns the transport's name in lower case: "quic", "webtransport",
// "webrtc", "tcp", "websocket", or "other".
func (t Transport) String() string {
	switch t {
	case QUIC:
		return "quic"
	case WebTransport:
		return "webtransport"
	case WebRTC:
		return "webrtc"
	case TCP:
		return "tcp"
	case WebSocket:
		return "websocket"
	default:
		return "other"
	}
}

// Reach is how far into the network an address lies.
type Reach uint8

// The reaches, nearest first.
const (
	// UnknownReach is that of names, which are not resolved here, and of
	// addresses that no single host has.
	UnknownReach Reach = iota
	// Loopback is the same machine.
	Loopback
	// Private is the same network, more or less: RFC 1918, IPv6 unique local,
	// link-local, and the shared addresses of carrier NATs and overlay networks
	// (100.64.0.0/10).
	Private
	// Public is every other address.
	Public
)

// String returns the reach in lower case: "loopback", "private", "public", or
// "unknown".
func (r Reach) String() string {
	switch r {
	case Loopback:
		return "loopback"
	case Private:
		return "private"
	case Public:
		return "public"
	default:
		return "unknown"
	}
}
