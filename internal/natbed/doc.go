// Package natbed makes a small internet of Linux network namespaces: two hosts, each behind
// a NAT router of its own, and a public relay. What runs there are real processes: the
// program that uses the package runs itself again in a namespace, as a [Node], and tells it
// what to do with lines of JSON over its standard input and output.
//
// It needs root, and the programs and devices that [Missing] looks for. It is for
// integration/nat and for the demo.
package natbed
