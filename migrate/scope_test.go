package migrate

import (
	"testing"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"
)

// TestScopeFollows: what was set on the scope is set on the next stream's, and taken back
// from the last one's.
func TestScopeFollows(t *testing.T) {
	a, b := new(fakeScope), new(fakeScope)
	s := &scope{cur: a}
	require.NoError(t, s.SetService("svc"))
	require.NoError(t, s.ReserveMemory(100, network.ReservationPriorityLow))
	require.Equal(t, network.ReservationPriorityLow, a.prio)
	s.ReleaseMemory(30)
	require.Equal(t, 70, a.reserved())
	require.Equal(t, int64(70), s.Stat().Memory)

	require.NoError(t, s.follow(b, true))
	require.Equal(t, 0, a.reserved())
	require.Equal(t, 70, b.reserved())
	require.Equal(t, "svc", b.service)
	require.Equal(t, network.ReservationPriorityAlways, b.prio, "the memory is in use already")
	b.refuses = network.ErrResourceLimitExceeded // as a scope that has one already
	require.NoError(t, s.follow(b, true), "twice is not too often")
	require.Equal(t, 70, b.reserved())

	s.ReleaseMemory(70)
	require.Equal(t, 0, b.reserved())
	s.ReleaseMemory(5) // more than there is
	require.Equal(t, 0, b.reserved())
}

// TestScopeThatIsRefused: what the next scope refuses does not stop the stream, and is
// not released there later.
func TestScopeThatIsRefused(t *testing.T) {
	a, b := new(fakeScope), &fakeScope{limit: 50}
	s := &scope{cur: a}
	require.NoError(t, s.ReserveMemory(100, network.ReservationPriorityHigh))
	require.ErrorIs(t, s.follow(b, true), network.ErrResourceLimitExceeded)
	require.Equal(t, 0, a.reserved())
	require.Equal(t, 0, b.reserved())
	require.NoError(t, s.ReserveMemory(10, network.ReservationPriorityHigh))
	require.Equal(t, 10, b.reserved())
	require.ErrorIs(t, s.ReserveMemory(100, network.ReservationPriorityHigh), network.ErrResourceLimitExceeded)
	s.ReleaseMemory(60) // 10 of them are known to b
	require.Equal(t, 0, b.reserved())

	b.limitTo(0)
	require.NoError(t, s.follow(b, true), "it is tried again when asked to")
	require.Equal(t, 50, b.reserved())
	s.ReleaseMemory(50)
	require.Equal(t, 0, b.reserved())
}

// TestScopeServiceNeedsProtocol: a service can be set only on a stream whose protocol is
// known.
func TestScopeServiceNeedsProtocol(t *testing.T) {
	a, b := new(fakeScope), new(fakeScope)
	s := &scope{cur: a}
	a.refuses = network.ErrResourceLimitExceeded
	require.Error(t, s.SetService("svc"))
	a.refuses = nil
	require.NoError(t, s.follow(b, true))
	require.Empty(t, b.service, "it was refused, so it is not carried over")

	require.NoError(t, s.SetService("svc"))
	c := new(fakeScope)
	require.NoError(t, s.follow(c, false))
	require.Empty(t, c.service)
	require.NoError(t, s.follow(c, true))
	require.Equal(t, "svc", c.service)
	d := &fakeScope{refuses: network.ErrResourceLimitExceeded}
	require.NoError(t, s.ReserveMemory(10, network.ReservationPriorityLow))
	require.Error(t, s.follow(d, true))
	require.Equal(t, 10, d.reserved(), "a refused service does not keep the memory back")
	require.Equal(t, 0, c.reserved())
}

// TestSpans belong to the logical stream, and follow it.
func TestSpans(t *testing.T) {
	a, b := new(fakeScope), new(fakeScope)
	s := &scope{cur: a}
	outer, err := s.BeginSpan()
	require.NoError(t, err)
	require.NoError(t, outer.ReserveMemory(10, network.ReservationPriorityLow))
	inner, err := outer.BeginSpan()
	require.NoError(t, err)
	require.NoError(t, inner.ReserveMemory(20, network.ReservationPriorityLow))
	require.Equal(t, int64(30), outer.Stat().Memory)
	require.Equal(t, int64(20), inner.Stat().Memory)
	require.Equal(t, 30, a.reserved())

	require.NoError(t, s.follow(b, true))
	require.Equal(t, 0, a.reserved())
	require.Equal(t, 30, b.reserved())
	inner.ReleaseMemory(5)
	inner.ReleaseMemory(100) // more than there is
	require.Equal(t, 10, b.reserved())
	require.NoError(t, inner.ReserveMemory(20, network.ReservationPriorityLow))
	inner.Done()
	inner.Done()
	require.Equal(t, 10, b.reserved())
	require.ErrorIs(t, inner.ReserveMemory(1, network.ReservationPriorityLow), network.ErrResourceScopeClosed)
	b.limitTo(12)
	require.ErrorIs(t, outer.ReserveMemory(5, network.ReservationPriorityLow), network.ErrResourceLimitExceeded)
	require.Equal(t, int64(10), outer.Stat().Memory)
	outer.Done()
	require.Equal(t, 0, b.reserved())
}

// TestNilSpan refuses nothing and counts nothing.
func TestNilSpan(t *testing.T) {
	var none *span
	require.NoError(t, none.reserve(1<<40))
	none.release(1 << 40)

	a := new(fakeScope)
	some := &span{parent: a}
	require.NoError(t, some.reserve(0))
	some.release(0)
	require.NoError(t, some.reserve(5))
	require.Equal(t, network.ReservationPriorityHigh, a.prio)
	some.release(5)
	require.Equal(t, 0, a.reserved())
}
