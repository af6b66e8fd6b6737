//go:build linux

package main

import (
	"os"
	"testing"

	"github.com/go-portage/portage/internal/natbed"
)

func TestMain(m *testing.M) {
	beNode()
	os.Exit(m.Run())
}

func TestBetweenRealNATs(t *testing.T) {
	if why := natbed.Missing(); why != "" {
		t.Skip("real NATs: " + why)
	}
	t.Parallel()
	var log logBuffer
	// The relay would carry half of it, in five seconds.
	got := runDemo(t, t.Context(), &log, "-nat", "-size", "256KiB", "-rate", "24KiB")
	if got.Error != "" || got.Bytes != got.Size || !got.SHA256OK {
		t.Errorf("%d of %d bytes arrived, error %q; want all, and none\n%s", got.Bytes, got.Size, got.Error, &log)
	}
	if got.Migrations != 1 || got.Conns != 1 || got.Relayed {
		t.Errorf("%d streams moved, %d connections are left, relayed %v; want 1, 1, false\n%s",
			got.Migrations, got.Conns, got.Relayed, &log)
	}
	if got.Received[relay] == 0 || got.Received[quic] == 0 || got.Received[relay]+got.Received[quic] != got.Size {
		t.Errorf("received by path: %v; want all of it over the two, and something over each", got.Received)
	}
}
