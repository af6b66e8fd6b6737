package migrate

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/rawpeer"
)

// TestOpenerThatWaitsForTheHeader: an opener that says nothing before it has the header gets
// it, once, whatever it speaks then. One that does not wait gets it with the answer.
func TestOpenerThatWaitsForTheHeader(t *testing.T) {
	label := LabelBytes(600 + newLabels(playHost).parity(playerLow, false))
	for name, rest := range map[string]string{
		"labelled": MigrationToken + label + MultistreamToken + EchoToken,
		"ordinary": EchoToken,
	} {
		answer := map[string]string{"labelled": MigrationToken + MultistreamToken + EchoToken, "ordinary": EchoToken}[name]
		bubble(t, name, func(t *testing.T) {
			h := verifyingHost()
			handled := make(chan network.Stream, 1)
			h.SetStreamHandler(echoID, func(s network.Stream) { handled <- s })
			u := newFake()
			u.conn.remote = playerLow
			go h.handleStream(u)
			time.Sleep(answerDelay)
			synctest.Wait()
			require.Equal(t, MultistreamToken, u.taken())
			u.feeds(MultistreamToken, nil)
			synctest.Wait()
			require.Equal(t, MultistreamToken, u.taken())
			u.feeds(rest, nil)
			require.NoError(t, (<-handled).Reset())
			require.Equal(t, MultistreamToken+answer, u.taken())
		})
	}
	bubble(t, "the path takes nothing", func(t *testing.T) {
		h := verifyingHost()
		u := newFake()
		u.room = 0
		u.conn.remote = playerLow
		go h.handleStream(u)
		time.Sleep(time.Second) // the header is being written
		u.feeds(MultistreamToken+MigrationToken+label, nil)
		time.Sleep(h.cfg.negotiation)
		synctest.Wait()
		require.NotNil(t, u.resetWith, "in time")
	})
	bubble(t, "its deadline", func(t *testing.T) {
		h := verifyingHost()
		u := &lossy{fakeStream: newFake(), lost: 1}
		u.conn.remote = playerLow
		go h.handleStream(u)
		time.Sleep(answerDelay)
		synctest.Wait()
		u.feeds(MultistreamToken+EchoToken, nil)
		synctest.Wait()
		require.NotNil(t, u.resetWith, "a part of the answer is missing")
	})
}
