package connmgr

import (
	"context"
	"sync"
	"time"
)

// tasks are the goroutines that end with the manager, and the calls that it waits for when it
// is closed.
type tasks struct {
	ctx    context.Context // of all of them; done once they are told to end
	cancel context.CancelFunc

	mu     sync.Mutex // a leaf: guards closed, and that nothing is added once it is set
	closed bool
	wg     sync.WaitGroup
}

func newTasks() *tasks {
	t := new(tasks)
	t.ctx, t.cancel = context.WithCancel(context.Background())
	return t
}

// begin keeps end waiting until the caller has called done. It is false if there is to be no
// task any more.
func (t *tasks) begin() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return false
	}
	t.wg.Add(1)
	return true
}

func (t *tasks) done() { t.wg.Done() }

// start runs f in a goroutine of its own. It is false, and f is not run, if there is to be no
// task any more.
func (t *tasks) start(f func()) bool {
	if !t.begin() {
		return false
	}
	go func() {
		defer t.done()
		f()
	}()
	return true
}

// over says whether there is to be no task any more.
func (t *tasks) over() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.closed
}

// refuse has begin and start return false from here on.
func (t *tasks) refuse() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
}

// end tells all to end, and waits for them, but not for longer than wait. It says whether all
// have ended. Call refuse before.
func (t *tasks) end(wait time.Duration) bool {
	t.cancel()
	ended := make(chan struct{})
	go func() {
		t.wg.Wait()
		close(ended)
	}()
	select {
	case <-ended:
		return true
	case <-time.After(wait):
		return false
	}
}
