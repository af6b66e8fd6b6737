// libp2p 3.3 uses Promise.withResolvers, which Node 20 does not have yet.
Promise.withResolvers ??= function () {
  let resolve, reject
  const promise = new this((a, b) => { resolve = a; reject = b })
  return { promise, resolve, reject }
}
