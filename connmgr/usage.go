package connmgr

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
)

// usage knows when a stream began last on the connections of peers with duplicates. A short
// stream comes and goes between two looks. It is told of each stream that a wrapped host
// opens or gets, so it has a lock of its own, and none at all while no peer has duplicates.
type usage struct {
	count atomic.Int32
	mu    sync.RWMutex // a leaf
	of    map[network.Conn]*connState
}

func (u *usage) add(cs *connState) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.of == nil {
		u.of = make(map[network.Conn]*connState)
	}
	u.of[cs.conn] = cs
	u.count.Store(int32(len(u.of)))
}

func (u *usage) drop(cs *connState) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.of[cs.conn] == cs {
		delete(u.of, cs.conn)
	}
	u.count.Store(int32(len(u.of)))
}

// note notes that a stream begins on c. It returns c's state if none has for a while.
func (u *usage) note(c network.Conn) *connState {
	u.mu.RLock()
	cs := u.of[c]
	u.mu.RUnlock()
	if cs == nil {
		return nil
	}
	now := time.Now().UnixNano()
	if before := cs.used.Swap(now); now-before > int64(useProbe) {
		return cs
	}
	return nil
}
