package migrate

import (
	"context"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
)

// TestEOFsOfYamux: an EOF of yamux that the other end has not sent comes with data, and only once
// the session is down. readFrom and sessionIsUp rest on that.
func TestEOFsOfYamux(t *testing.T) {
	var (
		lies atomic.Int64
		all  sync.WaitGroup
		turn = make(chan struct{}, 16)
	)
	for i := range 1000 {
		turn <- struct{}{}
		all.Go(func() {
			defer func() { <-turn }()
			lies.Add(endsSuddenly(t, i%2 == 0))
		})
	}
	all.Wait()
	t.Logf("%d false EOFs", lies.Load())
}

// endsSuddenly has a session end under a stream whose writer never closes it, and returns how many
// EOFs its reader has seen.
func endsSuddenly(t *testing.T, piped bool) (eofs int64) {
	near, far := net.Pipe()
	if !piped {
		near, far = loopback(t)
	}
	a, err := yamux.DefaultTransport.NewConn(near, false, nil)
	require.NoError(t, err)
	defer a.Close()
	b, err := yamux.DefaultTransport.NewConn(far, true, nil)
	require.NoError(t, err)
	defer b.Close()
	go func() {
		w, err := a.OpenStream(t.Context())
		if err != nil {
			return
		}
		for buf := make([]byte, 1+rand.IntN(300_000)); err == nil; {
			_, err = w.Write(buf)
		}
	}()
	r, err := b.AcceptStream()
	if err != nil {
		return 0
	}
	ends := []func() error{
		near.Close, far.Close, a.Close, b.Close,
		func() error { return a.CloseWithError(network.ConnErrorCode(5)) },
		func() error { return b.CloseWithError(network.ConnErrorCode(5)) },
	}
	end := ends[rand.IntN(len(ends))]
	left := rand.IntN(1_000_000)
	for p := make([]byte, 1+rand.IntN(70_000)); ; {
		n, err := r.Read(p)
		if err == io.EOF {
			eofs++
			if n == 0 {
				t.Error("an EOF without data")
			}
			if !b.IsClosed() {
				t.Error("an EOF while the session is up")
			}
		}
		if err != nil && n == 0 {
			return eofs
		}
		if left >= 0 && left < n {
			go func() { _ = end() }()
		}
		left -= n
	}
}

func loopback(t *testing.T) (near, far net.Conn) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	near, err = net.Dial("tcp", l.Addr().String())
	require.NoError(t, err)
	far, err = l.Accept()
	require.NoError(t, err)
	return near, far
}

// TestEOFsOfOthers: the muxers of other transports report no EOF that the other end has not sent.
// endsTruly rests on that.
func TestEOFsOfOthers(t *testing.T) {
	for _, tr := range []Transport{QUIC, WebTransport, WebRTC} {
		t.Run(string(tr), func(t *testing.T) {
			a, b := New(t, []Transport{tr}), New(t, []Transport{tr})
			for i := range 12 {
				diesUnderStreams(t, a, b, tr, i)
			}
		})
	}
}

// diesUnderStreams closes a connection under streams whose writers do not close them, in a way that
// depends on i.
func diesUnderStreams(t *testing.T, a, b *Node, tr Transport, i int) {
	const (
		streams = 10
		proto   = protocol.ID("/test/endless")
	)
	near := Dial(t, a, b, tr)
	far := Far(t, b, near)
	require.True(t, endsTruly(near))
	require.True(t, endsTruly(far))
	var readers sync.WaitGroup
	readers.Add(streams)
	begun := make(chan struct{}, streams)
	var left atomic.Int64 // until the connection is closed
	left.Store(1 << 50)
	end := []func() error{
		near.Close, far.Close,
		func() error { return near.CloseWithError(network.ConnSupplanted) },
		func() error { return far.CloseWithError(network.ConnSupplanted) },
	}[i%4]
	b.SetStreamHandler(proto, func(r network.Stream) {
		defer readers.Done()
		begun <- struct{}{}
		for p := make([]byte, 1+rand.IntN(70_000)); ; {
			n, err := r.Read(p)
			if err == io.EOF {
				t.Error("an EOF that the other end has not sent")
			}
			if err != nil {
				_ = r.Reset()
				return
			}
			if left.Add(-int64(n)) < 0 && left.Swap(1<<50) < 0 {
				go func() { _ = end() }()
			}
		}
	})
	for range streams {
		w, err := a.NewStream(network.WithNoDial(context.Background(), "test"), b.ID(), proto)
		require.NoError(t, err)
		go func() {
			for buf := make([]byte, 1+rand.IntN(100_000)); err == nil; {
				_, err = w.Write(buf)
			}
			_ = w.Reset()
		}()
		Take(t, begun, "the reader")
	}
	left.Store(rand.Int64N(1_000_000))
	readers.Wait()
	WaitFor(t, "the connection to go", func() bool {
		return len(a.Network().ConnsToPeer(b.ID())) == 0 && len(b.Network().ConnsToPeer(a.ID())) == 0
	})
}
