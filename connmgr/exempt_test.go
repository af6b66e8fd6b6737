package connmgr

import (
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	basic "github.com/libp2p/go-libp2p/p2p/net/connmgr"
	"github.com/stretchr/testify/require"
)

func TestExemptPeer(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher, WithExempt(ExemptPeer(higher)))
		relay := w.connectLimited()
		relay.open(1)
		direct := w.connect(quicAddr)
		w.pass(time.Hour)
		require.Empty(t, w.mover.made())
		require.False(t, relay.IsClosed() || direct.IsClosed())
		require.Nil(t, w.m.steer.choose(t.Context(), higher), "the swarm chooses")
		require.Equal(t, "the peer is exempt", w.m.Explain(higher).State)
		_, err := w.m.Consolidate(t.Context(), higher)
		require.ErrorIs(t, err, ErrExempt)

		other := higher + "2"
		w.net.identify(other, DrainID)
		w.net.connect(other, relayAddr, true).open(1)
		w.net.connect(other, quicAddr, false)
		w.pass(time.Minute)
		require.Len(t, w.net.ConnsToPeer(other), 1, "another peer is not")
	})
}

func TestExemptTag(t *testing.T) {
	for name, tag := range map[string]func(m *Manager){
		"protected": func(m *Manager) { m.Protect(higher, "keep") },
		"tagged":    func(m *Manager) { m.TagPeer(higher, "keep", 1) },
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, higher, WithExempt(ExemptTag("keep")))
				inner, err := basic.NewConnManager(10, 20)
				require.NoError(t, err)
				defer inner.Close()
				w.setInner(inner)
				tag(w.m)
				tcp := w.connect(tcpAddr)
				w.connect(quicAddr)
				w.pass(time.Hour)
				require.False(t, tcp.IsClosed())
				require.Equal(t, `peers with the tag "keep" are exempt`, w.m.Explain(higher).State)
				w.m.Unprotect(higher, "keep")
				w.m.UntagPeer(higher, "keep")
				w.pass(time.Minute)
				require.True(t, tcp.pruned(), "it is looked up anew")
			})
		})
	}
}

func TestExemptConn(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher, WithExempt(ExemptConn("backup path", func(c network.Conn) bool {
			return c.RemoteMultiaddr().String() == tcpAddr
		})))
		relay := w.connectLimited()
		relay.open(1)
		tcp := w.connect(tcpAddr)
		tcp.open(1)
		quic := w.connect(quicAddr)
		w.pass(time.Hour)
		require.True(t, relay.pruned())
		require.False(t, tcp.IsClosed())
		require.Equal(t, 1, tcp.count(), "nothing is moved away from it")
		require.Equal(t, 1, quic.count())
		require.Equal(t, "kept: backup path", w.m.Explain(higher).Conns[1].State)
		require.Zero(t, tcp.timesAsked())
	})
}

func TestExemptionsAreChecked(t *testing.T) {
	for name, e := range map[string]Exemption{
		"want a reason and a function": ExemptConn("", func(network.Conn) bool { return true }),
		"want a reason":                ExemptConn("why", nil),
		"no peer is given":             ExemptPeer(),
		"exempt tag: it is empty":      ExemptTag(""),
		"make it with ExemptPeer":      {},
	} {
		_, err := New(nil, WithExempt(e))
		require.ErrorContains(t, err, name)
	}
	m, err := New(nil, WithExempt(ExemptPeer(peer.ID("a"))), WithExempt(ExemptTag("b")))
	require.NoError(t, err)
	require.Len(t, m.cfg.exempt, 2, "they add up")
	require.NoError(t, m.Close())
}

// A protected peer is protected from trimming: its duplicates may go, its last connection
// never.
func TestProtectedPeer(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		inner, err := basic.NewConnManager(10, 20)
		require.NoError(t, err)
		defer inner.Close()
		w.setInner(inner)
		w.m.Protect(higher, "")
		quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
		w.pass(time.Hour)
		require.True(t, tcp.pruned())
		require.False(t, quic.IsClosed())
		require.True(t, w.m.IsProtected(higher, ""))
	})
}
