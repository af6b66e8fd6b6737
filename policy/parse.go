package policy

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/libp2p/go-libp2p/core/network"
	ma "github.com/multiformats/go-multiaddr"
)

// Parse returns the policy that text describes, such as
//
//	chain(unlimited, direct, reach(loopback, private, public), rtt, never(cidr 10.0.0.0/8))
//
// It reads what the String of a policy writes:
//
//	policy = "default" | "chain(" [ rule { "," rule } ] ")" | "weighted(" [ term { "," term } ] ")"
//	rule   = name [ "(" argument { "," argument } ")" ]
//	term   = rule [ "*" weight ]
//
// where spaces and line ends may stand between any two words. A weight is a
// whole number from 0 to 65535, by default 1. In a chain, "default" stands for
// DefaultRules. The rules are:
//
//	unlimited, direct, incumbent, pinned, streams, older, younger, rtt
//	reach      [ (loopback, private, public, unknown) ]               in any order
//	transport  [ (quic, webtransport, webrtc, tcp, websocket, other) ] in any order
//	ip         [ (v6, v4, unknown) ]                                  in any order
//	direction  [ (outbound, inbound, unknown) ]                       in any order
//	prefer, never (match, ...)
//
// and a match is one of
//
//	[remote | local] cidr 10.0.0.0/8
//	[remote | local] addr /ip4/192.0.2.1/udp/4001
//	interface eth0
//
// where remote is the default. A word that has a space, a comma, a parenthesis,
// an asterisk or a quote in it, such as the name of an interface may have, stands
// in double quotes and is read as in Go.
//
// Rules in own, which may be ones made by [Func] or [ScoreFunc], or of any other
// type, stand in the text by their name, and one that is also a Policy can be the
// whole text. For each policy of this package, Parse of its String, with those of
// its rules that are not of this package, returns its equal; the String of these
// has to be their name. The names must be as Func demands, and differ.
//
// An error of the text is a [*ParseError], which points at the word that is wrong.
func Parse(text string, own ...Rule) (Policy, error) {
	p := &parser{text: text, own: make(map[string]Rule, len(own))}
	for _, rule := range own {
		if err := checkName(rule.Name()); err != nil {
			return nil, err
		}
		if _, again := p.own[rule.Name()]; again {
			return nil, fmt.Errorf("policy: two rules of the name %q", rule.Name())
		}
		p.own[rule.Name()] = rule
	}
	p.next()
	policy, err := p.policy()
	if err != nil {
		return nil, err
	}
	if p.now.kind != endOfText {
		return nil, p.fail(p.now, "unexpected "+p.now.String()+" after the end of the policy")
	}
	return policy, nil
}

// parser reads a text word by word. Its methods that parse something begin at
// now and leave now behind it.
type parser struct {
	text string
	own  map[string]Rule
	now  token
}

// token is a word of the text, or what separates words.
type token struct {
	kind       tokenKind
	value      string // of a word, without its quotes
	start, end int    // offsets in the text
}

type tokenKind string

const (
	word      tokenKind = "word"
	openQuote tokenKind = "a quote that does not end"
	endOfText tokenKind = "the end of the text"
	left      tokenKind = "("
	right     tokenKind = ")"
	comma     tokenKind = ","
	times     tokenKind = "*"
)

const separators = "(),*"

// String is the token as an error names it.
func (t token) String() string {
	switch t.kind {
	case word:
		return strconv.Quote(t.value)
	case openQuote, endOfText:
		return string(t.kind)
	default:
		return strconv.Quote(string(t.kind))
	}
}

// next moves to the next token.
func (p *parser) next() {
	rest := strings.TrimLeftFunc(p.text[p.now.end:], unicode.IsSpace)
	p.now = token{start: len(p.text) - len(rest)}
	switch {
	case rest == "":
		p.now.kind, p.now.end = endOfText, len(p.text)
	case strings.ContainsRune(separators, rune(rest[0])):
		p.now.kind, p.now.end = tokenKind(rest[:1]), p.now.start+1
	case rest[0] == '"':
		quoted, err := strconv.QuotedPrefix(rest)
		if err != nil {
			p.now.kind, p.now.end = openQuote, p.now.start+1
			return
		}
		p.now.kind, p.now.end = word, p.now.start+len(quoted)
		p.now.value, _ = strconv.Unquote(quoted) // QuotedPrefix has checked it
	default:
		length := strings.IndexFunc(rest, endsWord)
		if length < 0 {
			length = len(rest)
		}
		p.now.kind, p.now.value, p.now.end = word, rest[:length], p.now.start+length
	}
}

func endsWord(r rune) bool {
	return unicode.IsSpace(r) || r == '"' || strings.ContainsRune(separators, r)
}

// quoteWord returns s as a word of a text, in quotes if it needs them.
func quoteWord(s string) string {
	needsQuotes := func(r rune) bool { return endsWord(r) || !unicode.IsPrint(r) }
	if s == "" || !utf8.ValidString(s) || strings.ContainsFunc(s, needsQuotes) {
		return strconv.Quote(s)
	}
	return s
}

