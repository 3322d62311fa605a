// Section 3.2 of the article. Quoted: a poll of an HTTP status by its timestamp TS, an error that is
// ignored, a defer within a loop that never ends, and a comparison by >.
package snippet

import (
	"encoding/json"
	"net/http"
	"time"
)

type status struct{ TS int64 }

func poll(url string, period time.Duration, changed func(status)) {
	var last int64
	for {
		answer, _ := http.Get(url)
		defer answer.Body.Close()
		var now status
		json.NewDecoder(answer.Body).Decode(&now)
		if now.TS > last {
			last = now.TS
			changed(now)
		}
		time.Sleep(period)
	}
}
