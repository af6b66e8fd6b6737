// Package hostile sets a peer that breaks the stream-migration protocol in every way it
// can upon a host, over TCP and QUIC, under go-libp2p's default resource limits. What has
// to hold, whatever it does:
//
//   - it costs a bounded amount of memory, which its limits decide, not how often it tries;
//   - it harms its own streams only: an honest peer's go on, and go on migrating;
//   - nothing is left of it when it is gone.
//
// The hostile side is a peer made of raw bytes, see internal/rawpeer.
package hostile

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
	. "github.com/go-portage/portage/internal/rawpeer"
	"github.com/go-portage/portage/migrate"
)

// tried counts the bad inputs of all tests.
var tried atomic.Int64

func TestMain(m *testing.M) {
	code := m.Run()
	fmt.Printf("bad inputs tried: %d\n", tried.Load())
	os.Exit(code)
}

// The protocols of the victim's applications.
const (
	echoID             = EchoID             // gives back what it gets
	holdID protocol.ID = "/test/hold/1.0.0" // never reads, until the stream ends
)

// refusal is how long a flood waits for a stream that the victim may not let it have: where
// QUIC has no more of them, it waits for ever.
const refusal = 2 * time.Second

// scene is a victim, with an honest peer that uses it.
type scene struct {
	t      *testing.T
	node   *Node
	victim *migrate.Host
	honest *honest
}

