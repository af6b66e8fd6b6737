package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	"golang.org/x/time/rate"
)

// fileProtocol carries one part of a file. The sender writes a header, which is a
// line of JSON, the bytes of the part, and their SHA-256, and closes its
// writing. The receiver answers with a receipt, another line.
const fileProtocol protocol.ID = "/portage-demo/file/1.0.0"

type header struct {
	Name string `json:"name"`
	Part int    `json:"part"` // from 0
	Size int64  `json:"size"`
}

type receipt struct {
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"` // what the receiver has computed, in hexadecimal
}

// chunk is what one Write takes, of one stream: little enough that the throughput of a
// slow path shows as a line and not as a comb.
const chunk = 16 << 10

// burst is how far the sender may catch up at once with its pace, since a timer is often
// a little late.
const burst = 8 * chunk

// chunkOf returns what one Write takes, of so many streams. All of them may be in a
// Write when they move, and what those have written by then is not known.
func chunkOf(streams int) int { return max(chunk/streams, 2<<10) }

// patience is how long the other streams, and the other end, get to say what has become
// of them once a part has failed.
const patience = 2 * time.Second

// source is what is sent.
type source struct {
	name string
	size int64
	file *os.File // nil: generated
}

func openSource(cfg config) (*source, error) {
	if cfg.file == "" {
		return &source{name: "generated", size: cfg.size}, nil
	}
	file, err := os.Open(cfg.file)
	if err != nil {
		return nil, err
	}
	return &source{name: filepath.Base(cfg.file), size: cfg.size, file: file}, nil
}

func (s *source) Close() error {
	if s.file == nil {
		return nil
	}
	return s.file.Close()
}

// part returns one of count parts, all of about the same size.
func (s *source) part(i, count int) (io.Reader, int64) {
	begin := s.size / int64(count) * int64(i)
	size := s.size / int64(count)
	if i == count-1 {
		size = s.size - begin
	}
	if s.file != nil {
		return io.NewSectionReader(s.file, begin, size), size
	}
	var seed [32]byte
	seed[0], seed[1] = byte(i), byte(i>>8)
	return io.LimitReader(rand.NewChaCha8(seed), size), size
}

// transfer sends a source from one host to the other.
type transfer struct {
	cfg  config
	bed  *testbed
	rec  *recorder
	pace *rate.Limiter

	mu       sync.Mutex
	handling int            // parts that the receiver is at
	sums     map[int]string // by part: the SHA-256 of what arrived whole
	lost     error          // what the receiver says of the first part that did not
	arrived  int64          // bytes of parts that have ended, whole or not
}

// newTransfer makes the receiver ready.
func newTransfer(cfg config, bed *testbed, rec *recorder) *transfer {
	t := &transfer{
		cfg:  cfg,
		bed:  bed,
		rec:  rec,
		pace: rate.NewLimiter(rate.Inf, burst),
		sums: make(map[int]string),
	}
	if cfg.rate > 0 {
		t.pace = rate.NewLimiter(rate.Limit(cfg.rate), burst)
	}
	bed.receiver.SetStreamHandler(fileProtocol, t.handle)
	return t
}

// result returns how many bytes arrived, how many streams did so whole, and, if that is the
// only one, the SHA-256 of the file.
func (t *transfer) result() (arrived int64, verified int, sum string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.cfg.streams == 1 {
		sum = t.sums[0]
	}
	return t.arrived, len(t.sums), sum
}

// run sends src, and returns when the receiver has verified all of it, or when that
// will not happen any more.
func (t *transfer) run(ctx context.Context, src *source) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	results := make(chan error, t.cfg.streams)
	for i := range t.cfg.streams {
		go func() { results <- t.sendPart(ctx, src, i) }()
	}
	var sendErr error
	for range t.cfg.streams {
		err := <-results
		if err != nil && sendErr == nil {
			sendErr = err
			time.AfterFunc(patience, cancel)
		}
	}
	if sendErr == nil {
		return nil
	}
	grace, stop := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer stop()
	poll(grace, func() bool {
		t.mu.Lock()
		defer t.mu.Unlock()
		return t.handling == 0
	})
	return t.explain(sendErr)
}

