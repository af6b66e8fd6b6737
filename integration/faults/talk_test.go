package faults

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	. "github.com/go-portage/portage/internal/hosttest"
	"github.com/go-portage/portage/migrate"
)

// The oracle. A talk is what the applications at both ends do with one stream: each writes
// a text that the other knows. It checks every byte, and what Read and Write say:
//
//   - what is read is a prefix of what was written, and no longer than what Write said
//     that it took;
//   - EOF comes only after all of it;
//   - where a byte is missing, both ends get an error. A writer finds that out as
//     applications do, by writing on.

// talk is one stream.
type talk struct {
	name  string
	ends  [2]*migrate.Stream
	flows [2]*flow // flows[side] is what the side writes

	// gives says that an end which gets an error resets the stream, as most applications do.
	gives bool

	rescued atomic.Bool // was reset, since it was stuck on WebRTC

	mu      sync.Mutex // guards all below, and the flows
	changed *sync.Cond
}

// flow is one direction of a talk.
type flow struct {
	t    *talk
	side int // who writes
	text []byte
	size int // how much of text is to be read; what follows is for a writer that finds out
	// early: the writer closes its direction when it has written everything, whatever
	// becomes of it.
	early bool
	piece int

	// Guarded by t.mu.
	allowed   int  // how far the writer may go
	readable  bool // the reader may begin
	attempted int  // how much was handed to Write
	written   int  // how much Write said it took
	closing   bool
	got       int
	wrote     bool // the writer is done
	read      bool // the reader is done
	eof       bool
	writeErr  error
	readErr   error
	wrong     string // what the oracle found
}

// spare is how much a writer may write to find out that its stream is broken.
const spare = 1 << 16

// newTalk begins to talk on a stream. Nothing is written before allow.
func newTalk(name string, ends [2]*migrate.Stream, seed uint64, sizes [2]int) *talk {
	t := &talk{name: name, ends: ends}
	t.changed = sync.NewCond(&t.mu)
	for side := range t.flows {
		t.flows[side] = &flow{
			t: t, side: side, size: sizes[side], readable: true, piece: 3000,
			text: text(seed*2+uint64(side), sizes[side]+spare),
		}
	}
	return t
}

func (t *talk) start() {
	for _, f := range t.flows {
		go f.write()
		go f.readOn()
	}
}

var noise = func() []byte {
	b := make([]byte, 32<<20)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}()

// text is n bytes that are different for every seed, and must not be changed.
func text(seed uint64, n int) []byte {
	at := int(seed*7919) % (len(noise) / 2)
	return noise[at : at+n]
}

// allow lets both writers go on to that many bytes.
func (t *talk) allow(n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, f := range t.flows {
		f.allowed = max(f.allowed, min(n, f.size))
	}
	t.changed.Broadcast()
}

// allowAll lets both ends do all that is left to do.
func (t *talk) allowAll() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, f := range t.flows {
		f.allowed, f.readable = f.size, true
	}
	t.changed.Broadcast()
}

// set changes something of the talk.
func (t *talk) set(f func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	f()
	t.changed.Broadcast()
}

// is looks at something of the talk.
func (t *talk) is(f func() bool) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return f()
}

// caughtUp says whether all that may be written so far, and may be read, has been read.
func (t *talk) caughtUp() bool { return t.is(t.caughtUpLocked) }

// caughtUpLocked is caughtUp. The lock must be held.
func (t *talk) caughtUpLocked() bool {
	for _, f := range t.flows {
		if f.written < f.allowed || f.readable && f.got < f.allowed {
			return false
		}
	}
	return true
}

// awaitCaughtUp returns at the moment at which caughtUp begins to hold.
func (t *talk) awaitCaughtUp(tb testing.TB) {
	tb.Helper()
	late := false
	defer time.AfterFunc(Patience, func() { t.set(func() { late = true }) }).Stop()
	t.mu.Lock()
	defer t.mu.Unlock()
	for !t.caughtUpLocked() {
		if late || t.broken() {
			tb.Fatalf("%s: not all is read that may be written\n%s", t.name, t.describe())
		}
		t.changed.Wait()
	}
}

// delivered says whether everything has been read. The lock must be held.
func (t *talk) delivered() bool {
	return t.flows[0].got >= t.flows[0].size && t.flows[1].got >= t.flows[1].size
}

// broken says whether some end got an error. The lock must be held.
func (t *talk) broken() bool {
	for _, f := range t.flows {
		if f.writeErr != nil || f.readErr != nil {
			return true
		}
	}
	return false
}

// over says whether both ends are done.
func (t *talk) over() bool {
	return t.is(func() bool {
		for _, f := range t.flows {
			if !f.wrote || !f.read {
				return false
			}
		}
		return true
	})
}

// progress grows with everything that is written or read.
func (t *talk) progress() (n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, f := range t.flows {
		n += f.written + f.got
	}
	return n
}

// writesBehindEOF says whether an end that has read EOF is inside of a Write.
func (t *talk) writesBehindEOF() bool {
	return t.is(func() bool {
		for side, f := range t.flows {
			if t.flows[1-side].eof && !f.wrote && f.written < f.attempted {
				return true
			}
		}
		return false
	})
}

// survived says whether both ends have read everything, and EOF.
func (t *talk) survived() bool {
	return t.is(func() bool { return t.flows[0].eof && t.flows[1].eof && !t.broken() })
}

