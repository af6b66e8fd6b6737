package migrate

import (
	"context"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
	. "github.com/go-portage/portage/internal/rawpeer"
)

// Peers that stall: they cost bounded memory, and no other stream's progress (M4).

// kept returns how much of the new stream, and of the old one, the host keeps for
// the application.
func (p *rawPeer) kept(s *Stream) (ahead, ready int) {
	ready, ahead = s.recv.waiting()
	return ahead, ready
}

// TestPeerThatNeverSendsFinalSize: it has acked, and goes no further. The old stream
// serves the direction from the peer on, the caller is not held up beyond its context,
// and a Reset frees everything (S10, M4).
func TestPeerThatNeverSendsFinalSize(t *testing.T) {
	t.Run("responder", func(t *testing.T) { // the peer is
		p := meet(t, verified)
		s, old := p.hostOpens()
		other, otherEnd := p.hostOpens()
		ctx, cancel := context.WithCancel(context.Background())
		moved := make(chan error, 1)
		go func() { moved <- p.host.Migrate(ctx, s, p.Ends[1]) }()
		next := p.Arrives()
		next.WantsMigrate(old.Label)
		next.Acks(AckVerified)
		next.Wants(FinalSizeBytes(1))
		old.WantsEOF()
		cancel()
		require.ErrorIs(t, Take(t, moved, "Migrate to return"), context.Canceled)

		p.writes(s, "new")
		next.Wants("new")
		old.Sends("old")
		p.reads(s, "old")
		p.talk(other, otherEnd)
		require.NoError(t, s.Reset())
		next.WantsReset(network.StreamNoError)
		require.NoError(t, other.Reset())
		p.nothingLeft()
	})
	t.Run("initiator", func(t *testing.T) {
		p := meet(t, verified)
		s, old := p.hostOpens()
		other, otherEnd := p.hostOpens()
		next := p.migrates(old)
		p.talk(s, old)
		p.talk(other, otherEnd)
		require.NoError(t, s.Reset())
		next.WantsReset(network.StreamNoError)
		old.WantsReset(network.StreamNoError)
		require.NoError(t, other.Reset())
		p.nothingLeft()
	})
	t.Run("initiator, closed", func(t *testing.T) {
		// S7: the Close waits for the exchange; that the peer ends it is enough.
		p := meet(t, verified)
		s, old := p.hostOpens()
		next := p.migrates(old)
		require.NoError(t, s.Close())
		old.WantsEOF()
		require.NoError(t, next.Reset())
		p.nothingLeft()
	})
}

// TestPeerThatNeverAnswers: the stream goes on where it is for as long as it takes (S10),
// and a Reset frees everything.
func TestPeerThatNeverAnswers(t *testing.T) {
	p := meet(t, verified)
	s, old := p.hostOpens()
	ctx, cancel := context.WithCancel(context.Background())
	moved := make(chan error, 1)
	go func() { moved <- p.host.Migrate(ctx, s, p.Ends[1]) }()
	next := p.Arrives()
	next.WantsMigrate(old.Label)
	cancel()
	require.ErrorIs(t, Take(t, moved, "Migrate to return"), context.Canceled)
	p.talk(s, old)
	require.NoError(t, s.Reset())
	next.WantsReset(network.StreamNoError)
	old.WantsReset(network.StreamNoError)
	p.nothingLeft()
}

// TestStall: a peer that has told how much is still to come on the old stream, and does
// not send it: both streams are reset (M4, S8).
func TestStall(t *testing.T) {
	for _, role := range []string{"initiator", "responder"} {
		t.Run(role, func(t *testing.T) {
			p := meet(t, verified, WithStallTimeout(50*time.Millisecond))
			s, old := p.hostOpens()
			other, otherEnd := p.hostOpens()
			var next *RawStream
			if role == "initiator" {
				_, next = p.asked(s)
				next.Acks(AckVerified)
				next.Wants(FinalSizeBytes(1))
			} else {
				next = p.migrates(old)
			}
			// Before the final size, from which on the time counts.
			old.Sends("abc")
			p.reads(s, "abc")
			next.Sends(FinalSizeBytes(1 + 5))
			require.Empty(t, p.readsEnd(s, network.ErrReset))
			next.WantsReset(network.StreamNoError)
			p.failed(s)
			p.talk(other, otherEnd)
			require.NoError(t, other.Reset())
			p.nothingLeft()
		})
	}
}

