package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/libp2p/go-libp2p/core/network"
)

func TestPartsMakeUpTheFile(t *testing.T) {
	content := []byte("to carry a boat from one stream to another")
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, count := range []int{1, 2, 5, len(content)} {
		src, err := openSource(config{file: name, size: int64(len(content))})
		if err != nil {
			t.Fatal(err)
		}
		var all []byte
		for i := range count {
			part, size := src.part(i, count)
			got, err := io.ReadAll(part)
			if err != nil || int64(len(got)) != size {
				t.Errorf("part %d of %d: %d bytes, %v; want %d", i, count, len(got), err, size)
			}
			all = append(all, got...)
		}
		if !bytes.Equal(all, content) {
			t.Errorf("%d parts make up %q; want %q", count, all, content)
		}
		src.Close()
	}
}

func TestGeneratedPartsAreRepeatableAndDiffer(t *testing.T) {
	src := &source{size: 1000}
	read := func(i int) []byte {
		part, _ := src.part(i, 2)
		got, _ := io.ReadAll(part)
		return got
	}
	if len(read(0)) != 500 || !bytes.Equal(read(0), read(0)) {
		t.Error("the first part is not the same 500 bytes each time")
	}
	if bytes.Equal(read(0), read(1)) {
		t.Error("two parts are the same, so a mix-up would not be seen")
	}
}

// received is a stream of the receiver's. It notes what of it was read when it was closed.
type received struct {
	network.Stream
	io.Reader
	ended, answered, reset bool
}

func (s *received) Read(p []byte) (int, error) {
	n, err := s.Reader.Read(p)
	s.ended = s.ended || err == io.EOF
	return n, err
}

func (s *received) Write(p []byte) (int, error) {
	s.answered = s.ended
	return len(p), nil
}

func (s *received) Close() error { return nil }
func (s *received) Reset() error { s.reset = true; return nil }

func TestReceiverReadsToTheEnd(t *testing.T) {
	content := "to carry a boat from one stream to another"
	sum := sha256.Sum256([]byte(content))
	whole := fmt.Sprintf("{\"Name\":\"boat\",\"Part\":0,\"Size\":%d}\n%s%s", len(content), content, sum[:])
	for name, test := range map[string]struct {
		sent  string
		whole bool
	}{
		"whole":     {whole, true},
		"more":      {whole + "!", false},
		"cut short": {whole[:len(whole)-1], false},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := config{streams: 1, size: int64(len(content))}
			tr := &transfer{cfg: cfg, rec: newRecorder(cfg), sums: make(map[int]string)}
			s := &received{Reader: bytes.NewReader([]byte(test.sent))}
			tr.handle(s)
			if s.answered != test.whole || s.reset == test.whole || (tr.lost == nil) != test.whole {
				t.Errorf("answered behind the end: %v, reset: %v, lost: %v", s.answered, s.reset, tr.lost)
			}
		})
	}
}
