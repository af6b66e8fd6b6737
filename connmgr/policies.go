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
	type outcome struct {
		ranking policy.Ranking
		err     error
	}
	came := make(chan outcome, 1)
	go func() {
		var out outcome
		defer func() {
			if r := recover(); r != nil {
				out = outcome{err: fmt.Errorf("%w: %v", errPanic, r)}
			}
			came <- out
		}()
		out.ranking = by.Rank(slices.Clone(candidates))
	}()
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

func (d *peerState) setStuck(stuck bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stuck = stuck
}
