package main

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestParseFlags(t *testing.T) {
	cfg, err := parseFlags([]string{"-size", "16MiB", "-streams", "3", "-from", "tcp", "-to", "ws", "-rate", "8MiB/s"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if cfg.size != 16<<20 || cfg.streams != 3 || cfg.from != tcp || cfg.to != ws || cfg.rate != 8<<20 {
		t.Errorf("flags were read as %+v", cfg)
	}
	if cfg.timeout < time.Minute {
		t.Errorf("timeout is %v; want a minute at least", cfg.timeout)
	}
}

func TestParseFlagsTakesTheSizeOfTheFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, make([]byte, minRelayed), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := parseFlags([]string{"-file", file}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if cfg.size != minRelayed {
		t.Errorf("size is %d; want the file's, %d", cfg.size, minRelayed)
	}
}

func TestBadFlagsSayWhatToDo(t *testing.T) {
	for _, test := range []struct{ args, want string }{
		{"-from moon", "use relay, quic"},
		{"-to moon", "use relay, quic"},
		{"-to relay", "use quic"},
		{"-from tcp -to tcp", "choose two"},
		{"-size big", "write it like 64MiB"},
		{"-size 1MiB", "at least 4 MiB"},
		{"-size 10B -streams 11 -from tcp", "fewer -streams"},
		{"-streams 0", "from 1 to"},
		{"-streams 100000", "from 1 to"},
		{"-rate fast", "write it like 64MiB"},
		{"-after 0s", "above 0"},
		{"-after 20s", "at most"},
		{"-timeout -1s", "above 0"},
		{"-file /does/not/exist", "-file"},
		{"-file . -from tcp", "not a regular file"},
		{"-file flags_test.go -size 5MiB", "without -file"},
		{"-nat -to ws", "quic and tcp only"},
		{"-nat -size 64KiB", "more than 128 KiB"},
		{"-nat -from tcp", "leave out -from"},
		{"-nat -streams 2", "leave out -streams"},
		{"-cut -from quic", "leave out -from"},
		{"-cut -nat", "leave out -nat"},
		{"-cut -size 1MiB", "at least 4 MiB"},
		{"photo.jpg", "use -file photo.jpg"},
		{"-unknown", "-h lists them"},
	} {
		_, err := parseFlags(strings.Fields(test.args), io.Discard)
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: error is %v; want one with %q", test.args, err, test.want)
		}
	}
}

// The relay has to carry the transfer until the streams have moved, and must not be
// able to carry all of it.
func TestRelayLimitsLeaveRoomForTheMoveOnly(t *testing.T) {
	for _, size := range []int64{minRelayed, 64 << 20, 1 << 30} {
		cfg, err := parseFlags(nil, io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		l := limitsFor(size)
		const window = 256 << 10 // in flight when the sender switches
		before := cfg.after + 2*settleDelay
		if need := int64(float64(l.rate)*before.Seconds()) + window; need > l.data {
			t.Errorf("%s: %s pass before the streams have moved; the limit is %s",
				formatSize(size), formatSize(need), formatSize(l.data))
		}
		if l.data > size/4 {
			t.Errorf("%s: the relay's limit is %s; want it well below the size", formatSize(size), formatSize(l.data))
		}
	}
}
