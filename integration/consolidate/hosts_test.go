package consolidate

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/p2p/security/noise"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/connmgr"
	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/migrate"
	"github.com/go-portage/portage/policy"
)

var (
	hostsFlag = flag.Int("hosts", 12, "number of hosts of TestFiftyHosts, which all connect to each other")
	seedFlag  = flag.Uint64("seed", 1, "first seed")
	seedsFlag = flag.Int("seeds", 2, "number of seeds of TestFiftyHosts")

	changesFlag = flag.Int("changes", 5, "number of seeds of TestConnectionsComeAndGo")
	cutsFlag    = flag.Int("cuts", 1, "number of seeds of TestFiftyHostsOutliveCuts")
)

// policies are what the hosts of one test have, side by side.
var policies = func() (list []policy.Policy) {
	for _, text := range []string{
		"default",
		"chain(unlimited, direct, transport(tcp, quic), older)",
		"chain(rtt, incumbent, younger)",
		"chain(direction(outbound, inbound), younger)",
		"weighted(rtt*3, streams, older, incumbent*2)",
		"chain(pinned, streams, older)",
		"chain()",
	} {
		p, err := policy.Parse(text)
		if err != nil {
			panic(err)
		}
		list = append(list, p)
	}
	return list
}()

// Of hosts that all dial each other at once, by two ways each, every pair ends with one
// connection, and nothing that an application has under way meanwhile suffers.
//
// Everything that varies follows from the seed: latencies, policies, transports, when
// dials and streams begin. Goroutines that run at the same moment of virtual time may
// still take turns in another order. Go on with
//
//	go test ./integration/consolidate -run TestFiftyHosts -v -timeout 0 -hosts 50 -seeds 100
//	go test ./integration/consolidate -run TestFiftyHosts -v -hosts 50 -seeds 1 -seed 17
func TestFiftyHosts(t *testing.T) {
	for seed := *seedFlag; seed < *seedFlag+uint64(*seedsFlag); seed++ {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			start := time.Now()
			var summary string
			Run(t, func(t *testing.T, n *Net) { summary = connectAll(t, n, *hostsFlag, seed, nil) })
			t.Logf("%s; %.1f s of real time", summary, time.Since(start).Seconds())
			runtime.GC() // the next seed needs the memory
		})
	}
}

// The same with streams that outlive their connection: nothing changes for any while nothing is
// cut; and where connections are cut at random, again and again, each stream ends well all the
// same. Go on with
//
//	go test ./integration/consolidate -run TestFiftyHostsOutliveCuts -v -timeout 0 -hosts 50 -cuts 100
func TestFiftyHostsOutliveCuts(t *testing.T) {
	for seed := *seedFlag; seed < *seedFlag+uint64(*cutsFlag); seed++ {
		for _, cut := range []bool{false, true} {
			t.Run(fmt.Sprintf("seed %d, cut %v", seed, cut), func(t *testing.T) {
				l := &lasting{cuts: cut}
				var summary string
				Run(t, func(t *testing.T, n *Net) { summary = connectAll(t, n, *hostsFlag, seed, l) })
				t.Logf("%s; %d cuts, streams went on %d times", summary, l.struck.Load(), l.resumed.Load())
				if cut {
					require.Positive(t, l.resumed.Load(), "a cut meets a stream")
				} else {
					require.Zero(t, l.resumed.Load())
				}
				runtime.GC()
			})
		}
	}
}

// lasting is for hosts whose streams outlive their connection.
type lasting struct {
	cuts            bool // connections are cut
	struck, resumed atomic.Int64
}

func (l *lasting) traced(e migrate.Event) {
	if e.Kind == migrate.Resumed {
		l.resumed.Add(1)
	}
}

// cut cuts one of the connections of a and b: one end closes it, as a middlebox does that sends
// resets, or the path is severed.
func (l *lasting) cut(n *Net, a, b *member, k int) {
	conns := a.conns(b)
	if len(conns) == 0 {
		return
	}
	l.struck.Add(1)
	c := conns[k%len(conns)]
	if k%2 == 0 && strings.Contains(c.RemoteMultiaddr().String(), "/tcp/") {
		for i := range a.IPs() {
			n.Sever(a.IPs()[i], b.IPs()[i])
		}
		return
	}
	_ = c.CloseWithError(network.ConnSupplanted)
}

