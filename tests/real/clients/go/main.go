// An unmodified Go net/http client: METHOD URL. It knows of no proxy and of no token.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
)

func main() {
	request, err := http.NewRequest(os.Args[1], os.Args[2], nil)
	fail(err)
	response, err := http.DefaultClient.Do(request)
	fail(err)
	body, err := io.ReadAll(response.Body)
	fail(err)
	fail(json.NewEncoder(os.Stdout).Encode(map[string]any{"status": response.StatusCode, "body": json.RawMessage(body)}))
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
