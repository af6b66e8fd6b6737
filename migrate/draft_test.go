package migrate

import (
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
)

// Peers that have the draft and nothing else: no FinalSize, and no FinalSizeID.

// migratesDraft has a draft-only peer ask to migrate old to the new connection. The host
// has acked.
func (p *rawPeer) migratesDraft(old *rawStream) *rawStream {
	p.t.Helper()
	id := p.fresh()
	next := p.opens(1, tMultistream, tMigration, migrateDraftBytes(id, old.label))
	next.label = id
	next.wants(tMultistream, tMigration, ackDraft)
	return next
}

// asked has the host ask the peer to migrate s to the new connection.
func (p *rawPeer) asked(s *Stream) (*outcome, *rawStream) {
	p.t.Helper()
	from := s.Label()
	o := p.hostMigrates(s)
	next := p.arrives()
	next.wantsMigrate(from)
	return o, next
}

func (u *rawStream) acks(ack string) { u.t.Helper(); u.sends(tMultistream, tMigration, ack) }

// settled checks that the host has moved s to the stream next.
func (p *rawPeer) settled(s *Stream, next *rawStream) {
	p.t.Helper()
	WaitFor(p.t, "the migration to finish", func() bool { return s.Migrations() == 1 })
	require.Equal(p.t, p.ends[1], s.Conn())
	require.Equal(p.t, next.label, s.Label())
	p.hasLabel(next.label)
}

// hasLabel waits until the host holds that label and no other: the last one is forgotten
// when the exchange has ended, of which the peer has heard before (L5).
func (p *rawPeer) hasLabel(label uint64) {
	p.t.Helper()
	WaitFor(p.t, "the stream to have one label", func() bool { return slices.Equal([]uint64{label}, p.labelled()) })
}

// holds waits until the host has read an end of the old stream, and keeps it back.
func (p *rawPeer) holds(s *Stream) {
	p.t.Helper()
	WaitFor(p.t, "the host to read the end of the old stream", s.recv.keepsBack)
}

// reading begins a Read of the application. It fails the test where that ends with
// anything but data.
func reading(s *Stream) chan string {
	got := make(chan string, 1)
	go func() {
		b := make([]byte, 100)
		n, err := s.Read(b)
		if err != nil {
			got <- "error: " + err.Error()
			return
		}
		got <- string(b[:n])
	}()
	return got
}

func (p *rawPeer) stillReading(got chan string) {
	p.t.Helper()
	select {
	case v := <-got:
		p.t.Fatalf("Read has to wait, and returned %q", v)
	default:
	}
}

// TestDraftInitiator: data both ways, in flight at the switch on either side (S3, S4).
func TestDraftInitiator(t *testing.T) {
	onBothTransports(t, func(t *testing.T, m meeting) {
		m.kind = draftOnly
		m.either(t, func(t *testing.T, p *rawPeer, s *Stream, old *rawStream) {
			next := p.migratesDraft(old)
			// Until there is proof that the ack has arrived, the old stream serves.
			p.writes(s, "old still")
			old.wants("old still")
			// The peer has read the ack. Its new path may be the faster one.
			next.sends("first of new")
			old.sends("last of old, ")
			old.closesWrite()
			old.wantsEOF()
			p.reads(s, "last of old, first of new")
			p.settled(s, next)
			p.talk(s, next)
			require.NoError(t, s.CloseWrite())
			next.wantsEOF()
			next.closesWrite()
			p.readsEnd(s, io.EOF)
			require.NoError(t, s.Close())
			p.nothingLeft()
		})
	})
}

// TestDraftResponder: data both ways, in flight at the switch on either side (S2, S4).
func TestDraftResponder(t *testing.T) {
	onBothTransports(t, func(t *testing.T, m meeting) {
		m.kind = draftOnly
		m.either(t, func(t *testing.T, p *rawPeer, s *Stream, old *rawStream) {
			moved, next := p.asked(s)
			p.writes(s, "old until the ack")
			old.wants("old until the ack")
			next.acks(ackDraft)
			old.wantsEOF()
			p.writes(s, "new from then on")
			next.wants("new from then on")
			// The peer's last bytes on the old path come later than its first on the new.
			next.sends("first of new")
			old.sends("last of old, ")
			old.closesWrite()
			p.reads(s, "last of old, first of new")
			moved.is(nil)
			p.settled(s, next)
			p.talk(s, next)
			require.NoError(t, s.CloseWrite())
			next.wantsEOF()
			next.closesWrite()
			p.readsEnd(s, io.EOF)
			require.NoError(t, s.Close())
			p.nothingLeft()
		})
	})
}

