package migrate

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/stretchr/testify/require"

	. "github.com/go-portage/portage/internal/hosttest"
	. "github.com/go-portage/portage/internal/rawpeer"
)

// The bytes of the example exchange in docs/protocol.md: a host with the lower peer ID, so
// that its labels are even, opens a stream of /echo/1.0.0 with the label 19088744, writes
// "hello", and, when each side has written 1000 bytes, migrates it to the label 19088746.

// golden decodes hex with comments.
func golden(t testing.TB, text string) string {
	t.Helper()
	var digits strings.Builder
	for line := range strings.Lines(text) {
		code, _, _ := strings.Cut(line, "#")
		digits.WriteString(strings.Join(strings.Fields(code), ""))
	}
	b, err := hex.DecodeString(digits.String())
	require.NoError(t, err)
	return string(b)
}

const (
	goldenHeader = `
		13 2f6d756c746973747265616d2f312e302e300a              # "/multistream/1.0.0\n"`

	goldenID = `
		19 2f6c69627032702f73747265616d2d6d6967726174696f6e0a  # "/libp2p/stream-migration\n"`

	goldenEcho = `
		0c 2f6563686f2f312e302e300a                            # "/echo/1.0.0\n"`

	goldenLabel = `
		07                                                     # 7 bytes follow
		0a 05                                                  # label:
		      08 e88a8d09                                      #   id = 19088744`

	goldenHello = `
		68656c6c6f                                             # the application's "hello"`

	goldenMigrate = `
		0f                                                     # 15 bytes follow
		12 0d                                                  # migrate:
		      08 ea8a8d09                                      #   id = 19088746
		      10 e88a8d09                                      #   from = 19088744
		      a006 01                                          #   final_size = true`

	// goldenMigrateDraft is what a peer sends that has only the draft.
	goldenMigrateDraft = `
		0c                                                     # 12 bytes follow
		12 0a                                                  # migrate:
		      08 ea8a8d09                                      #   id = 19088746
		      10 e88a8d09                                      #   from = 19088744`

	goldenAckVerified = `
		05                                                     # 5 bytes follow
		1a 03                                                  # ack_migrate:
		      a006 01                                          #   final_size = true`

	goldenAckDraft = `
		02                                                     # 2 bytes follow
		1a 00                                                  # ack_migrate, empty`

	goldenAckDenied = `
		04                                                     # 4 bytes follow
		1a 02                                                  # ack_migrate:
		      08 01                                            #   deny_migrate = true`

	goldenFinalSize = `
		06                                                     # 6 bytes follow
		a206 03                                                # final_size:
		        08 e807                                        #   size = 1000`

	// goldenPrelude begins every stream of the protocol, in both directions.
	goldenPrelude = goldenHeader + goldenID
	goldenOpening = goldenPrelude + goldenLabel + goldenHeader + goldenEcho
	goldenAnswer  = goldenPrelude + goldenHeader + goldenEcho
)

const (
	goldenProtocol protocol.ID = "/echo/1.0.0"
	goldenFrom     uint64      = 19088744
	goldenTo       uint64      = 19088746
)

// countTo sets the counter of the host's labels, so that the next one is label.
func (p *rawPeer) countTo(label uint64) {
	p.host.labels.counter.Store(label>>1 - 1)
}

// TestGoldenExchange: the bytes of opening, migrating and finishing, as the opener and
// initiator (W1, W2, W4, S12).
func TestGoldenExchange(t *testing.T) {
	p := meet(t, peerKind{ID, FinalSizeID, goldenProtocol})
	p.countTo(goldenFrom)
	s, err := p.hostBegins(0, goldenProtocol)
	require.NoError(t, err)
	p.writes(s, "hello")
	old := p.Arrives()
	old.Wants(golden(t, goldenOpening+goldenHello))
	old.Sends(golden(t, goldenAnswer+goldenHello))
	p.reads(s, "hello")
	more := strings.Repeat("x", 995)
	p.writes(s, more)
	old.Wants(more)
	old.Sends(more)

	moved := p.hostMigrates(s)
	next := p.Arrives()
	next.Wants(golden(t, goldenPrelude+goldenMigrate))
	next.Sends(golden(t, goldenPrelude+goldenAckVerified))
	next.Wants(golden(t, goldenFinalSize))
	old.WantsEOF()
	next.Sends(golden(t, goldenFinalSize))
	old.ClosesWrite()
	p.reads(s, more)
	moved.is(nil)
	require.Equal(t, uint64(goldenTo), s.Label())
	p.talk(s, next)
	require.NoError(t, s.Close())
	next.WantsEOF()
	p.nothingLeft()
}

