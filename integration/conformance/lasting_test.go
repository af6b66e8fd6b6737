package conformance

import (
	"context"
	"io"
	"testing"

	"github.com/libp2p/go-libp2p/core/network"

	. "github.com/go-portage/portage/internal/hosttest"
	"github.com/go-portage/portage/migrate"
)

// The streams of the setups that say so do outlive their connection: else the suites would show
// nothing of those.
func TestLastingStreamsLeaveTheirConnection(t *testing.T) {
	for _, s := range setups {
		if !s.lasting {
			continue
		}
		t.Run(s.String(), func(t *testing.T) {
			p := newPair(t, s)
			p.hosts[1].SetStreamHandler(netID, func(s network.Stream) {
				_, _ = io.Copy(s, s)
				_ = s.Close()
			})
			st, err := p.open(context.Background(), 0, netID)
			if err != nil {
				t.Fatal(err)
			}
			echoes := func() {
				t.Helper()
				if _, err := st.Write([]byte("?")); err != nil {
					t.Fatal(err)
				}
				if _, err := io.ReadFull(st, make([]byte, 1)); err != nil {
					t.Fatal(err)
				}
			}
			echoes()
			p.hosts[0].(*migrate.Host).Leave(p.conns[0][0])
			WaitFor(t, "the stream on the other connection", func() bool { return st.Conn() == p.conns[0][1] })
			echoes()
			if err := st.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadAll(st); err != nil {
				t.Fatal(err)
			}
			_ = st.Close()
		})
	}
}
