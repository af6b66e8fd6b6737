package migrate

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protodelim"

	. "github.com/go-portage/portage/internal/hosttest"
	. "github.com/go-portage/portage/internal/rawpeer"
	"github.com/go-portage/portage/pb"
)

// What a host tells its peer about streams beside these, and when (R12).

// report is what the peer was told, and on which connection.
type report struct {
	on network.Conn
	*pb.Progress
}

// reports are what the host tells from here on, whatever streams it opens for that.
func (p *rawPeer) reports() <-chan report {
	all := make(chan report, 1<<10)
	read := func(u *RawStream) {
		if Expect(u, MultistreamToken+Token(ResumeID)) != nil {
			return
		}
		in := bufio.NewReader(u)
		for {
			m := new(pb.Progress)
			if err := protodelim.UnmarshalFrom(in, m); err != nil {
				return
			}
			all <- report{u.Conn(), m}
		}
	}
	go func() {
		for {
			select {
			case u := <-p.CameFor(ResumeID):
				go read(u)
			case <-p.t.Context().Done():
				return
			}
		}
	}()
	return all
}

// closesReports has the host close its streams of reports, as if they had been idle for long, once
// it has told all that is due.
func (p *rawPeer) closesReports() {
	p.t.Helper()
	rs := p.host.resumer
	rs.mu.Lock()
	of := rs.peers[p.ID()]
	rs.mu.Unlock()
	if of == nil {
		return
	}
	WaitFor(p.t, "the streams of reports to be closed", func() bool {
		of.mu.Lock()
		told := !of.tell.busy && len(of.tell.due) == 0
		open := maps.Clone(of.tell.on)
		of.mu.Unlock()
		if !told {
			return false
		}
		for c, sides := range open {
			for _, sd := range slices.Clone(sides) {
				of.closeIdle(c, sd)
			}
		}
		return len(open) == 0
	})
}

// told waits for the next report, which has to be about the stream that was opened as u.
func (p *rawPeer) told(reports <-chan report, u *RawStream) report {
	p.t.Helper()
	r := Take(p.t, reports, "a report")
	require.Equal(p.t, u.Label, r.GetOrigin(), "the stream that is reported")
	return r
}

// tellingIs waits until cond holds of what the host has to tell.
func (p *rawPeer) tellingIs(what string, cond func(*telling) bool) {
	p.t.Helper()
	rs := p.host.resumer
	WaitFor(p.t, what, func() bool {
		rs.mu.Lock()
		defer rs.mu.Unlock()
		of := rs.peers[p.ID()]
		of.mu.Lock()
		defer of.mu.Unlock()
		return cond(&of.tell)
	})
}

// TestWhenReportsLeave: what there is to tell waits for what else there may be, but not for
// long, and not where it is much or urgent. One report is made at a time: what comes meanwhile
// leaves in another, right behind it.
func TestWhenReportsLeave(t *testing.T) {
	busy := func() *resumePeer {
		p := new(resumePeer)
		p.tell.busy = true
		return p
	}
	goesOn := func(p *resumePeer) bool {
		synctest.Wait()
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.tell.now
	}
	bubble(t, "less", func(t *testing.T) {
		p := busy()
		p.report(new(resumption), false)
		time.Sleep(reportWithin - time.Nanosecond)
		require.False(t, goesOn(p))
		time.Sleep(time.Nanosecond)
		require.True(t, goesOn(p))
	})
	bubble(t, "sooner, and later", func(t *testing.T) {
		p := busy()
		p.report(new(resumption), false)
		time.Sleep(reportWithin - 2*endWithin)
		p.reportIn(new(resumption), endWithin)
		p.report(new(resumption), false)
		time.Sleep(endWithin - time.Nanosecond)
		require.False(t, goesOn(p))
		time.Sleep(time.Nanosecond)
		require.True(t, goesOn(p))
		p.mu.Lock()
		p.tell.due, p.tell.now = nil, false // all was told
		p.mu.Unlock()
		p.reportIn(new(resumption), 2*endWithin)
		time.Sleep(endWithin)
		require.False(t, goesOn(p), "there was one time for all")
		time.Sleep(endWithin)
		require.True(t, goesOn(p))
	})
	bubble(t, "many", func(t *testing.T) {
		p := busy()
		for range reportMany - 1 {
			p.report(new(resumption), false)
		}
		require.False(t, goesOn(p))
		p.report(new(resumption), false)
		require.True(t, goesOn(p))
	})
	bubble(t, "urgent", func(t *testing.T) {
		p := busy()
		p.report(new(resumption), true)
		require.True(t, goesOn(p))
	})
}

