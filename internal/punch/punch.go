// Package punch starts a hole punch again.
//
// go-libp2p punches when a relayed connection comes in: three attempts, some 15 s at most,
// and never again on that connection. Where these fail since a firewall has not yet opened,
// an address was about to change, or the peer was not ready, the two hosts stay on the relay
// for as long as that connection lives, although a later attempt would succeed.
//
// There is no call to go-libp2p's hole puncher that a host could make: it is a private
// field of the host. But its other half, the handler of [holepunch.Protocol] at the peer,
// answers whoever asks on a relayed connection that the peer has opened. So [Again]
// speaks the protocol (DCUtR) itself, at the end that go-libp2p gives the same part: the
// one that the relayed connection came in at. What is dialled then is dialled by the host,
// with the options that go-libp2p has for it.
package punch

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/protocol/holepunch"
	"github.com/libp2p/go-libp2p/p2p/protocol/holepunch/pb"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	identifypb "github.com/libp2p/go-libp2p/p2p/protocol/identify/pb"
	"github.com/libp2p/go-msgio/pbio"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
	"github.com/multiformats/go-multistream"

	"github.com/go-portage/portage/internal/aside"
)

// Errors to test for with errors.Is. None of them will be another after a while by itself.
var (
	// ErrOff is what a host without hole punching, or without a public address of its own,
	// gets: libp2p.EnableHolePunching switches it on.
	ErrOff = errors.New("this host does not punch holes")
	// ErrNotOurs is what the end gets that has opened the relayed connection, or has none:
	// only the other end can start a punch.
	ErrNotOurs = errors.New("there is no relayed connection that the peer has opened")
	// ErrUnsupported is what the peer answers that does not punch holes.
	ErrUnsupported = errors.New("the peer does not punch holes")
	// ErrNoAddress is what a host gets that nobody tells under which address it is seen.
	ErrNoAddress = errors.New("no public address of this host is known")
)

const (
	attempts = 3 // as go-libp2p

	// observers is how many peers are asked under which address they see this host. One is
	// enough where the NAT gives a socket one address, and no number is where it does not.
	observers = 4
	// askTimeout is what the slowest of them gets. The relay is among them, over which all
	// the rest goes, too.
	askTimeout = 5 * time.Second
	// dialTimeout is what go-libp2p gives one attempt. QUIC takes no more than 5 s.
	dialTimeout = 10 * time.Second

	maxMessage  = 4 << 10 // of DCUtR, as go-libp2p
	maxIdentify = 8 << 10 // of identify, as go-libp2p
)

// Again tries to get a direct connection to a peer that is connected over a relay. It
// returns nil if there is one, whoever made it. It makes up to three attempts, each of which
// costs less than 1 KiB of what the relay allows the connection, and takes up to 10 s where
// it fails. It blocks until then, or until ctx is done. Attempts that overlap with
// go-libp2p's own to the same peer fail, and harm nothing.
//
// h is the host as libp2p.New returned it: of a wrapped one not all addresses may be known.
func Again(ctx context.Context, h host.Host, p peer.ID) error {
	if direct(h, p) {
		return nil
	}
	if !slices.Contains(h.Mux().Protocols(), holepunch.Protocol) {
		return ErrOff
	}
	var failed error
	for i := range attempts {
		c := relayedBy(h, p)
		if c == nil {
			return errors.Join(ErrNotOurs, failed)
		}
		own := addresses(ctx, h, c)
		if len(own) == 0 {
			return ErrNoAddress
		}
		err := attempt(ctx, h, c, own, i == attempts-1)
		if err == nil || direct(h, p) {
			return nil
		}
		failed = err
		if errors.Is(err, ErrUnsupported) || ctx.Err() != nil {
			break
		}
	}
	return fmt.Errorf("punch a hole to %s: %w", p, failed)
}

func isRelayed(a ma.Multiaddr) bool {
	_, err := a.ValueForProtocol(ma.P_CIRCUIT)
	return err == nil
}

// direct says whether there is a direct connection to p.
func direct(h host.Host, p peer.ID) bool {
	return slices.ContainsFunc(h.Network().ConnsToPeer(p), func(c network.Conn) bool {
		return !isRelayed(c.RemoteMultiaddr()) && !aside.IsClosed(c)
	})
}

// relayedBy returns the youngest relayed connection that p has opened; nil: there is none.
func relayedBy(h host.Host, p peer.ID) network.Conn {
	var youngest network.Conn
	for _, c := range h.Network().ConnsToPeer(p) {
		if !isRelayed(c.RemoteMultiaddr()) || aside.IsClosed(c) || c.Stat().Direction != network.DirInbound {
			continue
		}
		if youngest == nil || c.Stat().Opened.After(youngest.Stat().Opened) {
			youngest = c
		}
	}
	return youngest
}

