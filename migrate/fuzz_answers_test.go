package migrate

import (
	"bytes"
	"context"
	"io"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	msmux "github.com/multiformats/go-multistream"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/rawpeer"
)

// The kinds of answers that FuzzAnswers makes up.
const (
	toOpening     = iota // to an opening in one flight
	toNegotiation        // to one that negotiates the application's protocol
	toMigrate            // by a peer that advertises the verified handover
	toDraft              // by one that does not
	answerKinds
	resetAtEnd = 1 << 7 // the answer ends in a reset, not in EOF
)

// FuzzAnswers: arbitrary bytes, cut anyhow, as the answer to an opening and to a Migrate.
// What the right answer is, and what follows it, reaches the application to the byte; all
// else is an error, never a clean end, and leaves a stream that was there as it was.
func FuzzAnswers(f *testing.F) {
	const right, other = Prelude + MultistreamToken + EchoToken, Prelude + MultistreamToken + NAToken
	for kind, answers := range map[uint8][]string{
		toOpening: {
			"", right, right + "data", right[:30], MultistreamToken + NAToken, other, Prelude + AckVerified,
			MultistreamToken + EchoToken + "data", "\x00", right[:len(right)-1] + "\x00",
		},
		toNegotiation: {
			right, right + "data", other + EchoToken + "data", other + NAToken, MultistreamToken + NAToken, Prelude + MigrationToken,
			Prelude, Prelude + MultistreamToken + "\xff\xff\x03", other[:40],
		},
		toMigrate: {
			"", MultistreamToken, MultistreamToken + NAToken, Prelude + AckDenied, Prelude + AckVerified,
			Prelude + AckVerified + FinalSizeBytes(3) + "data",
			Prelude + AckVerified + FinalSizeBytes(2) + "data",
			Prelude + AckVerified + FinalSizeBytes(4) + "data",
			Prelude + AckVerified + FinalSizeBytes(1<<63) + "data",
			Prelude + AckVerified + FinalSizeBytes(3) + FinalSizeBytes(3),
			Prelude + AckVerified + AckVerified,
			Prelude + AckDraft + "data", Prelude + LabelBytes(601),
			Prelude + MigrateBytes(605, 603), Prelude + FinalSizeBytes(3) + AckVerified,
		},
		toDraft: {Prelude + AckDraft + "data", Prelude + AckDraft + FinalSizeBytes(3)},
	} {
		for _, in := range answers {
			f.Add([]byte(in), kind, uint8(0))
			f.Add([]byte(in), kind|resetAtEnd, uint8(1))
		}
	}
	for _, m := range Malformed {
		f.Add([]byte(Prelude+m), uint8(toMigrate), uint8(0))
	}
	f.Fuzz(func(t *testing.T, in []byte, kind, size uint8) {
		virtual(t, func(t *testing.T) {
			a := &answers{in: string(in), end: io.EOF, kind: kind &^ resetAtEnd % answerKinds}
			if kind&resetAtEnd != 0 {
				a.end = network.ErrReset
			}
			a.h = bareHost("a", func(id protocol.ID) bool { return id != FinalSizeID || a.kind == toMigrate })
			a.u = &scripted{fakeStream: newFake(), in: a.in, size: int(size), end: a.end}
			a.u.conn.remote = remoteOfAnswers
			switch a.kind {
			case toOpening:
				a.opening(t)
			case toNegotiation:
				a.negotiation(t)
			default:
				a.migration(t)
			}
			a.h.labels.mu.Lock()
			defer a.h.labels.mu.Unlock()
			require.Empty(t, a.h.labels.peers, "nothing may be left of a stream (L5)")
		})
	})
}

const remoteOfAnswers peer.ID = "b"

type answers struct {
	h    *Host
	u    *scripted
	in   string
	end  error
	kind uint8
}

