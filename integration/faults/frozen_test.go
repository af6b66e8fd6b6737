package faults

import (
	"fmt"
	"io"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
)

// The old path freezes: it is open, and takes and brings nothing. A connection over it
// ends seconds later, when its transport gives it up; calls on it may block until then.
// None of that holds up a stream that has another path.

// frozenWays have each transport as the old one.
var frozenWays = []way{
	{Relay, QUIC}, {Relay, TCP}, {TCP, QUIC}, {WebSocket, QUIC}, {QUIC, TCP}, {WebTransport, TCP}, {WebRTC, QUIC},
}

// eachMove runs f for both ends as the initiator, on every way, in time. f has a link
// of its own.
func eachMove(t *testing.T, ways []way, f func(t *testing.T, l *link, initiator int)) {
	t.Run("ways", func(t *testing.T) {
		for _, w := range ways {
			for initiator := range 2 {
				t.Run(fmt.Sprintf("%s, moved by the %s", w, endName(initiator)), func(t *testing.T) {
					inTime(t)
					l := joined(t, w.from, w.to)
					done.pair(w)
					f(t, l, initiator)
				})
			}
		}
	})
}

// fillers opens streams on connection i with which congest can fill it: each fills its own
// window, and all together the path.
func (l *link) fillers(t *testing.T, i int) (fillers []network.Stream) {
	t.Helper()
	const streams = 24
	for range streams {
		ends := l.raw(t, i)
		fillers = append(fillers, ends[0], ends[1])
	}
	return fillers
}

// congest freezes connection i, and writes to it, from both ends, until it takes nothing
// any more.
func (l *link) congest(t *testing.T, i int, fillers []network.Stream) {
	t.Helper()
	l.paths[i].Freeze()
	done.faults.Add(1)
	var writers sync.WaitGroup
	var written [2]stillness
	for n, s := range fillers {
		writers.Go(func() {
			for {
				m, err := s.Write(make([]byte, 16<<10))
				written[n%2].add(m)
				if err != nil {
					return
				}
			}
		})
	}
	t.Cleanup(func() {
		for _, s := range fillers {
			go s.Reset()
		}
		l.giveUp(i)
		writers.Wait()
	})
	for n := range written {
		WaitFor(t, fmt.Sprintf("the %s's side of the path to be full", endName(n)), written[n].still)
	}
}

// stillness is something that grows, and then does not.
type stillness struct {
	mu     sync.Mutex // guards all below
	n      int
	looked int // how often still has looked since it has grown
}

// looks is how often something that does not grow any more has to be looked at, 2 ms apart.
// Time alone does not tell: a machine that stalls keeps it from growing.
const looks = 100

func (s *stillness) add(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n > 0 {
		s.n, s.looked = s.n+n, 0
	}
}

func (s *stillness) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.n
}

// still is to be waited for.
func (s *stillness) still() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.looked++
	return s.looked > looks
}

// trips is how many round trips are timed on a stream that has moved, and tolerated how
// much longer they may take, in the median, than those of a stream that never was on the
// frozen path. Both are timed in turn, on a machine that may be busy.
const (
	trips     = 31
	tolerated = 100 * time.Millisecond
)

// TestFrozenOldPathHoldsNobodyUp: facts of yamux on a frozen path. With its queue full,
// every call on a stream of that connection blocks until the connection ends. A stream
// with nothing under way moves, and is used and ended, before that: no Write and no Read
// waits for the frozen path, which is frozen until all of them have returned. The exact
// times are those of integration/sim, where time is virtual: TestCongestedPathFreezes and
// TestOldPathFreezesWhileIdle.
func TestFrozenOldPathHoldsNobodyUp(t *testing.T) {
	defer summary(t)()
	var slowest, switched stopwatch
	eachMove(t, frozenWays, func(t *testing.T, l *link, initiator int) {
		ends := l.open(t, oldConn)
		control, forget := l.echoing(t, newConn)
		l.congest(t, oldConn, l.fillers(t, oldConn))
		const size = 1000
		talk := newTalk("a stream with nothing under way", ends, 1, [2]int{1 << 18, 1 << 18})
		begin := time.Now()
		talk.start() // a Read is inside the old stream at both ends
		moved := l.moving(initiator, ends[initiator], newConn)
		for side := range ends {
			WaitFor(t, fmt.Sprintf("the %s to write to the new connection", endName(side)),
				func() bool { return ends[side].Conn() == l.conns[side][newConn] })
		}
		switched.lap(begin)
		var ours, theirs []time.Duration
		for n := range trips {
			begin := time.Now()
			talk.allow((n + 1) * size)
			talk.awaitCaughtUp(t)
			ours = append(ours, time.Since(begin))
			begin = time.Now()
			control(size)
			theirs = append(theirs, time.Since(begin))
		}
		require.Less(t, median(ours), median(theirs)+tolerated, "a stream that has moved, beside one that was never on the frozen path")
		talk.allowAll()
		talk.settle(t)
		for side := range l.conns {
			require.False(t, l.conns[side][oldConn].IsClosed(), "the talk was to be over before the old connection is given up")
		}
		require.True(t, talk.survived(), "%v", talk)
		slowest.note(median(ours))
		talk.end(t)
		forget()
		l.giveUp(oldConn)
		require.NoError(t, await(t, moved, "Migrate to return"))
		l.nothingLeft(t)
	})
	t.Logf("beside a frozen connection: the slowest switch at both ends %v, the slowest Write and Read after it, by median, %v",
		switched.max, slowest.max)
}

// echoing opens a raw stream on connection i. trip sends n bytes over it and back.
func (l *link) echoing(t *testing.T, i int) (trip func(n int), forget func()) {
	t.Helper()
	ends := l.raw(t, i)
	go func() { _, _ = io.Copy(ends[acceptor], ends[acceptor]) }()
	forget = func() { _, _ = ends[opener].Reset(), ends[acceptor].Reset() }
	t.Cleanup(forget)
	return func(n int) {
		_ = ends[opener].SetDeadline(time.Now().Add(Patience))
		_, err := ends[opener].Write(make([]byte, n))
		require.NoError(t, err)
		_, err = io.ReadFull(ends[opener], make([]byte, n))
		require.NoError(t, err)
	}, forget
}

func median(all []time.Duration) time.Duration {
	slices.Sort(all)
	return all[len(all)/2]
}

// stopwatch keeps the longest of its laps.
type stopwatch struct {
	mu  sync.Mutex
	max time.Duration
}

func (w *stopwatch) lap(begin time.Time) { w.note(time.Since(begin)) }

func (w *stopwatch) note(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.max = max(w.max, d)
}
