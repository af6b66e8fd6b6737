package connmgr

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/multiformats/go-multistream"
	"go.uber.org/zap"
	"google.golang.org/protobuf/encoding/protodelim"

	"github.com/go-portage/portage/pb"
)

// Draining
//
//	this side, which wants to close a loser        the peer
//	open a stream on the loser itself
//	Drain      ------------------------------->    pledge: new streams avoid the loser (D1)
//	                                               wait until the loser has been quiet there
//	           <-------------------------------    Drained, or at once Refused
//	quiet here, too; the winner answers a ping
//	Drain      ------------------------------->
//	           <-------------------------------    Drained, at once if it has stayed quiet
//	still quiet here: close the loser (D2)
//
// Either side may see streams on the connection meanwhile, of code that knows nothing of
// this: they are waited for (D3). If this side sees one after Drained, it cannot know
// whether the peer has read what came of it, and asks again, on the same stream.
//
// The end of the drain stream is the end of the drain, and of the pledge.
//
// Nobody is left without a connection (D4), because a side that has pledged a connection
// does not count on it any more: it closes another one only if it keeps a third. Where
// both sides drain at once, and each the connection that the other one keeps, the lower
// peer ID refuses and the higher one gives up its own drain.

// DrainID is the protocol by which two managers agree that a connection carries nothing
// any more. A wrapped host advertises it through identify, which also tells its peers
// that a Manager runs on it: a peer with the higher ID that sees it leaves the decisions
// to this side.
const DrainID protocol.ID = "/portage/drain/1.0.0"

// maxDrainMessage is the longest message, in bytes.
const maxDrainMessage = 1 << 10

// maxReason is how much of a peer's reason is kept, in bytes.
const maxReason = 200

// drain is one that this side has asked for, or wants to. Guarded by Manager.mu.
type drain struct {
	cancel context.CancelFunc
	asks   chan struct{} // capacity 1: have Drain sent once more

	open    bool // its stream is, or is about to be, on the connection
	asked   bool // and the peer has not answered
	drained bool // the peer has answered so
	stale   bool // since it was asked there was another stream here
	ended   bool // the next attempt is not before until
	refused string
	until   time.Time

	// winner is the connection that answered a ping right before the peer was asked; nil
	// if none was pinged.
	winner *connState
}

// pledge is what this side has promised for a connection. Guarded by Manager.mu.
type pledge struct {
	cancel context.CancelFunc // ends it, and with it the peer's drain
}

func drainMessage() *pb.DrainMessage {
	return &pb.DrainMessage{Type: &pb.DrainMessage_Drain{Drain: &pb.Drain{}}}
}

func drainedMessage() *pb.DrainMessage {
	return &pb.DrainMessage{Type: &pb.DrainMessage_Drained{Drained: &pb.Drained{}}}
}

func refusedMessage(reason string) *pb.DrainMessage {
	return &pb.DrainMessage{Type: &pb.DrainMessage_Refused{Refused: &pb.Refused{Reason: &reason}}}
}

// writeDrain writes a message to s, in one Write.
func writeDrain(s network.Stream, m *pb.DrainMessage) error {
	var buf strings.Builder
	if _, err := protodelim.MarshalTo(&buf, m); err != nil {
		return err
	}
	_, err := s.Write([]byte(buf.String()))
	return err
}

// readDrain reads a message. What is none is errNotDrain; an error of the stream is
// returned as it is.
func readDrain(r *bufio.Reader) (*pb.DrainMessage, error) {
	_, err := r.Peek(1)
	if err != nil {
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
var errNotDrain = errors.New("message is not Drain")

// refusal is the error of a drain that the peer does not want.
type refusal struct{ reason string }

func (r refusal) Error() string { return "the peer refused: " + r.reason }

// drained says whether the peer has agreed that nothing is on loser any more. It asks
// for that where it has to. others is how many streams there are here, without the
// manager's own.
func (m *Manager) drained(d *duplicates, loser *connState, others int, quiet time.Duration) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	dr, now := loser.drain, time.Now()
	switch {
	case m.closed:
	case dr == nil || dr.ended && !now.Before(dr.until):
		m.startDrain(d, loser)
	case dr.ended || !dr.drained:
	case others > 0:
		dr.stale = true
	case !dr.stale:
		return true
	case !loser.quiet.IsZero() && now.Sub(loser.quiet) >= quiet:
		// The answer is worth something only if there is nothing when it is asked for.
		dr.askAgain(nil)
	}
	return false
}

// askAgain has Drain sent once more, after winner, if it is not nil, has shown that it
// works. It must be called with mu held.
func (dr *drain) askAgain(winner *connState) {
	dr.asked, dr.drained, dr.stale, dr.winner = true, false, false, winner
	select {
	case dr.asks <- struct{}{}:
	default: // the last one has not left, although the peer has answered it
	}
}

// confirm asks the peer once more, now that winner has shown that it works.
func (m *Manager) confirm(loser, winner *connState) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if loser.drain != nil && loser.drain.drained {
		loser.drain.askAgain(winner)
	}
}

