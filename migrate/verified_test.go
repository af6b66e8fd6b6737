package migrate

import (
	"io"
	"strings"
	"testing"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
	. "github.com/go-portage/portage/internal/rawpeer"
)

// The verified handover (S12) with a scripted peer: what FinalSize says, and what the old
// stream brings, agree or do not.

// migrates has the peer ask to migrate old to the new connection. The host has acked,
// and waits for the peer's final size.
func (p *rawPeer) migrates(old *RawStream) *RawStream {
	p.t.Helper()
	id := p.Fresh()
	next := p.Opens(1, Prelude, MigrateBytes(id, old.Label))
	next.Label = id
	next.Wants(Prelude, AckVerified)
	return next
}

// handingOver is a migration at the point where the host has told its final size, and
// waits for that of the peer (initiator) or has read it (responder).
type handingOver struct {
	p         *rawPeer
	s         *Stream
	old, next *RawStream
}

// bothRoles runs the test with the host as the initiator and as the responder. Before,
// one byte was sent either way on the old stream, by hostOpens, and the peer has sent
// what extra says. final is the final size that the peer tells.
func bothRoles(t *testing.T, extra string, final uint64, test func(t *testing.T, h handingOver)) {
	t.Run("initiator", func(t *testing.T) { // the host is
		p := meet(t, verified)
		s, old := p.hostOpens()
		old.Sends(extra)
		_, next := p.asked(s)
		next.Acks(AckVerified)
		next.Wants(FinalSizeBytes(1))
		old.WantsEOF()
		next.Sends(FinalSizeBytes(final))
		test(t, handingOver{p, s, old, next})
	})
	t.Run("responder", func(t *testing.T) {
		p := meet(t, verified)
		s, old := p.hostOpens()
		old.Sends(extra)
		next := p.migrates(old)
		next.Sends(FinalSizeBytes(final))
		test(t, handingOver{p, s, old, next})
	})
}

// isReset checks that the host has reset both streams, and that the application sees it
// at both halves (S8).
func (h handingOver) isReset(code network.StreamErrorCode) {
	h.p.t.Helper()
	h.next.WantsReset(code)
	h.p.readsEnd(h.s, network.ErrReset)
	h.p.failed(h.s)
	h.p.nothingLeft()
}

// TestVerifiedResponder: the host answers with its own final size as soon as it has the
// peer's, and does not wait for the end of the old stream (S3, S4, S12). It is the old
// stream that each end then closes for writing, not the new one (W3).
func TestVerifiedResponder(t *testing.T) {
	onBothTransports(t, func(t *testing.T, m meeting) {
		m.kind = verified
		m.either(t, func(t *testing.T, p *rawPeer, s *Stream, old *RawStream) {
			next := p.migrates(old)
			// Until the final size comes, the ack may have been lost (S3).
			p.writes(s, "old still")
			old.Wants("old still")
			next.Sends(FinalSizeBytes(1+9+8), "first of new")
			next.Wants(FinalSizeBytes(1 + 9))
			old.WantsEOF()
			p.writes(s, "new")
			next.Wants("new")
			old.Sends("old data ", "and last")
			p.reads(s, "old data and lastfirst of new")
			// No EOF came on the old stream, and none is needed.
			p.settled(s, next)
			p.talk(s, next)
			next.ClosesWrite()
			p.readsEnd(s, io.EOF)
			require.NoError(t, s.Close())
			next.WantsEOF()
			p.nothingLeft()
		})
	})
}

