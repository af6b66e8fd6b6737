package migrate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/rawpeer"
)

// A play is one logical stream of a host, with a peer and an application that do what a
// script says: whatever a peer can send over the old stream and the new ones, in any
// order, in both roles, with connections that die and lie, while the application reads,
// writes and closes. It runs over fake streams, in virtual time. At its end:
//
//   - what the application has read is a prefix of what the peer wrote, as the final sizes
//     join it, and a clean EOF comes behind all of it only (S2-S8, S12);
//   - what the peer has got is what Write says was written, in order, and each final size
//     that the host sent is true;
//   - the host has ended no stream in the application's place;
//   - another peer's stream with the same label is untouched (L3);
//   - once the connections are gone, every call returns, and no label, goroutine or
//     reserved byte is left (L5, M4).

// FuzzExchange plays what the fuzzer makes up.
func FuzzExchange(f *testing.F) {
	for _, p := range plays {
		f.Add(p.setting, []byte(p.script))
	}
	f.Fuzz(func(t *testing.T, set uint8, script []byte) {
		if len(script) > 2*200 {
			return // what can be found is found with less
		}
		virtual(t, func(t *testing.T) { play(t, setting(set), script) })
	})
}

// setting is how a play begins.
type setting = uint8

const (
	hostLower    setting = 1 << iota
	peerVerifies         // the peer advertises the verified handover
	hostRequires         // RequireVerifiedHandover
	hostOpened           // the host opened the stream; else the peer did
	answered             // the host's opening was answered
	readsAlways          // the application reads all the time; else when the script says so
	endsInReset          // the application resets at the end; else it closes
)

// The commands of a script: two bytes each, of which the second is the argument.
const (
	cmdData     = iota // the peer sends bytes of its application: 1 + low nibble
	cmdControl         // the peer sends a message of its protocol, see controls
	cmdEOF             // the peer closes a stream for writing
	cmdReset           // the peer resets a stream
	cmdFalseEOF        // the connection of a stream goes down, and its muxer says EOF
	cmdDie             // the connection of a stream goes down
	cmdAsk             // the peer asks for a migration
	cmdMigrate         // the host does
	cmdRead            // the application reads
	cmdWrite           // the application writes
	cmdEnd             // the application closes, one way or another
	cmdWait            // time passes: 1 ms doubled as often as the low nibble says
	cmdRoom            // a stream takes no more than the low nibble says; 15: everything
	cmdDeadline        // the application sets a deadline
	cmdFull            // the protocol has reached its limit, or has no longer
	cmdGiveUp          // the contexts of the host's Migrates end
	commands
)

// on is the argument of a command for the stream i: that of the i-th migration, from 1.
func on(i, low int) byte { return byte(i<<4 | low) }

// The arguments of cmdControl.
const (
	ctlPrelude = iota
	ctlAckVerified
	ctlAckDraft
	ctlAckDenied
	ctlFinalTrue
	ctlFinalHigh
	ctlFinalLow
	ctlFinalHuge
	ctlFinalZero
	ctlLabel
	ctlMigrate
	ctlNoMember
	ctlOversized
	ctlAnswer
	ctlPart
	ctlPreludePart
)

// The arguments of cmdAsk, which are combined.
const (
	askDraft = 1 << iota
	askUnknown
	askOld
	askWrongParity
	askAlive
	askWithData
)

// The arguments of cmdEnd.
const (
	endWrite = iota
	endRead
	endClose
	endReset
)

