package migrate

import (
	"bufio"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/multiformats/go-varint"
	"google.golang.org/protobuf/proto"

	"github.com/go-portage/portage/internal/aside"
	"github.com/go-portage/portage/pb"
)

// Confirmations, and announced ends (R7, R12): what the peer is told about streams beside
// these, on streams of ResumeID. Where one gets lost it is told again.

const (
	// reportAfter is after how many bytes the peer is told at once.
	reportAfter = 1 << 20

	// reportMany is of how many streams there is something to tell until it is told at once.
	reportMany = 64

	// reportWithin is how long it may take until the peer is told of what is less.
	reportWithin = 250 * time.Millisecond

	// endWithin is how long that may take of the end of writing where the peer believes that without
	// being told, unless the connection goes down before its application has read it.
	endWithin = 10 * time.Millisecond

	// reportTimeout bounds the sending of reports. On a connection that is busy it takes as long
	// as everything else does there.
	reportTimeout = 30 * time.Second

	// maxSides is how many streams of reports there are on a connection, at most.
	maxSides = 4

	// lingering is how long a stream of reports stays open that is not used: as long as more is
	// likely to follow. On a connection that is busy, opening one takes as long as all else does there.
	lingering = 10 * time.Second
)

// telling is what the peer is to be told. resumePeer.mu guards it.
type telling struct {
	due   map[*resumption]struct{}
	timer *time.Timer // tells then; nil: at no time
	at    time.Time   // when that is due
	busy  bool        // reportAll runs
	now   bool        // and is to go on
	waits bool        // something is due that waits for a side to be free
	on    map[network.Conn][]*side
}

// side is a stream of reports. Where a Write of one waits, as it does on a connection that is busy,
// another is opened: the end of a stream must not wait for what was told before.
type side struct {
	stream network.Stream // nil as long as it is not open
	writes bool           // somebody writes to it
	idle   *time.Timer    // closes it
}

// report notes that the peer is to be told of r, soon or now.
func (p *resumePeer) report(r *resumption, now bool) {
	if now {
		p.reportIn(r, 0)
	} else {
		p.reportIn(r, reportWithin)
	}
}

// reportIn notes that the peer is to be told of r within that time.
func (p *resumePeer) reportIn(r *resumption, within time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tell.add(r)
	if within == 0 || len(p.tell.due) >= reportMany {
		p.reportNow()
	} else {
		p.reportSoon(within)
	}
}

// reportAgain has the peer told once more of streams, since what it was told may be lost. However
// many they are that has time: there may be no way to tell it at the moment.
func (p *resumePeer) reportAgain(streams []*resumption) {
	for _, r := range streams {
		r.s.recv.mu.Lock()
		r.incoming.pending, r.incoming.urgent = true, false
		r.s.recv.mu.Unlock()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range streams {
		p.tell.add(r)
	}
	p.reportSoon(reportWithin)
}

func (t *telling) add(r *resumption) {
	if t.due == nil {
		t.due = make(map[*resumption]struct{})
	}
	t.due[r] = struct{}{}
}

// reportSoon has the peer told within that time. mu must be held.
func (p *resumePeer) reportSoon(within time.Duration) {
	t := &p.tell
	at := time.Now().Add(within)
	if t.timer != nil {
		if !t.at.After(at) {
			return
		}
		t.timer.Stop()
	}
	t.at = at
	t.timer = time.AfterFunc(within, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		t.timer = nil
		if len(t.due) > 0 {
			p.reportNow()
		}
	})
}

// reportNow has the peer told. mu must be held.
func (p *resumePeer) reportNow() {
	if p.tell.busy {
		p.tell.now = true
		return
	}
	p.tell.busy = true
	go p.reportAll()
}

// reportAll tells the peer of all that are due.
func (p *resumePeer) reportAll() {
	for {
		p.mu.Lock()
		t := &p.tell
		due := t.due
		t.due, t.now = nil, false
		if t.timer != nil {
			t.timer.Stop()
			t.timer = nil
		}
		p.mu.Unlock()
		on := make(map[network.Conn][]*resumption)
		for r := range due {
			c := r.s.send.stream().Conn()
			if aside.IsClosed(c) {
				if conns := p.usable(); len(conns) > 0 {
					c = conns[0]
				}
			}
			if aside.IsClosed(c) {
				r.progress() // who attaches tells, too, and the end of a connection has all told again
				continue
			}
			on[c] = append(on[c], r)
		}
		p.mu.Lock()
		for c, streams := range on {
			if sd := t.side(c); sd != nil {
				sd.writes = true
				go p.tellOn(c, sd, streams)
				continue
			}
			t.waits = true
			for _, r := range streams {
				t.add(r)
			}
		}
		again := t.now
		t.busy = again
		p.mu.Unlock()
		if !again {
			p.dropUnused()
			return
		}
	}
}

