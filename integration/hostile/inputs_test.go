package hostile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
	. "github.com/go-portage/portage/internal/rawpeer"
	"github.com/go-portage/portage/migrate"
)

// mutants are s cut off at each byte, and s with each byte changed.
func mutants(s string) (all []string) {
	for k := range len(s) {
		all = append(all, s[:k])
		for _, flip := range []byte{0x01, 0x80, 0xff} {
			b := []byte(s)
			b[k] ^= flip
			all = append(all, string(b))
		}
	}
	return all
}

// TestBadBeginnings: streams that begin with anything but what they should, byte by byte.
// Every one of them ends, and nothing else does: not even the hostile peer's own streams,
// unless it has asked for a migration and not gone on (W4, S8).
func TestBadBeginnings(t *testing.T) {
	s := newScene(t)
	for _, lower := range []bool{true, false} {
		t.Run(map[bool]string{true: "lower", false: "higher"}[lower], func(t *testing.T) {
			e := s.newHostile(t, lower)
			type input struct {
				conn     int
				bytes    string
				violates bool // whatever of it is read at once
			}
			var all []input
			var own, prey [2]network.Stream // prey is what is asked to migrate
			for i := range e.Conns {
				var label, preyed uint64
				own[i], label = e.mustStream(i, echoID)
				prey[i], preyed = e.mustStream(i, echoID)
				_ = own[i].SetDeadline(time.Time{}) // it is in use for as long as all of this takes
				e.echoes(own[i])
				foreign := s.honest.streams[0].Label()
				add := func(violates bool, inputs ...string) {
					for _, in := range inputs {
						all = append(all, input{1 - i, in, violates})
					}
				}
				for _, m := range Malformed {
					add(true, Prelude+m, Prelude+LabelBytes(e.Fresh())+m)
				}
				id := e.Fresh()
				for _, in := range []string{
					AckVerified, AckDraft, AckDenied, FinalSizeBytes(0), FinalSizeBytes(1 << 63), // out of order
					LabelBytes(id^1) + MultistreamToken + Token(echoID),  // of the wrong parity
					LabelBytes(label) + MultistreamToken + Token(echoID), // alive
					LabelBytes(id) + LabelBytes(id+2) + MultistreamToken + Token(echoID),
					LabelBytes(id) + MigrateBytes(id+2, label),
					LabelBytes(id) + Prelude + LabelBytes(id+2), // nested
					LabelBytes(id) + MultistreamToken + Token("/test/unknown") + MigrationToken + LabelBytes(id),
					LabelBytes(id) + MultistreamToken + Token(migrate.FinalSizeID),
					LabelBytes(id) + MultistreamToken + "\xff\x7f" + strings.Repeat("x", 2000),
					MigrateBytes(id^1, label), MigrateBytes(label, label), // of the wrong parity; alive
				} {
					add(true, Prelude+in)
				}
				for _, in := range []string{
					MigrateBytes(id, preyed) + FinalSizeBytes(0) + "too early", MigrateBytes(id, preyed) + "x",
					MigrateDraftBytes(id, preyed) + "too early",
					MigrateBytes(id, preyed) + MigrateBytes(id, preyed),
				} {
					add(false, Prelude+in)
				}
				// A label of another peer's is one of a stream that is not there (L3).
				for range 4 {
					add(false, Prelude+MigrateBytes(e.Fresh(), foreign), Prelude+MigrateBytes(e.Fresh(), s.honest.streams[1].Label()))
				}
				add(false, mutants(OpeningBytes(e.Fresh(), echoID))...)
				add(false, mutants(Prelude+MigrateBytes(e.Fresh(), preyed))...)
			}
			each(len(all), func(k int) {
				in := all[k]
				for _, end := range []func(network.Stream) error{network.Stream.CloseWrite, network.Stream.Reset} {
					u, err := e.tries(in.conn, in.bytes)
					if err != nil {
						t.Errorf("cannot open a stream: %v", err)
						return
					}
					_ = end(u)
					got, reset, err := outcome(u, Prelude+AckDraft)
					switch {
					case err != nil:
						t.Errorf("a stream that begins with %q does not end: %v", in.bytes, err)
					case in.violates && !reset:
						t.Errorf("a stream that begins with %q has a clean end, behind %q", in.bytes, got)
					}
					_ = u.Reset()
				}
			})
			s.progress("bad beginnings", true)
			for i := range own {
				e.echoes(own[i])
				_ = prey[i].Reset()
			}
			// Those that were reset at this end, and have told nothing of what became of them.
			WaitFor(t, "the victim to have none of the hostile peer's streams but its own two", func() bool {
				return len(e.Ends[0].GetStreams()) == 1 && len(e.Ends[1].GetStreams()) == 1
			})
			t.Logf("at rest: %v", s.measure(e.ID()))
			e.goes()
		})
	}
}

