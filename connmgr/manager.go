package connmgr

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/connmgr"
	coreevent "github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	basic "github.com/libp2p/go-libp2p/p2p/net/connmgr"
	"go.uber.org/zap"

	"github.com/go-portage/portage/internal/punch"
	"github.com/go-portage/portage/internal/sampled"
	"github.com/go-portage/portage/migrate"
	"github.com/go-portage/portage/policy"
)

// Errors to test for with errors.Is.
var (
	ErrClosed     = errors.New("connection manager is closed")
	ErrWrapped    = errors.New("connection manager already has a host; make a manager for each host")
	ErrNotManager = errors.New("host has another connection manager; pass libp2p.ConnectionManager")
	ErrNoNetwork  = errors.New("connection manager has not met a network yet")
	ErrNoDecay    = errors.New("inner connection manager has no decaying tags")
)

// Manager is a connection manager that consolidates: it leaves one good connection to
// each peer and takes the streams there first. The rest of what a connection manager
// does, the one that it decorates does.
//
// All methods are safe for concurrent use.
type Manager struct {
	inner connmgr.ConnManager
	cfg   config
	log   *zap.Logger
	watch *watcher

	ctx    context.Context // of everything that runs; done when Close is called
	cancel context.CancelFunc
	wg     sync.WaitGroup // every goroutine, and every Consolidate; Add only while mu is held and closed is false
	wake   chan struct{}  // to the dispatcher; capacity 1
	awake  atomic.Bool    // the dispatcher runs

	contested atomic.Bool // another host was to be wrapped, too
	bareOnce  sync.Once   // the warning
	closeOnce sync.Once
	closeErr  error

	steering   steering
	usage      usage
	young      young
	upgrades   upgrades
	silences   sampled.Lines // which lines about peers are logged; see logSampled
	refusals   sampled.Lines
	interfaces interfaces
	ranking    atomic.Pointer[ranker]
	probe      prober
	greet      greeter
	punch      puncher
	instance   uint64 // immutable: what this process calls itself; see Hello
	events     emitter
	totals     totals
	history    history

	// mu guards what follows and everything in each peerState that is not said to be
	// immutable. It is held briefly, and never across a call to a host, a network, a
	// connection or a stream. Before the locks of steering, usage, young, upgrades and
	// watcher, never after them.
	mu      sync.Mutex
	closed  bool
	host    host.Host     // that Wrap got; nil before
	wrapped *migrate.Host // that Wrap returned; nil before
	mover   mover         // nil without Wrap
	peers   map[peer.ID]*peerState
	due     dueHeap // the peers that wait for their next round
	places  int     // taken by rounds, not counting those of Consolidate
}

var (
	_ connmgr.ConnManager = (*Manager)(nil)
	_ connmgr.Decayer     = (*Manager)(nil)
)

// New returns a Manager that decorates inner. If inner is nil, it decorates what
// libp2p.New would have made by default: the basic connection manager with watermarks
// of 160 and 192 and its own grace period.
//
// The Manager owns inner and closes it when it is closed, which the host does.
func New(inner connmgr.ConnManager, opts ...Option) (*Manager, error) {
	cfg, err := configure(opts)
	if err != nil {
		return nil, fmt.Errorf("connection manager: %w", err)
	}
	if inner == nil {
		if inner, err = basic.NewConnManager(defaultLowWater, defaultHighWater); err != nil {
			return nil, fmt.Errorf("default connection manager: %w", err)
		}
	}
	return newManager(inner, cfg), nil
}

func configure(opts []Option) (config, error) {
	cfg := defaultConfig()
	for _, opt := range opts {
		if opt == nil {
			continue // as libp2p.New does with its own
		}
		if err := opt(&cfg); err != nil {
			return config{}, err
		}
	}
	return cfg, nil
}

func newManager(inner connmgr.ConnManager, cfg config) *Manager {
	m := &Manager{
		inner:    inner,
		cfg:      cfg,
		wake:     make(chan struct{}, 1),
		peers:    make(map[peer.ID]*peerState),
		probe:    probe,
		punch:    punch.Again,
		instance: rand.Uint64() | 1,
		events:   emitter{log: cfg.log},
	}
	m.greet = m.hello
	m.log = m.history.beside(cfg.log)
	m.totals.since = time.Now()
	m.silences.Every, m.refusals.Every = sampleEvery, sampleEvery
	m.ranking.Store(newRanker(cfg.policy))
	m.ctx, m.cancel = context.WithCancel(context.Background())
	m.watch = newWatcher(inner.Notifee(), m.wakeUp, func(c network.Conn) {
		m.young.disconnected(c)
		if m.upgrades.disconnected(c) {
			m.wakeUp()
		}
	})
	return m
}

