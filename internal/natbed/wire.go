//go:build linux

package natbed

import (
	"encoding/json"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	ma "github.com/multiformats/go-multiaddr"
)

// request is a line from the program to a node.
type request struct {
	ID   int             `json:"id"`
	Do   string          `json:"do"`
	Args json.RawMessage `json:"args,omitempty"`
}

// line is what a node writes: the answer to the request with that ID, or an event.
type line struct {
	ID     int             `json:"id,omitempty"`
	Error  string          `json:"error,omitempty"`
	Result json.RawMessage `json:"result,omitempty"`
	Event  *Event          `json:"event,omitempty"`
}

// Config is what a node is told to be.
type Config struct {
	// Limit is what the relay allows a relayed connection; nil: any amount, for ever.
	Limit *Limit `json:"limit,omitempty"`
	// IsRelay has the node be the relay. What follows is for the others.
	IsRelay bool `json:"is_relay,omitempty"`
	// Listen are the addresses to listen on.
	Listen []string `json:"listen"`
	// Relay are the addresses of the relay, where the node makes a reservation.
	Relay []string `json:"relay,omitempty"`
	// Portage has the node run Portage; else it is plain go-libp2p.
	Portage bool `json:"portage,omitempty"`
	// Resumption has its streams outlive their connection for as long, with Portage; 0: they
	// do not.
	Resumption time.Duration `json:"resumption,omitempty"`
	// StreamFirst holds the node's direct dials to its peer back until there is a Stream, so
	// that the stream is on the relay also where the machine is slow. Usually it is there
	// long before.
	StreamFirst bool `json:"stream_first,omitempty"`
	// PunchTimeout is how long go-libp2p tries to punch, of three times; 0: its default.
	PunchTimeout time.Duration `json:"punch_timeout,omitempty"`
}

// Limit is what a relay allows a relayed connection.
type Limit struct {
	Duration time.Duration `json:"duration"`
	Data     int64         `json:"data"` // bytes each way
}

// Info says who a node is.
type Info struct {
	ID    string   `json:"id"`
	Addrs []string `json:"addrs"`
}

// Relayed returns the same with only the addresses that lead over a relay.
func (i Info) Relayed() Info {
	relayed := Info{ID: i.ID}
	for _, a := range i.Addrs {
		if strings.Contains(a, "/p2p-circuit") {
			relayed.Addrs = append(relayed.Addrs, a)
		}
	}
	return relayed
}

// Kind is what an Event tells.
type Kind string

// The kinds of events.
const (
	Connected    Kind = "connected"    // Conn
	Disconnected Kind = "disconnected" // Conn
	Punch        Kind = "punch"        // Text: what go-libp2p's hole puncher says
	Move         Kind = "move"         // Text: a step of a migration, as migrate names it; Conn: where to
	Resumption   Kind = "resumption"   // Text: what became of a stream that has lost its connection, as migrate names it
	Ended        Kind = "ended"        // Stream
)

// Event is something that happened at a node. The times of all nodes are of one clock.
type Event struct {
	At   time.Time `json:"at"`
	Kind Kind      `json:"kind"`
	Text string    `json:"text,omitempty"`
	// Initiator is whether it was this node that asked for the migration.
	Initiator bool    `json:"initiator,omitempty"`
	Conn      *Conn   `json:"conn,omitempty"`
	Stream    *Result `json:"stream,omitempty"`
}

// Conn is a connection to the other host, as a node sees it.
type Conn struct {
	ID        string `json:"id"`
	Peer      string `json:"peer"`
	Transport string `json:"transport"` // relay, quic or tcp
	Limited   bool   `json:"limited,omitempty"`
	Outbound  bool   `json:"outbound,omitempty"`
}

// Relayed is the Transport of a relayed connection.
const Relayed = "relay"

func connOf(c network.Conn) *Conn {
	return &Conn{
		ID:        c.ID(),
		Peer:      c.RemotePeer().String(),
		Transport: transportOf(c.RemoteMultiaddr()),
		Limited:   c.Stat().Limited,
		Outbound:  c.Stat().Direction == network.DirOutbound,
	}
}

func transportOf(addr ma.Multiaddr) string {
	for _, t := range []struct {
		code int
		name string
	}{{ma.P_CIRCUIT, Relayed}, {ma.P_QUIC_V1, "quic"}, {ma.P_TCP, "tcp"}} {
		if _, err := addr.ValueForProtocol(t.code); err == nil {
			return t.name
		}
	}
	return "other"
}
