package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/go-portage/portage/internal/natbed"
)

// natRoundTrip is what the public network adds to a round trip between any two of sender,
// receiver and relay.
const natRoundTrip = 50 * time.Millisecond

// natChunk is what one Write takes: the paces are those of a relay.
const natChunk = 1 << 10

// beNode has the process be one of the hosts between real NATs, if that is what it was
// started for, and then does not return.
func beNode() { natbed.Main() }

// demonstrateNAT is demonstrate between real NATs, with a process for each host. What the
// hosts have recorded is put together when all is over.
func demonstrateNAT(ctx context.Context, cfg config, rec *recorder, con *console) *summary {
	sum := &summary{cfg: cfg}
	if why := natbed.Missing(); why != "" {
		return sum.fail(errors.New("-nat " + why))
	}
	n, err := natbed.New(natbed.Options{RoundTrip: natRoundTrip})
	if err != nil {
		return sum.fail(err)
	}
	defer n.Close()
	for _, line := range []string{
		"                       relay 45.0.0.10",
		"                              |",
		"        NAT 45.0.0.1 ---------+--------- NAT 45.0.0.2",
		"             |                                |",
		"      sender 10.1.0.2                receiver 10.2.0.2",
	} {
		con.say("%s", line)
	}
	con.say("relay: cuts a connection after %s or %v; %v of round trip between any two", formatSize(cfg.relay.data), cfg.relay.time, natRoundTrip)
	con.say("sender: paced to %s/s", formatSize(cfg.rate))

	t := &natTransfer{cfg: cfg, net: n, rec: rec, con: con}
	err = t.start(ctx)
	if err == nil {
		err = t.run(ctx, sum)
	}
	return sum.fail(cause(ctx, err))
}

// natTransfer is a transfer between real NATs.
type natTransfer struct {
	cfg  config
	net  *natbed.Net
	rec  *recorder
	con  *console
	ends [2]natEnd // sender, receiver
}

type natEnd struct {
	side side
	node *natbed.Node
	info natbed.Info
	peer string
}

// start starts the hosts, which make a reservation with the relay.
func (t *natTransfer) start(ctx context.Context) error {
	listen := func(ip string) []string {
		if t.cfg.to == tcp {
			return []string{"/ip4/" + ip + "/tcp/4001"}
		}
		return []string{"/ip4/" + ip + "/udp/4001/quic-v1"}
	}
	limit := &natbed.Limit{Duration: t.cfg.relay.time, Data: t.cfg.relay.data}
	relay, err := t.net.Start(ctx, natbed.Relay, natbed.Config{IsRelay: true, Listen: listen("45.0.0.10"), Limit: limit})
	if err != nil {
		return err
	}
	cfg := natbed.Config{Listen: listen("0.0.0.0"), Portage: !t.cfg.without, StreamFirst: true}
	for _, a := range relay.Addrs {
		cfg.Relay = append(cfg.Relay, a+"/p2p/"+relay.ID)
	}
	for i, at := range []natbed.Side{natbed.A, natbed.B} {
		node, err := t.net.Start(ctx, at.Host(), cfg)
		if err != nil {
			return err
		}
		end := natEnd{side: []side{senderSide, receiverSide}[i], node: node}
		if err := node.Call(ctx, "reserved", nil, &end.info); err != nil {
			return err
		}
		// A relayed connection that comes before this is not upgraded.
		if err := node.Call(ctx, "punchable", nil, nil); err != nil {
			return err
		}
		t.ends[i] = end
	}
	t.ends[0].peer, t.ends[1].peer = t.ends[1].info.ID, t.ends[0].info.ID
	return nil
}

