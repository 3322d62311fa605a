// Where to pin is an option of the loading, and that it is pinned a property of the map.
package snippet

import "github.com/cilium/ebpf"

func open() error {
	policies, err := ebpf.NewMapWithOptions(&ebpf.MapSpec{
		Name:       "policies",
		Type:       ebpf.Hash,
		KeySize:    4,
		ValueSize:  8,
		MaxEntries: 65536,
		Flags:      0,
		Pinning:    ebpf.PinByName,
	}, ebpf.MapOptions{PinPath: "/sys/fs/bpf"})
	if err != nil {
		return err
	}
	return policies.Close()
}
