package migrate

import (
	"context"
	"crypto/rand"
	"io"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/core/routing"
	basichost "github.com/libp2p/go-libp2p/p2p/host/basic"
	routed "github.com/libp2p/go-libp2p/p2p/host/routed"
	swarmt "github.com/libp2p/go-libp2p/p2p/net/swarm/testing"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	msmux "github.com/multiformats/go-multistream"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
)

// echoing serves echoID until the test ends.
func echoing(h host.Host) {
	h.SetStreamHandler(echoID, func(s network.Stream) {
		_, _ = io.Copy(s, s)
		_ = s.Close()
	})
}

func wrapped(t testing.TB, h host.Host, opts ...Option) *Host {
	t.Helper()
	if n, ok := h.(*Node); ok { // which hides its identify service
		h = n.Host
	}
	mh, err := Wrap(h, append([]Option{WithNegotiationTimeout(Patience)}, opts...)...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = mh.Close() })
	return mh
}

// nowhere is a routing that knows nobody.
type nowhere struct{ routing.Routing }

func (nowhere) FindPeer(_ context.Context, p peer.ID) (peer.AddrInfo, error) {
	return peer.AddrInfo{ID: p}, nil
}

// TestStreamWhenConnected: a stream that is opened as soon as there is a connection waits
// for identify and is labelled, whatever host is wrapped; also where the host hides its
// identify service.
func TestStreamWhenConnected(t *testing.T) {
	for name, around := range map[string]func(host.Host) host.Host{
		"basic host":  func(h host.Host) host.Host { return h },
		"routed host": func(h host.Host) host.Host { return routed.Wrap(h, nowhere{}) },
	} {
		for _, via := range []Transport{TCP, QUIC} {
			t.Run(name+" "+string(via), func(t *testing.T) {
				for range 10 {
					a, b := New(t, []Transport{via}), New(t, []Transport{via})
					ha, hb := wrapped(t, around(a)), wrapped(t, b)
					echoing(hb)
					TellsAll(t, b)
					opened := make(chan network.Stream, 1)
					a.Network().Notify(&network.NotifyBundle{ConnectedF: func(_ network.Network, c network.Conn) {
						s, err := ha.NewStream(context.Background(), c.RemotePeer(), echoID)
						if err != nil {
							t.Error(err)
						}
						opened <- s
					}})
					Dial(t, a, b, via)
					s := <-opened
					require.IsType(t, new(Stream), s)
					echoes(t, s)
					require.NoError(t, s.Reset())
				}
			})
		}
	}
}

// silentIdentify has h not answer identify, as a peer whose answer is lost.
func silentIdentify(h host.Host) { h.RemoveStreamHandler(identify.ID) }

// deafToIdentify has h not hear what others tell unasked. What their handlers were before is told so, too,
// where they are connected before their identify service has looked.
func deafToIdentify(h host.Host) { h.RemoveStreamHandler(identify.IDPush) }

// withoutIdentify waits until a knows that b does not tell.
func withoutIdentify(t *testing.T, a *Node, c network.Conn) {
	t.Helper()
	within(t, "identify to fail", func() {
		<-a.Host.(interface{ IDService() identify.IDService }).IDService().IdentifyWait(c)
	})
}

// replicas are two hosts with one key, and so one peer ID, of which the first migrates and
// the second does not, and a host that is connected to both.
type replicas struct {
	host  *Host
	node  *Node
	conns [2]network.Conn // to the one that migrates, and to the other
	named int
}

func (r *replicas) open(t *testing.T) network.Stream {
	t.Helper()
	s, err := r.host.NewStream(context.Background(), r.conns[0].RemotePeer(), echoID)
	require.NoError(t, err)
	require.True(t, s.Conn() == r.conns[r.named])
	return s
}

func newReplicas(t *testing.T, order [2]int, silent [2]bool) *replicas {
	key, _, err := crypto.GenerateEd25519Key(rand.Reader)
	require.NoError(t, err)
	r := &replicas{node: New(t, []Transport{TCP})}
	r.host = wrapped(t, r.node, WithConnSelector(func(context.Context, peer.ID) network.Conn { return r.conns[r.named] }))
	var far [2]*Node
	for i := range far {
		far[i] = New(t, []Transport{TCP}, libp2p.Identity(key))
	}
	echoing(wrapped(t, far[0]))
	echoing(far[1])
	for i := range far {
		TellsAll(t, far[i])
		if silent[i] {
			silentIdentify(far[i])
		}
	}
	// Each dials, since a second dial would find the first connection.
	for _, i := range order {
		before := r.node.Network().ConnsToPeer(far[i].ID())
		far[i].Know(r.node, r.node.Addr(t, TCP))
		ctx, cancel := context.WithTimeout(context.Background(), Patience)
		_, err := far[i].Network().DialPeer(ctx, r.node.ID())
		cancel()
		require.NoError(t, err)
		WaitFor(t, "the connection", func() bool {
			return len(r.node.Network().ConnsToPeer(far[i].ID())) == len(before)+1
		})
		for _, c := range r.node.Network().ConnsToPeer(far[i].ID()) {
			if len(before) == 0 || c != before[0] {
				r.conns[i] = c
			}
		}
		withoutIdentify(t, r.node, r.conns[i])
	}
	return r
}

