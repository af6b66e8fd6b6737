package natbed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The topology. Each box is a network namespace.
//
//	                  +-------------+
//	                  |    relay    |
//	                  |  45.0.0.10  |
//	                  +------+------+
//	                         | pub0
//	    +--------------------+--------------------+
//	    |   public network: a switch in this      |
//	    |   process that delays every frame       |
//	    +-----+-----------------------------+-----+
//	     wan0 |                             | wan0
//	+---------+---------+         +---------+---------+
//	|     router A      |         |     router B      |
//	| 45.0.0.1 or .101  |         | 45.0.0.2 or .102  |
//	|  NAT, firewall    |         |  NAT, firewall    |
//	| 10.1.0.1          |         | 10.2.0.1          |
//	+---------+---------+         +---------+---------+
//	     lan0 |                             | lan0
//	     eth0 |                             | eth0
//	+---------+---------+         +---------+---------+
//	|      host A       |         |      host B       |
//	| 10.1.0.2 or .102  |         | 10.2.0.2 or .102  |
//	+-------------------+         +-------------------+
//
// The second addresses are those that a router or host has after MoveRouter or MoveHost.
//
// Public addresses have to look public, or go-libp2p does not punch holes to them. A router
// keeps the port of a host that sends where it can, as home routers do, and drops what
// comes in unasked, also what is for itself: if it did not, the kernel would take the first
// packet of the other end's punch for a flow of the router's own, and give the host
// another port than the one that the relay has seen.
type Net struct {
	name  string
	delay time.Duration
	hub   *hub

	mu     sync.Mutex
	sides  [2]private
	nodes  []*Node
	closed bool
}

// private is a network behind a router, and the router.
type private struct {
	wan, host string // addresses as they are now
	lan       string // the first three numbers of the addresses inside
}

// Place is a namespace.
type Place int

// The namespaces. Those of a side are in the order of the sides.
const (
	Relay Place = iota
	RouterA
	RouterB
	HostA
	HostB
	places
)

func (p Place) String() string {
	return [places]string{"relay", "router-a", "router-b", "host-a", "host-b"}[p]
}

// Side is one of the two private networks.
type Side int

// The two sides.
const (
	A Side = iota
	B
)

func (s Side) String() string { return [2]string{"A", "B"}[s] }
func (s Side) router() Place  { return RouterA + Place(s) }

// Host returns the namespace of the side's host.
func (s Side) Host() Place { return HostA + Place(s) }

// Other returns the other side.
func (s Side) Other() Side { return 1 - s }

const relayAddr = "45.0.0.10"

// Options are what can be chosen of a Net.
type Options struct {
	// RoundTrip is what the public network adds to a round trip between any two of its
	// three members. Over the relay it counts twice.
	RoundTrip time.Duration
	// Unpunchable has both routers give every flow a port of its own, at random, so that
	// nobody can know where to send a punch.
	Unpunchable bool
}

// netPrefix begins the names of all namespaces; the process follows.
const netPrefix = "portage-nat-"

var (
	netCount  atomic.Int64
	sweepOnce sync.Once
	nets      sync.Map // *Net to nothing: those of this process

	interrupted    atomic.Bool
	errInterrupted = errors.New("interrupted")
)

// New builds the namespaces. Their names have the number of this process and a counter, so
// that several can stand side by side. What it returns has to be closed.
func New(opts Options) (*Net, error) {
	sweepOnce.Do(sweep)
	n := &Net{
		name:  fmt.Sprintf("%s%d-%d", netPrefix, os.Getpid(), netCount.Add(1)),
		delay: opts.RoundTrip / 2,
		sides: [2]private{
			{wan: "45.0.0.1", lan: "10.1.0", host: "10.1.0.2"},
			{wan: "45.0.0.2", lan: "10.2.0", host: "10.2.0.2"},
		},
	}
	nets.Store(n, nil)
	// CloseAll waits until there is something whole to remove.
	n.mu.Lock()
	err := errInterrupted
	if !interrupted.Load() {
		err = n.build(opts)
	}
	n.mu.Unlock()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("network namespaces: %w", err), n.Close())
	}
	return n, nil
}

