// Errors are looked at, the body is closed in its turn, and a version tells what a time may not.
package snippet

import (
	"encoding/json"
	"net/http"
	"time"
)

type status struct{ Version uint64 }

func once(url string) (now status, err error) {
	answer, err := http.Get(url)
	if err != nil {
		return now, err
	}
	defer answer.Body.Close()
	return now, json.NewDecoder(answer.Body).Decode(&now)
}

func poll(url string, period time.Duration, changed func(status)) {
	var last uint64
	for {
		if now, err := once(url); err == nil && now.Version != last {
			last = now.Version
			changed(now)
		}
		time.Sleep(period)
	}
}