var plays = []struct {
	name       string
	setting    setting
	script     string
	migrations int
}{
	{"nothing", readsAlways, "", 0},
	{"data and EOF", readsAlways, seq(cmdData, 5, cmdWrite, 5, cmdEOF, 0, cmdEnd, endWrite), 0},
	{"opener", hostOpened | answered | readsAlways, seq(cmdWrite, 5, cmdData, 5, cmdEOF, 0), 0},
	{"opener whose answer is late", hostOpened, seq(cmdWrite, 5, cmdRead, 9, cmdControl, ctlAnswer, cmdData, 5), 0},
	{"verified responder", peerVerifies | readsAlways, seq(cmdData, 5, cmdWrite, 9, cmdAsk, 0,
		cmdControl, on(1, ctlFinalTrue), cmdData, on(1, 7), cmdEOF, 0, cmdWrite, 20, cmdEOF, on(1, 0)), 1},
	{"verified responder that does not read", peerVerifies, seq(cmdData, 5, cmdAsk, 0,
		cmdControl, on(1, ctlFinalHigh), cmdData, on(1, 7), cmdWait, 12, cmdData, 0, cmdRead, 3, cmdRead, 200), 1},
	{"draft responder", readsAlways, seq(cmdData, 5, cmdWrite, 9, cmdAsk, askDraft, cmdEOF, 0, cmdData, on(1, 7), cmdEOF, on(1, 0)), 1},
	{"draft responder after EOF", readsAlways, seq(cmdData, 5, cmdEOF, 0, cmdAsk, askDraft, cmdEOF, on(1, 0), cmdWrite, 5), 1},
	{"verified initiator", hostLower | peerVerifies | readsAlways, seq(cmdData, 5, cmdWrite, 9, cmdMigrate, 1,
		cmdControl, on(1, ctlPrelude), cmdControl, on(1, ctlAckVerified), cmdData, 3, cmdControl, on(1, ctlFinalTrue),
		cmdData, on(1, 9), cmdEOF, on(1, 0)), 1},
	{"verified initiator over a dead connection", peerVerifies | readsAlways, seq(cmdData, 5, cmdMigrate, 1,
		cmdFalseEOF, 0, cmdControl, on(1, ctlPrelude), cmdControl, on(1, ctlAckVerified), cmdControl, on(1, ctlFinalTrue),
		cmdData, on(1, 9)), 1},
	{"draft initiator", readsAlways, seq(cmdData, 5, cmdWrite, 9, cmdMigrate, 1, cmdControl, on(1, ctlPrelude),
		cmdControl, on(1, ctlAckDraft), cmdEOF, 0, cmdData, on(1, 9)), 1},
	{"draft initiator over a dead connection", readsAlways, seq(cmdData, 5, cmdMigrate, 1, cmdControl, on(1, ctlPrelude),
		cmdControl, on(1, ctlAckDraft), cmdFalseEOF, 0, cmdData, on(1, 9)), 0},
	{"denied", readsAlways, seq(cmdData, 5, cmdMigrate, 1, cmdControl, on(1, ctlPrelude), cmdEOF, 0,
		cmdControl, on(1, ctlAckDenied), cmdWrite, 3), 0},
	{"reset before the ack", peerVerifies | readsAlways, seq(cmdMigrate, 1, cmdReset, on(1, 0), cmdData, 5, cmdEOF, 0), 0},
	{"reset after the ack", peerVerifies | readsAlways, seq(cmdAsk, 0, cmdReset, on(1, 0), cmdData, 5), 0},
	{"ack followed by silence", peerVerifies | readsAlways, seq(cmdMigrate, 1, cmdControl, on(1, ctlPrelude),
		cmdControl, on(1, ctlAckVerified), cmdWrite, 5, cmdData, 5, cmdWait, 15, cmdGiveUp, 0, cmdEnd, endClose), 0},
	{"final size too high", peerVerifies | readsAlways, seq(cmdData, 5, cmdAsk, 0, cmdControl, on(1, ctlFinalHigh), cmdEOF, 0, cmdWait, 15), 0},
	{"final size too low", peerVerifies | readsAlways, seq(cmdData, 5, cmdAsk, 0, cmdControl, on(1, ctlFinalLow), cmdData, on(1, 3)), 0},
	{"final size huge, drips", peerVerifies, seq(cmdData, 5, cmdAsk, 0, cmdControl, on(1, ctlFinalHuge),
		cmdWait, 13, cmdData, 0, cmdWait, 13, cmdData, 0, cmdWait, 13, cmdData, 0, cmdWait, 15), 0},
	{"final size twice", peerVerifies | readsAlways, seq(cmdAsk, 0, cmdControl, on(1, ctlFinalTrue), cmdControl, on(1, ctlFinalTrue)), 1},
	{"there and back", peerVerifies | readsAlways, seq(cmdData, 5, cmdWrite, 9, cmdAsk, 0, cmdControl, on(1, ctlFinalTrue), cmdData, on(1, 7),
		cmdWrite, 20, cmdMigrate, 0, cmdControl, on(2, ctlPrelude), cmdControl, on(2, ctlAckVerified), cmdControl, on(2, ctlFinalTrue),
		cmdData, on(2, 3), cmdWrite, 4, cmdEOF, on(2, 0)), 2},
	{"both, host lower", hostLower | peerVerifies | readsAlways, seq(cmdMigrate, 1, cmdAsk, 0, cmdControl, on(1, ctlPrelude),
		cmdControl, on(1, ctlAckVerified), cmdControl, on(1, ctlFinalTrue)), 1},
	{"both, host higher", peerVerifies | readsAlways, seq(cmdMigrate, 1, cmdAsk, 0, cmdControl, on(2, ctlFinalTrue), cmdData, on(2, 3)), 1},
	{"half-closed", peerVerifies | readsAlways, seq(cmdData, 5, cmdWrite, 9, cmdEnd, endWrite, cmdEOF, 0, cmdAsk, 0,
		cmdControl, on(1, ctlFinalTrue), cmdEOF, on(1, 0)), 1},
	{"closed for reading", peerVerifies, seq(cmdData, 5, cmdEnd, endRead, cmdAsk, 0, cmdControl, on(1, ctlFinalTrue), cmdWrite, 5), 1},
	{"blocked", peerVerifies | readsAlways, seq(cmdRoom, on(0, 3), cmdWrite, 50, cmdAsk, 0, cmdControl, on(1, ctlFinalTrue), cmdWrite, 3), 1},
	{"full", peerVerifies | readsAlways, seq(cmdFull, 0, cmdAsk, 0, cmdControl, on(1, ctlFinalTrue), cmdWrite, 3), 1},
	{"closed meanwhile", peerVerifies | readsAlways, seq(cmdWrite, 3, cmdAsk, 0, cmdEnd, endClose, cmdControl, on(1, ctlFinalTrue)), 1},
	{"unknown, foreign, wrong", peerVerifies | readsAlways, seq(cmdAsk, askUnknown, cmdWait, 13, cmdAsk, askWrongParity, cmdAsk, askAlive, cmdAsk, askWithData), 0},
	{"required", peerVerifies | hostRequires | readsAlways, seq(cmdAsk, askDraft, cmdMigrate, 1, cmdControl, on(2, ctlPrelude), cmdControl, on(2, ctlAckDraft)), 0},
	{"deadlines", peerVerifies, seq(cmdRead, 3, cmdDeadline, 0, cmdDeadline, 2, cmdAsk, 0, cmdRead, 3, cmdDeadline, 1,
		cmdControl, on(1, ctlFinalTrue), cmdData, on(1, 3), cmdDeadline, 0, cmdRead, 9), 1},
}

