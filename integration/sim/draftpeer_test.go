package sim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	msmux "github.com/multiformats/go-multistream"

	. "github.com/go-portage/portage/internal/rawpeer"
	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/migrate"
	"github.com/go-portage/portage/pb"
)

// draftHost is a host that has the draft and nothing else: an implementation of its own, on the
// bytes of internal/rawpeer, which shares no code with package migrate. It is as simple as one can be that loses
// nothing where nothing goes wrong: it reads an old stream only when its application
// reads, and it believes every EOF.
type draftHost struct {
	*Node
	w    *world
	side int
	app  *msmux.MultistreamMuxer[protocol.ID]

	mu      sync.Mutex // guards all below
	counter uint64
	streams map[uint64]*draftStream
}

func newDraftHost(w *world, side int, node *Node) *draftHost {
	h := &draftHost{
		Node: node, w: w, side: side, app: msmux.NewMultistreamMuxer[protocol.ID](),
		counter: w.plan.rand("labels of %s at %v", sideName(side), time.Since(w.start)).Uint64() >> 32,
		streams: make(map[uint64]*draftStream),
	}
	for _, st := range w.streams {
		h.app.AddHandler(st.pid, nil)
	}
	node.SetStreamHandler(migrate.ID, h.handle)
	return h
}

// fresh returns a label: even where this host's ID is the lower.
func (h *draftHost) fresh(p peer.ID) uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.counter += 2
	if h.ID() < p {
		return h.counter &^ 1
	}
	return h.counter | 1
}

func (h *draftHost) enter(label uint64, s *draftStream) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.streams[label] = s
}

func (h *draftHost) remove(label uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.streams, label)
}

func (h *draftHost) find(label uint64) *draftStream {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.streams[label]
}

// draftStream is a labelled stream of it. rd is where it reads, wr where it writes;
// during a migration next is what comes after rd.
type draftStream struct {
	network.Stream // the first underlying stream, for what never changes
	h              *draftHost
	st             *simStream
	turn           chan struct{} // holds a token while somebody is inside wr.Write
	order          chan struct{} // and as long as a Write is under way
	readTurn       chan struct{} // and rd.Read

	mu        sync.Mutex // guards all below
	changed   sync.Cond
	rd, wr    network.Stream
	next      network.Stream
	owed      int            // bytes of the acceptor's answer that have not been read
	asking    network.Stream // where Migrate was sent and no answer has come
	responder bool           // of the migration to next
	switching bool
	label     uint64
	nextLabel uint64
	eof       bool
	closedW   bool
	closedR   bool
	aborted   bool
	denied    bool
}

func (h *draftHost) newStream(u network.Stream, label uint64, st *simStream) *draftStream {
	s := &draftStream{Stream: u, h: h, st: st, turn: make(chan struct{}, 1), order: make(chan struct{}, 1), readTurn: make(chan struct{}, 1), rd: u, wr: u, label: label}
	s.changed.L = &s.mu
	h.enter(label, s)
	return s
}

// NewStream opens a labelled stream, and sends its opening at once.
func (h *draftHost) NewStream(ctx context.Context, p peer.ID, pids ...protocol.ID) (network.Stream, error) {
	st := h.w.streamOf(pids[0])
	c, _ := ctx.Value(onLink{}).(network.Conn)
	if !st.plan.labelled || c == nil {
		return h.Node.NewStream(ctx, p, pids...)
	}
	u, err := c.NewStream(ctx)
	if err != nil {
		return nil, err
	}
	if err := u.SetProtocol(st.pid); err != nil {
		return nil, err
	}
	label := h.fresh(p)
	s := h.newStream(u, label, st)
	if _, err := io.WriteString(u, OpeningBytes(label, st.pid)); err != nil {
		_ = u.Reset()
		return nil, err
	}
	s.owed = len(AnswerBytes(st.pid))
	return s, nil
}