// write is the application that writes.
func (f *flow) write() {
	t := f.t
	s := t.ends[f.side]
	t.mu.Lock()
	defer t.mu.Unlock()
	defer func() {
		f.wrote = true
		t.changed.Broadcast()
	}()
	for {
		for !(f.attempted < f.allowed || f.attempted == f.size && (f.early || t.delivered()) || t.broken()) {
			t.changed.Wait()
		}
		end := min(f.attempted+f.piece, f.allowed)
		switch {
		case f.attempted < f.allowed:
		case !t.broken() || f.early && f.attempted == f.size:
			f.closing = true
			t.mu.Unlock()
			err := s.CloseWrite()
			t.mu.Lock()
			if err != nil && !t.delivered() {
				f.writeErr = err
			}
			return
		case t.delivered():
			return // what is missing is the EOF, of which the reader knows
		case f.attempted < len(f.text):
			// The other application is not to be told that something is missing
			// but by the stream.
			end = f.attempted + 1
			t.mu.Unlock()
			<-time.After(2 * time.Millisecond)
			t.mu.Lock()
		default:
			f.wrong = "its Write never fails"
			return
		}
		from := f.attempted
		f.attempted = end
		t.mu.Unlock()
		n, err := s.Write(f.text[from:end])
		t.mu.Lock()
		f.written += n
		t.changed.Broadcast()
		if err == nil && n != end-from {
			f.wrong = fmt.Sprintf("Write took %d of %d bytes without an error", n, end-from)
		}
		if err != nil {
			f.writeErr = err
			f.giveUp(s)
			return
		}
	}
}

// readOn is the application that reads.
func (f *flow) readOn() {
	t := f.t
	s := t.ends[1-f.side]
	t.mu.Lock()
	defer t.mu.Unlock()
	defer func() {
		f.read = true
		t.changed.Broadcast()
	}()
	for !f.readable {
		t.changed.Wait()
	}
	buf := make([]byte, 8<<10)
	for {
		t.mu.Unlock()
		n, err := s.Read(buf)
		t.mu.Lock()
		switch {
		case f.got+n > f.attempted:
			f.wrong = fmt.Sprintf("%d bytes were read, and only %d written", f.got+n, f.attempted)
		case !bytes.Equal(buf[:n], f.text[f.got:f.got+n]):
			f.wrong = fmt.Sprintf("other bytes than those written, from %d on", f.got)
		}
		f.got += n
		done.bytes.Add(int64(n))
		t.changed.Broadcast()
		switch {
		case f.wrong != "":
			return
		case err == io.EOF:
			f.eof = true
			if !f.closing || f.got != f.attempted {
				f.wrong = fmt.Sprintf("a clean EOF after %d of %d bytes, closed: %v", f.got, f.attempted, f.closing)
			}
			return
		case err != nil:
			f.readErr = err
			f.giveUp(s)
			return
		}
	}
}

func (f *flow) giveUp(s *migrate.Stream) {
	if f.t.gives {
		go func() { _ = s.Reset() }()
	}
}

// check is the oracle's word on a talk that is over.
func (t *talk) check(tb testing.TB) {
	tb.Helper()
	done.streams.Add(1)
	t.mu.Lock()
	defer t.mu.Unlock()
	for side, f := range t.flows {
		switch {
		case f.wrong != "":
			tb.Errorf("%s: what the %s writes: %s\n%s", t.name, endName(side), f.wrong, t.describe())
		case f.got > f.written:
			tb.Errorf("%s: what the %s writes: Write said %d, and %d were read\n%s", t.name, endName(side), f.written, f.got, t.describe())
		}
	}
	if !t.broken() || t.delivered() {
		// That nothing but the last EOF is lost, its sender cannot know.
		return
	}
	for side := range t.ends {
		// What an end knows comes from its own writing and reading. One that is done
		// with both cannot be told any more.
		if t.flows[side].closing && t.flows[1-side].eof {
			continue
		}
		if t.flows[side].writeErr == nil && t.flows[1-side].readErr == nil {
			tb.Errorf("%s: the %s got no error\n%s", t.name, endName(side), t.describe())
		}
	}
}

// describe tells all about a talk. The lock must be held.
func (t *talk) describe() string {
	var b strings.Builder
	for side, f := range t.flows {
		fmt.Fprintf(&b, "\t%s writes: %d of %d handed over, %d taken (done %v, closed %v, %v); %d read (done %v, EOF %v, %v)\n", endName(side),
			f.attempted, f.size, f.written, f.wrote, f.closing, f.writeErr, f.got, f.read, f.eof, f.readErr)
	}
	return b.String()
}

func (t *talk) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.name + "\n" + t.describe()
}

// end waits until both ends are done, checks them, and lets go of the stream.
func (t *talk) end(tb testing.TB) {
	tb.Helper()
	t.settle(tb)
	t.check(tb)
	for _, s := range t.ends {
		if t.survived() {
			_ = s.Close()
		} else {
			_ = s.Reset()
		}
	}
}

func (t *talk) settle(tb testing.TB) {
	tb.Helper()
	defer func() {
		if tb.Failed() && !t.over() {
			tb.Logf("not over: %v\n%s", t, goroutinesOf("portage/migrate."))
		}
	}()
	WaitFor(tb, "both ends to be done: "+t.name, t.over)
}
