package migrate

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/rawpeer"
)

// What a host has of the resumable streams of a peer, and when it looks for another connection.

// acceptsAnother has the host accept a second resumable stream, on old.
func acceptsAnother(s *Stream, old *fakeStream, label uint64) *Stream {
	accepted := make(chan network.Stream, 1)
	s.host.SetStreamHandler(echoID, func(s network.Stream) { accepted <- s })
	old.conn.remote = s.peer
	if old.conn.open == nil {
		old.conn.open = func(context.Context) (network.Stream, error) { return nil, errNoRoom }
	}
	old.feeds(Prelude+resumableLabelBytes(label)+MultistreamToken+EchoToken, nil)
	s.host.handleStream(old)
	other := (<-accepted).(*Stream)
	other.dir = network.DirInbound
	return other
}

// The peer is told at once of 1 MiB, or of less where the windows are small, long before they are full.
func TestHowMuchIsToldAtOnce(t *testing.T) {
	for window, want := range map[int]uint64{64 << 10: 16 << 10, 2 << 20: 512 << 10, 16 << 20: 1 << 20, 64 << 20: 1 << 20} {
		virtual(t, func(t *testing.T) {
			s, _ := resumableOn(t, newFake())
			rs := newResumer(s.host)
			s.host.cfg.resumes.window = window
			require.True(t, rs.add(&Stream{peer: "other", label: 1}))
			require.Equal(t, want, rs.peers["other"].every)
		})
	}
}

// Nothing is kept of a peer without streams, and what has to do with its last ones changes nothing for
// the next.
func TestPeerOfWhichNothingIsLeft(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, before := resumableOn(t, newFake())
		rs := s.host.resumer
		require.NoError(t, s.Reset())
		require.Empty(t, rs.peers)
		next := acceptsAnother(s, newFake(), 602)
		require.NotNil(t, rs.get(s.peer, 602))
		before.of.dropUnused()
		require.NotSame(t, before.of, next.send.resumption.of)
		require.Same(t, next.send.resumption, rs.get(s.peer, 602))
		require.NoError(t, next.Reset())
		require.Empty(t, rs.peers)
	})
}

// As long as a stream of that origin is known there is no other one.
func TestOriginIsTakenByATombstone(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := resumableOn(t, newFake())
		_, err := s.Write([]byte("abc"))
		require.NoError(t, err)
		require.NoError(t, s.Close())
		require.True(t, r.lives())
		again := newFake()
		again.conn.remote = s.peer
		again.feeds(Prelude+resumableLabelBytes(r.origin)+MultistreamToken+EchoToken, nil)
		s.host.handleStream(again)
		require.NotNil(t, again.resetCode())
		require.Same(t, r, s.host.resumer.get(s.peer, r.origin))
	})
}

// There are as many tombstones as the configuration says, and then the oldest goes.
func TestTombstonesBesideEachOther(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := resumableOn(t, newFake())
		s.host.cfg.resumes.tombstones = 2
		all := []*resumption{r}
		for label := r.origin + 2; len(all) < 3; label += 2 {
			all = append(all, acceptsAnother(s, newFake(), label).send.resumption)
		}
		for i, r := range all {
			_, err := r.s.Write([]byte("abc"))
			require.NoError(t, err)
			require.NoError(t, r.s.Close())
			synctest.Wait()
			for j, r := range all[:i+1] {
				require.Equal(t, i-j < 2, r.lives(), "tombstone %d of %d", j, i+1)
			}
		}
	})
}

// When the host is closed streams that are lost end, and tombstones. The others end with their
// connections.
func TestHostIsClosedWithResumableStreams(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, attached := resumableOn(t, newFake())
		lost := acceptsAnother(s, newFake(), 602).send.resumption
		closed := acceptsAnother(s, newFake(), 604).send.resumption
		lost.loses()
		_, err := closed.s.Write([]byte("abc"))
		require.NoError(t, err)
		require.NoError(t, closed.s.Close())
		read := make(chan error, 1)
		go func() {
			_, err := lost.s.Read(make([]byte, 1))
			read <- err
		}()
		synctest.Wait()
		require.Empty(t, read)
		require.True(t, closed.lives())
		s.host.resumer.close()
		synctest.Wait()
		require.Len(t, read, 1)
		require.ErrorIs(t, <-read, network.ErrReset)
		require.False(t, lost.lives())
		require.False(t, closed.lives())
		require.True(t, attached.lives())
		_, err = s.Write([]byte("x"))
		require.NoError(t, err)
	})
}

