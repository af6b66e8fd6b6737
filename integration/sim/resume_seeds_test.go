package sim

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/migrate"
)

// Seeds of streams that outlive their connections. As in seeds_test.go one seed is one run;
// what goes wrong here are connections, at any step and at both ends, and the hosts themselves
// dial again. What must come of it: a stream that nobody has ended on purpose arrives whole, both
// ways. Of one that somebody has, nothing is doubled, reordered or missing behind a clean end.
//
//	go test ./integration/sim -run TestResumeSeeds -seed=N
//	go test ./integration/sim -run TestResumeSeeds -seeds=N -from=M

// lossPlan is all that follows from a seed.
type lossPlan struct {
	seed    uint64
	swapped bool
	via     [2]string
	joined  bool  // both connections are there from the beginning
	relay   int64 // what a relay lets through on the only connection, in bytes; 0: there is none
	oneWay  [2]time.Duration
	denies  [2]bool // migrations, which harms no stream
	lacks   [2]lack // resumption
	streams []lossyStream
	events  []lossEvent
}

type lossyStream struct {
	at     time.Duration
	opener int
	size   [2]int
	chunk  int
	buffer int
	pause  [2]time.Duration // between Writes, and between Reads
	ends   lossyEnd
	known  bool // the opener knows from identify that the acceptor speaks its protocol
}

// lossyEnd is how the applications of a stream end it.
type lossyEnd string

const (
	endsBoth    lossyEnd = "each ends its writing, reads to the end, and closes"
	endsRequest lossyEnd = "request, end, reply, end"
	endsClose   lossyEnd = "the opener writes and closes at once"
	endsDrop    lossyEnd = "the acceptor closes its reading half way"
)

// lack is since when an end is without resumption: its streams end with their connections, and
// no others do.
type lack string

const (
	lacksNever   lack = ""
	lacksAlways  lack = "from the beginning"
	lacksLater   lack = "since its restart" // an older version of the program, say
	lacksEarlier lack = "until its restart"
)

// at says whether an end is without resumption.
func (l lack) at(restarted bool) bool {
	return l == lacksAlways || l == lacksLater && restarted || l == lacksEarlier && !restarted
}

type lossEvent struct {
	at     time.Duration
	what   lossKind
	path   int
	side   int
	stream int
	last   time.Duration
}

type lossKind string

const (
	lossCut     lossKind = "cut"
	lossCutEnd  lossKind = "cut at one end"
	lossFreeze  lossKind = "freeze"
	lossVanish  lossKind = "vanish"
	lossReset   lossKind = "reset of an underlying stream"
	lossMigrate lossKind = "migrate"
	lossDial    lossKind = "dial"
	lossLeave   lossKind = "leave a path that lives"
	lossRelay   lossKind = "relay closes"
	endStop     lossKind = "stop of a host"
	endRestart  lossKind = "restart of a host"
	endCrash    lossKind = "crash and restart of a host" // the other end hears nothing of it
	endClose    lossKind = "close of the connection"
	endReset    lossKind = "reset by the application"
)

func (e lossEvent) String() string {
	return fmt.Sprintf("at %v %s: path %d, side %s, stream %d, %v", e.at, e.what, e.path, sideName(e.side), e.stream, e.last)
}

