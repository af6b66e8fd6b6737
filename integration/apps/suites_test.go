package apps

import (
	"bytes"
	"cmp"
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/integration/apps/moving"
	"github.com/go-portage/portage/internal/hosttest"
)

var all = flag.Bool("all", false, "run the tests of other projects' suites that take long, too")

// A suite is the tests of another project's package. They run as they are, but for the line
// that makes their hosts: it calls the package moving, whose hosts have Portage, and get a
// second connection to each peer again and again.
type suite struct {
	module  string
	folder  string // of the package in the module; none: the module's own package
	times   int    // that all are run; 0: once
	patches []patch
	long    []string // tests that are left out without -all: together they take most of the time
	still   []string // tests that count connections, or say which there are: they run with Portage, but get no second one
	never   []string // tests that fail on plain hosts, too
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
		// Each connection has a peer identified again, and so put into the table again: with a
		// second one 51 of 52 runs fail on plain hosts, too, and without it none with Portage.
		still: []string{"TestBootstrappersReplacable"},
		// It asks a server for a client that the server may not have identified yet: on plain
		// hosts 5 of 1310 runs fail, with Portage 3 of 1310.
		never: []string{"TestClientModeFindPeer"},
		pass:  75,
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

// TestSuiteOfLibp2p runs go-libp2p's own tests: p2p/test, and those of what applications use
// beside the host. Not here are the tests of muxers, which integration/conformance runs on
// streams that move, p2p/test/security, which only measures, and the tests within packages that
// a host is made of (identify, autorelay, holepunch, the circuit client and the like). Most streams
// here live for milliseconds, so that few of them move, and no number is demanded.
func TestSuiteOfLibp2p(t *testing.T) {
	everything := []string{".*"}
	for _, s := range []suite{
		{folder: "p2p/test/backpressure", patches: basicHosts("backpressure_test.go", 2), times: 3, pass: 3},
		{
			folder:  "p2p/test/basichost",
			patches: newHosts("basic_host_test.go", 12),
			long:    []string{"TestWebRTCWithQUICManyConnections"},
			still:   []string{"TestNewStreamTransientConnection"}, // only a relayed connection may be there
			pass:    5,
		},
		{
			folder:  "p2p/test/negotiation",
			patches: append(newHosts("muxer_test.go", 2), newHosts("security_test.go", 2)...),
			still:   everything,
			pass:    2,
		},
		{folder: "p2p/test/notifications", patches: newHosts("notification_test.go", 1), still: everything, pass: 1},
		{folder: "p2p/test/quic", patches: newHosts("quic_test.go", 3), still: everything, pass: 1},
		{folder: "p2p/test/reconnects", patches: basicHosts("reconnect_test.go", 1), still: everything, pass: 1},
		{folder: "p2p/test/resource-manager", patches: newHosts("echo_test.go", 1), still: everything, pass: 6},
		{
			folder:  "p2p/test/swarm",
			patches: newHosts("swarm_test.go", 9),
			still:   []string{"TestNewStreamTransientConnection"}, // only a relayed connection may be there
			pass:    3,
		},
		{
			folder:  "p2p/test/transport",
			patches: newHosts("transport_test.go", 15),
			long:    []string{"TestLotsOfDataManyStreams", "TestManyStreams", "TestMoreStreamsThanOurLimits", "TestConnDroppedWhenBlocked"},
			still: []string{
				"TestIntercept.*", // a gater expects one connection, and a host one address
				"TestErrorCodes",  // it closes the connection of a stream, and expects that code
			},
			// It closes a connection on which a stream may still be negotiated, and expects that none
			// is: on a busy machine 1 of 30 runs fails on plain hosts.
			never: []string{"TestResourceManagerIsUsed"},
			pass:  16,
		},
		{folder: "p2p/test/webtransport", patches: newHosts("webtransport_test.go", 2), still: everything, pass: 1},
		{
			folder:  "p2p/http",
			patches: newHosts("libp2phttp_test.go", 24),
			still:   []string{"TestMultiaddrURIRedirect", "TestImpliedHostIsSet"}, // a host's first address is to be dialled
			pass:    32,
		},
		{folder: "p2p/net/gostream", patches: newHosts("gostream_test.go", 1), pass: 1},
		{folder: "p2p/protocol/ping", patches: basicHosts("ping_test.go", 2), pass: 1},
	} {
		t.Run(s.folder, func(t *testing.T) {
			s.module = "github.com/libp2p/go-libp2p"
			run(t, s)
		})
	}
}

// newHosts has the hosts of a file that libp2p.New makes move.
func newHosts(file string, times int) []patch {
	const libp2pImport = "\t\"github.com/libp2p/go-libp2p\"\n"
	return []patch{
		{file, "= libp2p.New(", "= moving.New(t, ", times},
		{file, libp2pImport, libp2pImport + movingImport, 1},
	}
}

// basicHosts has the hosts of a file that are basic ones move.
func basicHosts(file string, times int) []patch {
	return []patch{
		{file, "bhost.NewHost(", "moving.NewHost(t, ", times},
		{file, "\tbhost \"github.com/libp2p/go-libp2p/p2p/host/basic\"\n", movingImport, 1},
	}
}

func run(t *testing.T, s suite) {
	ctx, cancel := context.WithTimeout(t.Context(), 4*hosttest.Patience)
	defer cancel()
	dir := t.TempDir()
	source := strings.TrimSpace(command(t, ctx, "", "go", "list", "-m", "-f", "{{.Dir}}", s.module))
	there := filepath.Join(dir, "module")
	require.NoError(t, os.CopyFS(there, os.DirFS(source)))
	for _, p := range s.patches {
		name := filepath.Join(there, s.folder, p.file)
		text, err := os.ReadFile(name)
		require.NoError(t, err)
		require.Equal(t, p.times, strings.Count(string(text), p.old), "%s has %q as often", p.file, p.old)
		require.NoError(t, os.WriteFile(name, []byte(strings.ReplaceAll(string(text), p.old, p.new)), 0o600))
	}

	// The copy takes the module's place. What it imports is found as for this module. Without
	// paths, what has been compiled of one copy serves for the next one.
	mod := filepath.Join(dir, "go.mod")
	for _, name := range []string{"go.mod", "go.sum"} {
		text, err := os.ReadFile(name)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), text, 0o600))
	}
	command(t, ctx, "", "go", "mod", "edit", "-replace", s.module+"="+there, mod)
	program := filepath.Join(dir, "suite.test")
	command(t, ctx, "", "go", "test", "-modfile="+mod, "-trimpath", "-vet=off", "-c", "-o", program, path.Join(s.module, s.folder))

	var r results
	start := func(still bool, args ...string) {
		args = append(args, "-test.v", "-test.timeout=10m", "-test.count="+strconv.Itoa(max(s.times, 1)))
		if !*all {
			args = append(args, "-test.short")
		}
		cmd := exec.CommandContext(ctx, program, args...)
		cmd.Dir = filepath.Join(there, s.folder)
		cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%t", moving.Still, still))
		r.run(t, cmd)
	}
	without := slices.Clone(s.never)
	if !*all {
		without = append(without, s.long...)
	}
	start(false, "-test.skip="+names(slices.Concat(without, s.still)))
	if len(s.still) > 0 {
		start(true, "-test.run="+names(s.still), "-test.skip="+names(without))
	}
	t.Logf("%d tests passed, %d skipped themselves, %d left out; %d migrations, %d connections closed",
		r.tests["PASS"], r.tests["SKIP"], len(without), r.moved, r.closed)
	require.GreaterOrEqual(t, r.tests["PASS"], s.pass, "tests that pass")
	require.GreaterOrEqual(t, r.moved, s.moved, "streams that have moved")
	if s.moved > 0 {
		require.Positive(t, r.closed, "connections were closed")
	}
}

