package migrate

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"

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

// knowsNothing is a peerstore without protocols.
type knowsNothing struct{ peerstore.Peerstore }

func (knowsNothing) GetProtocols(peer.ID) ([]protocol.ID, error) { return nil, nil }
func (knowsNothing) SupportsProtocols(peer.ID, ...protocol.ID) ([]protocol.ID, error) {
	return nil, nil
}

// forgetful is a host whose identify comes to know nothing of any peer.
type forgetful struct {
	host.Host
	forgets *atomic.Bool
}

func (f forgetful) Peerstore() peerstore.Peerstore {
	if f.forgets.Load() {
		return knowsNothing{f.Host.Peerstore()}
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
