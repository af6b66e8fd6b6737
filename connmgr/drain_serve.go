package connmgr

import (
	"context"
	"errors"
	"fmt"
	"slices"
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

// drainServer answers the requests of peers.
type drainServer struct {
	cfg      *config
	tasks    *tasks
	sched    *scheduler
	network  func() network.Network
	exempt   exemptions
	usage    *usage
	steer    *steering
	log      *zap.Logger
	instance uint64 // what this process calls itself; see Hello
}

// handle is the handler of DrainID.
func (ds *drainServer) handle(s network.Stream) {
	if !ds.tasks.begin() {
		_ = s.Reset()
		return
	}
	defer ds.tasks.done()
	err := ds.serve(s)
	switch {
	case errors.Is(err, errNotDrain):
		_ = s.ResetWithError(network.StreamProtocolViolation)
	case err != nil:
		_ = s.Reset()
	default:
		_ = s.Close()
	}
	if err != nil {
		ds.log.Debug("request of a peer not answered", zap.Stringer("peer", s.Conn().RemotePeer()), zap.Error(err))
	}
}

// serve reads a request and answers it. It blocks for 10 s at most.
func (ds *drainServer) serve(s network.Stream) error {
	if err := s.Scope().SetService(ServiceName); err != nil {
		return err
	}
	if err := s.SetDeadline(time.Now().Add(openTimeout)); err != nil {
		return err
	}
	defer context.AfterFunc(ds.tasks.ctx, func() { _ = s.Reset() })()
	msg, err := readDrain(s)
	if err != nil {
		return err
	}
	var answer *pb.DrainMessage
	switch {
	case msg.GetHello() != nil:
		answer = ds.answerHello(s.Conn(), msg.GetHello().GetInstance())
	case msg.GetKeep() != nil:
		answer = ds.agreeToKeep(s.Conn())
	case msg.GetDrain() != nil:
		lease := time.Duration(msg.GetDrain().GetLease()) * time.Second
		if lease <= 0 {
			lease = shortLease
		}
		answer = ds.agreeToLose(s.Conn(), min(lease, longLease))
	default:
		return fmt.Errorf("%w: unexpected %T", errNotDrain, msg.Type)
	}
	return writeDrain(s, answer)
}

// asked returns the entry of c and its peer, which shows by asking that it runs a manager,
// with the lock of the entry held. They are nil, and nothing is held, where c is the peer's
// only connection. All of conns, the open ones of the peer, are known to the entry.
func (ds *drainServer) asked(c network.Conn, conns []network.Conn) (*peerState, *connState) {
	if ds.tasks.over() || len(conns) < 2 {
		return nil, nil
	}
	if !slices.Contains(conns, c) { // it is closed
		conns = append(slices.Clip(conns), c)
	}
	d := ds.sched.lock(c.RemotePeer())
	for unknown := d.unknown(conns); len(unknown) > 0; unknown = d.unknown(conns) {
		d.mu.Unlock()
		made := make([]*connState, len(unknown))
		for i, o := range unknown {
			made[i] = newConnState(o)
		}
		d = ds.sched.lock(c.RemotePeer())
		for _, cs := range made {
			if d.state(cs.conn) == nil {
				d.conns = append(d.conns, cs)
				ds.usage.add(cs)
			}
		}
	}
	d.manages = true
	cs := d.state(c)
	cs.serves = true
	return d, cs
}

// unknown returns those of conns of which nothing is kept. It must be called with d's lock
// held.
func (d *peerState) unknown(conns []network.Conn) []network.Conn {
	state := d.states()
	return slices.DeleteFunc(slices.Clone(conns), func(c network.Conn) bool { return state(c) != nil })
}

// answerHello answers a Hello on c.
func (ds *drainServer) answerHello(c network.Conn, instance uint64) *pb.DrainMessage {
	if d, cs := ds.asked(c, openConns(ds.network(), c.RemotePeer())); d != nil {
		if instance != 0 && cs.instance != instance {
			cs.instance = instance
			ds.sched.schedule(d, time.Now())
		}
		d.mu.Unlock()
	}
	return helloMessage(ds.instance)
}

// agreeToKeep answers a Keep on c (K1).
func (ds *drainServer) agreeToKeep(c network.Conn) *pb.DrainMessage {
	n, p := ds.network(), c.RemotePeer()
	conns := openConns(n, p)
	if ds.tasks.over() {
		return refusedMessage("the manager is closed")
	}
	d, cs := ds.asked(c, conns)
	if d == nil {
		return keptMessage() // it is the only one
	}
	defer d.mu.Unlock()
	state := d.states()
	unlimited := slices.ContainsFunc(conns, func(o network.Conn) bool { return o != c && !state(o).base.Limited })
	switch {
	case n.LocalPeer() < p:
		ds.sched.schedule(d, time.Now())
		return refusedMessage("this side decides")
	case cs.closing:
		return refusedMessage("it is being closed")
	case cs.base.Limited && unlimited:
		return refusedMessage("it is limited, and there is one that is not")
	}
	if d.named != cs && !d.turns(time.Now()) {
		return refusedMessage("too many have been named of late")
	}
	cs.pledged = time.Time{}
	cs.drain.off()
	d.named = cs
	d.progress = time.Now()
	ds.sched.schedule(d, time.Now())
	return keptMessage()
}

// turns says whether the peer may name another connection now, and counts it. Each makes this
// side move its streams there, and costs the peer a few bytes. So it is a few at once, and then
// as seldom as this side itself changes its mind. It must be called with d's lock held.
func (d *peerState) turns(now time.Time) bool {
	free := later(d.turned, now).Add(turnPause)
	if free.Sub(now) > turnsAtOnce*turnPause {
		return false
	}
	d.turned = free
	return true
}

// agreeToLose answers a Drain on c (D1).
func (ds *drainServer) agreeToLose(c network.Conn, lease time.Duration) *pb.DrainMessage {
	p := c.RemotePeer()
	if why := ds.exempt.conn(c); why != "" {
		return refusedMessage(why)
	}
	n := ds.network()
	conns := openConns(n, p)
	open := streamsOn(c)
	lower := n.LocalPeer() < p

	d, cs := ds.asked(c, conns)
	if d == nil {
		return refusedMessage("there is no other connection that could take its place")
	}
	defer d.mu.Unlock()
	// What could take its place: connections that are not about to go themselves.
	now := time.Now()
	var rest, ours []*connState
	unlimited := 0
	state := d.states()
	for _, o := range conns {
		os := state(o)
		if o == c || os.base.Limited && !cs.base.Limited {
			continue
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
	case cs.path.health != pathSilent && standIn(append(rest, ours...)).path.health == pathSilent:
		return refuse("no other connection answers")
	case ds.cfg.standby && !cs.base.Limited && unlimited+len(ours) < 2:
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
		ds.sched.schedule(d, now)
	}
	cs.pledged = now.Add(lease)
	// The next round steers by the policy; until then, anywhere but there.
	if winner := ds.steer.get(p); winner == cs {
		to := steered{winner: standIn(append(rest, ours...))}
		for _, o := range d.conns {
			if o.path.health == pathSilent {
				to.silent = append(to.silent, o.conn)
			}
		}
		ds.steer.set(p, to)
	}
	if open.without(cs.requests) > 0 || d.touching(cs) > 0 {
		cs.quiet = time.Time{}
		return busyMessage(0)
	}
	if cs.quiet.IsZero() {
		cs.quiet = now
	}
	quiet := later(cs.quiet, cs.lastUse())
	if left := ds.cfg.quietTime - now.Sub(quiet); left > 0 {
		ds.sched.schedule(d, now.Add(min(left, maxQuietGap)))
		return busyMessage(left)
	}
	cs.drained = now
	return drainedMessage()
}
