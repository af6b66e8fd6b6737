package consolidate

import (
	"math"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	msmux "github.com/multiformats/go-multistream"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/simtest"
)

// pin opens a stream on c that nobody can move, and ends it after a while.
func (m *member) pin(t *testing.T, c network.Conn, other *member, lasts time.Duration) {
	t.Helper()
	other.Node.SetStreamHandler(pinID, func(s network.Stream) {
		_, _ = s.Read(make([]byte, 1))
		_ = s.Close()
	})
	s, err := c.NewStream(network.WithAllowLimitedConn(t.Context(), "test"))
	require.NoError(t, err)
	require.NoError(t, msmux.SelectProtoOrFail(pinID, s))
	time.AfterFunc(lasts, func() { _ = s.Close() })
}

const pinID = "/test/pin/1.0.0"

// disagreements are policies of two hosts that never agree.
var disagreements = []struct{ name, a, b string }{
	{"transports", "chain(transport(quic, tcp), older)", "chain(transport(tcp, quic), older)"},
	{"ages", "chain(older)", "chain(younger)"},
	{"directions", "chain(direction(outbound, inbound), older)", "chain(direction(outbound, inbound), older)"},
	{"round trips and ages", "chain(rtt, older)", "chain(younger)"},
	{"streams", "chain(streams)", "chain(streams)"},
	{"streams that cannot move", "chain(pinned)", "chain(streams, younger)"},
	{"scores", "weighted(streams*3, rtt)", "weighted(transport(tcp, quic)*3, younger)"},
	{"addresses", "chain(never(cidr 1.0.1.1/32, cidr 1.0.2.1/32), older)", "chain(prefer(cidr 1.0.1.1/32, cidr 1.0.2.1/32), older)"},
	{"nothing and something", "chain()", "default"},
}

// Hosts that disagree settle once streams have moved, and stay settled: for ten minutes, in
// which all connections have to stay since there are streams that cannot move, and
// streams come and go, no stream migrates again. How soon they settle depends on what fails and
// is tried again; it is over before the first stream comes and goes.
func TestDisagreementSettles(t *testing.T) {
	const every = 20 * time.Second // streams come and go
	for _, d := range disagreements {
		t.Run(d.name, func(t *testing.T) {
			eachDecider(t, func(t *testing.T, aDecides bool) {
				Run(t, func(t *testing.T, n *Net) {
					a, b := duo(t, n, aDecides, parse(t, d.a), parse(t, d.b))
					wait := connect(t, n, dial(a, b, TCP, 0, 0), dial(b, a, QUIC, 0, 0), dial(a, b, QUIC, 1, 0))
					app := new(traffic)
					go func() { // before the first round
						time.Sleep(400 * time.Millisecond)
						openBoth(t, app, a, b, 600)
					}()
					wait()
					for i, p := range [][2]*member{{a, b}, {b, a}} {
						for _, c := range p[0].conns(p[1]) {
							for range 1 + i {
								p[0].pin(t, c, p[1], 11*time.Minute)
							}
						}
					}
					begun := time.Now()
					var last time.Time // of a migration
					before := 0
					for time.Since(begun) < 10*time.Minute {
						if total, _ := app.migrations(0, 12); total != before {
							before, last = total, time.Now()
						}
						if since := time.Since(begun); since > 0 && since%every == 0 {
							from, to := a, b
							if since%(2*every) == 0 {
								from, to = b, a
							}
							app.request(t.Context(), from.host.NewStream, to, 3000)
							app.ping(t.Context(), from.host.NewStream, to, 3, time.Second)
							for range 2 {
								app.ping(t.Context(), from.stray(int(since/every)), to, 6, time.Second)
							}
						}
						time.Sleep(100 * time.Millisecond)
					}
					require.Len(t, a.conns(b), 3, explain(a, b))
					after := time.Duration(0)
					if !last.IsZero() {
						after = last.Sub(begun)
					}
					total, most := app.migrations(0, 12)
					short, mostShort := app.migrations(12, math.MaxInt)
					t.Logf("%d migrations of 12 streams, the last after %v; then %d short ones", total, after, short)
					require.Less(t, after, every, "settled before streams come and go")
					require.LessOrEqual(t, most, 2, "migrations of one stream")
					require.LessOrEqual(t, mostShort, 1, "migrations of one short stream")
					app.requireAll(t)
					settle(t, 5*time.Minute, a, b)
					requireOne(t, a, b)
				})
			})
		})
	}
}
