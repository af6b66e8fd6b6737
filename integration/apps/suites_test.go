package apps

import (
	"bytes"
	"cmp"
	"context"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/internal/hosttest"
)

var all = flag.Bool("all", false, "run the tests of other projects' suites that take long, too")

// A suite is the tests of another project's package. They run as they are, but for the line
// that makes their hosts: it calls the package moving, whose hosts have Portage, and get a
// second connection to each peer again and again.
type suite struct {
	module  string
	times   int // that all are run; 0: once
	patches []patch
	long    []string // tests that are left out without -all: together they take most of the time
	never   []string // tests that fail on doubled hosts without Portage, too, or when a machine is busy
	pass    int      // how many tests pass at least
	moved   int      // how many streams move at least
}

// A patch replaces all there is of old in a file, which is as many as times.
type patch struct {
	file, old, new string
	times          int
}

const movingImport = "\t\"github.com/go-portage/portage/integration/apps/moving\"\n"

func TestSuiteOfPubsub(t *testing.T) {
	run(t, suite{
		module: "github.com/libp2p/go-libp2p-pubsub",
		patches: []patch{
			{"pubsub_test.go", "simlibp2p.SimpleLibp2pNetwork(", "moving.SimpleLibp2pNetwork(t, ", 1},
			{"pubsub_test.go", "\t\"github.com/libp2p/go-libp2p/x/simlibp2p\"\n", "\t\"github.com/libp2p/go-libp2p/x/simlibp2p\"\n" + movingImport, 1},
		},
		long: []string{
			"TestBasicSeqnoValidatorReplay", "TestConfigurableMaxMessageSize", "TestDenseGossipsub", "TestGossipSubDiscoveryAfterBootstrap", "TestGossipsubControlPiggyback",
			"TestGossipsubEnoughPeers", "TestGossipsubFanout", "TestGossipsubFanoutMaintenance", "TestGossipsubGossip", "TestGossipsubGossipPropagation",
			"TestGossipsubGraft", "TestGossipsubGraftPruneRetry", "TestGossipsubNegativeScore", "TestGossipsubOpportunisticGrafting", "TestGossipsubPrune",
			"TestGossipsubRPCFragmentation", "TestGossipsubRemovePeer", "TestGossipsubStarTopology", "TestGossipsubStarTopologyWithSignedPeerRecords",
			"TestJSONTracer", "TestMessageBatchPublish", "TestMixedGossipsub", "TestPBTracer", "TestPartialMessagesEmitGossipWhenAllPeersPartial",
			"TestRandomsubBig", "TestRandomsubEnoughPeers", "TestRandomsubMixed", "TestRemoteTracer", "TestRoundRobinMessageIDScheduler",
			"TestSelfMessageFilter", "TestSparseGossipsub", "TestSubscriptionJoinNotification", "TestSubscriptionLeaveNotification",
			"TestSubscriptionManyNotifications",
		},
		pass:  183,
		moved: 150,
	})
}

func TestSuiteOfKadDHT(t *testing.T) {
	run(t, suite{
		module: "github.com/libp2p/go-libp2p-kad-dht",
		patches: []patch{
			{"dht_test.go", "bhost.NewHost(", "moving.NewHost(t, ", 14},
			{"dht_test.go", "*bhost.BasicHost", "*moving.Host", 1},
			{"dht_test.go", "\tbhost \"github.com/libp2p/go-libp2p/p2p/host/basic\"\n", "\tbhost \"github.com/libp2p/go-libp2p/p2p/host/basic\"\n" + movingImport, 1},
		},
		long: []string{"TestProvidesMany", "TestFindPeerQueryMinimal", "TestOptimisticProvide"},
		never: []string{
			"TestBootstrappersReplacable", // a peer that is identified again comes back into the table
			"TestClientModeFindPeer",      // it asks a server that may not have identified the client yet
		},
		pass:  74,
		moved: 200,
	})
}