// What identify has told is known to a notifiee that is called before ours.
func TestSettlesBeforeItIsNotified(t *testing.T) {
	a, b := New(t, []Transport{TCP}), New(t, []Transport{TCP})
	ha, _ := wrapped(t, a), wrapped(t, b)
	a.Network().StopNotify((*identifiedNotifiee)(&ha.told))
	TellsAll(t, b)
	c := Dial(t, a, b, TCP)
	<-ha.identify().IdentifyWait(c)
	require.Equal(t, told{}, ha.told.on(c))
	ha.told.settle(c)
	require.Equal(t, told{known: 3, speaks: 3, ended: true}, ha.told.on(c))
}

// TestReplicas: of two hosts with one key only one migrates. A label goes to that one, and
// the application sees two hosts that work, whichever was identified last, and also where one
// of them has not answered.
func TestReplicas(t *testing.T) {
	for name, test := range map[string]struct {
		order    [2]int
		silent   [2]bool
		labelled [2]bool
		known    [2]bool
	}{
		"the other was identified last": {[2]int{0, 1}, [2]bool{}, [2]bool{true, false}, [2]bool{true, true}},
		"it was identified last":        {[2]int{1, 0}, [2]bool{}, [2]bool{true, false}, [2]bool{true, true}},
		"the other tells nothing":       {[2]int{0, 1}, [2]bool{false, true}, [2]bool{true, false}, [2]bool{true, true}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newReplicas(t, test.order, test.silent)
			for range 3 {
				for i := range r.conns {
					r.named = i
					s := r.open(t)
					_, labelled := s.(*Stream)
					require.Equal(t, test.labelled[i], labelled)
					echoes(t, s)
					require.NoError(t, s.Close())
				}
			}
			for i, c := range r.conns {
				speaks, known := r.host.Speaks(c, ID)
				require.Equal(t, test.known[i], known, "from identify, or from having asked")
				require.Equal(t, test.labelled[i], speaks)
			}
		})
	}
}

// TestLabelThatIsAskedFor: where a connection's own identify has told nothing, and another
// has, the peer is asked, once for the connection, and both answers work.
func TestLabelThatIsAskedFor(t *testing.T) {
	for name, migrates := range map[string]bool{"it migrates": true, "it does not": false} {
		for known, told := range map[string]bool{"protocol known": true, "protocol not known": false} {
			t.Run(name+", "+known, func(t *testing.T) {
				a, b := New(t, nil), New(t, []Transport{TCP})
				ha, hb := wrapped(t, a), host.Host(b)
				if migrates {
					hb = wrapped(t, b)
				}
				echoing(hb)
				silentIdentify(b)
				deafToIdentify(a)
				a.Know(b, b.Addr(t, TCP))
				ctx, cancel := context.WithTimeout(context.Background(), Patience)
				defer cancel()
				c, err := a.Network().DialPeer(ctx, b.ID())
				require.NoError(t, err)
				withoutIdentify(t, a, c)
				require.NoError(t, a.Peerstore().AddProtocols(b.ID(), ID, FinalSizeID)) // from elsewhere
				if told {
					require.NoError(t, a.Peerstore().AddProtocols(b.ID(), echoID))
				}
				_, before := ha.Speaks(c, ID)
				require.False(t, before)
				for range 3 {
					s, err := ha.NewStream(ctx, b.ID(), "/not/there", echoID)
					require.NoError(t, err)
					require.Equal(t, echoID, s.Protocol())
					_, labelled := s.(*Stream)
					require.Equal(t, migrates, labelled)
					echoes(t, s)
					require.NoError(t, s.Close())
				}
				speaks, after := ha.Speaks(c, ID)
				require.Equal(t, migrates, speaks)
				require.True(t, after)

				_, err = ha.NewStream(ctx, b.ID(), "/not/there", "/nor/there")
				require.ErrorIs(t, err, msmux.ErrNotSupported[protocol.ID]{})
				require.EqualError(t, err, "failed to negotiate protocol: protocols not supported: [/not/there /nor/there]")
			})
		}
	}
}

