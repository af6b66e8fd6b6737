// A logical stream: what the application holds. Rules are those of docs/protocol.md.
import { Uint8ArrayList } from 'uint8arraylist'
import { Violation } from './codec.js'

const HIGH = 1024 * 1024 // what is kept for an application that does not read, or does not wait
const CHUNK = 64 * 1024

// An exchange is one attempt to migrate: opening, asked, committed, over.
export class Exchange {
  constructor (role, from, id) {
    Object.assign(this, { role, from, id, phase: 'opening' })
    this.done = new Promise(resolve => { this.resolve = resolve })
  }
}

export class Logical {
  constructor (raw, { label, protocol, remote, opener, table }) {
    Object.assign(this, { label, protocol, remote, opener, table })
    this.tx = this.rx = raw
    this.out = new Uint8ArrayList() // written by the application, not handed to tx yet
    this.base = raw.sent // bytes of tx that are not the application's
    this.inbox = new Uint8ArrayList() // read from rx, not by the application yet
    this.got = 0 // bytes of the application that were read from rx
    this.paused = this.wclosed = this.finSent = this.rclosed = false
    this.held = this.suspect = this.denied = this.over = false
    this.rend = undefined // how reading has ended: 'eof', or an error
    this.werr = undefined
    this.next = undefined // where to go on reading: the new stream, and the final size of rx
    this.x = undefined
    this.readers = []
    this.writers = []
    this.table?.add(label, this)
    raw.onchange = () => this.changed()
    this.changed()
  }

  get conn () { return this.tx.conn }

  // ---- the application's side

  // read returns bytes, null at the end, or throws.
  async read () {
    for (;;) {
      if (this.inbox.byteLength > 0) {
        const bytes = this.inbox.sublist()
        this.inbox.consume(bytes.byteLength)
        this.pull()
        return bytes.subarray()
      }
      if (this.rend === 'eof') return null
      if (this.rend !== undefined) throw this.rend
      if (this.rclosed) throw new Error('reading was closed')
      const woken = new Promise(resolve => this.readers.push(resolve))
      this.changed()
      await woken
    }
  }

  // write waits until there is room for more.
  async write (bytes) {
    if (this.werr !== undefined) throw this.werr
    if (this.wclosed) throw new Error('writing was closed')
    this.out.append(bytes)
    await new Promise((resolve, reject) => {
      this.writers.push({ resolve, reject })
      this.changed()
    })
  }

  closeWrite () {
    this.wclosed = true
    this.changed()
  }

  close () {
    this.wclosed = this.rclosed = true
    this.inbox.consume(this.inbox.byteLength)
    if (this.x === undefined) this.end() // else when the migration has ended: S7
    this.changed()
  }

  reset (code = 0) { this.fail(new Error('the stream was reset here'), code) }

  // ---- both halves

  changed () {
    const x = this.x
    if (x?.phase === 'committed' && x.raw.err !== undefined) return this.fail(x.raw.err)
    this.pull()
    if (x?.proof?.() && !x.written && this.x === x) this.switchWriting(x)
    this.pump()
    if (this.rx.wasReset && this.x === undefined && !this.over) this.fail(this.rx.err)
  }

  wakeReaders () { for (const resolve of this.readers.splice(0)) resolve() }

  wakeWriters () {
    if (this.werr !== undefined) for (const { reject } of this.writers.splice(0)) reject(this.werr)
    else if (this.out.byteLength < HIGH) for (const { resolve } of this.writers.splice(0)) resolve()
  }

  // end: the stream has ended at this side, and its labels die (L5).
  end () {
    if (this.over) return
    this.over = true
    this.table?.end(this.label)
  }

  // fail resets everything, before the application is told (S8).
  fail (err, code = 0) {
    const x = this.x
    for (const raw of new Set([x?.raw, this.next?.raw, this.tx, this.rx])) raw?.abort(code, err.message)
    this.x = this.next = undefined
    this.rend = this.rend === 'eof' ? 'eof' : err
    this.werr = err
    this.out.consume(this.out.byteLength)
    if (x) this.table.end(x.id)
    this.end()
    this.wakeReaders()
    this.wakeWriters()
    x?.resolve('failed')
  }