// TestGoldenAnswers: the bytes of the acceptor and responder (W1, W2, W4, S12).
func TestGoldenAnswers(t *testing.T) {
	accept := func(t *testing.T, opts ...Option) (*rawPeer, *Stream, *RawStream) {
		// The script plays the lower peer, with the labels of the example.
		p := meeting{kind: verified, hostHigher: true, opts: opts}.meet(t)
		p.host.SetStreamHandler(goldenProtocol, func(s network.Stream) { p.app <- s.(*Stream) })
		old := p.Opens(0, golden(t, goldenOpening+goldenHello))
		old.Wants(golden(t, goldenAnswer))
		s := p.accepted()
		require.Equal(t, uint64(goldenFrom), s.Label())
		p.reads(s, "hello")
		return p, s, old
	}
	t.Run("verified", func(t *testing.T) {
		p, s, old := accept(t)
		thousand := strings.Repeat("x", 1000)
		p.writes(s, thousand)
		old.Wants(thousand)
		old.Sends(thousand[5:])
		next := p.Opens(1, golden(t, goldenPrelude+goldenMigrate))
		next.Wants(golden(t, goldenPrelude+goldenAckVerified))
		next.Sends(golden(t, goldenFinalSize))
		old.ClosesWrite()
		next.Wants(golden(t, goldenFinalSize))
		old.WantsEOF()
		p.reads(s, thousand[5:])
		p.talk(s, next)
		require.Equal(t, uint64(goldenTo), s.Label())
	})
	t.Run("draft", func(t *testing.T) {
		p, s, old := accept(t)
		next := p.Opens(1, golden(t, goldenPrelude+goldenMigrateDraft))
		next.Wants(golden(t, goldenPrelude+goldenAckDraft))
		old.ClosesWrite()
		old.WantsEOF()
		p.talk(s, next)
	})
	t.Run("denied", func(t *testing.T) {
		p, s, old := accept(t, WithAcceptor(func(*Stream, network.Conn) bool { return false }))
		next := p.Opens(1, golden(t, goldenPrelude+goldenMigrate))
		next.Wants(golden(t, goldenPrelude+goldenAckDenied))
		next.WantsEOF()
		p.talk(s, old)
	})
}

// TestGoldenBytesAreDocumented: docs/protocol.md shows what the tests above expect.
func TestGoldenBytesAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../docs/protocol.md")
	require.NoError(t, err)
	doc := strings.Join(strings.Fields(string(text)), " ")
	shown := func(what, s string) {
		t.Helper()
		if !strings.Contains(doc, s) {
			t.Errorf("docs/protocol.md does not show the %s: %s", what, s)
		}
	}
	for name, bytes := range map[string]string{
		"header":       goldenHeader,
		"ID":           goldenID,
		"Label":        goldenLabel,
		"the protocol": goldenEcho,
		"Migrate":      goldenMigrate,
		"ack":          goldenAckVerified,
		"ack, draft":   goldenAckDraft,
		"denial":       goldenAckDenied,
		"FinalSize":    goldenFinalSize,
	} {
		shown(name, fmt.Sprintf("% x", golden(t, bytes)))
	}
	plain := len(golden(t, goldenHeader+goldenEcho))
	opener, acceptor := len(golden(t, goldenOpening)), len(golden(t, goldenAnswer))
	shown("size of the opening", fmt.Sprintf("sends %d bytes, %d more than without a label", opener, opener-plain))
	shown("size of the answer", fmt.Sprintf("(%d more than without)", acceptor-plain))
}