// The end of writing is told, behind what was written, also where all of that is confirmed;
// and of what was received nothing is told where that is nothing.
func TestReportsOfEnds(t *testing.T) {
	t.Run("behind what is confirmed", func(t *testing.T) {
		p := meetResuming(t)
		reports := p.reports()
		s, old := p.hostAcceptsResumable()
		require.Nil(t, p.told(reports, old).End, "it has not ended")
		p.reportsTo(receivedBytes(old.Label, 1))
		WaitFor(t, "the host to know", func() bool {
			s.send.mu.Lock()
			defer s.send.mu.Unlock()
			return s.send.resumption.ring.confirmed == 1
		})
		require.NoError(t, s.CloseWrite())
		end := p.told(reports, old)
		require.EqualValues(t, 1, end.GetReceived())
		require.EqualValues(t, 1, end.GetEnd())
	})
	t.Run("where nothing has come", func(t *testing.T) {
		p := meetResuming(t)
		reports := p.reports()
		s, u := p.hostOpensResumable()
		r := p.host.resumer.get(p.ID(), u.Label)
		require.Nil(t, r.progress())
		require.NoError(t, s.CloseWrite())
		end := p.told(reports, u)
		require.Nil(t, end.Received)
		require.EqualValues(t, 1, end.GetEnd())
	})
}

// A peer that refuses a stream of reports, against what it has said, has no use for it.
func TestReportsThatAreRefused(t *testing.T) {
	p := meetResuming(t)
	p.hostAcceptsResumable()
	u := p.ArrivesFor(ResumeID)
	u.Sends(MultistreamToken, NAToken)
	u.WantsReset(network.StreamNoError)
}

// A stream of reports is closed when the peer has closed it, and reset where what comes is none.
func TestEndsOfReports(t *testing.T) {
	p := meetResuming(t)
	s, old := p.hostAcceptsResumable()
	u := p.reportsTo(receivedBytes(old.Label, 1))
	u.Wants(MultistreamToken, Token(ResumeID))
	u.ClosesWrite()
	u.WantsEOF()
	for name, bytes := range map[string]string{"too long": Uvarint(1025), "no message": Lengthy("\x00\x00")} {
		t.Run(name, func(t *testing.T) {
			p.reportsTo(bytes).WantsReset(network.StreamProtocolViolation)
		})
	}
	p.talk(s, old)
	WaitFor(t, "the host to let go of the streams", func() bool {
		for _, u := range p.Ends[1].GetStreams() {
			if u.Protocol() == ResumeID {
				return false
			}
		}
		return true
	})
}

