package policy

import (
	"testing"
	"time"

	ma "github.com/multiformats/go-multiaddr"
)

const (
	relayPart = "/p2p/12D3KooWGzxzKZYveHXtpG6AsrUJBcWxHBFS2HsEoGTxrMLvKXtf/p2p-circuit"
	peerPart  = "/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
	certhash  = "/certhash/uEiAkH5a4DPGKUuOBjYw0CgwjvcJCJMD2K_1aluKR_tpevQ"
)

func TestSetAddr(t *testing.T) {
	for _, tt := range []struct {
		addr      string
		transport Transport
		relayed   bool
		reach     Reach
		ipVersion int
	}{
		// Transports.
		{"/ip4/8.8.8.8/udp/4001/quic-v1", QUIC, false, Public, 4},
		{"/ip4/8.8.8.8/udp/4001/quic-v1" + peerPart, QUIC, false, Public, 4},
		{"/ip4/8.8.8.8/udp/4001/quic", QUIC, false, Public, 4},
		{"/ip4/8.8.8.8/udp/4001/quic-v1/webtransport", WebTransport, false, Public, 4},
		{"/ip4/8.8.8.8/udp/4001/quic-v1/webtransport" + certhash + certhash + peerPart, WebTransport, false, Public, 4},
		{"/ip4/8.8.8.8/udp/4001/webrtc-direct" + certhash, WebRTC, false, Public, 4},
		{"/ip4/8.8.8.8/udp/4001/webrtc-direct", WebRTC, false, Public, 4},
		{"/ip4/8.8.8.8/udp/4001/webrtc", WebRTC, false, Public, 4},
		{"/ip4/8.8.8.8/udp/4001", WebRTC, false, Public, 4}, // accepted WebRTC
		{"/ip4/8.8.8.8/udp/4001/utp", OtherTransport, false, Public, 4},
		{"/ip4/8.8.8.8/tcp/4001", TCP, false, Public, 4},
		{"/ip4/8.8.8.8/tcp/4001/tls" + peerPart, TCP, false, Public, 4},
		{"/ip4/8.8.8.8/tcp/4001/tls/sni/example.com", TCP, false, Public, 4},
		{"/ip4/8.8.8.8/tcp/4001/plaintextv2", TCP, false, Public, 4},
		{"/ip4/8.8.8.8/tcp/4001/noise", TCP, false, Public, 4},
		{"/ip4/8.8.8.8/tcp/80/ws", WebSocket, false, Public, 4},
		{"/ip4/8.8.8.8/tcp/443/wss", WebSocket, false, Public, 4},
		{"/ip4/8.8.8.8/tcp/443/tls/ws", WebSocket, false, Public, 4},
		{"/ip4/8.8.8.8/tcp/443/tls/sni/example.com/ws" + peerPart, WebSocket, false, Public, 4},
		{"/ip4/8.8.8.8/tcp/80/http", OtherTransport, false, Public, 4},
		{"/memory/7", OtherTransport, false, UnknownReach, 0},
		{"/unix/tmp/socket", OtherTransport, false, UnknownReach, 0},
		{"/ip4/8.8.8.8", OtherTransport, false, Public, 4},

		// Reach, IPv4.
		{"/ip4/127.0.0.1/tcp/1", TCP, false, Loopback, 4},
		{"/ip4/127.255.255.254/tcp/1", TCP, false, Loopback, 4},
		{"/ip4/10.1.0.2/tcp/1", TCP, false, Private, 4},
		{"/ip4/172.15.255.255/tcp/1", TCP, false, Public, 4},
		{"/ip4/172.16.0.1/tcp/1", TCP, false, Private, 4},
		{"/ip4/192.168.1.1/tcp/1", TCP, false, Private, 4},
		{"/ip4/169.254.1.1/tcp/1", TCP, false, Private, 4},
		{"/ip4/100.63.255.255/tcp/1", TCP, false, Public, 4},
		{"/ip4/100.64.0.0/tcp/1", TCP, false, Private, 4},
		{"/ip4/100.127.255.255/tcp/1", TCP, false, Private, 4},
		{"/ip4/100.128.0.0/tcp/1", TCP, false, Public, 4},
		{"/ip4/0.0.0.0/tcp/1", TCP, false, UnknownReach, 4},
		{"/ip4/224.0.0.1/udp/1/quic-v1", QUIC, false, UnknownReach, 4},
		{"/ip4/255.255.255.255/udp/1/quic-v1", QUIC, false, UnknownReach, 4},

		// Reach, IPv6.
		{"/ip6/::1/udp/1/quic-v1", QUIC, false, Loopback, 6},
		{"/ip6/fd00::1/udp/1/quic-v1", QUIC, false, Private, 6},
		{"/ip6/fe80::1/udp/1/quic-v1", QUIC, false, Private, 6},
		{"/ip6zone/eth0/ip6/fe80::1/udp/1/quic-v1", QUIC, false, Private, 6},
		{"/ip6zone/lo/ip6/::1/tcp/1", TCP, false, Loopback, 6},
		{"/ip6/2606:4700::1/udp/1/quic-v1", QUIC, false, Public, 6},
		{"/ip6/64:ff9b::808:808/tcp/1", TCP, false, Public, 6},
		{"/ip6/::/tcp/1", TCP, false, UnknownReach, 6},
		{"/ip6/ff02::1/udp/1/quic-v1", QUIC, false, UnknownReach, 6},
		{"/ip6/::ffff:127.0.0.1/tcp/1", TCP, false, Loopback, 4},
		{"/ip6/::ffff:10.0.0.1/tcp/1", TCP, false, Private, 4},
		{"/ip6/::ffff:100.64.0.1/tcp/1", TCP, false, Private, 4},
		{"/ip6/::ffff:8.8.8.8/tcp/1", TCP, false, Public, 4},

		// Names are not resolved.
		{"/dns/example.com/tcp/443/tls/ws", WebSocket, false, UnknownReach, 0},
		{"/dns4/example.com/udp/1/quic-v1", QUIC, false, UnknownReach, 4},
		{"/dns6/example.com/udp/1/quic-v1", QUIC, false, UnknownReach, 6},
		{"/dnsaddr/example.com", OtherTransport, false, UnknownReach, 0},

		// Relayed: the path to the relay counts, what follows does not.
		{"/ip4/10.0.0.1/udp/1/quic-v1" + relayPart, QUIC, true, Private, 4},
		{"/ip4/10.0.0.1/udp/1/quic-v1" + relayPart + peerPart, QUIC, true, Private, 4},
		{"/ip6/2606:4700::1/tcp/1/ws" + relayPart, WebSocket, true, Public, 6},
		{"/ip4/8.8.8.8/tcp/1/p2p-circuit", TCP, true, Public, 4},
		{"/ip4/8.8.8.8/udp/1" + relayPart, WebRTC, true, Public, 4},
		{"/dns4/relay.example.com/tcp/443/wss" + relayPart, WebSocket, true, UnknownReach, 4},
		{"/ip4/8.8.8.8/tcp/1" + relayPart + "/webrtc" + peerPart, TCP, true, Public, 4},
		{"/ip4/8.8.8.8/tcp/1" + relayPart + "/ip4/127.0.0.1/udp/1/quic-v1", TCP, true, Public, 4},
		{relayPart, OtherTransport, true, UnknownReach, 0},
		{"/p2p-circuit", OtherTransport, true, UnknownReach, 0},
	} {
		t.Run(tt.addr, func(t *testing.T) {
			addr, err := ma.NewMultiaddr(tt.addr)
			if err != nil {
				t.Fatal(err)
			}
			want := Candidate{Remote: Addr(tt.addr), Transport: tt.transport, Relayed: tt.relayed, Reach: tt.reach, IPVersion: tt.ipVersion}
			var got Candidate
			got.SetAddr(addr)
			if got.Remote != want.Remote {
				t.Errorf("got remote address %q, want the one given", got.Remote)
			}
			if got != want {
				t.Errorf("got transport %v, relayed %t, reach %v, IP version %d; want %v, %t, %v, %d",
					got.Transport, got.Relayed, got.Reach, got.IPVersion, tt.transport, tt.relayed, tt.reach, tt.ipVersion)
			}
		})
	}
}

