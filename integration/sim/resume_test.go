package sim

import (
	"bytes"
	"context"
	"io"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/migrate"
)

// lasting are two hosts whose streams outlive their connections.
type lasting struct {
	*Net
	t     *testing.T
	nodes [2]*Node
	hosts [2]*migrate.Host

	swapped bool // the sides have each other's IPs, and keys
}

func newLasting(t *testing.T, n *Net, opts ...migrate.ResumeOption) *lasting {
	t.Helper()
	return newLastingWith(t, n, migrate.WithResumption(opts...))
}

func newLastingWith(t *testing.T, n *Net, opts ...migrate.Option) *lasting {
	t.Helper()
	l := &lasting{Net: n, t: t}
	for side, ips := range [][]string{ipsOfA, ipsOfB} {
		l.nodes[side] = n.NewNode(ips, unlimited(t))
		h, err := migrate.Wrap(l.nodes[side], opts...)
		require.NoError(t, err)
		t.Cleanup(func() { _ = h.Close() })
		l.hosts[side] = h
	}
	for i := range 2 {
		n.SetLatency(ipsOfA[i], ipsOfB[i], ms(10))
	}
	return l
}

// stream opens a stream from a to b.
func (l *lasting) stream() [2]network.Stream {
	l.t.Helper()
	accepted := make(chan network.Stream, 1)
	l.hosts[1].SetStreamHandler(testID, func(s network.Stream) { accepted <- s })
	s, err := l.hosts[0].NewStream(l.t.Context(), l.nodes[1].ID(), testID)
	require.NoError(l.t, err)
	_, err = s.Write([]byte{'!'})
	require.NoError(l.t, err)
	far := <-accepted
	_, err = io.ReadFull(far, make([]byte, 1))
	require.NoError(l.t, err)
	return [2]network.Stream{s, far}
}

// carry writes data to one end, closes that, and reads what comes at the other.
func carry(from, to network.Stream, data []byte, pace time.Duration) (got []byte, errs [2]error) {
	done := make(chan error, 1)
	go func() {
		for rest := data; len(rest) > 0; {
			n, err := from.Write(rest[:min(len(rest), 10_000)])
			if err != nil {
				done <- err
				return
			}
			rest = rest[n:]
			time.Sleep(pace)
		}
		done <- from.CloseWrite()
	}()
	got, errs[1] = io.ReadAll(to)
	errs[0] = <-done
	return got, errs
}

func pattern(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i) ^ byte(i>>8) ^ byte(i>>16)
	}
	return p
}

// A transfer goes on over a connection that is dialled when its own is cut, in whichever
// direction it goes.
func TestTransferOutlivesItsConnection(t *testing.T) {
	for _, via := range []string{tcp, quic} {
		t.Run(via, func(t *testing.T) {
			eachSide(t, func(t *testing.T, writer int) {
				Run(t, func(t *testing.T, n *Net) {
					l := newLasting(t, n)
					c := n.Dial(l.nodes[0], l.nodes[1], Path{Transport: Transport(via), From: ipsOfA[0], To: ipsOfB[0]})
					s := l.stream()
					go func() {
						time.Sleep(200 * time.Millisecond)
						_ = c.CloseWithError(network.ConnSupplanted)
					}()
					data := pattern(1_000_000)
					got, errs := carry(s[writer], s[1-writer], data, 10*time.Millisecond)
					require.Equal(t, [2]error{}, errs)
					require.True(t, bytes.Equal(data, got), "%d of %d bytes", len(got), len(data))
					require.NotEqual(t, c, s[0].Conn())
					_ = s[0].Close()
					_ = s[1].Close()
					time.Sleep(time.Minute)
				})
			})
		})
	}
}

