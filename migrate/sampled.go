package migrate

import (
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"go.uber.org/zap"

	"github.com/go-portage/portage/internal/sampled"
)

// What a peer can have logged at warn level it can have logged thousands of times a second.
// Of each peer the first line is logged at once, and from then on one in sampleEvery, with
// the number of those in between.
const sampleEvery = 10 * time.Second

// warn logs a line about p, or counts it.
func warn(l *sampled.Lines, log *zap.Logger, what string, p peer.ID, err error, fields ...zap.Field) {
	left, logged := l.Take(p, time.Now())
	if !logged {
		return
	}
	fields = append(fields, zap.Stringer("peer", p), zap.Error(err))
	if left > 0 {
		fields = append(fields, zap.Int("more_since_last", left))
	}
	log.Warn(what, fields...)
}

// warnViolation logs that p broke the protocol (W4).
func (h *Host) warnViolation(p peer.ID, err error, fields ...zap.Field) {
	for _, violated := range h.cfg.violated {
		violated(p)
	}
	warn(&h.violations, h.log, "peer broke the stream-migration protocol", p, err, fields...)
}
