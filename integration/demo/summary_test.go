package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"
)

func TestSummaryJSON(t *testing.T) {
	lost := sample(1)
	lost.verified, lost.arrived = 0, 8<<20
	lost.after = append(lost.after, connection{senderSide, relay, true})
	lost.fail(errors.New("cut"))
	for name, test := range map[string]struct {
		s    *summary
		want map[string]any
	}{
		"whole": {sample(1), map[string]any{
			"bytes": 64.0 * (1 << 20), "sha256_ok": true, "migrations": 1.0, "connections_after": 1.0,
			"relayed_after": false, "longest_read_gap_ms": 12.0, "migration_ms": 90.5, "direct_to_prune_ms": 402.0, "error": "",
		}},
		"lost": {lost, map[string]any{
			"bytes": 8.0 * (1 << 20), "sha256_ok": false, "connections_after": 2.0, "relayed_after": true, "error": "cut",
		}},
		"not begun": {(&summary{cfg: sample(1).cfg}).fail(errors.New("no relay")), map[string]any{
			"bytes": 0.0, "sha256_ok": false, "migrations": 0.0, "connections_after": 0.0, "relayed_after": false, "error": "no relay",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			if err := test.s.writeJSON(&out); err != nil {
				t.Fatal(err)
			}
			var got map[string]any
			if err := json.Unmarshal(out.Bytes(), &got); err != nil {
				t.Fatalf("not one JSON object: %v", err)
			}
			for field, want := range test.want {
				if got[field] != want {
					t.Errorf("%s is %v; want %v", field, got[field], want)
				}
			}
		})
	}
}

func TestSummaryText(t *testing.T) {
	whole := sample(1)
	whole.sha256 = "5f3a"
	lost := sample(1)
	lost.cfg.without, lost.verified = true, 0
	lost.fail(errors.New("cut"))
	cutUp := sample(1)
	cutUp.cfg.cut = true
	cutUp.cuts = []cut{{"the TCP connection is reset", time.Second, relay, 20 * time.Millisecond, 64 << 10}, {what: "nothing passes", at: 2 * time.Second}}
	cutOff := sample(1)
	cutOff.cfg.cut, cutOff.cfg.without, cutOff.verified = true, true, 0
	for name, test := range map[string]struct {
		s    *summary
		want []string
	}{
		"cut":       {cutUp, []string{"1.000 s   the relay      20 ms   64 KiB", "2.000 s   none"}},
		"cut off":   {cutOff, []string{"FAILED on plain go-libp2p", "although there were other ways"}},
		"whole":     {whole, []string{"arrived with Portage", "5f3a", "relayed (outbound), QUIC (outbound)", "1 of 1", "90.5 ms", "402 ms", "12 ms"}},
		"many":      {sample(100), []string{"100 streams", "SHA-256 of each", "100 of 100"}},
		"lost":      {lost, []string{"FAILED on plain go-libp2p", "although a QUIC connection stood beside it", "Error: cut"}},
		"not begun": {(&summary{cfg: sample(1).cfg}).fail(errors.New("no relay")), []string{"did not begin", "Error: no relay"}},
	} {
		t.Run(name, func(t *testing.T) {
			var out strings.Builder
			if err := test.s.writeText(&out); err != nil {
				t.Fatal(err)
			}
			for _, want := range test.want {
				if !strings.Contains(out.String(), want) {
					t.Errorf("the summary does not say %q:\n%s", want, out.String())
				}
			}
		})
	}
}