// TestDraftIdle: a stream that carries nothing moves all the same, though nobody reads.
func TestDraftIdle(t *testing.T) {
	t.Run("initiator", func(t *testing.T) {
		p := meet(t, draftOnly)
		s, old := p.hostOpens()
		next := p.migratesDraft(old)
		old.closesWrite()
		old.wantsEOF()
		p.settled(s, next)
		p.talk(s, next)
	})
	t.Run("responder", func(t *testing.T) {
		p := meet(t, draftOnly)
		s, old := p.hostOpens()
		moved, next := p.asked(s)
		next.acks(ackDraft)
		old.wantsEOF()
		old.closesWrite()
		moved.is(nil)
		p.settled(s, next)
		p.talk(s, next)
	})
}

// TestDraftHalfClosed: what was closed before the migration is closed after it, and an
// EOF that the application was given stays given (S3, S6).
func TestDraftHalfClosed(t *testing.T) {
	t.Run("initiator, its writing, EOF read", func(t *testing.T) {
		p := meet(t, draftOnly)
		s, old := p.hostOpens()
		old.closesWrite()
		p.readsEnd(s, io.EOF)
		next := p.migratesDraft(old)
		// The old stream had ended before the ack: that EOF proves nothing.
		p.writes(s, "old still")
		old.wants("old still")
		next.closesWrite() // S6, and the proof
		old.wantsEOF()
		p.writes(s, "new")
		next.wants("new")
		require.Equal(t, "", p.readsEnd(s, io.EOF))
		p.settled(s, next)
		require.NoError(t, s.Close())
		p.nothingLeft()
	})
	t.Run("initiator, its writing, EOF not read", func(t *testing.T) {
		p := meet(t, draftOnly)
		s, old := p.hostOpens()
		old.sends("the last")
		old.closesWrite()
		next := p.migratesDraft(old)
		next.closesWrite()
		old.wantsEOF()
		require.Equal(t, "the last", p.readsEnd(s, io.EOF))
		p.writes(s, "new")
		next.wants("new")
		p.settled(s, next)
	})
	t.Run("initiator, our writing", func(t *testing.T) {
		p := meet(t, draftOnly)
		s, old := p.hostOpens()
		require.NoError(t, s.CloseWrite())
		old.wantsEOF()
		next := p.migratesDraft(old)
		old.sends("last of old, ")
		old.closesWrite()
		next.wantsEOF()
		next.sends("new")
		next.closesWrite()
		require.Equal(t, "last of old, new", p.readsEnd(s, io.EOF))
		p.settled(s, next)
		_, err := s.Write([]byte("x"))
		require.Error(t, err, "writing is closed")
	})
	t.Run("responder, its writing, EOF read", func(t *testing.T) {
		p := meet(t, draftOnly)
		s, old := p.hostOpens()
		old.closesWrite()
		p.readsEnd(s, io.EOF)
		moved, next := p.asked(s)
		next.acks(ackDraft)
		next.closesWrite() // S6
		old.wantsEOF()
		moved.is(nil)
		p.writes(s, "new")
		next.wants("new")
		require.Equal(t, "", p.readsEnd(s, io.EOF))
		p.settled(s, next)
	})
	t.Run("responder, our writing", func(t *testing.T) {
		p := meet(t, draftOnly)
		s, old := p.hostOpens()
		require.NoError(t, s.CloseWrite())
		old.wantsEOF()
		moved, next := p.asked(s)
		next.acks(ackDraft)
		next.wantsEOF()
		old.sends("last of old, ")
		old.closesWrite()
		next.sends("new")
		p.reads(s, "last of old, new")
		moved.is(nil)
		p.settled(s, next)
	})
	t.Run("responder, both", func(t *testing.T) {
		p := meet(t, draftOnly)
		s, old := p.hostOpens()
		require.NoError(t, s.CloseWrite())
		old.wantsEOF()
		old.closesWrite()
		p.readsEnd(s, io.EOF)
		moved, next := p.asked(s)
		next.acks(ackDraft)
		next.wantsEOF()
		next.closesWrite()
		moved.is(nil)
		require.NoError(t, s.Close())
		p.nothingLeft()
	})
}

