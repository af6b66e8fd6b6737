package connmgr

import (
	"encoding/json"
	"fmt"
	"html"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	coreconnmgr "github.com/libp2p/go-libp2p/core/connmgr"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/policy"
)

func get(t testing.TB, h http.Handler, query string) string {
	t.Helper()
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/debug/portage"+query, nil))
	require.Equal(t, http.StatusOK, rec.Code)
	return rec.Body.String()
}

func getStatus(t testing.TB, h http.Handler, query string) Status {
	t.Helper()
	var s Status
	require.NoError(t, json.Unmarshal([]byte(get(t, h, "?format=json&"+query)), &s))
	return s
}

// The page, the JSON and Explain say the same, in the same order.
func TestPageSaysWhatExplainSays(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		h := Handler(w.m)
		relay := w.connectLimited()
		streams := relay.open(2)
		relay.setPlain(1)
		w.mover.setAnswer(func(s *fakeStream) error {
			if s == streams[0] {
				return errDeniedByFake
			}
			return errFakeReset
		})
		w.connect(tcpAddr)
		w.connect(quicAddr)
		w.pass(1700 * time.Millisecond)
		e := w.m.Explain(higher)
		s := getStatus(t, h, "")
		text := html.UnescapeString(get(t, h, ""))
		require.Len(t, s.Peers, 1)
		require.Equal(t, e.State, s.Peers[0].State)
		require.Contains(t, text, e.State)
		require.Contains(t, text, "this side decides: "+e.Reason)
		at := 0
		for i, c := range e.Conns {
			shown := s.Peers[0].Conns[i]
			require.Equal(t, c.Conn.ID, shown.ID)
			require.Equal(t, c.State, shown.State)
			require.Equal(t, c.Winner, shown.Winner)
			next := strings.Index(text[at:], c.State)
			require.GreaterOrEqual(t, next, 0, "%s, after those before it", c.State)
			at += next
			if c.Decision.Rule != "" {
				require.Contains(t, text[at:], "lost by rule "+c.Decision.Rule+": "+c.Decision.WinnerValue+" over "+c.Decision.LoserValue)
			}
			require.Equal(t, c.Until.IsZero(), shown.Until == nil)
		}
		require.NotNil(t, s.Peers[0].Conns[2].Until, "when the stream that failed is tried again")
		list := s.Peers[0].Conns[2].List
		require.Len(t, list, 3)
		require.Equal(t, "/test/plain/1.0.0", list[0].Protocol)
		require.Equal(t, "it has no label", list[0].Pinned)
		require.Equal(t, "the peer denies to move it", list[1].Pinned)
		require.Empty(t, list[2].Pinned)
	})
}

// The history is the log, from the first call of Handler on.
func TestPageHasTheLog(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		w.connectLimited().open(2)
		h := Handler(w.m)
		w.connect(quicAddr)
		w.pass(time.Minute)
		var said []string
		s := getStatus(t, h, "q="+higher.String()[:4])
		for _, line := range s.History {
			said = append([]string{line.What}, said...)
			require.Equal(t, higher.String(), line.Peer)
		}
		require.NotEmpty(t, said)
		require.Equal(t, w.messages(), said)
		require.Equal(t, "100 ms", s.History[0].Took)
		require.EqualValues(t, 1, s.Totals.Closed)
		require.Empty(t, getStatus(t, h, "q=nobody").History)
		for i := range 2 * historySize {
			w.m.tells.log.Info(fmt.Sprint("line ", i))
		}
		require.Equal(t, fmt.Sprint("line ", 2*historySize-1), getStatus(t, h, "").History[0].What)
		require.Len(t, w.m.tells.history.last(1<<20, ""), historySize)
	})
}

func TestPageEscapesWhatAPeerChooses(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		h := Handler(w.m)
		const evil = `"><script>alert(1)</script>`
		loser := w.connect(tcpAddr)
		loser.set(func() { loser.refuses = evil })
		w.connect(quicAddr)
		w.pass(10 * time.Second)
		require.Contains(t, w.m.Explain(higher).String(), "script")
		text := get(t, h, "?q=&show=all")
		require.Contains(t, text, "&lt;script&gt;", "it is shown")
		require.NotContains(t, text, "<script", "and is no more than text")
		require.NotContains(t, get(t, h, "?q="+strings.ReplaceAll(evil, " ", "+")), "<script")
	})
}