// What there is to tell while a report is made is told, too, and does not wait for that.
func TestReportsWhileOneIsMade(t *testing.T) {
	made := func(t *telling) (n int) { // reports are
		for _, sides := range t.on {
			for _, sd := range sides {
				if sd.writes {
					n++
				}
			}
		}
		return n
	}
	for _, urgent := range []bool{true, false} {
		t.Run(fmt.Sprintf("urgent %t", urgent), func(t *testing.T) {
			p := meetResuming(t)
			reports := p.reports()
			s, old := p.hostAcceptsResumable()
			p.told(reports, old)
			_, other := p.hostAcceptsResumable()
			p.told(reports, other)
			r, next := p.host.resumer.get(p.ID(), old.Label), p.host.resumer.get(p.ID(), other.Label)
			p.tellingIs("the reports to be made", func(t *telling) bool { return made(t) == 0 })
			s.recv.mu.Lock() // whoever makes a report about it waits
			r.of.report(r, urgent)
			p.tellingIs("a report to be made", func(t *telling) bool { return made(t) == 1 && len(t.due) == 0 })
			r.of.report(next, urgent)
			p.told(reports, other)
			s.recv.mu.Unlock()
			p.told(reports, old)
			p.tellingIs("the reports to be made", func(t *telling) bool { return made(t) == 0 && len(t.due) == 0 })
		})
	}
}

// What was told on a connection that is gone may not have arrived, so it is told again.
func TestReportsAreToldAgain(t *testing.T) {
	p := meetResuming(t)
	reports := p.reports()
	s, old := p.hostAcceptsResumable()
	require.Equal(t, p.Conns[0], p.told(reports, old).on)
	next := p.resumes(old, epoch(1), 1)
	next.Wants(Prelude, ackReceivedBytes(1))
	require.NoError(t, p.Conns[0].Close())
	r := p.told(reports, old)
	require.Equal(t, p.Conns[1], r.on)
	require.EqualValues(t, 1, r.GetReceived())
	p.talk(s, next)
}

// What cannot be told, since there is no connection, keeps nothing from being told later.
func TestReportsWithoutAConnection(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := resumableOn(t, newFake())
		receive := func(conn *fakeConn) {
			u := newFake()
			u.conn = conn
			s.send.mu.Lock()
			s.send.cur = u
			s.send.mu.Unlock()
			s.recv.mu.Lock()
			r.incoming.base++
			s.recv.progressed()
			s.recv.mu.Unlock()
			time.Sleep(reportWithin)
			synctest.Wait()
		}
		told := newFake()
		told.conn.open = func(context.Context) (network.Stream, error) { return told, nil }
		gone := newFake().conn
		gone.dies()
		receive(gone)
		receive(told.conn)
		require.Equal(t, MultistreamToken+Token(ResumeID)+receivedBytes(r.origin, 2), told.taken())
		time.Sleep(lingering)
	})
}

// What finds no room on its connection is told when there is some.
func TestReportsThatFindNoRoom(t *testing.T) {
	p := meetResuming(t)
	reports := p.reports()
	_, old := p.hostAcceptsResumable()
	p.told(reports, old)
	p.closesReports()
	p.host.late.add(p.Ends[0])
	r := p.host.resumer.get(p.ID(), old.Label)
	r.of.report(r, true)
	p.tellingIs("the report to be due again", func(t *telling) bool { return !t.busy && t.timer != nil })
	p.host.late.remove(p.Ends[0])
	p.told(reports, old)
}

// One that a path which is dead does not take holds up no other for longer than its time.
func TestReportsThatAreNotTaken(t *testing.T) {
	virtual(t, func(t *testing.T) {
		h := verifyingHost(WithResumption())
		h.resumer = newResumer(h)
		u := newFake()
		u.grants(0, nil)
		p := &resumePeer{host: h}
		sd := &side{stream: u}
		begun := time.Now()
		require.ErrorIs(t, p.send(u.conn, sd, []byte("x")), os.ErrDeadlineExceeded)
		require.Equal(t, reportTimeout, time.Since(begun))
		require.NotNil(t, u.resetWith)
	})
}

// hasReported is a resumable stream on conn of which there is something to tell.
func hasReported(p *resumePeer, conn network.Conn, received uint64) *resumption {
	u := newFake()
	u.conn = conn.(*fakeConn)
	s := newStream(p.host, u, echoID, 1)
	r := &resumption{s: s, of: p, origin: received}
	s.send.resumption, s.recv.resumption = r, r
	r.incoming.base = received
	return r
}