// attempt agrees with the peer on a moment, and dials at that moment.
func attempt(ctx context.Context, h host.Host, c network.Conn, own []ma.Multiaddr, asClient bool) error {
	addrs, rtt, err := agree(ctx, c, own)
	if err != nil {
		return err
	}
	// SYNC is on its way to the peer, which dials when it arrives.
	timer := time.NewTimer(rtt / 2)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	// With QUIC one end has to be the client, and so the peer is: both know it. Peers older
	// than go-libp2p v0.41 take the other part, which the last attempt allows for.
	ctx = network.WithSimultaneousConnect(ctx, asClient, "hole-punching")
	ctx = network.WithForceDirectDial(ctx, "hole-punching")
	return h.Connect(ctx, peer.AddrInfo{ID: c.RemotePeer(), Addrs: addrs})
}

// agree exchanges addresses with the peer, and says that the moment is now. It returns the
// peer's addresses, and the round-trip time over the relay.
func agree(ctx context.Context, c network.Conn, own []ma.Multiaddr) (addrs []ma.Multiaddr, rtt time.Duration, err error) {
	s, err := openStream(ctx, c, holepunch.Protocol, holepunch.ServiceName, maxMessage)
	if err != nil {
		return nil, 0, err
	}
	defer func() { s.end(err) }()

	connect := &pb.HolePunch{Type: pb.HolePunch_CONNECT.Enum()}
	for _, a := range own {
		connect.ObsAddrs = append(connect.ObsAddrs, a.Bytes())
	}
	start := time.Now()
	if err := s.WriteMsg(connect); err != nil {
		return nil, 0, fmt.Errorf("CONNECT: %w", err)
	}
	var answer pb.HolePunch
	if err := s.ReadMsg(&answer); err != nil {
		return nil, 0, fmt.Errorf("answer to CONNECT: %w", err)
	}
	rtt = time.Since(start)
	if answer.GetType() != pb.HolePunch_CONNECT {
		return nil, 0, fmt.Errorf("answer to CONNECT is %v", answer.GetType())
	}
	for _, raw := range answer.GetObsAddrs() {
		if a, err := ma.NewMultiaddrBytes(raw); err == nil && usable(a) {
			addrs = append(addrs, a)
		}
	}
	if len(addrs) == 0 {
		return nil, 0, errors.New("the peer named no public address")
	}
	if err := s.WriteMsg(&pb.HolePunch{Type: pb.HolePunch_SYNC.Enum()}); err != nil {
		return nil, 0, fmt.Errorf("SYNC: %w", err)
	}
	return addrs, rtt, nil
}

// usable says whether a hole can be punched to an address: a peer that names addresses of
// our own network gets nothing sent there.
func usable(a ma.Multiaddr) bool { return !isRelayed(a) && manet.IsPublicAddr(a) }

