package consolidate

import (
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/policy"
)

// Connections that change while the managers are at work.

// A better connection comes, the streams begin to move there, and it dies: at whatever
// moment, and however. The old one stays open, since it is the last. What had not begun to
// move is where it was. What had either works or has failed, at both ends.
func TestBetterConnectionDies(t *testing.T) {
	const (
		oneWay = 25 * time.Millisecond // of the better connection
		step   = 12 * time.Millisecond
	)
	for _, tc := range []struct {
		name   string
		better Transport
		die    func(n *Net, a, b *member)
	}{
		{"QUIC, frozen", QUIC, func(n *Net, a, b *member) { n.Freeze(a.IPs()[1], b.IPs()[1]) }},
		{"QUIC, closed by this side", QUIC, func(n *Net, a, b *member) { _ = newest(a, b).Close() }},
		{"QUIC, closed by the other side", QUIC, func(n *Net, a, b *member) { _ = newest(b, a).Close() }},
		{"TCP, frozen", TCP, func(n *Net, a, b *member) { n.Freeze(a.IPs()[1], b.IPs()[1]) }},
		{"TCP, severed", TCP, func(n *Net, a, b *member) { n.Sever(a.IPs()[1], b.IPs()[1]) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			eachDecider(t, func(t *testing.T, aDecides bool) {
				for when := -2 * step; when <= 5*oneWay; when += step {
					Run(t, func(t *testing.T, n *Net) {
						p := parse(t, "chain(younger)")
						a, b := duo(t, n, aDecides, p, p)
						old := QUIC
						if tc.better == QUIC {
							old = TCP
						}
						wait := connect(t, n, dial(a, b, old, 0, 0), dial(b, a, tc.better, 1, 5*time.Second))
						time.Sleep(time.Second)
						var streams []both
						for range 3 {
							streams = append(streams, a.open(t, b), b.open(t, a))
						}
						last := [2]network.Conn{a.conns(b)[0], b.conns(a)[0]}
						decider, follower := a, b
						if !aDecides {
							decider, follower = b, a
						}
						for len(decider.conns(follower)) < 2 {
							time.Sleep(time.Millisecond)
						}
						time.Sleep(time.Second + when) // the settle delay, and then
						tc.die(n, a, b)
						time.Sleep(3 * time.Minute)
						wait()

						moved := 0
						for i, c := range last {
							require.False(t, c.IsClosed(), "at %v: the last connection has been closed at end %d", when, i)
						}
						require.Equal(t, last[0], requireOne(t, a, b))
						for i, s := range streams {
							if err := s.works(time.Second); err == nil {
								end := i % 2 // opened by a, or by b
								require.Equal(t, last[end], s[0].Conn())
								require.Equal(t, last[1-end], s[1].Conn())
								continue
							}
							moved++
							for end := range s {
								_, err := s[end].Read(make([]byte, 1))
								require.Error(t, err, "stream %d, end %d", i, end)
								require.NotEqual(t, io.EOF, err, "stream %d, end %d: nobody has closed it", i, end)
							}
						}
						if when < 0 {
							require.Zero(t, moved, "at %v: no stream had begun to move", when)
						}
						s := a.open(t, b)
						require.NoError(t, s.works(time.Second))
					})
				}
			})
		})
	}
}

// The winner's path goes dead, at whatever moment of a consolidation. The loser is not
// closed any more, but for what was decided within the last round trips, and is what is
// left in the end.
func TestWinnerFreezes(t *testing.T) {
	const decided = 200 * time.Millisecond // a ping on the one, a question on the other
	for _, best := range []Transport{QUIC, TCP} {
		t.Run(string(best), func(t *testing.T) {
			eachDecider(t, func(t *testing.T, aDecides bool) {
				kept, closed := 0, 0
				for when := time.Duration(0); when < 7*time.Second; when += 130 * time.Millisecond {
					Run(t, func(t *testing.T, n *Net) {
						p := parse(t, "chain(prefer(local cidr 1.0.1.2/32, local cidr 1.0.2.2/32))")
						a, b := duo(t, n, aDecides, p, p)
						other := QUIC
						if best == QUIC {
							other = TCP
						}
						connect(t, n, dial(a, b, other, 0, 0), dial(b, a, best, 1, 0))()
						var loser network.Conn
						for _, c := range a.conns(b) {
							if strings.Contains(c.LocalMultiaddr().String(), a.IPs()[0]) {
								loser = c
							}
						}
						time.Sleep(when)
						n.Freeze(a.IPs()[1], b.IPs()[1])
						time.Sleep(decided)
						if loser.IsClosed() {
							closed++
							return
						}
						kept++
						time.Sleep(3 * time.Minute)
						require.False(t, loser.IsClosed(), "at %v: the one that works has been closed for the dead one", when)
						require.Equal(t, loser, requireOne(t, a, b))
						require.NoError(t, a.open(t, b).works(time.Second))
						require.NoError(t, b.open(t, a).works(time.Second))
					})
				}
				t.Logf("kept in %d cases; closed before in %d", kept, closed)
				require.Positive(t, kept)
				require.Positive(t, closed, "a consolidation takes less time than this looks at")
			})
		})
	}
}

