// Package rawpeer is a peer made of raw bytes, for the tests of several packages: a plain
// libp2p host, with two connections to a host under test, for which a test speaks the
// stream-migration protocol itself.
//
//	old := p.Opens(0, OpeningBytes(label, EchoID))
//	old.Wants(AnswerBytes(EchoID))
//	next := p.Opens(1, Prelude, MigrateBytes(p.Fresh(), label))
//	next.Wants(Prelude, AckVerified)
//	next.Sends(FinalSizeBytes(0))
//
// It shares no code with package migrate: what it sends is made here byte by byte, by
// docs/protocol.md, and what it gets is compared with that, or read with the generated code
// of package pb. Peers that need more than one stream at a time can use the bytes alone.
package rawpeer

import (
	"context"
	"crypto/rand"
	"io"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/internal/hosttest"
)

// RawPeer is the peer. Its methods fail the test where something does not go as they say, but
// for Open.
type RawPeer struct {
	*hosttest.Node
	T     testing.TB
	Conns [2]network.Conn // its ends of the connections
	Ends  [2]network.Conn // those of the host under test

	came  chan *RawStream
	apart map[protocol.ID]chan *RawStream
	label atomic.Uint64
}

// NewRawPeer connects node, twice, with the node of the host under test. To that it says that
// it speaks ids.
func NewRawPeer(t testing.TB, node, host *hosttest.Node, first, second hosttest.Transport, ids ...protocol.ID) *RawPeer {
	t.Helper()
	p := &RawPeer{Node: node, T: t, came: make(chan *RawStream, 1<<12)}
	p.label.Store(1 << 33)
	if node.ID() > host.ID() {
		p.label.Add(1) // L1
	}
	for _, id := range ids {
		node.SetStreamHandler(id, func(network.Stream) { t.Errorf("the mux of the raw peer was asked for %s", id) })
	}
	p.Conns[0], p.Conns[1] = hosttest.Join(t, node, host, first, second)
	for i, c := range p.Conns {
		p.Ends[i] = hosttest.Far(t, host, c)
	}
	return p
}

// TakeOver has the test get what the host opens from here on: streams of the protocols apart by
// ArrivesFor, all others by Arrives. Those of identify are answered as ever.
func (p *RawPeer) TakeOver(apart ...protocol.ID) {
	p.apart = make(map[protocol.ID]chan *RawStream)
	for _, id := range apart {
		p.apart[id] = make(chan *RawStream, 1<<12)
	}
	p.Network().SetStreamHandler(p.deliver)
}

