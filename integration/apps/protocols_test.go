package apps

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	libp2phttp "github.com/libp2p/go-libp2p/p2p/http"
	"github.com/libp2p/go-libp2p/p2p/net/gostream"
	"github.com/libp2p/go-libp2p/p2p/protocol/ping"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/internal/hosttest"
)

// What small programs do with a stream, all of them at once, between two hosts.
func TestProtocols(t *testing.T) {
	const moves = 2 // for each of them, while all are at work
	play(t, 2, []int{1}, func(t *testing.T, ctx context.Context, w *world) {
		a, b := w.nodes[0], w.nodes[1]
		serveGorpc, overGorpc := gorpc()
		protocols := []struct {
			name  string
			serve func(t *testing.T, h host.Host)
			use   func(ctx context.Context, h host.Host, p peer.ID, enough func() bool) error
		}{
			{"ping", func(*testing.T, host.Host) {}, pings},
			{"requests", serveRequests, requests},
			{"copy both ways", serveCopy, copyBothWays},
			{"gostream", serveGostream, overGostream},
			{"p2p/http", serveHTTP, overHTTP},
			{"gorpc", serveGorpc, overGorpc},
		}
		for _, p := range protocols {
			p.serve(t, b)
		}
		w.connect()
		var all []func() error
		for _, p := range protocols {
			all = append(all, func() error {
				if err := p.use(ctx, a, b.ID(), w.after(moves*len(protocols))); err != nil {
					return fmt.Errorf("%s: %w", p.name, err)
				}
				return nil
			})
		}
		require.NoError(t, together(all...))
	})
}

// pings pings, a thousand times over each stream: the protocol ends one after 30 s.
func pings(ctx context.Context, h host.Host, p peer.ID, enough func() bool) error {
	for done := false; !done; done = enough() {
		if err := pingStream(ctx, h, p); err != nil {
			return err
		}
	}
	return nil
}

func pingStream(ctx context.Context, h host.Host, p peer.ID) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	n := 0
	for r := range ping.Ping(ctx, h, p) {
		if r.Error != nil {
			return fmt.Errorf("ping %d: %w", n, r.Error)
		}
		if n++; n == 1000 {
			return nil
		}
	}
	return fmt.Errorf("the pings ended after %d", n)
}

// Requests and answers on one stream, each behind its length. A request of one byte is
// answered when the next one has come, which is what deadlines are for.

const requestID = "/apps/requests"

func serveRequests(_ *testing.T, h host.Host) {
	h.SetStreamHandler(requestID, func(s network.Stream) {
		defer s.Close()
		r := bufio.NewReader(s)
		var held []byte
		for {
			m, err := receive(r)
			if err != nil {
				return
			}
			if held == nil && len(m) == 1 {
				held = m
				continue
			}
			if held != nil {
				m, held = held, nil
			}
			if send(s, m) != nil {
				return
			}
		}
	})
}

func requests(ctx context.Context, h host.Host, p peer.ID, enough func() bool) error {
	s, err := h.NewStream(ctx, p, requestID)
	if err != nil {
		return err
	}
	defer s.Close()
	r := bufio.NewReader(s)
	for i := 0; i < 1000 || !enough(); i++ {
		m := make([]byte, 2+i%5000)
		m[0] = byte(i)
		if i%50 == 49 { // not the first: where a deadline ends a plain host's negotiation, the stream is lost
			m = m[:1]
		}
		if err := s.SetDeadline(time.Now().Add(hosttest.Patience)); err != nil {
			return err
		}
		if err := send(s, m); err != nil {
			return fmt.Errorf("request %d: %w", i, err)
		}
		if len(m) == 1 {
			if err := s.SetReadDeadline(time.Now().Add(5 * time.Millisecond)); err != nil {
				return err
			}
			var timeout net.Error
			if _, err := receive(r); !errors.As(err, &timeout) || !timeout.Timeout() {
				return fmt.Errorf("request %d: %w, and not the deadline", i, err)
			}
			if err := s.SetReadDeadline(time.Time{}); err != nil {
				return err
			}
			if err := send(s, []byte("go on")); err != nil {
				return fmt.Errorf("request %d: %w", i, err)
			}
		}
		switch got, err := receive(r); {
		case err != nil:
			return fmt.Errorf("answer %d: %w", i, err)
		case string(got) != string(m):
			return fmt.Errorf("answer %d is another: %d bytes for %d", i, len(got), len(m))
		}
	}
	if err := s.CloseWrite(); err != nil {
		return err
	}
	if _, err := receive(r); err != io.EOF {
		return fmt.Errorf("after the last answer: %w, and not the end", err)
	}
	return nil
}

func send(w io.Writer, m []byte) error {
	_, err := w.Write(append(binary.AppendUvarint(nil, uint64(len(m))), m...))
	return err
}