func lossPlanOf(seed uint64) lossPlan {
	r := rand.New(rand.NewPCG(seed, nameHash("loss")))
	p := lossPlan{seed: seed, swapped: chance(r, 0.5), joined: chance(r, 0.6)}
	for i := range p.via {
		p.via[i] = pick(r, tcp, quic)
		p.oneWay[i] = pick(r, 100*time.Microsecond, ms(5), ms(20), ms(60))
	}
	if chance(r, 0.15) {
		p.relay = 20_000 + r.Int64N(400_000)
	}
	horizon := pick(r, 300*time.Millisecond, time.Second, 5*time.Second, 20*time.Second)
	for range 1 + r.IntN(4) {
		s := lossyStream{
			at: upTo(r, horizon/2), opener: r.IntN(2), chunk: pick(r, 1, 300, 5000, 60_000), buffer: pick(r, 100, 4096, 64<<10),
			ends: pick(r, endsBoth, endsBoth, endsRequest, endsClose, endsDrop), known: chance(r, 0.6),
		}
		for side := range s.size {
			s.size[side] = r.IntN(1 + pick(r, 0, 1, 500, 30_000, 300_000, 1_500_000))
		}
		if s.ends == endsDrop { // what nobody reads fills yamux's window, for ever
			s.size[s.opener] = min(s.size[s.opener], 200_000)
		}
		largest := max(s.size[0], s.size[1], 1)
		s.chunk, s.buffer = max(s.chunk, largest/200), max(s.buffer, largest/200)
		for i, calls := range [2]int{largest / s.chunk, largest / s.buffer} {
			if chance(r, 0.7) {
				// Who reads nothing for longer than the patience may lose what a writer has closed.
				s.pause[i] = min(upTo(r, 1+4*horizon/time.Duration(1+calls)), 10*time.Second)
			}
		}
		p.streams = append(p.streams, s)
	}
	for range r.IntN(8) {
		e := lossEvent{
			at: upTo(r, horizon*5/4), path: r.IntN(2), side: r.IntN(2), stream: r.IntN(len(p.streams)),
			what: pick(r, lossCut, lossCut, lossCut, lossCutEnd, lossCutEnd, lossFreeze, lossVanish, lossReset, lossMigrate, lossMigrate, lossDial, lossDial, lossLeave, lossRelay),
			last: pick(r, upTo(r, time.Second), upTo(r, 20*time.Second)),
		}
		p.events = append(p.events, e)
		for chance(r, 0.3) { // soon after
			e.at += upTo(r, pick(r, ms(1), ms(100), time.Second))
			e.what, e.side, e.path = pick(r, lossCut, lossCutEnd, lossReset, lossMigrate, lossDial, lossLeave, lossLeave), r.IntN(2), r.IntN(2)
			p.events = append(p.events, e)
		}
	}
	if chance(r, 0.15) {
		p.events = append(p.events, lossEvent{
			at: upTo(r, horizon), what: pick(r, endClose, endReset, endReset, endStop), path: r.IntN(2), side: r.IntN(2), stream: r.IntN(len(p.streams)),
		})
	}
	if chance(r, 0.15) {
		p.events = append(p.events, lossEvent{
			at: upTo(r, horizon), what: pick(r, endRestart, endCrash), path: r.IntN(2), side: r.IntN(2), last: pick(r, upTo(r, time.Second), upTo(r, 40*time.Second)),
		})
	}
	for side := range p.denies {
		p.denies[side] = chance(r, 0.1)
	}
	if chance(r, 0.15) {
		p.lacks[r.IntN(2)] = pick(r, lacksAlways, lacksLater, lacksEarlier)
	}
	if slices.ContainsFunc(p.events, func(e lossEvent) bool { return e.what == lossReset }) {
		// A reset is noticed when the underlying stream is read next: not while the application has
		// what a migration has read ahead. The writer, if it has closed, must be there still.
		for i, s := range p.streams {
			calls := max(s.size[0], s.size[1], 1)/s.buffer + 1
			p.streams[i].pause[1] = min(s.pause[1], 20*time.Second/time.Duration(calls))
		}
	}
	return p
}

// outlives says whether stream i has to arrive whole: it was opened between two ends that have
// resumption.
func (p lossPlan) outlives(i int) bool {
	restarted := [2]bool{}
	for _, e := range p.events {
		if e.what == endRestart || e.what == endCrash {
			restarted[e.side] = e.at < p.streams[i].at
		}
	}
	return !p.lacks[0].at(restarted[0]) && !p.lacks[1].at(restarted[1])
}

func (p lossPlan) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "swapped %t, joined %t, relay %d, via %v, one way %v, denies %v, lacks resumption %q\n", p.swapped, p.joined, p.relay, p.via, p.oneWay, p.denies, p.lacks)
	for i, s := range p.streams {
		fmt.Fprintf(&b, "stream %d: at %v, %s opens, %v bytes, Write %d, Read %d, pauses %v; %s\n", i, s.at, sideName(s.opener), s.size, s.chunk, s.buffer, s.pause, s.ends)
	}
	for _, e := range p.events {
		fmt.Fprintln(&b, e)
	}
	return b.String()
}

// lossy is a run.
type lossy struct {
	*lasting
	plan  lossPlan
	relay *Node
	start time.Time
	tally *tally
	tasks

	running sync.Mutex // guards nodes and hosts

	mu       sync.Mutex // guards all below
	log      []string
	failures []string
	ended    map[int]string // streams that somebody has ended on purpose
	accepted map[int]bool   // streams whose acceptor has them
	opened   map[int]bool   // and whose opener
	open     map[int][2]network.Stream
	harmed   bool // something has happened to a connection
}

