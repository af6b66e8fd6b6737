package connmgr

import (
	"bufio"
	"cmp"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	"github.com/stretchr/testify/require"
	"golang.org/x/net/websocket"
)

// The page in a browser. It is made in virtual time, so that it is the same each time, and
// served as it was made. PORTAGE_SCREENSHOTS names a directory for pictures of it.

// busyPage makes a page with a peer in each state that looks different, and one of a manager
// that has none.
func busyPage(t *testing.T) (full, empty *httptest.ResponseRecorder) {
	ask := func(h http.Handler, query string) *httptest.ResponseRecorder {
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/debug/portage"+query, nil))
		require.Equal(t, http.StatusOK, rec.Code)
		return rec
	}
	inVirtualTime(t, func(t *testing.T) {
		named := func(name string) peer.ID { return peer.ID("z" + fmt.Sprintf("%-33s", name)) }
		exempt := named("the application's own")
		w := newWorld(t, named("chat"), WithExempt(ExemptPeer(exempt)))
		w.punches()
		h := Handler(w.m)
		w.net.mu.Lock()
		w.net.limit = map[any]any{client.StatLimitDuration: 2 * time.Minute}
		w.net.mu.Unlock()
		meet := func(name string, runs ...protocol.ID) func(addr string, limited bool) *fakeConn {
			w.net.identify(named(name), runs...)
			return func(addr string, limited bool) *fakeConn {
				return w.net.connectFrom(network.DirInbound, named(name), addr, limited)
			}
		}
		carry := func(c *fakeConn, ids ...protocol.ID) {
			for _, id := range ids {
				near, _ := newPipe(c)
				near.id = id
				c.set(func() { c.streams = append(c.streams, near) })
			}
		}
		meet("direct", DrainID)(quicAddr, false).open(3)
		relayed := meet("behind a firewall", DrainID)(relayAddr, true)
		relayed.open(1)
		meet("replies for ever", DrainID)("/ip6/2001:db8::17/tcp/443/wss", false)

		w.pass(70 * time.Second)
		pinned := meet("held", DrainID)
		loser := pinned(relayAddr, true)
		carry(loser, "/ipfs/bitswap/1.2.0", "/ipfs/bitswap/1.2.0", "/x/"+protocol.ID(strings.Repeat("long/", 20)))
		loser.open(2)
		pinned(quicAddr, false).open(4)
		unsure := meet("no answer", DrainID)
		unsure(relayAddr, true).setPlain(1)
		dead := unsure(tcpAddr, false)
		dead.set(func() { dead.silent = true })
		own := func(addr string, limited bool) *fakeConn { return w.net.connect(exempt, addr, limited) }
		own(tcpAddr, false)
		own(quicAddr, false)
		w.pass(15 * time.Second)

		w.connect(relayAddr).open(12)
		w.connect(quicAddr).open(2)
		w.pass(9 * time.Second)
		twice := meet("simultaneous dial", DrainID)
		twice(tcpAddr, false).open(1)
		twice(quicAddr, false)
		w.pass(1700 * time.Millisecond)
		full = ask(h, "?reload=10")
		empty = ask(h, "?q=nobody")
	})
	return full, empty
}

// browser is a headless Chromium, spoken to with the DevTools protocol.
type browser struct {
	t      *testing.T
	ws     *websocket.Conn
	id     int
	faults []string // that it has told of
}

// message is what it says, asked or not.
type message struct {
	ID     int             `json:"id"`
	Method string          `json:"method"`
	Params json.RawMessage `json:"params"`
	Result json.RawMessage `json:"result"`
	Error  json.RawMessage `json:"error"`
}

func newBrowser(t *testing.T) *browser {
	var path string
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome"} {
		if path, _ = exec.LookPath(name); path != "" {
			break
		}
	}
	if path == "" {
		t.Skip("there is no Chromium to look at the page with: apt-get install chromium")
	}
	args := []string{"--headless=new", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage", "--remote-debugging-port=0",
		"--remote-allow-origins=*", "--user-data-dir=" + t.TempDir(), "--disable-background-networking", "--disable-extensions",
		"--disable-component-update", "--no-proxy-server", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"}
	if os.Getuid() == 0 {
		args = append(args, "--no-sandbox")
	}
	cmd := exec.Command(path, append(args, "about:blank")...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.StderrPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	said := make(chan string, 1)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		var all strings.Builder
		lines := bufio.NewScanner(out)
		for found := false; lines.Scan(); {
			fmt.Fprintln(&all, lines.Text())
			if _, url, is := strings.Cut(lines.Text(), "DevTools listening on ws://"); is && !found {
				found = true
				said <- url
			}
		}
		close(said)
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		<-ended
	})
	at, ok := <-said
	require.True(t, ok, "Chromium ends before it says where it listens")
	host, _, _ := strings.Cut(at, "/")
	var tabs []struct {
		Type string `json:"type"`
		URL  string `json:"webSocketDebuggerUrl"`
	}
	got, err := http.Get("http://" + host + "/json/list")
	require.NoError(t, err)
	require.NoError(t, json.NewDecoder(got.Body).Decode(&tabs))
	require.NoError(t, got.Body.Close())
	tab := slices.IndexFunc(tabs, func(tab struct {
		Type string `json:"type"`
		URL  string `json:"webSocketDebuggerUrl"`
	}) bool {
		return tab.Type == "page"
	})
	require.GreaterOrEqual(t, tab, 0)
	ws, err := websocket.Dial(tabs[tab].URL, "", "http://127.0.0.1/")
	require.NoError(t, err)
	ws.MaxPayloadBytes = 64 << 20
	require.NoError(t, ws.SetDeadline(time.Now().Add(4*time.Minute)))
	t.Cleanup(func() { _ = ws.Close() })
	b := &browser{t: t, ws: ws}
	for _, domain := range []string{"Page", "Runtime", "Log", "Network", "Accessibility", "DOM"} {
		b.call(domain+".enable", nil, nil)
	}
	return b
}

