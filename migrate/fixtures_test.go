package migrate

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
)

// The fixtures of the tests that watch a migration from outside: a stream with both of
// its ends, on a path that leads from one connection to another, and a tracer that can
// stop either end at any step.

const testID protocol.ID = "/test/stream/1.0.0"

// The ends of a stream, as indices of pair's arrays.
const (
	opener   = 0
	acceptor = 1
)

var ends = []int{opener, acceptor}

func endName(side int) string { return []string{"opener", "acceptor"}[side] }

// path is a way for a stream: from one connection of a pair to the other.
type path struct {
	first, second Transport
	back          bool // from the second connection to the first
}

func (p path) String() string {
	if p.back {
		return fmt.Sprintf("%s to %s", p.second, p.first)
	}
	return fmt.Sprintf("%s to %s", p.first, p.second)
}

// from and to are indices of pair.conns.
func (p path) from() int {
	if p.back {
		return 1
	}
	return 0
}

func (p path) to() int { return 1 - p.from() }

var (
	tcpQUIC      = path{TCP, QUIC, false}
	quicTCP      = path{TCP, QUIC, true}
	relayQUIC    = path{Relay, QUIC, false}
	wsQUIC       = path{WebSocket, QUIC, false}
	quicWS       = path{WebSocket, QUIC, true}
	tcpWebT      = path{TCP, WebTransport, false}
	webTTCP      = path{TCP, WebTransport, true}
	quicWebRTC   = path{QUIC, WebRTC, false}
	webRTCQUIC   = path{QUIC, WebRTC, true}
	mainPaths    = []path{tcpQUIC, quicTCP}
	usualPaths   = []path{tcpQUIC, quicTCP, relayQUIC, wsQUIC}
	everyPath    = []path{tcpQUIC, quicTCP, relayQUIC, wsQUIC, quicWS, tcpWebT, webTTCP, quicWebRTC, webRTCQUIC}
	shortOfPaths = len(mainPaths) // with -short
)

// journey is a pair with the steps that its migrations take, and a path.
type journey struct {
	*pair
	path
	*steps
}

// eachPath runs f once for every path. Paths over the same two transports share a pair.
func eachPath(t *testing.T, paths []path, f func(*testing.T, *journey)) {
	t.Helper()
	if testing.Short() {
		paths = paths[:min(len(paths), shortOfPaths)]
	}
	for len(paths) > 0 {
		var same, others []path
		for _, p := range paths {
			if p.first == paths[0].first && p.second == paths[0].second {
				same = append(same, p)
			} else {
				others = append(others, p)
			}
		}
		paths = others
		t.Run(fmt.Sprintf("%s and %s", same[0].first, same[0].second), func(t *testing.T) {
			j := newJourney(t, same[0])
			for _, p := range same {
				t.Run(p.String(), func(t *testing.T) { f(t, &journey{j.pair, p, j.steps}) })
			}
			j.nothingLeft(t)
		})
	}
}

func newJourney(t testing.TB, p path, opts ...Option) *journey {
	t.Helper()
	st := new(steps)
	return &journey{newPair(t, p.first, p.second, append(opts, WithTracer(st.trace))...), p, st}
}

// start opens a stream at the beginning of the path, and returns its ends.
func (j *journey) start(t testing.TB) [2]*Stream {
	t.Helper()
	a, b := j.open(t, testID, j.from())
	return [2]*Stream{a, b}
}

// move migrates the stream to the end of the path, on behalf of one end.
func (j *journey) move(t testing.TB, side int, s [2]*Stream) error {
	t.Helper()
	return j.moveTo(t, side, s, j.to())
}

func (j *journey) moveTo(t testing.TB, side int, s [2]*Stream, i int) error {
	t.Helper()
	var err error
	within(t, fmt.Sprintf("the migration by the %s", endName(side)), func() {
		err = j.migrate(context.Background(), side, s[side], i)
	})
	return err
}

// moving migrates the stream beside the test, and returns what waits for the result.
func (j *journey) moving(t testing.TB, side int, s [2]*Stream) (wait func() error) {
	done := make(chan error, 1)
	go func() { done <- j.migrate(context.Background(), side, s[side], j.to()) }()
	return func() error {
		t.Helper()
		var err error
		within(t, fmt.Sprintf("the migration by the %s", endName(side)), func() { err = <-done })
		return err
	}
}

// settled waits until neither end migrates any more.
func (j *journey) settled(t testing.TB, s [2]*Stream) {
	t.Helper()
	for side, st := range s {
		WaitFor(t, fmt.Sprintf("the %s's side of the migration to end", endName(side)), func() bool { return st.exchange() == nil })
	}
}