func TestPageOfManyPeers(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		h := Handler(w.m)
		for i := range 120 {
			p := peer.ID(fmt.Sprintf("peer %03d", i))
			w.net.connect(p, quicAddr, false)
			switch {
			case i < 3:
				w.net.connect(p, tcpAddr, false).setPlain(1)
			case i == 100:
				w.net.connect(p, tcpAddr, false).setPlain(7)
			}
		}
		w.net.connect("peer relayed", relayAddr, true)
		s := getStatus(t, h, "page=99")
		require.Equal(t, 3, s.Query.Page, "a page that there is not is the last one")
		require.Len(t, s.Peers, 21)
		s = getStatus(t, h, "show=duplicates&sort=streams")
		require.Equal(t, 4, s.Found)
		require.Equal(t, peer.ID("peer 100").String(), s.Peers[0].Peer)
		s = getStatus(t, h, "show=relayed")
		require.Equal(t, 1, s.Found)
		require.Equal(t, "one connection, through a relay that limits it", s.Peers[0].State)
		require.Equal(t, Counts{Peers: 121, Duplicates: 4, Relayed: 1, Limited: 1, Connections: 125}, s.Counts)
		s = getStatus(t, h, "show=nonsense&sort=nonsense&page=x&q="+peer.ID("peer 100").String())
		require.Equal(t, 1, s.Found)
		require.Equal(t, "all", s.Query.Show)
		require.Contains(t, get(t, h, "?page=2"), `rel="next" href="?page=3&amp;show=all&amp;sort=connections"`)
	})
}

// What puts streams in danger looks like it, on the page and in the JSON.
func TestPageShowsWhatIsAProblem(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		h := Handler(w.m)
		signs := func() (peer Sign, conns []Sign) {
			p := getStatus(t, h, "").Peers[0]
			text := get(t, h, "")
			for _, c := range p.Conns {
				conns = append(conns, c.Sign)
				require.Contains(t, text, fmt.Sprintf(`<span class="sign %s"><span aria-hidden="true">%s</span>%s</span>`, c.Sign.Level, c.Sign.Glyph(), c.Sign.Text))
			}
			return p.Sign, conns
		}
		relay := w.connectLimited()
		at, conns := signs()
		require.Equal(t, Sign{LevelProblem, "limited relay only"}, at)
		require.Equal(t, []Sign{{LevelProblem, "limited"}}, conns)
		require.Equal(t, 1, getStatus(t, h, "show=limited").Found)

		relay.setPlain(1)
		direct := w.connect(quicAddr)
		w.pass(time.Second)
		at, conns = signs()
		require.Equal(t, Sign{LevelAttention, "held up"}, at)
		require.Equal(t, []Sign{{LevelGood, "kept"}, {LevelAttention, "pinned"}}, conns)
		require.Zero(t, getStatus(t, h, "show=limited").Found)

		direct.set(func() { direct.silent = true })
		w.pass(2 * time.Minute)
		at, conns = signs()
		require.Equal(t, Sign{LevelProblem, "limited relay in use"}, at)
		require.Equal(t, []Sign{{LevelProblem, "limited"}, {LevelProblem, "silent"}}, conns)

		direct.set(func() { direct.silent = false })
		relay.setPlain(0)
		w.pass(5 * time.Minute)
		at, conns = signs()
		require.Equal(t, Sign{LevelGood, "direct"}, at)
		require.Equal(t, []Sign{{LevelGood, "kept"}}, conns)
		require.NoError(t, direct.Close())
		w.connect(relayAddr)
		w.pass(time.Second)
		at, _ = signs()
		require.Equal(t, Sign{LevelAttention, "relay only"}, at)
	})
}

