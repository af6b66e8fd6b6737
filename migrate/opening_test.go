package migrate

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/quic-go/quic-go"
	"github.com/stretchr/testify/require"
)

// A scene is a peer with some connections, of which some take no stream.
type scene struct {
	host.Host
	conns []*sceneConn
	swarm int // how often the swarm was asked
}

func (s *scene) Network() network.Network { return sceneNet{scene: s} }

type sceneNet struct {
	network.Network
	scene *scene
}

func (s sceneNet) ConnsToPeer(peer.ID) []network.Conn {
	var conns []network.Conn
	for _, c := range s.scene.conns {
		conns = append(conns, c)
	}
	return conns
}

var errSwarm = errors.New("the swarm was asked")

func (s sceneNet) NewStream(context.Context, peer.ID) (network.Stream, error) {
	s.scene.swarm++
	return nil, errSwarm
}

type sceneConn struct {
	fakeConn
	name                             string
	limited, relayed, closed, silent bool
	quic                             bool // it keeps a stream waiting only for credit
	streams                          int
	failure                          error
	full                             chan struct{} // a stream opens when it is closed; nil: at once
	asked                            atomic.Int32
	opened                           []*fakeStream
}

func (c *sceneConn) As(target any) bool {
	_, asks := target.(**quic.Conn)
	return asks && c.quic
}

func (c *sceneConn) IsClosed() bool { return c.closed }
func (c *sceneConn) Stat() network.ConnStats {
	return network.ConnStats{Stats: network.Stats{Limited: c.limited}, NumStreams: c.streams}
}

func (c *sceneConn) RemoteMultiaddr() ma.Multiaddr {
	if c.relayed {
		return ma.StringCast("/ip4/192.0.2.1/tcp/1/p2p/12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA/p2p-circuit")
	}
	return ma.StringCast("/ip4/192.0.2.1/tcp/1")
}

func (c *sceneConn) NewStream(context.Context) (network.Stream, error) {
	c.asked.Add(1)
	if c.full != nil {
		<-c.full
	}
	if c.failure != nil {
		return nil, c.failure
	}
	u := newFake()
	u.conn = &c.fakeConn
	c.opened = append(c.opened, u)
	return u, nil
}

// TestWhereStreamsOpen: the selector's connection first, and where it does not open a stream
// at once, the others that the context allows and that do as well; never a limited one beside
// an unlimited one.
func TestWhereStreamsOpen(t *testing.T) {
	const swarm = "swarm"
	full := make(chan struct{})
	t.Cleanup(func() { close(full) })
	direct := func() *sceneConn { return &sceneConn{name: "direct"} }
	busier := func() *sceneConn { return &sceneConn{name: "busier", streams: 9} }
	relay := func() *sceneConn { return &sceneConn{name: "relay", relayed: true} }
	limited := func() *sceneConn { return &sceneConn{name: "limited", limited: true, relayed: true} }
	overQUIC := func(c *sceneConn) *sceneConn { c.quic = true; return c }
	isFull := func(c *sceneConn) *sceneConn { c.full = full; return c }
	refuses := func(c *sceneConn) *sceneConn { c.failure = network.ErrResourceLimitExceeded; return c }
	isSilent := func(c *sceneConn) *sceneConn { c.silent = true; return c }
	isClosed := func(c *sceneConn) *sceneConn { c.closed = true; return c }
	type ctx = context.Context
	plain := func(c ctx) ctx { return c }
	anyConn := func(c ctx) ctx { return network.WithAllowLimitedConn(c, "test") }
	directOnly := func(c ctx) ctx { return network.WithForceDirectDial(c, "test") }
	for name, test := range map[string]struct {
		conns []*sceneConn
		named string
		ctx   func(ctx) ctx
		on    string
		wait  time.Duration
	}{
		"named":                           {[]*sceneConn{busier(), direct()}, "direct", plain, "direct", 0},
		"named relay":                     {[]*sceneConn{direct(), relay()}, "relay", plain, "relay", 0},
		"none named":                      {[]*sceneConn{busier(), direct()}, "", plain, swarm, 0},
		"no other":                        {[]*sceneConn{direct()}, "direct", plain, swarm, 0},
		"no other that is allowed":        {[]*sceneConn{direct(), limited()}, "direct", plain, swarm, 0},
		"full":                            {[]*sceneConn{isFull(direct()), relay(), busier()}, "direct", plain, "busier", atOnce},
		"busy, a relay is left":           {[]*sceneConn{isFull(direct()), relay()}, "direct", plain, swarm, atOnce},
		"out of credit, a relay is left":  {[]*sceneConn{isFull(overQUIC(direct())), relay()}, "direct", plain, "relay", atOnce},
		"full, only limited ones are":     {[]*sceneConn{isFull(overQUIC(direct())), limited()}, "direct", anyConn, swarm, atOnce},
		"full, and limited not allowed":   {[]*sceneConn{isFull(direct()), limited()}, "direct", plain, swarm, 0},
		"full, and relays not allowed":    {[]*sceneConn{isFull(direct()), relay()}, "direct", directOnly, swarm, 0},
		"refused":                         {[]*sceneConn{refuses(direct()), busier()}, "direct", plain, "busier", 0},
		"closed":                          {[]*sceneConn{isClosed(direct()), busier()}, "direct", plain, swarm, 0},
		"all full":                        {[]*sceneConn{isFull(direct()), isFull(busier())}, "direct", plain, swarm, 2 * atOnce},
		"limited beside an unlimited one": {[]*sceneConn{limited(), relay()}, "limited", anyConn, "relay", 0},
		"limited, the unlimited is full":  {[]*sceneConn{limited(), isFull(relay())}, "limited", anyConn, swarm, atOnce},
		"limited, not allowed":            {[]*sceneConn{limited(), relay()}, "limited", plain, swarm, 0},
		"limited, the other is silent":    {[]*sceneConn{limited(), isSilent(direct())}, "limited", anyConn, "limited", 0},
		"limited is silent, too":          {[]*sceneConn{isSilent(limited()), isSilent(direct())}, "limited", anyConn, swarm, 0},
		"limited, silent, not allowed":    {[]*sceneConn{limited(), isSilent(direct())}, "limited", plain, swarm, 0},
		"full, another is silent":         {[]*sceneConn{isFull(direct()), isSilent(busier())}, "direct", plain, swarm, atOnce},
		"relay, not allowed":              {[]*sceneConn{relay(), direct(), busier()}, "relay", directOnly, swarm, 0},
	} {
		bubble(t, name, func(t *testing.T) {
			for _, c := range test.conns {
				if c.full != nil { // a bubble has channels of its own
					c.full = make(chan struct{})
					defer close(c.full)
				}
			}
			s := &scene{conns: test.conns}
			h := &Host{Host: s}
			h.cfg.selector = func(context.Context, peer.ID) network.Conn {
				i := slices.IndexFunc(s.conns, func(c *sceneConn) bool { return c.name == test.named })
				if i < 0 {
					return nil
				}
				return s.conns[i]
			}
			h.cfg.silent = func(c network.Conn) bool { return c.(*sceneConn).silent }
			start := time.Now()
			ctx := test.ctx(t.Context())
			u, err := h.openStream(ctx, playerLow, h.named(ctx, playerLow))
			require.Equal(t, test.wait, time.Since(start))
			if test.on == swarm {
				require.ErrorIs(t, err, errSwarm)
				require.EqualError(t, err, "failed to open stream: "+errSwarm.Error(), "as the plain host says it")
				return
			}
			require.NoError(t, err)
			require.Zero(t, s.swarm)
			for _, c := range s.conns {
				require.Equal(t, c.name == test.on, u.Conn() == network.Conn(&c.fakeConn), "the stream is on %s", test.on)
			}
		})
	}
}

