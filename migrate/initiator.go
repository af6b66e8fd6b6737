package migrate

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"go.uber.org/zap"

	"github.com/go-portage/portage/pb"
)

// The initiator's side of a migration, in the order of events:
//
//	open a stream on the other connection, send ID and Migrate
//	wait for the ack; an end of the old stream is held back meanwhile (S5)
//	-- until here everything can be undone; from here on nothing can (S10) --
//	pause writing, send FinalSize, go on writing on the new stream, close the old
//	one for writing (S2)
//	read FinalSize, read the old stream up to it, go on reading on the new stream
//	let go of the old stream
//
// All of it happens on one goroutine, which holds no lock while it waits.

// Migrate moves the stream s, which must be a *Stream of this host, to the connection
// to, which must lead to the same peer. It returns when the old underlying stream is
// done with, both ways; the application's bytes take the new connection long before. If
// s is on that connection already, nothing happens.
//
// The stream stays usable throughout. If Migrate fails with ErrTryLater or ErrDenied
// it goes on where it was; with any other error but a context's, see the errors of this
// package, it was reset or could not be migrated in the first place. Once the request
// has been sent it cannot be taken back: when ctx ends, Migrate returns its error, and
// the migration goes on (S10).
//
// If another migration of s is under way, Migrate waits for it first. On a limited
// connection ctx has to allow it with network.WithAllowLimitedConn. Safe for concurrent
// use.
func (h *Host) Migrate(ctx context.Context, s network.Stream, to network.Conn) error {
	st, ok := s.(*Stream)
	if !ok || st.host != h {
		return ErrNotLabelled
	}
	wrap := func(err error) error {
		return fmt.Errorf("migrate stream %d of %s: %w", st.Label(), st.peer, err)
	}
	if p := to.RemotePeer(); p != st.peer {
		return wrap(fmt.Errorf("the connection leads to another peer, %s", p))
	}
	if h.cfg.verified && !st.verifiable() {
		return wrap(ErrNotSupported)
	}
	x := &exchange{initiator: true, id: h.labels.fresh(st.peer)}
	for {
		st.mu.Lock()
		denied := st.denied
		st.mu.Unlock()
		if denied {
			return wrap(ErrDenied)
		}
		busy, err := st.begin(x)
		if err != nil {
			return wrap(err)
		}
		if busy == nil {
			break
		}
		select {
		case <-busy.done:
		case <-ctx.Done():
			return wrap(ctx.Err())
		}
	}
	result := make(chan error, 1)
	run := func() { result <- x.initiate(ctx, to) }
	if ctx.Done() == nil {
		run()
	} else {
		go run()
	}
	select {
	case err := <-result:
		if err != nil {
			return wrap(err)
		}
		return nil
	case <-ctx.Done():
		return wrap(ctx.Err())
	}
}

// initiate runs the exchange. ctx counts only until Migrate is sent.
func (x *exchange) initiate(ctx context.Context, to network.Conn) error {
	s, h := x.s, x.s.host
	tryLater := func(err error) error {
		err = x.unmoved(err)
		x.trace(Failed, err)
		x.end(stays)
		return err
	}
	if to == x.old.Conn() {
		x.end(stays) // it is there already
		return nil
	}
	// The label must be on its way before somebody refers to it.
	s.sendOpening()
	if s.opening.load() != openingSent {
		return tryLater(errors.New("the opening of the stream cannot be sent"))
	}
	u, err := x.openOn(ctx, to)
	if err != nil {
		return tryLater(fmt.Errorf("open a stream: %w", err))
	}
	h.observe(to, ID, network.DirOutbound)
	if !x.attach(u) {
		_ = u.Reset()
		return tryLater(errSuperseded)
	}
	if err := x.charge(u); err != nil {
		_ = u.ResetWithError(network.StreamResourceLimitExceeded)
		return tryLater(err)
	}
	x.verified = s.verifiable()
	if !x.hold() {
		_ = u.Reset()
		return tryLater(ErrClosed)
	}
	x.trace(Started, nil)

	l := x.listen(u)
	defer l.end()
	ack, err := x.request(l)
	if err != nil && l.cause(err) == errSilent && x.commit() {
		return x.fail(errSilent)
	}
	if err == nil && !x.answered(ack) {
		err = errSuperseded
	}
	if err != nil {
		// A reset now may have crossed an ack (S5).
		x.trace(Failed, x.unmoved(err))
		x.giveUp(u, x.code(err))
		x.doubt()
		x.end(stays)
		if errors.Is(err, errViolation) {
			h.warnViolation(s.peer, err, zap.Uint64("label", x.from))
		}
		return x.unmoved(err)
	}
	if ack.GetDenyMigrate() {
		x.trace(Denied, nil)
		_ = u.Close()
		x.end(stays)
		return ErrDenied
	}
	x.trace(Acked, nil)
	if err := x.carry(u, ack); err != nil {
		return x.fail(err)
	}
	return nil
}

