package faults

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	. "github.com/go-portage/portage/internal/hosttest"
	"github.com/go-portage/portage/migrate"
)

// webRTCPatience is how long an application on WebRTC waits for its Writes.
const webRTCPatience = 10 * time.Second

// randomFaults are those that can strike at any moment.
var randomFaults = append([]fault{
	{name: "reset by the opener", strike: resetAll(opener)},
	{name: "reset by the acceptor", strike: resetAll(acceptor)},
}, everyFault...)

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
func TestFaultAtAnyMoment(t *testing.T) {
	defer summary(t)()
	rounds := 5
	if *all {
		rounds = 25
	}
	var survivors, broken sync.Map
	t.Run("ways", func(t *testing.T) {
		for n, w := range ways() {
			t.Run(w.String(), func(t *testing.T) {
				t.Parallel()
				l := newLink(t, w.from, w.to)
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
	t.Logf("%d streams survived, %d broke", sum(&survivors), sum(&broken))
}

func sum(m *sync.Map) (n int) {
	m.Range(func(_, v any) bool { n += v.(int); return true })
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
		end := time.AfterFunc(time.Duration(r.IntN(400))*time.Millisecond, func() { l.giveUp(i) })
		defer end.Stop()
	}
	if l.over[0] == WebRTC || l.over[1] == WebRTC {
		// Once in a thousand times a Write on a WebRTC connection that is closed never
		// returns, with nobody left to read there. An application gives up some time.
		rescue := time.AfterFunc(webRTCPatience, func() {
			for _, talk := range talks {
				for _, s := range talk.ends {
					if !talk.over() {
						done.rescued.Add(1)
						_ = s.Reset()
					}
				}
			}
		})
		defer rescue.Stop()
	}
	for _, talk := range talks {
		talk.settle(t)
	}
	stop()
	for _, talk := range talks {
		talk.end(t)
		if talk.survived() {
			survived++
		} else {
			broke++
		}
	}
	t.Logf("fault: %s, of the %s connection; %d survived, %d broke", f.name, connName(i), survived, broke)
	l.nothingLeft(t)
	movers.Wait()
	return survived, broke
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