// fail returns the error that is about t. Where only some words are known in its
// place, they are its known words.
func (p *parser) fail(t token, problem string, known ...string) *ParseError {
	e := &ParseError{Text: p.text, Offset: t.start, Problem: problem, Known: slices.Clone(known), length: t.end - t.start}
	if t.kind == word {
		e.Meant = nearest(t.value, known)
	}
	return e
}

// word moves on behind a word, and returns it.
func (p *parser) word(what string, known ...string) (token, error) {
	t := p.now
	if t.kind != word {
		return t, p.fail(t, fmt.Sprintf("expected %s, found %s", what, t), known...)
	}
	p.next()
	return t, nil
}

// list parses "(", items with commas between them, of which there may be none,
// and ")".
func (p *parser) list(item func() error) error {
	if p.now.kind != left {
		return p.fail(p.now, fmt.Sprintf("expected %q, found %s", left, p.now))
	}
	p.next()
	if p.now.kind == right {
		p.next()
		return nil
	}
	return p.items(item)
}

// items parses what follows the "(" of a list with at least one item.
func (p *parser) items(item func() error) error {
	for {
		if err := item(); err != nil {
			return err
		}
		switch p.now.kind {
		case comma:
			p.next()
		case right:
			p.next()
			return nil
		default:
			return p.fail(p.now, fmt.Sprintf("expected %q or %q, found %s", comma, right, p.now))
		}
	}
}

// The words for a policy.
const (
	defaultWord  = "default"
	chainWord    = "chain"
	weightedWord = "weighted"
)

func (p *parser) policy() (Policy, error) {
	known := []string{defaultWord, chainWord, weightedWord}
	for _, name := range slices.Sorted(maps.Keys(p.own)) {
		if _, ok := p.own[name].(Policy); ok {
			known = append(known, name)
		}
	}
	name, err := p.word("a policy", known...)
	if err != nil {
		return nil, err
	}
	switch name.value {
	case defaultWord:
		return Default(), nil
	case chainWord:
		var rules []Rule
		err := p.list(func() error {
			more, err := p.chained()
			rules = append(rules, more...)
			return err
		})
		return chain(rules), err
	case weightedWord:
		var terms []Term
		err := p.list(func() error {
			term, err := p.term()
			terms = append(terms, term)
			return err
		})
		return weighted(terms), err
	}
	if policy, ok := p.own[name.value].(Policy); ok {
		return policy, nil
	}
	if slices.Contains(p.rules(), name.value) {
		return nil, p.fail(name, fmt.Sprintf("%s is a rule, which a policy has in its parentheses: %s(%s)", name, chainWord, name.value), known...)
	}
	return nil, p.fail(name, fmt.Sprintf("there is no policy %s", name), known...)
}

// rules returns the names of the rules that a text can have.
func (p *parser) rules() []string {
	names := slices.AppendSeq(slices.Collect(maps.Keys(vocabulary)), maps.Keys(p.own))
	slices.Sort(names)
	return names
}

// chained parses what may stand between the commas of a chain.
func (p *parser) chained() ([]Rule, error) {
	if p.now.kind == word && p.now.value == defaultWord {
		p.next()
		return DefaultRules(), nil
	}
	rule, err := p.rule(append(p.rules(), defaultWord)...)
	if err != nil {
		return nil, err
	}
	if p.now.kind == times {
		return nil, p.fail(p.now, fmt.Sprintf("only a rule of %q has a weight", weightedWord))
	}
	return []Rule{rule}, nil
}

// term parses what may stand between the commas of a weighted policy.
func (p *parser) term() (Term, error) {
	start := p.now
	rule, err := p.rule(p.rules()...)
	if err != nil {
		return Term{}, err
	}
	scored, ok := rule.(Scored)
	if !ok {
		return Term{}, p.fail(start, fmt.Sprintf("rule %s has no score, which a rule of %q needs", start, weightedWord))
	}
	if p.now.kind != times {
		return Times(scored, 1), nil
	}
	p.next()
	const what = "a weight, which is a whole number from 0 to 65535"
	number, err := p.word(what)
	if err != nil {
		return Term{}, err
	}
	weight, err := strconv.ParseUint(number.value, 10, 16)
	if err != nil {
		return Term{}, p.fail(number, fmt.Sprintf("expected %s, found %s", what, number))
	}
	return Times(scored, uint16(weight)), nil
}

func (p *parser) rule(known ...string) (Rule, error) {
	name, err := p.word("a rule", known...)
	if err != nil {
		return nil, err
	}
	if arguments, ok := vocabulary[name.value]; ok {
		return arguments(p, name)
	}
	if rule, ok := p.own[name.value]; ok {
		return rule, p.noArguments(name)
	}
	return nil, p.fail(name, fmt.Sprintf("there is no rule %s", name), known...)
}

// parseRule parses the text of a rule behind its name.
type parseRule func(p *parser, name token) (Rule, error)