func TestSetAddrOverwritesWhatFollowsFromTheAddressAndNothingElse(t *testing.T) {
	c := Candidate{
		ID: "c", Remote: "/ip6/::1", Transport: QUIC, Relayed: true, Reach: Loopback, IPVersion: 6,
		Local: "/ip6/::1", Interface: "lo", Limited: true, Age: time.Second, RTT: time.Second, Streams: 3, Labelled: 2, Pinned: 1, Incumbent: true,
	}
	want := c
	want.Remote = ""
	want.Transport, want.Relayed, want.Reach, want.IPVersion = OtherTransport, false, UnknownReach, 0
	if c.SetAddr(nil); c != want {
		t.Errorf("after SetAddr(nil): %+v, want %+v", c, want)
	}
}

func TestSetLocalAddr(t *testing.T) {
	for _, tt := range []struct{ addr, zone string }{
		{"/ip4/192.0.2.1/tcp/4001", ""},
		{"/ip4/0.0.0.0/udp/4001/quic-v1", ""},
		{"/ip6zone/wwan0/ip6/fe80::1/tcp/4001", "wwan0"},
		{"", ""},
	} {
		t.Run(tt.addr, func(t *testing.T) {
			var addr ma.Multiaddr // "" is none
			if tt.addr != "" {
				addr = ma.StringCast(tt.addr)
			}
			got := Candidate{ID: "c", Remote: "/ip4/192.0.2.2", Local: "/ip4/192.0.2.3", Interface: "eth0"}
			want := Candidate{ID: "c", Remote: "/ip4/192.0.2.2", Local: Addr(tt.addr), Interface: tt.zone}
			if got.SetLocalAddr(addr); got != want {
				t.Errorf("got %+v, want %+v", got, want)
			}
		})
	}
}

