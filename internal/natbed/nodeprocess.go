//go:build linux

package natbed

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/control"
	"github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/host/autorelay"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	"github.com/libp2p/go-libp2p/p2p/protocol/holepunch"
	ma "github.com/multiformats/go-multiaddr"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/go-portage/portage/connmgr"
	"github.com/go-portage/portage/internal/punch"
	"github.com/go-portage/portage/migrate"
)

// nodeEnv marks a process as a node.
const nodeEnv = "PORTAGE_NAT_NODE"

// Main is to be called at the very start of main, or of TestMain: in a process that is a
// node, it does what it is told until its standard input ends, and does not return.
func Main() {
	if os.Getenv(nodeEnv) == "" {
		return
	}
	n := &nodeProcess{
		out:     json.NewEncoder(os.Stdout),
		streams: make(map[string]*traffic),
		changed: make(chan struct{}),
		first:   make(chan struct{}),
	}
	n.serve(os.Stdin)
	n.close()
	os.Exit(0)
}

// nodeProcess is a node, from within.
type nodeProcess struct {
	outMu sync.Mutex
	out   *json.Encoder

	inner   host.Host // as libp2p.New returned it
	host    host.Host // wrapped where Portage runs
	manager *connmgr.Manager

	first     chan struct{} // closed when there is a stream
	firstOnce sync.Once

	mu      sync.Mutex
	streams map[string]*traffic // by name
	changed chan struct{}       // closed and replaced when streams gets another
}

func (n *nodeProcess) serve(in io.Reader) {
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var r request
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			fmt.Fprintf(os.Stderr, "a line that is no request: %v\n", err)
			return
		}
		go func() {
			result, err := n.do(r)
			answer := line{ID: r.ID}
			if err != nil {
				answer.Error = err.Error()
			}
			answer.Result, _ = json.Marshal(result)
			n.write(answer)
		}()
	}
}

func (n *nodeProcess) write(l line) {
	n.outMu.Lock()
	defer n.outMu.Unlock()
	_ = n.out.Encode(l) // a program that is gone ends the input, too
}

func (n *nodeProcess) tell(e Event) {
	e.At = time.Now()
	n.write(line{Event: &e})
}

func (n *nodeProcess) close() {
	if n.host != nil {
		n.host.Close()
	}
}

// do does what a request says. A request waits as long as it has to: the program knows when
// to give up, and then ends the node.
func (n *nodeProcess) do(r request) (any, error) {
	ctx := context.Background()
	switch r.Do {
	case "start":
		return with(r, n.start)
	case "reserved":
		return n.awaitReservation(ctx)
	case "punchable":
		return nil, poll(ctx, func() bool { return slices.Contains(n.host.Mux().Protocols(), holepunch.Protocol) })
	case "connect":
		return with(r, func(to Info) (any, error) { return nil, n.connect(ctx, to) })
	case "open":
		return with(r, func(s Stream) (any, error) { return n.openTraffic(ctx, s) })
	case "finish":
		return with(r, func(name string) (any, error) {
			t := n.traffic(ctx, name)
			t.stop()
			<-t.ended
			return t.now(), nil
		})
	case "result":
		return with(r, func(name string) (any, error) {
			t := n.traffic(ctx, name)
			<-t.ended
			return t.now(), nil
		})
	case "flowing":
		return with(r, func(name string) (any, error) {
			t := n.traffic(ctx, name)
			return nil, poll(ctx, func() bool { return t.now().Received > t.Burst })
		})
	case "conns":
		return with(r, func(id string) (any, error) { return n.conns(id) })
	case "reach":
		return with(r, func(to Info) (any, error) { return n.reach(ctx, to) })
	case "punch":
		return with(r, func(id string) (any, error) {
			p, err := peerOf(id)
			if err != nil {
				return nil, err
			}
			return nil, punch.Again(ctx, n.inner, p)
		})
	case "explain":
		return with(r, func(id string) (any, error) {
			p, err := peerOf(id)
			if err != nil || n.manager == nil {
				return "", err
			}
			return fmt.Sprint(n.manager.Explain(p)), nil
		})
	default:
		return nil, fmt.Errorf("%q is not known", r.Do)
	}
}

// with reads the arguments of a request for f.
func with[T any](r request, f func(T) (any, error)) (any, error) {
	var args T
	if err := json.Unmarshal(r.Args, &args); err != nil {
		return nil, fmt.Errorf("%s: %w", r.Do, err)
	}
	return f(args)
}

func (n *nodeProcess) start(cfg Config) (any, error) {
	var err error
	if cfg.IsRelay {
		err = n.startRelay(cfg)
	} else {
		err = n.startPeer(cfg)
	}
	if err != nil {
		return nil, err
	}
	return n.info(), nil
}

func (n *nodeProcess) info() Info {
	info := Info{ID: n.host.ID().String()}
	for _, a := range n.host.Addrs() {
		info.Addrs = append(info.Addrs, a.String())
	}
	return info
}

