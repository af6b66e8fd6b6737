package connmgr

import (
	"strings"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	"github.com/stretchr/testify/require"
)

func TestExplain(t *testing.T) {
	line := func(w *world) string { return w.m.Explain(w.peer).State }
	t.Run("who decides, and each connection", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			w.connectLimited().setPlain(2)
			w.connect(tcpAddr)
			direct := w.connect(quicAddr)
			direct.open(1)
			explained := func(tcp string) string {
				return "peer " + higher.String() + ": consolidating; this side decides: it has the lower peer ID\n" +
					"  1. quic direct " + quicAddr + " (conn-3), 1 stream (1 labelled, 0 pinned): kept\n" +
					"  2. tcp direct " + tcpAddr + " (conn-2), 0 streams (0 labelled, 0 pinned), rule transport: quic over tcp: " + tcp + "\n" +
					"  3. limited relay " + relayAddr + " (conn-1), 2 streams (0 labelled, 2 pinned), rule unlimited: true over false: kept until 2 streams that cannot move (2 of /test/plain/1.0.0) have ended"
			}
			w.pass(1500 * time.Millisecond)
			require.Equal(t, explained("quiet for 1.5 s of 2 s, then closed"), w.m.Explain(higher).String())
			w.pass(time.Second)
			require.Equal(t, explained("quiet for 2.5 s; closed when the winner has proved itself, in 500 ms"), w.m.Explain(higher).String())
			require.Equal(t, "alive", w.m.Explain(higher).Conns[1].Path)
		})
	})
	t.Run("states", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			require.Equal(t, "no connection", line(w))
			relay := w.connectLimited()
			require.Equal(t, "one connection, through a relay that limits it", line(w))
			s := relay.open(1)[0]
			w.mover.setAnswer(func(*fakeStream) error { return errFakeReset })
			direct := w.connect(quicAddr)
			w.pass(25 * time.Millisecond)
			require.Equal(t, "settling for another 75 ms, since all others are limited", line(w))
			w.pass(fastSettle)
			require.Equal(t, "1 stream moving", line(w))
			w.pass(100 * time.Millisecond)
			require.Equal(t, "1 stream failed to move, next attempt in 975 ms", line(w))
			require.Equal(t, "1 stream failed to move, next attempt in 975 ms", w.m.Explain(higher).Conns[1].State)
			relay.remove(s)
			w.pass(time.Minute)
			require.Equal(t, "one connection, nothing to do", line(w))
			second := w.connect(quicAddr)
			second.setPlain(1)
			direct.open(1)
			w.pass(250 * time.Millisecond)
			require.Equal(t, "settling for another 750 ms", line(w))
			w.pass(time.Minute)
			direct.setPlain(9)
			w.pass(defaultInterval)
			require.Contains(t, line(w), "another connection ranks first now, and wins if it still does in ")
			require.Equal(t, second.id, w.m.Explain(higher).Conns[0].Conn.ID, "the winner in force comes first")
			require.NoError(t, w.m.Close())
			require.Equal(t, "the manager is closed", line(w))
		})
	})
	t.Run("following", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, lower)
			relay := w.connectLimited()
			relay.openTheirs(1)
			relay.setPlain(1)
			direct := w.connect(quicAddr)
			direct.open(1)
			w.pass(3 * time.Second)
			e := w.m.Explain(lower)
			require.False(t, e.Controller)
			require.Equal(t, "the peer has the lower peer ID", e.Reason)
			require.Equal(t, "following, takes over in 7 s if nothing happens", e.State)
			require.Equal(t, "1 stream to move, once the peer says where to", e.Conns[1].State)
			w.pass(time.Minute)
			require.Equal(t, "taken over, since the peer did nothing", line(w))
		})
	})
	t.Run("no network", func(t *testing.T) {
		w := newBareWorld(t, higher)
		require.Equal(t, "the manager has not met a network yet", line(w))
	})
	t.Run("paths", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			quic, tcp := w.connect(quicAddr), w.connect(tcpAddr)
			quic.set(func() { quic.silent, quic.plain = true, 1 })
			tcp.set(func() { tcp.delay, tcp.plain = time.Second, 1 })
			w.pass(defaultSettleDelay - time.Millisecond)
			require.Equal(t, []string{"unknown", "unknown"}, pathsOf(w))
			w.pass(minRoundGap + defaultProbeTime)
			require.Equal(t, []string{"alive", "silent"}, pathsOf(w))
			require.Equal(t, "it does not answer", w.m.Explain(higher).Conns[1].RuledOut)
			require.Contains(t, w.m.Explain(higher).Conns[1].State, "it does not answer")
		})
	})
}