// TestNotIdentified: that a stream was opened to a peer does not make it known what the peer
// speaks.
func TestNotIdentified(t *testing.T) {
	a, b := New(t, nil), New(t, []Transport{TCP})
	ha := wrapped(t, a, WithPeerProtocols("/test/watched"))
	b.SetStreamHandler("/test/watched", func(network.Stream) {})
	echoing(b)
	silentIdentify(b)
	deafToIdentify(a)
	a.Know(b, b.Addr(t, TCP))
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	c, err := a.Network().DialPeer(ctx, b.ID())
	require.NoError(t, err)
	s, err := ha.NewStream(ctx, b.ID(), echoID)
	require.NoError(t, err)
	echoes(t, s)
	book, err := a.Peerstore().GetProtocols(b.ID())
	require.NoError(t, err)
	require.Equal(t, []protocol.ID{echoID}, book, "or the test tests nothing")
	for _, id := range []protocol.ID{ID, FinalSizeID, "/test/watched", echoID} {
		speaks, known := ha.Speaks(c, id)
		require.False(t, speaks, id)
		require.False(t, known, id)
	}
}

// TestWhatIdentifyTells: each connection's own answer, for as long as it is open, also that
// of connections from before Wrap; and nothing is kept behind it.
func TestWhatIdentifyTells(t *testing.T) {
	a, b := New(t, nil), New(t, []Transport{TCP})
	const other, not protocol.ID = "/test/watched", "/test/not"
	b.SetStreamHandler(other, func(network.Stream) {})
	early := Dial(t, a, b, TCP)
	ha := wrapped(t, a, WithPeerProtocols(other, not))
	tells := func(c network.Conn, id protocol.ID, want bool) {
		t.Helper()
		WaitFor(t, "what identify tells of "+string(id), func() bool {
			speaks, known := ha.Speaks(c, id)
			return known && speaks == want
		})
	}
	tells(early, other, true)
	tells(early, not, false)
	tells(early, ID, false)
	_, known := ha.Speaks(early, identify.ID)
	require.False(t, known, "nobody has named it")

	hb := wrapped(t, b)
	tells(early, ID, true) // by a push
	hb.RemoveStreamHandler(other)
	tells(early, other, false)

	empty, err := b.NewStream(context.Background(), a.ID(), identify.IDPush)
	require.NoError(t, err)
	require.NoError(t, empty.Close())
	WaitFor(t, "the push that says nothing", func() bool { return !ha.speaks(b.ID(), ID) })
	tells(early, ID, true)

	require.NoError(t, early.Close())
	nothingKept(t, ha)
	late := Dial(t, a, b, TCP)
	tells(late, ID, true)
	require.NoError(t, ha.Close())
	nothingKept(t, ha)
}

// nothingKept waits until nothing is kept of any connection, and nobody waits for events.
func nothingKept(t *testing.T, h *Host) {
	t.Helper()
	WaitFor(t, "what is known of connections to be gone", func() bool {
		i := &h.told
		i.mu.Lock()
		defer i.mu.Unlock()
		if len(i.conns) > 0 || i.run != nil {
			return false
		}
		select {
		case <-i.last.done:
			return true
		default:
			return false
		}
	})
}

// TestNegotiationTimeoutOfHost: NewStream takes what the wrapped host would.
func TestNegotiationTimeoutOfHost(t *testing.T) {
	basic, err := basichost.NewHost(swarmt.GenSwarm(t), &basichost.HostOpts{NegotiationTimeout: time.Second})
	require.NoError(t, err)
	t.Cleanup(func() { _ = basic.Close() })
	unbounded, err := basichost.NewHost(swarmt.GenSwarm(t), &basichost.HostOpts{NegotiationTimeout: -1})
	require.NoError(t, err)
	t.Cleanup(func() { _ = unbounded.Close() })
	viaRouting, err := libp2p.New(libp2p.NoListenAddrs, libp2p.Routing(func(host.Host) (routing.PeerRouting, error) { return nowhere{}, nil }))
	require.NoError(t, err)
	t.Cleanup(func() { _ = viaRouting.Close() })
	byDefault := basichost.DefaultNegotiationTimeout
	for name, test := range map[string]struct {
		host host.Host
		opts []Option
		want time.Duration
	}{
		"libp2p.New":              {New(t, nil), nil, byDefault},
		"libp2p.New with Routing": {viaRouting, nil, byDefault},
		"one second":              {basic, nil, time.Second},
		"one second, routed":      {routed.Wrap(basic, nowhere{}), nil, time.Second},
		"no bound":                {unbounded, nil, 0},
		"given":                   {New(t, nil), []Option{WithNegotiationTimeout(time.Minute)}, time.Minute},
		"no bound given":          {New(t, nil), []Option{WithNegotiationTimeout(0)}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			h, err := Wrap(test.host, test.opts...)
			require.NoError(t, err)
			t.Cleanup(func() { h.told.close() })
			require.Equal(t, test.want, max(0, h.timeout()))
			require.Equal(t, test.want, h.cfg.negotiation, "for streams that come in")
			test.host.RemoveStreamHandler(ID) // for the next test
		})
	}
	require.False(t, negotiationTimeout(new(bare)).IsValid())
	require.False(t, negotiationTimeout(struct{ host.Host }{}).IsValid())
	require.True(t, negotiationTimeout(basic).IsValid())
}
