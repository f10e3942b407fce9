// The model at work, away from the page: it never freezes.
//
// Takes {type: "load", model, backend}, {type: "write", prompt, options}, {type: "stop"} and {type: "check"}; tells of
// "progress", "ready", "step", "done", "checked", "error" and "lost".

import init, * as program from "./mtla_web.js";
import { DownloadError, files, list } from "./download.js";

const counts = { dispatches: 0, reads: 0 };
let backend;
let model;
let stopped = false;
let work = Promise.resolve();
let waiting = 0; // tasks that are not begun

const tell = (type, more = {}) => postMessage({ type, ...more });

/** Does something of our own before a method of the browser's. */
function before(prototype, name, act) {
    const method = prototype?.[name];
    if (method) {
        prototype[name] = function (...given) {
            act();
            return method.apply(this, given);
        };
    }
}

before(self.GPUComputePassEncoder?.prototype, "dispatchWorkgroups", () => counts.dispatches++);
before(self.GPUComputePassEncoder?.prototype, "dispatchWorkgroupsIndirect", () => counts.dispatches++);
before(self.GPUBuffer?.prototype, "mapAsync", () => counts.reads++);

const requestDevice = self.GPUAdapter?.prototype.requestDevice;
if (requestDevice) {
    GPUAdapter.prototype.requestDevice = async function (...given) {
        const device = await requestDevice.apply(this, given);
        device.lost.then(({ message }) => tell("lost", { message }));
        return device;
    };
}

/** Starts the program, on the GPU if that is wanted and there is one. */
async function begin(wanted) {
    const [adapter] = await Promise.all([
        wanted === "gpu" ? self.navigator.gpu?.requestAdapter().catch(() => null) : null,
        init({ module_or_path: new URL("mtla_web_bg.wasm", import.meta.url) }),
    ]);
    if (adapter) {
        await program.use_gpu();
    }
    return adapter ? "gpu" : "cpu";
}

async function load({ model: name, backend: wanted }) {
    backend ??= await begin(wanted);
    const found = (await list()).find((other) => other.name === name);
    const [config, weights, tokenizer] = await files(found.files, program.sha256, (share) =>
        tell("progress", { share }),
    );
    model?.free();
    model = undefined;
    model = new program.PageModel(backend === "gpu", config, weights, tokenizer);
    tell("ready", { backend, model: name, description: JSON.parse(model.description()) });
    if (backend === "gpu") await warmUp();
}

/**
 * Lets the driver compile the kernels while there is nothing else to do, before somebody waits for them: a prompt of
 * the usual length, and a few steps.
 */
async function warmUp() {
    const options = { max_new_tokens: 3, temperature: 1, top_p: 1, seed: 0, observe: true };
    const prompt =
        "One day Ada was in the tower. Tom was in the mill. Tom had a key. Tom carried the key from the mill to the tower. " +
        "Ada was still in the tower.\nWhere is the key?";
    model.start(prompt, JSON.stringify(options));
    do await messages();
    while (!waiting && JSON.parse(await model.advance()));
    model.stop();
}

async function write({ prompt, options }) {
    stopped = false;
    model.start(prompt, JSON.stringify(options));
    let reason = "stopped";
    while (!stopped) {
        const { dispatches, reads } = counts;
        const step = JSON.parse(await model.advance());
        if (!step) break;
        tell("step", { step, dispatches: counts.dispatches - dispatches, reads: counts.reads - reads });
        if (step.finish) {
            reason = step.finish;
            break;
        }
        await messages();
    }
    model.stop();
    tell("done", { reason });
}

/** Lets messages in that came meanwhile. */
function messages() {
    return new Promise((resolve) => {
        const { port1, port2 } = new MessageChannel();
        port1.onmessage = () => {
            port1.close();
            resolve();
        };
        port2.postMessage(null);
    });
}

async function check({ seed }) {
    tell("checked", { cases: JSON.parse(await program.check_kernel(seed)) });
}

const tasks = { load, write, check };

self.onmessage = ({ data }) => {
    if (data.type === "stop") {
        stopped = true;
        return;
    }
    waiting++;
    work = work
        .then(() => {
            waiting--;
            return tasks[data.type](data);
        })
        .catch((error) => {
            const download = error instanceof DownloadError;
            // After a panic the program is in no state to go on.
            const broken = error instanceof WebAssembly.RuntimeError;
            tell("error", { task: data.type, message: String(error.message ?? error), download, broken, backend });
        });
};