// side returns a stream of reports on c to which nobody writes, or nil where there are too many.
// resumePeer.mu must be held.
func (t *telling) side(c network.Conn) *side {
	for _, sd := range t.on[c] {
		if !sd.writes {
			return sd
		}
	}
	if len(t.on[c]) == maxSides {
		return nil
	}
	if t.on == nil {
		t.on = make(map[network.Conn][]*side)
	}
	sd := new(side)
	t.on[c] = append(t.on[c], sd)
	return sd
}

// tellOn tells the peer of streams on sd.
func (p *resumePeer) tellOn(c network.Conn, sd *side, streams []*resumption) {
	var batch []byte
	for _, r := range streams {
		batch = append(batch, r.progress()...)
	}
	err := p.send(c, sd, batch)
	p.mu.Lock()
	sd.writes = false
	switch {
	case err != nil:
		p.tell.leave(c, sd)
	case sd.idle == nil:
		sd.idle = time.AfterFunc(lingering, func() { p.closeIdle(c, sd) })
	default:
		sd.idle.Reset(lingering)
	}
	if p.tell.waits {
		p.tell.waits = false
		p.reportNow()
	}
	p.mu.Unlock()
	if err != nil {
		p.reportAgain(streams)
	}
}

// closeIdle closes sd, which has had nothing to tell for a while.
func (p *resumePeer) closeIdle(c network.Conn, sd *side) {
	p.mu.Lock()
	if sd.writes { // again
		p.mu.Unlock()
		return
	}
	p.tell.leave(c, sd)
	p.mu.Unlock()
	if sd.stream != nil {
		_ = sd.stream.Close()
	}
	p.dropUnused()
}

// leave takes sd out of the streams of reports. resumePeer.mu must be held.
func (t *telling) leave(c network.Conn, sd *side) {
	t.on[c] = slices.DeleteFunc(t.on[c], func(other *side) bool { return other == sd })
	if len(t.on[c]) == 0 {
		delete(t.on, c)
	}
}

// progress is the message about r, or nil where there is nothing to tell.
func (r *resumption) progress() []byte {
	m := &pb.Progress{Origin: &r.origin}
	h := &r.s.recv
	h.mu.Lock()
	in := &r.incoming
	now := h.received()
	if now > 0 {
		m.Received = &now
	}
	in.reported, in.pending, in.urgent = now, false, false
	h.mu.Unlock()
	w := &r.s.send
	w.mu.Lock()
	if w.closed && !w.inside && w.state != sendFailed && r.ring.confirmed <= r.ring.end {
		m.End = proto.Uint64(r.ring.end)
	}
	w.mu.Unlock()
	if m.Received == nil && m.End == nil {
		return nil
	}
	return progressMessage(m)
}

// progressMessage is m with its length before it.
func progressMessage(m *pb.Progress) []byte {
	body, err := proto.Marshal(m)
	if err != nil {
		panic(err) // all required fields are set
	}
	return append(varint.ToUvarint(uint64(len(body))), body...)
}

// send sends a batch of messages on sd, which it opens on c if it is not open. It resets sd where
// it fails.
func (p *resumePeer) send(c network.Conn, sd *side, batch []byte) error {
	if len(batch) == 0 {
		return nil
	}
	if sd.stream == nil {
		u, err := p.openSide(c)
		if err != nil {
			return err
		}
		sd.stream = u
		batch = append([]byte(header+token(string(ResumeID))), batch...)
	}
	_ = sd.stream.SetWriteDeadline(time.Now().Add(reportTimeout))
	_, err := sd.stream.Write(batch)
	if err != nil {
		_ = sd.stream.Reset()
	}
	return err
}

// openSide opens a stream of reports. Nothing is waited for; what the peer answers is read
// aside, and tells when it has no use for them.
func (p *resumePeer) openSide(c network.Conn) (network.Stream, error) {
	u := p.host.openAtOnce(network.WithAllowLimitedConn(p.host.ctx, "resume"), c)
	if u == nil {
		return nil, fmt.Errorf("the connection has no room for a stream of %s", ResumeID)
	}
	if err := u.SetProtocol(ResumeID); err != nil {
		_ = u.Reset()
		return nil, err
	}
	go func() {
		if err := readExpected(u, header+token(string(ResumeID)), 0); err != nil {
			_ = u.Reset()
		}
	}()
	return u, nil
}

// serveReports reads what the peer tells.
func (h *Host) serveReports(u network.Stream) {
	p := u.Conn().RemotePeer()
	in := bufio.NewReaderSize(u, 512)
	buf := make([]byte, usualMessage)
	for {
		body, err := readBody(in, buf)
		if err != nil {
			if err == io.EOF {
				_ = u.Close()
			} else {
				_ = u.ResetWithError(codeFor(err))
			}
			return
		}
		m := new(pb.Progress)
		if err := (proto.UnmarshalOptions{AllowPartial: true}).Unmarshal(body, m); err != nil {
			h.violation(u, fmt.Errorf("%w: %w", errViolation, err))
			return
		}
		r := h.resumer.get(p, m.GetOrigin())
		if r == nil {
			continue // it has ended meanwhile
		}
		if m.Received != nil {
			r.confirmed(m.GetReceived())
		}
		if m.End != nil {
			r.ends(m.GetEnd())
		}
	}
}
