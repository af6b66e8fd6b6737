package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	msmux "github.com/multiformats/go-multistream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
)

// class is what programs look at in an error of a stream.
type class struct {
	err, eof, reset, remote, timeout, canceled, deadline bool
	code                                                 network.StreamErrorCode
	lacks                                                string // protocols, of which multistream said no
}

func classOf(err error) class {
	c := class{
		err: err != nil, eof: errors.Is(err, io.EOF), reset: errors.Is(err, network.ErrReset),
		canceled: errors.Is(err, context.Canceled), deadline: errors.Is(err, context.DeadlineExceeded),
	}
	if of := (*network.StreamError)(nil); errors.As(err, &of) {
		c.code, c.remote = of.ErrorCode, of.Remote
	}
	var timeout interface{ Timeout() bool }
	c.timeout = errors.As(err, &timeout) && timeout.Timeout()
	var lacks msmux.ErrNotSupported[protocol.ID]
	if errors.As(err, &lacks) {
		c.lacks = fmt.Sprint(lacks.Protos)
	}
	return c
}

// TestErrorsArePlain: the errors of opening, reading and writing are to programs what they are
// on a plain host.
func TestErrorsArePlain(t *testing.T) {
	const served, unserved protocol.ID = "/test/served/1.0.0", "/x"
	ctx := testCtx(t)
	background := context.Background()
	buf := make([]byte, 1)
	read := func(s network.Stream) error { _, err := s.Read(buf); return err }
	write := func(s network.Stream) error { _, err := s.Write(buf); return err }
	fill := func(s network.Stream) (err error) {
		for err == nil {
			_, err = s.Write(make([]byte, 1<<16))
		}
		return err
	}
	open := func(t *testing.T, h host.Host, p peer.ID, ids ...protocol.ID) network.Stream {
		s, err := h.NewStream(ctx, p, ids...)
		require.NoError(t, err)
		return s
	}
	// What the handler of served does is the first byte that it reads.
	handler := func(s network.Stream) {
		buf := make([]byte, 1)
		if _, err := s.Read(buf); err != nil {
			_ = s.Reset()
			return
		}
		_, _ = s.Write(buf)
		if _, err := s.Read(buf); err != nil { // the answer has arrived
			_ = s.Reset()
			return
		}
		switch buf[0] {
		case 'r':
			_ = s.Reset()
		case 'c':
			_ = s.ResetWithError(42)
		case 'e':
			_ = s.Close()
		}
	}
	asked := func(t *testing.T, h host.Host, p peer.ID, what byte) network.Stream {
		s := open(t, h, p, served)
		_, err := s.Write([]byte{what})
		require.NoError(t, err)
		_, err = io.ReadFull(s, make([]byte, 1))
		require.NoError(t, err)
		_, err = s.Write([]byte{what})
		require.NoError(t, err)
		return s
	}
	type errs []error
	for name, does := range map[string]func(t *testing.T, h host.Host, p peer.ID) errs{
		"protocol that is not served": func(t *testing.T, h host.Host, p peer.ID) errs {
			_, err := h.NewStream(ctx, p, "/none/1", "/none/2")
			require.Contains(t, err.Error(), "failed to negotiate protocol: protocols not supported: [/none/1 /none/2]")
			return errs{err}
		},
		"protocol that is no longer served": func(t *testing.T, h host.Host, p peer.ID) errs {
			require.NoError(t, h.Peerstore().AddProtocols(p, unserved))
			s := open(t, h, p, unserved)
			// The length of a token: the peer waits for the rest, and does not reset.
			_, err := s.Write([]byte{16})
			return errs{err, read(s), read(s), s.Reset()}
		},
		"protocol that is no longer served, read first": func(t *testing.T, h host.Host, p peer.ID) errs {
			require.NoError(t, h.Peerstore().AddProtocols(p, unserved))
			s := open(t, h, p, unserved)
			return errs{read(s), read(s), s.Reset()}
		},
		"context that is over": func(_ *testing.T, h host.Host, p peer.ID) errs {
			over, cancel := context.WithCancel(background)
			cancel()
			late, cancel := context.WithDeadline(background, past)
			defer cancel()
			_, err1 := h.NewStream(over, p, "/none/1")
			_, err2 := h.NewStream(late, p, "/none/1")
			// Of several reasons yamux names any.
			return errs{errors.New(err1.Error()), errors.New(err2.Error())}
		},
		"no connection, not to dial": func(_ *testing.T, h host.Host, _ peer.ID) errs {
			_, err := h.NewStream(network.WithNoDial(ctx, "test"), "nobody", served)
			return errs{err}
		},
		"no address": func(_ *testing.T, h host.Host, _ peer.ID) errs {
			_, err := h.NewStream(ctx, "nobody", served)
			return errs{err}
		},
		"no protocol": func(_ *testing.T, h host.Host, p peer.ID) errs {
			_, err := h.NewStream(ctx, p)
			return errs{err}
		},
		"the peer resets": func(t *testing.T, h host.Host, p peer.ID) errs {
			s := asked(t, h, p, 'r')
			return errs{read(s), read(s), fill(s)}
		},
		"the peer resets with a code": func(t *testing.T, h host.Host, p peer.ID) errs {
			s := asked(t, h, p, 'c')
			return errs{read(s), read(s), fill(s)}
		},
		"the peer closes": func(t *testing.T, h host.Host, p peer.ID) errs {
			s := asked(t, h, p, 'e')
			return errs{read(s), read(s), s.Close()}
		},
		"deadlines": func(t *testing.T, h host.Host, p peer.ID) errs {
			s := asked(t, h, p, '-')
			require.NoError(t, s.SetDeadline(past))
			first := errs{read(s), fill(s)}
			require.NoError(t, s.SetDeadline(time.Time{}))
			return append(first, write(s), s.Reset())
		},
		"deadline of a Write that is under way": func(t *testing.T, h host.Host, p peer.ID) errs {
			s := asked(t, h, p, '-')
			require.NoError(t, s.SetWriteDeadline(time.Now().Add(50*time.Millisecond)))
			return errs{fill(s), s.Reset()}
		},
		"closed here": func(t *testing.T, h host.Host, p peer.ID) errs {
			s := asked(t, h, p, '-')
			return errs{s.Close(), read(s), write(s), s.Close()}
		},
		"closed here for writing": func(t *testing.T, h host.Host, p peer.ID) errs {
			s := asked(t, h, p, '-')
			return errs{s.CloseWrite(), write(s), s.Reset()}
		},
		"closed here for reading": func(t *testing.T, h host.Host, p peer.ID) errs {
			s := asked(t, h, p, '-')
			return errs{s.CloseRead(), read(s), write(s), s.Reset()}
		},
		"reset here": func(t *testing.T, h host.Host, p peer.ID) errs {
			s := asked(t, h, p, '-')
			return errs{s.Reset(), read(s), write(s)}
		},
		"reset here with a code": func(t *testing.T, h host.Host, p peer.ID) errs {
			s := asked(t, h, p, '-')
			return errs{s.ResetWithError(7), read(s), write(s)}
		},
	} {
		t.Run(name, func(t *testing.T) {
			for _, tr := range []Transport{TCP, QUIC} {
				var got [2][]class
				var said [2]errs
				for wrapped := range got {
					var hosts [2]host.Host
					nodes := [2]*Node{New(t, []Transport{tr}), New(t, []Transport{tr}, libp2p.Ping(true))}
					for i, n := range nodes {
						hosts[i] = n
						if wrapped == 1 {
							h, err := Wrap(n)
							require.NoError(t, err)
							hosts[i] = h
						}
					}
					hosts[1].SetStreamHandler(served, handler)
					Dial(t, nodes[0], nodes[1], tr)
					said[wrapped] = does(t, hosts[0], hosts[1].ID())
					for _, err := range said[wrapped] {
						got[wrapped] = append(got[wrapped], classOf(err))
					}
				}
				var texts [2][]string
				for i, all := range said {
					for _, err := range all {
						texts[i] = append(texts[i], strings.ReplaceAll(fmt.Sprint(err), "\n", " "))
					}
				}
				assert.Equal(t, got[0], got[1], "%s: plain says %q, wrapped %q", tr, texts[0], texts[1])
			}
		})
	}
}
