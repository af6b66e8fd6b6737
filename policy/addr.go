package policy

import (
	"net/netip"
	"strings"

	ma "github.com/multiformats/go-multiaddr"
)

// Addr is a multiaddr in its text form, as its String gives it: a multiaddr
// that == compares, which keeps a Candidate a plain value. "" is no address.
type Addr string

// IP returns the IP address that a begins with, without a zone, and as IPv4 if
// it is IPv4 inside IPv6. The result is not valid if a begins with a name, or
// with anything else.
func (a Addr) IP() netip.Addr {
	_, rest := a.cutZone()
	for _, protocol := range []string{"/ip4/", "/ip6/"} {
		if text, found := strings.CutPrefix(rest, protocol); found {
			text, _, _ = strings.Cut(text, "/")
			ip, _ := netip.ParseAddr(text) // not valid if not understood
			return ip.Unmap().WithZone("")
		}
	}
	return netip.Addr{}
}

// HasPrefix reports whether a begins with the components of prefix:
// /ip4/192.0.2.1/tcp/4001 begins with /ip4/192.0.2.1 and with itself, and not
// with /ip4/192.0.2.1/tcp/400.
func (a Addr) HasPrefix(prefix Addr) bool {
	rest, found := strings.CutPrefix(string(a), string(prefix))
	return found && (rest == "" || rest[0] == '/')
}

// cutZone returns the IPv6 zone that a begins with, if any, and what follows it.
func (a Addr) cutZone() (zone, rest string) {
	rest, found := strings.CutPrefix(string(a), "/ip6zone/")
	if !found {
		return "", string(a)
	}
	zone, rest, _ = strings.Cut(rest, "/")
	return zone, "/" + rest
}

// SetLocalAddr sets Local, and Interface to the zone of the address, which is
// the interface of a link-local one; it overwrites both and no other field. To
// find the interface of any other address takes a look at the host's
// interfaces, which is left to the caller.
//
// A transport that uses one socket for all interfaces, as QUIC does where the
// host listens on 0.0.0.0, knows of no local address but that one.
func (c *Candidate) SetLocalAddr(local ma.Multiaddr) {
	c.Local = Addr(local.String())
	c.Interface, _ = c.Local.cutZone()
}

// SetAddr sets Remote and what follows from it: Transport, Relayed, Reach and
// IPVersion; it overwrites all five and no other field.
//
// A connection is relayed if its address contains /p2p-circuit, and the
// transport, reach and IP version are then those of the path to the relay,
// which stands before it. Names are not resolved. What the address does not
// tell, as when it is nil, is left at the zero value.
func (c *Candidate) SetAddr(remote ma.Multiaddr) {
	c.Remote = Addr(remote.String())
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