func (n *Net) build(opts Options) error {
	var add strings.Builder
	for p := range places {
		fmt.Fprintf(&add, "netns add %s\n", n.space(p))
	}
	if err := command(add.String(), "ip", "-batch", "-"); err != nil {
		return err
	}
	n.hub = newHub(n.delay)
	for p, device := range []string{Relay: "pub0", RouterA: "wan0", RouterB: "wan0"} {
		if err := n.inside(Place(p), func() error { return n.hub.add(device) }); err != nil {
			return fmt.Errorf("%v: %w", Place(p), err)
		}
	}
	if err := n.ip(Relay, "link set lo up", "addr add "+relayAddr+"/24 dev pub0", "link set pub0 up"); err != nil {
		return err
	}
	for s := range n.sides {
		if err := n.buildSide(Side(s), opts); err != nil {
			return fmt.Errorf("side %v: %w", Side(s), err)
		}
	}
	n.hub.start()
	return nil
}

func (n *Net) buildSide(s Side, opts Options) error {
	side := &n.sides[s]
	masquerade := "masquerade"
	if opts.Unpunchable {
		masquerade = "masquerade random,fully-random"
	}
	return errors.Join(
		n.ip(s.router(),
			"link set lo up",
			"addr add "+side.wan+"/24 dev wan0",
			"link set wan0 up",
			"link add lan0 type veth peer name eth0 netns "+n.space(s.Host()),
			"addr add "+side.lan+".1/24 dev lan0",
			"link set lan0 up",
		),
		n.ip(s.Host(),
			"link set lo up",
			"addr add "+side.host+"/24 dev eth0",
			"link set eth0 up",
			"route add default via "+side.lan+".1",
		),
		n.inside(s.router(), func() error {
			return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644)
		}),
		// The chain cut is where Cut puts its rules, in front of all others.
		n.nft(s, `
			table ip nat {
				chain post {
					type nat hook postrouting priority 100; policy accept;
					oifname "wan0" `+masquerade+`
				}
			}
			table ip filter {
				chain cut { }
				chain input {
					type filter hook input priority 0; policy accept;
					iifname "wan0" ct state established,related accept
					iifname "wan0" drop
				}
				chain forward {
					type filter hook forward priority 0; policy drop;
					jump cut
					iifname "lan0" oifname "wan0" accept
					iifname "wan0" oifname "lan0" ct state established,related accept
				}
			}`),
	)
}

// Path is what Cut can cut.
type Path string

// The paths between the hosts.
const (
	Direct    Path = "direct" // all that does not go to the relay or come from it
	DirectUDP Path = "direct UDP"
	ToRelay   Path = "relay" // between the host of the side and the relay
)

// Cut has the router of a side swallow what goes over a path, silently and both ways, until
// Mend.
func (n *Net) Cut(s Side, p Path) error {
	match := map[Path]string{
		Direct:    "ip %s != " + relayAddr,
		DirectUDP: "ip %s != " + relayAddr + " meta l4proto udp",
		ToRelay:   "ip %s " + relayAddr,
	}[p]
	var rules strings.Builder
	for iface, addr := range map[string]string{"lan0": "daddr", "wan0": "saddr"} {
		fmt.Fprintf(&rules, "add rule ip filter cut iifname %q %s drop\n", iface, fmt.Sprintf(match, addr))
	}
	return n.nft(s, rules.String())
}

// Mend undoes all that Cut has done to a side.
func (n *Net) Mend(s Side) error { return n.nft(s, "flush chain ip filter cut\n") }

// MoveRouter gives the router of a side another public address, as some providers do every
// night. The flows that it knew are gone.
func (n *Net) MoveRouter(s Side) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	side := &n.sides[s]
	old, now := side.wan, fmt.Sprintf("45.0.0.%d", 101+int(s))
	if old == now {
		now = fmt.Sprintf("45.0.0.%d", 1+int(s))
	}
	side.wan = now
	return n.ip(s.router(), "addr del "+old+"/24 dev wan0", "addr add "+now+"/24 dev wan0")
}

// MoveHost gives the host of a side another address in its network.
func (n *Net) MoveHost(s Side) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	side := &n.sides[s]
	old, now := side.host, side.lan+".102"
	if old == now {
		now = side.lan + ".2"
	}
	side.host = now
	return n.ip(s.Host(),
		"addr del "+old+"/24 dev eth0",
		"addr add "+now+"/24 dev eth0",
		"route add default via "+side.lan+".1")
}

