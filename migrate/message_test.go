package migrate

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	msmux "github.com/multiformats/go-multistream"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	. "github.com/go-portage/portage/internal/rawpeer"
	"github.com/go-portage/portage/pb"
)

func TestMessageBytes(t *testing.T) {
	for _, tc := range []struct {
		name string
		m    *pb.StreamMigration
		want string
	}{
		{"migrate", migrateMessage(602, 600), MigrateBytes(602, 600)},
		{"migrate, largest", migrateMessage(1<<64-1, 1<<64-2), MigrateBytes(1<<64-1, 1<<64-2)},
		{"migrate, zero", migrateMessage(0, 0), MigrateBytes(0, 0)},
		{"ack", ackMessage(true), AckVerified},
		{"ack, draft", ackMessage(false), AckDraft},
		{"deny", denyMessage(), AckDenied},
		{"final size", finalSizeMessage(5), FinalSizeBytes(5)},
		{"final size, largest", finalSizeMessage(1<<64 - 1), FinalSizeBytes(1<<64 - 1)},
		{"final size, zero", finalSizeMessage(0), FinalSizeBytes(0)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			require.Equal(t, "before"+tc.want, string(appendMessage([]byte("before"), tc.m)))
			var w countingWriter
			require.NoError(t, writeMessage(&w, tc.m))
			require.Equal(t, []string{tc.want}, w.writes, "a message leaves in one Write")
		})
	}
	require.Equal(t, Prelude+LabelBytes(600), string(opening(600, "")))
	require.Equal(t, Prelude+LabelBytes(600)+MultistreamToken+EchoToken, string(opening(600, echoID)))
	require.Equal(t, Prelude+MultistreamToken+EchoToken, answer(echoID))
	long := protocol.ID("/" + strings.Repeat("x", 300))
	require.Equal(t, Token(long), token(string(long)), "the length of a token is a varint")
}

type countingWriter struct{ writes []string }

func (w *countingWriter) Write(p []byte) (int, error) {
	w.writes = append(w.writes, string(p))
	return len(p), nil
}

// TestReadMessage: no byte more is read than the message has, however it comes.
func TestReadMessage(t *testing.T) {
	for name, m := range map[string]string{
		"label":                   LabelBytes(1 << 40),
		"migrate":                 MigrateBytes(602, 600),
		"ack":                     AckDraft,
		"final size":              FinalSizeBytes(5),
		"largest":                 padded(600, 1024),
		"long form of the length": "\x85\x00" + AckVerified[1:],
	} {
		t.Run(name, func(t *testing.T) {
			whole := strings.NewReader(m + "rest")
			got, err := readMessage(whole)
			require.NoError(t, err)
			rest, _ := io.ReadAll(whole)
			require.Equal(t, "rest", string(rest))

			dripping := strings.NewReader(m + "rest")
			again, err := readMessage(iotest.OneByteReader(dripping))
			require.NoError(t, err)
			require.Equal(t, got.String(), again.String())
			rest, _ = io.ReadAll(dripping)
			require.Equal(t, "rest", string(rest))
		})
	}
}

// TestReadMessageViolations (W4): what is no message is told apart from a stream that
// ends or fails.
func TestReadMessageViolations(t *testing.T) {
	for name, m := range Malformed {
		t.Run(name, func(t *testing.T) {
			_, err := readMessage(strings.NewReader(m))
			require.ErrorIs(t, err, errViolation)
			_, err = readMessage(iotest.DataErrReader(strings.NewReader(m)))
			require.ErrorIs(t, err, errViolation, "with EOF together with the last byte")
		})
	}
	full := MigrateBytes(1<<40, 600)
	broken := errors.New("broken")
	for n := range len(full) {
		_, err := readMessage(strings.NewReader(full[:n]))
		if n == 0 {
			require.Equal(t, io.EOF, err)
		} else {
			require.Equal(t, io.ErrUnexpectedEOF, err, "after %d bytes", n)
		}
		_, err = readMessage(io.MultiReader(strings.NewReader(full[:n]), iotest.ErrReader(broken)))
		require.Equal(t, broken, err, "after %d bytes", n)
	}
	// Nothing is waited for, nor allocated, behind a length that is too big.
	r := strings.NewReader(Uvarint(1<<40) + "rest")
	_, err := readMessage(r)
	require.ErrorIs(t, err, errViolation)
	require.Equal(t, len("rest"), r.Len())
}

func TestReadFinalSize(t *testing.T) {
	size, err := readFinalSize(strings.NewReader(FinalSizeBytes(1<<40) + "rest"))
	require.NoError(t, err)
	require.Equal(t, uint64(1<<40), size)
	_, err = readFinalSize(strings.NewReader(AckVerified))
	require.ErrorIs(t, err, errViolation)
	_, err = readFinalSize(strings.NewReader(""))
	require.Equal(t, io.EOF, err)
}

