package connmgr

import (
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/network"

	"github.com/go-portage/portage/internal/aside"
)

// closer closes connections that nothing keeps.
type closer struct {
	tasks   *tasks
	network func() network.Network
	tells   *teller
}

// close closes a loser if it still may be: this is looked at once more, with the claim.
func (cl *closer) close(d *peerState, v *view, p *plan, i int) {
	loser, winner := v.conns[i].connState, v.conns[p.winner].connState
	if !cl.claim(d, v, p, i) {
		return
	}
	verdict := p.verdicts[i]
	if !cl.tasks.start(func() { // a transport may block in closing
		err := loser.conn.CloseWithError(network.ConnSupplanted)
		d.mu.Lock()
		moved, took := loser.left()
		asked := loser.drain.since
		d.mu.Unlock()
		cl.tells.pruned(pruned{d.peer, winner.info(), loser.info(), verdict, asked, moved, took, err})
	}) {
		return
	}
	p.verdicts[i].why, p.verdicts[i].kept = "closed", ""
	p.closed = append(p.closed, i)
}

// claim says whether a loser can be closed at this moment: nothing is on it and nothing has
// been since the plan, and the winner is there and not about to be closed by the peer. If
// so, from here on the loser counts for nothing any more (D4).
func (cl *closer) claim(d *peerState, v *view, p *plan, i int) bool {
	loser, winner := v.conns[i].connState, v.conns[p.winner].connState
	if !slices.Contains(openConns(cl.network(), d.peer), winner.conn) || aside.IsClosed(loser.conn) {
		return false
	}
	open := streamsOn(loser.conn)
	d.mu.Lock()
	defer d.mu.Unlock()
	now := time.Now()
	switch {
	case cl.tasks.over(), winner.closing, now.Before(winner.pledged) && d.named != winner:
		return false
	case winner.path.health != pathAlive:
		return false
	case open.others > 0, loser.requests > 0, d.touching(loser) > 0, winner == loser:
		return false
	case loser.lastUse().After(v.facts.now), loser.drain.phase != v.facts.conns[i].drain.phase:
		return false
	}
	loser.closing = true
	return true
}
