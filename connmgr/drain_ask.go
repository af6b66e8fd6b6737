package connmgr

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/multiformats/go-multistream"
	"go.uber.org/zap"
	"google.golang.org/protobuf/encoding/protodelim"

	"github.com/go-portage/portage/pb"
)

// Asking
//
// Two managers agree over DrainID, with one request and one answer on a stream of its own,
// on the connection that the request is about. No stream is held while anybody waits.
//
//	this side, which decides                the peer
//	on each: Hello       -------------->    which process is it? (also shows that the path works)
//	               <-------------- Hello
//	on the winner: Keep  -------------->    moves the streams that it opened there (K1)
//	               <-------------- Kept
//	on a loser:    Drain -------------->    opens nothing more there, for the lease (D1)
//	               <-------------- Busy     it has, or has just had, a stream there
//	               ... after a while ...
//	               Drain -------------->
//	               <------------ Drained    it has had none there for the quiet time
//	quiet here, too; the winner is asked whether it works
//	               Drain -------------->
//	               <------------ Drained
//	nothing came meanwhile: close (D2)
//
// drain_serve.go is the other side.

// DrainID is the protocol by which two managers agree which connection is kept, and that
// another one carries nothing any more. A wrapped host advertises it through identify, which
// also tells its peers that a Manager runs on it: a peer with the higher ID that sees it
// leaves the decisions to this side.
const DrainID protocol.ID = "/portage/drain/2.0.0"

// ServiceName is the name of the manager's own streams at the resource manager, for limits
// of services.
const ServiceName = "portage.connmgr"

const (
	// maxDrainMessage is the longest message, in bytes.
	maxDrainMessage = 1 << 10

	// maxReason is how much of a peer's reason is kept, in bytes.
	maxReason = 200

	// The lease of a Drain: for how long the peer opens nothing. It is renewed after a third
	// of it for as long as the connection is to go, so a long one is asked for where that
	// takes long.
	shortLease = time.Minute
	longLease  = 10 * time.Minute
)

// drainPhase is how far the peer has agreed to lose a connection.
//
//	            ask            Busy                Drained              Drained
//	off ------------> asked ---------> busy  - - - - - - - -> agreed - - - - - - -> confirmed
//	 ^                  |                ^      (asked again)    |   (asked again)      |
//	 |  the lease ends  | Refused        +-----------------------+----------------------+
//	 +------------------+--> refused          a stream was seen since it was asked
//	                    +--> failed      no answer
type drainPhase uint8

const (
	drainOff       drainPhase = iota // nothing was asked, or it does not hold any more
	drainAsked                       // a request is under way
	drainBusy                        // the peer opens nothing there, but has not done with it
	drainAgreed                      // it has done with it
	drainConfirmed                   // it has said so again after the winner had shown that it works
	drainRefused                     // it wants to keep the connection
	drainFailed                      // it has not answered
)

// drain is what the peer was asked about a connection that is to go.
type drain struct {
	phase    drainPhase
	since    time.Time     // when it was asked first
	sent     time.Time     // when it was asked last
	at       time.Time     // when what it answered last was asked
	lease    time.Duration // of what was asked last
	until    time.Time     // busy, refused, failed: it is not asked again before
	confirms bool          // the request under way is the one that confirms
	asks     int
	failures int
	reason   string // of refused
}

// ask notes that a request leaves.
func (d *drain) ask(now time.Time, confirms bool) {
	if d.since.IsZero() {
		d.since = now
	}
	d.phase, d.confirms, d.sent, d.lease = drainAsked, confirms, now, shortLease
	if d.asks++; d.asks > 4 {
		d.lease = longLease
	}
}

