package migrate

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
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

// forgetful is a host whose identify comes to know nothing of any peer.
type forgetful struct {
	host.Host
	forgets *atomic.Bool
}

func (f forgetful) Peerstore() peerstore.Peerstore {
	if f.forgets.Load() {
		return protocolsOf{f.Host.Peerstore(), new(identifying)}
	}
	return f.Host.Peerstore()
}

// TestIdentifyThatForgets: go-libp2p takes a push of identify that was cut short, as by its
// deadline on a connection that is congested, for one that says that the peer speaks nothing.
// The streams that are labelled migrate all the same, with a verified handover.
func TestIdentifyThatForgets(t *testing.T) {
	for _, side := range ends {
		for name, opts := range map[string][]Option{"by default": nil, "verified only": {RequireVerifiedHandover()}} {
			t.Run(fmt.Sprintf("%s, %s", endName(side), name), func(t *testing.T) {
				forgets, st := new(atomic.Bool), new(steps)
				between := func(h host.Host) host.Host { return forgetful{h, forgets} }
				j := &journey{newPairOf(t, TCP, QUIC, between, append(opts, WithTracer(st.trace))...), tcpQUIC, st}
				s := j.start(t)
				if side == acceptor && opts != nil {
					// It knows what the other has when it has once migrated.
					require.NoError(t, j.move(t, opener, s))
					require.NoError(t, j.moveTo(t, opener, s, j.from()))
					j.settled(t, s)
				}
				forgets.Store(true)
				h, other := j.hosts[side], s[side].peer
				require.True(t, h.Supports(other), "there is a labelled stream")

				require.NoError(t, j.move(t, side, s))
				j.settled(t, s)
				require.True(t, s[side].verifiable())
				j.converses(t, s, 10_000)
				require.False(t, h.Supports(other), "there is none any more")
			})
		}
	}
}

// TestPushOfIdentifyThatIsEmpty is about go-libp2p, and why a host has to be ready to forget.
func TestPushOfIdentifyThatIsEmpty(t *testing.T) {
	p := newPair(t, TCP, QUIC)
	sub, err := p.nodes[0].EventBus().Subscribe(new(event.EvtPeerProtocolsUpdated))
	require.NoError(t, err)
	defer sub.Close()
	push, err := p.nodes[1].NewStream(context.Background(), p.nodes[0].ID(), identify.IDPush)
	require.NoError(t, err)
	require.NoError(t, push.Close())
	within(t, "the peer to be taken for one that speaks nothing", func() {
		for e := range sub.Out() {
			if slices.Contains(e.(event.EvtPeerProtocolsUpdated).Removed, ID) {
				return
			}
		}
	})
}

// TestAnswerOfIdentifyThatIsLate is about go-libp2p, too: what an answer leaves out a push
// tells, and whichever of the two is handled last stands. So hosttest connects hosts when
// there is nothing to push.
func TestAnswerOfIdentifyThatIsLate(t *testing.T) {
	a, b := New(t, []Transport{QUIC}), New(t, []Transport{QUIC})
	TellsAll(t, b)
	release := make(chan struct{})
	var answers atomic.Int32
	b.Network().SetStreamHandler(func(s network.Stream) {
		late := &lateAnswer{Stream: s, answers: &answers, release: release}
		if id, handle, err := b.Mux().Negotiate(late); err == nil && s.SetProtocol(id) == nil {
			_ = handle(id, late)
		}
	})
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	a.Know(b, b.Addr(t, QUIC))
	c, err := a.Network().DialPeer(ctx, b.ID())
	require.NoError(t, err)
	WaitFor(t, "identify's answer to be written", func() bool { return answers.Load() == 1 })

	const added = "/test/added"
	knows := func() bool {
		ids, err := a.Peerstore().SupportsProtocols(b.ID(), added)
		return err == nil && len(ids) == 1
	}
	b.SetStreamHandler(added, func(s network.Stream) { _ = s.Reset() })
	WaitFor(t, "the push", knows)
	close(release)
	within(t, "identify to have its answer", func() {
		<-a.Host.(interface{ IDService() identify.IDService }).IDService().IdentifyWait(c)
	})
	require.False(t, knows(), "the older list stands")
}

// lateAnswer holds back what identify writes, behind the negotiation.
type lateAnswer struct {
	network.Stream
	answers *atomic.Int32
	release chan struct{}
}

func (s *lateAnswer) Write(b []byte) (int, error) {
	if bytes.Contains(b, []byte(identify.IDPush)) {
		s.answers.Add(1)
		<-s.release
	}
	return s.Stream.Write(b)
}