// TestStreamThatOpensLate: nobody waits for an attempt that is late, and no second one is
// made beside it; what comes of it is reset, and then the connection is used again.
func TestStreamThatOpensLate(t *testing.T) {
	virtual(t, func(t *testing.T) {
		c := &sceneConn{full: make(chan struct{})}
		h := new(Host)
		ctx, cancel := context.WithCancel(t.Context())
		start := time.Now()
		require.Nil(t, h.openAtOnce(ctx, c))
		require.Equal(t, atOnce, time.Since(start))
		for range 300 {
			require.Nil(t, h.openAtOnce(ctx, c))
		}
		require.Equal(t, atOnce, time.Since(start), "it is known that it would wait")
		synctest.Wait()
		require.EqualValues(t, 1, c.asked.Load())
		cancel() // of NewStream, which has returned long ago

		close(c.full)
		synctest.Wait()
		require.Len(t, c.opened, 1)
		require.NotNil(t, c.opened[0].resetWith, "a stream that nobody wants is reset")
		require.Empty(t, h.late.conns)

		u := h.openAtOnce(t.Context(), c)
		require.NotNil(t, u)
		require.Nil(t, u.(*fakeStream).resetWith)
		require.EqualValues(t, 2, c.asked.Load())
	})
}

// TestEndOfContextWhileOpening: who gives up does not wait for the attempt.
func TestEndOfContextWhileOpening(t *testing.T) {
	virtual(t, func(t *testing.T) {
		c := &sceneConn{full: make(chan struct{})}
		h := new(Host)
		ctx, cancel := context.WithTimeout(t.Context(), atOnce/2)
		defer cancel()
		start := time.Now()
		require.Nil(t, h.openAtOnce(ctx, c))
		require.Equal(t, atOnce/2, time.Since(start))
		close(c.full)
		synctest.Wait()
		require.NotNil(t, c.opened[0].resetWith)
		require.Empty(t, h.late.conns)
	})
}

// TestManyOpenLate: attempts that begin together are all late, and none of them is lost.
func TestManyOpenLate(t *testing.T) {
	virtual(t, func(t *testing.T) {
		c := &sceneConn{full: make(chan struct{}), failure: fmt.Errorf("closed")}
		h := new(Host)
		for range 10 {
			go h.openAtOnce(t.Context(), c)
		}
		time.Sleep(2 * atOnce)
		synctest.Wait()
		require.Equal(t, 10, h.late.conns[c])
		close(c.full)
		synctest.Wait()
		require.Empty(t, h.late.conns)
		require.Nil(t, h.openAtOnce(t.Context(), c))
		require.EqualValues(t, 11, c.asked.Load(), "it is tried again")
	})
}
