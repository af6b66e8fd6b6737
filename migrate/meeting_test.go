package migrate

import (
	"context"
	"crypto/rand"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
	. "github.com/go-portage/portage/internal/rawpeer"
)

// Migrations that meet something: an unknown label, another migration, each other.

// withLabelWait and withBusyWait shorten what an application cannot.
func withLabelWait(d time.Duration) Option {
	return func(c *config) error { c.labelWait = d; return nil }
}

func withBusyWait(d time.Duration) Option {
	return func(c *config) error { c.busyWait = d; return nil }
}

// waiting waits until n Migrates wait for their labels.
func (p *rawPeer) waiting(n int) {
	p.t.Helper()
	WaitFor(p.t, "the host to wait for a label", func() bool {
		p.host.labels.mu.Lock()
		defer p.host.labels.mu.Unlock()
		pl := p.host.labels.peers[p.ID()]
		return pl != nil && pl.nWaiting == n
	})
}

// TestUnknownFrom is denied when its label has not come in time (L4, M3).
func TestUnknownFrom(t *testing.T) {
	for name, request := range map[string]func(id, from uint64) string{
		"verified": MigrateBytes, "draft-only": MigrateDraftBytes,
	} {
		t.Run(name, func(t *testing.T) {
			p := meet(t, verified, withLabelWait(20*time.Millisecond))
			start := time.Now()
			u := p.Opens(1, Prelude, request(p.Fresh(), p.Fresh()))
			u.Wants(Prelude, AckDenied)
			require.GreaterOrEqual(t, time.Since(start), 20*time.Millisecond, "denied before the label could come")
			u.WantsEOF()
			p.nothingLeft()
		})
	}
}

// TestMigrateOvertakesLabel: a request that arrives before the label that it refers to
// waits for it (L4).
func TestMigrateOvertakesLabel(t *testing.T) {
	p := meet(t, verified, withLabelWait(time.Hour))
	label, id := p.Fresh(), p.Fresh()
	next := p.Opens(1, Prelude, MigrateBytes(id, label))
	p.waiting(1)
	old := p.Opens(0, Prelude, LabelBytes(label), MultistreamToken, EchoToken, "hello")
	old.Wants(Prelude, MultistreamToken, EchoToken)
	next.Wants(Prelude, AckVerified)
	next.Sends(FinalSizeBytes(5), ", again")
	next.Wants(FinalSizeBytes(0))
	old.WantsEOF()
	s := p.accepted()
	p.reads(s, "hello, again")
	p.talk(s, next)
	require.NoError(t, s.Close())
	next.WantsEOF()
	p.nothingLeft()
}

// TestMigrateBeforeOpening: nothing can refer to a label that has not been sent (L4), so
// that Migrate sends the opening itself. The application's write deadline is none of its
// business.
func TestMigrateBeforeOpening(t *testing.T) {
	p := meet(t, verified)
	s, err := p.hostBegins(0, echoID)
	require.NoError(t, err)
	require.NoError(t, s.SetWriteDeadline(past))
	moved := p.hostMigrates(s)
	old, next := p.Arrives(), p.Arrives()
	if old.Conn() != p.Conns[0] {
		old, next = next, old
	}
	old.Wants(Prelude, LabelBytes(s.Label()), MultistreamToken, EchoToken)
	next.WantsMigrate(s.Label())
	next.Acks(AckVerified)
	next.Wants(FinalSizeBytes(0))
	old.WantsEOF()
	next.Sends(FinalSizeBytes(0))
	moved.is(nil)
	_, err = s.Write([]byte("too late"))
	require.Error(t, err, "the deadline holds on the new stream, too")
	require.NoError(t, s.SetWriteDeadline(time.Time{}))
	p.talk(s, next)
}

// TestTooManyUnknownFroms: a peer can have maxWaiting Migrates wait; one more is reset,
// and other streams go on (L4).
func TestTooManyUnknownFroms(t *testing.T) {
	unlimited := libp2p.ResourceManager(&network.NullResourceManager{})
	p := meeting{
		kind: verified, opts: []Option{withLabelWait(time.Hour)}, rawOpts: unlimited, hostOpts: unlimited,
	}.meet(t)
	s, old := p.hostOpens()
	for range maxWaiting {
		p.Opens(0, Prelude, MigrateBytes(p.Fresh(), p.Fresh()))
	}
	p.waiting(maxWaiting)
	p.Opens(0, Prelude, MigrateBytes(p.Fresh(), p.Fresh())).WantsReset(network.StreamRateLimited)
	p.talk(s, old)

	// A label that is known does not have to wait.
	next := p.migrates(old)
	next.Sends(FinalSizeBytes(1 + 4))
	next.Wants(FinalSizeBytes(1 + 4))
	p.talk(s, next)
}

