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
// gets it with three lines:
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
// again with backoff ([WithRetry]). Streams that cannot move are waited for. A loser
// that has had no stream for a quiet time ([WithQuietTime], [WithPlainQuietTime]) is
// closed with network.ConnSupplanted. There is another round whenever a connection to
// the peer comes or goes, and periodically ([WithInterval]) for as long as there are
// two or more, which is also how the end of a peer's identification is noticed.
//
// Three things are never done: a stream is not migrated from an unlimited connection to
// a limited one, the last connection is not closed, and no connection is closed while a
// migration touches it.
//
// # Who decides
//
// Two peers that decide apart could move streams to and fro for ever, or each close the
// connection that the other one keeps. So the peer with the lower ID decides for both,
// and the other one follows: it only steers its own new streams. It takes over when
// nothing has happened for a while ([WithTakeover]), or at once when the other one does
// not advertise [ManagerID].
package connmgr
