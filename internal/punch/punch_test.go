package punch

import (
	"context"
	"errors"
	"io"
	"testing"

	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/p2p/protocol/holepunch"
	"github.com/libp2p/go-libp2p/p2p/protocol/holepunch/pb"
	"github.com/libp2p/go-msgio/pbio"
	ma "github.com/multiformats/go-multiaddr"

	"github.com/go-portage/portage/internal/hosttest"
)

// What succeeds needs NATs, and is in integration/nat. Here is what must fail.

func TestMain(m *testing.M) { hosttest.Main(m) }

var (
	public  = ma.StringCast("/ip4/45.0.0.1/udp/4001/quic-v1")
	private = ma.StringCast("/ip4/192.168.1.1/udp/4001/quic-v1")
	circuit = ma.StringCast("/ip4/45.0.0.1/udp/4001/quic-v1/p2p-circuit")
)

func connectWith(addrs ...ma.Multiaddr) *pb.HolePunch {
	m := &pb.HolePunch{Type: pb.HolePunch_CONNECT.Enum()}
	for _, a := range addrs {
		m.ObsAddrs = append(m.ObsAddrs, a.Bytes())
	}
	return m
}

// answering has a host serve DCUtR: it reads CONNECT, and answers.
func answering(h host.Host, answer func(network.Stream, pbio.Writer)) {
	h.SetStreamHandler(holepunch.Protocol, func(s network.Stream) {
		defer s.Close()
		if err := pbio.NewDelimitedReader(s, maxMessage).ReadMsg(new(pb.HolePunch)); err == nil {
			answer(s, pbio.NewDelimitedWriter(s))
		}
		io.Copy(io.Discard, s)
	})
}

func TestAnswersOfAPeer(t *testing.T) {
	junk := connectWith()
	junk.ObsAddrs = [][]byte{{0xff, 0xff}, nil}
	large := connectWith()
	large.ObsAddrs = [][]byte{make([]byte, 2*maxMessage)}
	for name, test := range map[string]struct {
		answer *pb.HolePunch
		agreed bool
	}{
		"an address":               {connectWith(public), true},
		"one of several":           {connectWith(private, circuit, public), true},
		"none":                     {connectWith(), false},
		"addresses of our network": {connectWith(private), false},
		"relayed addresses":        {connectWith(circuit), false},
		"no addresses at all":      {junk, false},
		"too much":                 {large, false},
		"SYNC":                     {&pb.HolePunch{Type: pb.HolePunch_SYNC.Enum(), ObsAddrs: [][]byte{public.Bytes()}}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, b := hosttest.New(t, []hosttest.Transport{hosttest.TCP}), hosttest.New(t, []hosttest.Transport{hosttest.TCP})
			c := hosttest.Dial(t, a, b, hosttest.TCP)
			answering(b, func(_ network.Stream, w pbio.Writer) { w.WriteMsg(test.answer) })
			addrs, _, err := agree(t.Context(), c, []ma.Multiaddr{public})
			if (err == nil) != test.agreed {
				t.Fatalf("agreed on %v, %v; want agreement: %v", addrs, err, test.agreed)
			}
			if test.agreed && (len(addrs) != 1 || !addrs[0].Equal(public)) {
				t.Errorf("addresses to dial: %v; want %v alone", addrs, public)
			}
			hosttest.WaitFor(t, "the stream to end", func() bool { return len(c.GetStreams()) == 0 })
		})
	}
}

func TestPeerThatDoesNotAnswerIsLeftWithTheContext(t *testing.T) {
	a, b := hosttest.New(t, []hosttest.Transport{hosttest.TCP}), hosttest.New(t, []hosttest.Transport{hosttest.TCP})
	c := hosttest.Dial(t, a, b, hosttest.TCP)
	ctx, cancel := context.WithCancel(t.Context())
	answering(b, func(network.Stream, pbio.Writer) { cancel() })
	if _, _, err := agree(ctx, c, []ma.Multiaddr{public}); err == nil {
		t.Fatal("agreed with a peer that is silent")
	}
}

func TestPeerWithoutHolePunching(t *testing.T) {
	a, b := hosttest.New(t, []hosttest.Transport{hosttest.TCP}), hosttest.New(t, []hosttest.Transport{hosttest.TCP})
	c := hosttest.Dial(t, a, b, hosttest.TCP)
	if _, _, err := agree(t.Context(), c, []ma.Multiaddr{public}); !errors.Is(err, ErrUnsupported) {
		t.Errorf("error is %v; want ErrUnsupported", err)
	}
}