// TestOpeningSize: what a label costs on the wire, for the largest label that the
// counter begins with: at most 64 B from the opener and 48 B from the acceptor (W1).
func TestOpeningSize(t *testing.T) {
	p := meet(t, verified)
	p.countTo(1<<33 - 2)
	s, u := p.hostOpens()
	require.Equal(t, uint64(1<<33-2), s.Label(), "not the largest label")
	labelled := len(Prelude + LabelBytes(u.Label) + MultistreamToken + EchoToken)
	plain := len(MultistreamToken + EchoToken)
	require.LessOrEqual(t, labelled-plain, 64)
	require.Equal(t, opening(u.Label, echoID), []byte(Prelude+LabelBytes(u.Label)+MultistreamToken+EchoToken))

	answered := len(Prelude + MultistreamToken + EchoToken)
	require.Equal(t, answered, len(answer(echoID)))
	require.LessOrEqual(t, answered-plain, 48)
}

// TestOpeningIsOneWrite: nothing leaves before the application writes; then everything
// leaves in one underlying Write with a small first Write, and the stream is raw from
// there on (W1).
func TestOpeningIsOneWrite(t *testing.T) {
	h := lonelyHost(t)
	u := newFake()
	u.conn.remote = "peer"
	s, err := h.open(context.Background(), u, echoID, []protocol.ID{echoID})
	require.NoError(t, err)
	require.Empty(t, u.writes, "the opening left before the first Write")
	require.Equal(t, echoID, u.Protocol(), "the stream has to be charged to the application's protocol")

	_, err = s.Write([]byte("hello"))
	require.NoError(t, err)
	open := string(opening(s.Label(), echoID))
	require.Equal(t, open+"hello", u.taken())
	require.Len(t, u.writes, 1, "a small first Write leaves together with the opening")

	_, err = s.Write([]byte("again"))
	require.NoError(t, err)
	require.Equal(t, open+"helloagain", u.taken())

	// Larger than openingRoom: behind the opening, and not copied.
	u = newFake()
	u.conn.remote = "peer"
	s, err = h.open(context.Background(), u, echoID, []protocol.ID{echoID})
	require.NoError(t, err)
	large := strings.Repeat("x", openingRoom+1)
	n, err := s.Write([]byte(large))
	require.NoError(t, err)
	require.Equal(t, len(large), n)
	open = string(opening(s.Label(), echoID))
	require.Equal(t, open+large, u.taken())
	require.Equal(t, []int{len(open), len(large)}, u.writes)
}

// TestOpenerThatReadsFirst: the acceptor has to learn of the stream though the opener's
// application begins with a Read, or ends its writing at once (W1).
func TestOpenerThatReadsFirst(t *testing.T) {
	open := func(t *testing.T, p *rawPeer) *Stream {
		s, err := p.hostBegins(0, echoID)
		require.NoError(t, err)
		return s
	}
	answer := Prelude + MultistreamToken + EchoToken
	t.Run("read", func(t *testing.T) {
		p := meet(t, verified)
		s := open(t, p)
		read := make(chan error, 1)
		go func() {
			_, err := io.ReadFull(s, make([]byte, 8))
			read <- err
		}()
		u := p.Arrives()
		u.Wants(Prelude, LabelBytes(s.Label()), MultistreamToken, EchoToken)
		u.Sends(answer, "greeting")
		require.NoError(t, Take(t, read, "the greeting"))
		p.talk(s, u)
	})
	t.Run("close write", func(t *testing.T) {
		p := meet(t, verified)
		s := open(t, p)
		require.NoError(t, s.CloseWrite())
		u := p.Arrives()
		u.Wants(Prelude, LabelBytes(s.Label()), MultistreamToken, EchoToken)
		u.WantsEOF()
		u.Sends(answer, "greeting")
		p.reads(s, "greeting")
	})
	t.Run("close", func(t *testing.T) {
		p := meet(t, verified)
		s := open(t, p)
		label := s.Label()
		closed := make(chan error, 1)
		go func() { closed <- s.Close() }()
		u := p.Arrives()
		u.Wants(Prelude, LabelBytes(label), MultistreamToken, EchoToken)
		u.Sends(answer)
		require.NoError(t, Take(t, closed, "Close"))
		u.WantsEOF()
		p.nothingLeft()
	})
}

