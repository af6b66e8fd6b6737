package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	. "github.com/go-portage/portage/internal/hosttest"
	. "github.com/go-portage/portage/internal/rawpeer"
)

// A host under test with a raw peer, see internal/rawpeer, and an application:
//
//	p := meet(t, draftOnly)
//	s, old := p.hostOpens()                // the host opens a labelled stream
//	moved := p.hostMigrates(s)             // and migrates it
//	next := p.Arrives()
//	id := next.WantsMigrate(old.Label)
//	next.Acks(AckDraft)
//	old.WantsEOF()

// peerKind is what a raw peer advertises through identify.
type peerKind []protocol.ID

var (
	draftOnly = peerKind{ID, echoID}
	verified  = peerKind{ID, FinalSizeID, echoID}
	resuming  = peerKind{ID, FinalSizeID, ResumeID, echoID}
)

type rawPeer struct {
	*RawPeer
	t    testing.TB
	host *Host        // under test
	app  chan *Stream // what the host accepts
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
	hostKey, rawKey := OrderedKeys(t)
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
	raw, hostNode := node(rawKey, m.rawOpts), node(hostKey, m.hostOpts)
	log := zap.NewNop()
	if testing.Verbose() {
		log = zaptest.NewLogger(t).Named("host")
	}
	host, err := Wrap(hostNode, append([]Option{WithLogger(log)}, m.opts...)...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = host.Close() })
	p := &rawPeer{t: t, host: host, app: make(chan *Stream, 64)}
	host.SetStreamHandler(echoID, func(s network.Stream) { p.app <- s.(*Stream) })
	p.RawPeer = NewRawPeer(t, raw, hostNode, m.first, m.second, m.kind...)
	host.cfg.selector = func(context.Context, peer.ID) network.Conn { return p.Ends[0] }
	p.TakeOver(ResumeID)
	return p
}

// hostBegins has the host open a labelled stream of one of ids on connection i, and does not
// wait for the peer but where the protocol has to be negotiated. NewStream would go elsewhere
// where the connection is slow to open one, as it can be on a busy machine.
func (p *rawPeer) hostBegins(i int, ids ...protocol.ID) (*Stream, error) {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	u, err := p.Ends[i].NewStream(ctx)
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
func (p *rawPeer) hostOpens() (*Stream, *RawStream) {
	p.t.Helper()
	s, u := p.hostOpensAs(LabelBytes)
	u.Sends("?")
	p.reads(s, "?")
	return s, u
}

// hostOpensAs has the host open a stream with such a Label, and write to it.
func (p *rawPeer) hostOpensAs(label func(uint64) string) (*Stream, *RawStream) {
	p.t.Helper()
	s, err := p.hostBegins(0, echoID)
	require.NoError(p.t, err)
	p.writes(s, "!")
	u := p.Arrives()
	u.Label = s.Label()
	u.Wants(Prelude, label(u.Label), MultistreamToken, EchoToken, "!")
	u.Sends(Prelude, MultistreamToken, EchoToken)
	return s, u
}

// hostAccepts opens a labelled stream to the host on the old connection, and returns
// what the host's handler got.
func (p *rawPeer) hostAccepts() (*Stream, *RawStream) {
	p.t.Helper()
	label := p.Fresh()
	u := p.Opens(0, Prelude, LabelBytes(label), MultistreamToken, EchoToken, "!")
	u.Label = label
	u.Wants(Prelude, MultistreamToken, EchoToken)
	s := p.accepted()
	require.Equal(p.t, label, s.Label())
	p.reads(s, "!")
	p.writes(s, "?")
	u.Wants("?")
	return s, u
}

// accepted returns what the host's handler got.
func (p *rawPeer) accepted() *Stream {
	p.t.Helper()
	return Take(p.t, p.app, "the host's handler to be called")
}

// either runs the test with a stream that the host opened, and with one that the raw
// peer opened: who opened a stream has no say in who may migrate it.
func (m meeting) either(t *testing.T, test func(t *testing.T, p *rawPeer, s *Stream, old *RawStream)) {
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
	go func() { o.done <- p.host.Migrate(context.Background(), s, p.Ends[i]) }()
	return o
}

func (o *outcome) is(target error) {
	o.t.Helper()
	err := Take(o.t, o.done, "Migrate to return")
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
	require.NoError(t, Take(t, done, what), what)
}

// talk checks that data flow between s and u, both ways.
func (p *rawPeer) talk(s *Stream, u *RawStream) {
	p.t.Helper()
	p.writes(s, "ping")
	u.Wants("ping")
	u.Sends("pong")
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
	if p.host.resumer != nil {
		p.closesReports()
	}
	for _, c := range p.Ends {
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
