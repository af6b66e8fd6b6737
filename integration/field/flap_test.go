package field

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	. "github.com/go-portage/portage/internal/simtest"
)

// Beside an unlimited relay there is a direct path that dies again and again. Plain hosts
// leave the streams that they have opened on the relay there, and these never notice.
func TestDirectPathThatDiesOften(t *testing.T) {
	for _, c := range []struct {
		tr     Transport
		lives  time.Duration // and then its path is cut
		deaths int
	}{
		{TCP, 7 * time.Second, 5},
		{TCP, 1500 * time.Millisecond, 5},
		{TCP, 20 * time.Second, 3},
		{QUIC, 7 * time.Second, 3},
	} {
		t.Run(fmt.Sprintf("%s for %v", c.tr, c.lives), func(t *testing.T) {
			compare(t, func(w *world) {
				w.hosts(setup{})
				w.relayed(false)
				chats := w.chats(2)
				time.Sleep(5 * time.Second)
				a, b := w.a.IPs()[1], w.b.IPs()[1]
				for i := range c.deaths {
					w.direct(c.tr, 1)
					time.Sleep(c.lives)
					if c.tr == TCP {
						w.Sever(a, b)
						time.Sleep(200 * time.Millisecond)
					} else {
						w.Freeze(a, b)
						w.until("QUIC notices", 90*time.Second, func() bool { return w.a.on(QUIC, w.b) == nil && w.b.on(QUIC, w.a) == nil })
						w.Thaw(a, b)
					}
					w.holds(fmt.Sprintf("a connection is left after death %d", i+1), len(w.a.conns(w.b)) > 0 && len(w.b.conns(w.a)) > 0)
					w.noteRequest(fmt.Sprintf("request after death %d", i+1), w.a, w.b, 5*time.Second, time.Second)
					w.noteRequest(fmt.Sprintf("request back after death %d", i+1), w.b, w.a, 5*time.Second, time.Second)
					time.Sleep(time.Second)
				}
				w.noteAll("stream that was opened on the relay", chats, 5*time.Second, 2*time.Second)
			})
		})
	}
}

// A UDP path is down for some seconds, again and again, which QUIC survives.
func TestDirectPathThatFlaps(t *testing.T) {
	compare(t, func(w *world) {
		w.hosts(setup{})
		w.relayed(false)
		chats := w.chats(2)
		time.Sleep(5 * time.Second)
		a, b := w.a.IPs()[1], w.b.IPs()[1]
		quic := w.direct(QUIC, 1)
		for i := range 6 {
			time.Sleep(time.Duration(2+i) * time.Second)
			w.Freeze(a, b)
			time.Sleep(8 * time.Second)
			w.Thaw(a, b)
		}
		time.Sleep(20 * time.Second)
		w.holds("the direct connection stays", !quic.IsClosed())
		w.holds("a connection is left", len(w.a.conns(w.b)) > 0 && len(w.b.conns(w.a)) > 0)
		w.noteAll("stream that was opened on the relay", chats, 5*time.Second, 4*time.Second)
		w.noteRequest("request", w.a, w.b, 5*time.Second, time.Second)
		w.noteRequest("request back", w.b, w.a, 5*time.Second, time.Second)
	})
}

// A direct path carries what is small, such as a ping, and swallows what is large. That
// is no path: streams that do well on a relay stay there.
func TestDirectPathThatSwallowsWhatIsLarge(t *testing.T) {
	for _, most := range []int{8000, 4000} {
		t.Run(fmt.Sprintf("over %d bytes", most), func(t *testing.T) {
			compare(t, func(w *world) {
				w.hosts(setup{})
				w.relayed(false)
				var chats []*chat
				for range 2 {
					chats = append(chats, w.chat(w.a, w.b, 20_000, time.Second), w.chat(w.b, w.a, 20_000, time.Second))
				}
				time.Sleep(5 * time.Second)
				w.Narrow(w.a.IPs()[1], w.b.IPs()[1], most)
				w.direct(TCP, 1)
				for i := range 12 {
					time.Sleep(5 * time.Second)
					w.holds(fmt.Sprintf("a connection is left at %d", i), len(w.a.conns(w.b)) > 0 && len(w.b.conns(w.a)) > 0)
				}
				w.noteAll("stream that was opened on the relay", chats, 5*time.Second, 5*time.Second)
			})
		})
	}
}

