package migrate

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"go.uber.org/zap"

	"github.com/go-portage/portage/internal/aside"
	"github.com/go-portage/portage/pb"
)

// Attempts to resume a stream that is lost (R2 to R6). Either end makes them, and their epochs
// order all of them. Who asks tells how much it has received, and so does who acks; each
// writes from there on.

const (
	// acceptorWaits is how long the end that did not open the stream leaves the first attempt
	// to the other, so that the two rarely cross (R6).
	acceptorWaits = 500 * time.Millisecond

	// attemptTimeout is how long an attempt may take: TCP repeats what was lost on a
	// connection that is new after 1 s, and again 2 s later.
	attemptTimeout = 4 * time.Second

	// firstPause and longestPause are how long the next attempt waits for when one has failed:
	// between half and all of a pause that doubles.
	firstPause   = 200 * time.Millisecond
	longestPause = 3 * time.Second

	// maxEpochJump is how far an epoch may be above all that are known (R5).
	maxEpochJump = 1 << 16
)

// nextEpoch is the smallest epoch above e that is of that parity (R2).
func nextEpoch(e, parity uint64) uint64 {
	e++
	return e + (e^parity)&1
}

func pauseAfter(tries uint32) time.Duration {
	pause := min(firstPause<<min(tries, 8), longestPause)
	return pause/2 + rand.N(pause/2)
}

// ask attempts to resume the stream on c. It returns when that is decided.
func (r *resumption) ask(c network.Conn) {
	s, h := r.s, r.s.host
	s.mu.Lock()
	if r.state != resumeLost {
		s.mu.Unlock()
		return
	}
	epoch := nextEpoch(max(r.promised, r.heard), h.labels.parity(s.peer, true))
	r.state, r.promised = resumeAsking, epoch
	id := h.labels.fresh(s.peer)
	if !r.name(id) {
		id = 0
	}
	from := s.label
	s.mu.Unlock()
	var err error
	begun := time.Now()
	if id == 0 {
		err = errors.New("the new label is taken")
	} else {
		err = r.attemptOn(c, id, from, epoch)
	}
	if err != nil {
		if time.Since(begun) >= attemptTimeout && !c.IsClosed() {
			r.of.isSilent(c)
		}
		h.log.Debug("attempt to resume failed", zap.Stringer("peer", s.peer), zap.Uint64("origin", r.origin),
			zap.Uint64("epoch", epoch), zap.Error(err))
		r.failed(epoch, pauseAfter)
	}
}

func resumeMessage(id, from, origin, epoch, received uint64) *pb.StreamMigration {
	return &pb.StreamMigration{Type: &pb.StreamMigration_Migrate{Migrate: &pb.Migrate{
		Id: &id, From: &from, Resume: &pb.Resume{Origin: &origin, Epoch: &epoch, Received: &received},
	}}}
}

// name enters the label that an attempt would give the stream, in place of the one that the
// last would have given. s.mu must be held.
func (r *resumption) name(id uint64) bool {
	s := r.s
	r.unname()
	if s.life != lifeOpen {
		return true
	}
	if !s.host.labels.add(s.peer, id, s) {
		return false
	}
	r.waits.asked = id
	return true
}

// unname takes back the label that the last attempt would have given. s.mu must be held.
func (r *resumption) unname() {
	s := r.s
	if id := r.waits.asked; id != 0 && id != s.label {
		s.host.labels.remove(s.peer, id, s)
	}
	r.waits.asked = 0
}

// failed ends the attempt of that epoch, if it is open still. The next one waits.
func (r *resumption) failed(epoch uint64, pause func(tries uint32) time.Duration) {
	s := r.s
	s.mu.Lock()
	var u network.Stream
	if r.promised == epoch && (r.state == resumeAsking || r.state == resumeAnswering) {
		w := r.waits
		r.state = resumeLost
		w.notBefore = time.Now().Add(pause(w.tries))
		w.tries++
		u, w.attempt = w.attempt, nil
	}
	s.mu.Unlock()
	if u != nil {
		_ = breakOff(u, codeGivenUp)
	}
	r.of.wake()
}

