package migrate

import (
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
)

// Stream is a labelled stream: what the application holds. It implements
// network.Stream and behaves like the underlying stream of its transport, also while
// it migrates. It is safe for concurrent use as that is; concurrent Writes, which can
// break a raw yamux connection, are taken one after the other.
type Stream struct {
	host  *Host
	peer  peer.ID
	proto protocol.ID
	dir   network.Direction
	born  uint64 // the label that it was opened with

	send sendHalf
	recv receiveHalf

	opening    openingState
	migrations uint32 // guarded by mu

	mu       sync.Mutex // guards all below; taken before the halves'
	scope    *scope     // nil as long as nobody has asked for it and no exchange needs it
	ex       *exchange  // the migration under way, or nil
	label    uint64
	counted  chan struct{} // tells the accepting goroutine to return; nil: it may, see serve.go
	serving  bool          // the application's handler runs
	denied   bool          // M3
	verifies bool          // the peer is known to have the verified handover
	life     life
	code     network.StreamErrorCode // of lifeReset
}

var _ network.Stream = (*Stream)(nil)

// life is how far the application is with a stream. It goes on with free, shut and kill.
type life uint8

const (
	lifeOpen   life = iota
	lifeLost        // nothing can save it, and nothing is kept of it; see lost.go
	lifeClosed      // by the application; a migration under way goes on (S7)
	lifeReset       // by either end, or for a failure
)

// shut notes that the application has closed the stream. It says false where that is over
// already. mu must be held.
func (s *Stream) shut() bool {
	if s.life >= lifeClosed {
		return false
	}
	s.life = lifeClosed
	return true
}

// kill notes that the stream is reset, and returns the code to do so with: where an exchange
// fails after the application's reset, that has one code for all. mu must be held.
func (s *Stream) kill(code network.StreamErrorCode) network.StreamErrorCode {
	if s.life != lifeReset {
		s.life, s.code = lifeReset, code
	}
	return s.code
}

// openingState is whether the opening of a stream has been sent (W1). Its zero value is that
// of an acceptor, which has none.
type openingState struct{ v atomic.Uint32 }

const (
	openingSent    uint32 = iota
	openingUnsent         // it leaves with the first Write, or is sent by a Read
	openingSending        // a Read has it sent
)

func (o *openingState) load() uint32 { return o.v.Load() }

// begin notes that there is one to be sent.
func (o *openingState) begin() { o.v.Store(openingUnsent) }

// take says whether the caller is to send it.
func (o *openingState) take() bool {
	return o.v.Load() == openingUnsent && o.v.CompareAndSwap(openingUnsent, openingSending)
}

// giveUp follows take where it could not be sent.
func (o *openingState) giveUp() { o.v.CompareAndSwap(openingSending, openingUnsent) }

// sent notes that it was sent, by whomever, or that nobody needs it any more.
func (o *openingState) sent() { o.v.Store(openingSent) }

func newStream(h *Host, u network.Stream, proto protocol.ID, label uint64) *Stream {
	s := &Stream{
		host:  h,
		peer:  u.Conn().RemotePeer(),
		proto: proto,
		dir:   u.Stat().Direction,
		label: label,
		born:  label,
	}
	s.send.cur = u
	s.recv.cur = &source{stream: u}
	return s
}

// Label returns the ID that both peers know the stream by at the moment. It changes at
// each migration.
func (s *Stream) Label() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.label
}

// Migrations returns how many migrations of this stream have succeeded.
func (s *Stream) Migrations() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return int(s.migrations)
}

// Read implements network.MuxedStream.
func (s *Stream) Read(p []byte) (int, error) {
	if s.opening.take() {
		// An opener that reads first: the acceptor has to learn of the stream. The
		// read deadline shall hold although the opening may block.
		go func() {
			defer s.opening.giveUp()
			s.sendOpening()
		}()
	}
	n, err := s.recv.read(p)
	if err != nil && err != io.EOF {
		s.noteTold()
	}
	return n, err
}

// Write implements network.MuxedStream.
func (s *Stream) Write(p []byte) (int, error) {
	n, err := s.send.write(p)
	if s.opening.load() != openingSent {
		s.noteOpening()
	}
	if err != nil {
		s.noteTold()
	}
	return n, err
}

func (s *Stream) sendOpening() {
	_ = s.send.flush()
	s.noteOpening()
}

func (s *Stream) noteOpening() {
	s.send.mu.Lock()
	defer s.send.mu.Unlock()
	if s.send.opening == nil {
		s.opening.sent()
	}
}

// CloseWrite implements network.MuxedStream. Like that of the underlying stream it may
// block for some seconds on a connection whose path is dead.
func (s *Stream) CloseWrite() error {
	s.recv.noteOwnEnd()
	return s.send.closeWrite()
}

// CloseRead implements network.MuxedStream.
func (s *Stream) CloseRead() error {
	return s.recv.closeRead()
}

