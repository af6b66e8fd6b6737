package main

import (
	"bufio"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/internal/hosttest"
	"github.com/go-portage/portage/migrate"
)

// The program is built, and its daemon started and stopped, with Portage and with the plugin
// disabled. Commands tell the same but for the protocols of Portage.
func TestDaemon(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 4*hosttest.Patience)
	defer cancel()
	dir := t.TempDir()
	program := filepath.Join(dir, "ipfs")
	out, err := exec.CommandContext(ctx, "go", "build", "-o", program, ".").CombinedOutput()
	require.NoError(t, err, "%s", out)
	ipfs := func(args ...string) *exec.Cmd {
		cmd := exec.CommandContext(ctx, program, args...)
		cmd.Env = append(os.Environ(), "IPFS_PATH="+filepath.Join(dir, "repo"))
		return cmd
	}
	says := func(args ...string) string {
		out, err := ipfs(args...).Output()
		require.NoError(t, err, "ipfs %s", args)
		return string(out)
	}
	says("init", "--profile=test,autoconf-off") // on loopback, and knows nobody
	says("config", "Internal.Libp2pForceReachability", "public")

	with := daemon(t, ipfs, says)
	says("config", "--json", "Plugins.Plugins.portage.Disabled", "true")
	without := daemon(t, ipfs, says)

	require.Contains(t, with.reachability, "Reachability: Public")
	require.Equal(t, without.reachability, with.reachability)
	require.Contains(t, with.protocols, string(migrate.ID))
	require.NotContains(t, without.protocols, string(migrate.ID))
	var rest []string
	for _, p := range with.protocols {
		if !strings.HasPrefix(p, "/portage/") && p != string(migrate.ID) {
			rest = append(rest, p)
		}
	}
	require.Equal(t, without.protocols, rest)
}

// told is what a daemon tells of itself.
type told struct {
	reachability string
	protocols    []string
}

// daemon runs the daemon until it has been asked.
func daemon(t *testing.T, ipfs func(args ...string) *exec.Cmd, says func(args ...string) string) told {
	cmd := ipfs("daemon")
	read, write := io.Pipe()
	cmd.Stdout, cmd.Stderr = write, write
	require.NoError(t, cmd.Start())
	ended := make(chan error, 1)
	go func() {
		ended <- cmd.Wait()
		_ = write.Close()
	}()
	var log []string
	ready := false
	for lines := bufio.NewScanner(read); !ready && lines.Scan(); {
		log = append(log, lines.Text())
		ready = strings.Contains(lines.Text(), "Daemon is ready")
	}
	require.True(t, ready, "the daemon is ready; it says:\n%s", strings.Join(log, "\n"))
	go func() { _, _ = io.Copy(io.Discard, read) }()
	asked := told{
		reachability: regexp.MustCompile(`(tcp|udp)/\d+`).ReplaceAllString(says("swarm", "addrs", "autonat"), "$1"),
		protocols:    strings.Fields(says("id", "--format=<protocols>")),
	}
	says("shutdown")
	require.NoError(t, <-ended, "the daemon ends")
	return asked
}