// TestAnswerInPieces: the acceptor's answer may come as it likes, and with the first
// data.
func TestAnswerInPieces(t *testing.T) {
	p := meet(t, verified)
	s, err := p.hostBegins(0, echoID)
	require.NoError(t, err)
	p.writes(s, "hello")
	u := p.Arrives()
	u.Wants(Prelude, LabelBytes(s.Label()), MultistreamToken, EchoToken, "hello")
	go u.Drips(Prelude, MultistreamToken, EchoToken, "hello")
	p.reads(s, "hello")
	p.talk(s, u)
}

// TestAnswerThatIsNone: an acceptor that answers something else is refused, and says so
// where it does not speak what identify said.
func TestAnswerThatIsNone(t *testing.T) {
	for name, tc := range map[string]struct{ answer, says string }{
		"no label":       {MultistreamToken + NAToken, "protocols not supported"},
		"no application": {Prelude + MultistreamToken + NAToken, "protocols not supported"},
		"other":          {Prelude + MultistreamToken + Token("/test/no/1.0.0"), "unexpected answer"},
		"garbage":        {"HTTP/1.1 400 Bad Request\r\n\r\n", "unexpected answer"},
	} {
		t.Run(name, func(t *testing.T) {
			p := meet(t, verified)
			s, err := p.hostBegins(0, echoID)
			require.NoError(t, err)
			p.writes(s, "hello")
			u := p.Arrives()
			u.Sends(tc.answer)
			inTime(t, "Read to fail", func() error {
				_, err = s.Read(make([]byte, 100))
				return nil
			})
			require.ErrorContains(t, err, tc.says)
			require.NoError(t, s.Reset())
			p.nothingLeft()
		})
	}
}

// TestOpenerThatWaits: an opener that does not pipeline, but waits for each answer
// before its next token, is served.
func TestOpenerThatWaits(t *testing.T) {
	p := meet(t, verified)
	label := p.Fresh()
	u := p.Opens(0)
	u.Sends(MultistreamToken)
	u.Wants(MultistreamToken)
	u.Sends(MigrationToken)
	u.Wants(MigrationToken)
	u.Sends(LabelBytes(label), MultistreamToken)
	u.Wants(MultistreamToken)
	u.Sends(EchoToken)
	u.Wants(EchoToken)
	s := p.accepted()
	require.Equal(t, label, s.Label())
	p.talk(s, u)

	// The same for a migration.
	id := p.Fresh()
	next := p.Opens(1)
	next.Sends(MultistreamToken)
	next.Wants(MultistreamToken)
	next.Sends(MigrationToken)
	next.Wants(MigrationToken)
	next.Sends(MigrateDraftBytes(id, label))
	next.Wants(AckDraft)
	u.ClosesWrite()
	u.WantsEOF()
	p.talk(s, next)
}

// TestOpenerByteByByte: how the bytes are cut into packets does not matter.
func TestOpenerByteByByte(t *testing.T) {
	p := meet(t, verified)
	label, id := p.Fresh(), p.Fresh()
	u := p.Opens(0)
	u.Drips(Prelude, LabelBytes(label), MultistreamToken, EchoToken, "hello")
	u.Wants(Prelude, MultistreamToken, EchoToken)
	s := p.accepted()
	p.reads(s, "hello")
	p.talk(s, u)

	next := p.Opens(1)
	next.Drips(Prelude, MigrateBytes(id, label))
	next.Wants(Prelude, AckVerified)
	next.Drips(FinalSizeBytes(9), "after")
	u.ClosesWrite()
	next.Wants(FinalSizeBytes(4))
	u.WantsEOF()
	p.reads(s, "after")
	p.talk(s, next)
}

