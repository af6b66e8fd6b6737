package main

import (
	"encoding/xml"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// picture is what happened in one transfer, or in two that stand one above the other, with
// the same axes.
type picture struct {
	title    string
	subtitle string
	charts   []chart
}

// chart is one transfer: what arrived over time, by connection, and the moments that
// mattered.
type chart struct {
	name    string
	elapsed time.Duration // until the last byte
	longest time.Duration // elapsed of the chart that takes longest, of those in one picture
	series  []series      // stacked, the first at the bottom
	marks   []mark        // in the order of time
}

// series is what arrived over one connection.
type series struct {
	name  string
	color string
	bins  []int64 // bytes, by time, binWidth each
}

// mark is a moment with a name.
type mark struct {
	at    time.Duration
	label string
}

// The picture, in pixels. Of a chart, the name comes first, then a row for each label, then
// the plot.
const (
	pictureWidth = 900
	plotLeft     = 66
	plotRight    = pictureWidth - 24
	plotHeight   = 300 // of one chart
	sharedHeight = 170 // of each of two
	chartsTop    = 62
	nameHeight   = 30
	rowHeight    = 17
	ticksHeight  = 32  // below a plot
	footHeight   = 44  // below the ticks of the last one
	labelIndent  = 5   // from the line to its label
	labelPadding = 10  // least room between labels of a row
	charWidth    = 6.2 // of a label, on the safe side

	// Moments that are closer than this part of the picture are one to the eye.
	together = 0.01
)

// colors are those of the series, from the first to the last.
var colors = []string{"#e59a3c", "#3b78d8", "#4a9d6e"}

// paths are those that the transfer takes, as the picture stacks them.
func (cfg config) paths() []path {
	if cfg.cut {
		return []path{relay, quic, tcp}
	}
	return []path{cfg.from, cfg.to}
}

// pictureOf returns what is to be drawn of a transfer, and of the same one without Portage,
// which may be nil.
func pictureOf(s, without *summary) picture {
	shaped := "Bytes that the receiver reads."
	if s.cfg.rate > 0 {
		shaped += fmt.Sprintf(" The sender is paced to %s/s.", formatSize(s.cfg.rate))
	}
	switch {
	case s.cfg.nat:
		shaped += fmt.Sprintf(" Both hosts are behind NATs; the relay's limit is %s.", formatSize(s.cfg.relay.data))
	case s.cfg.from == relay || s.cfg.cut:
		shaped += fmt.Sprintf(" The path to the relay is shaped to %s/s, its limit is %s.",
			formatSize(s.cfg.relay.rate), formatSize(s.cfg.relay.data))
	}
	what := fmt.Sprintf("%s first, then %s beside it", s.cfg.from.title(), s.cfg.to.title())
	if s.cfg.cut {
		what = fmt.Sprintf("the connection is lost %d times", len(s.cuts))
	}
	p := picture{
		title: fmt.Sprintf("%s in %s: %s",
			formatSize(s.cfg.size), plural(s.cfg.streams, "stream"), what),
		subtitle: shaped,
		charts:   []chart{chartOf(s)},
	}
	if without != nil {
		p.charts = append(p.charts, chartOf(without))
	}
	longest := time.Duration(0)
	for _, c := range p.charts {
		longest = max(longest, c.elapsed)
	}
	for i := range p.charts {
		p.charts[i].longest = longest
	}
	return p
}

func chartOf(s *summary) chart {
	with := "With Portage"
	if s.cfg.without {
		with = "Without"
	}
	outcome := fmt.Sprintf("all has arrived after %.1f s", s.record.elapsed.Seconds())
	if !s.whole() {
		outcome = fmt.Sprintf("ends after %s", formatSize(s.arrived))
	}
	c := chart{name: with + ": " + outcome, elapsed: s.record.elapsed, marks: marksOf(s)}
	for i, p := range s.cfg.paths() {
		c.series = append(c.series, series{p.title(), colors[i], s.record.bins[p]})
	}
	return c
}

// marksOf names the moments of a transfer. Of many streams it takes the first
// Migrate, and the last of what follows it. Moments that nobody could tell apart in the
// picture are one mark.
func marksOf(s *summary) []mark {
	var marks []mark
	for _, c := range s.cuts {
		m := mark{c.at, c.what}
		switch next := "on over " + c.next.inWords(); {
		case c.next == "":
		case float64(c.after) < together*float64(s.record.elapsed):
			m.label += ", " + next
		default:
			marks = append(marks, m)
			m = mark{c.at + c.after, next}
		}
		marks = append(marks, m)
	}
	moments := s.record.marked()
	for len(moments) > 0 {
		n := 1
		for n < len(moments) && float64(moments[n].at-moments[0].at) < together*float64(s.record.elapsed) {
			n++
		}
		marks = append(marks, mark{moments[0].at, s.labelOf(moments[:n])})
		moments = moments[n:]
	}
	return marks
}

// labelOf names moments that are together. The steps of a migration are one move then.
func (s *summary) labelOf(moments []moment) string {
	steps := 0
	for _, m := range moments {
		if m.kind.isStep() {
			steps++
		}
	}
	var labels []string
	for _, m := range moments {
		switch {
		case !m.kind.isStep() || steps == 1:
			labels = append(labels, s.label(m))
		case steps > 1:
			labels = append(labels, fmt.Sprintf("%s moved to %s", plural(s.cfg.streams, "stream"), s.cfg.to.title()))
			steps = 0 // said for all of them
		}
	}
	return strings.Join(labels, ", ")
}

// isStep says whether a moment belongs to a migration.
func (k momentKind) isStep() bool {
	return k == asked || k == acked || k == sendSwitched || k == receiveSwitched
}

func (s *summary) label(m moment) string {
	first, last := "", ""
	if s.cfg.streams > 1 {
		first = fmt.Sprintf("first of %d: ", s.cfg.streams)
		last = fmt.Sprintf("last of %d: ", s.cfg.streams)
	}
	from, to := s.cfg.from.title(), s.cfg.to.title()
	switch m.kind {
	case secondUp:
		return to + " connection up"
	case asked:
		return first + "Migrate leaves the " + string(m.side)
	case acked:
		return last + "ack reaches the " + string(m.side)
	case sendSwitched:
		return last + "sender writes to " + to
	case receiveSwitched:
		return last + "receiver reads from " + to
	default: // firstDown
		switch {
		case s.whole():
			return from + " connection closed"
		case s.cfg.without && s.cfg.from == relay:
			return "the relay cuts at its limit"
		default:
			return from + " connection lost"
		}
	}
}

// marked returns one moment of each kind that the chart shows, in the order of
// time.
func (r record) marked() []moment {
	var shown []moment
	for _, m := range r.moments {
		pick := r.first
		if m.kind == acked || m.kind == sendSwitched || m.kind == receiveSwitched {
			pick = r.last
		}
		if chosen, _ := pick(m.kind); chosen == m && m.kind != finished {
			shown = append(shown, m)
		}
	}
	return shown
}

// draw returns the picture as an SVG document.
func (p picture) draw() []byte {
	span, peak := time.Duration(0), 0.0
	for _, c := range p.charts {
		span = max(span, c.span())
		for _, s := range c.steps() {
			peak = max(peak, s.rate[len(s.rate)-1])
		}
	}
	height := float64(plotHeight)
	if len(p.charts) > 1 {
		height = sharedHeight
	}
	tick := niceStep(peak / (height / 60))
	if tick == 0 {
		tick = 1
	}
	top := max(tick*math.Ceil(peak*1.05/tick), tick)
	x := func(t time.Duration) float64 {
		return plotLeft + float64(t)/float64(span)*(plotRight-plotLeft)
	}

	d := &drawing{}
	at := float64(chartsTop)
	for _, c := range p.charts {
		at = d.chart(c, at, height, axes{span, x, top, tick})
	}
	d.text((plotLeft+plotRight)/2, at+8, `text-anchor="middle"`, "seconds since the transfer began")
	at += footHeight
	d.legend(p.charts[0].series, at-12)
	return d.document(p, at)
}

// axes are what the charts of a picture share.
type axes struct {
	span time.Duration
	x    func(time.Duration) float64
	top  float64 // MiB/s
	tick float64 // MiB/s
}

// chart draws c below at, and returns where it ends.
func (d *drawing) chart(c chart, at, height float64, ax axes) float64 {
	labels := layOut(c.marks, ax.x)
	rows := 0
	for _, l := range labels {
		rows = max(rows, l.row+1)
	}
	plotTop := at + nameHeight + float64(rows)*rowHeight
	plotBottom := plotTop + height
	y := func(rate float64) float64 { return plotBottom - rate/ax.top*height }

	d.text(plotLeft, at+16, `class="name"`, c.name)
	d.grid(ax, plotTop, plotBottom, y)
	steps := c.steps()
	for i, s := range c.series {
		d.area(steps, i, s.color, ax.x, y)
	}
	d.line(plotLeft, plotTop, plotLeft, plotBottom, `class="axis"`)
	d.line(plotLeft, plotBottom, plotRight, plotBottom, `class="axis"`)
	for _, l := range labels {
		base := plotTop - 8 - float64(l.row)*rowHeight
		d.line(l.x, base-9, l.x, plotBottom, `class="mark"`)
		d.label(l.x+labelIndent, base, l.mark)
	}
	return plotBottom + ticksHeight
}

// span is the time that the chart covers: all of the transfer and all marks, with
// room for the label of each, which stands to the right of its line.
func (c chart) span() time.Duration {
	const width = plotRight - plotLeft
	span := float64(max(c.elapsed, time.Millisecond)) * 1.02
	for _, m := range c.marks {
		room := max(width-labelIndent-m.width(), width/4)
		span = max(span, float64(m.at)*width/room)
	}
	return time.Duration(span)
}

// when is the time of a mark, which follows its name.
func (m mark) when() string { return fmt.Sprintf("%.3f s", m.at.Seconds()) }

// width is the room that the mark's name and time take.
func (m mark) width() float64 {
	return charWidth * float64(utf8.RuneCountInString(m.label)+1+utf8.RuneCountInString(m.when()))
}

// label is where the name of a mark stands: to the right of the line at x, in a
// row counted from the plot upwards.
type label struct {
	mark
	x   float64
	row int
}

func (l label) end() float64 { return l.x + labelIndent + l.width() }

// layOut finds a row for each label, so that none overlaps another, nor the line
// of another. Lines go down from their labels, and labels to the right, so each label
// has to stand above all those whose lines it spans.
func layOut(marks []mark, x func(time.Duration) float64) []label {
	labels := make([]label, len(marks))
	for i := len(marks) - 1; i >= 0; i-- {
		l := label{mark: marks[i], x: x(marks[i].at)}
		for _, later := range labels[i+1:] {
			if later.x < l.end()+labelPadding {
				l.row = max(l.row, later.row+1)
			}
		}
		labels[i] = l
	}
	return labels
}

// step is one bin of the chart.
type step struct {
	begin, end time.Duration
	rate       []float64 // MiB/s, up to and including each series
}

// steps brings the record's bins to a width at which the chart has about fifty.
func (c chart) steps() []step {
	width := binWidth
	for _, n := range []int{2, 5, 10, 20, 50, 100, 200, 500, 1000, 6000, 60000} {
		if int(max(c.elapsed, c.longest)/width) <= 60 {
			break
		}
		width = time.Duration(n) * binWidth
	}
	count := max(int((c.elapsed+width/2)/width), 1) // half a bin at the end joins the one before it
	steps := make([]step, count)
	for i := range steps {
		steps[i] = step{
			begin: time.Duration(i) * width,
			end:   time.Duration(i+1) * width,
			rate:  make([]float64, len(c.series)),
		}
	}
	steps[count-1].end = max(c.elapsed, steps[count-1].begin+width/2)
	for j, s := range c.series {
		for k, bytes := range s.bins {
			i := min(int(time.Duration(k)*binWidth/width), count-1)
			seconds := (steps[i].end - steps[i].begin).Seconds()
			for above := j; above < len(c.series); above++ {
				steps[i].rate[above] += float64(bytes) / (1 << 20) / seconds
			}
		}
	}
	return steps
}

// niceStep returns a step of 1, 2 or 5 times a power of ten, at least as great as
// least, for the ticks of an axis.
func niceStep(least float64) float64 {
	if least <= 0 {
		return 0
	}
	power := math.Pow(10, math.Floor(math.Log10(least)))
	for _, n := range []float64{1, 2, 5} {
		if n*power >= least*(1-1e-9) {
			return n * power
		}
	}
	return 10 * power
}

// drawing is an SVG document in the making.
type drawing struct{ b strings.Builder }

func (d *drawing) printf(format string, args ...any) { fmt.Fprintf(&d.b, format+"\n", args...) }

// document returns the whole, of that height, around what has been drawn.
func (d *drawing) document(p picture, height float64) []byte {
	whole := &drawing{}
	whole.printf(`<svg xmlns="http://www.w3.org/2000/svg" width="%[1]d" height="%.0[2]f" viewBox="0 0 %[1]d %.0[2]f" role="img">`,
		pictureWidth, height)
	whole.printf(`<title>%s</title>`, escape(p.title))
	whole.printf(`<style>
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; font-size: 12px; fill: #444 }
.title { font-size: 17px; font-weight: 600; fill: #222 }
.name { font-size: 14px; font-weight: 600; fill: #222 }
.note, .tick { fill: #707070 }
.label, .label .note { font-size: 11px }
.grid { stroke: #e6e6e6 }
.axis { stroke: #999 }
.mark { stroke: #333; stroke-opacity: .55 }
</style>`)
	whole.printf(`<rect width="%d" height="%.0f" fill="#fff"/>`, pictureWidth, height)
	whole.text(plotLeft, 28, `class="title"`, p.title)
	whole.text(plotLeft, 48, `class="note"`, p.subtitle)
	whole.b.WriteString(d.b.String())
	whole.printf(`</svg>`)
	return []byte(whole.b.String())
}

func (d *drawing) text(x, y float64, attributes, text string) {
	d.printf(`<text x="%.1f" y="%.1f" %s>%s</text>`, x, y, attributes, escape(text))
}

func (d *drawing) label(x, y float64, m mark) {
	d.printf(`<text x="%.1f" y="%.1f" class="label">%s <tspan class="note">%s</tspan></text>`,
		x, y, escape(m.label), m.when())
}

func (d *drawing) line(x1, y1, x2, y2 float64, attributes string) {
	d.printf(`<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" %s/>`, x1, y1, x2, y2, attributes)
}

// grid draws the ticks of both axes, their lines and what they measure.
func (d *drawing) grid(ax axes, plotTop, plotBottom float64, y func(float64) float64) {
	for i := 0; float64(i)*ax.tick <= ax.top*(1+1e-9); i++ {
		v := float64(i) * ax.tick
		d.line(plotLeft, y(v), plotRight, y(v), `class="grid"`)
		d.text(plotLeft-8, y(v)+4, `class="tick" text-anchor="end"`, tickText(v))
	}
	seconds := niceStep(ax.span.Seconds() / 8)
	for i := 0; float64(i)*seconds <= ax.span.Seconds(); i++ {
		v := float64(i) * seconds
		at := ax.x(time.Duration(v * float64(time.Second)))
		d.line(at, plotBottom, at, plotBottom+5, `class="axis"`)
		d.text(at, plotBottom+19, `class="tick" text-anchor="middle"`, tickText(v))
	}
	middle := (plotTop + plotBottom) / 2
	d.text(20, middle, fmt.Sprintf(`text-anchor="middle" transform="rotate(-90 20 %.1f)"`, middle), "MiB/s")
}

func tickText(v float64) string { return strconv.FormatFloat(v, 'g', 4, 64) }

// area draws series i, between the sum of those below it and its own.
func (d *drawing) area(steps []step, i int, color string, x func(time.Duration) float64, y func(float64) float64) {
	below := func(s step) float64 {
		if i == 0 {
			return 0
		}
		return s.rate[i-1]
	}
	var path strings.Builder
	fmt.Fprintf(&path, "M%.1f %.1f", x(0), y(below(steps[0])))
	for _, s := range steps {
		fmt.Fprintf(&path, "V%.1fH%.1f", y(s.rate[i]), x(s.end))
	}
	for k := len(steps) - 1; k >= 0; k-- {
		fmt.Fprintf(&path, "V%.1fH%.1f", y(below(steps[k])), x(steps[k].begin))
	}
	d.printf(`<path d="%sZ" fill="%s" fill-opacity=".85"/>`, path.String(), color)
}

// legend names the series, on the right.
func (d *drawing) legend(all []series, line float64) {
	right := float64(plotRight)
	for i := len(all) - 1; i >= 0; i-- {
		right -= 7*float64(utf8.RuneCountInString(all[i].name)) + 18
		d.text(right+17, line, "", all[i].name)
		d.printf(`<rect x="%.1f" y="%.1f" width="12" height="12" rx="2" fill="%s"/>`, right, line-10, all[i].color)
		right -= 14
	}
}

func escape(text string) string {
	var b strings.Builder
	xml.EscapeText(&b, []byte(text))
	return b.String()
}
