package field

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/protocol/ping"
	"github.com/libp2p/go-libp2p/p2p/security/noise"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/connmgr"
	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/migrate"
)

var (
	peersFlag   = flag.Int("peers", 100, "peers of TestMassReconnect: 1000 takes two minutes")
	hostileFlag = flag.Int("hostile", 128, "peers of TestHostilePeersThatUseUpEveryWait: 1024 takes minutes")
)

// silence is how long it takes to find a path silent: the time that a connection is given
// to answer a ping.
const silence = 3 * time.Second

// small is what hosts are made with of which there are many.
func small() setup {
	return setup{quietLog: true, host: []libp2p.Option{libp2p.DisableRelay(), libp2p.Security(noise.ID, noise.New)}}
}

// crowd makes many hosts beside a, 10 and 25 ms away from it.
func (w *world) crowd(count int, make func(name string, at []string) *end) []*end {
	w.Helper()
	all := []*end{}
	for i := range count {
		at := []string{fmt.Sprintf("2.%d.%d.1", i/200, i%200), fmt.Sprintf("2.%d.%d.2", i/200, i%200)}
		w.link(w.a.IPs(), at)
		all = append(all, make(fmt.Sprint("c", i), at))
	}
	return all
}

// idle is a stream that carries a block now and then, when it is told to.
type idle struct {
	s    network.Stream
	head []byte
}

// idles opens such a stream from each of many hosts, all at once.
func (w *world) idles(from []*end, to *end) []*idle {
	w.Helper()
	all, errs := make([]*idle, len(from)), make([]error, len(from))
	var wg sync.WaitGroup
	for i, p := range from {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(allowing(w.ctx), 30*time.Second)
			defer cancel()
			s, err := p.host.NewStream(ctx, to.ID(), chatID)
			if err != nil {
				errs[i] = err
				return
			}
			all[i] = &idle{s: s, head: binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(nil, numbers.Add(1)), 10)}
			errs[i] = all[i].carries(30 * time.Second)
		})
	}
	wg.Wait()
	for _, err := range errs {
		require.NoError(w, err)
	}
	return all
}

func (i *idle) carries(limit time.Duration) error {
	late := time.AfterFunc(limit, func() { _ = i.s.Reset() })
	defer late.Stop()
	block := append(i.head, make([]byte, 10)...)
	i.head = nil
	if _, err := i.s.Write(block); err != nil {
		return err
	}
	_, err := io.ReadFull(i.s, make([]byte, 10))
	return err
}

// Many peers lose their network and come back over another one before anybody has noticed.
// Their streams, which carry nothing at the moment, are on the new connections soon, all of
// them: no peer waits for another one's dead path.
func TestMassReconnect(t *testing.T) {
	together(t, func(w *world) {
		w.hosts(small())
		peers := w.crowd(*peersFlag, func(name string, at []string) *end { return w.newEnd(name, at, true, small()) })
		var attempts []Attempt
		const again = 12 * time.Second
		for _, p := range peers {
			attempts = append(attempts,
				Attempt{From: w.a.Node, To: p.Node, Path: Path{Transport: QUIC, From: w.a.IPs()[1], To: p.IPs()[1]}},
				Attempt{From: p.Node, To: w.a.Node, Path: Path{Transport: TCP, From: p.IPs()[0], To: w.a.IPs()[0]}, After: again})
		}
		begun := time.Now()
		dialled := make(chan []error, 1)
		go func() { dialled <- w.DialTogether(attempts...) }()
		time.Sleep(2 * time.Second)
		for _, p := range peers {
			p.AwaitIdentify(p.conns(w.a)[0])
		}
		streams := w.idles(peers, w.a)
		require.Less(w, time.Since(begun), again-2*time.Second, "all have streams in time")
		time.Sleep(again - 2*time.Second - time.Since(begun))
		for _, p := range peers {
			w.Freeze(w.a.IPs()[1], p.IPs()[1])
		}
		for _, err := range <-dialled {
			require.NoError(w, err)
		}
		back := time.Now()
		moved := func() (n int) {
			for _, s := range streams {
				if migrations(s.s) > 0 {
					n++
				}
			}
			return n
		}
		all := w.within(2*silence, func() bool { return moved() == len(streams) })
		assert.True(w, all, "%d of %d streams have moved %v after their peers came back", moved(), len(streams), time.Since(back))
		w.Logf("%d of %d have moved after %v", moved(), len(streams), time.Since(back))
		failed := 0
		for _, s := range streams {
			if all && s.carries(5*time.Second) != nil {
				failed++
			}
		}
		assert.Zero(w, failed, "streams that have moved and do not work")
	})
}

