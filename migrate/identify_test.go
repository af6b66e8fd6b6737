package migrate

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	"github.com/stretchr/testify/require"
)

// identifying is a host with connections to a peer, on each of which identify takes as long
// as the test likes.
type identifying struct {
	*bare
	conns []network.Conn
	waits map[network.Conn]chan struct{}
	known []protocol.ID
}

func (i *identifying) IDService() identify.IDService  { return identifyService{host: i} }
func (i *identifying) Network() network.Network       { return connsOf{host: i} }
func (i *identifying) Peerstore() peerstore.Peerstore { return protocolsOf{host: i} }

type identifyService struct {
	identify.IDService
	host *identifying
}

func (s identifyService) IdentifyWait(c network.Conn) <-chan struct{} { return s.host.waits[c] }

type connsOf struct {
	network.Network
	host *identifying
}

func (n connsOf) ConnsToPeer(peer.ID) []network.Conn { return n.host.conns }

type protocolsOf struct {
	peerstore.Peerstore
	host *identifying
}

func (p protocolsOf) GetProtocols(peer.ID) ([]protocol.ID, error) { return p.host.known, nil }
func (p protocolsOf) SupportsProtocols(peer.ID, ...protocol.ID) ([]protocol.ID, error) {
	return nil, nil
}

// TestOneAnswerOfIdentify: a peer that has said on one connection that it does not speak the
// protocol is not asked again on another, on which identify hangs. One that has said nothing
// may yet.
func TestOneAnswerOfIdentify(t *testing.T) {
	for name, test := range map[string]struct {
		known []protocol.ID
		waits bool // for the other connection
	}{
		"it speaks other protocols": {[]protocol.ID{echoID}, false},
		"identify failed":           {nil, true},
	} {
		bubble(t, name, func(t *testing.T) {
			host := &identifying{waits: make(map[network.Conn]chan struct{})}
			for range 2 {
				c := &fakeConn{remote: playerLow}
				host.conns = append(host.conns, c)
				host.waits[c] = make(chan struct{})
			}
			h := &Host{Host: host}
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			done := make(chan error, 1)
			go func() { done <- h.awaitIdentify(ctx, playerLow) }()
			synctest.Wait()
			require.Empty(t, done, "nothing is known yet")
			host.known = test.known
			close(host.waits[host.conns[0]])
			if test.waits {
				synctest.Wait()
				require.Empty(t, done)
				close(host.waits[host.conns[1]])
			}
			require.NoError(t, <-done)
		})
	}
}