func TestWhoCannotPunch(t *testing.T) {
	tcp := []hosttest.Transport{hosttest.TCP}
	a, b, r := hosttest.New(t, tcp), hosttest.New(t, tcp), hosttest.NewRelay(t)
	hosttest.DialRelayed(t, a, b, r)
	if err := Again(t.Context(), b, a.ID()); !errors.Is(err, ErrOff) {
		t.Errorf("without hole punching: %v; want ErrOff", err)
	}
	for _, h := range []host.Host{a, b} { // as hole punching does, once it knows an address
		h.SetStreamHandler(holepunch.Protocol, func(s network.Stream) { s.Reset() })
	}
	if err := Again(t.Context(), a, b.ID()); !errors.Is(err, ErrNotOurs) {
		t.Errorf("at the end that dialled: %v; want ErrNotOurs", err)
	}
	if err := Again(t.Context(), b, a.ID()); !errors.Is(err, ErrNoAddress) {
		t.Errorf("where all are on loopback: %v; want ErrNoAddress", err)
	}
	if err := Again(t.Context(), b, r.ID()); err != nil {
		t.Errorf("with a direct connection: %v; want nil", err)
	}
}

func TestObserved(t *testing.T) {
	a, b := hosttest.New(t, []hosttest.Transport{hosttest.TCP}), hosttest.New(t, []hosttest.Transport{hosttest.TCP})
	c := hosttest.Dial(t, a, b, hosttest.TCP)
	seen, err := observed(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if far := hosttest.Far(t, b, c); !seen.Equal(far.RemoteMultiaddr()) {
		t.Errorf("seen as %v; the peer's connection is to %v", seen, far.RemoteMultiaddr())
	}
}

func TestListensOn(t *testing.T) {
	listening := []ma.Multiaddr{ma.StringCast("/ip4/0.0.0.0/udp/4001/quic-v1"), ma.StringCast("/ip4/10.0.0.1/tcp/4002")}
	for local, want := range map[string]bool{
		"/ip4/0.0.0.0/udp/4001/quic-v1":  true,
		"/ip4/10.0.0.1/udp/4001/quic-v1": true,
		"/ip4/10.0.0.1/udp/4002/quic-v1": false,
		"/ip4/10.0.0.1/tcp/4002":         true,
		"/ip4/10.0.0.1/tcp/4001":         false,
		"/p2p-circuit":                   false,
	} {
		if got := listensOn(listening, ma.StringCast(local)); got != want {
			t.Errorf("%s: %v; want %v", local, got, want)
		}
	}
}

// Where a router keeps ports, the address of a transport over which nobody has seen this host
// follows from that of the other.
func TestGuesses(t *testing.T) {
	addrs := func(all ...string) (as []ma.Multiaddr) {
		for _, a := range all {
			as = append(as, ma.StringCast(a))
		}
		return as
	}
	both := addrs("/ip4/0.0.0.0/udp/4001/quic-v1", "/ip4/10.1.0.2/tcp/4001", "/ip4/0.0.0.0/udp/4001/quic-v1/webtransport", "/ip6/::/udp/4001/quic-v1")
	for name, test := range map[string]struct {
		seen, listening, want []ma.Multiaddr
	}{
		"over TCP alone":             {addrs("/ip4/45.0.0.1/tcp/4001"), both, addrs("/ip4/45.0.0.1/udp/4001/quic-v1")},
		"over QUIC alone":            {addrs("/ip4/45.0.0.1/udp/4001/quic-v1"), both, addrs("/ip4/45.0.0.1/tcp/4001")},
		"over both":                  {addrs("/ip4/45.0.0.1/tcp/4001", "/ip4/45.0.0.1/udp/4001/quic-v1"), both, nil},
		"under another port":         {addrs("/ip4/45.0.0.1/tcp/31213"), both, nil},
		"in our own network":         {addrs("/ip4/192.168.1.1/tcp/4001"), both, nil},
		"through a relay":            {addrs("/ip4/45.0.0.1/tcp/4001/p2p-circuit"), both, nil},
		"it listens on nothing else": {addrs("/ip4/45.0.0.1/tcp/4001"), addrs("/ip4/0.0.0.0/tcp/4001"), nil},
		"nobody has":                 {nil, both, nil},
	} {
		t.Run(name, func(t *testing.T) {
			got := guesses(test.seen, test.listening)
			if len(got) != len(test.want) {
				t.Fatalf("%v; want %v", got, test.want)
			}
			for i, a := range test.want {
				if !a.Equal(got[i]) {
					t.Errorf("%v; want %v", got, test.want)
				}
			}
		})
	}
}
