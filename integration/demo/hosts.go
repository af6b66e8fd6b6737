package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	relayv2 "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	ma "github.com/multiformats/go-multiaddr"
)

// testbed is the hosts and the paths between them.
//
//	-from relay                                  -from tcp -to quic
//
//	          +-------+                          sender <---- TCP ----- receiver
//	   +------| relay |------+                          ----- QUIC --->
//	shaper    +-------+      |
//	   |                     |                   The receiver dials the first
//	sender -- direct, -to -> receiver            connection, the sender the second.
type testbed struct {
	cfg      config
	sender   host.Host
	receiver host.Host
	relay    host.Host     // nil unless -from relay
	shaper   *shaper       // nil unless -from relay
	gate     *gate         // of the sender; nil if -from relay
	doors    map[path]door // of -cut

	held    chan dialled // the dial that waits at the gate
	closers []func() error
}

type dialled struct {
	conn network.Conn
	err  error
}

// newTestbed starts the hosts, without any connection. What it returns has to be
// closed even after an error.
func newTestbed(ctx context.Context, cfg config, rec *recorder, con *console) (*testbed, error) {
	bed := &testbed{cfg: cfg}
	senderOpts := []libp2p.Option{libp2p.NoListenAddrs, libp2p.EnableRelay()}
	if cfg.from != relay {
		bed.gate = newGate()
		senderOpts = []libp2p.Option{
			libp2p.ListenAddrStrings(cfg.from.listenAddr()),
			libp2p.ConnectionGater(bed.gate),
		}
	}
	// Each end listens where the other dials it and nowhere else, so that no dial
	// has a choice of addresses.
	receiverOpts := []libp2p.Option{libp2p.ListenAddrStrings(cfg.to.listenAddr())}

	var err error
	if bed.receiver, err = bed.start(receiverSide, rec, con, receiverOpts...); err != nil {
		return bed, err
	}
	if bed.sender, err = bed.start(senderSide, rec, con, senderOpts...); err != nil {
		return bed, err
	}
	bed.sender.Network().Notify(rec.watch(senderSide, bed.receiver.ID()))
	bed.receiver.Network().Notify(rec.watch(receiverSide, bed.sender.ID()))
	if cfg.from == relay {
		err = bed.startRelay()
	}
	return bed, err
}

// start starts the host of one side, with Portage unless it is to do without.
func (bed *testbed) start(who side, rec *recorder, con *console, opts ...libp2p.Option) (host.Host, error) {
	resources, err := newResourceManager(bed.cfg.streams)
	if err != nil {
		return nil, err
	}
	opts = append(opts, libp2p.ResourceManager(resources), bed.measured(), bed.dials())
	if !bed.cfg.without {
		opts = append(opts, withPortage(bed.cfg, who, rec, con.logger(who, bed.cfg.verbose)))
	}
	h, err := libp2p.New(opts...)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", who, err)
	}
	bed.closers = append(bed.closers, h.Close)
	if srv := bed.cfg.server; srv != nil {
		srv.show(who, h)
	}
	return h, nil
}

// measured has metrics where somebody can see them.
func (bed *testbed) measured() libp2p.Option {
	if srv := bed.cfg.server; srv != nil && !bed.cfg.without {
		return libp2p.PrometheusRegisterer(srv.metrics)
	}
	return libp2p.DisableMetrics()
}

// dials has -timeout alone bound the dials. By themselves they end after 5 s on loopback,
// which a machine that is busy can take for a handshake.
func (bed *testbed) dials() libp2p.Option {
	return libp2p.SwarmOpts(swarm.WithDialTimeout(bed.cfg.timeout), swarm.WithDialTimeoutLocal(bed.cfg.timeout))
}