// reads checks that s brings want, and then the end of the answer.
func (a *answers) reads(t *testing.T, s io.Reader, want string) {
	t.Helper()
	got, err := io.ReadAll(s)
	require.Equal(t, want, string(got))
	if a.end == io.EOF {
		require.NoError(t, err)
	} else {
		require.ErrorIs(t, err, a.end)
	}
}

func (a *answers) opening(t *testing.T) {
	s, err := a.h.open(context.Background(), a.u, echoID, []protocol.ID{echoID})
	require.NoError(t, err)
	_, err = s.Write([]byte("!"))
	require.NoError(t, err)
	require.Equal(t, Prelude+LabelBytes(s.Label())+MultistreamToken+EchoToken+"!", a.u.taken())
	if rest, ok := strings.CutPrefix(a.in, Prelude+MultistreamToken+EchoToken); ok {
		a.reads(t, s, rest)
	} else {
		got, err := io.ReadAll(s)
		require.Error(t, err, "an answer that is none may not read as a clean end")
		require.Empty(t, got)
	}
	require.NoError(t, s.Reset())
}

func (a *answers) negotiation(t *testing.T) {
	pids := []protocol.ID{"/test/other/1.0.0", echoID}
	s, err := a.h.open(context.Background(), a.u, "", pids)

	behind, right := strings.CutPrefix(a.in, Prelude)
	r := strings.NewReader(behind)
	proto, refErr := msmux.SelectOneOf(pids, readWriteCloser{r, new(bytes.Buffer)})
	if !right || refErr != nil {
		require.Error(t, err)
		return
	}
	require.NoError(t, err)
	require.Equal(t, proto, s.Protocol())
	a.reads(t, s, behind[len(behind)-r.Len():])
	require.NoError(t, s.Reset())
}

func (a *answers) migration(t *testing.T) {
	const sent = "abc" // over the old stream
	old := newFake().feeds(sent, nil).feeds("", io.EOF)
	old.conn.remote = remoteOfAnswers
	s := newStream(a.h, old, echoID, 600)
	require.True(t, a.h.labels.add(remoteOfAnswers, 600, s))
	to := &fakeConn{remote: remoteOfAnswers, open: func(context.Context) (network.Stream, error) { return a.u, nil }}
	err := a.h.Migrate(context.Background(), s, to)

	r := strings.NewReader(strings.TrimPrefix(a.in, Prelude))
	m, refErr := readMessage(r)
	ack := m.GetAckMigrate()
	final, finalErr := uint64(len(sent)), error(nil)
	if ack.GetFinalSize() && !ack.GetDenyMigrate() {
		final, finalErr = readFinalSize(r)
	}
	behind := a.in[len(a.in)-r.Len():]
	switch {
	case !strings.HasPrefix(a.in, Prelude) || refErr != nil || ack == nil:
		require.ErrorIs(t, err, ErrTryLater)
		require.NotNil(t, a.u.resetWith)
	case ack.GetDenyMigrate():
		require.ErrorIs(t, err, ErrDenied)
		require.True(t, a.u.isClosed)
	case finalErr != nil, final > uint64(len(sent)), a.kind == toMigrate && !ack.GetFinalSize():
		require.ErrorIs(t, err, network.ErrReset)
		got, err := io.ReadAll(s)
		require.ErrorIs(t, err, network.ErrReset)
		require.True(t, strings.HasPrefix(sent, string(got)))
		synctest.Wait()
		require.NotNil(t, old.resetWith)
		require.NotNil(t, a.u.resetWith)
		return
	default:
		require.NoError(t, err)
		require.Equal(t, 1, s.Migrations())
		a.reads(t, s, sent[:final]+behind)
		require.NoError(t, s.Reset())
		return
	}
	// It is as it was.
	require.Zero(t, s.Migrations())
	require.Equal(t, uint64(600), s.Label())
	got, err := io.ReadAll(s)
	require.NoError(t, err)
	require.Equal(t, sent, string(got))
	_, err = s.Write([]byte("!"))
	require.NoError(t, err)
	require.Equal(t, "!", old.taken())
	require.NoError(t, s.Reset())
}
