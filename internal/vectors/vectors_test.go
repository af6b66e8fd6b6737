package vectors

import (
	"encoding/json"
	"fmt"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protowire"
)

// drainFields are the messages of draining as docs/protocol.md has them: the members by number,
// and the fields of each. They are written down here once more, so that the vectors are
// checked against the text, and not against the code only.
var drainFields = map[protowire.Number]struct {
	name   string
	fields map[protowire.Number]string
}{
	1: {"drain", map[protowire.Number]string{1: "lease"}},
	2: {"drained", nil},
	3: {"refused", map[protowire.Number]string{1: "reason"}},
	4: {"keep", nil},
	5: {"kept", nil},
	6: {"busy", map[protowire.Number]string{1: "wait"}},
	7: {"hello", map[protowire.Number]string{1: "instance"}},
}

// decodeDrain decodes a message of draining with its length before it.
func decodeDrain(b []byte) (map[string]map[string]any, error) {
	size, n := protowire.ConsumeVarint(b)
	if n < 0 || size > 1024 || size != uint64(len(b)-n) {
		return nil, fmt.Errorf("a length of %d, of %d bytes", size, len(b)-n)
	}
	m := make(map[string]map[string]any)
	err := each(b[n:], func(num protowire.Number, v any) error {
		member, known := drainFields[num]
		body, ok := v.([]byte)
		if !known || !ok {
			return nil
		}
		fields := make(map[string]any)
		err := each(body, func(num protowire.Number, v any) error {
			if name, known := member.fields[num]; known {
				if text, ok := v.([]byte); ok {
					v = string(text)
				}
				fields[name] = v
			}
			return nil
		})
		clear(m) // the last member counts
		m[member.name] = fields
		return err
	})
	if err == nil && len(m) == 0 {
		err = fmt.Errorf("no member")
	}
	return m, err
}

func each(b []byte, field func(protowire.Number, any) error) error {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		var v any
		switch typ {
		case protowire.VarintType:
			v, n = protowire.ConsumeVarint(b)
		case protowire.BytesType:
			v, n = protowire.ConsumeBytes(b)
		case protowire.Fixed64Type:
			var number uint64
			number, n = protowire.ConsumeFixed64(b)
			v = strconv.FormatUint(number, 10) // as JSON has numbers of 64 bits here
		default:
			n = protowire.ConsumeFieldValue(num, typ, b)
		}
		if n < 0 {
			return protowire.ParseError(n)
		}
		if err := field(num, v); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

func TestDrainMessages(t *testing.T) {
	file := Load(t)
	for _, v := range Of(t, file.Messages, "DrainMessage") {
		t.Run(v.Name, func(t *testing.T) {
			m, err := decodeDrain([]byte(v.Bytes))
			require.NoError(t, err)
			got, err := json.Marshal(m)
			require.NoError(t, err)
			require.JSONEq(t, string(v.Message), string(got))
		})
	}
	for _, v := range Of(t, file.Refused, "DrainMessage") {
		t.Run("refused: "+v.Name, func(t *testing.T) {
			_, err := decodeDrain([]byte(v.Bytes))
			require.Error(t, err)
		})
	}
}