// confirmed says whether the peer has agreed after winner had shown that it works.
func (m *Manager) confirmed(loser, winner *connState) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return loser.drain != nil && loser.drain.drained && loser.drain.winner == winner
}

// startDrain must be called with mu held, and closed not be set.
func (m *Manager) startDrain(d *duplicates, loser *connState) {
	ctx, cancel := context.WithCancel(m.ctx)
	dr := &drain{cancel: cancel, asks: make(chan struct{}, 1), open: true, asked: true}
	dr.asks <- struct{}{}
	loser.drain = dr
	m.wg.Add(1)
	m.draining.Add(1)
	go func() {
		defer m.wg.Done()
		defer m.draining.Add(-1)
		err := m.askDrain(ctx, d, loser, dr)
		cancelled := ctx.Err() != nil
		cancel()
		m.endDrain(d, loser, dr, err, cancelled)
	}()
}

// begins is the migrate.WithStreamObserver of a wrapped host.
func (m *Manager) begins(c network.Conn, _ protocol.ID, dir network.Direction) {
	if dir == network.DirInbound {
		m.heard(c)
	}
}

// heard is called for each stream that a peer opens, of any protocol. Short ones come and
// go between two looks, unread answers and all.
func (m *Manager) heard(c network.Conn) {
	if m.draining.Load() == 0 {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if d := m.peers[c.RemotePeer()]; d != nil {
		if cs := d.state(c); cs != nil && cs.drain != nil {
			cs.drain.stale = true
		}
	}
}

// endDrain notes that a drain is off, and why.
func (m *Manager) endDrain(d *duplicates, loser *connState, dr *drain, err error, cancelled bool) {
	closed := loser.conn.IsClosed()
	var refused refusal
	m.mu.Lock()
	dr.open, dr.drained, dr.ended = false, false, true
	if loser.drain != dr || cancelled || closed {
		m.mu.Unlock()
		return
	}
	switch {
	case errors.As(err, &refused):
		dr.refused = refused.reason
	case isNotSupported(err):
		loser.plain = true
	}
	wait := m.cfg.maxRetry
	if shift := loser.drains; shift < 32 {
		wait = min(wait, m.cfg.firstRetry<<shift)
	}
	loser.drains++
	dr.until = time.Now().Add(wait)
	m.schedule(d, dr.until)
	said := loser.refused == dr.refused
	loser.refused = dr.refused
	m.mu.Unlock()
	m.wakeUp()
	if dr.refused != "" && !said {
		m.logRefused(d.peer, loser.info(), dr.refused)
	} else {
		m.log.Debug("drain ended", zap.Stringer("peer", d.peer), zap.Stringer("connection", loser.info()), zap.Error(err))
	}
}

func isNotSupported(err error) bool {
	return errors.As(err, new(multistream.ErrNotSupported[protocol.ID]))
}

// cancelDrain takes back what was asked of the peer. It must be called with mu held.
func (cs *connState) cancelDrain() {
	if cs.drain != nil {
		cs.drain.cancel()
		cs.drain = nil
	}
}

// askDrain asks the peer to drain loser, each time that is wanted, until ctx is done or
// the drain is off.
func (m *Manager) askDrain(ctx context.Context, d *duplicates, loser *connState, dr *drain) error {
	s, err := openOn(ctx, loser.conn, DrainID)
	if err != nil {
		return err
	}
	defer s.Reset()
	defer func() { // before its stream is gone, and counted as ours all the same
		m.mu.Lock()
		dr.drained = false
		m.mu.Unlock()
	}()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = s.Reset() })()
	go func() { // a Write can block for long on a dead path
		for {
			select {
			case <-ctx.Done():
				return
			case <-dr.asks:
			}
			if writeDrain(s, drainMessage()) != nil {
				cancel()
				return
			}
		}
	}()
	for r := bufio.NewReader(s); ; {
		answer, err := readDrain(r)
		if err != nil {
			return fmt.Errorf("answer to drain: %w", err)
		}
		switch answer.Type.(type) {
		case *pb.DrainMessage_Drained:
		case *pb.DrainMessage_Refused:
			reason := answer.GetRefused().GetReason()
			return refusal{strings.ToValidUTF8(reason[:min(len(reason), maxReason)], "")}
		default:
			_ = s.ResetWithError(network.StreamProtocolViolation)
			return fmt.Errorf("answer to drain: unexpected %T", answer.Type)
		}
		m.mu.Lock()
		wanted := dr.asked
		dr.asked, dr.drained = false, wanted
		m.schedule(d, time.Now())
		m.mu.Unlock()
		if !wanted {
			_ = s.ResetWithError(network.StreamProtocolViolation)
			return errors.New("answer to drain: it was not asked for")
		}
		m.wakeUp()
	}
}

