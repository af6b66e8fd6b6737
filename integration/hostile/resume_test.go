package hostile

import (
	"io"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/rawpeer"
	"github.com/go-portage/portage/migrate"
)

// resumeWindow is what the victim keeps of a stream that may be resumed. All of a peer's may
// take four times as much.
const resumeWindow = 256 << 10

func resumable(id uint64) string { return Lengthy("\x0a" + Lengthy("\x08"+Uvarint(id)+"\xa8\x06\x01")) }

func resumes(id, origin, epoch, received uint64) string {
	m := Lengthy("\x08" + Uvarint(origin) + "\x10" + Uvarint(epoch) + "\x18" + Uvarint(received))
	return Prelude + Lengthy("\x12"+Lengthy("\x08"+Uvarint(id)+"\x10"+Uvarint(origin)+"\xaa\x06"+m))
}

// report begins a stream of reports.
var report = MultistreamToken + Token(migrate.ResumeID)

func received(origin, n uint64) string {
	return Lengthy("\x08" + Uvarint(origin) + "\x10" + Uvarint(n))
}

// epoch is the n-th one that e may give.
func (e *hostile) epoch(n int) uint64 { return uint64(2*n) - e.Fresh()&1 }

// resumableStream opens a stream to the echo that may be resumed, and has its answer.
func (e *hostile) resumableStream(i int) (u *RawStream, label uint64, err error) {
	label = e.Fresh()
	u, err = e.Open(i, refusal, Prelude+resumable(label)+MultistreamToken+Token(echoID))
	if err != nil {
		return nil, 0, err
	}
	return u, label, Expect(u, AnswerBytes(echoID))
}

// TestFloodsOfResumption is TestFloods with streams that may be resumed.
func TestFloodsOfResumption(t *testing.T) {
	withstands(t, []flood{
		{name: "closed streams of which nothing is confirmed", n: 20, do: unconfirmed},
		{name: "one stream, resumed all the time", n: 20, do: resumedInALoop},
		{name: "attempts that are not carried on", n: 30, do: attemptsWithoutEnd},
		{name: "unknown streams", n: 20, do: unknownOrigins, crowds: true},
		{name: "reports about nothing", n: 2_000, do: reportsAboutNothing},
		{name: "confirmations that lie", n: 6, do: lies},
		{name: "epochs from the future", n: 6, do: futureEpochs},
	}, 4*resumeWindow, migrate.WithResumption(migrate.ResumeWindow(resumeWindow), migrate.ResumePatience(time.Second)))
}

// unconfirmed has the victim close streams with 20 kB each that are not confirmed.
func unconfirmed(e *hostile, n int) {
	data := make([]byte, 20_000)
	eachOf(8, n, func(k int) {
		tried.Add(1)
		u, _, err := e.resumableStream(k % 2)
		if err != nil {
			return
		}
		if _, err := u.Write(data); err == nil {
			_, _ = io.ReadFull(u, make([]byte, len(data)))
		}
		_ = u.Close()
	})
}

func resumedInALoop(e *hostile, n int) {
	u, origin, err := e.resumableStream(0)
	require.NoError(e.T, err)
	for k := range n {
		_, err := io.WriteString(u, "x")
		require.NoError(e.T, err)
		require.NoError(e.T, Expect(u, "x"))
		next, err := e.tries(1-k%2, resumes(e.Fresh(), origin, e.epoch(k+1), uint64(k+1)))
		require.NoError(e.T, err)
		require.NoError(e.T, Expect(next, Prelude+Lengthy("\x1a"+Lengthy("\xa8\x06"+Uvarint(uint64(k+1))))), "attempt %d", k)
		u = next
	}
}

// attemptsWithoutEnd resumes one stream again and again, and reads nothing.
func attemptsWithoutEnd(e *hostile, n int) {
	_, origin, err := e.resumableStream(0)
	require.NoError(e.T, err)
	each(n, func(k int) { _, _ = e.floods(k%2, resumes(e.Fresh(), origin, e.epoch(k+1), 0)) })
}

func unknownOrigins(e *hostile, n int) {
	each(n, func(k int) { _, _ = e.floods(k%2, resumes(e.Fresh(), e.Fresh()^uint64(k&1), e.epoch(1), 0)) })
}

func reportsAboutNothing(e *hostile, n int) {
	u, err := e.tries(0, report)
	require.NoError(e.T, err)
	for range n {
		tried.Add(1)
		_, err := io.WriteString(u, received(e.Fresh(), 1<<40))
		require.NoError(e.T, err)
	}
}

// lies says of each stream that more has arrived than was sent. That stream is reset, and no
// other.
func lies(e *hostile, n int) {
	good, _, err := e.resumableStream(0)
	require.NoError(e.T, err)
	each(n, func(k int) {
		u, origin, err := e.resumableStream(k % 2)
		if err != nil {
			return
		}
		if _, err := io.WriteString(u, "x"); err != nil || Expect(u, "x") != nil {
			return
		}
		if v, err := e.tries(k%2, report+received(origin, 3)); err == nil { // it has sent one byte
			_, err = io.ReadAll(u)
			assert.Error(e.T, err)
			_ = v.Close()
		}
	})
	_, err = io.WriteString(good, "x")
	require.NoError(e.T, err)
	require.NoError(e.T, Expect(good, "x"))
}

func futureEpochs(e *hostile, n int) {
	u, origin, err := e.resumableStream(0)
	require.NoError(e.T, err)
	each(n, func(k int) {
		v, err := e.floods(k%2, resumes(e.Fresh(), origin, e.epoch(1<<20+k), 0))
		if err == nil {
			_, err = io.ReadAll(v)
			assert.Error(e.T, err)
		}
	})
	_, err = io.WriteString(u, "x")
	require.NoError(e.T, err)
	require.NoError(e.T, Expect(u, "x"))
}
