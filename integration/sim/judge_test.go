package sim

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-portage/portage/migrate"
)

// The oracle itself: what it must not excuse.

// judged is a run without hosts: one stream, from a to b, that stays on connection 0 of two.
func judged() (*world, *simStream) {
	w := &world{
		plan:  plan{draft: -1, streams: []streamPlan{{labelled: true}}},
		tally: newTally(),
		links: []*simLink{{}, {path: 1}},
		start: time.Now().Add(-time.Hour),
	}
	st := newSimStream(w, 0)
	w.streams = append(w.streams, st)
	for side := range 2 {
		st.ends[side] = &end{st: st, side: side, s: new(migrate.Stream), out: st.flows[side], in: st.flows[1-side]}
		st.stays[side] = []*stay{{came: w.start}}
	}
	return w, st
}

// rules are those that the run breaks.
func (w *world) rules() (rules []string) {
	for _, f := range w.failures {
		rule, _, _ := strings.Cut(f, ":")
		rules = append(rules, rule)
	}
	return rules
}

func (w *world) after(d time.Duration) time.Time { return w.start.Add(d) }

func TestOracleWantsTheCauseFirst(t *testing.T) {
	for _, tc := range []struct {
		name string
		hurt time.Duration
		link int
		want []string
	}{
		{"harm before", 9 * time.Second, 0, nil},
		{"harm at that instant", 10 * time.Second, 0, nil},
		{"harm after", 11 * time.Second, 0, []string{"cause", "cause"}},
		{"harm elsewhere", 9 * time.Second, 1, []string{"cause", "cause"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w, st := judged()
			w.links[tc.link].hurt = w.after(tc.hurt)
			f := st.flows[0]
			f.writeErr, f.writeErrAt = errors.New("test"), w.after(10*time.Second)
			f.readErr, f.readErrAt = f.writeErr, f.writeErrAt
			st.ends[0].told = f.writeErr
			st.judgeFlow(f, st.ends[0], st.ends[1], st.wasHarmed())
			require.Equal(t, tc.want, w.rules())
		})
	}
}

func TestOracleWantsTheNewsInTime(t *testing.T) {
	for _, tc := range []struct {
		name   string
		silent int // the connection that falls silent, or -1
		left   time.Duration
		want   []string
	}{
		{"closed", -1, 0, []string{"both"}},
		{"silent", 0, 0, nil},
		{"another is silent", 1, 0, []string{"both"}},
		{"silent when the stream had left", 0, 5 * time.Second, []string{"both"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w, st := judged()
			st.harm("test")
			st.harms[0].at = w.after(6 * time.Second)
			if tc.silent >= 0 {
				w.links[tc.silent].silent = w.after(9 * time.Second)
			}
			if tc.left > 0 {
				for side := range 2 {
					st.stays[side][0].left = w.after(tc.left)
				}
			}
			f := st.flows[0]
			f.readErr, f.readErrAt = errors.New("test"), w.after(10*time.Second)
			st.ends[0].noRead, st.ends[0].noWrite = w.after(20*time.Second), w.after(20*time.Second)
			st.judgeFlow(f, st.ends[0], st.ends[1], st.wasHarmed())
			require.Equal(t, tc.want, w.rules())
		})
	}
}

// Who has ended its writing in time, and reads on for longer, is to be told by its Reads,
// unless all that they can bring was there before.
func TestOracleWantsTheNewsFromReads(t *testing.T) {
	for _, tc := range []struct {
		name            string
		wrote, finished time.Duration // when the writer ended its writing, and the other end its own
		missing         int64
		want            []string
	}{
		{"all was there", 11 * time.Second, 9 * time.Second, 0, nil},
		{"ended later", 11 * time.Second, 11 * time.Second, 0, []string{"both"}},
		{"something is missing", 11 * time.Second, 9 * time.Second, 1, []string{"both"}},
		{"writes for longer", 16 * time.Second, 9 * time.Second, 0, []string{"both"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w, st := judged()
			st.harm("test")
			st.harms[0].at = w.after(6 * time.Second)
			f, back := st.flows[0], st.flows[1]
			f.readErr, f.readErrAt = errors.New("test"), w.after(10*time.Second)
			st.ends[0].noRead, st.ends[0].noWrite = w.after(20*time.Second), w.after(tc.wrote)
			back.eof, back.finished, back.wrote = true, w.after(tc.finished), tc.missing
			st.judgeFlow(f, st.ends[0], st.ends[1], st.wasHarmed())
			require.Equal(t, tc.want, w.rules())
		})
	}
}

