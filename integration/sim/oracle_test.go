package sim

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"

	"github.com/go-portage/portage/migrate"
)

// The oracle watches every call of the application at both ends of every stream. What it
// demands:
//
//	content   What a reader got is an exact prefix of what the writer's Writes took: every
//	          byte is a function of the stream, the direction and its place.
//	count     The count that Write returns is exact: behind a clean end the reader has as
//	          many bytes as all Writes together have returned, those that failed included.
//	end       EOF comes only after the writer has called CloseWrite or Close, and not where
//	          a Write has failed before that: an application that is told of an error and
//	          closes must not look like one that has finished.
//	both      Where something is missing, both ends are told: the reader's Read fails, and
//	          the writer sees an error from one of its calls. Only an application that has
//	          finished cannot be told: one that has ended its writing (CloseWrite, Close,
//	          Reset), and its reading (EOF, CloseRead, Close, Reset). Nor can one that
//	          finishes before the news could reach it: 5 s, and longer only where a connection
//	          of the stream, or one that it was to move to, was held up or fell silent. It
//	          has finished with its writing where the other end had ended its own by then,
//	          and all of that is read, to the EOF: nothing of it is missing, late as it is.
//	cause     Nothing fails without a cause. A Read fails only where the other end, or this
//	          one, called Reset, or this one stopped reading, or the stream was harmed. A
//	          Write also where the other end stopped reading. A stream is harmed by what
//	          happens to a connection that it was on then or came to later, not by what
//	          happens to one that it has left, and not by that of a migration that was not
//	          acked (S9). The cause comes before the failure: what happens later is none. A
//	          relay that limits what it carries is one from when it has been sent so much.
//	moves     Where nothing has gone wrong with the connections of the stream, or those that
//	          it was to move to, Migrate succeeds, but for the meetings of both ends'
//	          migrations (M1, M2), the end of the stream, and a connection that takes 4 KiB at
//	          once and is full for a second.
//	agree     Where both ends are open, no migration is under way at either, and nothing has
//	          harmed the stream, both know it by the same label and on the same connection.
//	live      Every call returns, at the latest when all timeouts of the transports and of
//	          the library have passed. A Write that waits for patience, though the other end
//	          has not stopped reading, hangs, unless something has happened to the stream's
//	          connections a short time before, see noticed.
//	remains   When the applications are done, no label, stream, goroutine or reserved
//	          memory is left.
//
// Some things are not Portage's doing, and are told apart as narrowly as can be:
//
//   - yamux reports a clean EOF now and then, with data, where its connection has gone down
//     (docs/transports.md, 3), and more may follow. Nobody is given that by a stream that has a
//     label, on a host that has more than the draft. Elsewhere it passes.
//   - An application on a host that has only the draft may read a clean end behind a gap
//     where its stream was harmed: docs/protocol.md says how. What that host sends is held
//     to the rules.
//   - What that host reads, resets and leaves behind is the test's own implementation's:
//     where both ends migrate at once it may give up a stream that it has moved already.
//     A Write that waits there, or for it, on a stream that was harmed is counted only.
//   - Where an attempt to migrate failed before its ack, and the responder has only the
//     draft, the EOF that follows our own is an error (S5).
//   - A stream without a label is go-libp2p's own. Where it was harmed, only its content
//     is looked at.

// flow is one direction of a stream.
type flow struct {
	st   *simStream
	side int // who writes

	mu        sync.Mutex // guards all below
	attempted int64      // bytes that Writes were called with
	wrote     int64      // bytes that Writes have returned
	writing   int        // Writes under way
	finished  time.Time  // when the writer called CloseWrite or Close first
	read      int64
	records   []byte // what was read, where several write at once
	eof       bool
	eofAt     time.Time
	lied      bool  // that EOF may be the transport's, see above
	readErr   error // what ended reading, if not EOF, and if the reader had not stopped before
	readErrAt time.Time
	writeErr  error // the first that was not a deadline's, and that neither end's calls explain

	writeErrAt time.Time
}