// TestLabelsOfOthers: neither a label of another peer's stream, nor a Migrate from it,
// does anything to that stream (L3).
func TestLabelsOfOthers(t *testing.T) {
	s := newScene(t)
	es := []*hostile{s.newHostile(t, true), s.newHostile(t, false)}
	func() {
		s.honest.still.Lock()
		defer s.honest.still.Unlock()
		labels := []uint64{s.honest.streams[0].Label(), s.honest.streams[1].Label()}
		var asked []network.Stream
		for _, e := range es {
			for _, label := range labels {
				u, err := e.tries(1, Prelude+MigrateBytes(e.Fresh(), label))
				require.NoError(t, err)
				asked = append(asked, u)
			}
		}
		for _, u := range asked {
			require.NoError(t, Expect(u, Prelude+AckDenied))
		}
		for _, e := range es {
			for _, label := range labels {
				// The same number may be one of the hostile peer's own.
				u, err := e.tries(0, OpeningBytes(label, echoID))
				require.NoError(t, err)
				if Expect(u, AnswerBytes(echoID)) == nil {
					_, err = io.WriteString(u, "mine")
					require.NoError(t, err)
					require.NoError(t, Expect(u, "mine"))
				}
				_ = u.Reset()
			}
		}
		for i, st := range s.honest.streams {
			require.Equal(t, labels[i], st.Label())
		}
	}()
	for _, e := range es {
		e.goes()
	}
}

// opened has the victim open a stream to the hostile peer.
func (e *hostile) opened() (*migrate.Stream, *RawStream) {
	e.T.Helper()
	st, u, err := e.openedIfRoom()
	require.NoError(e.T, err)
	return st, u
}

func (e *hostile) openedIfRoom() (*migrate.Stream, *RawStream, error) {
	e.T.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	ns, err := e.s.victim.NewStream(ctx, e.ID(), echoID)
	if err != nil {
		return nil, nil, err
	}
	st := ns.(*migrate.Stream)
	_, err = st.Write([]byte("!"))
	require.NoError(e.T, err)
	for {
		u := e.Arrives()
		if Expect(u, Prelude+LabelBytes(st.Label())) != nil {
			_ = u.Reset() // an earlier Migrate, which nobody waits for
			continue
		}
		require.NoError(e.T, Expect(u, MultistreamToken+Token(echoID)+"!"))
		return st, u, nil
	}
}

