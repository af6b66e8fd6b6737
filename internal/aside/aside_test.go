package aside_test

import (
	"testing"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/internal/aside"
)

type conn struct {
	network.Conn
	closed bool
}

func (c conn) IsClosed() bool { return c.closed }
func (c conn) As(any) bool    { return false }

type setAside struct {
	conn
	gone bool
}

func (c setAside) IsClosed() bool { return true }
func (c setAside) Gone() bool     { return c.gone }

func (c setAside) As(target any) bool {
	t, ok := target.(*aside.Conn)
	if ok {
		*t = c
	}
	return ok
}

func TestIsClosed(t *testing.T) {
	require.False(t, aside.IsClosed(conn{}))
	require.True(t, aside.IsClosed(conn{closed: true}))
	require.False(t, aside.IsClosed(setAside{}), "it only says that it is closed")
	require.True(t, aside.IsClosed(setAside{gone: true}))
}
