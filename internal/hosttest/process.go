package hosttest

import (
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// Main is the TestMain of a package: it runs the tests, and fails if a goroutine outlives
// them. goleak.VerifyTestMain gives goroutines half a second to end, which is not enough
// for what go-libp2p leaves behind when a host is closed, on a machine that is busy.
func Main(m *testing.M, ignore ...goleak.Option) {
	code := m.Run()
	if code == 0 {
		if err := FindLeaks(ignore...); err != nil {
			fmt.Fprintf(os.Stderr, "goroutines outlive the tests: %v\n", err)
			code = 1
		}
	}
	os.Exit(code)
}

// FindLeaks waits until no goroutine is left but the caller's and those to ignore. It
// returns an error that lists them when some are after Patience.
func FindLeaks(ignore ...goleak.Option) error {
	for deadline := time.Now().Add(Patience); ; {
		err := goleak.Find(ignore...) // which waits a little, too
		if err == nil || time.Now().After(deadline) {
			return err
		}
	}
}

// Alone runs the test again in a process of its own, for what is counted by process, such
// as allocations: there no other test has left goroutines or finalizers. It says whether
// this is that process; in the other one the test is over. It is for tests at the top
// level only. args go to that process, such as -test.timeout for a test that may hang.
func Alone(t *testing.T, args ...string) bool {
	t.Helper()
	const env = "PORTAGE_TEST_ALONE"
	if os.Getenv(env) == t.Name() {
		return true
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], append(args, "-test.run=^"+t.Name()+"$")...)
	cmd.Env = append(os.Environ(), env+"="+t.Name())
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("in a process of its own: %v\n%s", err, out)
	}
	return false
}
