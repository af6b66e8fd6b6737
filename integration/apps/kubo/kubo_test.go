package kubo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ipfs/boxo/files"
	"github.com/ipfs/boxo/path"
	"github.com/ipfs/go-datastore"
	dssync "github.com/ipfs/go-datastore/sync"
	"github.com/ipfs/kubo/config"
	"github.com/ipfs/kubo/core"
	"github.com/ipfs/kubo/core/coreapi"
	"github.com/ipfs/kubo/core/corehttp"
	iface "github.com/ipfs/kubo/core/coreiface"
	"github.com/ipfs/kubo/core/coreiface/options"
	"github.com/ipfs/kubo/core/node/libp2p"
	"github.com/ipfs/kubo/plugin"
	"github.com/ipfs/kubo/repo"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/connmgr"
	"github.com/go-portage/portage/integration/apps/moving"
	"github.com/go-portage/portage/internal/hosttest"
	"github.com/go-portage/portage/migrate"
)

// The second connection has to live for 30 s beside one that is known to work (WithProof), and
// for 3 s beside one that came with it. How long a machine takes beyond that, which does other
// things, too, says nothing of Portage, so without the flag only that it happens is demanded;
// integration/field demands times, in virtual time.
var limitFlag = flag.Duration("limit", hosttest.Patience, "how long a node may keep two connections to a peer")

// newNode returns a node of Kubo on loopback, that knows nobody.
func newNode(t *testing.T, host libp2p.HostOption) *core.IpfsNode {
	t.Helper()
	id, err := config.CreateIdentity(io.Discard, []options.KeyGenerateOption{options.Key.Type(options.Ed25519Key)})
	require.NoError(t, err)
	cfg, err := config.InitWithIdentity(id)
	require.NoError(t, err)
	cfg.Addresses.Swarm = []string{"/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"}
	cfg.Bootstrap = nil
	cfg.AutoConf.Enabled = config.False
	cfg.AutoTLS.Enabled = config.False
	cfg.Discovery.MDNS.Enabled = false
	cfg.DNS.Resolvers = nil
	cfg.Datastore = config.Datastore{}
	cfg.Experimental.Libp2pStreamMounting = true
	cfg.Routing.DelegatedRouters = nil
	cfg.Routing.LoopbackAddressesOnLanDHT = config.True
	cfg.Ipns.DelegatedPublishers = nil
	cfg.Swarm.DisableNatPortMap = true
	n, err := core.NewNode(context.Background(), &core.BuildCfg{
		Online:    true,
		Permanent: true,
		Repo:      &repo.Mock{C: *cfg, D: dssync.MutexWrap(datastore.NewMapDatastore())},
		Host:      host,
		Routing:   libp2p.DHTServerOption,
		ExtraOpts: map[string]bool{"pubsub": true},
	})
	require.NoError(t, err)
	t.Cleanup(func() { _ = n.Close() })
	return n
}

func addr(t *testing.T, n *core.IpfsNode, tr hosttest.Transport) ma.Multiaddr {
	t.Helper()
	a, err := moving.Addr(n.PeerHost, tr)
	require.NoError(t, err)
	return a
}

func connect(t *testing.T, ctx context.Context, a, b *core.IpfsNode, tr hosttest.Transport) {
	t.Helper()
	require.NoError(t, a.PeerHost.Connect(ctx, peer.AddrInfo{ID: b.Identity, Addrs: []ma.Multiaddr{addr(t, b, tr)}}))
}

func conns(a, b *core.IpfsNode) []network.Conn { return a.PeerHost.Network().ConnsToPeer(b.Identity) }

