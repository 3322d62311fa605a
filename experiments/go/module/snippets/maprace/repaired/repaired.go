// One lock for those who read and for who writes.
package snippet

import "sync"

func race(policies map[int]int) {
	var mutex sync.RWMutex
	for range 4 {
		go func() {
			for {
				mutex.RLock()
				_ = policies[1]
				mutex.RUnlock()
			}
		}()
	}
	for {
		mutex.Lock()
		policies[1]++
		mutex.Unlock()
	}
}