  // ---- the sending half

  pump () {
    if (this.pumping) return
    this.pumping = true
    const tx = this.tx
    while (this.out.byteLength > 0 && tx.room > 0) {
      const n = Math.min(CHUNK, this.out.byteLength, tx.room)
      const chunk = this.out.sublist(0, n)
      this.out.consume(n)
      tx.send(chunk)
    }
    if (this.out.byteLength === 0 && this.wclosed && !this.finSent && tx.idle) {
      this.finSent = true
      tx.closeWrite()
    }
    this.pumping = false
    const kept = this.x !== undefined && !this.x.draft // errors of writes: S5
    if (tx.err !== undefined && !kept && this.writers.length > 0) {
      this.werr ??= tx.err
      this.end()
    }
    this.wakeWriters()
  }

  // switchWriting goes on with the new stream (S2). In a verified handover the new stream begins
  // with how many bytes were sent on the old one.
  switchWriting (x) {
    const old = this.tx
    if (!x.draft) x.raw.sendMessage('StreamMigration', { final_size: { size: BigInt(old.sent - this.base) } })
    this.tx = x.raw
    this.base = x.raw.sent
    this.finSent = false
    if (!old.dead) old.closeWrite()
    x.written = true
    this.pump()
    this.maybeEnd(x)
  }

  // ---- the receiving half

  pull () {
    for (;;) {
      const { rx, next } = this
      const left = next?.size === undefined ? Infinity : next.size - this.got
      const room = this.rclosed || next !== undefined ? Infinity : HIGH - this.inbox.byteLength
      const n = Math.min(rx.buf.byteLength, left, room)
      if (n > 0) {
        const bytes = rx.take(n)
        this.got += n
        if (this.rend === 'eof') return this.fail(new Violation('data behind the end')) // S11
        if (!this.rclosed) this.inbox.append(bytes)
        continue
      }
      if (next?.size !== undefined) { // verified: S12
        if (this.got === next.size || this.rclosed) { this.switchReading(); continue }
        if (rx.ended || rx.failed) return this.fail(rx.err ?? new Error('the old stream ended before its final size'))
      } else if (next !== undefined) { // draft-only: the end of the old stream is the switch
        if (rx.ended && rx.eofOfDead) return this.fail(new Error('an end of a connection that is closed'))
        if (rx.ended) { this.switchReading(); continue }
        if (rx.failed) return this.fail(rx.err)
      } else if (!this.held && this.rend === undefined) {
        if (rx.ended && this.suspect && this.finSent) this.rend = new Error('an end that may be no end') // S5, Appendix A
        else if (rx.ended) this.rend = 'eof'
        else if (rx.failed && (this.readers.length > 0 || rx.wasReset)) {
          this.rend = rx.err
          this.end()
        }
      }
      break
    }
    if (this.inbox.byteLength > 0 || this.rend !== undefined || this.rclosed) this.wakeReaders()
  }

  switchReading () {
    const x = this.x
    this.rx = this.next.raw
    this.next = undefined
    this.held = false
    this.got = 0
    x.read = true
    this.maybeEnd(x)
  }

  // ---- what an exchange does

  // release: there was no ack. The end of the old stream is the application's again.
  release (x, result) {
    if (this.x !== x) return
    this.table.drop(x.id)
    this.x = undefined
    this.held = false
    if (this.wclosed && this.rclosed) this.end()
    this.changed()
    x.resolve(result)
  }

  commit (x) {
    x.phase = 'committed'
    x.old = this.tx
    x.raw.onchange = () => this.changed()
  }

  readFrom (x, size) {
    this.next = { raw: x.raw, size: size === undefined ? undefined : Number(size) }
    this.changed()
  }

  maybeEnd (x) {
    if (!x.read || !x.written || this.x !== x) return
    this.table.end(this.label)
    this.label = x.id
    x.old.letGo()
    this.x = undefined
    this.suspect = false
    if (this.wclosed && this.rclosed) this.end()
    x.resolve('moved')
    queueMicrotask(() => this.changed())
  }
}
