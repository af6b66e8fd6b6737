package rawpeer

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"strings"

	"github.com/libp2p/go-libp2p/core/protocol"
	"google.golang.org/protobuf/encoding/protodelim"

	"github.com/go-portage/portage/pb"
)

// The tokens of multistream-select, as they are on the wire. See Token for any other.
const (
	MultistreamToken = "\x13/multistream/1.0.0\n"
	MigrationToken   = "\x19/libp2p/stream-migration\n"
	EchoToken        = "\x11/test/echo/1.0.0\n"
	NAToken          = "\x03na\n"

	// Prelude is what a labelled stream begins with, and one that a migration leads to (W1, W2).
	Prelude = MultistreamToken + MigrationToken
)

// EchoID is the protocol of the tests' usual application.
const EchoID protocol.ID = "/test/echo/1.0.0"

// The answers to Migrate: of a peer that has only the draft, of one that has the verified
// handover, and a denial.
const (
	AckDraft    = "\x02\x1a\x00"
	AckVerified = "\x05\x1a\x03\xa0\x06\x01"
	AckDenied   = "\x04\x1a\x02\x08\x01"
)

// Token is the token of a protocol.
func Token(id protocol.ID) string { return Lengthy(string(id) + "\n") }

// Uvarint is x as protobuf and multistream-select have it.
func Uvarint(x uint64) string { return string(binary.AppendUvarint(nil, x)) }

// Lengthy puts the length of s before s, as every message and every member has it.
func Lengthy(s string) string { return Uvarint(uint64(len(s))) + s }

// LabelBytes is the message that gives a stream its label.
func LabelBytes(id uint64) string { return Lengthy("\x0a" + Lengthy("\x08"+Uvarint(id))) }

// MigrateBytes asks to migrate the stream labelled from, with a verified handover. Its label
// becomes id.
func MigrateBytes(id, from uint64) string { return migrateWith(id, from, "\xa0\x06\x01") }

// MigrateDraftBytes is MigrateBytes of a peer that has only the draft.
func MigrateDraftBytes(id, from uint64) string { return migrateWith(id, from, "") }

func migrateWith(id, from uint64, more string) string {
	return Lengthy("\x12" + Lengthy("\x08"+Uvarint(id)+"\x10"+Uvarint(from)+more))
}

// FinalSizeBytes says how many bytes went over the old stream (S12).
func FinalSizeBytes(size uint64) string { return Lengthy("\xa2\x06" + Lengthy("\x08"+Uvarint(size))) }

// OpeningBytes is what a labelled stream of the application app begins with, in one flight.
func OpeningBytes(label uint64, app protocol.ID) string {
	return Prelude + LabelBytes(label) + MultistreamToken + Token(app)
}

// AnswerBytes is what the acceptor of a labelled stream begins with.
func AnswerBytes(app protocol.ID) string { return Prelude + MultistreamToken + Token(app) }

// Malformed are messages that are none, by what is wrong with them (W4).
var Malformed = map[string]string{
	"no member":              "\x00",
	"unknown member":         Lengthy("\xaa\x06" + Lengthy("")),
	"oversized":              Uvarint(1025) + strings.Repeat("\x00", 1025),
	"far oversized":          Uvarint(1<<20) + strings.Repeat("\x0a", 4096),
	"length of 64 bits":      Uvarint(1<<63) + "\x0a\x00",
	"length of 70 bits":      strings.Repeat("\xff", 10),
	"length that is too big": "\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
	"member beyond the end":  "\x02\x0a\x05",
	"unknown wire type":      "\x01\x0f",
	"field zero":             "\x02\x00\x00",
	"member of another type": Lengthy("\x08\x02"),
	"id of 70 bits":          Lengthy("\x0a" + Lengthy("\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")),
	"groups that never end":  Lengthy(strings.Repeat("\x0b", 1000)),
}

// Expect reads exactly want.
func Expect(r io.Reader, want string) error {
	got := make([]byte, len(want))
	n, err := io.ReadFull(r, got)
	if string(got[:n]) != want {
		return fmt.Errorf("wanted %q, got %q, and then %v", want, got[:n], err)
	}
	return nil
}

// ReadMessage reads one message, and nothing behind it.
func ReadMessage(r io.Reader) (*pb.StreamMigration, error) {
	m := new(pb.StreamMigration)
	return m, protodelim.UnmarshalFrom(bufio.NewReaderSize(oneByte{r}, 16), m)
}

// oneByte reads one byte at a time: what follows is not for its reader.
type oneByte struct{ io.Reader }

func (r oneByte) Read(p []byte) (int, error) { return r.Reader.Read(p[:1]) }
