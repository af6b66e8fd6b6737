package migrate

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	. "github.com/go-portage/portage/internal/hosttest"
)

// A raw peer is a plain libp2p host, with two connections to a host under test, that
// knows nothing of this package: a test speaks the protocol for it, byte by byte.
//
//	p := meet(t, draftOnly)
//	s, old := p.hostOpens()                // the host opens a labelled stream
//	moved := p.hostMigrates(s)             // and migrates it
//	next := p.arrives()
//	id := next.wantsMigrate(old.label)
//	next.sends(tMultistream, tMigration, ackDraft)
//	old.wantsEOF()
//
// Nothing of the package's encoding is used for what the raw peer sends.

// The tokens of multistream-select, as they are on the wire.
const (
	tMultistream = "\x13/multistream/1.0.0\n"
	tMigration   = "\x19/libp2p/stream-migration\n"
	tEcho        = "\x11/test/echo/1.0.0\n"
	tNA          = "\x03na\n"
)

// tok is any other token.
func tok(id protocol.ID) string { return lengthy(string(id) + "\n") }

// The answers to Migrate, each with its length before it.
const (
	ackDraft    = "\x02\x1a\x00"
	ackVerified = "\x05\x1a\x03\xa0\x06\x01"
	ackDenied   = "\x04\x1a\x02\x08\x01"
)

func uvarint(x uint64) string { return string(binary.AppendUvarint(nil, x)) }

// lengthy puts the length of s before s, as every message and every member has it.
func lengthy(s string) string { return uvarint(uint64(len(s))) + s }

func labelBytes(id uint64) string {
	return lengthy("\x0a" + lengthy("\x08"+uvarint(id)))
}

func migrateDraftBytes(id, from uint64) string {
	return lengthy("\x12" + lengthy("\x08"+uvarint(id)+"\x10"+uvarint(from)))
}

func migrateBytes(id, from uint64) string {
	return lengthy("\x12" + lengthy("\x08"+uvarint(id)+"\x10"+uvarint(from)+"\xa0\x06\x01"))
}

func finalSizeBytes(size uint64) string {
	return lengthy("\xa2\x06" + lengthy("\x08"+uvarint(size)))
}

// peerKind is what a raw peer advertises through identify.
type peerKind []protocol.ID

var (
	draftOnly = peerKind{ID, echoID}
	verified  = peerKind{ID, FinalSizeID, echoID}
	resuming  = peerKind{ID, FinalSizeID, ResumeID, echoID}
)

type rawPeer struct {
	*Node
	t     testing.TB
	host  *Host           // under test
	conns [2]network.Conn // the raw peer's ends: the old connection, and the new one
	ends  [2]network.Conn // the host's ends of the same
	came  chan *rawStream // what the host opens
	app   chan *Stream    // what the host accepts

	reports chan *rawStream // what the host opens for what it tells about streams that may be resumed
	label   uint64          // the last label that the raw peer gave
}

// meeting is how a raw peer and a host come together, where it matters.
type meeting struct {
	kind       peerKind
	hostHigher bool          // the host has the higher peer ID; by default the lower
	first      Transport     // of the old connection; default: TCP
	second     Transport     // of the new one; default: QUIC
	opts       []Option      // of the host's Wrap
	rawOpts    libp2p.Option // of the raw peer
	hostOpts   libp2p.Option // of the host under test
}

func meet(t testing.TB, kind peerKind, opts ...Option) *rawPeer {
	t.Helper()
	return meeting{kind: kind, opts: opts}.meet(t)
}

// onBothTransports runs the test with the old connection on TCP and the new one on
// QUIC, and the other way about.
func onBothTransports(t *testing.T, test func(t *testing.T, m meeting)) {
	for _, tr := range [][2]Transport{{TCP, QUIC}, {QUIC, TCP}} {
		t.Run(fmt.Sprintf("%s to %s", tr[0], tr[1]), func(t *testing.T) {
			test(t, meeting{first: tr[0], second: tr[1]})
		})
	}
}