// TestDraftDataAfterEnd: from a peer whose end the application was given, nothing more
// may come (S11).
func TestDraftDataAfterEnd(t *testing.T) {
	t.Run("initiator", func(t *testing.T) {
		p := meet(t, draftOnly)
		s, old := p.hostOpens()
		old.closesWrite()
		p.readsEnd(s, io.EOF)
		next := p.migratesDraft(old)
		next.sends("more")
		next.wantsReset(network.StreamProtocolViolation)
		p.failed(s)
		p.nothingLeft()
	})
	t.Run("responder", func(t *testing.T) {
		p := meet(t, draftOnly)
		s, old := p.hostOpens()
		old.closesWrite()
		p.readsEnd(s, io.EOF)
		_, next := p.asked(s)
		next.acks(ackDraft)
		old.wantsEOF()
		next.sends("more")
		next.wantsReset(network.StreamProtocolViolation)
		p.failed(s)
		p.nothingLeft()
	})
}

// TestDraftInitiatorFasterThanAck: a peer that has the ack, and has ended the old stream,
// before the host's Write of the ack has returned. Its EOF is the proof (S3); the peer
// has nothing to send, and nothing more will come.
func TestDraftInitiatorFasterThanAck(t *testing.T) {
	var p *rawPeer
	var s *Stream
	var old *rawStream
	p = meet(t, draftOnly, WithTracer(func(e Event) {
		if e.Kind == Acked {
			old.closesWrite()
			p.holds(s)
		}
	}))
	s, old = p.hostOpens()
	got := reading(s)
	next := p.migratesDraft(old)
	old.wantsEOF()
	p.settled(s, next)
	p.stillReading(got)
	next.sends("new")
	require.Equal(t, "new", take(t, got, "the Read"))
	p.talk(s, next)
}

// TestDraftReadingClosedMeanwhile: an application that stops reading during the handover.
// The end of the old stream is read all the same, since there is the proof (S3): a peer
// that waits for us has nothing to send on the new one.
func TestDraftReadingClosedMeanwhile(t *testing.T) {
	closesAt := func(t *testing.T, kind EventKind) (p *rawPeer, s *Stream, old *rawStream) {
		p = meet(t, draftOnly, WithTracer(func(e Event) {
			if e.Kind == kind {
				_ = e.Stream.CloseRead()
			}
		}))
		s, old = p.hostOpens()
		return
	}
	t.Run("after the end", func(t *testing.T) {
		p, s, old := closesAt(t, ReceiveSwitched)
		next := p.migratesDraft(old)
		old.closesWrite()
		old.wantsEOF()
		p.settled(s, next)
		p.writes(s, "new")
		next.wants("new")
	})
	t.Run("before the end, twice", func(t *testing.T) {
		p, s, old := closesAt(t, Acked)
		next := p.migratesDraft(old)
		p.writes(s, "old still")
		old.wants("old still")
		require.NoError(t, s.CloseRead())
		old.sends("nobody wants this")
		p.writes(s, "old still")
		old.wants("old still")
		old.closesWrite()
		old.wantsEOF()
		p.settled(s, next)
		p.writes(s, "new")
		next.wants("new")
		require.Zero(t, s.Scope().Stat().Memory)
	})
	t.Run("before the end, closed", func(t *testing.T) {
		// S7: what was written is still delivered, then EOF.
		p, s, old := closesAt(t, Acked)
		next := p.migratesDraft(old)
		p.writes(s, "old still")
		require.NoError(t, s.Close())
		old.wants("old still")
		old.wantsEOF()
		old.closesWrite()
		next.wantsEOF()
		p.nothingLeft()
	})
	t.Run("before the end, and that is reset", func(t *testing.T) {
		p, s, old := closesAt(t, Acked)
		next := p.migratesDraft(old)
		require.NoError(t, old.Reset())
		next.wantsReset(network.StreamNoError)
		p.failed(s)
	})
}

