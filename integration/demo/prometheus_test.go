package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The dashboard and the alert rules, against a Prometheus that scrapes the demo. Both are
// installed by Debian's package prometheus.

const dashboards = "../../docs/dashboards"

// tool returns the path of a program of Prometheus'.
func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("there is no %s to try the dashboard with: apt-get install prometheus", name)
	}
	return path
}

// scraper is a Prometheus that runs.
type scraper struct {
	t   *testing.T
	url string
}

// startPrometheus starts one that scrapes target.
func startPrometheus(t *testing.T, target string) *scraper {
	t.Helper()
	path := tool(t, "prometheus")
	rules, err := filepath.Abs(filepath.Join(dashboards, "alerts.yml"))
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	if err := l.Close(); err != nil { // Prometheus does not say which port it has chosen
		t.Fatal(err)
	}
	dir := t.TempDir()
	config := filepath.Join(dir, "prometheus.yml")
	if err := os.WriteFile(config, fmt.Appendf(nil, `
global: {scrape_interval: 500ms, scrape_timeout: 500ms, evaluation_interval: 1s}
rule_files: [%q]
scrape_configs: [{job_name: demo, static_configs: [{targets: [%q]}]}]
`, rules, target), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "--config.file="+config, "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+addr)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	said, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ready, ended := make(chan struct{}), make(chan struct{})
	var all strings.Builder // once ended
	go func() {
		defer close(ended)
		lines := bufio.NewScanner(said)
		for is := false; lines.Scan(); {
			fmt.Fprintln(&all, lines.Text())
			if !is && strings.Contains(lines.Text(), "Server is ready") {
				is = true
				close(ready)
			}
		}
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		<-ended
	})
	select {
	case <-ready:
	case <-ended:
		t.Fatalf("Prometheus does not start:\n%s", &all)
	}
	return &scraper{t, "http://" + addr}
}

// get calls a method of its API.
func (p *scraper) get(path string, query url.Values, data any) error {
	got, err := http.Get(p.url + path + "?" + query.Encode())
	if err != nil {
		return err
	}
	defer got.Body.Close()
	body, err := io.ReadAll(got.Body)
	if err != nil {
		return err
	}
	answer := struct {
		Status string          `json:"status"`
		Error  string          `json:"error"`
		Data   json.RawMessage `json:"data"`
	}{}
	if err := json.Unmarshal(body, &answer); err != nil {
		return fmt.Errorf("%w: %s", err, body)
	}
	if answer.Status != "success" {
		return fmt.Errorf("%s: %s", answer.Status, answer.Error)
	}
	return json.Unmarshal(answer.Data, data)
}

// series is how many series an expression has at this moment.
func (p *scraper) series(expr string) (int, error) {
	var data struct {
		Result []json.RawMessage `json:"result"`
	}
	err := p.get("/api/v1/query", url.Values{"query": {expr}}, &data)
	return len(data.Result), err
}

// await waits until an expression has series. Each question waits for the answer to the one
// before, and for a scrape.
func (p *scraper) await(ctx context.Context, expr string) error {
	for {
		if n, err := p.series(expr); err != nil || n > 0 {
			return err
		}
		timer := time.NewTimer(100 * time.Millisecond)
		select {
		case <-timer.C:
		case <-ctx.Done():
			return fmt.Errorf("no data for %s: %w", expr, ctx.Err())
		}
	}
}

