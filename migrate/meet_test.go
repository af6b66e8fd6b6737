package migrate

import (
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
)

// TestEitherEndMigrates: whoever opened the stream, whoever moves it, and on which
// transport, data written before, during and after arrive once and in order (S2, S4),
// the connection is the agreed one, and the label is one that the initiator may give
// (L1).
func TestEitherEndMigrates(t *testing.T) {
	eachPath(t, everyPath, func(t *testing.T, j *journey) {
		for _, side := range ends {
			t.Run(endName(side)+" migrates", func(t *testing.T) {
				s := j.start(t)
				id, first := [2]string{s[0].ID(), s[1].ID()}, s[0].Label()
				// Both speak at every step of both, and nobody listens yet.
				var mu sync.Mutex
				var sent [2][]byte
				speak := func(of int) {
					mu.Lock()
					defer mu.Unlock()
					b := content(uint64(len(sent[of])), 3000)
					sent[of] = append(sent[of], b...)
					if n, err := s[of].Write(b); n != len(b) || err != nil {
						t.Errorf("the %s's Write: %d, %v", endName(of), n, err)
					}
				}
				for _, st := range s {
					for _, kind := range everyStep {
						j.at(st, kind, func() { speak(opener); speak(acceptor) })
					}
				}
				speak(0)
				speak(1)
				require.NoError(t, j.move(t, side, s))
				for _, st := range s {
					j.await(t, st, Finished)
				}
				j.arrived(t, s, j.to(), 1)
				speak(0)
				speak(1)
				for of := range s {
					require.NoError(t, s[of].CloseWrite())
					wantEnd(t, s[1-of], sent[of])
				}
				require.NotEqual(t, first, s[0].Label(), "a migration gives a new label")
				low := j.hosts[side].ID() < j.hosts[1-side].ID()
				require.Equal(t, low, s[0].Label()%2 == 0, "the lower peer gives even labels")
				require.Equal(t, id, [2]string{s[0].ID(), s[1].ID()}, "ID never changes")
				for of := range s {
					require.Equal(t, j.conns[of][j.to()].Stat().Limited, s[of].Stat().Limited)
					require.Equal(t, testID, s[of].Protocol())
				}
				j.closed(t, s)
			})
		}
	})
}

// TestThereAndBack: the end that opened it and the other move a stream to and fro, in
// turns; each finds it where the other left it.
func TestThereAndBack(t *testing.T) {
	eachPath(t, usualPaths, func(t *testing.T, j *journey) {
		s := j.start(t)
		for n := 1; n <= 10; n++ {
			i := (j.from() + n) % 2
			require.NoError(t, j.moveTo(t, (n/2)%2, s, i))
			j.arrived(t, s, i, n)
			j.echoes(t, s, 10_000)
		}
		require.NoError(t, j.moveTo(t, opener, s, j.from()), "it is there already")
		require.Equal(t, 10, s[0].Migrations(), "nothing happens where the stream is there already")
		j.converses(t, s, 1000)
	})
}

// TestBothEndsMigrateAtOnce: M1. Exactly one of two simultaneous attempts stands, that of
// the lower peer ID where both have begun; the other end is told to try later, or finds
// the stream moved. Nothing is lost, at either end, and both agree.
func TestBothEndsMigrateAtOnce(t *testing.T) {
	rounds := 60
	if testing.Short() {
		rounds = 10
	}
	eachPath(t, usualPaths, func(t *testing.T, j *journey) {
		s := j.start(t)
		labels := map[uint64]bool{s[0].Label(): true}
		for n := range rounds {
			i := (j.to() + n) % 2
			var sent [2][]byte
			for side := range s {
				sent[side] = content(uint64(2*n+side), 20_000)
				write(t, s[side], sent[side])
			}
			before := s[0].Migrations()
			var errs [2]error
			var both sync.WaitGroup
			for side := range s {
				both.Go(func() { errs[side] = j.moveTo(t, side, s, i) })
			}
			both.Wait()
			for side, err := range errs {
				if err != nil {
					require.ErrorIs(t, err, ErrTryLater, "round %d: the %s", n, endName(side))
				}
			}
			require.True(t, errs[0] == nil || errs[1] == nil, "round %d: nobody succeeded: %v, %v", n, errs[0], errs[1])
			j.arrived(t, s, i, before+1)
			require.False(t, labels[s[0].Label()], "labels are not used twice")
			labels[s[0].Label()] = true
			for side := range s {
				require.Equal(t, sent[side], readN(t, s[1-side], len(sent[side])), "round %d: what the %s wrote", n, endName(side))
			}
		}
		j.converses(t, s, 1000)
	})
}

