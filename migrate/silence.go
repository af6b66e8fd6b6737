package migrate

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/network"

	"github.com/go-portage/portage/internal/aside"
)

// Once Migrate or the ack has left there is no way back (S10), and while one waits for the
// other end, errors of the old stream are kept back. So an end whose two paths are both dead
// would tell its application of neither. It may always reset both streams: then all see an
// error.
//
// And an initiator whose new path alone is dead would keep back the end of an old stream that
// works. Before its final size has come, a responder of the verified handover does not end the
// old stream because of the migration: that end is the application's, if the muxer has not made
// it up because its connection goes.

const (
	// maxSilence is how long the new stream may bring nothing when the old one is known to
	// have failed: TCP repeats what was lost on a connection that is new after 1 s, and
	// again 2 s later.
	maxSilence = 4 * time.Second

	// silenceLook is how often to look at the old stream meanwhile. The first answer of
	// nearly every peer is there before that. An end that is there at two looks, with its
	// connection open, is believed.
	silenceLook = time.Second
)

var errSilent = errors.New("the old stream has failed, and the new connection brings nothing")

// silence watches an exchange that waits for the other end. Reads of the new stream go
// through it. Its zero value watches nothing.
type silence struct {
	x     *exchange
	new   network.Stream
	began time.Time
	heard atomic.Int64 // how long after began new has last brought something

	mu    sync.Mutex // guards all below but path; before the lock of flows
	timer *time.Timer
	over  bool
	broke bool      // it has broken new off
	ended bool      // the old stream had ended when last looked at; for look alone
	since time.Time // since when the old stream is known to have failed
	path  watch     // the new connection, once the old stream has failed; for look alone
}

// listen watches the exchange until end is called.
func (x *exchange) listen(new network.Stream) *silence {
	l := &x.silence
	l.mu.Lock()
	defer l.mu.Unlock()
	l.x, l.new, l.began = x, new, time.Now()
	l.timer = time.AfterFunc(silenceLook, l.look)
	return l
}

// Read implements io.Reader.
func (l *silence) Read(p []byte) (int, error) {
	n, err := l.new.Read(p)
	if n > 0 {
		l.heard.Store(int64(time.Since(l.began)))
	}
	return n, err
}

func (l *silence) look() {
	failed := l.x.oldFailed()
	ended := !failed && l.x.s.recv.keepsEnd()
	if ended && l.ended {
		l.x.believeEnd()
	}
	l.ended = ended
	var others time.Time
	if failed {
		// What the answer waits behind may be other streams', on a slow path.
		if l.path.s == nil {
			l.path = watch{s: l.x.s, c: l.new.Conn()}
		}
		others = l.path.look()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	switch {
	case l.over:
		l.path.end()
		return
	case !failed:
		l.since = time.Time{}
	case l.since.IsZero():
		l.since = now
	case now.Sub(latest(latest(l.since, others), l.began.Add(time.Duration(l.heard.Load())))) >= maxSilence:
		l.broke = true
		l.path.end()
		go breakOff(l.new, network.StreamNoError)
		return
	}
	l.timer.Reset(silenceLook)
}

// end ends the watch.
func (l *silence) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over = true; l.timer.Stop() {
		l.path.end() // else look is under way, or was the last
	}
}

// cause is why what was waited for has failed with err.
func (l *silence) cause(err error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.broke {
		return errSilent
	}
	return err
}

// believeEnd gives the application the end of the old stream that is kept back, where it is
// certain that the responder has not ended it because of the migration.
func (x *exchange) believeEnd() {
	x.s.mu.Lock()
	defer x.s.mu.Unlock()
	if x.initiator && x.phase < phaseCommitted && x.verified {
		x.s.recv.release()
	}
}

// oldFailed says whether the old stream is known to have failed, and not only ended.
func (x *exchange) oldFailed() bool {
	return x.s.recv.keepsError() || x.s.send.keepsError() || aside.IsClosed(x.old.Conn())
}
