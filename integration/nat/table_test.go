//go:build linux

package nat

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"
)

// table collects what the runs of a test have measured, a row for each setup.
type table struct {
	columns []string
	mu      sync.Mutex
	rows    []*row
}

type row struct {
	name  string
	cells map[string][]time.Duration
	whole int
	runs  int
	// missed counts the runs that were not what they should have been.
	missed int
}

func newTable(columns ...string) *table { return &table{columns: columns} }

// add puts one run into the table. What has not been is not among the cells.
func (t *table) add(name string, whole bool, cells map[string]time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.row(name)
	r.runs++
	if whole {
		r.whole++
	}
	for column, d := range cells {
		r.cells[column] = append(r.cells[column], d)
	}
}

// missed puts a run into the table that has nothing to say: mostly since go-libp2p has found
// no direct connection.
func (t *table) missed(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.row(name).missed++
}

// row must be called with mu held.
func (t *table) row(name string) *row {
	i := slices.IndexFunc(t.rows, func(r *row) bool { return r.name == name })
	if i < 0 {
		t.rows = append(t.rows, &row{name: name, cells: make(map[string][]time.Duration)})
		i = len(t.rows) - 1
	}
	return t.rows[i]
}

// print logs the table: of each column the median and the worst, in milliseconds. If
// too many runs had nothing to say, nothing was tested, and that fails.
func (t *table) print(tb testing.TB) {
	runs, missed := 0, 0
	var text strings.Builder
	w := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "\nmedian / worst, in ms\t%s\twhole\n", strings.Join(t.columns, "\t"))
	slices.SortFunc(t.rows, func(a, b *row) int { return strings.Compare(a.name, b.name) })
	for _, r := range t.rows {
		fmt.Fprint(w, r.name)
		for _, column := range t.columns {
			fmt.Fprint(w, "\t", spread(r.cells[column]))
		}
		fmt.Fprintf(w, "\t%d/%d\n", r.whole, r.runs)
		runs, missed = runs+r.runs, missed+r.missed
	}
	w.Flush()
	tb.Log(text.String())
	if missed > 0 {
		tb.Logf("%d runs had nothing to say", missed)
	}
	if missed > runs/4 {
		tb.Errorf("%d of %d runs had nothing to say; their logs say why", missed, runs+missed)
	}
}

func spread(all []time.Duration) string {
	if len(all) == 0 {
		return "-"
	}
	slices.Sort(all)
	return fmt.Sprintf("%d / %d", all[len(all)/2].Milliseconds(), all[len(all)-1].Milliseconds())
}

// atOnce has room for the cases that are a matter of milliseconds.
var atOnce = make(chan struct{}, 3)

// fewAtOnce has t run beside few others. What waits for paths to be found dead, which takes
// half a minute, needs no such thing.
func fewAtOnce(t *testing.T) {
	atOnce <- struct{}{}
	t.Cleanup(func() { <-atOnce })
}

// repeat runs a case as often as -runs says, beside other cases.
func repeat(t *testing.T, name string, run func(*testing.T)) {
	for i := range *runs {
		runName := name
		if *runs > 1 {
			runName = fmt.Sprintf("%s, run %d", name, i+1)
		}
		t.Run(runName, func(t *testing.T) {
			t.Parallel()
			run(t)
		})
	}
}

// needAll skips a case that is not among the most common ones.
func needAll(t *testing.T) {
	t.Helper()
	if !*all {
		t.Skip("runs with -all")
	}
}

// needLong skips a case that takes minutes.
func needLong(t *testing.T) {
	t.Helper()
	needAll(t)
	if !*long {
		t.Skip("runs with -long")
	}
}
