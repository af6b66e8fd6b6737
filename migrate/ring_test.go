package migrate

import (
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"
)

// systemScope is a resource manager that counts what is reserved in its system scope, and refuses
// what exceeds its limit.
type systemScope struct {
	network.NullResourceManager
	mu  sync.Mutex // guards all below
	now reserved
	err error // of ViewSystem, instead
}

type reserved struct{ limit, memory, asked, spans int }

func (s *systemScope) set(change func(*reserved)) reserved {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&s.now)
	return s.now
}

func (s *systemScope) seen() reserved { return s.set(func(*reserved) {}) }

func (s *systemScope) ViewSystem(f func(network.ResourceScope) error) error {
	if s.err != nil {
		return s.err
	}
	return f(&systemSpan{of: s})
}

type systemSpan struct {
	network.NullScope
	of *systemScope
}

func (s *systemSpan) BeginSpan() (network.ResourceScopeSpan, error) {
	s.of.set(func(now *reserved) { now.spans++ })
	return s, nil
}

func (s *systemSpan) ReserveMemory(size int, _ uint8) (err error) {
	s.of.set(func(now *reserved) {
		if now.asked++; now.memory+size > now.limit {
			err = network.ErrResourceLimitExceeded
			return
		}
		now.memory += size
	})
	return err
}

func (s *systemSpan) ReleaseMemory(size int) {
	s.of.set(func(now *reserved) {
		if size < 0 || size > now.memory {
			panic("released what was not reserved")
		}
		now.memory -= size
	})
}

func (s *systemSpan) Done() {
	s.of.set(func(now *reserved) {
		now.memory = 0
		now.spans--
	})
}

// TestMemoryOfRings: neither a peer's rings nor all of a host take more than they may, and the
// resource manager knows of it: what is reserved there follows what is used.
func TestMemoryOfRings(t *testing.T) {
	const kib = 1 << 10
	fresh := func() (*ringBudget, *systemScope, func() *ringMemory) {
		system := &systemScope{now: reserved{limit: 1 << 20}}
		b := &ringBudget{perPeer: 8 * kib, perHost: 64 * kib, manager: system}
		return b, system, func() *ringMemory { return &ringMemory{host: b} }
	}
	bubble(t, "bounds", func(t *testing.T) {
		_, system, peer := fresh()
		var peers []*ringMemory
		for range 8 {
			m := peer()
			peers = append(peers, m)
			for range 8 {
				require.True(t, m.reserve(kib))
			}
			require.False(t, m.reserve(1), "a peer's are full")
		}
		require.False(t, peer().reserve(1), "the host's are full")
		require.Equal(t, 64*kib, system.seen().memory)
		peers[0].release(kib)
		require.False(t, peers[1].reserve(1))
		require.True(t, peers[0].reserve(kib))
	})
	bubble(t, "ahead", func(t *testing.T) {
		b, system, peer := fresh()
		m := peer()
		ahead := b.ahead()
		require.Equal(t, 4*kib, ahead)
		for n := range 8 {
			require.True(t, m.reserve(kib))
			require.Equal(t, n/4+1, system.seen().asked, "not for each")
			require.Equal(t, ahead*(n/4+1), system.seen().memory)
		}
		other := peer()
		for range 8 {
			require.True(t, other.reserve(kib))
		}
		for n := range 16 {
			[]*ringMemory{m, other}[n/8].release(kib)
			kept := 15 - n
			require.GreaterOrEqual(t, system.seen().memory, kept*kib)
			require.LessOrEqual(t, system.seen().memory, kept*kib+2*ahead)
		}
		time.Sleep(spareTime)
		synctest.Wait()
		require.Zero(t, system.seen().spans, "nothing is used any more")
		require.Zero(t, system.seen().memory)
		for range 2 {
			require.True(t, m.reserve(kib))
			m.release(kib)
			require.True(t, m.reserve(kib))
			time.Sleep(spareTime)
			synctest.Wait()
			require.Equal(t, 1, system.seen().spans, "it is in use again")
			m.release(kib)
			time.Sleep(spareTime)
			synctest.Wait()
			require.Zero(t, system.seen().spans)
			require.Zero(t, system.seen().memory)
		}
	})
	bubble(t, "refused", func(t *testing.T) {
		_, system, peer := fresh()
		m := peer()
		limit := func(n int) { system.set(func(now *reserved) { now.limit = n }) }
		limit(0)
		require.False(t, m.reserve(kib))
		require.Zero(t, system.seen().spans, "nothing is used")
		system.err = errors.New("no more scopes")
		require.False(t, m.reserve(kib))
		system.err = nil
		limit(5 * kib)
		for range 5 {
			require.True(t, m.reserve(kib), "what is needed, where there is not more")
		}
		require.False(t, m.reserve(kib))
		require.Equal(t, 5*kib, system.seen().memory)
		require.Equal(t, 5*kib, m.used)
		require.Equal(t, 5*kib, m.host.used)
	})
}