func (m meeting) meet(t testing.TB) *rawPeer {
	t.Helper()
	if m.first == "" {
		m.first, m.second = TCP, QUIC
	}
	hostKey, rawKey := orderedKeys(t)
	if m.hostHigher {
		hostKey, rawKey = rawKey, hostKey
	}
	node := func(key crypto.PrivKey, opt libp2p.Option) *Node {
		opts := []libp2p.Option{libp2p.Identity(key)}
		if opt != nil {
			opts = append(opts, opt)
		}
		return New(t, []Transport{m.first, m.second}, opts...)
	}
	p := &rawPeer{
		t: t, Node: node(rawKey, m.rawOpts),
		came: make(chan *rawStream, 64), reports: make(chan *rawStream, 64), app: make(chan *Stream, 64), label: 1 << 33,
	}
	if !m.hostHigher {
		p.label++ // L1: the higher one's labels are odd
	}
	for _, id := range m.kind {
		p.SetStreamHandler(id, func(network.Stream) { t.Errorf("the mux of the raw peer was asked for %s", id) })
	}
	hostNode := node(hostKey, m.hostOpts)
	log := zap.NewNop()
	if testing.Verbose() {
		log = zaptest.NewLogger(t).Named("host")
	}
	var err error
	p.host, err = Wrap(hostNode, append([]Option{WithLogger(log)}, m.opts...)...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = p.host.Close() })
	p.host.SetStreamHandler(echoID, func(s network.Stream) { p.app <- s.(*Stream) })
	p.conns[0], p.conns[1] = Join(t, p.Node, hostNode, m.first, m.second)
	for i, c := range p.conns {
		p.ends[i] = Far(t, hostNode, c)
	}
	p.host.cfg.selector = func(context.Context, peer.ID) network.Conn { return p.ends[0] }
	// Identify is done; from here on the network's streams are the test's.
	p.Network().SetStreamHandler(p.deliver)
	return p
}

// orderedKeys returns two keys, that of the lower peer ID first.
func orderedKeys(t testing.TB) (lower, higher crypto.PrivKey) {
	t.Helper()
	ids := make(map[peer.ID]crypto.PrivKey)
	var order []peer.ID
	for range 2 {
		key, _, err := crypto.GenerateEd25519Key(rand.Reader)
		require.NoError(t, err)
		id, err := peer.IDFromPrivateKey(key)
		require.NoError(t, err)
		ids[id] = key
		order = append(order, id)
	}
	slices.Sort(order)
	return ids[order[0]], ids[order[1]]
}

// deliver hands the test what the host opens, unread; identify's streams are answered
// as ever.
func (p *rawPeer) deliver(s network.Stream) {
	r := bufio.NewReader(s)
	first, err := r.Peek(len(tMultistream) + 1)
	if err == nil {
		first, err = r.Peek(len(first) + int(first[len(first)-1]))
	}
	switch {
	case err != nil:
		_ = s.Reset()
	case strings.Contains(string(first), "/ipfs/id/"):
		whole := &peeked{s, r}
		if id, handle, err := p.Mux().Negotiate(whole); err == nil && s.SetProtocol(id) == nil {
			_ = handle(id, whole)
		}
	case strings.Contains(string(first), string(ResumeID)):
		p.reports <- p.wire(s, r)
	default:
		p.came <- p.wire(s, r)
	}
}

type peeked struct {
	network.Stream
	r *bufio.Reader
}

func (s *peeked) Read(b []byte) (int, error) { return s.r.Read(b) }

// fresh returns a label that the raw peer may give (L1).
func (p *rawPeer) fresh() uint64 {
	p.label += 2
	return p.label
}

// rawPatience is how long a test waits for what has to happen.
const rawPatience = 20 * time.Second

// arrives returns the next stream that the host opens.
func (p *rawPeer) arrives() *rawStream {
	p.t.Helper()
	return take(p.t, p.came, "a stream from the host")
}

func take[T any](t testing.TB, ch <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(rawPatience):
		t.Fatalf("waited in vain for %s", what)
		panic("unreachable")
	}
}

// opens opens a stream on connection i and sends parts over it.
func (p *rawPeer) opens(i int, parts ...string) *rawStream {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), rawPatience)
	defer cancel()
	s, err := p.conns[i].NewStream(network.WithAllowLimitedConn(ctx, "test"))
	require.NoError(p.t, err)
	u := p.wire(s, bufio.NewReader(s))
	u.sends(parts...)
	return u
}

// hostBegins has the host open a labelled stream of one of ids on connection i, and does not
// wait for the peer but where the protocol has to be negotiated. NewStream would go elsewhere
// where the connection is slow to open one, as it can be on a busy machine.
func (p *rawPeer) hostBegins(i int, ids ...protocol.ID) (*Stream, error) {
	ctx, cancel := context.WithTimeout(context.Background(), rawPatience)
	defer cancel()
	u, err := p.ends[i].NewStream(ctx)
	if err != nil {
		return nil, err
	}
	s, err := p.host.begin(ctx, u, ids, false)
	if err != nil {
		_ = u.ResetWithError(network.StreamProtocolNegotiationFailed)
		return nil, err
	}
	return s.(*Stream), nil
}

