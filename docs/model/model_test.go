//go:build !race

// Package model_test runs the model of the protocol: see README.md. It has nothing to do
// with Go's race detector.
package model_test

import (
	"os/exec"
	"testing"
)

// TestModel runs the quick part of check.sh, which takes a minute or two on one core.
// It needs Spin and gcc, and is skipped where they are not. Continuous integration runs
// the rest.
func TestModel(t *testing.T) {
	for _, tool := range []string{"bash", "spin", "gcc"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("the model is checked with Spin, and %s is not installed (Debian: apt install spin gcc)", tool)
		}
	}
	out, err := exec.CommandContext(t.Context(), "bash", "check.sh", "quick").CombinedOutput()
	t.Logf("\n%s", out)
	if err != nil {
		t.Fatalf("a verdict is not the expected one, or the model could not be checked: %v", err)
	}
}
