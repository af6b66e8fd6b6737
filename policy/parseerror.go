package policy

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// ParseError is an error in the text of a policy, from [Parse].
type ParseError struct {
	// Text is the whole text.
	Text string
	// Offset is where the wrong word begins in Text, in bytes; the length of
	// Text if a word is missing at its end.
	Offset int
	// Problem says what is wrong.
	Problem string
	// Known has the words that could stand in the place of the wrong one, if
	// only some could.
	Known []string
	// Meant is what was probably meant, usually one of Known, or "".
	Meant string

	length int // of the wrong word, in bytes
}

// Position returns the line and the column of the wrong word, both from 1. A
// column is a character, whatever its number of bytes.
func (e *ParseError) Position() (line, column int) {
	before := e.Text[:e.Offset]
	lineStart := strings.LastIndexByte(before, '\n') + 1
	return strings.Count(before, "\n") + 1, utf8.RuneCountInString(before[lineStart:]) + 1
}

// Error says where and what the error is, and shows the line with a mark under
// the wrong word:
//
//	policy: column 15: there is no rule "trnsport"; did you mean "transport"?
//	  chain(direct, trnsport(quic), rtt)
//	                ^^^^^^^^
//	known here: direct, direction, ...
func (e *ParseError) Error() string {
	var b strings.Builder
	b.WriteString("policy: ")
	line, column := e.Position()
	if strings.Contains(e.Text, "\n") {
		fmt.Fprintf(&b, "line %d, ", line)
	}
	fmt.Fprintf(&b, "column %d: %s", column, e.Problem)
	if e.Meant != "" {
		fmt.Fprintf(&b, "; did you mean %q?", e.Meant)
	}

	start := strings.LastIndexByte(e.Text[:e.Offset], '\n') + 1
	shown, _, _ := strings.Cut(e.Text[start:], "\n")
	before := shown[:e.Offset-start]
	wrong := shown[len(before) : len(before)+e.length] // a word has no line end in it
	fmt.Fprintf(&b, "\n  %s\n  %s%s", strings.Map(visible, shown), strings.Map(blank, before),
		strings.Repeat("^", max(1, utf8.RuneCountInString(wrong))))
	if len(e.Known) > 0 {
		fmt.Fprintf(&b, "\nknown here: %s", strings.Join(e.Known, ", "))
	}
	return b.String()
}

// visible replaces what would not show, or would move the cursor, since a text is
// shown to people as it came.
func visible(r rune) rune {
	if r == '\t' || unicode.IsPrint(r) {
		return r
	}
	return utf8.RuneError
}

// blank replaces what stands above the space before a mark.
func blank(r rune) rune {
	if r == '\t' {
		return r
	}
	return ' '
}

// nearest returns the one of known that whoever wrote word probably meant, or ""
// if none is near. Another case is near, so are a typing error or two, and so is a
// word that contains the other.
func nearest(word string, known []string) string {
	word = strings.ToLower(word)
	const maxTypos = 2 // more of them make other words
	best, least := "", maxTypos+1
	for _, k := range known {
		typos := maxTypos + 1
		if len(word) <= len(k)+maxTypos { // a long text is not worth the comparison
			typos = distance(word, k)
		}
		if typos > max(1, len(k)/3) { // a short word is soon another one
			typos = maxTypos + 1
		}
		// Two letters would be part of almost anything.
		if len(word) > 2 && strings.Contains(k, word) || strings.Contains(word, k) {
			typos = min(typos, maxTypos)
		}
		if typos < least {
			best, least = k, typos
		}
	}
	return best
}

// distance returns how many letters to insert, remove, replace or swap with their
// neighbour make b of a (the optimal string alignment distance).
func distance(a, b string) int {
	var before []int // the row before last
	last := make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := range len(a) {
		row := make([]int, len(b)+1)
		row[0] = i + 1
		for j := range len(b) {
			replace := last[j]
			if a[i] != b[j] {
				replace++
			}
			row[j+1] = min(replace, last[j+1]+1, row[j]+1)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				row[j+1] = min(row[j+1], before[j-1]+1)
			}
		}
		before, last = last, row
	}
	return last[len(b)]
}
