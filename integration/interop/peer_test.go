package interop

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

// limit bounds each wait. It is reached only when something hangs.
const limit = 30 * time.Second

// requireNode skips the test where the peer in js cannot run.
func requireNode(t *testing.T) {
	t.Helper()
	out, err := exec.Command("node", "--version").Output()
	if err != nil {
		t.Skip("there is no node; install Node.js 18 or later")
	}
	version := strings.TrimSpace(string(out))
	major, _, _ := strings.Cut(strings.TrimPrefix(version, "v"), ".")
	if n, err := strconv.Atoi(major); err != nil || n < 18 {
		t.Skipf("node is %s; the peer in js needs 18 or later", version)
	}
	if _, err := os.Stat("js/node_modules/libp2p"); err != nil {
		t.Skip("js/node_modules is missing; run: npm ci --ignore-scripts --prefix integration/interop/js")
	}
}

// identities returns two keys: that of the lower peer, and that of the higher one.
func identities(t *testing.T) (lower, higher crypto.PrivKey) {
	t.Helper()
	var keys [2]crypto.PrivKey
	var ids [2]peer.ID
	for i := range keys {
		key, _, err := crypto.GenerateEd25519Key(rand.Reader)
		check(t, err)
		id, err := peer.IDFromPrivateKey(key)
		check(t, err)
		keys[i], ids[i] = key, id
	}
	if ids[0] < ids[1] {
		return keys[0], keys[1]
	}
	return keys[1], keys[0]
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func withLimit(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	return ctx
}

// eventually waits until done is true.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for begin := time.Now(); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Since(begin) > limit {
			t.Fatalf("after %v still not: %s", limit, what)
		}
	}
}

// args are the arguments of a command, answer is what the peer says to it.
type args map[string]any

type answer struct {
	ID       int
	Event    string
	Error    string
	Code     uint32
	Peer     string
	Addrs    []string
	Conn     string
	Conns    []struct{ Conn string }
	Port     int
	By       string
	Busy     int
	Split    int
	Stream   int
	Label    string
	Result   string
	Sent     string
	Received string
	Size     int
	Bytes    string
	EOF      bool
	Reset    bool
	Over     bool
	Idle     bool
	Blocked  bool
}

// node is a process that runs the peer in js.
type node struct {
	info    peer.AddrInfo
	streams chan answer // streams of /held/1.0.0 that it has accepted

	mu      sync.Mutex
	in      io.Writer
	next    int
	waiting map[int]chan answer
	ended   bool
}

// startNode starts the peer in js. start says how, as main.js has it.
func startNode(t *testing.T, key crypto.PrivKey, start args) *node {
	t.Helper()
	requireNode(t)
	cmd := exec.Command("node", "main.js")
	cmd.Dir = "js"
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	check(t, err)
	out, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	n := &node{in: in, streams: make(chan answer, 100), waiting: make(map[int]chan answer)}
	read := make(chan struct{})
	go func() {
		defer close(read)
		n.read(out)
	}()
	t.Cleanup(func() {
		_ = in.Close() // it ends then
		killer := time.AfterFunc(limit, func() { _ = cmd.Process.Kill() })
		<-read
		if err := cmd.Wait(); err != nil {
			t.Errorf("node: %v", err)
		}
		killer.Stop()
	})
	marshalled, err := crypto.MarshalPrivateKey(key)
	check(t, err)
	if start == nil {
		start = args{}
	}
	start["key"] = hex.EncodeToString(marshalled)
	a := n.must(t, "start", start)
	id, err := peer.Decode(a.Peer)
	check(t, err)
	n.info.ID = id
	for _, addr := range a.Addrs {
		n.info.Addrs = append(n.info.Addrs, ma.StringCast(addr))
	}
	return n
}

func (n *node) read(out io.Reader) {
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 64<<20)
	for lines.Scan() {
		var a answer
		if err := json.Unmarshal(lines.Bytes(), &a); err != nil {
			a.Error = fmt.Sprintf("not an answer: %q", lines.Text())
		}
		if a.Event == "stream" {
			n.streams <- a
			continue
		}
		n.mu.Lock()
		if c := n.waiting[a.ID]; c != nil {
			c <- a
			delete(n.waiting, a.ID)
		}
		n.mu.Unlock()
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ended = true
	for _, c := range n.waiting {
		c <- answer{Error: "node has ended"}
	}
}

// begin gives a command, and returns where its answer will be.
func (n *node) begin(command string, a args) <-chan answer {
	n.mu.Lock()
	defer n.mu.Unlock()
	c := make(chan answer, 1)
	if n.ended {
		c <- answer{Error: "node has ended"}
		return c
	}
	n.next++
	line := args{"id": n.next, "do": command}
	for k, v := range a {
		line[k] = v
	}
	n.waiting[n.next] = c
	data, err := json.Marshal(line)
	if err == nil {
		_, err = n.in.Write(append(data, '\n'))
	}
	if err != nil {
		delete(n.waiting, n.next)
		c <- answer{Error: err.Error()}
	}
	return c
}

func wait[T any](t *testing.T, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(limit):
		t.Fatalf("no answer after %v: %s", limit, what)
		panic("unreachable")
	}
}

func (n *node) do(t *testing.T, command string, a args) answer {
	t.Helper()
	return wait(t, command, n.begin(command, a))
}

// must is do, of a command that may not fail.
func (n *node) must(t *testing.T, command string, a args) answer {
	t.Helper()
	got := n.do(t, command, a)
	if got.Error != "" {
		t.Fatalf("%s: %s", command, got.Error)
	}
	return got
}

// conn is one connection, as each end knows it.
type conn struct {
	network.Conn        // of the Go host
	js           string // its ID in the Node process
}

// dial makes a connection. It is the Node process that dials, since it can make a second one.
func (n *node) dial(t *testing.T, h host.Host) conn {
	t.Helper()
	a := n.must(t, "dial", args{"addr": fmt.Sprintf("%s/p2p/%s", h.Addrs()[0], h.ID())})
	var found network.Conn
	eventually(t, "the host has the connection", func() bool {
		for _, c := range h.Network().ConnsToPeer(n.info.ID) {
			if port, err := c.RemoteMultiaddr().ValueForProtocol(ma.P_TCP); err == nil && port == strconv.Itoa(a.Port) {
				found = c
			}
		}
		return found != nil
	})
	return conn{found, a.Conn}
}

// newHost makes a Go host without Portage.
func newHost(t *testing.T, key crypto.PrivKey, opts ...libp2p.Option) host.Host {
	t.Helper()
	h, err := libp2p.New(append([]libp2p.Option{
		libp2p.Identity(key),
		libp2p.ListenAddrStrings("/ip4/127.0.0.1/tcp/0"),
		libp2p.DisableRelay(),
	}, opts...)...)
	check(t, err)
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	return h
}
