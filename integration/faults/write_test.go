package faults

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
	"github.com/go-portage/portage/migrate"
)

// Writes that are interrupted: by a migration, by CloseWrite, by a deadline. The count
// that Write returns is exact on every transport, and the rest takes the next path.

// blockedWriter writes as much as the path and the reader take.
type blockedWriter struct {
	stillness
	result chan error // of Write or CloseWrite
}

// writes begins to write to s, in pieces, and returns when the Write blocks.
func writes(t *testing.T, s network.Stream, data []byte) *blockedWriter {
	t.Helper()
	w := &blockedWriter{result: make(chan error, 1)}
	go func() {
		const piece = 64 << 10
		for at := 0; at < len(data); at += piece {
			n, err := s.Write(data[at:min(at+piece, len(data))])
			w.add(n)
			if err != nil {
				w.result <- err
				return
			}
		}
		w.result <- s.CloseWrite()
	}()
	WaitFor(t, "the Write to block", w.still)
	require.Less(t, w.count(), len(data))
	return w
}

// TestBlockedWriteMoves: a Write that waits on the old connection, for a reader or since
// the path has frozen, is called out and goes on over the new one, at the exact byte, as
// do those that follow. It does not wait for the old path. What that has swallowed
// arrives when it thaws, and before all that went over the new one (S2, S4).
func TestBlockedWriteMoves(t *testing.T) {
	defer summary(t)()
	const size = 6 << 20 // more than any window is at first
	for _, frozen := range []bool{false, true} {
		eachMove(t, frozenWays, func(t *testing.T, l *link, initiator int) {
			ends := l.open(t, oldConn)
			writer, reader := ends[acceptor], ends[opener]
			sent := text(1, size)
			if frozen {
				l.paths[oldConn].Freeze()
				done.faults.Add(1)
			}
			w := writes(t, writer, sent)
			before := w.count()
			moved := l.moving(initiator, ends[initiator], newConn)
			WaitFor(t, "the Write to go on over the new connection", func() bool { return w.count() > before })
			for side := range l.conns {
				require.False(t, l.conns[side][oldConn].IsClosed())
			}
			l.paths[oldConn].Thaw()
			got, err := io.ReadAll(reader)
			require.NoError(t, err)
			require.True(t, bytes.Equal(got, sent), "other bytes arrived than were written, %d of %d", len(got), len(sent))
			done.bytes.Add(int64(len(got)))
			done.streams.Add(1)
			require.NoError(t, await(t, w.result, "the Writes to end"))
			require.NoError(t, await(t, moved, "Migrate to return"))
			for _, s := range ends {
				require.NoError(t, s.Close())
			}
			l.nothingLeft(t)
		})
	}
}

// TestCloseWriteWhileWriteIsBlocked: on some transports the Write stays blocked behind a
// CloseWrite, on others it returns. However that is, what Write has counted when the
// stream has moved is what arrives, and EOF behind it.
func TestCloseWriteWhileWriteIsBlocked(t *testing.T) {
	defer summary(t)()
	const size = 6 << 20
	eachMove(t, frozenWays, func(t *testing.T, l *link, initiator int) {
		ends := l.open(t, oldConn)
		sent := text(2, size)
		w := writes(t, ends[acceptor], sent)
		require.NoError(t, ends[acceptor].CloseWrite())
		moved := l.moving(initiator, ends[initiator], newConn)
		got, err := io.ReadAll(ends[opener])
		require.NoError(t, err)
		require.Error(t, await(t, w.result, "the Write to be called out"))
		require.Equal(t, w.count(), len(got), "as many bytes as Write says that it took")
		require.True(t, bytes.HasPrefix(sent, got))
		done.bytes.Add(int64(len(got)))
		done.streams.Add(1)
		require.NoError(t, await(t, moved, "Migrate to return"))
		for _, s := range ends {
			require.NoError(t, s.Close())
		}
		l.nothingLeft(t)
	})
}

