package field

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	msmux "github.com/multiformats/go-multistream"
	"github.com/stretchr/testify/require"
)

// What applications do in these situations.

const (
	chatID    protocol.ID = "/test/chat/1.0.0"    // blocks to and fro
	requestID protocol.ID = "/test/request/1.0.0" // a block and the end, and as much back
	sinkID    protocol.ID = "/test/sink/1.0.0"    // takes all and answers nothing
	lateID    protocol.ID = "/test/late/1.0.0"    // is read long after it was written
)

// served is what the acceptors of a host have seen. Safe for concurrent use.
type served struct {
	mu   sync.Mutex
	errs map[uint64]error     // by the number of the stream
	at   map[uint64]time.Time // when
	late int                  // that came whole
	lost []error              // the others
}

func (v *served) failed(number uint64, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.errs[number], v.at[number] = err, time.Now()
}

func (v *served) failure(number uint64) (at time.Time, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.at[number], v.errs[number]
}

// lateFor is how long after it came a stream of lateID is read.
const lateFor = 3 * time.Minute

const lateSize = 5000

func (e *end) serve() {
	e.Node.SetStreamHandler(chatID, func(s network.Stream) {
		var head [12]byte
		if _, err := io.ReadFull(s, head[:]); err != nil {
			_ = s.Reset()
			return
		}
		number, size := binary.BigEndian.Uint64(head[:]), binary.BigEndian.Uint32(head[8:])
		for block := make([]byte, size); ; {
			_, err := io.ReadFull(s, block)
			if err == nil {
				_, err = s.Write(block)
			}
			if err == io.EOF {
				_ = s.Close()
				return
			}
			if err != nil {
				e.failed(number, err)
				_ = s.Reset()
				return
			}
		}
	})
	e.Node.SetStreamHandler(requestID, func(s network.Stream) {
		defer s.Close()
		question, err := io.ReadAll(s)
		if err != nil {
			_ = s.Reset()
			return
		}
		_, _ = s.Write(question)
	})
	e.Node.SetStreamHandler(sinkID, func(s network.Stream) { drop(s); _ = s.Reset() })
	e.Node.SetStreamHandler(lateID, func(s network.Stream) {
		time.Sleep(lateFor)
		got, err := io.ReadAll(s)
		_ = s.Close()
		if err == nil && len(got) != lateSize {
			err = fmt.Errorf("%d bytes of %d, and a clean end", len(got), lateSize)
		}
		e.mu.Lock()
		defer e.mu.Unlock()
		if e.late++; err != nil {
			e.late--
			e.lost = append(e.lost, err)
		}
	})
}

// allowing lets streams be opened on limited connections, and dials nothing: a host that
// dials anew would hide that it was left without a connection.
func allowing(ctx context.Context) context.Context {
	return network.WithAllowLimitedConn(network.WithNoDial(ctx, "field"), "field")
}

var numbers atomic.Uint64

// chat is a stream on which the opener sends a block now and then, and gets it back.
type chat struct {
	number uint64
	from   *end
	to     *end
	s      network.Stream
	every  time.Duration
	closed chan struct{} // no more blocks are wanted
	over   chan struct{} // the opener's side has ended

	mu       sync.Mutex
	err      error
	failedAt time.Time
	asked    time.Time // when the block was sent that was not answered yet; zero: all were
	last     time.Time // when the last answer came
	longest  time.Duration
	waited   string // where and from when on it was without an answer for longest
	rounds   int
}

// chat opens one with the application's host, and begins at once. The opening must succeed.
func (w *world) chat(from, to *end, size int, every time.Duration) *chat {
	w.Helper()
	ctx, cancel := context.WithTimeout(allowing(w.ctx), time.Minute)
	defer cancel()
	s, err := from.host.NewStream(ctx, to.ID(), chatID)
	require.NoError(w, err)
	return w.talk(from, to, s, size, every)
}

// chats opens some from each end, of 100 bytes a second.
func (w *world) chats(each int) []*chat {
	w.Helper()
	var all []*chat
	for range each {
		all = append(all, w.chat(w.a, w.b, 100, time.Second), w.chat(w.b, w.a, 100, time.Second))
	}
	return all
}

// pinned opens one without a label on a connection of one's choice.
func (w *world) pinned(from, to *end, c network.Conn, size int, every time.Duration) *chat {
	w.Helper()
	s, err := openOn(w.ctx, c, chatID)
	require.NoError(w, err)
	return w.talk(from, to, s, size, every)
}

