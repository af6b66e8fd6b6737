package faultproxy

import (
	"io"
	"net"
	"strings"
	"testing"
	"time"

	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/internal/hosttest"
)

func TestMain(m *testing.M) { hosttest.Main(m) }

// patience is how long a test waits for what must happen, and brief for what must not.
const (
	patience = hosttest.Patience
	brief    = 50 * time.Millisecond
)

// throughTCP returns both ends of a TCP connection through a proxy.
func throughTCP(t *testing.T) (p *Proxy, dialler, target *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	p = New(t, listening(t, l.Addr()))
	d, err := net.Dial("tcp", dialled(t, p.Addr()))
	require.NoError(t, err)
	a, err := l.Accept()
	require.NoError(t, err)
	return p, patient(t, d).(*net.TCPConn), patient(t, a).(*net.TCPConn)
}

// throughUDP returns a socket that sends through a proxy to the other.
func throughUDP(t *testing.T) (p *Proxy, dialler net.Conn, target net.PacketConn) {
	t.Helper()
	target, err := net.ListenPacket("udp4", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = target.Close() })
	require.NoError(t, target.SetDeadline(time.Now().Add(patience)))
	p = New(t, listening(t, target.LocalAddr()))
	d, err := net.Dial("udp4", dialled(t, p.Addr()))
	require.NoError(t, err)
	return p, patient(t, d), target
}

func listening(t *testing.T, a net.Addr) ma.Multiaddr {
	t.Helper()
	addr, err := manet.FromNetAddr(a)
	require.NoError(t, err)
	return addr
}

func dialled(t *testing.T, a ma.Multiaddr) string {
	t.Helper()
	_, s, err := manet.DialArgs(a)
	require.NoError(t, err)
	return s
}

func patient(t *testing.T, c net.Conn) net.Conn {
	t.Helper()
	t.Cleanup(func() { _ = c.Close() })
	require.NoError(t, c.SetDeadline(time.Now().Add(patience)))
	return c
}

func carries(t *testing.T, from io.Writer, to io.Reader, what string) {
	t.Helper()
	_, err := io.WriteString(from, what)
	require.NoError(t, err)
	got := make([]byte, len(what))
	_, err = io.ReadFull(to, got)
	require.NoError(t, err)
	require.Equal(t, what, string(got))
}

func silent(t *testing.T, c net.Conn) {
	t.Helper()
	require.NoError(t, c.SetReadDeadline(time.Now().Add(brief)))
	n, err := c.Read(make([]byte, 1))
	require.Zero(t, n)
	require.ErrorContains(t, err, "timeout")
	require.NoError(t, c.SetReadDeadline(time.Now().Add(patience)))
}

func TestAddrKeepsWhatFollowsThePort(t *testing.T) {
	for _, tail := range []string{"", "/ws", "/quic-v1", "/quic-v1/webtransport", "/webrtc-direct"} {
		head := "/ip4/127.0.0.1/udp/1"
		if tail == "" || tail == "/ws" {
			head = "/ip4/127.0.0.1/tcp/1"
		}
		got := New(t, ma.StringCast(head+tail)).Addr().String()
		require.True(t, strings.HasSuffix(got, tail), "%s in place of %s", got, head+tail)
		require.False(t, strings.HasPrefix(got, head+"/"), "%s is the target's own address", got)
	}
}

func TestTCPFreezesAndThaws(t *testing.T) {
	p, d, a := throughTCP(t)
	carries(t, d, a, "there")
	carries(t, a, d, "back")
	require.Equal(t, int64(len("there")), p.Passed(ToTarget))
	p.Freeze()
	_, err := io.WriteString(d, "late")
	require.NoError(t, err, "a frozen path shows nothing of it")
	silent(t, a)
	p.Thaw()
	carries(t, d, a, "")
	got := make([]byte, 4)
	_, err = io.ReadFull(a, got)
	require.NoError(t, err)
	require.Equal(t, "late", string(got), "nothing is lost on TCP")
}

