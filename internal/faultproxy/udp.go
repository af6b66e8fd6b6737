package faultproxy

import (
	"net"
	"net/netip"
	"sync"
	"time"

	manet "github.com/multiformats/go-multiaddr/net"
)

// udpForwarder is a UDP proxy. Each dialler has a socket of its own towards the target.
type udpForwarder struct {
	p      *Proxy
	near   *net.UDPConn // diallers send here
	target *net.UDPAddr

	mu     sync.Mutex // guards all below
	routes map[netip.AddrPort]*route
	over   bool
}

// route is the path of one dialler.
type route struct {
	dialler netip.AddrPort
	far     *net.UDPConn
	out, in chan packet // towards the target, and back
}

var epoch = time.Unix(0, 0)

// inFlight is how many datagrams may be under way in one direction. What comes beyond
// that is lost, as it would be in a router.
const inFlight = 4096

func (p *Proxy) listenUDP(target *net.UDPAddr) error {
	near, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return err
	}
	_ = near.SetReadBuffer(1 << 20)
	if p.addr, err = manet.FromNetAddr(near.LocalAddr()); err != nil {
		return err
	}
	f := &udpForwarder{p: p, near: near, target: target, routes: make(map[netip.AddrPort]*route)}
	p.forward = f
	p.wg.Add(1)
	go f.fromDiallers()
	return nil
}

func (f *udpForwarder) fromDiallers() {
	defer f.p.wg.Done()
	buf := make([]byte, 64<<10)
	busy := epoch
	for {
		n, from, err := f.near.ReadFromUDPAddrPort(buf)
		if err != nil {
			if f.isOver() {
				return
			}
			continue
		}
		r := f.route(from)
		if r == nil {
			return
		}
		f.queue(r.out, buf[:n], &busy)
	}
}

func (f *udpForwarder) fromTarget(r *route) {
	defer f.p.wg.Done()
	defer close(r.in)
	buf := make([]byte, 64<<10)
	busy := epoch
	for {
		n, err := r.far.Read(buf)
		if err != nil {
			if f.isOver() {
				return
			}
			continue // a closed port at the target
		}
		f.queue(r.in, buf[:n], &busy)
	}
}

// queue takes a datagram, if the path is not frozen and not full.
func (f *udpForwarder) queue(to chan packet, b []byte, busy *time.Time) {
	if f.p.isFrozen() {
		f.p.lost.Add(1)
		return
	}
	select {
	case to <- packet{append([]byte(nil), b...), f.p.due(busy, len(b))}:
	default:
		f.p.lost.Add(1)
	}
}

func (f *udpForwarder) deliver(d Direction, queue <-chan packet, write func([]byte) error) {
	defer f.p.wg.Done()
	for {
		select {
		case pkt, ok := <-queue:
			if !ok || !f.p.until(pkt.due) {
				return
			}
			if f.p.isFrozen() {
				f.p.lost.Add(1)
				continue
			}
			f.p.passed[d].Add(int64(len(pkt.b)))
			if write(pkt.b) != nil {
				f.p.passed[d].Add(-int64(len(pkt.b)))
			}
		case <-f.p.done:
			return
		}
	}
}

// route returns the path of a dialler. It returns nil when the proxy is over.
func (f *udpForwarder) route(dialler netip.AddrPort) *route {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.over {
		return nil
	}
	if r := f.routes[dialler]; r != nil {
		return r
	}
	far, err := net.DialUDP("udp4", nil, f.target)
	if err != nil {
		return nil
	}
	_ = far.SetReadBuffer(1 << 20)
	r := &route{dialler: dialler, far: far, out: make(chan packet, inFlight), in: make(chan packet, inFlight)}
	f.routes[dialler] = r
	f.p.dials.Add(1)
	f.p.wg.Add(3)
	go f.fromTarget(r)
	go f.deliver(ToTarget, r.out, func(b []byte) error { _, err := r.far.Write(b); return err })
	go f.deliver(ToDialler, r.in, func(b []byte) error { _, err := f.near.WriteToUDPAddrPort(b, dialler); return err })
	return r
}

func (f *udpForwarder) isOver() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.over
}

// end does nothing: datagrams have no end.
func (f *udpForwarder) end(Direction) {}

func (f *udpForwarder) cut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.over = true
	_ = f.near.Close()
	for _, r := range f.routes {
		_ = r.far.Close()
	}
}
