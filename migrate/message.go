package migrate

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/multiformats/go-varint"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/proto"

	"github.com/go-portage/portage/pb"
)

// maxMessage is how long a message may be, in bytes, without its length prefix.
const maxMessage = 1 << 10

// notAvailable is multistream-select's answer to a protocol that the peer lacks.
const notAvailable = "\x03na\n"

// header is the first token of multistream-select, and prelude what precedes every
// message: the stream speaks ID. Both sides send the same bytes.
var (
	header  = token("/multistream/1.0.0")
	prelude = header + token(string(ID))
)

// token is s as multistream-select sends it.
func token(s string) string {
	return string(varint.ToUvarint(uint64(len(s)+1))) + s + "\n"
}

// errViolation is the sentinel of everything that a peer must not send.
var errViolation = errors.New("protocol violation")

// appendMessage appends m to b, with its length before it.
func appendMessage(b []byte, m *pb.StreamMigration) []byte {
	buf := bytes.NewBuffer(b)
	if _, err := protodelim.MarshalTo(buf, m); err != nil {
		panic(err) // a required field that this package forgot
	}
	return buf.Bytes()
}

// messageReader is what readMessage reads from: it takes no byte more than the
// message has.
type messageReader interface {
	io.Reader
	io.ByteReader
}

// readMessage reads one message. A message that is malformed, oversized or without a
// member is an errViolation; an error of the stream is returned as it is. A required field
// that is missing is 0.
func readMessage(r messageReader) (*pb.StreamMigration, error) {
	// Two errors look alike to the decoder: bytes that are no message, and a stream
	// that ends. The tracker remembers whether it was the stream.
	t := &tracker{r: r}
	m := new(pb.StreamMigration)
	opts := protodelim.UnmarshalOptions{MaxSize: maxMessage}
	opts.AllowPartial = true // see zeros
	err := opts.UnmarshalFrom(t, m)
	switch {
	case t.err == io.EOF && t.read > 0:
		return nil, io.ErrUnexpectedEOF
	case t.err != nil:
		return nil, t.err
	case err != nil:
		return nil, fmt.Errorf("%w: %w", errViolation, err)
	case m.Type == nil:
		return nil, fmt.Errorf("%w: a message without a member", errViolation)
	}
	zeros(m)
	return m, nil
}

// zeros sets the required fields that are missing: proto3 encoders leave zeros out.
func zeros(m *pb.StreamMigration) {
	set := func(field **uint64) {
		if *field == nil {
			*field = new(uint64)
		}
	}
	switch t := m.Type.(type) {
	case *pb.StreamMigration_Label:
		set(&t.Label.Id)
	case *pb.StreamMigration_Migrate:
		set(&t.Migrate.Id)
		set(&t.Migrate.From)
	case *pb.StreamMigration_FinalSize:
		set(&t.FinalSize.Size)
	}
}

type tracker struct {
	r    messageReader
	read int
	err  error
}

func (t *tracker) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	t.read += n
	if n > 0 {
		return n, nil
	}
	t.err = err
	return n, err
}

func (t *tracker) ReadByte() (byte, error) {
	b, err := t.r.ReadByte()
	if err != nil {
		t.err = err
	} else {
		t.read++
	}
	return b, err
}

// byteReader reads single bytes from a stream, and none too many.
type byteReader struct{ io.Reader }

func (r byteReader) ReadByte() (byte, error) {
	var b [1]byte
	_, err := io.ReadFull(r, b[:])
	return b[0], err
}

// readExpected reads from r what the peer has to send: expect, of which seen bytes were read
// before. A different answer is reported as soon as it is seen, since no more may follow it.
func readExpected(r io.Reader, expect string, seen int) error {
	buf := make([]byte, len(expect)-seen)
	for seen < len(expect) {
		n, err := r.Read(buf[:len(expect)-seen])
		if string(buf[:n]) != expect[seen:seen+n] {
			return refusal(buf[:n], expect, seen)
		}
		if seen += n; err != nil && seen < len(expect) {
			return err
		}
	}
	return nil
}

// opening is what the opener of a labelled stream sends before the first byte of the
// application, in one flight (W1). Where it has yet to negotiate the application's
// protocol, app is empty, and the opening ends with the label.
func opening(label uint64, app protocol.ID) []byte {
	b := make([]byte, 0, len(prelude)+16+len(header)+len(app)+4)
	b = append(b, prelude...)
	b = appendMessage(b, &pb.StreamMigration{Type: &pb.StreamMigration_Label{Label: &pb.Label{Id: &label}}})
	if app != "" {
		b = append(append(b, header...), token(string(app))...)
	}
	return b
}

// answer is what the acceptor of a labelled stream sends before the first byte of the
// application.
func answer(app protocol.ID) string {
	return prelude + header + token(string(app))
}

func migrateMessage(id, from uint64) *pb.StreamMigration {
	return &pb.StreamMigration{Type: &pb.StreamMigration_Migrate{Migrate: &pb.Migrate{
		Id: &id, From: &from, FinalSize: proto.Bool(true),
	}}}
}

// ackMessage accepts the migration, with a verified handover or without.
func ackMessage(verified bool) *pb.StreamMigration {
	ack := new(pb.AckMigrate)
	if verified {
		ack.FinalSize = proto.Bool(true)
	}
	return &pb.StreamMigration{Type: &pb.StreamMigration_AckMigrate{AckMigrate: ack}}
}

func denyMessage() *pb.StreamMigration {
	return &pb.StreamMigration{Type: &pb.StreamMigration_AckMigrate{AckMigrate: &pb.AckMigrate{
		DenyMigrate: proto.Bool(true),
	}}}
}

func finalSizeMessage(size uint64) *pb.StreamMigration {
	return &pb.StreamMigration{Type: &pb.StreamMigration_FinalSize{FinalSize: &pb.FinalSize{Size: &size}}}
}

// writeMessage writes m to w in one Write.
func writeMessage(w io.Writer, m *pb.StreamMigration) error {
	_, err := w.Write(appendMessage(nil, m))
	return err
}

// readFinalSize reads the FinalSize message with which each side begins on the new
// stream of a verified handover (S12).
func readFinalSize(r io.Reader) (uint64, error) {
	m, err := readMessage(byteReader{r})
	if err != nil {
		return 0, err
	}
	if f := m.GetFinalSize(); f != nil {
		return f.GetSize(), nil
	}
	return 0, fmt.Errorf("%w: expected FinalSize, got %T", errViolation, m.Type)
}
