//go:build linux

// Package nat runs Portage, and plain go-libp2p beside it, between hosts behind real NATs.
// The topology is drawn in internal/natbed.
//
// It needs root, iproute2, nftables and TUN, and skips itself elsewhere. By hand:
//
//	go test ./integration/nat -v -all -runs 10        # the tables of docs/operations.md
//	go test ./integration/nat -v -all -long           # also what takes minutes
package nat

import (
	"context"
	"flag"
	"os"
	"os/signal"
	"syscall"
	"testing"

	"github.com/go-portage/portage/internal/natbed"
)

var (
	all  = flag.Bool("all", false, "every case; without it only the most common ones")
	long = flag.Bool("long", false, "with -all: also the cases that take minutes")
	runs = flag.Int("runs", 1, "how often to run each case; -v prints tables")
)

func TestMain(m *testing.M) {
	natbed.Main()
	flag.Parse()
	if f := flag.Lookup("test.parallel"); f.Value.String() == f.DefValue {
		_ = f.Value.Set("32") // the cases wait more than they compute; see fewAtOnce
	}
	// Namespaces must not outlive an interrupt.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	removed := make(chan struct{})
	context.AfterFunc(ctx, func() {
		defer close(removed)
		stop() // a second one ends the process at once
		natbed.CloseAll()
	})
	code := m.Run()
	if ctx.Err() != nil {
		<-removed
		code = 1
	}
	os.Exit(code)
}
