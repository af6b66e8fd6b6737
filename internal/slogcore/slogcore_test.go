package slogcore

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
)

func TestWritesToTheHandler(t *testing.T) {
	var out bytes.Buffer
	log := New(slog.NewTextHandler(&out, &slog.HandlerOptions{
		Level: slog.LevelInfo,
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		},
	}))
	log.Debug("not heard")
	log.Info("moved", zap.Int("streams", 14), zap.Duration("took", 221*time.Millisecond))
	log.Named("sub").With(zap.Stringer("rule", stringer("unlimited"))).Warn("refused", zap.Error(errors.New("no room")), zap.Bool("again", true))
	log.Error("broken", zap.Strings("ids", []string{"a", "b"}))
	require.Equal(t, strings.TrimSpace(`
level=INFO msg=moved streams=14 took=221ms
level=WARN msg=refused rule=unlimited logger=sub error="no room" again=true
level=ERROR msg=broken ids="[a b]"
`), strings.TrimSpace(out.String()))
	require.False(t, log.Core().Enabled(zap.DebugLevel))
	require.NoError(t, log.Sync())
}

type stringer string

func (s stringer) String() string { return string(s) }