// attemptOn is an attempt on c. Where it returns an error the attempt is to be ended.
func (r *resumption) attemptOn(c network.Conn, id, from, epoch uint64) error {
	s, h := r.s, r.s.host
	ctx, cancel := context.WithTimeout(network.WithAllowLimitedConn(h.ctx, "resume"), attemptTimeout)
	defer cancel()
	if err := h.awaitIdentify(ctx, c); err != nil {
		return err
	}
	if speaks, known := h.told.speaks(c, ResumeID); known && !speaks {
		return errors.New("this connection leads to a process that does not resume streams")
	}
	u, err := c.NewStream(ctx)
	if err != nil {
		return err
	}
	h.observe(c, ID, network.DirOutbound)
	s.mu.Lock()
	stands := r.promised == epoch && r.state == resumeAsking
	if stands {
		r.waits.attempt = u
	}
	s.mu.Unlock()
	if !stands {
		_ = u.ResetWithError(codeGivenUp)
		return nil
	}
	// No deadline: yamux cannot lift one any more when the other end's data and its end of
	// writing have come, right behind the ack.
	timer := time.AfterFunc(attemptTimeout, func() { _ = breakOff(u, codeGivenUp) })
	defer timer.Stop()
	if err := r.charge(u); err != nil {
		return err
	}
	s.recv.mu.Lock()
	n := s.recv.received()
	s.recv.mu.Unlock()
	if _, err := u.Write(appendMessage([]byte(prelude), resumeMessage(id, from, r.origin, epoch, n))); err != nil {
		return err
	}
	if err := readExpected(u, prelude, 0); err != nil {
		return err
	}
	m, err := readMessage(u)
	ack := m.GetAckMigrate()
	switch {
	case errors.Is(err, errViolation):
	case err != nil:
		return err
	case ack == nil:
		err = fmt.Errorf("%w: expected AckMigrate, got %T", errViolation, m.Type)
	case ack.GetDenyMigrate():
		r.failIf(epoch, errGone)
		return nil
	case ack.Stale != nil:
		r.stale(epoch, ack.GetStale())
		return nil
	case ack.Received == nil:
		err = fmt.Errorf("%w: an ack that does not say what was received", errViolation)
	}
	if err != nil {
		r.violatedIf(epoch, err)
		return nil
	}
	if !timer.Stop() {
		return errors.New("the ack came too late")
	}
	start, err := r.start(ack.GetReceived())
	switch {
	case errors.Is(err, errViolation):
		r.violatedIf(epoch, err)
	case err != nil:
		r.failIf(epoch, err)
	case !r.attach(u, epoch, id, start):
		_ = breakOff(u, codeGivenUp)
	}
	return nil
}

// failIf ends the stream for good if the attempt of that epoch is open still.
func (r *resumption) failIf(epoch uint64, cause error) {
	if r.asks(epoch) {
		r.fail(cause)
	}
}

// violatedIf is violated if the attempt of that epoch is open still: what is answered to another is
// ignored (R5).
func (r *resumption) violatedIf(epoch uint64, err error) {
	if r.asks(epoch) {
		r.violated(err)
	}
}

// asks says whether the attempt of that epoch is open still.
func (r *resumption) asks(epoch uint64) bool {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	return r.promised == epoch && r.state == resumeAsking
}

// stale ends an attempt that another has overtaken (R5, R6).
func (r *resumption) stale(epoch uint64, m *pb.Stale) {
	r.s.mu.Lock()
	if at := m.GetEpoch(); at > r.heard && at-max(r.heard, r.promised) <= maxEpochJump {
		r.heard = at
	}
	r.s.mu.Unlock()
	r.failed(epoch, func(tries uint32) time.Duration {
		if m.GetWait() {
			return attemptTimeout
		}
		return pauseAfter(tries)
	})
}

// start is where to write from, to an end that has received so much (R3, R4).
func (r *resumption) start(received uint64) (uint64, error) {
	h := &r.s.send
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := r.checkReceived(received); err != nil {
		return 0, err
	}
	r.ring.confirm(received)
	from := min(r.ring.confirmed, r.ring.end)
	if from < r.ring.low {
		return 0, errDroppedBytes
	}
	return from, nil
}

// attach takes the stream to u, which was acked (R3, R4), from the offset start on. It says
// false where another attempt has come before.
func (r *resumption) attach(u network.Stream, epoch, id, start uint64) bool {
	s := r.s
	s.mu.Lock()
	for {
		if r.promised != epoch || r.state != resumeAsking && r.state != resumeAnswering {
			s.mu.Unlock()
			return false
		}
		if s.ex == nil {
			break
		}
		done := s.ex.done // a migration that was dropped: it may not see the stream attached
		s.mu.Unlock()
		<-done
		s.mu.Lock()
	}
	w := r.waits
	resumed := Event{Kind: Resumed, Initiator: r.state == resumeAsking, From: w.away, To: u.Conn(), Took: time.Since(w.since)}
	r.state, w.attempt = resumeAttached, nil
	gone := s.label
	switch {
	case w.asked != id: // a stream that was closed has none
	case s.life == lifeOpen:
		s.label, w.asked = id, 0
	default:
		gone, w.asked = id, 0
	}
	if s.life == lifeOpen {
		r.disarm()
	}
	if sc := s.scope; sc != nil && sc.own == nil {
		if err := sc.follow(u.Scope(), true); err != nil {
			s.warnUnaccounted(err)
		}
	}
	r.of.hears(u.Conn())
	reads := s.recv.takeUp(u)
	replays, again := s.send.takeUp(u, start)
	resumed.Again = again
	done := !replays && s.life == lifeClosed && r.finished() // else Close has yet to end the writing
	named := gone != s.label
	s.mu.Unlock()
	if named {
		s.host.labels.remove(s.peer, gone, s)
	}
	if !reads {
		_ = u.CloseRead()
	}
	switch {
	case replays:
		go s.send.replay(u)
	case done: // the other end lacks nothing of what was closed
		r.end()
		go u.Close()
	}
	s.host.log.Debug("stream resumed", zap.Stringer("peer", s.peer), zap.Uint64("origin", r.origin), zap.Uint64("epoch", epoch),
		zap.Stringer("on", u.Conn().RemoteMultiaddr()))
	r.trace(resumed)
	if aside.IsClosed(u.Conn()) {
		r.ended(u, errors.New("the connection is closed"))
	}
	return true
}

