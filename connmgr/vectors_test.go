package connmgr

import (
	"bytes"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/go-portage/portage/internal/vectors"
	"github.com/go-portage/portage/pb"
)

// TestVectorsOfDrainMessages: docs/vectors.json, by which implementations in other languages
// are checked, too.
func TestVectorsOfDrainMessages(t *testing.T) {
	file := vectors.Load(t)
	for _, v := range vectors.Of(t, file.Messages, "DrainMessage") {
		t.Run(v.Name, func(t *testing.T) {
			m, err := readDrain(strings.NewReader(string(v.Bytes) + "rest"))
			require.NoError(t, err)
			got, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
			require.NoError(t, err)
			require.JSONEq(t, string(v.Message), string(got))
			if v.OnlyRead {
				return
			}
			want := new(pb.DrainMessage)
			require.NoError(t, protojson.Unmarshal(v.Message, want))
			var written bytes.Buffer
			require.NoError(t, writeDrain(&written, want))
			require.Equal(t, string(v.Bytes), written.String())
		})
	}
	for _, v := range vectors.Of(t, file.Refused, "DrainMessage") {
		t.Run("refused: "+v.Name, func(t *testing.T) {
			_, err := readDrain(strings.NewReader(string(v.Bytes)))
			require.ErrorIs(t, err, errNotDrain)
		})
	}
}