func (w *lossy) logf(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.log = append(w.log, fmt.Sprintf("%12.3fms  ", float64(time.Since(w.start))/1e6)+fmt.Sprintf(format, args...))
}

func (w *lossy) failf(format string, args ...any) {
	w.logf("FAILURE "+format, args...)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.failures = append(w.failures, fmt.Sprintf(format, args...))
}

func (p lossPlan) run(t *testing.T, tally *tally) {
	Run(t, func(t *testing.T, n *Net) {
		w := &lossy{plan: p, start: time.Now(), tally: tally, ended: make(map[int]string),
			accepted: make(map[int]bool), opened: make(map[int]bool), open: make(map[int][2]network.Stream)}
		w.lasting = &lasting{Net: n, t: t, swapped: p.swapped}
		for side := range 2 {
			w.boot(side, false)
		}
		for i := range p.streams {
			if !p.outlives(i) {
				w.ended[i] = "an end has no resumption"
				w.tally.add("streams with an end that has no resumption", 1)
			}
		}
		defer w.report()
		for i := range 2 {
			n.SetLatency(w.ip(0, i), w.ip(1, i), p.oneWay[i])
		}
		path := func(i int) Path {
			return Path{Transport: Transport(p.via[i]), From: w.ip(0, i), To: w.ip(1, i)}
		}
		for i, s := range p.streams {
			if s.known {
				w.handle(i)
			}
		}
		if p.relay > 0 {
			w.relay = n.NewRelay(ipRelay, relay.WithLimit(&relay.RelayLimit{Duration: time.Hour, Data: p.relay}))
			n.DialRelayed(w.node(0), w.node(1), w.relay, Transport(p.via[0]))
		} else if p.joined {
			back := path(1)
			back.From, back.To = back.To, back.From
			n.Join(w.node(0), w.node(1), path(0), back)
		} else {
			n.Dial(w.node(0), w.node(1), path(0))
		}
		time.Sleep(time.Second)
		w.start = time.Now()
		for i, s := range p.streams {
			if !s.known {
				w.handle(i)
			}
			w.task(fmt.Sprintf("stream %d: opener", i), func() {
				time.Sleep(s.at)
				ctx := network.WithAllowLimitedConn(t.Context(), "test")
				u, err := w.host(s.opener).NewStream(ctx, w.node(1-s.opener).ID(), lossyID(i))
				if err != nil {
					w.logf("stream %d: not opened: %v", i, err)
					return
				}
				w.apply(i, s.opener, u)
			})
		}
		for _, e := range p.events {
			w.task(e.String(), func() { time.Sleep(e.at); w.inflict(e) })
		}
		w.finish()
		if os.Getenv("LOSSY_LOG") != "" || *seedFlag != 0 {
			t.Log(p.String() + "\n" + strings.Join(w.log, "\n"))
		}
	})
	tally.add("runs", 1)
}

// handle serves stream i.
func (w *lossy) handle(i int) {
	side := 1 - w.plan.streams[i].opener
	w.host(side).SetStreamHandler(lossyID(i), func(u network.Stream) {
		w.mu.Lock()
		w.accepted[i] = true
		w.mu.Unlock()
		w.task(fmt.Sprintf("stream %d: acceptor", i), func() { w.apply(i, side, u) })
	})
}

func lossyID(i int) protocol.ID { return protocol.ID(fmt.Sprintf("/sim/%d", i)) }

// lineWriter is a zapcore.WriteSyncer.
type lineWriter func(line string)

func (w lineWriter) Write(p []byte) (int, error) {
	w(strings.TrimSpace(string(p)))
	return len(p), nil
}
func (lineWriter) Sync() error { return nil }

// boot starts a side, which may have been stopped.
func (w *lossy) boot(side int, again bool) {
	node := w.NewNode([]string{w.ip(side, 0), w.ip(side, 1)}, unlimited(w.t))
	var opts []migrate.Option
	if !w.plan.lacks[side].at(again) {
		opts = append(opts, migrate.WithResumption())
	}
	if w.plan.denies[side] {
		opts = append(opts, migrate.WithAcceptor(func(*migrate.Stream, network.Conn) bool { return false }))
	}
	if *seedFlag != 0 {
		lines := lineWriter(func(line string) { w.logf("%s: %s", sideName(side), line) })
		opts = append(opts, migrate.WithLogger(zap.New(zapcore.NewCore(zapcore.NewConsoleEncoder(zapcore.EncoderConfig{MessageKey: "m"}), lines, zap.DebugLevel))))
	}
	h, err := migrate.Wrap(node, opts...)
	require.NoError(w.t, err)
	w.t.Cleanup(func() { _ = h.Close() })
	w.running.Lock()
	defer w.running.Unlock()
	w.nodes[side], w.hosts[side] = node, h
}

