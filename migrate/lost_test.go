package migrate

import (
	"context"
	"runtime"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
)

// known returns how many labels h has.
func (l *labels) known() (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, pl := range l.peers {
		n += len(pl.streams)
	}
	return n
}

// TestStreamsThatNobodyCloses: a handler that returns when its Read has failed, without
// closing its stream, leaves nothing behind when the connection is gone; nor does the
// opener, nor where a stream has moved before. The streams are garbage then.
func TestStreamsThatNobodyCloses(t *testing.T) {
	const rounds, streams = 5, 8
	p := newPair(t, TCP, QUIC)
	accepted := make(chan weak.Pointer[Stream], streams)
	p.hosts[1].SetStreamHandler(hangID, func(s network.Stream) {
		accepted <- weak.Make(s.(*Stream))
		for buf := make([]byte, 1); ; {
			if _, err := s.Read(buf); err != nil {
				return
			}
		}
	})
	var all []weak.Pointer[Stream]
	for range rounds {
		for i := range streams {
			s := p.openOn(t, hangID, 0)
			_, err := s.Write([]byte{1})
			require.NoError(t, err)
			all = append(all, weak.Make(s), <-accepted)
			if i%2 == 0 {
				require.NoError(t, p.migrate(context.Background(), opener, s, 1))
			}
			// The opener hears of the end of the connection, too.
			go func() { _, _ = s.Read(make([]byte, 1)) }()
		}
		require.NoError(t, p.conns[0][0].Close())
		require.NoError(t, p.conns[0][1].Close())
		for _, h := range p.hosts {
			WaitFor(t, "nothing to be kept", func() bool { return h.labels.known() == 0 })
		}
		c0, c1 := Join(t, p.nodes[0], p.nodes[1], TCP, QUIC)
		p.conns = [2][2]network.Conn{{c0, c1}, {Far(t, p.nodes[1], c0), Far(t, p.nodes[1], c1)}}
	}
	WaitFor(t, "the streams to be garbage", func() bool {
		runtime.GC()
		for _, s := range all {
			if s.Value() != nil {
				return false
			}
		}
		return true
	})
}

// TestStreamsThatNobodyUses: where nobody reads, writes or closes, the end of the connection is
// enough, though not at once.
func TestStreamsThatNobodyUses(t *testing.T) {
	p := newPair(t, TCP, QUIC)
	for _, h := range p.hosts {
		h.cfg.labelWait = time.Millisecond
	}
	p.open(t, hangID, 0)
	require.Equal(t, 1, p.hosts[0].labels.known())
	require.NoError(t, p.conns[0][0].Close())
	for _, h := range p.hosts {
		WaitFor(t, "nothing to be kept", func() bool { return h.labels.known() == 0 })
	}
}

// TestStreamThatThePeerResets: when the application was told that the stream has failed, its
// label is free, though the connection lives and nobody closes the stream.
func TestStreamThatThePeerResets(t *testing.T) {
	p := newPair(t, TCP, QUIC)
	for _, tell := range []func(*Stream) error{
		func(s *Stream) error { _, err := s.Read(make([]byte, 1)); return err },
		func(s *Stream) error {
			for {
				if _, err := s.Write(make([]byte, 1)); err != nil {
					_, err = s.Read(make([]byte, 1)) // a Write that fails says nothing of Reads
					return err
				}
			}
		},
	} {
		near, far := p.open(t, hangID, 0)
		require.NoError(t, near.Reset())
		require.ErrorIs(t, tell(far), network.ErrReset)
		require.Zero(t, p.hosts[1].labels.known())
		require.ErrorIs(t, p.migrate(context.Background(), acceptor, far, 1), ErrClosed)
	}
}

// orphaned returns n streams of h on a connection that is gone.
func orphaned(t *testing.T, h *Host, n int) (all []*Stream) {
	t.Helper()
	conn := &fakeConn{remote: playerLow}
	for range n {
		u := newFake()
		u.conn = conn
		s := newStream(h, u, echoID, h.labels.fresh(playerLow))
		require.NoError(t, h.enter(s))
		all = append(all, s)
	}
	conn.dies()
	h.disconnected(conn)
	return all
}

// TestOrphans: a stream whose connection is gone, and whose application has not heard of
// it, is kept as long as a Migrate may be late, and not longer. What waits in it may be read
// even then.
func TestOrphans(t *testing.T) {
	virtual(t, func(t *testing.T) {
		h := verifyingHost()
		h.cfg.labelWait = 5 * time.Second
		all := orphaned(t, h, 3)
		x := &exchange{id: 1 << 20}
		_, err := all[0].begin(x)
		require.NoError(t, err)
		time.Sleep(h.cfg.labelWait - time.Nanosecond)
		synctest.Wait()
		require.Equal(t, 3, h.labels.known())
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		require.Equal(t, 1, h.labels.known(), "one migrates")
		require.ErrorIs(t, errOf(all[1].begin(&exchange{id: 1 << 21})), ErrClosed)
		require.Zero(t, h.orphans.Load())

		x.end(stays)
		require.Equal(t, 1, h.labels.known(), "it may be tried again")
		time.Sleep(h.cfg.labelWait)
		synctest.Wait()
		require.Zero(t, h.labels.known())
		require.Zero(t, h.orphans.Load())
	})
}

func errOf(_ *exchange, err error) error { return err }

// TestOrphansAreFew: whatever peers do, a bounded number of such streams is kept; and after
// the host is closed none.
func TestOrphansAreFew(t *testing.T) {
	virtual(t, func(t *testing.T) {
		h := verifyingHost()
		h.cfg.labelWait = 5 * time.Second
		for range 1000 {
			orphaned(t, h, 100)
			require.LessOrEqual(t, h.labels.known(), maxOrphans)
		}
		require.NotZero(t, h.labels.known())
		time.Sleep(h.cfg.labelWait)
		synctest.Wait()
		require.Zero(t, h.labels.known())
		h.cancel()
		orphaned(t, h, 1)
		require.Zero(t, h.labels.known())
	})
}