// TestBadAnswers: openings and Migrates of the victim's that are answered with anything
// but what they should be, byte by byte. The victim's application gets no byte that is not
// its own and no clean end behind a part, and its calls return.
func TestBadAnswers(t *testing.T) {
	s := newScene(t)
	e := s.newHostile(t, true)
	const right = Prelude + MultistreamToken + EchoToken
	t.Run("opening", func(t *testing.T) {
		e.T = t
		bad := append(mutants(right), "", "\x03na\n", MultistreamToken+"\x03na\n", Prelude+AckVerified, Prelude+MultistreamToken+"\x03na\n", strings.Repeat("x", 70000))
		for _, in := range bad {
			for _, end := range []func(network.Stream) error{network.Stream.CloseWrite, network.Stream.Reset} {
				tried.Add(1)
				st, u := e.opened()
				_, _ = io.WriteString(u, in)
				_ = end(u)
				_ = st.SetReadDeadline(time.Now().Add(Patience))
				got, err := io.ReadAll(st)
				require.Error(t, err, "answer %q", in)
				require.False(t, timedOut(err), "answer %q: the stream does not end: %v", in, err)
				require.Empty(t, got, "answer %q", in)
				require.NoError(t, st.Reset())
				_ = u.Reset()
			}
		}
		s.progress("bad answers to openings", true)
	})
	t.Run("migrate", func(t *testing.T) {
		e.T = t
		bad := mutants(Prelude + AckVerified + FinalSizeBytes(3))
		for _, m := range Malformed {
			bad = append(bad, Prelude+m, Prelude+AckVerified+m)
		}
		for _, m := range []string{
			LabelBytes(e.Fresh()), MigrateBytes(e.Fresh(), e.Fresh()), FinalSizeBytes(3), AckVerified + AckVerified,
			AckVerified + "data", AckVerified + FinalSizeBytes(2), AckVerified + FinalSizeBytes(0),
			AckVerified + FinalSizeBytes(4), AckVerified + FinalSizeBytes(1<<64-1), AckDenied,
			AckVerified + LabelBytes(e.Fresh()), AckDraft + FinalSizeBytes(3), AckDenied + FinalSizeBytes(3),
		} {
			bad = append(bad, Prelude+m)
		}
		for k, in := range bad {
			for _, readBefore := range []bool{false, true} {
				e.answersMigrate(in, right, readBefore, k%2 == 0)
			}
		}
		s.progress("bad answers to Migrates", true)
	})
	e.T = t
	t.Logf("at rest: %v", s.measure(e.ID()))
	e.goes()
}

// timedOut says whether err is a deadline's, of any muxer.
func timedOut(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout()
}

// answersMigrate has the victim migrate a stream on which the peer has said "abc", and
// answers with in. With readBefore the victim's application has read that by then. whole
// says that all of the answer arrives: the new stream is closed, else it is reset.
func (e *hostile) answersMigrate(in, opening string, readBefore, whole bool) {
	t, data := e.T, "abc"
	tried.Add(1)
	st, u := e.opened()
	_, err := io.WriteString(u, opening+data)
	require.NoError(t, err)
	if readBefore {
		require.NoError(t, Expect(st, data))
	}
	to := e.Ends[0]
	if st.Conn() == to {
		to = e.Ends[1]
	}
	moved := make(chan error, 1)
	go func() { moved <- e.s.victim.Migrate(context.Background(), st, to) }()
	next := e.Arrives()
	_, _ = io.WriteString(next, in)
	if whole {
		_ = next.CloseWrite()
	} else {
		_ = next.Reset()
	}
	// The final size may have been taken for true: then the old stream has to end.
	_ = u.CloseWrite()
	_ = st.SetReadDeadline(time.Now().Add(Patience))
	rest, readErr := io.ReadAll(st)
	got := string(rest)
	if readBefore {
		got = data + got
	}
	var migrateErr error
	select {
	case migrateErr = <-moved:
	case <-time.After(Patience):
		t.Fatalf("answer %q: Migrate does not return", in)
	}
	what := fmt.Sprintf("answer %q, read before: %v, whole: %v: the application got %q and %v, Migrate returned %v",
		in, readBefore, whole, got, readErr, migrateErr)
	size, sized := sizeIn(strings.TrimPrefix(in, Prelude+AckVerified))
	sized = sized && strings.HasPrefix(in, Prelude+AckVerified)
	switch {
	case errors.Is(migrateErr, migrate.ErrTryLater), errors.Is(migrateErr, migrate.ErrDenied):
		// It stays where it was (S9, M3), and has all that was said there.
		require.NoError(t, readErr, what)
		require.Equal(t, data, got, what)
		require.False(t, whole && strings.HasPrefix(in, Prelude+AckVerified), what)
	case errors.Is(migrateErr, network.ErrReset):
		require.ErrorIs(t, readErr, network.ErrReset, what)
		require.True(t, strings.HasPrefix(data, got), what)
	default:
		// The peer has said less than it had sent, and what it had sent beyond that was
		// not read (S12). It is its own stream that is short.
		require.NoError(t, migrateErr, what)
		require.True(t, sized && size < uint64(len(data)) && !readBefore, what)
		if readErr != nil {
			require.ErrorIs(t, readErr, network.ErrReset, what)
		}
		require.Equal(t, data[:size], got, what)
	}
	_ = st.Reset()
	_ = u.Reset()
	_ = next.Reset()
}