// receive returns the next message. Where a deadline passes it has read nothing of one.
func receive(r *bufio.Reader) ([]byte, error) {
	n, err := binary.ReadUvarint(r)
	if err != nil {
		return nil, err
	}
	m := make([]byte, n)
	_, err = io.ReadFull(r, m)
	return m, err
}

// Both ends send at the same time, and end when they have no more. What has come is told
// only then: the hash of it, behind the data.

const copyID = "/apps/copy"

func serveCopy(_ *testing.T, h host.Host) {
	h.SetStreamHandler(copyID, func(s network.Stream) {
		sum := sha256.New()
		if _, err := io.Copy(s, io.TeeReader(s, sum)); err != nil {
			_ = s.Reset()
			return
		}
		_, _ = s.Write(sum.Sum(nil))
		_ = s.Close()
	})
}

func copyBothWays(ctx context.Context, h host.Host, p peer.ID, enough func() bool) error {
	s, err := h.NewStream(ctx, p, copyID)
	if err != nil {
		return err
	}
	sent := newSource(enough)
	var tail lastOf
	err = together(
		func() error {
			if _, err := io.Copy(s, sent); err != nil {
				return err
			}
			return s.CloseWrite()
		},
		func() error {
			_, err := io.Copy(&tail, s)
			return err
		},
	)
	if err != nil {
		return err
	}
	if !tail.is(sent.sum) {
		return errors.New("other bytes have come than were sent")
	}
	return s.Close()
}

// lastOf keeps the hash of all bytes but the last of them, which are a hash themselves.
type lastOf struct {
	sum    hash.Hash
	before []byte // not yet in sum
}

func (l *lastOf) Write(b []byte) (int, error) {
	if l.sum == nil {
		l.sum = sha256.New()
	}
	l.before = append(l.before, b...)
	if n := len(l.before) - sha256.Size; n > 0 {
		l.sum.Write(l.before[:n])
		l.before = append(l.before[:0], l.before[n:]...)
	}
	return len(b), nil
}

// is says whether the bytes are those that were sent, and the peer said so.
func (l *lastOf) is(sent hash.Hash) bool {
	want := string(sent.Sum(nil))
	return l.sum != nil && string(l.sum.Sum(nil)) == want && string(l.before) == want
}

// source gives bytes until there are enough, at a pace that leaves time for others.
type source struct {
	enough func() bool
	tick   <-chan time.Time
	sum    hash.Hash
	n      byte
}

func newSource(enough func() bool) *source {
	return &source{enough: enough, tick: time.NewTicker(time.Millisecond).C, sum: sha256.New()}
}

func (s *source) Read(b []byte) (int, error) {
	<-s.tick
	if s.enough() && s.n > 200 {
		return 0, io.EOF
	}
	b = b[:min(len(b), 8<<10)]
	for i := range b {
		b[i] = s.n + byte(i)
	}
	if s.n < 255 {
		s.n++
	}
	s.sum.Write(b)
	return len(b), nil
}

// HTTP, over one stream that stays, and over a stream for each request.

var echo = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	sum := sha256.New()
	if _, err := io.Copy(sum, r.Body); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	_, _ = w.Write(sum.Sum(nil))
})

func post(ctx context.Context, c *http.Client, url string, enough func() bool) error {
	body := newSource(enough)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, body)
	if err != nil {
		return err
	}
	res, err := c.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	got, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK || string(got) != string(body.sum.Sum(nil)) {
		return fmt.Errorf("%s: other bytes have come than were sent", res.Status)
	}
	return nil
}

const gostreamID = "/apps/gostream"

func serveGostream(t *testing.T, h host.Host) {
	l, err := gostream.Listen(h, gostreamID)
	require.NoError(t, err)
	server := &http.Server{Handler: echo}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { _ = server.Close() })
}

func overGostream(ctx context.Context, h host.Host, p peer.ID, enough func() bool) error {
	dials := 0
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		dials++
		return gostream.Dial(ctx, h, p, gostreamID)
	}}
	defer tr.CloseIdleConnections()
	once := func() bool { return true }
	for i := 0; i < 3; i++ {
		if err := post(ctx, &http.Client{Transport: tr}, "http://peer/", once); err != nil {
			return fmt.Errorf("request %d: %w", i, err)
		}
	}
	if err := post(ctx, &http.Client{Transport: tr}, "http://peer/", enough); err != nil {
		return err
	}
	if dials != 1 {
		return fmt.Errorf("%d streams for what one is enough for", dials)
	}
	return nil
}

func serveHTTP(t *testing.T, h host.Host) {
	server := &libp2phttp.Host{StreamHost: h}
	server.SetHTTPHandler("/echo", echo)
	go func() { _ = server.Serve() }()
	t.Cleanup(func() { _ = server.Close() })
}

func overHTTP(ctx context.Context, h host.Host, p peer.ID, enough func() bool) error {
	client := &libp2phttp.Host{StreamHost: h}
	c, err := client.NamespacedClient("/echo", peer.AddrInfo{ID: p})
	if err != nil {
		return err
	}
	return post(ctx, &c, "/", enough)
}