// end is one end of a stream, as its application has it.
type end struct {
	st      *simStream
	side    int
	s       network.Stream
	host    wrapped
	out, in *flow

	mu        sync.Mutex // guards all below
	told      error      // the first error that was not a deadline's
	noRead    time.Time  // when CloseRead, Close or Reset was called, or EOF was read
	noWrite   time.Time  // when CloseWrite, Close or Reset was called
	resetAt   time.Time  // when Reset was called
	closedAt  time.Time  // when Close or Reset was called
	impatient bool       // a Write waited too long, and was given up
}

// simStream is a stream of the run.
type simStream struct {
	w    *world
	id   int
	pid  protocol.ID
	plan streamPlan

	flows [2]*flow // by who writes

	mu       sync.Mutex // guards all below
	ends     [2]*end
	stays    [2][]*stay    // of each side's, where it is, and was
	attempts [2][]*attempt // migrations that a side has begun, or was asked for
	harms    []harm        // apart from those of the connections
	trying   [2]int        // calls of Migrate under way
	triedAt  [2]time.Time  // when one of them began or ended last
	movedAt  time.Time     // when a migration has finished last, at either side
	met      []meeting     // attempts that failed while the other side tried, too
	doubtful bool          // S5: a responder with only the draft may have acked an attempt that failed
	steps    int           // of migrations, so far
}

// stay is a time on a connection.
type stay struct {
	link       int
	came, left time.Time // left is zero: it has not
}

// sees says whether what has happened to the connection at that time, if ever, can have
// harmed who stayed there.
func (s *stay) sees(at time.Time) bool {
	return !at.IsZero() && (s.left.IsZero() || !s.left.Before(at))
}

// attempt is a migration at one side. Its stay is that of the new underlying stream, for
// which it does not matter what happened before it came.
type attempt struct {
	stay
	initiator, acked bool
}

// harm is why a stream may fail, and since when.
type harm struct {
	why string
	at  time.Time
}

func newSimStream(w *world, id int) *simStream {
	st := &simStream{
		w: w, id: id, plan: w.plan.streams[id],
		pid: protocol.ID(fmt.Sprintf("/sim/%d", id)),
	}
	for side := range 2 {
		st.flows[side] = &flow{st: st, side: side}
	}
	return st
}

func (w *world) streamOf(pid protocol.ID) *simStream {
	var id int
	if _, err := fmt.Sscanf(string(pid), "/sim/%d", &id); err != nil {
		return nil
	}
	return w.streams[id]
}

// enter makes s the side's end.
func (st *simStream) enter(side int, s network.Stream) *end {
	e := &end{st: st, side: side, s: s, host: st.w.host(side), out: st.flows[side], in: st.flows[1-side]}
	link := st.w.linkOf(s.Conn())
	st.w.logf("stream %d: %s has it, on %d, labelled: %t", st.id, sideName(side), link, labelled(s))
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.ends[side] != nil {
		st.w.failf("content", "stream %d was delivered twice to %s", st.id, sideName(side))
	}
	st.ends[side] = e
	if len(st.stays[side]) == 0 { // else it has moved already
		st.stays[side] = append(st.stays[side], &stay{link: link, came: time.Now()})
	}
	return e
}

func labelled(s network.Stream) bool {
	switch s.(type) {
	case *migrate.Stream, *draftStream:
		return true
	}
	return false
}

func (st *simStream) end(side int) *end {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.ends[side]
}

// step notes a step of a migration.
func (st *simStream) step(side int, initiator bool, kind migrate.EventKind, from, to int) {
	st.w.tally.add("step: "+kind.String(), 1)
	now := time.Now()
	st.mu.Lock()
	defer st.mu.Unlock()
	st.steps++
	a := st.attemptLocked(side, initiator, kind, to)
	switch kind {
	case migrate.Started:
		st.attempts[side] = append(st.attempts[side], &attempt{stay: stay{link: to, came: now}, initiator: initiator})
		return
	case migrate.Acked:
		if len(st.stays[side]) == 0 {
			// The acceptor's handler has not run yet. Until the migration has finished the
			// stream can be harmed by the old connection, too.
			st.stays[side] = append(st.stays[side], &stay{link: from, came: now})
		}
		st.stays[side] = append(st.stays[side], &stay{link: to, came: now})
		if a != nil {
			a.acked = true
		}
		return
	case migrate.Finished:
		st.movedAt = now
		for _, s := range st.stays[side] {
			if s.link == from && s.left.IsZero() {
				s.left = now
			}
		}
	case migrate.Denied, migrate.Failed:
	default:
		return
	}
	if a != nil {
		a.left = now
	}
	go st.agree()
}

