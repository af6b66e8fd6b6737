//go:build !linux

package nat

import "testing"

func TestRealNATs(t *testing.T) { t.Skip("real NATs: needs Linux, for its network namespaces") }
