// Draining: docs/protocol.md, section 8. Both roles.
import { randomBytes } from 'node:crypto'
import { Raw } from './raw.js'

export const DRAIN = '/portage/drain/2.0.0'
const LIMITS = { maxInboundStreams: 64, maxOutboundStreams: 64, runOnLimitedConnection: true }
const PING = '/ipfs/ping/1.0.0'
const REQUEST = 5000
const SUPPLANTED = 0x1004 // a code of connections
const INSTANCE = randomBytes(8).readBigUInt64LE() || 1n // which process this is
const sleep = ms => new Promise(resolve => setTimeout(resolve, ms).unref())
const exempt = stream => [PING, DRAIN, '/ipfs/id/1.0.0', '/ipfs/id/push/1.0.0'].includes(stream.protocol)

export class Drainer {
  // settle: how long a second connection is left alone. quiet: how long none must have had a
  // stream. others: when the streams are moved that the peer has not moved. takeover: when a
  // follower decides after all. All in ms. prefer orders connections, the best one first.
  constructor (peer, { settle = 500, quiet = 2000, others = 3000, takeover = 10000, prefer = (a, b) => b.timeline.open - a.timeline.open } = {}) {
    Object.assign(this, { peer, settle, quiet, others, takeover, prefer })
    this.states = new Map() // of connections, by ID: lease, asking, closing, busy (when it last carried something)
    this.kept = new Map() // of peers: the connection that is kept, and by whom
    this.deciding = new Set() // peers
    this.busy = this.split = 0 // how often Busy was answered, by either side, and replicas were found
  }

  async start () {
    const { node } = this.peer
    await node.handle(DRAIN, (stream, conn) => this.serve(stream, conn), LIMITS)
    node.addEventListener('connection:open', ({ detail }) => this.watch(detail))
    node.addEventListener('capabilities', ({ detail }) => { this.decide(detail.remotePeer).catch(err => this.log?.(`decide: ${err.message}`)) })
    for (const conn of node.getConnections()) this.watch(conn)
  }

  watch (conn) {
    if (this.states.has(conn.id)) return
    const state = { lease: 0, asking: false, busy: Date.now() }
    this.states.set(conn.id, state)
    conn.muxer.addEventListener('stream', ({ detail }) => detail.addEventListener('close', () => { if (!exempt(detail)) state.busy = Date.now() }))
    const look = setInterval(() => { if (conn.streams.some(s => s.protocol !== '' && !exempt(s))) state.busy = Date.now() }, 50)
    conn.addEventListener('close', () => {
      clearInterval(look)
      this.states.delete(conn.id)
    })
  }

  state (conn) { return this.states.get(conn.id) ?? { lease: Infinity, asking: false, closing: true, busy: Date.now() } }
  leased (conn) { return this.state(conn).lease > Date.now() }
  quietFor (conn) { return conn.streams.some(s => !exempt(s) && (s.direction === 'inbound' || s.protocol !== '')) ? -1 : Date.now() - this.state(conn).busy }
  drains (remote) { return this.peer.conns(remote).some(c => this.peer.capabilities.get(c.id)?.has(DRAIN)) }
  decides (remote) { return this.peer.lower(remote) && this.drains(remote) }

  // pick tells where a new stream to a peer belongs.
  pick (remote) {
    const all = this.peer.conns(remote).sort(this.prefer)
    const kept = this.kept.get(remote.toString())?.conn
    return all.find(c => c === kept) ?? all.find(c => !this.leased(c) && !this.state(c).asking) ?? all[0]
  }

  // ---- answers

  async serve (stream, conn) {
    const raw = new Raw(stream, conn)
    try {
      const { drain, keep } = await raw.readMessage('DrainMessage', 'drain', 'keep', 'hello')
      raw.sendMessage('DrainMessage', drain ? this.answerDrain(conn, drain) : keep ? this.answerKeep(conn) : { hello: { instance: INSTANCE } })
      raw.letGo()
    } catch (err) { raw.abort(err.code, err.message) }
  }

  answerKeep (conn) {
    const remote = conn.remotePeer
    if (this.decides(remote)) return { refused: { reason: 'this side decides' } }
    if (this.state(conn).closing) return { refused: { reason: 'this side is closing it' } }
    if (conn.limits && this.peer.conns(remote).some(c => !c.limits)) return { refused: { reason: 'it is limited' } }
    Object.assign(this.state(conn), { lease: 0, asking: false })
    this.kept.set(remote.toString(), { conn, by: 'peer' })
    setTimeout(() => this.moveAll(conn, s => s.opener))
    return { kept: {} }
  }

  answerDrain (conn, { lease }) {
    const remote = conn.remotePeer
    const state = this.state(conn)
    const refuse = reason => {
      state.lease = 0
      return { refused: { reason } }
    }
    const kept = this.kept.get(remote.toString())
    if (kept?.conn === conn) {
      if (this.decides(remote)) return refuse('this side decides, and keeps it')
      this.kept.delete(remote.toString()) // K1: who asks to lose it keeps it no more
    }
    // D4
    const others = this.peer.conns(remote).filter(c => c !== conn && !this.leased(c) && (!c.limits || conn.limits))
    if (!others.some(c => !this.state(c).asking)) {
      if (others.length === 0 || this.peer.lower(remote)) return refuse('nothing else could take its place')
      for (const c of others) this.state(c).asking = false
    }
    state.lease = Date.now() + Math.min(lease || 60, 600) * 1000
    const quiet = this.quietFor(conn)
    if (quiet >= this.quiet) return { drained: {} }
    this.busy++
    return { busy: quiet < 0 ? {} : { wait: this.quiet - quiet } }
  }