// A stream of reports that has had nothing to tell for a while is closed; what comes before that
// goes over it.
func TestIdleStreamsOfReports(t *testing.T) {
	virtual(t, func(t *testing.T) {
		h := verifyingHost(WithResumption())
		h.resumer = newResumer(h)
		u := newFake()
		u.conn.open = func(context.Context) (network.Stream, error) { return u, nil }
		p := &resumePeer{host: h}
		for i := range 3 {
			p.report(hasReported(p, u.conn, uint64(i+1)), true)
			time.Sleep(lingering - time.Nanosecond)
			require.False(t, u.isClosed)
		}
		want := MultistreamToken + Token(ResumeID)
		for i := range uint64(3) {
			want += receivedBytes(i+1, i+1)
		}
		require.Equal(t, want, u.taken())
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		require.True(t, u.isClosed)
		require.Empty(t, p.tell.on)
	})
}

// What was told before and waits to be written does not hold up what is told next, but for a peer
// that takes nothing at all; then what is left goes when something else has gone.
func TestReportsDoNotWaitForEachOther(t *testing.T) {
	virtual(t, func(t *testing.T) {
		h := verifyingHost(WithResumption())
		h.resumer = newResumer(h)
		var opened []*fakeStream
		c := newFake().conn
		c.open = func(context.Context) (network.Stream, error) {
			u := newFake()
			u.conn = c
			u.grants(0, nil)
			opened = append(opened, u)
			return u, nil
		}
		p := &resumePeer{host: h}
		for i := range maxSides + 2 {
			p.report(hasReported(p, c, uint64(i+1)), true)
			synctest.Wait()
		}
		require.Len(t, opened, maxSides)
		require.Len(t, p.tell.due, 2)
		opened[1].grants(1<<10, nil)
		synctest.Wait()
		require.Len(t, opened, maxSides, "the stream that is free is used again")
		require.Empty(t, p.tell.due)
		require.Equal(t, MultistreamToken+Token(ResumeID)+receivedBytes(2, 2), opened[1].taken()[:len(MultistreamToken+Token(ResumeID)+receivedBytes(2, 2))])
		require.Len(t, opened[1].taken(), len(MultistreamToken+Token(ResumeID))+3*len(receivedBytes(2, 2)))
		for _, u := range opened {
			u.grants(1<<10, nil)
		}
		time.Sleep(lingering)
		synctest.Wait()
		require.Empty(t, p.tell.on)
	})
}

// unwelcome is a stream that the resource manager does not admit.
type unwelcome struct{ *fakeStream }

func (unwelcome) SetProtocol(protocol.ID) error { return network.ErrResourceLimitExceeded }

// Of one that the resource manager refuses nothing is left.
func TestReportsThatAreNotAdmitted(t *testing.T) {
	virtual(t, func(t *testing.T) {
		h := verifyingHost(WithResumption())
		p := &resumePeer{host: h}
		u := newFake()
		u.conn.open = func(context.Context) (network.Stream, error) { return unwelcome{u}, nil }
		_, err := p.openSide(u.conn)
		require.ErrorIs(t, err, network.ErrResourceLimitExceeded)
		require.NotNil(t, u.resetWith)
	})
}

// A stream that needs no connection any more takes none to be reported on, but another one where
// its own is gone.
func TestReportsOfWhatIsThroughTakeAnotherConnection(t *testing.T) {
	p := meetResuming(t)
	reports := p.reports()
	s, old := p.hostAcceptsResumable()
	p.told(reports, old)
	require.NoError(t, s.CloseWrite())
	old.WantsEOF()
	p.reportsTo(receivedBytes(old.Label, 1+1), endBytes(old.Label, 1))
	old.ClosesWrite()
	require.Empty(t, p.readsEnd(s, io.EOF))
	for p.told(reports, old).GetReceived() < 1+1 {
	}
	r := p.host.resumer.get(p.ID(), old.Label)
	WaitFor(t, "the end to be confirmed", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return r.finished()
	})
	require.NoError(t, p.Conns[0].CloseWithError(network.ConnErrorCode(network.StreamProtocolViolation)))
	told := p.told(reports, old)
	require.Equal(t, p.Conns[1], told.on)
	require.EqualValues(t, 1+1, told.GetReceived())
	require.Nil(t, told.End, "the end of writing was confirmed")
	require.Empty(t, p.Came(), "there is nothing to resume")
	require.NoError(t, s.Close())
}

