package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-yamux/v5"
	ma "github.com/multiformats/go-multiaddr"
	msmux "github.com/multiformats/go-multistream"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/rawpeer"
)

// fakeStream is an underlying stream in memory. The test decides what its Reads return
// and how much its Writes take. Reads and Writes that have nothing to return block, as
// those of a real stream, until a deadline, a close or a reset.
type fakeStream struct {
	network.Stream // nil: what no test expects to be called panics
	conn           *fakeConn
	scope          *fakeScope

	mu      sync.Mutex
	changed sync.Cond

	in      []fakeRead // what Reads will return, in order
	after   error      // and what they return behind all that, in place of blocking
	lies    bool       // an EOF that comes with data is none
	reading int        // how many are inside Read
	readBy  [2]deadline

	out     []byte // all that was taken
	writes  []int  // how much of each Write was taken
	room    int    // how many bytes Writes may still take; negative: any number
	breaks  error  // what Writes return once room is used up, in place of blocking
	writing int    // how many are inside Write

	proto                             protocol.ID
	writeClosed, readClosed, isClosed bool
	resetWith                         *network.StreamErrorCode
	dead                              chan struct{} // closing for writing takes until it is closed, as on a dead path of yamux
	deadlines                         []time.Time   // of reading, as they were set
}

// fakeRead is what one Read returns; where its data do not fit, so do several.
type fakeRead struct {
	data string
	err  error
}

// deadline is one of a fake stream; its index in readBy is 0 for reading.
type deadline struct {
	passed bool
	timer  *time.Timer
}

func newFake() *fakeStream {
	f := &fakeStream{conn: new(fakeConn), scope: new(fakeScope), room: -1}
	f.changed.L = &f.mu
	return f
}

// feeds adds what Reads return. err, if any, comes with the last byte of data.
func (f *fakeStream) feeds(data string, err error) *fakeStream {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.in = append(f.in, fakeRead{data, err})
	f.changed.Broadcast()
	return f
}

// ends makes Reads return err behind what there is to read, for good.
func (f *fakeStream) ends(err error) { _ = f.set(func() { f.after = err }) }

// grants lets Writes take n bytes more, and then fail with err, or block where that is
// nil.
func (f *fakeStream) grants(n int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.room, f.breaks = n, err
	f.changed.Broadcast()
}

func (f *fakeStream) Read(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reading++
	f.changed.Broadcast()
	defer func() {
		f.reading--
		f.changed.Broadcast()
	}()
	for {
		switch {
		case f.resetWith != nil:
			return 0, network.ErrReset
		case f.readClosed:
			return 0, errors.New("fake: closed for reading")
		case f.readBy[0].passed:
			return 0, os.ErrDeadlineExceeded
		case len(f.in) > 0:
			r := &f.in[0]
			n := copy(p, r.data)
			if n < len(r.data) {
				r.data = r.data[n:]
				return n, nil
			}
			err := r.err
			if err == io.EOF && n > 0 && !f.lies {
				r.data = "" // a true one comes again
			} else {
				f.in = f.in[1:]
			}
			return n, err
		case f.after != nil:
			return 0, f.after
		}
		f.changed.Wait()
	}
}

func (f *fakeStream) Write(p []byte) (n int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.writing++
	f.changed.Broadcast()
	defer func() {
		f.writing--
		f.writes = append(f.writes, n)
		f.changed.Broadcast()
	}()
	for {
		switch {
		case f.resetWith != nil:
			return n, network.ErrReset
		case f.writeClosed:
			return n, errors.New("fake: closed for writing")
		case f.readBy[1].passed:
			return n, os.ErrDeadlineExceeded
		}
		k := len(p) - n
		if f.room >= 0 {
			k = min(k, f.room)
			f.room -= k
		}
		f.out = append(f.out, p[n:n+k]...)
		n += k
		switch {
		case n == len(p):
			return n, nil
		case f.breaks != nil:
			return n, f.breaks
		}
		f.changed.Wait()
	}
}

func (f *fakeStream) set(change func()) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
	f.changed.Broadcast()
	return nil
}

func (f *fakeStream) CloseWrite() error {
	if f.dead != nil {
		<-f.dead
	}
	return f.set(func() { f.writeClosed = true })
}
func (f *fakeStream) CloseRead() error { return f.set(func() { f.readClosed = true }) }
func (f *fakeStream) Close() error {
	if f.dead != nil {
		<-f.dead
	}
	return f.set(func() { f.writeClosed, f.readClosed, f.isClosed = true, true, true })
}
func (f *fakeStream) Reset() error { return f.ResetWithError(network.StreamNoError) }
func (f *fakeStream) ResetWithError(code network.StreamErrorCode) error {
	return f.set(func() {
		if f.resetWith == nil {
			f.resetWith = &code
		}
	})
}

