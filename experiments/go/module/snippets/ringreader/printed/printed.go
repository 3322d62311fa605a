// Section 4.1 of the article. Quoted: a reader with the methods Events, Lost, Available, Consumed.
package snippet

import (
	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
)

func follow(ring *ebpf.Map, handle func(ringbuf.Record)) (lost, available, consumed uint64, err error) {
	reader, err := ringbuf.NewReader(ring)
	if err != nil {
		return
	}
	defer reader.Close()
	for event := range reader.Events() {
		handle(event)
		lost = reader.Lost()
		available = reader.Available()
		consumed = reader.Consumed()
	}
	return
}
