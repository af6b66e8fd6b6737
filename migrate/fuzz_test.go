package migrate

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	msmux "github.com/multiformats/go-multistream"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	. "github.com/go-portage/portage/internal/rawpeer"
	"github.com/go-portage/portage/pb"
)

// mergers are messages whose fields come more than once, or in an order of their own, or
// among others: what such bytes mean is told by the rules of protobuf alone.
var mergers = []string{
	Lengthy("\x12\x02\x08\x02" + "\x12\x02\x10\x04"),                // Migrate in two parts
	Lengthy("\x12\x04\x08\x02\x10\x04" + "\x12\x02\x08\x06"),        // the last id counts
	Lengthy("\x12\x04\x10\x04\x08\x02"),                             // from comes first
	Lengthy("\x12\x06\x08\x02\x08\x06\x10\x04"),                     // id twice
	Lengthy("\x0a\x02\x08\x02" + "\x12\x04\x08\x02\x10\x04"),        // Label, and then Migrate
	Lengthy("\x12\x04\x08\x02\x10\x04" + "\x0a\x02\x08\x02"),        // the other way about
	Lengthy("\x0a\x02\x08\x02" + "\x1a\x00" + "\x0a\x00"),           // Label, ack, Label of nothing
	Lengthy("\x1a\x02\x08\x01" + "\x1a\x02\x08\x00"),                // a denial that is taken back
	Lengthy("\x1a\x02\x08\x01" + "\x1a\x03\xa0\x06\x01"),            // a denial, with a final size
	Lengthy("\x1a\x05\xa0\x06\x01\x08\x01"),                         // the same, in the other order
	Lengthy("\x1a\x02\x08\x02"),                                     // a truth that is 2
	Lengthy("\xa2\x06\x02\x08\x05" + "\xa2\x06\x02\x08\x07"),        // the last size counts
	Lengthy("\xa2\x06\x05\x08\x05\x10\x01\x08"),                     // the last field is cut off
	Lengthy("\xa2\x06\x03\x08\x85\x00"),                             // a number longer than need be
	Lengthy("\x8a\x00\x02\x08\x02"),                                 // a tag longer than need be
	Lengthy("\x0a\x82\x00\x08\x02"),                                 // a length longer than need be
	Lengthy("\x0a\x03\x88\x00\x02"),                                 // a field's tag longer than need be
	Lengthy("\x0a\x0b\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"), // the largest label
	Lengthy("\x0a\x0b\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02"), // more than 64 bits
	Lengthy("\x0a\x05\x0d\x02\x00\x00\x00"),                         // of another wire type
	Lengthy("\x0a\x04\x0b\x08\x02\x0c"),                             // in a group
	Lengthy("\x7a\x01\x00" + "\x0a\x02\x08\x02"),                    // behind an unknown field
	Lengthy("\x0a\x02\x08\x02" + "\x78\x05"),                        // before one
	Lengthy("\x0a\x04\x08\x02\x08\x06"),                             // a label twice
	Lengthy("\x0a\x02\x10\x02"),                                     // another number than the label
	Lengthy("\x0a\x01\x08\x02"), Lengthy("\xa2\x06\x01\x08\x02"),    // a member that says it is shorter
	Lengthy("\x0a\x03\x08\x02"), // or longer
	"\x85", "\x80\x80",          // cut within the length
	Lengthy("\x7a\x01\x00"),                                           // an unknown field alone
	Lengthy("\x02\x00"), Lengthy("\x0a\x02\x00\x00"), Lengthy("\x0c"), // field 0, the end of no group
}

