package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// served runs the demo with a server at l until the test ends, and returns what it writes.
// before is called when all is set up and before the second connection is dialled; done is
// closed when the demo has told what came of it.
func served(t *testing.T, l net.Listener, before func(context.Context) error) (out *bytes.Buffer, log *logBuffer, done <-chan struct{}) {
	t.Helper()
	told := make(chan struct{})
	log = &logBuffer{onHas: "Ctrl-C ends", then: func() { close(told) }}
	cfg, err := parseFlags([]string{"-size", "8MiB", "-after", "300ms", "-timeout", "5m", "-json", "-svg", filepath.Join(t.TempDir(), "chart.svg")}, log)
	if err != nil {
		t.Fatal(err)
	}
	cfg.hold, cfg.before, cfg.server = true, before, serveOn(l)
	cfg.relay.data, cfg.relay.time = 2*cfg.size, cfg.timeout // for a machine that is busy
	ctx, interrupt := context.WithCancel(context.Background())
	ended := make(chan int, 1)
	out = new(bytes.Buffer)
	go func() { ended <- cfg.run(ctx, out, log) }()
	t.Cleanup(func() {
		interrupt()
		if status := <-ended; status != 0 {
			t.Errorf("exit status %d\n%s\n%s", status, out, log)
		}
		if _, err := http.Get("http://" + l.Addr().String()); err == nil {
			t.Error("the page is still there when the demo has ended")
		}
	})
	return out, log, told
}

func page(t *testing.T, url string) string {
	t.Helper()
	got, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Body.Close()
	body, err := io.ReadAll(got.Body)
	if err != nil || got.StatusCode != http.StatusOK {
		t.Fatalf("%s: status %d, error %v\n%s", url, got.StatusCode, err, body)
	}
	return string(body)
}

// The page is there while the demo runs, and when it is done; and so are the metrics.
func TestStatusPageIsServed(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	url := "http://" + l.Addr().String()
	seen := false
	_, log, done := served(t, l, func(context.Context) error {
		for _, path := range []string{"/", "/receiver"} {
			if text := page(t, url+path); !strings.Contains(text, "limited relay") {
				t.Errorf("%s does not show the relayed connection:\n%s", path, text)
			}
		}
		seen = true
		return nil
	})
	<-done
	if !seen {
		t.Fatalf("the second connection was not dialled\n%s", log)
	}
	if !strings.Contains(log.String(), "status page: "+url+" (sender), "+url+"/receiver; metrics: "+url+"/metrics") {
		t.Errorf("the demo does not say where the page is:\n%s", log)
	}
	for _, path := range []string{"/", "/receiver"} {
		var s struct {
			Totals struct {
				Moved int `json:"streams_moved"`
			} `json:"totals"`
			Peers []struct {
				Sign struct{ Text string } `json:"sign"`
			} `json:"peers"`
		}
		if err := json.Unmarshal([]byte(page(t, url+path+"?format=json&q=")), &s); err != nil {
			t.Fatal(err)
		}
		if s.Totals.Moved != 1 {
			t.Errorf("%s: %d streams moved; want 1", path, s.Totals.Moved)
		}
	}
	drained := regexp.MustCompile(`(?m)^libp2p_portage_drained_bytes_total [1-9]`)
	moved := regexp.MustCompile(`(?m)^libp2p_portage_migrations_total\{from="limited relay",outcome="moved",to="quic-v1"\} [1-9]`)
	if text := page(t, url+"/metrics"); !moved.MatchString(text) || !drained.MatchString(text) {
		t.Errorf("the metrics do not count the migration, or what was drained:\n%s", text)
	}
}

func TestAddressThatCannotBeServed(t *testing.T) {
	var log logBuffer
	if status := run(t.Context(), []string{"-http", "nowhere:-1"}, io.Discard, &log); status != 1 || !strings.Contains(log.String(), "-http") {
		t.Errorf("exit status %d, %q; want 1, and the flag", status, log.String())
	}
	for _, with := range []string{"-without", "-nat"} {
		if status := run(t.Context(), []string{"-http", "127.0.0.1:0", with}, io.Discard, &log); status != 2 {
			t.Errorf("with %s: exit status %d; want 2", with, status)
		}
	}
}
