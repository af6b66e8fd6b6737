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
)

// untouched checks that the host's stream s, which the peer has on u, is as it was.
func (p *rawPeer) untouched(s *Stream, u *rawStream) {
	p.t.Helper()
	p.talk(s, u)
	require.Equal(p.t, u.label, s.Label())
	require.Equal(p.t, 0, s.Migrations())
	p.hasLabel(u.label)
	p.host.labels.mu.Lock()
	defer p.host.labels.mu.Unlock()
	pl := p.host.labels.peers[p.ID()]
	require.Zero(p.t, pl.nWaiting)
	require.Empty(p.t, pl.waiting)
}

// padded is a Label whose message is exactly size bytes long, the rest a field that
// nobody knows.
func padded(id uint64, size int) string {
	m := "\x0a" + lengthy("\x08"+uvarint(id))
	rest := size - len(m) - len("\xaa\x06") - 2
	return lengthy(m + "\xaa\x06" + lengthy(strings.Repeat("x", rest)))
}

// malformed is what no message may look like (W4).
var malformed = map[string]string{
	"no member":              "\x00",
	"unknown member":         lengthy("\xaa\x06" + lengthy("")),
	"oversized":              uvarint(1025) + strings.Repeat("\x00", 1025),
	"length of 70 bits":      strings.Repeat("\xff", 10),
	"length that is too big": "\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
	"member beyond the end":  "\x02\x0a\x05",
	"unknown wire type":      "\x01\x0f",
	"field zero":             "\x02\x00\x00",
	"member of another type": lengthy("\x08\x02"),
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
		mine, other := p.fresh(), p.fresh()
		wrong := mine ^ 1
		rows := map[string]string{
			"ack":                           ackVerified,
			"final size":                    finalSizeBytes(5),
			"label of the wrong parity":     labelBytes(wrong) + tMultistream + tEcho,
			"label that is alive":           labelBytes(old.label) + tMultistream + tEcho,
			"nested ID":                     labelBytes(mine) + tMultistream + tMigration,
			"nested ID as a second choice":  labelBytes(mine) + tMultistream + tok("/test/other/1.0.0") + tMigration,
			"nested ID and label":           labelBytes(mine) + tMultistream + tMigration + labelBytes(other) + tMultistream + tEcho,
			"migrate of the wrong parity":   migrateBytes(wrong, old.label),
			"migrate to a label alive":      migrateBytes(old.label, old.label),
			"migrate with data":             migrateBytes(mine, old.label) + finalSizeBytes(1),
			"migrate with data, draft-only": migrateDraftBytes(mine, old.label) + "x",
		}
		for name, bytes := range malformed {
			rows[name] = bytes
		}
		for name, bytes := range rows {
			t.Run(name, func(t *testing.T) {
				for i := range p.conns {
					u := p.opens(i, tMultistream, tMigration, bytes)
					u.wantsReset(network.StreamProtocolViolation)
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
		next.sends(finalSizeBytes(uint64(1 + 4*2*len(rows))))
		next.wants(finalSizeBytes(uint64(1 + 4*2*len(rows))))
		old.wantsEOF()
		p.settled(s, next)
		p.talk(s, next)
		require.NoError(t, s.Close())
		next.wantsEOF()
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
		p.opens(1, tMultistream, tMigration, migrateBytes(u2.label, u1.label)).wantsReset(network.StreamProtocolViolation)
		p.talk(s1, u1)
		p.talk(s2, u2)
		require.ElementsMatch(t, []uint64{u1.label, u2.label}, p.labelled())
	}
}

// TestNegotiationThatFails: what is no violation of the protocol, but no stream either.
func TestNegotiationThatFails(t *testing.T) {
	p := meet(t, verified)
	s, old := p.hostAccepts()
	for name, bytes := range map[string]string{
		"message that is cut off":     tMultistream + tMigration + "\x05\x0a\x03",
		"length that is cut off":      tMultistream + tMigration + "\x85",
		"no message":                  tMultistream + tMigration,
		"no protocol":                 tMultistream + tMigration + labelBytes(p.fresh()),
		"no multistream behind label": tMultistream + tMigration + labelBytes(p.fresh()) + tEcho,
		"protocol that is cut off":    tMultistream + tMigration + labelBytes(p.fresh()) + tMultistream + tEcho[:7],
		"empty":                       "",
		"not multistream":             "GET / HTTP/1.1\r\nHost: example.org\r\n\r\n",
		"header that is cut off":      tMultistream[:7],
		"ID that is cut off":          tMultistream + tMigration[:7],
	} {
		t.Run(name, func(t *testing.T) {
			u := p.opens(1, bytes)
			if err := u.CloseWrite(); name != "no multistream behind label" {
				require.NoError(t, err)
			} // of which the host has seen enough: its reset may come first
			u.wantsReset(network.StreamProtocolNegotiationFailed)
			p.untouched(s, old)
		})
	}
}

// TestLargestMessage: 1024 bytes are not too many (W4).
func TestLargestMessage(t *testing.T) {
	p := meet(t, verified)
	label := p.fresh()
	message := padded(label, 1024)
	require.Len(t, message, 1024+2)
	u := p.opens(0, tMultistream, tMigration, message, tMultistream, tEcho, "hello")
	u.wants(tMultistream, tMigration, tMultistream, tEcho)
	s := p.accepted()
	p.reads(s, "hello")
	p.talk(s, u)

	p.opens(0, tMultistream, tMigration, padded(p.fresh(), 1025), tMultistream, tEcho).
		wantsReset(network.StreamProtocolViolation)
}

// TestLastMemberCounts, as protobuf has it: of two members, the last one stands.
func TestLastMemberCounts(t *testing.T) {
	p := meet(t, verified)
	label := p.fresh()
	m := "\x1a\x00" + "\x0a" + lengthy("\x08"+uvarint(label))
	u := p.opens(0, tMultistream, tMigration, lengthy(m), tMultistream, tEcho)
	u.wants(tMultistream, tMigration, tMultistream, tEcho)
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
			"label":      labelBytes(p.fresh()),
			"migrate":    migrateBytes(p.fresh(), old.label),
			"final size": finalSizeBytes(1),
		}
		for name, bytes := range malformed {
			rows[name] = bytes
		}
		for name, bytes := range rows {
			t.Run(name, func(t *testing.T) {
				moved, next := p.asked(s)
				next.acks(bytes)
				next.wantsReset(network.StreamProtocolViolation)
				moved.is(ErrTryLater)
				p.untouched(s, old)
			})
		}
		t.Run("cut off", func(t *testing.T) {
			moved, next := p.asked(s)
			next.acks(ackVerified[:2])
			next.closesWrite()
			next.wantsReset(network.StreamNoError)
			moved.is(ErrTryLater)
			p.untouched(s, old)
		})
		t.Run("not multistream", func(t *testing.T) {
			moved, next := p.asked(s)
			next.sends("GET / HTTP/1.1\r\n\r\n")
			next.wantsReset(network.StreamNoError)
			moved.is(ErrTryLater)
			p.untouched(s, old)
		})
	})
}
