package sim

import (
	"maps"
	"slices"
	"sync"
)

// tasks are what runs beside everything else. What has not ended when the run should be over
// is a hang, and reported by its name.
type tasks struct {
	tasksMu sync.Mutex
	running map[string]int // what has begun and not ended
}

func (t *tasks) task(name string, f func()) {
	t.tasksMu.Lock()
	if t.running == nil {
		t.running = make(map[string]int)
	}
	t.running[name]++
	t.tasksMu.Unlock()
	go func() {
		defer func() {
			t.tasksMu.Lock()
			defer t.tasksMu.Unlock()
			if t.running[name]--; t.running[name] == 0 {
				delete(t.running, name)
			}
		}()
		f()
	}()
}

func (t *tasks) unfinished() []string {
	t.tasksMu.Lock()
	defer t.tasksMu.Unlock()
	return slices.Sorted(maps.Keys(t.running))
}