// TestDraftNeverReadingSide: the old stream is read to its end though the application
// does not read, and the application finds everything later (S4).
func TestDraftNeverReadingSide(t *testing.T) {
	p := meet(t, draftOnly)
	s, old := p.hostOpens()
	data := strings.Repeat("0123456789abcdef", 10<<10)
	next := p.migratesDraft(old)
	old.sends(data)
	old.closesWrite()
	old.wantsEOF()
	p.settled(s, next)
	next.sends("new")
	next.closesWrite()
	require.Equal(t, data+"new", p.readsEnd(s, io.EOF))
}

// TestDraftClosesWhileTheAckLeaves: where the ack cannot be sent, the application's
// CloseRead takes effect after all.
func TestDraftClosesWhileTheAckLeaves(t *testing.T) {
	old := newFake()
	h := receivingFrom(old, "")
	require.True(t, h.awaitProof())
	h.hold()
	require.NoError(t, h.closeRead())
	require.False(t, old.readClosed)
	h.release()
	WaitFor(t, "the old stream to be closed for reading", func() bool {
		old.mu.Lock()
		defer old.mu.Unlock()
		return old.readClosed
	})
	require.False(t, h.awaitProof())
}

// TestDraftAsksWhileAnErrorIsHeld: the old stream fails while an attempt of ours is under
// way, and the peer, which goes first (M1), asks. No EOF will come that proves the ack (S3),
// so it is denied, and ours does not give way: the peer resets it, and the application gets
// the error that was kept back.
func TestDraftAsksWhileAnErrorIsHeld(t *testing.T) {
	p := meeting{kind: draftOnly, hostHigher: true}.meet(t)
	s, old := p.hostOpens()
	got := reading(s)
	moved, ours := p.asked(s)
	require.NoError(t, old.Reset())
	p.holds(s)
	next := p.opens(1, tMultistream, tMigration, migrateDraftBytes(p.fresh(), old.label))
	next.wants(tMultistream, tMigration, ackDenied)
	require.NoError(t, ours.Reset())
	require.Contains(t, take(t, got, "the Read"), "error: ")
	require.Error(t, take(t, moved.done, "Migrate to return"))
	require.NoError(t, s.Reset())
	p.nothingLeft()
}

// TestDraftReadingClosed: an application that has stopped reading leaves a draft-only
// initiator without a proof of the ack, so its migration is denied (S3).
func TestDraftReadingClosed(t *testing.T) {
	p := meet(t, draftOnly)
	s, old := p.hostOpens()
	require.NoError(t, s.CloseRead())
	next := p.opens(1, tMultistream, tMigration, migrateDraftBytes(p.fresh(), old.label))
	next.wants(tMultistream, tMigration, ackDenied)
	next.wantsEOF()
	p.writes(s, "old")
	old.wants("old")
	p.hasLabel(old.label)
}

// TestDraftHeldEOF: what an EOF that comes before the ack means is known only with the
// answer (S5).
func TestDraftHeldEOF(t *testing.T) {
	// held has the old stream end while the host waits for the answer.
	held := func(t *testing.T) (p *rawPeer, s *Stream, old, next *rawStream, moved *outcome, got chan string) {
		p = meet(t, draftOnly)
		s, old = p.hostOpens()
		got = reading(s)
		moved, next = p.asked(s)
		old.closesWrite()
		p.holds(s)
		p.stillReading(got)
		return
	}
	t.Run("ack", func(t *testing.T) {
		p, s, old, next, moved, got := held(t)
		next.acks(ackDraft)
		next.sends("new")
		old.wantsEOF()
		require.Equal(t, "new", take(t, got, "the Read"))
		moved.is(nil)
		p.settled(s, next)
		p.talk(s, next)
	})
	t.Run("deny", func(t *testing.T) {
		p, s, old, next, moved, got := held(t)
		next.acks(ackDenied)
		moved.is(ErrDenied)
		require.Equal(t, "error: EOF", take(t, got, "the Read"))
		p.writes(s, "old")
		old.wants("old")
	})
	t.Run("reset", func(t *testing.T) {
		p, s, old, next, moved, got := held(t)
		require.NoError(t, next.Reset())
		moved.is(ErrTryLater)
		require.Equal(t, "error: EOF", take(t, got, "the Read"))
		p.writes(s, "old")
		old.wants("old")
	})
}