// Close implements network.MuxedStream. During a migration it returns at once, and the
// migration goes on: what was written is still delivered (S7).
func (s *Stream) Close() error {
	s.mu.Lock()
	first, migrating := s.shut(), s.ex != nil
	if migrating {
		s.ex.interrupt()
	}
	s.mu.Unlock()
	if !first {
		return nil
	}
	if migrating {
		// Reads and Writes fail when Close has returned. What may block comes later, and the
		// exchange does the rest.
		s.recv.noteOwnEnd()
		s.send.shut()
		from := s.recv.shut()
		go func() {
			_ = s.CloseWrite()
			if from != nil {
				_ = from.CloseRead()
			}
		}()
		return nil
	}
	s.awaitAnswer()
	// No exchange can begin any more, so that both halves are on one stream, and one call
	// closes it for both.
	u, open, err := s.send.end()
	s.recv.shut()
	if r := s.send.resumption; r != nil && err == nil {
		if !open {
			_ = u.CloseRead()
		}
		err = s.send.endKept(u, open, u.Close)
	} else if e := u.Close(); err == nil {
		err = e
	}
	s.forget()
	s.send.resumption.closed()
	s.settle()
	return err
}

func (s *Stream) closeHalves() error {
	err := s.CloseWrite()
	_ = s.CloseRead()
	return err
}

// awaitAnswer reads the acceptor's answer to the opening before an opener closes, as
// the plain host does: on QUIC, closing for reading makes the acceptor's answer fail,
// which not every implementation takes for what it is.
func (s *Stream) awaitAnswer() {
	if !s.recv.owesAnswer() {
		return
	}
	_ = s.send.flush()
	_ = s.recv.awaitAnswer(time.Now().Add(s.host.cfg.negotiation))
}

// Reset implements network.MuxedStream. During a migration it resets both underlying
// streams (S7).
func (s *Stream) Reset() error {
	return s.ResetWithError(network.StreamNoError)
}

// ResetWithError implements network.MuxedStream.
func (s *Stream) ResetWithError(code network.StreamErrorCode) error {
	return s.abort(&network.StreamError{ErrorCode: code}, code)
}

// abort resets whatever the stream stands on, and makes both halves return err.
func (s *Stream) abort(err error, code network.StreamErrorCode) error {
	s.mu.Lock()
	ex := s.ex
	code = s.kill(code)
	if ex != nil {
		ex.interrupt()
	}
	if r := s.send.resumption; r != nil {
		r.endLocked(nil, code)
	}
	s.mu.Unlock()
	s.send.fail(err)
	s.recv.fail(err)
	s.forget()
	defer s.settle()
	if ex == nil {
		return breakOff(s.send.stream(), code)
	}
	// One of the two paths may be dead, and Reset block there.
	go breakOff(ex.old, code)
	if next := ex.next(); next != nil {
		return breakOff(next, code)
	}
	return nil
}

// forget takes the stream out of the table of labels (L5).
func (s *Stream) forget() {
	s.mu.Lock()
	gone := []uint64{s.label}
	if s.ex != nil && s.ex.new != nil {
		gone = append(gone, s.ex.id)
	}
	s.mu.Unlock()
	for _, label := range gone {
		s.host.labels.remove(s.peer, label, s)
	}
}

// SetDeadline implements network.MuxedStream.
func (s *Stream) SetDeadline(t time.Time) error {
	if err := s.SetReadDeadline(t); err != nil {
		return err
	}
	return s.SetWriteDeadline(t)
}

// SetReadDeadline implements network.MuxedStream.
func (s *Stream) SetReadDeadline(t time.Time) error { return s.recv.setDeadline(t) }

// SetWriteDeadline implements network.MuxedStream.
func (s *Stream) SetWriteDeadline(t time.Time) error { return s.send.setDeadline(t) }

// ID implements network.Stream. It never changes, and no other stream of the process has it:
// the peer, and the label that the stream was opened with.
func (s *Stream) ID() string { return fmt.Sprintf("%s-%d", s.peer, s.born) }

// Protocol implements network.Stream. It never changes.
func (s *Stream) Protocol() protocol.ID { return s.proto }

// SetProtocol implements network.Stream. The protocol of a labelled stream is set
// before the application gets it; as with any stream, a second time is an error.
func (s *Stream) SetProtocol(id protocol.ID) error {
	return fmt.Errorf("stream speaks %s already", s.proto)
}

// Conn implements network.Stream. It returns the connection that Writes take at the
// moment.
func (s *Stream) Conn() network.Conn { return s.send.stream().Conn() }

// Stat implements network.Stream. All but the direction, which says who opened the
// logical stream, is that of the present underlying stream. Those that Conn.GetStreams
// lists are the underlying ones: where the stream has moved, their direction says who moved
// it, which go-libp2p does not let anybody set.
func (s *Stream) Stat() network.Stats {
	stat := s.send.stream().Stat()
	stat.Direction = s.dir
	return stat
}

// Scope implements network.Stream. The scope follows the stream: what is reserved in it
// now is reserved on the next connection after a migration.
func (s *Stream) Scope() network.StreamScope {
	s.mu.Lock()
	defer s.mu.Unlock()
	sc := s.scopeLocked()
	sc.asked = true
	return sc
}

func (s *Stream) scopeLocked() *scope {
	if s.scope == nil {
		s.scope = &scope{cur: s.send.stream().Scope()}
	}
	return s.scope
}

// String returns a short description for logs.
func (s *Stream) String() string {
	return fmt.Sprintf("<migrate.Stream %s label %d on %s>", s.proto, s.Label(), s.Conn().RemoteMultiaddr())
}
