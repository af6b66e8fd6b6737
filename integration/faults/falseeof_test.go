package faults

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	msmux "github.com/multiformats/go-multistream"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
	. "github.com/go-portage/portage/internal/rawpeer"
	"github.com/go-portage/portage/migrate"
)

// Yamux can report a clean EOF that is none when its session goes down: in place of the
// error, or before data that reading on yields. It does so now and then; here it always
// does.

// liar is yamux at its worst.
type liar struct {
	network.Multiplexer
	early atomic.Bool // an EOF comes before all else
	// midway: an EOF comes with the first data, and in place of errors that come with more of
	// them. Yamux says so when it cannot tell the other end of the room that a Read has made.
	midway bool
	told   atomic.Int64
	belied atomic.Int64 // EOFs behind which Reads brought more
	ended  atomic.Int64 // bytes written to streams that were closed for writing then
}

func newLiar() (*liar, libp2p.Option) {
	l := &liar{Multiplexer: patientYamux()}
	return l, libp2p.Muxer(yamux.ID, l)
}

// midwayLiar joins two hosts of which the yamux lies midway.
func midwayLiar(t *testing.T, w way) (*liar, *link) {
	liar, option := newLiar()
	liar.midway = true
	l := newNodes(t, w.from, w.to, option)
	for side := range l.nodes {
		l.wrap(t, side)
	}
	l.join(t)
	done.pair(w)
	return liar, l
}

func (l *liar) NewConn(c net.Conn, server bool, scope network.PeerScope) (network.MuxedConn, error) {
	m, err := l.Multiplexer.NewConn(c, server, scope)
	return lyingConn{m, l}, err
}

type lyingConn struct {
	network.MuxedConn
	liar *liar
}

func (c lyingConn) OpenStream(ctx context.Context) (network.MuxedStream, error) {
	return c.lying(c.MuxedConn.OpenStream(ctx))
}

func (c lyingConn) AcceptStream() (network.MuxedStream, error) {
	return c.lying(c.MuxedConn.AcceptStream())
}

func (c lyingConn) lying(s network.MuxedStream, err error) (network.MuxedStream, error) {
	if err != nil {
		return nil, err
	}
	return &lyingStream{MuxedStream: s, conn: c}, nil
}

type lyingStream struct {
	network.MuxedStream
	conn  lyingConn
	told  atomic.Bool  // the EOF that comes early, or midway
	eof   atomic.Bool  // the last Read said so
	wrote atomic.Int64 // how many bytes
}

func (s *lyingStream) Read(p []byte) (int, error) {
	if s.conn.liar.early.Load() && s.conn.IsClosed() && !s.told.Swap(true) {
		s.conn.liar.told.Add(1)
		return 0, io.EOF
	}
	n, err := s.MuxedStream.Read(p)
	switch liar := s.conn.liar; {
	case !s.conn.IsClosed():
	case liar.midway && n > 0 && (!s.told.Swap(true) || err != nil), !liar.midway && err != nil && err != io.EOF:
		liar.told.Add(1)
		err = io.EOF
	}
	if n > 0 && s.eof.Swap(err == io.EOF) {
		s.conn.liar.belied.Add(1)
	}
	return n, err
}

func (s *lyingStream) Write(p []byte) (int, error) {
	n, err := s.MuxedStream.Write(p)
	s.wrote.Add(int64(n))
	return n, err
}

func (s *lyingStream) CloseWrite() error {
	err := s.MuxedStream.CloseWrite()
	s.conn.liar.ended.Add(s.wrote.Load())
	return err
}

// awaitEnds waits until the old connection has brought the ends of streams that carried n
// bytes, more than all others together, after there were ended bytes already. What is sent
// behind a FIN arrives behind it.
func (l *link) awaitEnds(t *testing.T, liar *liar, ended, n int64) {
	t.Helper()
	WaitFor(t, "the FINs to be sent", func() bool { return liar.ended.Load() >= ended+n })
	for _, s := range l.raw(t, oldConn) {
		_ = s.Reset()
	}
}

// falseEOFWays have each transport with yamux as the old one.
var falseEOFWays = []way{{TCP, QUIC}, {WebSocket, QUIC}, {Relay, QUIC}}

// TestFalseEOF: S12. The old connection goes down under streams at every step from the
// ack on, and every Read on it says EOF, cleanly. Nobody is given an EOF before all of
// the data, and a stream of which all data had come goes on.
func TestFalseEOF(t *testing.T) {
	defer summary(t)()
	var told atomic.Int64
	t.Run("ways", func(t *testing.T) {
		for _, w := range falseEOFWays {
			t.Run(w.String(), func(t *testing.T) {
				t.Parallel()
				liar, option := newLiar()
				l := newNodes(t, w.from, w.to, option)
				done.pair(w)
				for side := range l.nodes {
					l.wrap(t, side)
				}
				for turn, f := range []fault{cut, closed, closedB, ended, endedBy} {
					for _, early := range []bool{false, true} {
						l.join(t)
						liar.early.Store(early)
						t.Run(fmt.Sprintf("%s, early %v", f.name, early), func(t *testing.T) {
							l.suffer(t, f, oldConn, turn, afterHold)
						})
						liar.early.Store(false)
						l.part(t)
						l.forget()
					}
				}
				told.Add(liar.told.Load())
			})
		}
	})
	require.NotZero(t, told.Load(), "no EOF was false")
	t.Logf("%d false EOFs", told.Load())
}

