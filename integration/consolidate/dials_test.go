package consolidate

import (
	"context"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/policy"
)

// exchange has both hosts do everything that an application does, from the moment on that
// there is a connection: labelled streams from either end that last so long, and plain
// ones that end sooner.
func exchange(t *testing.T, tr *traffic, a, b *member, lasts time.Duration) {
	tr.accept(a)
	tr.accept(b)
	ctx := t.Context()
	for _, p := range [][2]*member{{a, b}, {b, a}} {
		from, to := p[0], p[1]
		tr.work.Go(func() {
			for len(from.conns(to)) == 0 && ctx.Err() == nil {
				time.Sleep(50 * time.Millisecond)
			}
			for k := range 4 {
				tr.ping(ctx, from.host.NewStream, to, int(lasts/time.Second), time.Second)
				tr.bulk(ctx, from.host.NewStream, to, int(lasts/time.Second), 10_000, time.Second)
				tr.bulk(ctx, from.host.NewStream, to, 1, 2_000_000, 0)
				tr.ping(ctx, from.Node.NewStream, to, 3, time.Second)
				tr.post(ctx, from.stray(k), to, 20_000, 7*time.Second)
				tr.post(ctx, from.host.NewStream, to, 20_000, 7*time.Second)
				time.Sleep(150 * time.Millisecond)
			}
			for range lasts / time.Second {
				tr.request(ctx, from.host.NewStream, to, 5_000)
				time.Sleep(time.Second)
			}
		})
	}
}

// Two hosts that dial each other at once, each by up to four ways, keep one connection,
// the same one at both ends, whatever either of them likes best.
func TestSimultaneousDials(t *testing.T) {
	for count := 2; count <= 8; count++ {
		for _, liking := range []struct{ name, a, b string }{
			{"one policy", "default", "default"},
			{"opposite policies", "chain(transport(quic, tcp), younger)", "chain(transport(tcp, quic), older)"},
			{"opposite directions", "chain(direction(outbound, inbound))", "chain(direction(outbound, inbound))"},
		} {
			t.Run(fmt.Sprintf("%d connections, %s", count, liking.name), func(t *testing.T) {
				Run(t, func(t *testing.T, n *Net) {
					a, b := duo(t, n, true, parse(t, liking.a), parse(t, liking.b))
					var attempts []Attempt
					for i := range count {
						from, to := a, b
						if i%2 == 1 {
							from, to = b, a
						}
						attempts = append(attempts, dial(from, to, []Transport{QUIC, TCP}[i/2%2], i/4, 0))
					}
					wait := connect(t, n, attempts...)
					tr := new(traffic)
					exchange(t, tr, a, b, 20*time.Second)
					wait()
					require.Len(t, a.conns(b), count)
					took := settle(t, 30*time.Second, a, b)
					tr.requireAll(t)
					requireOne(t, a, b)
					total, most := tr.allMigrations()
					t.Logf("settled in %v; %d streams, %d migrations, at most %d of one stream", took, tr.number.Load(), total, most)
					// The second one is where another connection has more of the streams that
					// cannot move, when those that were on the first have ended.
					require.LessOrEqual(t, most, 2, "migrations of one stream")
				})
			})
		}
	}
}

// One host dials another at all of its addresses at once, and all dials succeed.
func TestSeveralAddressesAtOnce(t *testing.T) {
	for _, tc := range []struct {
		name string
		ways []Path // From and To are not used
		to   []int
	}{
		{"TCP and QUIC", []Path{{Transport: TCP}, {Transport: QUIC}}, []int{0, 0}},
		{"QUIC at two interfaces", []Path{{Transport: QUIC}, {Transport: QUIC}}, []int{0, 1}},
		{"TCP at two interfaces", []Path{{Transport: TCP}, {Transport: TCP}}, []int{0, 1}},
		{"TCP and QUIC at two interfaces", []Path{{Transport: TCP}, {Transport: QUIC}, {Transport: TCP}, {Transport: QUIC}}, []int{0, 0, 1, 1}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			eachDecider(t, func(t *testing.T, aDecides bool) {
				Run(t, func(t *testing.T, n *Net) {
					a, b := duo(t, n, aDecides, policy.Default(), policy.Default())
					var attempts []Attempt
					for i, w := range tc.ways {
						attempts = append(attempts, dial(a, b, w.Transport, tc.to[i], 0))
					}
					wait := connect(t, n, attempts...)
					tr := new(traffic)
					exchange(t, tr, a, b, 20*time.Second)
					wait()
					require.Len(t, a.conns(b), len(tc.ways))
					settle(t, 30*time.Second, a, b)
					tr.requireAll(t)
					requireOne(t, a, b)
				})
			})
		})
	}
}

const echoID protocol.ID = "/test/echo/1.0.0"

// both is both ends of a stream that b echoes nothing on: each end is the test's.
type both [2]network.Stream

