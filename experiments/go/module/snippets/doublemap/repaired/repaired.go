// What is swapped is a pointer, to a table that nobody changes any more; and only over the version
// that it was made from.
package snippet

import (
	"maps"
	"sync/atomic"
)

type generation struct {
	version uint64
	entries map[string]uint64
}

type table struct{ active atomic.Pointer[generation] }

func (t *table) commit(version uint64, changes map[string]uint64) bool {
	expected := t.active.Load()
	if expected != nil && expected.version >= version {
		return false
	}
	next := &generation{version: version, entries: map[string]uint64{}}
	if expected != nil {
		maps.Copy(next.entries, expected.entries)
	}
	maps.Copy(next.entries, changes)
	return t.active.CompareAndSwap(expected, next)
}
