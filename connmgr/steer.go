package connmgr

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/go-portage/portage/internal/aside"
)

// steering is where new streams go: the winners of the peers that have duplicates. It
// is asked for each stream that is opened to any peer, so it has a lock of its own, and
// none at all while no peer has duplicates.
type steering struct {
	count   atomic.Int32 // of winners
	mu      sync.RWMutex // a leaf
	winners map[peer.ID]steered
}

// steered is where the new streams of a peer go, and where they do not.
type steered struct {
	winner *connState
	silent []network.Conn
}

func (st *steering) set(p peer.ID, to steered) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.winners == nil {
		st.winners = make(map[peer.ID]steered)
	}
	st.winners[p] = to
	st.count.Store(int32(len(st.winners)))
}

func (st *steering) drop(p peer.ID) {
	st.mu.Lock()
	defer st.mu.Unlock()
	delete(st.winners, p)
	st.count.Store(int32(len(st.winners)))
}

func (st *steering) clear() {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.winners = nil
	st.count.Store(0)
}

func (st *steering) get(p peer.ID) *connState {
	if st.count.Load() == 0 {
		return nil
	}
	st.mu.RLock()
	defer st.mu.RUnlock()
	return st.winners[p].winner
}

// silent says whether c does not answer, and another connection of its peer does.
func (st *steering) silent(c network.Conn) bool {
	if st.count.Load() == 0 {
		return false
	}
	st.mu.RLock()
	defer st.mu.RUnlock()
	return slices.Contains(st.winners[c.RemotePeer()].silent, c)
}

// standIn returns where new streams go in place of a connection that is about to go, until the
// next plan says: not where nothing answers if there is another one, not to a limited
// connection beside one that is not, and rather where an answer has come. among is not empty.
func standIn(among []*connState) *connState {
	fit := func(cs *connState) int {
		n := 0
		for i, good := range []bool{!cs.base.Relayed, cs.path.alive(), !cs.base.Limited, cs.path.health != pathSilent} {
			if good {
				n |= 1 << i
			}
		}
		return n
	}
	return slices.MaxFunc(among, func(a, b *connState) int { return cmp.Compare(fit(a), fit(b)) })
}

// choose is the migrate.ConnSelector of a wrapped host: the winner while there are
// duplicates and it is open, else nil, which is the swarm's own choice. What the
// caller's context rules out, a limited connection or a relayed one, is left to the
// swarm too.
func (st *steering) choose(ctx context.Context, p peer.ID) network.Conn {
	winner := st.get(p)
	if winner == nil || aside.IsClosed(winner.conn) {
		return nil
	}
	if allowed, _ := network.GetAllowLimitedConn(ctx); winner.base.Limited && !allowed {
		return nil
	}
	if direct, _ := network.GetForceDirectDial(ctx); winner.base.Relayed && direct {
		return nil
	}
	return winner.conn
}