// A connection that comes up is used at once, and no other peer's matters; that of one without streams
// does not either.
func TestConnectionThatComesUp(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := resumableOn(t, newFake())
		rs := s.host.resumer
		s.host.cfg.redial = func(ctx context.Context, _ peer.AddrInfo) error {
			<-ctx.Done()
			return ctx.Err()
		}
		r.lose(nil, errors.New("test"))
		time.Sleep(acceptorWaits + time.Millisecond)
		synctest.Wait()
		a := attemptsOn(&fakeConn{remote: playerLow}, r)
		s.host.Host.(*bare).conns = []network.Conn{a.fakeConn}
		rs.connected(&fakeConn{remote: "another"})
		synctest.Wait()
		require.Empty(t, a.streams())
		rs.connected(a.fakeConn)
		synctest.Wait()
		require.Len(t, a.streams(), 1)
	})
}

// With a connection go its streams, and nobody has to read or write for that.
func TestConnectionThatGoes(t *testing.T) {
	virtual(t, func(t *testing.T) {
		old, other := newFake(), newFake()
		s, r := resumableOn(t, old)
		stays := acceptsAnother(s, other, 602).send.resumption
		old.conn.dies()
		s.host.resumer.disconnected(old.conn)
		require.False(t, r.attached())
		require.True(t, stays.attached())
	})
	for name, half := range map[string]func(s *Stream, u network.Stream){
		"writing": func(s *Stream, u network.Stream) { s.send.cur = u },
		"reading": func(s *Stream, u network.Stream) { s.recv.cur.stream = u },
	} {
		for gone, goes := range map[string]func(h *Host, c network.Conn){"gone": func(h *Host, c network.Conn) { h.resumer.disconnected(c) }, "left": (*Host).Leave} {
			bubble(t, name+" elsewhere, "+gone, func(t *testing.T) {
				old := newFake()
				s, r := resumableOn(t, old)
				half(s, newFake())
				old.conn.dies()
				goes(s.host, old.conn)
				require.False(t, r.attached(), "the other half is on it")
			})
		}
	}
}

// TestLeaveOfOneConnection: what is on another one stays, and the one that was left gets no attempt before the
// peer was dialled.
func TestLeaveOfOneConnection(t *testing.T) {
	virtual(t, func(t *testing.T) {
		old, other := newFake(), newFake()
		s, r := resumableOn(t, old)
		dialled := make(chan error)
		s.host.cfg.redial = func(ctx context.Context, _ peer.AddrInfo) error {
			select {
			case err := <-dialled:
				return err
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		stays := acceptsAnother(s, other, 602).send.resumption
		a := attemptsOn(old.conn, r)
		s.host.Host.(*bare).conns = []network.Conn{old.conn}
		s.host.Leave(old.conn)
		require.False(t, r.attached())
		require.True(t, stays.attached())
		time.Sleep(acceptorWaits + time.Second)
		synctest.Wait()
		require.Empty(t, a.streams())
		dialled <- errors.New("nobody there")
		synctest.Wait()
		require.Len(t, a.streams(), 1)
		a.streams()[0].feeds(Prelude+ackReceivedBytes(0), nil)
		synctest.Wait()
		require.True(t, r.attached())
		time.Sleep(2 * longestPause)
		s.host.Leave(old.conn)
		time.Sleep(acceptorWaits + time.Second)
		synctest.Wait()
		require.Len(t, a.streams(), 1, "that it was dialled in vain was before")
	})
}

// The peer is dialled once as many attempts have failed as there are connections, and not before; what
// was learnt of the last loss is forgotten at the next.
func TestWhenThePeerIsDialled(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := resumableOn(t, newFake())
		dialled := make(chan time.Time, 1000)
		s.host.cfg.redial = func(context.Context, peer.AddrInfo) error {
			dialled <- time.Now()
			return errors.New("nobody there")
		}
		resumedBy(t, s, 0)
		require.Empty(t, dialled)
		time.Sleep(longestPause)
		synctest.Wait()

		a := attemptsOn(&fakeConn{remote: playerLow}, r, "")
		other := &fakeConn{remote: playerLow, open: a.open}
		s.host.Host.(*bare).conns = []network.Conn{a.fakeConn, other}
		r.lose(nil, errors.New("test"))
		u, _ := a.made(t, 2)
		require.Empty(t, dialled, "one has failed, of two")
		u.ends(network.ErrReset)
		u, _ = a.made(t, 3)
		require.NotEmpty(t, dialled)
		u.feeds(Prelude+ackReceivedBytes(0), nil)
		synctest.Wait()
		require.True(t, r.attached())
		n := len(dialled)
		time.Sleep(2 * longestPause)
		synctest.Wait()
		require.Len(t, dialled, n)

		for range 2 {
			for len(dialled) > 0 {
				<-dialled
			}
			s.host.Host.(*bare).conns = nil
			begun := time.Now()
			r.lose(nil, errors.New("test"))
			time.Sleep(20 * time.Second)
			synctest.Wait()
			require.Greater(t, len(dialled), 7)
			require.Equal(t, begun, <-dialled)
			pause := (<-dialled).Sub(begun)
			require.GreaterOrEqual(t, pause, firstPause/2)
			require.LessOrEqual(t, pause, firstPause)
			resumedBy(t, s, 0)
			time.Sleep(2 * longestPause)
			synctest.Wait()
		}
	})
}

