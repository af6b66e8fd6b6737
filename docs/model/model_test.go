// Package model_test runs the model of the protocol: see README.md.
package model_test

import (
	"os/exec"
	"testing"
)

// TestModel runs check.sh, and only its quick part with -short. It needs Spin and gcc,
// and is skipped where they are not.
func TestModel(t *testing.T) {
	for _, tool := range []string{"bash", "spin", "gcc"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("the model is checked with Spin, and %s is not installed (Debian: apt install spin gcc)", tool)
		}
	}
	args := []string{"check.sh"}
	if testing.Short() {
		args = append(args, "quick")
	}
	out, err := exec.CommandContext(t.Context(), "bash", args...).CombinedOutput()
	t.Logf("\n%s", out)
	if err != nil {
		t.Fatalf("a verdict is not the expected one, or the model could not be checked: %v", err)
	}
}
