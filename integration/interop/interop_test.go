// Package interop tests Portage against a peer on js-libp2p, which was written from
// docs/protocol.md alone. See js/README.md.
package interop

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"

	"github.com/go-portage/portage/migrate"
)

// pair is a Go host and a Node process with two connections between them.
type pair struct {
	host  *migrate.Host
	node  *node
	conns [2]conn
	on    atomic.Pointer[network.Conn] // where the Go host opens streams
	held  chan *migrate.Stream         // streams of /held/1.0.0 that the Go host has accepted
	trace atomic.Pointer[func(migrate.Event)]
	deny  atomic.Bool // whether the Go host denies migrations
}

// newPair makes one. lower says which of them is the lower peer, start is for the Node process.
func newPair(t *testing.T, lower string, start args) *pair {
	t.Helper()
	requireNode(t)
	mine, other := identities(t)
	if lower == "js" {
		mine, other = other, mine
	}
	p := &pair{held: make(chan *migrate.Stream, 100)}
	h, err := migrate.Wrap(newHost(t, mine),
		migrate.WithConnSelector(func(context.Context, peer.ID) network.Conn { return *p.on.Load() }),
		migrate.WithTracer(func(e migrate.Event) {
			if trace := p.trace.Load(); trace != nil {
				(*trace)(e)
			}
		}),
		migrate.WithAcceptor(func(*migrate.Stream, network.Conn) bool { return !p.deny.Load() }))
	check(t, err)
	p.host = h
	p.serve()
	p.node = startNode(t, other, start)
	p.conns = [2]conn{p.node.dial(t, h), p.node.dial(t, h)}
	p.use(0)
	eventually(t, "identify has run at the Go host", func() bool { return h.Supports(p.node.info.ID) })
	return p
}

func (p *pair) serve() {
	p.host.SetStreamHandler("/echo/1.0.0", func(s network.Stream) {
		if _, err := io.Copy(s, s); err != nil {
			_ = s.Reset()
			return
		}
		_ = s.Close()
	})
	p.host.SetStreamHandler("/held/1.0.0", func(s network.Stream) { p.held <- s.(*migrate.Stream) })
}

// use opens the streams of the Go host on that connection from now on.
func (p *pair) use(i int) { p.on.Store(&p.conns[i].Conn) }

// openGo opens a stream from the Go host.
func (p *pair) openGo(t *testing.T, id string) *migrate.Stream {
	t.Helper()
	s, err := p.host.NewStream(withLimit(t), p.node.info.ID, protocol.ID(id))
	check(t, err)
	labelled, ok := s.(*migrate.Stream)
	if !ok {
		t.Fatalf("the stream has no label")
	}
	return labelled
}

// heldByJS opens a stream from the Go host, and returns what the Node process has of it, too.
func (p *pair) heldByJS(t *testing.T) (*migrate.Stream, int) {
	t.Helper()
	s := p.openGo(t, "/held/1.0.0")
	write(t, s, "begin")
	id := wait(t, "a stream", p.node.streams).Stream
	p.readJS(t, id, "begin")
	return s, id
}

// heldByGo opens a stream from the Node process.
func (p *pair) heldByGo(t *testing.T) (*migrate.Stream, int) {
	t.Helper()
	id := p.node.must(t, "open", args{"conn": p.conns[0].js, "protocol": "/held/1.0.0"}).Stream
	s := wait(t, "a stream", p.held)
	p.writeJS(t, id, "begin")
	read(t, s, "begin")
	return s, id
}

func (p *pair) writeJS(t *testing.T, id int, text string) {
	t.Helper()
	p.node.must(t, "write", args{"stream": id, "bytes": hex.EncodeToString([]byte(text))})
}

func (p *pair) readJS(t *testing.T, id int, text string) {
	t.Helper()
	var got []byte
	for len(got) < len(text) {
		a := p.node.must(t, "read", args{"stream": id})
		part, err := hex.DecodeString(a.Bytes)
		check(t, err)
		if got = append(got, part...); a.EOF {
			break
		}
	}
	if string(got) != text {
		t.Fatalf("the Node process read %q, not %q", got, text)
	}
}

func (p *pair) endJS(t *testing.T, id int) {
	t.Helper()
	if a := p.node.must(t, "read", args{"stream": id}); !a.EOF {
		t.Fatalf("the Node process read %s, no EOF", a.Bytes)
	}
}

