package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// outcome is what run has to say in JSON.
type outcome struct {
	Size       int64          `json:"size"`
	Bytes      int64          `json:"bytes"`
	Verified   int            `json:"streams_verified"`
	SHA256OK   bool           `json:"sha256_ok"`
	Received   map[path]int64 `json:"bytes_received"`
	Migrations int            `json:"migrations"`
	Conns      int            `json:"connections_after"`
	Relayed    bool           `json:"relayed_after"`
	Cuts       []struct {
		What string `json:"what"`
		Next path   `json:"next"`
	} `json:"cuts"`
	Error string `json:"error"`
}

// runDemo runs the program and checks that its exit status, and whether there is a chart,
// fit what it says.
func runDemo(t *testing.T, ctx context.Context, log *logBuffer, args ...string) outcome {
	t.Helper()
	cfg, err := parseFlags(args, log)
	if err != nil {
		t.Fatal(err)
	}
	return runConfig(t, ctx, log, cfg)
}

func runConfig(t *testing.T, ctx context.Context, log *logBuffer, cfg config) outcome {
	t.Helper()
	cfg.json, cfg.svg = true, filepath.Join(t.TempDir(), "chart.svg")
	var out bytes.Buffer
	status := cfg.run(ctx, &out, log)
	var got outcome
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatalf("stdout is not one JSON object: %v\n%s\n%s", err, out.Bytes(), log)
	}
	if (status == 0) != (got.Error == "") || (status == 0 && !got.SHA256OK) {
		t.Errorf("exit status %d, sha256_ok %v, error %q do not fit together", status, got.SHA256OK, got.Error)
	}
	doc, err := os.ReadFile(cfg.svg)
	if begun := strings.Contains(log.String(), "first connection: "); begun != (err == nil) {
		t.Fatalf("the transfer has begun: %v; chart: %v; the demo says %q\n%s", begun, err, got.Error, log)
	}
	if err == nil {
		checkDrawing(t, doc)
	}
	return got
}

// logBuffer collects what the demo writes to stderr, and may act on it.
type logBuffer struct {
	mu    sync.Mutex
	text  strings.Builder
	onHas string
	then  func()
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.text.Write(p)
	if b.then != nil && strings.Contains(string(p), b.onHas) {
		b.then()
	}
	return len(p), nil
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

func TestStreamsMoveAndTheFileArrivesWhole(t *testing.T) {
	for _, test := range []struct {
		from, to path
		size     string
		streams  int
	}{
		{relay, quic, "8MiB", 1},
		{relay, tcp, "8MiB", 1},
		// More streams than go-libp2p allows a protocol by default; and of a size that lets
		// all of them through the relay before the second connection is there.
		{relay, webtransport, "32MiB", 100},
		{tcp, quic, "8MiB", 1},
		{quic, tcp, "8MiB", 1}, // against the default policy
		{ws, webtransport, "8MiB", 10},
	} {
		t.Run(string(test.from+" to "+test.to), func(t *testing.T) {
			t.Parallel()
			var log logBuffer
			cfg, err := parseFlags([]string{"-from", string(test.from), "-to", string(test.to),
				"-size", test.size, "-streams", strconv.Itoa(test.streams), "-after", "600ms", "-timeout", "5m"}, &log)
			if err != nil {
				t.Fatal(err)
			}
			// A machine that is busy takes its time for the move: the last bytes of a stream
			// wait for it, and the relay has no limits.
			cfg.hold = true
			cfg.relay.data, cfg.relay.time = 2*cfg.size, 10*time.Minute
			got := runConfig(t, t.Context(), &log, cfg)
			if got.Error != "" || got.Bytes != got.Size || got.Verified != test.streams {
				t.Errorf("%d of %d bytes arrived, %d of %d streams verified, error %q; want all, and none\n%s",
					got.Bytes, got.Size, got.Verified, test.streams, got.Error, &log)
			}
			if got.Migrations != test.streams || got.Conns != 1 || got.Relayed {
				t.Errorf("%d streams moved, %d connections are left, relayed %v; want %d, 1, false\n%s",
					got.Migrations, got.Conns, got.Relayed, test.streams, &log)
			}
			if got.Received[test.from] == 0 || got.Received[test.to] == 0 {
				t.Errorf("received by path: %v; want something over each", got.Received)
			}
		})
	}
}

func TestWithoutPortageTheRelayEndsTheTransfer(t *testing.T) {
	t.Parallel()
	var log logBuffer
	got := runDemo(t, t.Context(), &log, "-without", "-after", "500ms")
	if got.Error == "" || got.SHA256OK || got.Bytes >= got.Size/4 {
		t.Errorf("%d of %d bytes arrived, error %q; want the relay's limit, about an eighth, and an error",
			got.Bytes, got.Size, got.Error)
	}
	if got.Migrations != 0 || got.Received[quic] != 0 {
		t.Errorf("%d migrations, received by path %v; want none, and nothing over QUIC", got.Migrations, got.Received)
	}
}

func TestInterruptEndsTheDemo(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	log := logBuffer{onHas: "second connection up", then: cancel}
	begin := time.Now()
	got := runDemo(t, ctx, &log, "-size", "1GiB", "-rate", "4MiB", "-from", "tcp", "-after", "100ms")
	if !strings.Contains(got.Error, context.Canceled.Error()) {
		t.Errorf("error is %q; want the context's", got.Error)
	}
	if took := time.Since(begin); took > time.Minute {
		t.Errorf("took %v to end; want it at once", took)
	}
}

func TestTimeoutSaysSo(t *testing.T) {
	t.Parallel()
	var log logBuffer
	got := runDemo(t, t.Context(), &log, "-size", "1GiB", "-rate", "4MiB", "-from", "tcp", "-after", "100ms", "-timeout", "1s")
	if !strings.Contains(got.Error, "-timeout") {
		t.Errorf("error is %q; want one that names the flag", got.Error)
	}
}

// The picture shows the transfer, and below it what it would have been without Portage.
func TestPictureHasBothRuns(t *testing.T) {
	t.Parallel()
	var log logBuffer
	file := filepath.Join(t.TempDir(), "both.svg")
	cfg, err := parseFlags([]string{"-size", "8MiB", "-after", "600ms", "-timeout", "5m", "-svg", file}, &log)
	if err != nil {
		t.Fatal(err)
	}
	cfg.relay.data, cfg.relay.time = 2*cfg.size, 10*time.Minute // for a machine that is busy
	var out bytes.Buffer
	if status := cfg.run(t.Context(), &out, &log); status != 0 {
		t.Fatalf("exit status %d\n%s\n%s", status, &out, &log)
	}
	doc, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	checkDrawing(t, doc)
	with, without := bytes.Index(doc, []byte("With Portage: all has arrived")), bytes.Index(doc, []byte("Without: all has arrived"))
	if with < 0 || without < with {
		t.Errorf("the picture has the run with Portage at %d, the one without at %d; want both, in this order", with, without)
	}
	if bytes.Contains(out.Bytes(), []byte("plain go-libp2p")) {
		t.Errorf("the summary tells of the comparison:\n%s", &out)
	}
}
