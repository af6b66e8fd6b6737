package connmgr

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/connmgr"
	coreevent "github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	basic "github.com/libp2p/go-libp2p/p2p/net/connmgr"
	"go.uber.org/zap"

	"github.com/go-portage/portage/internal/punch"
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
	cfg   *config
	home  *home
	tasks *tasks

	watch *watcher    // what happens to connections
	sched *scheduler  // which peers have duplicates, and when to look at them
	disp  *dispatcher // has rounds run

	looks    *looker   // what is known of a peer
	policies *policies // which connection is best
	rounds   *rounds   // looks, decides (plan.go), acts

	steer    *steering   // where new streams go
	usage    *usage      // which connections are used
	moves    *migrations // streams to the winner
	paths    *pathAsker  // whether paths work
	serves   *drainServer
	echoes   echoServer // the peers' requests
	upgrades *upgrader  // a direct connection where there is none
	detours  *detourer  // another one where the only one does not answer
	tells    *teller    // the log, events, metrics, totals

	closeOnce sync.Once
	closeErr  error
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

// newManager puts the parts together. Each has what it needs of the others, and no more.
func newManager(inner connmgr.ConnManager, own config) *Manager {
	cfg := &own
	t := newTasks()
	home, usage, young, steer, up, waits := new(home), new(usage), new(young), new(steering), new(upgrades), new(detours)
	exempt := exemptions{inner, cfg.exempt}
	instance := rand.Uint64() | 1
	tells := newTeller(cfg)
	sched := newScheduler(t, cfg.concurrency)
	watch := newWatcher(inner.Notifee(), sched.wakeUp, func(c network.Conn) {
		young.disconnected(c)
		if up.disconnected(c) {
			sched.wakeUp()
		}
	})
	policies := newPolicies(cfg.policy, t, sched, tells)
	looks := &looker{cfg: cfg, network: watch.network, home: home, inner: inner, policies: policies, exempt: exempt, upgrades: up, detours: waits, young: young}
	paths := &pathAsker{cfg: cfg, tasks: t, sched: sched, tells: tells, probe: probe, greet: hello(instance)}
	moves := &migrations{cfg: cfg, tasks: t, sched: sched, tells: tells, usage: usage}
	if cfg.asides == nil {
		cfg.asides = new(asides)
	}
	detours := &detourer{cfg: cfg, tasks: t, sched: sched, network: watch.network, home: home, tells: tells, of: waits, asides: cfg.asides}
	rounds := &rounds{
		cfg: cfg, tasks: t, sched: sched, look: looks, policies: policies, tells: tells, usage: usage, young: young,
		paths: paths, steer: steer, moves: moves, detours: detours,
		asks:  &asker{cfg: cfg, tasks: t, sched: sched, tells: tells},
		close: &closer{tasks: t, network: watch.network, tells: tells},
	}
	upgrader := &upgrader{cfg: cfg, tasks: t, sched: sched, home: home, looks: looks, tells: tells, of: up, punch: punch.Again}
	disp := &dispatcher{watch: watch, sched: sched, rounds: rounds, upgrade: upgrader, young: young}
	sched.loop, sched.forget = disp.loop, rounds.forget
	return &Manager{
		inner: inner, cfg: cfg, home: home, tasks: t, watch: watch, sched: sched, disp: disp, looks: looks, policies: policies,
		rounds: rounds, steer: steer, usage: usage, moves: moves, paths: paths, upgrades: upgrader, detours: detours, tells: tells,
		serves: &drainServer{cfg: cfg, tasks: t, sched: sched, network: watch.network, exempt: exempt, usage: usage, steer: steer, log: tells.log, instance: instance},
		echoes: echoServer{tasks: t},
	}
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
	heard, err := h.EventBus().Subscribe(events, eventbus.Name("portage/connmgr"))
	if err != nil {
		m.home.disown()
		return nil, fmt.Errorf("wrap: %w", err)
	}
	if err := m.tells.events.start(h.EventBus()); err != nil {
		_ = heard.Close()
		m.home.disown()
		return nil, fmt.Errorf("wrap: %w", err)
	}
	opts := []migrate.Option{
		migrate.WithConnSelector(m.steer.choose), migrate.WithSilent(m.steer.silent), migrate.WithStreamObserver(m.began),
		migrate.WithTracer(m.moves.migrated), migrate.WithLogger(m.tells.log), migrate.WithRedial(m.detours.redial),
	}
	if mt := m.cfg.metrics; mt != nil {
		opts = append(opts, migrate.WithViolationObserver(func(peer.ID) { mt.Violation() }), migrate.WithBufferObserver(mt.Buffered))
	}
	wrapped, err := migrate.Wrap(h, append(opts, m.cfg.migrateOptions...)...)
	if err != nil {
		_ = heard.Close()
		m.tells.events.stop()
		m.home.disown()
		return nil, fmt.Errorf("wrap: %w", err)
	}
	m.home.setWrapped(wrapped)
	m.attach(wrapped, hostMover{wrapped})
	m.listen(heard)
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
	listens := m.tasks.start(func() {
		defer events.Close()
		for {
			select {
			case <-m.tasks.ctx.Done():
				return
			case e, open := <-events.Out():
				switch e := e.(type) {
				case coreevent.EvtPeerIdentificationCompleted:
					m.disp.identified(e.Peer)
					m.upgrades.told(e, m.watch.seed)
				case coreevent.EvtPeerProtocolsUpdated:
					m.disp.identified(e.Peer)
				case coreevent.EvtLocalAddressesUpdated, coreevent.EvtLocalReachabilityChanged:
					m.upgrades.changed("")
				}
				if !open {
					return
				}
			}
		}
	})
	if !listens {
		_ = events.Close()
	}
}

