// Section 2.3 of the article. Quoted: several goroutines read a map while one writes.
package snippet

func race(policies map[int]int) {
	for range 4 {
		go func() {
			for {
				_ = policies[1]
			}
		}()
	}
	for {
		policies[1]++
	}
}
