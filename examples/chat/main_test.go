package main

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/internal/hosttest"
)

func TestMain(m *testing.M) { hosttest.Main(m) }

func TestChat(t *testing.T) {
	var out strings.Builder
	require.NoError(t, run(t.Context(), &out))
	require.Equal(t, `
[limited relay]    alice: are you there?
[limited relay]    bob:   yes, I can hear you ("are you there?")
[direct]           alice: and now?
[direct]           bob:   yes, I can hear you ("and now?")
`, "\n"+out.String())
}
