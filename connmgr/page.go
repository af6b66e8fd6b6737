package connmgr

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"html/template"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"
)

//go:embed page.html
var pageText string

var page = template.Must(template.New("page").Funcs(template.FuncMap{
	"until":   func(now, t time.Time) string { return inWords(t.Sub(now)) },
	"since":   func(now, t time.Time) string { return inWords(now.Sub(t)) },
	"stamp":   func(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") },
	"streams": streams,
	"clock":   func(t time.Time) string { return t.UTC().Format("15:04:05") },
}).Parse(pageText))

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
			h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'")
			err = page.Execute(&body, shownPage{s})
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		_, _ = body.WriteTo(w)
	})
}

var (
	shows = []string{"all", "duplicates", "relayed"}
	sorts = []string{"connections", "streams", "oldest", "peer"}
)

// queryOf is what is asked for. A value that is not one of the choices counts as the first.
func queryOf(form url.Values) Query {
	q := Query{Show: form.Get("show"), Sort: form.Get("sort"), Text: form.Get("q")}
	if !slices.Contains(shows, q.Show) {
		q.Show = shows[0]
	}
	if !slices.Contains(sorts, q.Sort) {
		q.Sort = sorts[0]
	}
	q.Page, _ = strconv.Atoi(form.Get("page"))
	return q
}

// shownPage is what the template sees.
type shownPage struct{ Status }

func (p shownPage) Shows() []string { return shows }
func (p shownPage) Sorts() []string { return sorts }

// Link is the address of another page of the same query, or of its JSON.
func (p shownPage) Link(number int, format string) template.URL {
	v := url.Values{"show": {p.Query.Show}, "sort": {p.Query.Sort}, "page": {strconv.Itoa(number)}}
	if p.Query.Text != "" {
		v.Set("q", p.Query.Text)
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
