package migrate

import (
	"context"
	"errors"
	"io"
	"testing"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"
)

// The first thing that an application does with a stream that it has opened, and which the
// other end does not know yet (W1).

// TestReadDespiteWriteDeadline: a stream whose first Write runs into its deadline is still
// one to read from, and to migrate.
func TestReadDespiteWriteDeadline(t *testing.T) {
	eachPath(t, mainPaths, func(t *testing.T, j *journey) {
		for _, moves := range []bool{false, true} {
			j.hosts[acceptor].SetStreamHandler(testID, func(s network.Stream) {
				_, _ = s.Write([]byte("hello"))
				_ = s.Close()
			})
			s := j.openOn(t, testID, j.from())
			require.NoError(t, s.SetWriteDeadline(past))
			n, err := s.Write([]byte{1})
			require.Zero(t, n)
			require.True(t, isDeadline(err, s), "%v", err)
			if moves {
				err := j.migrate(context.Background(), opener, s, j.to())
				if !errors.Is(err, ErrDenied) && !errors.Is(err, ErrClosed) { // by the handler, that is at its end
					require.NoError(t, err)
				}
			}
			got, err := readAll(t, s)
			require.NoError(t, err)
			require.Equal(t, "hello", string(got))
			_ = s.Close()
		}
	})
}

// TestLargeFirstWriteMigrates: a first Write that no window holds is called out like any
// other, and goes on at the other side.
func TestLargeFirstWriteMigrates(t *testing.T) {
	const size = 8 << 20
	eachPath(t, usualPaths, func(t *testing.T, j *journey) {
		accepted := make(chan network.Stream, 1)
		j.hosts[acceptor].SetStreamHandler(testID, func(s network.Stream) { accepted <- s })
		s := j.openOn(t, testID, j.from())
		said := content(3, size)
		done := j.blocked(t, s, said)
		far := (<-accepted).(*Stream)
		both := [2]*Stream{s, far}
		read := make(chan []byte)
		require.NoError(t, j.move(t, opener, both), "a first Write that is blocked must not stop it")
		j.arrived(t, both, j.to(), 1)
		go func() {
			got := make([]byte, size)
			_, _ = io.ReadFull(far, got)
			read <- got
		}()
		w := result(t, done)
		require.NoError(t, w.err)
		require.Equal(t, said, <-read)
		j.converses(t, both, 1000)
	})
}