// Peers that answer nothing use up every wait that there is for a peer. The streams of an
// honest one leave its relay all the same, and soon.
func TestHostilePeersThatUseUpEveryWait(t *testing.T) {
	together(t, func(w *world) {
		w.hosts(setup{quietLog: true, host: []libp2p.Option{libp2p.Security(noise.ID, noise.New)}})
		w.relayed(true)
		chats := []*chat{w.chat(w.a, w.b, 100, 100*time.Millisecond), w.chat(w.b, w.a, 100, 100*time.Millisecond)}
		hostile := w.crowd(*hostileFlag, func(name string, at []string) *end { return w.newEnd(name, at, false, small()) })
		var attempts []Attempt
		for i, p := range hostile {
			for _, id := range []protocol.ID{ping.ID, connmgr.PathID, connmgr.DrainID, migrate.ID, migrate.FinalSizeID} {
				p.Node.SetStreamHandler(id, drop) // reads, and answers nothing
			}
			// The older one wins, and so has to be asked.
			attempts = append(attempts,
				Attempt{From: w.a.Node, To: p.Node, Path: Path{Transport: QUIC, From: w.a.IPs()[1], To: p.IPs()[1]}, After: time.Duration(i) * time.Millisecond},
				Attempt{From: p.Node, To: w.a.Node, Path: Path{Transport: TCP, From: p.IPs()[0], To: w.a.IPs()[0]}, After: 2 * time.Second})
		}
		for _, err := range w.DialTogether(attempts...) {
			require.NoError(w, err)
		}
		for i, p := range hostile { // half of them do not even negotiate any more
			if i%2 == 0 {
				p.Network().SetStreamHandler(drop)
			}
		}
		time.Sleep(time.Second)
		w.direct(QUIC, 1)
		direct := time.Now()
		ok := w.within(5*time.Second, func() bool { return migrations(chats[0].s) > 0 && migrations(chats[1].s) > 0 })
		assert.True(w, ok, "the honest peer's streams are on the relay after 5 s: %s", w.a.mgr.Explain(w.b.ID()))
		w.Logf("beside %d hostile peers, the honest one's streams have moved after %v", len(hostile), time.Since(direct))
		for _, c := range chats {
			assert.NoError(w, c.state(5*time.Second))
		}
	})
}

// capture is a host that tells which stream handler is set at its network.
type capture struct {
	host.Host
	set network.StreamHandler
}

func (c *capture) Network() network.Network { return &capturedNetwork{c.Host.Network(), c} }

type capturedNetwork struct {
	network.Network
	c *capture
}

func (n *capturedNetwork) SetStreamHandler(h network.StreamHandler) { n.c.set = h }

// prefixed is a stream of which something has been read already.
type prefixed struct {
	network.Stream
	head io.Reader
}

func (p *prefixed) Read(b []byte) (int, error) { return p.head.Read(b) }

