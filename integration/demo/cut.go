package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	ma "github.com/multiformats/go-multiaddr"
)

// -cut: what the stream is on is lost, again and again, and each time another way is left.
//
//	          +-------+
//	   +------| relay |------+             reset     limit     limit     nothing passes
//	   |      +-------+      |               |         |         |         |
//	shaper                   |           TCP |  relay  |  relay  |   QUIC  |  TCP
//	   |                     |
//	sender -- TCP door ----- receiver
//	       -- QUIC door ----

// cut is one loss of the connection, and where streams went on.
type cut struct {
	what  string
	at    time.Duration
	next  path          // "": on none
	after time.Duration // until the last stream went on, at both ends
	again int64         // bytes that were sent again
}

// act is a loss that is to come, with what is there after it.
type act struct {
	what   string
	strike func() // nil: it comes by itself
	then   func() // once all streams have gone on
}

func (bed *testbed) acts() []act {
	nothing := func() {}
	return []act{
		{"the TCP connection is reset", bed.doors[tcp].shut, nothing},
		{"the relay cuts at its limit", nil, func() { bed.open(quic) }},
		{"the relay cuts again", nil, func() { bed.open(tcp) }},
		{"nothing passes over QUIC any more, and the relay is gone", func() {
			bed.doors[quic].shut()
			bed.relay.Close()
		}, nothing},
	}
}

// cutLimits are of a relay that is cut twice while there is something to send. Beside that share
// there is room for what is under way in windows and buffers.
func cutLimits(size int64) relayLimits {
	return relayLimits{rate: size / 16, data: size/16 + 256<<10, time: time.Minute}
}

// newCutbed is newTestbed of -cut.
func newCutbed(ctx context.Context, cfg config, rec *recorder, con *console) (*testbed, error) {
	bed := &testbed{cfg: cfg, doors: make(map[path]door)}
	var addrs []ma.Multiaddr
	for _, p := range []path{tcp, quic} {
		d, err := newDoor(p)
		if err != nil {
			return bed, err
		}
		bed.doors[p] = d
		addrs = append(addrs, d.addr())
	}
	// What comes through the doors ends before they do.
	defer func() {
		for _, d := range bed.doors {
			bed.closers = append(bed.closers, d.close)
		}
	}()
	var err error
	if bed.receiver, err = bed.start(receiverSide, rec, con,
		libp2p.ListenAddrStrings(tcp.listenAddr(), quic.listenAddr()),
		libp2p.AddrsFactory(func([]ma.Multiaddr) []ma.Multiaddr { return addrs }),
	); err != nil {
		return bed, err
	}
	if bed.sender, err = bed.start(senderSide, rec, con, libp2p.NoListenAddrs, libp2p.EnableRelay()); err != nil {
		return bed, err
	}
	if err := bed.startRelay(); err != nil {
		return bed, err
	}
	relayInfo := peer.AddrInfo{ID: bed.relay.ID(), Addrs: bed.relay.Addrs()}
	if err := bed.receiver.Connect(ctx, relayInfo); err != nil {
		return bed, fmt.Errorf("receiver to relay: %w", err)
	}
	if _, err := client.Reserve(ctx, bed.receiver, relayInfo); err != nil {
		return bed, fmt.Errorf("reservation: %w", err)
	}
	return bed, nil
}

// connectToCut makes the first connection, over TCP. All other ways are known from then on.
func (bed *testbed) connectToCut(ctx context.Context) error {
	bed.open(tcp)
	if err := bed.sender.Connect(ctx, peer.AddrInfo{ID: bed.receiver.ID(), Addrs: []ma.Multiaddr{bed.doors[tcp].addr()}}); err != nil {
		return err
	}
	circuit, err := ma.NewMultiaddr(fmt.Sprintf("/ip4/127.0.0.1/tcp/%d/p2p/%s/p2p-circuit", bed.shaper.port(), bed.relay.ID()))
	if err != nil {
		return err
	}
	bed.sender.Peerstore().AddAddrs(bed.receiver.ID(),
		[]ma.Multiaddr{bed.doors[tcp].addr(), bed.doors[quic].addr(), circuit}, peerstore.PermanentAddrTTL)
	return nil
}

// open opens a door to where the receiver listens.
func (bed *testbed) open(p path) { bed.doors[p].open(bed.behind(p)) }

// behind is where the receiver listens.
func (bed *testbed) behind(p path) string {
	code := ma.P_TCP
	if p == quic {
		code = ma.P_UDP
	}
	for _, addr := range bed.receiver.Network().ListenAddresses() {
		if port, err := addr.ValueForProtocol(code); err == nil {
			return "127.0.0.1:" + port
		}
	}
	return ""
}

// demonstrateCuts is demonstrate of -cut.
func demonstrateCuts(ctx context.Context, cfg config, rec *recorder, con *console) *summary {
	sum := &summary{cfg: cfg}
	src, err := openSource(cfg)
	if err != nil {
		return sum.fail(err)
	}
	defer src.Close()
	bed, err := newCutbed(ctx, cfg, rec, con)
	if srv := cfg.server; srv != nil && !cfg.without {
		srv.keep(bed.close)
	} else {
		defer bed.close()
	}
	if err != nil {
		return sum.fail(cause(ctx, err))
	}
	for _, line := range bed.describe() {
		con.say("%s", line)
	}
	if err := bed.connectToCut(ctx); err != nil {
		return sum.fail(cause(ctx, fmt.Errorf("first connection: %w", err)))
	}
	con.say("first connection: %s; sending %s in %s over it", tcp.title(), formatSize(cfg.size), plural(cfg.streams, "stream"))

	t := newTransfer(cfg, bed, rec)
	stopProgress := con.progress(rec)
	rec.start()
	sum.begun = true
	sending, done := context.WithCancel(ctx) // until all is sent, or nothing more will be
	var sendErr error                        // once done
	go func() {
		defer done()
		sendErr = t.run(ctx, src)
	}()
	sum.cuts = bed.cutAll(sending, rec, con)
	<-sending.Done()
	stopProgress()
	rec.stop()
	err = sendErr
	if n := len(sum.cuts); err == nil && (n < len(bed.acts()) || sum.cuts[n-1].next == "") {
		err = errors.New("all was sent before all was cut: use a greater -size, a lower -rate or a lower -after")
	}
	sum.after = bed.connections()
	sum.record = rec.report()
	sum.arrived, sum.verified, sum.sha256 = t.result()
	return sum.fail(cause(ctx, err))
}

// cutAll cuts until ctx ends or there is nothing more to cut, and returns what was cut.
func (bed *testbed) cutAll(ctx context.Context, rec *recorder, con *console) (cuts []cut) {
	select {
	case <-rec.underWay:
	case <-ctx.Done():
		return nil
	}
	for _, a := range bed.acts() {
		if a.strike != nil {
			timer := time.NewTimer(bed.cfg.after)
			defer timer.Stop()
			select {
			case <-timer.C:
			case <-ctx.Done():
				return cuts
			}
			con.say("cut: %s", a.what)
			rec.strike(a.what)
			a.strike()
		} else if err := poll(ctx, rec.struck); err != nil {
			return cuts
		} else {
			con.say("cut: %s", a.what)
			rec.strike(a.what)
		}
		if err := poll(ctx, rec.wentOn); err != nil {
			c := rec.outcome()
			c.next = "" // not of all streams, at both ends
			return append(cuts, c)
		}
		cuts = append(cuts, rec.outcome())
		a.then()
	}
	return cuts
}