// sizeIn returns the final size that in begins with, if it is one of those that these
// tests make.
func sizeIn(in string) (size uint64, ok bool) {
	for _, size := range []uint64{0, 1, 2, 3, 4, 1<<64 - 1} {
		if strings.HasPrefix(in, FinalSizeBytes(size)) {
			return size, true
		}
	}
	return 0, false
}

// TestAfterTheAck: what a peer may not send once its Migrate was acked, byte by byte. With
// the right final size the stream has moved, and what follows is the application's; with
// anything else both streams are reset, and nothing comes of them but what belongs there
// (S8, S12).
func TestAfterTheAck(t *testing.T) {
	s := newScene(t, migrate.WithStallTimeout(time.Second))
	e := s.newHostile(t, false)
	const data = "abc"
	after := map[string]string{
		"final size too high": FinalSizeBytes(4), "too low": FinalSizeBytes(2), "huge": FinalSizeBytes(1<<64 - 1),
		"missing": "data without a final size", "twice": FinalSizeBytes(3) + FinalSizeBytes(3) + FinalSizeBytes(3),
		"ack": AckVerified, "label": LabelBytes(1), "migrate": MigrateBytes(1, 1), "nothing": "",
	}
	for what, m := range Malformed {
		after["malformed: "+what] = m
	}
	for k, m := range mutants(FinalSizeBytes(3) + "data") {
		after[fmt.Sprintf("mutant %d", k)] = m
	}
	var names []string
	for name := range after {
		names = append(names, name)
	}
	for i, tr := range []Transport{TCP, QUIC} {
		eachOf(16, 2*len(names), func(k int) {
			name, eof := names[k/2], k%2 == 0
			old, label, err := e.stream(i, echoID, Patience)
			if err != nil {
				t.Errorf("%s: %v", name, err)
				return
			}
			defer old.Reset()
			_, _ = io.WriteString(old, data)
			if err := Expect(old, data); err != nil {
				t.Errorf("%s: echo: %v", name, err)
				return
			}
			next, err := e.tries(1-i, Prelude+MigrateBytes(e.Fresh(), label))
			if err != nil {
				t.Errorf("%s: %v", name, err)
				return
			}
			defer next.Reset()
			if err := Expect(next, Prelude+AckVerified); err != nil {
				t.Errorf("%s: %v", name, err)
				return
			}
			in := after[name]
			_, _ = io.WriteString(next, in)
			if eof {
				_ = next.CloseWrite()
				_ = old.CloseWrite()
			} else {
				_ = next.Reset()
			}
			size, sized := sizeIn(in)
			right := sized && size == uint64(len(data))
			got, reset, err := outcome(next, "")
			what := fmt.Sprintf("%s, from %s, whole: %v: the new stream brought %q, reset: %v, %v", name, tr, eof, got, reset, err)
			switch {
			case err != nil:
				t.Errorf("%s: it does not end", what)
			case !eof: // reset at this end, too
			case right && (reset || got != in):
				t.Errorf("%s: it should have moved, and echo", what)
			case !right && (!reset || !strings.HasPrefix(FinalSizeBytes(3), got)):
				t.Errorf("%s: it should have been reset", what)
			}
			got, reset, err = outcome(old, "")
			what = fmt.Sprintf("%s, from %s, whole: %v: the old stream brought %q, reset: %v, %v", name, tr, eof, got, reset, err)
			switch {
			case err != nil:
				t.Errorf("%s: it does not end", what)
			case got != "":
				t.Errorf("%s: nothing else was said there", what)
			case !sized && !reset:
				// The victim closes it for writing once it has a final size, and not before (S3).
				t.Errorf("%s: a clean end before the proof that the ack has arrived", what)
			}
		})
		s.progress("violations after the ack, from "+string(tr), true)
	}
	t.Logf("at rest: %v", s.measure(e.ID()))
	e.goes()
}
