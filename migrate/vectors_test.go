package migrate

import (
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	. "github.com/go-portage/portage/internal/rawpeer"
	"github.com/go-portage/portage/internal/vectors"
	"github.com/go-portage/portage/pb"
)

// The test vectors of docs/protocol.md, by which implementations in other languages are
// checked, too.

// TestVectorsOfMessages: what is read and written (W4).
func TestVectorsOfMessages(t *testing.T) {
	file := vectors.Load(t)
	for _, v := range vectors.Of(t, file.Messages, "StreamMigration") {
		t.Run(v.Name, func(t *testing.T) {
			r := strings.NewReader(string(v.Bytes) + "rest")
			m, err := readMessage(r)
			require.NoError(t, err)
			require.Equal(t, len("rest"), r.Len())
			got, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
			require.NoError(t, err)
			require.JSONEq(t, string(v.Message), string(got))
			if v.OnlyRead {
				return
			}
			want := new(pb.StreamMigration)
			require.NoError(t, protojson.Unmarshal(v.Message, want))
			require.Equal(t, string(v.Bytes), string(appendMessage(nil, want)))
		})
	}
	for _, v := range vectors.Of(t, file.Refused, "StreamMigration") {
		t.Run("refused: "+v.Name, func(t *testing.T) {
			_, err := readMessage(strings.NewReader(string(v.Bytes)))
			require.ErrorIs(t, err, errViolation)
		})
	}
}

// TestVectorsOfOpenings: what the host answers to the beginning of a stream, or whether it
// resets that (W1, W4, W5, L1, S2).
func TestVectorsOfOpenings(t *testing.T) {
	for _, v := range vectors.Load(t).Openings {
		t.Run(v.Name, func(t *testing.T) {
			p := meeting{kind: verified, hostHigher: v.Opener == "lower"}.meet(t)
			p.host.SetStreamHandler(goldenProtocol, func(s network.Stream) { p.app <- s.(*Stream) })
			u := p.Opens(0, string(v.Bytes))
			switch v.Reset {
			case "":
				require.NotEmpty(t, v.Answer)
				u.Wants(string(v.Answer))
				p.talk(p.accepted(), u)
			case "any":
				u.WantsReset(network.StreamNoError)
				p.nothingLeft()
			default:
				code, err := strconv.ParseUint(v.Reset, 0, 32)
				require.NoError(t, err)
				u.WantsReset(network.StreamErrorCode(code))
				p.nothingLeft()
			}
		})
	}
}

// TestVectorsOfExchanges: the host as each of the two sides, where it can be that one.
func TestVectorsOfExchanges(t *testing.T) {
	for _, v := range vectors.Load(t).Exchanges {
		for _, side := range []string{"A", "B"} {
			if side != v.DraftOnly {
				t.Run(v.Name+", host is "+side, func(t *testing.T) { playVector(t, v, side) })
			}
		}
	}
}

func playVector(t *testing.T, v vectors.Exchange, side string) {
	m := meeting{kind: peerKind{ID, FinalSizeID, goldenProtocol}, hostHigher: side == "B"}
	if v.DraftOnly != "" {
		m.kind = peerKind{ID, goldenProtocol}
	}
	if v.Denies == side {
		m.opts = append(m.opts, WithAcceptor(func(*Stream, network.Conn) bool { return false }))
	}
	p := m.meet(t)
	p.host.SetStreamHandler(goldenProtocol, func(s network.Stream) { p.app <- s.(*Stream) })
	var (
		s      *Stream
		on     = make(map[string]*RawStream)
		before string // what the host sends with its application's first byte
		wrote  string // the peer's application
		moved  *outcome
		end    error
	)
	if v.Denies != "" && v.Denies != side {
		end = ErrDenied
	}
	steps := slices.Clone(v.Steps)
	for i, st := range steps {
		if st.Crosses && st.Side == side { // it is the host that has to send first
			steps[i-1], steps[i] = st, steps[i-1]
			end = ErrTryLater
		}
	}
	for i, st := range steps {
		u := on[st.Stream]
		what := fmt.Sprintf("step %d: %s on %s: %s %s", i, st.Side, st.Stream, st.Event, st.Says)
		if st.Side != side { // the test plays it
			switch {
			case st.Event == "open":
				on[st.Stream] = p.Opens(0, string(st.Bytes))
			case st.Event == "migrate":
				on[st.Stream] = p.Opens(1, string(st.Bytes))
			case st.Bytes != "":
				u.Sends(string(st.Bytes))
			case st.End:
				_ = u.CloseWrite() // on QUIC an error where the host has closed the stream, as after a denial
			default:
				require.NotEmpty(t, st.Reset, what) // the host has reset it
			}
			if st.Event == "write" {
				wrote += string(st.Bytes)
			}
			continue
		}
		if s == nil && st.Event != "open" && before == "" {
			u.Wants(string(st.Bytes)) // the answer to the opening
			s = p.accepted()
			continue
		}
		switch st.Event {
		case "open":
			p.countTo(goldenFrom)
			var err error
			s, err = p.hostBegins(0, goldenProtocol)
			require.NoError(t, err, what)
			before = string(st.Bytes)
			continue
		case "write":
			p.writes(s, string(st.Bytes))
		case "close write":
			require.NoError(t, s.CloseWrite(), what)
		case "migrate":
			req, err := readMessage(strings.NewReader(strings.TrimPrefix(string(st.Bytes), prelude)))
			require.NoError(t, err, what)
			p.countTo(req.GetMigrate().GetId())
			moved = p.hostMigrates(s)
		default:
			require.Equal(t, "protocol", st.Event, what)
		}
		if u == nil {
			u = p.Arrives()
			on[st.Stream] = u
		}
		switch {
		case st.Bytes != "":
			u.Wants(before + string(st.Bytes))
			before = ""
		case st.End:
			u.WantsEOF()
		default:
			require.Equal(t, "any", st.Reset, what)
			u.WantsReset(network.StreamNoError)
		}
	}
	require.Equal(t, wrote, p.readsEnd(s, io.EOF))
	if moved != nil {
		moved.is(end)
	}
	p.hasLabel(v.Label)
	require.NoError(t, s.Close())
	p.nothingLeft()
}