// expressions are those of the dashboard's panels and variables, with the variables filled in.
func expressions(t *testing.T) (exprs []string, names []string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dashboards, "portage.json"))
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct {
			Type, Title string
			Targets     []struct{ Expr string }
		}
		Templating struct {
			List []struct{ Name, Type, Definition string }
		}
	}
	if err := json.Unmarshal(text, &dashboard); err != nil {
		t.Fatal(err)
	}
	fill := strings.NewReplacer("$__rate_interval", "2m", "$job", ".+", "$instance", ".+")
	for _, p := range dashboard.Panels {
		if p.Type != "row" && len(p.Targets) == 0 {
			t.Errorf("panel %q shows nothing", p.Title)
		}
		for _, target := range p.Targets {
			exprs, names = append(exprs, fill.Replace(target.Expr)), append(names, p.Title)
		}
	}
	values := regexp.MustCompile(`^label_values\((.*), \w+\)$`)
	for _, v := range dashboard.Templating.List {
		if v.Type == "query" {
			exprs, names = append(exprs, fill.Replace(values.FindStringSubmatch(v.Definition)[1])), append(names, "variable "+v.Name)
		}
	}
	return exprs, names
}

// ruleExpressions are those of the alert rules, as Prometheus has read them.
func (p *scraper) ruleExpressions() map[string]string {
	p.t.Helper()
	var data struct {
		Groups []struct {
			Rules []struct{ Name, Query, Health, LastError string }
		}
	}
	if err := p.get("/api/v1/rules", nil, &data); err != nil {
		p.t.Fatal(err)
	}
	exprs := make(map[string]string)
	for _, g := range data.Groups {
		for _, r := range g.Rules {
			exprs[r.Name] = r.Query
			if r.LastError != "" {
				p.t.Errorf("rule %s: %s", r.Name, r.LastError)
			}
		}
	}
	return exprs
}

// compared is a comparison of an alert rule, which is not to be true of the demo.
var compared = regexp.MustCompile(`(>|==) `)

// TestDashboardHasData: each expression of the dashboard and the alert rules is understood,
// and has data while the demo runs.
func TestDashboardHasData(t *testing.T) {
	tool(t, "prometheus")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := startPrometheus(t, l.Addr().String())
	exprs, names := expressions(t)
	// A rate needs a scrape before what it is of.
	_, log, done := served(t, l, func(ctx context.Context) error {
		return p.await(ctx, "count_over_time(libp2p_portage_peers_with_duplicates[1m]) >= 2")
	})
	<-done
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if err := p.await(ctx, `sum(increase(libp2p_portage_prunes_total[2m])) + sum(increase(libp2p_portage_connections_saved_total{by="peer"}[2m])) >= 1`); err != nil {
		t.Fatalf("%v\n%s", err, log)
	}
	for i, expr := range exprs {
		if n, err := p.series(expr); err != nil || n == 0 {
			t.Errorf("panel %q: %d series, error %v:\n%s", names[i], n, err, expr)
		}
	}
	rules := p.ruleExpressions()
	if len(rules) == 0 {
		t.Error("there is no alert rule")
	}
	for name, expr := range rules {
		expr = compared.ReplaceAllString(expr, ">= bool ")
		if n, err := p.series(expr); err != nil || n == 0 {
			t.Errorf("rule %s: %d series, error %v:\n%s", name, n, err, expr)
		}
	}
}

// TestAlertsComeWhenTheyShould runs the tests beside the rules.
func TestAlertsComeWhenTheyShould(t *testing.T) {
	cmd := exec.Command(tool(t, "promtool"), "test", "rules", "alerts_test.yml")
	cmd.Dir = dashboards
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestDashboardShowsEachMetric: nothing is measured that nobody sees.
func TestDashboardShowsEachMetric(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, _, done := served(t, l, nil)
	<-done
	exprs, _ := expressions(t)
	shown := strings.Join(exprs, "\n")
	metrics := page(t, "http://"+l.Addr().String()+"/metrics")
	found := regexp.MustCompile(`(?m)^# TYPE (libp2p_portage_\w+) `).FindAllStringSubmatch(metrics, -1)
	if len(found) == 0 {
		t.Fatalf("there is no metric:\n%s", metrics)
	}
	for _, m := range found {
		if !strings.Contains(shown, m[1]) {
			t.Errorf("the dashboard does not show %s", m[1])
		}
	}
}
