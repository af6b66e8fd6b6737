package migrate_test

import (
	"context"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	msmux "github.com/multiformats/go-multistream"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
	"github.com/go-portage/portage/migrate"
)

// What a labelled stream costs beside a raw one. These are for a person to run, and
// assert nothing, since machines are noisy:
//
//	go test ./migrate -run '^$' -bench . -benchtime 15x
//
// -benchtime is the number of pairs: a raw and a labelled measurement, one after the
// other. What is reported is the median of the pairs' ratios, and the quartiles, which
// tell how much that is worth. ns/op says nothing.

// bench is two hosts with a TCP and a QUIC connection between them; index 0 opens.
type bench struct {
	hosts  [2]host.Host
	conns  [2][2]network.Conn // conns[side][i]
	opened atomic.Int32       // the connection that streams are opened on
}

const (
	onTCP  = 0
	onQUIC = 1

	benchID protocol.ID = "/bench/1.0.0"
)

var transports = []string{onTCP: "TCP", onQUIC: "QUIC"}

func newBench(b *testing.B, wrapped bool) *bench {
	b.Helper()
	p := new(bench)
	var nodes [2]*Node
	for i := range nodes {
		m, err := rcmgr.NewResourceManager(rcmgr.NewFixedLimiter(rcmgr.InfiniteLimits))
		require.NoError(b, err)
		nodes[i] = New(b, []Transport{TCP, QUIC}, libp2p.ResourceManager(m))
		p.hosts[i] = nodes[i]
		if wrapped {
			p.hosts[i], err = migrate.Wrap(nodes[i],
				migrate.WithConnSelector(func(context.Context, peer.ID) network.Conn { return p.conns[i][p.opened.Load()] }))
			require.NoError(b, err)
		}
	}
	p.hosts[1].SetStreamHandler(benchID, func(network.Stream) {})
	c0, c1 := Join(b, nodes[0], nodes[1], TCP, QUIC)
	p.conns = [2][2]network.Conn{{c0, c1}, {Far(b, nodes[1], c0), Far(b, nodes[1], c1)}}
	return p
}

// open opens a stream on connection i. A host that is not wrapped chooses itself, so its
// other connection must be closed; see only. One that is goes elsewhere where the connection
// is slow to open one, as it can be on a busy machine.
func (p *bench) open(b *testing.B, i int) network.Stream {
	p.opened.Store(int32(i))
	for {
		s, err := p.hosts[0].NewStream(context.Background(), p.hosts[1].ID(), benchID)
		require.NoError(b, err)
		if s.Conn() == p.conns[0][i] {
			return s
		}
		_ = s.Reset()
	}
}

// only closes all but connection i.
func (p *bench) only(b *testing.B, i int) *bench {
	b.Helper()
	require.NoError(b, p.conns[0][1-i].Close())
	WaitFor(b, "the connection to close", func() bool {
		return len(p.hosts[0].Network().Conns()) == 1 && len(p.hosts[1].Network().Conns()) == 1
	})
	return p
}

// both opens a stream on connection i and returns both ends.
func (p *bench) both(b *testing.B, i int) (near, far network.Stream) {
	accepted := make(chan network.Stream, 1)
	p.hosts[1].SetStreamHandler(benchID, func(s network.Stream) { accepted <- s })
	near = p.open(b, i)
	// The first exchange takes the negotiation out of both.
	require.NoError(b, send(near, 1))
	far = <-accepted
	require.NoError(b, receive(far, 1))
	require.NoError(b, send(far, 1))
	require.NoError(b, receive(near, 1))
	return near, far
}

func send(s io.Writer, n int) error {
	_, err := s.Write(make([]byte, n))
	return err
}

func receive(s io.Reader, n int) error {
	_, err := io.ReadFull(s, make([]byte, n))
	return err
}

// raw opens a stream on connection i that has nothing to do with this package, nor with
// the host's own wrapper around a stream, and returns both ends.
func (p *bench) raw(b *testing.B, i int) (near, far network.Stream) {
	accepted := make(chan network.Stream, 1)
	p.hosts[1].SetStreamHandler(benchID, func(s network.Stream) { accepted <- s })
	near, err := p.conns[0][i].NewStream(context.Background())
	require.NoError(b, err)
	require.NoError(b, msmux.SelectProtoOrFail(benchID, near))
	return near, <-accepted
}

