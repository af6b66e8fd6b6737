package migrate

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	msmux "github.com/multiformats/go-multistream"
	"go.uber.org/zap"

	"github.com/go-portage/portage/internal/sampled"
)

// Host is a host whose streams can migrate. It behaves as the wrapped host except for
// NewStream and the methods that it adds, and also has the methods that go-libp2p's hosts
// have beyond host.Host. Safe for concurrent use.
type Host struct {
	host.Host
	cfg    config
	log    *zap.Logger
	labels *labels
	flows  flows
	late   late
	told   identified
	own    reflect.Value   // the wrapped host's own negotiation timeout, or invalid
	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	debts  debts

	// The host's own, not the package's: a timer must stay in its bubble of synctest.
	negotiators sync.Pool // of *negotiator
	acceptings  sync.Pool // of *accepting

	resumer     *resumer // nil without WithResumption
	autonat     autoNAT
	orphans     atomic.Int64  // streams that are kept for a Migrate that may come; see lost.go
	violations  sampled.Lines // which lines about a peer are logged; see sampled.go
	unaccounted sampled.Lines
}

var _ host.Host = (*Host)(nil)

// Wrap makes the streams of h able to migrate. From here on it handles h's inbound
// streams, of all protocols, and identify advertises ID and FinalSizeID. Use the
// returned host in place of h; streams that are opened with h itself still work, but
// cannot migrate. A host can be wrapped once. Close the returned host, which closes h.
//
// Wrap h before it listens, or right after. A peer that has identified h before learns of
// the protocol from the push of identify that follows, and what it opens until then has no
// label. Streams of other kinds are opened as a host of go-libp2p's opens them, whatever
// the NewStream of h does.
func Wrap(h host.Host, opts ...Option) (*Host, error) {
	cfg := defaults()
	for _, opt := range opts {
		if err := opt(&cfg); err != nil {
			return nil, fmt.Errorf("migrate: %w", err)
		}
	}
	if slices.Contains(h.Mux().Protocols(), ID) {
		return nil, errors.New("migrate: the host handles " + string(ID) + " already; wrap it once")
	}
	own := negotiationTimeout(h)
	if !cfg.negotiates && own.IsValid() {
		cfg.negotiation = max(0, time.Duration(own.Int()))
	}
	mh := &Host{Host: h, cfg: cfg, log: cfg.log, labels: newLabels(h.ID())}
	mh.violations.Every, mh.unaccounted.Every = sampleEvery, sampleEvery
	mh.ctx, mh.cancel = context.WithCancel(context.Background())
	if !cfg.negotiates {
		mh.own = own
	}
	mh.told.watched = append([]protocol.ID{ID, FinalSizeID}, cfg.protocols...)
	if cfg.resumes != nil {
		if n := len(mh.told.watched); n == maxWatched {
			mh.cancel()
			return nil, fmt.Errorf("migrate: WithPeerProtocols: %d protocols; with WithResumption %d at most", len(cfg.protocols), maxWatched-3)
		}
		mh.told.watched = append(mh.told.watched, ResumeID)
		mh.resumer = newResumer(mh)
	}
	if err := mh.told.follow(mh); err != nil {
		mh.cancel()
		return nil, fmt.Errorf("migrate: %w", err)
	}
	// Both are never reached through the handler below: it serves ID itself, and what
	// comes behind a label must be neither.
	// FinalSizeID goes first: identify may tell of one before it tells of the other.
	h.SetStreamHandler(FinalSizeID, func(u network.Stream) { _ = u.Reset() })
	if mh.resumer != nil {
		h.SetStreamHandler(ResumeID, mh.serveReports)
		h.Network().Notify(&network.NotifyBundle{
			ConnectedF: func(_ network.Network, c network.Conn) { mh.resumer.connected(c) },
		})
	}
	h.SetStreamHandler(ID, func(u network.Stream) { _ = u.ResetWithError(network.StreamProtocolViolation) })
	h.Network().SetStreamHandler(mh.handleStream)
	h.Network().Notify(&network.NotifyBundle{
		DisconnectedF: func(_ network.Network, c network.Conn) { mh.disconnected(c) },
	})
	return mh, nil
}

