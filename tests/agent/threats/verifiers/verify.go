// Connects to NAME=PORT... on loopback, trusting one root: a line for each, `NAME ok` or what is wrong.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"strings"
)

func main() {
	root, err := os.ReadFile(os.Args[1])
	if err != nil {
		panic(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(root)
	for _, pair := range os.Args[2:] {
		name, port, _ := strings.Cut(pair, "=")
		connection, err := tls.Dial("tcp", "127.0.0.1:"+port, &tls.Config{RootCAs: roots, ServerName: name})
		if err != nil {
			fmt.Println(name, err)
			continue
		}
		connection.Close()
		fmt.Println(name, "ok")
	}
}
