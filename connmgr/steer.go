package connmgr

import (
	"context"
	"sync"
	"sync/atomic"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
)

// steering is where new streams go: the winners of the peers that have duplicates. It
// is asked for each stream that is opened to any peer, so it has a lock of its own, and
// none at all while no peer has duplicates.
type steering struct {
	count   atomic.Int32 // of winners
	mu      sync.RWMutex // a leaf
	winners map[peer.ID]*connState
}

func (st *steering) set(p peer.ID, winner *connState) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.winners == nil {
		st.winners = make(map[peer.ID]*connState)
	}
	st.winners[p] = winner
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
	return st.winners[p]
}

// choose is the migrate.ConnSelector of a wrapped host: the winner while there are
// duplicates and it is open, else nil, which is the swarm's own choice. What the
// caller's context rules out, a limited connection or a relayed one, is left to the
// swarm too.
func (st *steering) choose(ctx context.Context, p peer.ID) network.Conn {
	winner := st.get(p)
	if winner == nil || winner.conn.IsClosed() {
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
