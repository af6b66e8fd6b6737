package main

import (
	"testing"

	"github.com/go-portage/portage/policy"
)

func TestPolicyPrefersTheSecondConnection(t *testing.T) {
	candidate := func(p path) policy.Candidate {
		if p == relay {
			return policy.Candidate{ID: "relay", Transport: policy.TCP, Relayed: true, Limited: true}
		}
		return policy.Candidate{ID: string(p), Transport: transports[p]}
	}
	for _, from := range paths {
		for _, to := range paths {
			if to == relay || to == from {
				continue
			}
			ranking := policyFor(from, to).Rank([]policy.Candidate{candidate(from), candidate(to)})
			if winner, _ := ranking.Winner(); winner.ID != string(to) {
				t.Errorf("%s to %s: the policy keeps %s", from, to, winner.ID)
			}
		}
	}
}
