// A peer that another process controls: a command on each line of the standard input, in JSON,
// and an answer to each on the standard output. See README.md.
import { createHash } from 'node:crypto'
import { createInterface } from 'node:readline'
import { Peer } from './peer.js'
import { privateKeyFromProtobuf } from '@libp2p/crypto/keys'
import { multiaddr } from '@multiformats/multiaddr'
import { Drainer } from './drain.js'
import { Raw } from './raw.js'

let peer, drainer
let accepts = true
let count = 0
const streams = new Map()
const reply = message => process.stdout.write(JSON.stringify(message) + '\n')
const unhex = text => Uint8Array.from(Buffer.from(text, 'hex'))
const hex = bytes => Buffer.from(bytes).toString('hex')

function keep (stream) {
  const id = ++count
  streams.set(id, stream)
  return id
}

function conn (id) {
  const found = peer.node.getConnections().find(c => c.id === id)
  if (found === undefined) throw new Error(`there is no connection ${id}`)
  return found
}

function stream (id) {
  const found = streams.get(id)
  if (found === undefined) throw new Error(`there is no stream ${id}`)
  return found
}

async function echo (s) {
  for (let bytes; (bytes = await s.read()) !== null;) await s.write(bytes)
  s.closeWrite()
  s.close()
}

// send writes until it is told to finish, and then closes the writing. It tells the hash.
async function send (s) {
  const hash = createHash('sha256')
  for (let i = 0; !s.finish; i++) {
    const bytes = new Uint8Array(32 * 1024).fill(i)
    hash.update(bytes)
    await s.write(bytes)
    await new Promise(resolve => setTimeout(resolve, 1))
  }
  s.closeWrite()
  return hash.digest('hex')
}

async function receive (s) {
  const hash = createHash('sha256')
  let size = 0
  for (let bytes; (bytes = await s.read()) !== null;) {
    hash.update(bytes)
    size += bytes.length
  }
  return { size, received: hash.digest('hex') }
}

const commands = {
  async start ({ key, draftOnly, drain }) {
    peer = new Peer({ privateKey: privateKeyFromProtobuf(unhex(key)), draftOnly, accept: () => accepts })
    await peer.start()
    if (drain) {
      drainer = new Drainer(peer, drain)
      if (process.env.PORTAGE_LOG) drainer.log = text => process.stderr.write(text + '\n')
      await drainer.start()
    }
    await peer.handle('/echo/1.0.0', echo)
    await peer.handle('/held/1.0.0', s => reply({ event: 'stream', stream: keep(s), label: String(s.label) }))
    return { peer: peer.node.peerId.toString(), addrs: peer.node.getMultiaddrs().map(String) }
  },
  async dial ({ addr }) {
    const c = await peer.node.dial(multiaddr(addr), { force: true })
    await peer.identified(c)
    return { conn: c.id, port: c.maConn.socket.localPort }
  },
  conns: () => ({
    conns: peer.node.getConnections().filter(c => c.status === 'open').map(c => ({ conn: c.id })),
    busy: drainer?.busy,
    split: drainer?.split,
    by: drainer && [...drainer.kept.values()].map(k => k.by)[0]
  }),
  close: ({ conn: id }) => conn(id).close().then(() => ({})),
  abort: ({ conn: id }) => { peer.node.getConnections().find(c => c.id === id)?.abort(new Error('aborted')); return {} },
  accept: ({ on }) => { accepts = on; return {} },
  async open ({ conn: id, protocol }) {
    const c = id ? conn(id) : drainer.pick(peer.node.getConnections()[0].remotePeer)
    const s = await peer.open(c, protocol)
    return { stream: keep(s), label: String(s.label), conn: c.id }
  },
  migrate: async ({ stream: id, conn: to }) => ({ result: await peer.migrate(stream(id), conn(to)) }),
  info: ({ stream: id }) => ({ label: String(stream(id).label), conn: stream(id).conn.id, over: stream(id).over, idle: stream(id).x === undefined, blocked: stream(id).out.byteLength > 0 }),
  async transfer ({ stream: id }) {
    const [sent, received] = await Promise.all([send(stream(id)), receive(stream(id))])
    stream(id).close()
    return { sent, ...received }
  },
  // fill writes without a pause, and tells the hash when there is room for all of it.
  async fill ({ stream: id, size }) {
    const bytes = Uint8Array.from({ length: size }, (_, i) => i * 7 >> 8)
    for (let at = 0; at < size; at += 65536) await stream(id).write(bytes.subarray(at, at + 65536))
    return { sent: createHash('sha256').update(bytes).digest('hex') }
  },
  receive: ({ stream: id }) => receive(stream(id)),
  // find tells a stream by its label, also one that was accepted without an event.
  find ({ label }) {
    const s = [...peer.tables.values()].map(t => t.streams.get(BigInt(label))).find(s => s !== undefined)
    return { stream: s && (s.kept ??= keep(s)) }
  },
  finish: ({ stream: id }) => { stream(id).finish = true; return {} },
  write: async ({ stream: id, bytes }) => { await stream(id).write(unhex(bytes)); return {} },
  async read ({ stream: id }) {
    const bytes = await stream(id).read()
    return bytes === null ? { eof: true } : { bytes: hex(bytes) }
  },
  closeWrite: ({ stream: id }) => { stream(id).closeWrite(); return {} },
  closeStream: ({ stream: id }) => { stream(id).close(); return {} },
  reset: ({ stream: id, code }) => { stream(id).reset(code); return {} },
  // raw sends bytes on a stream that is not negotiated, and tells what is answered.
  async raw ({ conn: id, bytes, until }) {
    const c = conn(id)
    const raw = new Raw(await c.muxer.createStream(), c)
    raw.send(unhex(bytes))
    try {
      await raw.need(until || 1 << 20)
    } catch {}
    const answer = { bytes: hex(raw.buf.subarray()), reset: raw.wasReset ?? false, code: raw.err?.code ?? 0 }
    raw.abort()
    return answer
  },
  async stop () {
    setTimeout(() => process.exit(0), 1000).unref()
    await peer.node.stop()
    process.exit(0)
  }
}

// js-libp2p sends the first frame of a new stream from a microtask, and throws there if the
// connection was closed in between. Whoever opens the stream is told in another way, too.
process.on('uncaughtException', err => {
  if (err.name === 'StreamStateError') return
  console.error(err)
  process.exit(1)
})

createInterface({ input: process.stdin }).on('line', async line => {
  const command = JSON.parse(line)
  try {
    reply({ id: command.id, ...await commands[command.do](command) })
  } catch (err) {
    reply({ id: command.id, error: err.message, code: err.code ?? 0 })
  }
}).on('close', () => process.exit(0))
