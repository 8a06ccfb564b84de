// The peer of the throughput benches: BullMQ takes the jobs. With a PostgreSQL each runs one statement on a connection of its own by
// node-postgres; without one it does nothing, and what has ended is removed, as BullMQ's users do.
// Prints jobs per second, from the start of the worker that finds the queue full to the last job's completion.
const { Queue, Worker } = require('bullmq')
const { Client } = require('pg')

const connection = { host: '127.0.0.1', port: Number(process.env.REDIS_PORT), db: Number(process.env.REDIS_DB), maxRetriesPerRequest: null }
const count = Number(process.env.JOBS)
const runsSql = process.env.PG_HOST !== undefined

function dataOf (number) {
  return runsSql ? { sql: `/* ${number} */ SELECT 1` } : 'x'.repeat(98)
}

async function run (job) {
  if (!runsSql) return
  const client = new Client({ host: process.env.PG_HOST, port: Number(process.env.PG_PORT), user: 'postgres', database: 'bench' })
  await client.connect()
  await client.query(job.data.sql)
  await client.end()
}

async function main () {
  const queue = new Queue('bench', { connection, defaultJobOptions: { removeOnComplete: !runsSql } })
  for (let from = 0; from < count; from += 1000) {
    const size = Math.min(1000, count - from)
    await queue.addBulk(Array.from({ length: size }, (_, i) => ({ name: 'job', data: dataOf(from + i) })))
  }
  let done = 0
  const start = process.hrtime.bigint()
  const worker = new Worker('bench', run, { connection, concurrency: Number(process.env.CONCURRENCY) })
  worker.on('completed', async () => {
    if (++done === count) {
      const seconds = Number(process.hrtime.bigint() - start) / 1e9
      console.log(count / seconds)
      await worker.close()
      await queue.close()
    }
  })
  worker.on('failed', (_, error) => { console.error(error); process.exit(1) })
}

main().catch(error => { console.error(error); process.exit(1) })
