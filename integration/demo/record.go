package main

import (
	"cmp"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
)

// side is one end of the transfer.
type side string

const (
	senderSide   side = "sender"
	receiverSide side = "receiver"
)

// momentKind is something that happens to a connection or to a stream.
type momentKind int

const (
	secondUp        momentKind = iota // the second connection is there
	asked                             // Migrate leaves
	acked                             // the answer to it has come
	sendSwitched                      // the sender writes to the second connection
	receiveSwitched                   // the receiver reads from the second connection
	finished                          // a side is done with the old stream
	firstDown                         // the first connection is gone
)

// moment is when something happened, since the start of the transfer.
type moment struct {
	kind momentKind
	side side
	at   time.Duration
}

// record is what happened. All times count from the start of the transfer.
type record struct {
	elapsed   time.Duration // from the first stream opened to the last byte read
	sent      map[path]int64
	received  map[path]int64
	bins      map[path][]int64 // received, by time, binWidth each
	moments   []moment         // in the order of time
	moves     int              // migrations that ended well
	readGap   gap              // longest between two reads at the receiver, of whatever stream
	streamGap gap              // longest between two reads of the same stream
}

// gap is a time between two reads.
type gap struct {
	length time.Duration
	at     time.Duration // when it ended
	path   path          // of the read that ended it
}

// binWidth is the grain of the record; the chart has a coarser one.
const binWidth = 10 * time.Millisecond

// recorder takes the record. It is safe for concurrent use.
type recorder struct {
	from, to path
	streams  int
	cut      bool          // -cut
	underWay chan struct{} // closed when the receiver has read something of each stream
	allMoved chan struct{} // closed when as many migrations have ended well as there are streams

	mu       sync.Mutex
	begin    time.Time // zero before the start
	stopped  bool
	rec      record
	begun    int             // streams of which something has been read
	lastRead time.Time       // zero before the first
	route    path            // of the latest read; before that, the first
	courses  map[int]*course // by part
	losing   losing
}

// losing is a cut that is under way: from the moment that it strikes, or that a stream is lost,
// until none is lost any more.
type losing struct {
	cut
	ends  [2]struct{ waiting, back int } // streams that are lost, and that went on
	first time.Time                      // when the first was lost; zero: none was
	last  time.Time                      // when the last went on
}

func (l *losing) of(who side) *struct{ waiting, back int } {
	if who == senderSide {
		return &l.ends[0]
	}
	return &l.ends[1]
}

func newRecorder(cfg config) *recorder {
	return &recorder{
		from:     cfg.from,
		to:       cfg.to,
		route:    cfg.from,
		streams:  cfg.streams,
		cut:      cfg.cut,
		underWay: make(chan struct{}),
		allMoved: make(chan struct{}),
		courses:  make(map[int]*course),
		rec: record{
			sent:     make(map[path]int64),
			received: make(map[path]int64),
			bins:     make(map[path][]int64),
		},
	}
}

// start starts the clock. What was before is not part of the record.
func (r *recorder) start() { r.startAt(time.Now()) }

// startAt is start for what is recorded later than it happened.
func (r *recorder) startAt(begin time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.begin = begin
}

// stop ends the record: the hosts are about to be closed.
func (r *recorder) stop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stopped = true
}

// report returns a copy of the record.
func (r *recorder) report() record {
	r.mu.Lock()
	defer r.mu.Unlock()
	rec := r.rec
	rec.sent = maps.Clone(rec.sent)
	rec.received = maps.Clone(rec.received)
	rec.bins = make(map[path][]int64)
	for p, bins := range r.rec.bins {
		rec.bins[p] = slices.Clone(bins)
	}
	rec.moments = slices.Clone(rec.moments)
	slices.SortStableFunc(rec.moments, func(a, b moment) int { return cmp.Compare(a.at, b.at) })
	return rec
}

// progress returns how much has arrived, for how long, and what path the last of it
// took.
func (r *recorder) progress() (arrived int64, since time.Duration, route path) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.begin.IsZero() {
		return 0, 0, r.route
	}
	return total(r.rec.received), time.Since(r.begin), r.route
}

// total returns the bytes on all paths.
func total(byPath map[path]int64) (sum int64) {
	for _, n := range byPath {
		sum += n
	}
	return sum
}

// running says whether what happens now is part of the record. mu must be held.
func (r *recorder) running() bool { return !r.begin.IsZero() && !r.stopped }

// moment records that something happened.
func (r *recorder) moment(kind momentKind, who side, when time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.running() {
		r.rec.moments = append(r.rec.moments, moment{kind, who, when.Sub(r.begin)})
	}
}

// strike begins a cut, or names one that has begun by itself.
func (r *recorder) strike(what string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	at := time.Now()
	if !r.losing.first.IsZero() {
		at = r.losing.first
	}
	r.losing.what, r.losing.at = what, at.Sub(r.begin)
}

// lost records that a stream of one side has lost its connection, resumed that it goes on over
// another, and gaveUp that it does not.
func (r *recorder) lost(who side, when time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := &r.losing
	if l.first.IsZero() {
		l.first = when
	}
	l.of(who).waiting++
}