// afterHold are the steps from which on both ends keep an end of the old stream back.
var afterHold = everyStep[2:]

// TestFalseEOFBeforeTheRest: the old connection is closed when all of its data, and the
// FIN behind them, wait unread in the muxer. A Read in the midst of them brings an EOF;
// Reads behind that bring the rest. All of it is delivered, for the final size says how
// much there is (S12).
func TestFalseEOFBeforeTheRest(t *testing.T) {
	defer summary(t)()
	t.Run("ways", func(t *testing.T) {
		for _, w := range falseEOFWays {
			for initiator := range 2 {
				t.Run(fmt.Sprintf("%s, moved by the %s", w, endName(initiator)), func(t *testing.T) {
					t.Parallel()
					endsBeforeTheRest(t, w, initiator)
				})
			}
		}
	})
}

func endsBeforeTheRest(t *testing.T, w way, initiator int) {
	liar, l := midwayLiar(t, w)
	const size = 250_000 // fits yamux's first window
	ends := l.open(t, oldConn)
	sizes := [2]int{}
	sizes[initiator] = size
	talk := newTalk("much unread", ends, 1, sizes)
	talk.set(func() { talk.flows[initiator].readable = false })
	ended := liar.ended.Load()
	talk.allow(size)
	talk.start()
	WaitFor(t, "the Writes to end", func() bool { return talk.is(func() bool { return talk.flows[initiator].written == size }) })
	// The responder has acked, and does not read yet. The initiator ends the
	// old stream.
	responder := l.hold(t, point{ends[1-initiator], false, migrate.Acked})
	moved := l.moving(initiator, ends[initiator], newConn)
	await(t, responder.reached, "the ack")
	WaitFor(t, "the initiator to switch", func() bool { ok, _ := l.has(point{ends[initiator], true, migrate.SendSwitched}); return ok })
	l.awaitEnds(t, liar, ended, size)
	_ = l.conns[initiator][oldConn].Close()
	done.faults.Add(1)
	WaitFor(t, "the responder to notice", l.conns[1-initiator][oldConn].IsClosed)
	responder.release()
	talk.allowAll()
	talk.end(t)
	require.True(t, talk.survived(), "%v", talk)
	require.NoError(t, await(t, moved, "Migrate to return"))
	require.NotZero(t, liar.belied.Load(), "no EOF came before the rest")
	l.nothingLeft(t)
}

// TestFalseEOFOutsideMigration: what yamux says in the midst of the data when the other
// end has closed the connection, a stream that does not migrate need not believe, either.
// A raw stream beside it shows that yamux says it.
func TestFalseEOFOutsideMigration(t *testing.T) {
	defer summary(t)()
	t.Run("ways", func(t *testing.T) {
		for _, w := range falseEOFWays {
			t.Run(w.String(), func(t *testing.T) {
				t.Parallel()
				liar, l := midwayLiar(t, w)
				const size = 250_000
				sent := text(5, size)
				ended := liar.ended.Load()
				labelled, raw := l.open(t, oldConn), l.raw(t, oldConn)
				for _, s := range []network.Stream{labelled[opener], raw[opener]} {
					_, err := s.Write(sent)
					require.NoError(t, err)
					require.NoError(t, s.CloseWrite())
				}
				l.awaitEnds(t, liar, ended, 2*size)
				_ = l.conns[opener][oldConn].Close()
				done.faults.Add(1)
				WaitFor(t, "the acceptor to notice", l.conns[acceptor][oldConn].IsClosed)
				got, err := io.ReadAll(raw[acceptor])
				require.NoError(t, err)
				require.Less(t, len(got), size, "yamux did not lie to the raw stream")
				told := liar.told.Load()
				got, err = io.ReadAll(labelled[acceptor])
				if err == nil {
					require.Equal(t, size, len(got), "EOF came before the rest")
				}
				require.Greater(t, liar.told.Load(), told, "yamux did not lie to the labelled stream")
				require.True(t, bytes.HasPrefix(sent, got))
				done.bytes.Add(int64(len(got)))
				done.streams.Add(1)
				for _, s := range []network.Stream{labelled[0], labelled[1], raw[0], raw[1]} {
					_ = s.Reset()
				}
				l.nothingLeft(t)
			})
		}
	})
}