// A peer of which nothing is heard is no green one, whatever connections it has.
func TestPageShowsSilence(t *testing.T) {
	conn := func(addr string, r Reason, health health) ExplainedConn {
		c := ExplainedConn{Reason: r, Path: health.String(), Winner: r == ReasonKept || r == ReasonOnly}
		c.Candidate.SetAddr(ma.StringCast(addr))
		return c
	}
	for _, test := range []struct {
		conns []ExplainedConn
		peer  Sign
		first Sign
	}{
		{[]ExplainedConn{conn(quicAddr, ReasonOnly, pathUnknown)}, Sign{LevelGood, "direct"}, Sign{LevelGood, "kept"}},
		{[]ExplainedConn{conn(quicAddr, ReasonOnly, pathSilent)}, Sign{LevelProblem, "no answer"}, Sign{LevelProblem, "silent"}},
		{[]ExplainedConn{conn(quicAddr, ReasonKept, pathSilent), conn(tcpAddr, ReasonPinned, pathAlive)}, Sign{LevelAttention, "held up"}, Sign{LevelProblem, "silent"}},
		{[]ExplainedConn{conn(quicAddr, ReasonSilent, pathSilent), conn(tcpAddr, ReasonSilent, pathSilent)}, Sign{LevelProblem, "no answer"}, Sign{LevelProblem, "silent"}},
		{[]ExplainedConn{conn(quicAddr, ReasonKept, pathAlive), conn(tcpAddr, ReasonQuiet, pathAlive)}, Sign{LevelBusy, "consolidating"}, Sign{LevelGood, "kept"}},
	} {
		require.Equal(t, test.peer, signOf(&Explanation{Conns: test.conns}, &plan{}))
		require.Equal(t, test.first, test.conns[0].sign())
	}
}

// When something is due stands there once.
func TestPageSaysWhenSomethingIsDue(t *testing.T) {
	now := time.Date(2030, 1, 1, 12, 0, 0, 0, time.UTC)
	require.Equal(t, "at 12:00:02 UTC, in 2 s", due(now.Add(2*time.Second), now, "quiet for 1 s, then closed"))
	require.Equal(t, "at 12:00:02 UTC", due(now.Add(2*time.Second), now, "next attempt in 2 s"))
}

// blocking is a policy that ranks as the default one does until it does not return.
type blocking struct {
	policy.Policy
	until chan struct{}
	asked *atomic.Int32
}

func (p blocking) Rank(c []policy.Candidate) policy.Ranking {
	p.asked.Add(1)
	<-p.until
	return p.Policy.Rank(c)
}

// A policy that does not return, or takes long, makes no page slow, and keeps no more than a
// few goroutines, however often a page is asked for. What it has said before is shown.
func TestPageDoesNotWaitForThePolicy(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		h := Handler(w.m)
		for i := range peersOnPage {
			p := peer.ID(fmt.Sprintf("peer z %02d", i))
			w.net.identify(p, DrainID)
			w.net.connect(p, tcpAddr, false).setPlain(1)
			w.net.connect(p, quicAddr, false)
		}
		w.pass(5 * time.Second)
		before := getStatus(t, h, "sort=peer")
		require.Equal(t, "transport", before.Peers[0].Conns[1].Rule)

		p := blocking{policy.Default(), make(chan struct{}), new(atomic.Int32)}
		w.m.policies.inForce.Store(newRanker(p))
		for i := range 20 {
			start := time.Now()
			after := getStatus(t, h, "sort=peer")
			require.LessOrEqual(t, time.Since(start), hurry, "page %d", i)
			for i, p := range after.Peers {
				require.Equal(t, before.Peers[i].Conns[1].Rule, p.Conns[1].Rule)
				require.Equal(t, before.Peers[i].Conns[0].ID, p.Conns[0].ID)
			}
		}
		require.LessOrEqual(t, p.asked.Load(), int32(maxHurried))

		fresh := peer.ID("peer a new one")
		w.net.identify(fresh, DrainID)
		w.net.connect(fresh, tcpAddr, false)
		w.net.connect(fresh, quicAddr, false)
		shown := getStatus(t, h, "q="+fresh.String()).Peers[0]
		require.Equal(t, Sign{LevelProblem, "undecided"}, shown.Sign)
		close(p.until)
		w.pass(10 * time.Second)
		require.Zero(t, w.m.policies.hurried.Load())
		shown = getStatus(t, h, "q="+fresh.String()).Peers[0]
		require.Equal(t, "kept", shown.Conns[0].State)
	})
}

// The page's own policy allows no more than its own style.
func TestPageAllowsNothingElse(t *testing.T) {
	m, err := New(nil)
	require.NoError(t, err)
	defer m.Close()
	rec := httptest.NewRecorder()
	Handler(m).ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/", nil))
	csp := rec.Header().Get("Content-Security-Policy")
	require.Contains(t, csp, "default-src 'none'")
	require.NotContains(t, csp, "unsafe")
	require.Contains(t, rec.Body.String(), "<style>"+pageStyle+"</style>", "what was hashed is what is sent")
	for _, inline := range []string{"<script", " style=", " onclick="} {
		require.NotContains(t, pageText, inline)
	}
}

