// Package field puts whole hosts into the situations in which real nodes find themselves,
// in virtual time, with Portage at both ends, at one of them, and at neither. Whatever
// lives and works on plain go-libp2p hosts has to live and work on the others: streams,
// calls, connections.
package field

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	coreconnmgr "github.com/libp2p/go-libp2p/core/connmgr"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/go-portage/portage/connmgr"
	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/migrate"
	"github.com/go-portage/portage/policy"
)

// A cast says who of a and b has Portage, and who of them has the lower peer ID and so
// decides where both have.
type cast struct {
	name    string
	a, b    bool
	aFirst  bool
	lasting bool // streams outlive their connection, where both have Portage
}

var (
	plainCast = cast{name: "plain", aFirst: true}
	casts     = []cast{
		{name: "both, this side decides", a: true, b: true, aFirst: true},
		{name: "both, the other side decides", a: true, b: true},
		{name: "this side only", a: true, aFirst: true},
		{name: "the other side only", b: true, aFirst: true},
	}
	bothCasts = casts[:2]
)

// compare runs a situation on plain hosts and with each cast, and fails where something
// that is well on plain hosts is not with Portage.
func compare(t *testing.T, situation func(w *world)) {
	t.Helper()
	compareWith(t, casts, situation)
}

func compareWith(t *testing.T, casts []cast, situation func(w *world)) {
	t.Helper()
	plain := new(outcome)
	play(t, plainCast, plain, situation) // here, so that it is played whichever cast is asked for
	require.True(t, slices.ContainsFunc(plain.seen, func(o observation) bool { return o.err == nil }),
		"nothing is well on plain hosts: the situation compares nothing")
	for _, c := range casts {
		t.Run(c.name, func(t *testing.T) {
			here := new(outcome)
			did := play(t, c, here, situation)
			if worse := here.worseThan(plain); len(worse) > 0 {
				failAll(t, worse)
				t.Logf("what the managers did:\n%s", did)
			}
		})
	}
}

// together runs a situation with Portage at both ends, where what plain hosts do is known:
// it is the situation that says what has to be.
func together(t *testing.T, situation func(w *world)) {
	t.Helper()
	for _, c := range bothCasts {
		t.Run(c.name, func(t *testing.T) { play(t, c, new(outcome), situation) })
	}
}

// alone runs a situation with Portage at one end.
func alone(t *testing.T, situation func(w *world)) {
	t.Helper()
	for _, c := range casts[2:] {
		t.Run(c.name, func(t *testing.T) { play(t, c, new(outcome), situation) })
	}
}

func play(t *testing.T, c cast, seen *outcome, situation func(w *world)) *journal {
	t.Helper()
	did := new(journal)
	Run(t, func(t *testing.T, n *Net) {
		w := &world{T: t, Net: n, cast: c, seen: seen, log: did}
		var stop context.CancelFunc
		w.ctx, stop = context.WithCancel(t.Context())
		t.Cleanup(stop)
		t.Cleanup(func() {
			if t.Failed() || testing.Verbose() {
				t.Logf("what the managers did:\n%s", w.log)
			}
		})
		situation(w)
		stop()
		w.work.Wait()
	})
	return did
}

// outcome is what was seen in one run. Safe for concurrent use.
type outcome struct {
	mu   sync.Mutex
	seen []observation
}

func (o *outcome) add(ob observation) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.seen = append(o.seen, ob)
}

type observation struct {
	what  string
	err   error         // nil: it was well
	took  time.Duration // with allow: how long it took
	allow time.Duration // how much longer it may take elsewhere; 0: that does not matter
	count int           // of what there should be as much elsewhere, but for a tenth
	luck  bool          // on which connection a plain host's stream was decides
	note  string        // for a failure
}

// is notes whether something was well.
func (w *world) is(what string, err error) {
	w.seen.add(observation{what: what, err: err})
}

// holds notes whether something was as it should be.
func (w *world) holds(what string, well bool, otherwise ...any) {
	var err error
	if !well {
		err = errors.New("it is not so; " + fmt.Sprint(otherwise...))
	}
	w.is(what, err)
}

// takes notes how long something took, and how much longer it may take with Portage.
func (w *world) takes(what string, err error, took, allow time.Duration) {
	w.seen.add(observation{what: what, err: err, took: took, allow: allow})
}