func seq(b ...byte) string { return string(b) }

// TestPlays: the plays that the fuzzer begins with go as their names say.
func TestPlays(t *testing.T) {
	for _, p := range plays {
		bubble(t, p.name, func(t *testing.T) {
			require.Equal(t, p.migrations, play(t, p.setting, []byte(p.script)), "migrations")
		})
	}
}

// segment is one underlying stream of a play.
type segment struct {
	*fakeStream
	full   *bool
	prev   *segment // the stream from which a migration leads here
	fed    []byte   // all that the peer has sent over it
	eof    int      // where in fed its EOF is, or -1
	lies   int      // from where on its muxer may say EOF, or -1
	ended  bool     // nothing follows
	byHost bool     // the host asked for the migration
	began  int      // at which command the migration to it did
	acked  int      // at which command it was; 0: it was not
	verify bool     // with a verified handover
	index  int
}

func (g *segment) SetProtocol(id protocol.ID) error {
	if *g.full && g.index > 0 {
		return network.ErrResourceLimitExceeded
	}
	return g.fakeStream.SetProtocol(id)
}

const (
	playHost   peer.ID = "m"
	playerLow  peer.ID = "a"
	playerHigh peer.ID = "z"
	bystander  peer.ID = "n"
)

type stage struct {
	t       *testing.T
	h       *Host
	set     setting
	remote  peer.ID
	conns   [3]*fakeConn
	segs    []*segment
	s       *Stream
	label   uint64 // the peer's last
	first   uint64 // of the stream
	full    bool
	command int // the number of the present one

	ctx    context.Context
	giveUp context.CancelFunc
	calls  sync.WaitGroup // Migrates and inbound streams

	mu       sync.Mutex // guards all below
	sendTo   []*segment // in the order in which the host switched to them
	readFrom []*segment
	got      []byte
	eof      int // at which command the application was given it; 0: it was not
	readErr  error
	wrote    int // what Write said
	writing  bool
	ends     [4]bool
	reads    chan int
	writes   chan int
}

