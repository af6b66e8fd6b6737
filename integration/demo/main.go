// Demo sends a file over streams that move to a better connection on the way.
//
// Three go-libp2p hosts stand on 127.0.0.1: a sender, a receiver, and a relay
// with a data limit that the file could never pass. The transfer starts on the
// relayed connection. A moment later a direct connection comes up, and Portage
// does the rest by itself: it moves the streams there and closes the relayed
// connection. The receiver checks the SHA-256 of what has arrived.
//
//	go run ./integration/demo                    # relay to QUIC, 64 MiB, one stream
//	go run ./integration/demo -without           # only what happens on plain go-libp2p
//	go run ./integration/demo -from tcp -to quic # two direct connections
//	go run ./integration/demo -streams 100       # many transfers at once
//	go run ./integration/demo -nat               # between real NATs, as root on Linux
//	go run ./integration/demo -cut               # with its connection cut again and again
//	go run ./integration/demo -http 127.0.0.1:0  # with a status page to look at meanwhile
//
// What is shaped, so that there is something to see: the sender is paced, and
// the path through the relay is narrow. All else is as fast as it gets.
//
// With -cut streams outlive their connection (migrate.WithResumption): it is reset, cut by a relay,
// and passes nothing any more, and each time the transfer goes on over what is left. With
// -without it ends at the first.
//
// It is drawn, with the same on plain go-libp2p below it, which is run for that.
//
// With -http the hosts stay when all is done, and so does their status page, until Ctrl-C.
//
// The exit status is 0 only if all of the file arrived, and, unless -without or -cut is
// given, if one connection is left.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	beNode()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	status := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(status)
}

// run is the program. Its result is the exit status: 0 if the file arrived and
// all went as it should, 1 if not, 2 if the flags make no sense.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	cfg, err := parseFlags(args, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	} else if err != nil {
		fmt.Fprintf(stderr, "demo: %v\n", err)
		return 2
	}
	return cfg.run(ctx, stdout, stderr)
}

// run is the program once its flags are read.
func (cfg config) run(ctx context.Context, stdout, stderr io.Writer) int {
	con := newConsole(stderr, cfg.size)
	rec := newRecorder(cfg)
	if cfg.http != "" {
		srv, err := serve(cfg.http)
		if err != nil {
			fmt.Fprintf(stderr, "demo: %v\n", err)
			return 1
		}
		cfg.server = srv
	}
	interrupted := ctx
	ctx, cancel := context.WithTimeoutCause(ctx, cfg.timeout,
		fmt.Errorf("not done after %v: -timeout gives it more time", cfg.timeout))
	defer cancel()
	sum := cfg.show(ctx, rec, con)

	if cfg.svg != "" && sum.begun {
		if err := os.WriteFile(cfg.svg, pictureOf(sum, compare(ctx, cfg, sum, con)).draw(), 0o644); err != nil {
			sum.fail(fmt.Errorf("chart: %w", err))
		} else {
			sum.chart = cfg.svg
		}
	}
	if srv := cfg.server; srv != nil {
		defer func() {
			con.say("status page: %s (sender), %s/receiver; Ctrl-C ends", srv.url(), srv.url())
			<-interrupted.Done()
			if err := srv.close(); err != nil {
				fmt.Fprintf(stderr, "demo: %v\n", err)
			}
		}()
		con.say("")
	}
	write := sum.writeText
	if cfg.json {
		write = sum.writeJSON
	}
	if err := write(stdout); err != nil {
		fmt.Fprintf(stderr, "demo: %v\n", err)
		return 1
	}
	if sum.err != nil {
		if cfg.json {
			fmt.Fprintf(stderr, "demo: %v\n", sum.err)
		}
		return 1
	}
	return 0
}

// show goes through the whole story, where -nat says that it takes place.
func (cfg config) show(ctx context.Context, rec *recorder, con *console) *summary {
	if cfg.cut {
		return demonstrateCuts(ctx, cfg, rec, con)
	}
	if cfg.nat {
		return demonstrateNAT(ctx, cfg, rec, con)
	}
	return demonstrate(ctx, cfg, rec, con)
}

// compare runs the same on plain go-libp2p, where that shows a difference and somebody
// looks. It returns nil otherwise.
func compare(ctx context.Context, cfg config, sum *summary, con *console) *summary {
	if cfg.without || cfg.from != relay && !cfg.cut || cfg.json || sum.err != nil {
		return nil
	}
	con.say("the same without Portage, for the picture")
	cfg.without = true
	without := cfg.show(ctx, newRecorder(cfg), con)
	if !without.begun || ctx.Err() != nil {
		con.say("there is nothing to compare with: %v", without.err)
		return nil
	}
	con.say("without Portage %s of %s arrived", formatSize(without.arrived), formatSize(cfg.size))
	return without
}

// settleTime is how long the demo waits, after the transfer, for the first
// connection to be closed. A fraction of a second is enough, and on a machine that is
// busy some seconds; what takes longer than this does not happen.
const settleTime = time.Minute

// demonstrate goes through the whole story, and tells it on con. It leaves nothing
// running.
func demonstrate(ctx context.Context, cfg config, rec *recorder, con *console) *summary {
	sum := &summary{cfg: cfg}
	src, err := openSource(cfg)
	if err != nil {
		return sum.fail(err)
	}
	defer src.Close()

	bed, err := newTestbed(ctx, cfg, rec, con)
	if srv := cfg.server; srv != nil && !cfg.without {
		srv.keep(bed.close)
	} else {
		defer bed.close()
	}
	if err != nil {
		return sum.fail(cause(ctx, err))
	}
	if srv := cfg.server; srv != nil && !cfg.without {
		con.say("status page: %s (sender), %s/receiver; metrics: %s/metrics", srv.url(), srv.url(), srv.url())
	}
	for _, line := range bed.describe() {
		con.say("%s", line)
	}
	if err := bed.connectFirst(ctx); err != nil {
		return sum.fail(cause(ctx, fmt.Errorf("first connection (%s): %w", cfg.from.title(), err)))
	}
	con.say("first connection: %s; sending %s in %s over it", cfg.from.title(), formatSize(cfg.size), plural(cfg.streams, "stream"))

	t := newTransfer(cfg, bed, rec)
	stopProgress := con.progress(rec)
	rec.start()
	sum.begun = true
	sending, stopSending := context.WithCancel(ctx)
	defer stopSending()
	done := make(chan struct{})
	var sendErr error // once done
	go func() {
		defer close(done)
		sendErr = t.run(sending, src)
	}()

	if cfg.before != nil {
		if err := cfg.before(ctx); err != nil {
			return sum.fail(err)
		}
	}
	secondUp, err := bed.connectSecond(ctx, rec, cfg.after, done)
	if secondUp {
		sum.before = bed.awaitBoth(ctx)
		con.say("second connection up: %s", cfg.to.title())
	} else {
		stopSending()
	}
	<-done
	stopProgress()
	switch {
	case err != nil:
	case sendErr != nil && secondUp:
		bed.awaitOne(ctx, patience) // so that both ends know what became of the first
		err = sendErr
	case sendErr != nil:
		err = sendErr
	case !secondUp:
		err = errors.New("all was sent before the second connection was dialled: use a greater -size, a lower -rate or a lower -after")
	case !cfg.without:
		err = bed.awaitOne(ctx, settleTime)
	}
	rec.stop()
	sum.after = bed.connections()
	sum.record = rec.report()
	sum.arrived, sum.verified, sum.sha256 = t.result()
	return sum.fail(cause(ctx, err))
}

// cause returns why ctx has ended, if it has, or else err.
func cause(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}
