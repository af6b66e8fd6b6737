package sim

import (
	"bytes"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	msmux "github.com/multiformats/go-multistream"
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
						if writer == "responder" { // else only that knows
							require.ErrorIs(t, err, network.ErrReset)
						}
						for i := range s {
							got := <-reader[i].ended
							require.ErrorIs(t, got, network.ErrReset, "side %d", i)
							require.Empty(t, reader[i].blocks, "side %d", i)
							_, err := s[i].Read(make([]byte, 1))
							require.ErrorIs(t, err, network.ErrReset, "side %d, once more", i)
							synctest.Wait()
							_, err = s[i].Write([]byte("more"))
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

// A Write that waits on a dead path for a reader goes on, on the new path, and nothing
// that was written before is lost.
func TestBlockedWriteLeavesFrozenPath(t *testing.T) {
	for _, m := range frozenMoves {
		t.Run(m.name, func(t *testing.T) {
			eachSide(t, func(t *testing.T, initiator int) {
				Run(t, func(t *testing.T, n *Net) {
					p := newPair(t, n, m.old, m.new, unlimited(t))
					s := p.stream(0)
					sent := make([]byte, 3<<20)
					for i := range sent {
						sent[i] = byte(i * i >> 8)
					}
					var written atomic.Bool
					go func() {
						n, err := s[0].Write(sent)
						if err != nil || n != len(sent) {
							t.Errorf("Write: %d, %v", n, err)
						}
						written.Store(true)
						_ = s[0].CloseWrite()
					}()
					time.Sleep(5 * time.Second) // its window is full, and all of it has arrived
					require.False(t, written.Load())
					p.freeze(0)
					start := time.Now()
					require.NoError(t, p.migrate(initiator, s, 1))
					require.LessOrEqual(t, time.Since(start), 4*m.new.oneWay, "what has arrived does not need the old path")
					got, err := io.ReadAll(s[1])
					require.NoError(t, err)
					require.True(t, bytes.Equal(sent, got), "other bytes arrived than were sent")
				})
			})
		})
	}
}

// Calls on a connection that takes nothing any more may block until it ends. None of
// them holds up the application.
//
// There is one exception: yamux tells the other end of the room that a Read has made, and
// the Read waits until that is sent. What is still in its buffer then ends with the
// connection, some seconds later, and both ends are told.
func TestCongestedPathFreezes(t *testing.T) {
	for _, tc := range []struct {
		name     string
		old, new way
		unread   int // bytes that wait at both ends when the path freezes
		lost     bool
	}{
		{"TCP to QUIC", way{tcp, ms(10)}, way{quic, ms(25)}, 0, false},
		{"TCP to QUIC with little unread", way{tcp, ms(10)}, way{quic, ms(25)}, 100 << 10, false},
		{"TCP to QUIC with much unread", way{tcp, ms(10)}, way{quic, ms(25)}, 200 << 10, true},
		{"QUIC to TCP", way{quic, ms(10)}, way{tcp, ms(25)}, 0, false},
		{"QUIC to TCP with much unread", way{quic, ms(10)}, way{tcp, ms(25)}, 200 << 10, false},
		{"relay to QUIC", way{relayed, ms(40)}, way{quic, ms(25)}, 0, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			eachSide(t, func(t *testing.T, initiator int) {
				Run(t, func(t *testing.T, n *Net) {
					n.SetBuffer(64 << 10)
					p := newPair(t, n, tc.old, tc.new, unlimited(t))
					s := p.stream(0)
					for i := range s {
						_, err := s[i].Write(make([]byte, tc.unread))
						require.NoError(t, err)
					}
					time.Sleep(time.Second)
					end := p.congest(0)
					defer end()
					start := time.Now()
					moved := make(chan error, 1)
					go func() { moved <- p.migrate(initiator, s, 1) }()
					time.Sleep(4 * tc.new.oneWay)
					for i := range s {
						_, err := io.ReadFull(s[i], make([]byte, tc.unread))
						if tc.lost {
							require.ErrorIs(t, err, network.ErrReset, "side %d", i)
							require.LessOrEqual(t, time.Since(start), 31*time.Second, "the stall timeout bounds it")
						} else {
							require.NoError(t, err)
						}
					}
					if tc.lost {
						require.Error(t, <-moved)
						return
					}
					reader := p.readBoth(s)
					p.requireWorks(s, reader)
					require.Equal(t, 6*tc.new.oneWay, time.Since(start), "nothing was held up")
					require.NoError(t, <-moved)
					p.requireEnds(s, reader)
				})
			})
		})
	}
}

// congest freezes connection i, and then writes to it, from both ends, until it takes
// nothing any more.
func (p *pair) congest(i int) (end func()) {
	p.t.Helper()
	const streams = 60
	accepted := make(chan network.Stream, streams)
	p.nodes[1].SetStreamHandler(rawID, func(s network.Stream) { accepted <- s })
	var all []network.Stream
	for range streams {
		u, err := p.conns[0][i].NewStream(p.t.Context())
		require.NoError(p.t, err)
		require.NoError(p.t, msmux.SelectProtoOrFail(rawID, u))
		all = append(all, u, <-accepted)
	}
	p.freeze(i)
	var writers sync.WaitGroup
	for _, u := range all {
		writers.Go(func() { _, _ = u.Write(make([]byte, 1<<20)) })
	}
	time.Sleep(time.Second)
	return func() {
		for _, u := range all {
			go u.Reset()
		}
		writers.Wait()
	}
}

// A new path that dies before the ack leaves the stream where it is, and working.
func TestNewPathFreezesBeforeAck(t *testing.T) {
	for _, m := range frozenMoves {
		t.Run(m.name, func(t *testing.T) {
			eachSide(t, func(t *testing.T, initiator int) {
				Run(t, func(t *testing.T, n *Net) {
					p := newPair(t, n, m.old, m.new)
					s := p.stream(0)
					reader := p.readBoth(s)
					p.freeze(1)
					moved := make(chan error, 1)
					go func() { moved <- p.migrate(initiator, s, 1) }()
					time.Sleep(time.Second)
					p.requireWorksOn(0, s, reader)
					require.ErrorIs(t, <-moved, migrate.ErrTryLater)
					p.requireWorksOn(0, s, reader)
					p.requireEnds(s, reader)
				})
			})
		})
	}
}

// A new path that dies after the ack takes the stream with it, at both ends and with an
// error: there is no way back.
func TestNewPathFreezesAfterAck(t *testing.T) {
	for _, m := range frozenMoves {
		oneWay := m.new.oneWay
		for _, when := range []struct {
			name string
			at   time.Duration
		}{
			{"before the ack arrives", oneWay * 3 / 2},
			{"before the proof arrives", oneWay * 5 / 2},
			{"before the responder's final size arrives", oneWay * 7 / 2},
			{"when it is over", oneWay*4 + 1},
		} {
			t.Run(m.name+" "+when.name, func(t *testing.T) {
				eachSide(t, func(t *testing.T, initiator int) {
					Run(t, func(t *testing.T, n *Net) {
						p := newPair(t, n, m.old, m.new)
						s := p.stream(0)
						reader := p.readBoth(s)
						go func() { _ = p.migrate(initiator, s, 1) }()
						time.Sleep(when.at)
						p.freeze(1)
						for i := range s {
							got := <-reader[i].ended
							require.Error(t, got, "side %d", i)
							require.NotEqual(t, io.EOF, got, "side %d: the other end did not end", i)
							synctest.Wait()
							_, err := s[i].Write([]byte("more"))
							require.Error(t, err, "side %d", i)
						}
					})
				})
			})
		}
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
	p.requireWorksOn(1, s, readers)
}

func (p *pair) requireWorksOn(conn int, s [2]*migrate.Stream, readers [2]reading) {
	p.t.Helper()
	for i := range s {
		require.Equal(p.t, p.conns[i][conn], s[i].Conn())
		start := time.Now()
		_, err := s[i].Write([]byte("still there?"))
		require.NoError(p.t, err)
		got := <-readers[1-i].blocks
		require.Equal(p.t, "still there?", string(got.data))
		require.Equal(p.t, p.ways[conn].oneWay, got.at.Sub(start))
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
