// Package conformance runs the test suites that others have written for streams on
// streams that migrate all the time: go-libp2p's suite for stream muxers, and that of the
// Go project for implementations of net.Conn.
//
// Every suite runs on raw streams first, in the same harness, over TCP with yamux and over
// QUIC. What a raw stream passes a migrating one has to pass. What raw streams do not pass,
// and why, is in the table [rawFailures].
package conformance

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"go.uber.org/goleak"

	. "github.com/go-portage/portage/internal/hosttest"
)

// setup is what the streams of a suite run over.
type setup struct {
	first, other Transport // the connection that streams are opened on, and that beside it
	moved        bool      // labelled streams that migrate all the time; else raw ones
	lasting      bool      // of these, streams that may outlive their connection
}

var setups = []setup{
	{first: TCP, other: QUIC},
	{first: QUIC, other: TCP},
	{first: TCP, other: QUIC, moved: true},
	{first: QUIC, other: TCP, moved: true},
	{first: TCP, other: TCP, moved: true},
	{first: QUIC, other: QUIC, moved: true},
	{first: TCP, other: QUIC, moved: true, lasting: true},
	{first: QUIC, other: TCP, moved: true, lasting: true},
}

func (s setup) String() string {
	if s.moved {
		name := fmt.Sprintf("%s to %s and back", s.first, s.other)
		if s.lasting {
			name += ", lasting"
		}
		return name
	}
	return "raw " + string(s.first)
}

// uses says whether streams of this setup are on tr at times.
func (s setup) uses(tr Transport) bool {
	return s.first == tr || s.moved && s.other == tr
}

// rawFailures is what raw streams do not pass.
var rawFailures = []struct {
	test string // name of the test, as in -skip
	why  string
	race bool // fails under the race detector alone
}{
	{
		test: "TestNetConn/^raw_tcp$/.*/^RacyRead$",
		why: "Two Reads at once on one yamux stream race for the size of its receive window " +
			"(sendWindowUpdate, which \"must be invoked with the lock\", is not). " +
			"Reads of a migrate.Stream take turns, so it has to pass this one over any transport.",
		race: true,
	},
	{
		test: "TestNetConn/^raw_tcp$/.*/^RacyWrite$",
		why: "Two Writes at once on one yamux stream read the same send window and both use it. " +
			"The other end then closes the whole connection (receive window exceeded). " +
			"Writes of a migrate.Stream take turns, so it has to pass this one over any transport.",
	},
	{
		test: "TestNetConn/^raw_quic$/.*/^CloseTimeout$",
		why: "Close cancels reading, upon which the echo at the other end stops, and leaves a Write that is " +
			"blocked where it is: it hangs for ever where the window was full at that moment. " +
			"A migrate.Stream calls such a Write out, so it has to pass this one over any transport.",
	},
}

// closeOfCancelled says whether err is the one thing about Close that raw QUIC streams do
// not pass, in BasicIO and PingPong: where the other end has closed first, which on QUIC
// cancels our writing, our Close reports that it had been cancelled. Nothing is lost by it,
// and a migrating stream passes the error on while it is on QUIC. All the rest of the two
// subtests holds on QUIC, too, so that only this error is forgiven.
func closeOfCancelled(s setup, err error) bool {
	return !*all && s.uses(QUIC) && strings.Contains(err.Error(), "close called for canceled stream")
}

var (
	all  = flag.Bool("all", false, "run what raw streams do not pass as well, to see it fail")
	long = flag.Bool("long", false, "run what takes long as well")
)

func TestMain(m *testing.M) {
	flag.Parse()
	if !*all {
		// The suites have no means of their own to leave a subtest out.
		skip := flag.Lookup("test.skip")
		patterns := []string{}
		if v := skip.Value.String(); v != "" {
			patterns = append(patterns, v)
		}
		for _, f := range rawFailures {
			if raceEnabled || !f.race {
				patterns = append(patterns, f.test)
			}
		}
		if err := skip.Value.Set(strings.Join(patterns, "|")); err != nil {
			panic(err)
		}
	}
	// The muxers' suite gives 50,000 streams 10 s to be opened, negotiated and closed; in this
	// way it gives them 100 s, and all else is the same.
	_ = os.Setenv("CI", "true")
	os.Exit(m.Run())
}

// noLeaks checks, when t and all of its cleanups are done, that no goroutine is left that
// was not there before.
func noLeaks(t *testing.T, ignore ...goleak.Option) {
	ignore = append(ignore, goleak.IgnoreCurrent())
	t.Cleanup(func() {
		if err := FindLeaks(ignore...); err != nil {
			t.Error(err)
		}
	})
}
