// Many goroutines read one Go map; how the map is guarded and whether one goroutine writes to it
// are arguments. Prints "survived READS NANOSECONDS" unless the runtime ends the process.
package main

import (
	"fmt"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

const (
	keys = 1024
	most = 20 * time.Second // until each goroutine has been through all keys
)

type table interface {
	read(key int) int
	write(key, value int)
}

type bare struct{ entries map[int]int }

func (t *bare) read(key int) int     { return t.entries[key] }
func (t *bare) write(key, value int) { t.entries[key] = value }

type locked struct {
	mutex   sync.RWMutex
	entries map[int]int
}

func (t *locked) read(key int) int {
	t.mutex.RLock()
	defer t.mutex.RUnlock()
	return t.entries[key]
}

func (t *locked) write(key, value int) {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	t.entries[key] = value
}

type concurrent struct{ entries sync.Map }

func (t *concurrent) read(key int) int {
	value, _ := t.entries.Load(key)
	return value.(int)
}
func (t *concurrent) write(key, value int) { t.entries.Store(key, value) }

func newTable(guard string) table {
	switch guard {
	case "bare":
		return &bare{entries: map[int]int{}}
	case "rwmutex":
		return &locked{entries: map[int]int{}}
	case "syncmap":
		return &concurrent{}
	}
	panic("the guard is bare, rwmutex or syncmap")
}

// wait returns when the group is done, or after so long.
func wait(group *sync.WaitGroup, limit time.Duration) {
	done := make(chan struct{})
	go func() {
		group.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(limit):
	}
}

func main() {
	shared := newTable(os.Args[1])
	readers, _ := strconv.Atoi(os.Args[2])
	writers, _ := strconv.Atoi(os.Args[3])
	milliseconds, _ := strconv.Atoi(os.Args[4])
	for key := 0; key < keys; key++ {
		shared.write(key, key)
	}

	var stop atomic.Bool
	var reads atomic.Int64
	var group, rounds sync.WaitGroup
	work := func(round int, body func(turn int)) {
		group.Add(1)
		rounds.Add(1)
		go func() {
			defer group.Done()
			// What a careful programmer would try. The runtime's fatal error cannot be recovered.
			defer func() {
				if caught := recover(); caught != nil {
					fmt.Println("recovered", caught)
				}
			}()
			for turn := 0; !stop.Load(); turn++ {
				body(turn)
				if turn+1 == round {
					rounds.Done()
				}
			}
		}()
	}
	for reader := 0; reader < readers; reader++ {
		work(1, func(turn int) {
			for key := 0; key < keys; key++ {
				shared.read(key)
			}
			reads.Add(keys)
		})
	}
	for writer := 0; writer < writers; writer++ {
		work(keys, func(turn int) { shared.write(turn%keys, turn) })
	}
	begun := time.Now()
	time.Sleep(time.Duration(milliseconds) * time.Millisecond)
	// On a busy machine a goroutine may not have run at all by then.
	wait(&rounds, most)
	stop.Store(true)
	group.Wait()
	fmt.Println("survived", reads.Load(), time.Since(begun).Nanoseconds())
}
