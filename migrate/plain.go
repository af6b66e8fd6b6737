package migrate

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	basichost "github.com/libp2p/go-libp2p/p2p/host/basic"
	msmux "github.com/multiformats/go-multistream"
)

// Streams without a label, on a connection that the swarm has not chosen. The plain host
// cannot open them, so that what it does once it has its connection stands here again
// (basichost.BasicHost.NewStream of go-libp2p v0.51.0): same bytes, same round trips,
// same errors.

// plain makes u, which was just opened, a stream without a label. pref is the one of pids
// that the peer is known to speak, or empty. Where it fails, the caller resets u.
func (h *Host) plain(ctx context.Context, u network.Stream, pref protocol.ID, pids []protocol.ID) (network.Stream, error) {
	if pref != "" {
		if err := u.SetProtocol(pref); err != nil {
			return nil, err
		}
		return &plainStream{Stream: u, rw: msmux.NewMSSelect(u, pref)}, nil
	}
	selected, err := h.selectOneOf(ctx, pids, u)
	if err != nil {
		return nil, err
	}
	return h.agreed(u, selected)
}

// selectOneOf negotiates one of pids over u, obeying ctx.
func (h *Host) selectOneOf(ctx context.Context, pids []protocol.ID, u network.Stream) (protocol.ID, error) {
	type result struct {
		pid protocol.ID
		err error
	}
	done := make(chan result, 1)
	go func() {
		pid, err := msmux.SelectOneOf(pids, u)
		done <- result{pid, err}
	}()
	select {
	case r := <-done:
		if r.err != nil {
			return "", notNegotiated(r.err)
		}
		return r.pid, nil
	case <-ctx.Done():
		_ = u.ResetWithError(network.StreamProtocolNegotiationFailed)
		<-done
		return "", notNegotiated(ctx.Err())
	}
}

func notNegotiated(err error) error { return fmt.Errorf("failed to negotiate protocol: %w", err) }

// agreed makes u a stream of the protocol that was negotiated.
func (h *Host) agreed(u network.Stream, selected protocol.ID) (network.Stream, error) {
	if err := u.SetProtocol(selected); err != nil {
		_ = u.ResetWithError(network.StreamResourceLimitExceeded)
		return nil, err
	}
	_ = h.Peerstore().AddProtocols(u.Conn().RemotePeer(), selected) // helpful, not critical
	return u, nil
}

// plainStream is a stream whose protocol is negotiated with its first bytes.
type plainStream struct {
	network.Stream
	rw io.ReadWriteCloser
}

func (s *plainStream) Read(b []byte) (int, error)  { return s.rw.Read(b) }
func (s *plainStream) Write(b []byte) (int, error) { return s.rw.Write(b) }

// Close implements network.MuxedStream. It waits for the peer's answer, but not for ever.
func (s *plainStream) Close() error {
	_ = s.SetReadDeadline(time.Now().Add(basichost.DefaultNegotiationTimeout))
	return s.rw.Close()
}

// CloseWrite implements network.MuxedStream. What the negotiation has to send goes first;
// its error shows when the application reads.
func (s *plainStream) CloseWrite() error {
	if f, ok := s.rw.(interface{ Flush() error }); ok {
		_ = f.Flush()
	}
	return s.Stream.CloseWrite()
}