// TestSecondChoice: a protocol that the acceptor does not speak is answered with na, and
// the next one is taken; behind the label, and before it.
func TestSecondChoice(t *testing.T) {
	tOther := Token("/test/other/1.0.0")
	t.Run("behind the label", func(t *testing.T) {
		p := meet(t, verified)
		u := p.Opens(0, Prelude, LabelBytes(p.Fresh()), MultistreamToken, tOther)
		u.Wants(Prelude, MultistreamToken, NAToken)
		u.Sends(EchoToken)
		u.Wants(EchoToken)
		p.talk(p.accepted(), u)
	})
	t.Run("behind the label, in one flight", func(t *testing.T) {
		p := meet(t, verified)
		u := p.Opens(0, Prelude, LabelBytes(p.Fresh()), MultistreamToken, tOther, EchoToken, "hello")
		u.Wants(Prelude, MultistreamToken, NAToken, EchoToken)
		s := p.accepted()
		p.reads(s, "hello")
		p.talk(s, u)
	})
	t.Run("before the label", func(t *testing.T) {
		p := meet(t, verified)
		label := p.Fresh()
		u := p.Opens(0, MultistreamToken, tOther)
		u.Wants(MultistreamToken, NAToken)
		u.Sends(MigrationToken)
		u.Wants(MigrationToken)
		u.Sends(LabelBytes(label), MultistreamToken, EchoToken)
		u.Wants(MultistreamToken, EchoToken)
		s := p.accepted()
		require.Equal(t, label, s.Label())
		p.talk(s, u)
	})
	t.Run("before Migrate", func(t *testing.T) {
		p := meet(t, draftOnly)
		s, old := p.hostOpens()
		next := p.Opens(1, MultistreamToken, tOther, MigrationToken, MigrateDraftBytes(p.Fresh(), old.Label))
		next.Wants(MultistreamToken, NAToken, MigrationToken, AckDraft)
		old.ClosesWrite()
		old.WantsEOF()
		p.talk(s, next)
	})
	t.Run("none", func(t *testing.T) {
		p := meet(t, verified)
		u := p.Opens(0, Prelude, LabelBytes(p.Fresh()), MultistreamToken, tOther)
		u.Wants(Prelude, MultistreamToken, NAToken)
		u.ClosesWrite()
		u.WantsReset(network.StreamProtocolNegotiationFailed)
		p.nothingLeft()
	})
}

// TestHostNegotiatesBehindLabel: where the host does not know which protocol the peer
// speaks, it negotiates behind the label, with na and a second choice.
func TestHostNegotiatesBehindLabel(t *testing.T) {
	const other, third protocol.ID = "/test/other/1.0.0", "/test/third/1.0.0"
	tOther, tThird := Token(other), Token(third)
	type opened struct {
		s   *Stream
		err error
	}
	open := func(t *testing.T, p *rawPeer) chan opened {
		done := make(chan opened, 1)
		go func() {
			s, err := p.hostBegins(0, other, third)
			done <- opened{s, err}
		}()
		return done
	}
	t.Run("second choice", func(t *testing.T) {
		p := meet(t, verified)
		p.countTo(600)
		done := open(t, p)
		u := p.Arrives()
		u.Wants(Prelude, LabelBytes(600), MultistreamToken, tOther)
		u.Sends(Prelude, MultistreamToken, NAToken)
		u.Wants(tThird)
		u.Sends(tThird)
		o := Take(t, done, "NewStream")
		require.NoError(t, o.err)
		require.Equal(t, third, o.s.Protocol())
		s := o.s
		require.Equal(t, uint64(600), s.Label())
		p.talk(s, u)

		// What was negotiated does not count as the application's (S12).
		moved := p.hostMigrates(s)
		next := p.Arrives()
		next.WantsMigrate(600)
		next.Sends(Prelude, AckVerified)
		next.Wants(FinalSizeBytes(4))
		old := u
		old.WantsEOF()
		next.Sends(FinalSizeBytes(4))
		moved.is(nil)
		p.talk(s, next)
	})
	t.Run("none", func(t *testing.T) {
		p := meet(t, verified)
		done := open(t, p)
		u := p.Arrives()
		u.Sends(Prelude, MultistreamToken, NAToken, NAToken)
		o := Take(t, done, "NewStream")
		require.ErrorContains(t, o.err, "protocols not supported")
		u.WantsReset(network.StreamProtocolNegotiationFailed)
		p.nothingLeft()
	})
	t.Run("no label", func(t *testing.T) {
		p := meet(t, verified)
		done := open(t, p)
		u := p.Arrives()
		u.Sends(MultistreamToken, NAToken)
		o := Take(t, done, "NewStream")
		require.Error(t, o.err)
		u.WantsReset(network.StreamProtocolNegotiationFailed)
		p.nothingLeft()
	})
}

