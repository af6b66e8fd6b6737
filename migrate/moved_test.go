package migrate

import (
	"testing"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
	. "github.com/go-portage/portage/internal/rawpeer"
)

// TestMovedStreamKeepsNoScope: a stream that has moved holds what it held before, unless
// its application has asked for the scope, which then follows it.
func TestMovedStreamKeepsNoScope(t *testing.T) {
	p := meet(t, verified)
	s, on := p.hostAccepts()
	move := func() {
		t.Helper()
		next := p.migrates(on)
		next.Sends(FinalSizeBytes(1))
		next.Wants(FinalSizeBytes(1))
		p.hasLabel(next.Label)
		on = next
		on.Sends("x") // so that the next final size is the same
		p.reads(s, "x")
		p.writes(s, "y")
		on.Wants("y")
	}
	kept := func() (*scope, *span) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.recv.mu.Lock()
		defer s.recv.mu.Unlock()
		return s.scope, s.recv.budget
	}
	move()
	WaitFor(t, "what the migration has needed to go", func() bool {
		sc, budget := kept()
		return sc == nil && budget == nil
	})
	require.NoError(t, s.Scope().ReserveMemory(100, network.ReservationPriorityLow))
	given := s.Scope()
	move()
	require.Same(t, given, s.Scope())
	require.Equal(t, int64(100), s.send.stream().Scope().Stat().Memory, "it is reserved where the stream is")
	given.ReleaseMemory(100)
	move()
	require.Same(t, given, s.Scope(), "the application has it")
}
