package connmgr

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/p2p/protocol/ping"
	"github.com/libp2p/go-yamux/v5"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
	"github.com/quic-go/quic-go"
)

// Probing
//
// A connection whose path is gone looks like any other until its transport notices, which
// takes half a minute. A peer that has lost its network and reconnects has two connections
// then, and the older one is dead: were it to win, new streams would be sent there, and the
// only one that works would be closed. So a connection has to answer a ping before it wins
// over a newer one, and before another one is closed for it.

// probe sends a ping on c and returns how long the answer took, limited connection or
// not. A peer that does not serve ping answers, too.
func probe(ctx context.Context, c network.Conn) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	start := time.Now()
	s, err := openOn(ctx, c, ping.ID)
	switch {
	case isNotSupported(err):
		return time.Since(start), nil
	case err != nil:
		return 0, err
	}
	defer s.Reset()
	defer context.AfterFunc(ctx, func() { _ = s.Reset() })()
	start = time.Now()
	var buf [ping.PingSize]byte
	if _, err = s.Write(buf[:]); err == nil {
		_, err = io.ReadFull(s, buf[:])
	}
	if err != nil && ctx.Err() != nil {
		err = ctx.Err()
	}
	return time.Since(start), err
}

// answers says whether cs has answered since the given time, and asks it if need be. Only
// silence means no: an error says that something has been heard, or that asking was not
// possible here.
func (m *Manager) answers(ctx context.Context, cs *connState, since time.Time) bool {
	return m.answered(cs, since) || m.ask(ctx, cs, m.cfg.probeTime)
}

// answered says whether cs is known to have worked since the given time.
func (m *Manager) answered(cs *connState, since time.Time) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return !cs.alive.Before(since) || !cs.opened.Before(since)
}

// ask pings cs, and says whether it has answered within wait.
func (m *Manager) ask(ctx context.Context, cs *connState, wait time.Duration) bool {
	start := time.Now()
	limited, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	took, err := m.probeOn(limited, cs)
	silent := errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil
	m.mu.Lock()
	switch {
	case err == nil:
		cs.alive = start
		cs.pinged(took)
	case silent:
		cs.silent = time.Now()
	}
	m.mu.Unlock()
	if silent {
		m.logSilent(cs.conn.RemotePeer(), cs.info(), wait)
	}
	return !silent
}

// probeOn probes the connection, and counts the stream as ours.
func (m *Manager) probeOn(ctx context.Context, cs *connState) (time.Duration, error) {
	m.mu.Lock()
	cs.probes++
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		cs.probes--
		m.mu.Unlock()
	}()
	return m.probe(ctx, cs.conn)
}

// pinged notes what a ping took. It must be called with mu held.
func (cs *connState) pinged(took time.Duration) {
	took = max(took, 1)
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
// policy cannot compare what it knows with what it does not. It must be called with mu
// held; measured are those of the transports.
func (v *view) measure(measured []time.Duration) {
	for i := range v.conns {
		rtt := measured[i]
		if rtt == 0 {
			rtt = v.conns[i].rtt
		}
		if v.conns[i].candidate.RTT = rtt; rtt == 0 {
			for j := range v.conns[:i] {
				v.conns[j].candidate.RTT = 0
			}
			return
		}
	}
}

// ping measures what transports do not measure, if the policy looks at it: each connection
// once in rttInterval at most. It waits for the first measurement of a connection, since
// nothing should be decided without, and says whether there was one; later ones are made
// in the background.
func (m *Manager) ping(ctx context.Context, d *duplicates, v view) (first bool) {
	if !m.policy().use.RTT {
		return false
	}
	var wait sync.WaitGroup
	for _, cv := range v.conns {
		cs := cv.connState
		if transportRTT(cv.conn) != 0 {
			continue
		}
		m.mu.Lock()
		unknown := cs.rttAt.IsZero()
		due := !m.closed && !cs.pinging && (unknown || v.at.Sub(cs.rttAt) >= rttInterval)
		if due {
			cs.rttAt, cs.pinging = v.at, true
			m.wg.Add(1)
		}
		m.mu.Unlock()
		if !due {
			continue
		}
		if unknown {
			first = true
			wait.Add(1)
		}
		go func() {
			defer m.wg.Done()
			if unknown {
				defer wait.Done()
				m.ask(ctx, cs, m.cfg.probeTime)
			} else if took, err := m.probeOn(m.ctx, cs); err == nil {
				m.mu.Lock()
				cs.pinged(took)
				m.schedule(d, time.Now())
				m.mu.Unlock()
				m.wakeUp()
			}
			m.mu.Lock()
			cs.pinging = false
			m.mu.Unlock()
		}()
	}
	wait.Wait()
	return first
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
