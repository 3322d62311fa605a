// SPDX-License-Identifier: GPL-2.0

// cilium/ebpf's reader: what a Go program gets from a ring. It takes the orders of ring_peer.c.
package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"
)

const changeDelete = 2

// struct ring_log and its rows.
type row struct{ seq, intended, seen uint64 }
type header struct{ stop, taken, room uint64 }

type entry struct {
	version, value, seen uint64
	present              bool
}

var (
	logged  *header
	rows    []row
	replica map[uint64]entry
	copies  []byte
	copied  int
	sum     uint64
	started = time.Now()
	offset  = calibrated()
)

// CLOCK_MONOTONIC, by a system call.
func now() uint64 {
	var t unix.Timespec
	unix.ClockGettime(unix.CLOCK_MONOTONIC, &t)
	return uint64(t.Nano())
}

// What Go's own clock lacks: of many tries the one in which the two were read closest together.
func calibrated() (found uint64) {
	for try, closest := 0, uint64(1<<62); try < 1000; try++ {
		before, since := now(), uint64(time.Since(started))
		if apart := now() - before; apart < closest {
			closest, found = apart, before+apart/2-since
		}
	}
	return found
}

// The same by Go's own clock, which makes no system call.
func clock() uint64 { return offset + uint64(time.Since(started)) }

func cpu() uint64 {
	var t unix.Timespec
	unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &t)
	return uint64(t.Nano())
}

func note(seq, intended, seen uint64) {
	if logged.taken < logged.room {
		rows[logged.taken] = row{seq, intended, seen}
		logged.taken++
	}
}

// struct event
func add(sample []byte) { sum += binary.LittleEndian.Uint64(sample[24:]) }

func keep(sample []byte) { copied += copy(copies[copied:], sample) }

func readOne(sample []byte) {
	add(sample)
	note(binary.LittleEndian.Uint64(sample), binary.LittleEndian.Uint64(sample[8:]), clock())
}

// struct change_event, with a key and a value of 8 bytes
func applyOne(sample []byte) {
	version := binary.LittleEndian.Uint64(sample[8:])
	key := binary.LittleEndian.Uint64(sample[32:])
	if known, found := replica[key]; found && version <= known.version {
		return
	}
	seen := clock()
	replica[key] = entry{
		version, binary.LittleEndian.Uint64(sample[40:]), seen, sample[24] != changeDelete,
	}
	note(key, version, seen)
}

func handleMap(table *ebpf.Map, reads bool, entries, times int) (records int, ns uint64) {
	keys, values := make([]uint32, entries), make([]uint64, entries)
	for at := range keys {
		keys[at], values[at] = uint32(at), 3*uint64(at)
	}
	begun := now()
	for ; times > 0; times-- {
		if !reads {
			count, err := table.BatchUpdate(keys, values, nil)
			fail(err)
			records += count
			continue
		}
		var cursor ebpf.MapBatchCursor
		for at := 0; at < entries; {
			count, err := table.BatchLookup(&cursor, keys[at:], values[at:], nil)
			if !errors.Is(err, ebpf.ErrKeyNotExist) {
				fail(err)
			}
			records, at = records+count, at+count
			if err != nil {
				break
			}
		}
	}
	ns = now() - begun
	for _, value := range values {
		if reads {
			sum += value * uint64(records/entries)
		}
	}
	return records, ns
}

func stopped() bool { return atomic.LoadUint64(&logged.stop) != 0 }

// Takes what is in the ring; a reader waits for its deadline where there is nothing more.
func consume(reader *ringbuf.Reader, timer time.Duration, each func([]byte)) (records int) {
	var record ringbuf.Record
	if timer > 0 {
		timer += time.Millisecond // what is left of a wait is cut to whole ones, and 0 would spin
	}
	reader.SetDeadline(time.Now().Add(timer))
	for {
		err := reader.ReadInto(&record)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return records
		}
		fail(err)
		each(record.RawSample)
		records++
	}
}

func follow(reader *ringbuf.Reader, timer time.Duration, each func([]byte)) (records int) {
	for {
		last := stopped()
		took := consume(reader, timer, each)
		records += took
		if last && took == 0 {
			return records
		}
	}
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "ring_peer:", err)
		os.Exit(2)
	}
}

func share(descriptor string) {
	fd, err := strconv.Atoi(descriptor)
	fail(err)
	var told unix.Stat_t
	fail(unix.Fstat(fd, &told))
	memory, err := unix.Mmap(fd, 0, int(told.Size), unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_SHARED|unix.MAP_POPULATE)
	fail(err)
	logged = (*header)(unsafe.Pointer(&memory[0]))
	rows = unsafe.Slice((*row)(unsafe.Pointer(&memory[unsafe.Sizeof(header{})])), logged.room)
}

func main() {
	if len(os.Args) != 2 {
		fail(syscall.EINVAL)
	}
	share(os.Args[1])
	orders := bufio.NewScanner(os.Stdin)
	for orders.Scan() {
		var order, how string
		var id, micros int
		line := orders.Text()
		var entries, times int
		if n, _ := fmt.Sscanf(line, "%s %d %d %d", &order, &id, &entries, &times); n == 4 {
			table, err := ebpf.NewMapFromID(ebpf.MapID(id))
			fail(err)
			sum = 0
			records, ns := handleMap(table, order == "lookup", entries, times)
			fmt.Println(records, sum, ns, 0)
			table.Close()
			continue
		}
		if n, _ := fmt.Sscanf(line, "drain %d %s", &id, &how); n == 2 {
			order = "drain"
		} else if n, _ := fmt.Sscanf(line, "take %d %d %s", &id, &micros, &how); n == 3 {
			order = "take"
		} else if n, _ := fmt.Sscanf(line, "follow %d", &id); n == 1 {
			order, micros = "follow", 500
		} else {
			fail(syscall.EINVAL)
		}
		each := map[string]func([]byte){"copy": keep, "read": readOne, "replica": applyOne}[how]
		if each == nil {
			each = add
		}
		if how == "copy" && copies == nil {
			copies = make([]byte, 1<<26)
			for i := range copies {
				copies[i] = 1 // touched, so that no drain pays for fresh pages
			}
		}
		ring, err := ebpf.NewMapFromID(ebpf.MapID(id))
		fail(err)
		reader, err := ringbuf.NewReader(ring)
		fail(err)
		sum, copied, replica = 0, 0, map[uint64]entry{}
		if order != "drain" {
			fmt.Println("ready")
		}
		begun, spent := now(), cpu()
		var records int
		if order == "drain" {
			records = consume(reader, 0, each)
		} else {
			records = follow(reader, time.Duration(micros)*time.Microsecond, each)
		}
		spent, begun = cpu()-spent, now()-begun
		for at := 0; at < copied; at += 32 {
			add(copies[at:])
		}
		fmt.Println(records, sum, begun, spent)
		reader.Close()
		ring.Close()
	}
}
