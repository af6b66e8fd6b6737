package field

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/simtest"
)

// Both ends have dialled through a relay that lets 128 KiB pass on each connection. There
// is a stream on each, and each can use up what its connection has.
func TestTwoLimitedRelayedConnections(t *testing.T) {
	compare(t, func(w *world) {
		w.hosts(setup{})
		r := w.relay(true)
		for _, e := range []*end{w.a, w.b} {
			w.Reserve(e.Node, r, TCP)
		}
		var conns [2]network.Conn
		errs := make(chan error, 2)
		for i, p := range [][2]*end{{w.a, w.b}, {w.b, w.a}} {
			w.work.Go(func() {
				c, err := p[0].DialThrough(allowing(w.ctx), p[1].Node, r, TCP)
				conns[i] = c
				errs <- err
			})
		}
		require.NoError(w, <-errs)
		require.NoError(w, <-errs)
		w.until("both connections", 5*time.Second, func() bool { return len(w.a.conns(w.b)) == 2 && len(w.b.conns(w.a)) == 2 })
		for _, p := range [][2]*end{{w.a, w.b}, {w.b, w.a}} {
			for _, c := range p[0].conns(p[1]) {
				p[0].AwaitIdentify(c)
			}
		}
		chats := []*chat{
			w.chatOn(conns[0], w.a, w.b, 2000, 50*time.Millisecond),
			w.chatOn(conns[1], w.b, w.a, 2000, 50*time.Millisecond),
		}
		time.Sleep(30 * time.Second)
		total := 0
		for _, c := range chats {
			c.mu.Lock()
			total += c.rounds * 2000
			c.mu.Unlock()
		}
		w.counts("bytes that the streams have carried", total)
	})
}

// chatOn opens a chat as the application does, on a connection of its choice: the swarm
// takes the one with more streams.
func (w *world) chatOn(c network.Conn, from, to *end, size int, every time.Duration) *chat {
	w.Helper()
	var more []network.Stream
	for range 4 {
		s, err := c.NewStream(allowing(w.ctx))
		require.NoError(w, err)
		more = append(more, s)
	}
	ch := w.chat(from, to, size, every)
	require.True(w, ch.s.Conn() == c, "it is on %s", name(ch.s.Conn()))
	for _, s := range more {
		_ = s.Reset()
	}
	return ch
}

// Streams are so fast that a relay's 128 KiB are gone in about a second. A direct
// connection comes before that, and saves them.
func TestFastStreamsLeaveTheRelayInTime(t *testing.T) {
	for _, rate := range []int{102_000, 205_000} {
		for _, tr := range []Transport{TCP, QUIC} {
			for _, count := range []int{1, 4} {
				t.Run(fmt.Sprintf("%d kB a second over %s, %d streams", rate/1000, tr, count), func(t *testing.T) {
					together(t, func(w *world) {
						w.hosts(setup{})
						w.relayed(true)
						var chats []*chat
						for range count {
							chats = append(chats, w.chat(w.a, w.b, rate/20/count, 50*time.Millisecond))
						}
						time.Sleep(100 * time.Millisecond)
						w.direct(tr, 1)
						time.Sleep(30 * time.Second)
						for _, c := range chats {
							assert.NoError(w, c.state(5*time.Second))
							assert.Equal(w, 1, migrations(c.s))
						}
					})
				})
			}
		}
	}
}

// The old connection fails soon after a new one came, which is dead, too. Both ends hear of it
// about as early as they do on plain hosts: streams have not left a path that has worked for
// long for one that has not.
func TestOldAndNewPathDieTogether(t *testing.T) {
	for _, after := range []time.Duration{500, 700, 900, 1020, 1060, 2000, 9000} {
		after *= time.Millisecond
		t.Run(fmt.Sprintf("new path dead after %v", after), func(t *testing.T) {
			compare(t, func(w *world) { dieTogether(w, 5*time.Second, after, time.Second) })
		})
	}
}

// Both came at once, so that streams move as soon as the new one has answered, and both fail
// while they do. What is not among the moments is the one in which the opener has moved and
// the acceptor has, too, but the news of that is lost on the new path: then the acceptor hears
// of the failure when the new path's transport does, as it would of any other path's.
func TestOldAndNewPathDieWhileStreamsMove(t *testing.T) {
	for _, after := range []time.Duration{500, 700, 900, 1020} {
		after *= time.Millisecond
		t.Run(fmt.Sprintf("new path dead after %v", after), func(t *testing.T) {
			compare(t, func(w *world) { dieTogether(w, time.Second, after, 5*time.Second) })
		})
	}
}

// dieTogether has QUIC come beside TCP, and freeze, and TCP cut 0.7 s after that.
func dieTogether(w *world, second, after, allow time.Duration) {
	w.hosts(setup{})
	w.doubled(second)
	var chats []*chat
	for range 2 {
		chats = append(chats, w.chat(w.a, w.b, 100, 100*time.Millisecond), w.chat(w.b, w.a, 100, 100*time.Millisecond))
	}
	w.until("QUIC", 10*time.Second, func() bool { return w.a.on(QUIC, w.b) != nil && w.b.on(QUIC, w.a) != nil })
	time.Sleep(after)
	w.Freeze(w.a.IPs()[1], w.b.IPs()[1])
	time.Sleep(700 * time.Millisecond)
	cut := time.Now()
	w.Sever(w.a.IPs()[0], w.b.IPs()[0])
	time.Sleep(2 * time.Minute)
	for i, c := range chats {
		opener, acceptor := c.errorsAt()
		for end, at := range map[string]time.Time{"opener": opener, "acceptor": acceptor} {
			var err error
			if at.IsZero() {
				err = fmt.Errorf("it has not heard of it")
			}
			w.takes(fmt.Sprintf("the %s of stream %d hears of the failure", end, i), err, at.Sub(cut), allow)
		}
	}
}

// A direct path dies while the relay is still there. New streams of both ends work again
// after the time of a ping; on plain hosts not before QUIC has noticed.
func TestNewStreamsAfterTheDirectPathDied(t *testing.T) {
	for _, after := range []time.Duration{300, 1500, 2500, 12_000} {
		after *= time.Millisecond
		t.Run(fmt.Sprintf("after %v", after), func(t *testing.T) {
			together(t, func(w *world) {
				w.hosts(setup{})
				w.relayed(false)
				stay := w.pinned(w.a, w.b, w.a.conns(w.b)[0], 10, time.Second)
				w.direct(QUIC, 1)
				time.Sleep(after)
				w.Freeze(w.a.IPs()[1], w.b.IPs()[1])
				died := time.Now()
				var took [2]time.Duration
				var asking sync.WaitGroup
				for i, p := range [][2]*end{{w.a, w.b}, {w.b, w.a}} {
					asking.Go(func() {
						for took[i] = time.Minute; time.Since(died) < 40*time.Second; time.Sleep(50 * time.Millisecond) {
							if _, err := w.request(p[0], p[1], time.Second); err == nil {
								took[i] = time.Since(died)
								return
							}
						}
					})
				}
				asking.Wait()
				for i, of := range []string{"one end", "the other end"} {
					assert.Less(w, took[i], 5*time.Second, "new streams of %s work again", of)
				}
				require.NoError(w, stay.state(5*time.Second))
			})
		})
	}
}
