// Package faultproxy puts a path that can fail between two hosts on loopback. A host
// dials the proxy in place of the other; the proxy forwards what comes, TCP streams or
// UDP datagrams, until it is told to do worse:
//
//	p := faultproxy.New(t, b.Addr(t, hosttest.QUIC))
//	dial p.Addr()
//	p.Freeze()
//
//	dialler ---- Addr [ToTarget  ->] ---- target
//	                  [<- ToDialler]
//
// It knows nothing of what it forwards.
package faultproxy

import (
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

// Direction is one of the two that a path has.
type Direction int

// The directions of a path.
const (
	ToTarget Direction = iota
	ToDialler
)

// Proxy is one path. Its faults can be set at any time, by anyone.
type Proxy struct {
	addr    ma.Multiaddr
	stream  bool // TCP
	forward interface {
		cut()
		end(Direction)
	}
	wg sync.WaitGroup // everything that the proxy runs

	passed [2]atomic.Int64
	dials  atomic.Int64
	lost   atomic.Int64

	mu     sync.Mutex    // guards all below
	frozen chan struct{} // closed by Thaw; nil: not frozen
	done   chan struct{} // closed by Cut and Close
	over   bool
	delay  time.Duration
	rate   int // bytes a second; 0: no limit
}

// New returns a proxy that forwards to target, an IP address with a TCP or UDP port, and
// whatever follows. It is closed with the test.
func New(t testing.TB, target ma.Multiaddr) *Proxy {
	t.Helper()
	netAddr, err := manet.ToNetAddr(transportPart(target))
	if err != nil {
		t.Fatalf("proxy to %s: %v", target, err)
	}
	p := &Proxy{done: make(chan struct{})}
	switch a := netAddr.(type) {
	case *net.TCPAddr:
		p.stream = true
		err = p.listenTCP(a.String())
	case *net.UDPAddr:
		err = p.listenUDP(a)
	default:
		err = fmt.Errorf("neither TCP nor UDP")
	}
	if err != nil {
		t.Fatalf("proxy to %s: %v", target, err)
	}
	p.addr = withPort(target, p.addr)
	t.Cleanup(p.Close)
	return p
}

// Addr is the target's address with the proxy's port: the address to dial.
func (p *Proxy) Addr() ma.Multiaddr { return p.addr }

// Datagrams says whether the path carries UDP: its ends learn nothing of its faults.
func (p *Proxy) Datagrams() bool { return !p.stream }

// Passed is how many bytes the path has delivered in one direction.
func (p *Proxy) Passed(d Direction) int64 { return p.passed[d].Load() }

// Lost is how many datagrams the path has taken and will not deliver.
func (p *Proxy) Lost() int { return int(p.lost.Load()) }

// Dialled is how many TCP connections or UDP sockets have come to the path, let through
// or not. A path that is frozen holds a dial back: it can be seen here.
func (p *Proxy) Dialled() int { return int(p.dials.Load()) }

// Freeze makes the path pass nothing, and show nothing of it: TCP connections stay open
// and fill up, datagrams are lost.
func (p *Proxy) Freeze() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.frozen == nil {
		p.frozen = make(chan struct{})
	}
}

// Thaw ends Freeze.
func (p *Proxy) Thaw() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.frozen != nil {
		close(p.frozen)
		p.frozen = nil
	}
}

// Slow delays everything, and limits how many bytes a second pass in each direction. 0
// means no delay, or no limit.
func (p *Proxy) Slow(delay time.Duration, rate int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.delay, p.rate = delay, rate
}

// End ends one direction of every TCP connection, as if its sender had said that nothing
// follows, and passes nothing in it any more. The other direction goes on.
func (p *Proxy) End(d Direction) { p.forward.end(d) }

// Cut breaks the path for good: TCP connections are reset at both ends, datagrams find a
// closed port. Nobody can dial through it any more.
func (p *Proxy) Cut() {
	p.stop()
	p.forward.cut()
}

// Close ends the proxy. It returns when nothing of it is left.
func (p *Proxy) Close() {
	p.Cut()
	p.wg.Wait()
}

func (p *Proxy) stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.over {
		p.over = true
		close(p.done)
	}
}

func (p *Proxy) isFrozen() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.frozen != nil
}

// pass waits while the path is frozen. It says false when the path is over.
func (p *Proxy) pass() bool {
	for {
		p.mu.Lock()
		frozen := p.frozen
		p.mu.Unlock()
		if frozen == nil {
			select {
			case <-p.done:
				return false
			default:
				return true
			}
		}
		select {
		case <-frozen:
		case <-p.done:
			return false
		}
	}
}

// due says when n bytes that come now are to be delivered, behind those before them,
// which are through at busy.
func (p *Proxy) due(busy *time.Time, n int) time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.delay == 0 && p.rate == 0 {
		return time.Time{}
	}
	now := time.Now()
	if busy.Before(now) {
		*busy = now
	}
	if p.rate > 0 {
		*busy = busy.Add(time.Duration(n) * time.Second / time.Duration(p.rate))
	}
	return busy.Add(p.delay)
}

// until waits for a moment. It says false when the path is over first.
func (p *Proxy) until(moment time.Time) bool {
	if moment.IsZero() {
		return true
	}
	timer := time.NewTimer(time.Until(moment))
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-p.done:
		return false
	}
}

// packet is what is under way in one direction.
type packet struct {
	b   []byte
	due time.Time
}

// transportPart is the part of an address that ends with its port.
func transportPart(a ma.Multiaddr) ma.Multiaddr {
	head, _ := ma.SplitFunc(a, func(c ma.Component) bool {
		switch c.Protocol().Code {
		case ma.P_IP4, ma.P_IP6, ma.P_TCP, ma.P_UDP:
			return false
		}
		return true
	})
	return head
}

// withPort is target with the IP address and port of local.
func withPort(target, local ma.Multiaddr) ma.Multiaddr {
	_, tail := ma.SplitFunc(target, func(c ma.Component) bool {
		switch c.Protocol().Code {
		case ma.P_IP4, ma.P_IP6, ma.P_TCP, ma.P_UDP:
			return false
		}
		return true
	})
	if len(tail) == 0 {
		return local
	}
	return local.Encapsulate(tail)
}
