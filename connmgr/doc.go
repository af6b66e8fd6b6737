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
// Nothing, and nothing is kept about it, for as long as it has one connection that is not
// relayed. With the second one, all of its connections are asked whether they work, and given
// time to settle ([WithSettleDelay]). Then the policy ranks those that do ([WithPolicy]). New
// streams go to the winner from then on, and the streams of the others move there at once, each
// moved by the end that opened it. Streams that fail are tried again with backoff ([WithRetry]), and
// streams that cannot move are waited for. The peer is looked at again whenever something is
// heard of it, and every interval ([WithInterval]) while it has two connections or more.
//
// Where all connections of a peer are relayed, and it is used or wanted, the manager asks for a
// direct one from time to time ([WithUpgrades]); go-libp2p tries only when the first one comes.
//
// The file plan.go has every rule by which a connection lives or dies. What it decides is
// what [Manager.Explain], [Report] and the log say.
//
// # Never worse than without
//
// Where the manager does not know, it does nothing:
//
//   - A connection whose answer is late is not thought dead: anything that came on it
//     meanwhile shows that it lives. One that could not be asked loses to no older one.
//   - A direct connection is never closed for a relayed one, and no stream moves from an
//     unlimited connection to a limited one, or from one limited connection to another,
//     unless that one is about to end.
//   - A winner has to live for a while before the last other connection without a limit is
//     closed, and before streams leave a relay that does not limit them ([WithProof]). A kind
//     of path that has died young has to live for longer the next time.
//   - A stream that cannot be opened on the winner at once goes to another connection.
//   - Of a peer that has not been identified, nothing is closed.
//   - A policy that panics, does not return or names what it was not given decides nothing.
//
// # When a connection is closed
//
// Neither end knows alone that a connection carries nothing: a stream that was closed here may
// be unread at the other end, and closing the connection destroys what it carried. So the
// peer is asked, over [DrainID], on the connection itself. It opens nothing more there, and
// says when it has had no stream there for a quiet time ([WithQuietTime]). When there has
// been none here either, and the winner has shown once more that it works, the peer is asked
// a last time, and the connection is closed with network.ConnSupplanted. A peer may refuse,
// and is asked again later.
//
// A peer that runs no manager cannot be asked. A connection to it is closed when no stream
// has been on it, however short, for much longer ([WithPlainQuietTime]), and when it leads to
// the same process as the winner: replicas may share a key. The same holds for a Manager
// without Wrap, which cannot see short streams.
//
// Nothing is done about what is exempt ([WithExempt]). A peer that is protected in inner
// loses duplicates like any other, and its last connection never.
//
// # Who decides
//
// Two peers that each decide for themselves could move streams to and fro for ever, or each
// close the connection that the other one keeps. So the peer with the lower ID decides for
// both, and tells the other one which connection it keeps. That one follows: it moves the
// streams that it opened itself. It takes over when nothing has happened for a while
// ([WithTakeover]), or at once when the other one does not advertise [DrainID]. Both ends log
// what happened.
package connmgr