// names is a pattern of the tests, for the flags of go test.
func names(tests []string) string { return "^(" + strings.Join(tests, "|") + ")$" }

// results is what runs of a suite come to.
type results struct {
	tests         map[string]int // of the suite, by how they ended
	moved, closed int            // streams, and connections
}

// run runs a suite's program, and reports the tests that fail.
func (r *results) run(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	out, failed := cmd.CombinedOutput()
	if r.tests == nil {
		r.tests = make(map[string]int)
	}
	// Tests of the suite stand at the beginning of a line; those within tests do not.
	var failures []string
	for _, m := range regexp.MustCompile(`(?m)^--- (PASS|FAIL|SKIP): (\S+)`).FindAllStringSubmatch(string(out), -1) {
		r.tests[m[1]]++
		if m[1] == "FAIL" {
			failures = append(failures, m[2])
		}
	}
	for _, m := range regexp.MustCompile(`portage: (\d+) migrations, (\d+) connections closed`).FindAllStringSubmatch(string(out), -1) {
		r.moved, r.closed = r.moved+number(m[1]), r.closed+number(m[2])
	}
	if failed != nil || len(failures) > 0 {
		t.Errorf("%s: %v\n%s", strings.Join(failures, ", "), failed, about(out, failures))
	}
}

// nextTest is where a test begins that is not within another.
var nextTest = regexp.MustCompile(`(?m)^=== RUN   [^/\n]+$`)

// about is what tests have said, or the end of everything where none has failed.
func about(out []byte, tests []string) []byte {
	var said [][]byte
	for _, name := range tests {
		_, after, _ := bytes.Cut(out, []byte("=== RUN   "+name+"\n"))
		if next := nextTest.FindIndex(after); next != nil {
			after = after[:next[0]]
		}
		said = append(said, after)
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
