// The peer against docs/vectors.json: messages, and what two such peers send to each other.
import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { test } from 'node:test'
import { MIGRATION, Peer } from './peer.js'
import { HEADER, MAX_MESSAGE, decode, encode, parseVarint, token } from './codec.js'
import { generateKeyPair } from '@libp2p/crypto/keys'

const vectors = JSON.parse(readFileSync(new URL('../../../docs/vectors.json', import.meta.url)))
const unhex = text => Uint8Array.from(Buffer.from((text ?? '').replaceAll(' ', ''), 'hex'))
const hex = bytes => Buffer.from(bytes).toString('hex')
const plain = message => JSON.parse(JSON.stringify(message, (_, v) => typeof v === 'bigint' ? String(v) : v))

function split (bytes) {
  const length = parseVarint(bytes)
  if (length.value > BigInt(MAX_MESSAGE)) throw new Error('too long')
  return bytes.subarray(length.end)
}

for (const v of vectors.messages) {
  test(`message: ${v.type}, ${v.name}`, () => {
    const message = decode(v.type, split(unhex(v.bytes)))
    assert.deepEqual(plain(message), v.message)
    if (!v.only_read) assert.equal(hex(encode(v.type, message)), hex(unhex(v.bytes)))
  })
}

for (const v of vectors.refused) {
  test(`refused: ${v.type}, ${v.name}`, () => assert.throws(() => decode(v.type, split(unhex(v.bytes)))))
}

// record notes what each side sends on each stream.
function record (stream, log) {
  const proto = Object.getPrototypeOf(stream)
  const { sendData, sendCloseWrite, abort } = proto
  const note = (s, entry) => log.set(s, [...(log.get(s) ?? []), entry])
  proto.sendData = function (data) {
    const bytes = data.subarray().slice()
    const result = sendData.call(this, data)
    note(this, hex(bytes.subarray(0, result.sentBytes)))
    return result
  }
  proto.sendCloseWrite = function (options) {
    note(this, 'end')
    return sendCloseWrite.call(this, options)
  }
  proto.abort = function (err) {
    if (this.status === 'open') note(this, 'reset')
    return abort.call(this, err)
  }
  return () => Object.assign(proto, { sendData, sendCloseWrite, abort })
}

async function pair (v) {
  const [a, b] = (await Promise.all([generateKeyPair('Ed25519'), generateKeyPair('Ed25519')]))
    .sort((x, y) => Buffer.compare(x.publicKey.toMultihash().bytes, y.publicKey.toMultihash().bytes))
  const init = side => ({ draftOnly: v.draft_only === side, accept: () => v.denies !== side })
  const first = 19088744 / 2
  const A = new Peer({ privateKey: a, count: first, ...init('A') })
  const B = new Peer({ privateKey: b, count: first + 1, ...init('B') })
  await Promise.all([A.start(), B.start()])
  const connections = []
  for (let i = 0; i < 2; i++) {
    const c = await A.node.dial(B.node.getMultiaddrs(), { force: true })
    const other = () => B.node.getConnections().find(d => d.remoteAddr.toString().split('/')[4] === c.maConn.socket?.localPort?.toString())
    await until(() => other() !== undefined)
    await Promise.all([A.identified(c), B.identified(other())])
    connections.push({ A: c, B: other() })
  }
  return { A, B, connections }
}

async function until (done, what = () => 'timeout') {
  const limit = Date.now() + 10000
  while (!done()) {
    if (Date.now() > limit) assert.fail(what())
    await new Promise(resolve => setTimeout(resolve, 5))
  }
}

// Of two sides that reset a stream the second need not, and who resets a stream that the other
// has opened may have answered the first tokens by then.
const answered = hex(token(HEADER)) + hex(token(MIGRATION))
function matches (sent, expected, other) {
  if (!expected.endsWith('reset')) return sent === expected
  const bytes = expected.slice(0, -'reset'.length)
  return [bytes, bytes || answered].some(b => sent === b + 'reset' || (sent === b && other.endsWith('reset')))
}