func play(t *testing.T, set setting, script []byte) (migrations int) {
	st := newStage(t, set)
	for ; len(script) >= 2; script = script[2:] {
		st.command++
		st.do(int(script[0])%commands, script[1])
		synctest.Wait()
		st.check()
	}
	migrations = st.s.Migrations()
	st.curtain()
	return migrations
}

func newStage(t *testing.T, set setting) *stage {
	st := &stage{t: t, set: set, remote: playerLow, reads: make(chan int, 500), writes: make(chan int, 500)}
	if set&hostLower != 0 {
		st.remote = playerHigh
	}
	opts := []Option{WithTracer(st.trace)}
	if set&hostRequires != 0 {
		opts = append(opts, RequireVerifiedHandover())
	}
	st.h = bareHost(playHost, func(id protocol.ID) bool { return id != FinalSizeID || set&peerVerifies != 0 }, opts...)
	st.ctx, st.giveUp = context.WithCancel(context.Background())
	for i := range st.conns {
		st.conns[i] = &fakeConn{remote: st.remote}
	}
	st.label = 600 + st.h.labels.parity(st.remote, false)
	accepted := make(chan network.Stream, 100)
	st.h.SetStreamHandler(echoID, func(s network.Stream) { accepted <- s })

	old := st.segment(0)
	if set&hostOpened != 0 {
		s, err := st.h.open(context.Background(), old, echoID, []protocol.ID{echoID})
		require.NoError(t, err)
		st.s = s
		if set&answered != 0 {
			old.feed(Prelude + MultistreamToken + EchoToken)
		}
	} else {
		old.feed(Prelude + LabelBytes(st.fresh()) + MultistreamToken + EchoToken)
		st.h.handleStream(old)
		st.s = (<-accepted).(*Stream)
	}
	st.first = st.s.Label()
	st.sendTo, st.readFrom = []*segment{old}, []*segment{old}

	other := newFake()
	other.conn.remote = bystander
	require.True(t, st.h.labels.add(bystander, st.first, newStream(st.h, other, echoID, st.first)))

	go st.reader()
	go st.writer()
	synctest.Wait()
	return st
}

func (st *stage) segment(conn int) *segment {
	g := &segment{fakeStream: newFake(), full: &st.full, index: len(st.segs), eof: -1, lies: -1}
	g.fakeStream.conn = st.conns[conn%len(st.conns)]
	if g.index > 0 {
		g.prev = st.readFrom[len(st.readFrom)-1]
	}
	st.segs = append(st.segs, g)
	return g
}

func (st *stage) fresh() uint64 {
	st.label += 2
	return st.label
}