// call calls a method, and decodes what it returns into result, if that is not nil.
func (b *browser) call(method string, params map[string]any, result any) {
	b.t.Helper()
	b.id++
	if params == nil {
		params = map[string]any{}
	}
	require.NoError(b.t, websocket.JSON.Send(b.ws, map[string]any{"id": b.id, "method": method, "params": params}))
	id := b.id
	e := b.until(func(e message) bool { return e.ID == id })
	require.Empty(b.t, string(e.Error), method)
	if result != nil {
		require.NoError(b.t, json.Unmarshal(e.Result, result))
	}
}

// until reads what the browser says until it is what is waited for.
func (b *browser) until(is func(message) bool) message {
	b.t.Helper()
	for {
		var e message
		require.NoError(b.t, websocket.JSON.Receive(b.ws, &e))
		switch e.Method {
		case "Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Network.loadingFailed":
			b.faults = append(b.faults, e.Method+": "+string(e.Params))
		}
		if is(e) {
			return e
		}
	}
}

// open loads a page.
func (b *browser) open(url string) {
	b.t.Helper()
	b.faults = nil
	b.call("Page.navigate", map[string]any{"url": url}, nil)
	b.until(func(e message) bool { return e.Method == "Page.loadEventFired" })
}

// eval evaluates an expression in the page.
func (b *browser) eval(expression string, result any) {
	b.t.Helper()
	var got struct {
		Result struct {
			Value json.RawMessage `json:"value"`
		} `json:"result"`
		ExceptionDetails json.RawMessage `json:"exceptionDetails"`
	}
	b.call("Runtime.evaluate", map[string]any{"expression": expression, "returnByValue": true}, &got)
	require.Empty(b.t, string(got.ExceptionDetails), expression)
	require.NoError(b.t, json.Unmarshal(got.Result.Value, result))
}

