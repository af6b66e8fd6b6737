package consolidate

import (
	"fmt"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/policy"
)

const ipRelay = "1.0.9.1"

// relayed returns two hosts and a relay, 20 ms away from both.
func relayed(t *testing.T, n *Net, aDecides, limited bool) (a, b *member, r *Node) {
	t.Helper()
	a, b = duo(t, n, aDecides, policy.Default(), policy.Default())
	for _, m := range []*member{a, b} {
		n.SetLatency(m.IPs()[0], ipRelay, 20*time.Millisecond)
	}
	if limited {
		return a, b, n.NewRelay(ipRelay)
	}
	return a, b, n.NewRelay(ipRelay, relay.WithInfiniteLimits())
}

// eachRelay runs f with a relay that cuts a connection after two minutes or 128 KiB, and
// with one that does not.
func eachRelay(t *testing.T, f func(t *testing.T, aDecides, limited bool)) {
	for _, limited := range []bool{true, false} {
		t.Run(fmt.Sprintf("limited %v", limited), func(t *testing.T) {
			eachDecider(t, func(t *testing.T, aDecides bool) { f(t, aDecides, limited) })
		})
	}
}

// offRelay is how long it may take until only the direct connection is left: at once where
// the relay limits the other one, and else once the direct one has proved itself.
func offRelay(limited bool) time.Duration {
	if limited {
		return 10 * time.Second
	}
	return 45 * time.Second
}

// Streams that were opened through a relay go on over the direct connection, for longer
// than the relay would have let them.
func TestRelayedThenDirect(t *testing.T) {
	for _, tr := range []Transport{TCP, QUIC} {
		t.Run(string(tr), func(t *testing.T) {
			eachRelay(t, func(t *testing.T, aDecides, limited bool) {
				Run(t, func(t *testing.T, n *Net) {
					a, b, r := relayed(t, n, aDecides, limited)
					through := n.DialRelayed(a.Node, b.Node, r, tr)
					require.Equal(t, limited, through.Stat().Limited)
					app := new(traffic)
					openBoth(t, app, a, b, 300)
					time.Sleep(5 * time.Second)
					total, _ := app.allMigrations()
					require.Zero(t, total)
					direct := n.Dial(a.Node, b.Node, Path{Transport: tr, From: a.IPs()[1], To: b.IPs()[1]})
					settle(t, offRelay(limited), a, b)
					require.True(t, through.IsClosed())
					app.requireAll(t)
					require.Equal(t, direct, requireOne(t, a, b))
					total, most := app.allMigrations()
					require.EqualValues(t, app.number.Load(), total, "each of them once")
					require.Equal(t, 1, most)
				})
			})
		})
	}
}

// openBoth has both ends open labelled streams that last so many seconds.
func openBoth(t *testing.T, app *traffic, a, b *member, seconds int) {
	t.Helper()
	app.accept(a)
	app.accept(b)
	for _, p := range [][2]*member{{a, b}, {b, a}} {
		for range 3 {
			app.ping(t.Context(), p[0].host.NewStream, p[1], seconds, time.Second)
			app.bulk(t.Context(), p[0].host.NewStream, p[1], seconds, 100, time.Second)
		}
	}
}

// Both have dialled through the relay at once, and then there is a direct connection.
func TestTwoRelayedThenDirect(t *testing.T) {
	eachRelay(t, func(t *testing.T, aDecides, limited bool) {
		Run(t, func(t *testing.T, n *Net) {
			a, b, r := relayed(t, n, aDecides, limited)
			n.JoinRelayed(a.Node, b.Node, r, QUIC)
			app := new(traffic)
			openBoth(t, app, a, b, 60)
			direct := n.Dial(a.Node, b.Node, Path{Transport: QUIC, From: a.IPs()[1], To: b.IPs()[1]})
			settle(t, offRelay(limited), a, b)
			app.requireAll(t)
			require.Equal(t, direct, requireOne(t, a, b))
			_, most := app.allMigrations()
			require.LessOrEqual(t, most, 2)
		})
	})
}

// Without a direct connection one of the relayed ones is kept, but where the relay limits
// them: then each has a budget of its own, and both stay.
func TestTwoRelayed(t *testing.T) {
	eachRelay(t, func(t *testing.T, aDecides, limited bool) {
		Run(t, func(t *testing.T, n *Net) {
			a, b, r := relayed(t, n, aDecides, limited)
			n.JoinRelayed(a.Node, b.Node, r, QUIC)
			app := new(traffic)
			openBoth(t, app, a, b, 30)
			if limited {
				time.Sleep(45 * time.Second)
				require.Len(t, a.conns(b), 2)
				require.Len(t, b.conns(a), 2)
			} else {
				settle(t, 45*time.Second, a, b)
				requireOne(t, a, b)
			}
			app.requireAll(t)
			total, most := app.allMigrations()
			require.LessOrEqual(t, most, 1)
			if limited {
				require.Zero(t, total)
			}
		})
	})
}