// With the options that everybody has, the worse connection is gone in the end, although the
// DHT asks the peer over it all the time.
func TestOneConnectionWhileTheDHTIsUsed(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*hosttest.Patience)
	defer cancel()
	hub := newNode(t, HostOption())
	d := hosttest.NewDoubler(t, hub.PeerHost)
	peers := make([]*core.IpfsNode, 10)
	for i := range peers {
		peers[i] = newNode(t, HostOption())
		connect(t, ctx, hub, peers[i], hosttest.TCP)
	}
	var use sync.WaitGroup
	busy, idle := context.WithCancel(ctx)
	var asked atomic.Int64
	for i, p := range peers {
		use.Go(func() {
			for busy.Err() == nil {
				for _, n := range []*core.IpfsNode{hub, p} {
					if _, err := n.DHT.LAN.GetClosestPeers(busy, fmt.Sprint(i, asked.Add(1))); err != nil && busy.Err() == nil {
						t.Errorf("the DHT: %v", err)
					}
				}
			}
		})
	}
	defer use.Wait()
	defer idle()
	before := asked.Load()
	began := make([]time.Time, len(peers))
	for i, p := range peers {
		hosttest.WaitFor(t, "the peer in the table of the DHT", func() bool { return hub.DHT.LAN.RoutingTable().Find(p.Identity) != "" })
		require.NoError(t, d.Dial(ctx, p.Identity, addr(t, p, hosttest.QUIC)))
		began[i] = time.Now()
		hosttest.WaitFor(t, "the second connection", func() bool { return len(conns(hub, p)) == 2 || time.Since(began[i]) > time.Second })
	}
	var took []time.Duration
	for i, p := range peers {
		for len(conns(hub, p)) != 1 || len(conns(p, hub)) != 1 {
			if time.Since(began[i]) > *limitFlag {
				t.Fatalf("peer %d still has two connections after %v\n%s\n%s", i, time.Since(began[i]), explain(hub, p), explain(p, hub))
			}
			select {
			case <-time.After(5 * time.Millisecond):
			case <-ctx.Done():
				t.Fatal(ctx.Err())
			}
		}
		took = append(took, time.Since(began[i]).Round(time.Millisecond))
		require.Equal(t, hosttest.Transport(hosttest.QUIC), hosttest.Of(conns(hub, p)[0].RemoteMultiaddr()))
	}
	require.Greater(t, asked.Load(), before, "the DHT was used meanwhile")
	t.Logf("one connection after %v; %d questions to the DHT", took, asked.Load())
}

func explain(n, to *core.IpfsNode) string {
	m, ok := connmgr.Of(n.PeerHost)
	if !ok {
		return "no manager"
	}
	return m.Explain(to.Identity).String()
}

// Two nodes whose connection is doubled all the time, over TCP and QUIC in turn, while they
// do what Kubo does. Beside it the same on two plain nodes.
func TestKubo(t *testing.T) {
	t.Run("plain", func(t *testing.T) { testKubo(t, false) })
	t.Run("moving", func(t *testing.T) { testKubo(t, true) })
}

const size = 100 << 20