// TestVerifiedInitiator: the same with the roles changed.
func TestVerifiedInitiator(t *testing.T) {
	onBothTransports(t, func(t *testing.T, m meeting) {
		m.kind = verified
		m.either(t, func(t *testing.T, p *rawPeer, s *Stream, old *RawStream) {
			moved, next := p.asked(s)
			p.writes(s, "old until the ack")
			old.Wants("old until the ack")
			next.Acks(AckVerified)
			next.Wants(FinalSizeBytes(1 + 17))
			old.WantsEOF()
			p.writes(s, "new")
			next.Wants("new")
			old.Sends("old data ")
			p.reads(s, "old data ")
			next.Sends(FinalSizeBytes(1+9+8), "first of new")
			old.Sends("and last")
			p.reads(s, "and lastfirst of new")
			moved.is(nil)
			p.settled(s, next)
			p.talk(s, next)
			next.ClosesWrite()
			p.readsEnd(s, io.EOF)
			require.NoError(t, s.Close())
			next.WantsEOF()
			p.nothingLeft()
		})
	})
}

// TestVerifiedNeverReadingSide: the host reads the old stream although the application
// does not (S4).
func TestVerifiedNeverReadingSide(t *testing.T) {
	data := strings.Repeat("0123456789abcdef", 10<<10)
	bothRoles(t, data, uint64(1+len(data)), func(t *testing.T, h handingOver) {
		h.p.settled(h.s, h.next)
		h.next.Sends("new")
		h.next.ClosesWrite()
		require.Equal(t, data+"new", h.p.readsEnd(h.s, io.EOF))
	})
}

// TestVerifiedHalfClosed: closed writing is closed on the new stream behind FinalSize,
// and an EOF that was given stays given (S6).
func TestVerifiedHalfClosed(t *testing.T) {
	t.Run("initiator, our writing", func(t *testing.T) {
		p := meet(t, verified)
		s, old := p.hostOpens()
		require.NoError(t, s.CloseWrite())
		old.WantsEOF()
		moved, next := p.asked(s)
		next.Acks(AckVerified)
		next.Wants(FinalSizeBytes(1))
		next.WantsEOF()
		next.Sends(FinalSizeBytes(1), "new")
		p.reads(s, "new")
		moved.is(nil)
	})
	t.Run("responder, our writing", func(t *testing.T) {
		p := meet(t, verified)
		s, old := p.hostOpens()
		require.NoError(t, s.CloseWrite())
		old.WantsEOF()
		next := p.migrates(old)
		next.Sends(FinalSizeBytes(1), "new")
		next.Wants(FinalSizeBytes(1))
		next.WantsEOF()
		p.reads(s, "new")
		p.settled(s, next)
	})
	t.Run("initiator, its writing", func(t *testing.T) {
		p := meet(t, verified)
		s, old := p.hostOpens()
		old.ClosesWrite()
		p.readsEnd(s, io.EOF)
		moved, next := p.asked(s)
		next.Acks(AckVerified)
		next.Wants(FinalSizeBytes(1))
		next.Sends(FinalSizeBytes(1))
		next.ClosesWrite()
		moved.is(nil)
		require.Equal(t, "", p.readsEnd(s, io.EOF))
		p.writes(s, "new")
		next.Wants("new")
	})
	t.Run("responder, its writing, EOF not read", func(t *testing.T) {
		p := meet(t, verified)
		s, old := p.hostOpens()
		old.Sends("the last")
		old.ClosesWrite()
		next := p.migrates(old)
		next.Sends(FinalSizeBytes(1 + 8))
		next.ClosesWrite()
		next.Wants(FinalSizeBytes(1))
		old.WantsEOF()
		require.Equal(t, "the last", p.readsEnd(s, io.EOF))
		p.writes(s, "new")
		next.Wants("new")
	})
	t.Run("responder, our reading", func(t *testing.T) {
		// With a final size there is proof of the ack, so it is not denied (S3).
		p := meet(t, verified)
		s, old := p.hostOpens()
		require.NoError(t, s.CloseRead())
		next := p.migrates(old)
		next.Sends(FinalSizeBytes(1))
		next.Wants(FinalSizeBytes(1))
		old.WantsEOF()
		p.writes(s, "new")
		next.Wants("new")
		p.settled(s, next)
		require.NoError(t, s.Close())
		next.WantsEOF()
		p.nothingLeft()
	})
	t.Run("data after the end", func(t *testing.T) {
		p := meet(t, verified)
		s, old := p.hostOpens()
		old.ClosesWrite()
		p.readsEnd(s, io.EOF)
		next := p.migrates(old)
		next.Sends(FinalSizeBytes(1), "more")
		next.WantsReset(network.StreamProtocolViolation) // S11
		p.failed(s)
		p.nothingLeft()
	})
}