func (bed *testbed) startRelay() error {
	resources := relayv2.DefaultResources()
	resources.Limit = &relayv2.RelayLimit{Duration: bed.cfg.relay.time, Data: bed.cfg.relay.data}
	h, err := libp2p.New(
		libp2p.ListenAddrStrings(tcp.listenAddr()),
		libp2p.ForceReachabilityPublic(), // else it would say that it has no address of use
		libp2p.DisableMetrics(),
		bed.dials(),
	)
	if err != nil {
		return fmt.Errorf("relay: %w", err)
	}
	bed.relay = h
	bed.closers = append(bed.closers, h.Close)
	// Not libp2p.EnableRelayService, which begins to serve some time after New.
	if _, err := relayv2.New(h, relayv2.WithResources(resources)); err != nil {
		return fmt.Errorf("relay: %w", err)
	}

	var port string
	for _, addr := range h.Network().ListenAddresses() { // /p2p-circuit is among them
		if p, err := addr.ValueForProtocol(ma.P_TCP); err == nil {
			port = p
		}
	}
	if bed.shaper, err = newShaper("127.0.0.1:"+port, bed.cfg.relay.rate); err != nil {
		return fmt.Errorf("path to the relay: %w", err)
	}
	bed.closers = append(bed.closers, bed.shaper.close)
	return nil
}

// newResourceManager returns go-libp2p's own resource manager with its default
// limits, save those that so many streams of one protocol, to one peer, over one
// connection, would meet: by default a peer may open 64 per protocol.
func newResourceManager(streams int) (network.ResourceManager, error) {
	limits := rcmgr.DefaultLimits
	libp2p.SetDefaultServiceLimits(&limits)

	// A stream that moves is two for a moment; identify and the like need some too.
	n := 2*streams + 64
	// yamux reserves 256 KiB for each stream's window, up to 16 MiB for a busy one.
	memory := int64(n)*(256<<10) + 64<<20
	ours := rcmgr.BaseLimit{Streams: n, StreamsInbound: n, StreamsOutbound: n, Memory: memory}
	limits.AddProtocolLimit(fileProtocol, ours, rcmgr.BaseLimitIncrease{})
	limits.AddProtocolPeerLimit(fileProtocol, ours, rcmgr.BaseLimitIncrease{})
	// Transient are streams whose protocol is not known yet.
	for _, limit := range []*rcmgr.BaseLimit{&limits.PeerBaseLimit, &limits.TransientBaseLimit, &limits.SystemBaseLimit} {
		limit.Streams = max(limit.Streams, n)
		limit.StreamsInbound = max(limit.StreamsInbound, n)
		limit.StreamsOutbound = max(limit.StreamsOutbound, n)
		limit.Memory = max(limit.Memory, memory)
	}
	limits.ConnBaseLimit.Memory = max(limits.ConnBaseLimit.Memory, memory)
	return rcmgr.NewResourceManager(rcmgr.NewFixedLimiter(limits.AutoScale()))
}

// connectFirst makes the connection that the transfer starts on.
func (bed *testbed) connectFirst(ctx context.Context) error {
	if bed.cfg.from == relay {
		return bed.connectRelayed(ctx)
	}
	// See gate: the sender's dial is under way when the receiver's succeeds.
	bed.held = make(chan dialled, 1)
	bed.sender.Peerstore().AddAddrs(bed.receiver.ID(), bed.receiver.Addrs(), peerstore.PermanentAddrTTL)
	go func() {
		conn, err := bed.sender.Network().DialPeer(
			network.WithDialPeerTimeout(ctx, bed.cfg.timeout), bed.receiver.ID())
		bed.held <- dialled{conn, err}
	}()
	select {
	case <-bed.gate.reached:
	case d := <-bed.held:
		return fmt.Errorf("the dial of the second connection ended before its time: %w", d.err)
	case <-ctx.Done():
		return ctx.Err()
	}
	if err := bed.receiver.Connect(ctx, peer.AddrInfo{ID: bed.sender.ID(), Addrs: bed.sender.Addrs()}); err != nil {
		return err
	}
	// The accepting end knows of the connection a moment later.
	return poll(ctx, func() bool { return len(bed.sender.Network().ConnsToPeer(bed.receiver.ID())) > 0 })
}

func (bed *testbed) connectRelayed(ctx context.Context) error {
	relayInfo := peer.AddrInfo{ID: bed.relay.ID(), Addrs: bed.relay.Addrs()}
	if err := bed.receiver.Connect(ctx, relayInfo); err != nil {
		return fmt.Errorf("receiver to relay: %w", err)
	}
	if _, err := client.Reserve(ctx, bed.receiver, relayInfo); err != nil {
		return fmt.Errorf("reservation: %w", err)
	}
	narrow, err := ma.NewMultiaddr(fmt.Sprintf("/ip4/127.0.0.1/tcp/%d", bed.shaper.port()))
	if err != nil {
		return err
	}
	if err := bed.sender.Connect(ctx, peer.AddrInfo{ID: bed.relay.ID(), Addrs: []ma.Multiaddr{narrow}}); err != nil {
		return fmt.Errorf("sender to relay: %w", err)
	}
	circuit, err := ma.NewMultiaddr(fmt.Sprintf("%s/p2p/%s/p2p-circuit", narrow, bed.relay.ID()))
	if err != nil {
		return err
	}
	return bed.sender.Connect(ctx, peer.AddrInfo{ID: bed.receiver.ID(), Addrs: []ma.Multiaddr{circuit}})
}