func TestSuiteOfGorpc(t *testing.T) {
	run(t, suite{
		module: "github.com/libp2p/go-libp2p-gorpc",
		patches: []patch{
			{"server_test.go", "= libp2p.New(", "= moving.New(t, ", 3},
			{"server_test.go", "func makeRandomNodes()", "func makeRandomNodes(t *testing.T)", 1},
			{"server_test.go", ":= makeRandomNodes()", ":= makeRandomNodes(t)", 18},
			{"server_test.go", "\t\"github.com/libp2p/go-libp2p\"\n", "\t\"github.com/libp2p/go-libp2p\"\n" + movingImport, 1},
		},
		times: 3, // its streams live for milliseconds
		pass:  3 * 18,
		moved: 3,
	})
}

func run(t *testing.T, s suite) {
	ctx, cancel := context.WithTimeout(t.Context(), 4*hosttest.Patience)
	defer cancel()
	dir := t.TempDir()
	source := strings.TrimSpace(command(t, ctx, "", "go", "list", "-m", "-f", "{{.Dir}}", s.module))
	there := filepath.Join(dir, "module")
	require.NoError(t, os.CopyFS(there, os.DirFS(source)))
	for _, p := range s.patches {
		name := filepath.Join(there, p.file)
		text, err := os.ReadFile(name)
		require.NoError(t, err)
		require.Equal(t, p.times, strings.Count(string(text), p.old), "%s has %q as often", p.file, p.old)
		require.NoError(t, os.WriteFile(name, []byte(strings.ReplaceAll(string(text), p.old, p.new)), 0o600))
	}

	// The copy takes the module's place. What it imports is found as for this module.
	mod := filepath.Join(dir, "go.mod")
	for _, name := range []string{"go.mod", "go.sum"} {
		text, err := os.ReadFile(name)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), text, 0o600))
	}
	command(t, ctx, "", "go", "mod", "edit", "-replace", s.module+"="+there, mod)
	program := filepath.Join(dir, "suite.test")
	command(t, ctx, "", "go", "test", "-modfile="+mod, "-vet=off", "-c", "-o", program, s.module)

	without := slices.Clone(s.never)
	args := []string{"-test.v", "-test.timeout=10m", "-test.count=" + strconv.Itoa(max(s.times, 1))}
	if !*all {
		without = append(without, s.long...)
		args = append(args, "-test.short")
	}
	if len(without) > 0 {
		args = append(args, "-test.skip=^("+strings.Join(without, "|")+")$")
	}
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir = there
	out, failed := cmd.CombinedOutput()

	// Tests of the suite stand at the beginning of a line; those within tests do not.
	results := make(map[string][]string)
	for _, m := range regexp.MustCompile(`(?m)^--- (PASS|FAIL|SKIP): (\S+)`).FindAllStringSubmatch(string(out), -1) {
		results[m[1]] = append(results[m[1]], m[2])
	}
	moved, closed := 0, 0
	for _, m := range regexp.MustCompile(`portage: (\d+) migrations, (\d+) connections closed`).FindAllStringSubmatch(string(out), -1) {
		moved, closed = moved+number(m[1]), closed+number(m[2])
	}
	t.Logf("%d tests passed, %d skipped themselves, %d left out; %d migrations, %d connections closed",
		len(results["PASS"]), len(results["SKIP"]), len(without), moved, closed)
	if failed != nil || len(results["FAIL"]) > 0 {
		t.Errorf("%s: %v\n%s", strings.Join(results["FAIL"], ", "), failed, about(out, results["FAIL"]))
	}
	require.GreaterOrEqual(t, len(results["PASS"]), s.pass, "tests that pass")
	require.GreaterOrEqual(t, moved, s.moved, "streams that have moved")
	require.Positive(t, closed, "connections were closed")
}

// about is what tests have said, or the end of everything where none has failed.
func about(out []byte, tests []string) []byte {
	var said [][]byte
	for _, name := range tests {
		_, after, _ := bytes.Cut(out, []byte("=== RUN   "+name+"\n"))
		text, _, _ := bytes.Cut(after, []byte("\n=== RUN   Test"))
		said = append(said, text)
	}
	if len(said) == 0 {
		said = append(said, out[max(0, len(out)-4<<10):])
	}
	return bytes.Join(said, []byte("\n"))
}

func command(t *testing.T, ctx context.Context, dir, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	require.NoError(t, cmd.Run(), "%s\n%s", cmd, cmp.Or(errs.String(), out.String()))
	return out.String()
}

func number(s string) int {
	n, _ := strconv.Atoi(s)
	return n
}
