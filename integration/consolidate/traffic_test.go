package consolidate

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	msmux "github.com/multiformats/go-multistream"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/migrate"
)

// Every stream has a number, which its opener sends first, with how much it will send.
// Every byte after that is a function of the number, the direction and the offset. So
// whatever is lost, repeated or mixed up is seen, at either end.

const (
	pingID    protocol.ID = "/test/ping-pong/1.0.0" // blocks to and fro
	bulkID    protocol.ID = "/test/bulk/1.0.0"      // one way, to the end, then the number of bytes
	requestID protocol.ID = "/test/request/1.0.0"   // one block and the end, and as much back
	postID    protocol.ID = "/test/post/1.0.0"      // one block, which is read only later
)

const blockSize = 100

// traffic is what several hosts do, and what became of it. Safe for concurrent use.
type traffic struct {
	number  atomic.Uint64 // of streams opened
	streams atomic.Int64  // that have ended well, at the opener's end
	served  atomic.Int64  // and at the acceptor's
	plain   atomic.Int64  // of the opened ones, those without a label
	bytes   atomic.Int64  // read and found right

	mu       sync.Mutex // guards what follows
	failures []failure
	labelled []*migrate.Stream // opened

	work sync.WaitGroup // the opener's ends
}

// failure is a stream that has not ended well at one end.
type failure struct {
	number uint64
	opener bool
	err    error
}

// content is the bytes of a stream in one direction, from the first one on.
type content struct {
	number uint64 // of the stream; the highest bit is the direction
	offset uint64
}

// next returns the next n bytes.
func (c *content) next(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		x := (c.number+c.offset>>3)*0x9E3779B97F4A7C15 + c.number
		x = (x ^ x>>29) * 0xBF58476D1CE4E5B9
		p[i] = byte(x >> (8 * (c.offset & 7)))
		c.offset++
	}
	return p
}

func contents(number uint64) (opener, acceptor *content) {
	return &content{number: number}, &content{number: number | 1<<63}
}

var (
	errContent = errors.New("other bytes than were sent")
	errEarly   = errors.New("a clean end before all has come")
)

// early tells an EOF from other errors, which may have one as their cause.
func early(err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return errEarly
	}
	return err
}

// read reads n bytes that must be c's next.
func (tr *traffic) read(s network.Stream, c *content, n int) error {
	p := make([]byte, n)
	if _, err := io.ReadFull(s, p); err != nil {
		return fmt.Errorf("byte %d and on: %w", c.offset, early(err))
	}
	at := c.offset
	if !bytes.Equal(p, c.next(n)) {
		return fmt.Errorf("byte %d and on: %w", at, errContent)
	}
	tr.bytes.Add(int64(n))
	return nil
}

// readToEnd reads c's next bytes to EOF. There have to be so many.
func (tr *traffic) readToEnd(s network.Stream, c *content, size uint64) error {
	p := make([]byte, 16<<10)
	for {
		n, err := s.Read(p)
		if !bytes.Equal(p[:n], c.next(n)) {
			return fmt.Errorf("before byte %d: %w", c.offset, errContent)
		}
		tr.bytes.Add(int64(n))
		switch {
		case err == io.EOF && c.offset != size:
			return fmt.Errorf("after %d bytes of %d: %w", c.offset, size, errEarly)
		case err == io.EOF:
			return nil
		case err != nil:
			return fmt.Errorf("after byte %d: %w", c.offset, err)
		}
	}
}

func readEnd(s network.Stream) error {
	n, err := s.Read(make([]byte, 1))
	switch {
	case n != 0:
		return fmt.Errorf("behind the end: %w", errContent)
	case err != io.EOF:
		return fmt.Errorf("at the end: %w", err)
	}
	return nil
}

func readNumber(s network.Stream) (uint64, error) {
	var p [8]byte
	_, err := io.ReadFull(s, p[:])
	return binary.BigEndian.Uint64(p[:]), early(err)
}

func writeNumber(s network.Stream, n uint64) error {
	_, err := s.Write(binary.BigEndian.AppendUint64(nil, n))
	return err
}

// begin is what the opener sends first: the number of the stream, and how many bytes of
// its content there will be.
func begin(number uint64, size int, first []byte) []byte {
	return append(binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, number), uint64(size)), first...)
}

// serve installs the handlers of everything that hosts of these tests speak.
func (m *member) serve() { m.serveWhich() }