// connectAll connects all hosts. l is nil where streams end with their connection.
func connectAll(t *testing.T, n *Net, hosts int, seed uint64, l *lasting) (summary string) {
	r := rand.New(rand.NewPCG(seed, uint64(hosts)))
	cuts := l != nil && l.cuts
	members := make([]*member, hosts)
	addrs := make([][]string, hosts)
	for i := range members {
		for j := range 2 {
			addrs[i] = append(addrs[i], fmt.Sprintf("1.%d.%d.%d", seed%256, i, j+1))
		}
		p := policies[0]
		if r.IntN(2) == 0 {
			p = policies[r.IntN(len(policies))]
		}
		how := []connmgr.Option{connmgr.WithPolicy(p)}
		if l != nil {
			how = append(how, connmgr.WithMigrateOptions(migrate.WithResumption(), migrate.WithTracer(l.traced)))
		}
		members[i] = newManaged(t, n.NewNode, addrs[i], how, libp2p.DisableRelay(), libp2p.Security(noise.ID, noise.New))
	}

	var attempts []Attempt
	ms := func(limit int) time.Duration { return time.Duration(r.IntN(limit)) * time.Millisecond }
	for i, a := range members {
		for j, b := range members[:i] {
			for k := range 2 {
				n.SetLatency(addrs[i][k], addrs[j][k], time.Millisecond+ms(150))
			}
			for _, at := range []struct {
				from, to *member
				ips, far []string
			}{{a, b, addrs[i], addrs[j]}, {b, a, addrs[j], addrs[i]}} {
				first, second := Transport(TCP), Transport(QUIC)
				switch r.IntN(4) {
				case 0:
					second = TCP
				case 1:
					first = QUIC
				}
				for k, tr := range []Transport{first, second} {
					if k == 1 && r.IntN(3) == 0 {
						continue
					}
					attempts = append(attempts, Attempt{
						From: at.from.Node, To: at.to.Node,
						Path: Path{Transport: tr, From: at.ips[k], To: at.far[k]}, After: ms(300),
					})
				}
			}
		}
	}

	tr := new(traffic)
	for _, m := range members {
		tr.accept(m)
	}
	begun := time.Now()
	dialled := make(chan []error, 1)
	go func() { dialled <- n.DialTogether(attempts...) }()
	ctx := t.Context()
	for i, a := range members {
		for _, b := range members[:i] {
			for _, p := range [][2]*member{{a, b}, {b, a}} {
				from, to := p[0], p[1]
				at := 300*time.Millisecond + ms(700)
				pieces, size, requests := 8+r.IntN(8), 1<<8+r.IntN(3<<10), 3+r.IntN(3)
				every, pause := 500*time.Millisecond+ms(1500), ms(500)
				plain, plainFor := r.IntN(2) == 0, 1+r.IntN(8)
				gaps := make([]time.Duration, requests)
				for k := range gaps {
					gaps[k] = ms(3000)
				}
				tr.work.Go(func() {
					time.Sleep(at)
					tr.ping(ctx, from.host.NewStream, to, 12, every)
					tr.bulk(ctx, from.host.NewStream, to, pieces, size, pause)
					if cuts {
						return // what else there is ends with its connection, or is opened while that is cut
					}
					if plain {
						tr.ping(ctx, from.Node.NewStream, to, plainFor, time.Second)
						tr.post(ctx, from.stray(plainFor), to, size, time.Duration(plainFor)*time.Second)
					}
					for _, gap := range gaps {
						tr.request(ctx, from.host.NewStream, to, size)
						time.Sleep(gap)
					}
				})
			}
		}
	}

	for i, a := range members {
		for _, b := range members[:i] {
			for range r.IntN(4) {
				at, k := 4*time.Second+ms(12_000), r.IntN(100) // all are open by then
				if cuts {
					tr.work.Go(func() {
						time.Sleep(at)
						l.cut(n, a, b, k)
					})
				}
			}
		}
	}
	for _, err := range <-dialled {
		require.NoError(t, err)
	}
	time.Sleep(400 * time.Millisecond) // the acceptors' ends come last
	pairs, before, widest := hosts*(hosts-1)/2, 0, 0
	for i, a := range members {
		for _, b := range members[:i] {
			c := len(a.conns(b))
			before += c
			widest = max(widest, c)
		}
	}
	if cuts {
		time.Sleep(20 * time.Second)
	} else {
		settle(t, 2*time.Minute, members...)
	}
	settled := time.Since(begun)
	tr.requireAll(t)
	for i, a := range members {
		for _, b := range members[:i] {
			if cuts && len(a.conns(b))+len(b.conns(a)) == 0 {
				continue // cut when nothing needed it any more
			}
			c := requireOne(t, a, b)
			require.Empty(t, a.host.Streams(c), "L5: streams are left in a table")
			require.Equal(t, "one connection, nothing to do", a.mgr.Explain(b.ID()).State)
		}
	}
	total, most := tr.allMigrations()
	require.LessOrEqual(t, most, maxMoves, "migrations of one stream")
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	return fmt.Sprintf("%d hosts, %d pairs: %d connections (up to %d a pair), one a pair after %v; %d streams, %d of them plain, %.1f MB; %d migrations, at most %d of one stream; %d MiB from the system",
		hosts, pairs, before, widest, settled.Round(100*time.Millisecond), tr.number.Load(), tr.plain.Load(), float64(tr.bytes.Load())/1e6, total, most, mem.Sys>>20)
}

// maxMoves is how often one stream migrates at most: to the first winner, to another one
// when a connection has come late, and when streams that cannot move have ended.
const maxMoves = 3
