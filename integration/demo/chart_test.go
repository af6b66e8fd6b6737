package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"math/rand/v2"
	"strconv"
	"strings"
	"testing"
	"time"
)

// sample is a transfer as it usually goes: slow, then fast, with the moments of the
// move close together.
func sample(streams int) *summary {
	at := func(ms float64) time.Duration { return time.Duration(ms * float64(time.Millisecond)) }
	s := &summary{
		cfg:      config{size: 64 << 20, streams: streams, from: relay, to: quic, rate: 16 << 20, relay: limitsFor(64 << 20)},
		begun:    true,
		arrived:  64 << 20,
		verified: streams,
		before: []connection{
			{senderSide, relay, true}, {senderSide, quic, true},
			{receiverSide, relay, false}, {receiverSide, quic, false},
		},
		after: []connection{{senderSide, quic, true}, {receiverSide, quic, false}},
		record: record{
			elapsed:  at(5800),
			sent:     map[path]int64{relay: 4 << 20, quic: 60 << 20},
			received: map[path]int64{relay: 4 << 20, quic: 60 << 20},
			bins:     map[path][]int64{relay: make([]int64, 190), quic: make([]int64, 580)},
			moves:    streams,
			moments: []moment{
				{secondUp, senderSide, at(1500)}, {secondUp, receiverSide, at(1500.4)},
				{asked, receiverSide, at(1800)}, {acked, receiverSide, at(1800.6)},
				{sendSwitched, senderSide, at(1800.9)}, {receiveSwitched, receiverSide, at(1890)},
				{finished, senderSide, at(1890.2)}, {finished, receiverSide, at(1890.5)},
				{firstDown, receiverSide, at(1902)}, {firstDown, senderSide, at(1903)},
			},
			readGap: gap{at(12), at(1100), relay},
		},
	}
	for i := range s.record.bins[relay] {
		s.record.bins[relay][i] = 4 << 20 / 190
	}
	for i := 190; i < 580; i++ {
		s.record.bins[quic][i] = 60 << 20 / 390
	}
	return s
}

func TestChartIsWellFormedAndComplete(t *testing.T) {
	lost := sample(1)
	lost.cfg.without = true
	lost.verified, lost.arrived = 0, 8<<20
	lost.fail(errors.New("cut"))
	spread := sample(1)
	for i := range spread.record.moments {
		spread.record.moments[i].at = time.Duration(i) * 300 * time.Millisecond
	}
	cutUp, cutOff := sample(1), sample(1)
	cutUp.cfg.cut, cutOff.cfg.cut, cutOff.cfg.without = true, true, true
	cutUp.record.moments, cutOff.record.moments = nil, nil
	cutUp.cuts = []cut{
		{what: "the TCP connection is reset", at: time.Second, next: relay, after: 20 * time.Millisecond},
		{what: "nothing passes over QUIC any more", at: 2 * time.Second, next: tcp, after: 3 * time.Second},
	}
	cutOff.cuts = []cut{{what: "the TCP connection is reset", at: time.Second}}
	cutOff.verified, cutOff.arrived = 0, 8<<20
	empty := &summary{cfg: sample(1).cfg, begun: true}
	for name, test := range map[string]struct {
		s       *summary
		without *summary
		want    []string
	}{
		"one stream":       {sample(1), nil, []string{"With Portage: all has arrived after 5.8 s", "QUIC connection up", "1 stream moved to QUIC", "receiver reads from QUIC, relayed connection closed", "MiB/s", "seconds"}},
		"a long move":      {spread, nil, []string{"Migrate leaves the receiver", "ack reaches the receiver", "sender writes to QUIC", "receiver reads from QUIC"}},
		"many streams":     {sample(100), nil, []string{"100 streams moved to QUIC", "last of 100: receiver"}},
		"lost":             {lost, nil, []string{"Without: ends after 8 MiB", "the relay cuts at its limit"}},
		"with and without": {sample(1), lost, []string{"With Portage: all has arrived", "Without: ends after 8 MiB"}},
		"cut": {cutUp, cutOff, []string{"the connection is lost 2 times", "the TCP connection is reset, on over the relay",
			"nothing passes over QUIC any more <", "on over TCP <", "the TCP connection is reset <", "Without: ends after 8 MiB"}},
		"nothing":        {empty, nil, nil},
		"beside nothing": {sample(1), empty, nil},
	} {
		t.Run(name, func(t *testing.T) {
			doc := pictureOf(test.s, test.without).draw()
			for _, want := range test.want {
				if !bytes.Contains(doc, []byte(want)) {
					t.Errorf("the chart does not say %q", want)
				}
			}
			checkDrawing(t, doc)
		})
	}
}

