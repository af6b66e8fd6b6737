package apps

import (
	"context"
	"encoding/json"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	pubsub "github.com/libp2p/go-libp2p-pubsub"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/stretchr/testify/require"
)

// Twenty subscribers of a topic that publish all the time. Each gets each message once.
func TestGossipSub(t *testing.T) {
	const (
		hosts  = 20
		rounds = 100 // in each of which each host publishes one message
		window = 4   // rounds that are under way at a time
		pace   = 40 * time.Millisecond
		moves  = 200
	)
	playQUIC(t, hosts, []int{1, 3}, func(t *testing.T, ctx context.Context, w *world) {
		members := make([]*member, hosts)
		for i, n := range w.nodes {
			members[i] = newMember(t, ctx, n)
		}
		w.connect()
		for i, m := range members {
			require.NoError(t, until(ctx, func() bool { return len(m.topic.ListPeers()) >= 4 }),
				"host %d has %d peers in the topic", i, len(m.topic.ListPeers()))
		}
		publish := func(round int) {
			for i, m := range members {
				data, err := json.Marshal([2]int{i, round})
				require.NoError(t, err)
				require.NoError(t, m.topic.Publish(ctx, data))
			}
		}
		// What is published before gossipsub has built its mesh need not come. Once a
		// message of each host has come everywhere, there is one.
		for first, begun := -1, false; !begun; first-- {
			publish(first)
			begun = waitFor(ctx, time.Second, func() bool {
				return !slices.ContainsFunc(members, func(m *member) bool { return m.has(first) < hosts })
			}) == nil
		}
		enough := w.after(moves)
		sent := 0
		for ; sent < rounds || !enough(); sent++ {
			publish(sent)
			time.Sleep(pace) // of virtual time
			for i, m := range members {
				require.NoError(t, until(ctx, func() bool { return m.has(sent-window+1) >= hosts || sent < window }),
					"host %d has %d messages of round %d", i, m.has(sent-window+1), sent-window+1)
			}
		}
		for i, m := range members {
			for round := range sent {
				require.NoError(t, until(ctx, func() bool { return m.has(round) >= hosts }),
					"host %d has %d messages of round %d", i, m.has(round), round)
			}
			for what, times := range m.all() {
				require.Equal(t, 1, times, "host %d, message %v", i, what)
			}
		}
		t.Logf("%d messages, %d deliveries", hosts*sent, hosts*hosts*sent)
	})
}

// member is a subscriber.
type member struct {
	topic *pubsub.Topic

	mu     sync.Mutex
	got    map[[2]int]int // how often each message has come
	rounds map[int]int    // how many messages of each round
}

func newMember(t *testing.T, ctx context.Context, n host.Host) *member {
	// Where its queues are full, gossipsub drops messages, on plain hosts too.
	ps, err := pubsub.NewGossipSub(ctx, n, pubsub.WithPeerOutboundQueueSize(4096), pubsub.WithValidateQueueSize(4096))
	require.NoError(t, err)
	topic, err := ps.Join("talk")
	require.NoError(t, err)
	sub, err := topic.Subscribe(pubsub.WithBufferSize(4096))
	require.NoError(t, err)
	m := &member{topic: topic, got: make(map[[2]int]int), rounds: make(map[int]int)}
	go func() {
		for {
			msg, err := sub.Next(ctx)
			if err != nil {
				return
			}
			var what [2]int
			if err := json.Unmarshal(msg.Data, &what); err != nil {
				t.Errorf("a message that nobody sent: %q", msg.Data)
				return
			}
			m.mu.Lock()
			if m.got[what]++; m.got[what] == 1 {
				m.rounds[what[1]]++
			}
			m.mu.Unlock()
		}
	}()
	return m
}

// has is how many messages of a round have come.
func (m *member) has(round int) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.rounds[round]
}

func (m *member) all() map[[2]int]int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.got)
}