// negotiationTimeout finds the negotiation timeout of a go-libp2p host, or of one that is
// wrapped around it. There is no method that tells it, so it is read where it stands: as
// long as nobody knows whether a stream will have a label, NewStream must wait exactly as
// long as that host would. Where it is not found, the result is invalid.
func negotiationTimeout(h host.Host) reflect.Value {
	v := reflect.ValueOf(h)
	for range 16 { // pointers, interfaces, and hosts around hosts
		switch v.Kind() {
		case reflect.Pointer, reflect.Interface:
			v = v.Elem()
		case reflect.Struct:
			for _, name := range []string{"negtimeout", "Host", "host"} {
				f, ok := v.Type().FieldByName(name)
				if !ok {
					continue
				}
				next, err := v.FieldByIndexErr(f.Index)
				if err != nil {
					return reflect.Value{}
				}
				if next.Type() == reflect.TypeFor[time.Duration]() {
					return next
				}
				v = next
				break
			}
		}
	}
	return reflect.Value{}
}

// timeout is how long NewStream may take where its context has no deadline. Zero or less:
// any time.
func (h *Host) timeout() time.Duration {
	if h.own.IsValid() {
		return time.Duration(h.own.Int())
	}
	return h.cfg.negotiation
}

// Close closes the wrapped host, and with it all of its streams.
func (h *Host) Close() error {
	h.cancel()
	if h.resumer != nil {
		h.resumer.close()
	}
	h.autonat.close()
	err := h.Host.Close()
	h.told.close()
	return err
}

// Supports says whether p is known to speak the protocol: from identify, or because there
// are labelled streams with it.
func (h *Host) Supports(p peer.ID) bool { return h.speaks(p, ID) || h.labels.any(p) }

// verifies says whether p is known, from identify, to have the verified handover (S12).
func (h *Host) verifies(p peer.ID) bool { return h.speaks(p, FinalSizeID) }

// verifiable says whether the handover of s will be verified. What was known once stays
// known: identify can forget all that a peer speaks, since a push of the peer's that its
// deadline cuts short is read as an empty one (go-libp2p v0.51.0).
func (s *Stream) verifiable() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.verifies = s.verifies || s.host.verifies(s.peer)
	return s.verifies
}

func (h *Host) speaks(p peer.ID, id protocol.ID) bool {
	supported, err := h.Peerstore().SupportsProtocols(p, id)
	return err == nil && len(supported) > 0
}

// Streams returns the labelled streams that have an underlying stream on c, in no
// particular order. One that migrates at the moment has one on both connections.
func (h *Host) Streams(c network.Conn) []*Stream {
	seen := make(map[*Stream]bool)
	var on []*Stream
	for _, s := range h.labels.all(c.RemotePeer()) {
		if !seen[s] && s.on(c) {
			seen[s] = true
			on = append(on, s)
		}
	}
	return on
}

// Unlabelled returns the streams on c that have no label, so that they cannot migrate, of
// whatever protocol, in no particular order.
func (h *Host) Unlabelled(c network.Conn) []network.Stream {
	labelled := make(map[string]bool)
	for _, s := range h.labels.all(c.RemotePeer()) {
		s.mu.Lock()
		labelled[s.send.stream().ID()] = true
		if s.ex != nil {
			labelled[s.ex.old.ID()] = true
			if s.ex.new != nil {
				labelled[s.ex.new.ID()] = true
			}
		}
		s.mu.Unlock()
	}
	return slices.DeleteFunc(c.GetStreams(), func(s network.Stream) bool { return labelled[s.ID()] })
}

func (s *Stream) on(c network.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.send.stream().Conn() == c {
		return true
	}
	return s.ex != nil && (s.ex.old.Conn() == c || s.ex.new != nil && s.ex.new.Conn() == c)
}