func (f *fakeStream) SetDeadline(t time.Time) error {
	_ = f.SetReadDeadline(t)
	return f.SetWriteDeadline(t)
}

func (f *fakeStream) SetReadDeadline(t time.Time) error {
	return f.set(func() {
		f.deadlines = append(f.deadlines, t)
		f.arm(0, t)
	})
}

func (f *fakeStream) SetWriteDeadline(t time.Time) error { return f.set(func() { f.arm(1, t) }) }

func (f *fakeStream) arm(i int, t time.Time) {
	d := &f.readBy[i]
	if d.timer != nil {
		d.timer.Stop()
	}
	d.passed = false
	switch {
	case t.IsZero():
	case time.Until(t) <= 0:
		d.passed = true
	default:
		d.timer = time.AfterFunc(time.Until(t), func() { _ = f.set(func() { d.passed = true }) })
	}
}

func (f *fakeStream) SetProtocol(id protocol.ID) error { return f.set(func() { f.proto = id }) }
func (f *fakeStream) Protocol() protocol.ID            { return f.proto }
func (f *fakeStream) Conn() network.Conn               { return f.conn }
func (f *fakeStream) Scope() network.StreamScope       { return f.scope }
func (f *fakeStream) ID() string                       { return "fake" }
func (f *fakeStream) Stat() (s network.Stats)          { return s }
func (f *fakeStream) sees(cond func() bool) func() bool {
	return func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return cond()
	}
}

// wait waits until cond holds. cond is called with the stream's lock held.
func (f *fakeStream) wait(cond func() bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for !cond() {
		f.changed.Wait()
	}
}

// awaitReader waits until somebody is inside Read with nothing to read.
func (f *fakeStream) awaitReader() {
	f.wait(func() bool { return f.reading > 0 && len(f.in) == 0 })
}

// awaitWriter waits until somebody is blocked in Write.
func (f *fakeStream) awaitWriter() {
	f.wait(func() bool { return f.writing > 0 && f.room == 0 })
}

func (f *fakeStream) taken() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return string(f.out)
}

// fakeConn is the connection of a fake stream.
type fakeConn struct {
	network.Conn
	mu     sync.Mutex
	closed bool
	remote peer.ID
	dir    network.Direction
	open   func(context.Context) (network.Stream, error) // what NewStream does
	muxer  *yamux.Session                                // what As finds; nil: nothing
}

func (c *fakeConn) NewStream(ctx context.Context) (network.Stream, error) {
	c.mu.Lock()
	open := c.open
	c.mu.Unlock()
	return open(ctx)
}

func (c *fakeConn) IsClosed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

func (c *fakeConn) dies() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
}

// As implements network.Conn.
func (c *fakeConn) As(target any) bool {
	session, ok := target.(**yamux.Session)
	if ok = ok && c.muxer != nil; ok {
		*session = c.muxer
	}
	return ok
}

func (c *fakeConn) Stat() network.ConnStats {
	return network.ConnStats{Stats: network.Stats{Direction: c.dir}}
}
func (c *fakeConn) ConnState() network.ConnectionState { return network.ConnectionState{} }
func (c *fakeConn) RemotePeer() peer.ID                { return c.remote }
func (c *fakeConn) RemoteMultiaddr() ma.Multiaddr {
	return ma.StringCast("/ip4/192.0.2.1/tcp/1")
}

// fakeScope is the resource scope of a fake stream. It refuses what exceeds its limit.
type fakeScope struct {
	network.StreamScope
	mu      sync.Mutex
	limit   int // 0: none
	closed  bool
	memory  int
	peak    int
	asked   int   // how often memory was reserved
	prio    uint8 // of the last reservation
	service string
	refuses error // what SetService returns
}

func (c *fakeScope) ReserveMemory(size int, prio uint8) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.prio = prio
	c.asked++
	if c.closed {
		return fmt.Errorf("fake: %w", network.ErrResourceScopeClosed)
	}
	if c.limit > 0 && c.memory+size > c.limit {
		return network.ErrResourceLimitExceeded
	}
	c.memory += size
	c.peak = max(c.peak, c.memory)
	return nil
}

func (c *fakeScope) reservations() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.asked
}