func (n *nodeProcess) startRelay(cfg Config) error {
	resources := relay.DefaultResources()
	resources.Limit = nil
	if cfg.Limit != nil {
		resources.Limit = &relay.RelayLimit{Duration: cfg.Limit.Duration, Data: cfg.Limit.Data}
	}
	var err error
	n.host, err = libp2p.New(
		libp2p.ListenAddrStrings(cfg.Listen...),
		libp2p.ForceReachabilityPublic(),
		libp2p.DisableMetrics(),
	)
	if err != nil {
		return err
	}
	// Not libp2p.EnableRelayService, which begins to serve some time after New.
	_, err = relay.New(n.host, relay.WithResources(resources))
	return err
}

func (n *nodeProcess) startPeer(cfg Config) error {
	relayInfo, err := infoOf(cfg.Relay)
	if err != nil {
		return fmt.Errorf("relay: %w", err)
	}
	punching := []holepunch.Option{holepunch.WithTracer(punchTracer{n})}
	if cfg.PunchTimeout > 0 {
		punching = append(punching, holepunch.DirectDialTimeout(cfg.PunchTimeout))
	}
	opts := []libp2p.Option{
		libp2p.ListenAddrStrings(cfg.Listen...),
		libp2p.ForceReachabilityPrivate(),
		libp2p.EnableAutoRelayWithStaticRelays([]peer.AddrInfo{*relayInfo}, autorelay.WithBootDelay(0), autorelay.WithBackoff(time.Second)),
		libp2p.EnableHolePunching(punching...),
		libp2p.DisableMetrics(),
	}
	if cfg.StreamFirst {
		opts = append(opts, libp2p.ConnectionGater(&streamFirst{relay: relayInfo.ID, first: n.first}))
	}
	if cfg.Portage {
		log := newLog()
		migrating := []migrate.Option{migrate.WithLogger(log), migrate.WithTracer(n.moved)}
		if cfg.Resumption > 0 {
			migrating = append(migrating, migrate.WithResumption(migrate.ResumePatience(cfg.Resumption)))
		}
		n.manager, err = connmgr.New(nil, connmgr.WithLogger(log), connmgr.WithMigrateOptions(migrating...))
		if err != nil {
			return err
		}
		opts = append(opts, libp2p.ConnectionManager(n.manager), n.manager.Detours())
	}
	h, err := libp2p.New(opts...)
	if err != nil {
		return err
	}
	n.inner, n.host = h, h
	h.Network().Notify(&network.NotifyBundle{
		ConnectedF:    func(_ network.Network, c network.Conn) { n.tell(Event{Kind: Connected, Conn: connOf(c)}) },
		DisconnectedF: func(_ network.Network, c network.Conn) { n.tell(Event{Kind: Disconnected, Conn: connOf(c)}) },
	})
	if cfg.Portage {
		if n.host, err = n.manager.Wrap(h); err != nil {
			return err
		}
	}
	n.host.SetStreamHandler(streamProtocol, n.acceptTraffic)
	n.host.SetStreamHandler(echoProtocol, func(s network.Stream) {
		_, _ = io.Copy(s, s)
		_ = s.Close()
	})
	return nil
}

// streamFirst holds direct dials, but those to the relay, until first is closed. The swarm
// asks for each address just before it dials.
type streamFirst struct {
	relay peer.ID
	first <-chan struct{}
}

func (g *streamFirst) InterceptAddrDial(p peer.ID, a ma.Multiaddr) bool {
	if p != g.relay && transportOf(a) != Relayed {
		<-g.first
	}
	return true
}

func (g *streamFirst) InterceptPeerDial(peer.ID) bool              { return true }
func (g *streamFirst) InterceptAccept(network.ConnMultiaddrs) bool { return true }
func (g *streamFirst) InterceptSecured(network.Direction, peer.ID, network.ConnMultiaddrs) bool {
	return true
}
func (g *streamFirst) InterceptUpgraded(network.Conn) (bool, control.DisconnectReason) {
	return true, 0
}

func newLog() *zap.Logger {
	encoder := zap.NewDevelopmentEncoderConfig()
	encoder.EncodeTime = zapcore.TimeEncoderOfLayout("15:04:05.000")
	return zap.New(zapcore.NewCore(zapcore.NewConsoleEncoder(encoder), zapcore.Lock(os.Stderr), zap.DebugLevel))
}

// moved tells of migrations, and of streams that have lost their connection.
func (n *nodeProcess) moved(e migrate.Event) {
	text := fmt.Sprint(e.Kind)
	if e.Err != nil {
		text += ": " + e.Err.Error()
	}
	switch {
	case e.Kind == migrate.Lost || e.Kind == migrate.Resumed || e.Kind == migrate.GivenUp:
		n.tell(Event{Kind: Resumption, Text: text})
	case e.To != nil:
		n.tell(Event{Kind: Move, Text: text, Initiator: e.Initiator, Conn: connOf(e.To)})
	}
}

