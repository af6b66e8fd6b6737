package faults

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
	"github.com/go-portage/portage/migrate"
)

// An application whose Write WebRTC does not end waits for as long as this: it looks that
// many times, that often, and nothing has happened. Time alone does not tell on a machine
// that stalls.
const (
	webRTCLooks = 100
	lookAfter   = 100 * time.Millisecond
)

// maxStuck is how many of n streams on WebRTC may be stuck there: two in a hundred are, in
// rounds like these.
func maxStuck(n int64) int64 { return 4 + n/10 }

// randomFaults are those that can strike at any moment.
var randomFaults = append([]fault{
	{name: "reset by the opener", strike: resetAll(opener)},
	{name: "reset by the acceptor", strike: resetAll(acceptor)},
}, everyFault...)

// onPurpose says whether an end has ended the streams, or a connection for good.
func (f fault) onPurpose() bool { return f.forGood() || strings.HasPrefix(f.name, "reset by ") }

// resetAll resets all underlying streams of a connection, one by one, at one end.
func resetAll(side int) func(l *link, i int) {
	return func(l *link, i int) {
		for _, u := range ownStreams(l.conns[side][i]) {
			go u.Reset()
		}
	}
}

// TestFaultAtAnyMoment: streams that write as fast as they can, both ways, move to and
// fro between two connections, at either end's will, when one of the two fails. Nothing
// is asked of them but the oracle's: an exact prefix, EOF behind all of it only, an error
// at both ends where a byte is missing.
func TestFaultAtAnyMoment(t *testing.T) { atAnyMoment(t) }

// TestStreamsOutliveAnyMoment is TestFaultAtAnyMoment with resumption: only what an end does on
// purpose ends a stream.
func TestStreamsOutliveAnyMoment(t *testing.T) {
	atAnyMoment(t, migrate.WithResumption(), migrate.WithRedial(dialNobody))
}

func atAnyMoment(t *testing.T, opts ...migrate.Option) {
	defer summary(t)()
	rounds := 5
	if *all {
		rounds = 25
	}
	var survivors, broken sync.Map
	onWebRTC, rescued, moves := done.onWebRTC.Load(), done.rescued.Load(), done.moves.Load()
	t.Run("ways", func(t *testing.T) {
		for n, w := range ways() {
			t.Run(w.String(), func(t *testing.T) {
				t.Parallel()
				l := newLink(t, w.from, w.to, opts...)
				l.lasts = len(opts) > 0
				done.pair(w)
				for round := range rounds {
					seed := *firstSeed + uint64(n*1000+round)
					t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
						l.join(t)
						s, b := l.anyMoment(t, seed)
						survivors.Store(seed, s)
						broken.Store(seed, b)
						l.part(t)
						l.forget()
					})
				}
			})
		}
	})
	onWebRTC, rescued = done.onWebRTC.Load()-onWebRTC, done.rescued.Load()-rescued
	t.Logf("%d streams survived, %d broke; %d of %d on WebRTC were stuck", sum(&survivors), sum(&broken), rescued, onWebRTC)
	require.LessOrEqual(t, rescued, maxStuck(onWebRTC), "streams that were stuck on WebRTC")
	if size(&survivors) < len(ways())*rounds {
		return // a single seed need not show it all
	}
	require.NotZero(t, sum(&survivors), "no stream survived")
	require.NotZero(t, sum(&broken), "no stream broke")
	require.Greater(t, done.moves.Load(), moves, "no stream migrated")
}

func sum(m *sync.Map) (n int) {
	m.Range(func(_, v any) bool { n += v.(int); return true })
	return n
}

func size(m *sync.Map) (n int) {
	m.Range(func(_, _ any) bool { n++; return true })
	return n
}