func write(t *testing.T, s network.Stream, text string) {
	t.Helper()
	_, err := s.Write([]byte(text))
	check(t, err)
}

func read(t *testing.T, s network.Stream, text string) {
	t.Helper()
	check(t, s.SetReadDeadline(time.Now().Add(limit)))
	got := make([]byte, len(text))
	if _, err := io.ReadFull(s, got); err != nil || string(got) != text {
		t.Fatalf("read %q (%v), not %q", got, err, text)
	}
	check(t, s.SetReadDeadline(time.Time{}))
}

func readEnd(t *testing.T, s network.Stream) {
	t.Helper()
	check(t, s.SetReadDeadline(time.Now().Add(limit)))
	if n, err := s.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Fatalf("read %d bytes, %v; not EOF", n, err)
	}
}

// talk shows that a stream works in both directions.
func (p *pair) talk(t *testing.T, s *migrate.Stream, id int) {
	t.Helper()
	write(t, s, "to js")
	p.readJS(t, id, "to js")
	p.writeJS(t, id, "to go")
	read(t, s, "to go")
}

// settled waits until a migration has ended at both sides, and the same is known at both.
func (p *pair) settled(t *testing.T, s *migrate.Stream, id int) {
	t.Helper()
	var a answer
	eventually(t, "both sides have the stream under one label, on one connection", func() bool {
		a = p.node.must(t, "info", args{"stream": id})
		return a.Idle && a.Label == fmt.Sprint(s.Label()) && a.Conn == p.js(s.Conn())
	})
}

func (p *pair) js(c network.Conn) string {
	for _, known := range p.conns {
		if known.ID() == c.ID() {
			return known.js
		}
	}
	return ""
}

// migrate moves a stream to that connection, by whom it says.
func (p *pair) migrate(t *testing.T, by string, s *migrate.Stream, id, to int) {
	t.Helper()
	if by == "go" {
		check(t, p.host.Migrate(withLimit(t), s, p.conns[to]))
	} else if a := p.node.must(t, "migrate", args{"stream": id, "conn": p.conns[to].js}); a.Result != "moved" {
		t.Fatalf("the Node process says: %s", a.Result)
	}
}

func each(t *testing.T, run func(t *testing.T, lower, by string)) {
	for _, lower := range []string{"go", "js"} {
		for _, by := range []string{"go", "js"} {
			t.Run(fmt.Sprintf("lower=%s/by=%s", lower, by), func(t *testing.T) { run(t, lower, by) })
		}
	}
}

var errOtherBytes = errors.New("other bytes came back than were sent")

// load sends through a stream until finish, and checks what comes back.
type load struct {
	stop   chan struct{}
	result chan error
}

func startLoad(s network.Stream) *load {
	l := &load{make(chan struct{}), make(chan error, 1)}
	wrote := make(chan error, 1)
	sent, got := sha256.New(), sha256.New()
	go func() {
		chunk := make([]byte, 32<<10)
		for i := 0; ; i++ {
			select {
			case <-l.stop:
				wrote <- s.CloseWrite()
				return
			default:
			}
			for j := range chunk {
				chunk[j] = byte(i + j)
			}
			sent.Write(chunk)
			if _, err := s.Write(chunk); err != nil {
				wrote <- fmt.Errorf("write: %w", err)
				return
			}
		}
	}()
	go func() {
		n, err := io.Copy(got, s)
		if werr := <-wrote; werr != nil {
			err = errors.Join(err, werr)
		} else if err == nil && !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
			err = fmt.Errorf("%w: %d bytes", errOtherBytes, n)
		}
		l.result <- err
	}()
	return l
}

func (l *load) finish(t *testing.T) error {
	t.Helper()
	close(l.stop)
	return wait(t, "the load's end", l.result)
}