for (const v of vectors.exchanges) {
  test(`exchange: ${v.name}`, async () => {
    const { A, B, connections: [old, next] } = await pair(v)
    const peers = { A, B }
    const streams = {}
    let undo = () => {}
    try {
      await B.handle('/echo/1.0.0', s => { streams.B = s })
      const sample = await old.A.muxer.createStream()
      const log = new Map()
      undo = record(sample, log)
      sample.abort(new Error('a sample'))
      log.clear()

      // sent tells what a side has sent on a stream, as the vectors name it.
      const sent = (side, name) => {
        const from = name === 'new' && v.steps.some(s => s.stream === 'new of B') ? 'A' : name === 'new of B' ? 'B' : undefined
        const pick = ([s]) => {
          if (s.protocol !== MIGRATION && s.protocol !== '') return false
          const on = name === 'old' ? old : next
          if (s.sendFrame === undefined || !seen(on[side]).has(s)) return false
          return from === undefined || (s.direction === 'outbound') === (from === side)
        }
        return [...log].filter(pick).flatMap(([, entries]) => entries).join('')
      }
      const known = new Map()
      const seen = c => {
        const set = known.get(c) ?? new Set()
        for (const s of c.streams) set.add(s)
        return known.set(c, set).get(c)
      }
      for (const c of [old.A, old.B, next.A, next.B]) {
        c.muxer.addEventListener('stream', () => seen(c))
        const create = c.muxer.createStream.bind(c.muxer)
        c.muxer.createStream = async o => { const s = await create(o); seen(c); return s }
      }
      // Where two attempts cross, each side sends when both have negotiated.
      const crossing = v.steps.filter(s => s.event === 'migrate')
      const barrier = { left: crossing.length, ...Promise.withResolvers() }
      for (const s of crossing) {
        const c = next[s.side]
        const newStream = c.newStream
        c.newStream = async (...args) => {
          const stream = await newStream(...args)
          if (--barrier.left <= 0) barrier.resolve()
          await barrier.promise
          return stream
        }
      }
      const act = async ({ side, event, bytes }) => {
        if (event === 'open') {
          streams.A = await A.open(old.A, '/echo/1.0.0')
          await until(() => streams.B !== undefined)
        } else if (event === 'write') await streams[side].write(unhex(bytes))
        else if (event === 'close write') streams[side].closeWrite()
        else if (event === 'migrate') peers[side].migrate(streams[side], next[side])
      }
      for (let i = 0; i < v.steps.length; i++) {
        const step = v.steps[i]
        if (step.event !== 'protocol') await act(step)
        // Go on when all has been sent that follows from it, or, before what crosses it, at once.
        const following = v.steps[i + 1]
        if (following?.event === 'protocol' || following?.crosses) continue
        for (const { side, stream } of v.steps.slice(0, i + 1)) {
          const expected = v.steps.slice(0, i + 1).filter(s => s.side === side && s.stream === stream)
            .map(s => s.reset ? 'reset' : s.end ? 'end' : hex(unhex(s.bytes))).join('')
          await until(() => matches(sent(side, stream), expected, sent(side === 'A' ? 'B' : 'A', stream)), () => `${side} has sent on ${stream}:\n${sent(side, stream)}\nexpected:\n${expected}`)
        }
      }
      for (const side of ['A', 'B']) {
        await until(() => String(streams[side].label) === v.label, () => `the label at ${side} is ${streams[side].label}`)
        const written = v.steps.filter(s => s.side !== side && s.event === 'write').map(s => hex(unhex(s.bytes))).join('')
        let read = ''
        for (let bytes; (bytes = await streams[side].read()) !== null;) read += hex(bytes)
        assert.equal(read, written, `what the application of ${side} has read`)
      }
    } finally {
      undo()
      await Promise.all([A.node.stop(), B.node.stop()])
    }
  })
}