func (h *draftHost) handle(u network.Stream) {
	m, err := ReadMessage(u)
	switch {
	case err != nil:
		_ = u.Reset()
	case m.GetMigrate() != nil:
		h.respond(u, m.GetMigrate().GetId(), m.GetMigrate().GetFrom())
	case m.GetLabel() != nil:
		pid, _, err := h.app.Negotiate(u)
		if err != nil {
			_ = u.Reset()
			return
		}
		st := h.w.streamOf(pid)
		st.accept(h.newStream(u, m.GetLabel().GetId(), st))
	default:
		_ = u.Reset()
	}
}

// Migrate is the initiator's part.
func (h *draftHost) Migrate(ctx context.Context, ns network.Stream, to network.Conn) error {
	s, ok := ns.(*draftStream)
	if !ok || s.h != h {
		return migrate.ErrNotLabelled
	}
	s.mu.Lock()
	switch {
	case s.denied:
		s.mu.Unlock()
		return migrate.ErrDenied
	case s.closedR || s.aborted: // it would not see the end of the old stream
		s.mu.Unlock()
		return migrate.ErrClosed
	case s.asking != nil || s.next != nil || s.switching || s.rd != s.wr || s.wr.Conn() == to:
		s.mu.Unlock()
		return migrate.ErrTryLater
	}
	s.switching = true
	s.mu.Unlock()
	id := h.fresh(to.RemotePeer())
	u, err := to.NewStream(ctx)
	s.mu.Lock()
	s.switching = false
	if err == nil && s.next != nil {
		err = errors.New("the peer was faster")
		go u.Reset()
	}
	if err != nil {
		s.mu.Unlock()
		return fmt.Errorf("%w: %w", migrate.ErrTryLater, err)
	}
	from := s.label
	s.asking = u
	s.mu.Unlock()
	s.step(true, migrate.Started, u)
	var m *pb.StreamMigration
	if _, err = io.WriteString(u, Prelude+MigrateDraftBytes(id, from)); err == nil {
		if err = Expect(u, Prelude); err == nil {
			m, err = ReadMessage(u)
		}
	}
	ack := m.GetAckMigrate()
	if err == nil && ack == nil {
		err = errors.New("not an ack")
	}
	s.mu.Lock()
	superseded := s.asking != u
	s.asking = nil
	s.changed.Broadcast()
	switch {
	case err != nil || superseded:
		s.mu.Unlock()
		s.stays(superseded)
		_ = u.Reset()
		s.step(true, migrate.Failed, u)
		return fmt.Errorf("%w: %w", migrate.ErrTryLater, errors.Join(err))
	case ack.GetDenyMigrate():
		s.denied = true
		s.mu.Unlock()
		s.stays(false)
		_ = u.Close()
		s.step(true, migrate.Denied, u)
		return migrate.ErrDenied
	}
	s.next, s.responder, s.nextLabel = u, false, id
	aborted := s.aborted
	s.mu.Unlock()
	h.enter(id, s)
	s.step(true, migrate.Acked, u)
	if aborted {
		_ = u.Reset()
		return migrate.ErrClosed
	}
	s.switchWriting(u)
	s.afterEnd()
	return nil
}

// stays calls out settle, where an attempt has come to nothing and the application has
// closed its reading meanwhile, unless another one goes on.
func (s *draftStream) stays(goesOn bool) {
	s.mu.Lock()
	rd, closed := s.rd, s.closedR
	s.mu.Unlock()
	if closed && !goesOn {
		go rd.CloseRead()
	}
}

// respond is the responder's.
func (h *draftHost) respond(u network.Stream, id, from uint64) {
	s := h.find(from)
	answer := func(ack string) error {
		_, err := io.WriteString(u, ack)
		return err
	}
	if s == nil {
		_ = answer(AckDenied)
		_ = u.Close()
		return
	}
	s.mu.Lock()
	if s.asking != nil && h.ID() < u.Conn().RemotePeer() || s.next != nil || s.rd != s.wr || s.label != from {
		s.mu.Unlock()
		_ = u.Reset() // ours goes first, or the last one is not over
		return
	}
	if s.closedR || s.aborted {
		s.mu.Unlock()
		_ = answer(AckDenied)
		_ = u.Close()
		return
	}
	var dropped network.Stream
	dropped, s.asking = s.asking, nil
	s.next, s.responder, s.nextLabel = u, true, id
	s.changed.Broadcast()
	s.mu.Unlock()
	if dropped != nil {
		_ = dropped.Reset()
	}
	h.enter(id, s)
	s.step(false, migrate.Started, u)
	s.step(false, migrate.Acked, u) // it may have left whatever comes
	if err := answer(AckDraft); err != nil {
		_ = s.Reset()
		return
	}
	s.afterEnd()
}