// TestFalseEOF: the old stream ends short of the final size. What is missing cannot be
// had, so that both ends see a reset; what came is delivered (S8, S12).
func TestFalseEOF(t *testing.T) {
	bothRoles(t, "abc", 1+6, func(t *testing.T, h handingOver) {
		h.old.ClosesWrite()
		got := h.p.readsEnd(h.s, network.ErrReset)
		require.True(t, strings.HasPrefix("abc", got), "%q is not what was sent", got)
		h.isReset(network.StreamNoError)
	})
}

// TestFalseEOFThatWasBelieved: the application was given an EOF by the old stream, and
// the peer now says that there was more (S12).
func TestFalseEOFThatWasBelieved(t *testing.T) {
	for _, role := range []string{"initiator", "responder"} {
		t.Run(role, func(t *testing.T) {
			p := meet(t, verified)
			s, old := p.hostOpens()
			old.ClosesWrite()
			p.readsEnd(s, io.EOF)
			var next *RawStream
			if role == "initiator" {
				_, next = p.asked(s)
				next.Acks(AckVerified)
				next.Wants(FinalSizeBytes(1))
			} else {
				next = p.migrates(old)
			}
			next.Sends(FinalSizeBytes(1 + 5))
			next.WantsReset(network.StreamNoError)
			p.failed(s)
			p.nothingLeft()
		})
	}
}

// TestOldConnectionDies: with all bytes delivered, the death of the old connection does
// not matter, at any point of the handover; with bytes missing both ends see a reset
// (S12).
func TestOldConnectionDies(t *testing.T) {
	die := func(p *rawPeer) {
		require.NoError(p.t, p.Conns[0].Close())
		WaitFor(p.t, "the host to notice", p.Ends[0].IsClosed)
	}
	onBothTransports(t, func(t *testing.T, m meeting) {
		m.kind = verified
		t.Run("initiator, before the ack", func(t *testing.T) {
			p := m.meet(t)
			s, _ := p.hostOpens()
			got := reading(s)
			moved, next := p.asked(s)
			die(p)
			p.holds(s) // S5: the error is kept back like an EOF
			p.stillReading(got)
			wrote := make(chan error, 1)
			go func() {
				_, err := s.Write([]byte("new"))
				wrote <- err
			}()
			next.Acks(AckVerified)
			next.Wants(FinalSizeBytes(1), "new")
			require.NoError(t, Take(t, wrote, "the Write"), "the dead stream took nothing, so the new one takes it")
			next.Sends(FinalSizeBytes(1), "new")
			require.Equal(t, "new", Take(t, got, "the Read"))
			moved.is(nil)
			p.talk(s, next)
			require.NoError(t, s.Close())
			next.WantsEOF()
			p.nothingLeft()
		})
		t.Run("initiator, after the ack", func(t *testing.T) {
			p := m.meet(t)
			s, _ := p.hostOpens()
			moved, next := p.asked(s)
			next.Acks(AckVerified)
			next.Wants(FinalSizeBytes(1))
			die(p)
			p.writes(s, "new")
			next.Wants("new")
			next.Sends(FinalSizeBytes(1), "new")
			p.reads(s, "new")
			moved.is(nil)
			p.talk(s, next)
		})
		t.Run("responder, before the final size", func(t *testing.T) {
			p := m.meet(t)
			s, old := p.hostOpens()
			next := p.migrates(old)
			die(p)
			wrote := make(chan error, 1)
			go func() {
				_, err := s.Write([]byte("new"))
				wrote <- err
			}()
			next.Sends(FinalSizeBytes(1), "new")
			next.Wants(FinalSizeBytes(1), "new")
			require.NoError(t, Take(t, wrote, "the Write"))
			p.reads(s, "new")
			p.settled(s, next)
			p.talk(s, next)
		})
		t.Run("initiator, bytes missing", func(t *testing.T) {
			p := m.meet(t)
			s, _ := p.hostOpens()
			moved, next := p.asked(s)
			next.Acks(AckVerified)
			next.Wants(FinalSizeBytes(1))
			die(p)
			next.Sends(FinalSizeBytes(1+5), "new")
			next.WantsReset(network.StreamNoError)
			moved.is(network.ErrReset)
			p.readsEnd(s, network.ErrReset)
			p.failed(s)
			p.nothingLeft()
		})
		t.Run("responder, bytes missing", func(t *testing.T) {
			p := m.meet(t)
			s, old := p.hostOpens()
			next := p.migrates(old)
			die(p)
			next.Sends(FinalSizeBytes(1+5), "new")
			next.WantsReset(network.StreamNoError)
			p.readsEnd(s, network.ErrReset)
			p.failed(s)
			p.nothingLeft()
		})
		t.Run("denied", func(t *testing.T) {
			// Without a migration the death is what it always is.
			p := m.meet(t)
			s, _ := p.hostOpens()
			got := reading(s)
			moved, next := p.asked(s)
			die(p)
			p.holds(s)
			next.Acks(AckDenied)
			moved.is(ErrDenied)
			require.Contains(t, Take(t, got, "the Read"), "error: ")
			_, err := s.Write([]byte("x"))
			require.Error(t, err)
			require.NoError(t, s.Reset())
			p.nothingLeft()
		})
	})
}

