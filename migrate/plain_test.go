package migrate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"sync"
	"testing"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
)

const (
	askedID   protocol.ID = "/test/asked"
	limitedID protocol.ID = "/test/limited"
	absentID  protocol.ID = "/test/absent"
)

// account writes down all that an application can see.
type account struct {
	mu sync.Mutex
	bytes.Buffer
}

func (a *account) note(what string, args ...any) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for i, arg := range args {
		if err, ok := arg.(error); ok {
			var s *network.StreamError
			args[i] = fmt.Sprintf("%q (EOF %t, reset %t, deadline %t, limit %t)", withoutNumbers(err.Error()), err == io.EOF,
				errors.As(err, &s), errors.Is(err, context.DeadlineExceeded), errors.Is(err, network.ErrResourceLimitExceeded))
		}
	}
	fmt.Fprintln(&a.Buffer, append([]any{what}, args...)...)
}

// withoutNumbers makes messages alike that name a stream or a connection.
func withoutNumbers(s string) string {
	return numbers.ReplaceAllString(s, "#")
}

var numbers = regexp.MustCompile(`[0-9]+`)

func (a *account) reads(s io.Reader, n int) {
	b := make([]byte, n)
	m, err := io.ReadFull(s, b)
	a.note("read", string(b[:m]), err)
}

func (a *account) writes(s io.Writer, what string) {
	n, err := s.Write([]byte(what))
	a.note("write", n, err)
}

// plainCase is something that an application does with the stream that it opens.
type plainCase struct {
	pids  []protocol.ID
	known []protocol.ID // what the opener's peerstore has; nil: nothing
	does  func(*account, network.Stream)
}

var plainCases = map[string]plainCase{
	"writes first": {[]protocol.ID{askedID}, []protocol.ID{askedID}, func(a *account, s network.Stream) {
		a.writes(s, "hello")
		a.note("close for writing", s.CloseWrite())
		a.reads(s, 9)
		a.note("close", s.Close())
	}},
	"reads first": {[]protocol.ID{askedID}, []protocol.ID{askedID}, func(a *account, s network.Stream) {
		a.reads(s, 4)
		a.note("close", s.Close())
	}},
	"closes at once":                  {[]protocol.ID{askedID}, []protocol.ID{askedID}, func(a *account, s network.Stream) { a.note("close", s.Close()) }},
	"closes for writing, then reads":  {[]protocol.ID{askedID}, []protocol.ID{askedID}, func(a *account, s network.Stream) { a.note("cw", s.CloseWrite()); a.reads(s, 9) }},
	"resets at once":                  {[]protocol.ID{askedID}, []protocol.ID{askedID}, func(a *account, s network.Stream) { a.note("reset", s.Reset()); a.writes(s, "x"); a.reads(s, 1) }},
	"empty Write, empty Read":         {[]protocol.ID{askedID}, []protocol.ID{askedID}, func(a *account, s network.Stream) { a.writes(s, ""); a.reads(s, 0); a.reads(s, 4) }},
	"deadline before the answer":      {[]protocol.ID{askedID}, []protocol.ID{askedID}, func(a *account, s network.Stream) { _ = s.SetReadDeadline(past); a.reads(s, 1) }},
	"the second is known":             {[]protocol.ID{absentID, askedID}, []protocol.ID{askedID}, func(a *account, s network.Stream) { a.writes(s, "x"); a.reads(s, 4) }},
	"what is known is wrong":          {[]protocol.ID{absentID}, []protocol.ID{absentID}, func(a *account, s network.Stream) { a.writes(s, "x"); a.reads(s, 4); a.writes(s, "x") }},
	"what is known is wrong, reads":   {[]protocol.ID{absentID}, []protocol.ID{absentID}, func(a *account, s network.Stream) { a.reads(s, 4) }},
	"nothing is known":                {[]protocol.ID{askedID}, nil, func(a *account, s network.Stream) { a.writes(s, "x"); a.reads(s, 4); a.note("close", s.Close()) }},
	"nothing is known, the second is": {[]protocol.ID{absentID, askedID}, nil, func(a *account, s network.Stream) { a.reads(s, 4) }},
	"none is spoken":                  {[]protocol.ID{absentID, "/test/nor/this"}, nil, nil},
	"no protocol":                     {nil, nil, nil},
	"limit, known":                    {[]protocol.ID{limitedID}, []protocol.ID{limitedID}, nil},
	"limit, not known":                {[]protocol.ID{limitedID}, nil, nil},
}

