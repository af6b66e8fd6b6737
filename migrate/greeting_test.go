package migrate

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/stretchr/testify/require"
)

// TestOpenerThatWaitsForTheHeader: an opener that says nothing before it has the header gets
// it, once, whatever it speaks then. One that does not wait gets it with the answer.
func TestOpenerThatWaitsForTheHeader(t *testing.T) {
	label := labelBytes(600 + newLabels(playHost).parity(playerLow, false))
	for name, rest := range map[string]string{
		"labelled": tMigration + label + tMultistream + tEcho,
		"ordinary": tEcho,
	} {
		answer := map[string]string{"labelled": tMigration + tMultistream + tEcho, "ordinary": tEcho}[name]
		bubble(t, name, func(t *testing.T) {
			h := verifyingHost()
			handled := make(chan network.Stream, 1)
			h.SetStreamHandler(echoID, func(s network.Stream) { handled <- s })
			u := newFake()
			u.conn.remote = playerLow
			go h.handleStream(u)
			time.Sleep(answerDelay)
			synctest.Wait()
			require.Equal(t, tMultistream, u.taken())
			u.feeds(tMultistream, nil)
			synctest.Wait()
			require.Equal(t, tMultistream, u.taken())
			u.feeds(rest, nil)
			require.NoError(t, (<-handled).Reset())
			require.Equal(t, tMultistream+answer, u.taken())
		})
	}
	bubble(t, "its deadline", func(t *testing.T) {
		h := verifyingHost()
		u := &lossy{fakeStream: newFake(), lost: 1}
		u.conn.remote = playerLow
		go h.handleStream(u)
		time.Sleep(answerDelay)
		synctest.Wait()
		u.feeds(tMultistream+tEcho, nil)
		synctest.Wait()
		require.NotNil(t, u.resetWith, "a part of the answer is missing")
	})
}
