package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net"
	"time"

	"github.com/quic-go/quic-go"
)

// pathMigrations has quic-go move a connection to another UDP socket of the client's: with
// all of its streams, and from QUIC to QUIC only. Each connection moves once.
func pathMigrations(t *tb) arm {
	ctx := context.Background()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(err)
	const alpn = "bench"
	transport := func() *quic.Transport {
		c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		must(err)
		return &quic.Transport{Conn: c}
	}
	listening := transport()
	t.Cleanup(func() { _, _ = listening.Close(), listening.Conn.Close() })
	server, err := listening.Listen(&tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{cert}, PrivateKey: key}},
		NextProtos:   []string{alpn},
	}, nil)
	must(err)
	config := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{alpn}}
	return func(n int) (total cost) {
		for range n {
			from, to := transport(), transport()
			near, err := from.Dial(ctx, server.Addr(), config, nil)
			must(err)
			far, err := server.Accept(ctx)
			must(err)
			a, err := near.OpenStream()
			must(err)
			write(a, 1)
			b, err := far.AcceptStream(ctx)
			must(err)
			read(b, 1)
			before := spent()
			path, err := near.AddPath(to)
			must(err)
			must(path.Probe(ctx))
			must(path.Switch())
			write(a, 1) // what makes the other end switch
			read(b, 1)
			total = total.plus(spent().minus(before))
			_ = near.CloseWithError(0, "")
			_ = far.CloseWithError(0, "")
			for _, tr := range []*quic.Transport{from, to} {
				_, _ = tr.Close(), tr.Conn.Close()
			}
		}
		return total
	}
}
