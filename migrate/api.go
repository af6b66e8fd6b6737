package migrate

import (
	"context"
	"errors"
	"time"

	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"go.uber.org/zap"
)

// skeleton: to be replaced

const ID protocol.ID = "/libp2p/stream-migration"
const FinalSizeID protocol.ID = "/portage/final-size/1.0.0"

var (
	ErrNotLabelled  = errors.New("stream is not labelled")             // not a *Stream of this host
	ErrNotSupported = errors.New("peer does not migrate streams")      // peer lacks the protocol (or S12 where it is required)
	ErrDenied       = errors.New("peer denies to migrate this stream") // M3: for good; the stream is pinned
	ErrClosed       = errors.New("stream is closed")
	ErrTryLater     = errors.New("migration did not happen; try again later") // S9, M1
)

type Option func(*config) error
type config struct{}

type ConnSelector func(ctx context.Context, p peer.ID) network.Conn // nil: the swarm's own choice

func WithConnSelector(ConnSelector) Option                      { panic(0) }
func WithLogger(*zap.Logger) Option                             { panic(0) }
func WithAcceptor(func(s *Stream, to network.Conn) bool) Option { panic(0) }
func WithTracer(func(Event)) Option                             { panic(0) }
func RequireVerifiedHandover() Option                           { panic(0) }
func WithoutLabel(ctx context.Context) context.Context          { panic(0) }

type EventKind int

const (
	Started         EventKind = iota // initiator: Migrate is about to leave; responder: Migrate has come
	Acked                            // initiator: the ack has come; responder: the ack has left
	SendSwitched                     // this side writes to the new stream
	ReceiveSwitched                  // this side reads from the new stream
	Finished                         // the old stream is done with
	Denied
	Failed // S9: stays on the old stream; or S8: reset
)

type Event struct {
	Kind      EventKind
	Time      time.Time
	Peer      peer.ID
	Stream    *Stream
	Initiator bool // this side is the initiator
	From, To  network.Conn
	Err       error // of Failed
}

type Host struct{ host.Host }

func Wrap(h host.Host, opts ...Option) (*Host, error) { panic(0) }
func (h *Host) NewStream(ctx context.Context, p peer.ID, pids ...protocol.ID) (network.Stream, error) {
	panic(0)
}
func (h *Host) Migrate(ctx context.Context, s network.Stream, to network.Conn) error { panic(0) }
func (h *Host) Streams(c network.Conn) []*Stream                                     { panic(0) }
func (h *Host) Supports(p peer.ID) bool                                              { panic(0) }
func (h *Host) Close() error                                                         { panic(0) }

type Stream struct{ network.Stream }

func (s *Stream) Label() uint64   { panic(0) }
func (s *Stream) Migrations() int { panic(0) }
