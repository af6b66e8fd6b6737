// The messages of docs/protocol.md, sections 2 and 8, and the tokens of multistream-select.
import { Uint8ArrayList } from 'uint8arraylist'

export const MAX_MESSAGE = 1024

// A message type has its fields by number: a name, and a scalar type or the name of a message.
// Every required field has the default 0n, and is written always.
const types = {
  StreamMigration: { 1: ['label', 'Label'], 2: ['migrate', 'Migrate'], 3: ['ack_migrate', 'AckMigrate'], 100: ['final_size', 'FinalSize'] },
  Label: { 1: ['id', 'uint64', 0n] },
  Migrate: { 1: ['id', 'uint64', 0n], 2: ['from', 'uint64', 0n], 100: ['final_size', 'bool'] },
  AckMigrate: { 1: ['deny_migrate', 'bool'], 100: ['final_size', 'bool'] },
  FinalSize: { 1: ['size', 'uint64', 0n] },
  DrainMessage: { 1: ['drain', 'Drain'], 2: ['drained', 'Drained'], 3: ['refused', 'Refused'], 4: ['keep', 'Keep'], 5: ['kept', 'Kept'], 6: ['busy', 'Busy'], 7: ['hello', 'Hello'] },
  Drain: { 1: ['lease', 'uint32'] },
  Drained: {},
  Refused: { 1: ['reason', 'string'] },
  Keep: {},
  Kept: {},
  Busy: { 1: ['wait', 'uint32'] },
  Hello: { 1: ['instance', 'fixed64'] }
}

// A message that a peer must not send: W4.
export class Violation extends Error {
  constructor (message, code = 0x1004) {
    super(message)
    this.name = 'Violation'
    this.code = code
  }
}

export function varint (value) {
  const out = []
  let v = BigInt(value)
  for (; v > 0x7fn; v >>= 7n) out.push(Number(v & 0x7fn) | 0x80)
  out.push(Number(v))
  return Uint8Array.from(out)
}

// parseVarint returns the value and where it ends, or nothing if more bytes are needed.
export function parseVarint (bytes, at = 0) {
  let value = 0n
  for (let i = 0; i < 10; i++) {
    if (at + i >= bytes.byteLength) return undefined
    const b = bytes[at + i]
    if (i === 9 && b > 1) break
    value |= BigInt(b & 0x7f) << BigInt(7 * i)
    if (b < 0x80) return { value, end: at + i + 1 }
  }
  throw new Violation('a varint has more than 64 bits')
}

export const concat = (...parts) => new Uint8ArrayList(...parts).subarray()
const prefixed = body => concat(varint(body.byteLength), body)

function fixed64 (value) {
  const bytes = new Uint8Array(8)
  new DataView(bytes.buffer).setBigUint64(0, value, true)
  return bytes
}

const wireOf = kind => kind === 'fixed64' ? 1 : kind === 'string' || types[kind] ? 2 : 0

function body (type, message) {
  const parts = []
  for (const [number, [name, kind, required]] of Object.entries(types[type])) {
    const value = message[name] ?? required
    if (value === undefined) continue
    const wire = wireOf(kind)
    parts.push(varint(Number(number) << 3 | wire))
    if (kind === 'string') parts.push(prefixed(new TextEncoder().encode(value)))
    else if (wire === 1) parts.push(fixed64(value))
    else if (wire === 2) parts.push(prefixed(body(kind, value)))
    else parts.push(varint(value))
  }
  return concat(...parts)
}

// encode returns the bytes of a message, with its length before it.
export const encode = (type, message) => prefixed(body(type, message))

// decode reads a message that has no length before it. Of members and fields that are
// repeated the last one counts; a member that comes twice is put together.
export function decode (type, bytes) {
  const message = parse(type, bytes)
  if (Object.keys(message).length === 0) throw new Violation('a message without a known member')
  return message
}

function parse (type, bytes, message = {}) {
  const oneof = type === 'StreamMigration' || type === 'DrainMessage'
  for (const [name, , required] of Object.values(types[type])) if (required !== undefined) message[name] ??= required
  for (let at = 0; at < bytes.byteLength;) {
    const field = readField(bytes, at)
    at = field.end
    const [name, kind] = types[type][field.number] ?? []
    if (name === undefined || field.wire !== wireOf(kind)) continue
    if (oneof) message = name in message ? message : {}
    if (kind === 'string') message[name] = new TextDecoder().decode(field.value)
    else if (kind === 'fixed64') message[name] = new DataView(field.value.buffer, field.value.byteOffset, 8).getBigUint64(0, true)
    else if (kind === 'bool') message[name] = field.value !== 0n
    else if (kind === 'uint32') message[name] = Number(BigInt.asUintN(32, field.value))
    else message[name] = kind === 'uint64' ? field.value : parse(kind, field.value, message[name])
  }
  return message
}

function readField (bytes, at, inGroup = false) {
  const number = () => {
    const v = parseVarint(bytes, at)
    if (v === undefined) throw new Violation('a message that is cut short')
    at = v.end
    return v.value
  }
  const slice = length => {
    if (BigInt(at) + BigInt(length) > BigInt(bytes.byteLength)) throw new Violation('a field that is longer than its message')
    at += Number(length)
    return bytes.subarray(at - Number(length), at)
  }
  const tag = number()
  const field = { number: Number(tag >> 3n), wire: Number(tag & 7n) }
  if (tag >> 3n < 1n || tag >> 3n > 0x1fffffffn) throw new Violation('a field with an impossible number')
  switch (field.wire) {
    case 0: field.value = number(); break
    case 1: field.value = slice(8); break
    case 2: field.value = slice(number()); break
    case 3: // a group: only an unknown field can be one
      for (;;) {
        const inner = readField(bytes, at, true)
        at = inner.end
        if (inner.wire !== 4) continue
        if (inner.number !== field.number) throw new Violation('a group that another one ends')
        break
      }
      break
    case 4:
      if (!inGroup) throw new Violation('the end of a group that has not begun')
      break
    case 5: field.value = slice(4); break
    default: throw new Violation('an unknown wire type')
  }
  field.end = at
  return field
}

export const HEADER = '/multistream/1.0.0'
export const token = text => prefixed(new TextEncoder().encode(text + '\n'))