func (g *segment) feed(data string) {
	if !g.ended {
		g.fed = append(g.fed, data...)
		g.feeds(data, nil)
	}
}

// carried is what of fed is the application's: what is behind the messages of the protocol.
func (st *stage) carried(g *segment) (data []byte, final uint64) {
	if g.index == 0 && st.set&hostOpened == 0 {
		return g.fed[len(Prelude+LabelBytes(st.first)+MultistreamToken+EchoToken):], 0
	}
	if g.index == 0 {
		return g.fed[min(len(g.fed), len(Prelude+MultistreamToken+EchoToken)):], 0
	}
	r := bytes.NewReader(g.fed[min(len(g.fed), len(prelude)):])
	_, _ = readMessage(r)
	if g.verify {
		final, _ = readFinalSize(r)
	}
	data, _ = io.ReadAll(r)
	return data, final
}

func (st *stage) trace(e Event) {
	st.mu.Lock()
	defer st.mu.Unlock()
	switch e.Kind {
	case Denied, Failed, Finished:
		return
	}
	to := e.Stream.exchangeTo()
	if to == nil {
		return // it is going to be denied
	}
	g := to.(*segment)
	switch e.Kind {
	case Started:
		g.began = max(1, st.command)
	case Acked:
		g.acked = max(1, st.command)
		r := bytes.NewReader(g.fed[len(prelude):])
		m, err := readMessage(r)
		if err != nil {
			st.t.Errorf("stream %d: acked, by or for a message that is none: %v", g.index, err)
			return
		}
		g.byHost = e.Initiator
		g.verify = e.Initiator && m.GetAckMigrate().GetFinalSize() || !e.Initiator && m.GetMigrate().GetFinalSize()
	case SendSwitched:
		st.sendTo = append(st.sendTo, g)
	case ReceiveSwitched:
		st.readFrom = append(st.readFrom, g)
	}
}

// exchangeTo is the stream to which the exchange under way leads, or nil.
func (s *Stream) exchangeTo() network.Stream {
	if x := s.exchange(); x != nil {
		return x.next()
	}
	return nil
}

func (st *stage) do(command int, arg byte) {
	g := st.segs[int(arg>>4)%len(st.segs)]
	low := int(arg & 15)
	switch command {
	case cmdData:
		data := make([]byte, low+1)
		for i := range data {
			data[i] = byte(g.index<<5 + (len(g.fed)+i)%31)
		}
		g.feed(string(data))
	case cmdControl:
		g.feed(st.control(g, low))
	case cmdEOF:
		if !g.ended {
			g.ended, g.eof = true, len(g.fed)
			g.ends(io.EOF)
		}
	case cmdReset:
		if !g.ended {
			g.ended = true
			g.ends(network.ErrReset)
			g.grants(0, network.ErrReset)
		}
	case cmdFalseEOF:
		g.conn.dies()
		if !g.ended {
			if g.lies < 0 {
				g.lies = len(g.fed)
			}
			g.ends(io.EOF)
		}
	case cmdDie:
		g.conn.dies()
		if !g.ended {
			g.ended = true
			g.ends(errors.New("fake: the connection is dead"))
			g.grants(0, errors.New("fake: the connection is dead"))
		}
	case cmdAsk:
		st.ask(int(arg))
	case cmdMigrate:
		st.migrate(int(arg))
	case cmdRead:
		st.reads <- int(arg) + 1
	case cmdWrite:
		st.writes <- int(arg)
	case cmdEnd:
		st.end(int(arg) % 4)
	case cmdWait:
		time.Sleep(time.Millisecond << low)
	case cmdRoom:
		if low == 15 {
			low = -1
		}
		if !g.ended {
			g.grants(low, nil)
		}
	case cmdDeadline:
		when := []time.Time{{}, past, time.Now().Add(time.Second)}[int(arg>>1)%3]
		if arg&1 == 0 {
			_ = st.s.SetReadDeadline(when)
		} else {
			_ = st.s.SetWriteDeadline(when)
		}
	case cmdFull:
		st.full = !st.full
	case cmdGiveUp:
		st.giveUp()
		st.ctx, st.giveUp = context.WithCancel(context.Background())
	}
}

