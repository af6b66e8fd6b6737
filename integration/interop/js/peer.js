// A libp2p host with labelled streams that move: docs/protocol.md, sections 1 to 6 and Appendix A.
import './polyfill.js'
import { randomInt } from 'node:crypto'
import { identify, identifyPush } from '@libp2p/identify'
import { noise } from '@libp2p/noise'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { yamux } from '@libp2p/yamux'
import { createLibp2p } from 'libp2p'
import { HEADER, Violation, concat, encode, token } from './codec.js'
import { Exchange, Logical } from './logical.js'
import { Raw } from './raw.js'

export const MIGRATION = '/libp2p/stream-migration'
export const FINAL_SIZE = '/portage/final-size/1.0.0'
const LIMITS = { maxInboundStreams: 4096, maxOutboundStreams: 4096, runOnLimitedConnection: true }
const NEGOTIATION = 10000
const LABEL_WAIT = 5000 // L4
const LABEL_WAITING = 256
const TURN_WAIT = 10000 // M2
const ENDED = 1024 // labels remembered that have ended

const below = (a, b) => Buffer.compare(a.toMultihash().bytes, b.toMultihash().bytes) < 0
const late = ms => new Promise(resolve => setTimeout(resolve, ms, 'late').unref())

// The labels that two peers share.
class Table {
  constructor () {
    this.streams = new Map()
    this.taken = new Set() // labels of openings that are being negotiated
    this.ended = new Set()
    this.waiting = []
  }

  has (label) { return this.streams.has(label) || this.taken.has(label) }

  add (label, stream) {
    this.streams.set(label, stream)
    for (const wake of this.waiting.splice(0)) wake()
  }

  drop (label) { this.streams.delete(label) }

  end (label) {
    this.drop(label)
    this.ended.add(label)
    if (this.ended.size > ENDED) this.ended.delete(this.ended.values().next().value)
  }

  // find waits for a label that is not known yet (L4).
  async find (label) {
    const timeout = late(LABEL_WAIT)
    while (!this.streams.has(label) && !this.ended.has(label)) {
      if (this.waiting.length >= LABEL_WAITING) throw new Error('too many wait for a label')
      const added = new Promise(resolve => this.waiting.push(resolve))
      if (await Promise.race([added, timeout]) === 'late') break
    }
    return this.streams.get(label)
  }
}

export class Peer {
  // draftOnly: without the verified handover. accept: whether a migration is accepted.
  // count: where labels begin to count.
  constructor ({ privateKey, draftOnly = false, listen = ['/ip4/127.0.0.1/tcp/0'], accept = () => true, count = randomInt(2 ** 32) } = {}) {
    Object.assign(this, { privateKey, draftOnly, listen, accept, count: BigInt(count) })
    this.tables = new Map()
    this.handlers = new Map()
    this.capabilities = new Map() // of connections, by ID
  }

  async start () {
    this.node = await createLibp2p({
      privateKey: this.privateKey,
      addresses: { listen: this.listen },
      transports: [tcp()],
      connectionEncrypters: [noise()],
      streamMuxers: [yamux({ streamOptions: { maxStreamWindowSize: 1024 * 1024 } })],
      connectionManager: { inboundConnectionThreshold: 1000, maxParallelDials: 100, reconnectRetries: 0 },
      connectionMonitor: { enabled: false },
      services: { identify: identify(), push: identifyPush(), ping: ping() }
    })
    this.node.addEventListener('peer:identify', ({ detail }) => {
      this.capabilities.set(detail.connection.id, new Set(detail.protocols))
      this.node.safeDispatchEvent('capabilities', { detail: detail.connection })
    })
    this.node.addEventListener('connection:close', ({ detail }) => this.capabilities.delete(detail.id))
    await this.node.handle(MIGRATION, (stream, conn) => this.accepted(stream, conn), LIMITS)
    if (!this.draftOnly) await this.node.handle(FINAL_SIZE, stream => stream.abort(new Violation('it is only advertised')))
  }

  lower (remote) { return below(this.node.peerId, remote) }

  // L1: the lower peer gives even labels.
  ours (remote, label) { return (label & 1n) === (this.lower(remote) ? 0n : 1n) }

  nextLabel (remote) {
    for (;;) {
      const label = BigInt.asUintN(64, this.count++ << 1n | (this.lower(remote) ? 0n : 1n))
      if (!this.table(remote).has(label)) return label
    }
  }

