//go:build linux

package natbed

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	"golang.org/x/time/rate"

	"github.com/go-portage/portage/migrate"
)

// streamProtocol carries a Stream. The opener writes a header, which is the Stream as a line
// of JSON; then each end writes bytes that the other can compute, too.
const streamProtocol protocol.ID = "/portage-nat/stream/1.0.0"

// echoProtocol sends back what comes, for whoever wants to know whether a host is reached.
const echoProtocol protocol.ID = "/portage-nat/echo/1.0.0"

// Stream is a stream that a node is to open, and what is to be sent on it.
type Stream struct {
	Name string `json:"name"`
	Peer string `json:"peer"`
	// Size is how much each end sends; 0: until the opener is told to finish.
	Size int64 `json:"size,omitempty"`
	// Rate is the pace of each end in bytes a second; 0: as fast as it goes.
	Rate int64 `json:"rate,omitempty"`
	// Burst is how much of that each end sends at first, as fast as it goes.
	Burst int64 `json:"burst,omitempty"`
	// Chunk is what one Write takes.
	Chunk int `json:"chunk"`
	// Fixed has it stay on its connection, with Portage, too: it gets no label.
	Fixed bool `json:"fixed,omitempty"`
	// OneWay has only the opener send.
	OneWay bool `json:"one_way,omitempty"`
	// Trace has the results say when each Read and Write was.
	Trace bool `json:"trace,omitempty"`
}

// Result is what became of a stream at one end.
type Result struct {
	Name     string `json:"name"`
	First    string `json:"first"` // transport when it was opened
	Last     string `json:"last"`  // transport when it ended
	Sent     int64  `json:"sent"`
	Received int64  `json:"received"`
	SentSum  string `json:"sent_sum"` // SHA-256
	RecvSum  string `json:"recv_sum"`
	Wrong    string `json:"wrong,omitempty"` // the first byte that was another than the other end sent
	Error    string `json:"error,omitempty"` // "": both ways ended as they should
	Ended    time.Time
	Gap      time.Duration `json:"gap"` // the longest between two Reads
	GapEnd   time.Time     `json:"gap_end"`
	Reads    []Step        `json:"reads,omitempty"`
	Writes   []Step        `json:"writes,omitempty"`
}

// Step is a Read or a Write.
type Step struct {
	At        time.Time `json:"at"`
	Bytes     int64     `json:"bytes"`
	Transport string    `json:"transport"`
}

// Pair is what became of a stream at both ends.
type Pair struct{ Opener, Acceptor Result }

// Whole returns nil if everything arrived that was sent, both ways, and both ends know.
func (p Pair) Whole() error {
	var errs []error
	for end, r := range map[string]Result{"opener": p.Opener, "acceptor": p.Acceptor} {
		if r.Error != "" {
			errs = append(errs, fmt.Errorf("%s, after %d bytes read and %d written: %s", end, r.Received, r.Sent, r.Error))
		}
	}
	return errors.Join(append(errs, p.Prefix(), same("opener to acceptor", p.Opener, p.Acceptor), same("acceptor to opener", p.Acceptor, p.Opener))...)
}

func same(way string, from, to Result) error {
	if from.Sent != to.Received || from.SentSum != to.RecvSum {
		return fmt.Errorf("%s: %d bytes were sent, with SHA-256 %.8s, and %d arrived, with %.8s", way, from.Sent, from.SentSum, to.Received, to.RecvSum)
	}
	return nil
}

// Prefix returns nil if neither end has read anything but what the other sent: this must be
// true of streams that failed, too.
func (p Pair) Prefix() error {
	for end, r := range map[string]Result{"opener": p.Opener, "acceptor": p.Acceptor} {
		if r.Wrong != "" {
			return fmt.Errorf("%s: %s", end, r.Wrong)
		}
	}
	return nil
}

// Gap returns the longest time between two Reads at either end.
func (p Pair) Gap() time.Duration { return max(p.Opener.Gap, p.Acceptor.Gap) }

// traffic is one end of a Stream.
type traffic struct {
	Stream
	under  network.Stream
	opener bool
	ended  chan struct{} // closed when result is final
	finish chan struct{} // closed when it has sent enough
	once   sync.Once

	mu     sync.Mutex
	result Result
}

func newTraffic(s Stream, under network.Stream, opener bool) *traffic {
	t := &traffic{
		Stream: s,
		under:  under,
		opener: opener,
		ended:  make(chan struct{}),
		finish: make(chan struct{}),
	}
	t.result = Result{Name: s.Name, First: t.transport()}
	return t
}

func (t *traffic) transport() string { return transportOf(t.under.Conn().RemoteMultiaddr()) }

// stop has it send no more.
func (t *traffic) stop() { t.once.Do(func() { close(t.finish) }) }