// TestToldOfTheEnd: once the application was told that its connection has failed, the
// stream does not move any more, whoever asks. Else the other application would not be
// told, and would take the Close that follows for a clean end (S8).
func TestToldOfTheEnd(t *testing.T) {
	for name, tell := range map[string]func(s *Stream) error{
		"by Read":  func(s *Stream) error { _, err := s.Read(make([]byte, 10)); return err },
		"by Write": func(s *Stream) error { _, err := s.Write([]byte("lost")); return err },
	} {
		t.Run(name, func(t *testing.T) {
			onBothTransports(t, func(t *testing.T, m meeting) {
				m.kind = verified
				m.either(t, func(t *testing.T, p *rawPeer, s *Stream, old *RawStream) {
					require.NoError(t, p.Conns[0].Close())
					WaitFor(t, "the host to notice", p.Ends[0].IsClosed)
					require.Error(t, tell(s))
					p.hostMigrates(s).is(ErrClosed)
					next := p.Opens(1, Prelude, MigrateBytes(p.Fresh(), s.Label()))
					next.Wants(Prelude, AckDenied)
					next.WantsEOF()
					require.Error(t, tell(s))
					_ = s.Close()
					p.nothingLeft()
				})
			})
		})
	}
}

// TestResetBeforeTheAck: a stream that its application resets meanwhile is not one to try
// again with later.
func TestResetBeforeTheAck(t *testing.T) {
	p := meet(t, verified)
	s, old := p.hostOpens()
	moved, next := p.asked(s)
	require.NoError(t, s.Reset())
	moved.is(ErrClosed)
	next.WantsReset(network.StreamNoError)
	old.WantsReset(network.StreamNoError)
	p.nothingLeft()
}

// TestFinalSizeTooHigh: a peer that claims more than it sent, and ends the old stream:
// both ends see a reset, and never a clean end (S8, S12).
func TestFinalSizeTooHigh(t *testing.T) {
	for name, final := range map[string]uint64{"by one": 1 + 1, "by all there is": 1<<64 - 1} {
		t.Run(name, func(t *testing.T) {
			bothRoles(t, "", final, func(t *testing.T, h handingOver) {
				h.old.ClosesWrite()
				h.isReset(network.StreamNoError)
			})
		})
	}
}

