package migrate

import (
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	msmux "github.com/multiformats/go-multistream"
)

// What an accepted stream costs, and for how long. go-libp2p counts an inbound stream until
// it is closed and the goroutine that the swarm accepted it on has returned, and there it
// runs the handler. So a peer has no more handlers running than the resource manager grants
// it, whatever it closes.
//
// An underlying stream must not stay on its connection for the handler's sake once the
// logical one has moved. So the handler runs on a goroutine of its own. The accepting one
// waits for it, and as long as it does the swarm counts the stream. It stops waiting when a
// scope of the stream's own counts in place of the underlying one's; takeOver sees to that
// before the stream moves, and where a handler runs long, since a scope costs a tenth of a
// goroutine. Short streams have no such scope: opening it costs as much as a twentieth of
// opening the stream.

// longHandler is how long the accepting goroutine waits before the stream gets a scope of
// its own.
const longHandler = time.Second

// accepting is what the goroutine waits for that the swarm accepted a stream on.
type accepting struct {
	counted chan struct{} // holds one when the stream is counted without it
	timer   *time.Timer
}

// toServe notes that a handler will get the stream, which nobody else knows yet.
func (s *Stream) toServe() *accepting {
	a, _ := s.host.acceptings.Get().(*accepting)
	if a == nil {
		a = &accepting{make(chan struct{}, 1), time.NewTimer(longHandler)}
	} else {
		a.timer.Reset(longHandler)
	}
	s.counted, s.serving = a.counted, true
	return a
}

// serve hands s to the application's handler. It returns when the handler has, or sooner if
// the stream is counted without its caller, the goroutine that the swarm accepted it on.
func (s *Stream) serve(a *accepting, handle msmux.HandlerFunc[protocol.ID]) {
	go func() {
		defer s.served() // also where the handler ends its goroutine
		_ = handle(s.proto, s)
	}()
	for {
		select {
		case <-a.counted:
			a.timer.Stop()
			s.host.acceptings.Put(a)
			return
		case <-a.timer.C:
			// At the limit there is no room for two scopes, however short; the goroutine
			// goes on waiting.
			_ = s.takeOver()
			a.timer.Reset(longHandler)
		}
	}
}

// served notes that the handler has returned.
func (s *Stream) served() {
	s.mu.Lock()
	s.serving = false
	s.dismiss()
	s.mu.Unlock()
	s.settle()
}

// dismiss lets the accepting goroutine return. mu must be held.
func (s *Stream) dismiss() {
	if s.counted != nil {
		s.counted <- struct{}{}
		s.counted = nil
	}
}

// takeOver gives the stream a scope of its own, if only the accepting goroutine has it
// counted. Both count for a moment, so that at no moment none does.
func (s *Stream) takeOver() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.counted == nil || s.ex != nil { // an exchange does it itself
		return nil
	}
	own, err := s.host.Network().ResourceManager().OpenStream(s.peer, s.dir)
	if err != nil {
		return err
	}
	if err = own.SetProtocol(s.proto); err == nil {
		err = s.scopeLocked().adopt(own)
	}
	if err != nil {
		own.Done()
		return err
	}
	discount(s.send.stream())
	s.dismiss()
	return nil
}

// discount ends what u counts, though it lives on: its logical stream has a scope of its own.
func discount(u network.Stream) {
	// The swarm ends the scope by the same method, and a second time is no error.
	if scope, ok := u.Scope().(interface{ Done() }); ok {
		scope.Done()
	}
}

// settle ends the stream's own scope when nothing is left that it counts: the stream is
// over, or lost, its handler has returned, and no exchange is under way.
func (s *Stream) settle() {
	s.mu.Lock()
	if s.scope != nil && s.scope.own != nil && !s.serving && s.ex == nil && s.life != lifeOpen {
		s.scope.own.Done()
		s.scope.own, s.scope.unpaid = nil, nil
	}
	s.mu.Unlock()
	s.host.payOwed()
}

// chargeOwn counts a stream whose handler runs in a scope of its own before it moves from
// the old stream to u, neither of which is counted from then on: one logical stream costs
// one, though for the time of an exchange it has two underlying ones. It says whether the
// stream has such a scope.
func (x *exchange) chargeOwn(u network.Stream) (own bool, err error) {
	s := x.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if own = s.scope != nil && s.scope.own != nil; !own && s.counted == nil {
		return false, nil
	}
	_ = u.SetProtocol(s.proto) // for those who look at the streams of the connection
	discount(u)
	if own {
		return true, nil
	}
	// The place of u is the one that the scope takes: at the limit there is no other.
	scope, err := s.host.Network().ResourceManager().OpenStream(s.peer, s.dir)
	if err != nil {
		return true, err
	}
	// And under the limit of the protocol there may be the old stream's only.
	err = scope.SetProtocol(s.proto)
	discount(x.old)
	if err != nil {
		err = scope.SetProtocol(s.proto)
	}
	sc := s.scopeLocked()
	sc.own = scope
	if err != nil { // somebody was faster, and it waits for a place
		sc.unpaid = scope
	}
	if err := sc.follow(scope, err == nil); err != nil {
		s.warnUnaccounted(err)
	}
	s.dismiss()
	return true, nil
}
