package connmgr_test

import (
	"bytes"
	"context"
	"io"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	basic "github.com/libp2p/go-libp2p/p2p/net/connmgr"
	"github.com/multiformats/go-multistream"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/go-portage/portage/connmgr"
	"github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/policy"
)

// Two whole hosts with managers, joined by TCP and QUIC, in virtual time. Index 0 is the
// one that decides.

const (
	plainID protocol.ID = "/test/plain"

	// Peer IDs follow from them: ip0 has the lower one.
	ip0, ip1 = "1.0.1.1", "1.0.0.1"
)

type duo struct {
	t     *testing.T
	net   *simtest.Net
	nodes [2]*simtest.Node
	hosts [2]host.Host // wrapped
	mgrs  [2]*connmgr.Manager
	logs  [2]*observer.ObservedLogs
}

func newDuo(t *testing.T, n *simtest.Net, opts ...[]connmgr.Option) *duo {
	p := &duo{t: t, net: n}
	p.start(opts)
	return p
}

// newDuoWith makes the hosts with these options.
func newDuoWith(t *testing.T, n *simtest.Net, opts ...libp2p.Option) *duo {
	p := &duo{t: t, net: n}
	p.start(nil, opts...)
	return p
}

func (p *duo) start(opts [][]connmgr.Option, hostOpts ...libp2p.Option) {
	t, n := p.t, p.net
	ips := [][]string{{ip0}, {ip1}}
	n.SetLatency(ip0, ip1, 20*time.Millisecond)
	for i := range p.nodes {
		inner, err := basic.NewConnManager(100, 200)
		require.NoError(t, err)
		core, logs := observer.New(zap.DebugLevel)
		own := []connmgr.Option{connmgr.WithLogger(zap.New(core))}
		if i < len(opts) {
			own = append(own, opts[i]...)
		}
		p.mgrs[i], err = connmgr.New(inner, own...)
		require.NoError(t, err)
		p.logs[i] = logs
		p.nodes[i] = n.NewNode(ips[i], append(slices.Clone(hostOpts), libp2p.ConnectionManager(p.mgrs[i]))...)
		p.hosts[i], err = p.mgrs[i].Wrap(p.nodes[i])
		require.NoError(t, err)
	}
	require.Less(t, p.nodes[0].ID(), p.nodes[1].ID(), "the addresses are chosen so that index 0 decides")
	synctest.Wait() // identify tells of what was registered in the background
}

// join connects the two over TCP and QUIC.
func (p *duo) join() (tcp, quic network.Conn) {
	return p.net.Join(p.nodes[0], p.nodes[1],
		simtest.Path{Transport: simtest.TCP, From: ip0, To: ip1},
		simtest.Path{Transport: simtest.QUIC, From: ip1, To: ip0})
}

// plain opens a stream that is not labelled on a connection, and returns both ends.
func (p *duo) plain(side int, c network.Conn) (near, far network.Stream) {
	got := make(chan network.Stream, 1)
	p.nodes[1-side].SetStreamHandler(plainID, func(s network.Stream) { got <- s })
	near, err := c.NewStream(p.t.Context())
	require.NoError(p.t, err)
	require.NoError(p.t, multistream.SelectProtoOrFail(plainID, near))
	return near, <-got
}

func (p *duo) conns(side int) []network.Conn {
	return p.nodes[side].Network().ConnsToPeer(p.nodes[1-side].ID())
}

func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// D2: however long it takes, what one end has closed and the other has not read is not
// lost, whichever side decides.
func TestUnreadBytesKeepTheConnection(t *testing.T) {
	for name, writer := range map[string]int{"of the controller": 0, "of its peer": 1} {
		t.Run(name, func(t *testing.T) {
			simtest.Run(t, func(t *testing.T, n *simtest.Net) {
				p := newDuo(t, n)
				tcp, _ := p.join()
				on := tcp
				if writer == 1 {
					on = n.Far(p.nodes[1], tcp)
				}
				near, far := p.plain(writer, on)
				data := bytes.Repeat([]byte("portage "), 10_000)
				_, err := near.Write(data)
				require.NoError(t, err)
				require.NoError(t, near.Close())
				pass(10 * time.Minute)
				require.Len(t, p.conns(0), 2)
				got, err := io.ReadAll(far)
				require.NoError(t, err)
				require.True(t, bytes.Equal(data, got))
				require.NoError(t, far.Close())
				pass(time.Minute)
				require.Len(t, p.conns(0), 1)
				require.Len(t, p.conns(1), 1)
				require.True(t, tcp.IsClosed())
			})
		})
	}
}

// D1: the peer steers by the controller's choice from when it is asked, although its own
// policy is the opposite one.
func TestFollowerSteersAwayFromWhatIsDrained(t *testing.T) {
	simtest.Run(t, func(t *testing.T, n *simtest.Net) {
		opposite, err := policy.Parse("chain(transport(tcp, quic))")
		require.NoError(t, err)
		p := newDuo(t, n, nil, []connmgr.Option{connmgr.WithPolicy(opposite)})
		tcp, quic := p.join()
		near, far := p.plain(0, tcp) // keeps the connection
		defer near.Reset()
		defer far.Reset()
		pass(5 * time.Second)
		require.Len(t, p.conns(0), 2)
		for side := range p.hosts {
			p.hosts[1-side].SetStreamHandler("/test/labelled", func(network.Stream) {})
			s, err := p.hosts[side].NewStream(t.Context(), p.hosts[1-side].ID(), "/test/labelled")
			require.NoError(t, err)
			want := quic
			if side == 1 {
				want = n.Far(p.nodes[1], quic)
			}
			require.Equal(t, want, s.Conn(), "side %d", side)
			require.NoError(t, s.Reset())
		}
	})
}