// TestReadExpected: an answer that differs is reported as soon as it is seen.
func TestReadExpected(t *testing.T) {
	const want = Prelude
	require.NoError(t, readExpected(strings.NewReader(want), want, 0))
	require.NoError(t, readExpected(iotest.OneByteReader(strings.NewReader(want)), want, 0))
	require.NoError(t, readExpected(iotest.DataErrReader(strings.NewReader(want)), want, 0))
	r := strings.NewReader(want + "rest")
	require.NoError(t, readExpected(r, want, 0))
	require.Equal(t, len("rest"), r.Len())

	never := iotest.ErrReader(errors.New("read on behind an answer that differs"))
	na := readExpected(io.MultiReader(strings.NewReader(MultistreamToken+NAToken), never), want, 0)
	require.ErrorIs(t, na, msmux.ErrNotSupported[protocol.ID]{})
	for cut := 1; cut < len(want); cut++ {
		err := readExpected(io.MultiReader(strings.NewReader(want[:cut]+"?"), never), want, 0)
		require.ErrorContains(t, err, "unexpected answer", "after %d bytes", cut)
		require.Equal(t, io.EOF, readExpected(strings.NewReader(want[:cut]), want, 0), "after %d bytes", cut)
	}
}

// TestRefusal: a peer that lacks a protocol says so wherever Reads cut its answer, also
// where the answer begins like the name of the protocol.
func TestRefusal(t *testing.T) {
	for _, app := range []protocol.ID{"/x", echoID} {
		for lacks, answer := range map[protocol.ID]string{
			ID:  MultistreamToken + NAToken,
			app: Prelude + MultistreamToken + NAToken,
		} {
			for _, read := range []func(io.Reader) io.Reader{
				func(r io.Reader) io.Reader { return r }, iotest.OneByteReader, iotest.HalfReader,
			} {
				never := iotest.ErrReader(errors.New("read on behind an answer that differs"))
				err := readExpected(read(io.MultiReader(strings.NewReader(answer), never)), prelude+header+token(string(app)), 0)
				require.Equal(t, msmux.ErrNotSupported[protocol.ID]{Protos: []protocol.ID{lacks}}, err)
			}
		}
	}
}

// TestReadBehind: the answer to the opening is taken off, wherever Reads cut it, and
// nothing behind it is lost.
func TestReadBehind(t *testing.T) {
	expect := answer(echoID)
	for cut := range len(expect) + 3 {
		for _, room := range []int{1, 3, 10, len(expect), 2 * len(expect)} {
			all := expect + "data"
			u := newFake().feeds(all[:cut], nil).feeds(all[cut:], io.EOF)
			if cut == 0 {
				u = newFake().feeds(all, io.EOF)
			}
			h := receivingFrom(u, expect)
			var got bytes.Buffer
			buf := make([]byte, room)
			var err error
			for err == nil {
				var n int
				n, err = h.read(buf)
				got.Write(buf[:n])
			}
			require.Equal(t, io.EOF, err, "cut %d room %d", cut, room)
			require.Equal(t, "data", got.String(), "cut %d room %d", cut, room)
			require.Equal(t, uint64(4), h.reads(), "the answer does not count as the application's (S12)")
		}
	}
	// An end within the answer is not the application's.
	for cut := range len(expect) {
		h := receivingFrom(newFake().feeds(expect[:cut], io.EOF), expect)
		_, err := h.read(make([]byte, 100))
		require.Equal(t, io.ErrUnexpectedEOF, err, "after %d bytes", cut)
		h = receivingFrom(newFake().feeds(expect[:cut], network.ErrReset), expect)
		_, err = h.read(make([]byte, 100))
		require.Equal(t, network.ErrReset, err, "after %d bytes", cut)
	}
}

// TestUsualMessagesArePlain: what this version sends is read without the general decoder, which
// costs ten times as much.
func TestUsualMessagesArePlain(t *testing.T) {
	for name, bytes := range map[string]string{
		"label": LabelBytes(600), "migrate": MigrateBytes(602, 600), "draft migrate": MigrateDraftBytes(602, 600),
		"ack": AckVerified, "draft ack": AckDraft, "denial": AckDenied, "final size": FinalSizeBytes(1 << 40),
	} {
		body, err := readBody(strings.NewReader(bytes), make([]byte, usualMessage))
		require.NoError(t, err, name)
		m := parsePlain(body)
		require.NotNil(t, m, name)
		general := new(pb.StreamMigration)
		require.NoError(t, proto.Unmarshal(body, general), name)
		require.True(t, proto.Equal(general, m), "%s: %v, not %v", name, m, general)
		size, ok := parseNumber(fieldFinalSize, body)
		require.Equal(t, name == "final size", ok, name)
		require.Equal(t, general.GetFinalSize().GetSize(), size, name)
	}
}
