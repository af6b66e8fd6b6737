package hostile

import (
	"context"
	"fmt"
	"io"
	"maps"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
	. "github.com/go-portage/portage/internal/rawpeer"
	"github.com/go-portage/portage/migrate"
)

// perStream is the most that one held stream may cost, in bytes of heap, at both of its
// ends together, since both are in this process: the muxer's stream, the handler's and the
// host's state of it. Half of it is one buffer of io.Copy.
const perStream = 64 << 10

// perEnd is the most that an end at the hostile peer costs, which is in this process, too,
// and holds a stream that was refused until it resets it.
const perEnd = 2 << 10

// slack is what the heap of the process may differ by without any attack: connections, the
// honest peer, the test itself.
const slack = 4 << 20

// limits are the victim's, which scale with the machine's memory.
func limits() (peer, transient rcmgr.ResourceLimits) {
	scaled := rcmgr.DefaultLimits
	libp2p.SetDefaultServiceLimits(&scaled)
	cfg := scaled.AutoScale().ToPartialLimitConfig()
	return cfg.PeerDefault, cfg.Transient
}

// flood is something that a hostile peer does n times, and then ten times as often. What
// it leaves open stays open until it goes.
type flood struct {
	name string
	n    int
	do   func(e *hostile, n int)

	// crowds says that it takes all places among the streams that are not negotiated, as
	// on any libp2p host. New streams of others have to wait then, and so have migrations,
	// which are told to try again; the streams that are there go on, where they are.
	crowds bool
	// reserves says that it makes the victim keep data, which are on the resource
	// manager's account, and no more than the peer's memory limit.
	reserves bool
}

// TestFloods: what a flood costs is bounded by the limits of the resource manager, and not
// by how much is sent.
func TestFloods(t *testing.T) {
	floods := []flood{
		{name: "violations", n: 200, do: violations},
		{name: "beginnings without an end", n: 500, do: halfOpen, crowds: true},
		{name: "unknown labels", n: 100, do: unknownLabels, crowds: true},
		{name: "one label, again and again", n: 200, do: sameLabel},
		{name: "one protocol proposed after the other", n: 20_000, do: proposals},
		{name: "migrations that are asked for, never carried on", n: 20, do: askedAndLeft},
		{name: "migrations that are acked, never carried on", n: 10, do: ackedAndLeft},
		{name: "one stream, moved all the time", n: 300, do: movedInALoop},
		{name: "drips into a stream that nobody reads", n: 2_000, do: drips, reserves: true},
		{name: "data ahead of an end that does not come", n: 3, do: ahead, reserves: true},
	}
	withstands(t, floods, 0)
}

// withstands floods a victim. An honest peer goes on meanwhile, and the victim holds no more than
// the resource manager knows of, and as many bytes as are allowed besides.
func withstands(t *testing.T, floods []flood, allowed int64, opts ...migrate.Option) {
	for _, f := range floods {
		t.Run(f.name, func(t *testing.T) {
			s := newScene(t, opts...)
			peer, transient := limits()
			for _, n := range []int{f.n, 10 * f.n} {
				e := s.newHostile(t, n == f.n)
				f.do(e, n)
				s.progress(f.name, !f.crowds)
				s.rests(e)
				u := s.measure(e.ID())
				t.Logf("before:  %v", e.base)
				t.Logf("%-7d  %v", n, u)

				bound := slack + allowed + perStream*int64(u.peer.NumStreamsInbound+u.peer.NumStreamsOutbound)
				for _, c := range e.Conns {
					bound += perEnd * int64(len(c.GetStreams()))
				}
				if f.reserves {
					bound += u.peer.Memory
				}
				require.LessOrEqual(t, u.heap-e.base.heap, bound, "heap, in bytes, by what the resource manager knows of")
				require.LessOrEqual(t, u.peer.NumStreamsInbound, int(peer.StreamsInbound))
				require.LessOrEqual(t, u.transient.NumStreamsInbound, int(transient.StreamsInbound))
				require.LessOrEqual(t, u.peer.Memory, int64(peer.Memory))
				if f.crowds {
					// The flood is over, though the peer is there: its places are taken from it.
					s.progress("behind "+f.name, true)
					t.Logf("migrations of the honest peer: %d and %d, to be tried again: %d and %d",
						s.honest.moves[0].Load(), s.honest.moves[1].Load(), s.honest.later[0].Load(), s.honest.later[1].Load())
				}
				e.goes()
			}
		})
	}
}

func violations(e *hostile, n int) {
	malformed := slices.Sorted(maps.Values(Malformed))
	each(n, func(k int) {
		in := Prelude + malformed[k%len(malformed)]
		if k%10 == 0 {
			in = MultistreamToken + Token(migrate.FinalSizeID)
		}
		if u, err := e.floods(k%2, in); err == nil {
			_, _ = io.Copy(io.Discard, u)
			_ = u.Reset()
		}
	})
}