// reporter is a peer that is told over streams of conn.
type reporter struct {
	*resumePeer
	conn *fakeConn
	told uint64

	mu   sync.Mutex // guards list
	list []*fakeStream
}

// opened are the streams that the peer is told on, once nothing else happens.
func (r *reporter) opened() []*fakeStream {
	synctest.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.list)
}

// sides is how many streams of reports there are, as far as the host knows.
func (r *reporter) sides() int {
	synctest.Wait()
	r.resumePeer.mu.Lock()
	defer r.resumePeer.mu.Unlock()
	return len(r.tell.on[r.conn])
}

// newReporter is a peer that is told over streams that take so many bytes; negative: any number.
func newReporter(room int) *reporter {
	h := verifyingHost(WithResumption())
	h.resumer = newResumer(h)
	r := &reporter{resumePeer: &resumePeer{host: h}, conn: newFake().conn}
	r.conn.open = func(context.Context) (network.Stream, error) {
		u := newFake()
		u.conn, u.room = r.conn, room
		r.mu.Lock()
		defer r.mu.Unlock()
		r.list = append(r.list, u)
		return u, nil
	}
	return r
}

// tells has the peer told of one stream more, soon or now.
func (r *reporter) tells(now bool) {
	r.told++
	r.report(hasReported(r.resumePeer, r.conn, r.told), now)
}

// reports is how many reports the peer was given.
func (r *reporter) reports() (n int) {
	for _, u := range r.opened() {
		in := bufio.NewReader(strings.NewReader(strings.TrimPrefix(u.taken(), MultistreamToken+Token(ResumeID))))
		for protodelim.UnmarshalFrom(in, new(pb.Progress)) == nil {
			n++
		}
	}
	return n
}

// What has time waits as long as ever behind a report, whatever that was made for.
func TestReportsWaitAnew(t *testing.T) {
	virtual(t, func(t *testing.T) {
		r := newReporter(-1)
		waits := func(from time.Time, n int) {
			t.Helper()
			time.Sleep(time.Until(from.Add(reportWithin - time.Nanosecond)))
			require.Equal(t, n-1, r.reports())
			time.Sleep(time.Nanosecond)
			require.Equal(t, n, r.reports())
		}
		r.tells(false)
		time.Sleep(reportWithin / 4)
		r.tells(true) // and the former beside it
		require.Equal(t, 2, r.reports())
		time.Sleep(reportWithin / 4)
		r.tells(false)
		waits(time.Now(), 3)

		begun := time.Now()
		r.tells(false)
		time.Sleep(reportWithin / 2)
		r.tells(false)
		time.Sleep(time.Until(begun.Add(reportWithin)))
		require.Equal(t, 5, r.reports())
		r.tells(false)
		waits(time.Now(), 6)
		time.Sleep(lingering)
	})
}

// A stream is reported on its own connection as long as that is there, even if there is a better one.
func TestReportsTakeTheConnectionOfTheStream(t *testing.T) {
	virtual(t, func(t *testing.T) {
		r := newReporter(-1)
		better := newFake().conn
		better.open = func(context.Context) (network.Stream, error) { return nil, errNoRoom }
		r.host.Host.(*bare).conns = []network.Conn{better, r.conn}
		r.tells(true)
		require.Equal(t, 1, r.reports())
		time.Sleep(lingering)
	})
}

// asked is a host of which it is known when it is asked for connections.
type asked struct {
	*bare
	conns func()
}

