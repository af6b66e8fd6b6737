package connmgr

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"go.uber.org/zap"

	"github.com/go-portage/portage/pb"
)

// Answering
//
// The other side of drain_ask.go. A request is answered at once, from what is known; what
// this side agrees to is kept with the connection, and ends with it.
//
// Nobody is left without a connection (D4), because a side that has agreed to lose a
// connection does not count on it any more: it closes another one only if it keeps a third.
// Where both sides ask at once, and each for the connection that the other one keeps, the
// lower peer ID refuses and the higher one gives up what it asked for.

func drainedMessage() *pb.DrainMessage {
	return &pb.DrainMessage{Type: &pb.DrainMessage_Drained{Drained: &pb.Drained{}}}
}

func keptMessage() *pb.DrainMessage {
	return &pb.DrainMessage{Type: &pb.DrainMessage_Kept{Kept: &pb.Kept{}}}
}

func refusedMessage(reason string) *pb.DrainMessage {
	return &pb.DrainMessage{Type: &pb.DrainMessage_Refused{Refused: &pb.Refused{Reason: &reason}}}
}

// busyMessage tells when to ask again; 0: not known.
func busyMessage(wait time.Duration) *pb.DrainMessage {
	busy := new(pb.Busy)
	if wait > 0 {
		ms := uint32(max(wait.Milliseconds(), 1))
		busy.Wait = &ms
	}
	return &pb.DrainMessage{Type: &pb.DrainMessage_Busy{Busy: busy}}
}

// handleDrain is the handler of DrainID.
func (m *Manager) handleDrain(s network.Stream) {
	if !m.begin() {
		_ = s.Reset()
		return
	}
	defer m.wg.Done()
	err := m.serve(s)
	switch {
	case errors.Is(err, errNotDrain):
		_ = s.ResetWithError(network.StreamProtocolViolation)
	case err != nil:
		_ = s.Reset()
	default:
		_ = s.Close()
	}
	if err != nil {
		m.log.Debug("request of a peer not answered", zap.Stringer("peer", s.Conn().RemotePeer()), zap.Error(err))
	}
}

// serve reads a request and answers it. It blocks for 10 s at most.
func (m *Manager) serve(s network.Stream) error {
	if err := s.Scope().SetService(ServiceName); err != nil {
		return err
	}
	if err := s.SetDeadline(time.Now().Add(openTimeout)); err != nil {
		return err
	}
	defer context.AfterFunc(m.ctx, func() { _ = s.Reset() })()
	msg, err := readDrain(s)
	if err != nil {
		return err
	}
	var answer *pb.DrainMessage
	switch {
	case msg.GetHello() != nil:
		answer = m.answerHello(s.Conn(), msg.GetHello().GetInstance())
	case msg.GetKeep() != nil:
		answer = m.agreeToKeep(s.Conn())
	case msg.GetDrain() != nil:
		lease := time.Duration(msg.GetDrain().GetLease()) * time.Second
		if lease <= 0 {
			lease = shortLease
		}
		answer = m.agreeToLose(s.Conn(), min(lease, longLease))
	default:
		return fmt.Errorf("%w: unexpected %T", errNotDrain, msg.Type)
	}
	return writeDrain(s, answer)
}

// asked returns the entry of c and its peer, which shows by asking that it runs a manager.
// They are nil where c is the peer's only connection. It must be called with mu held.
func (m *Manager) asked(c network.Conn, conns []network.Conn) (*peerState, *connState) {
	if m.closed || len(conns) < 2 {
		return nil, nil
	}
	d := m.entry(c.RemotePeer())
	d.manages = true
	cs := d.state(c)
	if cs == nil {
		cs = newConnState(c)
		d.conns = append(d.conns, cs)
		m.usage.add(cs)
	}
	cs.serves = true
	return d, cs
}

// answerHello answers a Hello on c.
func (m *Manager) answerHello(c network.Conn, instance uint64) *pb.DrainMessage {
	conns := openConns(m.watch.network(), c.RemotePeer())
	m.mu.Lock()
	if d, cs := m.asked(c, conns); d != nil && instance != 0 && cs.instance != instance {
		cs.instance = instance
		m.schedule(d, time.Now())
	}
	m.mu.Unlock()
	m.wakeUp()
	return helloMessage(m.instance)
}

