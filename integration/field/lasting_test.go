package field

import (
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/connmgr"
	. "github.com/go-portage/portage/internal/simtest"
	"github.com/go-portage/portage/migrate"
)

// All direct paths die, which QUIC does not notice for half a minute, and the relay that is left
// cuts at its limit every few seconds. A stream that outlives its connections goes on each time:
// the connection that is open still and brings nothing keeps nobody from dialling.
func TestStreamsOutliveTheRelayBesideADeadPath(t *testing.T) {
	together(t, func(w *world) {
		lasting := setup{manager: []connmgr.Option{connmgr.WithMigrateOptions(migrate.WithResumption())}}
		w.hosts(lasting)
		through := w.relayed(true).RemoteMultiaddr()
		w.direct(QUIC, 1)
		w.a.Peerstore().AddAddr(w.b.ID(), through, peerstore.PermanentAddrTTL)
		c := w.chat(w.a, w.b, 2000, 50*time.Millisecond)
		time.Sleep(10 * time.Second)
		require.NoError(w, c.state(time.Second))
		for _, x := range w.a.IPs() {
			for _, y := range w.b.IPs() {
				w.Freeze(x, y)
			}
		}
		time.Sleep(29 * time.Second)
		require.NotNil(w, w.a.on(QUIC, w.b), "QUIC has not noticed yet")
		require.NoError(w, c.state(2*time.Second))
		require.Less(w, c.wait(), 10*time.Second, "the path was found silent, and nothing has taken longer than that")
		require.Greater(w, w.log.count("lost limited relay, resumed"), 2, "the relay has cut")
	})
}
