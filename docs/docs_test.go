// Package docs_test checks what the documents say of the repository: that their links lead
// somewhere, and that the tests and files that they name exist.
package docs_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"
)

const root = ".."

var (
	fence   = regexp.MustCompile("(?ms)^ *```.*?^ *```$")
	heading = regexp.MustCompile(`(?m)^#{1,6} +(.+?) *$`)
	link    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	code    = regexp.MustCompile("`[^`]+`")
	named   = regexp.MustCompile("`((?:Test|Fuzz|Benchmark|Example)[A-Za-z0-9_]*)(…?)(?: [^`]*)?`")
	path    = regexp.MustCompile("`((?:[a-z0-9_.-]+/)+[a-z0-9_.-]+\\.(?:go|js|json|md|pml|proto|sh|svg))`")
)

// files returns the files of the repository with one of these endings, from its root.
func files(t *testing.T, endings ...string) (found []string) {
	t.Helper()
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == ".git" || d.Name() == "node_modules"):
			return filepath.SkipDir
		case !d.IsDir() && slices.ContainsFunc(endings, func(e string) bool { return strings.HasSuffix(name, e) }):
			found = append(found, name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// read returns a document without its examples.
func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return fence.ReplaceAllString(string(text), "")
}

// anchors returns what the headings of a document are called in links, as GitHub does.
func anchors(text string) []string {
	var all []string
	seen := make(map[string]int)
	for _, h := range heading.FindAllStringSubmatch(text, -1) {
		title := link.ReplaceAllString(h[1], "]")
		slug := strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case r == '-' || r == '_' || unicode.IsLetter(r) || unicode.IsDigit(r):
				return unicode.ToLower(r)
			}
			return -1
		}, title)
		n := seen[slug]
		if seen[slug]++; n > 0 {
			slug = fmt.Sprintf("%s-%d", slug, n)
		}
		all = append(all, slug)
	}
	return all
}

// TestLinks: a link within the repository leads to a file, and to a heading of it.
func TestLinks(t *testing.T) {
	checked := 0
	for _, name := range files(t, ".md") {
		text := code.ReplaceAllString(read(t, name), "``")
		for _, l := range link.FindAllStringSubmatch(text, -1) {
			if strings.Contains(l[1], "://") {
				continue
			}
			checked++
			file, anchor, _ := strings.Cut(l[1], "#")
			target := name
			if file != "" {
				target = filepath.Join(filepath.Dir(name), filepath.FromSlash(file))
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s links to %s: there is no such file", name, l[1])
			} else if anchor != "" && !slices.Contains(anchors(read(t, target)), anchor) {
				t.Errorf("%s links to %s: there is no such heading; there are %q", name, l[1], anchors(read(t, target)))
			}
		}
	}
	if checked < 50 {
		t.Errorf("only %d links were found", checked)
	}
}

// TestNames: the tests and files that a document names exist. A name that ends with an
// ellipsis is the beginning of one.
func TestNames(t *testing.T) {
	var funcs []string
	for _, name := range files(t, "_test.go") {
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok {
				funcs = append(funcs, fn.Name.Name)
			}
		}
	}
	checked := 0
	for _, name := range files(t, ".md") {
		text := read(t, name)
		for _, n := range named.FindAllStringSubmatch(text, -1) {
			checked++
			if !slices.ContainsFunc(funcs, func(f string) bool { return f == n[1] || n[2] != "" && strings.HasPrefix(f, n[1]) }) {
				t.Errorf("%s names %s%s: there is no such test", name, n[1], n[2])
			}
		}
		for _, p := range path.FindAllStringSubmatch(text, -1) {
			checked++
			_, err := os.Stat(filepath.Join(root, filepath.FromSlash(p[1])))
			_, beside := os.Stat(filepath.Join(filepath.Dir(name), filepath.FromSlash(p[1])))
			if err != nil && beside != nil {
				t.Errorf("%s names %s: there is no such file", name, p[1])
			}
		}
	}
	if checked < 50 {
		t.Errorf("only %d names were found", checked)
	}
}

// TestLineCounts: the length of the peer in JavaScript measures how much an implementer has
// to write, so it is as its README says.
func TestLineCounts(t *testing.T) {
	const dir = root + "/integration/interop/js/"
	readme := read(t, dir+"README.md")
	rows := regexp.MustCompile("(?m)^\\| `([a-z]+\\.js)` \\| (\\d+) \\|").FindAllStringSubmatch(readme, -1)
	sum := 0
	for _, row := range rows {
		text, err := os.ReadFile(dir + row[1])
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Count(string(text), "\n")
		if fmt.Sprint(lines) != row[2] {
			t.Errorf("%s has %d lines, not %s", row[1], lines, row[2])
		}
		sum += lines
	}
	if want := fmt.Sprintf("has %d,%03d lines", sum/1000, sum%1000); len(rows) < 5 || !strings.Contains(readme, want) {
		t.Errorf("README.md does not say that the peer %s", want)
	}
}
