package migrate

import (
	"sync"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/p2p/host/autonat"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	ma "github.com/multiformats/go-multiaddr"
)

// Optional methods
//
// go-libp2p's hosts have methods that are not in host.Host, and programs ask for them with
// a type assertion: relay finders for IDService, AutoNAT for AllAddrs, Kubo for
// ConfirmedAddrs. A Host has them all, as it is a type of its own; what it wraps may have
// none, as a routed host or a blank one. Then each answers what a basic host answers that
// has no such service, which for the programs is the same as if the assertion had failed:
// they wait for no identification, and take the addresses of Addrs.

// IDService returns the identify service of the wrapped host. Where it has none, one is
// returned that takes each connection for identified.
func (h *Host) IDService() identify.IDService {
	if ids := h.identify(); ids != nil {
		return ids
	}
	return noIdentify{}
}

// AllAddrs returns all addresses on which the wrapped host listens, also those that it
// does not advertise. Where it cannot tell, they are Addrs.
func (h *Host) AllAddrs() []ma.Multiaddr {
	if of, ok := h.Host.(interface{ AllAddrs() []ma.Multiaddr }); ok {
		return of.AllAddrs()
	}
	return h.Addrs()
}

// ConfirmedAddrs returns the addresses of the wrapped host by what AutoNATv2 has found out
// about them: nothing where it has no AutoNATv2.
func (h *Host) ConfirmedAddrs() (reachable, unreachable, unknown []ma.Multiaddr) {
	if of, ok := h.Host.(interface {
		ConfirmedAddrs() (reachable, unreachable, unknown []ma.Multiaddr)
	}); ok {
		return of.ConfirmedAddrs()
	}
	return nil, nil, nil
}

// Reachability returns whether the wrapped host can be reached from the Internet:
// network.ReachabilityUnknown where it cannot tell.
func (h *Host) Reachability() network.Reachability {
	if of, ok := h.Host.(interface{ Reachability() network.Reachability }); ok {
		return of.Reachability()
	}
	return network.ReachabilityUnknown
}

// GetAutoNat returns the AutoNAT service of the wrapped host, or nil.
func (h *Host) GetAutoNat() autonat.AutoNAT {
	if of, ok := h.Host.(interface{ GetAutoNat() autonat.AutoNAT }); ok {
		return of.GetAutoNat()
	}
	return h.autonat.get()
}

// SetAutoNat sets the AutoNAT service, if there is none. It is closed with the host.
func (h *Host) SetAutoNat(a autonat.AutoNAT) {
	if of, ok := h.Host.(interface{ SetAutoNat(autonat.AutoNAT) }); ok {
		of.SetAutoNat(a)
		return
	}
	h.autonat.set(a)
}

// autoNAT is what SetAutoNat has set on a host that cannot hold it.
type autoNAT struct {
	mu      sync.Mutex
	service autonat.AutoNAT
}

func (a *autoNAT) get() autonat.AutoNAT {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.service
}

func (a *autoNAT) set(service autonat.AutoNAT) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.service == nil {
		a.service = service
	}
}

func (a *autoNAT) close() {
	if service := a.get(); service != nil {
		_ = service.Close()
	}
}

// noIdentify is the identify service of a host that has none.
type noIdentify struct{}

var identifiedAlready = func() <-chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

func (noIdentify) IdentifyConn(network.Conn)                 {}
func (noIdentify) IdentifyWait(network.Conn) <-chan struct{} { return identifiedAlready }
func (noIdentify) Start()                                    {}
func (noIdentify) Close() error                              { return nil }