// agreeToKeep answers a Keep on c (K1).
func (m *Manager) agreeToKeep(c network.Conn) *pb.DrainMessage {
	conns := openConns(m.watch.network(), c.RemotePeer())
	unlimited := false
	for _, o := range conns {
		unlimited = unlimited || o != c && !o.Stat().Limited
	}
	lower := m.watch.network().LocalPeer() < c.RemotePeer()

	defer m.wakeUp()
	m.mu.Lock()
	defer m.mu.Unlock()
	d, cs := m.asked(c, conns)
	switch {
	case m.closed:
		return refusedMessage("the manager is closed")
	case d == nil:
		return keptMessage() // it is the only one
	case lower:
		m.schedule(d, time.Now())
		return refusedMessage("this side decides")
	case cs.closing:
		return refusedMessage("it is being closed")
	case c.Stat().Limited && unlimited:
		return refusedMessage("it is limited, and there is one that is not")
	}
	cs.pledged = time.Time{}
	cs.drain.off()
	d.named = cs
	d.progress = time.Now()
	m.schedule(d, time.Now())
	return keptMessage()
}

// agreeToLose answers a Drain on c (D1).
func (m *Manager) agreeToLose(c network.Conn, lease time.Duration) *pb.DrainMessage {
	p := c.RemotePeer()
	if why := m.exemptConn(c); why != "" {
		return refusedMessage(why)
	}
	conns := openConns(m.watch.network(), p)
	limited := c.Stat().Limited
	open := streamsOn(c, true)
	lower := m.watch.network().LocalPeer() < p

	defer m.wakeUp()
	m.mu.Lock()
	defer m.mu.Unlock()
	d, cs := m.asked(c, conns)
	if d == nil {
		return refusedMessage("there is no other connection that could take its place")
	}
	// What could take its place: connections that are not about to go themselves.
	now := time.Now()
	var rest, ours []*connState
	unlimited := 0
	for _, o := range conns {
		if o == c || o.Stat().Limited && !limited {
			continue
		}
		os := d.state(o)
		if os == nil {
			os = newConnState(o)
			d.conns = append(d.conns, os)
			m.usage.add(os)
		}
		switch os.drain.lapse(now); {
		case os.closing, now.Before(os.pledged) && d.named != os:
		case os.drain.phase != drainOff && os.drain.phase != drainRefused && os.drain.phase != drainFailed:
			ours = append(ours, os)
		default:
			if rest = append(rest, os); os.path.health != pathSilent && !os.base.Limited {
				unlimited++
			}
		}
	}
	refuse := func(why string) *pb.DrainMessage {
		cs.pledged = time.Time{}
		return refusedMessage(why)
	}
	switch {
	case len(rest)+len(ours) == 0:
		return refuse("there is no other connection that could take its place")
	case lower && d.winner == cs:
		return refuse("this side decides, and keeps it")
	case m.cfg.standby && !limited && unlimited+len(ours) < 2:
		return refuse("it stands by")
	case len(rest) == 0 && lower:
		return refuse("this side wants to close the others") // D4
	case len(rest) == 0:
		for _, o := range ours {
			o.drain.off()
		}
	}
	if d.named == cs {
		d.named = nil
	}
	if !now.Before(cs.pledged) { // it was not before
		d.progress = now
		m.schedule(d, now)
	}
	cs.pledged = now.Add(lease)
	// The next round steers by the policy; until then, anywhere but there.
	if winner := m.steering.get(p); winner == cs {
		m.steering.set(p, append(rest, ours...)[0])
	}
	if open.without(cs.requests) > 0 || d.touching(cs) > 0 {
		cs.quiet = time.Time{}
		return busyMessage(0)
	}
	if cs.quiet.IsZero() {
		cs.quiet = now
	}
	quiet := later(cs.quiet, cs.lastUse())
	if left := m.cfg.quietTime - now.Sub(quiet); left > 0 {
		m.schedule(d, now.Add(min(left, maxQuietGap)))
		return busyMessage(left)
	}
	cs.drained = now
	return drainedMessage()
}