func (st *stage) control(g *segment, which int) string {
	var carried uint64
	if g.prev != nil {
		data, _ := st.carried(g.prev)
		carried = uint64(len(data))
	}
	switch which {
	case ctlPrelude:
		return Prelude
	case ctlAckVerified:
		return AckVerified
	case ctlAckDraft:
		return AckDraft
	case ctlAckDenied:
		return AckDenied
	case ctlFinalTrue:
		return FinalSizeBytes(carried)
	case ctlFinalHigh:
		return FinalSizeBytes(carried + 1)
	case ctlFinalLow:
		return FinalSizeBytes(carried - 1)
	case ctlFinalHuge:
		return FinalSizeBytes(1 << 63)
	case ctlFinalZero:
		return FinalSizeBytes(0)
	case ctlLabel:
		return LabelBytes(st.fresh())
	case ctlMigrate:
		return MigrateBytes(st.fresh(), st.s.Label())
	case ctlNoMember:
		return Malformed["no member"]
	case ctlOversized:
		return Malformed["oversized"]
	case ctlAnswer:
		return Prelude + MultistreamToken + EchoToken
	case ctlPart:
		return AckVerified[:2]
	default:
		return MultistreamToken[:7]
	}
}

// ask has the peer ask for a migration.
func (st *stage) ask(how int) {
	if len(st.segs) == 8 {
		return // that many can be told apart in a byte
	}
	g := st.segment(1 + len(st.segs))
	from, id := st.s.Label(), st.fresh()
	if how&askUnknown != 0 {
		from = 1 << 40
	}
	if how&askOld != 0 {
		from = st.first
	}
	if how&askWrongParity != 0 {
		id++
	}
	if how&askAlive != 0 {
		id = st.s.Label()
	}
	request := MigrateBytes(id, from)
	if how&askDraft != 0 {
		request = MigrateDraftBytes(id, from)
	}
	if how&askWithData != 0 {
		request += "too early"
	}
	g.feed(Prelude + request)
	st.calls.Go(func() { st.h.handleStream(g) })
}

// migrate has the host ask for one.
func (st *stage) migrate(how int) {
	if len(st.segs) == 8 {
		return
	}
	g := st.segment(how)
	c := g.conn
	c.mu.Lock()
	c.open = func(ctx context.Context) (network.Stream, error) {
		switch {
		case how&0x30 == 0x10:
			return nil, errors.New("fake: no stream")
		case how&0x30 == 0x20:
			<-ctx.Done()
			return nil, ctx.Err()
		}
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.byHost {
			return nil, errors.New("fake: one stream for each Migrate")
		}
		g.byHost = true
		return g, nil
	}
	c.mu.Unlock()
	ctx := st.ctx
	st.calls.Go(func() { _ = st.h.Migrate(ctx, st.s, c) })
}

// end has the application end the stream. None of it may block, since no fake does.
func (st *stage) end(how int) {
	st.mu.Lock()
	st.ends[how] = true
	st.mu.Unlock()
	st.calls.Go(func() {
		switch how {
		case endWrite:
			_ = st.s.CloseWrite()
		case endRead:
			_ = st.s.CloseRead()
		case endClose:
			_ = st.s.Close()
		case endReset:
			_ = st.s.Reset()
		}
	})
}

// reader is the application's reading.
func (st *stage) reader() {
	buf := make([]byte, 1<<10)
	for {
		size := 100
		if st.set&readsAlways == 0 {
			n, ok := <-st.reads
			if !ok {
				return
			}
			size = n
		}
		n, err := st.s.Read(buf[:size])
		late := false
		st.mu.Lock()
		st.got = append(st.got, buf[:n]...)
		switch {
		case st.eof != 0 && n > 0:
			st.t.Errorf("%d bytes behind EOF", n)
		case err == io.EOF && st.eof == 0:
			st.eof = max(1, st.command)
		case err == nil, err == io.EOF:
		case errors.Is(err, os.ErrDeadlineExceeded):
			late = true
		default:
			st.readErr = err
		}
		over := st.readErr != nil || st.eof != 0 && st.set&readsAlways != 0
		st.mu.Unlock()
		if over {
			return
		}
		if late {
			time.Sleep(time.Second)
		}
	}
}