// TestForeignFrom: a peer cannot migrate the stream of another, whatever its label, and
// two peers may give the same one (L3).
func TestForeignFrom(t *testing.T) {
	p := meet(t, verified, withLabelWait(20*time.Millisecond))
	// The other peer's labels are odd, too: its ID is the higher one.
	var key crypto.PrivKey
	for id := peer.ID(""); id < p.host.ID(); {
		var err error
		key, _, err = crypto.GenerateEd25519Key(rand.Reader)
		require.NoError(t, err)
		id, err = peer.IDFromPrivateKey(key)
		require.NoError(t, err)
	}
	foreigner := &rawPeer{
		RawPeer: NewRawPeer(t, New(t, []Transport{TCP, QUIC}, libp2p.Identity(key)), p.host.Host.(*Node), TCP, QUIC),
		t:       t, host: p.host, app: p.app,
	}
	foreigner.GoOnFrom(1<<34 + 1)
	s, old := foreigner.hostAccepts()

	denied := p.Opens(1, Prelude, MigrateBytes(p.Fresh(), old.Label))
	denied.Wants(Prelude, AckDenied)
	foreigner.talk(s, old)

	p.GoOnFrom(old.Label)
	s2, old2 := p.hostAccepts()
	require.Equal(t, old.Label, old2.Label)
	next := p.migrates(old2)
	next.Sends(FinalSizeBytes(1))
	next.Wants(FinalSizeBytes(1))
	old2.WantsEOF()
	p.talk(s2, next)
	foreigner.talk(s, old)
	require.Equal(t, old.Label, s.Label())
}

// TestMigrateBeforeTheLastHasEnded waits for that, and is reset when it takes too long
// (M2).
func TestMigrateBeforeTheLastHasEnded(t *testing.T) {
	// halfway is a migration of which the peer has yet to send 5 bytes on the old stream.
	halfway := func(t *testing.T, opts ...Option) (p *rawPeer, s *Stream, old, next *RawStream) {
		p = meet(t, verified, opts...)
		s, old = p.hostOpens()
		next = p.migrates(old)
		next.Sends(FinalSizeBytes(1 + 5))
		next.Wants(FinalSizeBytes(1))
		old.WantsEOF()
		return
	}
	again := func(p *rawPeer, next *RawStream) *RawStream {
		label := p.Fresh()
		u := p.Opens(0, Prelude, MigrateBytes(label, next.Label))
		u.Label = label
		return u
	}
	t.Run("in time", func(t *testing.T) {
		p, s, old, next := halfway(t, withBusyWait(time.Hour))
		third := again(p, next)
		p.writes(s, "still second")
		next.Wants("still second")
		old.Sends("first")
		next.Sends("second")
		third.Wants(Prelude, AckVerified)
		third.Sends(FinalSizeBytes(6), "third")
		third.Wants(FinalSizeBytes(12))
		next.WantsEOF()
		p.reads(s, "firstsecondthird")
		p.talk(s, third)
		WaitFor(t, "the second migration to end", func() bool { return s.Migrations() == 2 })
		p.hasLabel(third.Label)
		require.Equal(t, p.Ends[0], s.Conn())
	})
	t.Run("too late", func(t *testing.T) {
		p, s, old, next := halfway(t, withBusyWait(20*time.Millisecond))
		again(p, next).WantsReset(network.StreamNoError)
		old.Sends("first")
		p.reads(s, "first")
		p.settled(s, next)
		p.talk(s, next)
	})
	t.Run("not at all", func(t *testing.T) {
		p, s, old, next := halfway(t, withBusyWait(time.Hour))
		third := again(p, next)
		require.NoError(t, next.Reset())
		third.Wants(Prelude, AckDenied)
		old.WantsEOF()
		p.failed(s)
		p.nothingLeft()
	})
	t.Run("old label", func(t *testing.T) {
		// The label from before a migration that has ended means nothing any more.
		p, s, old, next := halfway(t, withLabelWait(20*time.Millisecond))
		old.Sends("first")
		p.reads(s, "first")
		p.settled(s, next)
		u := p.Opens(0, Prelude, MigrateBytes(p.Fresh(), old.Label))
		u.Wants(Prelude, AckDenied)
		p.talk(s, next)
	})
}