// FuzzReadMessage: whatever a peer sends, the parser does not panic, takes the bytes of
// one message and no more, obeys the bound, makes of it what protobuf does, and understands
// what it writes (W4).
func FuzzReadMessage(f *testing.F) {
	for _, m := range mergers {
		f.Add([]byte(m))
	}
	for _, m := range Malformed {
		f.Add([]byte(m))
	}
	for _, m := range []string{
		LabelBytes(600), MigrateBytes(602, 600), MigrateDraftBytes(602, 600),
		AckDraft, AckVerified, AckDenied, FinalSizeBytes(5), padded(600, 1024), padded(600, 1025),
		LabelBytes(600) + AckVerified, LabelBytes(600)[:3], "\x85\x00" + AckVerified[1:],
		Lengthy("\x1a\x00\x0a" + Lengthy("\x08\x02")),
	} {
		f.Add([]byte(m))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bytes.NewReader(in)
		m, err := readMessage(r)
		taken := len(in) - r.Len()

		dripping := bytes.NewReader(in)
		again, err2 := readMessage(iotest.OneByteReader(dripping))
		require.Equal(t, taken, len(in)-dripping.Len(), "how the bytes are cut decides how many are taken")
		require.Equal(t, err == nil, err2 == nil, "%v, and byte by byte %v", err, err2)

		size, n := binary.Uvarint(in)
		if n <= 0 || size > maxMessage || uint64(len(in)-n) < size {
			require.Nil(t, m)
			require.LessOrEqual(t, taken, binary.MaxVarintLen64+maxMessage)
			cut := n == 0 && len(in) < binary.MaxVarintLen64 || n > 0 && size <= maxMessage
			require.Equal(t, cut, !errors.Is(err, errViolation), "a stream that ends is no violation: %v", err)
			require.Equal(t, len(in) == 0, err == io.EOF)
			return
		}
		require.Equal(t, n+int(size), taken)
		ref := new(pb.StreamMigration) // the decoder that knows every encoding
		refErr := proto.UnmarshalOptions{AllowPartial: true}.Unmarshal(in[n:taken], ref)
		label, isLabel := parseNumber(fieldLabel, in[n:taken])
		final, isFinal := parseNumber(fieldFinalSize, in[n:taken])
		if refErr != nil || ref.Type == nil {
			require.Nil(t, m)
			require.False(t, isLabel || isFinal, "%x", in)
			require.ErrorIs(t, err, errViolation)
			return
		}
		require.NoError(t, err)
		require.True(t, proto.Equal(m, again))
		zeros(ref)
		require.True(t, proto.Equal(m, ref), "%v, not %v, of %x", m, ref, in)
		if isLabel {
			require.NotNil(t, m.GetLabel(), "%x", in)
			require.Equal(t, m.GetLabel().GetId(), label, "%x", in)
		}
		if isFinal {
			require.NotNil(t, m.GetFinalSize(), "%x", in)
			require.Equal(t, m.GetFinalSize().GetSize(), final, "%x", in)
		}
		if m.GetFinalSize() != nil {
			v, err := readFinalSize(bytes.NewReader(in))
			require.NoError(t, err)
			require.Equal(t, m.GetFinalSize().GetSize(), v)
		} else {
			_, err := readFinalSize(bytes.NewReader(in))
			require.ErrorIs(t, err, errViolation)
		}
		forgetUnknown(m.ProtoReflect()) // nothing that we send has any
		encoded := appendMessage([]byte("before"), m)
		require.Equal(t, "before", string(encoded[:6]))
		encoded = encoded[6:]
		require.LessOrEqual(t, len(encoded), 1+usualMessage)
		inner := new(pb.StreamMigration)
		require.NoError(t, proto.Unmarshal(encoded[1:], inner), "it is what protobuf reads")
		require.True(t, proto.Equal(m, inner))
		rest := strings.NewReader(string(encoded) + "rest")
		decoded, err := readMessage(rest)
		require.NoError(t, err, "%x, of %x", encoded, in)
		require.True(t, proto.Equal(m, decoded), "%x, of %x", encoded, in)
		require.Equal(t, len("rest"), rest.Len())
	})
}

// FuzzMessages: what is written is read as it was, whatever the numbers are, and two messages
// in one mean what protobuf makes of them.
func FuzzMessages(f *testing.F) {
	for _, n := range []uint64{0, 1, 127, 128, 1 << 32, 1<<63 - 1, 1<<64 - 1} {
		for kind := range uint8(5) {
			f.Add(n, n/2, kind, uint8(4-kind))
		}
	}
	f.Fuzz(func(t *testing.T, a, b uint64, kind, behind uint8) {
		of := func(kind uint8) *pb.StreamMigration {
			switch kind % 5 {
			case 0:
				return &pb.StreamMigration{Type: &pb.StreamMigration_Label{Label: &pb.Label{Id: &a}}}
			case 1:
				return migrateMessage(a, b)
			case 2:
				return ackMessage(a%2 == 0)
			case 3:
				return denyMessage()
			default:
				return finalSizeMessage(b)
			}
		}
		first, second := of(kind), of(behind)
		encoded := appendMessage(nil, first)
		m, err := readMessage(bytes.NewReader(encoded))
		require.NoError(t, err)
		require.True(t, proto.Equal(first, m), "%v, not %v", m, first)
		size, err := readFinalSize(bytes.NewReader(encoded))
		require.Equal(t, kind%5 == 4, err == nil)
		require.Equal(t, first.GetFinalSize().GetSize(), size)

		both := string(encoded[1:]) + string(appendMessage(nil, second)[1:])
		m, err = readMessage(strings.NewReader(Lengthy(both)))
		require.NoError(t, err)
		merged := proto.CloneOf(first)
		proto.Merge(merged, second)
		require.True(t, proto.Equal(merged, m), "%v, not %v", m, merged)
	})
}