func (s *draftStream) step(initiator bool, kind migrate.EventKind, to network.Stream) {
	s.mu.Lock()
	from := s.rd
	s.mu.Unlock()
	i, j := s.h.w.linkOf(from.Conn()), s.h.w.linkOf(to.Conn())
	s.h.w.logf("stream %d: %s (draft) %s, %d to %d", s.st.id, sideName(s.h.side), kind, i, j)
	s.st.step(s.h.side, initiator, kind, i, j)
}

// switchWriting lets Writes go to u.
func (s *draftStream) switchWriting(u network.Stream) {
	s.mu.Lock()
	old := s.wr
	s.switching = true
	s.mu.Unlock()
	for held := false; !held; {
		_ = old.SetWriteDeadline(time.Unix(1, 0))
		select {
		case s.turn <- struct{}{}:
			held = true
		case <-time.After(100 * time.Millisecond):
		}
	}
	s.mu.Lock()
	s.wr, s.switching = u, false
	closed := s.closedW
	s.changed.Broadcast()
	s.mu.Unlock()
	<-s.turn
	_ = old.CloseWrite()
	if closed {
		_ = u.CloseWrite()
	}
}

// afterEnd goes on with the next stream where the present one has ended already, or
// nobody reads it any more.
func (s *draftStream) afterEnd() {
	s.mu.Lock()
	eof, closed := s.eof, s.closedR
	s.mu.Unlock()
	switch {
	case eof:
		s.switchReading()
	case closed:
		go s.settle()
	}
}

// switchReading lets Reads go to the next stream: the old one has ended.
func (s *draftStream) switchReading() {
	s.mu.Lock()
	u, old, responder, closed := s.next, s.rd, s.responder, s.closedR
	gone := s.label
	if u == nil {
		s.mu.Unlock()
		return
	}
	s.mu.Unlock()
	if responder {
		s.switchWriting(u)
	}
	s.step(!responder, migrate.Finished, u)
	s.mu.Lock()
	s.rd, s.next, s.label, s.owed = u, nil, s.nextLabel, 0
	s.changed.Broadcast()
	s.mu.Unlock()
	s.h.remove(gone)
	go old.Close()
	if closed {
		_ = u.CloseRead()
	}
}

func (s *draftStream) Read(p []byte) (int, error) {
	for held := false; !held; {
		s.mu.Lock()
		closed, aborted := s.closedR, s.aborted
		s.mu.Unlock()
		if closed && !aborted {
			// The turn may be settle's, until the old stream ends. Where the new one has
			// died, the other end, which has fallen back (S9), may wait for what this
			// application does when it is told.
			return 0, errors.New("closed")
		}
		select {
		case s.readTurn <- struct{}{}:
			held = true
		case <-time.After(100 * time.Millisecond):
		}
	}
	defer func() { <-s.readTurn }()
	for {
		s.mu.Lock()
		rd, owed, closed, eof, aborted := s.rd, s.owed, s.closedR, s.eof, s.aborted
		s.mu.Unlock()
		switch {
		case aborted:
			return 0, network.ErrReset
		case closed:
			return 0, errors.New("closed")
		case eof:
			return 0, io.EOF
		}
		n, err := s.readOnce(rd, owed, p)
		if n > 0 || err == nil && len(p) == 0 {
			return n, nil
		}
		if err == nil {
			continue
		}
		s.mu.Lock()
		if err == io.EOF {
			for s.asking != nil {
				s.changed.Wait()
			}
			if s.next == nil && s.rd == rd {
				s.eof = true
			}
		}
		moved, next := s.rd != rd, s.next
		s.mu.Unlock()
		switch {
		case moved:
		case err == io.EOF && next != nil:
			s.switchReading()
		default:
			return 0, err
		}
	}
}