// TestDraftUntrustedEOF: a draft-only responder whose new stream was reset may have
// acked. If the application has ended its writing, the responder may have taken that
// for the migration's, and its EOF may be the answer to it: an error (S5).
func TestDraftUntrustedEOF(t *testing.T) {
	setUp := func(t *testing.T) (p *rawPeer, s *Stream, old *rawStream) {
		p = meet(t, draftOnly)
		s, old = p.hostOpens()
		return
	}
	fails := func(t *testing.T, p *rawPeer, s *Stream) {
		moved, next := p.asked(s)
		require.NoError(t, next.Reset())
		moved.is(ErrTryLater)
	}
	t.Run("closed before the attempt", func(t *testing.T) {
		p, s, old := setUp(t)
		require.NoError(t, s.CloseWrite())
		fails(t, p, s)
		old.sends("data")
		old.closesWrite()
		require.Equal(t, "data", p.readsEnd(s, network.ErrReset))
	})
	t.Run("closed after it", func(t *testing.T) {
		p, s, old := setUp(t)
		fails(t, p, s)
		require.NoError(t, s.CloseWrite())
		old.closesWrite()
		p.readsEnd(s, network.ErrReset)
	})
	held := func(t *testing.T) (p *rawPeer, s *Stream, next *rawStream, moved *outcome, got chan string) {
		p, s, old := setUp(t)
		got = reading(s)
		moved, next = p.asked(s)
		require.NoError(t, s.CloseWrite())
		old.closesWrite()
		p.holds(s)
		p.stillReading(got)
		return
	}
	t.Run("held", func(t *testing.T) {
		p, s, next, moved, got := held(t)
		require.NoError(t, s.SetReadDeadline(past))
		require.Contains(t, take(t, got, "the Read"), os.ErrDeadlineExceeded.Error())
		require.NoError(t, s.SetReadDeadline(time.Time{}))
		require.NoError(t, next.Reset())
		moved.is(ErrTryLater) // nobody has been told yet
		p.readsEnd(s, network.ErrReset)
		p.hostMigrates(s).is(ErrClosed)
	})
	t.Run("held from a Read", func(t *testing.T) {
		p, s, next, moved, got := held(t)
		require.NoError(t, next.Reset())
		require.Contains(t, take(t, got, "the Read"), "stream reset")
		// Migrate may have seen that the Read was told, or not.
		err := take(t, moved.done, "Migrate to return")
		require.True(t, errors.Is(err, ErrTryLater) || errors.Is(err, ErrClosed), "Migrate returned %v", err)
		p.hostMigrates(s).is(ErrClosed)
	})
	t.Run("our writing is open", func(t *testing.T) {
		p, s, old := setUp(t)
		fails(t, p, s)
		old.closesWrite()
		p.readsEnd(s, io.EOF)
		p.writes(s, "old")
		old.wants("old")
	})
	t.Run("migrated since", func(t *testing.T) {
		// The doubt was about the end of a stream that is history now.
		p, s, old := setUp(t)
		fails(t, p, s)
		moved, next := p.asked(s)
		next.acks(ackDraft)
		old.wantsEOF()
		old.closesWrite()
		moved.is(nil)
		require.NoError(t, s.CloseWrite())
		next.wantsEOF()
		next.sends("data")
		next.closesWrite()
		require.Equal(t, "data", p.readsEnd(s, io.EOF))
	})
	t.Run("denied", func(t *testing.T) {
		p, s, old := setUp(t)
		require.NoError(t, s.CloseWrite())
		moved, next := p.asked(s)
		next.acks(ackDenied)
		moved.is(ErrDenied)
		old.closesWrite()
		p.readsEnd(s, io.EOF)
	})
	t.Run("responder with the verified handover", func(t *testing.T) {
		p := meet(t, verified)
		s, old := p.hostOpens()
		require.NoError(t, s.CloseWrite())
		fails(t, p, s)
		old.closesWrite()
		p.readsEnd(s, io.EOF)
	})
}

