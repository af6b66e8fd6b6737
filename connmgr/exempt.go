package connmgr

import (
	"errors"
	"fmt"
	"slices"

	"github.com/libp2p/go-libp2p/core/connmgr"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
)

// Exemption says which connections a [Manager] leaves alone. See [WithExempt].
type Exemption struct {
	why  string
	peer func(inner connmgr.ConnManager, p peer.ID) bool
	conn func(c network.Conn) bool
	err  error
}

// ExemptPeer exempts all connections to these peers.
func ExemptPeer(ids ...peer.ID) Exemption {
	e := Exemption{why: "the peer is exempt"}
	if len(ids) == 0 {
		e.err = errors.New("exempt peers: no peer is given")
	}
	ids = slices.Clone(ids)
	e.peer = func(_ connmgr.ConnManager, p peer.ID) bool { return slices.Contains(ids, p) }
	return e
}

// ExemptTag exempts all connections to peers that have the tag in the inner connection
// manager: that are protected with it, or have a value for it. It is looked up anew each
// time.
func ExemptTag(tag string) Exemption {
	e := Exemption{why: fmt.Sprintf("peers with the tag %q are exempt", tag)}
	if tag == "" {
		e.err = errors.New("exempt tag: it is empty") // which would mean any protection
	}
	e.peer = func(inner connmgr.ConnManager, p peer.ID) bool {
		if inner.IsProtected(p, tag) {
			return true
		}
		info := inner.GetTagInfo(p)
		if info == nil {
			return false
		}
		_, tagged := info.Tags[tag]
		return tagged
	}
	return e
}

// ExemptConn exempts the connections that is returns true for. It is called often, from
// several goroutines, and must not block. reason is for logs and explanations.
func ExemptConn(reason string, is func(network.Conn) bool) Exemption {
	e := Exemption{why: reason, conn: is}
	if is == nil || reason == "" {
		e.err = errors.New("exempt connections: want a reason and a function")
	}
	return e
}

// WithExempt has the manager leave connections alone. No stream is moved from an exempt
// connection by this side, it is not closed, and a peer that wants to close it is
// refused; it may win, and other connections then go. Of an exempt peer all connections
// are exempt, and nothing is steered; [Manager.Consolidate] returns [ErrExempt]. May be
// given several times. Default: none.
func WithExempt(exemptions ...Exemption) Option {
	return func(c *config) error {
		for _, e := range exemptions {
			switch {
			case e.err != nil:
				return e.err
			case e.peer == nil && e.conn == nil:
				return errors.New("exemption is empty; make it with ExemptPeer, ExemptTag or ExemptConn")
			}
			c.exempt = append(c.exempt, e)
		}
		return nil
	}
}

// ErrExempt is what [Manager.Consolidate] returns for a peer that is exempt: see
// [WithExempt].
var ErrExempt = errors.New("peer is exempt")

// exemptions are those of a Manager.
type exemptions struct {
	inner connmgr.ConnManager
	list  []Exemption
}

// peer says why p is exempt; empty if it is not.
func (x exemptions) peer(p peer.ID) string {
	for _, e := range x.list {
		if e.peer != nil && e.peer(x.inner, p) {
			return e.why
		}
	}
	return ""
}

// conn says why c is exempt, itself or with its peer; empty if it is not.
func (x exemptions) conn(c network.Conn) string {
	for _, e := range x.list {
		if e.conn != nil && e.conn(c) {
			return e.why
		}
	}
	return x.peer(c.RemotePeer())
}
