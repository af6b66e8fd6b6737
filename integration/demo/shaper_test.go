package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/time/rate"
)

func TestPacedReaderKeepsItsPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size, pace, burst = 1 << 20, 256 << 10, 8 << 10
		begin := time.Now()
		n, err := io.Copy(io.Discard, pacedReader{t.Context(), bytes.NewReader(make([]byte, size)), rate.NewLimiter(pace, burst)})
		if n != size || err != nil {
			t.Fatalf("read %d bytes, %v; want %d", n, err, size)
		}
		want := time.Duration(float64(size-burst) / pace * float64(time.Second))
		if took := time.Since(begin); (took - want).Abs() > time.Millisecond {
			t.Errorf("took %v; want %v", took, want)
		}
	})
}

func TestPacedReaderEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	slow := pacedReader{ctx, bytes.NewReader(make([]byte, 2)), rate.NewLimiter(1, 1)}
	if _, err := io.Copy(io.Discard, slow); !errors.Is(err, context.Canceled) {
		t.Errorf("error is %v; want %v", err, context.Canceled)
	}
}

func TestShaperPassesBothWays(t *testing.T) {
	echo, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer echo.Close()
	go func() {
		conn, err := echo.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		io.Copy(conn, conn)
	}()
	s, err := newShaper(echo.Addr().String(), 100<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	conn, err := net.Dial("tcp", s.listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()

	const size = 1 << 20
	source := func() io.Reader {
		r, _ := (&source{size: size}).part(0, 1)
		return r
	}
	go io.Copy(conn, source())
	got, want := sha256.New(), sha256.New()
	if _, err := io.CopyN(got, conn, size); err != nil {
		t.Fatal(err)
	}
	io.Copy(want, source())
	if !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
		t.Error("what came back is not what was sent")
	}
}