func TestPageCanOnlyBeRead(t *testing.T) {
	m, err := New(nil)
	require.NoError(t, err)
	defer m.Close()
	rec := httptest.NewRecorder()
	Handler(m).ServeHTTP(rec, httptest.NewRequest(http.MethodPost, "/", nil))
	require.Equal(t, http.StatusMethodNotAllowed, rec.Code)
	require.Contains(t, get(t, Handler(m), ""), "There is no such peer", "a manager that has not met a network yet")
}

// crowd makes a manager with so many peers, each with so many connections. Of a second one
// nothing is closed: it carries a stream.
func crowd(t testing.TB, peers, conns int) *Manager {
	m, err := New(coreconnmgr.NullConnMgr{}, WithMetricsTracer(NewMetricsTracer(WithRegisterer(prometheus.NewRegistry()))))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	n := &fakeNet{conns: make(map[peer.ID][]*fakeConn), protocols: make(map[peer.ID][]protocol.ID), done: make(chan struct{})}
	t.Cleanup(func() { close(n.done) })
	n.notifiee = m.Notifee()
	for i := range peers {
		p := peer.ID(fmt.Sprintf("peer %05d", i))
		n.identify(p)
		for _, addr := range []string{quicAddr, tcpAddr}[:conns] {
			n.connect(p, addr, false).setPlain(1)
		}
	}
	return m
}

// A page looks at all peers, and explains those that are on it; a scrape looks at none.
func TestWhatItCostsToLook(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	for _, conns := range []int{1, 2} {
		inVirtualTime(t, func(t *testing.T) {
			const few, many = 2 * peersOnPage, 5000
			var page, scrape [2]float64
			for i, peers := range []int{few, many} {
				m := crowd(t, peers, conns)
				h := Handler(m)
				time.Sleep(3 * time.Second)
				synctest.Wait()
				require.Equal(t, peers*(conns-1), getStatus(t, h, "").Counts.Duplicates)
				page[i] = testing.AllocsPerRun(2, func() { get(t, h, "") })
				reg := prometheus.NewRegistry()
				NewMetricsTracer(WithRegisterer(reg))
				scrape[i] = testing.AllocsPerRun(2, func() { _, _ = reg.Gather() })
			}
			more := float64((many - few) * conns)
			require.LessOrEqual(t, page[1]-page[0], 3*more, "allocations of a page for each connection of a peer that is not on it")
			require.LessOrEqual(t, scrape[1], 1.1*scrape[0], "allocations of a scrape")
		})
	}
}

// cpu runs f as often as b wants, and reports how much CPU one run takes.
func cpu(b *testing.B, f func()) {
	used := func() time.Duration {
		var u syscall.Rusage
		require.NoError(b, syscall.Getrusage(syscall.RUSAGE_SELF, &u))
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	b.ReportAllocs()
	before := used()
	for b.Loop() {
		f()
	}
	b.ReportMetric(float64(used()-before)/float64(b.N)/1e6, "cpu-ms/op")
}

// rest waits until each peer with duplicates has been decided on, and ends the rounds: these
// are not what is measured.
func rest(b *testing.B, m *Manager) {
	undecided := func(d *peerState) bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.winner == nil
	}
	require.Eventually(b, func() bool { return !slices.ContainsFunc(m.sched.all(), undecided) }, time.Minute, 50*time.Millisecond)
	require.NoError(b, m.Close())
}

func BenchmarkPage(b *testing.B) {
	for conns, name := range []string{1: "alone", 2: "duplicates"} {
		if conns == 0 {
			continue
		}
		m := crowd(b, 10_000, conns)
		rest(b, m)
		h := Handler(m)
		b.Run(name+"/html", func(b *testing.B) { cpu(b, func() { get(b, h, "") }) })
		b.Run(name+"/json", func(b *testing.B) { cpu(b, func() { get(b, h, "?format=json") }) })
		b.Run(name+"/search", func(b *testing.B) { cpu(b, func() { get(b, h, "?q=abc") }) })
	}
}

func BenchmarkScrape(b *testing.B) {
	reg := prometheus.NewRegistry()
	NewMetricsTracer(WithRegisterer(reg))
	rest(b, crowd(b, 10_000, 2))
	h := promhttp.HandlerFor(reg, promhttp.HandlerOpts{})
	cpu(b, func() { get(b, h, "") })
}
