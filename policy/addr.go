package policy

import (
	"net/netip"

	ma "github.com/multiformats/go-multiaddr"
)

// SetAddr sets what follows from a connection's remote address: Transport,
// Relayed, Reach and IPVersion; it overwrites all four and no other field.
//
// A connection is relayed if its address contains /p2p-circuit, and the
// transport, reach and IP version are then those of the path to the relay,
// which stands before it. Names are not resolved. What the address does not
// tell, as when it is nil, is left at the zero value.
func (c *Candidate) SetAddr(remote ma.Multiaddr) {
	c.Transport, c.Relayed, c.Reach, c.IPVersion = OtherTransport, false, UnknownReach, 0
	ma.ForEach(remote, func(part ma.Component) bool {
		// Each layer replaces the transport below it: /tcp, then /ws.
		switch part.Code() {
		case ma.P_IP4, ma.P_IP6:
			c.setIP(part.RawValue())
		case ma.P_DNS4:
			c.IPVersion = 4
		case ma.P_DNS6:
			c.IPVersion = 6
		case ma.P_QUIC, ma.P_QUIC_V1:
			c.Transport = QUIC
		case ma.P_WEBTRANSPORT:
			c.Transport = WebTransport
		case ma.P_WEBRTC, ma.P_WEBRTC_DIRECT, ma.P_P2P_WEBRTC_DIRECT:
			c.Transport = WebRTC
		case ma.P_UDP:
			// go-libp2p knows the remote end of an accepted WebRTC connection
			// by /udp alone; every other transport on UDP adds its own layer.
			c.Transport = WebRTC
		case ma.P_TCP:
			c.Transport = TCP
		case ma.P_WS, ma.P_WSS:
			c.Transport = WebSocket
		case ma.P_DNS, ma.P_DNSADDR, ma.P_IP6ZONE, ma.P_P2P,
			ma.P_TLS, ma.P_SNI, ma.P_NOISE, ma.P_PLAINTEXTV2, ma.P_CERTHASH:
			// Names, keys and security: no transport of their own.
		case ma.P_CIRCUIT:
			c.Relayed = true
			return false
		default:
			c.Transport = OtherTransport
		}
		return true
	})
}

// sharedAddresses are those of carrier NATs (RFC 6598), which overlay networks
// use too.
var sharedAddresses = netip.MustParsePrefix("100.64.0.0/10")

// setIP sets Reach and IPVersion. An IPv4 address inside an IPv6 one (RFC 4291,
// 2.5.5.2) is how a dual-stack socket shows IPv4, so it counts as IPv4.
func (c *Candidate) setIP(raw []byte) {
	ip, _ := netip.AddrFromSlice(raw) // the component has checked its length
	ip = ip.Unmap()
	c.IPVersion = 6
	if ip.Is4() {
		c.IPVersion = 4
	}
	switch {
	case ip.IsLoopback():
		c.Reach = Loopback
	case ip.IsPrivate(), ip.IsLinkLocalUnicast(), sharedAddresses.Contains(ip):
		c.Reach = Private
	case ip.IsGlobalUnicast():
		c.Reach = Public
	default:
		c.Reach = UnknownReach
	}
}
