package migrate

import (
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/stretchr/testify/require"
)

// TestEOFsOfYamux: an EOF of yamux that the other end has not sent comes with data, and only once
// the session is down. readFrom and sessionIsUp rest on that.
func TestEOFsOfYamux(t *testing.T) {
	var (
		lies atomic.Int64
		all  sync.WaitGroup
		turn = make(chan struct{}, 16)
	)
	for i := range 2000 {
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
