// A server as Go programs have it. It counts in /status.
package main

import (
	"net"
	"os"
	"strconv"
	"time"
)

func main() {
	listener, err := net.Listen("tcp", ":8080")
	if err != nil {
		panic(err)
	}
	go func() {
		for {
			if connection, err := listener.Accept(); err == nil {
				connection.Close()
			}
		}
	}()
	for count := 0; ; count++ {
		text := []byte(strconv.Itoa(count))
		if err := os.WriteFile("/status.new", text, 0o644); err != nil {
			panic(err)
		}
		if err := os.Rename("/status.new", "/status"); err != nil {
			panic(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
