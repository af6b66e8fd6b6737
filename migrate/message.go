package migrate

import (
	"errors"
	"fmt"
	"io"

	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/multiformats/go-varint"
	"google.golang.org/protobuf/encoding/protowire"
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

// appendMessage appends m to b, with its length before it. No message is long enough for a
// length of more than one byte.
func appendMessage(b []byte, m *pb.StreamMigration) []byte {
	start := len(b)
	begin := func(member protowire.Number) {
		b = protowire.AppendTag(append(b, 0), member, protowire.BytesType)
		b = append(b, 0)
	}
	number := func(field protowire.Number, v uint64) {
		b = protowire.AppendVarint(protowire.AppendTag(b, field, protowire.VarintType), v)
	}
	truth := func(field protowire.Number, v *bool) {
		if v != nil {
			number(field, protowire.EncodeBool(*v))
		}
	}
	nested := func(field protowire.Number, fill func()) {
		b = append(protowire.AppendTag(b, field, protowire.BytesType), 0)
		at := len(b)
		fill()
		b[at-1] = byte(len(b) - at)
	}
	body := 0 // where the member's begins
	switch t := m.Type.(type) {
	case *pb.StreamMigration_Label:
		begin(fieldLabel)
		body = len(b)
		number(1, t.Label.GetId())
		truth(fieldResumes, t.Label.Resumes)
	case *pb.StreamMigration_Migrate:
		begin(fieldMigrate)
		body = len(b)
		number(1, t.Migrate.GetId())
		number(2, t.Migrate.GetFrom())
		truth(fieldFinalSize, t.Migrate.FinalSize)
		if m := t.Migrate.Resume; m != nil {
			nested(fieldResumes, func() {
				number(1, m.GetOrigin())
				number(2, m.GetEpoch())
				number(3, m.GetReceived())
			})
		}
	case *pb.StreamMigration_AckMigrate:
		begin(fieldAckMigrate)
		body = len(b)
		truth(1, t.AckMigrate.DenyMigrate)
		truth(fieldFinalSize, t.AckMigrate.FinalSize)
		if v := t.AckMigrate.Received; v != nil {
			number(fieldResumes, *v)
		}
		if m := t.AckMigrate.Stale; m != nil {
			nested(fieldStale, func() {
				number(1, m.GetEpoch())
				truth(2, m.Wait)
			})
		}
	case *pb.StreamMigration_FinalSize:
		begin(fieldFinalSize)
		body = len(b)
		number(1, t.FinalSize.GetSize())
	default:
		panic("a message without a member")
	}
	b[start], b[body-1] = byte(len(b)-start-1), byte(len(b)-body)
	return b
}

// The members of StreamMigration. fieldFinalSize is the extension's field in the other
// messages, too.
const (
	fieldLabel      = 1
	fieldMigrate    = 2
	fieldAckMigrate = 3
	fieldFinalSize  = 100
	fieldResumes    = 101
	fieldStale      = 102
)

// readMessage reads one message, and no byte more. A message that is malformed, oversized or
// without a member is an errViolation; an error of the stream is returned as it is. A required
// field that is missing is 0.
func readMessage(r io.Reader) (*pb.StreamMigration, error) {
	body, err := readBody(r, make([]byte, usualMessage))
	if err != nil {
		return nil, err
	}
	return parseMessage(body)
}

func parseMessage(body []byte) (*pb.StreamMigration, error) {
	if m := parsePlain(body); m != nil {
		return m, nil
	}
	m := new(pb.StreamMigration)
	// AllowPartial: see zeros.
	if err := (proto.UnmarshalOptions{AllowPartial: true}).Unmarshal(body, m); err != nil {
		return nil, fmt.Errorf("%w: %w", errViolation, err)
	}
	if m.Type == nil {
		return nil, fmt.Errorf("%w: a message without a member", errViolation)
	}
	zeros(m)
	return m, nil
}

// parsePlain reads a message as nearly every encoder writes it: one member with the fields
// that this version knows, each once at most and in their order. It returns nil for any other.
func parsePlain(body []byte) *pb.StreamMigration {
	member, typ, n := protowire.ConsumeTag(body)
	if n < 0 || typ != protowire.BytesType {
		return nil
	}
	fields, k := protowire.ConsumeBytes(body[n:])
	if k < 0 || n+k != len(body) {
		return nil
	}
	next := func(field protowire.Number) (v uint64, ok bool) {
		num, typ, n := protowire.ConsumeTag(fields)
		if n < 0 || num != field || typ != protowire.VarintType {
			return 0, false
		}
		v, k := protowire.ConsumeVarint(fields[n:])
		if k < 0 {
			return 0, false
		}
		fields = fields[n+k:]
		return v, true
	}
	truth := func(field protowire.Number) *bool {
		if v, ok := next(field); ok {
			return proto.Bool(protowire.DecodeBool(v))
		}
		return nil
	}
	m := new(pb.StreamMigration)
	switch member {
	case fieldLabel:
		id, _ := next(1)
		m.Type = &pb.StreamMigration_Label{Label: &pb.Label{Id: &id, Resumes: truth(fieldResumes)}}
	case fieldMigrate:
		id, _ := next(1)
		from, _ := next(2)
		m.Type = &pb.StreamMigration_Migrate{Migrate: &pb.Migrate{Id: &id, From: &from, FinalSize: truth(fieldFinalSize)}}
	case fieldAckMigrate:
		m.Type = &pb.StreamMigration_AckMigrate{AckMigrate: &pb.AckMigrate{DenyMigrate: truth(1), FinalSize: truth(fieldFinalSize)}}
	case fieldFinalSize:
		size, _ := next(1)
		m.Type = &pb.StreamMigration_FinalSize{FinalSize: &pb.FinalSize{Size: &size}}
	}
	if len(fields) > 0 || m.Type == nil {
		return nil
	}
	return m
}

// parseNumber reads a message whose member has one field, a number, as nearly every encoder
// writes it. It says false of any other message.
func parseNumber(member protowire.Number, body []byte) (v uint64, ok bool) {
	got, typ, n := protowire.ConsumeTag(body)
	if n < 0 || got != member || typ != protowire.BytesType {
		return 0, false
	}
	// The length and the field's tag are one byte each.
	if body = body[n:]; len(body) < 2 || int(body[0]) != len(body)-1 || body[1] != 1<<3|byte(protowire.VarintType) {
		return 0, false
	}
	v, n = protowire.ConsumeVarint(body[2:])
	return v, n == len(body)-2
}

// usualMessage is more than any message of this version has.
const usualMessage = 32

// readBody reads what comes behind the length of a message, into b if that is long enough.
func readBody(r io.Reader, b []byte) ([]byte, error) {
	length := uint64(0)
	for shift := 0; ; shift += 7 {
		if _, err := io.ReadFull(r, b[:1]); err != nil {
			if shift > 0 {
				err = unexpected(err)
			}
			return nil, err
		}
		if shift == 63 && b[0] > 1 {
			return nil, fmt.Errorf("%w: the length of a message does not fit 64 bits", errViolation)
		}
		length |= uint64(b[0]&0x7f) << shift
		if b[0] < 0x80 {
			break
		}
	}
	if length > maxMessage {
		return nil, fmt.Errorf("%w: a message of %d bytes", errViolation, length)
	}
	if length > uint64(len(b)) {
		b = make([]byte, length)
	}
	_, err := io.ReadFull(r, b[:length])
	return b[:length], unexpected(err)
}

// unexpected is err of a stream that ends within a message.
func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
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
		if r := t.Migrate.Resume; r != nil {
			set(&r.Origin)
			set(&r.Epoch)
			set(&r.Received)
		}
	case *pb.StreamMigration_AckMigrate:
		if m := t.AckMigrate.Stale; m != nil {
			set(&m.Epoch)
		}
	case *pb.StreamMigration_FinalSize:
		set(&t.FinalSize.Size)
	}
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
func opening(label uint64, app protocol.ID) []byte { return openingOf(label, app, false) }

// openingOf is the opening of a stream that may outlive its connection, if resumes says so.
func openingOf(label uint64, app protocol.ID, resumes bool) []byte {
	b := make([]byte, 0, len(prelude)+16+len(header)+len(app)+4)
	b = append(b, prelude...)
	m := &pb.Label{Id: &label}
	if resumes {
		m.Resumes = &resumes
	}
	b = appendMessage(b, &pb.StreamMigration{Type: &pb.StreamMigration_Label{Label: m}})
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
	_, err := w.Write(appendMessage(make([]byte, 0, usualMessage), m))
	return err
}

// readFinalSize reads the FinalSize message with which each side begins on the new
// stream of a verified handover (S12).
func readFinalSize(r io.Reader) (uint64, error) {
	body, err := readBody(r, make([]byte, usualMessage))
	if err != nil {
		return 0, err
	}
	if size, ok := parseNumber(fieldFinalSize, body); ok {
		return size, nil
	}
	m, err := parseMessage(body)
	if err != nil {
		return 0, err
	}
	if f := m.GetFinalSize(); f != nil {
		return f.GetSize(), nil
	}
	return 0, fmt.Errorf("%w: expected FinalSize, got %T", errViolation, m.Type)
}
