package sim

import (
	"bytes"
	"io"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/migrate"
)

// An old path that is slow has what was written to it for many streams one behind the
// other, and so brings nothing of the last ones for longer than a path may be quiet. It is
// no stall (M4): the path moves.
func TestSlowOldPathIsNoStall(t *testing.T) {
	const (
		streams = 16
		each    = 200 << 10
		rate    = 500_000 // bits per second: all of it takes 52 s
	)
	for _, tc := range []struct {
		name     string
		old, new way
	}{
		{"TCP to QUIC", way{tcp, ms(50)}, way{quic, ms(5)}},
		{"TCP to TCP", way{tcp, ms(50)}, way{tcp, ms(5)}},
		{"relay to QUIC", way{relayed, ms(50)}, way{quic, ms(5)}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			eachSide(t, func(t *testing.T, initiator int) {
				Run(t, func(t *testing.T, n *Net) {
					p := newBoundedPair(t, n, tc.old, tc.new, rate, 0)
					data := bytes.Repeat([]byte("0123456789abcdef"), each/16)
					want := append(data[:each:each], "last"...)
					moved := make(chan error, streams)
					read := make(chan error, streams)
					var all [][2]*migrate.Stream
					for range streams {
						all = append(all, p.stream(0))
					}
					start := time.Now()
					for _, s := range all {
						_, err := s[0].Write(data)
						require.NoError(t, err)
					}
					for _, s := range all {
						go func() { moved <- p.migrate(initiator, s, 1) }()
						go func() {
							got, err := io.ReadAll(s[1])
							if err == nil && !bytes.Equal(got, want) {
								t.Errorf("%d bytes, which differ", len(got))
							}
							read <- err
						}()
					}
					for _, s := range all {
						_, err := s[0].Write([]byte("last"))
						require.NoError(t, err)
						require.NoError(t, s[0].CloseWrite())
					}
					for range all {
						require.NoError(t, <-moved)
						require.NoError(t, <-read)
					}
					require.Greater(t, time.Since(start), 50*time.Second, "the path is not slow")
				})
			})
		})
	}
}