// counts notes an amount of which there should be as much with Portage.
func (w *world) counts(what string, n int) {
	w.seen.add(observation{what: what, count: n})
}

func (o *outcome) byName() map[string]observation {
	all := make(map[string]observation)
	for _, ob := range o.seen {
		all[ob.what] = ob
	}
	return all
}

// worseThan says what is worse than it was on plain hosts. What is luck has to be no worse
// than where plain hosts had least of it, in that run and in others.
func (o *outcome) worseThan(plain *outcome, others ...*outcome) (all []string) {
	here := o.byName()
	var least []map[string]observation
	for _, other := range others {
		least = append(least, other.byName())
	}
	for _, p := range plain.seen {
		h, seen := here[p.what]
		for _, other := range least {
			if q, seen := other[p.what]; h.luck && seen {
				p.took = max(p.took, q.took)
				p.err = cmp.Or(p.err, q.err)
			}
		}
		var worse string
		switch {
		case p.err != nil:
			continue
		case !seen:
			worse = "not seen at all"
		case h.err != nil:
			worse = h.err.Error()
		case p.allow > 0 && h.took > p.took+max(p.allow, h.allow):
			worse = fmt.Sprintf("it took %v %s", h.took, h.note)
		case h.count < p.count-p.count/10:
			worse = fmt.Sprint(h.count)
		default:
			continue
		}
		with := "well"
		if p.allow > 0 {
			with = p.took.String()
		}
		if p.count > 0 {
			with = fmt.Sprint(p.count)
		}
		all = append(all, fmt.Sprintf("worse than on plain hosts (%s): %s: %s", with, p.what, worse))
	}
	return all
}

// failAll fails the test with the first of the faults.
func failAll(t *testing.T, faults []string) {
	t.Helper()
	const most = 5
	if len(faults) > most {
		faults = append(faults[:most:most], fmt.Sprintf("and %d more", len(faults)-most))
	}
	for _, f := range faults {
		t.Error(f)
	}
}

// journal keeps the log lines of all managers of a run. Safe for concurrent use.
type journal struct {
	mu    sync.Mutex
	lines []string
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, strings.TrimRight(string(p), "\n"))
	return len(p), nil
}

func (j *journal) Sync() error { return nil }

// count returns how many lines contain the text.
func (j *journal) count(text string) int {
	j.mu.Lock()
	defer j.mu.Unlock()
	n := 0
	for _, l := range j.lines {
		if strings.Contains(l, text) {
			n++
		}
	}
	return n
}

// shown is how many lines of a journal a failure shows, of its beginning and of its end.
const shown = 30

// String leaves out the steps of each stream's migration.
func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	lines := slices.DeleteFunc(slices.Clone(j.lines), func(l string) bool { return strings.Contains(l, " DEBUG ") && strings.Contains(l, " migration ") })
	if len(lines) <= 2*shown {
		return strings.Join(lines, "\n")
	}
	return fmt.Sprintf("%s\n... %d more ...\n%s", strings.Join(lines[:shown], "\n"), len(lines)-2*shown,
		strings.Join(lines[len(lines)-shown:], "\n"))
}

// logger logs to the journal in virtual time, under the name of a host.
func (j *journal) logger(name string, level zapcore.Level) *zap.Logger {
	enc := zapcore.NewConsoleEncoder(zapcore.EncoderConfig{
		TimeKey: "t", LevelKey: "l", NameKey: "n", MessageKey: "m", ConsoleSeparator: " ",
		EncodeTime:     zapcore.TimeEncoderOfLayout("04:05.000"),
		EncodeLevel:    zapcore.CapitalLevelEncoder,
		EncodeDuration: zapcore.StringDurationEncoder,
	})
	return zap.New(zapcore.NewCore(enc, j, level)).Named(name)
}

// world is one run of a situation.
type world struct {
	*testing.T
	*Net
	cast
	a, b *end
	seen *outcome
	log  *journal
	ctx  context.Context // of what applications do; ends with the situation
	work sync.WaitGroup
}

// end is a host, and the application on it. Node is the plain host.
type end struct {
	*Node
	name string
	host host.Host        // what the application uses
	mgr  *connmgr.Manager // nil: none
	served
}