// A stream that both ends have ended needs no connection any more.
func TestStreamThatIsThroughIsNotResumed(t *testing.T) {
	virtual(t, func(t *testing.T) {
		old := newFake()
		s, r := resumableOn(t, old)
		require.NoError(t, s.CloseWrite())
		r.confirmed(0 + 1)
		r.ends(0)
		old.feeds("", io.EOF)
		_, err := s.Read(make([]byte, 1))
		require.Equal(t, io.EOF, err)
		a := lostOn(s)
		require.False(t, r.attached())
		time.Sleep(20 * time.Second)
		synctest.Wait()
		require.Empty(t, a.streams())
		require.NoError(t, s.Close())
	})
}

// describedConn is a fake connection of which more is known.
type describedConn struct {
	*fakeConn
	limited bool
	opened  time.Time
	addr    string
}

func (c describedConn) Stat() network.ConnStats {
	return network.ConnStats{Stats: network.Stats{Limited: c.limited, Opened: c.opened}}
}

func (c describedConn) RemoteMultiaddr() ma.Multiaddr { return ma.StringCast(c.addr) }

// Attempts are made on the best connection first: without limits, then direct, then new. None is
// made on one that is closed.
func TestWhichConnectionIsTheBest(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := resumableOn(t, newFake())
		const direct = "/ip4/192.0.2.1/tcp/1"
		relay := direct + "/p2p/12D3KooWN2WRKPVkUBbQNAKncTA6kBPKec1hoZwcYAossphMobuS" + "/p2p-circuit"
		now := time.Now()
		conn := func(limited bool, addr string, age time.Duration) network.Conn {
			return describedConn{&fakeConn{}, limited, now.Add(-age), addr}
		}
		best := []network.Conn{
			conn(false, direct, 2), conn(false, direct, 3), conn(false, relay, 0), conn(false, relay, 1),
			conn(true, direct, 0), conn(true, direct, 9), conn(true, relay, 0), conn(true, relay, 5),
		}
		closed := conn(false, direct, 1)
		closed.(describedConn).dies()
		for range 20 {
			mixed := append(slices.Clone(best), closed)
			rand.Shuffle(len(mixed), func(i, j int) { mixed[i], mixed[j] = mixed[j], mixed[i] })
			s.host.Host.(*bare).conns = mixed
			require.Equal(t, best, r.of.usable())
		}
	})
}