func (w *lossy) node(side int) *Node {
	w.running.Lock()
	defer w.running.Unlock()
	return w.nodes[side]
}

func (w *lossy) host(side int) *migrate.Host {
	w.running.Lock()
	defer w.running.Unlock()
	return w.hosts[side]
}

// restart ends a side's process and starts it again with the same key. Streams that are there
// end; those that come later are as any other.
func (w *lossy) restart(e lossEvent) {
	w.mu.Lock()
	until := time.Since(w.start) + e.last + 10*time.Second // a dial, and identify
	for i, s := range w.plan.streams {
		if s.at < until {
			w.ended[i] = "a host was restarted"
		}
	}
	w.mu.Unlock()
	if e.what == endCrash {
		for i := range 2 {
			w.Freeze(w.ip(0, i), w.ip(1, i))
		}
	}
	w.node(e.side).Stop()
	time.Sleep(e.last)
	for i := range 2 {
		w.Sever(w.ip(0, i), w.ip(1, i)) // sockets of the old process, such as a dial's that was under way
	}
	w.boot(e.side, true)
	for i := range w.plan.streams {
		if w.plan.streams[i].opener != e.side {
			w.handle(i)
		}
	}
	for i := range 2 {
		w.Thaw(w.ip(0, i), w.ip(1, i))
	}
	ctx, cancel := context.WithTimeout(w.t.Context(), 5*time.Second)
	defer cancel()
	_, err := w.node(e.side).Dial(ctx, w.node(1-e.side), Path{Transport: Transport(w.plan.via[e.path]), From: w.ip(e.side, e.path), To: w.ip(1-e.side, e.path)})
	w.logf("dialled after the restart: %v", err)
}

func (l *lasting) ip(side, path int) string {
	if l.swapped {
		side = 1 - side
	}
	return fmt.Sprintf("1.0.%d.%d", side, path+1)
}

// conns are the connections of a side over a path.
func (w *lossy) conns(side, path int) (conns []network.Conn) {
	for _, c := range w.node(side).Network().ConnsToPeer(w.node(1 - side).ID()) {
		if strings.HasPrefix(c.RemoteMultiaddr().String(), "/ip4/"+w.ip(1-side, path)+"/") {
			conns = append(conns, c)
		}
	}
	return conns
}

func (w *lossy) inflict(e lossEvent) {
	w.logf("EVENT %s", e)
	w.tally.add(string(e.what), 1)
	w.mu.Lock()
	w.harmed = true
	w.mu.Unlock()
	switch e.what {
	case lossCut, lossCutEnd:
		for _, c := range w.conns(e.side, e.path) {
			if isQUIC(c) {
				_ = c.CloseWithError(network.ConnSupplanted)
				continue
			}
			from, to := addrIP(c.LocalMultiaddr().String()), addrIP(c.RemoteMultiaddr().String())
			if e.what == lossCut {
				w.Sever(from, to)
			} else {
				w.SeverEnd(from, to)
			}
		}
	case lossFreeze, lossVanish:
		w.Freeze(w.ip(0, e.path), w.ip(1, e.path))
		if e.what == lossVanish {
			for _, c := range w.conns(e.side, e.path) {
				_ = c.CloseWithError(network.ConnSupplanted)
			}
		}
		time.Sleep(e.last)
		w.Thaw(w.ip(0, e.path), w.ip(1, e.path))
	case lossReset:
		for _, c := range w.conns(e.side, e.path) {
			for _, u := range c.GetStreams() {
				if u.Protocol() == lossyID(e.stream) {
					w.logf("stream %d: underlying stream reset", e.stream)
					_ = u.ResetWithError(network.StreamSupplanted)
				}
			}
		}
	case lossMigrate:
		w.mu.Lock()
		u := w.open[e.stream][e.side]
		w.mu.Unlock()
		conns := w.conns(e.side, e.path)
		if u == nil || len(conns) == 0 {
			return
		}
		ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
		defer cancel()
		err := w.host(e.side).Migrate(ctx, u, conns[0])
		w.logf("stream %d: migrated by %s: %v", e.stream, sideName(e.side), err)
		if err == nil {
			w.tally.add("migrations", 1)
		}
	case lossDial:
		ctx, cancel := context.WithTimeout(w.t.Context(), 5*time.Second)
		defer cancel()
		_, err := w.node(e.side).Dial(ctx, w.node(1-e.side), Path{Transport: Transport(w.plan.via[e.path]), From: w.ip(e.side, e.path), To: w.ip(1-e.side, e.path)})
		w.logf("dialled: %v", err)
	case lossLeave:
		if len(w.conns(e.side, 1-e.path)) == 0 {
			return // it is for connections beside one that works
		}
		for _, c := range w.conns(e.side, e.path) {
			w.host(e.side).Leave(c)
		}
	case lossRelay:
		if w.relay != nil {
			_ = w.relay.Network().ClosePeer(w.node(e.side).ID())
		}
	case endStop:
		w.mu.Lock()
		for i := range w.plan.streams {
			w.ended[i] = "a host was stopped"
		}
		w.mu.Unlock()
		w.node(e.side).Stop()
	case endRestart, endCrash:
		w.restart(e)
	case endClose:
		for _, c := range w.conns(e.side, e.path) {
			w.mu.Lock()
			for i := range w.plan.streams {
				w.ended[i] = "a connection was closed"
			}
			w.mu.Unlock()
			_ = c.Close()
		}
	case endReset:
		w.mu.Lock()
		u := w.open[e.stream][e.side]
		w.ended[e.stream] = "the application has reset it"
		w.mu.Unlock()
		if u != nil {
			_ = u.Reset()
		}
	}
}

