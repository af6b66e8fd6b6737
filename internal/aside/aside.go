// Package aside tells connections that are closed from those that only say so.
//
// While a peer is dialled beside a connection, that says for a moment that it is closed, so
// that the swarm dials (connmgr/aside.go). Whatever follows from a connection's end must not
// follow from that.
package aside

import "github.com/libp2p/go-libp2p/core/network"

// Conn is a connection that may be set aside. network.Conn's As finds it.
type Conn interface {
	// Gone says whether the connection is closed, set aside or not.
	Gone() bool
}

// IsClosed says whether c is closed. It is not while it is only set aside.
func IsClosed(c network.Conn) bool {
	if !c.IsClosed() {
		return false
	}
	var a Conn
	return !c.As(&a) || a.Gone()
}