func (c *fakeScope) ReleaseMemory(size int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.memory -= size
	if c.memory < 0 {
		panic("released more than was reserved")
	}
}

func (c *fakeScope) Stat() network.ScopeStat {
	c.mu.Lock()
	defer c.mu.Unlock()
	return network.ScopeStat{Memory: int64(c.memory)}
}

func (c *fakeScope) SetService(service string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.refuses == nil {
		c.service = service
	}
	return c.refuses
}

func (c *fakeScope) reserved() int { return int(c.Stat().Memory) }

func (c *fakeScope) limitTo(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.limit = n
}

// lonelyHost returns a wrapped host that listens nowhere, for streams that a test makes
// up.
func lonelyHost(t testing.TB, opts ...Option) *Host {
	t.Helper()
	h, err := libp2p.New(libp2p.NoListenAddrs, libp2p.DisableMetrics())
	require.NoError(t, err)
	mh, err := Wrap(h, opts...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = mh.Close() })
	return mh
}

var _ io.ReadWriteCloser = (*fakeStream)(nil)

// bareHost returns a wrapped host that has an ID and a mux, and knows of its peers what it
// is told: for streams that a test makes up, and in a bubble with a clock of its own.
func bareHost(self peer.ID, speaks func(protocol.ID) bool, opts ...Option) *Host {
	cfg := defaults()
	for _, opt := range opts {
		if err := opt(&cfg); err != nil {
			panic(err)
		}
	}
	b := &bare{id: self, mux: msmux.NewMultistreamMuxer[protocol.ID](), store: bareStore{speaks: speaks}}
	b.mux.AddHandler(ID, nil)
	b.mux.AddHandler(FinalSizeID, func(_ protocol.ID, s io.ReadWriteCloser) error { return s.(network.Stream).Reset() })
	h := &Host{Host: b, cfg: cfg, log: cfg.log, labels: newLabels(self)}
	h.ctx, h.cancel = context.WithCancel(context.Background())
	return h
}

// acceptedOn has h accept a labelled stream on the fake old.
func acceptedOn(t *testing.T, h *Host, old *fakeStream) *Stream {
	t.Helper()
	return acceptedWith(t, h, old, LabelBytes)
}

// acceptedWith is acceptedOn with another Label.
func acceptedWith(t *testing.T, h *Host, old *fakeStream, labelBytes func(id uint64) string) *Stream {
	t.Helper()
	old.conn.remote = playerLow
	accepted := make(chan network.Stream, 1)
	h.SetStreamHandler(echoID, func(s network.Stream) { accepted <- s })
	label := 600 + h.labels.parity(playerLow, false)
	old.feeds(Prelude+labelBytes(label)+MultistreamToken+EchoToken, nil)
	h.handleStream(old)
	return (<-accepted).(*Stream)
}

// verifyingHost is a bare host whose peers have the verified handover.
func verifyingHost(opts ...Option) *Host {
	return bareHost(playHost, func(protocol.ID) bool { return true }, opts...)
}

// bareNetwork has a resource manager that refuses nothing, and the same connections to every peer.
type bareNetwork struct {
	network.Network
	conns []network.Conn
}

func (n bareNetwork) ConnsToPeer(peer.ID) []network.Conn { return slices.Clone(n.conns) }

func (bareNetwork) ResourceManager() network.ResourceManager { return new(network.NullResourceManager) }

type bare struct {
	host.Host
	id    peer.ID
	mux   *msmux.MultistreamMuxer[protocol.ID]
	store bareStore
	conns []network.Conn
}

func (b *bare) Network() network.Network       { return bareNetwork{conns: b.conns} }
func (b *bare) ID() peer.ID                    { return b.id }
func (b *bare) Mux() protocol.Switch           { return b.mux }
func (b *bare) Peerstore() peerstore.Peerstore { return b.store }
func (b *bare) SetStreamHandler(id protocol.ID, handle network.StreamHandler) {
	b.mux.AddHandler(id, func(_ protocol.ID, s io.ReadWriteCloser) error {
		handle(s.(network.Stream))
		return nil
	})
}

type bareStore struct {
	peerstore.Peerstore
	speaks func(protocol.ID) bool
}

func (s bareStore) AddProtocols(peer.ID, ...protocol.ID) error { return nil }
func (s bareStore) SupportsProtocols(_ peer.ID, ids ...protocol.ID) (spoken []protocol.ID, _ error) {
	for _, id := range ids {
		if s.speaks(id) {
			spoken = append(spoken, id)
		}
	}
	return spoken, nil
}
