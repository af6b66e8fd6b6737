package hostile

import (
	"context"
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
	"\x02\x0a\x05",                        // a member beyond the end
	"\x01\x0f",                            // an unknown wire type
	"\x02\x00\x00",                        // field zero
	lengthy("\x0a" + lengthy("")),         // Label without id
	lengthy("\x12" + lengthy("\x10\x02")), // Migrate without id
	lengthy("\x12" + lengthy("\x08\x02")), // Migrate without from
	lengthy("\xa2\x06" + lengthy("")),     // FinalSize without size
	lengthy("\x08\x02"),
	lengthy("\x0a" + lengthy("\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")), // an id of 70 bits
	lengthy("\x0a" + lengthy("\x0a"+lengthy("\x08\x02"))),                         // a Label in a Label
	lengthy("\x12" + lengthy("\x0a"+lengthy("\x08\x02")+"\x12"+lengthy("\x08\x02"))),
	lengthy(strings.Repeat("\x0b", 1000)), // groups that never end
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
// Every one of them ends, and nothing else does.
func TestBadBeginnings(t *testing.T) {
	s := newScene(t)
	for _, lower := range []bool{true, false} {
		t.Run(map[bool]string{true: "lower", false: "higher"}[lower], func(t *testing.T) {
			e := s.newHostile(t, lower)
			type input struct {
				conn  int
				bytes string
			}
			var all []input
			for i := range e.conns {
				own, label := e.mustStream(i, echoID)
				foreign := s.honest.streams[0].Label()
				var inputs []string
				for _, m := range malformed {
					inputs = append(inputs, prelude+m, prelude+labelled(e.fresh())+m)
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
					asks(id, label) + finalSize(0) + "too early", asks(id, label) + "x",
					asksDraft(id, label) + "too early",
					asks(id, label) + asks(id, label),
				} {
					inputs = append(inputs, prelude+in)
				}
				// A label of another peer's is one of a stream that is not there (L3).
				for range 4 {
					inputs = append(inputs, prelude+asks(e.fresh(), foreign), prelude+asks(e.fresh(), s.honest.streams[1].Label()))
				}
				inputs = append(inputs, mutants(opening(e.fresh(), echoID))...)
				inputs = append(inputs, mutants(prelude+asks(e.fresh(), label))...)
				defer own.Reset()
				for _, in := range inputs {
					all = append(all, input{1 - i, in})
				}
			}
			each(len(all), func(k int) {
				for _, end := range []func(network.Stream) error{network.Stream.CloseWrite, network.Stream.Reset} {
					u, err := e.tries(all[k].conn, all[k].bytes)
					if err != nil {
						t.Errorf("cannot open a stream: %v", err)
						return
					}
					_ = end(u)
					_, _ = io.Copy(io.Discard, u) // to its end, within the stream's deadline
					_ = u.Reset()
				}
			})
			s.progress("bad beginnings", true)
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
	ctx, cancel := context.WithTimeout(context.Background(), patience)
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
		_ = u.SetDeadline(time.Now().Add(patience))
		return u
	case <-time.After(patience):
		e.t.Fatal("the victim opens no stream")
		panic("unreachable")
	}
}

// TestBadAnswers: openings and Migrates of the victim's that are answered with anything
// but what they should be, byte by byte. The victim's application gets no byte that is not
// its own and no clean end, and its calls return.
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
				_ = st.SetReadDeadline(time.Now().Add(patience))
				got, err := io.ReadAll(st)
				require.Error(t, err, "answer %q", in)
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
			ackVerified + labelled(e.fresh()), ackDraft + finalSize(3), ackDenied + finalSize(3),
		} {
			bad = append(bad, prelude+m)
		}
		for k, in := range bad {
			tried.Add(1)
			st, u := e.opened()
			_, err := io.WriteString(u, right+"abc")
			require.NoError(t, err)
			to := e.ends[0]
			if st.Conn() == to {
				to = e.ends[1]
			}
			moved := make(chan error, 1)
			go func() { moved <- s.victim.Migrate(context.Background(), st, to) }()
			next := e.arrives()
			_, _ = io.WriteString(next, in)
			if k%2 == 0 {
				_ = next.CloseWrite()
			} else {
				_ = next.Reset()
			}
			// The final size may have been taken for true: then the old stream has to end.
			_ = u.CloseWrite()
			_ = st.SetReadDeadline(time.Now().Add(patience))
			got, _ := io.ReadAll(st)
			require.True(t, strings.HasPrefix("abc", string(got)), "answer %q: the application got %q", in, got)
			select {
			case <-moved:
			case <-time.After(patience):
				t.Fatalf("answer %q: Migrate does not return", in)
			}
			_ = st.Reset()
			_ = u.Reset()
			_ = next.Reset()
		}
		s.progress("bad answers to Migrates", true)
	})
	e.t = t
	t.Logf("at rest: %v", s.measure(e.ID()))
	e.goes()
}

// TestAfterTheAck: what a peer may not send once its Migrate was acked, byte by byte: the
// stream is reset or has moved, and nothing is read from it but what was sent.
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
			old, label, err := e.stream(i, echoID)
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
			_, _ = io.WriteString(next, after[name])
			if eof {
				_ = next.CloseWrite()
				_ = old.CloseWrite()
			} else {
				_ = next.Reset()
			}
			_, _ = io.Copy(io.Discard, old)
			_, _ = io.Copy(io.Discard, next)
		})
		s.progress("violations after the ack, from "+string(tr), true)
	}
	t.Logf("at rest: %v", s.measure(e.ID()))
	e.goes()
}