type askedNetwork struct {
	network.Network
	conns func()
}

func (a asked) Network() network.Network { return askedNetwork{a.bare.Network(), a.conns} }

func (n askedNetwork) ConnsToPeer(p peer.ID) []network.Conn {
	n.conns()
	return n.Network.ConnsToPeer(p)
}

// What becomes due while it is decided where the last is told is told behind that, and so is what follows.
func TestReportsThatAreDueMeanwhile(t *testing.T) {
	virtual(t, func(t *testing.T) {
		r, decided := newReporter(-1), make(chan struct{})
		r.host.Host = asked{r.host.Host.(*bare), func() { <-decided }}
		gone := newFake().conn
		gone.dies()
		r.report(hasReported(r.resumePeer, gone, 1), true)
		synctest.Wait()
		r.tells(true)
		require.Zero(t, r.reports())
		close(decided)
		require.Equal(t, 1, r.reports())
		r.tells(true)
		require.Equal(t, 2, r.reports())
		time.Sleep(lingering)
	})
}

// A peer of which there is nothing to know but what could not be told is forgotten.
func TestPeerIsForgottenWithWhatCannotBeTold(t *testing.T) {
	virtual(t, func(t *testing.T) {
		s, r := resumableOn(t, newFake())
		peers := func() int {
			synctest.Wait()
			s.host.resumer.mu.Lock()
			defer s.host.resumer.mu.Unlock()
			return len(s.host.resumer.peers)
		}
		r.of.report(r, false)
		require.NoError(t, s.Reset())
		s.Conn().(*fakeConn).dies()
		require.Equal(t, 1, peers())
		time.Sleep(reportWithin)
		require.Zero(t, peers())
	})
}

// What a stream of reports did not take is told on another one: on one that is open and free, if
// there is one.
func TestReportsThatFail(t *testing.T) {
	bubble(t, "and are told on a new stream", func(t *testing.T) {
		r := newReporter(0)
		r.tells(true)
		synctest.Wait()
		r.opened()[0].grants(0, network.ErrReset)
		synctest.Wait()
		require.NotNil(t, r.opened()[0].resetCode())
		time.Sleep(reportWithin)
		synctest.Wait()
		require.Len(t, r.opened(), 2)
		r.opened()[1].grants(-1, nil)
		require.Equal(t, 1, r.reports())
		time.Sleep(lingering)
		synctest.Wait()
		require.Zero(t, r.sides())
	})
	bubble(t, "and are told on one that is open", func(t *testing.T) {
		r := newReporter(0)
		r.tells(true)
		synctest.Wait()
		r.tells(true)
		synctest.Wait()
		require.Len(t, r.opened(), 2)
		r.opened()[1].grants(-1, nil)
		require.Equal(t, 1, r.reports())
		r.opened()[0].grants(0, network.ErrReset)
		synctest.Wait()
		time.Sleep(reportWithin)
		require.Equal(t, 2, r.reports())
		require.Len(t, r.opened(), 2)
		time.Sleep(lingering)
	})
}

// A stream of reports that is written to is not idle, however long that takes; and one that was not
// opened, since there was nothing to tell, ends all the same.
func TestStreamsOfReportsThatAreNotIdle(t *testing.T) {
	bubble(t, "written to", func(t *testing.T) {
		r := newReporter(-1)
		r.tells(true)
		require.Equal(t, 1, r.reports())
		r.opened()[0].grants(0, nil)
		time.Sleep(lingering - time.Second)
		r.tells(true)
		time.Sleep(2 * time.Second)
		require.Equal(t, 1, r.reports())
		require.False(t, r.opened()[0].isClosed)
		r.opened()[0].grants(-1, nil)
		require.Equal(t, 2, r.reports())
		time.Sleep(lingering)
		synctest.Wait()
		require.True(t, r.opened()[0].isClosed)
		require.Zero(t, r.sides())
	})
	bubble(t, "not opened", func(t *testing.T) {
		r := newReporter(-1)
		r.report(hasReported(r.resumePeer, r.conn, 0), true)
		synctest.Wait()
		require.Equal(t, 1, r.sides())
		time.Sleep(lingering)
		synctest.Wait()
		require.Zero(t, r.sides())
		require.Empty(t, r.opened())
	})
}

