package policy

import (
	"slices"
	"testing"
	"time"
)

func TestDefaultDecidesByItsRulesInOrder(t *testing.T) {
	// Each loser is better than the winner by every rule below the one that
	// decides.
	winner := Candidate{ID: "b", Transport: TCP, Reach: Private, RTT: 100 * ms, Streams: 2, Pinned: 1, Age: time.Minute}
	loser := Candidate{ID: "a", Transport: QUIC, Reach: Loopback, RTT: ms, Streams: 9, Pinned: 9, Age: time.Hour}
	for _, tt := range []struct {
		set      func(c *Candidate) // what the loser has in place of its better value
		decision string
	}{
		{func(c *Candidate) { c.Limited = true }, "rule unlimited: true over false"},
		{func(c *Candidate) { c.Limited = false; c.Relayed = true }, "rule direct: true over false"},
		{func(c *Candidate) { c.Relayed = false; c.Reach = Public }, "rule reach: private over public"},
		{func(c *Candidate) { c.Reach = Private; c.Transport = WebSocket }, "rule transport: tcp over websocket"},
		{func(c *Candidate) { c.Transport = TCP; c.Pinned = 0 }, "rule pinned: 1 over 0"},
		{func(c *Candidate) { c.Pinned = 1; c.RTT = time.Second }, "rule rtt: 100ms over 1s"},
		{func(c *Candidate) { c.RTT = 90 * ms; c.Streams = 1 }, "rule streams: 2 over 1"},
		{func(c *Candidate) { c.Streams = 2; c.Age = time.Second }, "rule older: 1m0s over 1s"},
		{func(c *Candidate) { c.Age = time.Minute; c.ID = "c" }, "rule id: b over c"},
	} {
		tt.set(&loser)
		t.Run(tt.decision, func(t *testing.T) {
			ranking := Default().Rank([]Candidate{loser, winner})
			if got := ids(ranking.Order); got != "b"+loser.ID {
				t.Errorf("order %q, want %q", got, "b"+loser.ID)
			}
			if len(ranking.Decisions) != 1 {
				t.Fatalf("%d decisions for one loser", len(ranking.Decisions))
			}
			if got := ranking.Decisions[0].String(); got != tt.decision {
				t.Errorf("decision %q, want %q", got, tt.decision)
			}
			if d := ranking.Decisions[0]; d.Winner != winner || d.Loser != loser {
				t.Errorf("decision is on %s over %s, want %s over %s", d.Winner.ID, d.Loser.ID, winner.ID, loser.ID)
			}
		})
	}
}

func TestDefaultString(t *testing.T) {
	const want = "chain(unlimited, direct, reach(loopback, private, public), " +
		"transport(quic, webtransport, webrtc, tcp, websocket), pinned, rtt, streams, older)"
	if got := Default().String(); got != want {
		t.Errorf("Default is %q, want %q", got, want)
	}
}

func TestRankNothing(t *testing.T) {
	for name, candidates := range map[string][]Candidate{"nil": nil, "empty": {}} {
		t.Run(name, func(t *testing.T) {
			ranking := Default().Rank(candidates)
			if len(ranking.Order) != 0 || len(ranking.Decisions) != 0 {
				t.Errorf("ranking of nothing: %+v", ranking)
			}
			if winner, ok := ranking.Winner(); ok {
				t.Errorf("nothing won: %+v", winner)
			}
		})
	}
}

func TestRankOne(t *testing.T) {
	only := Candidate{ID: "only", Limited: true, Relayed: true}
	ranking := Default().Rank([]Candidate{only})
	if winner, ok := ranking.Winner(); !ok || winner != only {
		t.Errorf("winner %+v, %t; want the only candidate", winner, ok)
	}
	if len(ranking.Order) != 1 || len(ranking.Decisions) != 0 {
		t.Errorf("%d in order and %d decisions, want 1 and 0: no one lost", len(ranking.Order), len(ranking.Decisions))
	}
}

// ids returns the candidates' IDs in one string.
func ids(candidates []Candidate) string {
	var all string
	for _, c := range candidates {
		all += c.ID
	}
	return all
}

// permutations calls f with every order of candidates.
func permutations(candidates []Candidate, f func([]Candidate)) {
	var permute func(int)
	permute = func(n int) {
		if n == len(candidates) {
			f(slices.Clone(candidates))
			return
		}
		for i := n; i < len(candidates); i++ {
			candidates[n], candidates[i] = candidates[i], candidates[n]
			permute(n + 1)
			candidates[n], candidates[i] = candidates[i], candidates[n]
		}
	}
	permute(0)
}