// writer is its writing: bytes that tell their place.
func (st *stage) writer() {
	for size := range st.writes {
		st.mu.Lock()
		st.writing = true
		b := make([]byte, size)
		for i := range b {
			b[i] = byte((st.wrote + i) % 251)
		}
		st.mu.Unlock()
		n, err := st.s.Write(b)
		st.mu.Lock()
		st.wrote += n
		st.writing = false
		if err == nil && n != size {
			st.t.Errorf("Write took %d of %d bytes without an error", n, size)
		}
		st.mu.Unlock()
	}
}

// check looks at the stage when everything is still.
func (st *stage) check() {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.checkRead()
	st.checkWritten()
	st.checkEnds()
}

// checkRead compares what the application has read with what the peer wrote.
func (st *stage) checkRead() {
	t := st.t
	// The last switch may have gone unreported, where the exchange failed right after it.
	chains := [][]*segment{st.readFrom}
	for _, g := range st.segs {
		if g.acked != 0 && g.prev == st.readFrom[len(st.readFrom)-1] {
			chains = append(chains, append(st.readFrom[:len(st.readFrom):len(st.readFrom)], g))
		}
	}
	var why []string
	for _, chain := range chains {
		err := st.explains(chain)
		if err == nil {
			return
		}
		why = append(why, err.Error())
	}
	t.Fatalf("what the application has read is not what the peer wrote: %x (EOF at %d): %s", st.got, st.eof, strings.Join(why, "; or "))
}

// explains says whether got can be what came over those streams.
func (st *stage) explains(chain []*segment) error {
	var want []byte
	for i, g := range chain {
		data, _ := st.carried(g)
		if i+1 < len(chain) && chain[i+1].verify {
			_, final := st.carried(chain[i+1])
			if closed := st.ends[endRead] || st.ends[endClose]; uint64(len(data)) < final && !closed {
				return fmt.Errorf("stream %d was left at %d bytes, with a final size of %d", g.index, len(data), final)
			}
			data = data[:min(final, uint64(len(data)))]
		}
		want = append(want, data...)
	}
	if !bytes.HasPrefix(want, st.got) {
		return fmt.Errorf("no prefix of %x", want)
	}
	if st.eof == 0 {
		return nil
	}
	// The EOF must stand behind all of it, on the last stream. Where a muxer made one up,
	// it came behind all that was there to be read at the time.
	last := chain[len(chain)-1]
	at := len(st.got) - len(want) + len(last.fed)
	if at == last.eof || last.lies >= 0 && at >= last.lies {
		for _, g := range st.segs {
			if g.acked != 0 && g.began < st.eof && g.prev == last {
				return fmt.Errorf("EOF of stream %d although a migration to stream %d had begun, which was acked", last.index, g.index)
			}
		}
		return nil
	}
	// It was given before the migration, and stays given.
	if len(chain) > 1 && chain[len(chain)-1].began >= st.eof {
		return st.explains(chain[:len(chain)-1])
	}
	return fmt.Errorf("EOF %d bytes into stream %d, which ends after %d (-1: not yet)", at, last.index, last.eof)
}

