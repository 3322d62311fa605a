// Section 2.1 of the article. Quoted: NewMap with the fields MaxEntries, Flags and PinPath, and
// Close. The rest is the least that makes a package of it.
package snippet

import "github.com/cilium/ebpf"

func open() error {
	policies, err := ebpf.NewMap(&ebpf.MapSpec{
		Type:       ebpf.Hash,
		KeySize:    4,
		ValueSize:  8,
		MaxEntries: 65536,
		Flags:      0,
		PinPath:    "/sys/fs/bpf/policies",
	})
	if err != nil {
		return err
	}
	return policies.Close()
}
