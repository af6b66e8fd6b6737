package migrate

import (
	"errors"
	"time"

	"github.com/libp2p/go-libp2p/core/network"

	"github.com/go-portage/portage/internal/aside"
)

// Nothing is kept of a stream that has failed, even if its application has not closed it. A
// handler that returns when its Read has failed is common, and with a plain stream costs
// nothing once the connection is gone.

// maxOrphans is how many streams of a host are kept whose connection is gone, of which the
// application has not heard. The other end may not know either, and move them; its
// Migrate may come as late as one may wait for a label (L4). Peers can come and go as
// they like: of more than these none is kept.
const maxOrphans = 256

// noteTold frees what is kept of the stream if the application was told that it has failed.
func (s *Stream) noteTold() { s.free(false) }

// free frees what is kept of a stream that nothing can save: no exchange is under way, and
// the application was told that it has failed, or, where gone says that this is enough, its
// connection is gone. What may still be read of it is the application's.
func (s *Stream) free(gone bool) {
	s.mu.Lock()
	if r := s.send.resumption; r != nil && r.state != resumeOver {
		gone = false // it may be resumed
	}
	lost := s.ex == nil && s.life == lifeOpen &&
		(s.told() || gone && aside.IsClosed(s.send.stream().Conn()))
	if lost {
		s.life = lifeLost
	}
	s.mu.Unlock()
	if lost {
		s.forget()
		s.settle()
	}
}

// disconnected is called when c is gone.
func (h *Host) disconnected(c network.Conn) {
	if h.resumer != nil {
		h.resumer.disconnected(c)
	}
	var orphans []*Stream
	for _, s := range h.labels.all(c.RemotePeer()) {
		if s.send.stream().Conn() == c && !s.send.resumption.lives() {
			orphans = append(orphans, s)
		}
	}
	h.orphan(orphans)
}

// orphan frees streams whose connection is gone: at once where the application has heard of
// it, else when nobody can ask for them any more.
func (h *Host) orphan(streams []*Stream) {
	n := int64(len(streams))
	if n == 0 {
		return
	}
	free := func(gone bool) {
		for _, s := range streams {
			s.free(gone)
		}
	}
	if h.orphans.Add(n) > maxOrphans || h.ctx.Err() != nil {
		h.orphans.Add(-n)
		free(true)
		return
	}
	free(false)
	time.AfterFunc(h.cfg.labelWait, func() {
		h.orphans.Add(-n)
		free(true)
	})
}

// noteGone looks whether the connection of the stream has gone while nobody looked: before
// the stream was entered, or while it migrated.
func (s *Stream) noteGone() {
	s.noteTold()
	s.mu.Lock()
	gone := s.ex == nil && s.life == lifeOpen && aside.IsClosed(s.send.stream().Conn())
	s.mu.Unlock()
	if r := s.send.resumption; gone && r.lives() {
		r.ended(s.send.stream(), errors.New("the connection is closed"))
		gone = !r.lives()
	}
	if gone {
		s.host.orphan([]*Stream{s})
	}
}
