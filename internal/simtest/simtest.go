// Package simtest makes hosts on a network that exists in memory and in virtual time.
// A round trip takes exactly as long as the test says, on any machine and in next to no
// real time, so that tests can assert round trips rather than bounds.
//
//	simtest.Run(t, func(t *testing.T, n *simtest.Net) {
//		a := n.NewNode([]string{"1.0.0.1"})
//		b := n.NewNode([]string{"1.0.0.2", "1.0.0.3"})
//		n.SetLatency("1.0.0.1", "1.0.0.2", 10*time.Millisecond)
//		n.SetLatency("1.0.0.1", "1.0.0.3", 50*time.Millisecond)
//		fast, slow := n.Join(a, b,
//			simtest.Path{Transport: simtest.QUIC, From: "1.0.0.1", To: "1.0.0.2"},
//			simtest.Path{Transport: simtest.TCP, From: "1.0.0.3", To: "1.0.0.1"})
//	})
//
// The hosts are whole go-libp2p hosts: QUIC runs over packets (packet.go), security and
// yamux over streams of bytes that behave like TCP (tcp.go). Latency, black holes and
// byte counts are per pair of IPs, for both alike.
package simtest

import (
	"maps"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/marcopolo/simnet"
)

// Net is the network of one test. Safe for concurrent use.
type Net struct {
	t    *testing.T
	sim  *simnet.Simnet
	done chan struct{} // closed when the test ends

	wires sync.WaitGroup

	mu        sync.Mutex // guards all below; never held while time passes
	latency   map[link]time.Duration
	frozen    map[link]chan struct{} // closed when the link thaws
	narrow    map[link]narrowing
	rate      map[string]int // bits per second, by IP
	buffer    int
	sent      map[direction]Traffic
	watch     func(from, to string)
	listeners map[string]*listener
	tcp       map[*tcpConn]struct{} // both ends of every connection
	port      int
}

// link is an unordered pair of IPs: the lower one comes first.
type link [2]string

func between(a, b string) link {
	if b < a {
		a, b = b, a
	}
	return link{a, b}
}

type direction struct{ from, to string }

// Traffic is what was sent, with all headers but IP's, UDP's and TCP's. For TCP a packet
// is a write to the socket.
type Traffic struct{ Bytes, Packets int }

const (
	// defaultBuffer is what a TCP socket takes before it blocks: Linux's usual 4 MiB
	// at most, wmem_max of net.ipv4.tcp_wmem.
	defaultBuffer = 4 << 20

	// ending is how long a test that has ended waits, in virtual time, for what the
	// hosts leave to do in the background: longer than any timeout of theirs.
	ending = 5 * time.Minute
)

// Run runs f as a test in virtual time, on a network of its own, in which everything
// arrives at once until SetLatency says otherwise. Hosts are closed when f returns.
//
// Under the race detector the test is skipped, unless GOMAXPROCS is 1: else its runtime
// crashes on testing/synctest now and then.
func Run(t *testing.T, f func(t *testing.T, n *Net)) {
	t.Helper()
	if raceDetector && runtime.GOMAXPROCS(0) > 1 {
		t.Skip("virtual time crashes the race detector's runtime now and then (golang/go#78156), but with GOMAXPROCS=1")
	}
	synctest.Test(t, func(t *testing.T) {
		n := &Net{
			t:         t,
			done:      make(chan struct{}),
			latency:   make(map[link]time.Duration),
			frozen:    make(map[link]chan struct{}),
			narrow:    make(map[link]narrowing),
			rate:      make(map[string]int),
			buffer:    defaultBuffer,
			sent:      make(map[direction]Traffic),
			listeners: make(map[string]*listener),
			tcp:       make(map[*tcpConn]struct{}),
		}
		n.sim = newSimnet(n)
		n.sim.Start()
		// Runs after the hosts were closed: their clean-ups are registered later.
		t.Cleanup(func() {
			time.Sleep(ending) // virtual time ends with the test, and sleepers would be stuck
			close(n.done)
			n.hangUp()
			n.wires.Wait()
			n.sim.Close()
		})
		f(t, n)
	})
}

// SetLatency sets how long anything takes between two IPs, one way, in either direction.
// What is under way already is not affected.
func (n *Net) SetLatency(a, b string, oneWay time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.latency[between(a, b)] = oneWay
}

