package migrate

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
	. "github.com/go-portage/portage/internal/rawpeer"
	"github.com/go-portage/portage/pb"
)

// What a peer may send, and must not, about streams that outlive their connection; byte by byte.

func resumableLabelBytes(id uint64) string {
	return Lengthy("\x0a" + Lengthy("\x08"+Uvarint(id)+"\xa8\x06\x01"))
}

func resumeBytes(id, from, origin, epoch, received uint64) string {
	resume := Lengthy("\x08" + Uvarint(origin) + "\x10" + Uvarint(epoch) + "\x18" + Uvarint(received))
	return Lengthy("\x12" + Lengthy("\x08"+Uvarint(id)+"\x10"+Uvarint(from)+"\xaa\x06"+resume))
}

func ackReceivedBytes(received uint64) string {
	return Lengthy("\x1a" + Lengthy("\xa8\x06"+Uvarint(received)))
}

func ackStaleBytes(epoch uint64, wait string) string {
	return Lengthy("\x1a" + Lengthy("\xb2\x06"+Lengthy("\x08"+Uvarint(epoch)+"\x10"+wait)))
}

func receivedBytes(origin, received uint64) string {
	return Lengthy("\x08" + Uvarint(origin) + "\x10" + Uvarint(received))
}

func endBytes(origin, end uint64) string {
	return Lengthy("\x08" + Uvarint(origin) + "\x18" + Uvarint(end))
}

// meetResuming is a host that resumes streams, and a raw peer that says it does.
func meetResuming(t *testing.T) *rawPeer {
	return meeting{kind: resuming, opts: []Option{WithResumption()}}.meet(t)
}

// hostAcceptsResumable is hostAccepts with a stream that may outlive its connection.
func (p *rawPeer) hostAcceptsResumable() (*Stream, *RawStream) {
	p.t.Helper()
	label := p.Fresh()
	u := p.Opens(0, Prelude, resumableLabelBytes(label), MultistreamToken, EchoToken, "!")
	u.Label = label
	u.Wants(Prelude, MultistreamToken, EchoToken)
	s := p.accepted()
	p.reads(s, "!")
	p.writes(s, "?")
	u.Wants("?")
	return s, u
}

// hostOpensResumable is hostOpens with a stream that may outlive its connection. The host has sent
// a first byte, and the peer none.
func (p *rawPeer) hostOpensResumable() (*Stream, *RawStream) {
	p.t.Helper()
	return p.hostOpensAs(resumableLabelBytes)
}

// epoch is the n-th one that the raw peer may give, n from 1 on: it is the higher peer.
func epoch(n uint64) uint64 { return 2*n - 1 }

// resumes asks on connection 1 to resume the stream that was opened as u.
func (p *rawPeer) resumes(u *RawStream, e, received uint64) *RawStream {
	p.t.Helper()
	id := p.Fresh()
	next := p.Opens(1, Prelude, resumeBytes(id, u.Label, u.Label, e, received))
	next.Label = id
	return next
}

func TestPeerResumes(t *testing.T) {
	p := meetResuming(t)
	s, old := p.hostAcceptsResumable()
	p.writes(s, "abc")
	next := p.resumes(old, epoch(1), 1+1)
	next.Wants(Prelude, ackReceivedBytes(1), "bc")
	old.WantsReset(network.StreamSupplanted)
	p.talk(s, next)
	require.NoError(t, s.Close())
	next.WantsEOF()
}

// What was written meanwhile arrives, and the end of writing.
func TestPeerResumesWhatHasEnded(t *testing.T) {
	p := meetResuming(t)
	s, old := p.hostAcceptsResumable()
	p.host.resumer.get(p.ID(), old.Label).lose(nil, errors.New("test"))
	p.writes(s, strings.Repeat("x", 300))
	require.NoError(t, s.Close())
	first := p.Arrives() // ours, which nobody answers
	first.Wants(Prelude)
	next := p.resumes(old, epoch(2), 1)
	next.Wants(Prelude, ackReceivedBytes(everything), strings.Repeat("x", 300))
	next.WantsEOF()
	require.NotNil(t, p.host.resumer.get(p.ID(), old.Label), "nobody has confirmed the end")
	p.reportsTo(receivedBytes(old.Label, 1+300+1))
	WaitFor(t, "the stream to be forgotten", func() bool { return p.host.resumer.get(p.ID(), old.Label) == nil })
}

