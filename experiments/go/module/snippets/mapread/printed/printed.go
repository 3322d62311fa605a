// Section 2.2 of the article. Quoted: the methods Map.Read and Map.Get.
package snippet

import "github.com/cilium/ebpf"

func read(policies *ebpf.Map) (first, second uint64, err error) {
	if err = policies.Read(uint32(1), &first); err != nil {
		return
	}
	err = policies.Get(uint32(2), &second)
	return
}
