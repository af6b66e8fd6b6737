// Package apps runs programs of others, unmodified, on hosts with Portage. While they work
// their connections are doubled and consolidated all the time, so that their streams move
// again and again; beside it each of them runs on plain hosts. The suites of some of them run,
// too, on such hosts (TestSuite...): those tests that take long only with -all.
//
// It is a module of its own, so that Portage does not depend on these programs:
//
//	cd integration/apps && go test ./...
package apps
