// Package slogcore writes what is logged with zap to a slog.Handler.
package slogcore

import (
	"context"
	"log/slog"
	"maps"
	"slices"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// New returns a logger that writes to h: each field becomes an attribute, and a level of
// zap's is slog's of the same name. Levels above error are slog.LevelError+4 and more.
func New(h slog.Handler) *zap.Logger { return zap.New(core{h}) }

type core struct{ h slog.Handler }

var _ zapcore.Core = core{}

func (c core) Enabled(l zapcore.Level) bool { return c.h.Enabled(context.Background(), level(l)) }

func (c core) With(fields []zapcore.Field) zapcore.Core { return core{c.h.WithAttrs(attrs(fields))} }

func (c core) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if !c.Enabled(e.Level) {
		return ce
	}
	return ce.AddCore(e, c)
}

func (c core) Write(e zapcore.Entry, fields []zapcore.Field) error {
	r := slog.NewRecord(e.Time, level(e.Level), e.Message, e.Caller.PC)
	if e.LoggerName != "" {
		r.AddAttrs(slog.String("logger", e.LoggerName))
	}
	r.AddAttrs(attrs(fields)...)
	return c.h.Handle(context.Background(), r)
}

func (c core) Sync() error { return nil }

// level: both have four levels that count up from debug, and info is 0.
func level(l zapcore.Level) slog.Level { return slog.Level(l) * (slog.LevelWarn - slog.LevelInfo) }

func attrs(fields []zapcore.Field) []slog.Attr {
	as := make([]slog.Attr, 0, len(fields))
	for _, f := range fields {
		// One field may be several keys: of an error also its verbose text.
		m := zapcore.NewMapObjectEncoder()
		f.AddTo(m)
		for _, key := range slices.Sorted(maps.Keys(m.Fields)) {
			as = append(as, slog.Any(key, m.Fields[key]))
		}
	}
	return as
}
