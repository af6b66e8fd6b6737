package connmgr

import (
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
)

// dispatcher is the one goroutine that has rounds run: it takes in what the watcher has seen,
// and starts what is due.
type dispatcher struct {
	watch   *watcher
	sched   *scheduler
	rounds  *rounds
	upgrade *upgrader
	young   *young
}

func (ds *dispatcher) loop() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var events []event
	for {
		select {
		case <-ds.sched.tasks.ctx.Done():
			return
		case <-ds.sched.wake:
		case <-timer.C:
		}
		events = ds.watch.take(events)
		for _, e := range events {
			ds.admit(e)
		}
		wait, waiting := ds.sched.startDue(ds.rounds.runInPlace)
		if until, sweeps := ds.upgrade.startSweep(); sweeps && (!waiting || until < wait) {
			wait, waiting = until, true
		}
		if waiting {
			timer.Reset(wait)
		} else {
			timer.Stop()
		}
	}
}

// admit settles when a round follows from an event.
func (ds *dispatcher) admit(e event) {
	conns := openConns(ds.watch.network(), e.peer)
	ds.upgrade.admit(e.peer, conns)
	if ds.sched.known(e.peer) == nil {
		if len(conns) < 2 {
			return
		}
		e.opened = true // whatever it was: what there is now is new to us
	}
	d := ds.sched.lock(e.peer)
	now := time.Now()
	if e.opened {
		ds.young.resume(e.peer)
		d.came = now
		if d.firstOf.IsZero() {
			d.firstOf = now
		}
	}
	ds.sched.schedule(d, now) // before it can be forgotten
	d.mu.Unlock()
}

// identified is told that it is known, or known better, what a peer speaks.
func (ds *dispatcher) identified(p peer.ID) {
	manages := managed(ds.watch.network(), p) == yes
	d := ds.sched.lockKnown(p)
	if d == nil {
		return
	}
	d.manages = d.manages || manages
	for _, cs := range d.conns {
		cs.lacks = false // it may serve it by now
	}
	ds.sched.schedule(d, time.Now())
	d.mu.Unlock()
}
