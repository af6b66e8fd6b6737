package sim

import (
	"encoding/binary"
	"io"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/migrate"
)

const (
	pace      = time.Millisecond
	paceBlock = 1 << 10
)

// What an application that sends 1 KiB every millisecond sees of a migration: where the
// new path is faster nothing at all, where it is slower that it is slower, once.
func TestPacedStreamHasNoGap(t *testing.T) {
	for _, m := range moves {
		t.Run(m.name, func(t *testing.T) {
			eachSide(t, func(t *testing.T, initiator int) {
				Run(t, func(t *testing.T, n *Net) {
					const blocks = 400
					p := newPair(t, n, m.old, m.new)
					p.warmUp()
					s := p.stream(0)
					var got [2]chan arrivals
					for i := range s {
						got[i] = make(chan arrivals, 1)
						go func() { got[i] <- receivePaced(s[i]) }()
						go sendPaced(t, s[i], blocks)
					}
					time.Sleep(blocks / 3 * pace)
					require.NoError(t, p.migrate(initiator, s, 1))
					bound := pace + max(0, m.new.oneWay-m.old.oneWay)
					for i := range s {
						a := <-got[i]
						require.NoError(t, a.err)
						require.Equal(t, blocks, a.blocks, "blocks that side %d received, in order", i)
						require.LessOrEqual(t, a.gap, bound, "longest gap that side %d sees, at block %d", i, a.at)
						require.Equal(t, p.conns[i][1], s[i].Conn())
					}
				})
			})
		})
	}
}

// sendPaced sends numbered blocks, each when its time has come.
func sendPaced(t *testing.T, s *migrate.Stream, blocks int) {
	block := make([]byte, paceBlock)
	next := time.Now()
	for i := range blocks {
		time.Sleep(time.Until(next))
		next = next.Add(pace)
		binary.BigEndian.PutUint64(block, uint64(i))
		if _, err := s.Write(block); err != nil {
			t.Errorf("block %d: %v", i, err)
			_ = s.Reset()
			return
		}
	}
	if err := s.CloseWrite(); err != nil {
		t.Errorf("end: %v", err)
	}
}

type arrivals struct {
	blocks int
	gap    time.Duration // the longest between two blocks
	at     int           // the block that ended it
	err    error
}

// receivePaced receives blocks until EOF, or until one is not the next.
func receivePaced(s *migrate.Stream) (a arrivals) {
	block := make([]byte, paceBlock)
	var last time.Time
	for {
		if _, err := io.ReadFull(s, block); err != nil {
			if err != io.EOF {
				a.err = err
			}
			return a
		}
		if binary.BigEndian.Uint64(block) != uint64(a.blocks) {
			return a
		}
		if gap := time.Since(last); !last.IsZero() && gap > a.gap {
			a.gap, a.at = gap, a.blocks
		}
		last = time.Now()
		a.blocks++
	}
}
