package sim

import (
	"bytes"
	"io"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/migrate"
)

// An application may take its time with a stream whose opener has sent everything, and ended,
// before the negotiation was over. On yamux no deadline can be lifted from then on, and a plain
// host's stream ends with the negotiation's, ten seconds after it came.
func TestSlowReaderOfWhatHasEnded(t *testing.T) {
	data := pattern(200_000) // more than half of a window, less than a whole one
	for _, via := range []string{tcp, quic} {
		for name, unlabelled := range map[string]bool{"labelled": false, "without a label": true} {
			t.Run(via+", "+name, func(t *testing.T) {
				Run(t, func(t *testing.T, n *Net) {
					l := newLasting(t, n)
					n.Dial(l.nodes[0], l.nodes[1], Path{Transport: Transport(via), From: ipsOfA[0], To: ipsOfB[0]})
					accepted := make(chan network.Stream, 1)
					l.hosts[1].SetStreamHandlerMatch(testID, func(id protocol.ID) bool {
						time.Sleep(time.Second) // in which all comes
						return id == testID
					}, func(s network.Stream) { accepted <- s })
					ctx := t.Context()
					if unlabelled {
						ctx = migrate.WithoutLabel(ctx)
					}
					require.NoError(t, l.nodes[0].Peerstore().AddProtocols(l.nodes[1].ID(), testID)) // sends all in one flight
					s, err := l.hosts[0].NewStream(ctx, l.nodes[1].ID(), testID)
					require.NoError(t, err)
					_, err = s.Write(data)
					require.NoError(t, err)
					require.NoError(t, s.CloseWrite())

					far := <-accepted
					got := make([]byte, 1)
					_, err = io.ReadFull(far, got)
					require.NoError(t, err)
					time.Sleep(time.Minute)
					rest, err := io.ReadAll(far)
					require.NoError(t, err)
					require.True(t, bytes.Equal(data, append(got, rest...)))
					_ = s.Close()
					_ = far.Close()
					time.Sleep(time.Minute)
				})
			})
		}
	}
}