func testKubo(t *testing.T, moves bool) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*hosttest.Patience)
	defer cancel()
	var migrations atomic.Int64
	host := libp2p.DefaultHostOption
	if moves {
		host = HostOption(moving.Options(&migrations)...)
	}
	a, b := newNode(t, host), newNode(t, host)
	apiA, err := coreapi.NewCoreAPI(a)
	require.NoError(t, err)
	apiB, err := coreapi.NewCoreAPI(b)
	require.NoError(t, err)
	connect(t, ctx, a, b, hosttest.TCP)
	next, d := hosttest.Transport(hosttest.QUIC), (*hosttest.Doubler)(nil)
	if moves {
		d = hosttest.NewDoubler(t, a.PeerHost)
	}
	move := func() {
		if !moves {
			return
		}
		hosttest.WaitFor(t, "the older connection to be closed", func() bool { return len(conns(a, b)) == 1 && len(conns(b, a)) == 1 })
		require.NoError(t, d.Dial(ctx, b.Identity, addr(t, b, next)))
		if next == hosttest.QUIC {
			next = hosttest.TCP
		} else {
			next = hosttest.QUIC
		}
	}
	// moved demands that streams have moved each time, but for the last, which may be under way.
	moved := func(t *testing.T, since int64, times int) {
		if n := migrations.Load() - since; moves {
			require.GreaterOrEqual(t, n, int64(times-1), "streams have moved")
			t.Logf("%d migrations", n)
		}
	}

	t.Run("bitswap", func(t *testing.T) {
		since := migrations.Load()
		sum, where := add(t, ctx, apiA, 1)
		got, err := apiB.Unixfs().Get(ctx, where)
		require.NoError(t, err)
		require.Equal(t, sum, read(t, got.(files.File), move))
		moved(t, since, size/step)
	})
	t.Run("gateway", func(t *testing.T) {
		since := migrations.Load()
		sum, where := add(t, ctx, apiA, 2)
		l, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		handler, err := corehttp.MakeHandler(b, l, corehttp.GatewayOption("/ipfs", "/ipns"))
		require.NoError(t, err)
		server := &http.Server{Handler: handler}
		go func() { _ = server.Serve(l) }()
		defer server.Close()
		res, err := http.Get("http://" + l.Addr().String() + where.String())
		require.NoError(t, err)
		defer res.Body.Close()
		require.Equal(t, http.StatusOK, res.StatusCode)
		require.Equal(t, sum, read(t, res.Body, move))
		moved(t, since, size/step)
	})
	t.Run("p2p", func(t *testing.T) {
		since := migrations.Load()
		echo, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		defer echo.Close()
		go func() {
			if c, err := echo.Accept(); err == nil {
				_, _ = io.Copy(c, c)
				_ = c.Close()
			}
		}()
		target := ma.StringCast(fmt.Sprintf("/ip4/127.0.0.1/tcp/%d", echo.Addr().(*net.TCPAddr).Port))
		_, err = b.P2P.ForwardRemote(ctx, "/x/echo", target, false)
		require.NoError(t, err)
		forward, err := a.P2P.ForwardLocal(ctx, b.Identity, "/x/echo", ma.StringCast("/ip4/127.0.0.1/tcp/0"))
		require.NoError(t, err)
		port, err := forward.ListenAddress().ValueForProtocol(ma.P_TCP)
		require.NoError(t, err)
		c, err := net.Dial("tcp", "127.0.0.1:"+port)
		require.NoError(t, err)
		defer c.Close()
		data := make([]byte, size)
		_, _ = rand.NewChaCha8([32]byte{3}).Read(data)
		go func() { _, _ = io.Copy(c, bytes.NewReader(data)) }()
		require.Equal(t, sha256.Sum256(data), read(t, io.LimitReader(c, size), move))
		moved(t, since, size/step)
	})
	t.Run("pubsub", func(t *testing.T) {
		const messages = 500
		since := migrations.Load()
		sub, err := apiB.PubSub().Subscribe(ctx, "talk")
		require.NoError(t, err)
		defer sub.Close()
		hosttest.WaitFor(t, "the subscription", func() bool {
			ps, err := apiA.PubSub().Peers(ctx, options.PubSub.Topic("talk"))
			return err == nil && slices.Contains(ps, b.Identity)
		})
		for i := 0; i < messages || moves && migrations.Load() < since+4; i++ {
			if i%100 == 0 {
				move()
			}
			require.NoError(t, apiA.PubSub().Publish(ctx, "talk", fmt.Append(nil, i)))
			m, err := sub.Next(ctx)
			require.NoError(t, err)
			require.Equal(t, fmt.Sprint(i), string(m.Data()), "each message comes, and once")
		}
		moved(t, since, 5)
	})
}

// A file of 100 MiB comes from a node that is reached over a relay without a limit (on one
// with limits, Kubo opens no streams for it). Meanwhile a direct connection comes up, over
// TCP, and then one over QUIC. The transfer goes on over each, and the one before is closed.
func TestOffTheRelayInMidTransfer(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*hosttest.Patience)
	defer cancel()
	var mu sync.Mutex
	moves := make(map[string]int) // of streams
	host := HostOption(connmgr.WithProof(100*time.Millisecond), connmgr.WithInterval(100*time.Millisecond), connmgr.WithQuietTime(50*time.Millisecond),
		connmgr.WithMigrateOptions(migrate.WithTracer(func(e migrate.Event) {
			if e.Kind == migrate.Finished && e.Initiator {
				mu.Lock()
				moves[fmt.Sprint(hosttest.Of(e.From.RemoteMultiaddr()), " to ", hosttest.Of(e.To.RemoteMultiaddr()))]++
				mu.Unlock()
			}
		})))
	a, b := newNode(t, host), newNode(t, host)
	apiA, err := coreapi.NewCoreAPI(a)
	require.NoError(t, err)
	apiB, err := coreapi.NewCoreAPI(b)
	require.NoError(t, err)

	met := hosttest.NewRelay(t, relay.WithInfiniteLimits())
	known := peer.AddrInfo{ID: met.ID(), Addrs: []ma.Multiaddr{met.Addr(t, hosttest.TCP)}}
	require.NoError(t, a.PeerHost.Connect(ctx, known))
	_, err = client.Reserve(ctx, a.PeerHost, known)
	require.NoError(t, err)
	circuit := ma.StringCast(fmt.Sprintf("%s/p2p/%s/p2p-circuit", known.Addrs[0], known.ID))
	require.NoError(t, b.PeerHost.Connect(ctx, peer.AddrInfo{ID: a.Identity, Addrs: []ma.Multiaddr{circuit}}))
	d := hosttest.NewDoubler(t, b.PeerHost)

	only := func(tr hosttest.Transport) bool {
		for _, c := range [][]network.Conn{conns(a, b), conns(b, a)} {
			if len(c) != 1 || hosttest.Of(c[0].RemoteMultiaddr()) != tr {
				return false
			}
		}
		return true
	}
	require.True(t, only(hosttest.Relay), "the relayed connection alone")
	sum, where := add(t, ctx, apiA, 4)
	got, err := apiB.Unixfs().Get(ctx, where)
	require.NoError(t, err)
	before := hosttest.Transport(hosttest.Relay)
	at := 0
	next := func() {
		dialled := map[int]hosttest.Transport{20: hosttest.TCP, 60: hosttest.QUIC}[at]
		if dialled != "" {
			require.NoError(t, d.Dial(ctx, a.Identity, addr(t, a, dialled)))
		}
		if at == 40 || at == 80 { // the dialled one has taken over, and the rest is to come
			now := hosttest.Transport(hosttest.TCP)
			if at == 80 {
				now = hosttest.QUIC
			}
			hosttest.WaitFor(t, "the connection over "+string(now)+" alone", func() bool { return only(now) })
			mu.Lock()
			defer mu.Unlock()
			require.Positive(t, moves[fmt.Sprint(before, " to ", now)], "streams have moved from %s to %s: %v", before, now, moves)
			before = now
		}
		at += 5
	}
	require.Equal(t, sum, read(t, got.(files.File), next))
	require.Equal(t, 100, at)
	mu.Lock()
	defer mu.Unlock()
	t.Logf("streams that moved: %v", moves)
}

