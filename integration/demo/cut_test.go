package main

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"
)

// cutInSmall is -cut in less time. The relay's path is as fast as the sender, so that its limit
// is reached soon, and there is as much to send as a machine needs that is busy.
func cutInSmall(t *testing.T, log *logBuffer, args ...string) outcome {
	t.Helper()
	cfg, err := parseFlags(append([]string{"-cut", "-size", "24MiB", "-rate", "4MiB", "-after", "150ms", "-timeout", "5m"}, args...), log)
	if err != nil {
		t.Fatal(err)
	}
	cfg.relay.rate, cfg.relay.data = 4<<20, 1<<20
	return runConfig(t, t.Context(), log, cfg)
}

func TestTransferOutlivesItsConnections(t *testing.T) {
	for _, streams := range []string{"1", "5"} {
		t.Run(streams, func(t *testing.T) {
			t.Parallel()
			var log logBuffer
			got := cutInSmall(t, &log, "-streams", streams)
			if got.Error != "" || got.Bytes != got.Size || !got.SHA256OK {
				t.Fatalf("%d of %d bytes arrived, error %q\n%s", got.Bytes, got.Size, got.Error, &log)
			}
			if len(got.Cuts) != 4 || got.Cuts[0].Next != relay || got.Cuts[1].Next != relay || got.Cuts[3].Next != tcp {
				t.Errorf("cuts: %+v; want four, from TCP to the relay, to it again, and in the end to TCP\n%s", got.Cuts, &log)
			}
			if got.Received[relay] == 0 || got.Received[tcp] == 0 {
				t.Errorf("received by path: %v", got.Received)
			}
			for _, side := range []string{"sender", "receiver"} {
				if !bytes.Contains([]byte(log.String()), []byte(side+"  peer")) {
					t.Errorf("the log of the %s says nothing", side)
				}
			}
		})
	}
}

func TestWithoutPortageTheFirstCutEndsTheTransfer(t *testing.T) {
	t.Parallel()
	var log logBuffer
	got := cutInSmall(t, &log, "-without")
	if got.Error == "" || got.SHA256OK || len(got.Cuts) != 1 || got.Cuts[0].Next != "" {
		t.Errorf("error %q, cuts %+v; want an error at the first", got.Error, got.Cuts)
	}
}

// What goes through a door arrives while it is open. When it is shut, TCP sees a reset and UDP
// nothing, until it is open again.
func TestDoors(t *testing.T) {
	echo, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer echo.Close()
	go func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			go io.Copy(c, c)
		}
	}()
	echoes, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer echoes.Close()
	go func() {
		buf := make([]byte, 100)
		for {
			n, from, err := echoes.ReadFrom(buf)
			if err != nil {
				return
			}
			echoes.WriteTo(buf[:n], from)
		}
	}()
	ask := func(c net.Conn) error {
		if _, err := c.Write([]byte("?")); err != nil {
			return err
		}
		_, err := io.ReadFull(c, make([]byte, 1))
		return err
	}

	d, err := newTCPDoor()
	if err != nil {
		t.Fatal(err)
	}
	dial := func() net.Conn {
		c, err := net.Dial("tcp", d.listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	if c, err := net.Dial("tcp", d.listener.Addr().String()); err == nil {
		if ask(c) == nil {
			t.Error("a door is shut at first")
		}
		c.Close()
	}
	d.open(echo.Addr().String())
	c := dial()
	if err := ask(c); err != nil {
		t.Errorf("nothing comes through the open door: %v", err)
	}
	d.shut()
	if ask(c) == nil {
		t.Error("the connection outlives the door")
	}
	d.open(echo.Addr().String())
	if err := ask(dial()); err != nil {
		t.Errorf("nothing comes through the door that is open again: %v", err)
	}
	if err := d.close(); err != nil {
		t.Error(err)
	}

	u, err := newUDPDoor()
	if err != nil {
		t.Fatal(err)
	}
	c, err = net.Dial("udp", u.socket.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	u.open(echoes.LocalAddr().String())
	if err := ask(c); err != nil {
		t.Errorf("nothing comes through the open door: %v", err)
	}
	u.shut()
	c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if err := ask(c); err == nil {
		t.Error("something comes through the door that is shut")
	}
	c.SetReadDeadline(time.Time{})
	u.open(echoes.LocalAddr().String())
	if err := ask(c); err != nil {
		t.Errorf("nothing comes through the door that is open again: %v", err)
	}
	if err := u.close(); err != nil {
		t.Error(err)
	}
}
