package migrate

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	. "github.com/go-portage/portage/internal/hosttest"
)

const echoID protocol.ID = "/test/echo/1.0.0"

// pair is two wrapped hosts with two connections between them. The index of an array is
// 0 for a, the opener, and 1 for b.
type pair struct {
	nodes [2]*Node
	hosts [2]*Host
	conns [2][2]network.Conn // conns[side][i] is the side's end of connection i
}

func newPair(t testing.TB, first, second Transport, opts ...Option) *pair {
	t.Helper()
	return newPairOf(t, first, second, func(h host.Host) host.Host { return h }, opts...)
}

// newPairOf is newPair where each host, before it is wrapped, is what between makes of it.
func newPairOf(t testing.TB, first, second Transport, between func(host.Host) host.Host, opts ...Option) *pair {
	t.Helper()
	p := new(pair)
	all := []Transport{first, second}
	for i := range p.nodes {
		p.nodes[i] = New(t, all)
		log := zaptest.NewLogger(t, zaptest.Level(zap.DebugLevel)).Named(fmt.Sprintf("host%d", i))
		if _, ok := t.(*testing.B); ok || !testing.Verbose() {
			log = defaults().log
		}
		h, err := Wrap(between(p.nodes[i]), append([]Option{WithLogger(log), WithNegotiationTimeout(Patience)}, opts...)...)
		require.NoError(t, err)
		t.Cleanup(func() { _ = h.Close() })
		p.hosts[i] = h
	}
	var c0, c1 network.Conn
	if first == Relay {
		r := NewRelay(t, relayUnlimited)
		c0 = DialRelayed(t, p.nodes[0], p.nodes[1], r)
		c1 = Dial(t, p.nodes[0], p.nodes[1], second)
	} else {
		c0, c1 = Join(t, p.nodes[0], p.nodes[1], first, second)
	}
	p.conns[0] = [2]network.Conn{c0, c1}
	p.conns[1] = [2]network.Conn{Far(t, p.nodes[1], c0), Far(t, p.nodes[1], c1)}
	return p
}

// open opens a labelled stream on connection i, and returns both ends, the acceptor's
// once its handler has it, which takes a first byte.
func (p *pair) open(t testing.TB, id protocol.ID, i int) (*Stream, *Stream) {
	t.Helper()
	accepted := make(chan network.Stream, 1)
	p.hosts[1].SetStreamHandler(id, func(s network.Stream) { accepted <- s })
	s := p.openOn(t, id, i)
	_, err := s.Write([]byte{'!'})
	require.NoError(t, err)
	select {
	case a := <-accepted:
		_, err = io.ReadFull(a, make([]byte, 1))
		require.NoError(t, err)
		return s, a.(*Stream)
	case <-time.After(20 * time.Second):
		t.Fatal("the stream does not arrive")
		return nil, nil
	}
}

func (p *pair) openOn(t testing.TB, id protocol.ID, i int) *Stream {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	// Not with NewStream, which goes elsewhere where the connection is slow to open one,
	// as it can be on a busy machine.
	u, err := p.conns[0][i].NewStream(ctx)
	require.NoError(t, err)
	s, err := p.hosts[0].begin(ctx, u, []protocol.ID{id}, false)
	require.NoError(t, err)
	return s.(*Stream)
}

// migrate moves the stream from the given side to connection i.
func (p *pair) migrate(ctx context.Context, side int, s *Stream, i int) error {
	return p.hosts[side].Migrate(ctx, s, p.conns[side][i])
}

// nothingLeft checks L5: no label, and no stream of the test's protocols.
func (p *pair) nothingLeft(t testing.TB) {
	t.Helper()
	for i, h := range p.hosts {
		WaitFor(t, fmt.Sprintf("host %d to forget its labels", i), func() bool {
			h.labels.mu.Lock()
			defer h.labels.mu.Unlock()
			return len(h.labels.peers) == 0
		})
		for _, c := range p.conns[i] {
			WaitFor(t, fmt.Sprintf("host %d to free its streams", i), func() bool {
				for _, s := range c.GetStreams() {
					if !perConnection[s.Protocol()] || s.Protocol() == ID {
						return false
					}
				}
				return true
			})
		}
	}
}