// TestPlainStreamIsUntouched: a stream without a label reaches its handler raw, to the
// byte, however it is cut.
func TestPlainStreamIsUntouched(t *testing.T) {
	for name, send := range map[string]func(u *RawStream, parts ...string){
		"one flight":   (*RawStream).Sends,
		"byte by byte": (*RawStream).Drips,
	} {
		t.Run(name, func(t *testing.T) {
			p := meet(t, verified)
			plain := make(chan network.Stream, 1)
			p.host.SetStreamHandler(echoID, func(s network.Stream) { plain <- s })
			u := p.Opens(0)
			send(u, MultistreamToken, EchoToken, "hello")
			u.Wants(MultistreamToken, EchoToken)
			s := Take(t, plain, "the handler to be called")
			_, labelled := s.(*Stream)
			require.False(t, labelled, "the stream has no label")
			got := make([]byte, 5)
			_, err := io.ReadFull(s, got)
			require.NoError(t, err)
			require.Equal(t, "hello", string(got))
			require.Equal(t, echoID, s.Protocol())
		})
	}
}

// TestFinalSizeIDIsNotSpoken: a stream opened on it is reset (S12).
func TestFinalSizeIDIsNotSpoken(t *testing.T) {
	p := meet(t, verified)
	u := p.Opens(0, MultistreamToken, Token("/portage/final-size/1.0.0"))
	u.WantsReset(network.StreamNoError)
	p.nothingLeft()
}

// TestLocalChoicesAreDocumented: what section 7 of docs/protocol.md says of this implementation.
func TestLocalChoicesAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../docs/protocol.md")
	require.NoError(t, err)
	doc := strings.Join(strings.Fields(string(text)), " ")
	cfg := defaults()
	reread := rereadAfter * (1<<rereads - 1)
	for _, says := range []string{
		fmt.Sprintf("the negotiation of an inbound stream | takes %.0f s at most |", cfg.negotiation.Seconds()),
		fmt.Sprintf("(W1) | for %d ms |", answerDelay.Milliseconds()),
		fmt.Sprintf("(L4) | for %.0f s. %d at once for each peer;", cfg.labelWait.Seconds(), maxWaiting),
		fmt.Sprintf("(M2) | for %.0f s |", cfg.busyWait.Seconds()),
		fmt.Sprintf("leaves no room | is given up after %.0f s;", cfg.negotiation.Seconds()),
		fmt.Sprintf("(L5) | can be migrated for %.0f s; %d such streams are kept |", cfg.labelWait.Seconds(), maxOrphans),
		fmt.Sprintf("nothing has come on the new connection for %.0f s |", maxSilence.Seconds()),
		fmt.Sprintf("(S4) | %d MiB at most,", maxDrained>>20),
		fmt.Sprintf("(S12) | is read behind for about %d ms |", reread.Round(100*time.Millisecond).Milliseconds()),
		fmt.Sprintf("after %.0f s, the new one is read ahead, up to %d MiB", stallNotice.Seconds(), maxAhead>>20),
		fmt.Sprintf("brought nothing for %.0f s, S8 holds. After %.0f s without progress", maxHold.Seconds(), cfg.stall.Seconds()),
	} {
		require.Contains(t, doc, says)
	}
	require.Equal(t, 10, patience, "ten times the 5 s or 30 s")
}
