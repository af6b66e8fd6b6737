package main

import (
	"slices"
	"time"

	"github.com/libp2p/go-libp2p"
	"go.uber.org/zap"

	"github.com/go-portage/portage/connmgr"
	"github.com/go-portage/portage/migrate"
	"github.com/go-portage/portage/policy"
)

// settleDelay is how long the manager lets two connections stand side by side
// before it decides. It is longer than loopback needs, so that it can be seen in the
// picture.
const settleDelay = 300 * time.Millisecond

// withPortage is all that the demo needs of Portage on one host.
func withPortage(cfg config, who side, rec *recorder, log *zap.Logger) libp2p.Option {
	streams := []migrate.Option{migrate.WithLogger(log), migrate.WithTracer(trace(who, rec))}
	if cfg.cut {
		streams = append(streams, migrate.WithResumption())
	}
	return connmgr.Enable(
		connmgr.WithPolicy(policyFor(cfg.from, cfg.to)),
		connmgr.WithLogger(log),
		connmgr.WithSettleDelay(settleDelay),
		connmgr.WithMigrateOptions(streams...),
	)
}

// policyFor returns the default policy where it prefers to over from, and else one
// that does.
func policyFor(from, to path) policy.Policy {
	if slices.Index(paths, to) < slices.Index(paths, from) {
		return policy.Default()
	}
	return policy.Chain(
		policy.Unlimited(),
		policy.Direct(),
		policy.TransportOrder(transports[to], transports[from]),
	)
}

// trace returns a tracer that turns the library's events into moments of the
// record.
func trace(who side, rec *recorder) func(migrate.Event) {
	return func(e migrate.Event) {
		switch e.Kind {
		case migrate.Started:
			if e.Initiator {
				rec.moment(asked, who, e.Time)
			}
		case migrate.Acked:
			if e.Initiator {
				rec.moment(acked, who, e.Time)
			}
		case migrate.SendSwitched:
			if who == senderSide {
				rec.moment(sendSwitched, who, e.Time)
			}
		case migrate.ReceiveSwitched:
			if who == receiverSide {
				rec.moment(receiveSwitched, who, e.Time)
			}
		case migrate.Finished:
			if e.Initiator {
				rec.migrated()
			}
			rec.moment(finished, who, e.Time)
		case migrate.Lost:
			rec.lost(who, e.Time)
		case migrate.Resumed:
			rec.resumed(who, e.Time, pathOf(e.To), int64(e.Again))
		case migrate.GivenUp:
			rec.gaveUp(who)
		}
	}
}