  table (remote) {
    const key = remote.toString()
    if (!this.tables.has(key)) this.tables.set(key, new Table())
    return this.tables.get(key)
  }

  conns (remote) { return this.node.getConnections(remote).filter(c => c.status === 'open') }

  // identified tells what the other end of a connection advertises, once identify has.
  async identified (conn, ms = 5000) {
    const timeout = late(ms)
    while (!this.capabilities.has(conn.id)) {
      if (conn.status !== 'open') throw new Error('the connection is closed')
      const told = new Promise(resolve => this.node.addEventListener('capabilities', resolve, { once: true }))
      if (await Promise.race([told, timeout]) === 'late') throw new Error('identify has not answered')
    }
    return this.capabilities.get(conn.id)
  }

  verifies (conn) { return this.capabilities.get(conn.id)?.has(FINAL_SIZE) ?? false }

  async handle (protocol, handler) {
    this.handlers.set(protocol, handler)
    await this.node.handle(protocol, (stream, conn) => {
      this.serve(handler, new Logical(new Raw(stream, conn), { protocol, remote: conn.remotePeer, opener: false }))
    }, LIMITS)
  }

  serve (handler, stream) {
    Promise.resolve(handler(stream)).catch(() => stream.reset())
  }

  // ---- opening: section 3

  async open (conn, protocols) {
    protocols = [protocols].flat()
    const remote = conn.remotePeer
    if (!(await this.identified(conn)).has(MIGRATION)) {
      const stream = await conn.newStream(protocols, LIMITS)
      return new Logical(new Raw(stream, conn), { protocol: stream.protocol, remote, opener: true })
    }
    const raw = new Raw(await conn.newStream(MIGRATION, LIMITS), conn)
    const table = this.table(remote)
    const label = this.nextLabel(remote)
    table.taken.add(label)
    try {
      raw.send(concat(encode('StreamMigration', { label: { id: label } }), token(HEADER), token(protocols[0])))
      if (await raw.readToken() !== HEADER) throw new Violation('an answer without the header')
      for (let i = 0; ; i++) {
        const answer = await raw.readToken()
        if (answer === protocols[i]) return new Logical(raw, { label, protocol: answer, remote, opener: true, table })
        if (answer !== 'na' || i + 1 === protocols.length) throw new Error(`no protocol of ${protocols}: ${answer}`)
        raw.send(token(protocols[i + 1]))
      }
    } catch (err) {
      raw.abort(err.code, err.message)
      throw err
    } finally { table.taken.delete(label) }
  }

  async accepted (stream, conn) {
    const raw = new Raw(stream, conn)
    try {
      const opening = this.acceptOpening(raw, conn)
      opening.catch(() => {})
      const then = await Promise.race([opening, late(NEGOTIATION)])
      if (then === 'late') throw new Error('the negotiation took too long')
      await then()
    } catch (err) {
      raw.abort(err.code, err.message)
    }
  }

  // acceptOpening reads what a stream is for, and returns what is to be done with it.
  async acceptOpening (raw, conn) {
    const remote = conn.remotePeer
    const table = this.table(remote)
    const { label, migrate } = await raw.readMessage('StreamMigration', 'label', 'migrate')
    const { id } = label ?? migrate
    if (this.ours(remote, id)) throw new Violation('a label of the wrong parity')
    if (table.has(id)) throw new Violation('a label that is alive')
    if (migrate) return () => this.migrationAsked(raw, conn, migrate)

    table.taken.add(id)
    try {
      if (await raw.readToken() !== HEADER) throw new Violation('no header behind a label')
      raw.send(token(HEADER))
      for (;;) {
        const protocol = await raw.readToken()
        if (protocol === MIGRATION) throw new Violation('a nested label')
        const handler = this.handlers.get(protocol)
        raw.send(token(handler ? protocol : 'na'))
        if (!handler) continue
        const stream = new Logical(raw, { label: id, protocol, remote, opener: false, table })
        return () => this.serve(handler, stream)
      }
    } finally { table.taken.delete(id) }
  }

  // ---- migrating: the initiator

