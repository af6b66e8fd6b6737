package migrate

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"
)

// What the manager goes by when it says that a path works: bytes, who waits, and since when.

func TestTraffic(t *testing.T) {
	bubble(t, "bytes, and who waits", func(t *testing.T) {
		h, u := verifyingHost(), newFake()
		s := acceptedOn(t, h, u)
		fresh := h.Traffic(u.conn)
		require.Equal(t, Traffic{Of: fresh.Of}, fresh)
		require.NotZero(t, fresh.Of)
		require.Zero(t, h.Traffic(new(fakeConn)), "of another connection")

		u.feeds("abc", nil)
		_, err := s.Read(make([]byte, 3))
		require.NoError(t, err)
		_, err = s.Write([]byte("hello"))
		require.NoError(t, err)
		carried := Traffic{Received: 3, Sent: 5, Of: fresh.Of}
		require.Equal(t, carried, h.Traffic(u.conn))

		read := make(chan struct{})
		go func() {
			defer close(read)
			_, _ = s.Read(make([]byte, 1))
		}()
		synctest.Wait()
		waits := carried
		waits.Waits = true
		require.Equal(t, waits, h.Traffic(u.conn), "a Read")
		u.feeds("d", nil)
		<-read
		carried.Received = 4
		require.Equal(t, carried, h.Traffic(u.conn))

		u.grants(2, nil)
		w := writing(&s.send, "xyz")
		synctest.Wait()
		waits = carried
		waits.Waits = true
		require.Equal(t, waits, h.Traffic(u.conn), "a Write")
		u.grants(-1, nil)
		require.Equal(t, writeResult{3, nil}, <-w)
		carried.Sent = 8
		require.Equal(t, carried, h.Traffic(u.conn))
		require.NoError(t, s.Reset())
		require.Zero(t, h.Traffic(u.conn), "of a stream that is over")
	})
	bubble(t, "a Write that is blocked", func(t *testing.T) {
		h, u := verifyingHost(), newFake()
		s := acceptedOn(t, h, u)
		for round := range uint64(2) {
			u.grants(0, nil)
			w := writing(&s.send, "x")
			synctest.Wait()
			require.False(t, h.Traffic(u.conn).Blocked, "at the first look")
			time.Sleep(blockedFor - time.Millisecond)
			require.False(t, h.Traffic(u.conn).Blocked, "too soon to tell")
			time.Sleep(time.Millisecond)
			require.True(t, h.Traffic(u.conn).Blocked)
			require.Equal(t, round, h.Traffic(u.conn).Freed)
			u.grants(-1, nil)
			require.Equal(t, writeResult{1, nil}, <-w)
			for range 2 {
				now := h.Traffic(u.conn)
				require.False(t, now.Blocked, "it has gone on")
				require.Equal(t, round+1, now.Freed)
				require.Equal(t, round+1, now.Sent)
				time.Sleep(blockedFor)
			}
		}
		require.NoError(t, s.Reset())
	})
	bubble(t, "of all connections", func(t *testing.T) {
		h, u := verifyingHost(), newFake()
		s := acceptedOn(t, h, u)
		_, err := s.Write([]byte("hello"))
		require.NoError(t, err)
		gone := new(fakeConn)
		all := map[network.Conn]*Traffic{gone: {Sent: 9, Of: 9}}
		for range 2 { // what was there before does not count
			h.TrafficOfAll(all)
			require.Equal(t, map[network.Conn]*Traffic{u.conn: {Sent: 5, Of: h.Traffic(u.conn).Of}}, all)
		}
		require.NoError(t, s.Reset())
		h.TrafficOfAll(all)
		require.Empty(t, all)
	})
}
