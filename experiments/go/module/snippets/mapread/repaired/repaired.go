// The method is called Lookup.
package snippet

import "github.com/cilium/ebpf"

func read(policies *ebpf.Map) (first, second uint64, err error) {
	if err = policies.Lookup(uint32(1), &first); err != nil {
		return
	}
	err = policies.Lookup(uint32(2), &second)
	return
}