// compare measures raw and labelled in turn, and reports the ratios.
func compare(b *testing.B, unit string, raw, labelled func() float64) {
	b.Helper()
	raw() // warm up
	labelled()
	var ratios, raws, labelleds []float64
	for i := range max(b.N, 1) {
		var r, l float64
		if i%2 == 0 {
			r = raw()
			l = labelled()
		} else {
			l = labelled()
			r = raw()
		}
		ratios, raws, labelleds = append(ratios, l/r), append(raws, r), append(labelleds, l)
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(quantile(ratios, 0.5), "labelled/raw")
	b.ReportMetric(quantile(ratios, 0.25), "q1")
	b.ReportMetric(quantile(ratios, 0.75), "q3")
	b.ReportMetric(quantile(raws, 0.5), "raw-"+unit)
	b.ReportMetric(quantile(labelleds, 0.5), "labelled-"+unit)
}

func quantile(v []float64, q float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[int(q*float64(len(v)-1)+0.5)]
}

// cpu is the processor time that the process, both hosts of it, has taken.
func cpu() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkThroughput reports MB/s: the larger the better.
func BenchmarkThroughput(b *testing.B) {
	for i, tr := range transports {
		for _, size := range []int{256, 4 << 10, 64 << 10, 1 << 20} {
			b.Run(fmt.Sprintf("%s/%d", tr, size), func(b *testing.B) {
				// Short and many: what disturbs one pair is outvoted.
				total := 8 << 20
				if size < 4<<10 {
					total = 1 << 20
				}
				p := newBench(b, true)
				raw, rawFar := p.raw(b, i)
				labelled, labelledFar := p.both(b, i)
				compare(b, "MB/s",
					func() float64 { return throughput(b, raw, rawFar, size, total) },
					func() float64 { return throughput(b, labelled, labelledFar, size, total) })
			})
		}
	}
}

func throughput(b *testing.B, from, to network.Stream, size, total int) float64 {
	received := make(chan error, 1)
	go func() {
		buf := make([]byte, 64<<10)
		for left := total; left > 0; {
			n, err := to.Read(buf[:min(len(buf), left)])
			left -= n
			if err != nil {
				received <- err
				return
			}
		}
		received <- nil
	}()
	buf := make([]byte, size)
	start := time.Now()
	for range total / size {
		if _, err := from.Write(buf); err != nil {
			b.Fatal(err)
		}
	}
	require.NoError(b, <-received)
	return float64(total) / 1e6 / time.Since(start).Seconds()
}

// BenchmarkPingPong reports what one byte takes there and back.
func BenchmarkPingPong(b *testing.B) {
	for i, tr := range transports {
		b.Run(tr, func(b *testing.B) {
			p := newBench(b, true)
			raw, rawFar := p.raw(b, i)
			labelled, labelledFar := p.both(b, i)
			compare(b, "µs",
				func() float64 { return pingPong(b, raw, rawFar, 500) },
				func() float64 { return pingPong(b, labelled, labelledFar, 500) })
		})
	}
}

func pingPong(b *testing.B, near, far network.Stream, times int) float64 {
	ended := make(chan error, 1)
	go func() {
		buf := make([]byte, 1)
		for range times {
			if _, err := far.Read(buf); err != nil {
				ended <- err
				return
			}
			if _, err := far.Write(buf); err != nil {
				ended <- err
				return
			}
		}
		ended <- nil
	}()
	buf := make([]byte, 1)
	start := time.Now()
	for range times {
		if _, err := near.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, err := near.Read(buf); err != nil {
			b.Fatal(err)
		}
	}
	took := time.Since(start)
	require.NoError(b, <-ended)
	return float64(took.Microseconds()) / float64(times)
}

// BenchmarkAllocations reports allocations of a ping and a pong: two Writes, two Reads.
func BenchmarkAllocations(b *testing.B) {
	for i, tr := range transports {
		b.Run(tr, func(b *testing.B) {
			count := func(near, far network.Stream) func() float64 {
				return func() float64 {
					const times = 5000
					var before, after runtime.MemStats
					runtime.ReadMemStats(&before)
					pingPong(b, near, far, times)
					runtime.ReadMemStats(&after)
					return float64(after.Mallocs-before.Mallocs) / times
				}
			}
			p := newBench(b, true)
			compare(b, "allocs", count(p.raw(b, i)), count(p.both(b, i)))
		})
	}
}

// BenchmarkOpen reports the CPU time of opening a stream, its first echo, and closing it,
// both ends together.
func BenchmarkOpen(b *testing.B) {
	for i, tr := range transports {
		b.Run(tr, func(b *testing.B) {
			compare(b, "µs",
				openings(b, newBench(b, false).only(b, i), i),
				openings(b, newBench(b, true).only(b, i), i))
		})
	}
}

func openings(b *testing.B, p *bench, i int) func() float64 {
	const times = 300
	var closed sync.WaitGroup
	p.hosts[1].SetStreamHandler(benchID, func(s network.Stream) {
		defer closed.Done()
		defer s.Close()
		buf := make([]byte, 1)
		if _, err := s.Read(buf); err != nil {
			b.Error(err)
			return
		}
		if _, err := s.Write(buf); err != nil {
			b.Error(err)
		}
		if _, err := s.Read(buf); err != io.EOF {
			b.Error(err)
		}
	})
	buf := make([]byte, 1)
	return func() float64 {
		runtime.GC()
		before := cpu()
		for range times {
			closed.Add(1)
			s := p.open(b, i)
			if _, err := s.Write(buf); err != nil {
				b.Fatal(err)
			}
			if _, err := s.Read(buf); err != nil {
				b.Fatal(err)
			}
			if err := s.Close(); err != nil {
				b.Fatal(err)
			}
		}
		closed.Wait()
		return float64((cpu() - before).Microseconds()) / times
	}
}

// BenchmarkMigration reports the CPU time of a migration, both ends together, beside that
// of opening a raw stream on the new connection and closing it at both ends, with nothing on it.
func BenchmarkMigration(b *testing.B) {
	for from, tr := range transports {
		to := 1 - from
		b.Run(tr+" to "+transports[to], func(b *testing.B) {
			compare(b, "µs",
				opensAndCloses(b, newBench(b, false).only(b, to), to),
				migrations(b, newBench(b, true), from, to))
		})
	}
}

// inTurn is how many streams are opened, or migrated, one after the other. QUIC allows 256.
const inTurn = 200

func opensAndCloses(b *testing.B, p *bench, i int) func() float64 {
	var closed sync.WaitGroup
	p.hosts[1].SetStreamHandler(benchID, func(s network.Stream) {
		_ = s.Close()
		closed.Done()
	})
	return func() float64 {
		runtime.GC()
		before := cpu()
		for range inTurn {
			closed.Add(1)
			_ = p.open(b, i).Close() // on QUIC an error where the other end is faster
			closed.Wait()
		}
		return float64((cpu() - before).Microseconds()) / inTurn
	}
}

func migrations(b *testing.B, p *bench, from, to int) func() float64 {
	return func() float64 {
		var near, far []network.Stream
		for range inTurn {
			n, f := p.both(b, from)
			near, far = append(near, n), append(far, f)
		}
		runtime.GC()
		before := cpu()
		for _, s := range near {
			if err := p.hosts[0].(*migrate.Host).Migrate(context.Background(), s, p.conns[0][to]); err != nil {
				b.Fatal(err)
			}
		}
		WaitFor(b, "the other end to finish", func() bool {
			return len(p.hosts[1].(*migrate.Host).Streams(p.conns[1][from])) == 0
		})
		took := cpu() - before
		for i := range near {
			_ = near[i].Close()
			_ = far[i].Close() // on QUIC an error: nobody reads its EOF any more
		}
		WaitFor(b, "the streams to close", func() bool {
			return len(p.hosts[0].(*migrate.Host).Streams(p.conns[0][to])) == 0 &&
				len(p.hosts[1].(*migrate.Host).Streams(p.conns[1][to])) == 0
		})
		return float64(took.Microseconds()) / inTurn
	}
}

// BenchmarkIdle reports the heap and the goroutines of an idle stream, one end of it. It
// measures once, whatever -benchtime says.
func BenchmarkIdle(b *testing.B) {
	for _, streams := range []int{10_000, 100_000} {
		b.Run(fmt.Sprint(streams), func(b *testing.B) {
			rawBytes, rawGoroutines := idle(b, newBench(b, false).only(b, onTCP), streams)
			bytes, goroutines := idle(b, newBench(b, true).only(b, onTCP), streams)
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(rawBytes, "raw-B")
			b.ReportMetric(bytes, "labelled-B")
			b.ReportMetric(bytes-rawBytes, "more-B")
			b.ReportMetric(goroutines-rawGoroutines, "more-goroutines")
		})
	}
}

// idle returns bytes and goroutines for each end of a stream.
func idle(b *testing.B, p *bench, streams int) (bytes, goroutines float64) {
	b.Helper()
	accepted := make(chan network.Stream, 1)
	p.hosts[1].SetStreamHandler(benchID, func(s network.Stream) { accepted <- s })
	all := make([]network.Stream, 0, 2*streams)
	open := func() {
		s := p.open(b, onTCP)
		require.NoError(b, send(s, 1))
		far := <-accepted
		require.NoError(b, receive(far, 1))
		require.NoError(b, send(far, 1))
		require.NoError(b, receive(s, 1))
		all = append(all, s, far)
	}
	open()
	before, goBefore := heap(), runtime.NumGoroutine()
	for range streams {
		open()
	}
	time.Sleep(time.Second) // for the goroutines that delivered them
	bytes = float64(heap()-before) / float64(2*streams)
	goroutines = float64(runtime.NumGoroutine()-goBefore) / float64(2*streams)
	for _, s := range all {
		_ = s.Reset()
	}
	for _, h := range p.hosts {
		require.NoError(b, h.Close())
	}
	runtime.KeepAlive(all)
	return bytes, goroutines
}

// heap is what is in use when all garbage has been collected.
func heap() int64 {
	for range 3 {
		runtime.GC() // finalizers and pools need more than one
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
