package migrate

import (
	"errors"
	"net"
	"os"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"

	"github.com/go-portage/portage/internal/aside"
)

// cond is a condition variable whose waiters may have a deadline. Its zero value
// is ready. It costs nothing while nobody waits.
type cond struct {
	ch chan struct{} // closed at the next broadcast; nil while nobody waits
}

// wait gives up mu, waits for a broadcast or until the deadline has passed (zero:
// no deadline), takes mu again, and says whether there was a broadcast. mu must be
// held; it must be the lock that guards c.
func (c *cond) wait(mu *sync.Mutex, deadline time.Time) bool {
	if c.ch == nil {
		c.ch = make(chan struct{})
	}
	ch := c.ch
	mu.Unlock()
	defer mu.Lock()
	if deadline.IsZero() {
		<-ch
		return true
	}
	timer := time.NewTimer(time.Until(deadline))
	defer timer.Stop()
	select {
	case <-ch:
		return true
	case <-timer.C:
		return false
	}
}

// broadcast wakes all that wait. The lock that guards c must be held.
func (c *cond) broadcast() {
	if c.ch != nil {
		close(c.ch)
		c.ch = nil
	}
}

// longLock is a lock that may be held for as long as a Write takes. It has a capacity of one. It is
// not a sync.Mutex, since virtual time stands still while somebody waits for one.
type longLock chan struct{}

func (l longLock) Lock()   { l <- struct{}{} }
func (l longLock) Unlock() { <-l }

// past is a deadline that has passed.
var past = time.Unix(1, 0)

// isDeadline says whether err, which an underlying stream reported, is a deadline's doing:
// the stream is as good as before. The muxers agree on Timeout only, not on the value; and
// a connection that ends because its peer was silent for too long reports a timeout, too.
func isDeadline(err error, u network.Stream) bool {
	var t interface{ Timeout() bool }
	return (errors.Is(err, os.ErrDeadlineExceeded) || errors.As(err, &t) && t.Timeout()) &&
		!errors.Is(err, net.ErrClosed) && !aside.IsClosed(u.Conn())
}
