package sim

import (
	"io"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	msmux "github.com/multiformats/go-multistream"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/rawpeer"
	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/migrate"
)

// With a responder that has only the draft, the proof that all has arrived is EOF on the
// old stream, in either direction: a migration takes a round trip of each path.
func TestDraftOnlyResponderTakesARoundTripOfEach(t *testing.T) {
	for _, m := range moves {
		t.Run(m.name, func(t *testing.T) {
			Run(t, func(t *testing.T, n *Net) {
				p := newPlainPair(t, n, m.old, m.new)
				new(draftOnly).serve(p.nodes[1])
				p.wrap(0)
				s := p.openOn(0)
				_, err := s.Write([]byte("old"))
				require.NoError(t, err)
				got := make([]byte, 3)
				_, err = io.ReadFull(s, got)
				require.NoError(t, err)
				time.Sleep(time.Second)

				start := time.Now()
				require.NoError(t, p.hosts[0].Migrate(t.Context(), s, p.conns[0][1]))
				require.Equal(t, 2*m.new.oneWay+2*m.old.oneWay, time.Since(start))

				start = time.Now()
				_, err = s.Write([]byte("new"))
				require.NoError(t, err)
				_, err = io.ReadFull(s, got)
				require.NoError(t, err)
				require.Equal(t, "new", string(got))
				require.Equal(t, 2*m.new.oneWay, time.Since(start))
				require.NoError(t, s.CloseWrite())
				_, err = s.Read(got)
				require.Equal(t, io.EOF, err)
				require.NoError(t, s.Close())
			})
		})
	}
}

// draftOnly is a peer that has only the draft, and echoes. It serves one stream, and one
// migration of that.
type draftOnly struct {
	next chan network.Stream
}

func (d *draftOnly) serve(node *Node) {
	d.next = make(chan network.Stream, 1)
	app := msmux.NewMultistreamMuxer[protocol.ID]()
	app.AddHandler(testID, nil)
	node.SetStreamHandler(testID, func(u network.Stream) { _ = u.Reset() }) // advertises it
	node.SetStreamHandler(migrate.ID, func(u network.Stream) {
		m, err := ReadMessage(u)
		if err != nil {
			_ = u.Reset()
			return
		}
		if m.GetMigrate() != nil {
			if _, err := io.WriteString(u, AckDraft); err != nil {
				_ = u.Reset()
				return
			}
			d.next <- u
			return
		}
		if _, _, err := app.Negotiate(u); err != nil {
			_ = u.Reset()
			return
		}
		_, _ = io.Copy(u, u)
		_ = u.Close()
		select {
		case u = <-d.next:
			_, _ = io.Copy(u, u)
			_ = u.Close()
		default:
		}
	})
}