// TestFirstWriteInterrupted: the connection has hardly any room, and a deadline interrupts
// the first Write, which carries the opening. The count is exact; and with room the stream
// goes on as if nothing had been, there or on another connection. Where the connection has
// no room at all, no first Write gets through before its deadline.
func TestFirstWriteInterrupted(t *testing.T) {
	defer summary(t)()
	t.Run("ways", func(t *testing.T) {
		for _, w := range []way{{QUIC, TCP}, {WebTransport, TCP}} {
			t.Run(w.String(), func(t *testing.T) {
				t.Parallel()
				l := newLink(t, w.from, w.to)
				done.pair(w)
				l.join(t)
				room := firstWriteInterrupted(t, l, -1, true) // how much a new connection takes
				for n, left := range []int{0, 50, 100, 1000, 5000, 50_000} {
					l.part(t)
					l.forget()
					l.join(t)
					firstWriteInterrupted(t, l, room-left, n%2 == 0)
				}
			})
		}
		// The streams of yamux share nothing but the path, so it is that which has no room.
		for _, w := range []way{{TCP, QUIC}, {WebSocket, QUIC}, {Relay, QUIC}} {
			for _, move := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s, moved %v", w, move), func(t *testing.T) {
					inTime(t)
					l := joined(t, w.from, w.to)
					done.pair(w)
					fillers := l.fillers(t, oldConn)
					// The path has to carry it, too. From now on go-libp2p allows 10 s until the
					// opening has come.
					s := l.newStream(t, oldConn)
					l.congest(t, oldConn, fillers)
					sent, n := interrupt(t, s, 1<<20, true) // more than a window of yamux
					t.Logf("it took %d", n)
					l.goesOn(t, s, sent, n, move, l.paths[oldConn].Thaw)
					l.giveUp(oldConn)
					l.nothingLeft(t)
				})
			}
		}
	})
}

// filling is what fills a connection.
type filling struct {
	ends    [][2]network.Stream
	written int
}

// fill writes n bytes to connection oldConn that nobody reads, or as much as it takes.
func (l *link) fill(t *testing.T, n int) (f filling) {
	t.Helper()
	for range 2 { // one alone has too small a window
		ends := l.raw(t, oldConn)
		f.ends = append(f.ends, ends)
		// A machine that stalls lets a deadline pass although there is room: it is full
		// when that has been so more than once.
		for refused := 0; refused < 3 && (n < 0 || f.written < n); {
			size := 1 << 10
			if n >= 0 {
				size = min(size, n-f.written)
			}
			_ = ends[0].SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
			m, err := ends[0].Write(make([]byte, size))
			f.written += m
			switch {
			case m > 0:
				refused = 0
			case err != nil:
				refused++
			}
		}
	}
	return f
}

func (f filling) empty() {
	for _, ends := range f.ends {
		go io.Copy(io.Discard, ends[1])
	}
}

// firstWriteInterrupted fills the connection with that many bytes, or until it is full. It
// returns how many they were.
func firstWriteInterrupted(t *testing.T, l *link, fill int, move bool) int {
	t.Helper()
	filling := l.fill(t, fill)
	s := l.newStream(t, oldConn)
	sent, n := interrupt(t, s, 100_000, fill < 0)
	t.Logf("after %d bytes by others it took %d", filling.written, n)
	l.goesOn(t, s, sent, n, move, filling.empty)
	for _, ends := range filling.ends {
		_, _ = ends[0].Reset(), ends[1].Reset()
	}
	l.nothingLeft(t)
	return filling.written
}

