package main

import (
	"maps"
	"testing"
	"testing/synctest"
	"time"
)

func TestEachByteCountsForThePathItWasWrittenTo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRecorder(config{from: relay, to: quic})
		r.start()
		c := r.course(0)
		c.depart(relay, 100)
		c.depart(relay, 20)
		c.depart(quic, 50)
		time.Sleep(20 * time.Millisecond)
		c.arrive(110, time.Now())
		time.Sleep(10 * time.Millisecond)
		c.arrive(30, time.Now()) // 10 of the relay's, and 20
		c.arrive(30, time.Now())

		got := r.report()
		if want := (map[path]int64{relay: 120, quic: 50}); !maps.Equal(got.received, want) {
			t.Errorf("received by path: %v; want %v", got.received, want)
		}
		if bins := got.bins[relay]; len(bins) != 4 || bins[2] != 110 || bins[3] != 10 {
			t.Errorf("relayed bytes by time: %v; want 110 at 20 ms and 10 at 30 ms", bins)
		}
		if want := (gap{10 * time.Millisecond, 30 * time.Millisecond, quic}); got.readGap != want {
			t.Errorf("longest gap: %v; want %v", got.readGap, want)
		}
	})
}

func TestGapsOfOneStreamAndOfAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRecorder(config{from: relay, to: quic})
		r.start()
		for part := range 2 {
			r.course(part).depart(relay, 1000)
		}
		for range 4 { // in turns, 5 ms apart
			for part := range 2 {
				r.course(part).arrive(1, time.Now())
				time.Sleep(5 * time.Millisecond)
			}
		}
		got := r.report()
		if got.readGap.length != 5*time.Millisecond || got.streamGap.length != 10*time.Millisecond {
			t.Errorf("gaps are %v over all and %v in one stream; want 5 ms and 10 ms", got.readGap.length, got.streamGap.length)
		}
	})
}

func TestNothingIsRecordedBeforeTheStartOrAfterTheEnd(t *testing.T) {
	r := newRecorder(config{from: relay, to: quic})
	r.moment(firstDown, senderSide, time.Now())
	r.start()
	r.moment(secondUp, senderSide, time.Now())
	r.stop()
	r.moment(firstDown, senderSide, time.Now())
	if got := r.report().moments; len(got) != 1 || got[0].kind != secondUp {
		t.Errorf("moments are %v; want the one between", got)
	}
}
