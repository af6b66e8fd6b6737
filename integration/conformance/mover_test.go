package conformance

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/network"

	"github.com/go-portage/portage/migrate"
)

// mover migrates every stream of a pair to and fro until it ends, at both ends at once.
type mover struct {
	wg    sync.WaitGroup
	moved atomic.Int64 // migrations that both ends agreed on
	later atomic.Int64 // attempts that were to be tried again later
}

// trace counts the migrations. Where both ends migrate a stream to the same connection, one
// of the two calls succeeds although it finds nothing to do.
func (m *mover) trace(e migrate.Event) {
	if e.Kind == migrate.Finished && e.Initiator {
		m.moved.Add(1)
	}
}

// move begins to migrate a stream of the given side, if streams of the pair move, and ready
// comes to say so. over says whether the application has closed or reset an end of it: until then each migration has
// to succeed, sooner or later.
func (p *pair) move(side int, s network.Stream, ready, over func() bool) {
	if !p.moved {
		return
	}
	p.mover.wg.Add(1)
	go func() {
		defer p.mover.wg.Done()
		if !ready() {
			return
		}
		h, st := p.hosts[side].(*migrate.Host), s.(*migrate.Stream)
		for {
			to := p.conns[side][0]
			if st.Conn() == to {
				to = p.conns[side][1]
			}
			switch err := h.Migrate(context.Background(), st, to); {
			case err == nil:
			case over() || errors.Is(err, migrate.ErrClosed):
				return
			case errors.Is(err, migrate.ErrTryLater):
				p.mover.later.Add(1)
			default:
				p.t.Errorf("side %d: a stream that lives must migrate: %v", side, err)
				return
			}
		}
	}()
}

// await waits until no stream is left to migrate. All of them must have been closed or
// reset.
func (p *pair) await() {
	p.t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.mover.wg.Wait()
	}()
	select {
	case <-done:
	case <-time.After(patience):
		p.t.Error("streams that have ended still migrate")
		<-done
	}
}