// TestOwnMigrationWaits: an application's Migrate during the peer's waits, too, and does
// nothing where the stream is there by then.
func TestOwnMigrationWaits(t *testing.T) {
	p := meet(t, verified)
	s, old := p.hostOpens()
	next := p.migrates(old)
	moved := p.hostMigrates(s)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	require.ErrorIs(t, p.host.Migrate(ctx, s, p.Ends[1]), context.Canceled)
	next.Sends(FinalSizeBytes(1))
	next.Wants(FinalSizeBytes(1))
	moved.is(nil)
	require.Equal(t, 1, s.Migrations())
	p.talk(s, next)
}

// TestBothMigrate: of two migrations of the same label at once, that of the lower peer
// ID stands (M1).
func TestBothMigrate(t *testing.T) {
	for _, kind := range []struct {
		name string
		peerKind
	}{{"verified", verified}, {"draft-only", draftOnly}} {
		request, ack := MigrateBytes, AckVerified
		if kind.name == "draft-only" {
			request, ack = MigrateDraftBytes, AckDraft
		}
		t.Run(kind.name+", host lower", func(t *testing.T) {
			p := meet(t, kind.peerKind)
			s, old := p.hostOpens()
			moved, next := p.asked(s)
			theirs := p.Opens(1, Prelude, request(p.Fresh(), old.Label))
			theirs.WantsReset(network.StreamNoError)
			p.talk(s, old)
			// The peer answers, having dropped its own.
			next.Acks(ack)
			if ack == AckVerified {
				next.Wants(FinalSizeBytes(1 + 4))
				next.Sends(FinalSizeBytes(1 + 4))
			}
			old.WantsEOF()
			old.ClosesWrite()
			moved.is(nil)
			p.settled(s, next)
			p.talk(s, next)
		})
		t.Run(kind.name+", host higher", func(t *testing.T) {
			p := meeting{kind: kind.peerKind, hostHigher: true}.meet(t)
			s, old := p.hostOpens()
			moved, next := p.asked(s)
			id := p.Fresh()
			theirs := p.Opens(1, Prelude, request(id, old.Label))
			next.WantsReset(network.StreamNoError)
			moved.is(ErrTryLater)
			theirs.Wants(Prelude, ack)
			theirs.Label = id
			if ack == AckVerified {
				theirs.Sends(FinalSizeBytes(1))
				theirs.Wants(FinalSizeBytes(1))
			}
			old.ClosesWrite()
			old.WantsEOF()
			p.settled(s, theirs)
			p.talk(s, theirs)
			require.NoError(t, s.Close())
			theirs.WantsEOF()
			p.nothingLeft()
		})
	}
	t.Run("host higher, and acked already", func(t *testing.T) {
		// The peer has answered ours, and then asks itself: for it, M2 holds.
		p := meeting{kind: verified, hostHigher: true, opts: []Option{withBusyWait(time.Hour)}}.meet(t)
		s, _ := p.hostOpens()
		moved, next := p.asked(s)
		next.Acks(AckVerified)
		next.Wants(FinalSizeBytes(1))
		theirs := p.Opens(0, Prelude, MigrateBytes(p.Fresh(), next.Label))
		next.Sends(FinalSizeBytes(1))
		moved.is(nil)
		theirs.Wants(Prelude, AckVerified)
		theirs.Sends(FinalSizeBytes(0))
		theirs.Wants(FinalSizeBytes(0))
		p.talk(s, theirs)
		// The application may read before the exchange has ended.
		WaitFor(t, "the second migration to end", func() bool { return s.Migrations() == 2 })
	})
}

