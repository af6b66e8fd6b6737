package migrate

import (
	"sync"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
)

// scope is the resource scope of a logical stream, as the application sees it. It
// stands on the scope of the underlying stream, and takes along what was set on it
// when that changes: the service, and the memory reserved and not yet released.
type scope struct {
	mu       sync.Mutex // guards all below
	cur      network.StreamScope
	service  string
	serves   network.StreamScope // the one that knows of service
	reserved int                 // bytes reserved here and in the spans of this scope
	charged  int                 // how many of them cur knows of: all, or none where it refused them

	// Guarded by the stream's mu.
	asked  bool                          // the application has it
	own    network.StreamManagementScope // cur, where it is the stream's own: see serve.go
	unpaid interface {                   // cur or its stream, where it is not charged to the protocol
		SetProtocol(protocol.ID) error
	}
}

var _ network.StreamScope = (*scope)(nil)

// ReserveMemory implements network.ResourceScope.
func (c *scope) ReserveMemory(size int, prio uint8) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.cur.ReserveMemory(size, prio); err != nil {
		return err
	}
	c.reserved += size
	c.charged += size
	return nil
}

// ReleaseMemory implements network.ResourceScope.
func (c *scope) ReleaseMemory(size int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := min(size, c.charged); n > 0 {
		c.cur.ReleaseMemory(n)
		c.charged -= n
	}
	c.reserved = max(0, c.reserved-size)
}

// Stat implements network.ResourceScope.
func (c *scope) Stat() network.ScopeStat {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cur.Stat()
}

// BeginSpan implements network.ResourceScope.
func (c *scope) BeginSpan() (network.ResourceScopeSpan, error) {
	return &span{parent: c}, nil
}

// SetService implements network.StreamScope.
func (c *scope) SetService(service string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.cur.SetService(service); err != nil {
		return err
	}
	c.service, c.serves = service, c.cur
	return nil
}

// adopt makes own, which is attached to the protocol, the scope for good. Where own refuses
// a part it changes nothing: what was counted until then still is.
func (c *scope) adopt(own network.StreamManagementScope) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.service != "" {
		if err := own.SetService(c.service); err != nil {
			return err
		}
	}
	if c.reserved > 0 {
		if err := own.ReserveMemory(c.reserved, network.ReservationPriorityAlways); err != nil {
			return err
		}
	}
	c.cur, c.own, c.charged = own, own, c.reserved
	if c.service != "" {
		c.serves = own
	}
	return nil
}

// spare says whether another one that stands on cur would be the same. The stream's mu must
// be held.
func (c *scope) spare() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.asked && c.own == nil && c.unpaid == nil && c.service == "" && c.reserved == 0
}

// attached sets what could not be set before cur was attached to its protocol. It does
// nothing where the stream has moved on.
func (c *scope) attached(cur network.StreamScope) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cur != cur {
		return nil
	}
	return c.followLocked(cur, true)
}

// follow moves everything to next, the service only if next is attached to its protocol.
// It may be called again with the same next. It returns an error where next refuses a
// part; the stream goes on all the same.
func (c *scope) follow(next network.StreamScope, attached bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.followLocked(next, attached)
}

// followLocked is follow. mu must be held.
func (c *scope) followLocked(next network.StreamScope, attached bool) error {
	var err error
	if attached && c.service != "" && c.serves != next {
		if err = next.SetService(c.service); err == nil {
			c.serves = next
		}
	}
	if c.cur == next && c.charged == c.reserved {
		return err
	}
	if c.charged > 0 { // the resource manager has one lock for the whole host
		c.cur.ReleaseMemory(c.charged)
	}
	c.cur, c.charged = next, 0
	if c.reserved > 0 {
		if e := next.ReserveMemory(c.reserved, network.ReservationPriorityAlways); e != nil {
			return e
		}
		c.charged = c.reserved
	}
	return err
}

// memory is what a span reserves in.
type memory interface {
	ReserveMemory(size int, prio uint8) error
	ReleaseMemory(size int)
}

// watchedMemory tells how much of a memory is reserved.
type watchedMemory struct {
	memory
	changed []func(more int)
}

func (o watchedMemory) ReserveMemory(size int, prio uint8) error {
	if err := o.memory.ReserveMemory(size, prio); err != nil {
		return err
	}
	for _, changed := range o.changed {
		changed(size)
	}
	return nil
}

func (o watchedMemory) ReleaseMemory(size int) {
	o.memory.ReleaseMemory(size)
	if size == 0 {
		return
	}
	for _, changed := range o.changed {
		changed(-size)
	}
}

// span is memory that is released together. It lives in the scope of a logical
// stream, not in that of an underlying one, which it may outlive. A nil span refuses
// nothing and counts nothing.
type span struct {
	parent memory
	mu     sync.Mutex // guards all below; taken before the parent's
	size   int
	done   bool
}

var _ network.ResourceScopeSpan = (*span)(nil)

// ReserveMemory implements network.ResourceScope.
func (s *span) ReserveMemory(size int, prio uint8) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done {
		return network.ErrResourceScopeClosed
	}
	if err := s.parent.ReserveMemory(size, prio); err != nil {
		return err
	}
	s.size += size
	return nil
}

// ReleaseMemory implements network.ResourceScope.
func (s *span) ReleaseMemory(size int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	size = min(size, s.size)
	s.size -= size
	s.parent.ReleaseMemory(size)
}

// Stat implements network.ResourceScope.
func (s *span) Stat() network.ScopeStat {
	s.mu.Lock()
	defer s.mu.Unlock()
	return network.ScopeStat{Memory: int64(s.size)}
}

// BeginSpan implements network.ResourceScope.
func (s *span) BeginSpan() (network.ResourceScopeSpan, error) {
	return &span{parent: s}, nil
}

// Done implements network.ResourceScopeSpan.
func (s *span) Done() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.parent.ReleaseMemory(s.size)
	s.size, s.done = 0, true
}

// reserve reserves memory for what is read ahead of the application: such a buffer is
// needed for the stream to go on, but not at the cost of everybody else's.
func (s *span) reserve(size int) error {
	if s == nil || size == 0 {
		return nil
	}
	return s.ReserveMemory(size, network.ReservationPriorityHigh)
}

// empty says whether nothing is reserved.
func (s *span) empty() bool {
	if s == nil {
		return true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.size == 0
}

func (s *span) release(size int) {
	if s != nil && size > 0 {
		s.ReleaseMemory(size)
	}
}
