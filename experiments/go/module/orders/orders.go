// Package orders is how a program of the lab speaks with who started it: lines out, a line in to go on.
package orders

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"
)

var in = bufio.NewReader(os.Stdin)

// Must ends the program over an error that nothing expects.
func Must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(3)
	}
}

// Number is an argument of the program that is one.
func Number(at int) int {
	number, err := strconv.Atoi(os.Args[at])
	Must(err)
	return number
}

// Stage tells what has been done, and waits until it is to go on; it answers what is said to that.
func Stage(words ...any) string {
	fmt.Println(words...)
	answer, err := in.ReadString('\n')
	Must(err)
	return strings.TrimSpace(answer)
}