// TestFinalSizeTooLow: a peer that sent more than it claims (S11, S12).
func TestFinalSizeTooLow(t *testing.T) {
	for _, role := range []string{"initiator", "responder"} {
		t.Run(role, func(t *testing.T) {
			p := meet(t, verified)
			s, old := p.hostOpens()
			old.Sends("abc")
			p.reads(s, "abc")
			var next *RawStream
			if role == "initiator" {
				_, next = p.asked(s)
				next.Acks(AckVerified)
				next.Wants(FinalSizeBytes(1))
			} else {
				next = p.migrates(old)
			}
			next.Sends(FinalSizeBytes(1 + 2))
			handingOver{p, s, old, next}.isReset(network.StreamProtocolViolation)
		})
	}
}

// TestFinalSizeMissing: something else where FinalSize has to be (W4). There is no way
// back (S10), so both streams are reset.
func TestFinalSizeMissing(t *testing.T) {
	for name, sent := range map[string]string{
		"data":          "\x02hi",
		"no member":     "\x00",
		"another":       AckVerified,
		"oversized":     Uvarint(1025),
		"overlong":      strings.Repeat("\xff", 10),
		"not a message": "\x01\xff",
	} {
		t.Run(name, func(t *testing.T) {
			for _, role := range []string{"initiator", "responder"} {
				t.Run(role, func(t *testing.T) {
					p := meet(t, verified)
					s, old := p.hostOpens()
					var next *RawStream
					if role == "initiator" {
						_, next = p.asked(s)
						next.Acks(AckVerified)
						next.Wants(FinalSizeBytes(1))
						next.Sends(sent)
					} else {
						next = p.migrates(old)
						next.Sends(sent)
						old.WantsReset(network.StreamProtocolViolation)
					}
					handingOver{p, s, old, next}.isReset(network.StreamProtocolViolation)
				})
			}
		})
	}
}

// TestFinalSizeTwice: what follows the final size is the application's, whatever it
// looks like.
func TestFinalSizeTwice(t *testing.T) {
	bothRoles(t, "", 1, func(t *testing.T, h handingOver) {
		h.next.Sends(FinalSizeBytes(1))
		h.p.reads(h.s, FinalSizeBytes(1))
		h.p.settled(h.s, h.next)
	})
}

// TestFinalSizeInPieces: however it is cut, nothing behind it is lost.
func TestFinalSizeInPieces(t *testing.T) {
	p := meet(t, verified)
	s, old := p.hostOpens()
	moved, next := p.asked(s)
	next.Drips(Prelude, AckVerified, FinalSizeBytes(1), "new")
	next.Wants(FinalSizeBytes(1))
	old.WantsEOF()
	p.reads(s, "new")
	moved.is(nil)
	p.talk(s, next)
}

// TestAckWithoutFinalSize: a peer that advertises the verified handover, and acks
// without: what was kept back on its account cannot be judged any more (S12).
func TestAckWithoutFinalSize(t *testing.T) {
	p := meet(t, verified)
	s, old := p.hostOpens()
	moved, next := p.asked(s)
	next.Acks(AckDraft)
	next.WantsReset(network.StreamProtocolViolation)
	old.WantsReset(network.StreamProtocolViolation)
	moved.is(network.ErrReset)
	p.readsEnd(s, network.ErrReset)
	p.failed(s)
	p.nothingLeft()
}