// What was closed, and has arrived, is over once the peer says so; nothing is left of it.
func TestPeerResumesWhatHasArrived(t *testing.T) {
	for _, received := range []uint64{1 + 3 + 1, everything} {
		p := meetResuming(t)
		s, old := p.hostAcceptsResumable()
		p.writes(s, "abc")
		require.NoError(t, s.Close())
		next := p.resumes(old, epoch(1), received)
		next.Wants(Prelude, ackReceivedBytes(everything))
		next.WantsEOF()
		WaitFor(t, "the stream to be forgotten", func() bool { return p.host.resumer.get(p.ID(), old.Label) == nil })
	}
}

// reportsTo sends reports on connection 1.
func (p *rawPeer) reportsTo(parts ...string) *RawStream {
	p.t.Helper()
	return p.Opens(1, MultistreamToken, Token(ResumeID), strings.Join(parts, ""))
}

func TestStaleAttempts(t *testing.T) {
	p := meetResuming(t)
	s, old := p.hostAcceptsResumable()
	next := p.resumes(old, epoch(3), 1)
	next.Wants(Prelude, ackReceivedBytes(1))
	for _, e := range []uint64{epoch(1), epoch(3)} {
		late := p.resumes(old, e, 0)
		late.Wants(Prelude, ackStaleBytes(epoch(3), "\x00"))
		late.WantsEOF()
	}
	p.talk(s, next)
}

func TestUnknownStreamsAreDenied(t *testing.T) {
	p := meeting{kind: resuming, opts: []Option{WithResumption(), func(c *config) error {
		c.labelWait = 50 * time.Millisecond
		return nil
	}}}.meet(t)
	ours := p.host.labels.fresh(p.ID())
	theirs := p.Fresh()
	for _, origin := range []uint64{ours, theirs} {
		u := p.resumes(&RawStream{Label: origin}, epoch(1), 0)
		u.Wants(Prelude, AckDenied)
		u.WantsEOF()
	}
	// Its opening, which comes late, is refused: the peer has given it up.
	u := p.Opens(0, Prelude, resumableLabelBytes(theirs), MultistreamToken, EchoToken, "!")
	u.WantsReset(network.StreamProtocolNegotiationFailed)
}

func TestWithoutTheOptionResumptionsAreDenied(t *testing.T) {
	p := meet(t, resuming)
	s, old := p.hostAcceptsResumable()
	u := p.resumes(old, epoch(1), 1)
	u.Wants(Prelude, AckDenied)
	u.WantsEOF()
	p.talk(s, old)
}

// A peer that lies harms its own stream.
func TestViolationsOfResumption(t *testing.T) {
	for _, tc := range []struct {
		name    string
		lives   bool // the stream does
		attempt func(p *rawPeer, old *RawStream) *RawStream
	}{
		{"more received than sent", false, func(p *rawPeer, old *RawStream) *RawStream { return p.resumes(old, epoch(1), 3) }},
		{"epoch of the host's parity", true, func(p *rawPeer, old *RawStream) *RawStream { return p.resumes(old, epoch(1)+1, 1) }},
		{"epoch from far away", true, func(p *rawPeer, old *RawStream) *RawStream { return p.resumes(old, 1<<20+1, 1) }},
		{"no epoch", true, func(p *rawPeer, old *RawStream) *RawStream { return p.resumes(old, 0, 1) }},
		{"label of the host's parity", true, func(p *rawPeer, old *RawStream) *RawStream {
			return p.Opens(1, Prelude, resumeBytes(old.Label+1, old.Label, old.Label, epoch(1), 1))
		}},
		{"data before the ack", true, func(p *rawPeer, old *RawStream) *RawStream {
			return p.Opens(1, Prelude+resumeBytes(p.Fresh(), old.Label, old.Label, epoch(1), 1)+"x")
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := meetResuming(t)
			s, old := p.hostAcceptsResumable()
			other, otherOld := p.hostAcceptsResumable()
			tc.attempt(p, old).WantsReset(network.StreamProtocolViolation)
			if tc.lives {
				p.talk(s, old)
			} else {
				p.failed(s)
			}
			p.talk(other, otherOld)
		})
	}
}