// forgetUnknown drops the fields that this version does not know.
func forgetUnknown(m protoreflect.Message) {
	m.SetUnknown(nil)
	m.Range(func(_ protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if inner, ok := v.Interface().(protoreflect.Message); ok {
			forgetUnknown(inner)
		}
		return true
	})
}

// scripted is an inbound stream that brings what it is given, size bytes at a time, and
// then ends.
type scripted struct {
	*fakeStream
	in   string
	size int
	end  error
}

func (s *scripted) Read(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.resetWith != nil:
		return 0, network.ErrReset
	case len(s.in) == 0:
		return 0, s.end
	case s.size > 0 && len(p) > s.size:
		p = p[:s.size]
	}
	n := copy(p, s.in)
	s.in = s.in[n:]
	return n, nil
}

// reference is what go-multistream itself makes of the beginning of a stream: which
// protocol it speaks, what is answered, and what is left for the application.
type reference struct {
	proto    protocol.ID
	answered string
	rest     string
	err      error
}

type readWriteCloser struct {
	io.Reader
	io.Writer
}

func (readWriteCloser) Close() error { return nil }

func negotiated(in string, ids ...protocol.ID) (ref reference) {
	mux := msmux.NewMultistreamMuxer[protocol.ID]()
	for _, id := range ids {
		mux.AddHandler(id, nil)
	}
	r, w := strings.NewReader(in), new(bytes.Buffer)
	ref.proto, _, ref.err = mux.Negotiate(readWriteCloser{r, w})
	rest, _ := io.ReadAll(r)
	ref.answered, ref.rest = w.String(), string(rest)
	return ref
}

