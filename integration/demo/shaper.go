package main

import (
	"context"
	"io"
	"net"
	"sync"

	"golang.org/x/time/rate"
)

// shaper is a narrow path: a TCP forwarder that passes so many bytes a second and
// no more, each way.
type shaper struct {
	listener net.Listener
	target   string
	rate     int64

	cancel context.CancelFunc
	ctx    context.Context
	wg     sync.WaitGroup
}

// shaperChunk is what the shaper passes at once. At its usual rates that is a few
// milliseconds' worth, so the flow is smooth.
const shaperChunk = 8 << 10

// socketBuffer bounds what waits in the kernel before the narrow part, as a router
// with a short queue would. Else seconds of data would pile up there, and the
// sender would not feel the rate.
const socketBuffer = 32 << 10

// newShaper listens on loopback and forwards to target, at rate bytes a second.
func newShaper(target string, rate int64) (*shaper, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s := &shaper{listener: listener, target: target, rate: rate}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.wg.Go(s.accept)
	return s, nil
}

func (s *shaper) port() int { return s.listener.Addr().(*net.TCPAddr).Port }

// close breaks all connections, and returns when nothing is left running.
func (s *shaper) close() error {
	s.cancel()
	err := s.listener.Close()
	s.wg.Wait()
	return err
}

func (s *shaper) accept() {
	for {
		conn, err := s.listener.Accept()
		if err != nil {
			return
		}
		s.wg.Go(func() { s.forward(conn) })
	}
}

func (s *shaper) forward(near net.Conn) {
	defer near.Close()
	far, err := new(net.Dialer).DialContext(s.ctx, "tcp", s.target)
	if err != nil {
		return
	}
	defer far.Close()
	stop := context.AfterFunc(s.ctx, func() {
		near.Close()
		far.Close()
	})
	defer stop()

	var wg sync.WaitGroup
	wg.Go(func() { s.pass(far, near) })
	wg.Go(func() { s.pass(near, far) })
	wg.Wait()
}

// pass copies from src to dst until either ends, and then ends both.
func (s *shaper) pass(dst, src net.Conn) {
	defer dst.Close()
	defer src.Close()
	src.(*net.TCPConn).SetReadBuffer(socketBuffer)
	limiter := rate.NewLimiter(rate.Limit(s.rate), shaperChunk)
	io.Copy(dst, pacedReader{s.ctx, src, limiter})
}

// pacedReader reads at the pace that limiter allows, at most its burst at once.
type pacedReader struct {
	ctx     context.Context
	src     io.Reader
	limiter *rate.Limiter
}

func (r pacedReader) Read(p []byte) (int, error) {
	n, err := r.src.Read(p[:min(len(p), r.limiter.Burst())])
	if n > 0 {
		if waitErr := r.limiter.WaitN(r.ctx, n); waitErr != nil {
			return 0, waitErr
		}
	}
	return n, err
}
