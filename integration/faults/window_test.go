package faults

import (
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

// The streams of a QUIC or WebTransport connection share a window, those of a WebRTC
// connection a buffer. Data that nobody reads yet, since the rest of the old connection's
// must come first, take of that.

// stuckWays have each transport as the new one.
var stuckWays = []way{{TCP, QUIC}, {Relay, QUIC}, {TCP, WebTransport}, {TCP, WebRTC}, {QUIC, TCP}, {QUIC, WebSocket}, {QUIC, Relay}}

// TestStuckMigrationLeavesTheWinner: M4. Migrations cannot end, since the old path has
// frozen with data under way, and their writers flood the new connection. Other streams of
// that go on. When the old path thaws, what was read ahead was not lost; what would have
// held others up was given up, with an error.
func TestStuckMigrationLeavesTheWinner(t *testing.T) {
	defer summary(t)()
	t.Run("ways", func(t *testing.T) {
		for _, w := range stuckWays {
			type floods struct{ streams, each int }
			beyond := floods{4, 8 << 20} // what is read ahead, and the window
			if ownWindows(w.to) {
				beyond = floods{2, 5 << 20} // what is read ahead
			}
			for _, f := range []floods{{1, 3 << 20}, {4, 3 << 20}, beyond} {
				if f == beyond && w.to == WebRTC {
					continue // nothing frees the buffer of a WebRTC connection, not even a reset
				}
				if !*all && f.streams == 1 {
					continue
				}
				t.Run(fmt.Sprintf("%s, %d times %d MiB", w, f.streams, f.each>>20), func(t *testing.T) {
					inTime(t)
					stuckBeside(t, w, f.streams, f.each, f == beyond && !ownWindows(w.to))
				})
			}
		}
	})
}

// ownWindows says whether the streams of a connection have windows of their own.
func ownWindows(tr Transport) bool { return tr == TCP || tr == WebSocket || tr == Relay }

// stuckBeside freezes the old path for some seconds, on a busy machine for ten times that,
// which has to be less than QUIC's idle timeout, 30 s.
func stuckBeside(t *testing.T, w way, n, flood int, lost bool) {
	// No other bound than that of M4.
	l := joined(t, w.from, w.to, migrate.WithStallTimeout(time.Hour))
	done.pair(w)
	var streams [][2]*migrate.Stream
	for range n {
		streams = append(streams, l.open(t, oldConn))
	}
	l.paths[oldConn].Freeze()
	done.faults.Add(1)
	sent := append([]byte("swallowed"), text(1, flood)...)
	var floods sync.WaitGroup
	var moves []<-chan error
	var wrote [10]error
	for i, ends := range streams {
		_, err := ends[acceptor].Write(sent[:9])
		require.NoError(t, err)
		moves = append(moves, l.moving(opener, ends[opener], newConn))
		WaitFor(t, "the acceptor to write to the new connection", func() bool { return ends[acceptor].Conn() == l.conns[acceptor][newConn] })
		floods.Go(func() {
			if _, wrote[i] = ends[acceptor].Write(sent[9:]); wrote[i] == nil {
				wrote[i] = ends[acceptor].CloseWrite()
			}
		})
	}
	size := 4 << 20
	if ownWindows(w.to) {
		size = 1 << 20
	}
	other := newTalk("another stream of the new connection", l.open(t, newConn), 2, [2]int{size, size})
	other.start()
	other.allowAll()
	other.settle(t)
	require.True(t, other.survived(), "%v", other)
	other.end(t)
	if lost {
		WaitFor(t, "the floods to be given up", func() bool {
			for _, ends := range streams {
				if ok, _ := l.has(point{ends[opener], true, migrate.Failed}); !ok {
					return false
				}
			}
			return true
		})
	} else {
		for _, ends := range streams {
			require.Zero(t, ends[opener].Migrations(), "the other stream was to be over while this one is stuck")
		}
	}
	l.paths[oldConn].Thaw()
	for i, ends := range streams {
		got, err := io.ReadAll(ends[opener])
		moved := await(t, moves[i], "Migrate to return")
		if lost {
			require.ErrorIs(t, err, network.ErrReset)
			require.ErrorIs(t, moved, network.ErrReset)
			require.Empty(t, got)
		} else {
			require.NoError(t, err)
			require.NoError(t, moved)
			require.True(t, string(got) == string(sent), "other bytes arrived than were written")
		}
		done.bytes.Add(int64(len(got)))
		done.streams.Add(1)
	}
	floods.Wait()
	for i, ends := range streams {
		if lost {
			require.ErrorIs(t, wrote[i], network.ErrReset)
		} else {
			require.NoError(t, wrote[i])
		}
		for _, s := range ends {
			_ = s.Close()
		}
	}
	l.nothingLeft(t)
}
