// One underlying stream: a js-libp2p stream with what a migration has to know about it, namely
// how many bytes were sent, how many more there is room for, and whether its end is an end.
import { Uint8ArrayList } from 'uint8arraylist'
import { MAX_MESSAGE, Violation, decode, encode, parseVarint } from './codec.js'

const PAUSE = 256 * 1024 // what is kept unread before the muxer's window does the rest
const RST = 8

export class Raw {
  constructor (stream, conn) {
    this.stream = stream
    this.conn = conn
    this.buf = new Uint8ArrayList()
    this.sent = this.received = 0 // bytes
    this.eof = false
    this.err = undefined
    this.waiters = []
    this.onchange = undefined
    this.discarding = false

    // In Yamux the length of a frame that resets a stream is the error code. js-libp2p sends 0, and
    // does not look at what comes. Nor does it tell when there is room again.
    const handle = stream.handleWindowUpdate.bind(stream)
    stream.handleWindowUpdate = frame => {
      if (frame.header.flag & RST) stream.resetCode = frame.header.length
      handle(frame)
      queueMicrotask(() => this.changed())
    }
    stream.sendReset = err => stream.sendFrame({ type: 1, flag: RST, streamID: stream.streamId, length: err?.code ?? 0 })
    stream.addEventListener('message', e => {
      this.received += e.data.byteLength
      if (!this.discarding) this.buf.append(e.data)
      // Not at once: js-libp2p would open the window all the same, where it is just resuming.
      queueMicrotask(() => { if (this.buf.byteLength > PAUSE) this.pause(true) })
      this.changed()
    })
    // The only sign of an end that the other side has sent. That a stream closes says nothing:
    // it does so without an error, too, when its connection goes down.
    // It may have come while the first tokens were negotiated.
    if (stream.status === 'open' && stream.remoteWriteStatus === 'closed') this.eof = true
    if (stream.status !== 'open') this.err = new Error('the stream was closed in its negotiation')
    stream.addEventListener('remoteCloseWrite', () => {
      this.eof = true
      this.eofOfDead = conn.status !== 'open'
      this.changed()
    })
    stream.addEventListener('close', e => {
      if (e.error) this.err = Object.assign(e.error, { code: stream.resetCode })
      else if (!this.eof) this.err = new Error('the connection of the stream was closed')
      this.wasReset = e.error?.name === 'StreamResetError'
      this.changed()
    })
    for (const event of ['drain', 'idle']) stream.addEventListener(event, () => queueMicrotask(() => this.changed()))
  }

  get complete () { return this.stream.readBufferLength === 0 || this.stream.status === 'aborted' } // nothing more comes to buf
  get ended () { return this.eof && this.complete && this.buf.byteLength === 0 }
  get failed () { return this.err !== undefined && this.complete && this.buf.byteLength === 0 }
  get dead () { return this.err !== undefined || this.stream.writeStatus !== 'writable' }
  get idle () { return !this.dead && this.stream.writeBufferLength === 0 && !this.stream.writableNeedsDrain }
  get room () { return this.idle ? Math.min(this.stream.sendWindowCapacity, this.stream.maxMessageSize) : 0 } // for bytes that leave at once

  changed () {
    this.onchange?.()
    for (const wake of this.waiters.splice(0)) wake()
  }

  pause (on) {
    try {
      if (on) this.stream.pause()
      else this.stream.resume()
    } catch {} // it has ended
  }

  take (n) {
    const bytes = this.buf.sublist(0, n)
    this.buf.consume(n)
    // Not at once: it delivers what is there, and the caller has yet to do something with these.
    if (this.buf.byteLength <= PAUSE / 2 && this.stream.readStatus === 'paused') queueMicrotask(() => this.pause(false))
    return bytes
  }

  // need waits until n bytes are there.
  async need (n) {
    while (this.buf.byteLength < n) {
      if (this.err !== undefined && this.complete) throw this.err
      if (this.eof && this.complete) throw new Error('the stream ended')
      await new Promise(resolve => this.waiters.push(resolve))
    }
  }

  async readPrefixed () {
    for (let n = 1; ; n++) {
      await this.need(n)
      const length = parseVarint(this.buf.subarray(0, Math.min(this.buf.byteLength, 10)))
      if (length === undefined) continue
      if (length.value > BigInt(MAX_MESSAGE)) throw new Violation('a message of more than 1024 bytes')
      const size = Number(length.value)
      await this.need(length.end + size)
      return this.take(length.end + size).subarray(length.end)
    }
  }

  // readMessage reads one message, which has to have one of the members named.
  async readMessage (type, ...members) {
    const message = decode(type, await this.readPrefixed())
    if (!members.some(name => name in message)) throw new Violation(`got ${Object.keys(message)}, expected ${members}`)
    return message
  }

  async readToken () {
    const text = new TextDecoder().decode(await this.readPrefixed())
    if (!text.endsWith('\n')) throw new Violation('a token without a line feed')
    return text.slice(0, -1)
  }

  send (bytes) {
    this.sent += bytes.byteLength
    try {
      this.stream.send(bytes)
    } catch {} // it has been closed, which is told by an event
  }

  sendMessage (type, message) { this.send(encode(type, message)) }

  closeWrite () { this.stream.close().catch(() => {}) }

  // letGo closes the stream at this side. What still comes is thrown away.
  letGo () {
    this.onchange = undefined
    this.discarding = true
    this.buf.consume(this.buf.byteLength)
    this.pause(false)
    if (!this.dead) this.closeWrite()
  }

  abort (code = 0, reason = 'reset') { this.stream.abort(Object.assign(new Error(reason), { code })) }
}