// sent is what the host sent over g: the application's bytes, and the final size before.
func (st *stage) sent(g *segment) (data []byte, final uint64, ok bool) {
	out := g.taken()
	expect := Prelude
	if g.index == 0 {
		if st.set&hostOpened != 0 {
			expect += LabelBytes(st.first)
		}
		expect += MultistreamToken + EchoToken
	}
	if len(out) <= len(expect) {
		if !strings.HasPrefix(expect, out) {
			st.t.Fatalf("stream %d: the host sent %q", g.index, out)
		}
		return nil, 0, false
	}
	if !strings.HasPrefix(out, expect) {
		st.t.Fatalf("stream %d: the host sent %q, not %q first", g.index, out, expect)
	}
	out = out[len(expect):]
	if g.index == 0 {
		return []byte(out), 0, true
	}
	r := strings.NewReader(out)
	if _, err := readMessage(r); err != nil {
		return nil, 0, false // it has not left whole
	}
	if g.verify {
		f, err := readFinalSize(r)
		if err != nil {
			return nil, 0, false
		}
		final = f
	}
	data, _ = io.ReadAll(r)
	return data, final, true
}

// checkWritten compares what the peer was sent with what the application wrote.
func (st *stage) checkWritten() {
	t := st.t
	var got []byte
	for i, g := range st.sendTo {
		data, _, _ := st.sent(g)
		if i+1 < len(st.sendTo) && st.sendTo[i+1].verify {
			_, final, ok := st.sent(st.sendTo[i+1])
			if ok && final != uint64(len(data)) {
				t.Fatalf("stream %d carried %d bytes, and the final size said %d", g.index, len(data), final)
			}
		}
		got = append(got, data...)
	}
	for i := range got {
		if got[i] != byte(i%251) {
			t.Fatalf("the peer was sent %x", got)
		}
	}
	if !st.writing && len(got) != st.wrote {
		t.Fatalf("the peer was sent %d bytes, and Write said %d", len(got), st.wrote)
	}
	for _, g := range st.segs {
		in := false
		for _, to := range st.sendTo {
			in = in || to == g
		}
		if data, _, _ := st.sent(g); !in && len(data) > 0 {
			t.Fatalf("stream %d was sent %x, and is none of the logical stream's", g.index, data)
		}
	}
}

// checkEnds: the host ends a stream cleanly when the application did, or has moved on.
func (st *stage) checkEnds() {
	last := st.sendTo[len(st.sendTo)-1]
	last.mu.Lock()
	defer last.mu.Unlock()
	if last.writeClosed && last.resetWith == nil && !st.ends[endWrite] && !st.ends[endClose] && !st.ends[endReset] {
		st.t.Fatalf("the host closed stream %d for writing, and the application did not", last.index)
	}
}

// curtain is the end of a play: the peer is gone, and the application ends the stream.
func (st *stage) curtain() {
	t := st.t
	gone := errors.New("fake: the connection is gone")
	for _, c := range st.conns {
		c.dies()
	}
	for _, g := range st.segs {
		if !g.ended {
			g.ended = true
			g.ends(gone)
		}
		g.grants(0, gone)
	}
	synctest.Wait()
	st.command++
	st.check()
	_ = st.s.SetDeadline(time.Time{})
	st.giveUp()
	end := endClose
	if st.set&endsInReset != 0 {
		end = endReset
	}
	st.end(end)
	// Longer than every time limit together.
	time.Sleep(5 * time.Minute)
	synctest.Wait()
	close(st.reads)
	close(st.writes)
	done := make(chan struct{})
	go func() {
		st.calls.Wait()
		close(done)
	}()
	synctest.Wait()
	select {
	case <-done:
	default:
		t.Fatal("a call has not returned although the peer is gone")
	}
	st.check()

	st.h.labels.mu.Lock()
	defer st.h.labels.mu.Unlock()
	require.Len(t, st.h.labels.peers, 1, "nothing may be left of the stream (L5)")
	other := st.h.labels.peers[bystander].streams[st.first]
	require.NotNil(t, other, "another peer's stream")
	require.Zero(t, other.Migrations())
	for _, g := range st.segs {
		require.Zero(t, g.scope.reserved(), "memory reserved in the scope of stream %d", g.index)
	}
	st.s.mu.Lock()
	defer st.s.mu.Unlock()
	require.Nil(t, st.s.ex)
}