// interrupt has a deadline interrupt the first Write to s, of that size, and returns what
// was to be written and how much of it Write took. Only with full it is certain that there
// is no room for all of it.
func interrupt(t *testing.T, s *migrate.Stream, size int, full bool) (sent []byte, n int) {
	t.Helper()
	sent = text(3, size)
	require.NoError(t, s.SetWriteDeadline(time.Now().Add(100*time.Millisecond)))
	n, err := s.Write(sent)
	done.faults.Add(1)
	if full {
		require.Error(t, err, "the connection has no room, and Write took %d bytes", n)
	}
	if err != nil { // else the window has grown meanwhile
		require.Less(t, n, len(sent))
		var timeout interface{ Timeout() bool }
		require.ErrorAs(t, err, &timeout)
		require.True(t, timeout.Timeout())
	}
	require.NoError(t, s.SetWriteDeadline(time.Time{}))
	return sent, n
}

// goesOn writes the rest of what was to be sent when there is room, and ends the stream.
func (l *link) goesOn(t *testing.T, s *migrate.Stream, sent []byte, n int, move bool, room func()) {
	t.Helper()
	moved := make(<-chan error)
	if move {
		moved = l.moving(opener, s, newConn) // waits until the opening can leave
	}
	room()
	written := make(chan error, 1)
	go func() {
		m, err := s.Write(sent[n:])
		if err == nil && n+m != len(sent) {
			err = fmt.Errorf("Write took %d and %d of %d bytes", n, m, len(sent))
		}
		written <- errors.Join(err, s.CloseWrite())
	}()
	var far *migrate.Stream
	var got []byte
	arrived := make(chan error, 1)
	go func() {
		var err error
		far = <-l.accepted
		got, err = io.ReadAll(far)
		arrived <- err
	}()
	require.NoError(t, await(t, written, "the Write to end"))
	require.NoError(t, await(t, arrived, "the stream and its bytes"))
	require.True(t, bytes.Equal(sent, got), "%d bytes were written, %d others came", len(sent), len(got))
	done.bytes.Add(int64(len(got)))
	done.streams.Add(1)
	if move {
		require.NoError(t, await(t, moved, "Migrate to return"))
	}
	_, err := far.Write([]byte("answer"))
	require.NoError(t, err)
	require.NoError(t, far.CloseWrite())
	got, err = io.ReadAll(s)
	require.NoError(t, err)
	require.Equal(t, "answer", string(got))
	for _, s := range []*migrate.Stream{s, far} {
		require.NoError(t, s.Close())
	}
}

// TestConcurrentWritesOnYamux: two Writes at once on one stream of yamux can overrun its
// window, upon which the other end closes the connection. Those on a logical stream take
// turns, and no record is torn, also where the stream moves meanwhile.
func TestConcurrentWritesOnYamux(t *testing.T) {
	defer summary(t)()
	const writers, records, size = 8, 300, 3000
	eachMove(t, []way{{TCP, Relay}, {Relay, TCP}, {TCP, WebSocket}}, func(t *testing.T, l *link, initiator int) {
		ends := l.open(t, oldConn)
		var writing sync.WaitGroup
		for w := range writers {
			writing.Go(func() {
				record := bytes.Repeat([]byte{byte(w)}, size)
				for range records {
					if n, err := ends[0].Write(record); n != size || err != nil {
						t.Errorf("Write: %d, %v", n, err)
						return
					}
				}
			})
		}
		go func() {
			writing.Wait()
			_ = ends[0].CloseWrite()
		}()
		var counts [writers]int
		record := make([]byte, size)
		for n := range writers * records {
			if n%300 == 100 {
				to := newConn - n/300%2
				require.NoError(t, l.hosts[initiator].Migrate(t.Context(), ends[initiator], l.conns[initiator][to]))
			}
			_, err := io.ReadFull(ends[1], record)
			require.NoError(t, err)
			require.Equal(t, bytes.Repeat(record[:1], size), record, "a record was torn")
			counts[record[0]]++
			done.bytes.Add(size)
		}
		for w, n := range counts {
			require.Equal(t, records, n, "of writer %d", w)
		}
		_, err := ends[1].Read(record)
		require.Equal(t, io.EOF, err)
		done.streams.Add(1)
		for side := range l.conns {
			for i, c := range l.conns[side] {
				require.False(t, c.IsClosed(), "the %s connection", connName(i))
			}
			require.NoError(t, ends[side].Close())
		}
		l.nothingLeft(t)
	})
}