// charge has u count as a stream of the application's protocol.
func (r *resumption) charge(u network.Stream) error {
	x := &exchange{s: r.s, old: r.s.send.stream()}
	if own, err := x.chargeOwn(u); own {
		r.s.host.oweIfUnpaid(r.s)
		return err
	}
	return u.SetProtocol(r.s.proto)
}

// answerResume answers an attempt of the peer's, which came on n's stream. Its error is a
// violation.
func (h *Host) answerResume(n *negotiator, m *pb.Migrate) error {
	u := n.stream
	p := u.Conn().RemotePeer()
	origin, epoch, id := m.GetResume().GetOrigin(), m.GetResume().GetEpoch(), m.GetId()
	if err := h.labels.check(p, id); err != nil {
		return err
	}
	switch {
	case epoch == 0 || epoch&1 != h.labels.parity(p, false):
		return fmt.Errorf("%w: epoch %d has the wrong parity", errViolation, epoch)
	case len(n.rest()) > 0:
		return fmt.Errorf("%w: data before the ack", errViolation)
	}
	if !n.inTime() { // before the ack: see attemptOn
		_ = u.Reset()
		return nil
	}
	reply := func(ack *pb.AckMigrate) (whole bool) {
		whole, _ = n.finish(&pb.StreamMigration{Type: &pb.StreamMigration_AckMigrate{AckMigrate: ack}}, attemptTimeout)
		return whole
	}
	over := func(ack *pb.AckMigrate) error {
		if reply(ack) {
			_ = u.Close()
		} else {
			_ = u.Reset()
		}
		return nil
	}
	deny := denyMessage().GetAckMigrate()
	if h.resumer == nil {
		return over(deny)
	}
	r, err := h.resumer.find(h.ctx, p, origin)
	if err != nil {
		_ = u.ResetWithError(network.StreamRateLimited)
		return nil
	}
	if r == nil && h.resumer.isOpening(p, origin) {
		_ = u.ResetWithError(codeGivenUp) // the acceptor is faster; it will ask again
		return nil
	}
	if r == nil {
		h.labels.end(p, origin) // its Label may be on its way still
		return over(deny)
	}
	s := r.s
	s.mu.Lock()
	known := max(r.promised, r.heard)
	switch {
	case r.state == resumeOver:
		s.mu.Unlock()
		return over(deny)
	case epoch <= r.promised:
		asking := r.state == resumeAsking
		s.mu.Unlock()
		return over(&pb.AckMigrate{Stale: &pb.Stale{Epoch: &known, Wait: &asking}})
	case epoch > known && epoch-known > maxEpochJump:
		s.mu.Unlock()
		return fmt.Errorf("%w: epoch %d, %d is known", errViolation, epoch, known)
	}
	r.promised, r.heard = epoch, max(r.heard, epoch)
	var event *Event
	if r.state == resumeAttached {
		lost := r.loseLocked(errors.New("the other end has lost it"))
		event = &lost
	}
	dropped := r.waits.attempt
	r.waits.attempt = nil
	r.state = resumeAnswering
	named := r.name(id)
	s.mu.Unlock()
	if event != nil {
		r.trace(*event)
	}
	if dropped != nil {
		go breakOff(dropped, codeGivenUp)
	}
	if !named {
		r.failed(epoch, pauseAfter)
		return fmt.Errorf("%w: label %d is alive", errViolation, id)
	}
	start, err := r.start(m.GetResume().GetReceived())
	switch {
	case errors.Is(err, errViolation):
		r.violated(err)
		return err
	case err != nil:
		r.fail(err)
		return over(deny)
	}
	if err := r.charge(u); err != nil {
		go breakOff(u, network.StreamResourceLimitExceeded)
		r.failed(epoch, pauseAfter)
		return nil
	}
	s.recv.mu.Lock()
	received := s.recv.received()
	s.recv.mu.Unlock()
	if !reply(&pb.AckMigrate{Received: &received}) {
		go breakOff(u, codeGivenUp)
		r.failed(epoch, pauseAfter)
		return nil
	}
	if !r.attach(u, epoch, id, start) {
		_ = breakOff(u, codeGivenUp)
	}
	return nil
}

// find returns the stream of p that was opened with the label origin, waiting for it where it
// is p's own, as its Label may be on its way (L4, R9). It returns nil where there is none.
func (rs *resumer) find(ctx context.Context, p peer.ID, origin uint64) (*resumption, error) {
	if r := rs.get(p, origin); r != nil || rs.host.labels.check(p, origin) != nil {
		return r, nil
	}
	if _, err := rs.host.labels.find(ctx, p, origin, rs.host.cfg.labelWait); err != nil {
		return nil, err
	}
	return rs.get(p, origin), nil
}