// explain adds to the sender's error what the receiver knows, which is more: how far
// it got.
func (t *transfer) explain(sendErr error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.lost == nil {
		return sendErr
	}
	return fmt.Errorf("%s of %s arrived, %d of %s whole; receiver: %w; sender: %w",
		formatSize(t.arrived), formatSize(t.cfg.size), len(t.sums), plural(t.cfg.streams, "stream"), t.lost, sendErr)
}

// sendPart sends one part, over a stream of its own.
func (t *transfer) sendPart(ctx context.Context, src *source, i int) (err error) {
	// A relayed connection with limits is only used by those who say that they know.
	s, err := t.bed.sender.NewStream(network.WithAllowLimitedConn(ctx, "file transfer"), t.bed.receiver.ID(), fileProtocol)
	if err != nil {
		return fmt.Errorf("open a stream: %w", err)
	}
	defer s.Close()
	defer context.AfterFunc(ctx, func() { s.Reset() })()

	content, size := src.part(i, t.cfg.streams)
	out := departing{s, t.rec.course(i)}
	if err := json.NewEncoder(out).Encode(header{src.name, i, size}); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	hash := sha256.New()
	content = io.TeeReader(&pacedReader{ctx, content, t.pace}, hash)
	if sent, err := io.CopyBuffer(out, content, make([]byte, chunkOf(t.cfg.streams))); err != nil {
		return fmt.Errorf("send: after %s of %s: %w", formatSize(sent), formatSize(size), err)
	} else if sent != size {
		return fmt.Errorf("send: %s is shorter than it was: %s of %s", src.name, formatSize(sent), formatSize(size))
	}
	if t.cfg.hold {
		select {
		case <-t.rec.allMoved:
		case <-ctx.Done():
		}
	}
	if _, err := out.Write(hash.Sum(nil)); err != nil {
		return fmt.Errorf("send the hash: %w", err)
	}
	if err := s.CloseWrite(); err != nil {
		return fmt.Errorf("end of sending: %w", err)
	}
	var got receipt
	if err := json.NewDecoder(s).Decode(&got); err != nil {
		return fmt.Errorf("receipt: %w", err)
	}
	if want := hex.EncodeToString(hash.Sum(nil)); got.Size != size || got.SHA256 != want {
		return fmt.Errorf("receipt: %d bytes with SHA-256 %s arrived; sent were %d with %s", got.Size, got.SHA256, size, want)
	}
	return nil
}

// handle receives one part. It holds no more of it than a buffer.
func (t *transfer) handle(s network.Stream) {
	defer s.Close()
	t.mu.Lock()
	t.handling++
	t.mu.Unlock()
	defer func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.handling--
	}()
	bytesIn := &arriving{Stream: s}
	in := bufio.NewReaderSize(bytesIn, chunk)

	var head header
	line, err := in.ReadSlice('\n')
	if err == nil {
		err = json.Unmarshal(line, &head)
	}
	if err == nil && (head.Part < 0 || head.Part >= t.cfg.streams) {
		err = fmt.Errorf("there is no part %d", head.Part)
	}
	if err != nil {
		s.Reset()
		t.fail(0, fmt.Errorf("header: %w", err))
		return
	}
	bytesIn.follow(t.rec.course(head.Part))
	hash := sha256.New()
	arrived, err := io.CopyN(hash, in, head.Size)
	var claimed [sha256.Size]byte
	if err == nil {
		_, err = io.ReadFull(in, claimed[:])
	}
	sum := hash.Sum(nil)
	if err == nil && !bytes.Equal(sum, claimed[:]) {
		err = errors.New("the SHA-256 is another than the sender's")
	}
	if err == nil {
		// On QUIC a receiver that closes before it has read the end makes that fail.
		switch _, end := in.ReadByte(); end {
		case io.EOF:
		case nil:
			err = errors.New("more arrived than was announced")
		default:
			err = end
		}
	}
	if err != nil {
		s.Reset()
		t.fail(arrived, fmt.Errorf("after %s of %s: %w", formatSize(arrived), formatSize(head.Size), unexpected(err)))
		return
	}
	t.mu.Lock()
	t.sums[head.Part] = hex.EncodeToString(sum)
	t.arrived += arrived
	t.mu.Unlock()
	json.NewEncoder(s).Encode(receipt{arrived, hex.EncodeToString(sum)})
}

// unexpected turns an end in the middle into an error that says so.
func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

func (t *transfer) fail(arrived int64, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.arrived += arrived
	if t.lost == nil {
		t.lost = err
	}
}