// halfOpen stops at every byte of an opening. On QUIC it gets as far as the number of streams
// that the victim's QUIC lets it open; the rest takes TCP.
func halfOpen(e *hostile, n int) {
	var full atomic.Bool
	each(n, func(k int) {
		in, i := OpeningBytes(e.Fresh(), echoID), k%2
		if full.Load() {
			i = 0
		}
		if _, err := e.floods(i, in[:k%len(in)]); err != nil && i == 1 {
			full.Store(true)
		}
	})
}

func unknownLabels(e *hostile, n int) {
	each(n, func(k int) { _, _ = e.floods(k%2, Prelude+MigrateBytes(e.Fresh(), e.Fresh())) })
}

func sameLabel(e *hostile, n int) {
	label := e.Fresh()
	each(n, func(k int) {
		if u, err := e.floods(k%2, OpeningBytes(label, echoID)); err == nil {
			_ = u.CloseWrite()
			_, _ = io.Copy(io.Discard, u)
			_ = u.Reset()
		}
	})
}

// proposals does not read the answers, until the muxer has room for no more. Then it does:
// they wait in this process, and would be taken for something that the victim keeps.
func proposals(e *hostile, n int) {
	in := Prelude + LabelBytes(e.Fresh()) + MultistreamToken + strings.Repeat("\x02x\n", n)
	var all []network.Stream
	for i := range 2 {
		u, err := e.Open(i, Patience, "")
		require.NoError(e.T, err)
		_ = u.SetWriteDeadline(time.Now().Add(2 * time.Second))
		_, _ = io.WriteString(u, in)
		tried.Add(int64(n))
		all = append(all, u)
	}
	e.s.progress("answers that nobody reads", true)
	for _, u := range all {
		go func() { _, _ = io.Copy(&e.taken, u) }()
	}
}

// askedAndLeft takes as many streams as it gets, asks for a migration of each, and for
// another, and says nothing more.
func askedAndLeft(e *hostile, n int) {
	var acked atomic.Int64
	each(n, func(k int) {
		app := []protocol.ID{echoID, holdID}[k%2]
		_, label, err := e.stream(0, app, refusal)
		if err != nil {
			return
		}
		for range 2 {
			u, err := e.floods(1, Prelude+MigrateBytes(e.Fresh(), label))
			if err != nil {
				return
			}
			go func() {
				if Expect(u, Prelude+AckVerified) == nil {
					acked.Add(1)
				}
			}()
		}
	})
	WaitFor(e.T, "a migration to be acked", func() bool { return acked.Load() >= 8 })
}

// ackedAndLeft acks what the victim asks for, and says nothing more.
func ackedAndLeft(e *hostile, n int) {
	for range n {
		st, u, err := e.openedIfRoom()
		if err != nil {
			return // the victim has as many streams with this peer as it may have
		}
		_, err = io.WriteString(u, AnswerBytes(echoID))
		require.NoError(e.T, err)
		to := e.Ends[0]
		if st.Conn() == to {
			to = e.Ends[1]
		}
		ctx, cancel := context.WithCancel(context.Background())
		failed := make(chan struct{})
		go func() {
			_ = e.s.victim.Migrate(ctx, st, to)
			close(failed)
		}()
		select {
		case next := <-e.Came():
			tried.Add(1)
			_, err = io.WriteString(next, Prelude+AckVerified)
			require.NoError(e.T, err)
		case <-failed:
		}
		cancel()
	}
}

func movedInALoop(e *hostile, n int) {
	u, label := e.mustStream(0, echoID)
	for k := range n {
		_, err := io.WriteString(u, "x")
		require.NoError(e.T, err)
		require.NoError(e.T, Expect(u, "x"))
		id := e.Fresh()
		next, err := e.tries(1-k%2, Prelude+MigrateBytes(id, label))
		require.NoError(e.T, err)
		require.NoError(e.T, Expect(next, Prelude+AckVerified), "migration %d", k)
		_, err = io.WriteString(next, FinalSizeBytes(1))
		require.NoError(e.T, err)
		require.NoError(e.T, Expect(next, FinalSizeBytes(1)), "migration %d", k)
		_ = u.Close()
		u, label = next, id
	}
}

// asked opens a stream whose handler does not read, and has its migration acked.
func (e *hostile) asked(size uint64) (old, next *RawStream) {
	e.T.Helper()
	old, label := e.mustStream(0, holdID)
	next, err := e.tries(1, Prelude+MigrateBytes(e.Fresh(), label))
	require.NoError(e.T, err)
	require.NoError(e.T, Expect(next, Prelude+AckVerified))
	_, err = io.WriteString(next, FinalSizeBytes(size))
	require.NoError(e.T, err)
	return old, next
}