func pathsOf(w *world) []string {
	var paths []string
	for _, c := range w.m.Explain(w.peer).Conns {
		paths = append(paths, c.Path)
	}
	return paths
}

// A peer with one connection that is limited: what that means, and until when.
func TestExplainOnlyALimitedConnection(t *testing.T) {
	w := newBareWorld(t, higher)
	relay := w.connectLimited()
	e := w.m.Explain(higher)
	require.Equal(t, "one connection, through a relay that limits it", e.State)
	require.Equal(t, "the only one; the relay cuts it when its limit is reached, and streams on it end then unless a direct connection comes before", e.Conns[0].State)
	require.Zero(t, e.Conns[0].Until)
	relay.Close()

	relay = w.net.connect(higher, relayAddr, true)
	relay.extra = map[any]any{client.StatLimitDuration: 2 * time.Minute}
	e = w.m.Explain(higher)
	require.Regexp(t, `^the only one; the relay cuts it in (2 m 0 s|1 m 59 s) at the latest, and streams on it end then unless`, e.Conns[0].State)
	require.Equal(t, relay.opened.Add(2*time.Minute), e.Conns[0].Until)
	relay.Close()

	w.net.connect(higher, relayAddr, false)
	require.Equal(t, "one connection, through a relay", w.m.Explain(higher).State)
}

// A peer with several limited connections: what that means, and until when.
func TestExplainOnlyLimitedConnections(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		w := newWorld(t, higher)
		w.connectLimited()
		w.net.limit = map[any]any{client.StatLimitDuration: 2 * time.Minute}
		second := w.connectLimited()
		w.pass(2 * defaultSettleDelay)
		e := w.m.Explain(higher)
		require.Equal(t, "only limited connections, each with a budget of its own: all are left, and streams leave one that is about to be cut", e.State)
		said := make(map[string]ExplainedConn)
		for _, c := range e.Conns {
			said[c.Conn.ID] = c
		}
		require.Equal(t, "kept: its relay limits it, as the others", said["conn-1"].State)
		require.Equal(t, "kept: its relay limits it, as the others, and cuts it in 1 m 58 s at the latest", said["conn-2"].State)
		require.Equal(t, second.opened.Add(2*time.Minute), said["conn-2"].Until)

		w.pass(2*time.Minute - endingSoon)
		e = w.m.Explain(higher)
		require.Equal(t, "its relay is about to cut it", e.Conns[1].RuledOut)
		require.Equal(t, second.id, e.Conns[1].Conn.ID)
	})
}

// Nothing that a peer chooses can write lines of its own, into an explanation, a report or
// the log.
func TestWhatAPeerSaysIsQuoted(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		const forged = "no\npeer xyz: kept tcp direct\x1b[2J\u202e"
		w := newWorld(t, higher)
		w.connect(quicAddr).setPlain(1)
		tcp := w.connect(tcpAddr)
		tcp.set(func() { tcp.refuses = forged })
		w.pass(2 * defaultSettleDelay)
		e := w.m.Explain(higher)
		require.Contains(t, e.Conns[1].State, "the peer refused")
		report, err := w.m.Consolidate(t.Context(), higher)
		require.NoError(t, err)
		for _, text := range append(w.messages(), e.Conns[1].State, report.String(), report.Losers[0].Kept) {
			require.NotContains(t, text, "\npeer xyz")
			require.NotContains(t, text, "\x1b")
			require.NotContains(t, text, "\u202e")
		}
		require.Len(t, strings.Split(e.String(), "\n"), 3)
	})
}

func TestWords(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Second:                   "0 ms",
		1499 * time.Microsecond:        "1 ms",
		221 * time.Millisecond:         "221 ms",
		4212 * time.Millisecond:        "4.21 s",
		time.Minute + 5*time.Second:    "1 m 5 s",
		61*time.Minute + 4*time.Second: "61 m 4 s",
	} {
		require.Equal(t, want, inWords(d), "%v", d)
	}
	require.Equal(t, "1 stream", streams(1))
	require.Equal(t, "0 streams", streams(0))
}
