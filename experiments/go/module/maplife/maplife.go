// Creates maps in one of the ways in which programs keep or lose them, and tells their ids.
package main

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"

	"github.com/cilium/ebpf"
	"lab/orders"
)

var ids []any

func create(entries int) *ebpf.Map {
	policies, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: "policies", Type: ebpf.Hash, KeySize: 4, ValueSize: 8, MaxEntries: uint32(entries),
	})
	orders.Must(err)
	info, err := policies.Info()
	orders.Must(err)
	id, _ := info.ID()
	ids = append(ids, id)
	return policies
}

func heap() uint64 {
	var told runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&told)
	return told.HeapAlloc
}

// The maps of the loop are closed when the function returns, and not with each turn.
func deferInLoop(count int) {
	for range count {
		policies := create(1)
		defer policies.Close()
	}
	orders.Stage(ids...)
}

func deferInFunction() {
	policies := create(1)
	defer policies.Close()
}

func size(entries int) {
	before := heap()
	orders.Stage(0)
	policies := create(entries)
	after := heap()
	orders.Stage(ids[0], int64(after)-int64(before))
	runtime.KeepAlive(policies)
}

func main() {
	// No collection but those that are asked for below.
	debug.SetGCPercent(-1)
	way, count := os.Args[1], orders.Number(2)
	var kept []*ebpf.Map
	switch way {
	case "size":
		size(count)
		return
	case "defer-loop":
		deferInLoop(count)
		orders.Stage("left")
		return
	}
	for at := range count {
		switch way {
		case "close":
			orders.Must(create(1).Close())
		case "defer":
			deferInFunction()
		case "kept":
			kept = append(kept, create(1))
		case "dropped":
			create(1)
		case "pinned":
			policies := create(1)
			orders.Must(policies.Pin(fmt.Sprintf("%s%d", os.Args[3], at)))
			orders.Must(policies.Close())
		}
	}
	orders.Stage(ids...)
	if way == "kept" || way == "dropped" {
		runtime.GC()
		orders.Stage("collected")
	}
	runtime.KeepAlive(kept)
}