// hostOpens has the host open a labelled stream on the old connection, and accepts it.
// A first byte has been exchanged each way.
func (p *rawPeer) hostOpens() (*Stream, *rawStream) {
	p.t.Helper()
	s, err := p.hostBegins(0, echoID)
	require.NoError(p.t, err)
	p.writes(s, "!")
	u := p.arrives()
	u.label = s.Label()
	u.wants(tMultistream, tMigration, labelBytes(u.label), tMultistream, tEcho, "!")
	u.sends(tMultistream, tMigration, tMultistream, tEcho, "?")
	p.reads(s, "?")
	return s, u
}

// hostAccepts opens a labelled stream to the host on the old connection, and returns
// what the host's handler got.
func (p *rawPeer) hostAccepts() (*Stream, *rawStream) {
	p.t.Helper()
	label := p.fresh()
	u := p.opens(0, tMultistream, tMigration, labelBytes(label), tMultistream, tEcho, "!")
	u.label = label
	u.wants(tMultistream, tMigration, tMultistream, tEcho)
	s := p.accepted()
	require.Equal(p.t, label, s.Label())
	p.reads(s, "!")
	p.writes(s, "?")
	u.wants("?")
	return s, u
}

// accepted returns what the host's handler got.
func (p *rawPeer) accepted() *Stream {
	p.t.Helper()
	return take(p.t, p.app, "the host's handler to be called")
}

// either runs the test with a stream that the host opened, and with one that the raw
// peer opened: who opened a stream has no say in who may migrate it.
func (m meeting) either(t *testing.T, test func(t *testing.T, p *rawPeer, s *Stream, old *rawStream)) {
	t.Run("host opened", func(t *testing.T) {
		p := m.meet(t)
		s, old := p.hostOpens()
		test(t, p, s, old)
	})
	t.Run("peer opened", func(t *testing.T) {
		p := m.meet(t)
		s, old := p.hostAccepts()
		test(t, p, s, old)
	})
}

// outcome is that of a call of Migrate.
type outcome struct {
	t    testing.TB
	done chan error
}

// hostMigrates has the host migrate s to the new connection.
func (p *rawPeer) hostMigrates(s *Stream) *outcome {
	p.t.Helper()
	return p.hostMigratesTo(s, 1)
}

func (p *rawPeer) hostMigratesTo(s *Stream, i int) *outcome {
	o := &outcome{p.t, make(chan error, 1)}
	go func() { o.done <- p.host.Migrate(context.Background(), s, p.ends[i]) }()
	return o
}

func (o *outcome) is(target error) {
	o.t.Helper()
	err := take(o.t, o.done, "Migrate to return")
	if target == nil {
		require.NoError(o.t, err)
	} else {
		require.ErrorIs(o.t, err, target)
	}
}

// Of the host's end of a stream:

// writes has the application write data.
func (p *rawPeer) writes(s *Stream, data string) {
	p.t.Helper()
	inTime(p.t, fmt.Sprintf("the application to write %q", data), func() error {
		n, err := s.Write([]byte(data))
		if err == nil && n != len(data) {
			err = io.ErrShortWrite
		}
		return err
	})
}

// reads has the application read data.
func (p *rawPeer) reads(s *Stream, data string) {
	p.t.Helper()
	var got string
	inTime(p.t, fmt.Sprintf("the application to read %q", data), func() error {
		b := make([]byte, len(data))
		n, err := io.ReadFull(s, b)
		got = string(b[:n])
		return err
	})
	require.Equal(p.t, data, got, "what the application read")
}

// readsEnd has the application read on, and expects it to end with err: io.EOF, or
// network.ErrReset. It returns what came before.
func (p *rawPeer) readsEnd(s *Stream, err error) string {
	p.t.Helper()
	var got strings.Builder
	inTime(p.t, fmt.Sprintf("the application to read %v", err), func() error {
		b := make([]byte, 4096)
		for {
			n, e := s.Read(b)
			got.Write(b[:n])
			if e == nil {
				continue
			}
			if !errors.Is(e, err) {
				return fmt.Errorf("Read ended with %w", e)
			}
			if e != io.EOF && errors.Is(e, io.EOF) {
				return fmt.Errorf("an error that passes for a clean end with errors.Is: %w", e)
			}
			return nil
		}
	})
	return got.String()
}

// failed waits until the application's Writes fail with a reset.
func (p *rawPeer) failed(s *Stream) {
	p.t.Helper()
	WaitFor(p.t, "the application's Writes to fail", func() bool {
		_, err := s.Write([]byte{'x'})
		if err != nil {
			require.ErrorIs(p.t, err, network.ErrReset)
		}
		return err != nil
	})
}

func inTime(t testing.TB, what string, f func() error) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- f() }()
	require.NoError(t, take(t, done, what), what)
}

// talk checks that data flow between s and u, both ways.
func (p *rawPeer) talk(s *Stream, u *rawStream) {
	p.t.Helper()
	p.writes(s, "ping")
	u.wants("ping")
	u.sends("pong")
	p.reads(s, "pong")
}