// TestStallFillsNothing: a peer that writes to the new stream while it owes data on the
// old one. The host reads a bounded part of it ahead, so that it takes little of the
// window that all streams of a QUIC connection share, and then lets it wait; other
// streams of that connection go on, and the data come in order in the end (M4, S4).
func TestStallFillsNothing(t *testing.T) {
	const debt = readChunk // what the Read on the old stream reserves at once
	p := meet(t, verified)
	s, old := p.hostOpens()
	next := p.migrates(old)
	next.Sends(FinalSizeBytes(1 + debt))
	next.Wants(FinalSizeBytes(1))
	// The path may be quiet for maxHold at most, and the test takes as long as it takes: a
	// byte of what is owed comes now and then.
	paid := 0
	pays := func() {
		if paid < debt-1 {
			old.Sends("o")
			paid++
		}
	}
	data := strings.Repeat("0123456789abcdef", 5<<16) // 5 MiB
	written := make(chan error, 1)
	go func() {
		_, err := io.WriteString(next, data)
		written <- err
	}()
	WaitFor(t, "the new stream to be read ahead", func() bool {
		pays()
		ahead, _ := p.kept(s)
		return ahead == maxAhead
	})
	// Another stream on the new connection.
	s2, err := p.hostBegins(1, echoID)
	require.NoError(t, err)
	pays()
	p.writes(s2, "hello")
	u := p.Arrives()
	pays()
	u.Wants(Prelude, LabelBytes(s2.Label()), MultistreamToken, EchoToken, "hello")
	pays()
	u.Sends(Prelude, MultistreamToken, EchoToken, strings.Repeat("x", 100<<10))
	p.reads(s2, strings.Repeat("x", 100<<10))
	pays()

	ahead, ready := p.kept(s)
	require.Equal(t, maxAhead, ahead, "read ahead without a bound")
	require.LessOrEqual(t, ready, paid)
	require.Equal(t, int64(maxAhead+debt), s.Scope().Stat().Memory,
		"what is read ahead has to be reserved, and what the old stream has brought and will bring")

	old.Sends(strings.Repeat("o", debt-paid))
	p.reads(s, strings.Repeat("o", debt)+data)
	require.NoError(t, Take(t, written, "the peer to write"))
	require.Zero(t, s.Scope().Stat().Memory)
	p.talk(s, next)
}

// TestPeerThatNeverReads: a Write that is blocked on the old stream is called out, and
// goes on on the new one, at the exact byte; nothing is buffered on the way, and other
// streams go on (S2, M4).
func TestPeerThatNeverReads(t *testing.T) {
	onBothTransports(t, func(t *testing.T, m meeting) {
		m.kind = verified
		p := m.meet(t)
		s, old := p.hostOpens()
		other, otherEnd := p.hostOpens()
		data := make([]byte, 8<<20)
		for i := range data {
			data[i] = byte(i >> (i % 3 * 8))
		}
		wrote := make(chan error, 1)
		go func() {
			_, err := s.Write(data)
			wrote <- err
		}()
		WaitFor(t, "the Write to be inside the old stream", s.send.writesInside)
		moved, next := p.asked(s)
		next.Acks(AckVerified)
		final := next.FinalSize()
		next.Sends(FinalSizeBytes(1))
		moved.is(nil)
		p.talk(other, otherEnd)
		select {
		case err := <-wrote:
			t.Fatalf("8 MiB were written to a peer that does not read: %v", err)
		default:
		}
		require.Zero(t, s.Scope().Stat().Memory)

		// It reads after all: the old stream to its end, then the new one.
		got, err := io.ReadAll(old)
		require.NoError(t, err)
		require.Len(t, got, int(final-1), "the final size is not what the old stream carried")
		rest := make([]byte, len(data)-len(got))
		_, err = io.ReadFull(next, rest)
		require.NoError(t, err)
		require.NoError(t, Take(t, wrote, "the Write to end"))
		require.True(t, string(append(got, rest...)) == string(data), "the bytes differ")
		p.talk(s, next)
	})
}

// TestDraftResponderInNoHurry: a draft-only responder ends the old stream when its
// application has read what was sent, which may take any time: that is no stall.
func TestDraftResponderInNoHurry(t *testing.T) {
	p := meet(t, draftOnly, WithStallTimeout(time.Millisecond))
	s, old := p.hostOpens()
	moved, next := p.asked(s)
	next.Acks(AckDraft)
	old.WantsEOF()
	// Longer than the stall timeout: the notice of a quiet old stream comes after it.
	WaitFor(t, "the host to notice that the old stream is quiet", s.recv.readsAhead)
	old.Sends("old")
	old.ClosesWrite()
	moved.is(nil)
	// Only now: what comes ahead of the old stream's end makes that end due.
	next.Sends("new")
	p.reads(s, "oldnew")
	p.talk(s, next)
}

// TestDraftResponderThatStalls: one that writes to the new stream has ended the old one,
// or never will (M4).
func TestDraftResponderThatStalls(t *testing.T) {
	p := meet(t, draftOnly, WithStallTimeout(50*time.Millisecond))
	s, old := p.hostOpens()
	moved, next := p.asked(s)
	next.Acks(AckDraft)
	old.WantsEOF()
	next.Sends("new")
	next.WantsReset(network.StreamNoError)
	moved.is(network.ErrReset)
	p.readsEnd(s, network.ErrReset)
	p.nothingLeft()
}
