package migrate

import (
	"context"
	"io"
	"testing"

	"github.com/libp2p/go-libp2p/core/network"
	msmux "github.com/multiformats/go-multistream"
	"github.com/stretchr/testify/require"
)

// TestEmptyBuffers: a Read or Write of nothing answers as that of a plain stream on the same
// connection does; the transports do not agree.
func TestEmptyBuffers(t *testing.T) {
	const plainID = "/test/plain/1.0.0"
	j := newJourney(t, tcpQUIC)
	accepted := make(chan network.Stream, 1)
	j.hosts[acceptor].SetStreamHandler(plainID, func(s network.Stream) { accepted <- s })
	plain := func(t *testing.T, i int) (s [2]network.Stream) {
		u, err := j.conns[opener][i].NewStream(context.Background())
		require.NoError(t, err)
		require.NoError(t, msmux.SelectProtoOrFail(plainID, u))
		return [2]network.Stream{u, <-accepted}
	}
	labelled := func(t *testing.T, i int) [2]network.Stream {
		a, b := j.open(t, testID, i)
		write(t, b, []byte("!"))
		readN(t, a, 1) // and the answer to the opening
		return [2]network.Stream{a, b}
	}
	// There are three answers.
	answer := func(n int, err error) string {
		switch {
		case n != 0:
			return "bytes of an empty buffer"
		case err == nil:
			return "nothing"
		case err == io.EOF:
			return "EOF"
		}
		return "an error"
	}
	for _, test := range []struct {
		name  string
		state func(t *testing.T, s [2]network.Stream)
		read  bool
	}{
		{"Read, data there", func(t *testing.T, s [2]network.Stream) {
			write(t, s[acceptor], []byte("xy"))
			readN(t, s[opener], 1)
		}, true},
		{"Read, EOF there", func(t *testing.T, s [2]network.Stream) {
			require.NoError(t, s[acceptor].CloseWrite())
		}, true},
		{"Read, EOF given", func(t *testing.T, s [2]network.Stream) {
			require.NoError(t, s[acceptor].CloseWrite())
			wantEnd(t, s[opener], nil)
		}, true},
		{"Read, reset", func(t *testing.T, s [2]network.Stream) {
			require.NoError(t, s[acceptor].Reset())
			wantReset(t, s[opener], "the opener")
		}, true},
		{"Read, closed", func(t *testing.T, s [2]network.Stream) {
			require.NoError(t, s[opener].CloseRead())
		}, true},
		{"Write, open", func(*testing.T, [2]network.Stream) {}, false},
		{"Write, closed", func(t *testing.T, s [2]network.Stream) {
			require.NoError(t, s[opener].CloseWrite())
		}, false},
		{"Write, closed for good", func(t *testing.T, s [2]network.Stream) {
			require.NoError(t, s[opener].Close())
		}, false},
	} {
		for i, tr := range []string{"TCP", "QUIC"} {
			t.Run(test.name+" on "+tr, func(t *testing.T) {
				var got [2]string
				for k, open := range []func(*testing.T, int) [2]network.Stream{plain, labelled} {
					s := open(t, i)
					test.state(t, s)
					op := s[opener].Write
					if test.read {
						op = s[opener].Read
					}
					within(t, "the call", func() { got[k] = answer(op(nil)) })
					for _, end := range s {
						_ = end.Reset()
					}
				}
				require.Equal(t, got[0], got[1], "as a plain stream answers")
			})
		}
	}
	t.Run("behind the answer to the opening", func(t *testing.T) {
		a, b := j.open(t, testID, 0)
		require.NoError(t, b.CloseWrite())
		within(t, "the call", func() { require.Equal(t, "EOF", answer(a.Read(nil)), "yamux's") })
		j.closed(t, [2]*Stream{a, b})
	})
	t.Run("after a migration", func(t *testing.T) {
		s := j.start(t)
		require.NoError(t, s[acceptor].CloseWrite())
		wantEnd(t, s[opener], nil)
		require.NoError(t, s[opener].CloseWrite())
		require.NoError(t, j.move(t, opener, s))
		require.Equal(t, "EOF", answer(s[opener].Read(nil)))
		require.Equal(t, "an error", answer(s[opener].Write(nil)), "QUIC's")
		j.closed(t, s)
	})
	j.nothingLeft(t)
}