// setup is what hosts are made with. The zero value is the usual one.
type setup struct {
	manager  []connmgr.Option
	host     []libp2p.Option
	inner    func() (coreconnmgr.ConnManager, error) // the inner connection manager; nil: one that does nothing
	limited  bool                                    // with go-libp2p's default resource limits; else without any
	quietLog bool                                    // the managers' lines at info level only
}

const (
	ipRelay  = "1.0.9.1"
	ipRelay2 = "1.0.9.2"
)

// ips are the addresses of a host with two networks; i tells hosts apart.
func ips(i int) []string {
	return []string{fmt.Sprintf("1.1.%d.1", i), fmt.Sprintf("1.1.%d.2", i)}
}

// hosts makes a and b. Between their first IPs it takes 10 ms one way, between their
// second ones 25 ms, and 20 ms between any of them and a relay.
func (w *world) hosts(s setup) {
	w.Helper()
	w.hostsWith(s, s)
}

// hostsWith makes each as it should be.
func (w *world) hostsWith(a, b setup) {
	w.Helper()
	i, j := 1, 2
	if (w.ID(ips(1)[0]) < w.ID(ips(2)[0])) != w.aFirst {
		i, j = 2, 1
	}
	w.link(ips(1), ips(2))
	w.a, w.b = w.newEnd("a", ips(i), w.cast.a, a), w.newEnd("b", ips(j), w.cast.b, b)
}

func (w *world) link(x, y []string) {
	for k, oneWay := range []time.Duration{10 * time.Millisecond, 25 * time.Millisecond} {
		w.SetLatency(x[k], y[k], oneWay)
		for _, r := range []string{ipRelay, ipRelay2} {
			w.SetLatency(x[k], r, 20*time.Millisecond)
			w.SetLatency(y[k], r, 20*time.Millisecond)
		}
	}
}

func (w *world) newEnd(name string, at []string, portage bool, s setup) *end {
	w.Helper()
	return w.makeEnd(name, portage, s, func(opts ...libp2p.Option) *Node { return w.NewNode(at, opts...) })
}

func (w *world) makeEnd(name string, portage bool, s setup, newNode func(opts ...libp2p.Option) *Node) *end {
	w.Helper()
	e := &end{name: name, served: served{errs: make(map[uint64]error), at: make(map[uint64]time.Time)}}
	opts := slices.Clone(s.host)
	if !s.limited {
		opts = append(opts, libp2p.ResourceManager(&network.NullResourceManager{}))
	}
	inner := coreconnmgr.ConnManager(coreconnmgr.NullConnMgr{})
	if s.inner != nil {
		var err error
		inner, err = s.inner()
		require.NoError(w, err)
	}
	if !portage {
		e.Node = newNode(append(opts, libp2p.ConnectionManager(inner))...)
		e.host = e.Node.Host
		e.serve()
		return e
	}
	level := zapcore.DebugLevel
	if s.quietLog {
		level = zapcore.InfoLevel
	}
	manager := append([]connmgr.Option{connmgr.WithLogger(w.log.logger(name, level))}, s.manager...)
	if w.cast.lasting {
		manager = append(manager, connmgr.WithMigrateOptions(migrate.WithResumption()))
	}
	mgr, err := connmgr.New(inner, manager...)
	require.NoError(w, err)
	e.mgr = mgr
	e.Node = newNode(append(opts, libp2p.ConnectionManager(mgr), mgr.Detours())...)
	e.host, err = mgr.Wrap(e.Node.Host)
	require.NoError(w, err)
	w.Cleanup(func() { _ = e.host.Close() })
	e.serve()
	return e
}

// relay makes a relay, limited by go-libp2p's defaults (128 KiB, two minutes) or unlimited.
func (w *world) relay(limited bool) *Node {
	w.Helper()
	if limited {
		return w.NewRelay(ipRelay)
	}
	return w.NewRelay(ipRelay, relay.WithInfiniteLimits())
}

// relayed connects a to b through a relay, which both reach over TCP from their first IPs,
// and returns a's side.
func (w *world) relayed(limited bool) network.Conn {
	w.Helper()
	return w.DialRelayed(w.a.Node, w.b.Node, w.relay(limited), TCP)
}

