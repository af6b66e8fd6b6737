package field

import (
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/connmgr"
	"github.com/go-portage/portage/internal/hosttest"
	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/migrate"
	"github.com/go-portage/portage/policy"
)

// custom is a policy of an application's own, which does as it likes with the connections
// of one peer, and well with those of others. Safe for concurrent use.
type custom struct {
	times atomic.Int64 // asked, of any peer
	mu    sync.Mutex
	of    []string // the IPs of the one peer
	rank  func(cs []policy.Candidate) policy.Ranking
}

func (c *custom) String() string { return "custom" }

func (c *custom) Rank(cs []policy.Candidate) policy.Ranking {
	c.times.Add(1)
	c.mu.Lock()
	rank, of := c.rank, c.of
	c.mu.Unlock()
	if rank != nil && len(cs) > 0 && slices.Contains(of, cs[0].Remote.IP().String()) {
		return rank(cs)
	}
	return policy.Default().Rank(cs)
}

func (c *custom) become(of []string, rank func(cs []policy.Candidate) policy.Ranking) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.of, c.rank = of, rank
}

// third is another peer of a's, whose connections nobody's policy is wrong about: TCP and
// QUIC at once. It has to end with one.
type third struct {
	*end
	w *world
}

func (w *world) third() *third {
	w.Helper()
	i := 4
	for w.ID(ips(i)[0]) < w.a.ID() { // a is to decide
		i++
	}
	at := ips(i)
	w.link(w.a.IPs(), at)
	c := w.newEnd("c", at, true, setup{})
	for _, err := range w.DialTogether(
		Attempt{From: w.a.Node, To: c.Node, Path: Path{Transport: TCP, From: w.a.IPs()[0], To: at[0]}},
		Attempt{From: c.Node, To: w.a.Node, Path: Path{Transport: QUIC, From: at[1], To: w.a.IPs()[1]}},
	) {
		require.NoError(w, err)
	}
	time.Sleep(time.Second / 4)
	return &third{end: c, w: w}
}

// consolidates checks that c ends with one connection within a time.
func (c *third) consolidates(limit time.Duration) {
	c.w.Helper()
	if !c.w.within(limit, func() bool { return len(c.conns(c.w.a)) == 1 && len(c.w.a.conns(c.end)) == 1 }) {
		c.w.Errorf("another peer still has %d connections after %v: %s", len(c.conns(c.w.a)), limit, c.w.a.mgr.Explain(c.ID()))
	}
}

// mine are the casts in which a has Portage.
var mine = casts[:3]

// A policy puts the winner in front that it has once chosen, whether that connection was
// given to it or not. When the path of that one is dead, streams use the other one no
// later than on plain hosts, nothing is asked without end, and other peers do not suffer.
func TestStickyPolicy(t *testing.T) {
	for _, frozen := range []Transport{QUIC, TCP} {
		t.Run(string(frozen)+" dies", func(t *testing.T) {
			compareWith(t, mine, func(w *world) {
				sticky := new(custom)
				var mu sync.Mutex
				var last *policy.Candidate
				rank := func(cs []policy.Candidate) policy.Ranking {
					mu.Lock()
					defer mu.Unlock()
					r := policy.Default().Rank(cs)
					if last == nil {
						for _, c := range cs {
							if (c.Transport == policy.QUIC) == (frozen == QUIC) {
								last = &c
							}
						}
					}
					if last == nil {
						return r
					}
					order := slices.DeleteFunc(slices.Clone(r.Order), func(c policy.Candidate) bool { return c.ID == last.ID })
					r = policy.Ranking{Order: append([]policy.Candidate{*last}, order...)}
					for _, c := range order {
						r.Decisions = append(r.Decisions, policy.Decision{Winner: *last, Loser: c, Rule: "custom", WinnerValue: "true", LoserValue: "false"})
					}
					return r
				}
				w.hostsWith(setup{manager: []connmgr.Option{connmgr.WithPolicy(sticky), connmgr.WithConcurrency(1)}}, setup{})
				sticky.become(w.b.IPs(), rank)
				first, second := QUIC, TCP
				if frozen == TCP {
					first, second = TCP, QUIC
				}
				k := map[Transport]int{TCP: 0, QUIC: 1}
				w.dial(w.attempt(first, k[first], 0), w.back(second, k[second], 10*time.Second))
				w.until("the second", 20*time.Second, func() bool { return w.a.on(second, w.b) != nil })
				for _, c := range w.a.conns(w.b) { // neither is out of use
					w.pinned(w.a, w.b, c, 10, time.Hour)
				}
				time.Sleep(3 * time.Second)
				w.Freeze(w.a.IPs()[k[frozen]], w.b.IPs()[k[frozen]])
				died := time.Now()
				asked := w.log.count("does not answer")
				var took [2]time.Duration
				var errs [2]error
				var asking sync.WaitGroup
				for i, p := range [][2]*end{{w.a, w.b}, {w.b, w.a}} {
					asking.Go(func() { took[i], errs[i] = w.firstAnswer(p[0], p[1], died) })
				}
				if w.cast.a {
					time.Sleep(5 * time.Second)
					w.third().consolidates(8 * time.Second)
				}
				asking.Wait()
				for i := range took {
					w.takes(fmt.Sprintf("new streams of end %d work again", i), errs[i], took[i], 5*time.Second)
				}
				time.Sleep(30 * time.Second)
				assert.LessOrEqual(w, w.log.count("does not answer")-asked, 8, "times that a dead connection was said not to answer")
			})
		})
	}
}