// attemptLocked returns the attempt that a step belongs to, or nil: the newest in that
// role to that connection that has not ended. One that is denied was not acked. mu must be
// held.
func (st *simStream) attemptLocked(side int, initiator bool, kind migrate.EventKind, to int) *attempt {
	for _, a := range slices.Backward(st.attempts[side]) {
		if a.left.IsZero() && a.initiator == initiator && a.link == to && !(a.acked && kind == migrate.Denied) {
			return a
		}
	}
	return nil
}

// underLocked returns since when a migration is under way at the side, or zero. mu must be
// held.
func (st *simStream) underLocked(side int) (since time.Time) {
	for _, a := range st.attempts[side] {
		if a.left.IsZero() && (since.IsZero() || a.came.Before(since)) {
			since = a.came
		}
	}
	return since
}

// harm notes that the stream may fail from now on.
func (st *simStream) harm(why string) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.harms = append(st.harms, harm{why, time.Now()})
}

// doubt notes that an attempt has failed which a draft-only responder may have acked (S5).
func (st *simStream) doubt() {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.doubtful = true
}

func (st *simStream) isDoubtful() bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.doubtful
}

// wasHarmed says by what the stream was harmed, or nothing.
func (st *simStream) wasHarmed() string { return st.harmedBy(time.Now()) }

// harmedBy says so of the time until then.
func (st *simStream) harmedBy(at time.Time) string {
	st.w.mu.Lock()
	defer st.w.mu.Unlock()
	st.mu.Lock()
	defer st.mu.Unlock()
	for _, h := range st.harms {
		if !h.at.After(at) {
			return h.why
		}
	}
	for side := range st.stays {
		for _, s := range st.stays[side] {
			if s.link < 0 {
				return "a connection that is not in the list"
			}
			if hurt := st.w.links[s.link].hurt; s.sees(hurt) && !hurt.After(at) && !s.came.After(at) {
				return fmt.Sprintf("connection %d", s.link)
			}
		}
	}
	return ""
}

// news is how long it may take until one end hears of what the other has seen, where no
// connection was held up.
const news = 5 * time.Second