// TestDenialLeavesOwnAttempt: both ends migrate at once, and the one whose attempt would
// give way denies the other's. Its own goes on (M1, M3): had it been reset, the other
// end might read its Migrate after the denial, ack it, and lose the stream to the reset
// (S8) although nothing had failed.
func TestDenialLeavesOwnAttempt(t *testing.T) {
	never := WithAcceptor(func(*Stream, network.Conn) bool { return false })
	for name, c := range map[string]struct {
		kind    peerKind
		opts    []Option
		request func(id, from uint64) string
	}{
		"verified":                    {verified, []Option{never}, MigrateBytes},
		"draft-only":                  {draftOnly, []Option{never}, MigrateDraftBytes},
		"draft-only, not listened to": {draftOnly, nil, MigrateDraftBytes},
	} {
		t.Run(name, func(t *testing.T) {
			p := meeting{kind: c.kind, hostHigher: true, opts: c.opts}.meet(t)
			s, old := p.hostOpens()
			if c.opts == nil {
				require.NoError(t, s.CloseRead()) // S3
			}
			moved, next := p.asked(s)
			theirs := p.Opens(1, Prelude, c.request(p.Fresh(), old.Label))
			theirs.Wants(Prelude, AckDenied)
			theirs.WantsEOF()
			// The peer reads the host's Migrate after the denial.
			if len(c.kind) == len(verified) {
				next.Acks(AckVerified)
				next.Wants(FinalSizeBytes(1))
				next.Sends(FinalSizeBytes(1))
			} else {
				next.Acks(AckDraft)
			}
			old.WantsEOF()
			old.ClosesWrite()
			moved.is(nil)
			p.settled(s, next)
			p.writes(s, "new")
			next.Wants("new")
		})
	}
}

// TestCloseAfterGivingWay: an application that closes the stream when its end has given
// way to the other's attempt (M1), and before that is answered, does not abort that (S7):
// what it wrote is still delivered, over the new connection.
func TestCloseAfterGivingWay(t *testing.T) {
	p := meeting{kind: verified, hostHigher: true, opts: []Option{WithTracer(func(e Event) {
		if e.Initiator && e.Kind == Failed {
			_ = e.Stream.Close()
		}
	})}}.meet(t)
	s, old := p.hostOpens()
	moved, next := p.asked(s)
	p.writes(s, "the last")
	theirs := p.Opens(1, Prelude, MigrateBytes(p.Fresh(), old.Label))
	next.WantsReset(network.StreamNoError)
	moved.is(ErrTryLater)
	theirs.Wants(Prelude, AckVerified)
	theirs.Sends(FinalSizeBytes(1))
	theirs.Wants(FinalSizeBytes(1 + 8))
	theirs.WantsEOF()
	old.Wants("the last")
	old.WantsEOF()
	p.nothingLeft()
}

// TestAckThatCrossesTheirs: M1. Our attempt has given way to the peer's, and its ack is
// there all the same, since the peer breaks the rule, or the reset came after the answer:
// nothing is carried to it.
func TestAckThatCrossesTheirs(t *testing.T) {
	h := bareHost("a", func(protocol.ID) bool { return true })
	defer h.cancel()
	old, next := newFake(), newFake()
	old.conn.remote, next.conn.remote = "b", "b"
	s := newStream(h, old, echoID, 7)
	ours, theirs := &exchange{initiator: true, id: 8}, &exchange{id: 9, from: 7, verified: true}
	busy, err := s.begin(ours)
	require.Nil(t, busy)
	require.NoError(t, err)
	require.True(t, ours.attach(next))
	w, err := s.beginNext(theirs, false)
	require.NoError(t, err)
	require.NotNil(t, next.resetWith)
	require.False(t, ours.commit(), "ours has given way")
	ours.end(stays)
	<-w.turn
	require.True(t, s.stopWaiting(w), "theirs begins")
	require.True(t, theirs.commit())
	theirs.end(stays)
}

// TestNoWayBackFromTheAck: an exchange of ours that has the ack does not give way any more (S10):
// what the peer asks for meanwhile waits for it to end.
func TestNoWayBackFromTheAck(t *testing.T) {
	h, old, next := verifyingHost(), newFake(), newFake()
	s := newStream(h, old, echoID, 602)
	ours := &exchange{initiator: true, id: 604}
	busy, err := s.begin(ours)
	require.NoError(t, err)
	require.Nil(t, busy)
	require.True(t, ours.attach(next))
	require.True(t, ours.commit())
	theirs := &exchange{from: ours.from, id: 605, verified: true}
	w, err := s.beginNext(theirs, false)
	require.NoError(t, err)
	require.NotNil(t, w)
	require.False(t, w.promised)
	require.Nil(t, next.resetWith)
	require.Equal(t, phaseCommitted, ours.phase)
	ours.end(moved)
	<-w.turn
	require.True(t, s.stopWaiting(w))
}