// accept has m take part in the traffic of others.
func (tr *traffic) accept(m *member) {
	for id, serve := range map[protocol.ID]func(s network.Stream, number, size uint64) error{
		pingID: tr.servePing, bulkID: tr.serveBulk, requestID: tr.serveRequest, postID: tr.servePost,
	} {
		m.Node.SetStreamHandler(id, func(s network.Stream) {
			number, err := readNumber(s)
			var size uint64
			if err == nil {
				size, err = readNumber(s)
			}
			if err == nil {
				err = serve(s, number, size)
			}
			if err != nil {
				tr.fail(number, false, fmt.Errorf("%s from %s%s: %w", id, short(s.Conn().RemotePeer()), where(s), err))
				_ = s.Reset()
				return
			}
			_ = s.Close()
			tr.served.Add(1)
		})
	}
}

func short(p peer.ID) string { s := p.String(); return s[len(s)-6:] }

// where says what there is to know about a stream that has failed.
func where(s network.Stream) string {
	migrations := "no label"
	if l, ok := s.(*migrate.Stream); ok {
		migrations = fmt.Sprintf("%d migrations", l.Migrations())
	}
	return fmt.Sprintf(" (%s, on %s)", migrations, s.Conn().RemoteMultiaddr())
}

func (tr *traffic) servePing(s network.Stream, number, size uint64) error {
	in, out := contents(number)
	for in.offset < size {
		if err := tr.read(s, in, blockSize); err != nil {
			return err
		}
		if _, err := s.Write(out.next(blockSize)); err != nil {
			return err
		}
	}
	return readEnd(s)
}

func (tr *traffic) serveBulk(s network.Stream, number, size uint64) error {
	in, _ := contents(number)
	if err := tr.readToEnd(s, in, size); err != nil {
		return err
	}
	return writeNumber(s, size)
}

func (tr *traffic) serveRequest(s network.Stream, number, size uint64) error {
	in, out := contents(number)
	if err := tr.readToEnd(s, in, size); err != nil {
		return err
	}
	_, err := s.Write(out.next(int(size)))
	return err
}

func (tr *traffic) servePost(s network.Stream, number, size uint64) error {
	wait, err := readNumber(s)
	if err != nil {
		return err
	}
	time.Sleep(time.Duration(wait))
	in, _ := contents(number)
	return tr.readToEnd(s, in, size)
}

// opening is how a stream is opened.
type opening func(ctx context.Context, p peer.ID, ids ...protocol.ID) (network.Stream, error)

// stray opens plain streams on any connection, the k-th modulo their number: what a
// program does that keeps connections of its own.
func (m *member) stray(k int) opening {
	return func(ctx context.Context, p peer.ID, ids ...protocol.ID) (network.Stream, error) {
		conns := m.Network().ConnsToPeer(p)
		for ; len(conns) == 0; conns = m.Network().ConnsToPeer(p) {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			time.Sleep(10 * time.Millisecond)
		}
		s, err := conns[k%len(conns)].NewStream(ctx)
		if err != nil {
			return nil, err
		}
		if err := s.SetProtocol(ids[0]); err != nil {
			return nil, err
		}
		return s, msmux.SelectProtoOrFail(ids[0], s)
	}
}

// run runs one side of a stream to the other, in a goroutine of its own.
func (tr *traffic) run(ctx context.Context, open opening, other *member, id protocol.ID, talk func(s network.Stream, number uint64) error) {
	number := tr.number.Add(1)
	tr.work.Go(func() {
		s, err := open(network.WithAllowLimitedConn(ctx, "test"), other.ID(), id)
		if err != nil {
			tr.fail(number, true, fmt.Errorf("open %s: %w", id, err))
			return
		}
		if l, ok := s.(*migrate.Stream); ok {
			tr.mu.Lock()
			tr.labelled = append(tr.labelled, l)
			tr.mu.Unlock()
		} else {
			tr.plain.Add(1)
		}
		if err := talk(s, number); err != nil {
			tr.fail(number, true, fmt.Errorf("%s to %s%s: %w", id, short(other.ID()), where(s), err))
			_ = s.Reset()
			return
		}
		_ = s.Close()
		tr.streams.Add(1)
	})
}

// ping sends that many blocks, each some time after the last was answered.
func (tr *traffic) ping(ctx context.Context, open opening, other *member, blocks int, every time.Duration) {
	tr.run(ctx, open, other, pingID, func(s network.Stream, number uint64) error {
		out, in := contents(number)
		for i := range blocks {
			p := out.next(blockSize)
			if i == 0 {
				p = begin(number, blocks*blockSize, p)
			}
			if _, err := s.Write(p); err != nil {
				return err
			}
			if err := tr.read(s, in, blockSize); err != nil {
				return err
			}
			time.Sleep(every)
		}
		if err := s.CloseWrite(); err != nil {
			return err
		}
		return readEnd(s)
	})
}

