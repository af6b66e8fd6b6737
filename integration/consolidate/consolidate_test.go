// Package consolidate tests whole hosts with a connection manager of ours, in virtual
// time: what becomes of their connections, and that no stream suffers from it.
package consolidate

import (
	"fmt"
	"io"
	"slices"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	coreconnmgr "github.com/libp2p/go-libp2p/core/connmgr"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	msmux "github.com/multiformats/go-multistream"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/connmgr"
	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/migrate"
	"github.com/go-portage/portage/policy"
)

// member is a host with a manager. Node is the plain host, whose streams have no label.
type member struct {
	*Node
	mgr  *connmgr.Manager // nil: none
	host *migrate.Host    // nil: not wrapped
}

// ips are the addresses of a two-homed host; i tells hosts apart.
func ips(i int) []string { return []string{fmt.Sprintf("1.0.%d.1", i), fmt.Sprintf("1.0.%d.2", i)} }

// unlimited takes away the resource manager's limits, such as eight connections from
// one IP.
func unlimited() libp2p.Option { return libp2p.ResourceManager(&network.NullResourceManager{}) }

// newMember returns a host with a manager, wrapped.
func newMember(t *testing.T, n *Net, ips []string, p policy.Policy, opts ...libp2p.Option) *member {
	t.Helper()
	return newMemberWith(t, n.NewNode, ips, p, opts...)
}

func newMemberWith(t *testing.T, newNode func([]string, ...libp2p.Option) *Node, ips []string, p policy.Policy, opts ...libp2p.Option) *member {
	t.Helper()
	return newManaged(t, newNode, ips, []connmgr.Option{connmgr.WithPolicy(p)}, opts...)
}

func newManaged(t *testing.T, newNode func([]string, ...libp2p.Option) *Node, ips []string, how []connmgr.Option, opts ...libp2p.Option) *member {
	t.Helper()
	mgr, err := connmgr.New(coreconnmgr.NullConnMgr{}, how...)
	require.NoError(t, err)
	m := &member{Node: newNode(ips, append([]libp2p.Option{libp2p.ConnectionManager(mgr), unlimited()}, opts...)...), mgr: mgr}
	h, err := mgr.Wrap(m.Node.Host)
	require.NoError(t, err)
	m.host = h
	t.Cleanup(func() { _ = m.host.Close() })
	m.serve()
	return m
}

// newMigrator returns a host that migrates streams, and has no manager.
func newMigrator(t *testing.T, n *Net, ips []string, opts ...libp2p.Option) *member {
	t.Helper()
	m := &member{Node: n.NewNode(ips, append([]libp2p.Option{unlimited()}, opts...)...)}
	h, err := migrate.Wrap(m.Node.Host)
	require.NoError(t, err)
	m.host = h
	t.Cleanup(func() { _ = h.Close() })
	m.serve()
	return m
}

// newPlain returns a host as go-libp2p makes it.
func newPlain(n *Net, ips []string, opts ...libp2p.Option) *member {
	m := &member{Node: n.NewNode(ips, append([]libp2p.Option{unlimited()}, opts...)...)}
	m.serve()
	return m
}

// conns returns the open connections of m to other.
func (m *member) conns(other *member) []network.Conn {
	return slices.DeleteFunc(m.Network().ConnsToPeer(other.ID()), network.Conn.IsClosed)
}

const whichID protocol.ID = "/test/which/1.0.0"

// serveWhich answers which connection a stream has come on.
func (m *member) serveWhich() {
	m.Node.SetStreamHandler(whichID, func(s network.Stream) {
		_, _ = io.WriteString(s, s.Conn().ID())
		_ = s.Close()
	})
}

// far returns the other end of a connection to other, which has to work.
func (m *member) far(t *testing.T, c network.Conn, other *member) network.Conn {
	t.Helper()
	s, err := c.NewStream(network.WithAllowLimitedConn(t.Context(), "test"))
	require.NoError(t, err)
	defer s.Close()
	require.NoError(t, msmux.SelectProtoOrFail(whichID, s))
	id, err := io.ReadAll(s)
	require.NoError(t, err)
	for _, d := range other.Network().ConnsToPeer(m.ID()) {
		if d.ID() == string(id) {
			return d
		}
	}
	t.Fatalf("%s is not a connection of the peer", id)
	return nil
}

