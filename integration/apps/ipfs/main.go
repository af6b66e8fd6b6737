// Ipfs is Kubo's program, with Portage in it, and otherwise the same:
//
//	cd integration/apps && go build -o ipfs-portage ./ipfs
//	./ipfs-portage daemon
//
// Copy it, with its plugin, to build one of your own.
package main

import (
	"os"

	"github.com/ipfs/kubo/cmd/ipfs/kubo"
	"github.com/ipfs/kubo/plugin/loader"

	portage "github.com/go-portage/portage/integration/apps/kubo"
)

func main() {
	os.Exit(kubo.Start(kubo.BuildEnv(func(l *loader.PluginLoader) error {
		return l.Load(new(portage.Plugin))
	})))
}
