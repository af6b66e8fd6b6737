package connmgr

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	identifypb "github.com/libp2p/go-libp2p/p2p/protocol/identify/pb"
	"go.uber.org/zap"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/proto"
)

// Replicas of a service may share one key, and then look like one peer. An idle connection
// to one of them is its only one, however many connections there are to the others. A
// manager at the other end speaks for its own process, since it is asked on the connection
// itself. Of a plain peer it is identify that tells: two connections lead to the same
// process if what it says on both is the same, record, addresses and all.

// maxIdentify is the longest message of identify that is read, in bytes: what go-libp2p
// takes.
const maxIdentify = 8 << 10

// compare finds out whether loser leads to the process that winner leads to. It does not wait
// for the answer.
func (a *asker) compare(d *peerState, loser, winner *connState) {
	d.mu.Lock()
	loser.same = sameAsked
	loser.requests++
	winner.requests++
	d.mu.Unlock()
	type outcome struct {
		id  *identifypb.Identify
		err error
	}
	a.tasks.start(func() {
		came := make(chan outcome, 1)
		go func() {
			id, err := identifyOn(a.tasks.ctx, winner.conn)
			came <- outcome{id, err}
		}()
		there, err := identifyOn(a.tasks.ctx, loser.conn)
		here := <-came
		err = errors.Join(err, here.err)
		same := sameNot
		if err == nil && sameProcess(there, here.id) {
			same = sameYes
		}
		d.mu.Lock()
		if loser.same == sameAsked {
			loser.same = same
		}
		loser.requests--
		winner.requests--
		d.mu.Unlock()
		a.sched.schedule(d, time.Now())
		a.tells.log.Debug("compared the processes of two connections", zap.Stringer("peer", d.peer),
			zap.Stringer("connection", loser.info()), zap.Bool("same", same == sameYes), zap.Error(err))
	})
}

// sameProcess says whether two messages of identify are of one process.
func sameProcess(a, b *identifypb.Identify) bool {
	if len(a.SignedPeerRecord) > 0 || len(b.SignedPeerRecord) > 0 {
		return bytes.Equal(a.SignedPeerRecord, b.SignedPeerRecord)
	}
	return len(a.ListenAddrs) > 0 && a.GetAgentVersion() == b.GetAgentVersion() &&
		slices.EqualFunc(sorted(a.ListenAddrs), sorted(b.ListenAddrs), bytes.Equal)
}

func sorted(of [][]byte) [][]byte {
	of = slices.Clone(of)
	slices.SortFunc(of, bytes.Compare)
	return of
}

// identifyOn asks c's other end what identify says there. It blocks for 10 s at most.
func identifyOn(ctx context.Context, c network.Conn) (*identifypb.Identify, error) {
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	s, err := openOn(ctx, c, identify.ID, nil)
	if err != nil {
		return nil, err
	}
	defer s.Reset()
	defer context.AfterFunc(ctx, func() { _ = s.Reset() })()
	r := bufio.NewReaderSize(s, 1<<10)
	id := new(identifypb.Identify)
	for { // a list that is long comes in several messages
		part := new(identifypb.Identify)
		err := protodelim.UnmarshalOptions{MaxSize: maxIdentify}.UnmarshalFrom(r, part)
		switch {
		case err == nil:
			proto.Merge(id, part)
			if proto.Size(id) <= 4*maxIdentify {
				continue
			}
			return nil, errors.New("identify: too long")
		case errors.Is(err, io.EOF) && proto.Size(id) > 0:
			return id, nil
		default:
			return nil, orDone(ctx, err)
		}
	}
}