// R6: connections that have brought nothing are left out as long as there are others, or a dial is to come.
func TestWhichConnectionsAreHopeful(t *testing.T) {
	a, b, c := newFake().conn, newFake().conn, newFake().conn
	all := []network.Conn{a, b, c}
	p := new(resumePeer)
	require.Equal(t, all, p.hopeful(all))
	p.isSilent(a)
	p.isSilent(b)
	require.Equal(t, all[2:], p.hopeful(all))
	p.dialled = true
	require.Equal(t, all[2:], p.hopeful(all))
	p.isSilent(c)
	require.Equal(t, all, p.hopeful(all))
	p.dialled = false
	require.Empty(t, p.hopeful(all))
	p.hears(b)
	require.Equal(t, all[1:2], p.hopeful(all))
}

// However long nothing works, attempts are made and the peer is dialled, as seldom as at the longest pause and
// no more often.
func TestPausesDoNotEnd(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := resumableOn(t, newFake())
		s.host.cfg.resumes.patience = 10 * time.Minute
		var dials []time.Duration
		begun := time.Now()
		s.host.cfg.redial = func(context.Context, peer.AddrInfo) error {
			dials = append(dials, time.Since(begun))
			return errors.New("nobody there")
		}
		a := lostOn(s, make([]string, 1000)...)
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		require.True(t, r.lives())
		_, at := a.all()
		for _, all := range [][]time.Duration{dials, at} {
			require.Greater(t, len(all), 100)
			for i := 6; i < len(all); i++ {
				require.GreaterOrEqual(t, all[i]-all[i-1], longestPause/2)
				require.LessOrEqual(t, all[i]-all[i-1], longestPause)
			}
		}
		require.NoError(t, s.Reset())
	})
}

// The peer is dialled once at a time, and for so long.
func TestOneDialAtATime(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := resumableOn(t, newFake())
		var dials atomic.Int32
		s.host.cfg.redial = func(ctx context.Context, _ peer.AddrInfo) error {
			dials.Add(1)
			<-ctx.Done()
			return ctx.Err()
		}
		r.lose(nil, errors.New("test"))
		time.Sleep(dialTimeout - time.Nanosecond)
		synctest.Wait()
		require.EqualValues(t, 1, dials.Load())
		time.Sleep(firstPause + time.Nanosecond)
		synctest.Wait()
		require.EqualValues(t, 2, dials.Load())
	})
}

// Once all streams are resumed nobody looks for connections any more.
func TestNobodyLooksWhereNothingIsLost(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, _ := resumableOn(t, newFake())
		resumedBy(t, s, 0)
		time.Sleep(2 * longestPause)
		looks := 0
		s.host.Host = asked{s.host.Host.(*bare), func() { looks++ }}
		time.Sleep(time.Minute)
		synctest.Wait()
		require.Zero(t, looks)
	})
}

// Attempts take turns on the connections; the one that the stream has left comes last.
func TestConnectionsTakeTurns(t *testing.T) {
	a, b, c := newFake().conn, newFake().conn, newFake().conn
	all := []network.Conn{a, b, c}
	for left, want := range map[*fakeConn][]network.Conn{a: {b, c, a}, b: {a, c, b}, c: {a, b, c}, newFake().conn: {a, b, c}} {
		for tries := range uint32(6) {
			require.Same(t, want[tries%3], choose(all, left, tries))
		}
	}
	require.Equal(t, []network.Conn{a, b, c}, all)
}

// A connection of which it is known that it leads to a process without resumption gets no attempt.
func TestConnectionsOfOtherProcesses(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := resumableOn(t, newFake())
		s.host.told.watched = []protocol.ID{FinalSizeID, ResumeID}
		a := lostOn(s)
		s.host.told.mu.Lock()
		s.host.told.conns = map[network.Conn]told{a.fakeConn: {known: 1 << 1}}
		s.host.told.mu.Unlock()
		require.Empty(t, r.of.usable())
		time.Sleep(acceptorWaits)
		synctest.Wait()
		require.Empty(t, a.streams())
		r.ask(a.fakeConn)
		require.Empty(t, a.streams(), "it has told meanwhile")
		s.host.told.mu.Lock()
		s.host.told.conns[a.fakeConn] = told{known: 1 << 1, speaks: 1 << 1}
		s.host.told.mu.Unlock()
		require.Len(t, r.of.usable(), 1)
		a.made(t, 1)
	})
}
