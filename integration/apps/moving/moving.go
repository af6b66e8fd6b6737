// Package moving makes hosts of which streams move all the time, for the tests of programs
// of others, and for their own suites, which are given these hosts in the place of plain
// ones.
package moving

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/transport"
	bhost "github.com/libp2p/go-libp2p/p2p/host/basic"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	"github.com/libp2p/go-libp2p/x/simlibp2p"
	"github.com/marcopolo/simnet"
	ma "github.com/multiformats/go-multiaddr"

	"github.com/go-portage/portage/connmgr"
	"github.com/go-portage/portage/internal/hosttest"
	"github.com/go-portage/portage/migrate"
	"github.com/go-portage/portage/policy"
)

// Still is an environment variable: where it is true, hosts of suites have Portage, but get no
// second connection.
const Still = "PORTAGE_STILL"

// Options has everything happen at once, and the newest connection win. Each stream that
// has moved is counted, at the end that has moved it.
func Options(migrations *atomic.Int64) []connmgr.Option {
	newest, err := policy.Parse("chain(younger)")
	if err != nil {
		panic(err)
	}
	return []connmgr.Option{
		connmgr.WithPolicy(newest),
		connmgr.WithSettleDelay(20 * time.Millisecond),
		connmgr.WithQuietTime(50 * time.Millisecond),
		connmgr.WithProof(100 * time.Millisecond),
		connmgr.WithInterval(100 * time.Millisecond),
		connmgr.WithMigrateOptions(migrate.WithTracer(func(e migrate.Event) {
			if e.Kind == migrate.Finished && e.Initiator {
				migrations.Add(1)
			}
		})),
	}
}

// Addr is the address that h listens on over a transport.
func Addr(h host.Host, tr hosttest.Transport) (ma.Multiaddr, error) {
	for _, a := range h.Network().ListenAddresses() {
		if hosttest.Of(a) == tr && !strings.HasPrefix(a.String(), "/memory") {
			return a, nil
		}
	}
	return nil, fmt.Errorf("the host does not listen on %s", tr)
}

// suite is hosts of a test of a suite. When that ends it logs what they have done.
type suite struct {
	t          testing.TB
	pause      time.Duration // between two doublings of a pair
	migrations atomic.Int64
	closings   atomic.Int64 // of a connection beside another one
	ctx        context.Context
	dials      chan struct{} // as many as may be under way at a time
	work       sync.WaitGroup
}

// realDials is what dials is for all hosts of a suite in real time.
var realDials = make(chan struct{}, 4)

func newSuite(t testing.TB, pause time.Duration, dials chan struct{}) *suite {
	ctx, cancel := context.WithCancel(context.Background())
	s := &suite{t: t, pause: pause, ctx: ctx, dials: dials}
	t.Cleanup(func() {
		cancel()
		s.work.Wait()
		t.Logf("portage: %d migrations, %d connections closed", s.migrations.Load(), s.closings.Load())
	})
	return s
}

// double gives h a second connection to each peer that it has one to, again and again. Of
// two hosts one does it.
func (s *suite) double(h host.Host) {
	if still, _ := strconv.ParseBool(os.Getenv(Still)); still {
		return
	}
	d := hosttest.NewDoubler(s.t, h)
	var mu sync.Mutex
	busy := make(map[peer.ID]bool)
	h.Network().Notify(&network.NotifyBundle{
		ConnectedF: func(_ network.Network, c network.Conn) {
			p := c.RemotePeer()
			mu.Lock()
			defer mu.Unlock()
			if h.ID() > p || busy[p] || s.ctx.Err() != nil {
				return
			}
			busy[p] = true
			s.work.Go(func() {
				for more := true; more; {
					s.again(d, h, p)
					mu.Lock()
					more = s.ctx.Err() == nil && len(h.Network().ConnsToPeer(p)) > 0
					busy[p] = more
					mu.Unlock()
				}
			})
		},
		DisconnectedF: func(n network.Network, c network.Conn) {
			if len(n.ConnsToPeer(c.RemotePeer())) > 0 {
				s.closings.Add(1)
			}
		},
	})
}

