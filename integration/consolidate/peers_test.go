package consolidate

import (
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/policy"
)

// A peer that migrates streams and has no manager: they are moved from this side, and the
// connection is closed when it has been quiet for long, since that peer cannot be asked.
func TestPeerOnlyMigrates(t *testing.T) {
	eachDecider(t, func(t *testing.T, aDecides bool) {
		Run(t, func(t *testing.T, n *Net) {
			i, j := order(n, aDecides)
			link(n)
			a, b := newMember(t, n, ips(i), policy.Default()), newMigrator(t, n, ips(j))
			wait := connect(t, n, dial(a, b, TCP, 0, 0), dial(b, a, QUIC, 1, 0))
			app := new(traffic)
			go func() {
				time.Sleep(300 * time.Millisecond)
				openBoth(t, app, a, b, 120)
			}()
			wait()
			took := settle(t, 3*time.Minute, a, b)
			require.Greater(t, took, time.Minute, "it cannot be asked")
			app.requireAll(t)
			requireOne(t, a, b)
			_, most := app.allMigrations()
			require.LessOrEqual(t, most, 1)
		})
	})
}

// A peer that has nothing of ours: streams stay where they are until they end, and then
// one connection stays.
func TestPlainPeer(t *testing.T) {
	eachDecider(t, func(t *testing.T, aDecides bool) {
		Run(t, func(t *testing.T, n *Net) {
			i, j := order(n, aDecides)
			link(n)
			a, b := newMember(t, n, ips(i), policy.Default()), newPlain(n, ips(j))
			wait := connect(t, n, dial(a, b, TCP, 0, 0), dial(b, a, QUIC, 1, 0))
			wait()
			app := new(traffic)
			app.accept(a)
			app.accept(b)
			for range 6 {
				app.ping(t.Context(), a.host.NewStream, b, 120, time.Second)
				app.bulk(t.Context(), b.Node.NewStream, a, 120, 1000, time.Second)
			}
			for k, c := range a.conns(b) {
				a.pin(t, c, b, time.Duration(2+k)*time.Minute)
			}
			time.Sleep(119 * time.Second)
			require.Len(t, a.conns(b), 2, "no stream is taken away")
			app.requireAll(t)
			require.EqualValues(t, app.number.Load(), app.plain.Load(), "none has a label")
			settle(t, 5*time.Minute, a, b)
			requireOne(t, a, b)
		})
	})
}

// A manager is closed while its host lives. Its peer, whoever decided before, goes on
// alone: the streams can still move.
func TestManagerClosesBeforeItsHost(t *testing.T) {
	for name, closes := range map[string]time.Duration{
		"long before":              0,
		"in the middle of a round": 10*time.Second + 1300*time.Millisecond,
		"while it drains":          10*time.Second + 3*time.Second,
	} {
		t.Run(name, func(t *testing.T) {
			eachDecider(t, func(t *testing.T, aDecides bool) {
				Run(t, func(t *testing.T, n *Net) {
					a, b := duo(t, n, aDecides, policy.Default(), policy.Default())
					wait := connect(t, n, dial(a, b, TCP, 0, 0), dial(b, a, QUIC, 1, 10*time.Second))
					time.Sleep(time.Second)
					require.Len(t, a.conns(b), 1)
					app := new(traffic)
					openBoth(t, app, a, b, 240)
					time.AfterFunc(closes, func() { _ = b.mgr.Close() })
					wait()
					took := settle(t, 5*time.Minute, a, b)
					t.Logf("settled in %v", took)
					app.requireAll(t)
					requireOne(t, a, b)
					total, most := app.allMigrations()
					require.EqualValues(t, app.number.Load(), total)
					require.Equal(t, 1, most)
				})
			})
		})
	}
}

// Hosts that cannot identify each other know nothing of each other's protocols: their
// streams have no label, and where nothing is known nothing is closed, as on plain hosts.
func TestPeerWithoutIdentify(t *testing.T) {
	for _, who := range []string{"this host", "the other", "both"} {
		t.Run(who, func(t *testing.T) {
			eachDecider(t, func(t *testing.T, aDecides bool) {
				Run(t, func(t *testing.T, n *Net) {
					a, b := duo(t, n, aDecides, policy.Default(), policy.Default())
					for i, m := range []*member{a, b} {
						if who == "both" || i == 0 == (who == "this host") {
							m.Node.RemoveStreamHandler(identify.ID)
							m.Node.RemoveStreamHandler(identify.IDPush)
						}
					}
					connect(t, n, dial(a, b, TCP, 0, 0), dial(b, a, QUIC, 1, 0))()
					app := new(traffic)
					openBoth(t, app, a, b, 60)
					if who == "both" {
						time.Sleep(10 * time.Minute)
						require.Len(t, a.conns(b), 2, explain(a, b))
						require.Len(t, b.conns(a), 2, explain(b, a))
						app.requireAll(t)
						return
					}
					took := settle(t, 10*time.Minute, a, b)
					t.Logf("settled in %v, %d of %d streams plain", took, app.plain.Load(), app.number.Load())
					app.requireAll(t)
					requireOne(t, a, b)
				})
			})
		})
	}
}

// In a private network everything is as elsewhere.
func TestPrivateNetwork(t *testing.T) {
	eachDecider(t, func(t *testing.T, aDecides bool) {
		Run(t, func(t *testing.T, n *Net) {
			i, j := order(n, aDecides)
			link(n)
			key := libp2p.PrivateNetwork(make([]byte, 32))
			p := parse(t, "chain(younger)")
			a, b := newMemberWith(t, n.NewTCPNode, ips(i), p, key), newMemberWith(t, n.NewTCPNode, ips(j), p, key)
			wait := connect(t, n, dial(a, b, TCP, 0, 0), dial(b, a, TCP, 1, 0))
			app := new(traffic)
			exchange(t, app, a, b, 20*time.Second)
			wait()
			require.Len(t, a.conns(b), 2)
			settle(t, 30*time.Second, a, b)
			app.requireAll(t)
			requireOne(t, a, b)
			total, most := app.allMigrations()
			require.Positive(t, total)
			require.Equal(t, 1, most)
		})
	})
}
