package migrate

import (
	"io"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
	. "github.com/go-portage/portage/internal/rawpeer"
)

// What docs/protocol.md says that both ends have to agree on, where no other test is
// about it.

// hasMoved waits for the end of the stream's n-th migration at the host, to next.
func (p *rawPeer) hasMoved(s *Stream, next *RawStream, n int) {
	p.t.Helper()
	WaitFor(p.t, "the migration to finish", func() bool { return s.Migrations() == n })
	p.hasLabel(next.Label)
}

// TestMissingFieldsAreZero: proto3 encoders leave zeros out. What this end writes has them:
// see TestMessageBytes.
func TestMissingFieldsAreZero(t *testing.T) {
	p := meeting{kind: verified, hostHigher: true}.meet(t) // 0 is even, so it is the peer's
	old := p.Opens(0, Prelude, "\x02\x0a\x00", MultistreamToken, EchoToken)
	old.Wants(Prelude, MultistreamToken, EchoToken)
	s := p.accepted()
	require.Equal(t, uint64(0), s.Label())
	p.writes(s, "hello")
	old.Wants("hello")

	next := p.Opens(1, Prelude, Lengthy("\x12"+Lengthy("\x08\x02\xa0\x06\x01")))
	next.Label = 2
	next.Wants(Prelude, AckVerified)
	next.Sends("\x03\xa2\x06\x00")
	next.Wants(FinalSizeBytes(5))
	old.WantsEOF()
	p.settled(s, next)
	p.talk(s, next)

	// Back to the label 0, which nobody has any more.
	last := p.Opens(0, Prelude, Lengthy("\x12"+Lengthy("\x10\x02\xa0\x06\x01")))
	last.Label = 0
	last.Wants(Prelude, AckVerified)
	last.Sends(FinalSizeBytes(4))
	last.Wants(FinalSizeBytes(4))
	p.hasMoved(s, last, 2)
	p.talk(s, last)
	require.NoError(t, s.Close())
	last.WantsEOF()
	p.nothingLeft()
}

// TestMigrateOnTheSameConnection is answered like any other. (This end asks for none, see
// TestThereAndBack.)
func TestMigrateOnTheSameConnection(t *testing.T) {
	onBothTransports(t, func(t *testing.T, m meeting) {
		m.kind = verified
		m.either(t, func(t *testing.T, p *rawPeer, s *Stream, old *RawStream) {
			id := p.Fresh()
			next := p.Opens(0, Prelude, MigrateBytes(id, old.Label))
			next.Label = id
			next.Wants(Prelude, AckVerified)
			next.Sends(FinalSizeBytes(1+4), "new")
			next.Wants(FinalSizeBytes(1))
			old.Sends("last")
			old.WantsEOF()
			p.reads(s, "lastnew")
			p.hasMoved(s, next, 1)
			require.Equal(t, p.Ends[0], s.Conn())
			p.talk(s, next)
			require.NoError(t, s.Close())
			next.WantsEOF()
			p.nothingLeft()
		})
	})
}

// TestDenialBindsTheInitiatorOnly (M3): who has denied may migrate the stream itself, and
// judges each Migrate anew. (That the initiator asks no more is in TestDraftDenied.)
func TestDenialBindsTheInitiatorOnly(t *testing.T) {
	for name, again := range map[string]func(p *rawPeer, s *Stream, old *RawStream) *RawStream{
		"asked again": func(p *rawPeer, _ *Stream, old *RawStream) *RawStream {
			next := p.migrates(old)
			next.Sends(FinalSizeBytes(1 + 4))
			next.Wants(FinalSizeBytes(1 + 4))
			return next
		},
		"asks itself": func(p *rawPeer, s *Stream, _ *RawStream) *RawStream {
			moved, next := p.asked(s)
			next.Acks(AckVerified)
			next.Wants(FinalSizeBytes(1 + 4))
			next.Sends(FinalSizeBytes(1 + 4))
			moved.is(nil)
			return next
		},
	} {
		t.Run(name, func(t *testing.T) {
			var says atomic.Bool
			p := meet(t, verified, WithAcceptor(func(*Stream, network.Conn) bool { return says.Load() }))
			s, old := p.hostAccepts()
			denied := p.Opens(1, Prelude, MigrateBytes(p.Fresh(), old.Label))
			denied.Wants(Prelude, AckDenied)
			denied.WantsEOF()
			p.talk(s, old)
			says.Store(true)
			next := again(p, s, old)
			old.WantsEOF()
			p.settled(s, next)
			p.talk(s, next)
		})
	}
}

// TestMigrateOfAStreamThatHasEnded (L5) is denied, and at once: the label will not come.
func TestMigrateOfAStreamThatHasEnded(t *testing.T) {
	for name, ends := range map[string]func(s *Stream) error{
		"closed": (*Stream).Close,
		"reset":  (*Stream).Reset,
	} {
		t.Run(name, func(t *testing.T) {
			meeting{kind: verified, opts: []Option{withLabelWait(time.Hour)}}.either(t,
				func(t *testing.T, p *rawPeer, s *Stream, old *RawStream) {
					require.NoError(t, ends(s))
					// The peer's application has not ended the stream, nor has it heard.
					next := p.Opens(1, Prelude, MigrateBytes(p.Fresh(), old.Label))
					next.Wants(Prelude, AckDenied)
					next.WantsEOF()
					p.nothingLeft()
				})
		})
	}
	t.Run("ended both ways, and not closed", func(t *testing.T) {
		meeting{kind: verified}.either(t, func(t *testing.T, p *rawPeer, s *Stream, old *RawStream) {
			require.NoError(t, s.CloseWrite())
			old.WantsEOF()
			old.ClosesWrite()
			p.readsEnd(s, io.EOF)
			next := p.migrates(old)
			next.Sends(FinalSizeBytes(1))
			next.ClosesWrite()
			next.Wants(FinalSizeBytes(1))
			next.WantsEOF()
			p.settled(s, next)
			require.NoError(t, s.Close())
			p.nothingLeft()
		})
	})
}

// TestMigrateThatFindsAnotherLabel (M2): it named the stream when it came, and waited for
// the migration under way, which gave the stream another label. It is reset, and not denied:
// the initiator may ask again. What it wanted to call the stream is free.
func TestMigrateThatFindsAnotherLabel(t *testing.T) {
	p := meet(t, verified, withBusyWait(time.Hour))
	s, old := p.hostAccepts()
	next := p.migrates(old)
	id := p.Fresh()
	late := p.Opens(1, Prelude, MigrateBytes(id, old.Label))
	old.Sends("x") // so that the first does not end before the second has come
	next.Sends(FinalSizeBytes(1 + 2))
	next.Wants(FinalSizeBytes(1))
	WaitFor(t, "the second Migrate to wait for its turn", func() bool { return s.queued() == 1 })
	old.Sends("y")
	p.reads(s, "xy")
	late.WantsReset(network.StreamNoError)
	p.settled(s, next)
	p.talk(s, next)

	p.GoOnFrom(id)
	third := p.Opens(0, Prelude, MigrateBytes(p.Fresh(), next.Label))
	third.Label = id
	third.Wants(Prelude, AckVerified)
	third.Sends(FinalSizeBytes(4))
	third.Wants(FinalSizeBytes(4))
	p.hasMoved(s, third, 2)
	p.talk(s, third)
}