// anyMoment is one round. It returns how many streams survived, and how many did not.
func (l *link) anyMoment(t *testing.T, seed uint64) (survived, broke int) {
	r := rand.New(rand.NewPCG(seed, 0))
	const streams, half = 4, 256 << 10
	var talks []*talk
	for k := range streams {
		sizes := [2]int{r.IntN(half * 2), r.IntN(half * 2)}
		if r.IntN(4) == 0 {
			sizes[r.IntN(2)] = 0
		}
		talk := newTalk(fmt.Sprintf("stream %d of seed %d", k, seed), l.open(t, r.IntN(2)), seed*streams+uint64(k), sizes)
		talk.gives = true
		for _, f := range talk.flows {
			f.piece = 256 + r.IntN(1<<(8+r.IntN(9)))
			f.early = r.IntN(2) == 0
		}
		talks = append(talks, talk)
	}
	f := randomFaults[r.IntN(len(randomFaults))]
	i := r.IntN(2)
	for !f.possible(l.paths[i]) {
		f = randomFaults[r.IntN(len(randomFaults))]
	}
	// Movers ask again and again, until a stream is over.
	var movers sync.WaitGroup
	asking, stop := context.WithCancel(t.Context())
	defer stop()
	for _, talk := range talks {
		for side := range talk.ends {
			pauses := rand.New(rand.NewPCG(seed, uint64(side+1)))
			if r.IntN(3) > 0 {
				movers.Go(func() { l.keepMoving(asking, side, talk.ends[side], pauses) })
			}
		}
	}
	at := r.IntN(2 * streams * half)
	if r.IntN(2) == 0 {
		at >>= 6
	}
	wait := time.Duration(r.IntN(3000)) * time.Microsecond
	for _, talk := range talks {
		talk.start()
		talk.allowAll()
	}
	WaitFor(t, "the moment of the fault", func() bool {
		got, over := 0, 0
		for _, talk := range talks {
			talk.is(func() bool { got += talk.flows[0].got + talk.flows[1].got; return true })
			if talk.over() {
				over++
			}
		}
		return got >= at || over == len(talks)
	})
	<-time.After(wait)
	f.strike(l, i)
	done.faults.Add(1)
	if !f.slow {
		// What nobody notices, the transports do some time later.
		given := make(chan struct{})
		end := time.AfterFunc(time.Duration(r.IntN(400))*time.Millisecond, func() {
			defer close(given)
			l.giveUp(i)
		})
		defer func() {
			if !end.Stop() {
				<-given // else it could be the next round's connection
			}
		}()
	}
	if l.over[0] == WebRTC || l.over[1] == WebRTC {
		done.onWebRTC.Add(streams)
		defer rescue(t, talks)()
	}
	for _, talk := range talks {
		talk.settle(t)
	}
	stop()
	for _, talk := range talks {
		talk.end(t)
		switch {
		case talk.survived():
			survived++
			continue
		case l.lasts && !f.onPurpose() && !talk.rescued.Load():
			t.Errorf("it is to survive: %v", talk)
		}
		broke++
	}
	t.Logf("fault: %s, of the %s connection; %d survived, %d broke", f.name, connName(i), survived, broke)
	l.nothingLeft(t)
	movers.Wait()
	return survived, broke
}

// rescue resets talks in which WebRTC does not end a Write, see TestWebRTCWriteBehindEOF. An
// application gives up some time. A talk that stands still for any other reason has failed.
func rescue(t *testing.T, talks []*talk) (stop func()) {
	quit, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(lookAfter)
		defer tick.Stop()
		moved, still := make([]int, len(talks)), make([]int, len(talks))
		for {
			select {
			case <-quit:
				return
			case <-tick.C:
			}
			var stuck []*talk
			for k, talk := range talks {
				if n := talk.progress(); n != moved[k] || talk.over() {
					moved[k], still[k] = n, 0
				} else if still[k]++; still[k] == webRTCLooks {
					stuck = append(stuck, talk)
				}
			}
			if len(stuck) == 0 {
				continue
			}
			for _, talk := range stuck {
				if !talk.writesBehindEOF() {
					t.Errorf("it stands still, and no Write behind an EOF is to blame: %v", talk)
				}
			}
			inside := goroutinesOf("transport/webrtc.(*stream).Write", "portage/migrate.")
			if strings.Count(inside, "\n\n") < len(stuck) {
				t.Errorf("%d streams stand still, and it is not WebRTC that keeps them:\n%v\n%s",
					len(stuck), stuck, goroutinesOf("portage/migrate."))
			}
			done.rescued.Add(int64(len(stuck)))
			for _, talk := range stuck {
				talk.rescued.Store(true)
				for _, s := range talk.ends {
					_ = s.Reset()
				}
			}
		}
	}()
	return func() {
		close(quit)
		<-ended
	}
}

// keepMoving migrates a stream to and fro.
func (l *link) keepMoving(asking context.Context, side int, s *migrate.Stream, pauses *rand.Rand) {
	to := 1
	if s.Conn() == l.conns[side][newConn] {
		to = 0
	}
	for {
		select {
		case <-asking.Done():
			return
		case <-time.After(time.Duration(pauses.IntN(20)) * time.Millisecond):
		}
		_ = l.hosts[side].Migrate(asking, s, l.conns[side][to])
		to = 1 - to
	}
}

// TestWebRTCWriteBehindEOF: what keeps some Writes on WebRTC from ending, on raw streams,
// whatever migrates. A reset that arrives while a Write waits for room is noted, and the
// Write not woken. Whoever reads is told, and ends the Write; behind an EOF nobody does. To
// set a deadline, whichever, wakes it.
func TestWebRTCWriteBehindEOF(t *testing.T) {
	l := joined(t, WebRTC, QUIC)
	ends := l.raw(t, oldConn)
	writer, reader := ends[opener], ends[acceptor]
	require.NoError(t, reader.CloseWrite())
	_, err := writer.Read(make([]byte, 1))
	require.Equal(t, io.EOF, err)
	w := writes(t, writer, text(1, 8<<20)) // more than the buffers of both ends
	require.NoError(t, reader.Reset())
	done.faults.Add(1)
	select {
	case err := <-w.result:
		t.Fatalf("WebRTC wakes the Write now (%v): rescue has nothing to do any more", err)
	case <-time.After(300 * time.Millisecond): // for the reset to arrive; if it comes later, nothing is shown
	}
	WaitFor(t, "a Write that is woken to end", func() bool {
		require.NoError(t, writer.SetWriteDeadline(time.Time{}))
		select {
		case err = <-w.result:
			return true
		default:
			return false
		}
	})
	require.ErrorIs(t, err, network.ErrReset)
	_ = writer.Reset()
}