// What the other end has confirmed is not kept: of a stream that idles nothing is, whether
// what it brought came with its opening or in Reads.
func TestIdleStreamsKeepNothing(t *testing.T) {
	Run(t, func(t *testing.T, n *Net) {
		l := newLasting(t, n)
		n.Dial(l.nodes[0], l.nodes[1], Path{Transport: Transport(quic), From: ipsOfA[0], To: ipsOfB[0]})
		reserved := func() (memory [2]int64) { // QUIC reserves none for what is small
			for side, node := range l.nodes {
				require.NoError(t, node.Network().ResourceManager().ViewSystem(func(s network.ResourceScope) error {
					memory[side] = s.Stat().Memory
					return nil
				}))
			}
			return memory
		}
		first := l.stream()
		time.Sleep(5 * time.Second)
		before := reserved()
		streams := [][2]network.Stream{first}
		for range 100 {
			s := l.stream()
			_, err := s[1].Write([]byte{'?'})
			require.NoError(t, err)
			_, err = io.ReadFull(s[0], make([]byte, 1))
			require.NoError(t, err)
			streams = append(streams, s)
		}
		require.Greater(t, reserved()[0], before[0])
		require.Greater(t, reserved()[1], before[1])
		time.Sleep(2 * time.Second)
		require.Equal(t, before, reserved())

		for _, s := range streams {
			_ = s[0].Close()
			_ = s[1].Close()
		}
	})
}

// Where another connection is there already, a stream that has lost its own goes on there. The end
// whose attempt counts sends its bytes once it is answered, like a migration's initiator; the other
// one with its answer.
func TestResumingTakesItsRoundTrips(t *testing.T) {
	const oneWay, pace = 10 * time.Millisecond, time.Millisecond
	for _, via := range []string{tcp, quic} {
		t.Run(via, func(t *testing.T) {
			eachSide(t, func(t *testing.T, writer int) {
				Run(t, func(t *testing.T, n *Net) {
					var first network.Conn
					l := newLastingWith(t, n, migrate.WithResumption(),
						migrate.WithConnSelector(func(context.Context, peer.ID) network.Conn { return first }))
					other := map[string]Transport{tcp: QUIC, quic: TCP}[via]
					first, _ = n.Join(l.nodes[0], l.nodes[1], Path{Transport: Transport(via), From: ipsOfA[0], To: ipsOfB[0]},
						Path{Transport: other, From: ipsOfB[1], To: ipsOfA[1]})
					s := l.stream()
					time.Sleep(5 * time.Second)
					cut := time.Now().Add(time.Second)
					go func() {
						time.Sleep(time.Until(cut))
						if via == tcp {
							n.Sever(ipsOfA[0], ipsOfB[0])
						} else {
							_ = first.CloseWithError(network.ConnSupplanted)
						}
					}()
					go func() {
						for range 3000 {
							_, _ = s[writer].Write([]byte{'.'})
							time.Sleep(pace)
						}
						_ = s[writer].CloseWrite()
					}()
					total, next := 0, time.Duration(0)
					for {
						m, err := s[1-writer].Read(make([]byte, 100))
						total += m
						if after := time.Since(cut); next == 0 && after > oneWay { // else it was under way
							next = after
						}
						if err == io.EOF {
							break
						}
						require.NoError(t, err)
					}
					require.Equal(t, 3000, total)
					require.Equal(t, []time.Duration{3 * oneWay, 2 * oneWay}[writer], next, "from the cut to the next byte")
					_ = s[0].Close()
					_ = s[1].Close()
					time.Sleep(time.Minute)
				})
			})
		})
	}
}