// adopt makes h the manager's host.
func (m *Manager) adopt(h host.Host) error {
	if m.tasks.over() {
		return ErrClosed
	}
	return m.home.adopt(h)
}

// attach lets the manager migrate with mv, and tells peers that it runs on h.
func (m *Manager) attach(h host.Host, mv mover) {
	h.SetStreamHandler(PathID, m.echoes.handle)
	h.SetStreamHandler(DrainID, m.serves.handle)
	m.home.setMover(mv)
	if m.tasks.over() { // meanwhile: Close may not have seen the handler
		m.unserve(h)
	}
	m.watch.scan(h.Network())
}

// unserve takes the manager's own protocols from h.
func (m *Manager) unserve(h host.Host) {
	h.Mux().RemoveHandler(DrainID)
	h.Mux().RemoveHandler(PathID)
}

// began is told of each stream that a wrapped host opens or gets.
func (m *Manager) began(c network.Conn, id protocol.ID, _ network.Direction) {
	m.detours.began()
	if m.usage.count.Load() == 0 && m.upgrades.of.count.Load() == 0 || ownProtocol(id) {
		return
	}
	m.upgrades.of.note(c)
	if m.usage.note(c) != nil {
		// It was not used for a while: nobody has asked since whether it works.
		m.sched.poke(c.RemotePeer())
	}
}

// SetPolicy replaces the policy. All peers with more than one connection are ranked anew,
// at once: there is no settle delay, and the winner so far has no advantage but what the
// policy gives it. A nil policy is an error. Safe for concurrent use; it does not block.
func (m *Manager) SetPolicy(p policy.Policy) error {
	if p == nil {
		return errors.New("set policy: policy is nil")
	}
	by := newRanker(p)
	m.policies.inForce.Store(by)
	m.tells.log.Info("policy changed", zap.String("policy", by.name()))
	for _, d := range m.sched.all() {
		d.mu.Lock()
		d.atOnce = true
		d.mu.Unlock()
		m.sched.schedule(d, time.Now())
	}
	return nil
}

// Close ends all rounds and closes inner. Streams that are being migrated are not
// interrupted; the rest is left as it is. It returns within a second, also if a
// transport blocks in closing a connection, and then logs that. The host calls it when
// it is closed itself. Further calls do nothing and return the same.
func (m *Manager) Close() error {
	m.closeOnce.Do(func() {
		m.tasks.refuse()
		h := m.home.host()
		if h != nil && (m.home.wasContested() || m.watch.metSecond()) {
			m.tells.log.Error("connection manager was given to two hosts, and one of them has closed it: "+
				"nothing is consolidated any more at the other; make a manager for each host", zap.Stringer("host", h.Network().LocalPeer()))
		}
		m.watch.close()
		if h != nil {
			// Not RemoveStreamHandler, which has identify tell everybody: mostly the
			// host is being closed. If it is not, its peers take over after a while.
			m.unserve(h)
		}
		if !m.tasks.end(closeWait) {
			m.tells.log.Warn("connection manager closed while closing a connection blocks",
				zap.Duration("waited", closeWait))
		}
		m.steer.clear()
		m.tells.measureNothing(m.sched.all())
		m.tells.events.stop()
		m.closeErr = m.inner.Close()
	})
	return m.closeErr
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