// vocabulary has the rules of this package.
var vocabulary = map[string]parseRule{
	"unlimited": plain(Unlimited),
	"direct":    plain(Direct),
	"incumbent": plain(Incumbent),
	"pinned":    plain(PinnedStreams),
	"streams":   plain(MoreStreams),
	"older":     plain(Older),
	"younger":   plain(Younger),
	"rtt":       plain(RTTBand),

	"reach":     order(ReachOrder, Reach.String, Loopback, Private, Public, UnknownReach),
	"transport": order(TransportOrder, Transport.String, QUIC, WebTransport, WebRTC, TCP, WebSocket, OtherTransport),
	"ip":        order(IPVersionOrder, ipVersionName, 6, 4, 0),
	"direction": order(DirectionOrder, directionName, network.DirOutbound, network.DirInbound, network.DirUnknown),

	"prefer": matching(Prefer),
	"never":  matching(Never),
}

// isReserved returns whether name has a meaning in a text or a decision by itself,
// without rules that a program adds.
func isReserved(name string) bool {
	_, isRule := vocabulary[name]
	return isRule || slices.Contains([]string{defaultWord, chainWord, weightedWord, byID{}.Name()}, name)
}

// plain is for a rule without arguments.
func plain(build func() Scored) parseRule {
	return func(p *parser, name token) (Rule, error) { return build(), p.noArguments(name) }
}

func (p *parser) noArguments(name token) error {
	if p.now.kind == left {
		return p.fail(p.now, fmt.Sprintf("rule %s has no arguments", name))
	}
	return nil
}

// order is for a rule that may have an order of some kinds.
func order[Kind any](build func(...Kind) Scored, name func(Kind) string, kinds ...Kind) parseRule {
	names := make([]string, len(kinds))
	for i, kind := range kinds {
		names[i] = name(kind)
	}
	return func(p *parser, _ token) (Rule, error) {
		if p.now.kind != left {
			return build(), nil
		}
		p.next()
		var chosen []Kind
		var seen []string
		err := p.items(func() error {
			t, err := p.word("one of the known words", names...)
			if err != nil {
				return err
			}
			i := slices.Index(names, t.value)
			if i < 0 {
				return p.fail(t, fmt.Sprintf("%s is not known here", t), names...)
			}
			if slices.Contains(seen, t.value) {
				return p.fail(t, fmt.Sprintf("%s stands here for the second time", t))
			}
			chosen, seen = append(chosen, kinds[i]), append(seen, t.value)
			return nil
		})
		return build(chosen...), err
	}
}

// matching is for a rule that has matches.
func matching(build func(Match, ...Match) Scored) parseRule {
	return func(p *parser, _ token) (Rule, error) {
		if p.now.kind != left {
			return nil, p.fail(p.now, fmt.Sprintf("expected %q and a match, found %s", left, p.now))
		}
		p.next()
		var matches []Match
		err := p.items(func() error {
			match, err := p.match()
			matches = append(matches, match)
			return err
		})
		if err != nil {
			return nil, err
		}
		return build(matches[0], matches[1:]...), nil
	}
}

// The words for a match.
const (
	remoteWord    = "remote"
	localWord     = "local"
	cidrWord      = "cidr"
	addrWord      = "addr"
	interfaceWord = "interface"
)

func (p *parser) match() (Match, error) {
	known := []string{cidrWord, addrWord, interfaceWord, localWord, remoteWord}
	kind, err := p.word("a match", known...)
	if err != nil {
		return Match{}, err
	}
	cidr, addr := RemoteIn, RemotePrefix
	if kind.value == localWord {
		cidr, addr = LocalIn, LocalPrefix
	}
	if kind.value == localWord || kind.value == remoteWord {
		known = []string{cidrWord, addrWord}
		if kind, err = p.word("a match", known...); err != nil {
			return Match{}, err
		}
	}
	if !slices.Contains(known, kind.value) {
		err := p.fail(kind, fmt.Sprintf("there is no match %s", kind), known...)
		if _, notPrefix := netip.ParsePrefix(kind.value); notPrefix == nil {
			err.Meant = cidrWord + " " + kind.value
		} else if strings.HasPrefix(kind.value, "/") {
			err.Meant = addrWord + " " + quoteWord(kind.value)
		}
		return Match{}, err
	}
	switch kind.value {
	case cidrWord:
		const what = "a prefix such as 10.0.0.0/8 or fd00::/8"
		value, err := p.word(what)
		if err != nil {
			return Match{}, err
		}
		prefix, err := netip.ParsePrefix(value.value)
		if err != nil {
			return Match{}, p.fail(value, fmt.Sprintf("expected %s, found %s", what, value))
		}
		return cidr(prefix), nil
	case addrWord:
		const what = "a multiaddr such as /ip4/192.0.2.1/udp/4001"
		value, err := p.word(what)
		if err != nil {
			return Match{}, err
		}
		prefix, err := ma.NewMultiaddr(value.value)
		if err != nil {
			return Match{}, p.fail(value, fmt.Sprintf("expected %s, found %s", what, value))
		}
		return addr(prefix), nil
	default:
		const what = "the name of a network interface"
		name, err := p.word(what)
		if err != nil {
			return Match{}, err
		}
		if name.value == "" {
			return Match{}, p.fail(name, fmt.Sprintf("expected %s, found %s", what, name))
		}
		return OnInterface(name.value), nil
	}
}