// Hundreds of streams lose their connection at once, and go on over the one that is left. Of 300 QUIC
// has room for 256 that one end opens: the other end opens the rest.
func TestManyStreamsOutliveTheirConnection(t *testing.T) {
	for _, tc := range []struct {
		from, to string
		streams  int
	}{{tcp, tcp, 300}, {tcp, quic, 300}, {quic, tcp, 250}, {quic, quic, 250}} {
		t.Run(tc.from+" to "+tc.to, func(t *testing.T) {
			Run(t, func(t *testing.T, n *Net) {
				var first network.Conn
				var ends atomic.Int32 // that have resumed
				l := newLastingWith(t, n, migrate.WithResumption(),
					migrate.WithConnSelector(func(context.Context, peer.ID) network.Conn { return first }),
					migrate.WithTracer(func(e migrate.Event) {
						if e.Kind == migrate.Resumed {
							ends.Add(1)
						}
					}))
				first, _ = n.Join(l.nodes[0], l.nodes[1], Path{Transport: Transport(tc.from), From: ipsOfA[0], To: ipsOfB[0]},
					Path{Transport: Transport(tc.to), From: ipsOfB[1], To: ipsOfA[1]})
				var streams [][2]network.Stream
				for range tc.streams {
					streams = append(streams, l.stream())
				}
				time.Sleep(3 * time.Second)
				require.NoError(t, first.CloseWithError(network.ConnSupplanted))
				for _, s := range streams {
					for writer := range 2 {
						_, err := s[writer].Write([]byte("go on"))
						require.NoError(t, err)
					}
				}
				for _, s := range streams {
					for reader := range 2 {
						got := make([]byte, 5)
						_, err := io.ReadFull(s[reader], got)
						require.NoError(t, err)
						require.Equal(t, "go on", string(got))
					}
				}
				require.EqualValues(t, 2*tc.streams, ends.Load())
				for _, s := range streams {
					_ = s[0].Close()
					_ = s[1].Close()
				}
				time.Sleep(time.Minute)
			})
		})
	}
}

// What one end of a bulk transfer confirms to the other is less than 0.01 % of what that sends. (Over
// QUIC the acknowledgements of packets differ by more from run to run.) What the writer keeps
// until then is a part of the window. On a link that is slower than the processor it takes no longer.
func TestConfirmationsAreSmall(t *testing.T) {
	const size = 16 << 20
	var back [2]int   // bytes that the reader has sent, without and with resumption
	var kept [2]int64 // bytes that the writer has had reserved at most
	var took [2]time.Duration
	for i, opts := range [][]migrate.Option{nil, {migrate.WithResumption()}} {
		Run(t, func(t *testing.T, n *Net) {
			for _, ip := range []string{ipsOfA[0], ipsOfB[0]} {
				n.SetBandwidth(ip, 100_000_000)
			}
			l := newLastingWith(t, n, opts...)
			n.Dial(l.nodes[0], l.nodes[1], Path{Transport: TCP, From: ipsOfA[0], To: ipsOfB[0]})
			s := l.stream()
			time.Sleep(5 * time.Second)
			before := n.Sent(ipsOfB[0], ipsOfA[0])
			begun := time.Now()
			go func() {
				_, _ = s[0].Write(make([]byte, size))
				_ = s[0].CloseWrite()
			}()
			over := make(chan struct{})
			go func() {
				for {
					select {
					case <-over:
						return
					case <-time.After(time.Millisecond):
					}
					_ = l.nodes[0].Network().ResourceManager().ViewSystem(func(s network.ResourceScope) error {
						kept[i] = max(kept[i], s.Stat().Memory)
						return nil
					})
				}
			}()
			m, err := io.Copy(io.Discard, s[1])
			require.NoError(t, err)
			require.Equal(t, int64(size), m)
			took[i] = time.Since(begun)
			close(over)
			time.Sleep(5 * time.Second)
			back[i] = n.Sent(ipsOfB[0], ipsOfA[0]).Bytes - before.Bytes
			_ = s[0].Close()
			_ = s[1].Close()
			time.Sleep(time.Minute)
		})
	}
	t.Logf("%d bytes for each MiB; the writer keeps %d KiB; without resumption it takes %v, with it %v", (back[1]-back[0])/(size>>20), (kept[1]-kept[0])>>10, took[0], took[1])
	require.Greater(t, back[1], back[0], "nothing is confirmed")
	require.Less(t, back[1]-back[0], size/10_000)
	require.LessOrEqual(t, kept[1]-kept[0], int64(2<<20))
	require.Less(t, took[1].Seconds(), took[0].Seconds()/0.99)
}
