package migrate

import (
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
)

// EventKind is a step of a migration.
type EventKind int

// The steps, in the order in which a migration that succeeds takes them. The two
// switches may come in either order.
const (
	// Started: Migrate is about to leave (initiator), or has come (responder).
	Started EventKind = iota
	// Acked: the ack has come (initiator), or has left (responder).
	Acked
	// SendSwitched: from here on the application's Writes take the new connection.
	SendSwitched
	// ReceiveSwitched: all that was sent over the old connection has been received.
	ReceiveSwitched
	// Finished: the old underlying stream is done with, and closed.
	Finished
	// Denied: the stream stays where it is, for good (M3).
	Denied
	// Failed: Err says why, and what became of the stream: it stays where it is
	// (ErrTryLater, or ErrClosed where it is not to migrate any more), or was reset
	// (network.ErrReset alone).
	Failed
)

// String implements fmt.Stringer.
func (k EventKind) String() string {
	switch k {
	case Started:
		return "started"
	case Acked:
		return "acked"
	case SendSwitched:
		return "send switched"
	case ReceiveSwitched:
		return "receive switched"
	case Finished:
		return "finished"
	case Denied:
		return "denied"
	case Failed:
		return "failed"
	}
	return "unknown"
}

// Event is one step of one migration, as WithTracer's function gets it.
type Event struct {
	Kind      EventKind
	Time      time.Time
	Peer      peer.ID
	Stream    *Stream
	Initiator bool // this side sent Migrate
	From, To  network.Conn
	Err       error // of Failed
	// Took is the time since Started. It is 0 for Started itself, and where a migration
	// failed before that.
	Took time.Duration
	// Drained is how many bytes of the application's came over the old connection since the
	// migration began. It is 0 but for ReceiveSwitched and Finished.
	Drained uint64
}
