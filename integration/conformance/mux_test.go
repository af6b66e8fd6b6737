package conformance

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	mux "github.com/libp2p/go-libp2p/p2p/muxer/testsuite"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	. "github.com/go-portage/portage/internal/hosttest"
)

const muxID protocol.ID = "/conformance/mux/1.0.0"

// timed is what a machine that is busy does not pass, over raw streams neither.
var timed = map[string]string{
	"StreamOpenStress": "opens 50,000 streams, and gives them a fixed time",
	"StreamReset":      "expects a reset to have arrived after 50 ms",
}

// longByRace is what takes minutes under the race detector with all setups.
var longByRace = map[string]setup{
	"Stress1Conn100Stream100Msg10MB": {first: TCP, other: QUIC, moved: true},
}

// TestMuxer runs the suite for stream muxers on a muxer whose streams are those of a host.
func TestMuxer(t *testing.T) {
	// The suite leaves its listeners open.
	noLeaks(t, goleak.IgnoreAnyFunction("github.com/libp2p/go-libp2p/p2p/muxer/testsuite.GoServe.func1"))
	for _, s := range setups {
		t.Run(s.String(), func(t *testing.T) {
			t.Parallel()
			var migrations int64
			for _, name := range slices.Sorted(maps.Keys(mux.Subtests)) {
				subtest := mux.Subtests[name]
				_, name, _ = strings.Cut(name, ".Subtest")
				t.Run(name, func(t *testing.T) {
					if why, ok := timed[name]; ok && !*long {
						t.Skipf("%s: with -long only", why)
					}
					if only, ok := longByRace[name]; ok && raceEnabled && s != only && !*long {
						t.Skipf("takes long under the race detector: %s, and the others with -long only", only)
					}
					m := &muxer{t: t, setup: s, sessions: make(map[string]*session)}
					subtest(t, m)
					moved, later := m.close()
					t.Logf("%d migrations, %d attempts to be repeated", moved, later)
					migrations += moved
				})
			}
			if s.moved {
				t.Logf("%d migrations", migrations)
				if migrations == 0 {
					t.Error("no stream has migrated")
				}
			}
		})
	}
}

// muxer is a network.Multiplexer that carries nothing over the connections it is given: a
// connection stands for a pair of hosts, and its two ends for the two hosts.
type muxer struct {
	t *testing.T
	setup
	mu       sync.Mutex // guards all below
	sessions map[string]*session
}

// session is what runs over one connection.
type session struct {
	once   sync.Once
	pair   *pair
	ends   [2]*muxConn
	closed atomic.Bool // an end was closed

	opened atomic.Uint64
	shared sync.Map // number of a stream -> *sharedState
}

// sharedState is what the two ends of a stream share.
type sharedState struct {
	over    atomic.Bool   // an end was closed or reset
	arrived chan struct{} // closed when the acceptor has it
}

// NewConn implements network.Multiplexer.
func (m *muxer) NewConn(nc net.Conn, isServer bool, _ network.PeerScope) (network.MuxedConn, error) {
	side, client, server := 0, nc.LocalAddr(), nc.RemoteAddr()
	if nc.LocalAddr().String() > nc.RemoteAddr().String() {
		side, client, server = 1, server, client
	}
	key := client.String() + " " + server.String()
	m.mu.Lock()
	s := m.sessions[key]
	if s == nil {
		s = new(session)
		m.sessions[key] = s
	}
	m.mu.Unlock()
	s.once.Do(func() {
		s.pair = newPair(m.t, m.setup)
		for i := range s.ends {
			s.ends[i] = newMuxConn(s, i)
		}
	})
	if s.pair == nil {
		return nil, errors.New("no hosts")
	}
	c := s.ends[side]
	c.under <- nc
	return c, nil
}

// close closes all sessions, checks that nothing is left of them, and says how many
// migrations there were.
func (m *muxer) close() (moved, later int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.sessions {
		if s.pair == nil {
			continue // there were no hosts, upon which the test has failed
		}
		for _, c := range s.ends {
			_ = c.Close()
		}
		s.pair.await()
		s.pair.nothingLeft(muxID)
		moved += s.pair.mover.moved.Load()
		later += s.pair.mover.later.Load()
	}
	return moved, later
}

// muxConn is one end of a session.
type muxConn struct {
	session *session
	side    int
	under   chan net.Conn // has the connection that the suite gave
	arrived chan *muxStream
	once    sync.Once
	closed  chan struct{}

	mu      sync.Mutex // guards all below
	streams map[*muxStream]struct{}
}

func newMuxConn(s *session, side int) *muxConn {
	c := &muxConn{
		session: s,
		side:    side,
		under:   make(chan net.Conn, 1),
		arrived: make(chan *muxStream),
		closed:  make(chan struct{}),
		streams: make(map[*muxStream]struct{}),
	}
	h := s.pair.hosts[side]
	h.SetStreamHandler(muxID, c.accept)
	h.Network().Notify(&network.NotifyBundle{DisconnectedF: func(n network.Network, nc network.Conn) {
		if len(n.ConnsToPeer(nc.RemotePeer())) == 0 {
			go c.shut() // the other end was closed
		}
	}})
	return c
}

// OpenStream implements network.MuxedConn. The stream begins with its number, so that its
// two ends find each other.
func (c *muxConn) OpenStream(ctx context.Context) (network.MuxedStream, error) {
	u, err := c.session.pair.open(ctx, c.side, muxID)
	if err != nil {
		return nil, err
	}
	n := c.session.opened.Add(1)
	c.session.shared.Store(n, &sharedState{arrived: make(chan struct{})})
	if _, err := u.Write(binary.BigEndian.AppendUint64(nil, n)); err != nil {
		_ = u.Reset()
		return nil, err
	}
	return c.add(u, n), nil
}