// Wrap gives the manager the host whose connection manager it is, and returns the
// *migrate.Host to use from then on: streams opened through it, and streams that come
// in from now on, can move, and new streams go to the winner. It also advertises
// [DrainID]. [Enable] does the same inside libp2p.New, and reaches what that builds on the
// host, too.
//
// Call it once, right after libp2p.New: streams that exist before cannot move. A second
// call is an error ([ErrWrapped]), and so is a host that was not made with
// libp2p.ConnectionManager and this manager ([ErrNotManager]). A host that was made with
// this manager beside another one closes it for both, which is logged as an error.
func (m *Manager) Wrap(h host.Host) (*migrate.Host, error) {
	if h == nil {
		return nil, errors.New("wrap: host is nil")
	}
	if cm := h.ConnManager(); cm != connmgr.ConnManager(m) {
		return nil, fmt.Errorf("wrap: %w (it has a %T)", ErrNotManager, cm)
	}
	if err := m.adopt(h); err != nil {
		return nil, fmt.Errorf("wrap: %w", err)
	}
	identified, err := h.EventBus().Subscribe(events, eventbus.Name("portage/connmgr"))
	if err != nil {
		m.disown()
		return nil, fmt.Errorf("wrap: %w", err)
	}
	if err := m.events.start(h.EventBus()); err != nil {
		_ = identified.Close()
		m.disown()
		return nil, fmt.Errorf("wrap: %w", err)
	}
	opts := []migrate.Option{migrate.WithConnSelector(m.steer), migrate.WithStreamObserver(m.began), migrate.WithTracer(m.migrated), migrate.WithLogger(m.log)}
	if mt := m.cfg.metrics; mt != nil {
		opts = append(opts, migrate.WithViolationObserver(func(peer.ID) { mt.Violation() }))
	}
	wrapped, err := migrate.Wrap(h, append(opts, m.cfg.migrateOptions...)...)
	if err != nil {
		_ = identified.Close()
		m.events.stop()
		m.disown()
		return nil, fmt.Errorf("wrap: %w", err)
	}
	m.mu.Lock()
	m.wrapped = wrapped
	m.mu.Unlock()
	m.attach(wrapped, hostMover{wrapped})
	m.listen(identified)
	return wrapped, nil
}

// events tell that it is known, or known better, what a peer speaks: who decides, whether
// its streams can move, whether it can be asked; and that a peer or this host is found under
// other addresses, or by others.
var events = []any{
	new(coreevent.EvtPeerIdentificationCompleted), new(coreevent.EvtPeerProtocolsUpdated),
	new(coreevent.EvtLocalAddressesUpdated), new(coreevent.EvtLocalReachabilityChanged),
}

// listen has a round for each peer with duplicates of which an event tells, until Close.
func (m *Manager) listen(events coreevent.Subscription) {
	if !m.begin() {
		_ = events.Close()
		return
	}
	go func() {
		defer m.wg.Done()
		defer events.Close()
		for {
			select {
			case <-m.ctx.Done():
				return
			case e, open := <-events.Out():
				switch e := e.(type) {
				case coreevent.EvtPeerIdentificationCompleted:
					m.identified(e.Peer)
					if m.upgrades.told(e, m.watch.seed, time.Now()) {
						m.wakeUp()
					}
				case coreevent.EvtPeerProtocolsUpdated:
					m.identified(e.Peer)
				case coreevent.EvtLocalAddressesUpdated, coreevent.EvtLocalReachabilityChanged:
					m.upgradeChanged("")
				}
				if !open {
					return
				}
			}
		}
	}()
}

func (m *Manager) identified(p peer.ID) {
	manages := managed(m.watch.network(), p) == yes
	m.mu.Lock()
	d := m.peers[p]
	if d != nil {
		d.manages = d.manages || manages
		for _, cs := range d.conns {
			cs.lacks = false // it may serve it by now
		}
		m.schedule(d, time.Now())
	}
	m.mu.Unlock()
	if d != nil {
		m.wakeUp()
	}
}

// adopt makes h the manager's host, of which there can be one.
func (m *Manager) adopt(h host.Host) error {
	m.mu.Lock()
	closed, own := m.closed, m.host
	if !closed && own == nil {
		m.host = h
	}
	m.mu.Unlock()
	switch {
	case closed:
		return ErrClosed
	case own != nil:
		if own.Network() != h.Network() {
			m.contested.Store(true)
		}
		return fmt.Errorf("%w: %s", ErrWrapped, own.Network().LocalPeer())
	}
	return nil
}

func (m *Manager) disown() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.host = nil
}

// attach lets the manager migrate with mv, and tells peers that it runs on h.
func (m *Manager) attach(h host.Host, mv mover) {
	h.SetStreamHandler(DrainID, m.handleDrain)
	m.mu.Lock()
	m.mover = mv
	closed := m.closed
	m.mu.Unlock()
	if closed { // meanwhile: Close may not have seen the handler
		h.Mux().RemoveHandler(DrainID)
	}
	m.watch.scan(h.Network())
}

// ranker is the policy, and what it looks at.
type ranker struct {
	policy.Policy
	use    policy.Use
	blamed atomic.Bool // an error line has been written about it
}

func newRanker(p policy.Policy) *ranker { return &ranker{Policy: p, use: policy.Uses(p)} }

