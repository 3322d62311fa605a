// Read answers one record at a time. What is lost only the program in the kernel can count; here it
// puts its count into a map.
package snippet

import (
	"errors"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
)

func follow(ring, drops *ebpf.Map, handle func(ringbuf.Record)) (lost, available, consumed uint64, err error) {
	reader, err := ringbuf.NewReader(ring)
	if err != nil {
		return
	}
	defer reader.Close()
	for {
		event, err := reader.Read()
		if errors.Is(err, ringbuf.ErrClosed) {
			return lost, available, consumed, nil
		} else if err != nil {
			return lost, available, consumed, err
		}
		handle(event)
		if err := drops.Lookup(uint32(0), &lost); err != nil {
			return lost, available, consumed, err
		}
		available = uint64(reader.AvailableBytes()) // bytes that wait, and not room that is left
		consumed++
	}
}
