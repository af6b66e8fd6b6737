package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
)

// summary is what came of it all.
type summary struct {
	cfg      config
	begun    bool         // the transfer did begin
	before   []connection // when both were there
	after    []connection // in the end
	record   record
	cuts     []cut  // of -cut
	arrived  int64  // bytes of the file, verified or not
	verified int    // streams that arrived whole
	sha256   string // of the file, if it was one stream
	chart    string // file name
	err      error
}

// fail adds an error, which may be nil.
func (s *summary) fail(err error) *summary {
	s.err = errors.Join(s.err, err)
	return s
}

func (s *summary) whole() bool { return s.verified == s.cfg.streams }

// first returns the earliest moment of a kind, and last the latest.
func (r record) first(kind momentKind) (moment, bool) {
	for _, m := range r.moments {
		if m.kind == kind {
			return m, true
		}
	}
	return moment{}, false
}

func (r record) last(kind momentKind) (found moment, ok bool) {
	for _, m := range r.moments {
		if m.kind == kind {
			found, ok = m, true
		}
	}
	return found, ok
}

// migration returns the time from the first Migrate until the last old stream was
// done with, at both ends.
func (r record) migration() (time.Duration, bool) {
	begin, began := r.first(asked)
	end, ended := r.last(finished)
	return end.at - begin.at, began && ended
}

// consolidation returns the time from the second connection to the end of the first.
func (r record) consolidation() (time.Duration, bool) {
	begin, began := r.first(secondUp)
	end, ended := r.first(firstDown)
	return end.at - begin.at, began && ended
}

// writeJSON writes the summary as one line of JSON, for programs.
func (s *summary) writeJSON(w io.Writer) error {
	type end struct {
		Side      side   `json:"side"`
		Path      path   `json:"path"`
		Direction string `json:"direction"`
	}
	ends := func(conns []connection) []end {
		all := []end{}
		for _, c := range conns {
			all = append(all, end{c.side, c.path, c.direction()})
		}
		return all
	}
	type loss struct {
		What  string  `json:"what"`
		At    float64 `json:"at_ms"`
		Next  path    `json:"next"` // empty: none
		After float64 `json:"after_ms"`
		Again int64   `json:"bytes_sent_again"`
	}
	var cuts []loss
	for _, c := range s.cuts {
		cuts = append(cuts, loss{c.what, ms(c.at), c.next, ms(c.after), c.again})
	}
	migration, _ := s.record.migration()
	consolidation, _ := s.record.consolidation()
	out := struct {
		From          path           `json:"from"`
		To            path           `json:"to"`
		Portage       bool           `json:"portage"`
		Size          int64          `json:"size"`
		Bytes         int64          `json:"bytes"` // of size, that arrived
		Streams       int            `json:"streams"`
		Verified      int            `json:"streams_verified"`
		SHA256OK      bool           `json:"sha256_ok"` // of every stream
		SHA256        string         `json:"sha256,omitempty"`
		Elapsed       float64        `json:"elapsed_ms"`
		Sent          map[path]int64 `json:"bytes_sent"` // headers and hashes included
		Received      map[path]int64 `json:"bytes_received"`
		Migrations    int            `json:"migrations"`
		Migration     float64        `json:"migration_ms"`
		Consolidation float64        `json:"direct_to_prune_ms"`
		ReadGap       float64        `json:"longest_read_gap_ms"`
		StreamGap     float64        `json:"longest_stream_read_gap_ms"`
		Cuts          []loss         `json:"cuts,omitempty"`
		Before        []end          `json:"before"`
		After         []end          `json:"after"`
		ConnsAfter    int            `json:"connections_after"` // of the side that has more
		RelayedAfter  bool           `json:"relayed_after"`
		Error         string         `json:"error"`
	}{
		From: s.cfg.from, To: s.cfg.to, Portage: !s.cfg.without,
		Size: s.cfg.size, Bytes: s.arrived, Streams: s.cfg.streams, Verified: s.verified,
		SHA256OK: s.whole(), SHA256: s.sha256,
		Elapsed: ms(s.record.elapsed), Sent: s.record.sent, Received: s.record.received,
		Migrations: s.record.moves, Migration: ms(migration), Consolidation: ms(consolidation),
		ReadGap: ms(s.record.readGap.length), StreamGap: ms(s.record.streamGap.length),
		Cuts: cuts, Before: ends(s.before), After: ends(s.after),
	}
	perSide := make(map[side]int)
	for _, c := range s.after {
		perSide[c.side]++
		out.ConnsAfter = max(out.ConnsAfter, perSide[c.side])
		out.RelayedAfter = out.RelayedAfter || c.path == relay
	}
	if s.err != nil {
		out.Error = s.err.Error()
	}
	return json.NewEncoder(w).Encode(out)
}

// ms is d in milliseconds, to the microsecond.
func ms(d time.Duration) float64 {
	return float64(d.Round(time.Microsecond)) / float64(time.Millisecond)
}