// TestVectorsOfResumptionMessages: what is read and written of streams that outlive their
// connection.
func TestVectorsOfResumptionMessages(t *testing.T) {
	all := vectors.Load(t).Resumption.Messages
	check := func(t *testing.T, v vectors.Message, got, want proto.Message, written func() string) {
		is, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(got)
		require.NoError(t, err)
		require.JSONEq(t, string(v.Message), string(is))
		require.NoError(t, protojson.Unmarshal(v.Message, want))
		if !v.OnlyRead {
			require.Equal(t, string(v.Bytes), written())
		}
	}
	for _, v := range vectors.Of(t, all, "StreamMigration") {
		t.Run(v.Name, func(t *testing.T) {
			m, err := readMessage(strings.NewReader(string(v.Bytes)))
			require.NoError(t, err)
			want := new(pb.StreamMigration)
			check(t, v, m, want, func() string { return string(appendMessage(nil, want)) })
		})
	}
	for _, v := range vectors.Of(t, all, "Progress") {
		t.Run(v.Name, func(t *testing.T) {
			m, want := readProgress(t, strings.NewReader(string(v.Bytes))), new(pb.Progress)
			check(t, v, m, want, func() string { return string(progressMessage(want)) })
		})
	}
}

func readProgress(t *testing.T, r io.Reader) *pb.Progress {
	t.Helper()
	body, err := readBody(r, make([]byte, usualMessage))
	require.NoError(t, err)
	m := new(pb.Progress)
	require.NoError(t, proto.Unmarshal(body, m))
	return m
}

// TestVectorsOfResumption: the host as each of the two sides.
func TestVectorsOfResumption(t *testing.T) {
	v := vectors.Load(t).Resumption.Exchange
	for _, side := range []string{"A", "B"} {
		t.Run("host is "+side, func(t *testing.T) { playResumption(t, v, side) })
	}
}