// drips sends n bytes, one at a time, to a host that has to keep them.
func drips(e *hostile, n int) {
	var wg sync.WaitGroup
	for range 4 {
		old, _ := e.asked(1 << 40)
		wg.Go(func() {
			for range n / 4 {
				tried.Add(1)
				if _, err := old.Write([]byte{1}); err != nil {
					e.T.Errorf("drip: %v", err)
					return
				}
				time.Sleep(20 * time.Microsecond) // so that each is read alone
			}
		})
	}
	wg.Wait()
}

// ahead sends data over n new streams whose old ones never end.
func ahead(e *hostile, n int) {
	data := make([]byte, 1<<20)
	var all []network.Stream
	for range n {
		_, next := e.asked(1)
		all = append(all, next)
	}
	for _, next := range all {
		tried.Add(1)
		go func() { _, _ = next.Write(data) }()
	}
	WaitFor(e.T, "data to be read ahead, as far as that goes", func() bool {
		return e.s.stat().Peers[e.ID()].Memory >= int64(n)*(256<<10)
	})
}

// TestDripsForEver: a peer that sends one byte after the other and never pauses holds a
// stream that is not negotiated for no longer than a negotiation may take; once a
// migration is acked it may go on (S10), at the cost of its own streams.
func TestDripsForEver(t *testing.T) {
	s := newScene(t)
	e := s.newHostile(t, true)
	long := Lengthy("\x0a" + Lengthy("\x08"+Uvarint(e.Fresh())) + "\xaa\x06" + Lengthy(strings.Repeat("x", 990)))
	forEver := func() string { return strings.Repeat("\x02x\n", 1000) }
	points := map[string][2]string{ // what is sent at once, and what drips
		"header":         {"", Prelude + long},
		"ID":             {MultistreamToken, MigrationToken + long},
		"length":         {Prelude, long},
		"message":        {Prelude + long[:2], long[2:]},
		"behind a label": {Prelude + LabelBytes(e.Fresh()), MultistreamToken + forEver()},
		"proposals":      {Prelude + LabelBytes(e.Fresh()) + MultistreamToken, forEver()},
		"plain":          {MultistreamToken, forEver()},
	}
	var running sync.WaitGroup
	stop := make(chan struct{})
	drip := func(u network.Stream, what string) {
		for k := 0; ; k = (k + 1) % len(what) {
			tried.Add(1)
			if _, err := u.Write([]byte{what[k]}); err != nil {
				return
			}
			select {
			case <-stop:
				return
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	var open atomic.Int64
	for _, p := range points {
		for i := range 2 {
			u, err := e.tries(i, p[0])
			require.NoError(t, err)
			open.Add(1)
			running.Go(func() {
				drip(u, p[1])
				open.Add(-1)
				_ = u.Reset()
			})
		}
	}
	// Behind the ack: the final size, and the old stream up to it.
	for _, what := range []string{"\xff\x07" + strings.Repeat("\xaa", 1000), strings.Repeat("\x00", 10)} {
		u, label := e.mustStream(0, holdID)
		next, err := e.tries(1, Prelude+MigrateBytes(e.Fresh(), label))
		require.NoError(t, err)
		require.NoError(t, Expect(next, Prelude+AckVerified))
		if what[0] == 0 {
			_, err = io.WriteString(next, FinalSizeBytes(1<<40))
			require.NoError(t, err)
			next = u
		}
		running.Go(func() { drip(next, what) })
	}
	s.progress("drips", true)
	WaitFor(t, "the negotiations that drip to be ended", func() bool { return open.Load() == 0 })
	WaitFor(t, "the victim to hold the two streams that move, and what they move to, only", func() bool {
		return s.stat().Peers[e.ID()].NumStreamsInbound <= 4 // identify pushes over one more now and then
	})
	t.Logf("held: %v", s.measure(e.ID()))
	close(stop)
	running.Wait()
	e.goes()
}

// TestPeerThatReadsNothing: all that the victim's applications write to it fills the
// windows, its answers to Migrates included. It takes no place for ever that others need.
func TestPeerThatReadsNothing(t *testing.T) {
	s := newScene(t)
	e := s.newHostile(t, true)
	data := make([]byte, 1<<20)
	for i := range 2 {
		for range 8 {
			u, err := e.tries(i, OpeningBytes(e.Fresh(), echoID))
			require.NoError(t, err)
			_ = u.SetWriteDeadline(time.Now().Add(time.Second))
			go func() { _, _ = u.Write(data) }()
		}
	}
	s.progress("windows that are full", true)
	for k := range 40 {
		_, _ = e.floods(k%2, Prelude+MigrateBytes(e.Fresh(), e.Fresh()))
	}
	u := s.measure(e.ID())
	t.Logf("held: %v", u)
	WaitFor(t, "the victim to free the streams on which it cannot answer", func() bool {
		return s.stat().Transient.NumStreamsInbound == 0
	})
	s.progress("denials that nobody takes", true)
	s.rests(e)
	u = s.measure(e.ID())
	t.Logf("held: %v", u)
	// The heap is that of both. The hostile peer holds its data, and what waits unread in its
	// windows: 256 KiB for each of its 8 yamux streams, 768 KiB for QUIC's connection.
	own := int64(len(data) + 8*256<<10 + 768<<10)
	require.LessOrEqual(t, u.heap-e.base.heap, slack+own+perStream*int64(u.peer.NumStreamsInbound)+u.peer.Memory)
	runtime.KeepAlive(data)
	e.goes()
}

// TestBothAsk: the hostile peer asks whenever the victim does, and answers with what comes
// next, in turn. No call hangs, and no stream of anybody else's is harmed (M1, M2).
func TestBothAsk(t *testing.T) {
	s := newScene(t, migrate.WithStallTimeout(time.Second))
	for _, lower := range []bool{true, false} {
		t.Run(fmt.Sprintf("lower %v", lower), func(t *testing.T) {
			e := s.newHostile(t, lower)
			replies := []string{"", Prelude + AckVerified, Prelude + AckVerified + FinalSizeBytes(1), Prelude + AckDenied, Prelude + AckDraft, "\x00"}
			for k := range 60 {
				st, u := e.opened()
				_, err := io.WriteString(u, AnswerBytes(echoID)+"?")
				require.NoError(t, err)
				require.NoError(t, Expect(st, "?"))
				to := 0
				if st.Conn() == e.Ends[0] {
					to = 1
				}
				moved := make(chan error, 1)
				label := st.Label()
				go func() { moved <- s.victim.Migrate(context.Background(), st, e.Ends[to]) }()
				var mine []network.Stream
				for range 3 {
					next, err := e.tries(to, Prelude+MigrateBytes(e.Fresh(), label))
					require.NoError(t, err)
					mine = append(mine, next)
				}
				for _, next := range mine {
					_, _ = io.WriteString(next, []string{FinalSizeBytes(1), "", FinalSizeBytes(9)}[k%3])
				}
				// Whatever the victim opens is answered so, also what it has given up already
				// and the peer gets to see only now.
				reply := func(theirs network.Stream) {
					_, _ = io.WriteString(theirs, replies[k%len(replies)])
					_ = theirs.Reset()
				}
				deadline := time.After(Patience)
				returned := false
				select {
				case theirs := <-e.Came():
					reply(theirs)
				case <-moved:
					returned = true
				case <-time.After(50 * time.Millisecond):
					// It waits for one of mine that it has acked (M2).
				}
				for _, next := range mine {
					_ = next.Reset()
				}
				_ = u.Reset()
				for !returned {
					select {
					case theirs := <-e.Came():
						reply(theirs)
					case <-moved:
						returned = true
					case <-deadline:
						t.Fatal("Migrate does not return")
					}
				}
				_ = st.Reset()
			}
			s.progress("both ask", true)
			t.Logf("at rest: %v", s.measure(e.ID()))
			e.goes()
		})
	}
}

// TestDataAfterTheEnd: a peer whose EOF the application has been given, and that sends on
// behind a migration (S11).
func TestDataAfterTheEnd(t *testing.T) {
	s := newScene(t)
	e := s.newHostile(t, true)
	for k := range 40 {
		st, u := e.opened()
		_, err := io.WriteString(u, AnswerBytes(echoID)+"abc")
		require.NoError(t, err)
		require.NoError(t, u.CloseWrite())
		got, err := io.ReadAll(st)
		require.NoError(t, err)
		require.Equal(t, "abc", string(got))
		to := 0
		if st.Conn() == e.Ends[0] {
			to = 1
		}
		next, err := e.tries(to, Prelude+MigrateBytes(e.Fresh(), st.Label()))
		require.NoError(t, err)
		require.NoError(t, Expect(next, Prelude+AckVerified))
		size := uint64(3)
		if k%2 == 0 {
			size = 4 // it had more to say, it says now
		}
		_, err = io.WriteString(next, FinalSizeBytes(size)+"more")
		require.NoError(t, err)
		_, reset := e.ended(next)
		require.True(t, reset)
		n, err := st.Read(make([]byte, 10))
		require.Zero(t, n)
		require.Error(t, err)
		_ = st.Reset()
		_ = u.Reset()
	}
	s.progress("data after the end", true)
	e.goes()
}
