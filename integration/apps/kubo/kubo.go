// Package kubo makes Kubo's nodes with Portage, in both ways in which Kubo can be used: in
// one's own program, with the option of core.BuildCfg,
//
//	node, err := core.NewNode(ctx, &core.BuildCfg{Online: true, Repo: r, Host: kubo.HostOption()})
//
// and as a plugin of the program ipfs; integration/apps/ipfs is that program. Kubo itself is
// not changed, and neither is its connection manager, which stays underneath.
package kubo

import (
	"fmt"

	logging "github.com/ipfs/go-log/v2"
	"github.com/ipfs/kubo/core"
	"github.com/ipfs/kubo/core/node/libp2p"
	"github.com/ipfs/kubo/plugin"
	p2p "github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"go.uber.org/fx"

	"github.com/go-portage/portage/connmgr"
	"github.com/go-portage/portage/policy"
)

// HostOption makes the hosts of Kubo's nodes with Portage.
func HostOption(opts ...connmgr.Option) libp2p.HostOption {
	return WithPortage(libp2p.DefaultHostOption, opts...)
}

// WithPortage is next, with Portage in the hosts that it makes. The option comes last, behind
// Kubo's routing.
func WithPortage(next libp2p.HostOption, opts ...connmgr.Option) libp2p.HostOption {
	return func(id peer.ID, ps peerstore.Peerstore, options ...p2p.Option) (host.Host, error) {
		return next(id, ps, append(options[:len(options):len(options)], connmgr.Enable(opts...))...)
	}
}

// Plugin is Portage as a plugin of Kubo. What it does is in Kubo's log, under "portage":
//
//	ipfs log level portage info
//
// The policy is set in Kubo's configuration, as policy.Parse reads it:
//
//	ipfs config --json Plugins.Plugins.portage.Config '{"Policy": "chain(unlimited, direct, transport(quic, tcp))"}'
type Plugin struct {
	opts []connmgr.Option
}

var _ plugin.PluginFx = (*Plugin)(nil)

// Name implements plugin.Plugin. It is the name in Kubo's configuration.
func (*Plugin) Name() string { return "portage" }

// Version implements plugin.Plugin.
func (*Plugin) Version() string { return "0.1.0" }

// Init implements plugin.Plugin. It fails if the policy cannot be read.
func (p *Plugin) Init(env *plugin.Environment) error {
	p.opts = []connmgr.Option{connmgr.WithLogger(logging.Logger("portage").Desugar())}
	if env == nil || env.Config == nil {
		return nil
	}
	conf, ok := env.Config.(map[string]any)
	if !ok {
		return fmt.Errorf(`the configuration of the plugin portage is a %T; it should be like {"Policy": "default"}`, env.Config)
	}
	for key, value := range conf {
		text, ok := value.(string)
		if key != "Policy" || !ok {
			return fmt.Errorf("the configuration of the plugin portage has %q: %v; it takes Policy alone, a string", key, value)
		}
		ranking, err := policy.Parse(text)
		if err != nil {
			return fmt.Errorf("the policy of the plugin portage: %w", err)
		}
		p.opts = append(p.opts, connmgr.WithPolicy(ranking))
	}
	return nil
}

// Options implements plugin.PluginFx.
func (p *Plugin) Options(info core.FXNodeInfo) ([]fx.Option, error) {
	return append(info.FXOptions, fx.Decorate(func(next libp2p.HostOption) libp2p.HostOption {
		return WithPortage(next, p.opts...)
	})), nil
}