// answer notes the answer to the last request.
func (d *drain) answer(now time.Time, cfg *config, msg *pb.DrainMessage) {
	if d.phase != drainAsked {
		return // it was taken back meanwhile
	}
	switch t := msg.Type.(type) {
	case *pb.DrainMessage_Drained:
		if d.phase, d.at, d.failures = drainAgreed, d.sent, 0; d.confirms {
			d.phase = drainConfirmed
		}
	case *pb.DrainMessage_Busy:
		wait := min(time.Duration(t.Busy.GetWait())*time.Millisecond, cfg.interval)
		if t.Busy.GetWait() == 0 { // the peer has a stream there, nobody knows for how long
			wait = min(cfg.firstRetry<<min(d.asks, 16), cfg.interval)
		}
		if d.asks >= busyAsks {
			wait = cfg.interval
		}
		d.phase, d.at, d.failures = drainBusy, d.sent, 0
		d.until = now.Add(max(wait, minRoundGap))
	case *pb.DrainMessage_Refused:
		d.phase, d.reason = drainRefused, clip(t.Refused.GetReason())
		d.until = now.Add(cfg.retryAfter(d.failures))
		d.failures++
	}
}

// fail notes that there is no answer.
func (d *drain) fail(now time.Time, cfg *config) {
	if d.phase != drainAsked {
		return
	}
	d.phase = drainFailed
	d.until = now.Add(cfg.retryAfter(d.failures))
	d.failures++
}

// void takes away what the peer has agreed to: there was a stream since.
func (d *drain) void(now time.Time) {
	if d.phase == drainAgreed || d.phase == drainConfirmed {
		d.phase, d.until = drainBusy, now
	}
}

// lapse ends a lease that is over.
func (d *drain) lapse(now time.Time) {
	switch d.phase {
	case drainBusy, drainAgreed, drainConfirmed:
		if !now.Before(d.at.Add(d.lease)) {
			d.phase = drainOff
		}
	}
}

// off takes back what was asked.
func (d *drain) off() { *d = drain{} }

// tellPhase is whether the peer knows which connection is kept.
type tellPhase uint8

const (
	tellOff     tellPhase = iota // it has not been told
	tellAsked                    // Keep is under way
	tellKept                     // it does the same
	tellRefused                  // it does not want to
	tellFailed                   // it has not answered
)

// telling is what the peer was told about the connection that is kept (K1).
type telling struct {
	phase    tellPhase
	until    time.Time // kept: the peer has time until then to move its streams; else: not told again before
	failures int
}

// due says whether the peer is to be told now.
func (t telling) due(now time.Time) bool {
	return t.phase == tellOff || (t.phase == tellRefused || t.phase == tellFailed) && !now.Before(t.until)
}

// over says whether this side no longer waits for the peer to move its streams.
func (t telling) over(now time.Time) bool {
	return t.phase == tellRefused || t.phase == tellFailed || t.phase == tellKept && !now.Before(t.until)
}

// heard notes whether the other end of cs serves DrainID, by what came of a request.
func (cs *connState) heard(err error) {
	switch {
	case err == nil:
		cs.serves, cs.lacks = true, false
	case isNotSupported(err):
		cs.lacks = true
	}
}

func helloMessage(instance uint64) *pb.DrainMessage {
	return &pb.DrainMessage{Type: &pb.DrainMessage_Hello{Hello: &pb.Hello{Instance: &instance}}}
}

// greeter asks which process a connection leads to, and how long the answer took; 0: it does
// not say. It calls put when the question has been handed to the transport.
type greeter func(ctx context.Context, c network.Conn, put func()) (instance uint64, took time.Duration, err error)

// hello returns the greeter of a process.
func hello(instance uint64) greeter {
	return func(ctx context.Context, c network.Conn, put func()) (uint64, time.Duration, error) {
		start := time.Now()
		answer, err := request(ctx, c, helloMessage(instance), put)
		return answer.GetHello().GetInstance(), time.Since(start), err
	}
}

// sameness is whether a connection to a plain peer leads to the process that the winner
// leads to. Replicas may share a key.
type sameness uint8

