package policy

// Use says which fields of a candidate a policy looks at, of those that cost
// something to find out. Whoever ranks may leave the others at 0.
type Use struct {
	// RTT is for Candidate.RTT, which takes round trips on every connection.
	RTT bool
	// Interface is for Candidate.Interface, which takes a look at the host's
	// network interfaces.
	Interface bool
}

// Uses returns what p looks at. A chain or a weighted policy looks at what its
// rules do: [RTTBand] at the RTT, [Prefer] and [Never] at the interface if they
// have an [OnInterface]. Of a policy or rule made by [Func] or [ScoreFunc] it is
// what [WithUse] declared. A policy or rule of any other type declares it with a
// method Uses() Use, and is taken to look at none of this if it has no such
// method: nothing is measured unasked.
func Uses(p Policy) Use { return usesOf(p) }

func usesOf(policyOrRule any) Use {
	if u, ok := policyOrRule.(interface{ Uses() Use }); ok {
		return u.Uses()
	}
	return Use{}
}

// or returns what u or v looks at.
func (u Use) or(v Use) Use {
	return Use{
		RTT:       u.RTT || v.RTT,
		Interface: u.Interface || v.Interface,
	}
}