// add adds a file of 100 MiB, and returns its hash and where it is.
func add(t *testing.T, ctx context.Context, api iface.CoreAPI, seed byte) ([32]byte, path.ImmutablePath) {
	t.Helper()
	h := sha256.New()
	r := io.TeeReader(io.LimitReader(rand.NewChaCha8([32]byte{seed}), size), h)
	p, err := api.Unixfs().Add(ctx, files.NewReaderFile(r))
	require.NoError(t, err)
	return [32]byte(h.Sum(nil)), p
}

// step is how many bytes are read between two doublings of the connection.
const step = 5 << 20

// read reads 100 MiB, and calls move before each step.
func read(t *testing.T, r io.Reader, move func()) [32]byte {
	t.Helper()
	h := sha256.New()
	for n := 0; n < size; n += step {
		move()
		_, err := io.CopyN(h, r, step)
		require.NoError(t, err, "after %d bytes", n)
	}
	return [32]byte(h.Sum(nil))
}

// What the command ipfs swarm addrs autonat asks the host for, it is told.
func TestReachability(t *testing.T) {
	type asked interface {
		Reachability() network.Reachability
		ConfirmedAddrs() (reachable, unreachable, unknown []ma.Multiaddr)
	}
	plain, ok := newNode(t, libp2p.DefaultHostOption).PeerHost.(asked)
	require.True(t, ok, "a plain node's host tells it")
	with, ok := newNode(t, HostOption()).PeerHost.(asked)
	require.True(t, ok, "and one with Portage")
	require.Equal(t, plain.Reachability(), with.Reachability())
	for i, of := range []func(asked) []ma.Multiaddr{
		func(h asked) []ma.Multiaddr { r, _, _ := h.ConfirmedAddrs(); return r },
		func(h asked) []ma.Multiaddr { _, u, _ := h.ConfirmedAddrs(); return u },
		func(h asked) []ma.Multiaddr { _, _, u := h.ConfirmedAddrs(); return u },
	} {
		require.Len(t, of(with), len(of(plain)), "list %d", i)
	}
}

// The plugin reads its configuration, and says what is wrong with it.
func TestPlugin(t *testing.T) {
	p := new(Plugin)
	require.NoError(t, p.Init(nil))
	require.NoError(t, p.Init(&plugin.Environment{}))
	require.NoError(t, p.Init(&plugin.Environment{Config: map[string]any{"Policy": "chain(direct)"}}))
	require.Len(t, p.opts, 2)
	require.ErrorContains(t, p.Init(&plugin.Environment{Config: map[string]any{"Policy": "chain(nonsense)"}}), "nonsense")
	require.ErrorContains(t, p.Init(&plugin.Environment{Config: map[string]any{"Polcy": "default"}}), "Polcy")
	require.ErrorContains(t, p.Init(&plugin.Environment{Config: "default"}), "string")
}