func TestOracleWantsMeetingsToEndWell(t *testing.T) {
	for _, tc := range []struct {
		name  string
		slow  time.Duration // for which a connection that an attempt asked on was held up
		lived time.Duration // how long the stream did
		want  []string
	}{
		{"lived long", 0, 4 * time.Second, []string{"moves"}},
		{"lived short", 0, time.Second, nil},
		{"the other attempt was held up", harmless, 4 * time.Second, nil},
		{"held up, but not for so long", harmless, 10 * time.Second, []string{"moves"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w, st := judged()
			w.links[1].slow = tc.slow
			st.step(0, true, migrate.Started, 0, 1)
			st.met = []meeting{{w.after(time.Second), w.after(2 * time.Second)}}
			for _, e := range st.ends {
				e.closedAt = w.after(2*time.Second + tc.lived)
			}
			st.judgeMeetings()
			require.Equal(t, tc.want, w.rules())
		})
	}
}

// A migration may be acked before the acceptor's handler runs. What then happens to the old
// connection harms the stream, until the migration has finished.
func TestOracleKnowsWhereAnAcceptorWas(t *testing.T) {
	w, st := judged()
	st.ends = [2]*end{} // there is nothing to agree on
	st.stays[0], st.stays[1] = nil, nil
	st.step(1, false, migrate.Started, 0, 1)
	st.step(1, false, migrate.Acked, 0, 1)
	require.Empty(t, st.wasHarmed())
	w.links[0].hurt = time.Now()
	require.Equal(t, "connection 0", st.wasHarmed())

	w.links[0].hurt = time.Time{}
	st.step(1, false, migrate.Finished, 0, 1)
	w.links[0].hurt = time.Now().Add(time.Second)
	require.Empty(t, st.harmedBy(time.Now().Add(time.Minute)))
}

func TestOracleWantsWritesToReturn(t *testing.T) {
	for _, tc := range []struct {
		name string
		ago  time.Duration
		want []string
	}{
		{"harmed a short time ago", noticed / 2, nil},
		{"harmed long ago", noticed + time.Minute, []string{"live"}},
		{"never harmed", 0, []string{"live"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w, st := judged()
			if tc.ago > 0 {
				w.links[0].hurt = time.Now().Add(-tc.ago)
				w.links[0].last = w.links[0].hurt
			}
			st.ends[0].judgeGivenUp(true)
			require.Equal(t, tc.want, w.rules())
		})
	}
}

// A side that asks and denies meanwhile is still migrating.
func TestOracleTellsMigrationsApart(t *testing.T) {
	for _, first := range []bool{true, false} {
		_, st := judged()
		st.ends = [2]*end{} // there is nothing to agree on
		for _, initiator := range []bool{first, !first} {
			st.step(0, initiator, migrate.Started, 0, 1)
		}
		goesOn := func() (initiators, responders int) {
			for _, a := range st.attempts[0] {
				switch {
				case !a.left.IsZero():
				case a.initiator:
					initiators++
				default:
					responders++
				}
			}
			return
		}
		st.step(0, false, migrate.Denied, 0, 1)
		i, r := goesOn()
		require.Equal(t, [2]int{1, 0}, [2]int{i, r}, "what was denied is the peer's")
		st.step(0, true, migrate.Acked, 0, 1)
		st.step(0, true, migrate.Finished, 0, 1)
		i, r = goesOn()
		require.Equal(t, [2]int{0, 0}, [2]int{i, r})
	}
}

func TestOracleWantsNoEndOfWhatWasNotOpened(t *testing.T) {
	w, st := judged()
	st.ends[0] = nil
	st.judge()
	require.Empty(t, w.rules())
	st.flows[0].eof = true
	st.judge()
	require.Equal(t, []string{"end"}, w.rules())
}
