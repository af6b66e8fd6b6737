package migrate

import "bytes"

// chunks is a queue of bytes. Its zero value is empty. However small the pieces in which a
// peer sends, the queue holds what has been reserved for it, and one buffer at each end.
type chunks struct {
	list [][]byte
	len  int
}

// add takes b over, unless there was room for all of it: then b is the caller's again.
func (c *chunks) add(b []byte) (taken bool) {
	c.len += len(b)
	if i := len(c.list) - 1; i >= 0 {
		last := c.list[i]
		n := copy(last[len(last):cap(last)], b)
		c.list[i] = last[:len(last)+n]
		b = b[:copy(b, b[n:])]
	}
	if len(b) > 0 {
		c.list = append(c.list, b)
	}
	return len(b) > 0
}

// append takes over what is in other. It copies no more than what is in one buffer.
func (c *chunks) append(other *chunks) {
	if i := len(c.list) - 1; i >= 0 && other.len > 0 && len(c.list[i]) < cap(c.list[i]) {
		c.list[i] = bytes.Clone(c.list[i]) // its room will not be used any more
	}
	c.list, c.len = append(c.list, other.list...), c.len+other.len
	*other = chunks{}
}

func (c *chunks) take(p []byte) (n int) {
	for n < len(p) && c.len > 0 {
		m := copy(p[n:], c.list[0])
		n += m
		c.len -= m
		if m == len(c.list[0]) {
			c.list[0] = nil
			c.list = c.list[1:]
		} else {
			c.list[0] = c.list[0][m:]
		}
	}
	if c.len == 0 {
		c.list = nil
	}
	return n
}
