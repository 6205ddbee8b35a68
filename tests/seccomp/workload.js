// Runs inside a box: what ordinary Node.js programs do. Prints one JSON object, name -> "ok" or what failed.
// Only what ships with Node.js: the test hands this file to `node -e`.
"use strict";
const assert = require("node:assert");
const { spawn, execFile } = require("node:child_process");
const crypto = require("node:crypto");
const dgram = require("node:dgram");
const dns = require("node:dns");
const { once } = require("node:events");
const fs = require("node:fs");
const http = require("node:http");
const net = require("node:net");
const os = require("node:os");
const path = require("node:path");
const { promisify } = require("node:util");
const { Worker } = require("node:worker_threads");
const zlib = require("node:zlib");

const folder = fs.mkdtempSync(path.join(os.tmpdir(), "workload-"));

const checks = {
  async http() {
    const server = http.createServer((request, response) => request.pipe(response)).listen(0, "127.0.0.1");
    await once(server, "listening");
    const request = http.request({ port: server.address().port, host: "127.0.0.1", method: "POST", agent: false });
    request.end("echo");
    const [response] = await once(request, "response");
    let text = "";
    for await (const chunk of response) text += chunk;
    server.close();
    assert.equal(text, "echo");
  },

  async unix_socket() {
    const server = net.createServer((socket) => socket.end("hello")).listen(path.join(folder, "socket"));
    await once(server, "listening");
    const [data] = await once(net.connect(path.join(folder, "socket")), "data");
    server.close();
    assert.equal(String(data), "hello");
  },

  async udp() {
    const one = dgram.createSocket("udp4");
    one.bind(0, "127.0.0.1");
    await once(one, "listening");
    const two = dgram.createSocket("udp4");
    two.send("datagram", one.address().port, "127.0.0.1");
    const [message] = await once(one, "message");
    one.close();
    two.close();
    assert.equal(String(message), "datagram");
  },

  async worker_threads() {
    const worker = new Worker("require('worker_threads').parentPort.postMessage(6 * 7)", { eval: true });
    const [answer] = await once(worker, "message");
    await worker.terminate();
    assert.equal(answer, 42);
  },

  async child_process() {
    const { stdout } = await promisify(execFile)(process.execPath, ["-p", "1 + 1"]);
    assert.equal(stdout, "2\n");
    const sleeper = spawn(process.execPath, ["-e", "setInterval(() => {}, 1000)"], { stdio: "ignore" });
    await once(sleeper, "spawn");
    sleeper.kill("SIGKILL");
    const [, signal] = await once(sleeper, "exit");
    assert.equal(signal, "SIGKILL");
  },

  async child_process_ipc() {
    const child = spawn(process.execPath, ["-e", "process.on('message', (m) => { process.send(m + 1); process.disconnect(); })"], {
      stdio: ["ignore", "ignore", "ignore", "ipc"],
    });
    child.send(41);
    const [answer] = await once(child, "message");
    assert.equal(answer, 42);
  },

  async fs_watch() {
    const watcher = fs.watch(folder);
    const seen = once(watcher, "change");
    fs.writeFileSync(path.join(folder, "watched"), "x");
    await seen;
    watcher.close();
  },

  async fs_cp() {
    const source = path.join(folder, "source");
    fs.mkdirSync(path.join(source, "deep"), { recursive: true });
    fs.writeFileSync(path.join(source, "deep", "file"), "text");
    await fs.promises.cp(source, path.join(folder, "copy"), { recursive: true, preserveTimestamps: true });
    assert.equal(fs.readFileSync(path.join(folder, "copy", "deep", "file"), "utf8"), "text");
  },

  async wasm() {
    // (module (func (export "add") (param i32 i32) (result i32) local.get 0 local.get 1 i32.add))
    const bytes = Buffer.from("0061736d0100000001070160027f7f017f030201000707010361646400000a09010700200020016a0b", "hex");
    const { instance } = await WebAssembly.instantiate(bytes);
    assert.equal(instance.exports.add(40, 2), 42);
  },

  async jit() {
    let sum = 0;
    for (let n = 0; n < 5e6; n++) sum = (sum + n * n) % 1000003;
    assert.ok(sum >= 0);
  },

  async crypto() {
    assert.equal(crypto.randomBytes(32).length, 32);
    assert.equal((await promisify(crypto.scrypt)("password", "salt", 32)).length, 32);
    const { publicKey, privateKey } = crypto.generateKeyPairSync("ed25519");
    const signature = crypto.sign(null, Buffer.from("text"), privateKey);
    assert.ok(crypto.verify(null, Buffer.from("text"), publicKey, signature));
    assert.equal((await promisify(zlib.gunzip)(await promisify(zlib.gzip)("text"))).toString(), "text");
  },

  async interfaces_and_names() {
    assert.ok(os.networkInterfaces().lo);
    assert.equal((await dns.promises.lookup("localhost", { family: 4 })).address, "127.0.0.1");
    assert.ok(os.cpus().length > 0 && os.totalmem() > 0 && os.hostname());
  },
};

(async () => {
  const report = {};
  for (const [name, check] of Object.entries(checks)) {
    let timer;
    const late = new Promise((_, reject) => (timer = setTimeout(() => reject(new Error("took over 10 s")), 10000)));
    try {
      await Promise.race([check(), late]);
      report[name] = "ok";
    } catch (error) {
      report[name] = error.stack;
    }
    clearTimeout(timer);
  }
  console.log(JSON.stringify(report));
  process.exit(0);
})();
