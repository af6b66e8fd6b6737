package migrate

import (
	"context"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
)

const (
	lower  peer.ID = "a"
	higher peer.ID = "b"
)

// TestLabelParity: the lower peer gives even labels, the higher one odd ones (L1). IDs
// are compared as byte strings.
func TestLabelParity(t *testing.T) {
	for _, tc := range []struct {
		self, remote peer.ID
		ours         uint64
	}{
		{lower, higher, 0},
		{higher, lower, 1},
		{"a", "aa", 0},
		{"\x7f", "\x80", 0},
		{"\xff", "\x00", 1},
	} {
		l := newLabels(tc.self)
		for range 3 {
			label := l.fresh(tc.remote)
			require.Equal(t, tc.ours, label&1, "%q to %q", tc.self, tc.remote)
			require.ErrorIs(t, l.check(tc.remote, label), errViolation, "the peer must not give ours")
			require.NoError(t, l.check(tc.remote, label^1))
		}
	}
}

// TestLabelsAreFresh: no label twice, and another beginning in each process (L2).
func TestLabelsAreFresh(t *testing.T) {
	l := newLabels(lower)
	seen := make(map[uint64]bool)
	for range 1000 {
		label := l.fresh(higher)
		require.False(t, seen[label])
		require.Less(t, label, uint64(1)<<34)
		seen[label] = true
	}
	starts := make(map[uint64]bool)
	for range 20 {
		starts[newLabels(lower).fresh(higher)] = true
	}
	require.Greater(t, len(starts), 15, "a process that was restarted must not reuse its labels")
}

// TestLabelsAreAliveOnce: a label that is alive is not taken over (L2); it belongs to one
// peer (L3); nothing is left of what has ended (L5).
func TestLabelsAreAliveOnce(t *testing.T) {
	l := newLabels(lower)
	one, two := new(Stream), new(Stream)
	require.True(t, l.add(higher, 1, one))
	require.False(t, l.add(higher, 1, two))
	require.False(t, l.add(higher, 1, one))
	require.True(t, l.add("c", 1, two), "another peer's label is another label")
	require.True(t, l.add(higher, 3, one), "during a migration a stream has two")
	require.True(t, l.alive(higher, 1))
	require.False(t, l.alive(higher, 5))
	require.False(t, l.alive("d", 1))
	require.ElementsMatch(t, []*Stream{one, one}, l.all(higher))
	require.Empty(t, l.all("d"))

	l.remove(higher, 1, two) // not its
	require.True(t, l.alive(higher, 1))
	l.remove(higher, 1, one)
	l.remove(higher, 1, one)
	require.False(t, l.alive(higher, 1))
	require.True(t, l.alive("c", 1))
	require.True(t, l.add(higher, 1, two), "a label that has ended may be given again")
	l.remove(higher, 1, two)
	l.remove(higher, 3, one)
	l.remove("c", 1, two)
	l.remove("d", 1, two)
	require.Empty(t, l.peers)
}

// TestFindLabel: found at once, or waited for, for a bounded time (L4).
func TestFindLabel(t *testing.T) {
	ctx := context.Background()
	l := newLabels(lower)
	one := new(Stream)
	require.True(t, l.add(higher, 1, one))

	s, err := l.find(ctx, higher, 1, 0)
	require.NoError(t, err)
	require.Same(t, one, s)

	s, err = l.find(ctx, "c", 1, time.Millisecond)
	require.NoError(t, err)
	require.Nil(t, s, "the label is another peer's (L3)")

	start := time.Now()
	s, err = l.find(ctx, higher, 3, 10*time.Millisecond)
	require.NoError(t, err)
	require.Nil(t, s)
	require.GreaterOrEqual(t, time.Since(start), 10*time.Millisecond)

	canceled, cancel := context.WithCancel(ctx)
	cancel()
	s, err = l.find(canceled, higher, 3, time.Hour)
	require.NoError(t, err)
	require.Nil(t, s)

	l.remove(higher, 1, one)
	start = time.Now()
	s, err = l.find(ctx, higher, 1, time.Hour)
	require.NoError(t, err)
	require.Nil(t, s, "a label that has ended will not come")
	require.Less(t, time.Since(start), time.Minute)
	require.Empty(t, l.peers)
}

// TestFindLabelThatComes: all that wait for it are told.
func TestFindLabelThatComes(t *testing.T) {
	l := newLabels(lower)
	found := make(chan *Stream, 3)
	for range cap(found) {
		go func() {
			s, err := l.find(context.Background(), higher, 1, time.Hour)
			if err != nil {
				t.Error(err)
			}
			found <- s
		}()
	}
	WaitFor(t, "all to wait", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		pl := l.peers[higher]
		return pl != nil && pl.nWaiting == cap(found)
	})
	require.False(t, l.alive(higher, 1))
	other, one := new(Stream), new(Stream)
	require.True(t, l.add("c", 1, other))
	require.True(t, l.add(higher, 1, one))
	for range cap(found) {
		require.Same(t, one, Take(t, found, "the label"))
	}
	l.remove(higher, 1, one)
	l.remove("c", 1, other)
	require.Empty(t, l.peers)
}

// TestFindIsBounded: maxWaiting of one peer may wait, and no other peer is worse off
// (L4).
func TestFindIsBounded(t *testing.T) {
	l := newLabels(lower)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, maxWaiting)
	for i := range maxWaiting {
		go func() {
			_, err := l.find(ctx, higher, uint64(2*i+1), time.Hour)
			done <- err
		}()
	}
	WaitFor(t, "all to wait", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		pl := l.peers[higher]
		return pl != nil && pl.nWaiting == maxWaiting
	})
	_, err := l.find(ctx, higher, 9999, time.Hour)
	require.ErrorContains(t, err, "more than 256")
	_, err = l.find(ctx, "c", 1, time.Millisecond)
	require.NoError(t, err)
	one := new(Stream)
	require.True(t, l.add(higher, 9999, one))
	s, err := l.find(ctx, higher, 9999, 0)
	require.NoError(t, err)
	require.Same(t, one, s, "a label that is there needs no room among those that wait")
	l.remove(higher, 9999, one)
	cancel()
	for range maxWaiting {
		require.NoError(t, Take(t, done, "those that wait to end"))
	}
	require.Empty(t, l.peers)
}