// TestLowerPeerGoesFirst: M1, step by step. Both have sent Migrate, and neither has
// answered: the lower peer resets the attempt of the higher one, which drops its own
// and answers.
func TestLowerPeerGoesFirst(t *testing.T) {
	eachPath(t, mainPaths, func(t *testing.T, j *journey) {
		s := j.start(t)
		low, high := opener, acceptor
		if j.hosts[acceptor].ID() < j.hosts[opener].ID() {
			low, high = high, low
		}
		// Each begins before it can see the other's attempt.
		there, release := j.stop(t, s[high], Started)
		highResult := j.moving(t, high, s)
		await(t, there, "the higher peer to begin")
		lowThere, lowRelease := j.stop(t, s[low], Started)
		lowResult := j.moving(t, low, s)
		await(t, lowThere, "the lower peer to begin")
		release()
		require.ErrorIs(t, highResult(), ErrTryLater, "the lower peer's attempt goes first")
		lowRelease()
		require.NoError(t, lowResult())
		j.arrived(t, s, j.to(), 1)
		parity := s[0].Label() % 2
		require.Zero(t, parity, "the label is one that the lower peer gave")
		j.converses(t, s, 1000)
	})
}

// TestHigherPeerYields: M1. The higher peer's attempt has not left when the lower one's
// comes: it is dropped, and the lower one's answered.
func TestHigherPeerYields(t *testing.T) {
	eachPath(t, mainPaths, func(t *testing.T, j *journey) {
		s := j.start(t)
		low, high := opener, acceptor
		if j.hosts[acceptor].ID() < j.hosts[opener].ID() {
			low, high = high, low
		}
		there, release := j.stop(t, s[high], Started)
		highResult := j.moving(t, high, s)
		await(t, there, "the higher peer to begin")
		lowResult := j.moving(t, low, s)
		WaitFor(t, "the higher peer to drop its attempt", func() bool {
			s[high].mu.Lock()
			defer s[high].mu.Unlock()
			return s[high].ex != nil && s[high].ex.phase == phaseYielded
		})
		release()
		require.ErrorIs(t, highResult(), ErrTryLater)
		require.NoError(t, lowResult())
		j.arrived(t, s, j.to(), 1)
		j.converses(t, s, 1000)
	})
}

// TestNextMigrationWaits: M2. A Migrate for a stream whose last migration has not ended
// at this end waits for that, and is then served; and where it does not end in bounded
// time the attempt is told to try later.
func TestNextMigrationWaits(t *testing.T) {
	t.Run("served", func(t *testing.T) {
		j := newJourney(t, tcpQUIC)
		s := j.start(t)
		there, release := j.stop(t, s[acceptor], ReceiveSwitched)
		first := j.moving(t, opener, s)
		await(t, there, "the acceptor's last step")
		require.NoError(t, first())
		back := make(chan error, 1)
		go func() { back <- j.moveTo(t, opener, s, j.from()) }()
		WaitFor(t, "the second request to leave", func() bool { return j.took(s[opener], Started) == 2 })
		require.Equal(t, 1, j.took(s[acceptor], Started), "the acceptor has not ended the first")
		release()
		require.NoError(t, <-back)
		j.arrived(t, s, j.from(), 2)
		j.converses(t, s, 1000)
	})
	t.Run("not for ever", func(t *testing.T) {
		j := newJourney(t, tcpQUIC, func(c *config) error { c.busyWait = 50 * time.Millisecond; return nil })
		s := j.start(t)
		there, release := j.stop(t, s[acceptor], ReceiveSwitched)
		first := j.moving(t, opener, s)
		await(t, there, "the acceptor's last step")
		require.NoError(t, first())
		require.ErrorIs(t, j.moveTo(t, opener, s, j.from()), ErrTryLater)
		release()
		j.arrived(t, s, j.to(), 1)
		j.converses(t, s, 1000)
	})
}

// TestManyMigrateCalls: any number of concurrent calls to Migrate, at both ends, with
// both directions busy, end with a stream that both agree on.
func TestManyMigrateCalls(t *testing.T) {
	eachPath(t, mainPaths, func(t *testing.T, j *journey) {
		s := j.start(t)
		var calls sync.WaitGroup
		for c := range 12 {
			calls.Go(func() {
				for n := range 10 {
					err := j.moveTo(t, c%2, s, (c/2+n)%2)
					if err != nil && !errors.Is(err, ErrTryLater) {
						t.Errorf("caller %d: %v", c, err)
					}
				}
			})
		}
		size := 2 << 20
		var ends sync.WaitGroup
		for side := range s {
			ends.Go(func() { write(t, s[side], content(uint64(side), size)) })
			ends.Go(func() {
				got := readN(t, s[1-side], size)
				if string(got) != string(content(uint64(side), size)) {
					t.Errorf("what the %s wrote did not arrive", endName(side))
				}
			})
		}
		ends.Wait()
		calls.Wait()
		j.settled(t, s)
		require.Equal(t, s[0].Migrations(), s[1].Migrations())
		require.Equal(t, s[0].Label(), s[1].Label())
		for i := range j.conns[0] {
			require.Equal(t, s[0].Conn() == j.conns[0][i], s[1].Conn() == j.conns[1][i], "both ends stand on one connection")
		}
		t.Logf("%d migrations", s[0].Migrations())
		j.converses(t, s, 1000)
	})
}
