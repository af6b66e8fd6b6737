package migrate

import (
	"strings"
	"sync/atomic"
	"testing"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	. "github.com/go-portage/portage/internal/rawpeer"
)

// untouched checks that the host's stream s, which the peer has on u, is as it was.
func (p *rawPeer) untouched(s *Stream, u *RawStream) {
	p.t.Helper()
	p.talk(s, u)
	require.Equal(p.t, u.Label, s.Label())
	require.Equal(p.t, 0, s.Migrations())
	p.hasLabel(u.Label)
	p.host.labels.mu.Lock()
	defer p.host.labels.mu.Unlock()
	pl := p.host.labels.peers[p.ID()]
	require.Zero(p.t, pl.nWaiting)
	require.Empty(p.t, pl.waiting)
}

// padded is a Label whose message is exactly size bytes long, the rest a field that
// nobody knows.
func padded(id uint64, size int) string {
	m := "\x0a" + Lengthy("\x08"+Uvarint(id))
	rest := size - len(m) - len("\xaa\x06") - 2
	return Lengthy(m + "\xaa\x06" + Lengthy(strings.Repeat("x", rest)))
}

// TestViolationOnOpening: what an inbound stream must not begin with (W4, W5, L1, L2,
// S2). It alone is reset; the living stream, which it may even name, goes on.
func TestViolationOnOpening(t *testing.T) {
	onBothTransports(t, func(t *testing.T, m meeting) {
		m.kind = verified
		core, logs := observer.New(zap.WarnLevel)
		var told atomic.Int32
		m.opts = append(m.opts, WithLogger(zap.New(core)), WithViolationObserver(func(peer.ID) { told.Add(1) }))
		p := m.meet(t)
		p.host.violations.Every = 0
		s, old := p.hostAccepts()
		mine, other := p.Fresh(), p.Fresh()
		wrong := mine ^ 1
		rows := map[string]string{
			"ack":                           AckVerified,
			"final size":                    FinalSizeBytes(5),
			"label of the wrong parity":     LabelBytes(wrong) + MultistreamToken + EchoToken,
			"label that is alive":           LabelBytes(old.Label) + MultistreamToken + EchoToken,
			"nested ID":                     LabelBytes(mine) + Prelude,
			"nested ID as a second choice":  LabelBytes(mine) + MultistreamToken + Token("/test/other/1.0.0") + MigrationToken,
			"nested ID and label":           LabelBytes(mine) + Prelude + LabelBytes(other) + MultistreamToken + EchoToken,
			"migrate of the wrong parity":   MigrateBytes(wrong, old.Label),
			"migrate to a label alive":      MigrateBytes(old.Label, old.Label),
			"migrate with data":             MigrateBytes(mine, old.Label) + FinalSizeBytes(1),
			"migrate with data, draft-only": MigrateDraftBytes(mine, old.Label) + "x",
		}
		for name, bytes := range Malformed {
			rows[name] = bytes
		}
		for name, bytes := range rows {
			t.Run(name, func(t *testing.T) {
				for i := range p.Conns {
					u := p.Opens(i, Prelude, bytes)
					u.WantsReset(network.StreamProtocolViolation)
					p.untouched(s, old)
					// Before the reset. A handler that refuses ID would look the same to the peer.
					require.Len(t, logs.TakeAll(), 1, "the violation is logged, once")
					require.EqualValues(t, 1, told.Swap(0), "and the observer is told")
				}
			})
		}
		select {
		case <-p.app:
			t.Error("the application was handed a stream that broke the protocol")
		default:
		}

		// After all of that the stream can migrate.
		next := p.migrates(old)
		next.Sends(FinalSizeBytes(uint64(1 + 4*2*len(rows))))
		next.Wants(FinalSizeBytes(uint64(1 + 4*2*len(rows))))
		old.WantsEOF()
		p.settled(s, next)
		p.talk(s, next)
		require.NoError(t, s.Close())
		next.WantsEOF()
		p.nothingLeft()
	})
}