func isQUIC(c network.Conn) bool { return strings.Contains(c.RemoteMultiaddr().String(), "quic") }

func addrIP(m string) string { return strings.Split(m, "/")[2] }

// apply runs the application of an end.
func (w *lossy) apply(i, side int, u network.Stream) {
	s := w.plan.streams[i]
	w.tally.add("ends of streams", 1)
	w.mu.Lock()
	both := w.open[i]
	both[side] = u
	w.open[i] = both
	if side == s.opener {
		w.opened[i] = true
	}
	w.mu.Unlock()
	opener := side == s.opener
	var read, write int // bytes
	read, write = s.size[1-side], s.size[side]
	var sent, received error
	var eof bool
	var got []byte
	send := func() {
		data := lossyData(i, side, write)
		for len(data) > 0 {
			n, err := u.Write(data[:min(len(data), s.chunk)])
			if sent = err; err != nil {
				return
			}
			data = data[n:]
			w.pause(s.pause[0])
		}
		sent = u.CloseWrite()
	}
	fetch := func(most int) {
		p := make([]byte, s.buffer)
		for len(got) < most {
			n, err := u.Read(p[:min(len(p), most-len(got))])
			got = append(got, p[:n]...)
			if err != nil {
				if eof = err == io.EOF; !eof {
					received = err
				}
				return
			}
			w.pause(s.pause[1])
		}
	}
	const all = 1 << 40
	wants := true // to read everything
	switch s.ends {
	case endsRequest:
		if opener {
			send()
			fetch(all)
		} else {
			fetch(all)
			send()
		}
	case endsClose:
		if opener {
			send()
			wants = false
		} else {
			fetch(all)
		}
	default:
		var wg sync.WaitGroup
		wg.Go(send)
		if s.ends == endsDrop && !opener {
			fetch(read / 2)
			_ = u.CloseRead()
			wants = false
		} else {
			fetch(all)
		}
		wg.Wait()
	}
	closing := u.Close()
	w.logf("stream %d: %s is done: sent %v, received %d of %d bytes, EOF %t, %v; closed: %v", i, sideName(side), sent, len(got), read, eof, received, closing)
	if !bytes.HasPrefix(lossyData(i, 1-side, read), got) {
		w.failf("stream %d: %s has read something else than was written", i, sideName(side))
	}
	whole := len(got) == read
	silent := s.ends == endsClose && opener // nobody writes to it
	if s.ends == endsClose && !opener {
		sent = nil
	}
	// Of a stream that cannot outlive its connection yamux may end what is cut: see "What remains" of
	// docs/reliability.md.
	bare := !w.plan.outlives(i) && (w.plan.via[0] == tcp || w.plan.via[1] == tcp)
	if eof && !whole && !bare && !(s.ends == endsClose && opener) {
		w.failf("stream %d: %s has read a clean end after %d of %d bytes", i, sideName(side), len(got), read)
	}
	w.mu.Lock()
	ended, accepted := w.ended[i], w.accepted[i] && w.opened[i]
	w.mu.Unlock()
	if ended != "" || !accepted {
		return
	}
	if s.ends == endsDrop && opener {
		sent = nil // the other end reads no more, and may have closed
	}
	if sent != nil {
		w.failf("stream %d: %s cannot write: %v", i, sideName(side), sent)
	}
	if wants && !silent && (!eof || !whole) {
		w.failf("stream %d: %s has read %d of %d bytes, EOF %t: %v", i, sideName(side), len(got), read, eof, received)
	}
	w.tally.add("ends that were whole", 1)
}