// Close ends the nodes and removes the namespaces. It may be called again.
func (n *Net) Close() error {
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		return nil
	}
	n.closed = true
	nodes := n.nodes
	n.mu.Unlock()

	var wg sync.WaitGroup
	for _, node := range nodes {
		wg.Go(node.Stop)
	}
	wg.Wait()
	if n.hub != nil {
		n.hub.close()
	}
	var errs []error
	for p := range places {
		if err := command("", "ip", "netns", "delete", n.space(p)); err != nil && exists(n.space(p)) {
			errs = append(errs, err)
		}
	}
	nets.Delete(n)
	return errors.Join(errs...)
}

// CloseAll closes every Net of this process, for a program that is interrupted. There will
// be no other.
func CloseAll() {
	interrupted.Store(true)
	var wg sync.WaitGroup
	nets.Range(func(n, _ any) bool {
		wg.Go(func() { _ = n.(*Net).Close() })
		return true
	})
	wg.Wait()
}

// sweep removes namespaces of processes that are no more: they were killed, or their tests
// took too long.
func sweep() {
	entries, err := os.ReadDir(spacesDir)
	if err != nil {
		return
	}
	for _, e := range entries {
		rest, ours := strings.CutPrefix(e.Name(), netPrefix)
		pid, _, _ := strings.Cut(rest, "-")
		if n, err := strconv.Atoi(pid); !ours || err != nil || syscall.Kill(n, 0) != syscall.ESRCH {
			continue
		}
		_ = command("", "ip", "netns", "delete", e.Name())
	}
}

// Missing says what this machine lacks; "" if a Net can be built.
func Missing() string {
	if os.Getuid() != 0 {
		return "needs root, to make network namespaces"
	}
	for program, pkg := range map[string]string{"ip": "iproute2", "nft": "nftables"} {
		if _, err := exec.LookPath(program); err != nil {
			return fmt.Sprintf("needs the program %s (Debian's package %s)", program, pkg)
		}
	}
	if _, err := os.Stat(tunDevice); errors.Is(err, fs.ErrNotExist) {
		return "needs " + tunDevice + ", which the kernel's module tun provides"
	}
	probe := fmt.Sprintf("%s%d-0", netPrefix, os.Getpid())
	if err := command("", "ip", "netns", "add", probe); err != nil {
		return fmt.Sprintf("needs network namespaces, and this container or kernel gives none: %v", err)
	}
	defer command("", "ip", "netns", "delete", probe)
	rules := "table ip portage { chain c { type nat hook postrouting priority 100; masquerade random,fully-random; }; chain f { ct state established drop; }; }\n"
	if err := command(rules, "ip", "netns", "exec", probe, "nft", "-f", "-"); err != nil {
		return fmt.Sprintf("needs NAT in the kernel: %v", err)
	}
	return ""
}

const (
	spacesDir = "/run/netns"
	tunDevice = "/dev/net/tun"
)

func (n *Net) space(p Place) string { return n.name + "-" + p.String() }

func exists(space string) bool {
	_, err := os.Stat(spacesDir + "/" + space)
	return err == nil
}

// ip runs commands of ip in a namespace.
func (n *Net) ip(p Place, lines ...string) error {
	return command(strings.Join(lines, "\n")+"\n", "ip", "-n", n.space(p), "-batch", "-")
}

// nft gives the firewall of a router rules.
func (n *Net) nft(s Side, rules string) error {
	return command(rules, "ip", "netns", "exec", n.space(s.router()), "nft", "-f", "-")
}

// command runs a program to its end. None of them takes longer than an instant.
func command(stdin, name string, args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}

// inside calls f in a namespace.
func (n *Net) inside(p Place, f func() error) error {
	space, err := os.Open(spacesDir + "/" + n.space(p))
	if err != nil {
		return err
	}
	defer space.Close()
	done := make(chan error)
	go func() {
		// The thread is not unlocked, and so ends with the goroutine.
		runtime.LockOSThread()
		if err := unix.Setns(int(space.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}