// name is the policy's String, which is a program's own code, too.
func (r *ranker) name() (name string) {
	defer func() {
		if recover() != nil {
			name = fmt.Sprintf("%T", r.Policy)
		}
	}()
	return r.String()
}

func (m *Manager) policy() *ranker { return m.ranking.Load() }

// SetPolicy replaces the policy. All peers with more than one connection are ranked anew,
// at once: there is no settle delay, and the winner so far has no advantage but what the
// policy gives it. A nil policy is an error. Safe for concurrent use; it does not block.
func (m *Manager) SetPolicy(p policy.Policy) error {
	if p == nil {
		return errors.New("set policy: policy is nil")
	}
	by := newRanker(p)
	m.ranking.Store(by)
	m.log.Info("policy changed", zap.String("policy", by.name()))
	m.mu.Lock()
	now := time.Now()
	for _, d := range m.peers {
		d.atOnce = true
		m.schedule(d, now)
	}
	m.mu.Unlock()
	m.wakeUp()
	return nil
}

// Close ends all rounds and closes inner. Streams that are being migrated are not
// interrupted; the rest is left as it is. It returns within a second, also if a
// transport blocks in closing a connection, and then logs that. The host calls it when
// it is closed itself. Further calls do nothing and return the same.
func (m *Manager) Close() error {
	m.closeOnce.Do(func() {
		m.mu.Lock()
		m.closed = true
		h := m.host
		m.mu.Unlock()
		if h != nil && (m.contested.Load() || m.watch.metSecond()) {
			m.log.Error("connection manager was given to two hosts, and one of them has closed it: "+
				"nothing is consolidated any more at the other; make a manager for each host", zap.Stringer("host", h.Network().LocalPeer()))
		}
		m.cancel()
		m.watch.close()
		if h != nil {
			// Not RemoveStreamHandler, which has identify tell everybody: mostly the
			// host is being closed. If it is not, its peers take over after a while.
			h.Mux().RemoveHandler(DrainID)
		}
		ended := make(chan struct{})
		go func() {
			m.wg.Wait()
			close(ended)
		}()
		select {
		case <-ended:
		case <-time.After(closeWait):
			m.log.Warn("connection manager closed while closing a connection blocks",
				zap.Duration("waited", closeWait))
		}
		m.steering.clear()
		m.measureNothing()
		m.events.stop()
		m.closeErr = m.inner.Close()
	})
	return m.closeErr
}

// begin keeps Close waiting until the caller has called m.wg.Done. It is false if the
// manager is closed.
func (m *Manager) begin() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return false
	}
	m.wg.Add(1)
	return true
}

// TagPeer implements connmgr.ConnManager: it is inner's.
func (m *Manager) TagPeer(p peer.ID, tag string, value int) { m.inner.TagPeer(p, tag, value) }

// UntagPeer implements connmgr.ConnManager: it is inner's.
func (m *Manager) UntagPeer(p peer.ID, tag string) { m.inner.UntagPeer(p, tag) }

// UpsertTag implements connmgr.ConnManager: it is inner's.
func (m *Manager) UpsertTag(p peer.ID, tag string, upsert func(int) int) {
	m.inner.UpsertTag(p, tag, upsert)
}

// GetTagInfo implements connmgr.ConnManager: it is inner's.
func (m *Manager) GetTagInfo(p peer.ID) *connmgr.TagInfo { return m.inner.GetTagInfo(p) }

// TrimOpenConns implements connmgr.ConnManager: it is inner's.
func (m *Manager) TrimOpenConns(ctx context.Context) { m.inner.TrimOpenConns(ctx) }

// Notifee implements connmgr.ConnManager: inner's notifiee, with the manager watching
// beside it. It is always the same one.
func (m *Manager) Notifee() network.Notifiee { return m.watch }

// Protect implements connmgr.ConnManager: it is inner's. A protected peer keeps one
// connection like any other; protection is from trimming.
func (m *Manager) Protect(p peer.ID, tag string) { m.inner.Protect(p, tag) }

// Unprotect implements connmgr.ConnManager: it is inner's.
func (m *Manager) Unprotect(p peer.ID, tag string) bool { return m.inner.Unprotect(p, tag) }

// IsProtected implements connmgr.ConnManager: it is inner's.
func (m *Manager) IsProtected(p peer.ID, tag string) bool { return m.inner.IsProtected(p, tag) }

// CheckLimit implements connmgr.ConnManager: it is inner's.
func (m *Manager) CheckLimit(l connmgr.GetConnLimiter) error { return m.inner.CheckLimit(l) }

// RegisterDecayingTag implements connmgr.Decayer: it is inner's. Where inner is no
// connmgr.Decayer, it returns [ErrNoDecay].
func (m *Manager) RegisterDecayingTag(name string, interval time.Duration, decay connmgr.DecayFn, bump connmgr.BumpFn) (connmgr.DecayingTag, error) {
	d, ok := connmgr.SupportsDecay(m.inner)
	if !ok {
		return nil, fmt.Errorf("decaying tag %q: %w (it is a %T)", name, ErrNoDecay, m.inner)
	}
	return d.RegisterDecayingTag(name, interval, decay, bump)
}
