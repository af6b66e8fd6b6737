package connmgr

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"html/template"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

var (
	//go:embed page.html
	pageText string
	//go:embed page.css
	pageStyle string
)

var page = template.Must(template.New("page").Funcs(template.FuncMap{
	"since":   func(now, t time.Time) string { return inWords(now.Sub(t)) },
	"stamp":   func(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") },
	"clock":   func(t time.Time) string { return t.UTC().Format("15:04:05") },
	"streams": streams,
	"times":   func(n int) string { return fmt.Sprintf("%d×", n) },
	"address": shortAddress,
}).Parse(pageText))

// pagePolicy is the page's Content-Security-Policy. It runs nothing and loads nothing, whatever
// a peer were to smuggle into it; the style is the one that it was made with.
var pagePolicy = fmt.Sprintf("default-src 'none'; style-src 'sha256-%s'; img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
	base64.StdEncoding.EncodeToString(hashOf(pageStyle)))

func hashOf(text string) []byte {
	sum := sha256.Sum256([]byte(text))
	return sum[:]
}

// inAddress is a peer ID in a multiaddr.
var inAddress = regexp.MustCompile("/p2p/([^/]{13,})")

// shortAddress is a multiaddr for people: of peer IDs it has the two ends.
func shortAddress(addr string) string {
	return inAddress.ReplaceAllStringFunc(addr, func(part string) string {
		id := strings.TrimPrefix(part, "/p2p/")
		return "/p2p/" + id[:4] + ".." + id[len(id)-6:]
	})
}

// Handler returns a status page of m: what is done about each peer and why, as
// [Manager.Explain] says it, what has been done, and the totals. With ?format=json it is the
// same as JSON, a [Status]. It needs nothing from outside, and can be mounted anywhere:
//
//	http.Handle("/debug/portage", connmgr.Handler(m))
//
// As with net/http/pprof, whoever can reach the page learns which peers the host has: serve
// it where only those can that may know. It changes nothing.
//
// The history begins with the first call of Handler. A page has 50 peers; all others cost
// little, so that 10,000 are no trouble. Safe for concurrent use.
func Handler(m *Manager) http.Handler {
	m.tells.history.on.Store(true)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			http.Error(w, "the page can only be read", http.StatusMethodNotAllowed)
			return
		}
		form := r.URL.Query()
		s := m.status(queryOf(form))
		var body bytes.Buffer
		var err error
		h := w.Header()
		h.Set("Cache-Control", "no-store")
		h.Set("X-Content-Type-Options", "nosniff")
		if form.Get("format") == "json" {
			h.Set("Content-Type", "application/json")
			enc := json.NewEncoder(&body)
			enc.SetIndent("", "  ")
			err = enc.Encode(s)
		} else {
			h.Set("Content-Type", "text/html; charset=utf-8")
			h.Set("Content-Security-Policy", pagePolicy)
			h.Set("Referrer-Policy", "no-referrer")
			err = page.Execute(&body, shownPage{s})
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		_, _ = body.WriteTo(w)
	})
}

// choice is what can be chosen of something; the first one is the default.
type choice struct {
	Value, Text string
	Chosen      bool
}

var (
	shows   = []choice{{Value: "all", Text: "all peers"}, {Value: "duplicates", Text: "peers with duplicates"}, {Value: "relayed", Text: "reached through relays only"}, {Value: "limited", Text: "through limited relays only"}}
	sorts   = []choice{{Value: "connections"}, {Value: "streams"}, {Value: "oldest"}, {Value: "peer"}}
	reloads = []choice{{Value: "0", Text: "never"}, {Value: "2", Text: "every 2 s"}, {Value: "10", Text: "every 10 s"}, {Value: "60", Text: "every minute"}}
)

// chosen returns the value that is asked for, or the first one where it is none of these.
func chosen(of []choice, value string) string {
	if !slices.ContainsFunc(of, func(c choice) bool { return c.Value == value }) {
		return of[0].Value
	}
	return value
}

func choose(of []choice, value string) []choice {
	of = slices.Clone(of)
	for i := range of {
		of[i].Chosen = of[i].Value == value
	}
	return of
}

// queryOf is what is asked for.
func queryOf(form url.Values) Query {
	q := Query{Show: chosen(shows, form.Get("show")), Sort: chosen(sorts, form.Get("sort")), Text: form.Get("q")}
	q.Page, _ = strconv.Atoi(form.Get("page"))
	q.Reload, _ = strconv.Atoi(chosen(reloads, form.Get("reload")))
	return q
}

// shownPage is what the template sees.
type shownPage struct{ Status }

func (p shownPage) Style() template.CSS { return template.CSS(pageStyle) }
func (p shownPage) Shows() []choice     { return choose(shows, p.Query.Show) }
func (p shownPage) Reloads() []choice   { return choose(reloads, strconv.Itoa(p.Query.Reload)) }

// column is one of the table of peers. Of those with a Sort the link sorts by it.
type column struct {
	Text, Sort, Order string
	Link              template.URL
}

// Columns are those of the table of peers.
func (p shownPage) Columns() []column {
	columns := []column{
		{Text: "Peer", Sort: "peer", Order: "ascending"}, {Text: "Connection", Sort: "connections", Order: "descending"},
		{Text: "What becomes of it"}, {Text: "Streams", Sort: "streams", Order: "descending"}, {Text: "Path", Sort: "oldest", Order: "descending"},
	}
	for i := range columns {
		if c := &columns[i]; c.Sort != "" {
			q := p.Query
			q.Sort = c.Sort
			c.Link = q.link(1, "")
			if c.Sort != p.Query.Sort {
				c.Order = "none"
			}
		}
	}
	return columns
}

// Rows are the connections of a peer; where there are none, one empty row.
func (p PeerShown) Rows() []*ConnShown {
	rows := []*ConnShown{nil}
	if len(p.Conns) > 0 {
		rows = rows[:0]
	}
	for i := range p.Conns {
		rows = append(rows, &p.Conns[i])
	}
	return rows
}

// ShowsRuledOut says whether the state does not say already why it was not ranked.
func (c ConnShown) ShowsRuledOut() bool {
	return c.RuledOut != "" && !strings.Contains(c.State, c.RuledOut)
}

// Glyph is a sign's mark, for those who do not tell its colours apart.
func (s Sign) Glyph() string {
	switch s.Level {
	case LevelGood:
		return "✓"
	case LevelBusy:
		return "↻"
	case LevelAttention:
		return "!"
	case LevelProblem:
		return "✕"
	default:
		return "–"
	}
}

// Link is the address of another page of the same query, or of its JSON.
func (p shownPage) Link(number int, format string) template.URL { return p.Query.link(number, format) }

func (q Query) link(number int, format string) template.URL {
	v := url.Values{"show": {q.Show}, "sort": {q.Sort}, "page": {strconv.Itoa(number)}}
	if q.Text != "" {
		v.Set("q", q.Text)
	}
	if q.Reload != 0 {
		v.Set("reload", strconv.Itoa(q.Reload))
	}
	if format != "" {
		v.Set("format", format)
	}
	return template.URL("?" + v.Encode())
}

func (p shownPage) Previous() int { return p.Query.Page - 1 }

// Next is 0 on the last page.
func (p shownPage) Next() int {
	if p.Query.Page >= p.Pages {
		return 0
	}
	return p.Query.Page + 1
}
