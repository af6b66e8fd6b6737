package main

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
)

// units of sizes, by what stands behind the number. The bare letters are
// binary too, as in most tools that copy files.
var units = map[string]int64{
	"": 1, "b": 1,
	"k": 1 << 10, "kib": 1 << 10, "kb": 1e3,
	"m": 1 << 20, "mib": 1 << 20, "mb": 1e6,
	"g": 1 << 30, "gib": 1 << 30, "gb": 1e9,
	"t": 1 << 40, "tib": 1 << 40, "tb": 1e12,
}

// parseSize reads a number of bytes such as 64MiB, 1.5 GB or 4096.
func parseSize(text string) (int64, error) {
	trimmed := strings.TrimSpace(text)
	end := strings.LastIndexAny(trimmed, "0123456789.") + 1
	unit, ok := units[strings.ToLower(strings.TrimSpace(trimmed[end:]))]
	number, err := strconv.ParseFloat(trimmed[:end], 64)
	if err != nil || !ok || number < 0 {
		return 0, fmt.Errorf("%q is not a size; write it like 64MiB or 1.5GiB", text)
	}
	bytes := math.Round(number * float64(unit))
	if bytes >= math.MaxInt64 {
		return 0, errors.New("that is more than there is: " + text)
	}
	return int64(bytes), nil
}

// formatSize writes a number of bytes for people, with three digits or four.
func formatSize(bytes int64) string {
	const binary = 1 << 10
	value, unit := float64(bytes), ""
	for _, next := range []string{"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"} {
		if math.Abs(value) < binary {
			break
		}
		value, unit = value/binary, next
	}
	if unit == "" {
		return fmt.Sprintf("%d B", bytes)
	}
	digits := 2
	switch {
	case value >= 100:
		digits = 0
	case value >= 10:
		digits = 1
	}
	number := strconv.FormatFloat(value, 'f', digits, 64)
	if strings.Contains(number, ".") {
		number = strings.TrimRight(strings.TrimRight(number, "0"), ".")
	}
	return number + " " + unit
}

// plural writes a number of things: "1 stream", "100 streams".
func plural(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}