func TestReportsThatLie(t *testing.T) {
	for name, report := range map[string]func(origin uint64) string{
		"more received than sent":     func(origin uint64) string { return receivedBytes(origin, 1<<40) },
		"an end before what has come": func(origin uint64) string { return endBytes(origin, 0) },
		"two ends":                    func(origin uint64) string { return endBytes(origin, 5) + endBytes(origin, 6) },
	} {
		t.Run(name, func(t *testing.T) {
			p := meetResuming(t)
			s, old := p.hostAcceptsResumable()
			other, otherOld := p.hostAcceptsResumable()
			p.reportsTo(report(old.Label))
			p.failed(s)
			old.WantsReset(network.StreamProtocolViolation)
			p.talk(other, otherOld)
		})
	}
	t.Run("no message", func(t *testing.T) {
		p := meetResuming(t)
		s, old := p.hostAcceptsResumable()
		p.reportsTo("\xff\xff\xff\x7f").WantsReset(network.StreamProtocolViolation)
		p.talk(s, old)
	})
}

// An EOF on a muxer that may report one for being closed counts at the end that was announced.
func TestEndsAreBelievedWhereTheyWereAnnounced(t *testing.T) {
	p := meetResuming(t)
	s, old := p.hostAcceptsResumable()
	p.reportsTo(endBytes(old.Label, 1+3))
	WaitFor(t, "the end to be known", func() bool {
		s.recv.mu.Lock()
		defer s.recv.mu.Unlock()
		return s.recv.resumption.incoming.told
	})
	old.Sends("ab")
	p.reads(s, "ab")
	old.ClosesWrite() // too early
	got := make(chan error, 1)
	go func() {
		_, err := s.Read(make([]byte, 1))
		got <- err
	}()
	next := p.arrivesAfter(old)
	next.Sends(Prelude, ackReceivedBytes(1), "c")
	require.NoError(t, <-got)
	next.ClosesWrite()
	_, err := s.Read(make([]byte, 1))
	require.Equal(t, io.EOF, err)
}

// arrivesAfter is the host's attempt to resume what was opened as u.
func (p *rawPeer) arrivesAfter(u *RawStream) *RawStream {
	p.t.Helper()
	next := p.Arrives()
	next.Wants(Prelude)
	m, err := readMessage(next)
	require.NoError(p.t, err)
	require.Equal(p.t, u.Label, m.GetMigrate().GetResume().GetOrigin())
	next.Label = m.GetMigrate().GetId()
	return next
}

// A host leaves a connection that is open, where it is told to.
func TestLeave(t *testing.T) {
	p := meetResuming(t)
	s, old := p.hostAcceptsResumable()
	p.host.Leave(p.Ends[0])
	next := p.arrivesAfter(old)
	require.Equal(t, p.Conns[1], next.Conn(), "another connection")
	next.Sends(Prelude, ackReceivedBytes(1))
	p.talk(s, next)
}

// A stream whose opening the peer may not have stays where it is: the peer would deny it.
func TestLeaveBeforeTheOpeningHasArrived(t *testing.T) {
	for _, told := range []string{"nothing", "by the answer", "by a report"} {
		t.Run(told, func(t *testing.T) {
			p := meetResuming(t)
			s, err := p.hostBegins(0, echoID)
			require.NoError(t, err)
			p.writes(s, "!")
			old := p.Arrives()
			old.Wants(Prelude, resumableLabelBytes(s.Label()), MultistreamToken, EchoToken, "!")
			switch told {
			case "by the answer":
				old.Sends(Prelude, MultistreamToken, EchoToken, "?")
				p.reads(s, "?")
			case "by a report":
				p.reportsTo(receivedBytes(s.Label(), 1))
				WaitFor(t, "the report to arrive", func() bool {
					s.send.mu.Lock()
					defer s.send.mu.Unlock()
					return s.send.resumption.ring.confirmed > 0
				})
			}
			p.host.Leave(p.Ends[0])
			if told == "nothing" {
				old.Sends(Prelude, MultistreamToken, EchoToken)
				p.talk(s, old)
				return
			}
			next := p.Arrives()
			next.Wants(Prelude)
			require.Equal(t, p.Conns[1], next.Conn(), "another connection")
		})
	}
}

