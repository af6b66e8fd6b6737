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
	. "github.com/go-portage/portage/internal/rawpeer"
)

// Peers that have the draft and nothing else: no FinalSize, and no FinalSizeID.

// migratesDraft has a draft-only peer ask to migrate old to the new connection. The host
// has acked.
func (p *rawPeer) migratesDraft(old *RawStream) *RawStream {
	p.t.Helper()
	id := p.Fresh()
	next := p.Opens(1, Prelude, MigrateDraftBytes(id, old.Label))
	next.Label = id
	next.Wants(Prelude, AckDraft)
	return next
}

// asked has the host ask the peer to migrate s to the new connection.
func (p *rawPeer) asked(s *Stream) (*outcome, *RawStream) {
	p.t.Helper()
	from := s.Label()
	o := p.hostMigrates(s)
	next := p.Arrives()
	next.WantsMigrate(from)
	return o, next
}

// settled checks that the host has moved s to the stream next.
func (p *rawPeer) settled(s *Stream, next *RawStream) {
	p.t.Helper()
	WaitFor(p.t, "the migration to finish", func() bool { return s.Migrations() == 1 })
	require.Equal(p.t, p.Ends[1], s.Conn())
	require.Equal(p.t, next.Label, s.Label())
	p.hasLabel(next.Label)
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
		m.either(t, func(t *testing.T, p *rawPeer, s *Stream, old *RawStream) {
			next := p.migratesDraft(old)
			// Until there is proof that the ack has arrived, the old stream serves.
			p.writes(s, "old still")
			old.Wants("old still")
			// The peer has read the ack. Its new path may be the faster one.
			next.Sends("first of new")
			old.Sends("last of old, ")
			old.ClosesWrite()
			old.WantsEOF()
			p.reads(s, "last of old, first of new")
			p.settled(s, next)
			p.talk(s, next)
			require.NoError(t, s.CloseWrite())
			next.WantsEOF()
			next.ClosesWrite()
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
		m.either(t, func(t *testing.T, p *rawPeer, s *Stream, old *RawStream) {
			moved, next := p.asked(s)
			p.writes(s, "old until the ack")
			old.Wants("old until the ack")
			next.Acks(AckDraft)
			old.WantsEOF()
			p.writes(s, "new from then on")
			next.Wants("new from then on")
			// The peer's last bytes on the old path come later than its first on the new.
			next.Sends("first of new")
			old.Sends("last of old, ")
			old.ClosesWrite()
			p.reads(s, "last of old, first of new")
			moved.is(nil)
			p.settled(s, next)
			p.talk(s, next)
			require.NoError(t, s.CloseWrite())
			next.WantsEOF()
			next.ClosesWrite()
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
		old.ClosesWrite()
		old.WantsEOF()
		p.settled(s, next)
		p.talk(s, next)
	})
	t.Run("responder", func(t *testing.T) {
		p := meet(t, draftOnly)
		s, old := p.hostOpens()
		moved, next := p.asked(s)
		next.Acks(AckDraft)
		old.WantsEOF()
		old.ClosesWrite()
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
		old.ClosesWrite()
		p.readsEnd(s, io.EOF)
		next := p.migratesDraft(old)
		// The old stream had ended before the ack: that EOF proves nothing.
		p.writes(s, "old still")
		old.Wants("old still")
		next.ClosesWrite() // S6, and the proof
		old.WantsEOF()
		p.writes(s, "new")
		next.Wants("new")
		require.Equal(t, "", p.readsEnd(s, io.EOF))
		p.settled(s, next)
		require.NoError(t, s.Close())
		p.nothingLeft()
	})
	t.Run("initiator, its writing, EOF not read", func(t *testing.T) {
		p := meet(t, draftOnly)
		s, old := p.hostOpens()
		old.Sends("the last")
		old.ClosesWrite()
		next := p.migratesDraft(old)
		next.ClosesWrite()
		old.WantsEOF()
		require.Equal(t, "the last", p.readsEnd(s, io.EOF))
		p.writes(s, "new")
		next.Wants("new")
		p.settled(s, next)
	})
	t.Run("initiator, our writing", func(t *testing.T) {
		p := meet(t, draftOnly)
		s, old := p.hostOpens()
		require.NoError(t, s.CloseWrite())
		old.WantsEOF()
		next := p.migratesDraft(old)
		old.Sends("last of old, ")
		old.ClosesWrite()
		next.WantsEOF()
		next.Sends("new")
		next.ClosesWrite()
		require.Equal(t, "last of old, new", p.readsEnd(s, io.EOF))
		p.settled(s, next)
		_, err := s.Write([]byte("x"))
		require.Error(t, err, "writing is closed")
	})
	t.Run("responder, its writing, EOF read", func(t *testing.T) {
		p := meet(t, draftOnly)
		s, old := p.hostOpens()
		old.ClosesWrite()
		p.readsEnd(s, io.EOF)
		moved, next := p.asked(s)
		next.Acks(AckDraft)
		next.ClosesWrite() // S6
		old.WantsEOF()
		moved.is(nil)
		p.writes(s, "new")
		next.Wants("new")
		require.Equal(t, "", p.readsEnd(s, io.EOF))
		p.settled(s, next)
	})
	t.Run("responder, our writing", func(t *testing.T) {
		p := meet(t, draftOnly)
		s, old := p.hostOpens()
		require.NoError(t, s.CloseWrite())
		old.WantsEOF()
		moved, next := p.asked(s)
		next.Acks(AckDraft)
		next.WantsEOF()
		old.Sends("last of old, ")
		old.ClosesWrite()
		next.Sends("new")
		p.reads(s, "last of old, new")
		moved.is(nil)
		p.settled(s, next)
	})
	t.Run("responder, both", func(t *testing.T) {
		p := meet(t, draftOnly)
		s, old := p.hostOpens()
		require.NoError(t, s.CloseWrite())
		old.WantsEOF()
		old.ClosesWrite()
		p.readsEnd(s, io.EOF)
		moved, next := p.asked(s)
		next.Acks(AckDraft)
		next.WantsEOF()
		next.ClosesWrite()
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
		old.ClosesWrite()
		p.readsEnd(s, io.EOF)
		next := p.migratesDraft(old)
		next.Sends("more")
		next.WantsReset(network.StreamProtocolViolation)
		p.failed(s)
		p.nothingLeft()
	})
	t.Run("responder", func(t *testing.T) {
		p := meet(t, draftOnly)
		s, old := p.hostOpens()
		old.ClosesWrite()
		p.readsEnd(s, io.EOF)
		_, next := p.asked(s)
		next.Acks(AckDraft)
		old.WantsEOF()
		next.Sends("more")
		next.WantsReset(network.StreamProtocolViolation)
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
	var old *RawStream
	p = meet(t, draftOnly, WithTracer(func(e Event) {
		if e.Kind == Acked {
			old.ClosesWrite()
			p.holds(s)
		}
	}))
	s, old = p.hostOpens()
	got := reading(s)
	next := p.migratesDraft(old)
	old.WantsEOF()
	p.settled(s, next)
	p.stillReading(got)
	next.Sends("new")
	require.Equal(t, "new", Take(t, got, "the Read"))
	p.talk(s, next)
}

// TestDraftReadingClosedMeanwhile: an application that stops reading during the handover.
// The end of the old stream is read all the same, since there is the proof (S3): a peer
// that waits for us has nothing to send on the new one.
func TestDraftReadingClosedMeanwhile(t *testing.T) {
	closesAt := func(t *testing.T, kind EventKind) (p *rawPeer, s *Stream, old *RawStream) {
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
		old.ClosesWrite()
		old.WantsEOF()
		p.settled(s, next)
		p.writes(s, "new")
		next.Wants("new")
	})
	t.Run("before the end, twice", func(t *testing.T) {
		p, s, old := closesAt(t, Acked)
		next := p.migratesDraft(old)
		p.writes(s, "old still")
		old.Wants("old still")
		require.NoError(t, s.CloseRead())
		old.Sends("nobody wants this")
		p.writes(s, "old still")
		old.Wants("old still")
		old.ClosesWrite()
		old.WantsEOF()
		p.settled(s, next)
		p.writes(s, "new")
		next.Wants("new")
		require.Zero(t, s.Scope().Stat().Memory)
	})
	t.Run("before the end, closed", func(t *testing.T) {
		// S7: what was written is still delivered, then EOF.
		p, s, old := closesAt(t, Acked)
		next := p.migratesDraft(old)
		p.writes(s, "old still")
		require.NoError(t, s.Close())
		old.Wants("old still")
		old.WantsEOF()
		old.ClosesWrite()
		next.WantsEOF()
		p.nothingLeft()
	})
	t.Run("before the end, and that is reset", func(t *testing.T) {
		p, s, old := closesAt(t, Acked)
		next := p.migratesDraft(old)
		require.NoError(t, old.Reset())
		next.WantsReset(network.StreamNoError)
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
	old.Sends(data)
	old.ClosesWrite()
	old.WantsEOF()
	p.settled(s, next)
	next.Sends("new")
	next.ClosesWrite()
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
	next := p.Opens(1, Prelude, MigrateDraftBytes(p.Fresh(), old.Label))
	next.Wants(Prelude, AckDenied)
	require.NoError(t, ours.Reset())
	require.Contains(t, Take(t, got, "the Read"), "error: ")
	require.Error(t, Take(t, moved.done, "Migrate to return"))
	require.NoError(t, s.Reset())
	p.nothingLeft()
}

// TestDraftReadingClosed: an application that has stopped reading leaves a draft-only
// initiator without a proof of the ack, so its migration is denied (S3).
func TestDraftReadingClosed(t *testing.T) {
	p := meet(t, draftOnly)
	s, old := p.hostOpens()
	require.NoError(t, s.CloseRead())
	next := p.Opens(1, Prelude, MigrateDraftBytes(p.Fresh(), old.Label))
	next.Wants(Prelude, AckDenied)
	next.WantsEOF()
	p.writes(s, "old")
	old.Wants("old")
	p.hasLabel(old.Label)
}

// TestDraftHeldEOF: what an EOF that comes before the ack means is known only with the
// answer (S5).
func TestDraftHeldEOF(t *testing.T) {
	// held has the old stream end while the host waits for the answer.
	held := func(t *testing.T) (p *rawPeer, s *Stream, old, next *RawStream, moved *outcome, got chan string) {
		p = meet(t, draftOnly)
		s, old = p.hostOpens()
		got = reading(s)
		moved, next = p.asked(s)
		old.ClosesWrite()
		p.holds(s)
		p.stillReading(got)
		return
	}
	t.Run("ack", func(t *testing.T) {
		p, s, old, next, moved, got := held(t)
		next.Acks(AckDraft)
		next.Sends("new")
		old.WantsEOF()
		require.Equal(t, "new", Take(t, got, "the Read"))
		moved.is(nil)
		p.settled(s, next)
		p.talk(s, next)
	})
	t.Run("deny", func(t *testing.T) {
		p, s, old, next, moved, got := held(t)
		next.Acks(AckDenied)
		moved.is(ErrDenied)
		require.Equal(t, "error: EOF", Take(t, got, "the Read"))
		p.writes(s, "old")
		old.Wants("old")
	})
	t.Run("reset", func(t *testing.T) {
		p, s, old, next, moved, got := held(t)
		require.NoError(t, next.Reset())
		moved.is(ErrTryLater)
		require.Equal(t, "error: EOF", Take(t, got, "the Read"))
		p.writes(s, "old")
		old.Wants("old")
	})
}

// TestDraftUntrustedEOF: a draft-only responder whose new stream was reset may have
// acked. If the application has ended its writing, the responder may have taken that
// for the migration's, and its EOF may be the answer to it: an error (S5).
func TestDraftUntrustedEOF(t *testing.T) {
	setUp := func(t *testing.T) (p *rawPeer, s *Stream, old *RawStream) {
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
		old.Sends("data")
		old.ClosesWrite()
		require.Equal(t, "data", p.readsEnd(s, network.ErrReset))
	})
	t.Run("closed after it", func(t *testing.T) {
		p, s, old := setUp(t)
		fails(t, p, s)
		require.NoError(t, s.CloseWrite())
		old.ClosesWrite()
		p.readsEnd(s, network.ErrReset)
	})
	held := func(t *testing.T) (p *rawPeer, s *Stream, next *RawStream, moved *outcome, got chan string) {
		p, s, old := setUp(t)
		got = reading(s)
		moved, next = p.asked(s)
		require.NoError(t, s.CloseWrite())
		old.ClosesWrite()
		p.holds(s)
		p.stillReading(got)
		return
	}
	t.Run("held", func(t *testing.T) {
		p, s, next, moved, got := held(t)
		require.NoError(t, s.SetReadDeadline(past))
		require.Contains(t, Take(t, got, "the Read"), os.ErrDeadlineExceeded.Error())
		require.NoError(t, s.SetReadDeadline(time.Time{}))
		require.NoError(t, next.Reset())
		moved.is(ErrTryLater) // nobody has been told yet
		p.readsEnd(s, network.ErrReset)
		p.hostMigrates(s).is(ErrClosed)
	})
	t.Run("held from a Read", func(t *testing.T) {
		p, s, next, moved, got := held(t)
		require.NoError(t, next.Reset())
		require.Contains(t, Take(t, got, "the Read"), "stream reset")
		// Migrate may have seen that the Read was told, or not.
		err := Take(t, moved.done, "Migrate to return")
		require.True(t, errors.Is(err, ErrTryLater) || errors.Is(err, ErrClosed), "Migrate returned %v", err)
		p.hostMigrates(s).is(ErrClosed)
	})
	t.Run("our writing is open", func(t *testing.T) {
		p, s, old := setUp(t)
		fails(t, p, s)
		old.ClosesWrite()
		p.readsEnd(s, io.EOF)
		p.writes(s, "old")
		old.Wants("old")
	})
	t.Run("migrated since", func(t *testing.T) {
		// The doubt was about the end of a stream that is history now.
		p, s, old := setUp(t)
		fails(t, p, s)
		moved, next := p.asked(s)
		next.Acks(AckDraft)
		old.WantsEOF()
		old.ClosesWrite()
		moved.is(nil)
		require.NoError(t, s.CloseWrite())
		next.WantsEOF()
		next.Sends("data")
		next.ClosesWrite()
		require.Equal(t, "data", p.readsEnd(s, io.EOF))
	})
	t.Run("denied", func(t *testing.T) {
		p, s, old := setUp(t)
		require.NoError(t, s.CloseWrite())
		moved, next := p.asked(s)
		next.Acks(AckDenied)
		moved.is(ErrDenied)
		old.ClosesWrite()
		p.readsEnd(s, io.EOF)
	})
	t.Run("responder with the verified handover", func(t *testing.T) {
		p := meet(t, verified)
		s, old := p.hostOpens()
		require.NoError(t, s.CloseWrite())
		fails(t, p, s)
		old.ClosesWrite()
		p.readsEnd(s, io.EOF)
	})
}

// TestDraftResetBeforeAck: the stream goes on where it was, and can be migrated later,
// by either end (S9).
func TestDraftResetBeforeAck(t *testing.T) {
	t.Run("responder", func(t *testing.T) {
		p := meet(t, draftOnly)
		s, old := p.hostOpens()
		for _, ends := range []func(next *RawStream){
			func(next *RawStream) { require.NoError(t, next.Reset()) },
			func(next *RawStream) { require.NoError(t, next.ResetWithError(network.StreamResourceLimitExceeded)) },
			func(next *RawStream) { next.ClosesWrite() },
			func(next *RawStream) { next.Sends(MultistreamToken, NAToken) },
		} {
			moved, next := p.asked(s)
			ends(next)
			moved.is(ErrTryLater)
			p.talk(s, old)
			p.hasLabel(old.Label)
		}
		moved, next := p.asked(s)
		next.Acks(AckDraft)
		old.WantsEOF()
		old.ClosesWrite()
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
		next := p.Opens(1, Prelude, MigrateDraftBytes(p.Fresh(), old.Label))
		Take(t, asked, "the request to arrive")
		require.NoError(t, next.Reset())
		Take(t, reset, "the host to notice")
		WaitFor(t, "the attempt to be over", func() bool { return s.exchange() == nil })
		p.talk(s, old)
		p.hasLabel(old.Label)

		next = p.migratesDraft(old)
		old.ClosesWrite()
		old.WantsEOF()
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
			other.WantsReset(network.StreamNoError)
			p.readsEnd(s, network.ErrReset)
			p.failed(s)
			p.nothingLeft()
		})
		t.Run("responder, "+which, func(t *testing.T) {
			p := meet(t, draftOnly)
			s, old := p.hostOpens()
			moved, next := p.asked(s)
			next.Acks(AckDraft)
			old.WantsEOF()
			if which == "old" {
				require.NoError(t, old.Reset())
				next.WantsReset(network.StreamNoError)
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
			require.NoError(t, p.Conns[0].Close())
			next.WantsReset(network.StreamNoError)
			p.readsEnd(s, network.ErrReset)
			p.failed(s)
			p.nothingLeft()
		})
		t.Run("responder", func(t *testing.T) {
			p := m.meet(t)
			s, old := p.hostOpens()
			moved, next := p.asked(s)
			next.Acks(AckDraft)
			old.WantsEOF()
			require.NoError(t, p.Conns[0].Close())
			moved.is(network.ErrReset)
			next.WantsReset(network.StreamNoError)
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
	next.Acks(AckDenied)
	next.WantsEOF() // the host closes it
	moved.is(ErrDenied)
	p.talk(s, old)
	p.hostMigrates(s).is(ErrDenied)
	p.hasLabel(old.Label)
	require.Equal(t, 0, s.Migrations())

	// The peer itself may ask, though.
	next = p.migratesDraft(old)
	old.ClosesWrite()
	old.WantsEOF()
	p.settled(s, next)
	p.talk(s, next)
}

// TestRequireVerifiedHandover refuses draft-only peers in both roles (S12).
func TestRequireVerifiedHandover(t *testing.T) {
	t.Run("initiator", func(t *testing.T) {
		p := meet(t, draftOnly, RequireVerifiedHandover())
		s, old := p.hostAccepts()
		next := p.Opens(1, Prelude, MigrateDraftBytes(p.Fresh(), old.Label))
		next.Wants(Prelude, AckDenied)
		next.WantsEOF()
		p.talk(s, old)
		p.hasLabel(old.Label)
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
		p.Arrives().Wants(MultistreamToken, EchoToken, "hello")
	})
	t.Run("peer that has it", func(t *testing.T) {
		p := meet(t, verified, RequireVerifiedHandover())
		s, old := p.hostOpens()
		moved, next := p.asked(s)
		next.Acks(AckVerified)
		next.Wants(FinalSizeBytes(1))
		next.Sends(FinalSizeBytes(1))
		old.WantsEOF()
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
	next := p.Opens(1, Prelude, MigrateDraftBytes(p.Fresh(), old.Label))
	Take(t, acked, "the ack")
	old.ClosesWrite()
	old.WantsEOF()
	p.writes(s, "to new, in vain")
	require.NoError(t, next.Reset())
	require.Contains(t, Take(t, got, "the Read"), "stream reset")
	p.failed(s)
	_ = s.Reset() // the migration may have ended before, and the label lives until then
	p.nothingLeft()
}