// D3: streams that somebody opens with the plain host while the connection is being
// drained are waited for, and so are the answers that their openers have not read: at
// whatever moment they come, one after the other.
func TestStreamsAtTheLastMoment(t *testing.T) {
	for side, name := range []string{"of the controller", "of its peer"} {
		t.Run(name, func(t *testing.T) {
			for moment := time.Duration(0); moment < 4*time.Second; moment += 170 * time.Millisecond {
				simtest.Run(t, func(t *testing.T, n *simtest.Net) { lastMoment(t, newDuo(t, n), side, moment) })
			}
		})
	}
}

// lastMoment opens a stream every 700 ms, from the given moment on. The far end answers
// and closes; what opened it reads that only later.
func lastMoment(t *testing.T, p *duo, opener int, moment time.Duration) {
	tcp, _ := p.join()
	on := tcp
	if opener == 1 {
		on = p.net.Far(p.nodes[1], tcp)
	}
	p.nodes[1-opener].SetStreamHandler(plainID, func(s network.Stream) {
		_, _ = s.Write([]byte("answer"))
		_ = s.Close()
	})
	pass(moment)
	var unread []network.Stream
	for range 5 {
		s, err := on.NewStream(t.Context())
		if err != nil { // it was closed before: nothing was opened that could be lost
			require.True(t, tcp.IsClosed())
			break
		}
		if multistream.SelectProtoOrFail(plainID, s) != nil {
			break // its opener has seen an error
		}
		unread = append(unread, s)
		pass(700 * time.Millisecond)
	}
	pass(time.Minute)
	for _, s := range unread {
		got, err := io.ReadAll(s)
		require.NoError(t, err, "at %v", moment)
		require.Equal(t, "answer", string(got))
		require.NoError(t, s.Close())
	}
	pass(time.Minute)
	require.True(t, tcp.IsClosed())
	require.Len(t, p.conns(0), 1)
}

// The close reason that the peer is given.
func TestSupplanted(t *testing.T) {
	simtest.Run(t, func(t *testing.T, n *simtest.Net) {
		p := newDuo(t, n)
		tcp, _ := p.join()
		far := n.Far(p.nodes[1], tcp)
		_, theirs := p.plain(0, tcp)
		_ = theirs
		near, _ := p.plain(1, far)
		readErr := make(chan error, 1)
		go func() {
			_, err := near.Read(make([]byte, 1))
			readErr <- err
		}()
		pass(time.Second)
		require.NoError(t, tcp.CloseWithError(network.ConnSupplanted))
		var connErr *network.ConnError
		require.ErrorAs(t, <-readErr, &connErr)
		require.Equal(t, network.ConnSupplanted, connErr.ErrorCode)
	})
}

// A peer that switches Portage off, its host living on, is one that cannot be asked.
func TestPeerSwitchesOff(t *testing.T) {
	for side, name := range []string{"the controller", "the follower"} {
		t.Run(name, func(t *testing.T) {
			simtest.Run(t, func(t *testing.T, n *simtest.Net) {
				p := newDuo(t, n)
				tcp, _ := p.join()
				near, far := p.plain(0, tcp)
				pass(5 * time.Second)
				require.NoError(t, p.mgrs[side].Close())
				pass(time.Second)
				require.NoError(t, near.Reset())
				require.NoError(t, far.Reset())
				pass(10 * time.Minute)
				require.Len(t, p.conns(0), 1)
				require.True(t, tcp.IsClosed())
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				p.hosts[0].SetStreamHandler("/test/x", func(s network.Stream) { _ = s.Close() })
				_, err := p.hosts[1].NewStream(ctx, p.hosts[0].ID(), "/test/x")
				require.NoError(t, err)
			})
		})
	}
}

func TestCloseTakesLessThanASecond(t *testing.T) {
	for name, before := range map[string]func(p *duo){
		"at once":        func(p *duo) {},
		"settling":       func(p *duo) { p.join() },
		"during a drain": func(p *duo) { tcp, _ := p.join(); p.plain(0, tcp); pass(4 * time.Second) },
		"on a frozen path": func(p *duo) {
			tcp, _ := p.join()
			p.plain(0, tcp)
			p.net.Freeze(ip0, ip1)
			pass(4 * time.Second)
		},
		"after the closing": func(p *duo) { p.join(); pass(time.Minute) },
	} {
		t.Run(name, func(t *testing.T) {
			simtest.Run(t, func(t *testing.T, n *simtest.Net) {
				p := newDuo(t, n)
				before(p)
				for _, m := range p.mgrs {
					start := time.Now()
					require.NoError(t, m.Close())
					require.Less(t, time.Since(start), time.Second)
				}
			})
		})
	}
}
