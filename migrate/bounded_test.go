package migrate

import (
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/stretchr/testify/require"
)

// What a peer can make a host keep has a bound (M4).

// TestAnswersDoNotPileUp: a peer that proposes one unknown protocol after the other, and
// never pauses, is answered meanwhile.
func TestAnswersDoNotPileUp(t *testing.T) {
	const proposals = 20_000
	h := bareHost("a", func(protocol.ID) bool { return true })
	u := &scripted{
		fakeStream: newFake(), end: io.EOF,
		in: tMultistream + tMigration + labelBytes(603) + tMultistream + strings.Repeat("\x02x\n", proposals),
	}
	u.conn.remote = "b"
	h.handleStream(u)
	require.True(t, strings.HasPrefix(u.taken(), tMultistream+tMigration+tMultistream+tNA), "%.100q", u.taken())
	require.GreaterOrEqual(t, strings.Count(u.taken(), tNA), proposals-negotiationBuffer/len(tNA))
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
			require.Equal(t, drips, r.ready.len)
			require.LessOrEqual(t, kept(r.ready), drips+readChunk)
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
			require.Equal(t, drips, r.ahead.len)
			require.LessOrEqual(t, kept(r.ahead), drips+readChunk)
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
				u.grants(len(tMultistream)+3, nil)
				u.feeds(tMultistream+tMigration+migrateBytes(603, from), nil)
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
