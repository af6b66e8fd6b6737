//go:build !race

// Package model_test runs the model of the protocol: see README.md. It has nothing to do
// with Go's race detector.
package model_test

import (
	"os/exec"
	"testing"
)

// rows are the configurations that say most in a few seconds: everything may fail, and
// what goes wrong without the rules that matter most. Continuous integration runs the
// others as well.
var rows = []string{
	"one", "causes", "no-S1", "no-S3", "no-S5", "no-S12", "no-M1", "reach-survival",
	"resume", "resume-no-epochs", "resume-no-freeze", "resume-no-tombstone", "resume-believes", "resume-reach-once",
}

// TestModel checks these rows. It needs Spin and gcc, and is skipped where they are not.
func TestModel(t *testing.T) {
	for _, tool := range []string{"bash", "spin", "gcc"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("the model is checked with Spin, and %s is not installed (Debian: apt install spin gcc)", tool)
		}
	}
	out, err := exec.CommandContext(t.Context(), "bash", append([]string{"check.sh"}, rows...)...).CombinedOutput()
	t.Logf("\n%s", out)
	if err != nil {
		t.Fatalf("a verdict is not the expected one, or the model could not be checked: %v", err)
	}
}
