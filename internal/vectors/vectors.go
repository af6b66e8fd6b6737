// Package vectors reads docs/vectors.json for tests.
package vectors

import (
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// Bytes are written in hexadecimal, with blanks between them.
type Bytes string

// UnmarshalJSON implements json.Unmarshaler.
func (b *Bytes) UnmarshalJSON(in []byte) error {
	var digits string
	if err := json.Unmarshal(in, &digits); err != nil {
		return err
	}
	raw, err := hex.DecodeString(strings.ReplaceAll(digits, " ", ""))
	*b = Bytes(raw)
	return err
}

// File is what the file holds, as it says itself at its head.
type File struct {
	About     []string
	Messages  []Message
	Refused   []Message
	Openings  []Opening
	Exchanges []Exchange

	Resumption struct {
		Messages []Message
		Exchange Exchange
	}
}

// Message is one message, with its length before it.
type Message struct {
	Name, Type string
	Bytes      Bytes
	Message    json.RawMessage // in the JSON form of protobuf; nil where it has to be refused
	OnlyRead   bool            `json:"only_read"`
}

// Opening is how a stream begins.
type Opening struct {
	Name, Opener  string
	Bytes, Answer Bytes
	Reset         string
}

// Exchange is the life of one logical stream.
type Exchange struct {
	Name, Denies string
	DraftOnly    string `json:"draft_only"`
	Label        uint64 `json:",string"`
	Steps        []Step
}

// Step is something that one side sends.
type Step struct {
	Side, Stream, Event string
	Bytes               Bytes
	End, Crosses        bool
	Reset, Says         string
}

// Load reads the file.
func Load(t testing.TB) *File {
	t.Helper()
	_, here, _, _ := runtime.Caller(0)
	in, err := os.Open(filepath.Join(filepath.Dir(here), "../../docs/vectors.json"))
	require.NoError(t, err)
	defer in.Close()
	f := new(File)
	dec := json.NewDecoder(in)
	dec.DisallowUnknownFields()
	require.NoError(t, dec.Decode(f))
	return f
}

// Of returns those of all that are of that type.
func Of(t testing.TB, all []Message, typ string) []Message {
	t.Helper()
	var of []Message
	for _, m := range all {
		if m.Type == typ {
			of = append(of, m)
		}
	}
	require.NotEmpty(t, of, "no vectors of %s", typ)
	return of
}
