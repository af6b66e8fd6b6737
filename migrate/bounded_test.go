package migrate

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// What a peer can make a host keep has a bound (M4).

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
