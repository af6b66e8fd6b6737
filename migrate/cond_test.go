package migrate

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
)

func TestCond(t *testing.T) {
	var mu sync.Mutex
	var c cond
	mu.Lock()
	c.broadcast() // nobody waits
	require.Zero(t, testing.AllocsPerRun(100, c.broadcast))

	woken := make(chan bool)
	inside := 0
	for i := range 3 {
		deadline := time.Time{}
		if i == 0 {
			deadline = time.Now().Add(time.Hour)
		}
		go func() {
			mu.Lock()
			defer mu.Unlock()
			inside++
			woken <- c.wait(&mu, deadline)
		}()
	}
	mu.Unlock()
	for n := 0; n < 3; {
		mu.Lock()
		n = inside
		mu.Unlock()
	}
	mu.Lock()
	c.broadcast()
	mu.Unlock()
	for range 3 {
		require.True(t, Take(t, woken, "all that wait to wake"))
	}
	mu.Lock()
	defer mu.Unlock()
	require.False(t, c.wait(&mu, past))
	require.False(t, c.wait(&mu, time.Now().Add(time.Millisecond)))
	require.False(t, mu.TryLock(), "the lock is held again")
	c.broadcast()
	require.False(t, c.wait(&mu, past), "a broadcast wakes nobody who comes later")
}

type timeoutError struct{}

func (timeoutError) Error() string { return "i/o timeout" }
func (timeoutError) Timeout() bool { return true }

func TestIsDeadline(t *testing.T) {
	u, dead := newFake(), newFake()
	dead.conn.dies()
	require.True(t, isDeadline(os.ErrDeadlineExceeded, u))
	require.True(t, isDeadline(fmt.Errorf("read: %w", timeoutError{}), u), "as yamux reports it")
	require.False(t, isDeadline(timeoutError{}, dead), "an idle timeout of the connection is one, too")
	require.False(t, isDeadline(errors.Join(timeoutError{}, net.ErrClosed), u))
	require.False(t, isDeadline(io.EOF, u))
	require.False(t, isDeadline(nil, u))
}

func TestChunks(t *testing.T) {
	var a, b chunks
	a.add([]byte("one"))
	a.add(nil)
	a.add([]byte("two"))
	b.add([]byte("three"))
	a.append(&b)
	require.Equal(t, 11, a.len)
	require.Zero(t, b.len)
	require.Empty(t, b.list)

	buf := make([]byte, 4)
	require.Equal(t, 4, a.take(buf))
	require.Equal(t, "onet", string(buf))
	require.Equal(t, 0, a.take(nil))
	buf = make([]byte, 100)
	require.Equal(t, 7, a.take(buf))
	require.Equal(t, "wothree", string(buf[:7]))
	require.Zero(t, a.len)
	require.Nil(t, a.list, "nothing is kept once it is empty")
	require.Equal(t, 0, a.take(buf))
}
