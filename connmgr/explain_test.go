package connmgr

import (
	"testing"
	"time"

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
			w.pass(2 * time.Second)
			require.Equal(t, "peer "+higher.String()+": consolidating; this side decides: it has the lower peer ID\n"+
				"  1. quic direct "+quicAddr+" (conn-3), 1 stream (1 labelled, 0 pinned): kept\n"+
				"  2. tcp direct "+tcpAddr+" (conn-2), 0 streams (0 labelled, 0 pinned), rule transport: quic over tcp: quiet for 1 s of 2 s, then closed\n"+
				"  3. limited relay "+relayAddr+" (conn-1), 2 streams (0 labelled, 2 pinned), rule unlimited: true over false: kept until 2 streams that cannot move have ended",
				w.m.Explain(higher).String())
		})
	})
	t.Run("states", func(t *testing.T) {
		inVirtualTime(t, func(t *testing.T) {
			w := newWorld(t, higher)
			require.Equal(t, "no connection", line(w))
			relay := w.connectLimited()
			require.Equal(t, "one connection, nothing to do", line(w))
			s := relay.open(1)[0]
			w.mover.setAnswer(func(*fakeStream) error { return errFakeReset })
			direct := w.connect(quicAddr)
			w.pass(250 * time.Millisecond)
			require.Equal(t, "settling for another 750 ms", line(w))
			w.pass(800 * time.Millisecond)
			require.Equal(t, "1 stream moving", line(w))
			w.pass(100 * time.Millisecond)
			require.Equal(t, "1 stream failed to move, next attempt in 950 ms", line(w))
			require.Equal(t, "1 stream to move", w.m.Explain(higher).Conns[1].State)
			relay.remove(s)
			w.pass(time.Minute)
			require.Equal(t, "one connection, nothing to do", line(w))
			second := w.connect(quicAddr)
			second.setPlain(1)
			direct.open(1)
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
			relay.open(1)
			relay.set(func() { relay.noDrain = true })
			direct := w.connect(quicAddr)
			direct.open(1)
			w.pass(3 * time.Second)
			e := w.m.Explain(lower)
			require.False(t, e.Controller)
			require.Equal(t, "the peer has the lower peer ID", e.Reason)
			require.Equal(t, "following, takes over in 8 s if nothing happens", e.State)
			w.pass(time.Minute)
			require.Equal(t, "taken over, since the peer did nothing", line(w))
			require.Contains(t, w.m.Explain(lower).Conns[1].State, "of 1 m 10 s, then closed")
		})
	})
	t.Run("no network", func(t *testing.T) {
		w := newBareWorld(t, higher)
		require.Equal(t, "the manager has not met a network yet", line(w))
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
