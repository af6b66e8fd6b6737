package natbed

import (
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// hub is an Ethernet switch between TAP devices, which delays every frame. The kernel could
// do that with a bridge and netem, if all kernels had netem.
type hub struct {
	delay time.Duration
	ports []*port
	done  chan struct{}
	wg    sync.WaitGroup

	mu    sync.RWMutex
	known map[[6]byte]*port // where an address has been seen
}

type port struct {
	device *os.File
	queue  chan frame
}

type frame struct {
	due  time.Time
	data []byte
}

const (
	// queueLength is how many frames may be under way to a port: at 1,500 bytes and 25 ms
	// that lets half a gigabyte a second pass.
	queueLength = 8192
	maxFrame    = 2048
)

func newHub(delay time.Duration) *hub {
	return &hub{delay: delay, done: make(chan struct{}), known: make(map[[6]byte]*port)}
}

// add makes a device in the namespace of the thread that calls.
func (h *hub) add(name string) error {
	fd, err := unix.Open(tunDevice, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("%s: %w", tunDevice, err)
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		unix.Close(fd)
		return fmt.Errorf("%s: device %s: %w", tunDevice, name, err)
	}
	h.ports = append(h.ports, &port{os.NewFile(uintptr(fd), name), make(chan frame, queueLength)})
	return nil
}

// start begins to pass frames on. All devices are there and up.
func (h *hub) start() {
	for _, p := range h.ports {
		h.wg.Go(func() { h.receive(p) })
		h.wg.Go(func() { h.deliver(p) })
	}
}

// close ends the switch and removes the devices.
func (h *hub) close() {
	close(h.done)
	for _, p := range h.ports {
		p.device.Close()
	}
	h.wg.Wait()
}

func (h *hub) receive(from *port) {
	buf := make([]byte, maxFrame)
	for {
		n, err := from.device.Read(buf)
		if err != nil {
			return
		}
		if n < 14 {
			continue
		}
		f := frame{time.Now().Add(h.delay), append([]byte(nil), buf[:n]...)}
		to := h.learn([6]byte(buf[6:12]), from, [6]byte(buf[:6]))
		for _, p := range h.ports {
			if p == from || (to != nil && p != to) {
				continue
			}
			select {
			case p.queue <- f:
			default: // full: lost, as on any network
			}
		}
	}
}

// learn notes where src is, and returns where dst is; nil: not known, or everywhere.
func (h *hub) learn(src [6]byte, from *port, dst [6]byte) *port {
	h.mu.RLock()
	at, to := h.known[src], h.known[dst]
	h.mu.RUnlock()
	if at != from {
		h.mu.Lock()
		h.known[src] = from
		h.mu.Unlock()
	}
	return to
}

func (h *hub) deliver(to *port) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case f := <-to.queue:
			if wait := time.Until(f.due); wait > 0 {
				timer.Reset(wait)
				select {
				case <-timer.C:
				case <-h.done:
					return
				}
			}
			// A device that is gone, or has no room, loses the frame.
			_, _ = to.device.Write(f.data)
		case <-h.done:
			return
		}
	}
}