// punchTracer tells of hole punching.
type punchTracer struct{ n *nodeProcess }

func (t punchTracer) Trace(e *holepunch.Event) {
	detail, _ := json.Marshal(e.Evt)
	t.n.tell(Event{Kind: Punch, Text: e.Type + " " + string(detail)})
}

// awaitReservation returns the node's addresses once a relayed one is among them.
func (n *nodeProcess) awaitReservation(ctx context.Context) (Info, error) {
	sub, err := n.host.EventBus().Subscribe(new(event.EvtLocalAddressesUpdated))
	if err != nil {
		return Info{}, err
	}
	defer sub.Close()
	for {
		info := n.info()
		if slices.ContainsFunc(info.Addrs, func(a string) bool { return strings.Contains(a, "/p2p-circuit") }) {
			return info, nil
		}
		select {
		case <-sub.Out():
		case <-ctx.Done():
			return Info{}, ctx.Err()
		}
	}
}

func (n *nodeProcess) connect(ctx context.Context, to Info) error {
	info, err := to.addrInfo()
	if err != nil {
		return err
	}
	return n.host.Connect(network.WithAllowLimitedConn(ctx, "test"), info)
}

// reach opens new streams to a peer until one carries an answer, and says on what it was.
func (n *nodeProcess) reach(ctx context.Context, to Info) (*Conn, error) {
	info, err := to.addrInfo()
	if err != nil {
		return nil, err
	}
	for {
		if c, err := n.reachOnce(ctx, info); err == nil {
			return c, nil
		}
		select {
		case <-time.After(100 * time.Millisecond): // the pause of an application that tries again
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (n *nodeProcess) reachOnce(ctx context.Context, info peer.AddrInfo) (*Conn, error) {
	ctx, cancel := context.WithTimeout(network.WithAllowLimitedConn(ctx, "test"), 5*time.Second)
	defer cancel()
	if err := n.host.Connect(ctx, info); err != nil {
		return nil, err
	}
	s, err := n.host.NewStream(ctx, info.ID, echoProtocol)
	if err != nil {
		return nil, err
	}
	// Nobody who tries again waits for this: on a dead connection of yamux whose buffers are full
	// it takes until that is given up.
	defer func() { go s.Reset() }()
	deadline, _ := ctx.Deadline()
	s.SetDeadline(deadline)
	buf := make([]byte, 32)
	if _, err := s.Write(buf); err != nil {
		return nil, err
	}
	if _, err := io.ReadFull(s, buf); err != nil {
		return nil, err
	}
	return connOf(s.Conn()), nil
}

func (n *nodeProcess) conns(id string) ([]*Conn, error) {
	p, err := peerOf(id)
	if err != nil {
		return nil, err
	}
	conns := []*Conn{}
	for _, c := range n.host.Network().ConnsToPeer(p) {
		if !c.IsClosed() {
			conns = append(conns, connOf(c))
		}
	}
	return conns, nil
}

// keep makes a stream known by its name, and tells of its end.
func (n *nodeProcess) keep(t *traffic) {
	n.mu.Lock()
	n.firstOnce.Do(func() { close(n.first) })
	n.streams[t.Name] = t
	close(n.changed)
	n.changed = make(chan struct{})
	n.mu.Unlock()
	go func() {
		<-t.ended
		result := t.now()
		result.Reads, result.Writes = nil, nil
		n.tell(Event{Kind: Ended, Stream: &result})
	}()
}

// traffic returns the stream of that name, once there is one.
func (n *nodeProcess) traffic(ctx context.Context, name string) *traffic {
	for {
		n.mu.Lock()
		t, changed := n.streams[name], n.changed
		n.mu.Unlock()
		if t != nil {
			return t
		}
		<-changed
	}
}

func peerOf(id string) (peer.ID, error) { return peer.Decode(id) }

func (i Info) addrInfo() (peer.AddrInfo, error) {
	p, err := peerOf(i.ID)
	if err != nil {
		return peer.AddrInfo{}, err
	}
	info := peer.AddrInfo{ID: p}
	for _, a := range i.Addrs {
		addr, err := ma.NewMultiaddr(a)
		if err != nil {
			return peer.AddrInfo{}, err
		}
		info.Addrs = append(info.Addrs, addr)
	}
	return info, nil
}

// infoOf joins addresses of one peer.
func infoOf(addrs []string) (*peer.AddrInfo, error) {
	if len(addrs) == 0 {
		return nil, errors.New("no address")
	}
	var all *peer.AddrInfo
	for _, a := range addrs {
		info, err := peer.AddrInfoFromString(a)
		if err != nil {
			return nil, err
		}
		if all == nil {
			all = info
		} else {
			all.Addrs = append(all.Addrs, info.Addrs...)
		}
	}
	return all, nil
}

// poll waits until done, of which no event tells.
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
