package conformance

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	msmux "github.com/multiformats/go-multistream"

	. "github.com/go-portage/portage/internal/hosttest"
	"github.com/go-portage/portage/migrate"
)

// pair is two hosts on loopback with two connections between them, and the mover of the
// streams there.
type pair struct {
	setup
	t     testing.TB
	hosts [2]host.Host       // *migrate.Host where the streams move
	conns [2][2]network.Conn // conns[side][i] is the side's end of connection i
	mover mover
}

// patience is how long something may take that must happen. It never decides how a test
// ends that passes.
const patience = 3 * time.Minute

func newPair(t testing.TB, s setup) *pair {
	t.Helper()
	p := &pair{setup: s, t: t}
	transports := []Transport{s.first}
	if s.other != s.first {
		transports = append(transports, s.other)
	}
	var nodes [2]*Node
	for side := range nodes {
		// A thousand streams at once are more than a host takes by default.
		rm, err := rcmgr.NewResourceManager(rcmgr.NewFixedLimiter(rcmgr.InfiniteLimits))
		if err != nil {
			t.Fatal(err)
		}
		nodes[side] = New(t, transports, libp2p.ResourceManager(rm), patientYamux())
		p.hosts[side] = nodes[side].Host
		if !s.moved {
			negotiatePatiently(nodes[side])
			continue
		}
		opts := []migrate.Option{
			migrate.WithConnSelector(func(context.Context, peer.ID) network.Conn { return p.conns[side][0] }),
			migrate.WithNegotiationTimeout(patience),
			migrate.WithTracer(p.mover.trace),
		}
		if s.lasting {
			opts = append(opts, migrate.WithResumption())
		}
		h, err := migrate.Wrap(nodes[side], opts...)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = h.Close() })
		p.hosts[side] = h
	}
	first, other := Join(t, nodes[0], nodes[1], s.first, s.other)
	p.conns[0] = [2]network.Conn{first, other}
	for i, c := range p.conns[0] {
		// By direction: the addresses of two QUIC connections are the same.
		for _, far := range nodes[1].Network().ConnsToPeer(nodes[0].ID()) {
			if far.Stat().Direction != c.Stat().Direction {
				p.conns[1][i] = far
			}
		}
		if p.conns[1][i] == nil {
			t.Fatalf("no other end of %v", c)
		}
	}
	for side, h := range p.hosts {
		// The handlers are set too late for identify.
		if err := h.Peerstore().AddProtocols(p.hosts[1-side].ID(), netID, muxID); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

// patientYamux does not close a connection that has a write waiting for the 10 s that are
// usual: a suite on a busy machine keeps them waiting for longer. And it has room for all
// streams of a suite that the other end has yet to accept: see TestYamuxBacklog.
func patientYamux() libp2p.Option {
	cfg := *yamux.DefaultTransport.Config()
	cfg.ConnectionWriteTimeout = patience
	cfg.AcceptBacklog = 1 << 14
	return libp2p.Muxer(yamux.ID, (*yamux.Transport)(&cfg))
}

// negotiatePatiently does what a host does with inbound streams, without its limit of 10 s,
// for which there is no option.
func negotiatePatiently(h host.Host) {
	h.Network().SetStreamHandler(func(s network.Stream) {
		id, handle, err := h.Mux().Negotiate(s)
		if err != nil {
			_ = s.ResetWithError(network.StreamProtocolNegotiationFailed)
			return
		}
		if err := s.SetProtocol(id); err != nil {
			_ = s.ResetWithError(network.StreamResourceLimitExceeded)
			return
		}
		_ = handle(id, s)
	})
}

// open opens a stream. It waits for nothing but a connection that is congested: a thousand
// at once, on a slow machine, take longer than the 10 s that are usual.
func (p *pair) open(ctx context.Context, side int, id protocol.ID) (network.Stream, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if p.moved {
		far := p.hosts[1-side].ID()
		for {
			// A push of identify that is cut short, since a connection is congested, is taken
			// for an empty one.
			if err := p.hosts[side].Peerstore().AddProtocols(far, migrate.ID, migrate.FinalSizeID, id); err != nil {
				return nil, err
			}
			s, err := p.hosts[side].NewStream(ctx, far, id)
			if err != nil {
				return nil, err
			}
			if _, ok := s.(*migrate.Stream); ok {
				return s, nil
			}
			_ = s.Reset()
			known, err := p.hosts[side].Peerstore().SupportsProtocols(far, migrate.ID)
			if err != nil {
				return nil, err
			}
			if len(known) > 0 {
				return nil, errors.New("the stream is not labelled")
			}
		}
	}
	u, err := p.conns[side][0].NewStream(ctx)
	if err != nil {
		return nil, err
	}
	if err := u.SetProtocol(id); err != nil {
		return nil, err
	}
	return &rawStream{Stream: u, lazy: msmux.NewMSSelect(u, id)}, nil
}

// begin tells the other side of a stream that open has opened.
func begin(s network.Stream) error {
	if raw, ok := s.(*rawStream); ok {
		// Until it is negotiated a raw stream is much worse at deadlines.
		_, err := raw.lazy.Read(nil)
		return err
	}
	_, err := s.Write(nil)
	return err
}

// rawStream is a raw stream that is negotiated when it is first used. Then it is as good as
// the stream in it.
type rawStream struct {
	network.Stream
	lazy msmux.LazyConn
}

func (s *rawStream) Read(p []byte) (int, error)  { return s.lazy.Read(p) }
func (s *rawStream) Write(p []byte) (int, error) { return s.lazy.Write(p) }

// nothingLeft checks that no stream of the protocol is left, nor a label or any memory that
// is reserved for one. All streams must have been closed or reset.
func (p *pair) nothingLeft(id protocol.ID) {
	p.t.Helper()
	for side, h := range p.hosts {
		if mh, ok := h.(*migrate.Host); ok {
			WaitFor(p.t, fmt.Sprintf("side %d to forget its streams", side), func() bool {
				return len(mh.Streams(p.conns[side][0])) == 0 && len(mh.Streams(p.conns[side][1])) == 0
			})
		}
		WaitFor(p.t, fmt.Sprintf("side %d to release what its streams held", side), func() bool {
			var stat network.ScopeStat
			err := h.Network().ResourceManager().ViewProtocol(id, func(s network.ProtocolScope) error {
				stat = s.Stat()
				return nil
			})
			return err == nil && stat == network.ScopeStat{}
		})
	}
}