// trouble says when something has happened last that may concern the stream: to a
// connection that it was on, or that it was to move to. longest is how long it may
// take until one end hears of what the other has seen.
func (st *simStream) trouble() (last time.Time, longest time.Duration) {
	st.w.mu.Lock()
	defer st.w.mu.Unlock()
	st.mu.Lock()
	defer st.mu.Unlock()
	for _, h := range st.harms {
		last = later(last, h.at)
	}
	longest = news
	look := func(s *stay) {
		if s.link < 0 {
			return
		}
		l := st.w.links[s.link]
		if s.sees(l.hurt) {
			last = later(last, l.last)
		}
		if longest += l.slow; s.sees(l.silent) {
			longest += patience
		}
	}
	for side := range 2 {
		for _, s := range st.stays[side] {
			look(s)
		}
		for _, a := range st.attempts[side] {
			look(&a.stay)
		}
	}
	return last, min(longest, patience)
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// agree checks that both ends know the stream by the same label, and have it on the same
// connection, if nothing is under way, and nothing has harmed it.
func (st *simStream) agree() {
	steps, quiet := st.atRest()
	if !quiet || st.wasHarmed() != "" {
		return
	}
	var labels [2]uint64
	var links [2]int
	for side := range 2 {
		s, ok := st.end(side).s.(*migrate.Stream)
		if !ok {
			return
		}
		labels[side], links[side] = s.Label(), st.w.linkOf(s.Conn())
	}
	if again, quiet := st.atRest(); !quiet || again != steps {
		return // something has begun meanwhile
	}
	st.w.tally.add("agreements of both ends", 1)
	if labels[0] != labels[1] || links[0] != links[1] {
		st.w.failf("agree", "stream %d: label %d on connection %d at a, label %d on connection %d at b",
			st.id, labels[0], links[0], labels[1], links[1])
	}
}

// atRest says whether both ends are open, and no migration is under way; and how many steps
// of migrations there have been.
func (st *simStream) atRest() (steps int, quiet bool) {
	if st.end(0).ended() || st.end(1).ended() {
		return 0, false
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.steps, st.underLocked(0).IsZero() && st.underLocked(1).IsZero()
}

// pattern fills p with what the flow carries from its byte off on.
func (f *flow) pattern(p []byte, off int64) {
	key := uint64(f.st.id)<<1 | uint64(f.side)
	for i := 0; i < len(p); {
		block, within := uint64(off)>>3, int(off&7)
		x := key*0x9e3779b97f4a7c15 + block*0xd1342543de82ef95
		x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
		x = (x ^ x>>27) * 0x94d049bb133111eb
		x ^= x >> 31
		var b [8]byte
		binary.LittleEndian.PutUint64(b[:], x)
		n := copy(p[i:], b[within:])
		i += n
		off += int64(n)
	}
}

// isTimeout says whether err is that of a deadline which the application has set.
func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.As(err, &t) && t.Timeout()
}

// write calls Write once. deadline says that one is set.
func (e *end) write(p []byte, deadline bool) (int, error) {
	f := e.out
	f.mu.Lock()
	f.attempted += int64(len(p))
	f.writing++
	f.mu.Unlock()
	impatient := time.AfterFunc(patience, func() {
		e.mu.Lock()
		e.impatient = true
		e.mu.Unlock()
		_ = e.s.SetWriteDeadline(time.Unix(1, 0))
	})
	n, err := e.s.Write(p)
	impatient.Stop()
	e.mu.Lock()
	gaveUp, closed := e.impatient, !e.noWrite.IsZero()
	e.mu.Unlock()
	wanted := !closed && !e.st.end(1-e.side).stopped()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.writing--
	f.attempted -= int64(len(p) - n)
	f.wrote += int64(n)
	switch {
	case n > len(p) || n < 0:
		e.failf("count", "Write of %d bytes returned %d", len(p), n)
	case err == nil && n < len(p):
		e.failf("count", "Write of %d bytes returned %d and no error", len(p), n)
	case err == nil:
	case isTimeout(err) && gaveUp:
		e.logf("gave up a Write after %v, %d of %d", patience, n, len(p))
		e.judgeGivenUp(wanted)
	case isTimeout(err) && deadline:
		e.st.w.tally.add("deadline hit: write", 1)
	default:
		if f.writeErr == nil && wanted {
			f.writeErr, f.writeErrAt = err, time.Now()
		}
		e.logf("Write: %d of %d, %v", n, len(p), err)
		e.tell(err)
	}
	return n, err
}

// judgeGivenUp judges that a Write has not returned for all of patience. wanted says that
// the other end has not stopped reading.
func (e *end) judgeGivenUp(wanted bool) {
	last, _ := e.st.trouble()
	switch since := time.Since(last); {
	case !wanted:
		e.st.w.tally.add("Writes given up: nobody reads", 1)
	case e.st.w.plan.draft >= 0 && !last.IsZero():
		e.st.w.tally.add("Writes given up: harmed, and one end has only the draft", 1)
	case since < noticed:
		e.st.w.tally.add("Writes given up: harmed a short time ago", 1)
	default:
		e.failf("live", "a Write took more than %v, though the other end reads, and nothing has happened for %v", patience, since)
	}
}

// stopped says whether the end has stopped reading of its own accord; one that was not
// accepted has.
func (e *end) stopped() bool {
	if e == nil {
		return true
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return !e.noRead.IsZero()
}

// read calls Read once.
func (e *end) read(p []byte, deadline bool) (int, error) {
	n, err := e.s.Read(p)
	f := e.in
	e.mu.Lock()
	quit := !e.noRead.IsZero()
	e.mu.Unlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	if n < 0 || n > len(p) {
		e.failf("count", "Read into %d bytes returned %d", len(p), n)
		return n, err
	}
	if f.eof && n > 0 && !f.lied {
		e.failf("end", "Read returned %d bytes after EOF", n)
	}
	e.st.w.tally.add("bytes checked", n)
	if e.st.plan.kind == kindConcurrent && e.side != e.st.plan.opener {
		f.records = append(f.records, p[:n]...)
	} else if n > 0 {
		want := make([]byte, n)
		f.pattern(want, f.read)
		if i := firstDifference(p[:n], want); i >= 0 {
			e.failf("content", "byte %d is not what was written%s", f.read+int64(i), f.locate(p[i:n]))
		}
	}
	f.read += int64(n)
	if f.read > f.attempted {
		e.failf("content", "%d bytes read of %d that Write was ever called with", f.read, f.attempted)
	}
	switch {
	case err == nil:
	case err == io.EOF && !quit && !f.eof:
		f.eof, f.eofAt = true, time.Now()
		f.lied = e.lie()
		e.mu.Lock()
		e.noRead = f.eofAt
		e.mu.Unlock()
		e.logf("EOF after %d bytes", f.read)
	case err == io.EOF:
	case deadline && isTimeout(err) && !e.s.Conn().IsClosed():
		e.st.w.tally.add("deadline hit: read", 1)
	default:
		if f.readErr == nil && !quit {
			f.readErr, f.readErrAt = err, time.Now()
		}
		e.logf("Read after %d bytes: %v", f.read, err)
		e.tell(err)
		if strings.Contains(err.Error(), "outcome is unknown") && e.st.isDoubtful() {
			e.st.harm("an EOF that cannot be told (S5)")
		}
	}
	return n, err
}

// lie says whether an EOF that was just read may be the transport's: it came from a yamux
// connection that is closed, and nothing of Portage's stands before that.
func (e *end) lie() bool {
	if labelled(e.s) && e.st.w.plan.draft != e.side {
		return false
	}
	c := e.s.Conn()
	at := c.RemoteMultiaddr().String()
	return (strings.Contains(at, "/tcp/") || strings.Contains(at, "/p2p-circuit")) && c.IsClosed()
}

func firstDifference(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// locate looks for got elsewhere in the flow: what was lost, doubled or reordered.
func (f *flow) locate(got []byte) string {
	got = got[:min(len(got), 16)]
	all := make([]byte, f.attempted)
	f.pattern(all, 0)
	if len(got) >= 8 {
		if i := strings.Index(string(all), string(got)); i >= 0 {
			return fmt.Sprintf(", but what was written as byte %d", i)
		}
	}
	return fmt.Sprintf(", and not found anywhere: %x", got)
}

func (e *end) tell(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.told == nil {
		e.told = err
	}
}

func (e *end) closeWrite() {
	e.note("CloseWrite", &e.noWrite)
	e.out.finish()
	if err := e.s.CloseWrite(); err != nil {
		e.logf("CloseWrite: %v", err)
		e.tell(err)
	}
}

func (e *end) closeRead() {
	e.note("CloseRead", &e.noRead)
	if err := e.s.CloseRead(); err != nil {
		e.logf("CloseRead: %v", err)
	}
}

func (e *end) close() {
	e.note("Close", &e.noRead, &e.noWrite)
	e.out.finish()
	if err := e.s.Close(); err != nil {
		e.logf("Close: %v", err)
		e.tell(err)
	}
	e.logf("Close has returned")
}

func (e *end) abort() {
	e.note("Reset", &e.noRead, &e.noWrite, &e.resetAt)
	if err := e.s.Reset(); err != nil {
		e.logf("Reset: %v", err)
	}
}

// note notes that the application does something from which on it neither reads nor
// writes, or only one of both.
func (e *end) note(what string, since ...*time.Time) {
	e.logf("%s", what)
	e.st.w.tally.add("call: "+what, 1)
	e.mu.Lock()
	defer e.mu.Unlock()
	if (what == "Close" || what == "Reset") && e.closedAt.IsZero() {
		e.closedAt = time.Now()
	}
	for _, at := range since {
		if at.IsZero() {
			*at = time.Now()
		}
	}
}

func (f *flow) finish() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.finished.IsZero() {
		f.finished = time.Now()
	}
}

func (e *end) logf(format string, args ...any) {
	e.st.w.logf("stream %d: %s: %s", e.st.id, sideName(e.side), fmt.Sprintf(format, args...))
}

func (e *end) failf(rule, format string, args ...any) {
	e.st.w.failf(rule, "stream %d at %s: %s", e.st.id, sideName(e.side), fmt.Sprintf(format, args...))
}

// judge looks at a stream when its applications are done.
func (st *simStream) judge() {
	harmed := st.wasHarmed()
	if st.end(st.plan.opener) == nil {
		st.judgeUnopened()
		return
	}
	st.judgeMeetings()
	for side := range 2 {
		st.judgeFlow(st.flows[side], st.end(side), st.end(1-side), harmed)
	}
}

// judgeUnopened looks at a stream whose opener was told that it cannot be opened: if it has
// an acceptor, that has got nothing, and no end of it.
func (st *simStream) judgeUnopened() {
	f := st.flows[st.plan.opener]
	switch {
	case f.eof && f.lied:
	case f.eof, f.read > 0:
		st.w.failf("end", "stream %d: NewStream has failed, and the acceptor has read %d bytes, EOF: %t", st.id, f.read, f.eof)
	case st.end(1-st.plan.opener) != nil:
		st.w.tally.add("streams accepted that were not opened", 1)
	}
}

// meeting is an attempt to migrate that failed while the other end tried, too.
type meeting struct{ began, failed time.Time }

// judgeMeetings checks that where both ends' migrations met, one of them came about (M1),
// if the stream lived long enough: where a connection was held up, the request that stands
// may reach the other end as late as any news.
func (st *simStream) judgeMeetings() {
	long := 2 * time.Second
	if _, longest := st.trouble(); longest > news {
		long = longest
	}
	for _, m := range st.met {
		lived := true
		for _, e := range st.ends {
			lived = lived && e != nil && e.closedAt.Sub(m.failed) > long
		}
		if lived && st.isCalm(nil) && st.movedAt.Before(m.began) {
			st.w.failf("moves", "stream %d: both ends migrate it at %v, and neither succeeds",
				st.id, m.began.Sub(st.w.start))
		}
	}
}

// judgeFlow looks at one direction. writer and reader are its ends; either may be nil,
// where the stream never got there.
func (st *simStream) judgeFlow(f *flow, writer, reader *end, harmed string) {
	raw := !st.plan.labelled
	unlabelled := func(e *end) bool { return e != nil && !labelled(e.s) }
	raw = raw || unlabelled(writer) || unlabelled(reader)
	fail := func(rule, format string, args ...any) {
		st.w.failf(rule, "stream %d, %s to %s: %s (harmed by: %q)",
			st.id, sideName(f.side), sideName(1-f.side), fmt.Sprintf(format, args...), harmed)
	}
	if (raw || f.st.w.plan.draft == 1-f.side) && harmed != "" {
		return
	}
	if f.writeErr != nil && st.harmedBy(f.writeErrAt) == "" {
		fail("cause", "Write failed without a cause: %v", f.writeErr)
	}
	if reader == nil {
		if writer != nil && harmed == "" && writer.resetAt.IsZero() {
			fail("cause", "the stream never came to its acceptor")
		}
		return
	}
	if st.plan.kind == kindConcurrent && f.side == st.plan.opener {
		if err := checkRecords(f.records, uint64(st.id)); err != nil {
			fail("content", "%v", err)
		}
	}
	switch {
	case f.eof && writer == nil:
		fail("end", "EOF, but the other end was never opened")
	case f.eof && (f.finished.IsZero() || f.eofAt.Before(f.finished)):
		fail("end", "EOF after %d bytes, but the writer did not close before", f.read)
	case f.eof && f.writeErr != nil:
		fail("end", "EOF after %d bytes, though a Write had failed: %v", f.read, f.writeErr)
	case f.eof && f.read != f.wrote:
		fail("count", "EOF after %d bytes, but Writes returned %d", f.read, f.wrote)
	case f.eof:
		st.w.tally.add("directions complete", 1)
	case f.readErr == nil:
		st.w.tally.add("directions whose reader stopped", 1)
	default:
		st.w.tally.add("directions that ended with an error", 1)
		reset := writer != nil && !writer.resetAt.IsZero() && !writer.resetAt.After(f.readErrAt)
		if st.harmedBy(f.readErrAt) == "" && writer != nil && !reset && st.w.plan.draft != 1-f.side {
			fail("cause", "Read failed after %d of %d bytes without a cause: %v", f.read, f.wrote, f.readErr)
		}
		if writer == nil || writer.told != nil || st.w.plan.draft == f.side {
			break
		}
		_, longest := st.trouble()
		finished := writer.noWrite
		if writer.noRead.After(finished) && !st.flows[1-f.side].wasWhole(f.readErrAt) {
			finished = writer.noRead
		}
		if late := finished.Sub(f.readErrAt); late > longest {
			fail("both", "the reader saw an error after %d of %d bytes, and the writer, who finished %v later, none: %v",
				f.read, f.wrote, late, f.readErr)
		}
	}
}

// wasWhole says whether the writer had ended the flow by then, and its reader has got all
// of it, to the EOF. So the transport may keep it for a slow reader, whatever becomes of the
// connection, and no Read can tell that the other direction has failed.
func (f *flow) wasWhole(at time.Time) bool {
	return f.eof && f.read == f.wrote && !f.finished.IsZero() && !f.finished.After(at)
}

// remains checks that nothing is left while the hosts are still there.
func (w *world) remains() {
	const long = 4 * time.Minute // longer than all timeouts together
	var left []string
	w.wait(long, func() bool {
		left = w.leftOver()
		return len(left) == 0
	})
	if len(left) > 0 {
		w.failf("remains", "%s", strings.Join(left, "\n    "))
	}
	if stacks := stacksIn("portage/migrate."); stacks != "" {
		w.failf("remains", "goroutines of package migrate:\n%s", stacks)
	}
}

func (w *world) leftOver() (left []string) {
	w.mu.Lock()
	stopped := slices.Clone(w.stopped)
	w.mu.Unlock()
	for _, h := range stopped {
		if n := labelsOf(h); n > 0 {
			left = append(left, fmt.Sprintf("%d peers in the table of labels of a host that was stopped", n))
		}
	}
	for side := range 2 {
		if side == w.plan.draft {
			continue // what is left there is the test's own implementation's
		}
		w.mu.Lock()
		h, node := w.hosts[side], w.nodes[side]
		w.mu.Unlock()
		if n := labelsOf(h); n > 0 {
			left = append(left, fmt.Sprintf("%s: %d peers in the table of labels", sideName(side), n))
		}
		for _, c := range node.Network().ConnsToPeer(w.node(1 - side).ID()) {
			for _, u := range c.GetStreams() {
				if p := u.Protocol(); p == "" || p == migrate.ID || strings.HasPrefix(string(p), "/sim/") {
					left = append(left, fmt.Sprintf("%s: stream of %q on %d", sideName(side), p, w.linkOf(c)))
				}
			}
		}
		rm := node.Network().ResourceManager()
		for _, st := range w.streams {
			_ = rm.ViewProtocol(st.pid, func(s network.ProtocolScope) error {
				if stat := s.Stat(); stat != (network.ScopeStat{}) {
					left = append(left, fmt.Sprintf("%s: %s holds %+v", sideName(side), st.pid, stat))
				}
				return nil
			})
		}
	}
	return left
}

// empty checks that the resource managers hold nothing when all connections are closed.
func (w *world) empty() {
	for side := range 2 {
		for _, p := range w.node(side).Network().Peers() {
			_ = w.node(side).Network().ClosePeer(p)
		}
	}
	if w.relay != nil {
		for _, p := range w.relay.Network().Peers() {
			_ = w.relay.Network().ClosePeer(p)
		}
	}
	var left []string
	w.wait(2*time.Minute, func() bool {
		left = nil
		for side := range 2 {
			rm := w.node(side).Network().ResourceManager()
			check := func(name string, stat network.ScopeStat) {
				if stat != (network.ScopeStat{}) {
					left = append(left, fmt.Sprintf("%s: scope %s holds %+v", sideName(side), name, stat))
				}
			}
			_ = rm.ViewSystem(func(s network.ResourceScope) error { check("system", s.Stat()); return nil })
			_ = rm.ViewTransient(func(s network.ResourceScope) error { check("transient", s.Stat()); return nil })
			_ = rm.ViewPeer(w.node(1-side).ID(), func(s network.PeerScope) error { check("peer", s.Stat()); return nil })
		}
		return len(left) == 0
	})
	if len(left) > 0 {
		w.failf("remains", "after all connections were closed: %s", strings.Join(left, "\n    "))
	}
}

// labelsOf is how many peers the host's table of labels has. It is unexported; that
// nothing is left in it is worth the reflection.
func labelsOf(h wrapped) int {
	mh, ok := h.(*migrate.Host)
	if !ok {
		return 0
	}
	labels := reflect.ValueOf(mh).Elem().FieldByName("labels").Elem()
	mu := labels.FieldByName("mu")
	guard := reflect.NewAt(mu.Type(), mu.Addr().UnsafePointer()).Interface().(*sync.Mutex)
	guard.Lock()
	defer guard.Unlock()
	return labels.FieldByName("peers").Len()
}

// stacksIn returns the stacks of all goroutines that are inside functions of such names.
// Identify's own streams pass through Portage's handler, too, and are not meant.
func stacksIn(names ...string) string {
	buf := make([]byte, 4<<20)
	buf = buf[:runtime.Stack(buf, true)]
	all := strings.Split(string(buf), "\n\n")
	all = slices.DeleteFunc(all, func(s string) bool {
		// A host follows what identify tells for as long as it has connections.
		return strings.Contains(s, "/protocol/identify.") || strings.Contains(s, "migrate.(*identified).take") || !slices.ContainsFunc(names, func(name string) bool { return strings.Contains(s, name) })
	})
	return strings.Join(all, "\n\n")
}

// Where several goroutines write to one stream at once, each Write is a record, so that
// what was mixed up shows:
//
//	writer (1 byte), number (4), length of what follows (4), bytes
const recordHeader = 9

func record(stream uint64, writer byte, number uint32, size int) []byte {
	b := make([]byte, recordHeader+size)
	b[0] = writer
	binary.BigEndian.PutUint32(b[1:], number)
	binary.BigEndian.PutUint32(b[5:], uint32(size))
	for i := range size {
		b[recordHeader+i] = byte(stream*31 + uint64(writer)*17 + uint64(number)*7 + uint64(i)*3)
	}
	return b
}

// checkRecords checks that got consists of whole records, each writer's in order. The
// last may be cut short.
func checkRecords(got []byte, stream uint64) error {
	next := make(map[byte]uint32)
	for off := 0; len(got)-off >= recordHeader; {
		writer, number := got[off], binary.BigEndian.Uint32(got[off+1:])
		size := int(binary.BigEndian.Uint32(got[off+5:]))
		if size > maxRecord || number != next[writer] {
			return fmt.Errorf("at byte %d: record %d of writer %d, %d bytes; expected its record %d", off, number, writer, size, next[writer])
		}
		want := record(stream, writer, number, size)
		n := min(len(want), len(got)-off)
		if i := firstDifference(got[off:off+n], want[:n]); i >= 0 {
			return fmt.Errorf("record %d of writer %d, at byte %d: wrong at its byte %d of %d", number, writer, off, i, len(want))
		}
		next[writer]++
		off += n
	}
	return nil
}