// nothingLeft checks L5 on the host: no label is held, and no stream of the test.
func (p *rawPeer) nothingLeft() {
	p.t.Helper()
	WaitFor(p.t, "the host to forget its labels", func() bool {
		p.host.labels.mu.Lock()
		defer p.host.labels.mu.Unlock()
		return len(p.host.labels.peers) == 0
	})
	WaitFor(p.t, "the host to watch no path", func() bool {
		p.host.flows.mu.Lock()
		defer p.host.flows.mu.Unlock()
		return len(p.host.flows.of) == 0
	})
	for _, c := range p.ends {
		WaitFor(p.t, "the host to free its streams", func() bool {
			return !slices.ContainsFunc(c.GetStreams(), func(s network.Stream) bool {
				return !strings.HasPrefix(string(s.Protocol()), "/ipfs/")
			})
		})
	}
}

// labelled returns the host's labels with the raw peer.
func (p *rawPeer) labelled() []uint64 {
	p.host.labels.mu.Lock()
	defer p.host.labels.mu.Unlock()
	var all []uint64
	if pl := p.host.labels.peers[p.ID()]; pl != nil {
		for label := range pl.streams {
			all = append(all, label)
		}
	}
	slices.Sort(all)
	return all
}

// rawStream is the raw peer's end of one underlying stream.
type rawStream struct {
	network.Stream
	t     testing.TB
	r     *bufio.Reader
	label uint64 // what the stream was labelled with, where it was
}

func (p *rawPeer) wire(s network.Stream, r *bufio.Reader) *rawStream {
	// Nothing here takes that long; where it does, the test fails.
	_ = s.SetDeadline(time.Now().Add(rawPatience))
	return &rawStream{Stream: s, t: p.t, r: r}
}

// sends sends parts in one Write.
func (u *rawStream) sends(parts ...string) {
	u.t.Helper()
	_, err := u.Write([]byte(strings.Join(parts, "")))
	require.NoError(u.t, err, "send %q", parts)
}

// drips sends parts byte by byte.
func (u *rawStream) drips(parts ...string) {
	u.t.Helper()
	for _, b := range []byte(strings.Join(parts, "")) {
		_, err := u.Write([]byte{b})
		require.NoError(u.t, err)
	}
}

// wants reads exactly parts.
func (u *rawStream) wants(parts ...string) {
	u.t.Helper()
	want := strings.Join(parts, "")
	got := make([]byte, len(want))
	n, err := io.ReadFull(u.r, got)
	require.Equal(u.t, want, string(got[:n]), "what the host sent, before %v", err)
}

// wantsMigrate reads the request to migrate the stream labelled from, and returns the
// new label.
func (u *rawStream) wantsMigrate(from uint64) (id uint64) {
	u.t.Helper()
	u.wants(tMultistream, tMigration)
	size, err := binary.ReadUvarint(u.r)
	require.NoError(u.t, err)
	m := make([]byte, size)
	_, err = io.ReadFull(u.r, m)
	require.NoError(u.t, err)
	require.Equal(u.t, byte(0x12), m[0], "the member is not Migrate: %x", m)
	id, n := binary.Uvarint(m[3:])
	require.Positive(u.t, n)
	require.Equal(u.t, migrateBytes(id, from), uvarint(size)+string(m), "not the Migrate that was expected: %x", m)
	u.label = id
	return id
}

// finalSize reads the host's final size.
func (u *rawStream) finalSize() uint64 {
	u.t.Helper()
	b, err := u.r.Peek(1)
	require.NoError(u.t, err)
	b, err = u.r.Peek(1 + int(b[0]))
	require.NoError(u.t, err)
	size, _ := binary.Uvarint(b[5:]) // behind two lengths and two tags
	u.wants(finalSizeBytes(size))
	return size
}

func (u *rawStream) closesWrite() {
	u.t.Helper()
	require.NoError(u.t, u.CloseWrite())
}

// wantsEOF expects nothing but the end.
func (u *rawStream) wantsEOF() {
	u.t.Helper()
	b, err := u.r.ReadByte()
	require.Equal(u.t, io.EOF, err, "expected EOF, got %q", b)
}

// wantsReset expects a reset with that code, after whatever data.
func (u *rawStream) wantsReset(code network.StreamErrorCode) {
	u.t.Helper()
	_, err := io.Copy(io.Discard, u.r)
	require.ErrorIs(u.t, err, network.ErrReset)
	var se *network.StreamError
	require.ErrorAs(u.t, err, &se)
	require.True(u.t, se.Remote, "the host has to reset the stream, not this end: %v", err)
	require.Equal(u.t, code, se.ErrorCode, "the code of the reset, 0x%x", uint32(se.ErrorCode))
}