// TestDraftResetBeforeAck: the stream goes on where it was, and can be migrated later,
// by either end (S9).
func TestDraftResetBeforeAck(t *testing.T) {
	t.Run("responder", func(t *testing.T) {
		p := meet(t, draftOnly)
		s, old := p.hostOpens()
		for _, ends := range []func(next *rawStream){
			func(next *rawStream) { require.NoError(t, next.Reset()) },
			func(next *rawStream) { require.NoError(t, next.ResetWithError(network.StreamResourceLimitExceeded)) },
			func(next *rawStream) { next.closesWrite() },
			func(next *rawStream) { next.sends(tMultistream, tNA) },
		} {
			moved, next := p.asked(s)
			ends(next)
			moved.is(ErrTryLater)
			p.talk(s, old)
			p.hasLabel(old.label)
		}
		moved, next := p.asked(s)
		next.acks(ackDraft)
		old.wantsEOF()
		old.closesWrite()
		moved.is(nil)
		p.talk(s, next)
	})
	t.Run("initiator", func(t *testing.T) {
		asked, reset := make(chan struct{}, 1), make(chan struct{})
		p := meet(t, draftOnly, WithAcceptor(func(_ *Stream, to network.Conn) bool {
			select {
			case <-reset:
			default:
				// The peer gives up now; the host shall have noticed when it acks.
				asked <- struct{}{}
				for _, u := range to.GetStreams() {
					if u.Protocol() == "" {
						noticesReset(u)
					}
				}
				close(reset)
			}
			return true
		}))
		s, old := p.hostOpens()
		next := p.opens(1, tMultistream, tMigration, migrateDraftBytes(p.fresh(), old.label))
		take(t, asked, "the request to arrive")
		require.NoError(t, next.Reset())
		take(t, reset, "the host to notice")
		WaitFor(t, "the attempt to be over", func() bool { return s.exchange() == nil })
		p.talk(s, old)
		p.hasLabel(old.label)

		next = p.migratesDraft(old)
		old.closesWrite()
		old.wantsEOF()
		p.settled(s, next)
		p.talk(s, next)
	})
}

