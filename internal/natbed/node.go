//go:build linux

package natbed

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Node is a process in a namespace of a Net: a libp2p host.
type Node struct {
	Info
	place Place
	cmd   *exec.Cmd
	in    io.WriteCloser
	log   *tail
	gone  chan struct{} // closed when the process has ended

	mu      sync.Mutex
	next    int
	answers map[int]chan line
	events  []Event
	changed chan struct{} // closed and replaced with every event
	stopped bool
}

// Start runs this program again at a place, and has it be the node that cfg says.
func (n *Net) Start(ctx context.Context, at Place, cfg Config) (*Node, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	// ip replaces itself with the program, so that its process is the node's.
	cmd := exec.Command("ip", "netns", "exec", n.space(at), self)
	cmd.Env = append(os.Environ(), nodeEnv+"=1")
	// An interrupt from the terminal goes to this process, which ends the node.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	node := &Node{
		place:   at,
		cmd:     cmd,
		log:     &tail{},
		gone:    make(chan struct{}),
		answers: make(map[int]chan line),
		changed: make(chan struct{}),
	}
	cmd.Stderr = node.log
	if node.in, err = cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil, errors.New("the network is closed")
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("%v: %w", at, err)
	}
	n.nodes = append(n.nodes, node)
	go node.read(out)
	return node, node.Call(ctx, "start", cfg, &node.Info)
}

// read takes the lines of the node until it has ended.
func (n *Node) read(out io.Reader) {
	defer close(n.gone)
	lines := json.NewDecoder(bufio.NewReader(out))
	for {
		var l line
		if err := lines.Decode(&l); err != nil {
			break
		}
		n.mu.Lock()
		if l.Event != nil {
			n.events = append(n.events, *l.Event)
			close(n.changed)
			n.changed = make(chan struct{})
		} else if answer := n.answers[l.ID]; answer != nil {
			answer <- l
			delete(n.answers, l.ID)
		}
		n.mu.Unlock()
	}
	_ = n.cmd.Wait()
}

// Call has the node do something, and waits for what it answers.
func (n *Node) Call(ctx context.Context, do string, args, result any) error {
	raw, err := json.Marshal(args)
	if err != nil {
		return err
	}
	answer := make(chan line, 1)
	n.mu.Lock()
	n.next++
	id := n.next
	n.answers[id] = answer
	err = json.NewEncoder(n.in).Encode(request{id, do, raw})
	n.mu.Unlock()
	if err != nil {
		return fmt.Errorf("%v: %s: %w", n.place, do, err)
	}
	select {
	case l := <-answer:
		if l.Error != "" {
			return fmt.Errorf("%v: %s: %s", n.place, do, l.Error)
		}
		if result == nil {
			return nil
		}
		return json.Unmarshal(l.Result, result)
	case <-n.gone:
		return fmt.Errorf("%v: %s: the process has ended", n.place, do)
	case <-ctx.Done():
		return fmt.Errorf("%v: %s: %w", n.place, do, context.Cause(ctx))
	}
}

// Await returns the first event for which is holds, of all that have been or will be.
func (n *Node) Await(ctx context.Context, what string, is func(Event) bool) (Event, error) {
	for seen := 0; ; {
		n.mu.Lock()
		events, changed := n.events[seen:], n.changed
		seen = len(n.events)
		n.mu.Unlock()
		for _, e := range events {
			if is(e) {
				return e, nil
			}
		}
		select {
		case <-changed:
		case <-n.gone:
			return Event{}, fmt.Errorf("%v: %s: the process has ended", n.place, what)
		case <-ctx.Done():
			return Event{}, fmt.Errorf("%v: %s: %w", n.place, what, context.Cause(ctx))
		}
	}
}

// Events returns all that have been.
func (n *Node) Events() []Event {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]Event(nil), n.events...)
}

// Log returns the end of what the node wrote to its standard error.
func (n *Node) Log() string { return n.log.String() }

// patience is how long a node gets to close its host.
const patience = 20 * time.Second

// Stop ends the process: it closes its host when its input ends, and is killed if it does
// not. Stop returns when the process has ended, and may be called again.
func (n *Node) Stop() {
	n.mu.Lock()
	if !n.stopped {
		n.stopped = true
		n.in.Close()
	}
	n.mu.Unlock()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-n.gone:
	case <-timer.C:
		n.Kill()
	}
}

// Kill ends the process at once, as a crash would.
func (n *Node) Kill() {
	_ = n.cmd.Process.Kill()
	<-n.gone
}

// tail keeps the end of what is written to it.
type tail struct {
	mu   sync.Mutex
	text []byte
}

const tailLength = 64 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text = append(t.text, p...)
	if len(t.text) > 2*tailLength {
		t.text = append([]byte(nil), t.text[len(t.text)-tailLength:]...)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.text))
}
