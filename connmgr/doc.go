// Package connmgr leaves a libp2p host with one good connection to each peer.
//
// go-libp2p keeps every connection that it ever gets to a peer: the relayed one beside
// the direct one that hole punching won, the TCP one beside the QUIC one, both halves
// of a simultaneous dial. Closing the extra ones kills their streams, so nothing closes
// them. A [Manager] does, in this order: it ranks the connections with a policy,
// migrates the streams of the losers to the winner, and only then, when a loser has
// carried nothing for a while, closes it.
//
// It is a connection manager itself, a decorator of the one a host already has. A host
// gets it with one option, [Enable]:
//
//	h, err := libp2p.New(connmgr.Enable(connmgr.WithLogger(logger)))
//
// or, where something else makes the host, with three lines:
//
//	mgr, err := connmgr.New(inner, connmgr.WithLogger(logger)) // inner nil: libp2p's default
//	h, err := libp2p.New(libp2p.ConnectionManager(mgr))
//	h, err = mgr.Wrap(h) // from here on h.NewStream opens streams that can move
//
// Everything that the host and its services ask of a connection manager is answered by
// inner, which goes on to decide how many peers there are. The Manager decides only how
// many connections to each.
//
// Without Wrap the manager still consolidates, but it can only close connections that
// carry no stream.
//
// # What happens to a peer
//
// Nothing, and nothing is kept about it, for as long as it has one connection. With the
// second one begins a settle delay ([WithSettleDelay]); then there is a round:
// connections are ranked ([WithPolicy]), new streams go to the winner from then on, and
// all labelled streams of the losers are migrated at once. Streams that fail are tried
// again with backoff ([WithRetry]). Streams that cannot move are waited for. There is
// another round whenever a connection to the peer comes or goes or the peer has been
// identified, and periodically ([WithInterval]) for as long as there are two or more.
//
// A connection wins over a newer one, and another one is closed for it, only after it has
// answered a ping: the older of two connections is the dead one where a peer has lost its
// network and come back before anybody noticed.
//
// # When a connection is closed
//
// Nobody knows alone that a connection carries nothing: a stream that was closed here may
// be unread at the other end, and closing the connection destroys what it carried. So the
// peer is asked, over [DrainID], on the loser itself. It opens nothing more there, and
// agrees when it has had no stream there for a quiet time ([WithQuietTime]); when there has
// been none here either, the loser is closed with network.ConnSupplanted. A peer may
// refuse, and is asked again later.
//
// A peer that runs no manager cannot be asked. A connection to it is closed when it has
// had no stream at this end for much longer ([WithPlainQuietTime]). The same holds for a
// Manager without Wrap.
//
// Never: a stream is not migrated from an unlimited connection to a limited one, the last
// connection is not closed, no connection is closed while a migration touches it, and
// nothing is done about what is exempt ([WithExempt]). A peer that is protected in inner
// loses duplicates like any other, and its last connection never.
//
// # Who decides
//
// Two peers that decide apart could move streams to and fro for ever, or each close the
// connection that the other one keeps. So the peer with the lower ID decides for both,
// and the other one follows: it only steers its own new streams, by its own policy until
// it is asked to drain. It takes over when nothing has happened for a while
// ([WithTakeover]), or at once when the other one does not advertise [DrainID].
package connmgr