// openOn opens a stream without a label on a connection.
func openOn(ctx context.Context, c network.Conn, id protocol.ID) (network.Stream, error) {
	s, err := c.NewStream(allowing(ctx))
	if err != nil {
		return nil, err
	}
	if err := s.SetProtocol(id); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = s.Reset() })
	defer stop()
	return s, msmux.SelectProtoOrFail(id, s)
}

func (w *world) talk(from, to *end, s network.Stream, size int, every time.Duration) *chat {
	c := &chat{
		number: numbers.Add(1), from: from, to: to, s: s, every: every,
		last: time.Now(), closed: make(chan struct{}), over: make(chan struct{}),
	}
	w.work.Go(func() {
		defer close(c.over)
		defer context.AfterFunc(w.ctx, func() { _ = s.Reset() })()
		if err := c.run(size); err != nil {
			c.mu.Lock()
			c.err, c.failedAt = err, time.Now()
			c.mu.Unlock()
			_ = s.Reset()
			return
		}
		_ = s.Close()
	})
	return c
}

func (c *chat) run(size int) error {
	out := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(nil, c.number), uint32(size))
	block, back := make([]byte, size), make([]byte, size)
	tick := time.NewTimer(0)
	defer tick.Stop()
	<-tick.C
	for i := uint64(1); ; i++ {
		for k := range block {
			block[k] = byte(i*0x9E37 + c.number + uint64(k)*7)
		}
		c.mu.Lock()
		begun := time.Now()
		c.asked = begun
		c.mu.Unlock()
		// The application's Write and Read run at the same time: a block may be larger
		// than what is in flight.
		wrote := make(chan error, 1)
		go func() { _, err := c.s.Write(append(out, block...)); wrote <- err }()
		_, err := io.ReadFull(c.s, back)
		if err != nil {
			_ = c.s.Reset()
		}
		if werr := <-wrote; err == nil {
			err = werr
		}
		if err != nil {
			return fmt.Errorf("round %d: %w", i, err)
		}
		if !bytes.Equal(block, back) {
			return fmt.Errorf("round %d: other bytes than were sent", i)
		}
		out = nil
		c.mu.Lock()
		c.asked, c.last, c.rounds = time.Time{}, time.Now(), int(i)
		if took := time.Since(begun); took > c.longest {
			c.longest, c.waited = took, fmt.Sprintf("from %s on, %s", begun.Format("04:05.000"), name(c.s.Conn()))
		}
		c.mu.Unlock()
		tick.Reset(c.every - time.Since(begun))
		select {
		case <-c.closed:
			return nil
		case <-tick.C:
		}
	}
}

// finish ends the chat, and returns how that went.
func (c *chat) finish(limit time.Duration) error {
	close(c.closed)
	select {
	case <-c.over:
		return c.state(limit)
	case <-time.After(limit):
		return fmt.Errorf("does not end within %v", limit)
	}
}

// state is nil while the chat goes on: neither end has seen an error, and no block has been
// without an answer for longer than patience.
func (c *chat) state(patience time.Duration) error {
	c.mu.Lock()
	err, at, asked, rounds := c.err, c.failedAt, c.asked, c.rounds
	c.mu.Unlock()
	farAt, far := c.to.failure(c.number)
	switch {
	case err != nil:
		return fmt.Errorf("after %d rounds, at %s, moved %d times, the opener: %w", rounds, at.Format("04:05.000"), migrations(c.s), err)
	case far != nil:
		return fmt.Errorf("after %d rounds, at %s, the acceptor: %w", rounds, farAt.Format("04:05.000"), far)
	case !asked.IsZero() && time.Since(asked) > patience:
		return fmt.Errorf("after %d rounds: no answer for %v", rounds, time.Since(asked))
	}
	return nil
}

// wait is the longest time that a block was without an answer.
func (c *chat) wait() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.asked.IsZero() {
		return max(c.longest, time.Since(c.asked))
	}
	return c.longest
}

// waitedFor counts a wait that was before the first block.
func (c *chat) waitedFor(took time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.longest = max(c.longest, took)
}

// errorsAt returns when the opener and the acceptor have seen an error; zero: they have not.
func (c *chat) errorsAt() (opener, acceptor time.Time) {
	c.mu.Lock()
	opener = c.failedAt
	c.mu.Unlock()
	acceptor, _ = c.to.failure(c.number)
	return opener, acceptor
}