// A peer resets the first attempts to move its streams, and leaves the next ones without an
// answer. There is a bounded number of attempts, and so of rounds.
func TestPeerThatResetsAndThenHangs(t *testing.T) {
	play(t, cast{a: true, aFirst: true}, new(outcome), func(w *world) {
		asked := new(custom)
		w.hostsWith(setup{manager: []connmgr.Option{connmgr.WithPolicy(asked)}}, setup{})
		c := &capture{Host: w.b.Node.Host}
		h, err := migrate.Wrap(c)
		require.NoError(w, err)
		w.b.host = h
		w.b.Node.SetStreamHandler(connmgr.DrainID, drop)
		var mu sync.Mutex
		var first time.Time
		w.b.Network().SetStreamHandler(func(s network.Stream) {
			head := make([]byte, 64)
			n, err := readUntilKnown(s, head)
			if err != nil {
				_ = s.Reset()
				return
			}
			if !isMigrate(head[:n]) {
				c.set(&prefixed{s, io.MultiReader(strings.NewReader(string(head[:n])), s)})
				return
			}
			mu.Lock()
			if first.IsZero() {
				first = time.Now()
			}
			resets := time.Since(first) < 500*time.Millisecond
			mu.Unlock()
			if resets {
				_ = s.Reset()
				return
			}
			drop(s)
		})
		time.Sleep(time.Second)
		w.doubled(8 * time.Second)
		for range 60 {
			w.chat(w.a, w.b, 100, time.Second)
		}
		// The younger connection has to live for 30 s first.
		w.until("a first attempt", time.Minute, func() bool { mu.Lock(); defer mu.Unlock(); return !first.IsZero() })
		before := asked.times.Load()
		const most = 200
		w.within(30*time.Second, func() bool { return asked.times.Load()-before > most })
		assert.LessOrEqual(w, asked.times.Load()-before, int64(most), "rounds in half a minute")
	})
}

const migratePrelude = "\x13/multistream/1.0.0\n\x19/libp2p/stream-migration\n"

// readUntilKnown reads as much of a stream as tells whether it is a migration.
func readUntilKnown(s io.Reader, head []byte) (int, error) {
	n := 0
	for {
		k := n + 1
		switch {
		case n < len(migratePrelude):
			if string(head[:n]) != migratePrelude[:n] {
				return n, nil
			}
		case n == len(migratePrelude)+2: // a length, and the field that tells the message
			return n, nil
		}
		if k > len(head) {
			return n, errors.New("too long")
		}
		if _, err := io.ReadFull(s, head[n:k]); err != nil {
			return n, err
		}
		n = k
	}
}

func isMigrate(head []byte) bool {
	return len(head) == len(migratePrelude)+2 && head[len(head)-1] == 0x12
}

// A program opens all its streams with the plain host, while a connection is being drained.
// They do not all land on that one, and it goes.
func TestPlainStreamsWhileALoserIsDrained(t *testing.T) {
	for _, of := range []string{"of the one that decides", "of the other", "of both"} {
		t.Run(of, func(t *testing.T) {
			play(t, bothCasts[0], new(outcome), func(w *world) {
				w.hosts(setup{})
				w.doubled(3 * time.Second)
				tcp := w.a.on(TCP, w.b)
				require.NotNil(w, tcp)
				w.until("QUIC", 10*time.Second, func() bool { return w.a.on(QUIC, w.b) != nil && w.b.on(QUIC, w.a) != nil })
				time.Sleep(2 * time.Second)
				opens := [][2]*end{{w.a, w.b}, {w.b, w.a}}
				switch of {
				case "of the one that decides":
					opens = opens[:1]
				case "of the other":
					opens = opens[1:]
				}
				total, onLoser := 0, 0
				gone := false
				for begun := time.Now(); time.Since(begun) < 90*time.Second && !gone; gone = tcp.IsClosed() {
					for _, p := range opens {
						s, err := p[0].Node.NewStream(allowing(w.ctx), p[1].ID(), requestID)
						require.NoError(w, err)
						total++
						if p[0].on(TCP, p[1]) == s.Conn() {
							onLoser++
						}
						time.Sleep(time.Second)
						ctx, cancel := context.WithTimeout(w.ctx, 5*time.Second)
						assert.NoError(w, ask(ctx, s))
						cancel()
						time.Sleep(500 * time.Millisecond)
					}
				}
				assert.True(w, gone, "the loser is there after 90 s: %s", w.a.mgr.Explain(w.b.ID()))
				if total >= 10 {
					assert.Less(w, onLoser, total*3/4, "of %d streams on the loser", total)
				}
			})
		})
	}
}