// firstAnswer makes requests, one every 100 ms whether the others are answered or not, and
// returns how long after a moment the first of those was made that are answered within 2 s.
func (w *world) firstAnswer(from, to *end, since time.Time) (time.Duration, error) {
	type answer struct {
		at  time.Duration
		err error
	}
	const most = 1200
	answers := make(chan answer, most)
	for made, open := 0, 0; ; {
		if made < most {
			made++
			open++
			w.work.Go(func() {
				at := time.Since(since)
				_, err := w.request(from, to, 2*time.Second)
				answers <- answer{at, err}
			})
		}
		select {
		case a := <-answers:
			if open--; a.err == nil || open == 0 && made == most {
				return a.at, a.err
			}
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// A policy panics. The process lives, and other peers are served.
func TestPolicyThatPanics(t *testing.T) {
	if !hosttest.Alone(t) {
		return
	}
	badPolicy(t, func(cs []policy.Candidate) policy.Ranking { panic("a mistake in the application") }, true)
}

// A policy does not return, for as long as the test lasts.
func TestPolicyThatBlocks(t *testing.T) {
	compareWith(t, mine, func(w *world) {
		over := make(chan struct{}) // in virtual time
		defer close(over)
		badPolicyIn(w, func(cs []policy.Candidate) policy.Ranking { <-over; return policy.Default().Rank(cs) }, false)
		if w.cast.a {
			begun := time.Now()
			_ = w.a.mgr.Explain(w.third().ID()) // of another peer
			assert.Less(w, time.Since(begun), 5*time.Second, "Explain of another peer")
		}
	})
}

// A policy names what it was not given, or nothing, or one connection twice.
func TestPolicyThatLies(t *testing.T) {
	for name, rank := range map[string]func(cs []policy.Candidate) policy.Ranking{
		"nothing": func([]policy.Candidate) policy.Ranking { return policy.Ranking{} },
		"a connection that there is not": func(cs []policy.Candidate) policy.Ranking {
			r := policy.Default().Rank(cs)
			r.Order = slices.Clone(r.Order)
			for i := range r.Order {
				r.Order[i].ID = fmt.Sprint("no ", i)
			}
			return r
		},
		"one twice, and no decisions": func(cs []policy.Candidate) policy.Ranking {
			return policy.Ranking{Order: []policy.Candidate{cs[0], cs[0], cs[0], cs[0]}}
		},
		"only the worst": func(cs []policy.Candidate) policy.Ranking {
			r := policy.Default().Rank(cs)
			return policy.Ranking{Order: r.Order[len(r.Order)-1:]}
		},
		"decisions about others": func(cs []policy.Candidate) policy.Ranking {
			r := policy.Default().Rank(cs)
			r.Decisions = slices.Repeat([]policy.Decision{{}}, 7)
			return r
		},
	} {
		t.Run(name, func(t *testing.T) { badPolicy(t, rank, false) })
	}
}

// A policy has another opinion each time, or two ends have opposite ones.
func TestPolicyThatChangesItsMind(t *testing.T) {
	var turn atomic.Int64
	for name, pick := range map[string]func() bool{
		"each time":        func() bool { return turn.Add(1)%2 == 0 },
		"every third time": func() bool { return turn.Add(1)%3 == 0 },
		"every 11 s":       func() bool { return time.Now().Unix()/11%2 == 0 },
		"every 40 times":   func() bool { return turn.Add(1)/40%2 == 0 },
	} {
		t.Run(name, func(t *testing.T) {
			badPolicy(t, func(cs []policy.Candidate) policy.Ranking {
				r := policy.Default().Rank(cs)
				if pick() {
					r.Order = slices.Clone(r.Order)
					slices.Reverse(r.Order)
					r.Decisions = nil
				}
				return r
			}, false)
		})
	}
}

// badPolicy plays with a policy at a that is bad about b's connections.
func badPolicy(t *testing.T, rank func(cs []policy.Candidate) policy.Ranking, tells bool) {
	t.Helper()
	compareWith(t, mine, func(w *world) { badPolicyIn(w, rank, tells) })
}

func badPolicyIn(w *world, rank func(cs []policy.Candidate) policy.Ranking, tells bool) {
	w.Helper()
	bad := new(custom)
	w.hostsWith(setup{manager: []connmgr.Option{connmgr.WithPolicy(bad), connmgr.WithConcurrency(1)}}, setup{})
	bad.become(w.b.IPs(), rank)
	w.doubled(5 * time.Second)
	chats := w.chats(2)
	time.Sleep(15 * time.Second)
	if w.cast.a {
		w.third().consolidates(8 * time.Second)
	}
	for i := range 20 {
		time.Sleep(5 * time.Second)
		w.noteRequest(fmt.Sprintf("request %d", i), w.a, w.b, 5*time.Second, time.Second)
		w.noteRequest(fmt.Sprintf("request back %d", i), w.b, w.a, 5*time.Second, time.Second)
	}
	w.noteAll("chat", chats, 5*time.Second, 2*time.Second)
	w.holds("a connection is left", len(w.a.conns(w.b)) > 0 && len(w.b.conns(w.a)) > 0)
	assert.LessOrEqual(w, mostMoved(chats), 12, "moves of one stream in two minutes")
	assert.Less(w, bad.times.Load(), int64(1000), "times that the policy was asked in two minutes")
	if tells && w.cast.a {
		said := w.log.count(" ERROR ")
		assert.True(w, said >= 1 && said <= 3, "an error is logged, and not again and again: %d lines", said)
	}
}

// Two ends have opposite policies, and one does not know that the other has a manager.
// Streams do not move to and fro without end.
func TestOppositePolicies(t *testing.T) {
	for _, forgets := range []bool{false, true} {
		t.Run(fmt.Sprintf("one forgets that the other drains %v", forgets), func(t *testing.T) {
			compareWith(t, bothCasts, func(w *world) {
				older, err := policy.Parse("chain(older)")
				require.NoError(w, err)
				younger, err := policy.Parse("chain(younger)")
				require.NoError(w, err)
				w.hostsWith(setup{manager: []connmgr.Option{connmgr.WithPolicy(older)}}, setup{manager: []connmgr.Option{connmgr.WithPolicy(younger)}})
				w.doubled(5 * time.Second)
				if forgets {
					require.NoError(w, w.b.Peerstore().RemoveProtocols(w.a.ID(), connmgr.DrainID))
				}
				chats := w.chats(2)
				if forgets {
					w.until("QUIC", 10*time.Second, func() bool { return w.b.on(QUIC, w.a) != nil })
					time.Sleep(300 * time.Millisecond)
					require.NoError(w, w.b.Peerstore().RemoveProtocols(w.a.ID(), connmgr.DrainID))
				}
				time.Sleep(3 * time.Minute)
				w.noteAll("chat", chats, 5*time.Second, 2*time.Second)
				w.holds("a connection is left", len(w.a.conns(w.b)) > 0 && len(w.b.conns(w.a)) > 0)
				assert.LessOrEqual(w, mostMoved(chats), 4, "moves of one stream in three minutes")
			})
		})
	}
}

// One manager is given to two hosts. It serves the one that it was wrapped for, and does nothing
// at the other, which cannot have it. That one closes the manager with itself all the same, which
// nobody can keep it from: a host closes what it was given with a call that does not say whose it
// is. Then the log says so, and the first host is as good as a plain one.
func TestOneManagerForTwoHosts(t *testing.T) {
	together(t, func(w *world) {
		w.hosts(setup{})
		at, other := ips(5), ips(6)
		w.link(at, other)
		second := w.NewNode(at, libp2p.ConnectionManager(w.a.mgr))
		_, err := w.a.mgr.Wrap(second.Host)
		require.ErrorIs(w, err, connmgr.ErrWrapped)
		plain := w.NewNode(other)
		w.Join(second, plain, Path{Transport: TCP, From: at[0], To: other[0]}, Path{Transport: QUIC, From: other[1], To: at[1]})

		w.doubled(0)
		w.chats(2)
		one := func() bool { return len(w.a.conns(w.b)) == 1 && len(w.b.conns(w.a)) == 1 }
		w.until("the first host's connections are consolidated", 10*time.Second, one)
		time.Sleep(3 * time.Minute)
		assert.Len(w, second.Network().ConnsToPeer(plain.ID()), 2, "nothing is done at the second")
		assert.Zero(w, w.log.count("was given to two hosts"))

		second.Stop()
		assert.Equal(w, 1, w.log.count("was given to two hosts"), "whoever reads the log is told")
		require.NoError(w, w.a.host.Network().ClosePeer(w.b.ID()))
		w.until("it is gone", time.Second, func() bool { return len(w.b.conns(w.a)) == 0 })
		w.doubled(time.Second)
		chats := w.chats(2)
		time.Sleep(10 * time.Second)
		assert.Equal(w, "the manager is closed", w.a.mgr.Explain(w.b.ID()).State)
		for _, c := range chats {
			assert.NoError(w, c.state(5*time.Second))
		}
		for _, p := range [][2]*end{{w.a, w.b}, {w.b, w.a}} {
			_, err := w.request(p[0], p[1], 5*time.Second)
			assert.NoError(w, err)
		}
		require.NoError(w, w.a.host.Close(), "the manager is closed twice")
	})
}

// A takeover that is to come after as many settle delays as can be said is refused, or
// never comes: the other end decides, and does nothing.
func TestTakeoverThatNeverComes(t *testing.T) {
	if _, err := connmgr.New(nil, connmgr.WithTakeover(math.MaxInt)); err != nil {
		require.ErrorContains(t, err, "takeover")
		return
	}
	play(t, cast{a: true}, new(outcome), func(w *world) {
		w.hosts(setup{manager: []connmgr.Option{connmgr.WithTakeover(math.MaxInt)}})
		h, err := migrate.Wrap(w.b.Node.Host)
		require.NoError(w, err)
		w.b.host = h
		w.b.Node.SetStreamHandler(connmgr.DrainID, drop)
		time.Sleep(time.Second)
		w.doubled(5 * time.Second)
		chats := w.chats(2)
		time.Sleep(2 * time.Minute)
		assert.Zero(w, mostMoved(chats), "moves of one stream")
		assert.Len(w, w.a.conns(w.b), 2)
	})
}

// With hardly any quiet time, and a peer that reads late, nobody looks all the time
// whether it is over. In virtual time that would last for ever.
func TestHardlyAnyQuietTime(t *testing.T) {
	if !hosttest.Alone(t, "-test.timeout=1m") {
		return
	}
	quiet := time.Duration(1)
	if _, err := connmgr.New(nil, connmgr.WithQuietTime(quiet)); err != nil {
		quiet = time.Millisecond // the least that is allowed
	}
	together(t, func(w *world) {
		counts := []*custom{new(custom), new(custom)}
		w.hostsWith(setup{manager: []connmgr.Option{connmgr.WithQuietTime(quiet), connmgr.WithPolicy(counts[0])}},
			setup{manager: []connmgr.Option{connmgr.WithQuietTime(quiet), connmgr.WithPolicy(counts[1])}})
		w.doubled(5 * time.Second)
		require.NoError(w, w.post(w.a, w.b)) // the peer reads it only after minutes
		require.NoError(w, w.post(w.b, w.a))
		const most = 300
		w.within(time.Minute, func() bool { return counts[0].times.Load() > most || counts[1].times.Load() > most })
		for _, c := range counts {
			assert.LessOrEqual(w, c.times.Load(), int64(most), "rounds in a minute")
		}
	})
}
