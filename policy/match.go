package policy

import (
	"errors"
	"fmt"
	"net/netip"

	ma "github.com/multiformats/go-multiaddr"
)

// Match is a condition on the addresses of a candidate, for [Prefer] and [Never].
// It does not hold where the address is not known.
type Match struct {
	text  string
	holds func(Candidate) bool
	use   Use
}

// String is the match in the text of a policy.
func (m Match) String() string { return m.text }

// RemoteIn returns the match for candidates whose Remote address has an IP
// address in prefix, such as 10.0.0.0/8. In text it is "cidr 10.0.0.0/8".
// Prefixes are of IPv4 or of IPv6; IPv4 inside IPv6 counts as IPv4. It panics if
// prefix is not valid.
func RemoteIn(prefix netip.Prefix) Match {
	prefix = canonical(prefix)
	return Match{
		text:  "cidr " + prefix.String(),
		holds: func(c Candidate) bool { return prefix.Contains(c.Remote.IP()) },
	}
}

// LocalIn is [RemoteIn] for the Local address: what one says to prefer or avoid
// an interface by the network it is in. In text it is "local cidr 10.0.0.0/8".
func LocalIn(prefix netip.Prefix) Match {
	prefix = canonical(prefix)
	return Match{
		text:  "local cidr " + prefix.String(),
		holds: func(c Candidate) bool { return prefix.Contains(c.Local.IP()) },
	}
}

// canonical returns prefix without the bits that do not count, and as IPv4 if it
// is IPv4 inside IPv6, since that is how Addr.IP has it.
func canonical(prefix netip.Prefix) netip.Prefix {
	const mapped = 96 // bits before the IPv4 address
	if !prefix.IsValid() {
		panic(fmt.Errorf("policy: invalid address prefix %v", prefix))
	}
	if prefix.Addr().Is4In6() && prefix.Bits() >= mapped {
		prefix = netip.PrefixFrom(prefix.Addr().Unmap(), prefix.Bits()-mapped)
	}
	return prefix.Masked()
}

// RemotePrefix returns the match for candidates whose Remote address begins with
// the components of prefix. In text it is "addr /ip4/192.0.2.1/tcp/4001". It
// panics if prefix is empty.
func RemotePrefix(prefix ma.Multiaddr) Match {
	addr := notEmpty(prefix)
	return Match{
		text:  "addr " + quoteWord(string(addr)),
		holds: func(c Candidate) bool { return c.Remote.HasPrefix(addr) },
	}
}

// LocalPrefix is [RemotePrefix] for the Local address. In text it is
// "local addr /ip4/192.0.2.1".
func LocalPrefix(prefix ma.Multiaddr) Match {
	addr := notEmpty(prefix)
	return Match{
		text:  "local addr " + quoteWord(string(addr)),
		holds: func(c Candidate) bool { return c.Local.HasPrefix(addr) },
	}
}

func notEmpty(prefix ma.Multiaddr) Addr {
	if len(prefix) == 0 {
		panic(errors.New("policy: empty multiaddr prefix"))
	}
	return Addr(prefix.String())
}

// OnInterface returns the match for candidates whose Interface has this name. In
// text it is "interface wwan0". It panics if name is empty.
func OnInterface(name string) Match {
	if name == "" {
		panic(errors.New("policy: empty interface name"))
	}
	return Match{
		text:  "interface " + quoteWord(name),
		holds: func(c Candidate) bool { return c.Interface == name },
		use:   Use{Interface: true},
	}
}
