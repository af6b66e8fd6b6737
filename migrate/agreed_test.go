package migrate

import (
	"io"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
)

// What docs/protocol.md says that both ends have to agree on, where no other test is
// about it.

// hasMoved waits for the end of the stream's n-th migration at the host, to next.
func (p *rawPeer) hasMoved(s *Stream, next *rawStream, n int) {
	p.t.Helper()
	WaitFor(p.t, "the migration to finish", func() bool { return s.Migrations() == n })
	p.hasLabel(next.label)
}

// TestMissingFieldsAreZero: proto3 encoders leave zeros out. What this end writes has them:
// see TestMessageBytes.
func TestMissingFieldsAreZero(t *testing.T) {
	p := meeting{kind: verified, hostHigher: true}.meet(t) // 0 is even, so it is the peer's
	old := p.opens(0, tMultistream, tMigration, "\x02\x0a\x00", tMultistream, tEcho)
	old.wants(tMultistream, tMigration, tMultistream, tEcho)
	s := p.accepted()
	require.Equal(t, uint64(0), s.Label())
	p.writes(s, "hello")
	old.wants("hello")

	next := p.opens(1, tMultistream, tMigration, lengthy("\x12"+lengthy("\x08\x02\xa0\x06\x01")))
	next.label = 2
	next.wants(tMultistream, tMigration, ackVerified)
	next.sends("\x03\xa2\x06\x00")
	next.wants(finalSizeBytes(5))
	old.wantsEOF()
	p.settled(s, next)
	p.talk(s, next)

	// Back to the label 0, which nobody has any more.
	last := p.opens(0, tMultistream, tMigration, lengthy("\x12"+lengthy("\x10\x02\xa0\x06\x01")))
	last.label = 0
	last.wants(tMultistream, tMigration, ackVerified)
	last.sends(finalSizeBytes(4))
	last.wants(finalSizeBytes(4))
	p.hasMoved(s, last, 2)
	p.talk(s, last)
	require.NoError(t, s.Close())
	last.wantsEOF()
	p.nothingLeft()
}

// TestMigrateOnTheSameConnection is answered like any other. (This end asks for none, see
// TestThereAndBack.)
func TestMigrateOnTheSameConnection(t *testing.T) {
	onBothTransports(t, func(t *testing.T, m meeting) {
		m.kind = verified
		m.either(t, func(t *testing.T, p *rawPeer, s *Stream, old *rawStream) {
			id := p.fresh()
			next := p.opens(0, tMultistream, tMigration, migrateBytes(id, old.label))
			next.label = id
			next.wants(tMultistream, tMigration, ackVerified)
			next.sends(finalSizeBytes(1+4), "new")
			next.wants(finalSizeBytes(1))
			old.sends("last")
			old.wantsEOF()
			p.reads(s, "lastnew")
			p.hasMoved(s, next, 1)
			require.Equal(t, p.ends[0], s.Conn())
			p.talk(s, next)
			require.NoError(t, s.Close())
			next.wantsEOF()
			p.nothingLeft()
		})
	})
}

// TestDenialBindsTheInitiatorOnly (M3): who has denied may migrate the stream itself, and
// judges each Migrate anew. (That the initiator asks no more is in TestDraftDenied.)
func TestDenialBindsTheInitiatorOnly(t *testing.T) {
	for name, again := range map[string]func(p *rawPeer, s *Stream, old *rawStream) *rawStream{
		"asked again": func(p *rawPeer, _ *Stream, old *rawStream) *rawStream {
			next := p.migrates(old)
			next.sends(finalSizeBytes(1 + 4))
			next.wants(finalSizeBytes(1 + 4))
			return next
		},
		"asks itself": func(p *rawPeer, s *Stream, _ *rawStream) *rawStream {
			moved, next := p.asked(s)
			next.acks(ackVerified)
			next.wants(finalSizeBytes(1 + 4))
			next.sends(finalSizeBytes(1 + 4))
			moved.is(nil)
			return next
		},
	} {
		t.Run(name, func(t *testing.T) {
			var says atomic.Bool
			p := meet(t, verified, WithAcceptor(func(*Stream, network.Conn) bool { return says.Load() }))
			s, old := p.hostAccepts()
			denied := p.opens(1, tMultistream, tMigration, migrateBytes(p.fresh(), old.label))
			denied.wants(tMultistream, tMigration, ackDenied)
			denied.wantsEOF()
			p.talk(s, old)
			says.Store(true)
			next := again(p, s, old)
			old.wantsEOF()
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
				func(t *testing.T, p *rawPeer, s *Stream, old *rawStream) {
					require.NoError(t, ends(s))
					// The peer's application has not ended the stream, nor has it heard.
					next := p.opens(1, tMultistream, tMigration, migrateBytes(p.fresh(), old.label))
					next.wants(tMultistream, tMigration, ackDenied)
					next.wantsEOF()
					p.nothingLeft()
				})
		})
	}
	t.Run("ended both ways, and not closed", func(t *testing.T) {
		meeting{kind: verified}.either(t, func(t *testing.T, p *rawPeer, s *Stream, old *rawStream) {
			require.NoError(t, s.CloseWrite())
			old.wantsEOF()
			old.closesWrite()
			p.readsEnd(s, io.EOF)
			next := p.migrates(old)
			next.sends(finalSizeBytes(1))
			next.closesWrite()
			next.wants(finalSizeBytes(1))
			next.wantsEOF()
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
	id := p.fresh()
	late := p.opens(1, tMultistream, tMigration, migrateBytes(id, old.label))
	old.sends("x") // so that the first does not end before the second has come
	next.sends(finalSizeBytes(1 + 2))
	next.wants(finalSizeBytes(1))
	WaitFor(t, "the second Migrate to wait for its turn", func() bool { return s.queued() == 1 })
	old.sends("y")
	p.reads(s, "xy")
	late.wantsReset(network.StreamNoError)
	p.settled(s, next)
	p.talk(s, next)

	p.label = id - 2
	third := p.opens(0, tMultistream, tMigration, migrateBytes(p.fresh(), next.label))
	third.label = id
	third.wants(tMultistream, tMigration, ackVerified)
	third.sends(finalSizeBytes(4))
	third.wants(finalSizeBytes(4))
	p.hasMoved(s, third, 2)
	p.talk(s, third)
}
