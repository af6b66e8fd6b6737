//go:build !linux

package main

import (
	"context"
	"errors"
)

// beNode does nothing: there are no nodes; see nat_linux.go.
func beNode() {}

// demonstrateNAT says that it cannot.
func demonstrateNAT(_ context.Context, cfg config, _ *recorder, _ *console) *summary {
	return (&summary{cfg: cfg}).fail(errors.New("-nat needs Linux, for its network namespaces"))
}