func newScene(t *testing.T, opts ...migrate.Option) *scene {
	t.Helper()
	s := &scene{t: t, node: New(t, []Transport{TCP, QUIC})}
	var err error
	s.victim, err = migrate.Wrap(s.node, opts...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = s.victim.Close() })
	echo(s.victim)
	s.victim.SetStreamHandler(holdID, func(ns network.Stream) {
		// It notices the end of the stream without reading: a Write fails then.
		for {
			if _, err := ns.Write([]byte{0}); err != nil {
				_ = ns.Reset()
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
	})
	s.honest = s.newHonest()
	began := tried.Load()
	t.Cleanup(func() { t.Logf("bad inputs tried: %d", tried.Load()-began) })
	return s
}

func echo(h *migrate.Host) {
	h.SetStreamHandler(echoID, func(s network.Stream) {
		_, _ = io.Copy(s, s)
		_ = s.Close()
	})
}

// honest is a peer with two connections to the victim, and two streams, one opened by
// each of them. It plays ping-pong on both, and has both move to and fro all the time.
type honest struct {
	s       *scene
	node    *Node
	host    *migrate.Host
	conns   [2]network.Conn // its ends
	ends    [2]network.Conn // the victim's
	streams [2]*migrate.Stream

	rounds [2]atomic.Int64
	moves  [2]atomic.Int64
	later  [2]atomic.Int64 // migrations that were to be tried again
	still  sync.RWMutex    // held while nothing may migrate
	ctx    context.Context
}

func (s *scene) newHonest() *honest {
	t := s.t
	h := &honest{s: s, node: New(t, []Transport{TCP, QUIC})}
	var err error
	h.host, err = migrate.Wrap(h.node)
	require.NoError(t, err)
	t.Cleanup(func() { _ = h.host.Close() })
	echo(h.host)
	h.conns[0], h.conns[1] = Join(t, h.node, s.node, TCP, QUIC)
	for i, c := range h.conns {
		h.ends[i] = Far(t, s.node, c)
	}
	var stop context.CancelFunc
	h.ctx, stop = context.WithCancel(context.Background())
	var running sync.WaitGroup
	t.Cleanup(func() {
		stop()
		for _, st := range h.streams {
			_ = st.Reset()
		}
		running.Wait()
	})
	for i, opener := range []*migrate.Host{h.host, s.victim} {
		other := []peer.ID{s.victim.ID(), h.host.ID()}[i]
		ctx, cancel := context.WithTimeout(h.ctx, Patience) // else that of negotiations holds
		ns, err := opener.NewStream(ctx, other, echoID)
		cancel()
		require.NoError(t, err)
		h.streams[i] = ns.(*migrate.Stream)
		running.Go(func() { h.playsPingPong(i) })
		running.Go(func() { h.moving(i, opener) })
	}
	return h
}

// playsPingPong checks every byte.
func (h *honest) playsPingPong(i int) {
	st := h.streams[i]
	ping, pong := make([]byte, 2000), make([]byte, 2000)
	for round := int64(1); h.ctx.Err() == nil; round++ {
		for k := range ping {
			ping[k] = byte(round*31 + int64(k)*7 + int64(i))
		}
		n, err := st.Write(ping)
		if err == nil {
			_, err = io.ReadFull(st, pong)
		}
		switch {
		case h.ctx.Err() != nil:
			return
		case err != nil:
			h.s.t.Errorf("stream %d of the honest peer, round %d, after %d bytes: %v", i, round, n, err)
			return
		case string(ping) != string(pong):
			h.s.t.Errorf("stream %d of the honest peer, round %d: other bytes came back", i, round)
			return
		}
		h.rounds[i].Store(round)
		time.Sleep(time.Millisecond)
	}
}

func (h *honest) moving(i int, by *migrate.Host) {
	conns := h.conns
	if by == h.s.victim {
		conns = h.ends
	}
	for to := 1; h.ctx.Err() == nil; {
		h.still.RLock()
		err := by.Migrate(context.Background(), h.streams[i], conns[to])
		h.still.RUnlock()
		switch {
		case err == nil:
			h.moves[i].Add(1)
			to = 1 - to
		case h.ctx.Err() != nil:
			return
		case errors.Is(err, migrate.ErrTryLater):
			h.later[i].Add(1)
		default:
			h.s.t.Errorf("stream %d of the honest peer: %v", i, err)
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// progress waits until the honest peer has played on, and its streams have moved there and
// back. Without moves it is enough that Migrate has returned as often: moving sees to it that
// what it then says is "try again".
func (s *scene) progress(what string, moves bool) {
	s.t.Helper()
	h := s.honest
	for i := range h.streams {
		returned := func() int64 {
			if moves {
				return h.moves[i].Load()
			}
			return h.moves[i].Load() + h.later[i].Load()
		}
		rounds, before := h.rounds[i].Load(), returned()
		WaitFor(s.t, fmt.Sprintf("stream %d of the honest peer to make progress: %s", i, what), func() bool {
			return s.t.Failed() || h.rounds[i].Load() >= rounds+10 && returned() >= before+2
		})
	}
	if s.t.Failed() {
		s.t.FailNow()
	}
}

// usage is what the process and the victim use.
type usage struct {
	heap       int64
	goroutines int               // that are inside of package migrate
	peer       network.ScopeStat // what the victim's resource manager counts for the hostile peer
	transient  network.ScopeStat // and for streams that are not negotiated, of all peers
}

func (u usage) String() string {
	return fmt.Sprintf("heap %6.2f MiB, %4d goroutines in migrate, peer: %4d in %3d out %8d B, not negotiated: %4d",
		float64(u.heap)/(1<<20), u.goroutines, u.peer.NumStreamsInbound, u.peer.NumStreamsOutbound, u.peer.Memory,
		u.transient.NumStreamsInbound+u.transient.NumStreamsOutbound)
}

// measure looks while the honest peer's streams do not move.
func (s *scene) measure(p peer.ID) usage {
	s.honest.still.Lock()
	defer s.honest.still.Unlock()
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	stat := s.stat()
	return usage{int64(m.HeapAlloc), inMigrate(), stat.Peers[p], stat.Transient}
}

func (s *scene) stat() rcmgr.ResourceManagerStat {
	return s.node.Network().ResourceManager().(rcmgr.ResourceManagerState).Stat()
}

// rests waits until the victim's resource manager counts nothing more for the hostile peer,
// and nothing less, and that takes no more answers. Time alone does not tell: a machine that
// stalls keeps it from changing.
func (s *scene) rests(e *hostile) {
	s.t.Helper()
	const looks = 100
	type state struct {
		held  network.ScopeStat
		taken int64
	}
	var last state
	same := 0
	WaitFor(s.t, "what the hostile peer holds to stay as it is", func() bool {
		if now := (state{s.stat().Peers[e.ID()], e.taken.Load()}); now != last {
			last, same = now, 0
		}
		same++
		return same > looks
	})
}

// sink counts what is written to it.
type sink struct{ atomic.Int64 }

func (s *sink) Write(p []byte) (int, error) {
	s.Add(int64(len(p)))
	return len(p), nil
}

// inMigrate counts the goroutines that are inside of package migrate.
func inMigrate() (n int) {
	buf := make([]byte, 1<<20)
	for {
		k := runtime.Stack(buf, true)
		if k < len(buf) {
			buf = buf[:k]
			break
		}
		buf = make([]byte, 2*len(buf))
	}
	for _, g := range strings.Split(string(buf), "\n\n") {
		if strings.Contains(g, "go-portage/portage/migrate.") {
			n++
		}
	}
	return n
}

// hostile is a raw peer of the victim's.
type hostile struct {
	*RawPeer
	s     *scene
	taken sink // answers, of streams that only flood
	base  usage
}

// newHostile returns a hostile peer whose ID is lower than the victim's, or higher. It
// has no limits of its own.
func (s *scene) newHostile(t *testing.T, lower bool) *hostile {
	t.Helper()
	var key crypto.PrivKey
	for {
		k, _, err := crypto.GenerateEd25519Key(rand.Reader)
		require.NoError(t, err)
		id, err := peer.IDFromPrivateKey(k)
		require.NoError(t, err)
		if (id < s.victim.ID()) == lower {
			key = k
			break
		}
	}
	node := New(t, []Transport{TCP, QUIC}, libp2p.Identity(key), libp2p.ResourceManager(&network.NullResourceManager{}))
	e := &hostile{s: s, RawPeer: NewRawPeer(t, node, s.node, TCP, QUIC, migrate.ID, migrate.FinalSizeID, echoID)}
	e.TakeOver()
	e.base = s.measure(e.ID())
	return e
}

// tries opens a stream on connection i, for which there is room, and sends it bytes, as one
// bad input.
func (e *hostile) tries(i int, bytes string) (*RawStream, error) {
	tried.Add(1)
	u, err := e.Open(i, Patience, "")
	if err != nil {
		return nil, err
	}
	// QUIC sends a long input in parts, and the first may be enough for the victim.
	if _, err := io.WriteString(u, bytes); err != nil && !errors.Is(err, network.ErrReset) {
		_ = u.Reset()
		return nil, err
	}
	return u, nil
}

// floods is tries, where the victim may have had enough: that is what fails of it then.
func (e *hostile) floods(i int, bytes string) (*RawStream, error) {
	tried.Add(1)
	return e.Open(i, refusal, bytes)
}

// stream opens a labelled stream on connection i, within that time, and has its answer.
func (e *hostile) stream(i int, app protocol.ID, within time.Duration) (*RawStream, uint64, error) {
	label := e.Fresh()
	u, err := e.Open(i, within, OpeningBytes(label, app))
	if err == nil {
		if err = Expect(u, AnswerBytes(app)); err != nil {
			_ = u.Reset()
		}
	}
	return u, label, err
}

// mustStream is stream, of a peer that has room for it.
func (e *hostile) mustStream(i int, app protocol.ID) (*RawStream, uint64) {
	e.T.Helper()
	u, label, err := e.stream(i, app, Patience)
	require.NoError(e.T, err)
	return u, label
}

// ended reads to the end, whichever that is, and says with which code it was reset.
func (e *hostile) ended(u network.Stream) (code network.StreamErrorCode, reset bool) {
	e.T.Helper()
	_, err := io.Copy(io.Discard, u)
	if err == nil {
		return 0, false
	}
	var se *network.StreamError
	if !errors.Is(err, network.ErrReset) {
		e.T.Fatalf("the victim does not end the stream: %v", err)
	}
	if errors.As(err, &se) {
		code = se.ErrorCode
	}
	return code, true
}

// outcome reads a stream to its end, and says which it was. err is that it had none. A
// draft-only handover lasts until the old stream ends, or the new one is reset; where acked
// is what is read, a peer that wants neither gives up.
func outcome(u network.Stream, acked string) (got string, reset bool, err error) {
	var b strings.Builder
	buf := make([]byte, 1<<10)
	for {
		n, err := u.Read(buf)
		b.Write(buf[:n])
		switch {
		case err == io.EOF:
			return b.String(), false, nil
		case errors.Is(err, network.ErrReset):
			return b.String(), true, nil
		case err != nil:
			return b.String(), false, err
		case acked != "" && b.String() == acked:
			return b.String(), true, u.Reset()
		}
	}
}

// echoes checks that a stream of the hostile peer's still works.
func (e *hostile) echoes(u network.Stream) {
	e.T.Helper()
	const what = "still here"
	_, err := io.WriteString(u, what)
	require.NoError(e.T, err)
	require.NoError(e.T, Expect(u, what))
}

// each runs f for 0 to n-1, 64 at a time: some inputs have to wait for 5 s (L4).
func each(n int, f func(k int)) { eachOf(64, n, f) }

func eachOf(workers, n int, f func(k int)) {
	var wg sync.WaitGroup
	var next atomic.Int64
	for range workers {
		wg.Go(func() {
			for k := int(next.Add(1)) - 1; k < n; k = int(next.Add(1)) - 1 {
				f(k)
			}
		})
	}
	wg.Wait()
}

// goes closes the hostile peer, and waits until nothing of it is left at the victim.
func (e *hostile) goes() {
	e.T.Helper()
	require.NoError(e.T, e.Close())
	s := e.s
	WaitFor(e.T, "the victim to forget the hostile peer", func() bool {
		for _, c := range e.Ends {
			if !c.IsClosed() || len(s.victim.Streams(c)) > 0 || len(c.GetStreams()) > 0 {
				return false
			}
		}
		p := s.stat().Peers[e.ID()]
		return p.NumStreamsInbound+p.NumStreamsOutbound+p.NumConnsInbound+p.NumConnsOutbound == 0 && p.Memory == 0
	})
	WaitFor(e.T, "the victim's goroutines for the hostile peer to end", func() bool {
		s.honest.still.Lock()
		defer s.honest.still.Unlock()
		return inMigrate() <= e.base.goroutines
	})
	now := s.measure(e.ID())
	e.T.Logf("gone:    %v", now)
	s.progress("after the attack", true)
}