// noteAll notes how all chats are, and how long they have had to wait.
func (w *world) noteAll(what string, chats []*chat, patience, allow time.Duration) {
	for i, c := range chats {
		w.takes(fmt.Sprintf("%s %d", what, i), c.state(patience), c.wait(), allow)
	}
}

// mostMoved is how often one of the chats has moved at most.
func mostMoved(chats []*chat) int {
	most := 0
	for _, c := range chats {
		most = max(most, migrations(c.s))
	}
	return most
}

// request sends a block on a stream of its own, and waits for the answer, for as long as
// limit. It dials nothing.
func (w *world) request(from, to *end, limit time.Duration) (took time.Duration, err error) {
	return w.requestWith(allowing(w.ctx), from, to, limit)
}

func (w *world) requestWith(ctx context.Context, from, to *end, limit time.Duration) (took time.Duration, err error) {
	return w.requestBy(byHost, ctx, from, to, limit)
}

// opener opens a stream.
type opener func(ctx context.Context, from, to *end, id protocol.ID) (network.Stream, error)

func byHost(ctx context.Context, from, to *end, id protocol.ID) (network.Stream, error) {
	return from.host.NewStream(ctx, to.ID(), id)
}

func (w *world) requestBy(open opener, ctx context.Context, from, to *end, limit time.Duration) (took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	start := time.Now()
	s, err := open(ctx, from, to, requestID)
	if err != nil {
		return time.Since(start), fmt.Errorf("open, after %v: %w", time.Since(start), err)
	}
	err = ask(ctx, s)
	return time.Since(start), err
}

// ask sends a block on a new stream, and reads it back.
func ask(ctx context.Context, s network.Stream) error {
	start := time.Now()
	defer context.AfterFunc(ctx, func() { _ = s.Reset() })()
	question := []byte("what plain hosts do")
	_, err := s.Write(question)
	if err == nil {
		err = s.CloseWrite()
	}
	var answer []byte
	if err == nil {
		answer, err = io.ReadAll(s)
	}
	switch {
	case ctx.Err() != nil:
		err = fmt.Errorf("no answer within %v on %s", time.Since(start), s.Conn().RemoteMultiaddr())
	case err != nil:
		err = fmt.Errorf("request on %s: %w", s.Conn().RemoteMultiaddr(), err)
	case !bytes.Equal(question, answer):
		err = errors.New("another answer than was sent")
	}
	if err != nil {
		_ = s.Reset()
		return err
	}
	return s.Close()
}

// noteRequest makes a request and notes how it went.
func (w *world) noteRequest(what string, from, to *end, limit, allow time.Duration) {
	took, err := w.request(from, to, limit)
	w.takes(what, err, took, allow)
}

// post writes to a stream, closes it, and leaves it to the other end to read it later.
func (w *world) post(from, to *end) error {
	ctx, cancel := context.WithTimeout(allowing(w.ctx), 10*time.Second)
	defer cancel()
	s, err := from.host.NewStream(ctx, to.ID(), lateID)
	if err != nil {
		return err
	}
	if _, err := s.Write(make([]byte, lateSize)); err != nil {
		return err
	}
	return s.Close()
}

// noteLate notes what has become of what was posted to e.
func (e *end) noteLate(w *world, what string, posted int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	w.holds(what, e.late == posted && len(e.lost) == 0, e.late, " of ", posted, " have come whole; lost: ", e.lost)
}

// upload is a stream on which one end writes without end.
type upload struct {
	bytes atomic.Int64
	mu    sync.Mutex
	err   error
	s     network.Stream
}

func (w *world) upload(from, to *end) *upload {
	w.Helper()
	ctx, cancel := context.WithTimeout(allowing(w.ctx), time.Minute)
	defer cancel()
	s, err := from.host.NewStream(ctx, to.ID(), sinkID)
	require.NoError(w, err)
	u := &upload{s: s}
	w.work.Go(func() {
		defer s.Reset()
		defer context.AfterFunc(w.ctx, func() { _ = s.Reset() })()
		for block := make([]byte, 16<<10); ; {
			n, err := s.Write(block)
			u.bytes.Add(int64(n))
			if err != nil {
				u.mu.Lock()
				u.err = err
				u.mu.Unlock()
				return
			}
		}
	})
	return u
}

// state is nil while the upload goes on.
func (u *upload) state() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.err != nil {
		return fmt.Errorf("after %d bytes, moved %d times: %w", u.bytes.Load(), migrations(u.s), u.err)
	}
	return nil
}