func (c *muxConn) accept(u network.Stream) {
	number := make([]byte, 8)
	if _, err := io.ReadFull(u, number); err != nil {
		if !c.session.closed.Load() {
			c.session.pair.t.Errorf("accept a stream: %v", err)
		}
		_ = u.Reset()
		return
	}
	s := c.add(u, binary.BigEndian.Uint64(number))
	close(s.shared.arrived)
	select {
	case c.arrived <- s:
	case <-c.closed:
		_ = s.Reset()
	}
}

func (c *muxConn) add(u network.Stream, number uint64) *muxStream {
	shared, _ := c.session.shared.Load(number)
	s := &muxStream{Stream: u, conn: c, shared: shared.(*sharedState)}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.streams[s] = struct{}{}
	c.session.pair.move(c.side, u, s.await, func() bool { return s.shared.over.Load() || c.session.closed.Load() })
	return s
}

// AcceptStream implements network.MuxedConn.
func (c *muxConn) AcceptStream() (network.MuxedStream, error) {
	select {
	case s := <-c.arrived:
		return s, nil
	case <-c.closed:
		return nil, errors.New("connection is closed")
	}
}

// shut ends what is at this end, as a muxer does when its session ends.
func (c *muxConn) shut() {
	c.session.closed.Store(true)
	c.once.Do(func() {
		close(c.closed)
		c.mu.Lock()
		defer c.mu.Unlock()
		for s := range c.streams {
			_ = s.Stream.Reset()
		}
		select {
		case nc := <-c.under:
			_ = nc.Close()
		default: // this end was never asked for
		}
	})
}

// Close implements network.MuxedConn.
func (c *muxConn) Close() error {
	c.shut()
	pair := c.session.pair
	return pair.hosts[c.side].Network().ClosePeer(pair.hosts[1-c.side].ID())
}

// CloseWithError implements network.MuxedConn.
func (c *muxConn) CloseWithError(network.ConnErrorCode) error { return c.Close() }

// As implements network.MuxedConn.
func (c *muxConn) As(any) bool { return false }

// IsClosed implements network.MuxedConn.
func (c *muxConn) IsClosed() bool {
	select {
	case <-c.closed:
		return true
	default:
		return false
	}
}

// muxStream is a stream as a muxer has it. It differs from that of a host in one thing: it
// need not be closed where both directions have ended.
type muxStream struct {
	network.Stream
	conn   *muxConn
	shared *sharedState

	read, written atomic.Bool // the direction has ended
}

// await waits until the stream has both ends, and says whether it does. A Migrate that is
// seconds ahead of its stream, which happens where a slow machine carries a thousand, is
// denied (L4).
func (s *muxStream) await() bool {
	select {
	case <-s.shared.arrived:
		return true
	case <-s.conn.closed:
		return false
	}
}

func (s *muxStream) Read(p []byte) (int, error) {
	n, err := s.Stream.Read(p)
	if err == io.EOF {
		s.read.Store(true)
		s.ended()
	}
	return n, err
}

func (s *muxStream) CloseWrite() error {
	err := s.Stream.CloseWrite()
	s.written.Store(true)
	s.ended()
	if err != nil && closeOfCancelled(s.conn.session.pair.setup, err) {
		return nil
	}
	return err
}

func (s *muxStream) ended() {
	if s.read.Load() && s.written.Load() {
		_ = s.Close()
	}
}

func (s *muxStream) forget() {
	s.shared.over.Store(true)
	s.conn.mu.Lock()
	defer s.conn.mu.Unlock()
	delete(s.conn.streams, s)
}

func (s *muxStream) Close() error {
	s.forget()
	return s.Stream.Close()
}

func (s *muxStream) Reset() error {
	s.forget()
	return s.Stream.Reset()
}

// TestYamuxBacklog is what raw streams of yamux do: one that is reset before the other end
// has accepted it gives its place among those that may wait for that to the next, though it
// waits there still. So where many are given up at once, as attempts to migrate from both
// ends are (M1), streams that have nothing to do with it can be reset as they open.
func TestYamuxBacklog(t *testing.T) {
	near, far := net.Pipe()
	scope := &network.NullScope{}
	opener, err := yamux.DefaultTransport.NewConn(near, false, scope)
	require.NoError(t, err)
	defer opener.Close()
	acceptor, err := yamux.DefaultTransport.NewConn(far, true, scope)
	require.NoError(t, err)
	defer acceptor.Close()

	for range yamux.DefaultTransport.AcceptBacklog {
		s, err := opener.OpenStream(t.Context())
		require.NoError(t, err)
		require.NoError(t, s.Reset())
	}
	s, err := opener.OpenStream(t.Context())
	require.NoError(t, err, "nothing waits at this end")
	_, err = s.Read(make([]byte, 1))
	require.ErrorIs(t, err, network.ErrReset, "the other end has no room")

	for range yamux.DefaultTransport.AcceptBacklog {
		_, err := acceptor.AcceptStream()
		require.NoError(t, err)
	}
	s, err = opener.OpenStream(t.Context())
	require.NoError(t, err)
	accepted, err := acceptor.AcceptStream()
	require.NoError(t, err)
	_, err = accepted.Write([]byte{1})
	require.NoError(t, err)
	n, err := s.Read(make([]byte, 1))
	require.NoError(t, err)
	require.Equal(t, 1, n)
}