// TestFalseEOFFromDraftOnlyPeer: without a final size, an EOF of a connection that is
// closed is not believed (S8, S12), whichever side migrates, and whether it is read
// before the ack or after. Behind it there was more.
func TestFalseEOFFromDraftOnlyPeer(t *testing.T) {
	defer summary(t)()
	t.Run("ways", func(t *testing.T) {
		for _, w := range falseEOFWays {
			t.Run(w.String(), func(t *testing.T) {
				t.Parallel()
				for _, initiator := range []bool{true, false} {
					for _, acked := range []bool{false, true} {
						if !initiator && !acked {
							continue // a responder acks at once
						}
						for _, alive := range []bool{false, true} {
							name := fmt.Sprintf("initiator %v, acked %v, connection alive %v", initiator, acked, alive)
							t.Run(name, func(t *testing.T) { falseEOFFromDraft(t, w, initiator, acked, alive) })
						}
					}
				}
			})
		}
	})
}

// falseEOFFromDraft has a host migrate a stream with a draft-only peer. With alive, the
// peer's EOF is a true one, of a connection that lives: the stream goes on.
func falseEOFFromDraft(t *testing.T, w way, initiator, acked, alive bool) {
	liar, option := newLiar()
	l := newNodes(t, w.from, w.to, option)
	done.pair(w)
	l.wrap(t, opener)
	d := serveDraft(l.nodes[acceptor])
	l.join(t)
	s := l.newStream(t, oldConn)
	_, err := s.Write([]byte{'!'})
	require.NoError(t, err)
	old := await(t, d.opened, "the stream at the draft-only peer")
	label := s.Label()
	const said = "what came, "
	_, err = io.WriteString(old, said)
	require.NoError(t, err)
	got := make([]byte, len(said))
	_, err = io.ReadFull(s, got)
	require.NoError(t, err)
	require.Equal(t, said, string(got))

	type result struct {
		rest string
		err  error
	}
	read := make(chan result, 1)
	go func() { // is inside the old stream
		rest, err := io.ReadAll(s)
		read <- result{string(rest), err}
	}()
	end := func() {
		if alive {
			require.NoError(t, old.CloseWrite())
			return
		}
		done.faults.Add(1)
		_ = l.conns[acceptor][oldConn].Close()
		if w.from == Relay {
			_ = l.nodes[acceptor].Network().ClosePeer(l.relay.ID())
		}
		WaitFor(t, "the false EOF", func() bool { return liar.told.Load() > 0 && l.conns[opener][oldConn].IsClosed() })
	}
	var next network.Stream
	moved := make(<-chan error)
	if initiator {
		moved = l.moving(opener, s, newConn)
		next = await(t, d.asked, "Migrate")
		if !acked {
			end()
		}
		_, err = io.WriteString(next, AckDraft)
		require.NoError(t, err)
		if acked {
			WaitFor(t, "the host to have the ack", func() bool { ok, _ := l.has(point{s, true, migrate.Acked}); return ok })
			end()
		}
	} else {
		next, err = l.conns[acceptor][newConn].NewStream(t.Context())
		require.NoError(t, err)
		require.NoError(t, msmux.SelectProtoOrFail(migrate.ID, next))
		id := uint64(1 << 40)
		if l.nodes[acceptor].ID() > l.nodes[opener].ID() {
			id++ // L1
		}
		_, err = io.WriteString(next, MigrateDraftBytes(id, label))
		require.NoError(t, err)
		require.NoError(t, next.SetReadDeadline(time.Now().Add(Patience)))
		require.NoError(t, Expect(next, AckDraft))
		require.NoError(t, next.SetReadDeadline(time.Time{}))
		end()
	}
	_, _ = io.WriteString(next, "and more")
	_ = next.CloseWrite()
	r := await(t, read, "the Read")
	done.streams.Add(1)
	done.bytes.Add(int64(len(said) + len(r.rest)))
	if alive {
		require.NoError(t, r.err)
		require.Equal(t, "and more", r.rest)
	} else {
		require.ErrorIs(t, r.err, network.ErrReset, "behind %q", r.rest)
		require.Empty(t, r.rest)
		WaitFor(t, "Writes to fail", func() bool { _, err = s.Write([]byte{1}); return err != nil })
		require.ErrorIs(t, err, network.ErrReset)
		if initiator {
			require.ErrorIs(t, await(t, moved, "Migrate to return"), network.ErrReset)
		}
	}
	_ = s.Reset()
	_, _ = old.Reset(), next.Reset()
	l.nothingLeft(t)
}

// draft is a peer that has only the draft.
type draft struct {
	opened chan network.Stream // behind the negotiation and the first byte
	asked  chan network.Stream // behind Migrate
}

func serveDraft(node *Node) *draft {
	d := &draft{make(chan network.Stream, 1), make(chan network.Stream, 1)}
	app := msmux.NewMultistreamMuxer[protocol.ID]()
	app.AddHandler(testID, nil)
	node.SetStreamHandler(testID, func(u network.Stream) { _ = u.Reset() }) // advertises it
	node.SetStreamHandler(migrate.ID, func(u network.Stream) {
		m, err := ReadMessage(u)
		if err != nil {
			_ = u.Reset()
			return
		}
		if m.GetMigrate() != nil {
			d.asked <- u
			return
		}
		if _, _, err := app.Negotiate(u); err != nil {
			_ = u.Reset()
			return
		}
		if _, err := io.ReadFull(u, make([]byte, 1)); err == nil {
			d.opened <- u
		}
	})
	return d
}
