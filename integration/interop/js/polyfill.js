// What libp2p 3.3 uses and older Node.js does not have.
import { webcrypto } from 'node:crypto'

globalThis.crypto ??= webcrypto // from 19 on
globalThis.CustomEvent ??= class extends Event { // from 19 on
  constructor (type, init) {
    super(type, init)
    this.detail = init?.detail ?? null
  }
}
Promise.withResolvers ??= function () { // from 22 on
  let resolve, reject
  const promise = new this((a, b) => { resolve = a; reject = b })
  return { promise, resolve, reject }
}
