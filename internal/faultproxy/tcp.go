package faultproxy

import (
	"net"
	"sync"

	manet "github.com/multiformats/go-multiaddr/net"
)

// tcpForwarder is a TCP proxy. Each connection has two lanes, and each lane two
// goroutines: one takes what comes, the other delivers it when it is due.
type tcpForwarder struct {
	p        *Proxy
	listener net.Listener
	target   string

	mu    sync.Mutex // guards all below
	conns map[*net.TCPConn]bool
	lanes []*lane
	over  bool
}

// lane is one direction of one connection.
type lane struct {
	dir      Direction
	from, to *net.TCPConn
	queue    chan packet
	ended    chan struct{} // closed by End
	once     sync.Once
}

// chunk is how much is taken at once, and queued how many chunks may be under way: room
// for 2 MiB a second with a delay of 500 ms.
const (
	chunk  = 16 << 10
	queued = 64
)

// readBuffer is how much the kernel keeps of what the proxy has not taken yet: little, so
// that a path that is frozen soon takes nothing any more.
const readBuffer = 256 << 10

func (p *Proxy) listenTCP(target string) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	if p.addr, err = manet.FromNetAddr(l.Addr()); err != nil {
		return err
	}
	f := &tcpForwarder{p: p, listener: l, target: target, conns: make(map[*net.TCPConn]bool)}
	p.forward = f
	p.wg.Add(1)
	go f.accept()
	return nil
}

func (f *tcpForwarder) accept() {
	defer f.p.wg.Done()
	for {
		near, err := f.listener.Accept()
		if err != nil {
			return
		}
		f.p.dials.Add(1)
		f.p.wg.Add(1)
		go func() {
			defer f.p.wg.Done()
			// A path that is frozen does not connect, either.
			if !f.p.pass() {
				_ = near.Close()
				return
			}
			far, err := net.Dial("tcp", f.target)
			if err != nil {
				_ = near.Close()
				return
			}
			f.join(near.(*net.TCPConn), far.(*net.TCPConn))
		}()
	}
}

func (f *tcpForwarder) join(near, far *net.TCPConn) {
	lanes := []*lane{
		{dir: ToTarget, from: near, to: far},
		{dir: ToDialler, from: far, to: near},
	}
	for _, l := range lanes {
		_ = l.from.SetReadBuffer(readBuffer)
		l.queue, l.ended = make(chan packet, queued), make(chan struct{})
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.over {
		_ = near.Close()
		_ = far.Close()
		return
	}
	f.conns[near], f.conns[far] = true, true
	f.lanes = append(f.lanes, lanes...)
	for _, l := range lanes {
		f.p.wg.Add(2)
		go f.take(l)
		go f.deliver(l)
	}
}

// take reads from one end. While the path is frozen it does not, so that the sender's
// buffers fill.
func (f *tcpForwarder) take(l *lane) {
	defer f.p.wg.Done()
	defer close(l.queue)
	var busy = epoch
	for f.p.pass() {
		b := make([]byte, chunk)
		n, err := l.from.Read(b)
		if n > 0 {
			select {
			case l.queue <- packet{b[:n], f.p.due(&busy, n)}:
			case <-f.p.done:
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// deliver writes to the other end, and closes it for writing where there is no more.
func (f *tcpForwarder) deliver(l *lane) {
	defer f.p.wg.Done()
	defer func() {
		for range l.queue { // nobody gets it, and its sender need not know
		}
	}()
	for pkt := range l.queue {
		if !f.p.until(pkt.due) || !f.p.pass() {
			return
		}
		select {
		case <-l.ended:
			continue
		default:
		}
		// Counted first: what has arrived is never missing in the count.
		f.p.passed[l.dir].Add(int64(len(pkt.b)))
		if n, err := l.to.Write(pkt.b); err != nil {
			f.p.passed[l.dir].Add(int64(n - len(pkt.b)))
			// The receiver is gone, and the sender is to learn of it.
			_ = l.from.Close()
			return
		}
	}
	if f.p.pass() {
		_ = l.to.CloseWrite()
	}
}

func (f *tcpForwarder) end(d Direction) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, l := range f.lanes {
		if l.dir == d {
			l.once.Do(func() {
				close(l.ended)
				_ = l.to.CloseWrite()
			})
		}
	}
}

func (f *tcpForwarder) cut() {
	_ = f.listener.Close()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.over = true
	for c := range f.conns {
		_ = c.SetLinger(0) // a reset, not an end
		_ = c.Close()
	}
}
