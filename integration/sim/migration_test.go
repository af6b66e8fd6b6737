package sim

import (
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/migrate"
)

// moves are pairs of an old and a new connection.
var moves = []struct {
	name     string
	old, new way
}{
	{"TCP to faster QUIC", way{tcp, ms(25)}, way{quic, ms(5)}},
	{"TCP to slower QUIC", way{tcp, ms(5)}, way{quic, ms(25)}},
	{"QUIC to faster TCP", way{quic, ms(25)}, way{tcp, ms(5)}},
	{"QUIC to slower TCP", way{quic, ms(5)}, way{tcp, ms(25)}},
	{"QUIC to faster QUIC", way{quic, ms(25)}, way{quic, ms(5)}},
	{"QUIC to slower QUIC", way{quic, ms(5)}, way{quic, ms(25)}},
	{"relay to faster QUIC", way{relayed, ms(25)}, way{quic, ms(5)}},
	{"relay to slower TCP", way{relayed, ms(5)}, way{tcp, ms(25)}},
}

// The initiator's bytes take the new path after one round trip of it, the responder's
// after one and a half; the old stream is done with when its last bytes have arrived and
// the other's final size has.
func TestMigrationTakesItsRoundTrips(t *testing.T) {
	for _, m := range moves {
		t.Run(m.name, func(t *testing.T) {
			eachSide(t, func(t *testing.T, initiator int) {
				Run(t, func(t *testing.T, n *Net) {
					p := newPair(t, n, m.old, m.new)
					s := p.stream(0)
					responder := 1 - initiator
					var (
						rtt     = 2 * m.new.oneWay
						switchI = rtt
						switchR = rtt + m.new.oneWay
						doneI   = max(2*rtt, switchR-1+m.old.oneWay)
						doneR   = max(switchR, switchI-1+m.old.oneWay)
					)
					var received [2]chan int
					for i := range s {
						received[i] = make(chan int, 1)
						go func() {
							n, err := io.Copy(io.Discard, s[i])
							require.NoError(t, err)
							received[i] <- int(n)
						}()
					}
					start := time.Now()
					moved := make(chan error, 1)
					go func() { moved <- p.migrate(initiator, s, 1) }()
					for _, w := range []struct {
						side int
						at   time.Duration
						over int
						why  string
					}{
						{initiator, switchI - 1, 0, "before the ack has come, the initiator's bytes take the old path"},
						{initiator, switchI + 1, 1, "after one round trip the initiator's bytes take the new path"},
						{responder, switchR - 1, 0, "before the proof of the ack, the responder's bytes take the old path"},
						{responder, switchR + 1, 1, "after one and a half round trips the responder's bytes take the new path"},
					} {
						time.Sleep(time.Until(start.Add(w.at)))
						synctest.Wait()
						before := [2]int{p.sent(w.side, 0).Bytes, p.sent(w.side, 1).Bytes}
						_, err := s[w.side].Write(make([]byte, 1000))
						require.NoError(t, err)
						synctest.Wait()
						require.GreaterOrEqual(t, p.sent(w.side, w.over).Bytes-before[w.over], 1000, w.why)
						require.Less(t, p.sent(w.side, 1-w.over).Bytes-before[1-w.over], 1000, w.why)
					}
					require.NoError(t, <-moved)
					require.Equal(t, doneI, time.Since(start), "Migrate returns when the old stream is done with")
					time.Sleep(time.Until(start.Add(max(doneI, doneR))))
					synctest.Wait()
					for i := range s {
						require.Equal(t, p.conns[i][1], s[i].Conn())
						for _, u := range p.conns[i][0].GetStreams() {
							require.NotEqual(t, testID, u.Protocol(), "nothing is left of the old stream at side %d", i)
						}
					}
					require.Equal(t, switchI, p.logs[initiator].at(t, migrate.SendSwitched).Sub(start))
					require.Equal(t, switchR, p.logs[responder].at(t, migrate.SendSwitched).Sub(start))
					require.Equal(t, doneI, p.logs[initiator].at(t, migrate.Finished).Sub(start))
					require.Equal(t, doneR, p.logs[responder].at(t, migrate.Finished).Sub(start))
					for i := range s {
						require.NoError(t, s[i].CloseWrite())
					}
					for i := range s {
						require.Equal(t, 2000, <-received[i], "bytes that side %d received", i)
						require.NoError(t, s[i].Close())
					}
				})
			})
		})
	}
}
