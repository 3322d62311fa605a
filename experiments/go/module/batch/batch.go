// Fills a map beyond its end, and iterates while another goroutine deletes what was just read; tells
// what cilium/ebpf answers, and what is so.
package main

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"lab/orders"
)

func create(entries int) *ebpf.Map {
	table, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: "policies", Type: ebpf.Hash, KeySize: 4, ValueSize: 8, MaxEntries: uint32(entries),
	})
	orders.Must(err)
	return table
}

func present(table *ebpf.Map, keys []uint32) (found int) {
	var value uint64
	for _, key := range keys {
		if table.Lookup(&key, &value) == nil {
			found++
		}
	}
	return
}

func numbered(count int) ([]uint32, []uint64) {
	keys, values := make([]uint32, count), make([]uint64, count)
	for at := range keys {
		keys[at], values[at] = uint32(at), uint64(at)
	}
	return keys, values
}

// Twice as many keys as there is room for, one by one and in a batch.
func fill(entries int) {
	keys, values := numbered(2 * entries)
	table, refused := create(entries), 0
	for at := range keys {
		if table.Put(&keys[at], &values[at]) != nil {
			refused++
		}
	}
	fmt.Println("put", len(keys), len(keys)-refused, present(table, keys))
	orders.Must(table.Close())

	table = create(entries)
	count, err := table.BatchUpdate(keys, values, nil)
	if err == nil {
		count = -1 // an error is due
	}
	fmt.Println("batch-update", len(keys), count, present(table, keys))
	orders.Must(table.Close())
}

// What came of one pass over all keys, of which the even ones were there all the time.
type pass struct{ passes, aborted, twice, missed int }

func (p *pass) note(entries int, seen []int, err error) {
	p.passes++
	if errors.Is(err, ebpf.ErrIterationAborted) {
		p.aborted++
		return
	}
	orders.Must(err)
	twice, missed := 0, 0
	for key := 0; key < entries; key += 2 {
		twice, missed = max(twice, seen[key]-1), max(missed, 1-seen[key])
	}
	p.twice += min(twice, 1)
	p.missed += missed
}

func iterate(table *ebpf.Map, met func(uint32)) error {
	var key uint32
	var value uint64
	entries := table.Iterate()
	for entries.Next(&key, &value) {
		met(key)
	}
	return entries.Err()
}

func batches(table *ebpf.Map, met func(uint32)) error {
	keys, values := make([]uint32, 256), make([]uint64, 256)
	var cursor ebpf.MapBatchCursor
	for {
		count, err := table.BatchLookup(&cursor, keys, values, nil)
		for _, key := range keys[:count] {
			met(key)
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

func read(way string, entries, room, passes int, deletes bool, over func(*ebpf.Map, func(uint32)) error) {
	table := create(room)
	keys, values := numbered(entries)
	_, err := table.BatchUpdate(keys, values, nil)
	orders.Must(err)
	doomed, gone := make(chan uint32), make(chan error)
	go func() { // another goroutine, at the worst moment
		for key := range doomed {
			gone <- table.Delete(&key)
		}
	}()
	var told pass
	for range passes {
		seen, count, deleted := make([]int, entries), 0, -1
		err := over(table, func(key uint32) {
			seen[key]++
			if count++; deletes && deleted < 0 && count > entries/2 && key%2 == 1 {
				deleted = int(key)
				doomed <- key
				orders.Must(<-gone)
			}
		})
		told.note(entries, seen, err)
		if deleted >= 0 {
			orders.Must(table.Put(&keys[deleted], &values[deleted]))
		}
	}
	close(doomed)
	fmt.Println(way, told.passes, told.aborted, told.twice, told.missed)
	orders.Must(table.Close())
}

func main() {
	entries, passes := orders.Number(1), orders.Number(2)
	fill(entries)
	read("iterate-quiet", entries, entries, passes, false, iterate)
	read("iterate-full", entries, entries, passes, true, iterate)
	read("iterate-room", entries, 8*entries, passes, true, iterate)
	read("batch-full", entries, entries, passes, true, batches)
	read("batch-room", entries, 8*entries, passes, true, batches)
	orders.Stage("done")
}
