package sim

import (
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/migrate"
)

// frozenMoves are migrations away from a path that freezes.
var frozenMoves = []struct {
	name     string
	old, new way
}{
	{"TCP to QUIC", way{tcp, ms(10)}, way{quic, ms(25)}},
	{"QUIC to TCP", way{quic, ms(10)}, way{tcp, ms(25)}},
	{"QUIC to QUIC", way{quic, ms(40)}, way{quic, ms(25)}},
	{"relay to QUIC", way{relayed, ms(40)}, way{quic, ms(25)}},
}

// A path that goes dead while nothing is under way on it does no harm to a stream that
// migrates away from it, whenever that happens: not even an error, not even a delay.
func TestOldPathFreezesWhileIdle(t *testing.T) {
	for _, m := range frozenMoves {
		oneWay := m.new.oneWay
		for _, when := range []struct {
			name string
			at   time.Duration // after the migration began
		}{
			{"long before", -10 * time.Second},
			{"before the request arrives", oneWay / 2},
			{"before the ack arrives", oneWay * 3 / 2},
			{"after the ack", 2*oneWay + 1},
			{"before the responder has switched", oneWay * 5 / 2},
			{"after the responder has switched", 3*oneWay + 1},
		} {
			t.Run(m.name+" "+when.name, func(t *testing.T) {
				eachSide(t, func(t *testing.T, initiator int) {
					Run(t, func(t *testing.T, n *Net) {
						p := newPair(t, n, m.old, m.new)
						s := p.stream(0)
						reader := p.readBoth(s) // a Read is inside the old stream from the beginning
						if when.at < 0 {
							p.freeze(0)
							time.Sleep(-when.at)
						}
						start := time.Now()
						moved := make(chan error, 1)
						go func() { moved <- p.migrate(initiator, s, 1) }()
						if when.at >= 0 {
							time.Sleep(when.at)
							p.freeze(0)
						}
						require.NoError(t, <-moved)
						require.Equal(t, 4*oneWay, time.Since(start), "a migration takes no longer for it")
						p.requireWorks(s, reader)
						time.Sleep(2 * time.Minute) // the old connection ends meanwhile
						require.True(t, p.conns[0][0].IsClosed())
						p.requireWorks(s, reader)
						p.requireEnds(s, reader)
					})
				})
			})
		}
	}
}

// Bytes that a dead path has swallowed are never passed over: both ends see an error,
// after the stall timeout at the latest.
func TestOldPathSwallowsBytes(t *testing.T) {
	for _, m := range frozenMoves {
		for _, writer := range []string{"initiator", "responder"} {
			t.Run(m.name+" of the "+writer, func(t *testing.T) {
				eachSide(t, func(t *testing.T, initiator int) {
					Run(t, func(t *testing.T, n *Net) {
						p := newPair(t, n, m.old, m.new)
						s := p.stream(0)
						reader := p.readBoth(s)
						side := initiator
						if writer == "responder" {
							side = 1 - initiator
						}
						p.freeze(0)
						_, err := s[side].Write([]byte("swallowed"))
						require.NoError(t, err)
						start := time.Now()
						err = p.migrate(initiator, s, 1)
						if side != initiator {
							require.Error(t, err)
						} // else it is the responder who finds out, later
						for i := range s {
							got := <-reader[i].ended
							require.ErrorIs(t, got, network.ErrReset, "side %d", i)
							require.Empty(t, reader[i].blocks, "side %d", i)
							_, err := s[i].Write([]byte("more"))
							require.ErrorIs(t, err, network.ErrReset, "side %d", i)
						}
						require.LessOrEqual(t, time.Since(start), 31*time.Second)
					})
				})
			})
		}
	}
}

// Where the path comes to life again in time, nothing was lost, and nothing is.
func TestOldPathThaws(t *testing.T) {
	for _, m := range frozenMoves {
		t.Run(m.name, func(t *testing.T) {
			eachSide(t, func(t *testing.T, initiator int) {
				Run(t, func(t *testing.T, n *Net) {
					p := newPair(t, n, m.old, m.new)
					s := p.stream(0)
					reader := p.readBoth(s)
					p.freeze(0)
					for i := range s {
						_, err := s[i].Write([]byte("before"))
						require.NoError(t, err)
					}
					moved := make(chan error, 1)
					go func() { moved <- p.migrate(initiator, s, 1) }()
					time.Sleep(time.Second)
					for i := range s {
						require.Equal(t, p.conns[i][1], s[i].Conn(), "writing does not wait for the old path")
						_, err := s[i].Write([]byte("after"))
						require.NoError(t, err)
					}
					time.Sleep(2 * time.Second)
					for i := range s {
						require.Empty(t, reader[i].blocks, "what follows the lost bytes must not overtake them")
					}
					p.thaw(0)
					require.NoError(t, <-moved)
					for i := range s {
						require.Equal(t, "before", string((<-reader[i].blocks).data))
						require.Equal(t, "after", string((<-reader[i].blocks).data))
					}
					p.requireWorks(s, reader)
					p.requireEnds(s, reader)
				})
			})
		})
	}
}

// block is what one Read brought.
type block struct {
	data []byte
	at   time.Time
}

// reading is what an end of a stream reads.
type reading struct {
	blocks chan block
	ended  chan error
}

// readBoth reads both ends.
func (p *pair) readBoth(s [2]*migrate.Stream) (readers [2]reading) {
	for i := range s {
		r := reading{make(chan block, 1<<10), make(chan error, 1)}
		readers[i] = r
		go func() {
			for {
				buf := make([]byte, 1<<10)
				n, err := s[i].Read(buf)
				if n > 0 {
					r.blocks <- block{buf[:n], time.Now()}
				}
				if err != nil {
					r.ended <- err
					return
				}
			}
		}()
	}
	synctest.Wait()
	return readers
}

// requireWorks checks that both directions are as fast as connection 1.
func (p *pair) requireWorks(s [2]*migrate.Stream, readers [2]reading) {
	p.t.Helper()
	for i := range s {
		require.Equal(p.t, p.conns[i][1], s[i].Conn())
		start := time.Now()
		_, err := s[i].Write([]byte("still there?"))
		require.NoError(p.t, err)
		got := <-readers[1-i].blocks
		require.Equal(p.t, "still there?", string(got.data))
		require.Equal(p.t, p.ways[1].oneWay, got.at.Sub(start))
	}
}

// requireEnds checks that both directions end with EOF.
func (p *pair) requireEnds(s [2]*migrate.Stream, readers [2]reading) {
	p.t.Helper()
	for i := range s {
		require.NoError(p.t, s[i].CloseWrite())
	}
	for i := range s {
		require.Equal(p.t, io.EOF, <-readers[i].ended)
		require.NoError(p.t, s[i].Close())
	}
}
