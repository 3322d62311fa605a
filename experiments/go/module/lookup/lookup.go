// Looks elements of a map up, and updates them, by cilium/ebpf and by the article's call, with each
// way a stage of its own. One thread does it all, whose calls somebody may watch.
package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
	"lab/orders"
)

func locked() (kilobytes int) {
	status, err := os.ReadFile("/proc/thread-self/status")
	orders.Must(err)
	_, rest, _ := strings.Cut(string(status), "VmLck:")
	_, err = fmt.Sscan(rest, &kilobytes)
	orders.Must(err)
	return
}

func main() {
	runtime.LockOSThread()
	// No memory of this process may be locked.
	orders.Must(unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{}))
	entries, attempts := uint32(orders.Number(1)), orders.Number(2)
	// The map exists once somebody watches this thread.
	id, err := strconv.Atoi(orders.Stage(unix.Gettid()))
	orders.Must(err)
	table, err := ebpf.NewMapFromID(ebpf.MapID(id))
	orders.Must(err)
	orders.Stage(table.FD())

	var failed, changed int
	var words string
	note := func(err error) {
		if err != nil {
			failed++
			words = err.Error()
		}
	}
	// done tells of one way, and waits for the next.
	done := func() {
		orders.Stage(failed, changed, locked(), strings.ReplaceAll(words, " ", "_")+".")
		failed, changed, words = 0, 0, ""
	}

	key, value := new(uint32), new(uint64)
	for *key = 0; *key < entries; *key++ {
		note(table.Lookup(key, value))
	}
	done()
	for *key = 0; *key < entries; *key++ {
		note(table.Put(key, value))
	}
	done()
	iterator := table.Iterate()
	for iterator.Next(key, value) {
		changed++
	}
	note(iterator.Err())
	done()
	keys, values := make([]uint32, entries), make([]uint64, entries)
	var cursor ebpf.MapBatchCursor
	for err == nil {
		var count int
		count, err = table.BatchLookup(&cursor, keys, values, nil)
		changed += count
	}
	if !errors.Is(err, ebpf.ErrKeyNotExist) {
		note(err)
	}
	done()
	changed, err = table.BatchUpdate(keys, values, nil)
	note(err)
	done()

	// Values of another size than the map's: does what stands behind them change?
	for _, size := range []int{4, 16} {
		buffer := make([]byte, 32)
		for at := range buffer {
			buffer[at] = 0xa5
		}
		for range attempts {
			*key = 0
			note(table.Lookup(key, buffer[:size]))
		}
		for _, one := range buffer[size:] {
			if one != 0xa5 {
				changed++
			}
		}
		done()
		for range attempts {
			note(table.Put(key, buffer[:size]))
		}
		orders.Must(table.Lookup(key, value))
		if *value == 0xa5a5a5a5a5a5a5a5 || uint32(*value) == 0xa5a5a5a5 {
			changed++
		}
		done()
	}

	for _, command := range []uintptr{1, 2} {
		*value = 0x5ea1
		for range attempts {
			_, _, errno := unix.Syscall6(unix.SYS_BPF, command, uintptr(table.FD()),
				uintptr(unsafe.Pointer(key)), uintptr(unsafe.Pointer(value)), 0, 0)
			if errno != 0 {
				note(errno)
			}
		}
		if *value != 0x5ea1 {
			changed++
		}
		done()
	}
}
