package connmgr

import (
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-yamux/v5"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
	"github.com/quic-go/quic-go"
)

// What a policy may ask for and a connection does not tell by itself: round-trip times,
// network interfaces.

// pinged notes what a ping took. It must be called with the peer's lock held.
func (cs *connState) pinged(took time.Duration) {
	took = max(took, 1)
	cs.rttAt = time.Now()
	if cs.rtt == 0 {
		cs.rtt = took
	} else {
		cs.rtt = (7*cs.rtt + took) / 8 // as TCP does, RFC 6298
	}
}

// transportRTT returns the smoothed round-trip time that c's transport has measured, or
// 0. Through a relay it is that to the peer, not to the relay.
func transportRTT(c network.Conn) time.Duration {
	var q *quic.Conn
	if c.As(&q) {
		return q.ConnectionStats().SmoothedRTT
	}
	var y *yamux.Session
	if c.As(&y) {
		return y.RTT()
	}
	return 0
}

// measure fills in the round-trip times of v's candidates: of all, or of none, since a
// policy cannot compare what it knows with what it does not. It must be called with the
// peer's lock held; measured are those of the transports.
func (v *view) measure(measured []time.Duration) {
	for i := range v.conns {
		rtt := measured[i]
		if rtt == 0 {
			rtt = v.conns[i].rtt
		}
		if v.conns[i].facts.candidate.RTT = rtt; rtt == 0 {
			for j := range v.conns[:i] {
				v.conns[j].facts.candidate.RTT = 0
			}
			return
		}
	}
}

// interfaces knows which network interface has an address. The zero value is ready.
type interfaces struct {
	mu    sync.Mutex
	read  time.Time
	names map[netip.Addr]string
}

// of returns the name of the interface that has the IP of a, or "". now is the time.
func (in *interfaces) of(a ma.Multiaddr, now time.Time) string {
	if a == nil {
		return ""
	}
	ip, err := manet.ToIP(a)
	if err != nil {
		return ""
	}
	addr, _ := netip.AddrFromSlice(ip)
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.names == nil || now.Sub(in.read) >= interfacesAge {
		in.names, in.read = make(map[netip.Addr]string), now
		all, _ := net.Interfaces()
		for _, i := range all {
			addrs, _ := i.Addrs()
			for _, a := range addrs {
				if prefix, err := netip.ParsePrefix(a.String()); err == nil {
					in.names[prefix.Addr().Unmap()] = i.Name
				}
			}
		}
	}
	return in.names[addr.Unmap()]
}