func TestVectors(t *testing.T) {
	requireNode(t)
	ctx := withLimit(t)
	cmd := exec.CommandContext(ctx, "node", "--test", "vectors.test.js")
	cmd.Dir = "js"
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

func TestEcho(t *testing.T) {
	p := newPair(t, "go", nil)
	check(t, startLoad(p.openGo(t, "/echo/1.0.0")).finish(t))
	s := p.openGo(t, "/echo/1.0.0") // one that is closed at once is opened all the same
	check(t, s.CloseWrite())
	readEnd(t, s)
	p.finishJS(t, p.loadJS(t))
}

// jsLoad is what the Node process sends and gets back.
type jsLoad struct {
	stream int
	result <-chan answer
}

func (p *pair) loadJS(t *testing.T) jsLoad {
	t.Helper()
	a := p.node.must(t, "open", args{"conn": p.conns[0].js, "protocol": "/echo/1.0.0"})
	if a.Label == "" || a.Label == "undefined" {
		t.Fatal("the stream of the Node process has no label")
	}
	return jsLoad{a.Stream, p.node.begin("transfer", args{"stream": a.Stream})}
}

func (p *pair) finishJS(t *testing.T, l jsLoad) {
	t.Helper()
	p.node.must(t, "finish", args{"stream": l.stream})
	a := wait(t, "the load's end", l.result)
	if a.Error != "" || a.Sent != a.Received {
		t.Fatalf("the Node process sent %s and got %s back, %d bytes; %s", a.Sent, a.Received, a.Size, a.Error)
	}
}

// Twenty migrations of a stream that is loaded in both directions.
func TestMigrationsUnderLoad(t *testing.T) {
	each(t, func(t *testing.T, lower, by string) {
		p := newPair(t, lower, nil)
		s := p.openGo(t, "/echo/1.0.0")
		goLoad, jsLoad := startLoad(s), p.loadJS(t)
		for i := range 20 {
			to := p.conns[(i+1)%2]
			if by == "go" {
				check(t, p.host.Migrate(withLimit(t), s, to))
				theirs := p.accepted(t, jsLoad.stream)
				check(t, p.host.Migrate(withLimit(t), theirs, to))
				continue
			}
			for _, id := range []int{jsLoad.stream, p.acceptedJS(t, s)} {
				if a := p.node.must(t, "migrate", args{"stream": id, "conn": to.js}); a.Result != "moved" {
					t.Fatalf("migration %d: %s", i, a.Result)
				}
			}
		}
		check(t, goLoad.finish(t))
		p.finishJS(t, jsLoad)
		if got := s.Migrations(); got < 20 {
			t.Errorf("the stream of the Go host has moved %d times, not 20", got)
		}
	})
}

// accepted returns what the Go host has of a stream of the Node process.
func (p *pair) accepted(t *testing.T, id int) (found *migrate.Stream) {
	t.Helper()
	eventually(t, "the Go host knows the stream", func() bool {
		label := p.node.must(t, "info", args{"stream": id}).Label
		for _, c := range p.conns {
			for _, s := range p.host.Streams(c.Conn) {
				if fmt.Sprint(s.Label()) == label {
					found = s
				}
			}
		}
		return found != nil
	})
	return found
}

// acceptedJS returns how the Node process calls a stream of the Go host.
func (p *pair) acceptedJS(t *testing.T, s *migrate.Stream) (id int) {
	t.Helper()
	eventually(t, "the Node process knows the stream", func() bool {
		id = p.node.must(t, "find", args{"label": fmt.Sprint(s.Label())}).Stream
		return id != 0
	})
	return id
}

// Both ends move the same stream at the same time, again and again.
func TestMeetings(t *testing.T) {
	for _, lower := range []string{"go", "js"} {
		t.Run("lower="+lower, func(t *testing.T) {
			p := newPair(t, lower, nil)
			s := p.openGo(t, "/echo/1.0.0")
			l := startLoad(s)
			id := p.acceptedJS(t, s)
			moved := 0
			for i := range 40 {
				to := p.conns[(i+1)%2]
				theirs := p.node.begin("migrate", args{"stream": id, "conn": to.js})
				err := p.host.Migrate(withLimit(t), s, to)
				a := wait(t, "migrate", theirs)
				if err != nil && !errors.Is(err, migrate.ErrTryLater) {
					t.Fatalf("round %d: Go: %v; Node: %s", i, err, a.Result)
				}
				if a.Result != "moved" && a.Result != "met" && a.Result != "failed" {
					t.Fatalf("round %d: Go: %v; Node: %s %s", i, err, a.Result, a.Error)
				}
				p.settled(t, s, id)
				if s.Conn().ID() == to.ID() {
					moved++
				}
			}
			check(t, l.finish(t))
			if moved < 40 {
				t.Errorf("of 40 meetings only %d have moved the stream", moved)
			}
		})
	}
}

// Writes that nobody reads, and that are blocked in both directions, are carried on by the new
// connection.
func TestBlockedWrites(t *testing.T) {
	for _, by := range []string{"go", "js"} {
		t.Run("by="+by, func(t *testing.T) {
			const size = 20 << 20 // more than all windows and buffers take
			p := newPair(t, "go", nil)
			s, id := p.heldByJS(t)
			theirs := p.node.begin("fill", args{"stream": id, "size": size})
			eventually(t, "the Node process is blocked", func() bool { return p.node.must(t, "info", args{"stream": id}).Blocked })
			sent := make([]byte, size)
			for i := range sent {
				sent[i] = byte(i >> 8)
			}
			var taken atomic.Int64
			wrote := make(chan error, 1)
			go func() {
				for rest := sent; len(rest) > 0; {
					n, err := s.Write(rest[:min(len(rest), 64<<10)])
					taken.Add(int64(n))
					if err != nil {
						wrote <- err
						return
					}
					rest = rest[n:]
				}
				wrote <- s.CloseWrite()
			}()
			eventually(t, "the Go host has begun", func() bool { return taken.Load() > 0 })
			p.migrate(t, by, s, id, 1)
			p.settled(t, s, id)

			received := p.node.begin("receive", args{"stream": id})
			got := sha256.New()
			check(t, s.SetReadDeadline(time.Now().Add(limit)))
			_, err := io.CopyN(got, s, size)
			check(t, err)
			if a := wait(t, "fill", theirs); a.Error != "" || a.Sent != hex.EncodeToString(got.Sum(nil)) {
				t.Errorf("the Go host has received other bytes than %+v", a)
			}
			check(t, wait(t, "the Write", wrote))
			hash := sha256.Sum256(sent)
			if a := wait(t, "receive", received); a.Error != "" || a.Size != size || a.Received != hex.EncodeToString(hash[:]) {
				t.Errorf("the Node process has received other bytes: %+v", a)
			}
		})
	}
}

func TestHalfClosed(t *testing.T) {
	each(t, func(t *testing.T, lower, by string) {
		p := newPair(t, lower, nil)
		s, id := p.heldByJS(t)
		check(t, s.CloseWrite())
		p.endJS(t, id)
		p.migrate(t, by, s, id, 1)
		p.settled(t, s, id)
		p.writeJS(t, id, "more")
		read(t, s, "more")
		p.node.must(t, "closeWrite", args{"stream": id})
		readEnd(t, s)

		s, id = p.heldByGo(t)
		p.node.must(t, "closeWrite", args{"stream": id})
		readEnd(t, s)
		p.migrate(t, by, s, id, 1)
		p.settled(t, s, id)
		write(t, s, "more")
		p.readJS(t, id, "more")
		check(t, s.CloseWrite())
		p.endJS(t, id)
		check(t, s.Close())
		p.node.must(t, "closeStream", args{"stream": id})
	})
}

func TestDenied(t *testing.T) {
	for _, lower := range []string{"go", "js"} {
		t.Run("lower="+lower, func(t *testing.T) {
			p := newPair(t, lower, nil)
			s, id := p.heldByJS(t)
			p.node.must(t, "accept", args{"on": false})
			if err := p.host.Migrate(withLimit(t), s, p.conns[1]); !errors.Is(err, migrate.ErrDenied) {
				t.Fatalf("Go: %v, not ErrDenied", err)
			}
			p.talk(t, s, id)
			p.migrate(t, "js", s, id, 1) // a denial binds nobody else
			p.settled(t, s, id)
			p.talk(t, s, id)

			s, id = p.heldByGo(t)
			p.deny.Store(true)
			if a := p.node.must(t, "migrate", args{"stream": id, "conn": p.conns[1].js}); a.Result != "denied" {
				t.Fatalf("Node: %s, not denied", a.Result)
			}
			p.talk(t, s, id)
			p.node.must(t, "accept", args{"on": true})
			p.migrate(t, "go", s, id, 1)
			p.settled(t, s, id)
			p.talk(t, s, id)
		})
	}
}

func TestResets(t *testing.T) {
	for _, moves := range []string{"", "go", "js"} {
		t.Run("moved by="+moves, func(t *testing.T) {
			p := newPair(t, "go", nil)
			other, otherID := p.heldByJS(t)
			s, id := p.heldByJS(t)
			if moves != "" {
				p.migrate(t, moves, s, id, 1)
				p.settled(t, s, id)
			}
			reading := p.node.begin("read", args{"stream": id})
			check(t, s.ResetWithError(77))
			if a := wait(t, "read", reading); a.Error == "" || a.Code != 77 {
				t.Errorf("the Node process read %+v, not a reset with code 77", a)
			}
			s, id = p.heldByGo(t)
			if moves != "" {
				p.migrate(t, moves, s, id, 1)
				p.settled(t, s, id)
			}
			p.node.must(t, "reset", args{"stream": id, "code": 78})
			check(t, s.SetReadDeadline(time.Now().Add(limit)))
			_, err := s.Read(make([]byte, 1))
			var reset *network.StreamError
			if !errors.As(err, &reset) || reset.ErrorCode != 78 || !reset.Remote {
				t.Errorf("the Go host read %v, not a reset with code 78", err)
			}
			p.talk(t, other, otherID)
		})
	}
}

// A stream on which nothing is under way survives the death of its connection, if it is
// moved before its application has noticed.
func TestMovedAfterDeath(t *testing.T) {
	each(t, func(t *testing.T, lower, by string) {
		p := newPair(t, lower, nil)
		s, id := p.heldByJS(t)
		p.node.must(t, "abort", args{"conn": p.conns[0].js})
		eventually(t, "the Go host has noticed", p.conns[0].IsClosed)
		p.migrate(t, by, s, id, 1)
		p.settled(t, s, id)
		p.talk(t, s, id)
		check(t, s.CloseWrite())
		p.endJS(t, id)
	})
}

// Connections die while streams move, at each step of a migration. A stream ends with all of
// its bytes, or with an error: never with fewer, or others.
func TestConnectionsThatDie(t *testing.T) {
	steps := []migrate.EventKind{migrate.Started, migrate.Acked, migrate.SendSwitched, migrate.ReceiveSwitched}
	for _, by := range []string{"go", "js"} {
		t.Run("by="+by, func(t *testing.T) {
			p := newPair(t, "go", nil)
			whole := 0
			for i := range 2 * len(steps) {
				p.conns = [2]conn{p.node.dial(t, p.host), p.node.dial(t, p.host)}
				p.use(0)
				step, dies := steps[i/2], p.conns[i%2]
				s := p.openGo(t, "/echo/1.0.0")
				l := startLoad(s)
				id := p.acceptedJS(t, s)
				reached := make(chan struct{})
				var once sync.Once
				trace := func(e migrate.Event) {
					if e.Stream == s && (e.Kind == step || e.Kind == migrate.Failed || e.Kind == migrate.Finished) {
						once.Do(func() { close(reached) })
					}
				}
				p.trace.Store(&trace)
				var theirs <-chan answer
				ours := make(chan error, 1)
				if by == "js" {
					theirs = p.node.begin("migrate", args{"stream": id, "conn": p.conns[1].js})
				} else {
					go func() { ours <- p.host.Migrate(withLimit(t), s, p.conns[1]) }()
				}
				wait(t, step.String(), reached)
				if (i+i/2)%2 == 0 {
					p.node.must(t, "abort", args{"conn": dies.js})
				} else {
					check(t, dies.Close())
				}
				if by == "js" {
					if a := wait(t, "migrate", theirs); a.Error != "" {
						t.Fatalf("migrate: %s", a.Error)
					}
				} else {
					_ = wait(t, "Migrate", ours) // whatever it says
				}
				err := l.finish(t)
				if err == nil {
					whole++
				} else if errors.Is(err, errOtherBytes) {
					t.Fatalf("%v, when connection %d died at the step %q", err, i%2, step)
				}
				_ = s.Reset()
				for _, c := range p.conns {
					_ = c.Close()
				}
			}
			t.Logf("%d of %d streams were whole", whole, 2*len(steps))
		})
	}
}

// vectors is docs/vectors.json, as far as it is used here.
type vectors struct {
	Openings []struct {
		Name, Opener, Bytes, Answer, Reset string
	}
}

// What must be refused is refused, by each of the two, and another stream of the same
// connection does not notice.
func TestOpenings(t *testing.T) {
	data, err := os.ReadFile("../../docs/vectors.json")
	check(t, err)
	var v vectors
	check(t, json.Unmarshal(data, &v))
	unspaced := func(s string) string { return strings.ReplaceAll(s, " ", "") }
	for _, opener := range []string{"go", "js"} {
		for _, rank := range []string{"lower", "higher"} {
			t.Run(fmt.Sprintf("%s, the %s peer, opens", opener, rank), func(t *testing.T) {
				lower := opener
				if rank == "higher" {
					lower = map[string]string{"go": "js", "js": "go"}[opener]
				}
				p := newPair(t, lower, nil)
				s, id := p.heldByJS(t)
				for _, o := range v.Openings {
					if o.Opener != rank {
						continue
					}
					var got answer
					if opener == "js" {
						got = p.node.must(t, "raw", args{"conn": p.conns[0].js, "bytes": unspaced(o.Bytes), "until": len(unspaced(o.Answer)) / 2})
					} else {
						got = openRaw(t, p.conns[0], unspaced(o.Bytes), len(unspaced(o.Answer))/2)
					}
					switch {
					case o.Answer != "" && got.Bytes != unspaced(o.Answer):
						t.Errorf("%s: the answer is %+v, not %s", o.Name, got, unspaced(o.Answer))
					case o.Reset != "" && (!got.Reset || o.Reset != "any" && fmt.Sprintf("%#x", got.Code) != o.Reset):
						t.Errorf("%s: the answer is %+v, not a reset with code %s", o.Name, got, o.Reset)
					}
					p.talk(t, s, id)
				}
			})
		}
	}
}

// openRaw sends bytes on a stream that is not negotiated, as the Node process does.
func openRaw(t *testing.T, c network.Conn, text string, until int) (got answer) {
	t.Helper()
	data, err := hex.DecodeString(text)
	check(t, err)
	s, err := c.NewStream(withLimit(t))
	check(t, err)
	defer func() { _ = s.Reset() }()
	check(t, s.SetDeadline(time.Now().Add(limit)))
	_, err = s.Write(data)
	check(t, err)
	if until == 0 {
		until = 1 << 20
	}
	answered := make([]byte, until)
	n, err := io.ReadFull(s, answered)
	got.Bytes = hex.EncodeToString(answered[:n])
	var reset *network.StreamError
	if errors.As(err, &reset) && reset.Remote {
		got.Reset, got.Code = true, uint32(reset.ErrorCode)
	}
	return got
}

// A peer without the verified handover.
func TestDraftOnly(t *testing.T) {
	each(t, func(t *testing.T, lower, by string) {
		p := newPair(t, lower, args{"draftOnly": true})
		s := p.openGo(t, "/echo/1.0.0")
		l := startLoad(s)
		id := p.acceptedJS(t, s)
		for i := range 20 {
			p.migrate(t, by, s, id, (i+1)%2)
			p.settled(t, s, id)
		}
		check(t, l.finish(t))

		// Half-closed, both ways.
		s, id = p.heldByJS(t)
		check(t, s.CloseWrite())
		p.endJS(t, id)
		p.migrate(t, by, s, id, 1)
		p.writeJS(t, id, "more")
		read(t, s, "more")
		p.node.must(t, "closeWrite", args{"stream": id})
		readEnd(t, s)
		s, id = p.heldByGo(t)
		p.node.must(t, "closeWrite", args{"stream": id})
		readEnd(t, s)
		p.migrate(t, by, s, id, 1)
		write(t, s, "more")
		p.readJS(t, id, "more")
		check(t, s.CloseWrite())
		p.endJS(t, id)

		// Both at once.
		s = p.openGo(t, "/echo/1.0.0")
		l = startLoad(s)
		id = p.acceptedJS(t, s)
		for i := range 20 {
			theirs := p.node.begin("migrate", args{"stream": id, "conn": p.conns[(i+1)%2].js})
			err := p.host.Migrate(withLimit(t), s, p.conns[(i+1)%2])
			a := wait(t, "migrate", theirs)
			if err != nil && !errors.Is(err, migrate.ErrTryLater) && !errors.Is(err, migrate.ErrDenied) {
				t.Fatalf("round %d: Go: %v; Node: %s", i, err, a.Result)
			}
			p.settled(t, s, id)
		}
		check(t, l.finish(t))
	})
}