// readOnce reads from rd, first what is left of the acceptor's answer.
func (s *draftStream) readOnce(rd network.Stream, owed int, p []byte) (int, error) {
	if owed == 0 {
		return rd.Read(p)
	}
	n, err := rd.Read(make([]byte, owed))
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rd == rd {
		s.owed -= n
	}
	if n > 0 {
		err = nil
	}
	return 0, err
}

// settle reads on in the application's stead until a migration is over.
func (s *draftStream) settle() {
	s.readTurn <- struct{}{}
	defer func() { <-s.readTurn }()
	for {
		s.mu.Lock()
		rd, next, asking := s.rd, s.next, s.asking
		s.mu.Unlock()
		if next == nil && asking == nil {
			break
		}
		n, err := rd.Read(make([]byte, 4096))
		if n > 0 || err == nil {
			continue
		}
		if err != io.EOF {
			break
		}
		s.mu.Lock()
		for s.asking != nil {
			s.changed.Wait()
		}
		s.mu.Unlock()
		s.switchReading()
	}
	s.mu.Lock()
	rd, wr, next, closedW, label := s.rd, s.wr, s.next, s.closedW, s.label
	s.mu.Unlock()
	if closedW {
		if next != nil {
			_ = next.Reset() // the migration has failed
		}
		_ = rd.Close()
		_ = wr.Close()
		s.h.remove(label)
	}
}

func (s *draftStream) Write(p []byte) (n int, err error) {
	s.order <- struct{}{} // also where a migration calls one out: what is left of it comes first
	defer func() { <-s.order }()
	for {
		s.mu.Lock()
		for s.switching && s.next != nil {
			s.changed.Wait()
		}
		closed, aborted := s.closedW, s.aborted
		s.mu.Unlock()
		switch {
		case aborted:
			return n, network.ErrReset
		case closed:
			return n, errors.New("closed")
		}
		s.turn <- struct{}{}
		s.mu.Lock()
		wr := s.wr
		s.mu.Unlock()
		var m int
		m, err = wr.Write(p[n:])
		<-s.turn
		if n += m; n == len(p) {
			return n, nil
		}
		s.mu.Lock()
		again := s.switching && s.next != nil || s.wr != wr
		s.mu.Unlock()
		if err != nil && !again {
			return n, err
		}
	}
}

func (s *draftStream) CloseWrite() error {
	s.mu.Lock()
	s.closedW = true
	wr, switching := s.wr, s.switching && s.next != nil
	s.mu.Unlock()
	if switching {
		return nil
	}
	return wr.CloseWrite()
}

func (s *draftStream) CloseRead() error {
	s.mu.Lock()
	if s.closedR {
		s.mu.Unlock()
		return nil
	}
	s.closedR = true
	rd, busy := s.rd, s.next != nil || s.asking != nil
	s.mu.Unlock()
	if busy {
		go s.settle()
		return nil
	}
	return rd.CloseRead()
}

func (s *draftStream) Close() error {
	err := s.CloseWrite()
	s.mu.Lock()
	s.closedR = true
	s.mu.Unlock()
	go s.settle()
	return err
}

func (s *draftStream) Reset() error { return s.ResetWithError(0) }

func (s *draftStream) ResetWithError(code network.StreamErrorCode) error {
	s.mu.Lock()
	s.aborted, s.closedR, s.closedW = true, true, true
	all := []network.Stream{s.rd, s.wr, s.next, s.asking}
	labels := []uint64{s.label, s.nextLabel}
	s.changed.Broadcast()
	s.mu.Unlock()
	for _, u := range all {
		if u != nil {
			_ = u.SetDeadline(time.Unix(1, 0))
			_ = u.ResetWithError(code)
		}
	}
	for _, label := range labels {
		s.h.remove(label)
	}
	return nil
}

func (s *draftStream) Conn() network.Conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rd.Conn()
}

func (s *draftStream) SetReadDeadline(t time.Time) error {
	s.mu.Lock()
	rd := s.rd
	s.mu.Unlock()
	return rd.SetReadDeadline(t)
}

func (s *draftStream) SetWriteDeadline(t time.Time) error {
	s.mu.Lock()
	wr := s.wr
	s.mu.Unlock()
	return wr.SetWriteDeadline(t)
}