func TestRing(t *testing.T) {
	const window = 64 << 10
	budget := &ringBudget{perPeer: 4 * window, perHost: 4 * window, manager: &network.NullResourceManager{}}
	fresh := func() *ring { return &ring{of: &ringMemory{host: budget, window: window}} }
	data := bytes.Repeat([]byte("0123456789abcdefghijk"), window/10)
	read := func(r *ring, from uint64) []byte {
		p := make([]byte, window)
		return p[:r.copyFrom(from, p)]
	}
	lent := func(r *ring, p []byte, taken int) {
		p = bytes.Clone(p)
		r.lend(p)
		r.giveBack(len(p) - taken)
		r.keep()
		clear(p) // the application writes to it again
	}

	r := fresh()
	require.Equal(t, 100, r.put(data[:100], false))
	require.Equal(t, data[30:100], read(r, 30))
	require.Equal(t, smallestBlock, budget.used)
	r.confirm(40)
	require.Equal(t, window-60, r.put(data[100:], false), "no more than the window")
	require.Zero(t, r.put(data, false))
	require.Equal(t, data[40:40+window], read(r, 40))
	require.Len(t, r.blocks[0], smallestBlock, "little takes little")
	for _, b := range r.blocks[1:] {
		require.Equal(t, window/4, cap(b), "what is confirmed is free soon, and takes few blocks")
	}
	few := make([]byte, 3000)
	require.Equal(t, 3000, r.copyFrom(50, few))
	require.Equal(t, data[50:3050], few)
	lent(r, data[40+window:60+window], 10) // drops the oldest
	require.EqualValues(t, 50, r.low)
	require.Equal(t, data[50:50+window], read(r, 50))
	require.LessOrEqual(t, budget.used, window+window/4, "but for one block it takes what it keeps")
	r.confirm(60_000)
	require.Equal(t, data[60_000:50+window], read(r, 60_000))
	require.LessOrEqual(t, budget.used, window/2, "blocks that are confirmed are free")
	r.confirm(50 + window)
	require.Nil(t, r.blocks)
	require.Zero(t, budget.used)
	require.NotNil(t, budget.span, "more is likely to follow")
	budget.tidy()
	require.Nil(t, budget.span)
	require.Zero(t, budget.reserved)

	r = fresh()
	lent(r, data, len(data)) // more than fits
	require.Equal(t, uint64(len(data)), r.end)
	require.Equal(t, data[len(data)-window:], read(r, r.low))
	r.confirm(everything)
	require.Nil(t, r.blocks)
	require.Equal(t, 5, r.put(data[:5], false), "nobody asks for it")
	require.Equal(t, r.end, r.low)
	lent(r, data, 7)
	require.EqualValues(t, len(data)+12, r.end)
	require.Equal(t, r.end, r.low)
	require.Zero(t, budget.used)

	// What is confirmed while it is lent is not copied.
	r = fresh()
	lent(r, data[:100], 100)
	r.lend(data[100:1000])
	r.confirm(400)
	r.giveBack(100)
	r.keep()
	require.Equal(t, data[400:900], read(r, 400))
	r.lend(data[900:1000])
	r.confirm(950)
	r.giveBack(50)
	r.keep()
	require.EqualValues(t, 950, r.low)
	require.EqualValues(t, 950, r.end)
	require.Zero(t, budget.used)
	lent(r, data[950:1000], 50)
	require.Equal(t, data[950:1000], read(r, 950))
	r.release()
	lent(r, data[:10], 10)
	require.Zero(t, r.put(data[:10], false))
	require.EqualValues(t, 1010, r.end)
	require.Zero(t, budget.used)

	full := fresh()
	for budget.reserve(smallestBlock) {
	}
	require.Zero(t, full.put(data[:10], false), "the budget is used up")
	lent(full, data, 10)
	require.EqualValues(t, 10, full.low)
	budget.release(smallestBlock)
	lent(full, data[10:20], 10)
	require.Equal(t, data[10:20], read(full, 10))
	lent(full, data[20:20+smallestBlock], smallestBlock) // the memory there is has the newest
	require.Equal(t, data[20+smallestBlock-10:20+smallestBlock], read(full, full.end-10))
	require.Less(t, full.low, full.end)
}

func TestEpochs(t *testing.T) {
	for _, tc := range []struct{ above, parity, want uint64 }{{0, 0, 2}, {0, 1, 1}, {1, 0, 2}, {1, 1, 3}, {2, 0, 4}, {2, 1, 3}} {
		require.Equal(t, tc.want, nextEpoch(tc.above, tc.parity), "above %d, parity %d", tc.above, tc.parity)
	}
}

func TestResumptionOptions(t *testing.T) {
	for name, opt := range map[string]ResumeOption{
		"small window": ResumeWindow(1), "large window": ResumeWindow(math.MaxInt), "no patience": ResumePatience(0), "no protocol": ResumeOnly(),
	} {
		cfg := defaults()
		require.Error(t, WithResumption(opt)(&cfg), name)
	}
	cfg := defaults()
	require.NoError(t, WithResumption(ResumeWindow(100_000), ResumePatience(time.Minute), ResumeOnly(echoID))(&cfg))
	require.Equal(t, 64<<10, cfg.resumes.window)
}

