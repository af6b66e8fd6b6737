package connmgr

import (
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"go.uber.org/zap"

	"github.com/go-portage/portage/migrate"
)

// outages gathers what becomes of streams that outlive their connection
// (migrate.WithResumption): one line of the log tells of all that a peer has lost together.
// A peer is in it while streams of it are lost, and no longer.
type outages struct {
	mu    sync.Mutex // a leaf
	peers map[peer.ID]*outage
}

// outage is the time from the first stream of a peer that is lost until none is any more.
type outage struct {
	open     int // streams that are lost; less than 0 where that is told late
	resumed  int
	gone     int
	from, to network.Conn // of the last stream that was resumed, or of the last that was not
	took     time.Duration
	again    uint64
	err      error // why the last one was not
}

// take adds a step, and returns the outage if it is over with that.
func (o *outages) take(e migrate.Event) *outage {
	o.mu.Lock()
	defer o.mu.Unlock()
	of := o.peers[e.Peer]
	if of == nil {
		of = new(outage)
		if o.peers == nil {
			o.peers = make(map[peer.ID]*outage)
		}
		o.peers[e.Peer] = of
	}
	switch {
	case e.Kind == migrate.Lost:
		of.open++
	case e.Kind == migrate.Resumed:
		of.open--
		of.resumed++
		of.from, of.to = e.From, e.To
		of.took = max(of.took, e.Took)
		of.again += e.Again
	case e.Err == nil: // nobody has waited for it any more
		of.open--
	default:
		of.open--
		of.gone++
		of.err = e.Err
		if of.from == nil {
			of.from = e.From
		}
	}
	if of.open != 0 {
		return nil
	}
	delete(o.peers, e.Peer)
	return of
}

// resumed tells of a step of a resumption, of either end.
func (t *teller) resumed(e migrate.Event) {
	switch e.Kind {
	case migrate.Lost:
	case migrate.Resumed:
		t.totals.resumed.Add(1)
		if t.events.listens() {
			t.events.emit(EvtStreamResumed{
				Peer: e.Peer, Protocol: e.Stream.Protocol(), Label: e.Stream.Label(),
				From: infoOf(e.From), To: infoOf(e.To), Initiator: e.Initiator, Took: e.Took, Again: e.Again,
			})
		}
	case migrate.GivenUp:
	default:
		return
	}
	if outcome := resumeOutcome(e); t.metrics != nil && outcome != "" {
		t.metrics.ResumptionFinished(outcome, e.Took, e.Again)
	}
	if o := t.outages.take(e); o != nil && o.resumed+o.gone > 0 {
		t.sampled(&t.deeds, e.Peer, o.inWords)
	}
}

func (o *outage) inWords() (string, []zap.Field) {
	from := infoOf(o.from)
	var sb strings.Builder
	fmt.Fprintf(&sb, "lost %s", from.Kind)
	fields := []zap.Field{zap.Stringer("connection", from), zap.Int("streams_resumed", o.resumed), zap.Int("streams_given_up", o.gone)}
	if o.resumed > 0 {
		to := infoOf(o.to)
		fmt.Fprintf(&sb, ", resumed %s on %s after %s", streams(o.resumed), to.Kind, inWords(o.took))
		if o.again > 0 {
			fmt.Fprintf(&sb, ", %s sent again", sizeInWords(o.again))
		}
		fields = append(fields, zap.Stringer("winner", to), zap.Duration("took", o.took), zap.Uint64("bytes_sent_again", o.again))
	}
	if o.gone > 0 {
		fmt.Fprintf(&sb, ", gave up %s: %s", streams(o.gone), briefly(o.err))
		fields = append(fields, zap.Error(o.err))
	}
	return sb.String(), fields
}

// resumeOutcome says how a resumption has ended; empty: it has not.
func resumeOutcome(e migrate.Event) string {
	switch {
	case e.Kind == migrate.Resumed:
		return StreamResumed
	case e.Kind == migrate.GivenUp && e.Err != nil:
		return StreamGivenUp
	case e.Kind == migrate.GivenUp:
		return StreamEnded
	}
	return ""
}

// sizeInWords returns "900 B", "12 KiB", "1.2 MiB".
func sizeInWords(n uint64) string {
	if n < 1<<10 {
		return fmt.Sprintf("%d B", n)
	}
	v, unit := float64(n)/(1<<10), "KiB"
	for _, next := range []string{"MiB", "GiB", "TiB"} {
		if v < 1000 {
			break
		}
		v, unit = v/(1<<10), next
	}
	if v < 10 {
		return fmt.Sprintf("%.1f %s", v, unit)
	}
	return fmt.Sprintf("%.0f %s", v, unit)
}