// run sends and receives, and returns when both are over.
func (t *traffic) run(in io.Reader) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var sending sync.WaitGroup
	sending.Go(func() {
		if err := t.send(ctx); err != nil {
			t.fail(fmt.Errorf("write: %w", err))
			cancel()
		}
	})
	err := t.receive(in)
	if err != nil {
		t.fail(fmt.Errorf("read: %w", err))
		cancel()
	}
	t.stop() // an acceptor sends until the opener has ended
	sending.Wait()
	t.under.Close()

	t.mu.Lock()
	t.result.Last = t.transport()
	t.result.Ended = time.Now()
	t.mu.Unlock()
	close(t.ended)
}

// fail notes the first error. Whoever is still inside the stream is called out.
func (t *traffic) fail(err error) {
	t.mu.Lock()
	first := t.result.Error == ""
	if first {
		t.result.Error = err.Error()
	}
	t.mu.Unlock()
	if first {
		t.under.Reset()
	}
}

// content are the bytes that one end sends, whatever the stream.
func content(opener bool) io.Reader {
	var seed [32]byte
	if opener {
		seed[0] = 1
	}
	return rand.NewChaCha8(seed)
}

func (t *traffic) send(ctx context.Context) error {
	source, sum := content(t.opener), sha256.New()
	defer func() {
		t.mu.Lock()
		t.result.SentSum = sumOf(sum)
		t.mu.Unlock()
	}()
	if t.OneWay && !t.opener {
		// The opener takes this end for a receipt.
		select {
		case <-t.finish:
			return t.under.CloseWrite()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	pace := rate.NewLimiter(rate.Inf, t.Chunk)
	if t.Rate > 0 {
		pace.SetLimit(rate.Limit(t.Rate))
	}
	buf := make([]byte, t.Chunk)
	var sent int64
	for t.Size == 0 || sent < t.Size {
		n := t.Chunk
		if t.Size > 0 {
			n = int(min(int64(n), t.Size-sent))
		}
		if sent >= t.Burst {
			if err := pace.WaitN(ctx, n); err != nil {
				return err
			}
		}
		select {
		case <-t.finish:
			return t.under.CloseWrite()
		case <-ctx.Done():
			return ctx.Err()
		default:
		}
		io.ReadFull(source, buf[:n])
		at := t.transport()
		wrote, err := t.under.Write(buf[:n])
		sum.Write(buf[:wrote])
		sent += int64(wrote)
		t.mu.Lock()
		t.result.Sent = sent
		if t.Trace {
			t.result.Writes = append(t.result.Writes, Step{time.Now(), int64(wrote), at})
		}
		t.mu.Unlock()
		if err != nil {
			return err
		}
	}
	return t.under.CloseWrite()
}

func (t *traffic) receive(in io.Reader) error {
	expected, sum := content(!t.opener), sha256.New()
	defer func() {
		t.mu.Lock()
		t.result.RecvSum = sumOf(sum)
		t.mu.Unlock()
	}()
	buf := make([]byte, 64<<10)
	want := make([]byte, len(buf))
	last := time.Now()
	for {
		n, err := in.Read(buf)
		now := time.Now()
		if n > 0 {
			io.ReadFull(expected, want[:n])
			sum.Write(buf[:n])
			t.mu.Lock()
			if !bytes.Equal(buf[:n], want[:n]) && t.result.Wrong == "" {
				t.result.Wrong = fmt.Sprintf("the %d bytes behind byte %d are others than were sent", n, t.result.Received)
			}
			if gap := now.Sub(last); t.result.Received > 0 && gap > t.result.Gap {
				t.result.Gap, t.result.GapEnd = gap, now
			}
			t.result.Received += int64(n)
			if t.Trace {
				t.result.Reads = append(t.result.Reads, Step{now, int64(n), t.transport()})
			}
			t.mu.Unlock()
			last = now
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func sumOf(h hash.Hash) string { return hex.EncodeToString(h.Sum(nil)) }

// now returns the result so far.
func (t *traffic) now() Result {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.result
}

// openTraffic opens the stream that s says.
func (n *nodeProcess) openTraffic(ctx context.Context, s Stream) (Result, error) {
	p, err := peerOf(s.Peer)
	if err != nil {
		return Result{}, err
	}
	if s.Fixed {
		ctx = migrate.WithoutLabel(ctx)
	}
	under, err := n.host.NewStream(network.WithAllowLimitedConn(ctx, "test"), p, streamProtocol)
	if err != nil {
		return Result{}, err
	}
	t := newTraffic(s, under, true)
	if err := json.NewEncoder(under).Encode(s); err != nil {
		under.Reset()
		return t.now(), fmt.Errorf("header: %w", err)
	}
	n.keep(t)
	go t.run(under)
	return t.now(), nil
}

// acceptTraffic is the handler of streamProtocol.
func (n *nodeProcess) acceptTraffic(under network.Stream) {
	in := bufio.NewReader(under)
	head, err := in.ReadSlice('\n')
	var s Stream
	if err == nil {
		err = json.Unmarshal(head, &s)
	}
	if err != nil {
		under.Reset()
		return
	}
	t := newTraffic(s, under, false)
	n.keep(t)
	t.run(in)
}