// Whose Label says nothing of it, because the peer lacks it or the application does not want
// it, has no such stream.
func TestWhichStreamsMayBeResumed(t *testing.T) {
	for _, tc := range []struct {
		name string
		kind peerKind
		opts []Option
		want bool
	}{
		{"both", resuming, []Option{WithResumption()}, true},
		{"the peer does not", verified, []Option{WithResumption()}, false},
		{"this host does not", resuming, nil, false},
		{"this protocol", resuming, []Option{WithResumption(ResumeOnly(echoID))}, true},
		{"another protocol", resuming, []Option{WithResumption(ResumeOnly("/other"))}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := meet(t, tc.kind, tc.opts...)
			ctx, cancel := context.WithTimeout(t.Context(), Patience)
			defer cancel()
			s, err := p.host.NewStream(ctx, p.ID(), echoID)
			require.NoError(t, err)
			p.writes(s.(*Stream), "!")
			u := p.Arrives()
			label := LabelBytes(s.(*Stream).Label())
			if tc.want {
				label = resumableLabelBytes(s.(*Stream).Label())
			}
			u.Wants(Prelude, label, MultistreamToken, EchoToken, "!")
			require.Equal(t, tc.want, s.(*Stream).send.resumption != nil)
		})
	}
}

// The bytes of docs/resumption.md.
func TestExampleOfResumption(t *testing.T) {
	text, err := os.ReadFile("../docs/resumption.md")
	require.NoError(t, err)
	var want []byte
	for line := range strings.Lines(string(text)) {
		if hexBytes, _, found := strings.Cut(line, "  length"); found || strings.HasPrefix(line, "   08 ") {
			hexBytes, _, _ = strings.Cut(strings.TrimSpace(hexBytes), "      ")
			b, err := hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(hexBytes), " ", ""))
			require.NoError(t, err, line)
			want = append(want, b...)
		}
	}
	const origin = 19088744
	resumes, wait, three, received, end := true, true, uint64(3), uint64(600), uint64(700)
	id := uint64(origin)
	var got []byte
	got = appendMessage(got, &pb.StreamMigration{Type: &pb.StreamMigration_Label{Label: &pb.Label{Id: &id, Resumes: &resumes}}})
	got = appendMessage(got, resumeMessage(origin+2, origin, origin, 2, 1000))
	for _, ack := range []*pb.AckMigrate{{Received: &received}, {Stale: &pb.Stale{Epoch: &three, Wait: &wait}}} {
		got = appendMessage(got, &pb.StreamMigration{Type: &pb.StreamMigration_AckMigrate{AckMigrate: ack}})
	}
	got = append(got, progressMessage(&pb.Progress{Origin: &id, Received: &received})...)
	got = append(got, progressMessage(&pb.Progress{Origin: &id, End: &end})...)
	require.Equal(t, hex.Dump(want), hex.Dump(got))
}

// A peer that confirms nothing piles up no tombstones: the oldest go.
func TestTombstonesAreBounded(t *testing.T) {
	for _, tc := range []struct {
		name    string
		opts    []ResumeOption
		written int // to each stream
		kept    int
	}{
		{"in number", []ResumeOption{func(c *resumeConfig) error { c.tombstones = 2; return nil }}, 1, 2},
		{"in memory", []ResumeOption{ResumeWindow(64 << 10)}, 40_000, 2}, // 48 KiB of 128 each
		{"in memory of all peers", []ResumeOption{ResumeWindow(64 << 10), func(c *resumeConfig) error { c.perHost = 200 << 10; return nil }}, 40_000, 2},
		{"none has room", []ResumeOption{ResumeWindow(64 << 10), func(c *resumeConfig) error { c.perHost = 90 << 10; return nil }}, 40_000, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := meeting{kind: resuming, opts: []Option{WithResumption(tc.opts...)}}.meet(t)
			var all []uint64
			text := strings.Repeat("x", tc.written)
			var streams []*RawStream
			for range 5 {
				s, old := p.hostAcceptsResumable()
				p.writes(s, text)
				require.NoError(t, s.Close())
				all, streams = append(all, old.Label), append(streams, old)
			}
			kept := func() (kept []uint64) {
				for _, origin := range all {
					if p.host.resumer.get(p.ID(), origin) != nil {
						kept = append(kept, origin)
					}
				}
				return kept
			}
			WaitFor(t, "the oldest to be forgotten", func() bool { return len(kept()) == tc.kept })
			require.Equal(t, all[len(all)-tc.kept:], append([]uint64{}, kept()...))
			for _, u := range streams { // what is forgotten arrives all the same
				u.Wants(text)
				u.WantsEOF()
			}
			for _, origin := range kept() {
				p.reportsTo(receivedBytes(origin, 1+uint64(tc.written)+1))
			}
			WaitFor(t, "the last to be forgotten", func() bool { return len(kept()) == 0 })
			rs := p.host.resumer
			rs.mu.Lock()
			defer rs.mu.Unlock()
			require.Zero(t, rs.buried)
		})
	}
}