// run sends, and puts what came of it into sum.
func (t *natTransfer) run(ctx context.Context, sum *summary) error {
	sender, receiver := t.ends[0], t.ends[1]
	if err := sender.node.Call(ctx, "connect", receiver.info.Relayed(), nil); err != nil {
		return fmt.Errorf("first connection (relayed): %w", err)
	}
	const name = "file"
	begin := time.Now()
	stream := natbed.Stream{
		Name: name, Peer: receiver.info.ID, Size: t.cfg.size, Rate: t.cfg.rate, Chunk: natChunk, OneWay: true, Trace: true,
	}
	if err := sender.node.Call(ctx, "open", stream, nil); err != nil {
		return fmt.Errorf("open a stream: %w", err)
	}
	sum.begun = true
	t.rec.startAt(begin)
	t.con.say("first connection: relayed; sending %s over it", formatSize(t.cfg.size))

	for _, end := range t.ends {
		_, err := end.node.Await(ctx, "a direct connection", func(e natbed.Event) bool { return end.about(e, natbed.Connected, false) })
		if err != nil {
			return err
		}
	}
	t.con.say("a hole is punched: there is a direct connection after %.1f s", time.Since(begin).Seconds())
	sum.before = t.connections(ctx)

	var pair natbed.Pair
	err := sender.node.Call(ctx, "result", name, &pair.Opener)
	if err == nil {
		err = receiver.node.Call(ctx, "result", name, &pair.Acceptor)
	}
	if err != nil {
		return err
	}
	err = pair.Whole()
	if err == nil && !t.cfg.without {
		err = t.awaitOne(ctx)
	}
	sum.after = t.connections(ctx)
	t.book(pair)
	sum.record = t.rec.report()
	sum.arrived = pair.Acceptor.Received
	if pair.Whole() == nil {
		sum.verified, sum.sha256 = 1, pair.Acceptor.RecvSum
	}
	return err
}

// about says whether an event is of a connection to the other end.
func (e natEnd) about(ev natbed.Event, kind natbed.Kind, relayed bool) bool {
	return ev.Kind == kind && ev.Conn.Peer == e.peer && (ev.Conn.Transport == natbed.Relayed) == relayed
}

// awaitOne waits until the relayed connection is closed.
func (t *natTransfer) awaitOne(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, settleTime, fmt.Errorf(
		"all arrived, but %v later the relayed connection was still open", settleTime))
	defer cancel()
	for _, end := range t.ends {
		_, err := end.node.Await(ctx, "the end of the relayed connection",
			func(e natbed.Event) bool { return end.about(e, natbed.Disconnected, true) })
		if err != nil {
			return cause(ctx, err)
		}
	}
	return nil
}

// connections returns what connections each side has to the other.
func (t *natTransfer) connections(ctx context.Context) []connection {
	var all []connection
	for _, end := range t.ends {
		var conns []natbed.Conn
		if err := end.node.Call(ctx, "conns", end.peer, &conns); err != nil {
			continue
		}
		for _, c := range conns {
			all = append(all, connection{end.side, path(c.Transport), c.Outbound})
		}
	}
	return all
}

// book puts what the hosts have recorded into the record.
func (t *natTransfer) book(pair natbed.Pair) {
	for _, end := range t.ends {
		for _, e := range end.node.Events() {
			switch {
			case e.Kind == natbed.Move:
				t.bookMove(end.side, e)
			case end.about(e, natbed.Connected, false):
				t.rec.moment(secondUp, end.side, e.At)
			case end.about(e, natbed.Disconnected, true):
				t.rec.moment(firstDown, end.side, e.At)
			}
		}
	}
	course := t.rec.course(0)
	for _, w := range pair.Opener.Writes {
		course.depart(path(w.Transport), w.Bytes)
		t.rec.sent(path(w.Transport), w.Bytes)
	}
	for _, r := range pair.Acceptor.Reads {
		course.arrive(r.Bytes, r.At)
	}
	t.rec.stop()
}

func (t *natTransfer) bookMove(who side, e natbed.Event) {
	switch {
	case e.Text == "started" && e.Initiator:
		t.rec.moment(asked, who, e.At)
	case e.Text == "acked" && e.Initiator:
		t.rec.moment(acked, who, e.At)
	case e.Text == "send switched" && who == senderSide:
		t.rec.moment(sendSwitched, who, e.At)
	case e.Text == "receive switched" && who == receiverSide:
		t.rec.moment(receiveSwitched, who, e.At)
	case e.Text == "finished":
		if e.Initiator {
			t.rec.migrated()
		}
		t.rec.moment(finished, who, e.At)
	}
}