// TestResetReachesTheOtherEnd: on every transport, with the code on all but WebTransport,
// after the stream has come there.
func TestResetReachesTheOtherEnd(t *testing.T) {
	defer summary(t)()
	const code network.StreamErrorCode = 0x77
	eachMove(t, someWays, func(t *testing.T, l *link, initiator int) {
		for resetter := range 2 {
			ends := l.open(t, oldConn)
			require.NoError(t, l.hosts[initiator].Migrate(t.Context(), ends[initiator], l.conns[initiator][newConn]))
			require.NoError(t, ends[resetter].ResetWithError(code))
			_, err := ends[1-resetter].Read(make([]byte, 1))
			var se *network.StreamError
			require.ErrorAs(t, err, &se)
			require.True(t, se.Remote)
			if l.over[newConn] != WebTransport {
				require.Equal(t, code, se.ErrorCode)
			}
			WaitFor(t, "Writes to fail", func() bool { _, err = ends[1-resetter].Write([]byte{1}); return err != nil })
			done.streams.Add(1)
			_ = ends[1-resetter].Reset()
		}
		l.nothingLeft(t)
	})
}

// TestResetBeforeTheRequestHasLeft: the new connection has no room, not even for a
// stream's header. Streams that wait there to move are reset by their applications, which
// on WebTransport can end the whole connection; or the connection is closed. The others
// stay where they are, and lose nothing (S7, S9).
func TestResetBeforeTheRequestHasLeft(t *testing.T) {
	defer summary(t)()
	eachMove(t, []way{{TCP, WebTransport}, {TCP, QUIC}, {TCP, WebRTC}, {WebTransport, WebTransport}}, func(t *testing.T, l *link, initiator int) {
		l.opensOn.Store(newConn)
		var fillers []network.Stream
		for range 4 {
			ends := l.raw(t, newConn)
			fillers = append(fillers, ends[0], ends[1])
		}
		var full [2]stillness
		for n, s := range fillers {
			go func() {
				for {
					m, err := s.Write(make([]byte, 16<<10))
					full[n%2].add(m)
					if err != nil {
						return
					}
				}
			}()
		}
		for side := range full {
			WaitFor(t, fmt.Sprintf("the %s's side to be full", endName(side)), full[side].still)
		}
		var talks []*talk
		var moves []<-chan error
		for n := range 4 {
			talk := newTalk("a stream that stays", l.open(t, oldConn), uint64(n), [2]int{1 << 16, 1 << 16})
			talks = append(talks, talk)
			talk.start()
			talk.allow(1000)
			moves = append(moves, l.moving(initiator, talk.ends[initiator], newConn))
		}
		for n, talk := range talks {
			WaitFor(t, "some of the talk: "+talk.name, talk.caughtUp)
			if n%2 == 0 { // one by the end that asks, one by the other
				require.NoError(t, talk.ends[n/2].Reset())
			}
		}
		done.faults.Add(1)
		// An end that waits for the answer to its request keeps back how the old stream
		// ended, a reset too, until it is clear what becomes of the request.
		l.giveUp(newConn)
		for n, talk := range talks {
			err := await(t, moves[n], "Migrate to return")
			acked, _ := l.has(point{talk.ends[1-initiator], false, migrate.Acked})
			talk.allowAll()
			talk.end(t)
			switch {
			case n%2 == 0:
				require.False(t, talk.survived())
			case errors.Is(err, migrate.ErrTryLater) && !acked: // else that is lost, and S10 holds at the other end
				require.True(t, talk.survived(), "%v", talk)
			}
		}
		for _, s := range fillers {
			_ = s.Reset()
		}
		l.nothingLeft(t)
	})
}
