package simtest

import (
	"log/slog"
	"net"
	"time"

	"github.com/libp2p/go-libp2p/p2p/transport/quicreuse"
	"github.com/marcopolo/simnet"
)

// Packets, for QUIC:
//
//	packetConn.WriteTo -> dropped where the link is frozen, or the packet too large for it
//	                   -> simnet: uplink queue, latency, downlink queue
//	                   -> packetConn.ReadFrom, some at a time

// unbounded is a link that lets everything pass at once. The burst, simnet's MTU, has to
// be more than a test sends: a link whose burst is used up and whose next packet takes
// less than a nanosecond gets stuck.
var unbounded = simnet.LinkSettings{BitsPerSecond: 100_000_000_000, MTU: 1 << 30}

func newSimnet(n *Net) *simnet.Simnet {
	return &simnet.Simnet{
		LatencyFunc: func(p *simnet.Packet) time.Duration {
			return n.delay(p.From.(*net.UDPAddr).IP.String(), p.To.(*net.UDPAddr).IP.String())
		},
		Logger: slog.New(slog.DiscardHandler), // packets to hosts that are closed
	}
}

// burst is how many packets a socket is given in one instant; the next one comes when
// nothing is left to do with them, a nanosecond later. quic-go drops what comes while 256
// packets of a connection wait (protocol.MaxConnUnprocessedPackets), and an instant takes
// as long as the machine likes: on a busy one, its reading goroutine would be given any
// number of packets before the connection's sees the first.
const burst = 128

// packetConn is a socket, read by one goroutine. An IP has 4 bytes here, always: simnet
// tells those of 4 and of 16 apart.
type packetConn struct {
	*simnet.SimConn
	net *Net
	ip  string

	instant time.Time // when the last packet was read
	count   int       // that were read in this instant
}

func (c *packetConn) ReadFrom(p []byte) (int, net.Addr, error) {
	if c.count == burst && time.Now().Equal(c.instant) {
		time.Sleep(time.Nanosecond)
	}
	n, from, err := c.SimConn.ReadFrom(p)
	if now := time.Now(); !now.Equal(c.instant) {
		c.instant, c.count = now, 0
	}
	c.count++
	return n, from, err
}

func (c *packetConn) WriteTo(p []byte, to net.Addr) (int, error) {
	dest := *to.(*net.UDPAddr)
	dest.IP = dest.IP.To4()
	ip := dest.IP.String()
	c.net.count(c.ip, ip, len(p))
	if c.net.thawed(c.ip, ip) != nil || c.net.swallowed(c.ip, ip, len(p)) != nil {
		return len(p), nil
	}
	return c.SimConn.WriteTo(p, &dest)
}

// quic returns what the QUIC transport of the node gets its sockets from.
func (d *Node) quic() (*quicreuse.ConnManager, error) {
	n := d.net
	return quicreuse.NewConnManager(secret(1, d.ips[0]), secret(2, d.ips[0]),
		quicreuse.OverrideSourceIPSelector(func() (quicreuse.SourceIPSelector, error) { return d, nil }),
		quicreuse.OverrideListenUDP(func(_ string, addr *net.UDPAddr) (net.PacketConn, error) {
			return n.listenUDP(addr), nil
		}))
}

func (n *Net) listenUDP(addr *net.UDPAddr) *packetConn {
	ip := addr.IP.String()
	side := unbounded
	if rate, bounded := n.rateOf(ip); bounded {
		side = simnet.LinkSettings{BitsPerSecond: rate}
	}
	c := n.sim.NewEndpoint(&net.UDPAddr{IP: addr.IP.To4(), Port: addr.Port}, simnet.NodeBiDiLinkSettings{Downlink: side, Uplink: side})
	return &packetConn{SimConn: c, net: n, ip: ip}
}

// PreferredSourceIPForDestination implements quicreuse.SourceIPSelector.
func (d *Node) PreferredSourceIPForDestination(to *net.UDPAddr) (net.IP, error) {
	return net.ParseIP(d.source(to.IP.String())).To4(), nil
}