  // migrate makes one attempt, and tells how that ended: moved, denied, over (the stream has
  // ended), met (the other end's attempt goes first), or failed.
  async migrate (s, conn) {
    while (s.x !== undefined) await s.x.done
    if (s.label === undefined || s.over) return 'over'
    if (s.denied) return 'denied'
    if (s.conn === conn) return 'moved'
    const { table, remote } = s
    const x = new Exchange('initiator', s.label, this.nextLabel(remote))
    const verifies = this.verifies(conn) && !this.draftOnly
    x.draft = !verifies
    s.x = x
    table.taken.add(x.id)
    try {
      x.raw = new Raw(await conn.newStream(MIGRATION, LIMITS), conn)
    } catch (err) {
      s.release(x, 'failed')
      return 'failed'
    } finally { table.taken.delete(x.id) }
    if (s.x !== x) {
      x.raw.abort()
      return x.done
    }
    s.held = true
    table.add(x.id, s)
    x.phase = 'asked'
    let ack
    try {
      x.raw.sendMessage('StreamMigration', { migrate: { id: x.id, from: x.from, ...(this.draftOnly ? {} : { final_size: true }) } })
      ack = (await x.raw.readMessage('StreamMigration', 'ack_migrate')).ack_migrate
    } catch (err) { // S9
      x.raw.abort(err.code, err.message)
      if (s.x === x && !verifies) s.suspect = true
      s.release(x, 'failed')
      return x.done
    }
    if (s.x !== x) return x.done
    if (ack.deny_migrate) { // M3
      s.denied = true
      x.raw.letGo()
      s.release(x, 'denied')
      return 'denied'
    }
    x.draft = this.draftOnly || !ack.final_size
    s.commit(x)
    if (x.draft && verifies) s.fail(new Violation('an ack without final_size'), 0x1004)
    if (s.x !== x) return x.done
    s.switchWriting(x)
    await this.goOnReading(s, x)
    return x.done
  }

  async goOnReading (s, x) {
    if (x.draft) return s.readFrom(x)
    try {
      const { final_size: { size } } = await x.raw.readMessage('StreamMigration', 'final_size')
      if (s.x === x) s.readFrom(x, size)
    } catch (err) {
      if (s.x === x) s.fail(err, err.code)
    }
  }

  // ---- migrating: the responder

  async migrationAsked (raw, conn, { id, from, final_size: verified }) {
    const remote = conn.remotePeer
    const table = this.table(remote)
    const draft = this.draftOnly || !verified
    if (raw.buf.byteLength > 0) throw new Violation('something behind Migrate, before the ack')
    const begun = raw.received
    const deny = () => {
      raw.sendMessage('StreamMigration', { ack_migrate: { deny_migrate: true } })
      raw.letGo()
    }
    const s = await table.find(from)
    if (s === undefined) return deny()
    const denies = () => s.over || (s.wclosed && s.rclosed) || (draft && (s.rclosed || s.rend instanceof Error)) || !this.accept(s, conn)
    const timeout = late(TURN_WAIT)
    for (let own; (own = s.x) !== undefined;) {
      if (own.role === 'initiator' && own.phase !== 'committed' && own.from === from) { // M1
        if (denies()) return deny()
        if (own.phase === 'asked' && this.lower(remote)) throw new Error('the attempt of this side goes first')
        break
      }
      if (await Promise.race([own.done, timeout]) === 'late') throw new Error('the last migration has not ended') // M2
    }
    if (s.x === undefined && s.label !== from && !s.over) throw new Error('the stream has moved')
    if (raw.received > begun) throw new Violation('something behind Migrate, before the ack')
    if (denies()) return deny()
    if (table.has(id)) throw new Violation('a label that is alive')

    if (raw.dead) return
    const x = new Exchange('responder', from, id)
    x.draft = draft
    x.raw = raw
    const own = s.x
    const ended = s.rend === 'eof' || s.rx.ended
    s.held = true // S1
    s.x = x
    if (own !== undefined) {
      table.drop(own.id)
      own.raw?.abort(0, 'the attempt of the other side goes first')
      own.resolve('met')
    }
    table.add(id, s)
    s.commit(x)
    raw.sendMessage('StreamMigration', { ack_migrate: draft ? {} : { final_size: true } })
    if (!draft) {
      await this.goOnReading(s, x)
      if (s.x === x) s.switchWriting(x)
      return
    }
    // S3 of Appendix A: the ack has arrived when the old stream ends, or the new one begins.
    x.proof = ended ? () => raw.received > begun || (raw.eof && !raw.eofOfDead) : () => x.read
    s.readFrom(x)
  }
}
