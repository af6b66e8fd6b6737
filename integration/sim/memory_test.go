package sim

import (
	"io"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/simtest"
)

// wide opens yamux's largest window from the beginning.
func wide() libp2p.Option {
	cfg := *yamux.DefaultTransport.Config()
	cfg.InitialStreamWindowSize = cfg.MaxStreamWindowSize
	return libp2p.Muxer(yamux.ID, (*yamux.Transport)(&cfg))
}

// The migration of a stream whose reader does not read takes what is in flight into
// memory: no more than the old stream's window, all of it on the resource manager's
// account, and none of it once it has been read.
func TestNeverReadingSideHoldsTheWindow(t *testing.T) {
	for _, tc := range []struct {
		name     string
		old, new way
		least    int // what is in flight when the window is full
		most     int // the largest window that the muxer opens
		opts     []libp2p.Option
	}{
		{"TCP to QUIC", way{tcp, ms(25)}, way{quic, ms(5)}, 8 << 20, 16 << 20, nil},
		{"wide TCP to QUIC", way{tcp, ms(25)}, way{quic, ms(5)}, 16 << 20, 16 << 20, []libp2p.Option{wide()}},
		{"QUIC to TCP", way{quic, ms(25)}, way{tcp, ms(5)}, 6 << 20, 10 << 20, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			eachSide(t, func(t *testing.T, initiator int) {
				Run(t, func(t *testing.T, n *Net) {
					p := newPair(t, n, tc.old, tc.new, append(tc.opts, unlimited(t))...)
					s := p.stream(0)
					var stop atomic.Bool
					written := make(chan int, 1)
					go func() {
						total := 0
						buf := make([]byte, 64<<10)
						for !stop.Load() {
							n, err := s[0].Write(buf)
							total += n
							if err != nil {
								t.Errorf("Write: %v", err)
								break
							}
						}
						_ = s[0].CloseWrite()
						written <- total
					}()
					const warm = 64 << 20 // opens the window
					_, err := io.CopyN(io.Discard, s[1], warm)
					require.NoError(t, err)
					time.Sleep(10 * time.Second) // fills it
					stop.Store(true)

					require.NoError(t, p.migrate(initiator, s, 1))
					held := s[1].Scope().Stat().Memory
					t.Logf("%d KiB held", held>>10)
					require.GreaterOrEqual(t, held, int64(tc.least), "the test is to fill the window")
					require.LessOrEqual(t, held, int64(tc.most), "the old stream's window bounds what is held")
					require.Zero(t, s[0].Scope().Stat().Memory)

					got, err := io.Copy(io.Discard, s[1])
					require.NoError(t, err)
					require.EqualValues(t, <-written, warm+got)
					require.Zero(t, s[1].Scope().Stat().Memory, "what has been read is not held any more")
				})
			})
		})
	}
}