// One that goes and has not delivered everything is an error at the other end.
func TestTombstoneThatIsLostGoes(t *testing.T) {
	p := meeting{kind: resuming, opts: []Option{WithResumption(func(c *resumeConfig) error {
		c.tombstones = 1
		return nil
	})}}.meet(t)
	s, old := p.hostAcceptsResumable()
	p.host.resumer.get(p.ID(), old.Label).lose(nil, errors.New("test"))
	p.writes(s, "abc")
	require.NoError(t, s.Close())
	u := p.Arrives() // its attempt, which nobody answers
	u.Wants(Prelude)
	next, _ := p.hostAcceptsResumable()
	require.NoError(t, next.Close())
	WaitFor(t, "the first to be forgotten", func() bool { return p.host.resumer.get(p.ID(), old.Label) == nil })
	u = p.resumes(old, epoch(2), 1)
	u.Wants(Prelude, AckDenied)
	u.WantsEOF()
}

// Who has ended its writing and read the other's end is not told that the stream was denied: what
// it waits for is a confirmation only.
func TestDeniedStreamThatIsThrough(t *testing.T) {
	for _, through := range []bool{false, true} {
		t.Run(fmt.Sprint(through), func(t *testing.T) {
			p := meetResuming(t)
			s, old := p.hostAcceptsResumable()
			if through {
				p.reportsTo(endBytes(old.Label, 1))
				old.ClosesWrite()
				_, err := s.Read(make([]byte, 1))
				require.Equal(t, io.EOF, err)
			}
			require.NoError(t, s.CloseWrite())
			p.host.resumer.get(p.ID(), old.Label).lose(nil, errors.New("test"))
			next := p.arrivesAfter(old)
			next.Sends(Prelude, AckDenied)
			WaitFor(t, "the stream to be forgotten", func() bool { return p.host.resumer.get(p.ID(), old.Label) == nil })
			_, err := s.Read(make([]byte, 1))
			if !through {
				require.ErrorIs(t, err, network.ErrReset)
				return
			}
			require.Equal(t, io.EOF, err)
			require.NoError(t, s.Close())
		})
	}
}

// Reports about streams that live for a moment, one after the other, share a stream of their own,
// and the memory that is reserved for them.
func TestShortStreamsShareReports(t *testing.T) {
	onBothTransports(t, func(t *testing.T, m meeting) {
		m.kind, m.opts = resuming, []Option{WithResumption()}
		p := m.meet(t)
		confirms := p.reportsTo()
		for range 20 {
			s, old := p.hostAcceptsResumable()
			require.NoError(t, s.Close())
			confirms.Sends(receivedBytes(old.Label, everything))
			WaitFor(t, "the stream to be forgotten", func() bool { return p.host.resumer.get(p.ID(), old.Label) == nil })
		}
		p.ArrivesFor(ResumeID)
		require.Empty(t, p.CameFor(ResumeID), "one is enough")
		budget := &p.host.resumer.budget
		require.NotNil(t, budget.span, "and what is reserved")
		p.closesReports()
		require.Empty(t, p.host.resumer.peers)
		budget.tidy()
		require.Nil(t, budget.span)
	})
}

// A first Write that is too large to leave with the opening follows it.
func TestFirstWriteOfAResumableStream(t *testing.T) {
	for _, size := range []int{0, 1, openingRoom, openingRoom + 1, 100 << 10} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			p := meetResuming(t)
			s, err := p.hostBegins(0, echoID)
			require.NoError(t, err)
			require.NotNil(t, s.send.resumption)
			data := strings.Repeat("x", size)
			wrote := make(chan error, 1)
			go func() {
				_, err := s.Write([]byte(data))
				wrote <- err
			}()
			u := p.Arrives()
			u.Wants(Prelude, resumableLabelBytes(s.Label()), MultistreamToken, EchoToken, data)
			require.NoError(t, <-wrote)
			u.Sends(Prelude, MultistreamToken, EchoToken)
			p.talk(s, u)
		})
	}
}