// SetBandwidth bounds what an IP can send and receive, each, in bits per second. It must
// be called before the node is made. Packets of QUIC share it, and are queued, and in
// the end dropped, where they are too many; for a TCP connection the slower of its two
// ends counts, and each direction of each connection has all of it.
func (n *Net) SetBandwidth(ip string, bitsPerSecond int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.rate[ip] = bitsPerSecond
}

// SetBuffer sets how many bytes a TCP socket takes that have not arrived yet. It holds
// for connections made afterwards.
func (n *Net) SetBuffer(bytes int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.buffer = bytes
}

// Freeze makes a black hole of the link between two IPs: nothing that is sent from now on
// arrives, and nobody is told. QUIC's packets are lost; TCP's bytes arrive after Thaw.
func (n *Net) Freeze(a, b string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if l := between(a, b); n.frozen[l] == nil {
		n.frozen[l] = make(chan struct{})
	}
}

// Thaw ends a Freeze.
func (n *Net) Thaw(a, b string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	l := between(a, b)
	if ch := n.frozen[l]; ch != nil {
		close(ch)
		delete(n.frozen, l)
	}
}

// narrowing is a link that does not carry what is large.
type narrowing struct {
	most    int
	widened chan struct{} // closed when it does again
}

// Narrow makes the link between two IPs swallow whatever is larger than most bytes, and
// nobody is told: a path whose MTU has become smaller without a word of it. Packets of
// QUIC are lost. On a TCP connection a burst (a write to the socket, of which up to 16 KiB
// travel together) is lost however often it is repeated, and nothing that was sent after
// it arrives before Widen.
func (n *Net) Narrow(a, b string, most int) {
	n.Widen(a, b)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.narrow[between(a, b)] = narrowing{most, make(chan struct{})}
}

// Widen ends a Narrow.
func (n *Net) Widen(a, b string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	l := between(a, b)
	if nw, ok := n.narrow[l]; ok {
		close(nw.widened)
		delete(n.narrow, l)
	}
}

// swallowed returns a channel that is closed when the link may carry so many bytes
// together, or nil where it does now.
func (n *Net) swallowed(from, to string, bytes int) <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	if nw, ok := n.narrow[between(from, to)]; ok && bytes > nw.most {
		return nw.widened
	}
	return nil
}

// hangUp ends the TCP connections that are left, as an operating system does: those that
// no host had accepted when it was closed.
func (n *Net) hangUp() {
	n.mu.Lock()
	left := slices.Collect(maps.Keys(n.tcp))
	n.mu.Unlock()
	for _, c := range left {
		c.sever()
	}
}

// Sever breaks all TCP connections between two IPs, at both ends at once. What is under
// way is lost.
func (n *Net) Sever(a, b string) {
	n.mu.Lock()
	var broken []*tcpConn
	for c := range n.tcp {
		if between(c.from, c.to) == between(a, b) {
			broken = append(broken, c)
		}
	}
	n.mu.Unlock()
	for _, c := range broken {
		c.sever()
	}
}

// SeverEnd breaks all TCP connections between two IPs at the end that is ip: there at
// once, and at the other end when the news arrive, which takes as long as anything. What
// is under way to ip is lost.
func (n *Net) SeverEnd(ip, other string) {
	n.mu.Lock()
	var broken []*tcpConn
	for c := range n.tcp {
		if c.from == ip && c.to == other {
			broken = append(broken, c)
		}
	}
	n.mu.Unlock()
	for _, c := range broken {
		c.sever()
	}
}

// Watch has f called whenever something is about to be sent: after it was counted, and
// before it is subject to Freeze. f is called concurrently, and must not block; nil ends
// it.
func (n *Net) Watch(f func(from, to string)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.watch = f
}

// Sent returns what has been sent from one IP to another, whether it arrived or not.
func (n *Net) Sent(from, to string) Traffic {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.sent[direction{from, to}]
}

func (n *Net) count(from, to string, bytes int) {
	n.mu.Lock()
	d := direction{from, to}
	s := n.sent[d]
	n.sent[d] = Traffic{s.Bytes + bytes, s.Packets + 1}
	watch := n.watch
	n.mu.Unlock()
	if watch != nil {
		watch(from, to)
	}
}

func (n *Net) delay(from, to string) time.Duration {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.latency[between(from, to)]
}

// thawed returns a channel that is closed when the link carries something again, or nil
// where it does now.
func (n *Net) thawed(from, to string) <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.frozen[between(from, to)]
}

// rateOf returns the bandwidth of an IP; false where it has no bound.
func (n *Net) rateOf(ip string) (bitsPerSecond int, bounded bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	r, ok := n.rate[ip]
	return r, ok
}