// direct connects a to b over the path between their k-th IPs, and returns a's side at
// once. There must be no other direct connection.
func (w *world) direct(tr Transport, k int) network.Conn {
	w.Helper()
	ctx, cancel := context.WithTimeout(w.ctx, 30*time.Second)
	defer cancel()
	c, err := w.a.Dial(ctx, w.b.Node, w.path(tr, k))
	require.NoError(w, err)
	return c
}

func (w *world) path(tr Transport, k int) Path {
	return Path{Transport: tr, From: w.a.IPs()[k], To: w.b.IPs()[k]}
}

// attempt dials over the path between the k-th IPs, from a to b, after a while.
func (w *world) attempt(tr Transport, k int, after time.Duration) Attempt {
	return Attempt{From: w.a.Node, To: w.b.Node, Path: w.path(tr, k), After: after}
}

// back is attempt from b to a.
func (w *world) back(tr Transport, k int, after time.Duration) Attempt {
	return Attempt{From: w.b.Node, To: w.a.Node, Path: Path{Transport: tr, From: w.b.IPs()[k], To: w.a.IPs()[k]}, After: after}
}

// dial makes all attempts in the background, which must succeed, and returns when the
// first connection is there and identified.
func (w *world) dial(attempts ...Attempt) {
	w.Helper()
	done := make(chan []error, 1)
	w.work.Go(func() { done <- w.DialTogether(attempts...) })
	w.work.Go(func() {
		for i, err := range <-done {
			if err != nil {
				w.Errorf("dial over %s: %v", attempts[i].Path, err)
			}
		}
	})
	w.until("the first connection", 10*time.Second, func() bool {
		return len(w.b.conns(w.a)) > 0 && len(w.a.conns(w.b)) > 0
	})
	w.a.AwaitIdentify(w.a.conns(w.b)[0])
	w.b.AwaitIdentify(w.b.conns(w.a)[0])
	time.Sleep(100 * time.Millisecond)
}

// doubled connects a and b over TCP between their first IPs, and over QUIC between their
// second ones, which b dials, after the given time. It returns when the first is there.
func (w *world) doubled(after time.Duration) {
	w.Helper()
	w.dial(w.attempt(TCP, 0, 0), w.back(QUIC, 1, after))
}

// until waits until cond holds.
func (w *world) until(what string, limit time.Duration, cond func() bool) {
	w.Helper()
	if !w.within(limit, cond) {
		w.Fatalf("not within %v: %s", limit, what)
	}
}

// within waits until cond holds, and says whether it does within a time.
func (w *world) within(limit time.Duration, cond func() bool) bool {
	for deadline := time.Now().Add(limit); !cond(); time.Sleep(20 * time.Millisecond) {
		if !time.Now().Before(deadline) {
			return false
		}
	}
	return true
}

// conns returns e's open connections to other.
func (e *end) conns(other *end) []network.Conn {
	return slices.DeleteFunc(e.Network().ConnsToPeer(other.ID()), network.Conn.IsClosed)
}

// on returns e's connection to other over a transport; nil: none. A relayed one is no TCP.
func (e *end) on(tr Transport, other *end) network.Conn {
	for _, c := range e.conns(other) {
		var has policy.Candidate
		has.SetAddr(c.RemoteMultiaddr())
		if !has.Relayed && (has.Transport == policy.QUIC) == (tr == QUIC) {
			return c
		}
	}
	return nil
}

// isRelayed says whether a connection passes through a relay.
func isRelayed(c network.Conn) bool {
	return strings.Contains(c.RemoteMultiaddr().String(), "/p2p-circuit")
}

// migrations returns how often a stream has moved.
func migrations(s network.Stream) int {
	if l, ok := s.(*migrate.Stream); ok {
		return l.Migrations()
	}
	return 0
}

// name names a connection in a failure.
func name(c network.Conn) string {
	via := c.RemoteMultiaddr().String()
	if isRelayed(c) {
		via = "a relay"
	}
	return fmt.Sprintf("%s (%s)", via, c.ID())
}

func names(conns []network.Conn) string {
	var all []string
	for _, c := range conns {
		all = append(all, name(c))
	}
	return fmt.Sprintf("%d connections: %s", len(all), strings.Join(all, ", "))
}

// drop reads a stream until it fails.
func drop(s network.Stream) { _, _ = io.Copy(io.Discard, s) }