// arrived checks that both ends stand on connection i, after n migrations, and call the
// stream by the same name.
func (j *journey) arrived(t testing.TB, s [2]*Stream, i, n int) {
	t.Helper()
	j.settled(t, s)
	for side, st := range s {
		require.True(t, j.conns[side][i] == st.Conn(), "the %s is to be on %s, and is on %s", endName(side),
			j.conns[side][i].RemoteMultiaddr(), st.Conn().RemoteMultiaddr())
		require.Equal(t, n, st.Migrations(), "migrations of the %s", endName(side))
	}
	require.Equal(t, s[0].Label(), s[1].Label(), "both ends know the stream by one label")
}

// closed closes both ends, and checks that nothing is left of the stream.
func (j *journey) closed(t testing.TB, s [2]*Stream) {
	t.Helper()
	for _, st := range s {
		_ = st.Close()
	}
	j.nothingLeft(t)
}

// echoes checks that the stream carries n bytes each way, beyond what was sent before.
func (j *journey) echoes(t testing.TB, s [2]*Stream, n int) {
	t.Helper()
	for side := range s {
		want := content(uint64(100+side), n)
		got := make([]byte, n)
		read := make(chan error, 1)
		go func() { // beside the Write: yamux forgets credit when its window grows, and may have granted less than n bytes
			_, err := io.ReadFull(s[1-side], got)
			read <- err
		}()
		write(t, s[side], want)
		require.NoError(t, Take(t, read, "a Read"))
		require.Equal(t, want, got, "what the %s wrote", endName(side))
	}
}

// converses checks that the stream carries n bytes each way, and ends both ways.
func (j *journey) converses(t testing.TB, s [2]*Stream, n int) {
	t.Helper()
	j.echoes(t, s, n)
	for side := range s {
		require.NoError(t, s[side].CloseWrite())
		wantEnd(t, s[1-side], nil)
	}
	j.closed(t, s)
}

// steps records the steps of all migrations of a pair, and stops them where a test
// wants to act.
type steps struct {
	mu   sync.Mutex // guards all below
	seen []Event
	acts map[step][]func()
}

// every step that a migration takes which succeeds.
var everyStep = []EventKind{Started, Acked, SendSwitched, ReceiveSwitched, Finished}

// step is a step of one end of one stream.
type step struct {
	s    *Stream
	kind EventKind
}

func (st *steps) trace(e Event) {
	at := step{e.Stream, e.Kind}
	st.mu.Lock()
	acts := st.acts[at]
	delete(st.acts, at)
	st.mu.Unlock()
	for _, act := range acts {
		act()
	}
	st.mu.Lock()
	st.seen = append(st.seen, e)
	st.mu.Unlock()
}

// at has act run when s takes the step for the first time from now. The exchange goes
// on when it returns, so it must not fail the test with FailNow.
func (st *steps) at(s *Stream, kind EventKind, act func()) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.acts == nil {
		st.acts = make(map[step][]func())
	}
	at := step{s, kind}
	st.acts[at] = append(st.acts[at], act)
}

// stop makes s stop at the step until release is called. reached is closed when it is
// there.
func (st *steps) stop(t testing.TB, s *Stream, kind EventKind) (reached <-chan struct{}, release func()) {
	there, on := make(chan struct{}), make(chan struct{})
	st.at(s, kind, func() {
		close(there)
		<-on
	})
	release = sync.OnceFunc(func() { close(on) })
	t.Cleanup(release)
	return there, release
}

// await waits until s has taken the step.
func (st *steps) await(t testing.TB, s *Stream, kind EventKind) {
	t.Helper()
	WaitFor(t, fmt.Sprintf("the step %q", kind), func() bool { return st.took(s, kind) > 0 })
}

// event returns what was told of the step when s took it last.
func (st *steps) event(s *Stream, kind EventKind) Event {
	st.mu.Lock()
	defer st.mu.Unlock()
	for _, e := range slices.Backward(st.seen) {
		if e.Stream == s && e.Kind == kind {
			return e
		}
	}
	return Event{}
}

// took says how often s has taken the step.
func (st *steps) took(s *Stream, kind EventKind) int {
	st.mu.Lock()
	defer st.mu.Unlock()
	n := 0
	for _, e := range st.seen {
		if e.Stream == s && e.Kind == kind {
			n++
		}
	}
	return n
}

// moment is when something happens to a stream: before its migration, at a step of one
// end of it, or after it.
type moment struct {
	initiator bool
	kind      EventKind
}

const (
	beforehand EventKind = -1
	afterwards EventKind = -2
)