// requireOne checks that a and b have one connection, and that it is the same one. It
// returns a's side.
func requireOne(t *testing.T, a, b *member) network.Conn {
	t.Helper()
	near, far := a.conns(b), b.conns(a)
	require.Len(t, near, 1, explain(a, b))
	require.Len(t, far, 1, explain(b, a))
	require.Equal(t, far[0], a.far(t, near[0], b), "the ends have kept different connections")
	return near[0]
}

// explain says what m's manager thinks of the other.
func explain(m, other *member) string {
	if m.mgr == nil {
		return "it has no manager"
	}
	return m.mgr.Explain(other.ID()).String()
}

// settle waits until all pairs among members have one connection, and returns how long
// that took.
func settle(t *testing.T, limit time.Duration, members ...*member) time.Duration {
	t.Helper()
	start := time.Now()
	for {
		a, b := unsettled(members)
		if a == nil {
			return time.Since(start)
		}
		if time.Since(start) >= limit {
			t.Fatalf("%d and %d connections after %v\n%s\n\nthe other side:\n%s", len(a.conns(b)), len(b.conns(a)), limit, explain(a, b), explain(b, a))
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// unsettled returns a pair that has not one connection.
func unsettled(members []*member) (a, b *member) {
	for i, a := range members {
		for _, b := range members[:i] {
			if len(a.conns(b)) != 1 || len(b.conns(a)) != 1 {
				return a, b
			}
		}
	}
	return nil, nil
}

// duo returns two hosts with managers, of which a decides if that is wanted. Between
// their first IPs it takes 10 ms one way, between their second ones 25 ms.
func duo(t *testing.T, n *Net, aDecides bool, pa, pb policy.Policy) (a, b *member) {
	t.Helper()
	i, j := order(n, aDecides)
	link(n)
	return newMember(t, n, ips(i), pa), newMember(t, n, ips(j), pb)
}

// link sets the latencies between the hosts at ips(1) and ips(2).
func link(n *Net) {
	for k, oneWay := range []time.Duration{10 * time.Millisecond, 25 * time.Millisecond} {
		n.SetLatency(ips(1)[k], ips(2)[k], oneWay)
	}
}

// order returns 1 and 2 in the order of the peer IDs of hosts with these ips, or the
// other way round.
func order(n *Net, ascending bool) (i, j int) {
	if (n.ID(ips(1)[0]) < n.ID(ips(2)[0])) == ascending {
		return 1, 2
	}
	return 2, 1
}

// dial is an attempt from a to b over the path between their k-th IPs.
func dial(a, b *member, tr Transport, k int, after time.Duration) Attempt {
	return Attempt{From: a.Node, To: b.Node, Path: Path{Transport: tr, From: a.IPs()[k], To: b.IPs()[k]}, After: after}
}

// connect makes all attempts in the background. The returned function waits until both
// ends have all connections.
func connect(t *testing.T, n *Net, attempts ...Attempt) (wait func()) {
	done := make(chan []error, 1)
	go func() { done <- n.DialTogether(attempts...) }()
	return func() {
		t.Helper()
		for i, err := range <-done {
			require.NoError(t, err, attempts[i].Path.String())
		}
		time.Sleep(200 * time.Millisecond) // the acceptor's end comes last
	}
}

// eachDecider runs f twice: a decides, or b does.
func eachDecider(t *testing.T, f func(t *testing.T, aDecides bool)) {
	for _, aDecides := range []bool{true, false} {
		name := "this side decides"
		if !aDecides {
			name = "the other side decides"
		}
		t.Run(name, func(t *testing.T) { f(t, aDecides) })
	}
}

func parse(t *testing.T, text string) policy.Policy {
	t.Helper()
	p, err := policy.Parse(text)
	require.NoError(t, err)
	return p
}
