package main

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/term"
)

// console is what the demo says while it runs: notes, the logs of the hosts, and
// how far the transfer is. On a terminal that is a bar below the lines, and else a
// line now and then. It is safe for concurrent use.
type console struct {
	size int64

	mu  sync.Mutex
	out io.Writer
	bar *progressbar.ProgressBar // nil: none, or not now
}

const (
	barPause  = 100 * time.Millisecond
	linePause = 500 * time.Millisecond
)

func newConsole(out io.Writer, size int64) *console {
	return &console{out: out, size: size}
}

// Write writes lines above the bar.
func (c *console) Write(lines []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.bar != nil {
		c.bar.Clear()
	}
	return c.out.Write(lines)
}

// say writes a note.
func (c *console) say(format string, args ...any) {
	fmt.Fprintf(c, format+"\n", args...)
}

// logger returns a logger for the host of one side.
func (c *console) logger(who side, verbose bool) *zap.Logger {
	level := zap.InfoLevel
	if verbose {
		level = zap.DebugLevel
	}
	form := zapcore.EncoderConfig{
		TimeKey:          "T",
		LevelKey:         "L",
		NameKey:          "N",
		MessageKey:       "M",
		ConsoleSeparator: "  ",
		EncodeTime:       zapcore.TimeEncoderOfLayout("15:04:05.000"),
		EncodeLevel:      zapcore.LowercaseLevelEncoder,
		EncodeDuration:   zapcore.StringDurationEncoder,
	}
	core := zapcore.NewCore(zapcore.NewConsoleEncoder(form), zapcore.AddSync(c), level)
	return zap.New(core).Named(string(who))
}

// progress shows how far the transfer is until the returned function is called.
func (c *console) progress(rec *recorder) (stop func()) {
	pause, show := linePause, c.line
	if file, ok := c.out.(*os.File); ok && term.IsTerminal(int(file.Fd())) {
		pause, show = barPause, c.advance
		c.mu.Lock()
		c.bar = progressbar.NewOptions64(c.size,
			progressbar.OptionSetWriter(c.out),
			progressbar.OptionShowBytes(true),
			progressbar.OptionUseIECUnits(true),
			progressbar.OptionSetPredictTime(false),
			progressbar.OptionSetWidth(30),
		)
		c.mu.Unlock()
	}
	quit := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		ticker := time.NewTicker(pause)
		defer ticker.Stop()
		for {
			select {
			case <-ticker.C:
				show(rec.progress())
			case <-quit:
				return
			}
		}
	})
	return func() {
		close(quit)
		wg.Wait()
		show(rec.progress())
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.bar != nil {
			fmt.Fprintln(c.out)
			c.bar = nil
		}
	}
}

func (c *console) line(arrived int64, since time.Duration, route path) {
	c.say("%5.1f s  %9s of %s arrived  (%s)", since.Seconds(), formatSize(arrived), formatSize(c.size), route.title())
}

func (c *console) advance(arrived int64, _ time.Duration, route path) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.bar.Describe(fmt.Sprintf("%-7s", route.title()))
	c.bar.Set64(min(arrived, c.size))
}