// addresses returns the public addresses of the host: those that it knows, and those under
// which the relay and some other peers see it now. go-libp2p's own hole puncher takes
// what identify told of all connections, which nobody else can ask for.
func addresses(ctx context.Context, h host.Host, relayed network.Conn) []ma.Multiaddr {
	var mu sync.Mutex
	var all []ma.Multiaddr
	if known, ok := h.(interface{ AllAddrs() []ma.Multiaddr }); ok {
		all = append(all, known.AllAddrs()...)
	}
	all = append(all, h.Addrs()...)
	listening := h.Network().ListenAddresses()
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	var wg sync.WaitGroup
	for _, c := range witnesses(h, relayed) {
		wg.Go(func() {
			seen, err := observed(ctx, c)
			if err == nil && listensOn(listening, c.LocalMultiaddr()) && sameTransport(seen, c.LocalMultiaddr()) {
				mu.Lock()
				all = append(all, seen)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	all = append(all, guesses(all, listening)...)
	return slices.DeleteFunc(ma.Unique(all), func(a ma.Multiaddr) bool { return !usable(a) })
}

// guesses returns addresses that nobody has seen, but that are likely: a host that has reached
// its relay over TCP alone is seen under no address of QUIC, and one that has reached it over
// QUIC under none of TCP, so that the two have nothing in common to punch with. Where a router
// has kept the port that this host listens on, as most do at home, it does so for the other
// transport, too.
func guesses(seen, listening []ma.Multiaddr) []ma.Multiaddr {
	kept := make(map[string]bool) // IP components
	has := make(map[int]bool)     // transports
	for _, a := range seen {
		if !usable(a) {
			continue
		}
		has[transport(a)] = true
		if listensOn(listening, a) {
			kept[string(a[:1].Bytes())] = true
		}
	}
	var all []ma.Multiaddr
	for _, l := range listening {
		plain := len(l) == 2 && l[1].Code() == ma.P_TCP || len(l) == 3 && l[1].Code() == ma.P_UDP && l[2].Code() == ma.P_QUIC_V1
		if !plain || has[transport(l)] {
			continue
		}
		for ip := range kept {
			if a, err := ma.NewMultiaddrBytes([]byte(ip)); err == nil && a[0].Code() == l[0].Code() {
				all = append(all, a.Encapsulate(l[1:]))
			}
		}
	}
	return all
}

// witnesses returns direct connections to peers on the internet, those to the relay first,
// and of each transport before a second one of the same.
func witnesses(h host.Host, relayed network.Conn) []network.Conn {
	relay, _ := relayed.RemoteMultiaddr().ValueForProtocol(ma.P_P2P)
	relayID, _ := peer.Decode(relay)
	var chosen []network.Conn
	for _, pick := range [][]network.Conn{h.Network().ConnsToPeer(relayID), h.Network().Conns()} {
		transports := make(map[int]bool)
		for _, c := range pick {
			code := transport(c.LocalMultiaddr())
			if len(chosen) == observers || transports[code] || !usable(c.RemoteMultiaddr()) || aside.IsClosed(c) || slices.Contains(chosen, c) {
				continue
			}
			transports[code] = true
			chosen = append(chosen, c)
		}
	}
	return chosen
}

// transport returns the code of TCP or UDP; 0: neither.
func transport(a ma.Multiaddr) int {
	for _, c := range a {
		if code := c.Protocol().Code; code == ma.P_TCP || code == ma.P_UDP {
			return code
		}
	}
	return 0
}

func sameTransport(a, b ma.Multiaddr) bool {
	return len(a) == len(b) && slices.EqualFunc(a, b, func(a, b ma.Component) bool { return a.Protocol().Code == b.Protocol().Code })
}

// listensOn says whether a connection's local address is one of those that the host listens
// on: a connection from another port is seen under an address where nobody answers.
func listensOn(listening []ma.Multiaddr, local ma.Multiaddr) bool {
	code := transport(local)
	port, err := local.ValueForProtocol(code)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(listening, func(l ma.Multiaddr) bool {
		p, err := l.ValueForProtocol(code)
		return err == nil && p == port
	})
}

// observed asks the other end of a connection under which address it sees this host. This
// is identify, which go-libp2p asks once on each connection: what it was told is not kept
// where others can read it, and may be old.
func observed(ctx context.Context, c network.Conn) (addr ma.Multiaddr, err error) {
	s, err := openStream(ctx, c, identify.ID, identify.ServiceName, maxIdentify)
	if err != nil {
		return nil, err
	}
	defer func() { s.end(err) }()
	var answer identifypb.Identify
	if err := s.ReadMsg(&answer); err != nil { // the address is in the first message, if there are two
		return nil, err
	}
	return ma.NewMultiaddrBytes(answer.GetObservedAddr())
}

// stream is a stream that carries messages of protobuf.
type stream struct {
	pbio.Writer
	pbio.Reader
	end func(error) // resets the stream if there is one
}

// openStream opens a stream on a connection, and no other. All of it ends with ctx.
func openStream(ctx context.Context, c network.Conn, p protocol.ID, service string, size int) (*stream, error) {
	s, err := c.NewStream(network.WithAllowLimitedConn(ctx, service))
	if err != nil {
		return nil, fmt.Errorf("stream: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = s.Reset() })
	fail := func(err error) (*stream, error) {
		stop()
		_ = s.Reset()
		return nil, fmt.Errorf("stream: %w", cmp.Or(ctx.Err(), err))
	}
	if err := s.SetProtocol(p); err != nil {
		return fail(err)
	}
	if err := s.Scope().SetService(service); err != nil {
		return fail(err)
	}
	if err := s.Scope().ReserveMemory(size, network.ReservationPriorityAlways); err != nil {
		return fail(err)
	}
	if err := multistream.SelectProtoOrFail(p, s); err != nil {
		s.Scope().ReleaseMemory(size)
		if errors.As(err, new(multistream.ErrNotSupported[protocol.ID])) {
			err = ErrUnsupported
		}
		return fail(err)
	}
	return &stream{
		Writer: pbio.NewDelimitedWriter(s),
		Reader: pbio.NewDelimitedReader(s, size),
		end: func(err error) {
			stop()
			s.Scope().ReleaseMemory(size)
			if err != nil {
				_ = s.Reset()
			} else {
				_ = s.Close()
			}
		},
	}, nil
}