// connectSecond makes the second connection, once after has passed since something of
// each stream has arrived: a stream that opens later could take it at once. If the
// transfer is done before that, there will be none: false.
func (bed *testbed) connectSecond(ctx context.Context, rec *recorder, after time.Duration, done <-chan struct{}) (bool, error) {
	select {
	case <-rec.underWay:
	case <-done:
		return false, nil
	}
	timer := time.NewTimer(after)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-done:
		return false, nil
	}
	var d dialled
	if bed.cfg.from == relay {
		bed.sender.Peerstore().AddAddrs(bed.receiver.ID(), bed.receiver.Addrs(), peerstore.PermanentAddrTTL)
		d.conn, d.err = bed.sender.Network().DialPeer(
			network.WithForceDirectDial(ctx, "a direct connection beside the relayed one"), bed.receiver.ID())
	} else {
		bed.gate.open()
		d = <-bed.held
	}
	if d.err != nil {
		return false, fmt.Errorf("second connection (%s): %w", bed.cfg.to.title(), d.err)
	}
	if got := pathOf(d.conn); got != bed.cfg.to {
		return false, fmt.Errorf("second connection: it is %s, not %s", got.title(), bed.cfg.to.title())
	}
	return true, nil
}

// awaitBoth waits until each side has both connections, and returns them. The
// accepting end may be a moment behind the other.
func (bed *testbed) awaitBoth(ctx context.Context) []connection {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	var all []connection
	poll(ctx, func() bool {
		all = bed.connections()
		return len(all) == 4
	})
	return all
}

// awaitOne waits until each side has one connection to the other, the second one.
func (bed *testbed) awaitOne(ctx context.Context, limit time.Duration) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf(
		"all arrived, but %v later the %s connection was still open", limit, bed.cfg.from.title()))
	defer cancel()
	err := poll(ctx, func() bool {
		for _, c := range bed.connections() {
			if c.path != bed.cfg.to {
				return false
			}
		}
		return true
	})
	return cause(ctx, err)
}

// poll waits until done, and asks often: it is a matter of milliseconds.
func poll(ctx context.Context, done func() bool) error {
	ticker := time.NewTicker(5 * time.Millisecond)
	defer ticker.Stop()
	for !done() {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// connection is one end of a connection between sender and receiver.
type connection struct {
	side     side
	path     path
	outbound bool // this side dialled
}

// connections returns what connections sender and receiver have to each other, as
// each side sees it.
func (bed *testbed) connections() []connection {
	var all []connection
	for _, end := range []struct {
		side
		host, peer host.Host
	}{
		{senderSide, bed.sender, bed.receiver},
		{receiverSide, bed.receiver, bed.sender},
	} {
		for _, c := range end.host.Network().ConnsToPeer(end.peer.ID()) {
			all = append(all, connection{
				side:     end.side,
				path:     pathOf(c),
				outbound: c.Stat().Direction == network.DirOutbound,
			})
		}
	}
	return all
}

// describe says what is special about the paths.
func (bed *testbed) describe() []string {
	var lines []string
	if bed.relay != nil {
		l := bed.cfg.relay
		lines = append(lines, fmt.Sprintf("relay: cuts a connection after %s or %v; the path to it is shaped to %s/s",
			formatSize(l.data), l.time, formatSize(l.rate)))
	}
	if bed.cfg.rate > 0 {
		lines = append(lines, fmt.Sprintf("sender: paced to %s/s", formatSize(bed.cfg.rate)))
	}
	return lines
}

// close ends everything, the ends first and the relay after them.
func (bed *testbed) close() error {
	if bed.gate != nil {
		bed.gate.open()
	}
	var errs []error
	for _, close := range bed.closers {
		errs = append(errs, close())
	}
	bed.closers = nil
	return errors.Join(errs...)
}