// NewStream opens a stream to p, as the wrapped host would: it dials where there is no
// connection, waits for identify, uses a limited connection only where ctx allows it,
// and takes the first of pids that p speaks. Where p is known to speak one of them
// nothing is sent, and no round trip spent, before the first Write or Read (W1).
//
// The stream is on the connection that the selector names (see WithConnSelector), unless
// it cannot be opened there at once.
//
// The stream is labelled, a *Stream, and can migrate, unless p does not support it, one
// of pids is a protocol of libp2p's own that speaks about its connection (identify,
// relay, hole punching, AutoNAT), or ctx comes from WithoutLabel. Without a label it is
// what the wrapped host would return.
//
// It blocks until ctx ends; where that has no deadline, for as long as the wrapped host
// would (see WithNegotiationTimeout).
func (h *Host) NewStream(ctx context.Context, p peer.ID, pids ...protocol.ID) (network.Stream, error) {
	if len(pids) == 0 || slices.ContainsFunc(pids, func(id protocol.ID) bool { return perConnection[id] }) {
		return h.innerStream(ctx, p, pids)
	}
	unlabelled, _ := ctx.Value(withoutLabel{}).(bool)
	if unlabelled && h.named(ctx, p) == nil {
		return h.innerStream(ctx, p, pids)
	}
	if _, ok := ctx.Deadline(); !ok {
		if d := h.timeout(); d > 0 {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, d)
			defer cancel()
		}
	}
	if noDial, _ := network.GetNoDial(ctx); !noDial {
		if err := h.Connect(ctx, peer.AddrInfo{ID: p}); err != nil {
			return nil, err
		}
	}
	named := h.named(ctx, p)
	if unlabelled && named == nil {
		return h.innerStream(network.WithNoDial(ctx, "already dialed"), p, pids)
	}
	u, err := h.openStream(ctx, p, named)
	if err != nil {
		return nil, err
	}
	h.observe(u.Conn(), pids[0], network.DirOutbound)
	s, err := h.begin(ctx, u, pids, unlabelled)
	if err != nil {
		_ = u.ResetWithError(network.StreamProtocolNegotiationFailed)
		return nil, err
	}
	return s, nil
}

// innerStream has the wrapped host open a stream.
func (h *Host) innerStream(ctx context.Context, p peer.ID, pids []protocol.ID) (network.Stream, error) {
	s, err := h.Host.NewStream(ctx, p, pids...)
	if err == nil {
		h.observe(s.Conn(), s.Protocol(), network.DirOutbound)
	}
	return s, err
}

// observe tells the observers of a stream that begins.
func (h *Host) observe(c network.Conn, id protocol.ID, dir network.Direction) {
	for _, begins := range h.cfg.observers {
		begins(c, id, dir)
	}
}

// begin makes u, which was just opened, a stream of one of pids: with a label, unless the
// other end, after identify on this connection, does not support that.
func (h *Host) begin(ctx context.Context, u network.Stream, pids []protocol.ID, unlabelled bool) (network.Stream, error) {
	c := u.Conn()
	if err := h.awaitIdentify(ctx, c); err != nil {
		return nil, err
	}
	supported, err := h.Peerstore().SupportsProtocols(c.RemotePeer(), pids...)
	if err != nil {
		return nil, err
	}
	var pref protocol.ID
	if len(supported) > 0 {
		pref = supported[0]
	}
	l := never
	if !unlabelled {
		l = h.labellingOn(c)
	}
	before := prelude
	switch l {
	case never:
		return h.plain(ctx, u, pref, pids)
	case ask:
		selected, err := h.askFor(ctx, u, pids)
		if err != nil {
			return nil, err
		}
		if selected != ID {
			return h.agreed(u, selected)
		}
		before = ""
	}
	s, err := h.openBehind(ctx, u, before, pref, pids)
	if err != nil {
		return nil, err
	}
	return s, nil
}

// askFor negotiates ID, or else one of pids.
func (h *Host) askFor(ctx context.Context, u network.Stream, pids []protocol.ID) (protocol.ID, error) {
	selected, err := h.selectOneOf(ctx, append([]protocol.ID{ID}, pids...), u)
	var none msmux.ErrNotSupported[protocol.ID]
	switch {
	case errors.As(err, &none):
		h.told.tell(u.Conn(), h.told.only(ID, false))
		// The application has not asked for ID.
		return "", notNegotiated(msmux.ErrNotSupported[protocol.ID]{Protos: pids})
	case err != nil:
		return "", err
	}
	h.told.tell(u.Conn(), h.told.only(ID, selected == ID))
	return selected, nil
}