// open opens a labelled stream to the other, and returns both ends.
func (m *member) open(t *testing.T, other *member) both {
	t.Helper()
	accepted := make(chan network.Stream, 1)
	other.Node.SetStreamHandler(echoID, func(s network.Stream) {
		if _, err := io.ReadFull(s, make([]byte, 1)); err == nil {
			accepted <- s
		}
	})
	ctx, cancel := context.WithTimeout(network.WithAllowLimitedConn(t.Context(), "test"), 10*time.Second)
	defer cancel()
	s, err := m.host.NewStream(ctx, other.ID(), echoID)
	require.NoError(t, err)
	_, err = s.Write([]byte{'!'})
	require.NoError(t, err)
	select {
	case far := <-accepted:
		return both{s, far}
	case <-ctx.Done():
		t.Fatalf("a new stream goes nowhere, on %s\n%s", s.Conn().RemoteMultiaddr(), explain(m, other))
		return both{}
	}
}

// works sends a word in both directions, and says what came of that.
func (s both) works(wait time.Duration) error {
	for i := range s {
		word := fmt.Sprintf("word %d", i)
		if _, err := io.WriteString(s[i], word); err != nil {
			return fmt.Errorf("end %d: %w", i, err)
		}
		buf := make([]byte, len(word))
		timer := time.AfterFunc(wait, func() { _ = s[1-i].Reset() })
		_, err := io.ReadFull(s[1-i], buf)
		timer.Stop()
		if err != nil {
			return fmt.Errorf("end %d: %w", 1-i, err)
		}
		if string(buf) != word {
			return errContent
		}
	}
	return nil
}

// A peer loses its path, and is back over another one before the old connection is
// noticed dead. The old one is what policies like best here (QUIC before TCP, and older),
// and it must not win: new streams would go nowhere, and the one that works would be
// closed.
func TestReconnectBeforeOldIsNoticedDead(t *testing.T) {
	for _, tc := range []struct {
		name     string
		old, new Transport
		drops    bool // the peer closes the old connection, which is not heard
	}{
		{"QUIC then TCP", QUIC, TCP, false},
		{"TCP then QUIC", TCP, QUIC, false},
		{"QUIC then QUIC", QUIC, QUIC, false},
		{"TCP then TCP", TCP, TCP, false},
		{"QUIC then TCP, dropped", QUIC, TCP, true},
		{"TCP then QUIC, dropped", TCP, QUIC, true},
		{"QUIC then QUIC, dropped", QUIC, QUIC, true},
		{"TCP then TCP, dropped", TCP, TCP, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			eachDecider(t, func(t *testing.T, aDecides bool) {
				Run(t, func(t *testing.T, n *Net) {
					a, b := duo(t, n, aDecides, parse(t, "chain(direct, transport(quic, tcp), older)"), parse(t, "chain(direct, transport(quic, tcp), older)"))
					const back = 10 * time.Second
					wait := connect(t, n, dial(b, a, tc.old, 0, 0), dial(b, a, tc.new, 1, back))
					tr := new(traffic)
					tr.accept(a)
					tr.accept(b)
					time.Sleep(time.Second)
					require.Len(t, a.conns(b), 1)
					idle := []both{a.open(t, b), b.open(t, a)}
					ctx := t.Context()
					tr.ping(ctx, a.host.NewStream, b, 60, time.Second)
					tr.ping(ctx, b.host.NewStream, a, 60, time.Second)
					tr.bulk(ctx, a.host.NewStream, b, 60, 1000, time.Second)
					tr.bulk(ctx, b.host.NewStream, a, 60, 1000, time.Second)
					time.Sleep(4*time.Second + 500*time.Millisecond)
					n.Freeze(a.IPs()[0], b.IPs()[0])
					old := a.conns(b)[0]
					if tc.drops {
						require.NoError(t, b.conns(a)[0].Close())
					}
					wait()
					live := [2]network.Conn{newest(a, b), newest(b, a)}
					require.NotEqual(t, old, live[0])
					require.False(t, old.IsClosed(), "it has not been noticed yet")

					// The settle delay, and a ping that is not answered.
					time.Sleep(time.Second + 3*time.Second)
					for range 60 {
						for i, m := range []*member{a, b} {
							other := []*member{b, a}[i]
							s := m.open(t, other)
							require.Equal(t, live[i], s[0].Conn(), "a new stream goes to the dead connection\n%s", explain(m, other))
							require.NoError(t, s.works(time.Second))
							require.NoError(t, s[0].Close())
							require.NoError(t, s[1].Close())
							require.False(t, live[i].IsClosed(), "the one that works has been closed")
						}
						time.Sleep(time.Second)
					}
					for i, s := range idle {
						err := s.works(time.Second)
						if tc.drops {
							// Whoever closes a connection ends the streams on it.
							require.Error(t, err, "stream %d was idle when its connection was closed", i)
							continue
						}
						require.NoError(t, err, "stream %d was idle, and has moved", i)
					}
					failed := tr.requireHonest(t)
					t.Logf("%d of %d streams with something under way have failed", failed, tr.number.Load())
					require.False(t, live[0].IsClosed() || live[1].IsClosed())
					require.Equal(t, live[0], requireOne(t, a, b))
				})
			})
		})
	}
}

// newest returns m's youngest connection to the other.
func newest(m, other *member) (c network.Conn) {
	for _, d := range m.conns(other) {
		if c == nil || d.Stat().Opened.After(c.Stat().Opened) {
			c = d
		}
	}
	return c
}