// again makes a second connection to p, over another transport than the present one where
// there is one, and waits. The peer may go away at any time, and so may the host.
func (s *suite) again(d *hosttest.Doubler, h host.Host, p peer.ID) {
	wait := time.NewTimer(s.pause)
	defer wait.Stop()
	select {
	case <-wait.C:
	case <-s.ctx.Done():
		return
	}
	conns := h.Network().ConnsToPeer(p)
	if len(conns) != 1 {
		return
	}
	var to ma.Multiaddr
	for _, a := range h.Peerstore().Addrs(p) {
		if tr := hosttest.Of(a); tr != hosttest.TCP && tr != hosttest.QUIC || strings.HasPrefix(a.String(), "/memory") {
			continue
		}
		if to == nil || hosttest.Of(a) != hosttest.Of(conns[0].RemoteMultiaddr()) {
			to = a
		}
	}
	if to == nil {
		return
	}
	s.dials <- struct{}{}
	defer func() { <-s.dials }()
	ctx, cancel := context.WithTimeout(s.ctx, 5*time.Second)
	defer cancel()
	if err := d.Dial(ctx, p, to); err != nil && !errors.Is(err, transport.ErrListenerClosed) && s.ctx.Err() == nil {
		s.t.Logf("portage: no second connection to %s: %v", to, err)
	}
}

// SimpleLibp2pNetwork stands in the place of simlibp2p's, in suites.
func SimpleLibp2pNetwork(t testing.TB, links []simlibp2p.NodeLinkSettingsAndCount, latency simlibp2p.LatencyFunc, _ simlibp2p.NetworkSettings) (*simnet.Simnet, *simlibp2p.SimpleLibp2pNetworkMeta, error) {
	s := newSuite(t, 2*time.Second, make(chan struct{}, 4))
	network := &simnet.Simnet{LatencyFunc: latency}
	meta := &simlibp2p.SimpleLibp2pNetworkMeta{AddrToNode: make(map[string]simlibp2p.HostAndIdx)}
	for _, link := range links {
		for range link.Count {
			h, err := SimHost(network, len(meta.Nodes), link.LinkSettings, connmgr.Enable(Options(&s.migrations)...))
			if err != nil {
				return nil, nil, err
			}
			s.double(h)
			meta.AddrToNode[h.Addrs()[0].String()] = simlibp2p.HostAndIdx{Host: h, Idx: len(meta.Nodes)}
			meta.Nodes = append(meta.Nodes, h)
		}
	}
	return network, meta, nil
}

// New stands in the place of libp2p.New, in suites. Options that leave no room for a manager
// are an error, as elsewhere.
func New(t testing.TB, opts ...libp2p.Option) (host.Host, error) {
	s := newSuite(t, 50*time.Millisecond, realDials)
	h, err := libp2p.New(append(opts, connmgr.Enable(Options(&s.migrations)...))...)
	if err != nil {
		return nil, err
	}
	s.double(h)
	return h, nil
}

// SimHost makes a host as simlibp2p does, which takes no options.
func SimHost(net *simnet.Simnet, i int, link simnet.NodeBiDiLinkSettings, opts ...libp2p.Option) (host.Host, error) {
	return libp2p.New(append(opts,
		libp2p.ListenAddrStrings(fmt.Sprintf("/ip4/%s/udp/8000/quic-v1", simnet.IntToPublicIPv4(i))),
		simlibp2p.QUICSimnet(net, link),
		libp2p.DisableIdentifyAddressDiscovery(),
		libp2p.ResourceManager(&network.NullResourceManager{}),
	)...)
}

// Host is a host that a suite starts itself.
type Host struct {
	*migrate.Host
	basic *bhost.BasicHost
}

// Start starts what the host is made of.
func (h *Host) Start() { h.basic.Start() }

// NewHost stands in the place of bhost.NewHost, in suites.
func NewHost(t testing.TB, n *swarm.Swarm, opts *bhost.HostOpts) (*Host, error) {
	s := newSuite(t, 50*time.Millisecond, realDials)
	if opts == nil {
		opts = new(bhost.HostOpts)
	}
	m, err := connmgr.New(opts.ConnManager, Options(&s.migrations)...)
	if err != nil {
		return nil, err
	}
	opts.ConnManager = m
	basic, err := bhost.NewHost(n, opts)
	if err != nil {
		return nil, err
	}
	wrapped, err := m.Wrap(basic)
	if err != nil {
		return nil, err
	}
	s.double(wrapped)
	return &Host{Host: wrapped, basic: basic}, nil
}