func (m moment) String() string {
	switch {
	case m.kind == beforehand:
		return "before"
	case m.kind == afterwards:
		return "after"
	case m.initiator:
		return "initiator has " + m.kind.String()
	default:
		return "responder has " + m.kind.String()
	}
}

// everyMoment is all of them in their order. The two ends take some steps at once.
var everyMoment = func() []moment {
	all := []moment{{true, beforehand}}
	for _, kind := range everyStep[:len(everyStep)-1] {
		all = append(all, moment{true, kind}, moment{false, kind})
	}
	return append(all, moment{true, afterwards})
}()

// duringMove migrates the stream, on behalf of one end, and has act run at the moment.
// At a step it runs on the exchange's goroutine, so it must not fail with FailNow.
func (j *journey) duringMove(t testing.TB, side int, s [2]*Stream, m moment, act func()) error {
	t.Helper()
	switch m.kind {
	case beforehand:
		act()
	case afterwards:
		defer act()
	default:
		at := s[side]
		if !m.initiator {
			at = s[1-side]
		}
		j.at(at, m.kind, act)
	}
	err := j.move(t, side, s)
	j.settled(t, s)
	return err
}

// content is n bytes that are different for every seed.
func content(seed uint64, n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), 1}).Read(b)
	return b
}

// within runs f, and fails the test when it takes too long.
func within(t testing.TB, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	await(t, done, what)
}

// await waits for something that must happen.
func await(t testing.TB, ch <-chan struct{}, what string) {
	t.Helper()
	timer := time.NewTimer(Patience)
	defer timer.Stop()
	select {
	case <-ch:
	case <-timer.C:
		t.Fatalf("timed out waiting for: %s", what)
	}
}

func write(t testing.TB, s io.Writer, b []byte) {
	t.Helper()
	var n int
	var err error
	within(t, "a Write", func() { n, err = s.Write(b) })
	require.NoError(t, err)
	require.Equal(t, len(b), n)
}

func readN(t testing.TB, s io.Reader, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	var m int
	var err error
	within(t, "a Read", func() { m, err = io.ReadFull(s, b) })
	require.NoError(t, err, "after %d of %d bytes", m, n)
	return b
}

// readAll reads to the end, whatever that is.
func readAll(t testing.TB, s io.Reader) (b []byte, err error) {
	t.Helper()
	within(t, "the end of reading", func() { b, err = io.ReadAll(s) })
	return b, err
}

// wantEnd checks that exactly want can be read, then EOF, and EOF again.
func wantEnd(t testing.TB, s io.Reader, want []byte) {
	t.Helper()
	got, err := readAll(t, s)
	require.NoError(t, err, "after %d of %d bytes", len(got), len(want))
	require.True(t, bytes.Equal(want, got), "%d bytes came, not the %d that were written", len(got), len(want))
	var n int
	within(t, "a Read after EOF", func() { n, err = s.Read(make([]byte, 10)) })
	require.Equal(t, 0, n, "nothing is readable after EOF")
	require.Equal(t, io.EOF, err, "EOF that was given stays given")
}

// wantReset checks that reading and writing fail with a reset, sooner or later: the news
// of it may be on its way.
func wantReset(t testing.TB, s network.Stream, what string) {
	t.Helper()
	_, err := readAll(t, s)
	require.Error(t, err, "%s: a reset must never read as a clean EOF", what)
	require.ErrorIs(t, err, network.ErrReset, "%s: Read", what)
	require.NotErrorIs(t, err, io.EOF, "%s: a reset must not pass for a clean EOF with errors.Is", what)
	within(t, what+": Write to fail", func() {
		for err = nil; err == nil; {
			_, err = s.Write([]byte{1})
		}
	})
	require.ErrorIs(t, err, network.ErrReset, "%s: Write", what)
}

// blocked starts a Write that is too large for every window, and returns once it blocks.
// The result is what Write returned.
func (j *journey) blocked(t testing.TB, s *Stream, b []byte) <-chan written {
	t.Helper()
	done := make(chan written, 1)
	go func() {
		n, err := s.Write(b)
		done <- written{n, err}
	}()
	WaitFor(t, "a Write that is inside the underlying stream", s.send.writesInside)
	return done
}

// written is what Write returned.
type written struct {
	n   int
	err error
}

func (w written) String() string { return fmt.Sprintf("(%d, %v)", w.n, w.err) }

// result waits for what a Write returns.
func result(t testing.TB, done <-chan written) (w written) {
	t.Helper()
	within(t, "a Write to return", func() { w = <-done })
	return w
}

var _ = peer.ID("")