func testCtx(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// TestMigrateLoop: 64 MiB of echo over one stream that migrates all the time (S2, S4,
// S12, M1).
func TestMigrateLoop(t *testing.T) {
	size, least := 64<<20, 200
	if testing.Short() {
		size, least = 8<<20, 20
	}
	for _, tc := range []struct {
		name   string
		from   Transport
		to     Transport
		movers []int
	}{
		{"TCP QUIC opener", TCP, QUIC, []int{0}},
		{"TCP QUIC acceptor", TCP, QUIC, []int{1}},
		{"TCP QUIC both", TCP, QUIC, []int{0, 1}},
		{"WebSocket QUIC opener", WebSocket, QUIC, []int{0}},
		{"TCP WebTransport acceptor", TCP, WebTransport, []int{1}},
		{"relay QUIC both", Relay, QUIC, []int{0, 1}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newPair(t, tc.from, tc.to)
			s, far := p.open(t, echoID, 0)
			stop, moved := make(chan struct{}), make(chan struct{})
			go func() {
				_, err := io.Copy(far, far)
				if err != nil {
					t.Errorf("echo: %v", err)
					_ = far.Reset()
				}
				_ = far.CloseWrite()
				<-moved
				_ = far.Close()
			}()

			counts := make(chan int, len(tc.movers))
			for _, side := range tc.movers {
				st := []*Stream{s, far}[side]
				go func() {
					n := 0
					defer func() { counts <- n }()
					for i := 1; ; i++ {
						select {
						case <-stop:
							return
						default:
						}
						switch err := p.migrate(testCtx(t), side, st, i%2); {
						case err == nil:
							n++
						case errors.Is(err, ErrTryLater) && len(tc.movers) == 2:
						case errors.Is(err, ErrClosed):
							return
						default:
							t.Errorf("migration %d by side %d: %v", n, side, err)
							return
						}
					}
				}()
			}
			sent, got := sha256.New(), sha256.New()
			var received int64
			done := make(chan error, 1)
			go func() {
				var err error
				received, err = io.Copy(got, s)
				done <- err
			}()
			rnd := rand.New(rand.NewPCG(1, 2))
			buf := make([]byte, 256<<10)
			for left := size; left > 0 || s.Migrations() < least; {
				n := 1 + rnd.IntN(len(buf))
				for i := range buf[:n] {
					buf[i] = byte(rnd.Uint32())
				}
				_, err := s.Write(buf[:n])
				require.NoError(t, err, "%d bytes before the end", left)
				sent.Write(buf[:n])
				left -= n
			}
			require.NoError(t, s.CloseWrite())
			require.NoError(t, <-done, "after %d bytes, %d migrations", received, s.Migrations())
			close(stop)
			for range tc.movers {
				<-counts
			}
			close(moved)
			require.True(t, bytes.Equal(sent.Sum(nil), got.Sum(nil)), "the bytes differ")
			require.GreaterOrEqual(t, s.Migrations(), least)
			require.NoError(t, s.Close())
			p.nothingLeft(t)
			t.Logf("%d migrations", s.Migrations())
		})
	}
}

// TestResetIsNoTimeout: an application that tries again after a timeout must not do so for
// ever on a stream that is gone.
func TestResetIsNoTimeout(t *testing.T) {
	err := reset(fmt.Errorf("read: %w", os.ErrDeadlineExceeded))
	require.ErrorIs(t, err, network.ErrReset)
	require.NotErrorIs(t, err, os.ErrDeadlineExceeded)
	var timeout interface{ Timeout() bool }
	require.False(t, errors.As(err, &timeout) && timeout.Timeout(), "%v", err)
	require.ErrorIs(t, reset(errTooMuch), errViolation, "other causes can be told")
}
