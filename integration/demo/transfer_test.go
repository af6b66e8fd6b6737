package main

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"
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
