package connmgr

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/internal/hosttest"
)

// Any host answers, whatever it serves, to questions of either size, and no stream is left.
func TestQuestionsAreAnswered(t *testing.T) {
	for name, opts := range map[string][]libp2p.Option{
		"a manager":             {Enable()},
		"a plain host":          nil,
		"a plain one, no pings": {libp2p.Ping(false)},
	} {
		t.Run(name, func(t *testing.T) {
			for _, tr := range []hosttest.Transport{hosttest.TCP, hosttest.QUIC, hosttest.WebRTC} {
				t.Run(string(tr), func(t *testing.T) {
					a, b := hosttest.New(t, []hosttest.Transport{tr}), hosttest.New(t, []hosttest.Transport{tr}, opts...)
					c := hosttest.Dial(t, a, b, tr)
					far := hosttest.Far(t, b, c)
					for _, full := range []bool{false, true} {
						put := false
						took, err := probe(t.Context(), c, full, func() { put = true })
						require.NoError(t, err)
						require.Positive(t, took)
						require.True(t, put)
						for _, end := range []network.Conn{c, far} {
							hosttest.WaitFor(t, "the stream to end", func() bool { return end.Stat().NumStreams == 0 })
						}
					}
				})
			}
		})
	}
}

// Both directions of a large question take more than a packet, and its proposals are as long
// as is said.
func TestSizeOfQuestions(t *testing.T) {
	require.Len(t, askedAtLarge, fullProbe)
	require.Equal(t, fullProbe/proposalSize, bytes.Count(askedAtLarge, []byte{'\n'}))
	require.Greater(t, fullProbe/proposalSize*len(framed("na")), 1452, "QUIC's largest packet")
	require.Less(t, len(askedFirst), 100, "a small one costs a relay next to nothing")
	require.Less(t, len(askedAtLarge)+2*int(openTimeout/useProbe)*len(askedAgain), maxEcho)
}

// scripted is a connection whose other end answers streams as it is told to.
type scripted struct {
	*fakeConn
	far func(s *fakePipe)
}

func (c scripted) NewStream(context.Context) (network.Stream, error) {
	near, far := newPipe(c.fakeConn)
	go func() {
		c.far(far)
		_, _ = io.Copy(io.Discard, far)
	}()
	return near, nil
}

// A small question is answered by the first answer, a large one by all of them. It is
// repeated while there is none.
func TestWhatAnAnswerIs(t *testing.T) {
	header, served, refused := framed(multistreamID), framed(string(PathID)), framed("na")
	refusals := bytes.Repeat(refused, fullProbe/proposalSize)
	say := func(what ...[]byte) func(*fakePipe) {
		return func(s *fakePipe) { _, _ = s.Write(bytes.Join(what, nil)) }
	}
	for name, c := range map[string]struct {
		far         func(s *fakePipe)
		small, full error // nil: it is an answer
	}{
		"all refused":             {say(header, refused, refusals), nil, nil},
		"accepted and echoed":     {say(header, served, askedAtLarge), nil, nil},
		"only the first came":     {say(header, refused), nil, context.DeadlineExceeded},
		"all but one":             {say(header, refused, refusals[len(refused):]), nil, context.DeadlineExceeded},
		"accepted, no echo":       {say(header, served), nil, context.DeadlineExceeded},
		"a byte of it is missing": {say(header, served, askedAtLarge[1:]), nil, context.DeadlineExceeded},
		"half an answer":          {say(header), context.DeadlineExceeded, context.DeadlineExceeded},
		"nothing":                 {say(), context.DeadlineExceeded, context.DeadlineExceeded},
		"the stream ends":         {func(s *fakePipe) { _ = s.Close() }, io.EOF, io.EOF},
	} {
		t.Run(name, func(t *testing.T) {
			for full, want := range map[bool]error{false: c.small, true: c.full} {
				inVirtualTime(t, func(t *testing.T) {
					conn := scripted{&fakeConn{net: &fakeNet{}}, c.far}
					_, err := probe(t.Context(), conn, full, func() {})
					require.ErrorIs(t, err, want)
				})
			}
		})
	}
	t.Run("asked again", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			asked := make(chan string, 1)
			conn := scripted{&fakeConn{net: &fakeNet{}}, func(s *fakePipe) {
				all, _ := io.ReadAll(s)
				asked <- string(all)
			}}
			_, err := probe(t.Context(), conn, false, func() {})
			require.ErrorIs(t, err, context.DeadlineExceeded)
			require.InDelta(t, openTimeout/useProbe, strings.Count(<-asked, string(PathID)), 1)
		})
	})
}

// What a peer can have of the echo is bounded, in time and in bytes.
func TestEchoIsBounded(t *testing.T) {
	for name, c := range map[string]struct {
		peer func(t *testing.T, w *world, far *fakePipe)
		want error // nil: the stream has ended well
	}{
		"a large question": {func(t *testing.T, _ *world, far *fakePipe) {
			_, err := far.Write(askedAtLarge)
			require.NoError(t, err)
			require.NoError(t, far.Close())
			got, err := io.ReadAll(bufio.NewReader(far))
			require.NoError(t, err)
			require.Equal(t, askedAtLarge, got)
		}, nil},
		"nothing": {func(_ *testing.T, w *world, _ *fakePipe) { w.pass(openTimeout) }, network.ErrReset},
		"too much": {func(_ *testing.T, w *world, far *fakePipe) {
			_, _ = far.Write(make([]byte, 2*maxEcho))
			w.pass(0)
		}, network.ErrReset},
		"the manager is closed": {func(t *testing.T, w *world, _ *fakePipe) { require.NoError(t, w.m.Close()) }, network.ErrReset},
	} {
		t.Run(name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				w := newWorld(t, higher)
				near, far := newPipe(w.connect(quicAddr))
				var ended atomic.Bool
				go func() {
					w.m.echoes.handle(near)
					ended.Store(true)
				}()
				w.pass(time.Second)
				require.False(t, ended.Load())
				c.peer(t, w, far)
				w.pass(0)
				require.True(t, ended.Load())
				_, err := io.Copy(io.Discard, far)
				require.ErrorIs(t, err, c.want)
			})
		})
	}
}