// A direct path that swallows what is large does well for an application that sends nothing
// large, and new streams of plain hosts go there. Nobody may break it by asking for more while
// it is in use, at either end, unless new streams of both go elsewhere.
func TestDirectPathThatCarriesWhatIsSmall(t *testing.T) {
	for _, every := range []time.Duration{80 * time.Millisecond, 300 * time.Millisecond, time.Second, 7 * time.Second, 25 * time.Second} {
		t.Run(fmt.Sprintf("a request each %v", every), func(t *testing.T) {
			compare(t, func(w *world) {
				w.hosts(setup{})
				w.relayed(false)
				chats := w.chats(1)
				time.Sleep(5 * time.Second)
				w.Narrow(w.a.IPs()[1], w.b.IPs()[1], 8000)
				w.direct(TCP, 1)
				for i := range int(min(2*time.Minute, 200*every) / every) {
					time.Sleep(every)
					for _, q := range [][2]*end{{w.a, w.b}, {w.b, w.a}} {
						w.noteRequest(fmt.Sprintf("request %d of %s", i, q[0].name), q[0], q[1], 5*time.Second, 2*time.Second)
					}
				}
				w.noteAll("stream that was opened on the relay", chats, 5*time.Second, 5*time.Second)
			})
		})
	}
}

// A QUIC path is down for some seconds while streams on it wait for answers. QUIC waits twice
// as long each time before it sends again, and plain hosts have the answers up to as long
// after the path is back as it was down. Beside a second connection the path is asked, and so
// found up within about a second; and the streams, whether they have left it or not, go on.
func TestPathThatComesBack(t *testing.T) {
	for _, down := range []time.Duration{6500, 7500, 9000, 12_000} {
		down *= time.Millisecond
		t.Run(fmt.Sprint(down), func(t *testing.T) {
			situation := func(w *world) {
				w.hosts(setup{})
				w.dial(w.attempt(QUIC, 1, 0), w.back(TCP, 0, 8*time.Second))
				var chats []*chat
				for range 2 {
					chats = append(chats, w.chat(w.a, w.b, 100, 100*time.Millisecond), w.chat(w.b, w.a, 100, 100*time.Millisecond))
				}
				w.until("TCP", 20*time.Second, func() bool { return w.a.on(TCP, w.b) != nil && w.b.on(TCP, w.a) != nil })
				w.pinned(w.a, w.b, w.a.on(TCP, w.b), 10, time.Hour) // so that it stays
				time.Sleep(10 * time.Second)
				w.Freeze(w.a.IPs()[1], w.b.IPs()[1])
				time.Sleep(down)
				w.Thaw(w.a.IPs()[1], w.b.IPs()[1])
				time.Sleep(15 * time.Second)
				for _, c := range chats {
					assert.NoError(w, c.state(5*time.Second))
					assert.Less(w, c.wait(), down+1300*time.Millisecond, "how long an answer took")
				}
			}
			together(t, situation)
			alone(t, situation)
		})
	}
}

// A machine sleeps, or its network is away for a while: nothing passes on any of its paths, and
// then everything does again. Nobody can tell which connection is better while none answers; so
// all are kept, and what lives on plain hosts lives.
func TestAllPathsPause(t *testing.T) {
	for _, relayed := range []bool{false, true} {
		for _, down := range []time.Duration{5 * time.Second, 12 * time.Second, 20 * time.Second} {
			t.Run(fmt.Sprintf("relayed %v, %v", relayed, down), func(t *testing.T) {
				compare(t, func(w *world) {
					w.hosts(setup{})
					if relayed {
						w.relayed(false)
						w.direct(QUIC, 1)
					} else {
						w.doubled(time.Second)
					}
					chats := w.chats(2)
					time.Sleep(10 * time.Second)
					links := [][2]string{{w.a.IPs()[0], w.b.IPs()[0]}, {w.a.IPs()[1], w.b.IPs()[1]}, {w.a.IPs()[0], ipRelay}}
					for _, l := range links {
						w.Freeze(l[0], l[1])
					}
					time.Sleep(down)
					for _, l := range links {
						w.Thaw(l[0], l[1])
					}
					time.Sleep(15 * time.Second)
					w.holds("a connection is left", len(w.a.conns(w.b)) > 0 && len(w.b.conns(w.a)) > 0)
					w.noteRequest("request", w.a, w.b, 5*time.Second, time.Second)
					w.noteRequest("request back", w.b, w.a, 5*time.Second, time.Second)
					time.Sleep(time.Minute)
					for i, c := range chats {
						w.is(fmt.Sprintf("chat %d", i), c.state(5*time.Second))
					}
				})
			})
		}
	}
}