// OrderedKeys returns two keys, that of the lower peer ID first.
func OrderedKeys(t testing.TB) (lower, higher crypto.PrivKey) {
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

func (p *RawPeer) deliver(s network.Stream) {
	first := make([]byte, len(MultistreamToken)+1)
	_, err := io.ReadFull(s, first)
	if err == nil {
		rest := make([]byte, first[len(first)-1])
		_, err = io.ReadFull(s, rest)
		first = append(first, rest...)
	}
	if err != nil {
		_ = s.Reset()
		return
	}
	u := p.wire(s)
	u.seen = first
	id := protocol.ID(strings.TrimSpace(string(first[len(MultistreamToken)+1:])))
	switch apart := p.apart[id]; {
	case strings.HasPrefix(string(id), "/ipfs/"):
		_ = s.SetDeadline(time.Time{})
		if id, handle, err := p.Mux().Negotiate(u); err == nil && s.SetProtocol(id) == nil {
			_ = handle(id, u)
		}
	case apart != nil:
		apart <- u
	default:
		p.came <- u
	}
}

// Fresh returns a label that the raw peer may give (L1).
func (p *RawPeer) Fresh() uint64 { return p.label.Add(2) }

// GoOnFrom has Fresh return label next.
func (p *RawPeer) GoOnFrom(label uint64) { p.label.Store(label - 2) }

// Arrives returns the next stream that the host opens, unread.
func (p *RawPeer) Arrives() *RawStream {
	p.T.Helper()
	return hosttest.Take(p.T, p.came, "a stream from the host")
}

// ArrivesFor is Arrives for a protocol that comes apart.
func (p *RawPeer) ArrivesFor(id protocol.ID) *RawStream {
	p.T.Helper()
	return hosttest.Take(p.T, p.apart[id], "a stream from the host for "+string(id))
}

// CameFor is where ArrivesFor takes its streams from.
func (p *RawPeer) CameFor(id protocol.ID) <-chan *RawStream { return p.apart[id] }

// Came is where Arrives takes its streams from.
func (p *RawPeer) Came() <-chan *RawStream { return p.came }

// Opens opens a stream on connection i and sends parts over it.
func (p *RawPeer) Opens(i int, parts ...string) *RawStream {
	p.T.Helper()
	u, err := p.Open(i, hosttest.Patience, strings.Join(parts, ""))
	require.NoError(p.T, err)
	return u
}

// Open opens a stream on connection i, within that time, and sends bytes over it, if there are
// any. It fails where the host or its muxer does not have it.
func (p *RawPeer) Open(i int, within time.Duration, bytes string) (*RawStream, error) {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	s, err := p.Conns[i].NewStream(network.WithAllowLimitedConn(ctx, "test"))
	if err != nil {
		return nil, err
	}
	u := p.wire(s)
	if bytes == "" {
		return u, nil
	}
	if _, err := io.WriteString(u, bytes); err != nil {
		_ = u.Reset()
		return nil, err
	}
	return u, nil
}

// RawStream is the raw peer's end of one underlying stream. Its methods Sends, Wants and so on
// fail the test where something else happens.
type RawStream struct {
	network.Stream
	Label uint64 // what the stream was labelled with, where it was

	t    testing.TB
	seen []byte // was read, and is to be read again
}

// wire makes a RawStream of s. Nothing takes as long as its deadline, but what hangs.
func (p *RawPeer) wire(s network.Stream) *RawStream {
	_ = s.SetDeadline(time.Now().Add(hosttest.Patience))
	return &RawStream{Stream: s, t: p.T}
}

// Read implements io.Reader.
func (u *RawStream) Read(b []byte) (int, error) {
	if len(u.seen) > 0 {
		n := copy(b, u.seen)
		u.seen = u.seen[n:]
		return n, nil
	}
	return u.Stream.Read(b)
}

// Sends sends parts in one Write.
func (u *RawStream) Sends(parts ...string) {
	u.t.Helper()
	_, err := u.Write([]byte(strings.Join(parts, "")))
	require.NoError(u.t, err, "send %q", parts)
}

// Drips sends parts byte by byte.
func (u *RawStream) Drips(parts ...string) {
	u.t.Helper()
	for _, b := range []byte(strings.Join(parts, "")) {
		_, err := u.Write([]byte{b})
		require.NoError(u.t, err)
	}
}

// Acks answers Migrate with ack.
func (u *RawStream) Acks(ack string) {
	u.t.Helper()
	u.Sends(Prelude, ack)
}

// Wants reads exactly parts.
func (u *RawStream) Wants(parts ...string) {
	u.t.Helper()
	require.NoError(u.t, Expect(u, strings.Join(parts, "")))
}

// WantsMigrate reads the request to migrate the stream labelled from, with a verified handover,
// and returns the new label.
func (u *RawStream) WantsMigrate(from uint64) (id uint64) {
	u.t.Helper()
	u.Wants(Prelude)
	heard := &heard{Reader: u}
	m, err := ReadMessage(heard)
	require.NoError(u.t, err)
	u.Label = m.GetMigrate().GetId()
	require.Equal(u.t, MigrateBytes(u.Label, from), string(heard.all), "not the Migrate that was expected: %v", m)
	return u.Label
}

// FinalSize reads the host's final size.
func (u *RawStream) FinalSize() uint64 {
	u.t.Helper()
	heard := &heard{Reader: u}
	m, err := ReadMessage(heard)
	require.NoError(u.t, err)
	size := m.GetFinalSize().GetSize()
	require.Equal(u.t, FinalSizeBytes(size), string(heard.all), "not a final size: %v", m)
	return size
}

// heard keeps what was read.
type heard struct {
	io.Reader
	all []byte
}

func (h *heard) Read(p []byte) (int, error) {
	n, err := h.Reader.Read(p)
	h.all = append(h.all, p[:n]...)
	return n, err
}

// ClosesWrite ends the raw peer's writing.
func (u *RawStream) ClosesWrite() {
	u.t.Helper()
	require.NoError(u.t, u.CloseWrite())
}

// WantsEOF expects nothing but the end.
func (u *RawStream) WantsEOF() {
	u.t.Helper()
	got, err := io.ReadAll(io.LimitReader(u, 1))
	require.NoError(u.t, err, "instead of EOF")
	require.Empty(u.t, string(got), "instead of EOF")
}

// WantsReset expects the host to reset the stream with that code, after whatever data.
func (u *RawStream) WantsReset(code network.StreamErrorCode) {
	u.t.Helper()
	_, err := io.Copy(io.Discard, u)
	require.ErrorIs(u.t, err, network.ErrReset)
	var se *network.StreamError
	require.ErrorAs(u.t, err, &se)
	require.True(u.t, se.Remote, "the host has to reset the stream, not this end: %v", err)
	require.Equal(u.t, code, se.ErrorCode, "the code of the reset, 0x%x", uint32(se.ErrorCode))
}