func TestTCPEndsOneDirection(t *testing.T) {
	p, d, a := throughTCP(t)
	carries(t, d, a, "there")
	p.End(ToTarget)
	_, err := a.Read(make([]byte, 1))
	require.Equal(t, io.EOF, err)
	carries(t, a, d, "back")
}

func TestTCPPassesAnEndOn(t *testing.T) {
	_, d, a := throughTCP(t)
	carries(t, d, a, "there")
	require.NoError(t, d.CloseWrite())
	_, err := a.Read(make([]byte, 1))
	require.Equal(t, io.EOF, err)
	carries(t, a, d, "back")
}

func TestTCPIsCutAtBothEnds(t *testing.T) {
	p, d, a := throughTCP(t)
	carries(t, d, a, "there")
	p.Cut()
	for _, c := range []net.Conn{d, a} {
		_, err := c.Read(make([]byte, 1))
		require.ErrorContains(t, err, "reset")
	}
	_, err := net.Dial("tcp", dialled(t, p.Addr()))
	require.Error(t, err)
}

func TestSlowPathTakesItsTime(t *testing.T) {
	const delay = 20 * time.Millisecond
	p, d, a := throughTCP(t)
	p.Slow(delay, 0)
	start := time.Now()
	carries(t, d, a, "there")
	carries(t, a, d, "back")
	require.GreaterOrEqual(t, time.Since(start), 2*delay)
	p.Slow(0, 1<<20)
	start = time.Now()
	carries(t, d, a, strings.Repeat("x", 1<<17))
	require.GreaterOrEqual(t, time.Since(start), time.Second/8-time.Second/64)
}

func TestUDPLosesWhatIsSentIntoAFreeze(t *testing.T) {
	p, d, a := throughUDP(t)
	send := func(what string) {
		_, err := io.WriteString(d, what)
		require.NoError(t, err)
	}
	receive := func(want string) net.Addr {
		b := make([]byte, 100)
		n, from, err := a.ReadFrom(b)
		require.NoError(t, err)
		require.Equal(t, want, string(b[:n]))
		return from
	}
	send("there")
	back := receive("there")
	_, err := a.WriteTo([]byte("back"), back)
	require.NoError(t, err)
	b := make([]byte, 100)
	n, err := d.Read(b)
	require.NoError(t, err)
	require.Equal(t, "back", string(b[:n]))
	require.True(t, p.Datagrams())

	p.Freeze()
	send("lost")
	require.NoError(t, a.SetReadDeadline(time.Now().Add(brief)))
	_, _, err = a.ReadFrom(b)
	require.ErrorContains(t, err, "timeout")
	require.NoError(t, a.SetReadDeadline(time.Now().Add(patience)))
	// Until the proxy has taken it, it waits in a socket, and would pass after a thaw.
	hosttest.WaitFor(t, "the datagram to be lost", func() bool { return p.Lost() == 1 })
	p.Thaw()
	send("after")
	receive("after")
}

func TestDialIsHeldBackByAFreeze(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	p := New(t, listening(t, l.Addr()))
	p.Freeze()
	d, err := net.Dial("tcp", dialled(t, p.Addr()))
	require.NoError(t, err)
	patient(t, d)
	require.NoError(t, l.(*net.TCPListener).SetDeadline(time.Now().Add(brief)))
	_, err = l.Accept()
	require.ErrorContains(t, err, "timeout")
	hosttest.WaitFor(t, "the proxy to see the dial", func() bool { return p.Dialled() > 0 })
	require.Equal(t, 1, p.Dialled())
	p.Thaw()
	require.NoError(t, l.(*net.TCPListener).SetDeadline(time.Now().Add(patience)))
	a, err := l.Accept()
	require.NoError(t, err)
	carries(t, d, patient(t, a), "there")
}