// pause is one of an application, which hurries when the run is old.
func (w *lossy) pause(d time.Duration) {
	if time.Since(w.start) < 2*time.Minute {
		time.Sleep(d)
	}
}

// lossyData is what a side writes to a stream.
func lossyData(i, side, size int) []byte {
	p := make([]byte, size)
	r := rand.New(rand.NewPCG(uint64(i), uint64(side)))
	for at := 0; at < size; at += 8 {
		v := r.Uint64()
		for k := 0; k < 8 && at+k < size; k++ {
			p[at+k] = byte(v >> (8 * k))
		}
	}
	return p
}

// finish waits until all has ended, and looks at what is left.
func (w *lossy) finish() {
	wait := func(limit time.Duration, condition func() bool) bool {
		end := time.Now().Add(limit)
		for !condition() {
			if time.Now().After(end) {
				return false
			}
			time.Sleep(200 * time.Millisecond)
		}
		return true
	}
	if !wait(15*time.Minute, func() bool { return len(w.unfinished()) == 0 }) {
		w.failf("does not end: %s\n%s", strings.Join(w.unfinished(), "; "), stacksIn("integration/sim.(*lossy)", "portage/migrate."))
		for side := range 2 {
			w.node(side).Stop()
		}
		synctest.Wait()
		return
	}
	w.logf("all are done")
	var left string
	nothing := func() bool {
		left = ""
		for side := range 2 {
			if n := labelsOf(w.host(side)); n > 0 {
				left += fmt.Sprintf("%s: %d peers in the table of labels\n", sideName(side), n)
			}
			if n := resumerOf(w.host(side)); n > 0 {
				left += fmt.Sprintf("%s: %d peers with resumable streams\n", sideName(side), n)
			}
		}
		return left == ""
	}
	if !wait(4*time.Minute, nothing) {
		w.failf("remains: %s", left)
	}
	time.Sleep(2 * time.Minute) // until the ends of connections that have vanished know
	if stacks := stacksIn("portage/migrate."); stacks != "" {
		w.failf("remains: goroutines\n%s", stacks)
	}
	for side := range 2 {
		for _, p := range w.node(side).Network().Peers() {
			_ = w.node(side).Network().ClosePeer(p)
		}
	}
	empty := func() bool {
		left = ""
		for side := range 2 {
			_ = w.node(side).Network().ResourceManager().ViewSystem(func(s network.ResourceScope) error {
				if stat := s.Stat(); stat != (network.ScopeStat{}) {
					left += fmt.Sprintf("%s: %+v\n", sideName(side), stat)
				}
				return nil
			})
		}
		return left == ""
	}
	if !wait(2*time.Minute, empty) {
		w.failf("remains: resources %s", left)
	}
}

// resumerOf is how many peers a host has resumable streams with.
func resumerOf(h *migrate.Host) int {
	rs := reflect.ValueOf(h).Elem().FieldByName("resumer").Elem()
	if !rs.IsValid() {
		return 0 // it has no resumption
	}
	mu := rs.FieldByName("mu")
	guard := reflect.NewAt(mu.Type(), mu.Addr().UnsafePointer()).Interface().(*sync.Mutex)
	guard.Lock()
	defer guard.Unlock()
	return rs.FieldByName("peers").Len()
}

func (w *lossy) report() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.failures) > 0 {
		w.t.Errorf("To run it again:\n  go test ./integration/sim -run TestResumeSeeds -seed=%d\n\n%s\n%s\n\nWhat is wrong:\n  %s",
			w.plan.seed, w.plan, strings.Join(w.log, "\n"), strings.Join(w.failures, "\n  "))
	}
}

func TestResumeSeeds(t *testing.T) {
	runSeeds(t, 150, 0, func(t *testing.T, seed uint64, tally *tally) { lossPlanOf(seed).run(t, tally) })
}