// roomWait is how long a migration waits for a place on a connection that has none: some
// round trips of any path that is in use, since that may be all it takes. Who moves many
// streams needs to know that the others had better stay.
const roomWait = time.Second

// openOn opens the stream to move to.
func (x *exchange) openOn(ctx context.Context, to network.Conn) (network.Stream, error) {
	opening, stop := context.WithTimeoutCause(ctx, roomWait, errNoRoom)
	defer stop()
	x.mayStop(stop)
	u, err := to.NewStream(opening)
	if err != nil && context.Cause(opening) == errNoRoom {
		return nil, errNoRoom
	}
	return u, err
}

var errNoRoom = fmt.Errorf("the connection has had no room for a stream for %s", roomWait)

// answered takes note of the answer, unless the exchange has yielded (M1).
func (x *exchange) answered(ack *pb.AckMigrate) bool {
	if !ack.GetDenyMigrate() {
		return x.commit()
	}
	x.s.mu.Lock()
	defer x.s.mu.Unlock()
	x.s.denied = x.s.denied || x.phase != phaseYielded
	return x.phase != phaseYielded
}

// unmoved is what Migrate returns where err came before the ack.
func (x *exchange) unmoved(err error) error {
	x.s.mu.Lock()
	defer x.s.mu.Unlock()
	if x.s.life == lifeReset || x.s.told() {
		return fmt.Errorf("%w: %w", ErrClosed, err)
	}
	return fmt.Errorf("%w: %w", ErrTryLater, err)
}

var errSuperseded = errors.New("the peer migrates the stream at this moment")

// codeFor is the code to reset a stream with because of err.
func codeFor(err error) network.StreamErrorCode {
	if errors.Is(err, errViolation) {
		return network.StreamProtocolViolation
	}
	return network.StreamNoError
}

// code is the code to reset u with because of err, before the ack. Where the application has
// reset the stream it is the application's, whoever gets there first: err may come from the
// deadline by which that has called the exchange out (S7).
func (x *exchange) code(err error) network.StreamErrorCode {
	x.s.mu.Lock()
	defer x.s.mu.Unlock()
	if x.s.life == lifeReset {
		return x.s.code
	}
	return codeFor(err)
}

// request sends Migrate and waits for the answer.
func (x *exchange) request(l *silence) (*pb.AckMigrate, error) {
	request := append(make([]byte, 0, len(prelude)+usualMessage), prelude...)
	if _, err := l.new.Write(appendMessage(request, migrateMessage(x.id, x.from))); err != nil {
		return nil, fmt.Errorf("request: %w", err)
	}
	if err := readExpected(l, prelude, 0); err != nil {
		return nil, fmt.Errorf("answer: %w", err)
	}
	m, err := readMessage(l)
	if err != nil {
		return nil, fmt.Errorf("answer: %w", err)
	}
	ack := m.GetAckMigrate()
	if ack == nil {
		return nil, fmt.Errorf("%w: expected AckMigrate, got %T", errViolation, m.Type)
	}
	return ack, nil
}

// carry moves both directions to u, after the ack.
func (x *exchange) carry(u network.Stream, ack *pb.AckMigrate) error {
	if x.verified && !ack.GetFinalSize() {
		// An EOF of the old stream was kept back, and errors of it, on the
		// assumption that the handover will tell what they are worth.
		return fmt.Errorf("%w: the peer advertises %s and does not answer with it", errViolation, FinalSizeID)
	}
	x.verified = ack.GetFinalSize()
	if err := x.switchSending(u); err != nil {
		return err
	}
	x.closeOld()
	var g goal = untilEOF{}
	if x.verified {
		x.s.mu.Lock()
		x.s.verifies = true
		x.s.mu.Unlock()
		final, err := readFinalSize(&x.silence)
		if err != nil {
			return fmt.Errorf("final size: %w", x.silence.cause(err))
		}
		x.silence.end()
		g = finalSize(final)
	}
	if err := x.switchReceiving(&source{stream: u}, g); err != nil {
		return err
	}
	x.finish(u)
	return nil
}