func playResumption(t *testing.T, v vectors.Exchange, side string) {
	p := meeting{kind: peerKind{ID, FinalSizeID, ResumeID, goldenProtocol}, hostHigher: side == "B", opts: []Option{WithResumption()}}.meet(t)
	p.host.SetStreamHandler(goldenProtocol, func(s network.Stream) { p.app <- s.(*Stream) })
	steps := slices.Clone(v.Steps)
	if side == "B" { // A's attempt comes once B knows that its own is stale
		at := func(of, stream, event string) int {
			return slices.IndexFunc(steps, func(st vectors.Step) bool { return st.Side == of && st.Stream == stream && st.Event == event })
		}
		i := at("A", "new", "resume")
		attempt := steps[i]
		steps = slices.Delete(steps, i, i+1)
		steps = slices.Insert(steps, at("B", "new", "protocol"), attempt)
	}
	var (
		s      *Stream
		on     = make(map[string]*RawStream)
		before string // what the host sends with its application's first byte
	)
	for i, st := range steps {
		u, bytes := on[st.Stream], string(st.Bytes)
		what := fmt.Sprintf("step %d: %s on %s: %s %s", i, st.Side, st.Stream, st.Event, st.Says)
		report := strings.HasPrefix(st.Stream, "report")
		switch {
		case st.Side != side && st.Event == "lose":
			_ = u.ResetWithError(network.StreamSupplanted)
		case st.Side != side && st.Event == "open":
			on[st.Stream] = p.Opens(0, bytes)
		case st.Side != side && (st.Event == "resume" || report && u == nil):
			on[st.Stream] = p.Opens(1, bytes)
		case st.Side != side && st.End:
			u.ClosesWrite()
		case st.Side != side && st.Reset != "":
			_ = u.ResetWithError(codeGivenUp)
		case st.Side != side:
			u.Sends(bytes)
			if s != nil && side == "A" && st.Event == "write" {
				p.reads(s, bytes)
			}

		case st.Event == "open":
			p.countTo(goldenFrom)
			var err error
			s, err = p.hostBegins(0, goldenProtocol)
			require.NoError(t, err, what)
			before = bytes
		case st.Event == "lose":
			p.host.resumer.get(p.ID(), goldenFrom).lose(nil, errTooLate)
			if side == "A" {
				u.WantsReset(network.StreamSupplanted)
			}
		case st.Event == "resume":
			u = p.Arrives()
			u.Wants(bytes)
			on[st.Stream] = u
		case report && u == nil:
			require.True(t, strings.HasPrefix(bytes, header+token(string(ResumeID))), what)
			want := readProgress(t, strings.NewReader(strings.TrimPrefix(bytes, header+token(string(ResumeID)))))
			on[st.Stream] = p.awaitsReport(want)
		case u == nil || st.Event == "protocol" && s == nil: // what the host opens, and its answer to an opening
			if st.Event == "write" {
				p.writes(s, bytes)
				bytes = before + bytes
			}
			if u == nil {
				u = p.Arrives()
				on[st.Stream] = u
			}
			u.Wants(bytes)
			if s == nil {
				s = p.accepted()
				p.reads(s, "hel")
			}
		case st.Event == "write":
			p.writes(s, bytes)
			u.Wants(bytes)
		case st.Event == "close write":
			require.NoError(t, s.CloseWrite(), what)
			u.WantsEOF()
		case st.End:
			u.WantsEOF()
		case st.Reset != "":
			u.WantsReset(network.StreamSupplanted)
		default:
			u.Wants(bytes)
		}
		if next := i + 1; next < len(steps) && steps[next].Event == "lose" && steps[next].Side == side {
			for _, st := range steps { // the label that the host's attempt is to give
				if st.Event == "resume" && st.Side == side {
					m, err := readMessage(strings.NewReader(strings.TrimPrefix(string(st.Bytes), prelude)))
					require.NoError(t, err)
					p.countTo(m.GetMigrate().GetId())
				}
			}
		}
		if side == "B" && st.Event == "close write" {
			require.Equal(t, "lo world", p.readsEnd(s, io.EOF))
		}
	}
	p.hasLabel(v.Label)
	require.NoError(t, s.Close())
}

// awaitsReport waits until the host has told what want says, and returns the stream of that.
func (p *rawPeer) awaitsReport(want *pb.Progress) *RawStream {
	p.t.Helper()
	for {
		u := p.ArrivesFor(ResumeID)
		u.Wants(header, token(string(ResumeID)))
		for {
			body, err := readBody(u, make([]byte, usualMessage))
			if err != nil {
				break // it has reported what there was
			}
			m := new(pb.Progress)
			require.NoError(p.t, proto.Unmarshal(body, m))
			require.Equal(p.t, want.GetOrigin(), m.GetOrigin())
			if want.End != nil && m.End != nil {
				require.Equal(p.t, want.GetEnd(), m.GetEnd())
				return u
			}
			if want.Received != nil && m.GetReceived() == want.GetReceived() {
				return u
			}
		}
	}
}

// TestVectorsAreDocumented: each message that docs/protocol.md shows is a vector, so that
// it is what the code reads and writes.
func TestVectorsAreDocumented(t *testing.T) {
	file := vectors.Load(t)
	for _, doc := range []struct {
		name  string
		least int
		of    []vectors.Message
	}{
		{"protocol.md", 14, file.Messages},
		{"resumption.md", 6, file.Resumption.Messages},
	} {
		text, err := os.ReadFile("../docs/" + doc.name)
		require.NoError(t, err)
		known := make(map[string]bool)
		for _, v := range doc.of {
			known[fmt.Sprintf("% x", string(v.Bytes))] = true
		}
		shown := regexp.MustCompile(`(?m)^((?:[0-9a-f]{2} )+) +length (\d+): `).FindAllStringSubmatch(string(text), -1)
		require.GreaterOrEqual(t, len(shown), doc.least, "the messages are not found in %s", doc.name)
		for _, line := range shown {
			bytes := strings.TrimSpace(line[1])
			require.True(t, known[bytes], "docs/vectors.json has no message %s", bytes)
			require.Equal(t, line[2], strconv.Itoa(strings.Count(bytes, " ")), "the length of %s", bytes)
		}
	}
}