  // ---- requests

  async request (conn, message) {
    const answers = message.hello ? ['hello'] : message.keep ? ['kept', 'refused'] : ['drained', 'busy', 'refused']
    const answer = await this.ask(conn, DRAIN, raw => {
      raw.sendMessage('DrainMessage', message)
      raw.closeWrite()
      return raw.readMessage('DrainMessage', ...answers)
    })
    if (answer.busy) this.busy++
    return answer
  }

  answersPing (conn) {
    const sent = randomBytes(32)
    return this.ask(conn, PING, async raw => {
      raw.send(sent)
      await raw.need(sent.length)
      return sent.equals(raw.take(sent.length).subarray())
    }).catch(() => false)
  }

  // ask opens a stream for one question. It gives up after a while.
  async ask (conn, protocol, question) {
    const raw = new Raw(await conn.newStream(protocol, { ...LIMITS, signal: AbortSignal.timeout(REQUEST) }), conn)
    const timer = setTimeout(() => raw.abort(), REQUEST)
    try {
      const answer = await question(raw)
      raw.letGo()
      return answer
    } catch (err) {
      raw.abort(err.code, err.message)
      throw err
    } finally { clearTimeout(timer) }
  }

  // oneProcess tells whether connections lead to one process, as far as they say.
  async oneProcess (conns) {
    const instances = await Promise.all(conns.map(async c => {
      if (!(await this.peer.identified(c).catch(() => new Set())).has(DRAIN)) return 'none'
      const { hello } = await this.request(c, { hello: { instance: INSTANCE } }).catch(() => ({}))
      return hello?.instance || undefined
    }))
    return new Set(instances.filter(i => i !== undefined)).size <= 1
  }

  // decide runs where there is more than one connection to a peer.
  async decide (remote) {
    const key = remote.toString()
    if (this.deciding.has(key)) return
    this.deciding.add(key)
    try {
      let patience = this.takeover
      await sleep(this.settle)
      while (this.peer.conns(remote).length > 1 && this.drains(remote)) {
        if (!this.decides(remote)) {
          const before = this.peer.conns(remote).length
          await sleep(patience)
          if (this.kept.get(key)?.conn.status === 'open' || this.peer.conns(remote).some(c => this.leased(c)) || this.peer.conns(remote).length < before) continue
          patience *= 2
        }
        await this.round(remote, this.peer.conns(remote).sort((a, b) => Boolean(a.limits) - Boolean(b.limits) || this.prefer(a, b)))
        await sleep(1000)
      }
    } finally { this.deciding.delete(key) }
  }

  async round (remote, [kept, ...losers]) {
    const key = remote.toString()
    if (!await this.oneProcess([kept, ...losers])) return this.split++
    const answer = await this.request(kept, { keep: {} }).catch(err => ({ refused: { reason: err.message } }))
    this.log?.(`keep: ${Object.keys(answer)} ${answer.refused?.reason ?? ''}`)
    if (answer.refused) return
    Object.assign(this.state(kept), { lease: 0 })
    this.kept.set(key, { conn: kept, by: 'us' })
    setTimeout(() => { if (this.kept.get(key)?.conn === kept) this.moveAll(kept, () => true) }, this.others).unref()
    await Promise.all([this.moveAll(kept, s => s.opener), ...losers.map(c => this.lose(c, kept))])
  }

  async lose (conn, kept) {
    const state = this.state(conn)
    state.asking = true
    let pause = 1000
    let first = false // whether Drained has been answered once, and a ping behind it
    while (state.asking && conn.status === 'open' && kept.status === 'open') {
      const sent = Date.now()
      const answer = await this.request(conn, { drain: { lease: 60 } }).catch(() => ({ busy: {} }))
      this.log?.(`drain: ${Object.keys(answer)} ${answer.busy?.wait ?? ''} ${answer.refused?.reason ?? ''}`)
      if (answer.drained && this.quietFor(conn) >= this.quiet && this.state(conn).busy < sent) { // D2, D3
        if (!first) {
          first = await this.answersPing(kept)
          if (!first) await sleep(pause)
          continue
        }
        if (!state.asking || this.leased(kept)) break
        state.closing = true
        await conn.close({ reason: SUPPLANTED }).catch(err => conn.abort(err))
        return
      }
      first = false
      const wait = answer.refused ? pause : Math.min(answer.busy?.wait || Math.max(this.quiet - this.quietFor(conn), 100), 5000)
      if (answer.refused) pause = Math.min(pause * 2, 60000)
      await sleep(wait)
    }
    state.asking = false
  }

  // moveAll moves the labelled streams of other connections that are chosen. A stream that
  // cannot be moved is tried again, with growing pauses (S9).
  async moveAll (to, chosen) {
    const streams = new Set(this.peer.table(to.remotePeer).streams.values())
    await Promise.all([...streams].filter(s => s.conn !== to && chosen(s)).map(async s => {
      for (let pause = 100; to.status === 'open' && this.kept.get(to.remotePeer.toString())?.conn === to; pause *= 2) {
        const result = await this.peer.migrate(s, to)
        if (['moved', 'denied', 'over'].includes(result)) return
        await sleep(pause)
      }
    }))
  }
}