// handled are the cases in which the other end's handler runs, whatever the timing.
var handled = []string{"writes first", "reads first", "closes at once", "closes for writing, then reads", "empty Write, empty Read",
	"the second is known", "nothing is known", "nothing is known, the second is"}

// ended are those of them in which the opener ends its writing and waits for the answer. In the
// others it resets the stream while the other end works on it, and what that sees of it is a
// matter of time.
var ended = []string{"writes first", "closes for writing, then reads"}

// accountOf runs the case on a pair of hosts of its own, and returns what was seen at both
// ends.
func (c plainCase) accountOf(t *testing.T, name string, via int, steer bool) string {
	limits := rcmgr.PartialLimitConfig{Protocol: map[protocol.ID]rcmgr.ResourceLimits{limitedID: {Streams: rcmgr.BlockAllLimit, StreamsOutbound: rcmgr.BlockAllLimit}}}
	m, err := rcmgr.NewResourceManager(rcmgr.NewFixedLimiter(limits.Build(rcmgr.DefaultLimits.AutoScale())))
	require.NoError(t, err)
	both := []Transport{TCP, QUIC}
	a, b := New(t, both, libp2p.ResourceManager(m)), New(t, both)
	far := new(account)
	handled, whole := slices.Contains(handled, name), slices.Contains(ended, name)
	over := make(chan struct{})
	for _, id := range []protocol.ID{askedID, limitedID} {
		b.SetStreamHandler(id, func(s network.Stream) {
			defer close(over)
			far.note("protocol", s.Protocol(), s.Stat().Direction)
			_, writing := s.Write([]byte("hi: "))
			all, reading := io.ReadAll(s)
			if whole {
				far.note("write", writing)
				far.note("all", string(all), reading)
			}
			_, _ = s.Write(all)
			_ = s.Close()
		})
	}
	c0, c1 := Join(t, a, b, TCP, QUIC)
	conn := []network.Conn{c0, c1}[via]
	var h host.Host = a.Host
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	if steer {
		h = wrapped(t, a, WithConnSelector(func(context.Context, peer.ID) network.Conn { return conn }))
		ctx = WithoutLabel(ctx)
	} else {
		// The swarm prefers the connection with the most streams.
		for range 9 {
			u, err := conn.NewStream(ctx)
			require.NoError(t, err)
			defer func() { _ = u.Reset() }()
		}
	}
	require.NoError(t, a.Peerstore().RemoveProtocols(b.ID(), askedID, limitedID))
	require.NoError(t, a.Peerstore().AddProtocols(b.ID(), c.known...))
	near := new(account)
	s, err := h.NewStream(ctx, b.ID(), c.pids...)
	near.note("open", err)
	if err == nil {
		require.True(t, s.Conn() == conn, "steered %t", steer)
		near.note("is", s.Protocol(), s.Stat().Direction, s.Conn().ConnState().Transport)
		c.does(near, s)
		_ = s.Reset()
	}
	if handled {
		await(t, over, "the handler to end")
		near.note("far:", far.String())
	}
	book, err := a.Peerstore().SupportsProtocols(b.ID(), askedID, limitedID, absentID)
	require.NoError(t, err)
	near.note("book", book)
	WaitFor(t, "the streams to be gone", func() bool {
		n := 0
		for _, u := range conn.GetStreams() {
			if u.Protocol() != "" {
				n++
			}
		}
		return n == 0
	})
	return near.String()
}

// TestStreamsWithoutLabel: on a connection that the selector names, an application sees of a
// stream without a label exactly what it sees with a plain host on that connection.
func TestStreamsWithoutLabel(t *testing.T) {
	for name, c := range plainCases {
		for via, transport := range []Transport{TCP, QUIC} {
			t.Run(fmt.Sprintf("%s, %s", name, transport), func(t *testing.T) {
				require.Equal(t, c.accountOf(t, name, via, false), c.accountOf(t, name, via, true))
			})
		}
	}
}

