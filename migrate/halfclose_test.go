package migrate

import (
	"fmt"
	"io"
	"testing"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
)

// TestHalfClose: S6, S2, S5. Either end closes its writing, at any moment of a migration
// by either end: the other reads all that was written, then EOF, then EOF for ever; and
// the direction that stays open carries on. That is a request, a half-close and a reply
// with a migration anywhere in it.
func TestHalfClose(t *testing.T) {
	eachPath(t, usualPaths, func(t *testing.T, j *journey) {
		for _, mover := range ends {
			for _, closer := range ends {
				for _, m := range everyMoment {
					for _, reading := range []bool{false, true} {
						name := fmt.Sprintf("%s migrates, %s closes, %s, reading %t", endName(mover), endName(closer), m, reading)
						t.Run(name, func(t *testing.T) { halfClose(t, j, mover, closer, m, reading) })
					}
				}
			}
		}
	})
}

func halfClose(t *testing.T, j *journey, mover, closer int, m moment, reading bool) {
	s := j.start(t)
	requester, replier := s[closer], s[1-closer]
	request, aside, reply := content(1, 40_000), content(2, 10_000), content(3, 20_000)
	write(t, requester, request[:30_000])
	write(t, replier, aside)

	var got []byte
	ended := make(chan error, 1)
	if reading { // a Read is inside the old stream all the time
		go func() {
			var err error
			got, err = io.ReadAll(replier)
			ended <- err
		}()
	}
	err := j.duringMove(t, mover, s, m, func() {
		if _, err := requester.Write(request[30_000:]); err != nil {
			t.Errorf("Write: %v", err)
		}
		if err := requester.CloseWrite(); err != nil {
			t.Errorf("CloseWrite: %v", err)
		}
	})
	require.NoError(t, err)
	j.arrived(t, s, j.to(), 1)

	_, err = requester.Write([]byte{1})
	require.Error(t, err, "what is closed for writing stays closed")
	if reading {
		within(t, "EOF", func() { err = <-ended })
		require.NoError(t, err)
		require.Equal(t, request, got)
		wantEnd(t, replier, nil)
	} else {
		wantEnd(t, replier, request)
	}
	write(t, replier, reply)
	require.NoError(t, replier.CloseWrite())
	wantEnd(t, requester, append(aside, reply...))
	wantEnd(t, replier, nil)
	j.closed(t, s)
}

// TestEndThatWasReadStays: S6. An EOF that the application has read before a migration
// stays, through any number of migrations by either end; what the other direction
// carries meanwhile is not touched.
func TestEndThatWasReadStays(t *testing.T) {
	eachPath(t, usualPaths, func(t *testing.T, j *journey) {
		for _, closer := range ends {
			t.Run(endName(closer)+" has closed", func(t *testing.T) {
				s := j.start(t)
				write(t, s[closer], []byte("request"))
				require.NoError(t, s[closer].CloseWrite())
				wantEnd(t, s[1-closer], []byte("request"))
				for n := 1; n <= 4; n++ {
					i := (j.from() + n) % 2
					require.NoError(t, j.moveTo(t, n/2%2, s, i))
					j.arrived(t, s, i, n)
					wantEnd(t, s[1-closer], nil)
					write(t, s[1-closer], []byte("reply"))
					require.Equal(t, []byte("reply"), readN(t, s[closer], 5))
				}
				require.NoError(t, s[1-closer].CloseWrite())
				wantEnd(t, s[closer], nil)
				j.closed(t, s)
			})
		}
	})
}

// TestBothDirectionsEnded: a stream that both ends have closed for writing, and not for
// good, migrates like any other: read to the end, or not read at all.
func TestBothDirectionsEnded(t *testing.T) {
	eachPath(t, usualPaths, func(t *testing.T, j *journey) {
		for _, mover := range ends {
			for _, read := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s migrates, read before %t", endName(mover), read), func(t *testing.T) {
					s := j.start(t)
					for side := range s {
						write(t, s[side], content(uint64(side), 5000))
						require.NoError(t, s[side].CloseWrite())
					}
					if read {
						for side := range s {
							wantEnd(t, s[side], content(uint64(1-side), 5000))
						}
					}
					require.NoError(t, j.move(t, mover, s))
					j.arrived(t, s, j.to(), 1)
					for side := range s {
						if read {
							wantEnd(t, s[side], nil)
						} else {
							wantEnd(t, s[side], content(uint64(1-side), 5000))
						}
					}
					j.closed(t, s)
				})
			}
		}
	})
}

// TestCloseRead: S6, S13. Either end closes its reading, at any moment of a migration by
// either end. It gets nothing any more; what it writes, before and after, still arrives,
// to the EOF, although on QUIC the other end's Writes fail by now.
func TestCloseRead(t *testing.T) {
	eachPath(t, usualPaths, func(t *testing.T, j *journey) {
		for _, mover := range ends {
			for _, closer := range ends {
				for _, m := range everyMoment {
					name := fmt.Sprintf("%s migrates, %s closes, %s", endName(mover), endName(closer), m)
					t.Run(name, func(t *testing.T) { closeRead(t, j, mover, closer, m) })
				}
			}
		}
	})
}

func closeRead(t *testing.T, j *journey, mover, closer int, m moment) {
	s := j.start(t)
	deaf, other := s[closer], s[1-closer]
	said := content(1, 30_000)
	write(t, other, content(2, 10_000)) // nobody will read it
	write(t, deaf, said[:10_000])
	err := j.duringMove(t, mover, s, m, func() {
		if err := deaf.CloseRead(); err != nil {
			t.Errorf("CloseRead: %v", err)
		}
		if _, err := deaf.Write(said[10_000:20_000]); err != nil {
			t.Errorf("Write: %v", err)
		}
	})
	require.NoError(t, err)
	j.arrived(t, s, j.to(), 1)

	n, err := deaf.Read(make([]byte, 10))
	require.Zero(t, n, "nothing is readable after CloseRead")
	require.Error(t, err)
	// The other end's Write fails as it would have without a migration.
	if Of(other.Conn().RemoteMultiaddr()) == QUIC {
		within(t, "Write to fail", func() {
			for err = nil; err == nil; {
				_, err = other.Write([]byte{1})
			}
		})
		require.ErrorIs(t, err, network.ErrReset, "QUIC tells the writer")
	} else {
		write(t, other, []byte{1}) // yamux does not
	}
	write(t, deaf, said[20_000:])
	require.NoError(t, deaf.CloseWrite())
	wantEnd(t, other, said)
	_ = other.CloseWrite()
	j.closed(t, s)
}

// TestCloseReadWhileBlocked: S13. Where CloseRead fails the other end's Write, a
// migration that follows neither heals that nor spreads it: what it has yet to read is
// delivered.
func TestCloseReadWhileBlocked(t *testing.T) {
	eachPath(t, mainPaths, func(t *testing.T, j *journey) {
		for _, mover := range ends {
			t.Run(endName(mover)+" migrates", func(t *testing.T) {
				s := j.start(t)
				deaf, other := s[mover], s[1-mover]
				done := j.blocked(t, other, content(1, 32<<20))
				write(t, deaf, content(2, 10_000))
				require.NoError(t, deaf.CloseRead())
				require.NoError(t, j.move(t, mover, s))
				j.arrived(t, s, j.to(), 1)
				require.NoError(t, deaf.CloseWrite())
				wantEnd(t, other, content(2, 10_000))
				_ = other.Close() // ends a Write that yamux keeps blocked
				w := result(t, done)
				require.Error(t, w.err, "nobody reads it")
				require.Less(t, w.n, 32<<20)
				j.closed(t, s)
			})
		}
	})
}
