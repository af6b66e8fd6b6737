package migrate

import (
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
	. "github.com/go-portage/portage/internal/rawpeer"
)

// What a peer can make a host keep has a bound (M4).

// TestAnswersDoNotPileUp: a peer that proposes one unknown protocol after the other, and
// never pauses, is answered meanwhile.
func TestAnswersDoNotPileUp(t *testing.T) {
	const proposals = 20_000
	h := bareHost("a", func(protocol.ID) bool { return true })
	u := &scripted{
		fakeStream: newFake(), end: io.EOF,
		in: Prelude + LabelBytes(603) + MultistreamToken + strings.Repeat("\x02x\n", proposals),
	}
	u.conn.remote = "b"
	h.handleStream(u)
	require.True(t, strings.HasPrefix(u.taken(), Prelude+MultistreamToken+NAToken), "%.100q", u.taken())
	require.GreaterOrEqual(t, strings.Count(u.taken(), NAToken), proposals-negotiationBuffer/len(NAToken))
	require.LessOrEqual(t, slices.Max(u.writes), negotiationBuffer, "that much was kept for one answer")
}

// TestDripsAreKeptTogether: what a peer sends byte by byte takes no more memory than what
// it sends at once.
func TestDripsAreKeptTogether(t *testing.T) {
	kept := func(c chunks) (n int) {
		for _, b := range c.list {
			n += cap(b)
		}
		return n
	}
	const drips = 3000
	for _, piece := range []int{1, 7, readChunk/2 + 1} {
		var c chunks
		var want []byte
		for i := range drips * 7 / (piece + 6) {
			b := make([]byte, readChunk)
			b[0] = byte(i)
			c.add(b[:piece])
			want = append(want, b[:piece]...)
			require.LessOrEqual(t, kept(c), c.len+readChunk)
			if i%100 == 0 { // one that did not fill its buffer, either
				b = make([]byte, 1<<10)
				c.append(&chunks{list: [][]byte{b[:3]}, len: 3})
				want = append(want, 0, 0, 0)
			}
		}
		got := make([]byte, len(want)+1)
		require.Equal(t, len(want), c.take(got))
		require.True(t, string(got[:len(want)]) == string(want))
	}
	t.Run("old stream", func(t *testing.T) {
		virtual(t, func(t *testing.T) {
			r := newReceiver(t)
			r.hands(drips+1, time.Minute)
			for range drips {
				r.old.feeds("x", nil)
			}
			synctest.Wait()
			ready, _ := r.waiting()
			require.Equal(t, drips, ready)
			require.LessOrEqual(t, kept(r.cur.got), drips+readChunk)
			require.Equal(t, drips+1, r.scope.reserved())
		})
	})
	t.Run("new stream", func(t *testing.T) {
		virtual(t, func(t *testing.T) {
			r := newReceiver(t)
			r.hands(1, time.Minute)
			time.Sleep(2 * stallNotice)
			for range drips {
				r.next.feeds("x", nil)
			}
			synctest.Wait()
			require.Equal(t, drips, r.waitsAhead())
			require.LessOrEqual(t, kept(r.moving.next.got), drips+readChunk)
		})
	})
}

// TestAnswerThatIsNotTaken: a peer that leaves no room for the answer to its Migrate holds
// the new stream for as long as a negotiation may take, and no longer. Its own stream is
// untouched where the ack has not left.
func TestAnswerThatIsNotTaken(t *testing.T) {
	const self, remote peer.ID = "a", "b"
	const living = 601
	for name, from := range map[string]uint64{"ack": living, "denial": 605} {
		t.Run(name, func(t *testing.T) {
			virtual(t, func(t *testing.T) {
				h := bareHost(self, func(protocol.ID) bool { return true })
				old, u := newFake(), newFake()
				old.conn.remote, u.conn.remote = remote, remote
				s := newStream(h, old, echoID, living)
				require.True(t, h.labels.add(remote, living, s))
				u.grants(len(MultistreamToken)+3, nil)
				u.feeds(Prelude+MigrateBytes(603, from), nil)
				began := time.Now()
				h.handleStream(u)
				require.LessOrEqual(t, time.Since(began), h.cfg.labelWait+h.cfg.negotiation+time.Second)
				require.NotNil(t, u.resetWith)
				require.Equal(t, uint64(living), s.Label())
				old.feeds("still here", nil)
				b := make([]byte, 20)
				n, err := s.Read(b)
				require.NoError(t, err)
				require.Equal(t, "still here", string(b[:n]))
				require.NoError(t, s.Reset())
			})
		})
	}
}

// TestUnpaidStreams: a peer with as many streams as it may have, all of which it begins to
// migrate and none of which it carries on, takes a bounded number of places among the
// streams that have not been negotiated, which all peers share. The rest is refused for
// now, and goes on where it is.
func TestUnpaidStreams(t *testing.T) {
	const streams = 3 * maxUnpaid
	p := meeting{kind: verified, hostOpts: libp2p.ResourceManager(limited(t, echoID, streams))}.meet(t)
	type both struct {
		s         *Stream
		old, next *RawStream
	}
	var all, acked, refused []both
	for range streams {
		s, old := p.hostAccepts()
		all = append(all, both{s: s, old: old})
	}
	const answer = Prelude + AckVerified
	for _, b := range all {
		b.next = p.Opens(1, Prelude, MigrateBytes(p.Fresh(), b.old.Label))
		got := make([]byte, len(answer))
		if _, err := io.ReadFull(b.next, got); err == nil {
			require.Equal(t, answer, string(got))
			acked = append(acked, b)
			continue
		}
		b.next.WantsReset(network.StreamResourceLimitExceeded)
		refused = append(refused, b)
	}
	require.Equal(t, maxUnpaid, len(acked), "how many migrations were acked")
	for _, b := range refused {
		p.talk(b.s, b.old)
	}
	// Once they are carried on there is room again.
	carriesOn := func(b both, sent uint64) {
		b.next.Sends(FinalSizeBytes(sent))
		b.next.Wants(FinalSizeBytes(sent))
		b.old.WantsEOF()
		p.talk(b.s, b.next)
	}
	for _, b := range acked {
		carriesOn(b, 1)
	}
	for _, b := range refused {
		WaitFor(t, "room for a migration", func() bool {
			b.next = p.Opens(1, Prelude, MigrateBytes(p.Fresh(), b.old.Label))
			got := make([]byte, len(answer))
			_, err := io.ReadFull(b.next, got)
			return err == nil && string(got) == answer
		})
		carriesOn(b, 1+4)
	}
	for _, b := range all {
		require.NoError(t, b.s.Reset())
	}
	p.nothingLeft()
}

// TestScopeThatIsGone: where the new stream is gone, there is no memory to wait for.
func TestScopeThatIsGone(t *testing.T) {
	virtual(t, func(t *testing.T) {
		r := newReceiver(t)
		r.scope.closed = true
		r.hands(5, time.Minute)
		require.ErrorIs(t, <-r.awaited, network.ErrReset)
	})
}