// TestStreamWithoutLabelToSilentPeer: the end of the context ends the negotiation, as with a
// plain host, and the stream is reset.
func TestStreamWithoutLabelToSilentPeer(t *testing.T) {
	for _, steer := range []bool{false, true} {
		t.Run(fmt.Sprint(steer), func(t *testing.T) {
			a, b := New(t, []Transport{TCP, QUIC}), New(t, []Transport{TCP, QUIC})
			c0, _ := Join(t, a, b, TCP, QUIC)
			seen, reset := make(chan struct{}), make(chan error, 1)
			b.Network().SetStreamHandler(func(s network.Stream) {
				var got []byte
				for {
					b := make([]byte, 100)
					n, err := s.Read(b)
					asked := bytes.Contains(got, []byte(askedID))
					if got = append(got, b[:n]...); !asked && bytes.Contains(got, []byte(askedID)) {
						close(seen)
					}
					if err != nil {
						if asked { // else it is identify's
							reset <- err
						}
						return
					}
				}
			})
			ctx, cancel := context.WithCancel(WithoutLabel(context.Background()))
			go func() {
				<-seen
				cancel()
			}()
			var h host.Host = a.Host
			if steer {
				h = wrapped(t, a, WithConnSelector(func(context.Context, peer.ID) network.Conn { return c0 }))
			}
			_, err := h.NewStream(ctx, b.ID(), askedID)
			require.EqualError(t, err, "failed to negotiate protocol: context canceled")
			require.ErrorIs(t, err, context.Canceled)
			var s *network.StreamError
			require.ErrorAs(t, <-reset, &s)
			require.Equal(t, network.StreamProtocolNegotiationFailed, s.ErrorCode)
		})
	}
}

// observed collects what an observer is told.
type observed struct {
	mu   sync.Mutex
	seen []string
}

func (o *observed) note(c network.Conn, id protocol.ID, dir network.Direction) {
	if id == identify.IDPush { // whenever a handler is set
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.seen = append(o.seen, fmt.Sprint(c.ConnState().Transport, " ", id, " ", dir))
}

func (o *observed) Take() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	seen := o.seen
	o.seen = nil
	return seen
}

// TestStreamObserver: both ends learn of each stream once, of whatever kind, before the
// handler and NewStream's caller do.
func TestStreamObserver(t *testing.T) {
	var obs [2]observed
	p := newPair(t, TCP, QUIC)
	for i, h := range p.hosts {
		h.cfg.observers = append(h.cfg.observers, obs[i].note)
	}
	handled := make(chan network.Stream, 1)
	for _, id := range []protocol.ID{echoID, askedID} {
		p.hosts[1].SetStreamHandler(id, func(s network.Stream) { handled <- s })
	}
	opens := func(ctx context.Context, ids ...protocol.ID) network.Stream {
		t.Helper()
		ctx, cancel := context.WithTimeout(ctx, Patience)
		defer cancel()
		s, err := p.hosts[0].NewStream(ctx, p.hosts[1].ID(), ids...)
		require.NoError(t, err)
		require.Equal(t, []string{"tcp " + string(ids[0]) + " Outbound"}, obs[0].Take())
		_, err = s.Write([]byte{1})
		require.NoError(t, err)
		return s
	}
	p.hosts[0].cfg.selector = func(context.Context, peer.ID) network.Conn { return p.conns[0][0] }

	s := opens(context.Background(), echoID)
	<-handled
	require.Equal(t, []string{"tcp " + string(echoID) + " Inbound"}, obs[1].Take(), "labelled")

	opens(WithoutLabel(context.Background()), askedID)
	<-handled
	require.Equal(t, []string{"tcp " + string(askedID) + " Inbound"}, obs[1].Take(), "without a label")

	require.NoError(t, p.hosts[0].Migrate(context.Background(), s, p.conns[0][1]))
	require.Equal(t, []string{"quic-v1 " + string(ID) + " Outbound"}, obs[0].Take())
	require.Equal(t, []string{"quic-v1 " + string(ID) + " Inbound"}, obs[1].Take(), "a migration")

	h := &Host{cfg: config{observers: []func(network.Conn, protocol.ID, network.Direction){
		func(network.Conn, protocol.ID, network.Direction) {},
	}}}
	require.Zero(t, testing.AllocsPerRun(100, func() { h.observe(p.conns[0][0], echoID, network.DirInbound) }),
		"telling costs no allocation")
}