func (r *recorder) resumed(who side, when time.Time, to path, again int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := &r.losing
	l.of(who).waiting--
	l.of(who).back++
	l.last, l.next = when, to
	l.again += again
}

func (r *recorder) gaveUp(who side) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.losing.of(who).waiting--
}

// struck says whether a stream has lost its connection, and wentOn whether each end had such
// streams, and has none any more.
func (r *recorder) struck() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return !r.losing.first.IsZero()
}

func (r *recorder) wentOn() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, end := range r.losing.ends {
		if end.back == 0 || end.waiting > 0 {
			return false
		}
	}
	return true
}

// outcome ends the cut that is under way.
func (r *recorder) outcome() cut {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.losing
	r.losing = losing{}
	if l.next != "" {
		l.after = l.last.Sub(r.begin) - l.at
	}
	return l.cut
}

// migrated counts a migration.
func (r *recorder) migrated() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.rec.moves++; r.rec.moves == r.streams {
		close(r.allMoved)
	}
}

// watch returns a notifiee that records the connections of one side to the other.
func (r *recorder) watch(who side, other peer.ID) network.Notifiee {
	return &network.NotifyBundle{
		ConnectedF: func(_ network.Network, c network.Conn) {
			if c.RemotePeer() == other && pathOf(c) == r.to {
				r.moment(secondUp, who, time.Now())
			}
		},
		DisconnectedF: func(_ network.Network, c network.Conn) {
			if c.RemotePeer() == other && pathOf(c) == r.from {
				r.moment(firstDown, who, time.Now())
			}
		},
	}
}

// course is the way of one part's bytes: which path they took, in the order in
// which they were written. That order is also the one in which they arrive, so the
// receiving end can tell too, although a stream does not say where a byte came from.
// Bytes are booked when a Write begins; of one that is still blocked when its stream
// moves, all count for the old path.
type course struct {
	recorder *recorder

	// guarded by recorder.mu
	legs     []leg // what the receiver has not read yet
	lastRead time.Time
}

// leg is a number of bytes that took one path, one behind the other.
type leg struct {
	path  path
	bytes int64
}

// course returns the course of a part, for either end.
func (r *recorder) course(part int) *course {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.courses[part]
	if c == nil {
		c = &course{recorder: r}
		r.courses[part] = c
	}
	return c
}

// departing is a stream that bytes are written to. It implements io.Writer.
type departing struct {
	network.Stream
	course *course
}

func (d departing) Write(p []byte) (int, error) {
	at := pathOf(d.Conn())
	if !d.course.recorder.cut {
		d.course.depart(at, int64(len(p)))
	}
	n, err := d.Stream.Write(p)
	d.course.recorder.sent(at, int64(n))
	return n, err
}

func (c *course) depart(at path, n int64) {
	c.recorder.mu.Lock()
	defer c.recorder.mu.Unlock()
	if last := len(c.legs) - 1; last >= 0 && c.legs[last].path == at {
		c.legs[last].bytes += n
	} else {
		c.legs = append(c.legs, leg{at, n})
	}
}

func (r *recorder) sent(at path, n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.running() {
		r.rec.sent[at] += n
	}
}

// arriving is a stream that bytes are read from. It implements io.Reader. Until its
// course is known, what is read is put off.
type arriving struct {
	network.Stream
	course *course // nil: not known
	putOff int64
}

func (a *arriving) Read(p []byte) (int, error) {
	n, err := a.Stream.Read(p)
	switch {
	case a.course == nil:
		a.putOff += int64(n)
	case n > 0:
		a.arrived(int64(n))
	}
	return n, err
}

// follow says which course the stream's bytes take.
func (a *arriving) follow(c *course) {
	a.course = c
	a.arrived(a.putOff)
}

// arrived records a Read. Where bytes are sent again, their course is where the receiver has its
// stream.
func (a *arriving) arrived(n int64) {
	if a.course.recorder.cut {
		a.course.depart(pathOf(a.Conn()), n)
	}
	a.course.arrive(n, time.Now())
}

// arrive records a Read.
func (c *course) arrive(n int64, now time.Time) {
	r := c.recorder
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.running() {
		return
	}
	if c.lastRead.IsZero() {
		if r.begun++; r.begun == r.streams {
			close(r.underWay)
		}
	}
	at := now.Sub(r.begin)
	bin := int(at / binWidth)
	for n > 0 && len(c.legs) > 0 {
		from := &c.legs[0]
		took := min(n, from.bytes)
		r.route = from.path
		r.rec.received[from.path] += took
		bins := r.rec.bins[from.path]
		for len(bins) <= bin {
			bins = append(bins, 0)
		}
		bins[bin] += took
		r.rec.bins[from.path] = bins
		n -= took
		if from.bytes -= took; from.bytes == 0 {
			c.legs = c.legs[1:]
		}
	}
	r.rec.elapsed = at
	r.rec.readGap.widen(r.lastRead, now, at, r.route)
	r.rec.streamGap.widen(c.lastRead, now, at, r.route)
	r.lastRead, c.lastRead = now, now
}

// widen makes the gap the one from last to now, if that is longer.
func (g *gap) widen(last, now time.Time, at time.Duration, p path) {
	if length := now.Sub(last); !last.IsZero() && length > g.length {
		*g = gap{length, at, p}
	}
}