// checkDrawing checks that doc is well-formed and that all of it lies inside the
// picture.
func checkDrawing(t *testing.T, doc []byte) {
	t.Helper()
	limits := map[string]float64{"x": pictureWidth, "x1": pictureWidth, "x2": pictureWidth}
	for decoder := xml.NewDecoder(bytes.NewReader(doc)); ; {
		token, err := decoder.Token()
		if err == io.EOF {
			return
		} else if err != nil {
			t.Fatalf("not well-formed: %v", err)
		}
		element, ok := token.(xml.StartElement)
		if !ok {
			continue
		}
		if element.Name.Local == "svg" {
			height, err := strconv.ParseFloat(attribute(element, "height"), 64)
			if err != nil {
				t.Fatal(err)
			}
			limits["y"], limits["y1"], limits["y2"] = height, height, height
		}
		for _, a := range element.Attr {
			limit, ok := limits[a.Name.Local]
			if !ok {
				continue
			}
			v, err := strconv.ParseFloat(a.Value, 64)
			if err != nil || v != v || v < 0 || v > limit {
				t.Errorf("<%s %s=%q> is outside of the picture", element.Name.Local, a.Name.Local, a.Value)
			}
		}
		if path := attribute(element, "d"); strings.Contains(path, "NaN") || strings.Contains(path, "Inf") {
			t.Errorf("a path with no place: %s", path)
		}
	}
}

func attribute(element xml.StartElement, name string) string {
	for _, a := range element.Attr {
		if a.Name.Local == name {
			return a.Value
		}
	}
	return ""
}

func TestLabelsOverlapNeitherLabelsNorLines(t *testing.T) {
	check := func(t *testing.T, marks []mark) {
		t.Helper()
		c := chart{elapsed: 5 * time.Second, marks: marks}
		span := c.span()
		labels := layOut(marks, func(at time.Duration) float64 {
			return plotLeft + float64(at)/float64(span)*(plotRight-plotLeft)
		})
		for i, l := range labels {
			if l.end() > plotRight+1 {
				t.Errorf("%q ends at %.0f, beyond the plot", l.label, l.end())
			}
			for _, other := range labels[i+1:] {
				spans := other.x < l.end() && l.x <= other.x
				if spans && other.row == l.row {
					t.Errorf("%q and %q overlap", l.label, other.label)
				}
				if spans && other.row > l.row {
					t.Errorf("the line of %q runs through %q", other.label, l.label)
				}
			}
		}
	}
	check(t, marksOf(sample(1)))
	check(t, marksOf(sample(100)))
	random := rand.New(rand.NewPCG(1, 2))
	for range 1000 {
		marks := make([]mark, random.IntN(8))
		at := time.Duration(0)
		for i := range marks {
			at += time.Duration(random.ExpFloat64() * float64(300*time.Millisecond))
			marks[i] = mark{at, strings.Repeat("x", 3+random.IntN(40))}
		}
		check(t, marks)
	}
}

func TestStepsKeepEveryByte(t *testing.T) {
	for _, elapsed := range []time.Duration{5 * time.Millisecond, 777 * time.Millisecond, 5 * time.Second, time.Minute + 1, time.Hour} {
		bins := make([]int64, elapsed/binWidth+1)
		for i := range bins {
			bins[i] = 1 << 20
		}
		steps := chart{elapsed: elapsed, series: []series{{bins: bins}}}.steps()
		if len(steps) > 120 {
			t.Errorf("%v: %d steps are more than a chart can show", elapsed, len(steps))
		}
		sum := 0.0
		for _, s := range steps {
			sum += s.rate[0] * (s.end - s.begin).Seconds()
		}
		if want := float64(len(bins)); sum < want*0.999 || sum > want*1.001 {
			t.Errorf("%v: the steps hold %.1f MiB; want %.1f", elapsed, sum, want)
		}
	}
}

func TestNiceStep(t *testing.T) {
	for least, want := range map[float64]float64{0: 0, 0.03: 0.05, 1: 1, 1.1: 2, 2.1: 5, 7: 10, 42: 50} {
		if got := niceStep(least); got < want*0.999 || got > want*1.001 {
			t.Errorf("niceStep(%v) = %v; want %v", least, got, want)
		}
	}
}
