// A client on net/http that is told of the proxy and of the certificates when it starts. For each URL
// on standard input it says the status that it got, or what went wrong.
package main

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"
)

func main() {
	proxy, err := url.Parse(os.Args[1])
	if err != nil {
		panic(err)
	}
	certificates, err := os.ReadFile(os.Args[2])
	if err != nil {
		panic(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(certificates) {
		panic("no certificates")
	}
	client := &http.Client{
		Timeout: 20 * time.Second,
		Transport: &http.Transport{
			Proxy:             http.ProxyURL(proxy),
			ForceAttemptHTTP2: true,
			TLSClientConfig: &tls.Config{
				RootCAs:            roots,
				ClientSessionCache: tls.NewLRUClientSessionCache(8),
			},
		},
	}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		fmt.Println(get(client, lines.Text()))
	}
}

func get(client *http.Client, url string) string {
	response, err := client.Get(url)
	if err == nil {
		defer response.Body.Close()
		if _, err = io.Copy(io.Discard, response.Body); err == nil {
			return fmt.Sprintf("%d %s", response.StatusCode, response.Proto)
		}
	}
	if strings.Contains(err.Error(), "x509:") || strings.Contains(err.Error(), "tls:") {
		return "tls " + err.Error()
	}
	return "connection " + err.Error()
}