// noticesReset waits until a QUIC stream has been reset both ways. The frame that ends its
// reading (RESET_STREAM) is handled before the one that ends its writing (STOP_SENDING).
func noticesReset(u network.Stream) {
	_, _ = io.Copy(io.Discard, u)
	for {
		if _, err := u.Write(nil); err != nil {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// TestDraftResetAfterAck: from the ack on there is no way back; a reset of either stream
// resets both (S8, S10).
func TestDraftResetAfterAck(t *testing.T) {
	for _, which := range []string{"old", "new"} {
		t.Run("initiator, "+which, func(t *testing.T) {
			p := meet(t, draftOnly)
			s, old := p.hostOpens()
			next := p.migratesDraft(old)
			broken, other := old, next
			if which == "new" {
				broken, other = next, old
			}
			require.NoError(t, broken.Reset())
			other.wantsReset(network.StreamNoError)
			p.readsEnd(s, network.ErrReset)
			p.failed(s)
			p.nothingLeft()
		})
		t.Run("responder, "+which, func(t *testing.T) {
			p := meet(t, draftOnly)
			s, old := p.hostOpens()
			moved, next := p.asked(s)
			next.acks(ackDraft)
			old.wantsEOF()
			if which == "old" {
				require.NoError(t, old.Reset())
				next.wantsReset(network.StreamNoError)
			} else {
				require.NoError(t, next.Reset())
			}
			moved.is(network.ErrReset)
			p.readsEnd(s, network.ErrReset)
			p.failed(s)
			p.nothingLeft()
		})
	}
}

// TestDraftClosedConnection: without a final size nothing vouches for how a stream ended
// whose connection is gone: both ends see an error, and never a clean end (S12).
func TestDraftClosedConnection(t *testing.T) {
	onBothTransports(t, func(t *testing.T, m meeting) {
		m.kind = draftOnly
		t.Run("initiator", func(t *testing.T) {
			p := m.meet(t)
			s, old := p.hostOpens()
			next := p.migratesDraft(old)
			require.NoError(t, p.conns[0].Close())
			next.wantsReset(network.StreamNoError)
			p.readsEnd(s, network.ErrReset)
			p.failed(s)
			p.nothingLeft()
		})
		t.Run("responder", func(t *testing.T) {
			p := m.meet(t)
			s, old := p.hostOpens()
			moved, next := p.asked(s)
			next.acks(ackDraft)
			old.wantsEOF()
			require.NoError(t, p.conns[0].Close())
			moved.is(network.ErrReset)
			next.wantsReset(network.StreamNoError)
			p.readsEnd(s, network.ErrReset)
			p.failed(s)
			p.nothingLeft()
		})
	})
}

// TestDraftDenied: the peer's no is for good, and the stream works as before (M3).
func TestDraftDenied(t *testing.T) {
	p := meet(t, draftOnly)
	s, old := p.hostOpens()
	moved, next := p.asked(s)
	next.acks(ackDenied)
	next.wantsEOF() // the host closes it
	moved.is(ErrDenied)
	p.talk(s, old)
	p.hostMigrates(s).is(ErrDenied)
	p.hasLabel(old.label)
	require.Equal(t, 0, s.Migrations())

	// The peer itself may ask, though.
	next = p.migratesDraft(old)
	old.closesWrite()
	old.wantsEOF()
	p.settled(s, next)
	p.talk(s, next)
}

// TestRequireVerifiedHandover refuses draft-only peers in both roles (S12).
func TestRequireVerifiedHandover(t *testing.T) {
	t.Run("initiator", func(t *testing.T) {
		p := meet(t, draftOnly, RequireVerifiedHandover())
		s, old := p.hostAccepts()
		next := p.opens(1, tMultistream, tMigration, migrateDraftBytes(p.fresh(), old.label))
		next.wants(tMultistream, tMigration, ackDenied)
		next.wantsEOF()
		p.talk(s, old)
		p.hasLabel(old.label)
	})
	t.Run("responder", func(t *testing.T) {
		p := meet(t, draftOnly, RequireVerifiedHandover())
		s, old := p.hostAccepts()
		p.hostMigrates(s).is(ErrNotSupported)
		p.talk(s, old)
	})
	t.Run("opening", func(t *testing.T) {
		p := meet(t, draftOnly, RequireVerifiedHandover())
		s, err := p.host.NewStream(context.Background(), p.ID(), echoID)
		require.NoError(t, err)
		_, labelled := s.(*Stream)
		require.False(t, labelled, "a stream that cannot move has no label")
		_, err = s.Write([]byte("hello"))
		require.NoError(t, err)
		p.arrives().wants(tMultistream, tEcho, "hello")
	})
	t.Run("peer that has it", func(t *testing.T) {
		p := meet(t, verified, RequireVerifiedHandover())
		s, old := p.hostOpens()
		moved, next := p.asked(s)
		next.acks(ackVerified)
		next.wants(finalSizeBytes(1))
		next.sends(finalSizeBytes(1))
		old.wantsEOF()
		moved.is(nil)
		p.talk(s, next)
	})
}

// TestDraftEOFCrossesTheAck: a draft-only initiator whose application ends its writing
// while the ack is on its way. S3 has to take that EOF for the proof, and it is none: the
// ack is lost with the new stream, and the initiator falls back to an old stream that
// this end has closed. docs/protocol.md, appendix B, says why that remains, at the peer
// alone: here, what becomes of the stream is an error.
func TestDraftEOFCrossesTheAck(t *testing.T) {
	acked := make(chan struct{}, 1)
	p := meet(t, draftOnly, WithTracer(func(e Event) {
		if e.Kind == Acked {
			acked <- struct{}{}
		}
	}))
	s, old := p.hostOpens()
	got := reading(s)
	next := p.opens(1, tMultistream, tMigration, migrateDraftBytes(p.fresh(), old.label))
	take(t, acked, "the ack")
	old.closesWrite()
	old.wantsEOF()
	p.writes(s, "to new, in vain")
	require.NoError(t, next.Reset())
	require.Contains(t, take(t, got, "the Read"), "stream reset")
	p.failed(s)
	_ = s.Reset() // the migration may have ended before, and the label lives until then
	p.nothingLeft()
}
