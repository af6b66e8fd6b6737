package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/host"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/go-portage/portage/connmgr"
)

// server shows, over HTTP, what the two hosts do, while the demo runs and afterwards: the
// status page of each, and the metrics of both.
type server struct {
	listener net.Listener
	http     *http.Server
	metrics  *prometheus.Registry

	mu     sync.Mutex
	pages  map[side]http.Handler
	closes []func() error // of the hosts, which are there for as long as the pages
}

// serve starts to listen on addr.
func serve(addr string) (*server, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("-http: %w", err)
	}
	return serveOn(l), nil
}

func serveOn(l net.Listener) *server {
	s := &server{listener: l, metrics: prometheus.NewRegistry(), pages: make(map[side]http.Handler)}
	mux := http.NewServeMux()
	mux.Handle("/{$}", s.page(senderSide))
	mux.Handle("/receiver", s.page(receiverSide))
	mux.Handle("/metrics", promhttp.HandlerFor(s.metrics, promhttp.HandlerOpts{}))
	s.http = &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = s.http.Serve(l) }()
	return s
}

// page is the status page of a side, once there is its host.
func (s *server) page(who side) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		page := s.pages[who]
		s.mu.Unlock()
		if page == nil {
			http.Error(w, fmt.Sprintf("the %s has not started yet: load this page again", who), http.StatusServiceUnavailable)
			return
		}
		page.ServeHTTP(w, r)
	})
}

// show serves the status page of a host.
func (s *server) show(who side, h host.Host) {
	m, ok := connmgr.Of(h)
	if !ok {
		return
	}
	page := connmgr.Handler(m)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pages[who] = page
}

// keep has something closed with the server.
func (s *server) keep(close func() error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closes = append(s.closes, close)
}

func (s *server) url() string { return "http://" + s.listener.Addr().String() }

// close ends it all.
func (s *server) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	errs := []error{s.http.Shutdown(ctx)}
	if errs[0] != nil {
		errs = append(errs, s.http.Close())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, close := range s.closes {
		errs = append(errs, close())
	}
	return errors.Join(errs...)
}
