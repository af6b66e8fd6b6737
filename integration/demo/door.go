package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	ma "github.com/multiformats/go-multiaddr"
)

// door is an address of the receiver's that works or does not, as -cut wants it: it forwards to
// the receiver while it is open.
type door interface {
	addr() ma.Multiaddr
	// open lets everything pass, to that address.
	open(to string)
	// shut has connections over it lost: those of TCP are reset, now and when somebody dials;
	// what comes over UDP is dropped, and nobody is told.
	shut()
	close() error
}

// newDoor returns a door that is shut, for TCP or QUIC.
func newDoor(p path) (door, error) {
	if p == quic {
		return newUDPDoor()
	}
	return newTCPDoor()
}

type tcpDoor struct {
	listener net.Listener
	wg       sync.WaitGroup

	mu    sync.Mutex
	to    string                // "": shut
	conns map[net.Conn]struct{} // both ends of what it forwards
}

func newTCPDoor() (*tcpDoor, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	d := &tcpDoor{listener: listener, conns: make(map[net.Conn]struct{})}
	d.wg.Go(func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			d.wg.Go(func() { d.forward(near) })
		}
	})
	return d, nil
}

func (d *tcpDoor) addr() ma.Multiaddr {
	return ma.StringCast(fmt.Sprintf("/ip4/127.0.0.1/tcp/%d", d.listener.Addr().(*net.TCPAddr).Port))
}

func (d *tcpDoor) open(to string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.to = to
}

// target is where to, or "" while it is shut.
func (d *tcpDoor) target() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.to
}

func (d *tcpDoor) shut() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.to = ""
	for c := range d.conns {
		reset(c)
	}
	clear(d.conns)
}

func (d *tcpDoor) close() error {
	err := d.listener.Close()
	d.shut()
	d.wg.Wait()
	return err
}

// reset has the other end of a TCP connection see a reset.
func reset(c net.Conn) {
	c.(*net.TCPConn).SetLinger(0)
	c.Close()
}

// enter notes two connections, unless the door is shut: then they are reset.
func (d *tcpDoor) enter(near, far net.Conn) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, c := range []net.Conn{near, far} {
		if d.to != "" {
			d.conns[c] = struct{}{}
		} else {
			reset(c)
		}
	}
	return d.to != ""
}

func (d *tcpDoor) forward(near net.Conn) {
	to := d.target()
	if to == "" {
		reset(near)
		return
	}
	far, err := net.Dial("tcp", to)
	if err != nil {
		reset(near)
		return
	}
	if !d.enter(near, far) {
		return
	}
	var wg sync.WaitGroup
	pass := func(dst, src net.Conn) {
		io.Copy(dst, src)
		dst.Close()
		src.Close()
	}
	wg.Go(func() { pass(far, near) })
	wg.Go(func() { pass(near, far) })
	wg.Wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.conns, near)
	delete(d.conns, far)
}

type udpDoor struct {
	socket net.PacketConn
	wg     sync.WaitGroup

	mu   sync.Mutex
	to   string // "": shut
	over bool
	far  map[string]net.Conn // by the address of who comes
}

func newUDPDoor() (*udpDoor, error) {
	socket, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	d := &udpDoor{socket: socket, far: make(map[string]net.Conn)}
	d.wg.Go(func() {
		buf := make([]byte, 64<<10)
		for {
			n, from, err := socket.ReadFrom(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if far := d.farOf(from); far != nil {
				far.Write(buf[:n])
			}
		}
	})
	return d, nil
}

func (d *udpDoor) addr() ma.Multiaddr {
	return ma.StringCast(fmt.Sprintf("/ip4/127.0.0.1/udp/%d/quic-v1", d.socket.LocalAddr().(*net.UDPAddr).Port))
}

func (d *udpDoor) shut() { d.open("") }

func (d *udpDoor) open(to string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.to = to
}

func (d *udpDoor) passes() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.to != ""
}

// farOf returns the socket to the receiver for who comes from there, or nil if nothing passes.
func (d *udpDoor) farOf(from net.Addr) net.Conn {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.to == "" || d.over {
		return nil
	}
	if far := d.far[from.String()]; far != nil {
		return far
	}
	far, err := net.Dial("udp", d.to)
	if err != nil {
		return nil
	}
	d.far[from.String()] = far
	d.wg.Go(func() {
		buf := make([]byte, 64<<10)
		for {
			n, err := far.Read(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if d.passes() {
				d.socket.WriteTo(buf[:n], from)
			}
		}
	})
	return far
}

func (d *udpDoor) close() error {
	err := d.socket.Close()
	d.mu.Lock()
	d.over = true
	for _, far := range d.far {
		far.Close()
	}
	d.mu.Unlock()
	d.wg.Wait()
	return err
}
