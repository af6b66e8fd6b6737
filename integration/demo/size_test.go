package main

import "testing"

func TestParseSize(t *testing.T) {
	for text, want := range map[string]int64{
		"0":       0,
		"4096":    4096,
		"17 B":    17,
		"64MiB":   64 << 20,
		"64 mib":  64 << 20,
		"64M":     64 << 20,
		"1.5GiB":  3 << 29,
		"2KB":     2000,
		" 1kib ":  1024,
		"0.5 TiB": 1 << 39,
	} {
		if got, err := parseSize(text); err != nil || got != want {
			t.Errorf("parseSize(%q) = %d, %v; want %d", text, got, err, want)
		}
	}
}

func TestParseSizeRefuses(t *testing.T) {
	for _, text := range []string{"", "MiB", "-1", "1 XiB", "1..5M", "99999999999TiB", "NaN", "Inf", "1 2"} {
		if got, err := parseSize(text); err == nil {
			t.Errorf("parseSize(%q) = %d; want an error", text, got)
		}
	}
}

func TestFormatSize(t *testing.T) {
	for bytes, want := range map[int64]string{
		0:               "0 B",
		1023:            "1023 B",
		1024:            "1 KiB",
		1536:            "1.5 KiB",
		10<<20 + 300000: "10.3 MiB",
		64 << 20:        "64 MiB",
		100 << 20:       "100 MiB",
		1<<63 - 1:       "8 EiB",
	} {
		if got := formatSize(bytes); got != want {
			t.Errorf("formatSize(%d) = %q; want %q", bytes, got, want)
		}
	}
}
