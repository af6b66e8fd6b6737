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
	"github.com/go-portage/portage/migrate"
)

// malformed are messages that are none (W4).
var malformed = []string{
	"\x00",                            // without a member
	lengthy("\xaa\x06" + lengthy("")), // of a member that nobody knows
	uvarint(1025) + strings.Repeat("\x00", 1025),
	uvarint(1<<20) + strings.Repeat("\x0a", 4096),
	uvarint(1<<63) + "\x0a\x00",
	strings.Repeat("\xff", 10),
	"\x02\x0a\x05", // a member beyond the end
	"\x01\x0f",     // an unknown wire type
	"\x02\x00\x00", // field zero
	lengthy("\x08\x02"),
	lengthy("\x0a" + lengthy("\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")), // an id of 70 bits
	lengthy(strings.Repeat("\x0b", 1000)),                                         // groups that never end
}

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
			for i := range e.conns {
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
				for _, m := range malformed {
					add(true, prelude+m, prelude+labelled(e.fresh())+m)
				}
				id := e.fresh()
				for _, in := range []string{
					ackVerified, ackDraft, ackDenied, finalSize(0), finalSize(1 << 63), // out of order
					labelled(id^1) + tMultistream + token(echoID),  // of the wrong parity
					labelled(label) + tMultistream + token(echoID), // alive
					labelled(id) + labelled(id+2) + tMultistream + token(echoID),
					labelled(id) + asks(id+2, label),
					labelled(id) + prelude + labelled(id+2), // nested
					labelled(id) + tMultistream + token("/test/unknown") + tMigration + labelled(id),
					labelled(id) + tMultistream + token(migrate.FinalSizeID),
					labelled(id) + tMultistream + "\xff\x7f" + strings.Repeat("x", 2000),
					asks(id^1, label), asks(label, label), // of the wrong parity; alive
				} {
					add(true, prelude+in)
				}
				for _, in := range []string{
					asks(id, preyed) + finalSize(0) + "too early", asks(id, preyed) + "x",
					asksDraft(id, preyed) + "too early",
					asks(id, preyed) + asks(id, preyed),
				} {
					add(false, prelude+in)
				}
				// A label of another peer's is one of a stream that is not there (L3).
				for range 4 {
					add(false, prelude+asks(e.fresh(), foreign), prelude+asks(e.fresh(), s.honest.streams[1].Label()))
				}
				add(false, mutants(opening(e.fresh(), echoID))...)
				add(false, mutants(prelude+asks(e.fresh(), preyed))...)
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
					got, reset, err := outcome(u, prelude+ackDraft)
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
				return len(e.ends[0].GetStreams()) == 1 && len(e.ends[1].GetStreams()) == 1
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
				u, err := e.tries(1, prelude+asks(e.fresh(), label))
				require.NoError(t, err)
				asked = append(asked, u)
			}
		}
		for _, u := range asked {
			require.NoError(t, wants(u, prelude+ackDenied))
		}
		for _, e := range es {
			for _, label := range labels {
				// The same number may be one of the hostile peer's own.
				u, err := e.tries(0, opening(label, echoID))
				require.NoError(t, err)
				if wants(u, answer(echoID)) == nil {
					_, err = io.WriteString(u, "mine")
					require.NoError(t, err)
					require.NoError(t, wants(u, "mine"))
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
func (e *hostile) opened() (*migrate.Stream, network.Stream) {
	e.t.Helper()
	st, u, err := e.openedIfRoom()
	require.NoError(e.t, err)
	return st, u
}

func (e *hostile) openedIfRoom() (*migrate.Stream, network.Stream, error) {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	ns, err := e.s.victim.NewStream(ctx, e.ID(), echoID)
	if err != nil {
		return nil, nil, err
	}
	st := ns.(*migrate.Stream)
	_, err = st.Write([]byte("!"))
	require.NoError(e.t, err)
	for {
		u := e.arrives()
		label := labelled(st.Label())
		if wants(u, label) != nil {
			_ = u.Reset() // an earlier Migrate, which nobody waits for
			continue
		}
		require.NoError(e.t, wants(u, tMultistream+token(echoID)+"!"))
		return st, u, nil
	}
}

// arrives returns the next stream that the victim opens, behind its prelude.
func (e *hostile) arrives() network.Stream {
	e.t.Helper()
	select {
	case u := <-e.came:
		_ = u.SetDeadline(time.Now().Add(Patience))
		return u
	case <-time.After(Patience):
		e.t.Fatal("the victim opens no stream")
		panic("unreachable")
	}
}

// TestBadAnswers: openings and Migrates of the victim's that are answered with anything
// but what they should be, byte by byte. The victim's application gets no byte that is not
// its own and no clean end behind a part, and its calls return.
func TestBadAnswers(t *testing.T) {
	s := newScene(t)
	e := s.newHostile(t, true)
	const right = prelude + tMultistream + "\x11/test/echo/1.0.0\n"
	t.Run("opening", func(t *testing.T) {
		e.t = t
		bad := append(mutants(right), "", "\x03na\n", tMultistream+"\x03na\n", prelude+ackVerified, prelude+tMultistream+"\x03na\n", strings.Repeat("x", 70000))
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
		e.t = t
		bad := mutants(prelude + ackVerified + finalSize(3))
		for _, m := range malformed {
			bad = append(bad, prelude+m, prelude+ackVerified+m)
		}
		for _, m := range []string{
			labelled(e.fresh()), asks(e.fresh(), e.fresh()), finalSize(3), ackVerified + ackVerified,
			ackVerified + "data", ackVerified + finalSize(2), ackVerified + finalSize(0),
			ackVerified + finalSize(4), ackVerified + finalSize(1<<64-1), ackDenied,
			ackVerified + labelled(e.fresh()), ackDraft + finalSize(3), ackDenied + finalSize(3),
		} {
			bad = append(bad, prelude+m)
		}
		for k, in := range bad {
			for _, readBefore := range []bool{false, true} {
				e.answersMigrate(in, right, readBefore, k%2 == 0)
			}
		}
		s.progress("bad answers to Migrates", true)
	})
	e.t = t
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
	t, data := e.t, "abc"
	tried.Add(1)
	st, u := e.opened()
	_, err := io.WriteString(u, opening+data)
	require.NoError(t, err)
	if readBefore {
		require.NoError(t, wants(st, data))
	}
	to := e.ends[0]
	if st.Conn() == to {
		to = e.ends[1]
	}
	moved := make(chan error, 1)
	go func() { moved <- e.s.victim.Migrate(context.Background(), st, to) }()
	next := e.arrives()
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
	size, sized := sizeIn(strings.TrimPrefix(in, prelude+ackVerified))
	sized = sized && strings.HasPrefix(in, prelude+ackVerified)
	switch {
	case errors.Is(migrateErr, migrate.ErrTryLater), errors.Is(migrateErr, migrate.ErrDenied):
		// It stays where it was (S9, M3), and has all that was said there.
		require.NoError(t, readErr, what)
		require.Equal(t, data, got, what)
		require.False(t, whole && strings.HasPrefix(in, prelude+ackVerified), what)
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
		if strings.HasPrefix(in, finalSize(size)) {
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
		"final size too high": finalSize(4), "too low": finalSize(2), "huge": finalSize(1<<64 - 1),
		"missing": "data without a final size", "twice": finalSize(3) + finalSize(3) + finalSize(3),
		"ack": ackVerified, "label": labelled(1), "migrate": asks(1, 1), "nothing": "",
	}
	for k, m := range malformed {
		after[fmt.Sprintf("malformed %d", k)] = m
	}
	for k, m := range mutants(finalSize(3) + "data") {
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
			if err := wants(old, data); err != nil {
				t.Errorf("%s: echo: %v", name, err)
				return
			}
			next, err := e.tries(1-i, prelude+asks(e.fresh(), label))
			if err != nil {
				t.Errorf("%s: %v", name, err)
				return
			}
			defer next.Reset()
			if err := wants(next, prelude+ackVerified); err != nil {
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
			case !right && (!reset || !strings.HasPrefix(finalSize(3), got)):
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