func TestAddrIP(t *testing.T) {
	for addr, want := range map[Addr]string{
		"/ip4/192.0.2.1/tcp/4001":                  "192.0.2.1",
		"/ip4/192.0.2.1":                           "192.0.2.1",
		"/ip4/192.0.2.1/tcp/4001" + relayPart:      "192.0.2.1",
		"/ip6/2001:db8::1/udp/4001/quic-v1":        "2001:db8::1",
		"/ip6/::ffff:192.0.2.1/tcp/4001":           "192.0.2.1",
		"/ip6zone/eth0/ip6/fe80::1/udp/1/quic-v1":  "fe80::1",
		"/ip6zone/eth0":                            "invalid IP",
		"/dns4/example.com/tcp/4001/ip4/192.0.2.1": "invalid IP",
		"/memory/7":          "invalid IP",
		"/ip4/example.com":   "invalid IP",
		"/ip4cidr/192.0.2.1": "invalid IP",
		"192.0.2.1":          "invalid IP",
		"":                   "invalid IP",
	} {
		if got := addr.IP().String(); got != want {
			t.Errorf("IP of %q: %s, want %s", addr, got, want)
		}
	}
}

func TestAddrHasPrefix(t *testing.T) {
	const addr = Addr("/ip4/192.0.2.1/tcp/4001/ws")
	for prefix, want := range map[Addr]bool{
		"/ip4/192.0.2.1":                         true,
		"/ip4/192.0.2.1/tcp/4001":                true,
		"/ip4/192.0.2.1/tcp/4001/ws":             true,
		"/ip4/192.0.2.1/tcp/4001/wss":            false,
		"/ip4/192.0.2.1/tcp/4001/w":              false,
		"/ip4/192.0.2.1/tcp/400":                 false,
		"/ip4/192.0.2.1/tcp/4001/ws/p2p-circuit": false,
		"/ip4/192.0.2.10":                        false,
		"/tcp/4001":                              false,
	} {
		if got := addr.HasPrefix(prefix); got != want {
			t.Errorf("%q has prefix %q: %t, want %t", addr, prefix, got, want)
		}
	}
	if Addr("").HasPrefix("/ip4/192.0.2.1") {
		t.Error("no address has a prefix")
	}
}

func TestTransportString(t *testing.T) {
	for transport, want := range map[Transport]string{
		OtherTransport: "other", QUIC: "quic", WebTransport: "webtransport", WebRTC: "webrtc", TCP: "tcp", WebSocket: "websocket",
		200: "other",
	} {
		if got := transport.String(); got != want {
			t.Errorf("Transport %d: %q, want %q", transport, got, want)
		}
	}
}

func TestReachString(t *testing.T) {
	for reach, want := range map[Reach]string{
		UnknownReach: "unknown", Loopback: "loopback", Private: "private", Public: "public",
		200: "unknown",
	} {
		if got := reach.String(); got != want {
			t.Errorf("Reach %d: %q, want %q", reach, got, want)
		}
	}
}