// bulk sends so many pieces of that size, as fast as they go but for a pause after each.
func (tr *traffic) bulk(ctx context.Context, open opening, other *member, pieces, size int, pause time.Duration) {
	tr.run(ctx, open, other, bulkID, func(s network.Stream, number uint64) error {
		out, _ := contents(number)
		if _, err := s.Write(begin(number, pieces*size, nil)); err != nil {
			return err
		}
		for range pieces {
			if _, err := s.Write(out.next(size)); err != nil {
				return err
			}
			time.Sleep(pause)
		}
		if err := s.CloseWrite(); err != nil {
			return err
		}
		got, err := readNumber(s)
		if err != nil {
			return fmt.Errorf("the number of bytes that have arrived: %w", err)
		}
		if got != uint64(pieces*size) {
			return fmt.Errorf("%d bytes have arrived of %d", got, pieces*size)
		}
		return readEnd(s)
	})
}

// request sends a block and its end, and reads the answer to its end.
func (tr *traffic) request(ctx context.Context, open opening, other *member, size int) {
	tr.run(ctx, open, other, requestID, func(s network.Stream, number uint64) error {
		out, in := contents(number)
		if _, err := s.Write(begin(number, size, out.next(size))); err != nil {
			return err
		}
		if err := s.CloseWrite(); err != nil {
			return err
		}
		return tr.readToEnd(s, in, uint64(size))
	})
}

// post sends a block and closes the stream. The acceptor reads only after a while, in which
// the opener has nothing left of the stream.
func (tr *traffic) post(ctx context.Context, open opening, other *member, size int, after time.Duration) {
	tr.run(ctx, open, other, postID, func(s network.Stream, number uint64) error {
		out, _ := contents(number)
		_, err := s.Write(binary.BigEndian.AppendUint64(begin(number, size, nil), uint64(after)))
		if err != nil {
			return err
		}
		_, err = s.Write(out.next(size))
		return err
	})
}

func (tr *traffic) fail(number uint64, opener bool, err error) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.failures = append(tr.failures, failure{number, opener, fmt.Errorf("stream %d, %s: %w", number, time.Now().Format("04:05.000"), err)})
}

// migrations returns how many there have been of the labelled streams first to end, in the
// order in which they were opened, and how many of one stream at most.
func (tr *traffic) migrations(first, end int) (total, most int) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	end = min(end, len(tr.labelled))
	for _, s := range tr.labelled[min(first, end):end] {
		n := s.Migrations()
		total += n
		most = max(most, n)
	}
	return total, most
}

func (tr *traffic) allMigrations() (total, most int) { return tr.migrations(0, math.MaxInt) }

// requireAll waits for all streams, which have to end well.
func (tr *traffic) requireAll(t *testing.T) {
	t.Helper()
	tr.work.Wait()
	time.Sleep(time.Minute) // for the acceptors' ends
	tr.mu.Lock()
	defer tr.mu.Unlock()
	for i, f := range tr.failures {
		if i == 20 {
			t.Errorf("and %d more", len(tr.failures)-i)
			break
		}
		t.Error(f.err)
	}
	require.EqualValues(t, tr.number.Load(), tr.streams.Load(), "streams opened, and ended well")
	require.EqualValues(t, tr.number.Load(), tr.served.Load(), "streams opened, and accepted")
}

// requireHonest waits for all streams, which may fail, but not silently: no byte is wrong
// or missing, and what went well for the opener went well for the acceptor.
func (tr *traffic) requireHonest(t *testing.T) (failed int) {
	t.Helper()
	tr.work.Wait()
	time.Sleep(5 * time.Minute) // what is dead is noticed
	tr.mu.Lock()
	defer tr.mu.Unlock()
	openers := make(map[uint64]bool)
	for _, f := range tr.failures {
		openers[f.number] = openers[f.number] || f.opener
	}
	for _, f := range tr.failures {
		if errors.Is(f.err, errContent) || errors.Is(f.err, errEarly) {
			t.Errorf("a silent gap: %v", f.err)
		}
		if !openers[f.number] {
			t.Errorf("the opener has not been told: %v", f.err)
		}
	}
	return len(openers)
}