// FuzzHandleStream: arbitrary bytes into the negotiation of an inbound stream. It ends
// when they end, without a panic; streams without a label are negotiated as go-multistream
// would, to the byte; nothing that is the application's is lost; and nothing is left in
// any table.
func FuzzHandleStream(f *testing.F) {
	const remote peer.ID = "\xff\xff" // higher than any host's, so that its labels are odd
	const living = 601
	for _, in := range []string{
		"", MultistreamToken, MultistreamToken + EchoToken + "data", MultistreamToken + NAToken + EchoToken + "data",
		MultistreamToken + Token("/test/other/1.0.0") + EchoToken,
		MultistreamToken + Token("/test/other/1.0.0") + MigrationToken + LabelBytes(603) + MultistreamToken + EchoToken + "data",
		MultistreamToken + Token("/test/as-long-as-the-id/1") + EchoToken + "data",
		MultistreamToken + Token(FinalSizeID),
		Prelude + LabelBytes(603) + MultistreamToken + EchoToken + "data",
		Prelude + LabelBytes(603) + MultistreamToken + Token("/test/other/1.0.0") + EchoToken + "data",
		Prelude + LabelBytes(602) + MultistreamToken + EchoToken,
		Prelude + LabelBytes(living) + MultistreamToken + EchoToken,
		Prelude + LabelBytes(603) + Prelude,
		Prelude + LabelBytes(603) + MultistreamToken + Token(FinalSizeID),
		Prelude + MigrateBytes(603, living) + FinalSizeBytes(0) + "data",
		Prelude + MigrateBytes(603, living) + FinalSizeBytes(5) + "data",
		Prelude + MigrateBytes(603, living) + AckVerified,
		Prelude + MigrateDraftBytes(603, living) + "data",
		Prelude + MigrateBytes(living, living),
		Prelude + MigrateBytes(603, 605),
		Prelude + AckVerified,
		Prelude + padded(603, 1024) + MultistreamToken + EchoToken + strings.Repeat("data", 500),
	} {
		f.Add([]byte(in), uint8(0))
		f.Add([]byte(in), uint8(1))
		f.Add([]byte(in), uint8(52))
	}
	for _, m := range Malformed {
		f.Add([]byte(Prelude+m), uint8(0))
	}

	h := lonelyHost(f, WithNegotiationTimeout(0), withLabelWait(time.Nanosecond), withBusyWait(time.Nanosecond))
	for _, id := range h.Mux().Protocols() {
		if id != ID && id != FinalSizeID {
			h.Mux().RemoveHandler(id)
		}
	}
	app := make(chan network.Stream, 1)
	h.SetStreamHandler(echoID, func(s network.Stream) { app <- s })

	f.Fuzz(func(t *testing.T, bytes []byte, size uint8) {
		in := string(bytes)
		u := &scripted{fakeStream: newFake(), in: in, size: int(size), end: io.EOF}
		u.conn.remote = remote
		old := &scripted{fakeStream: newFake(), end: network.ErrReset}
		old.conn.remote = remote
		alive := newStream(h, old, echoID, living)
		require.True(t, h.labels.add(remote, living, alive))

		h.handleStream(u) // and it ends

		var got network.Stream
		for _, s := range h.labels.all(remote) {
			switch {
			case s.Protocol() == FinalSizeID:
				_ = s.Reset() // as its handler does, at any moment
			case s.Protocol() == ID:
				t.Fatal("W5: a stream whose protocol is", ID)
			case s != alive:
				got = s
			}
		}
		if got != nil {
			require.Same(t, got, <-app, "the application has the stream")
		} else {
			select {
			case got = <-app:
			default:
			}
		}
		readAll := func(s network.Stream) string {
			data, err := io.ReadAll(s)
			require.NoError(t, err)
			return string(data)
		}

		// What go-multistream and the parser of messages make of it.
		ref := negotiated(in, ID, FinalSizeID, echoID)
		migrated := false
		switch {
		case ref.err != nil:
			require.Nil(t, got)
			require.NotNil(t, u.resetWith)
			require.Equal(t, network.StreamProtocolNegotiationFailed, *u.resetWith)
		case ref.proto == FinalSizeID:
			require.Nil(t, got)
			require.NotNil(t, u.resetWith)
		case ref.proto == echoID:
			require.Same(t, u, got, "the application has to get the raw stream")
			require.Equal(t, ref.answered, u.taken())
			require.Equal(t, ref.rest, readAll(got))
			require.Equal(t, echoID, u.Protocol())
			require.Nil(t, u.resetWith)
		default:
			r := strings.NewReader(ref.rest)
			m, err := readMessage(r)
			behind := ref.rest[len(ref.rest)-r.Len():]
			switch {
			case err == nil && m.GetLabel() != nil:
				label := m.GetLabel().GetId()
				inner := negotiated(behind, ID, FinalSizeID, echoID)
				if label%2 == 0 || label == living || inner.err != nil || inner.proto == ID {
					require.Nil(t, got)
					require.NotNil(t, u.resetWith)
					break
				}
				if inner.proto == FinalSizeID {
					break // its handler resets what it gets
				}
				require.NotNil(t, got)
				require.Equal(t, label, got.(*Stream).Label())
				require.Equal(t, ref.answered+inner.answered, u.taken())
				require.Equal(t, inner.rest, readAll(got))
				require.Equal(t, uint64(len(inner.rest)), got.(*Stream).recv.reads())
			case err == nil && m.GetMigrate() != nil && alive.Migrations() > 0:
				migrated = true
				require.Equal(t, m.GetMigrate().GetId(), alive.Label())
				f, err := readFinalSize(r)
				require.NoError(t, err)
				require.Zero(t, f, "the old stream brought nothing")
				require.True(t, strings.HasPrefix(u.taken(), ref.answered+AckVerified))
				require.Equal(t, ref.rest[len(ref.rest)-r.Len():], readAll(alive))
			default:
				require.Nil(t, got)
				require.True(t, u.resetWith != nil || u.isClosed, "a stream that is no use any more has to end")
			}
		}
		require.Equal(t, migrated, alive.Migrations() > 0)
		if got != nil {
			require.NoError(t, got.Reset())
		}
		require.NoError(t, alive.Reset())
		h.labels.mu.Lock()
		defer h.labels.mu.Unlock()
		require.Empty(t, h.labels.peers, "nothing may be left of a stream (L5)")
	})
}
