package migrate

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/quic-go/quic-go"

	"github.com/go-portage/portage/internal/aside"
)

// On which connection a stream is opened
//
// Where the selector names none, or there is no other, the swarm chooses, as it does for
// a plain host. Else the one named is tried, then the others, each for as long as a
// stream takes that opens at once; and only if none does, the swarm chooses, and waits.

// A stream opens at once if that takes no longer than ticks times tick. Opening needs nothing of the
// peer, unless the credit that it has given is used up (256 streams on QUIC, 256 that it
// has not acknowledged on yamux) or so much is being sent that not even the opening can be
// queued: then it takes a round trip, or for ever. Together this is less than most round
// trips on the Internet, and more than a busy machine takes. It is counted in ticks, since a
// process that gets no time for a while sees at most one of them pass, and not the end.
const (
	tick   = time.Millisecond
	ticks  = 32
	atOnce = ticks * tick
)

// named returns the connection that the selector names for a stream to p, if it is open
// and ctx allows it; else nil.
func (h *Host) named(ctx context.Context, p peer.ID) network.Conn {
	if h.cfg.selector == nil {
		return nil
	}
	c := h.cfg.selector(ctx, p)
	if c == nil || !usable(ctx, c) {
		return nil
	}
	return c
}

// usable says whether a stream that is opened with ctx may be on c.
func usable(ctx context.Context, c network.Conn) bool {
	if aside.IsClosed(c) {
		return false
	}
	if allowed, _ := network.GetAllowLimitedConn(ctx); !allowed && c.Stat().Limited {
		return false
	}
	direct, _ := network.GetForceDirectDial(ctx)
	return !direct || !relayed(c)
}

func relayed(c network.Conn) bool {
	_, err := c.RemoteMultiaddr().ValueForProtocol(ma.P_CIRCUIT)
	return err == nil
}

// openStream opens a stream to p, on the connection named, if any, or else on another.
// Its errors are a plain host's.
func (h *Host) openStream(ctx context.Context, p peer.ID, named network.Conn) (network.Stream, error) {
	if named != nil {
		if u := h.openNamed(ctx, p, named); u != nil {
			return u, nil
		}
	}
	u, err := h.Network().NewStream(network.WithNoDial(ctx, "already dialed"), p)
	switch {
	case err == nil:
		return u, nil
	case errors.Is(err, network.ErrNoConn):
		return nil, errors.New("connection failed")
	default:
		return nil, fmt.Errorf("failed to open stream: %w", err)
	}
}

// openNamed opens a stream at once: on the connection named, or on the next best. It
// returns nil where that cannot be done, or the swarm has no other choice anyway.
func (h *Host) openNamed(ctx context.Context, p peer.ID, named network.Conn) network.Stream {
	conns := slices.DeleteFunc(h.Network().ConnsToPeer(p), func(c network.Conn) bool { return !usable(ctx, c) })
	heard := conns
	if h.cfg.silent != nil {
		heard = slices.DeleteFunc(slices.Clone(conns), h.cfg.silent)
	}
	if len(conns) < 2 || len(heard) == 0 {
		return nil
	}
	conns = heard
	choices := make([]choice, len(conns))
	for i, c := range conns {
		stat := c.Stat()
		choices[i] = choice{c, stat.Limited, c == named, relayed(c), stat.NumStreams}
	}
	slices.SortStableFunc(choices, better)
	for _, choice := range noWorse(choices) {
		if u := h.openAtOnce(ctx, choice.conn); u != nil {
			return u
		}
	}
	return nil
}

// noWorse returns those of the choices, the best first, that do as well as the first. Beside
// an unlimited connection a limited one does not, and beside a direct one that is merely busy
// a relayed one does not: there the stream waits, as a plain host's. QUIC keeps a stream
// waiting only where the other end's credit is used up, which may be for ever.
func noWorse(choices []choice) []choice {
	credit := true // what is direct waits for nothing but credit
	for _, c := range choices {
		credit = credit && (c.relayed || c.conn.As(new(*quic.Conn)))
	}
	best := choices[0]
	return slices.DeleteFunc(choices, func(c choice) bool {
		return c.limited && !best.limited || c.relayed && !best.relayed && !credit
	})
}

type choice struct {
	conn                    network.Conn
	limited, named, relayed bool
	streams                 int
}

// better puts first what is to be tried first. A limited connection never goes before an
// unlimited one, whoever names it. The rest is the swarm's order.
func better(a, b choice) int {
	return cmp.Or(
		first(!a.limited, !b.limited),
		first(a.named, b.named),
		first(!a.relayed, !b.relayed),
		cmp.Compare(b.streams, a.streams),
	)
}

func first(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return -1
	default:
		return 1
	}
}

// late counts, for each connection, the attempts to open a stream that nobody waits for any
// more. As long as there is one, no other is made: it would wait behind that.
type late struct {
	mu    sync.Mutex // guards conns
	conns map[network.Conn]int
}

func (l *late) any(c network.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.conns[c] > 0
}

func (l *late) add(c network.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conns == nil {
		l.conns = make(map[network.Conn]int)
	}
	l.conns[c]++
}

func (l *late) remove(c network.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conns[c]--; l.conns[c] == 0 {
		delete(l.conns, c)
	}
}

// openAtOnce opens a stream on c, or returns nil where that is not possible at once.
//
// An attempt that is late is not called off, since yamux keeps a stream for ever whose
// opening is cancelled while it waits to be sent. It ends by itself, with the connection
// or after the swarm's own timeout, 15 s, and what comes of it is reset.
func (h *Host) openAtOnce(ctx context.Context, c network.Conn) network.Stream {
	if h.late.any(c) {
		return nil
	}
	opened := make(chan network.Stream)
	gone := make(chan struct{})
	var begun atomic.Bool // else it is this process that is late, and not the connection
	go func() {
		begun.Store(true)
		u, err := c.NewStream(context.WithoutCancel(ctx))
		if err != nil {
			u = nil
		}
		select {
		case opened <- u:
			return
		case <-gone:
		}
		h.late.remove(c)
		if u != nil {
			_ = u.Reset()
		}
	}()
	timer := time.NewTimer(tick)
	defer timer.Stop()
	for n := 0; ; {
		select {
		case u := <-opened:
			return u
		case <-timer.C:
			if begun.Load() {
				n++
			}
			if n < ticks {
				timer.Reset(tick)
				continue
			}
		case <-ctx.Done():
		}
		break
	}
	h.late.add(c)
	close(gone)
	return nil
}
