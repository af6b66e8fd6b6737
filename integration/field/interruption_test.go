package field

import (
	"fmt"
	"sync"
	"testing"
	"time"

	. "github.com/go-portage/portage/internal/simtest"
)

// The direct path is silent for some time, and then works again. Beside it there is a relayed
// connection, on which something else has a stream. Whatever lives through that on plain hosts
// lives, is not found to go on later, and a new stream of either end does not take longer.
func TestInterruptionBesideARelay(t *testing.T) {
	for _, limited := range []bool{false, true} {
		for _, tr := range []Transport{QUIC, TCP} {
			for _, silent := range []time.Duration{3, 8, 15, 25} {
				silent *= time.Second
				relay := "an unlimited relay"
				if limited {
					relay = "a limited relay"
				}
				t.Run(fmt.Sprintf("%s beside %s, silent for %v", tr, relay, silent), func(t *testing.T) {
					compare(t, func(w *world) { interruptedBesideRelay(w, tr, limited, silent) })
				})
			}
		}
	}
}

func interruptedBesideRelay(w *world, tr Transport, limited bool, silent time.Duration) {
	w.hosts(setup{})
	stays := w.pinned(w.a, w.b, w.relayed(limited), 10, 10*time.Second)
	w.direct(tr, 1)
	time.Sleep(40 * time.Second) // the direct connection has proved itself
	var often, rarely []*chat
	for _, p := range [][2]*end{{w.a, w.b}, {w.b, w.a}} {
		often = append(often, w.chat(p[0], p[1], 100, 100*time.Millisecond))
		rarely = append(rarely, w.chat(p[0], p[1], 100, 7*time.Second))
	}
	time.Sleep(10 * time.Second)
	w.Freeze(w.a.IPs()[1], w.b.IPs()[1])
	back := time.Now().Add(silent)
	// An application that opens a stream every now and then, and waits for each.
	var asking sync.WaitGroup
	for i, p := range [][2]*end{{w.a, w.b}, {w.b, w.a}} {
		asking.Go(func() {
			start := time.Now()
			var err error
			for tries := 0; tries == 0 || err != nil && time.Since(start) < time.Minute; tries++ {
				_, err = w.request(p[0], p[1], 5*time.Second)
			}
			w.takes(fmt.Sprintf("a new stream of %s", []string{"one end", "the other end"}[i]), err, time.Since(start), 2*time.Second)
		})
	}
	time.Sleep(time.Until(back))
	w.Thaw(w.a.IPs()[1], w.b.IPs()[1])
	asking.Wait()
	time.Sleep(time.Until(back.Add(30 * time.Second)))
	// An answer that was on its way comes when the transport repeats it, which is up to as long
	// after the path is back as it was silent.
	w.noteAll("stream in use", often, 15*time.Second, 3*time.Second)
	w.noteAll("stream that is used now and then", rarely, 15*time.Second, 3*time.Second)
	w.noteAll("stream on the relay", []*chat{stays}, 15*time.Second, time.Second)
}