// look sets how wide the window is, and whether it is dark.
func (b *browser) look(width int, scheme string) {
	b.t.Helper()
	b.call("Emulation.setDeviceMetricsOverride", map[string]any{"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}, nil)
	b.call("Emulation.setEmulatedMedia", map[string]any{"features": []any{map[string]any{"name": "prefers-color-scheme", "value": scheme}}}, nil)
}

func (b *browser) picture(name string) {
	b.t.Helper()
	dir := os.Getenv("PORTAGE_SCREENSHOTS")
	if dir == "" {
		return
	}
	var got struct {
		Data string `json:"data"`
	}
	b.call("Page.captureScreenshot", map[string]any{"captureBeyondViewport": true}, &got)
	png, err := base64.StdEncoding.DecodeString(got.Data)
	require.NoError(b.t, err)
	require.NoError(b.t, os.WriteFile(filepath.Join(dir, name+".png"), png, 0o644))
}

// TestPageInABrowser: no fault, no violation of the page's own policy, nothing that is cut
// off, everything readable, in every width and colour scheme.
func TestPageInABrowser(t *testing.T) {
	full, empty := busyPage(t)
	b := newBrowser(t)
	served := http.NewServeMux()
	for path, page := range map[string]*httptest.ResponseRecorder{"/full": full, "/empty": empty} {
		served.HandleFunc(path, func(w http.ResponseWriter, _ *http.Request) {
			for key, values := range page.Header() {
				w.Header()[key] = values
			}
			_, _ = w.Write(page.Body.Bytes())
		})
	}
	injected := strings.Replace(full.Body.String(), "</body>", "<script>document.title='run'</script><p style='color:red'>styled</p><img src='http://127.0.0.1:9/x.png'></body>", 1)
	served.HandleFunc("/injected", func(w http.ResponseWriter, _ *http.Request) {
		for key, values := range full.Header() {
			w.Header()[key] = values
		}
		_, _ = w.Write([]byte(injected))
	})
	server := httptest.NewServer(served)
	defer server.Close()

	for _, scheme := range []string{"light", "dark"} {
		for _, width := range []int{1280, 390} {
			t.Run(fmt.Sprintf("%s, %d wide", scheme, width), func(t *testing.T) {
				b.t = t
				b.look(width, scheme)
				for _, path := range []string{"/full", "/empty"} {
					b.open(server.URL + path)
					var wide, styled bool
					b.eval("[document.documentElement, ...document.querySelectorAll('.frame')].every(e => e.scrollWidth <= e.clientWidth)", &wide)
					require.True(t, wide, "nothing is cut off")
					b.eval("getComputedStyle(document.querySelector('h1')).display == 'flex'", &styled)
					require.True(t, styled, "the style is taken")
					var faint []string
					b.eval(unreadable, &faint)
					require.Empty(t, faint, "text with a contrast of less than 4.5")
					require.Empty(t, b.faults)
				}
				b.open(server.URL + "/full")
				b.picture(fmt.Sprintf("page-%s-%d", scheme, width))
			})
		}
	}
	b.t = t
	t.Run("what is smuggled in does nothing", func(t *testing.T) {
		b.t = t
		b.open(server.URL + "/injected")
		var title string
		b.eval("document.title", &title)
		require.NotEqual(t, "run", title)
		all := strings.Join(b.faults, "\n")
		for _, directive := range []string{"script-src", "style-src", "img-src"} {
			require.Contains(t, all, directive)
		}
	})
	t.Run("keyboard", func(t *testing.T) {
		b.t = t
		b.look(1280, "light")
		b.open(server.URL + "/full")
		var reached []string
		for range 60 {
			for _, kind := range []string{"rawKeyDown", "keyUp"} {
				b.call("Input.dispatchKeyEvent", map[string]any{"type": kind, "key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9}, nil)
			}
			var at struct{ Name, Outline string }
			b.eval("(() => { const e = document.activeElement; return {Name: e.name || e.innerText.trim().split('\\n')[0] || e.className, Outline: getComputedStyle(e).outlineStyle} })()", &at)
			if slices.Contains(reached, at.Name) && at.Name == reached[0] {
				break
			}
			require.NotEqual(t, "none", at.Outline, "the focus is seen on %q", at.Name)
			reached = append(reached, at.Name)
		}
		require.Equal(t, "Skip to the peers", reached[0], "first of all")
		for _, name := range []string{"q", "show", "reload", "Show", "Peer", "Streams", "The same as JSON"} {
			require.Contains(t, reached, name)
		}
		require.True(t, slices.ContainsFunc(reached, func(name string) bool { return strings.HasSuffix(name, " streams") }), "a list of streams can be opened: %q", reached)
	})
	t.Run("screen reader", func(t *testing.T) {
		b.t = t
		for _, width := range []int{1280, 390} {
			b.look(width, "light")
			b.open(server.URL + "/full")
			roles := b.accessible()
			for role, least := range map[string]int{
				"banner": 1, "main": 1, "contentinfo": 1, "search": 1, "heading": 3, "table": 2, "columnheader": 5, "rowheader": 10, "textbox": 1, "combobox": 2,
			} {
				require.GreaterOrEqual(t, len(roles[role]), least, "%s, %d wide: %q", role, width, roles[role])
			}
			for _, role := range []string{"textbox", "combobox", "button", "link", "region", "table", "search", "heading", "columnheader"} {
				require.NotContains(t, roles[role], "", "each %s has a name", role)
			}
			require.Contains(t, roles["textbox"], "Peer ID contains")
			require.Contains(t, strings.Join(roles["StaticText"], "\n"), "limited relay only", "what the colour says stands there, too")
		}
		var sorted []string
		b.eval("[...document.querySelectorAll('th[aria-sort]')].map(e => e.innerText.trim() + ': ' + e.ariaSort)", &sorted)
		require.Equal(t, []string{"Peer: none", "Connection ▼: descending", "Streams: none", "Path: none"}, sorted)
	})
}

// accessible returns the names of what a screen reader finds, by role.
func (b *browser) accessible() map[string][]string {
	type value struct {
		Value any `json:"value"`
	}
	var tree struct {
		Nodes []struct {
			Ignored bool  `json:"ignored"`
			Role    value `json:"role"`
			Name    value `json:"name"`
		} `json:"nodes"`
	}
	b.call("Accessibility.getFullAXTree", nil, &tree)
	roles := make(map[string][]string)
	for _, n := range tree.Nodes {
		if !n.Ignored {
			role := fmt.Sprint(n.Role.Value)
			roles[role] = append(roles[role], cmp.Or(fmt.Sprint(n.Name.Value), ""))
		}
	}
	return roles
}

// unreadable is the text of which the contrast with what is behind it is less than WCAG's AA
// wants.
const unreadable = `(() => {
  const rgb = c => c.match(/[\d.]+/g).map(Number);
  const light = c => { const [r, g, b] = rgb(c).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if ((rgb(c)[3] ?? 1) > 0) return c; } return 'rgb(255,255,255)'; };
  const bad = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !e.checkVisibility()) continue;
    const a = light(getComputedStyle(e).color), b = light(behind(e));
    const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (contrast < 4.5) bad.push(walk.currentNode.data.trim() + ': ' + contrast.toFixed(2));
  }
  return bad;
})()`
