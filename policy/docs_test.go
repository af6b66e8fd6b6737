package policy

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	ma "github.com/multiformats/go-multiaddr"
)

const document = "../docs/policies.md"

// TestDocumentedPolicies runs the examples of docs/policies.md: each line of a
// "policy" block parses; each "error" block is the error of the text that it
// shows; and each table with a rank is the ranking by the policy above it.
func TestDocumentedPolicies(t *testing.T) {
	policies, rankings, parseErrors := 0, 0, 0
	var policy Policy
	for _, part := range readDocument(t) {
		switch {
		case part.block == "policy":
			for i, text := range part.lines {
				p, err := Parse(text)
				if err != nil {
					t.Fatalf("line %d: %v", part.line+i, err)
				}
				policy, policies = p, policies+1
			}
		case part.block == "error":
			text := strings.TrimPrefix(part.lines[1], "  ")
			_, err := Parse(text)
			if got, want := fmt.Sprint(err), strings.Join(part.lines, "\n"); got != want {
				t.Errorf("line %d: the error is\n%s\nnot\n%s", part.line, got, want)
			}
			var parseError *ParseError
			if !errors.As(err, &parseError) {
				t.Errorf("line %d: error of type %T", part.line, err)
			}
			parseErrors++
		case part.table != nil && part.table.header[0] == "rank":
			t.Run(fmt.Sprintf("line %d", part.line), func(t *testing.T) { runRanking(t, policy, part) })
			rankings++
		}
	}
	if policies == 0 || rankings == 0 || parseErrors == 0 {
		t.Errorf("%d policies, %d rankings, %d errors: the document is not read as it should be", policies, rankings, parseErrors)
	}
}

// TestDocumentedRules checks that the table of rules has each rule, and that its
// texts are rules, and likewise for matches; that the default policy is what the
// text says.
func TestDocumentedRules(t *testing.T) {
	var rules []string
	matches := 0
	for _, part := range readDocument(t) {
		if part.table == nil || !slices.Equal(part.table.header[:2], []string{"text", "in Go"}) {
			continue
		}
		for _, row := range part.table.rows {
			// Of several texts, all are the same rule.
			for _, text := range strings.Split(row["text"], "`, `") {
				text = strings.Trim(text, "`")
				isMatch := slices.Contains(part.table.header, "fits")
				if isMatch {
					text, matches = "never("+text+")", matches+1
				}
				policy, err := Parse("chain(" + text + ")")
				if err != nil {
					t.Fatalf("line %d: %v", part.line, err)
				}
				if isMatch {
					continue
				}
				rule := policy.(chain)[0]
				if !slices.Contains(rules, rule.Name()) {
					rules = append(rules, rule.Name())
				}
				if strings.Contains(text, "(") && rule.String() != text {
					t.Errorf("line %d: the rule of %q is %q", part.line, text, rule)
				}
			}
		}
	}
	if want := slices.Sorted(maps.Keys(vocabulary)); !slices.Equal(slices.Sorted(slices.Values(rules)), want) {
		t.Errorf("the rules of the document are\n%q, of the package\n%q", rules, want)
	}
	if matches != 5 {
		t.Errorf("the document has %d matches, the package 5", matches)
	}

	text, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), "\n"+Default().String()+"\n") {
		t.Errorf("the document does not have the default, %v", Default())
	}
}

// documentPart is a fenced block or a table.
type documentPart struct {
	line  int // of its first line of text, from 1
	block string
	lines []string
	table *documentTable
}

type documentTable struct {
	header []string
	rows   []map[string]string // by header
}

func readDocument(t *testing.T) []documentPart {
	t.Helper()
	text, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(text), "\n")
	var parts []documentPart
	for i := 0; i < len(lines); i++ {
		switch {
		case strings.HasPrefix(lines[i], "```"):
			end := i + 1 + slices.Index(lines[i+1:], "```")
			if end == i {
				t.Fatalf("line %d: block without an end", i+1)
			}
			parts = append(parts, documentPart{line: i + 2, block: lines[i][3:], lines: lines[i+1 : end]})
			i = end
		case strings.HasPrefix(lines[i], "|"):
			part := documentPart{line: i + 3, table: &documentTable{header: cells(lines[i])}}
			for i += 2; i < len(lines) && strings.HasPrefix(lines[i], "|"); i++ {
				row := make(map[string]string)
				for j, cell := range cells(lines[i]) {
					if j >= len(part.table.header) {
						t.Fatalf("line %d: more cells than the header has", i+1)
					}
					row[part.table.header[j]] = cell
				}
				part.table.rows = append(part.table.rows, row)
			}
			parts = append(parts, part)
		}
	}
	return parts
}

func cells(line string) []string {
	fields := strings.Split(strings.Trim(line, "|"), "|")
	for i := range fields {
		fields[i] = strings.TrimSpace(fields[i])
	}
	return fields
}

// runRanking ranks the rows of a table, and checks that they stand in the order
// of the ranking, with its decisions.
func runRanking(t *testing.T, policy Policy, part documentPart) {
	var candidates []Candidate
	for i, row := range part.table.rows {
		if rank := strconv.Itoa(i + 1); row["rank"] != rank {
			t.Errorf("rank %s stands where %s belongs", row["rank"], rank)
		}
		c, err := documentCandidate(row)
		if err != nil {
			t.Fatalf("line %d: %v", part.line+i, err)
		}
		candidates = append(candidates, c)
	}
	slices.Reverse(candidates) // the order of the input must not help
	ranking := policy.Rank(candidates)
	for i, c := range ranking.Order {
		row := part.table.rows[i]
		decision := "wins"
		if i > 0 {
			decision = "`" + ranking.Decisions[i-1].String() + "`"
		}
		if row["connection"] != c.ID || row["decision"] != decision {
			t.Errorf("line %d: rank %d is %s, %s; want %s, %s, by\n%v",
				part.line+i, i+1, row["connection"], row["decision"], c.ID, decision, policy)
		}
	}
}

// documentCandidate returns the candidate in a row of a table. A column that is
// missing or empty is not known.
func documentCandidate(row map[string]string) (Candidate, error) {
	c := Candidate{
		ID:        row["connection"],
		Interface: row["interface"],
		Limited:   row["limited"] == "yes",
		Incumbent: row["incumbent"] == "yes",
	}
	var errs []error
	for column, cell := range row {
		var err error
		switch {
		case cell == "":
		case column == "remote":
			var addr ma.Multiaddr
			addr, err = ma.NewMultiaddr(strings.Trim(cell, "`"))
			c.SetAddr(addr)
		case column == "direction":
			c.Direction = map[string]network.Direction{"outbound": network.DirOutbound, "inbound": network.DirInbound}[cell]
		case column == "rtt":
			c.RTT, err = time.ParseDuration(cell)
		case column == "age":
			c.Age, err = time.ParseDuration(cell)
		case column == "streams":
			c.Streams, err = strconv.Atoi(cell)
		case column == "pinned":
			c.Pinned, err = strconv.Atoi(cell)
		case slices.Contains([]string{"rank", "connection", "interface", "limited", "incumbent", "decision"}, column):
		default:
			err = fmt.Errorf("unknown column %q", column)
		}
		errs = append(errs, err)
	}
	return c, errors.Join(errs...)
}
