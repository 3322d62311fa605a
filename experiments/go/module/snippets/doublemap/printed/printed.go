// Section 4.3 of the article. Quoted: two sync.Maps, active and pending, that are swapped by an
// atomic pointer; `expected`, which nothing uses; a *unsafe.Pointer where an unsafe.Pointer is due.
package snippet

import (
	"sync"
	"sync/atomic"
	"unsafe"
)

type table struct {
	active, pending sync.Map
	version         uint64
}

func (t *table) commit(version uint64) {
	expected := atomic.LoadUint64(&t.version)
	atomic.SwapPointer(
		(*unsafe.Pointer)(unsafe.Pointer(&t.active)),
		(*unsafe.Pointer)(unsafe.Pointer(&t.pending)),
	)
	atomic.StoreUint64(&t.version, version)
}