// The peer that agrees to be told is told on that stream.
func TestReportsThatAreWelcome(t *testing.T) {
	virtual(t, func(t *testing.T) {
		r := newReporter(-1)
		r.tells(true)
		require.Equal(t, 1, r.reports())
		r.opened()[0].feeds(MultistreamToken+Token(ResumeID), nil)
		synctest.Wait()
		require.Nil(t, r.opened()[0].resetCode())
		r.tells(true)
		require.Equal(t, 2, r.reports())
		require.Len(t, r.opened(), 1)
		time.Sleep(lingering)
	})
}

// Whether what was received is told soon or at once depends on how much it is since the last report.
func TestHowMuchIsReportedAtOnce(t *testing.T) {
	virtual(t, func(t *testing.T) {
		r := newReporter(-1)
		r.every = 1000
		s := hasReported(r.resumePeer, r.conn, 0)
		receives := func(n uint64, atOnce bool) {
			t.Helper()
			told := r.reports()
			s.s.recv.mu.Lock()
			s.incoming.base += n
			s.s.recv.progressed()
			s.s.recv.mu.Unlock()
			if !atOnce {
				time.Sleep(reportWithin - time.Nanosecond)
				require.Equal(t, told, r.reports())
				time.Sleep(time.Nanosecond)
			}
			require.Equal(t, told+1, r.reports())
		}
		receives(1, false)
		receives(999, false)
		receives(1000, true)
		receives(1, false)
		receives(999, false)
		receives(1001, true)
		time.Sleep(lingering)
	})
}

// No end is told as long as a Write is under way, or of a stream that has failed.
func TestEndsThatAreNotReported(t *testing.T) {
	virtual(t, func(t *testing.T) {
		old := newFake()
		s, r := resumableOn(t, old)
		s.recv.mu.Lock()
		r.incoming.base = 1 // so that there is something to tell
		s.recv.mu.Unlock()
		s.send.mu.Lock()
		s.send.cur = &deaf{fakeStream: old, deaf: math.MaxInt}
		s.send.mu.Unlock()
		end := func() *uint64 {
			m := new(pb.Progress)
			require.NoError(t, protodelim.UnmarshalFrom(bufio.NewReader(bytes.NewReader(r.progress())), m))
			return m.End
		}
		old.grants(1, nil)
		go func() { _, _ = s.Write([]byte("abc")) }()
		synctest.Wait()
		closed := make(chan error, 1)
		go func() { closed <- s.CloseWrite() }()
		synctest.Wait()
		require.Nil(t, end())
		require.Empty(t, closed)
		old.grants(-1, nil)
		require.NoError(t, <-closed)
		require.EqualValues(t, 3, *end())
		require.NoError(t, s.Reset())
		require.Nil(t, end())
	})
}

// Reports about streams that are not known are ignored, and one that names none is about that with
// the label 0.
func TestReportsWithoutAnOrigin(t *testing.T) {
	p := meeting{kind: resuming, hostHigher: true, opts: []Option{WithResumption()}}.meet(t)
	u := p.Opens(0, Prelude, resumableLabelBytes(0), MultistreamToken, EchoToken, "!")
	u.Wants(Prelude, MultistreamToken, EchoToken)
	s := p.accepted()
	p.reads(s, "!")
	p.writes(s, "?")
	p.reportsTo(receivedBytes(2, 1), endBytes(2, 1), Lengthy("\x10\x01"))
	WaitFor(t, "the host to know", func() bool {
		s.send.mu.Lock()
		defer s.send.mu.Unlock()
		return s.send.resumption.ring.confirmed == 1
	})
}
