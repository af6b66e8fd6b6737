package connmgr

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
)

// What an operator can set and see is in docs/operations.md.

func operations(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../docs/operations.md")
	require.NoError(t, err)
	return string(text)
}

// sources are the files of a package, but for its tests.
func sources(t *testing.T, dir string) []*ast.File {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(dir, "*.go"))
	require.NoError(t, err)
	var files []*ast.File
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		require.NoError(t, err)
		files = append(files, file)
	}
	require.NotEmpty(t, files)
	return files
}

func TestEachMetricIsDocumented(t *testing.T) {
	_, table, found := strings.Cut(operations(t), "## Metrics")
	require.True(t, found)
	named := regexp.MustCompile(`fqName: "` + metricNamespace + `_(\w+)"`)
	for _, c := range collectors {
		descs := make(chan *prometheus.Desc, 1)
		c.Describe(descs)
		name := named.FindStringSubmatch((<-descs).String())[1]
		require.Contains(t, table, "| `"+name+"` |")
	}
	for name, values := range map[string][]string{
		"rounds_total": roundOutcomes, "migrations_total": migrationOutcomes, "drain_answers_total": drainAnswers,
		"upgrade_attempts_total": upgradeOutcomes, "connections_saved_total": {ByThisSide, ByPeer},
		"resumptions_total": resumeOutcomes,
	} {
		line := regexp.MustCompile("(?m)^\\| `" + name + "` .*$").FindString(table)
		require.Contains(t, line, strings.Join(values, ", "), "the values of its label")
	}
}

func TestEachOptionIsDocumented(t *testing.T) {
	_, text, found := strings.Cut(operations(t), "## What can be set")
	require.True(t, found)
	text, _, _ = strings.Cut(text, "\n## ")
	n := 0
	for _, dir := range []string{".", "../migrate"} {
		for _, file := range sources(t, dir) {
			for _, decl := range file.Decls {
				f, is := decl.(*ast.FuncDecl)
				if !is || f.Recv != nil || !f.Name.IsExported() || f.Type.Results == nil || len(f.Type.Results.List) != 1 {
					continue
				}
				if result, is := f.Type.Results.List[0].Type.(*ast.Ident); is && strings.HasSuffix(result.Name, "Option") {
					require.Contains(t, text, "`"+f.Name.Name+"`", "an option of %s", file.Name)
					n++
				}
			}
		}
	}
	require.Greater(t, n, 20)
}

func TestEachEventIsDocumented(t *testing.T) {
	text := operations(t)
	n := 0
	for _, file := range sources(t, ".") {
		ast.Inspect(file, func(node ast.Node) bool {
			if typ, is := node.(*ast.TypeSpec); is && strings.HasPrefix(typ.Name.Name, "Evt") {
				require.Contains(t, text, "| `connmgr."+typ.Name.Name+"` |")
				n++
			}
			return true
		})
	}
	require.Equal(t, len(kindsOfEvents), n)
}

// Each line is documented by what it begins with, up to the first thing that varies.
func TestEachLineIsDocumented(t *testing.T) {
	text := operations(t)
	levels := map[string]bool{"Debug": true, "Info": true, "Warn": true, "Error": true}
	fixed := func(line string) {
		line = strings.TrimPrefix(line, "peer %s: ")
		for _, part := range regexp.MustCompile(`%[a-z]`).Split(line, -1) {
			part = strings.Trim(part, " :,;(")
			if part, _, _ = strings.Cut(part, ":"); part != "" {
				part, _, _ = strings.Cut(part, ";")
				require.Contains(t, text, strings.TrimSpace(part), "of the line %q", line)
			}
		}
	}
	n := 0
	for _, dir := range []string{".", "../migrate"} {
		for _, file := range sources(t, dir) {
			ast.Inspect(file, func(node ast.Node) bool {
				switch call := node.(type) {
				case *ast.CallExpr:
					f, is := call.Fun.(*ast.SelectorExpr)
					if !is || len(call.Args) == 0 {
						return true
					}
					first, is := call.Args[0].(*ast.BinaryExpr)
					arg := call.Args[0]
					if is {
						arg = first.X
					}
					if lit, is := arg.(*ast.BasicLit); is && lit.Kind == token.STRING {
						line := strings.Trim(lit.Value, "\"`")
						if levels[f.Sel.Name] || f.Sel.Name == "Sprintf" && strings.HasPrefix(line, "peer %s: ") {
							fixed(line)
							n++
						}
					}
				}
				return true
			})
		}
	}
	require.Greater(t, n, 15)
}

func TestEachReasonAndParameterIsDocumented(t *testing.T) {
	text := operations(t)
	_, table, _ := strings.Cut(text, "## A connection will not go")
	for _, r := range knownReasons {
		require.Contains(t, table, "`"+string(r)+"`")
	}
	for _, of := range [][]choice{shows, sorts, reloads} {
		for _, c := range of {
			require.Contains(t, text, "`"+c.Value+"`")
		}
	}
	for _, level := range []Level{LevelGood, LevelBusy, LevelIdle, LevelAttention, LevelProblem} {
		require.Contains(t, text, "| `"+string(level)+"` "+Sign{Level: level}.Glyph()+" |")
	}
}

// Each alert that the rules have is explained.
func TestEachAlertIsDocumented(t *testing.T) {
	rules, err := os.ReadFile("../docs/dashboards/alerts.yml")
	require.NoError(t, err)
	alerts := regexp.MustCompile(`- alert: (\w+)`).FindAllStringSubmatch(string(rules), -1)
	require.NotEmpty(t, alerts)
	for _, a := range alerts {
		require.Contains(t, operations(t), "| `"+a[1]+"` |")
	}
}
