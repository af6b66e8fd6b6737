package hosttest

import (
	"bytes"
	"io"
	"testing"

	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	ma "github.com/multiformats/go-multiaddr"
)

// identified waits until a and b have identified each other on all connections, and each
// knows of all protocols that the other handles.
func identified(t testing.TB, a, b *Node) {
	t.Helper()
	wait := func(n, other *Node) {
		// The accepting side may learn of the connection a little later.
		WaitFor(t, "a connection at both ends", func() bool {
			return len(n.Network().ConnsToPeer(other.ID())) >= len(other.Network().ConnsToPeer(n.ID()))
		})
		for _, c := range n.Network().ConnsToPeer(other.ID()) {
			<-n.Host.(interface{ IDService() identify.IDService }).IDService().IdentifyWait(c)
		}
		WaitFor(t, "the other's protocols to be known", func() bool {
			handled := other.Mux().Protocols()
			known, err := n.Peerstore().SupportsProtocols(other.ID(), handled...)
			return err == nil && len(known) == len(handled)
		})
	}
	wait(a, b)
	wait(b, a)
}

// TellsAll waits until h's identify, when asked, tells of all protocols that h handles. It
// learns of a handler a little after that is set, and what it left out of an answer it
// tells with a push. The answer and the push are streams of their own, and a peer that
// handles the answer last keeps the older list for good. So hosts are connected when there
// is nothing to push.
func TellsAll(t testing.TB, h host.Host) {
	t.Helper()
	WaitFor(t, "identify to tell of all protocols", func() bool {
		q := &question{in: bytes.NewReader(identifyPrelude)}
		if err := h.Mux().Handle(q); err != nil {
			t.Fatalf("ask identify: %v", err)
		}
		for _, id := range h.Mux().Protocols() {
			if !bytes.Contains(q.answer.Bytes(), lengthPrefixed(id)) {
				return false
			}
		}
		return true
	})
}

var identifyPrelude = append(lengthPrefixed("/multistream/1.0.0\n"), lengthPrefixed(identify.ID+"\n")...)

func lengthPrefixed(id protocol.ID) []byte { return append([]byte{byte(len(id))}, id...) }

// question is a stream on which a host's own handlers can be asked, without a network.
type question struct {
	network.Stream // nil
	in             io.Reader
	answer         bytes.Buffer
}

func (q *question) Read(b []byte) (int, error)  { return q.in.Read(b) }
func (q *question) Write(b []byte) (int, error) { return q.answer.Write(b) }
func (q *question) Close() error                { return nil }
func (q *question) Reset() error                { return nil }
func (q *question) Scope() network.StreamScope  { return &network.NullScope{} }
func (q *question) Conn() network.Conn          { return noConn{} }

type noConn struct {
	network.Conn // nil
}

var nowhere = ma.StringCast("/ip4/127.0.0.1/tcp/1")

func (noConn) RemotePeer() peer.ID           { return "" }
func (noConn) RemoteMultiaddr() ma.Multiaddr { return nowhere }
func (noConn) LocalMultiaddr() ma.Multiaddr  { return nowhere }