// handleDrain is the handler of DrainID.
func (m *Manager) handleDrain(s network.Stream) {
	if !m.enter() {
		_ = s.Reset()
		return
	}
	defer m.wg.Done()
	err := m.serveDrain(s)
	m.log.Debug("peer's drain ended", zap.Stringer("peer", s.Conn().RemotePeer()), zap.Error(err))
	if errors.Is(err, errNotDrain) {
		_ = s.ResetWithError(network.StreamProtocolViolation)
	} else {
		_ = s.Reset() // nothing, where it was closed
	}
}

// serveDrain answers a peer that drains the connection of s. Its error says how that
// ended, errNotDrain that the peer did something wrong.
func (m *Manager) serveDrain(s network.Stream) error {
	ctx, cancel := context.WithCancel(m.ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = s.Reset() })()

	r := bufio.NewReader(s)
	next := func() error {
		msg, err := readDrain(r)
		if err == nil && msg.GetDrain() == nil {
			err = fmt.Errorf("%w but %T", errNotDrain, msg.Type)
		}
		return err
	}
	c := s.Conn()
	if err := s.SetReadDeadline(time.Now().Add(openTimeout)); err != nil {
		return err
	}
	if err := next(); err != nil {
		return err
	}
	_ = s.SetReadDeadline(time.Time{})

	pl := &pledge{cancel: cancel}
	if reason := m.takePledge(c, pl); reason != "" {
		err := writeDrain(s, refusedMessage(reason))
		_ = s.Close()
		return err
	}
	defer m.dropPledge(c, pl)
	asks := make(chan struct{}, 1)
	asks <- struct{}{}
	wrong := make(chan error, 1)
	go func() {
		defer cancel()
		for {
			if err := next(); err != nil {
				wrong <- err
				return
			}
			select {
			case asks <- struct{}{}:
			default: // it has not been answered yet: a peer that does not wait gets one answer
			}
		}
	}()
	quiet := time.NewTimer(0)
	defer quiet.Stop()
	look := quietLook{m: m, conn: c}
	for wanted := false; ; {
		select {
		case <-ctx.Done():
			select {
			case err := <-wrong:
				return err
			default:
				return ctx.Err()
			}
		case <-asks:
			wanted = true
		case <-quiet.C:
		}
		// It goes on looking after Drained, so that it can say it again at once.
		quiet.Reset(look.next())
		if wanted && look.quiet() {
			wanted = false
			if err := writeDrain(s, drainedMessage()); err != nil {
				return err
			}
		}
	}
}

// quietLook looks every now and then whether a connection has a stream.
type quietLook struct {
	m     *Manager
	conn  network.Conn
	since time.Time     // when there was none first; zero: there is one
	busy  time.Duration // until the next look while there is one
}

// next looks, and returns after how long to do so again: the less often the longer there
// are streams.
func (l *quietLook) next() time.Duration {
	cfg := &l.m.cfg
	gap := min(maxQuietGap, cfg.quietTime/quietLooks)
	switch now := time.Now(); {
	case l.m.streamsOn(l.conn) > 0:
		l.since, l.busy = time.Time{}, min(max(gap, 2*l.busy), cfg.interval)
		return l.busy
	case l.since.IsZero():
		l.since, l.busy = now, 0
		return gap
	default:
		if left := cfg.quietTime - now.Sub(l.since); left > 0 {
			return min(gap, left)
		}
		return gap
	}
}

// quiet says whether there has been no stream for the quiet time.
func (l *quietLook) quiet() bool {
	return !l.since.IsZero() && time.Since(l.since) >= l.m.cfg.quietTime
}

