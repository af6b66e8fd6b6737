package migrate

import (
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
)

// EventKind is a step of a migration, or of a resumption.
type EventKind int

// The steps, in the order in which a migration that succeeds takes them. The two
// switches may come in either order. The last three are those of a stream that outlives its
// connection (WithResumption).
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
	// Lost: the connection From is lost, as Err says, and the stream waits for another.
	Lost
	// Resumed: a stream that was lost goes on over the connection To.
	Resumed
	// GivenUp: a stream that was lost is over, without another connection. Err says why; it is
	// nil where the application has ended it meanwhile, or nothing was missing.
	GivenUp
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
	case Lost:
		return "lost"
	case Resumed:
		return "resumed"
	case GivenUp:
		return "given up"
	}
	return "unknown"
}

// Event is one step of one migration or resumption, as WithTracer's function gets it.
type Event struct {
	Kind      EventKind
	Time      time.Time
	Peer      peer.ID
	Stream    *Stream
	Initiator bool // this side sent Migrate
	From, To  network.Conn
	Err       error // of Failed, Lost and GivenUp
	// Took is the time since Started, or since Lost. It is 0 for these two themselves, and where
	// a migration failed before Started.
	Took time.Duration
	// Drained is how many bytes of the application's came over the old connection since the
	// migration began. It is 0 but for ReceiveSwitched and Finished.
	Drained uint64
	// Again is how many bytes of the application's this side sends again, since the lost
	// connection had them and the other end has not received them. It is 0 but for Resumed.
	Again uint64
}