// writeText writes the summary for people.
func (s *summary) writeText(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintln(&b)
	fmt.Fprintln(&b, s.headline())
	if s.begun {
		s.writeTables(&b)
	}
	if s.err != nil {
		fmt.Fprintf(&b, "\nError: %s\n", strings.ReplaceAll(s.err.Error(), "; ", "\n  "))
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (s *summary) headline() string {
	what := fmt.Sprintf("%s in %s", formatSize(s.cfg.size), plural(s.cfg.streams, "stream"))
	with := "with Portage"
	if s.cfg.without {
		with = "on plain go-libp2p"
	}
	switch {
	case !s.begun:
		return fmt.Sprintf("The transfer of %s did not begin.", what)
	case !s.whole():
		return fmt.Sprintf("FAILED %s: of %s, %s arrived in %.1f s.%s",
			with, what, formatSize(s.arrived), s.record.elapsed.Seconds(), s.reason())
	case s.sha256 != "":
		return fmt.Sprintf("%s arrived %s in %.1f s. SHA-256 verified:\n%s", what, with, s.record.elapsed.Seconds(), s.sha256)
	default:
		return fmt.Sprintf("%s arrived %s in %.1f s. SHA-256 of each verified.", what, with, s.record.elapsed.Seconds())
	}
}

// reason says why plain go-libp2p loses the transfer, if it was that.
func (s *summary) reason() string {
	if s.cfg.without && s.cfg.cut {
		return "\nIts stream ended with its first connection, although there were other ways to the receiver."
	}
	_, up := s.record.first(secondUp)
	_, down := s.record.first(firstDown)
	if !s.cfg.without || s.cfg.from != relay || !up || !down {
		return ""
	}
	return fmt.Sprintf("\nThe relay cut the connection at its limit of %s, although a %s connection stood beside it.",
		formatSize(s.cfg.relay.data), s.cfg.to.title())
}

func (s *summary) writeTables(w io.Writer) {
	table := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintf(table, "\nConnections\tsender's view\treceiver's view\n")
	if len(s.before) > 0 {
		fmt.Fprintf(table, "two up\t%s\t%s\n", list(s.before, senderSide), list(s.before, receiverSide))
	}
	fmt.Fprintf(table, "in the end\t%s\t%s\n", list(s.after, senderSide), list(s.after, receiverSide))

	if s.cfg.cut {
		s.writeCuts(table)
		return
	}
	fmt.Fprintf(table, "\nBytes\tsent\treceived\n")
	for _, p := range []path{s.cfg.from, s.cfg.to} {
		fmt.Fprintf(table, "%s\t%s\t%s\n", p.title(), formatSize(s.record.sent[p]), formatSize(s.record.received[p]))
	}

	fmt.Fprintln(table)
	if !s.cfg.without {
		moved := fmt.Sprintf("%d of %d", s.record.moves, s.cfg.streams)
		if d, ok := s.record.migration(); ok {
			moved += fmt.Sprintf(", from the first Migrate to the end of the last old stream in %s", short(d))
		}
		fmt.Fprintf(table, "Streams moved\t%s\n", moved)
	}
	if d, ok := s.record.consolidation(); ok {
		fmt.Fprintf(table, "%s up to %s closed\t%s\n", s.cfg.to.title(), s.cfg.from.title(), short(d))
	}
	if g := s.record.readGap; g.length > 0 {
		fmt.Fprintf(table, "Longest gap between two reads\t%s\n", g)
	}
	if g := s.record.streamGap; s.cfg.streams > 1 && g.length > 0 {
		fmt.Fprintf(table, "The same within one stream\t%s\n", g)
	}
	if s.chart != "" {
		fmt.Fprintf(table, "Chart\t%s\n", s.chart)
	}
	table.Flush()
}

// writeCuts is what there is to tell of -cut.
func (s *summary) writeCuts(table *tabwriter.Writer) {
	fmt.Fprintf(table, "\nCut\tat\twent on over\tafter\tsent again\n")
	for _, c := range s.cuts {
		if c.next == "" {
			fmt.Fprintf(table, "%s\t%.3f s\tnone\n", c.what, c.at.Seconds())
			continue
		}
		fmt.Fprintf(table, "%s\t%.3f s\t%s\t%s\t%s\n", c.what, c.at.Seconds(), c.next.inWords(), short(c.after), formatSize(c.again))
	}
	fmt.Fprintf(table, "\nBytes\treceived\n")
	for _, p := range s.cfg.paths() {
		fmt.Fprintf(table, "%s\t%s\n", p.title(), formatSize(s.record.received[p]))
	}
	if s.chart != "" {
		fmt.Fprintf(table, "\nChart\t%s\n", s.chart)
	}
	table.Flush()
}

func (g gap) String() string {
	return fmt.Sprintf("%s, up to %.3f s, %s", short(g.length), g.at.Seconds(), g.path.title())
}

// list writes one side's connections in a line.
func list(conns []connection, who side) string {
	var all []string
	for _, c := range conns {
		if c.side == who {
			all = append(all, fmt.Sprintf("%s (%s)", c.path.title(), c.direction()))
		}
	}
	if len(all) == 0 {
		return "none"
	}
	return strings.Join(all, ", ")
}

func (c connection) direction() string {
	if c.outbound {
		return "outbound"
	}
	return "inbound"
}

// short rounds to what can be told apart at a glance.
func short(d time.Duration) string {
	switch {
	case d >= 10*time.Second:
		return d.Round(100 * time.Millisecond).String()
	case d >= time.Millisecond:
		return fmt.Sprintf("%.4g ms", ms(d))
	default:
		return d.Round(time.Microsecond).String()
	}
}