// TestTwoAliveLabels: a Migrate whose new label belongs to another stream harms neither
// (L2).
func TestTwoAliveLabels(t *testing.T) {
	p := meet(t, verified)
	s1, u1 := p.hostAccepts()
	s2, u2 := p.hostAccepts()
	for range 2 {
		p.Opens(1, Prelude, MigrateBytes(u2.Label, u1.Label)).WantsReset(network.StreamProtocolViolation)
		p.talk(s1, u1)
		p.talk(s2, u2)
		require.ElementsMatch(t, []uint64{u1.Label, u2.Label}, p.labelled())
	}
}

// TestNegotiationThatFails: what is no violation of the protocol, but no stream either.
func TestNegotiationThatFails(t *testing.T) {
	p := meet(t, verified)
	s, old := p.hostAccepts()
	for name, bytes := range map[string]string{
		"message that is cut off":     Prelude + "\x05\x0a\x03",
		"length that is cut off":      Prelude + "\x85",
		"no message":                  Prelude,
		"no protocol":                 Prelude + LabelBytes(p.Fresh()),
		"no multistream behind label": Prelude + LabelBytes(p.Fresh()) + EchoToken,
		"protocol that is cut off":    Prelude + LabelBytes(p.Fresh()) + MultistreamToken + EchoToken[:7],
		"empty":                       "",
		"not multistream":             "GET / HTTP/1.1\r\nHost: example.org\r\n\r\n",
		"header that is cut off":      MultistreamToken[:7],
		"ID that is cut off":          Prelude[:7],
	} {
		t.Run(name, func(t *testing.T) {
			u := p.Opens(1, bytes)
			if err := u.CloseWrite(); name != "no multistream behind label" {
				require.NoError(t, err)
			} // of which the host has seen enough: its reset may come first
			u.WantsReset(network.StreamProtocolNegotiationFailed)
			p.untouched(s, old)
		})
	}
}

// TestLargestMessage: 1024 bytes are not too many (W4).
func TestLargestMessage(t *testing.T) {
	p := meet(t, verified)
	label := p.Fresh()
	message := padded(label, 1024)
	require.Len(t, message, 1024+2)
	u := p.Opens(0, Prelude, message, MultistreamToken, EchoToken, "hello")
	u.Wants(Prelude, MultistreamToken, EchoToken)
	s := p.accepted()
	p.reads(s, "hello")
	p.talk(s, u)

	p.Opens(0, Prelude, padded(p.Fresh(), 1025), MultistreamToken, EchoToken).
		WantsReset(network.StreamProtocolViolation)
}

// TestLastMemberCounts, as protobuf has it: of two members, the last one stands.
func TestLastMemberCounts(t *testing.T) {
	p := meet(t, verified)
	label := p.Fresh()
	m := "\x1a\x00" + "\x0a" + Lengthy("\x08"+Uvarint(label))
	u := p.Opens(0, Prelude, Lengthy(m), MultistreamToken, EchoToken)
	u.Wants(Prelude, MultistreamToken, EchoToken)
	p.talk(p.accepted(), u)
}

// TestViolationInAnswer: what must not answer a Migrate. The new stream is reset, and
// the logical one stays where it is and can be tried again (W4, S9).
func TestViolationInAnswer(t *testing.T) {
	onBothTransports(t, func(t *testing.T, m meeting) {
		m.kind = verified
		p := m.meet(t)
		s, old := p.hostOpens()
		rows := map[string]string{
			"label":      LabelBytes(p.Fresh()),
			"migrate":    MigrateBytes(p.Fresh(), old.Label),
			"final size": FinalSizeBytes(1),
		}
		for name, bytes := range Malformed {
			rows[name] = bytes
		}
		for name, bytes := range rows {
			t.Run(name, func(t *testing.T) {
				moved, next := p.asked(s)
				next.Acks(bytes)
				next.WantsReset(network.StreamProtocolViolation)
				moved.is(ErrTryLater)
				p.untouched(s, old)
			})
		}
		t.Run("cut off", func(t *testing.T) {
			moved, next := p.asked(s)
			next.Acks(AckVerified[:2])
			next.ClosesWrite()
			next.WantsReset(network.StreamNoError)
			moved.is(ErrTryLater)
			p.untouched(s, old)
		})
		t.Run("not multistream", func(t *testing.T) {
			moved, next := p.asked(s)
			next.Sends("GET / HTTP/1.1\r\n\r\n")
			next.WantsReset(network.StreamNoError)
			moved.is(ErrTryLater)
			p.untouched(s, old)
		})
	})
}