// A peer is killed, and is back under the same ID before its connection is noticed dead.
// It knows nothing of the old streams.
func TestPeerRestarts(t *testing.T) {
	for _, tc := range []struct{ old, new Transport }{{QUIC, TCP}, {TCP, QUIC}, {QUIC, QUIC}, {TCP, TCP}} {
		t.Run(fmt.Sprintf("%s then %s", tc.old, tc.new), func(t *testing.T) {
			eachDecider(t, func(t *testing.T, aDecides bool) {
				Run(t, func(t *testing.T, n *Net) {
					a, b := duo(t, n, aDecides, policy.Default(), policy.Default())
					connect(t, n, dial(b, a, tc.old, 0, 0))()
					streams := []both{a.open(t, b), b.open(t, a)}
					old := a.conns(b)[0]
					n.Freeze(a.IPs()[0], b.IPs()[0])
					b.Stop()
					time.Sleep(5 * time.Second)
					require.False(t, old.IsClosed(), "it has not been noticed yet")

					b = newMember(t, n, b.IPs(), policy.Default())
					connect(t, n, dial(b, a, tc.new, 1, 0))()
					live := newest(a, b)
					time.Sleep(time.Second + 3*time.Second) // the settle delay, and a ping
					for range 60 {
						for _, p := range [][2]*member{{a, b}, {b, a}} {
							s := p[0].open(t, p[1])
							require.NoError(t, s.works(time.Second))
							require.NoError(t, s[0].Close())
							require.NoError(t, s[1].Close())
						}
						require.False(t, live.IsClosed(), "the one that works has been closed")
						time.Sleep(time.Second)
					}
					for i, s := range streams {
						_, err := s[i].Read(make([]byte, 1)) // i is a's end
						require.Error(t, err)
						require.NotEqual(t, io.EOF, err, "nobody has closed it")
					}
					require.Equal(t, live, requireOne(t, a, b))
				})
			})
		})
	}
}

// Connections come and are closed, by either end or by the network, at any time, but never
// the last one: so there always is one, and in the end exactly one. Streams fail only
// together with their connection, and never silently.
//
// The winner is broken only at both ends at once. Were one end to close it, the other could
// close the last loser before it hears of that, and nobody could help it.
func TestConnectionsComeAndGo(t *testing.T) {
	const interfaces = 10
	for seed := *seedFlag; seed < *seedFlag+uint64(*changesFlag); seed++ {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			Run(t, func(t *testing.T, n *Net) {
				r := rand.New(rand.NewPCG(seed, 0))
				var addrs [2][]string
				for i := range addrs {
					for k := range interfaces {
						addrs[i] = append(addrs[i], fmt.Sprintf("1.%d.%d.%d", seed%256, i, k+1))
					}
				}
				pick := func() policy.Policy { return policies[r.IntN(len(policies))] }
				a, b := newMember(t, n, addrs[0], pick()), newMember(t, n, addrs[1], pick())
				var attempts []Attempt
				for k := range interfaces {
					n.SetLatency(addrs[0][k], addrs[1][k], time.Duration(1+r.IntN(80))*time.Millisecond)
					for i, p := range [][2]*member{{a, b}, {b, a}} {
						after := time.Duration(r.IntN(12_000)) * time.Millisecond
						if k == 0 && i == 0 {
							after = 0
						}
						attempts = append(attempts, dial(p[0], p[1], []Transport{TCP, QUIC}[r.IntN(2)], k, after))
					}
				}
				wait := connect(t, n, attempts...)
				app := new(traffic)
				app.accept(a)
				app.accept(b)
				for len(a.conns(b)) == 0 || len(b.conns(a)) == 0 {
					time.Sleep(time.Millisecond)
				}
				go func() {
					for t.Context().Err() == nil {
						if len(a.conns(b)) == 0 && len(b.conns(a)) == 0 {
							t.Error("no connection is left")
							return
						}
						time.Sleep(time.Millisecond)
					}
				}()
				begun := time.Now()
				kills := 0
				for time.Since(begun) < 20*time.Second {
					time.Sleep(time.Duration(200+r.IntN(2500)) * time.Millisecond)
					near, far := a.conns(b), b.conns(a)
					for i, p := range [][2]*member{{a, b}, {b, a}} {
						if len(near) > 0 && len(far) > 0 {
							app.ping(t.Context(), p[0].host.NewStream, p[1], 5, time.Second)
							app.request(t.Context(), p[0].host.NewStream, p[1], 1000*(i+1))
						}
					}
					if len(near) < 2 || len(far) < 2 {
						continue
					}
					kills++
					switch c, d := near[r.IntN(len(near))], far[r.IntN(len(far))]; r.IntN(3) {
					case 0:
						if !wins(c, a, b) {
							_ = c.Close()
						}
					case 1:
						if !wins(d, b, a) {
							_ = d.Close()
						}
					case 2:
						on := interfaceOf(d)
						same := slices.DeleteFunc(far, func(e network.Conn) bool { return interfaceOf(e) != on })
						if len(same) < len(near) { // it breaks all of them
							n.Sever(on[0], on[1])
						}
					}
				}
				wait()
				took := settle(t, 2*time.Minute, a, b)
				failed := app.requireHonest(t)
				t.Logf("%d attempts, %d connections closed from outside; settled after another %v; %d of %d streams failed", len(attempts), kills, took, failed, app.number.Load())
				requireOne(t, a, b)
			})
		})
	}
}

// wins says whether c, a connection of m, is the winner of either end.
func wins(c network.Conn, m, other *member) bool {
	for _, e := range m.mgr.Explain(other.ID()).Conns {
		if e.Winner && e.Conn.ID == c.ID() {
			return true
		}
	}
	for _, e := range other.mgr.Explain(m.ID()).Conns {
		if e.Winner && e.Conn.Remote.Equal(c.LocalMultiaddr()) {
			return true
		}
	}
	return false
}

// interfaceOf returns the IPs of a connection over TCP.
func interfaceOf(c network.Conn) (ips [2]string) {
	if c.ConnState().Transport == "quic-v1" {
		return ips
	}
	for i, m := range []ma.Multiaddr{c.LocalMultiaddr(), c.RemoteMultiaddr()} {
		ips[i], _ = m.ValueForProtocol(ma.P_IP4)
	}
	return ips
}