// TestUnadvertised: what both messages of the exchange say counts, not what identify
// said, where it can be had (S12).
func TestUnadvertised(t *testing.T) {
	t.Run("initiator", func(t *testing.T) {
		p := meet(t, draftOnly)
		s, old := p.hostOpens()
		moved, next := p.asked(s)
		next.Acks(AckVerified)
		next.Wants(FinalSizeBytes(1))
		old.WantsEOF()
		require.NoError(t, p.Conns[0].Close())
		next.Sends(FinalSizeBytes(1), "new")
		p.reads(s, "new")
		moved.is(nil)
		p.talk(s, next)
	})
	t.Run("responder", func(t *testing.T) {
		p := meet(t, draftOnly)
		s, old := p.hostOpens()
		next := p.migrates(old)
		next.Sends(FinalSizeBytes(1), "new")
		next.Wants(FinalSizeBytes(1))
		old.WantsEOF()
		p.reads(s, "new")
		p.settled(s, next)
	})
	t.Run("advertised, and not offered", func(t *testing.T) {
		p := meet(t, verified)
		s, old := p.hostOpens()
		next := p.migratesDraft(old)
		old.ClosesWrite()
		old.WantsEOF()
		p.settled(s, next)
		p.talk(s, next)
	})
}

// TestVerifiedReset: after the ack, a reset of the new stream resets both; one of the old
// stream does so only where bytes are missing (S8, S12).
func TestVerifiedReset(t *testing.T) {
	t.Run("initiator, new", func(t *testing.T) {
		p := meet(t, verified)
		s, old := p.hostOpens()
		moved, next := p.asked(s)
		next.Acks(AckVerified)
		next.Wants(FinalSizeBytes(1))
		old.WantsEOF() // else the reset could be faster
		require.NoError(t, next.Reset())
		moved.is(network.ErrReset)
		p.readsEnd(s, network.ErrReset)
		p.failed(s)
		p.nothingLeft()
	})
	t.Run("responder, new", func(t *testing.T) {
		p := meet(t, verified)
		s, old := p.hostOpens()
		next := p.migrates(old)
		require.NoError(t, next.Reset())
		old.WantsReset(network.StreamNoError)
		p.readsEnd(s, network.ErrReset)
		p.failed(s)
		p.nothingLeft()
	})
	t.Run("responder, new ends", func(t *testing.T) {
		p := meet(t, verified)
		s, old := p.hostOpens()
		next := p.migrates(old)
		next.ClosesWrite()
		old.WantsReset(network.StreamNoError)
		p.readsEnd(s, network.ErrReset)
		p.nothingLeft()
	})
	t.Run("old, bytes missing", func(t *testing.T) {
		bothRoles(t, "", 1+5, func(t *testing.T, h handingOver) {
			require.NoError(t, h.old.Reset())
			h.isReset(network.StreamNoError)
		})
	})
	t.Run("old, nothing missing", func(t *testing.T) {
		for _, role := range []string{"initiator", "responder"} {
			t.Run(role, func(t *testing.T) {
				p := meet(t, verified)
				s, old := p.hostOpens()
				got := reading(s)
				var next *RawStream
				if role == "initiator" {
					_, next = p.asked(s)
					require.NoError(t, old.Reset())
					p.holds(s)
					next.Acks(AckVerified)
				} else {
					next = p.migrates(old)
					require.NoError(t, old.Reset())
					p.holds(s)
				}
				next.Sends(FinalSizeBytes(1), "new")
				next.Wants(FinalSizeBytes(1))
				require.Equal(t, "new", Take(t, got, "the Read"))
				p.settled(s, next)
				p.talk(s, next)
			})
		}
	})
}

// TestErrorsHaveADirection: a peer that closes its reading makes the host's Writes fail
// on QUIC, and nothing else (S13).
func TestErrorsHaveADirection(t *testing.T) {
	p := meeting{kind: verified, first: QUIC, second: TCP}.meet(t)
	s, old := p.hostOpens()
	require.NoError(t, old.CloseRead())
	WaitFor(t, "Writes to fail", func() bool {
		_, err := s.Write([]byte("x"))
		return err != nil
	})
	old.Sends("to be ")
	p.reads(s, "to be ")
	old.Sends("read")
	old.ClosesWrite()
	require.Equal(t, "read", p.readsEnd(s, io.EOF))
}
