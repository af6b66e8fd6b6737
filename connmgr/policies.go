package connmgr

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/go-portage/portage/policy"
)

// policies has connections ranked by the policy in force. That is a program's own code: where
// it panics, or does not return for a second, that is one peer's ranking and nobody else's
// trouble.
type policies struct {
	tasks   *tasks
	sched   *scheduler
	tells   *teller
	inForce atomic.Pointer[ranker]
	hurried atomic.Int32 // calls for pages that have not returned
}

func newPolicies(p policy.Policy, t *tasks, sched *scheduler, tells *teller) *policies {
	r := &policies{tasks: t, sched: sched, tells: tells}
	r.inForce.Store(newRanker(p))
	return r
}

// ranker is a policy, and what it looks at.
type ranker struct {
	policy.Policy
	use    policy.Use
	blamed atomic.Bool // an error line has been written about it
}

func newRanker(p policy.Policy) *ranker { return &ranker{Policy: p, use: policy.Uses(p)} }

// name is the policy's String, which is a program's own code, too.
func (r *ranker) name() (name string) {
	defer func() {
		if recover() != nil {
			name = fmt.Sprintf("%T", r.Policy)
		}
	}()
	return r.String()
}

var (
	errNoWinner = errors.New("the policy names no connection that it was given")
	errSilent   = errors.New("no connection of the peer answers")
	errStuck    = errors.New("the policy has not returned for a second")
	errPanic    = errors.New("the policy panicked")
	errSlow     = errors.New("the policy takes too long to be asked for this page")
)

func (r *policies) policy() *ranker { return r.inForce.Load() }

// of is the policy for decide. d is nil for a peer without an entry.
func (r *policies) of(d *peerState) rank {
	return func(candidates []policy.Candidate) (policy.Ranking, error) {
		if d != nil {
			d.mu.Lock()
			stuck := d.stuck
			d.mu.Unlock()
			if stuck {
				return policy.Ranking{}, errStuck
			}
		}
		return r.rank(d, candidates)
	}
}

func (r *policies) rank(d *peerState, candidates []policy.Candidate) (policy.Ranking, error) {
	by := r.policy()
	came := by.ask(candidates, nil)
	timer := time.NewTimer(policyWait)
	defer timer.Stop()
	select {
	case out := <-came:
		if out.err != nil {
			r.tells.policyFailed(d, by, out.err)
		}
		return out.ranking, out.err
	case <-timer.C:
	}
	r.tells.policyFailed(d, by, errStuck)
	if d != nil {
		d.setStuck(true)
		r.tasks.start(func() {
			select {
			case <-came:
			case <-r.tasks.ctx.Done():
			}
			d.setStuck(false)
			r.sched.schedule(d, time.Now())
		})
	}
	return policy.Ranking{}, errStuck
}

// ranked is what a policy says.
type ranked struct {
	ranking policy.Ranking
	err     error
}

// ask asks the policy, on a goroutine of its own, and calls done, if that is not nil, when it
// has returned.
func (by *ranker) ask(candidates []policy.Candidate, done func()) <-chan ranked {
	came := make(chan ranked, 1)
	go func() {
		var out ranked
		defer func() {
			if r := recover(); r != nil {
				out = ranked{err: fmt.Errorf("%w: %v", errPanic, r)}
			}
			if done != nil {
				done()
			}
			came <- out
		}()
		out.ranking = by.Rank(slices.Clone(candidates))
	}()
	return came
}

const (
	// hurry is how long a page waits for the policy, for all of its peers together.
	hurry = 250 * time.Millisecond

	// maxHurried is how many calls for pages may be waiting for a policy that does not
	// return, however often a page is asked for.
	maxHurried = 4
)

// inHurry is the policy for a page, which has many peers: where it does not answer in time,
// what it has said of a peer before is shown.
type inHurry struct {
	*policies
	until time.Time
}

func (r *policies) hurry() inHurry { return inHurry{r, time.Now().Add(hurry)} }

func (h inHurry) of(d *peerState) rank {
	return func(candidates []policy.Candidate) (policy.Ranking, error) {
		var said policy.Ranking
		stuck := false
		if d != nil {
			d.mu.Lock()
			said, stuck = d.ranking, d.stuck
			d.mu.Unlock()
		}
		if !stuck {
			if out, ok := h.try(candidates); ok {
				return out.ranking, out.err
			}
		}
		if len(said.Order) == len(candidates) && !slices.ContainsFunc(candidates, func(c policy.Candidate) bool {
			return !slices.ContainsFunc(said.Order, func(o policy.Candidate) bool { return o.ID == c.ID })
		}) {
			return said, nil
		}
		return policy.Ranking{}, errSlow
	}
}

// try asks the policy, if there is time.
func (h inHurry) try(candidates []policy.Candidate) (ranked, bool) {
	wait := time.Until(h.until)
	if wait <= 0 {
		return ranked{}, false
	}
	if h.hurried.Add(1) > maxHurried {
		h.hurried.Add(-1)
		return ranked{}, false
	}
	came := h.policy().ask(candidates, func() { h.hurried.Add(-1) })
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case out := <-came:
		return out, true
	case <-timer.C:
		return ranked{}, false
	}
}

func (d *peerState) setStuck(stuck bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stuck = stuck
}
