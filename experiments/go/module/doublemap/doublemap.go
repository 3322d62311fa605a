// The switch between two tables of section 4.3 of the article, made to compile in two ways, and the
// one that publishes a generation that nobody changes any more. Counts what readers see.
package main

import (
	"fmt"
	"maps"
	"os"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"lab/orders"
)

const limit = 20 * time.Second // for readers to have swept

// A table: changes of a generation are put into force by commit, unless a newer one is.
type table interface {
	commit(version uint64, changes map[uint64]uint64) bool
	// view answers what a sweep reads from.
	view() func(key uint64) (uint64, bool)
}

// As printed, with a conversion that lets it compile: the first word of active is overwritten.
type forced struct {
	active, pending sync.Map
	version         uint64
}

func (t *forced) commit(version uint64, changes map[uint64]uint64) bool {
	for key, value := range changes {
		t.pending.Store(key, value)
	}
	expected := atomic.LoadUint64(&t.version)
	_ = expected
	atomic.SwapPointer((*unsafe.Pointer)(unsafe.Pointer(&t.active)),
		unsafe.Pointer((*unsafe.Pointer)(unsafe.Pointer(&t.pending))))
	atomic.StoreUint64(&t.version, version)
	return true
}

func (t *forced) view() func(uint64) (uint64, bool) { return loader(&t.active) }

// What was meant: pointers to two maps are exchanged. No version is compared, nothing is emptied.
type pointers struct {
	active, pending atomic.Pointer[sync.Map]
	version         uint64
}

func (t *pointers) commit(version uint64, changes map[uint64]uint64) bool {
	pending := t.pending.Load()
	for key, value := range changes {
		pending.Store(key, value)
	}
	t.pending.Store(t.active.Swap(pending))
	atomic.StoreUint64(&t.version, version)
	return true
}

func (t *pointers) view() func(uint64) (uint64, bool) { return loader(t.active.Load()) }

func loader(of *sync.Map) func(uint64) (uint64, bool) {
	return func(key uint64) (uint64, bool) {
		value, found := of.Load(key)
		if !found {
			return 0, false
		}
		return value.(uint64), true
	}
}

// A generation is made anew, never changed, and put into force over the one that it was made from.
type generation struct {
	version uint64
	entries map[uint64]uint64
}

type immutable struct{ active atomic.Pointer[generation] }

func (t *immutable) commit(version uint64, changes map[uint64]uint64) bool {
	expected := t.active.Load()
	if expected.version >= version {
		return false
	}
	next := &generation{version, maps.Clone(expected.entries)}
	maps.Copy(next.entries, changes)
	return t.active.CompareAndSwap(expected, next)
}

func (t *immutable) view() func(uint64) (uint64, bool) {
	entries := t.active.Load().entries
	return func(key uint64) (uint64, bool) {
		value, found := entries[key]
		return value, found
	}
}

func newTable(way string) table {
	switch way {
	case "forced":
		return &forced{}
	case "pointers":
		made := &pointers{}
		made.active.Store(&sync.Map{})
		made.pending.Store(&sync.Map{})
		return made
	case "immutable":
		made := &immutable{}
		made.active.Store(&generation{entries: map[uint64]uint64{}})
		return made
	}
	panic("the way is forced, pointers or immutable")
}

func same(keys, version uint64) map[uint64]uint64 {
	changes := map[uint64]uint64{}
	for key := range keys {
		changes[key] = version
	}
	return changes
}

// What readers saw, and what of the generations is in force in the end.
type counts struct {
	sweeps, stale, mixed, panicked, lost, late int64
	newest                                     atomic.Uint64
}

// look reads one key; a reader whose table panics recovers, as a careful one would.
func (c *counts) look(read func(uint64) (uint64, bool), key uint64) (value uint64, found bool) {
	defer func() {
		if recover() != nil {
			atomic.AddInt64(&c.panicked, 1)
		}
	}()
	return read(key)
}

func (c *counts) sweepOnce(of table, keys, committed uint64) {
	read := of.view()
	lowest, highest := ^uint64(0), uint64(0)
	for key := range keys {
		value, _ := c.look(read, key)
		lowest, highest = min(lowest, value), max(highest, value)
	}
	if lowest < committed {
		atomic.AddInt64(&c.stale, 1)
	}
	if lowest != highest {
		atomic.AddInt64(&c.mixed, 1)
	}
	for newest := c.newest.Load(); newest < highest && !c.newest.CompareAndSwap(newest, highest); {
		newest = c.newest.Load()
	}
	atomic.AddInt64(&c.sweeps, 1)
}

// Readers sweep over all keys while generation follows generation, each of which sets them all; or,
// where nobody writes, until they have swept so often.
func (c *counts) sweep(of table, keys, generations uint64, readers int, quiet bool) {
	var committed atomic.Uint64
	var done atomic.Bool
	var group sync.WaitGroup
	for range readers {
		group.Go(func() {
			for !done.Load() {
				c.sweepOnce(of, keys, committed.Load())
			}
		})
	}
	deadline := time.Now().Add(limit)
	swept := func(times int64) {
		for atomic.LoadInt64(&c.sweeps) < times && time.Now().Before(deadline) {
			time.Sleep(time.Millisecond)
		}
	}
	swept(1) // before the first generation, as a reader that was there before the writer
	for version := uint64(1); version <= generations && !quiet; version++ {
		of.commit(version, same(keys, version))
		committed.Store(version)
	}
	swept(int64(generations))
	done.Store(true)
	group.Wait()
}

// Each generation sets a key that no other sets: how many are not in force in the end?
func (c *counts) lose(of table, generations uint64) {
	for version := uint64(1); version <= generations; version++ {
		of.commit(version, map[uint64]uint64{version: version})
	}
	read := of.view()
	for version := uint64(1); version <= generations; version++ {
		if _, found := c.look(read, version); !found {
			c.lost++
		}
	}
}

// Writers that come late, with versions that are older than the one in force: how many pass?
func (c *counts) comeLate(of table, generations uint64) {
	of.commit(2*generations, map[uint64]uint64{0: 2 * generations})
	for version := uint64(1); version <= generations; version++ {
		if of.commit(version, map[uint64]uint64{0: version}) {
			c.late++
		}
	}
}

func main() {
	way := os.Args[1]
	keys, generations, readers := uint64(orders.Number(2)), uint64(orders.Number(3)), orders.Number(4)
	quiet := way == "quiet"
	if quiet {
		way = "pointers"
	}
	var seen counts
	seen.sweep(newTable(way), keys, generations, readers, quiet)
	if !quiet {
		seen.lose(newTable(way), generations)
		seen.comeLate(newTable(way), generations)
	}
	fmt.Println(seen.sweeps, seen.stale, seen.mixed, seen.newest.Load(), seen.panicked, seen.lost,
		seen.late)
}