const (
	sameUnknown sameness = iota
	sameAsked            // identify is under way on both
	sameYes
	sameNot // or it could not be found out
)

// clip is what is kept of a text that a peer has sent.
func clip(text string) string {
	return strings.ToValidUTF8(text[:min(len(text), maxReason)], "")
}

// writeDrain writes a message to w, in one Write.
func writeDrain(w io.Writer, m *pb.DrainMessage) error {
	var buf bytes.Buffer
	if _, err := protodelim.MarshalTo(&buf, m); err != nil {
		return err
	}
	_, err := w.Write(buf.Bytes())
	return err
}

// readDrain reads a message. If what comes is not one the error is errNotDrain; an error of
// the stream is returned unchanged.
func readDrain(from io.Reader) (*pb.DrainMessage, error) {
	r := bufio.NewReaderSize(from, 64)
	if _, err := r.Peek(1); err != nil {
		return nil, err
	}
	m := new(pb.DrainMessage)
	if err := (protodelim.UnmarshalOptions{MaxSize: maxDrainMessage}).UnmarshalFrom(r, m); err != nil {
		return nil, fmt.Errorf("%w: %w", errNotDrain, err)
	}
	if m.Type == nil {
		return nil, fmt.Errorf("%w: it has no member", errNotDrain)
	}
	return m, nil
}

// errNotDrain is the sentinel of what a peer must not send.
var errNotDrain = errors.New("message is not one of the drain protocol")

// isNotSupported says whether the other end does not speak the protocol. The reset that
// follows its answer may be faster than that.
func isNotSupported(err error) bool {
	var reset *network.StreamError
	return errors.As(err, new(multistream.ErrNotSupported[protocol.ID])) ||
		errors.As(err, &reset) && reset.Remote && reset.ErrorCode == network.StreamProtocolNegotiationFailed
}

// openNamed opens a stream of the manager's own on a connection of its choice, limited or
// not. What negotiates id is left to the caller. It blocks until ctx is done at most.
func openNamed(ctx context.Context, c network.Conn, id protocol.ID) (network.Stream, error) {
	s, err := c.NewStream(network.WithAllowLimitedConn(ctx, string(id)))
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", id, err)
	}
	err = s.SetProtocol(id)
	if err == nil {
		err = s.Scope().SetService(ServiceName)
	}
	if err != nil {
		_ = s.ResetWithError(network.StreamResourceLimitExceeded)
		return nil, fmt.Errorf("open %s: %w", id, err)
	}
	return s, nil
}

// openOn opens a stream as openNamed does, whose negotiation is sent with the first Write. put,
// if not nil, is called once the first Write has been taken.
func openOn(ctx context.Context, c network.Conn, id protocol.ID, put func()) (network.Stream, error) {
	s, err := openNamed(ctx, c, id)
	if err != nil {
		return nil, err
	}
	return &ownStream{Stream: s, lazy: multistream.NewMSSelect(s, id), put: put}, nil
}

// ownStream is a stream of the manager's own.
type ownStream struct {
	network.Stream
	lazy multistream.LazyConn
	put  func()
}

func (s *ownStream) Read(p []byte) (int, error) { return s.lazy.Read(p) }

func (s *ownStream) Write(p []byte) (int, error) {
	n, err := s.lazy.Write(p)
	if err == nil && s.put != nil {
		s.put()
		s.put = nil
	}
	return n, err
}

