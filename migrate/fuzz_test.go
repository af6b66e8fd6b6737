package migrate

import (
	"bytes"
	"testing"

	"google.golang.org/protobuf/proto"
)

// FuzzReadMessage: W4. Whatever a peer sends, the parser returns a message with a member or
// an error, reads no byte behind the message, and none of one that is too long.
func FuzzReadMessage(f *testing.F) {
	for _, seed := range [][]byte{
		appendMessage(nil, migrateMessage(4, 2)),
		appendMessage(nil, ackMessage(true)),
		appendMessage(nil, denyMessage()),
		appendMessage(nil, finalSizeMessage(1000)),
		{0}, {2, 0x1a}, {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, {0x81, 0x08},
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		const behind = "behind"
		r := bytes.NewReader(append(bytes.Clone(data), behind...))
		m, err := readMessage(r)
		if err != nil {
			return
		}
		if m.Type == nil {
			t.Fatal("a message without a member was accepted")
		}
		read := r.Size() - int64(r.Len())
		if read > maxMessage+10 {
			t.Fatalf("read %d bytes", read)
		}
		again, err := readMessage(bytes.NewReader(appendMessage(nil, m)))
		if err != nil || !proto.Equal(m, again) {
			t.Fatalf("%v became %v, %v", m, again, err)
		}
	})
}