// takePledge promises to open nothing more on c. If it does not, it says why.
func (m *Manager) takePledge(c network.Conn, pl *pledge) (refused string) {
	p := c.RemotePeer()
	if why := m.exemptConn(c); why != "" {
		return why
	}
	conns := openConns(m.watch.network(), p)
	limited := c.Stat().Limited
	decides, _ := m.controller(p, true)
	lower := m.watch.network().LocalPeer() < p

	defer m.wakeUp()
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.peers[p]
	state := func(c network.Conn) *connState {
		if d == nil {
			return nil
		}
		return d.state(c)
	}
	// What could take its place: connections that are not about to go themselves.
	var rest, ours []network.Conn
	for _, other := range conns {
		switch cs := state(other); {
		case other == c || m.pledges[other] != nil || cs != nil && cs.closing:
		case other.Stat().Limited && !limited:
		case cs != nil && cs.drain != nil && !cs.drain.ended:
			ours = append(ours, other)
		default:
			rest = append(rest, other)
		}
	}
	switch {
	case m.closed:
		return "the manager is closed"
	case len(rest)+len(ours) == 0:
		return "there is no other connection that could take its place"
	case decides && d != nil && d.winner != nil && d.winner.conn == c:
		return "this side decides, and keeps it"
	case len(rest) == 0 && lower:
		return "this side is draining the others" // D4
	case len(rest) == 0:
		for _, other := range ours {
			state(other).cancelDrain()
		}
	}
	if old := m.pledges[c]; old != nil {
		old.cancel() // the end of its stream is still on its way
	}
	if m.pledges == nil {
		m.pledges = make(map[network.Conn]*pledge)
	}
	m.pledges[c] = pl
	// The next round steers by the policy; until then, anywhere but there.
	if winner := m.steering.get(p); winner == nil || winner.conn == c {
		other := append(rest, ours...)[0]
		cs := state(other)
		if cs == nil {
			cs = newConnState(other)
		}
		m.steering.set(p, cs)
	}
	// Not atOnce: that c cannot win is in force by itself, and the rest has not changed.
	d = m.entry(p)
	d.settled = time.Now()
	m.schedule(d, d.settled)
	return ""
}

// dropPledge ends a pledge: the connection may be used again, and a side that only follows
// does so at once.
func (m *Manager) dropPledge(c network.Conn, pl *pledge) {
	decides, _ := m.controller(c.RemotePeer(), true)
	m.mu.Lock()
	if m.pledges[c] == pl {
		delete(m.pledges, c)
		if d := m.peers[c.RemotePeer()]; d != nil {
			d.atOnce = d.atOnce || !decides
			m.schedule(d, time.Now())
		}
	}
	m.mu.Unlock()
	m.wakeUp()
}

// streamsOn returns the number of streams on c, without the manager's own.
func (m *Manager) streamsOn(c network.Conn) int {
	n := c.Stat().NumStreams
	m.mu.Lock()
	defer m.mu.Unlock()
	return max(0, n-m.oursOn(c))
}

// oursOn returns the number of streams on c that are the manager's own: of drains, and
// pings. It must be called with mu held.
func (m *Manager) oursOn(c network.Conn) int {
	n := 0
	if m.pledges[c] != nil {
		n++
	}
	if d := m.peers[c.RemotePeer()]; d != nil {
		if cs := d.state(c); cs != nil {
			n += cs.probes
			if cs.drain != nil && cs.drain.open {
				n++
			}
		}
	}
	return n
}

// pledged says whether the peer is draining cs. It must be called with mu held.
func (m *Manager) pledged(cs *connState) bool { return m.pledges[cs.conn] != nil }

// openOn opens a stream of the protocol on a connection of one's choice, limited or not.
func openOn(ctx context.Context, c network.Conn, id protocol.ID) (network.Stream, error) {
	ctx, cancel := context.WithTimeout(network.WithAllowLimitedConn(ctx, string(id)), openTimeout)
	defer cancel()
	s, err := c.NewStream(ctx)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", id, err)
	}
	negotiated := context.AfterFunc(ctx, func() { _ = s.Reset() })
	err = s.SetProtocol(id)
	if err == nil {
		err = multistream.SelectProtoOrFail(id, s)
	}
	if !negotiated() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		_ = s.Reset()
		if ctx.Err() != nil {
			err = ctx.Err() // whatever the reset looked like
		}
		return nil, fmt.Errorf("negotiate %s: %w", id, err)
	}
	return s, nil
}