// request sends a message on a stream of its own on c and returns the answer. It blocks
// until ctx is done, and for 10 s at most.
func request(ctx context.Context, c network.Conn, msg *pb.DrainMessage, put func()) (*pb.DrainMessage, error) {
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	s, err := openOn(ctx, c, DrainID, put)
	if err != nil {
		return nil, err
	}
	defer context.AfterFunc(ctx, func() { _ = s.Reset() })()
	if err := writeDrain(s, msg); err != nil {
		_ = s.Reset()
		return nil, orDone(ctx, fmt.Errorf("ask: %w", err))
	}
	answer, err := readDrain(s)
	if err == nil && !answers(msg, answer) {
		err = fmt.Errorf("%w: unexpected %T", errNotDrain, answer.Type)
	}
	switch {
	case errors.Is(err, errNotDrain):
		_ = s.ResetWithError(network.StreamProtocolViolation)
	case err != nil:
		_ = s.Reset()
	default:
		_ = s.Close()
	}
	if err != nil {
		return nil, orDone(ctx, fmt.Errorf("answer: %w", err))
	}
	return answer, nil
}

// answers says whether an answer is one to a request.
func answers(request, answer *pb.DrainMessage) bool {
	switch answer.Type.(type) {
	case *pb.DrainMessage_Refused:
		return request.GetHello() == nil
	case *pb.DrainMessage_Hello:
		return request.GetHello() != nil
	case *pb.DrainMessage_Kept:
		return request.GetKeep() != nil
	case *pb.DrainMessage_Drained, *pb.DrainMessage_Busy:
		return request.GetDrain() != nil
	}
	return false
}

// asker asks peers, each time on a goroutine of its own, and keeps the answers with the
// connections that they are about.
type asker struct {
	cfg   *config
	tasks *tasks
	sched *scheduler
	tells *teller
}

// drain asks the peer to lose a connection, or where confirms is set, whether it still has
// done with it. It does not wait for the answer.
func (a *asker) drain(d *peerState, loser *connState, confirms bool) {
	d.mu.Lock()
	loser.drain.ask(time.Now(), confirms)
	loser.requests++
	seconds := uint32(loser.drain.lease / time.Second)
	d.mu.Unlock()
	a.tasks.start(func() {
		answer, err := request(a.tasks.ctx, loser.conn, &pb.DrainMessage{Type: &pb.DrainMessage_Drain{Drain: &pb.Drain{Lease: &seconds}}}, nil)
		now := time.Now()
		d.mu.Lock()
		loser.heard(err)
		was := loser.drain.reason
		if err != nil {
			loser.drain.fail(now, a.cfg)
		} else {
			loser.drain.answer(now, a.cfg, answer)
		}
		loser.requests--
		is := loser.drain
		d.mu.Unlock()
		a.sched.schedule(d, now)
		a.tells.answered(d.peer, loser.info(), is.phase, err)
		if is.phase == drainRefused && is.reason != was {
			a.tells.refused(d.peer, loser.info(), is.reason)
		}
	})
}

// keep tells the peer that winner is kept. It does not wait for the answer.
func (a *asker) keep(d *peerState, winner *connState) {
	d.mu.Lock()
	winner.told.phase = tellAsked
	winner.requests++
	d.mu.Unlock()
	a.tasks.start(func() {
		answer, err := request(a.tasks.ctx, winner.conn, &pb.DrainMessage{Type: &pb.DrainMessage_Keep{Keep: &pb.Keep{}}}, nil)
		now := time.Now()
		d.mu.Lock()
		winner.heard(err)
		t := &winner.told
		switch {
		case err != nil:
			t.phase, t.until = tellFailed, now.Add(a.cfg.retryAfter(t.failures))
			t.failures++
		case answer.GetKept() != nil:
			t.phase, t.until, t.failures = tellKept, now.Add(theirsAfter), 0
		default:
			t.phase, t.until = tellRefused, now.Add(a.cfg.retryAfter(t.failures))
			t.failures++
			d.progress = now // whoever refuses decides, and is there
		}
		winner.requests--
		d.mu.Unlock()
		a.sched.schedule(d, now)
		if err != nil || answer.GetRefused() != nil {
			a.tells.log.Debug("keep: not agreed", zap.Stringer("peer", d.peer), zap.Stringer("connection", winner.info()),
				zap.String("reason", clip(answer.GetRefused().GetReason())), zap.Error(err))
		}
	})
}
