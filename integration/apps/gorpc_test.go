package apps

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	rpc "github.com/libp2p/go-libp2p-gorpc"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/stretchr/testify/require"
)

// go-libp2p-gorpc: calls, errors of the other end, calls that are given up, and a stream of
// questions and answers that lasts.

const gorpcID = "/apps/gorpc"

// Gorpc is what the server has; gorpc wants it exported.
type Gorpc struct {
	waits   chan struct{} // a call of Wait has begun
	givenUp chan struct{} // and has been told that nobody waits for it
}

func (*Gorpc) Double(_ context.Context, n int, to *int) error {
	*to = 2 * n
	return nil
}

func (*Gorpc) Fail(_ context.Context, why string, _ *int) error { return errors.New(why) }

func (g *Gorpc) Wait(ctx context.Context, _ int, _ *int) error {
	g.waits <- struct{}{}
	<-ctx.Done()
	g.givenUp <- struct{}{}
	return ctx.Err()
}

func (*Gorpc) DoubleAll(ctx context.Context, questions <-chan int, answers chan<- int) error {
	defer close(answers)
	for n := range questions {
		select {
		case answers <- 2 * n:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// gorpc serves, and returns what uses it.
func gorpc() (serve func(t *testing.T, h host.Host), use func(ctx context.Context, h host.Host, p peer.ID, enough func() bool) error) {
	service := &Gorpc{waits: make(chan struct{}), givenUp: make(chan struct{})}
	serve = func(t *testing.T, h host.Host) {
		require.NoError(t, rpc.NewServer(h, gorpcID).RegisterName("gorpc", service))
	}
	use = func(ctx context.Context, h host.Host, p peer.ID, enough func() bool) error {
		c := rpc.NewClient(h, gorpcID)
		return together(
			func() error { return gorpcCalls(ctx, c, p, enough) },
			func() error {
				for i := 0; i < 10 || !enough(); i++ {
					if err := gorpcGivenUp(ctx, c, p, service); err != nil {
						return err
					}
				}
				return nil
			},
			func() error { return gorpcStream(ctx, c, p, enough) },
		)
	}
	return serve, use
}

func gorpcCalls(ctx context.Context, c *rpc.Client, p peer.ID, enough func() bool) error {
	for i := 0; i < 100 || !enough(); i++ {
		var got int
		if err := c.CallContext(ctx, p, "gorpc", "Double", i, &got); err != nil || got != 2*i {
			return fmt.Errorf("call %d: got %d, %w", i, got, err)
		}
		why := fmt.Sprintf("reason %d", i)
		if err := c.CallContext(ctx, p, "gorpc", "Fail", why, &got); err == nil || !strings.Contains(err.Error(), why) {
			return fmt.Errorf("call %d: want the error of the other end, got %w", i, err)
		}
	}
	return nil
}

// gorpcGivenUp makes a call, and gives it up once it has begun. The other end is told.
func gorpcGivenUp(ctx context.Context, c *rpc.Client, p peer.ID, service *Gorpc) error {
	call, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- c.CallContext(call, p, "gorpc", "Wait", 0, new(int)) }()
	select {
	case <-service.waits:
	case err := <-done:
		return fmt.Errorf("a call that waits: %w", err)
	}
	cancel()
	select {
	case <-service.givenUp:
	case <-ctx.Done():
		return fmt.Errorf("a call that is given up: the other end is not told: %w", ctx.Err())
	}
	if err := <-done; err == nil {
		return errors.New("a call that is given up has succeeded")
	}
	return nil
}

// gorpcStream asks on one stream until there is enough.
func gorpcStream(ctx context.Context, c *rpc.Client, p peer.ID, enough func() bool) error {
	questions, answers := make(chan int), make(chan int)
	done := make(chan error, 1)
	go func() { done <- c.Stream(ctx, p, "gorpc", "DoubleAll", questions, answers) }()
	for i := 0; i < 1000 || !enough(); i++ {
		select {
		case questions <- i:
		case err := <-done:
			return fmt.Errorf("the stream ended before question %d: %w", i, err)
		}
		if got, ok := <-answers; !ok || got != 2*i {
			return fmt.Errorf("question %d: got %d, %v", i, got, ok)
		}
	}
	close(questions)
	for n := range answers {
		return fmt.Errorf("an answer to no question: %d", n)
	}
	return <-done
}
