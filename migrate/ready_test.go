package migrate

import (
	"io"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/rawpeer"
)

// ackWatcher is a new stream that has something happen before the Write of the ack
// returns.
type ackWatcher struct {
	*fakeStream
	ack       string
	meanwhile func()
}

func (w *ackWatcher) Write(p []byte) (int, error) {
	n, err := w.fakeStream.Write(p)
	if strings.HasSuffix(string(p[:n]), w.ack) {
		w.meanwhile()
	}
	return n, err
}

// TestReadyBeforeTheAckLeaves: S1. A path may be so fast that the initiator has the ack,
// has switched and has ended the old stream before the responder's Write of that ack has
// returned. That EOF is the migration's, and not for the application.
func TestReadyBeforeTheAckLeaves(t *testing.T) {
	for name, initiator := range map[string]struct {
		request func(id, from uint64) string
		ack     string
		first   string // what the initiator sends on the new stream before its data
	}{
		"verified":   {MigrateBytes, AckVerified, FinalSizeBytes(0)},
		"draft-only": {MigrateDraftBytes, AckDraft, ""},
	} {
		bubble(t, name, func(t *testing.T) {
			h, old := verifyingHost(), newFake()
			s := acceptedOn(t, h, old)
			label := s.Label()
			got := reading(s)
			old.awaitReader()

			acked := make(chan struct{})
			next := &ackWatcher{fakeStream: newFake(), ack: initiator.ack, meanwhile: func() {
				old.ends(io.EOF)
				synctest.Wait() // whoever reads has read it
				close(acked)
			}}
			next.conn.remote = playerLow
			next.feeds(Prelude+initiator.request(label+2, label), nil)
			defer func() { _ = next.Reset() }()
			done := make(chan struct{})
			go func() {
				defer close(done)
				h.handleStream(next)
			}()
			<-acked
			require.Empty(t, got, "the application was given the migration's EOF")
			next.feeds(initiator.first+"new", nil)
			<-done
			require.Equal(t, "new", <-got)
			require.NoError(t, s.Close())
		})
	}
}
