// The page in a real browser: Chromium without a window, WebGPU on a driver for the CPU.
//
// Arguments: the folder of the finished page, the native program that writes (examples/write.rs), the folder of the
// models, and a folder for screenshots.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdirSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { chromium } from "playwright-core";
import sirv from "sirv";

const [page_folder, native, models, screenshots] = process.argv.slice(2);
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const PROMPT =
    "One bright morning Ada was in the tower. Tom was in the mill. Tom had a key. Tom carried the key from the mill " +
    "to the tower.\nWhere is the key?";
const ARGUMENTS = [
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
];
const WEBGPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"];

mkdirSync(screenshots, { recursive: true });
const server = createServer(sirv(page_folder, { etag: true }));
await new Promise((resolve) => server.listen(0, "localhost", resolve));
const address = `http://localhost:${server.address().port}/`;
const executablePath = process.env.CHROMIUM ?? "/usr/bin/chromium";
const launch = (more) => chromium.launch({ executablePath, args: [...ARGUMENTS, ...more] });

const WINDOW = { viewport: { width: 1200, height: 1000 } };

/** Opens the page in a fresh profile; `expected` are forms of console errors that a test provokes. */
async function open(browser, { query = "", expected = [], ...options } = {}) {
    const context = await browser.newContext({ ...WINDOW, ...options });
    // (Playwright has no cache of the browser's own where anything is routed.)
    await context.route("**/favicon.ico", (route) => route.fulfill({ status: 204 }));
    return openIn(context, { query, expected });
}

async function openIn(context, { query = "", expected = [] } = {}) {
    const page = await context.newPage();
    page.setDefaultTimeout(300_000);
    const errors = [];
    const note = (text) => expected.some((form) => form.test(text)) || errors.push(text);
    page.on("console", (message) => message.type() === "error" && note(message.text()));
    page.on("pageerror", (error) => note(String(error)));
    // Every message of the worker, for the tests to look at.
    await page.addInitScript(() => {
        self.heard = [];
        const Plain = Worker;
        self.Worker = class extends Plain {
            constructor(...given) {
                super(...given);
                this.addEventListener("message", ({ data }) => self.heard.push(data));
            }
        };
    });
    return { page, context, errors, go: () => page.goto(address + query) };
}

const ready = (page) => page.waitForFunction(() => self.heard.some(({ type }) => type === "ready"));
const heard = (page, type) => page.evaluate((type) => self.heard.filter((message) => message.type === type), type);

/** Sets the form and writes; the steps that the worker told of. */
async function write(page, { prompt = PROMPT, temperature = 0, seed = 1, length = 40 } = {}) {
    await page.evaluate(() => (self.heard.length = 0));
    await page.fill("#prompt", prompt);
    for (const [id, value] of Object.entries({ temperature, length })) {
        await page.fill(`#${id}`, String(value));
    }
    await page.fill("#seed", String(seed));
    await page.click("#write");
    await page.waitForFunction(() => self.heard.some(({ type }) => type === "done" || type === "error"));
    assert.deepEqual(await heard(page, "error"), []);
    return (await heard(page, "step")).map(({ step, ...more }) => ({ ...step, ...more }));
}

/** The same, and when the first token came, in milliseconds since the page was called. */
async function firstToken(page) {
    const began = () => self.heard.some(({ type }) => type === "step") && performance.now();
    const first = page.waitForFunction(began, null, { polling: 5 });
    const steps = await write(page);
    return { first: await (await first).jsonValue(), steps };
}

const tokens = (steps) => steps.map(({ token }) => token);
const nativeTokens = (model, prompt, length) =>
    JSON.parse(execFileSync(native, [`${models}/${model}`, prompt, String(length)], { encoding: "utf8" }));

async function noViolations(page) {
    await page.evaluate(axe);
    const { violations } = await page.evaluate(() => axe.run());
    assert.deepEqual(
        violations.map(({ id, nodes }) => [id, nodes.map(({ html }) => html)]),
        [],
    );
}

const tests = {
    async "writes what the native program writes, by the kernel"(browser) {
        const { page, errors, go } = await open(browser);
        await go();
        await ready(page);
        const [{ backend }] = await heard(page, "ready");
        assert.equal(backend, "gpu");
        const steps = await write(page);
        assert.deepEqual(tokens(steps), nativeTokens("mtla", PROMPT, 40));
        assert.match(await page.textContent("#text"), /In the tower|tower/);

        const layers = 3;
        for (const { launches, reads, dispatches, layers: seen } of steps.slice(1)) {
            assert.ok(launches >= layers && launches <= 2 * layers, `${launches} launches of the kernel`);
            assert.equal(reads, 1);
            assert.ok(dispatches >= launches);
            for (const { gates, weights } of seen) {
                assert.equal(gates.length, 1);
                assert.ok(gates[0] >= 0 && gates[0] <= 1, `gate ${gates[0]}`);
                for (const head of weights) {
                    assert.ok(Math.abs(head.reduce((a, b) => a + b) - 1) < 1e-3);
                }
            }
        }
        // Some are saturated, and not all.
        const gates = steps.slice(1).flatMap(({ layers }) => layers.map(({ gates }) => gates[0]));
        assert.ok(gates.some((gate) => gate > 0.1 && gate < 0.9));
        const { length, cache_bytes } = steps.at(-1);
        const [{ description }] = await heard(page, "ready").then((found) => (found.length ? found : [{}]));
        assert.equal(await page.locator(".slot").count(), Math.ceil(length / 2));
        assert.equal(await page.locator(".token").count(), length);
        assert.ok(cache_bytes > 0, description);
        await page.screenshot({ path: `${screenshots}/light.png`, fullPage: true });
        await noViolations(page);
        assert.deepEqual(errors, []);
    },

    async "samples again from the same seed, and stops when told"(browser) {
        const { page, errors, go } = await open(browser);
        await go();
        await ready(page);
        const sampled = async (seed) => tokens(await write(page, { prompt: "", temperature: 1, seed }));
        const first = await sampled(7);
        assert.deepEqual(await sampled(7), first);
        assert.notDeepEqual(await sampled(8), first);

        await page.evaluate(() => (self.heard.length = 0));
        await page.fill("#length", "400");
        await page.fill("#temperature", "1.5");
        await page.click("#write");
        await page.waitForFunction(() => self.heard.filter(({ type }) => type === "step").length >= 3);
        await page.click("#stop");
        await page.waitForFunction(() => self.heard.some(({ type }) => type === "done"));
        assert.deepEqual(await heard(page, "done"), [{ type: "done", reason: "stopped" }]);
        const steps = (await heard(page, "step")).length;
        assert.ok(steps < 400, `${steps} steps`);
        // And goes on afterwards.
        assert.deepEqual(await sampled(7), first);
        assert.deepEqual(errors, []);
    },

    async "runs the same prompt with MHA"(browser) {
        const { page, errors, go } = await open(browser);
        await go();
        await ready(page);
        const withoutPicture = async () => {
            await page.uncheck("#observe", { force: true });
            const steps = await write(page, { length: 5 });
            await page.check("#observe", { force: true });
            return steps.at(-1).dispatches;
        };
        const mtlaAlone = await withoutPicture();
        const mtla = await write(page, { length: 20 });
        await page.evaluate(() => (self.heard.length = 0));
        await page.check("input[value=mha]", { force: true });
        await page.waitForFunction(() => self.heard.some(({ type }) => type === "done"));
        const [{ description }] = await heard(page, "ready");
        assert.equal(description.attention, "MHA");
        const steps = await heard(page, "step");
        const mha = steps.map(({ step }) => step);
        console.log(
            `    dispatches a token: MTLA ${mtlaAlone}, with the picture ${mtla.at(-1).dispatches}; ` +
                `MHA ${await withoutPicture()}, with the picture ${steps.at(-1).dispatches}`,
        );
        assert.deepEqual(tokens(mha), nativeTokens("mha", PROMPT, 20));
        const last = (steps) => steps.at(-1).cache_bytes / steps.at(-1).length;
        assert.ok(last(mtla) < 0.5 * last(mha));
        assert.deepEqual(errors, []);
    },

    async "keeps the models, and writes soon"() {
        // A browser as visitors have it, which keeps what it has loaded and compiled.
        const profile = mkdtempSync(`${tmpdir()}/page-`);
        const context = await chromium.launchPersistentContext(profile, {
            executablePath,
            args: [...ARGUMENTS, ...WEBGPU],
            ...WINDOW,
        });
        try {
            const { page, errors, go } = await openIn(context);
            await go();
            await ready(page);
            let asked = 0;
            context.on("request", (request) => (asked += request.url().endsWith(".safetensors")));
            await write(page);
            // Written as soon as it can be, with all kernels to be compiled again.
            await page.reload();
            await ready(page);
            const loaded = await page.evaluate(() => performance.now());
            const { first, steps } = await firstToken(page);
            assert.equal(asked, 0);
            assert.deepEqual(tokens(steps), nativeTokens("mtla", PROMPT, 40));
            // And once more, when they are there.
            await write(page);
            const warm = parseInt(await page.textContent("#first"), 10);
            const speed = await page.textContent("#speed");
            console.log(
                `    after a reload: ready in ${loaded.toFixed()} ms, the first token in ${first.toFixed()} ms; ` +
                    `later the first token ${warm} ms after Write, ${speed} tokens/s`,
            );
            assert.deepEqual(errors, []);
        } finally {
            await context.close();
            rmSync(profile, { recursive: true, force: true });
        }
    },

    async "says what became of a download, and tries again"(browser) {
        const { page, context, errors, go } = await open(browser, { expected: [/Failed to load resource/] });
        let answer = (route) => route.abort();
        await context.route("**/mtla/model.safetensors", (route) => answer(route));
        await go();
        // What an earlier attempt has left is hidden.
        const says = (text) =>
            page.waitForFunction((text) => {
                const notice = document.querySelector("#notice");
                return !notice.hidden && notice.textContent.includes(text);
            }, text);
        await says("could not be downloaded");
        await page.screenshot({ path: `${screenshots}/download.png` });
        answer = (route) => route.fulfill({ status: 500 });
        await page.click("#notice-action");
        await says("the server says 500");
        const whole = readFileSync(`${page_folder}/mtla/model.safetensors`);
        const damaged = Buffer.from(whole);
        damaged[damaged.length - 5] ^= 1;
        answer = (route) => route.fulfill({ body: damaged });
        await page.click("#notice-action");
        await says("arrived damaged");
        answer = (route) => route.fulfill({ body: whole.subarray(0, whole.length / 2) });
        await page.click("#notice-action");
        await says("damaged");
        answer = (route) => route.continue();
        await page.click("#notice-action");
        await ready(page);
        assert.ok((await write(page, { length: 10 })).length > 0);
        assert.deepEqual(errors, []);
    },

    async "says that the GPU is lost, and begins again"(browser) {
        const { page, context, errors, go } = await open(browser, {
            expected: [/lost|destroyed|panicked|unreachable/i],
        });
        // The worker's device, at hand to be ended from outside, as a driver's crash ends it.
        const hook = `const plainRequest = GPUAdapter.prototype.requestDevice;
      GPUAdapter.prototype.requestDevice = async function (...given) {
        return (self.device = await plainRequest.apply(this, given));
      };`;
        const worker = readFileSync(`${page_folder}/worker.js`, "utf8").replace(/const requestDevice/, `${hook}\n$&`);
        await context.route("**/worker.js", (route) => route.fulfill({ body: worker, contentType: "text/javascript" }));
        await go();
        await ready(page);
        await page.evaluate(() => (self.heard.length = 0));
        await page.fill("#length", "400");
        await page.fill("#temperature", "1.5");
        await page.click("#write");
        await page.waitForFunction(() => self.heard.filter(({ type }) => type === "step").length >= 3);
        await page
            .workers()
            .at(-1)
            .evaluate(() => self.device.destroy());
        await page.waitForFunction(() => self.heard.some(({ type }) => type === "lost"));
        assert.match(await page.textContent("#notice-text"), /The GPU was lost/);
        await page.screenshot({ path: `${screenshots}/lost.png` });
        await page.evaluate(() => (self.heard.length = 0));
        await page.click("#notice-action");
        await ready(page);
        assert.deepEqual(tokens(await write(page, { length: 10 })), nativeTokens("mtla", PROMPT, 10));
        assert.deepEqual(errors, []);
    },

    async "checks the kernel on problems of many shapes"(browser) {
        const { page, errors, go } = await open(browser);
        await go();
        await ready(page);
        await page.click("#check summary");
        await page.click("#check-run");
        await page.waitForFunction(() => self.heard.some(({ type }) => type === "checked"));
        const [{ cases }] = await heard(page, "checked");
        assert.ok(cases.length >= 16);
        for (const { name, error, right } of cases) {
            assert.ok(right, `${name}: ${error}`);
        }
        console.log(`    ${cases.length} problems, largest error ${Math.max(...cases.map(({ error }) => error))}`);
        assert.deepEqual(errors, []);
    },

    async "fits a phone, in the dark, by the keyboard"(browser) {
        const { page, errors, go } = await open(browser, {
            viewport: { width: 390, height: 844 },
            colorScheme: "dark",
        });
        await go();
        await ready(page);
        await page.focus("#prompt");
        await page.fill("#prompt", "");
        await page.fill("#length", "60");
        await page.keyboard.press("Tab");
        await page.focus("#prompt");
        await page.keyboard.press("Control+Enter");
        await page.waitForFunction(() => self.heard.some(({ type }) => type === "done"));
        const { scroll, client } = await page.evaluate(() => ({
            scroll: document.documentElement.scrollWidth,
            client: document.documentElement.clientWidth,
        }));
        assert.ok(scroll <= client, `${scroll} pixels on ${client}`);
        await page.screenshot({ path: `${screenshots}/dark-phone.png`, fullPage: true });
        await noViolations(page);
        assert.deepEqual(errors, []);
    },
};

const withoutWebGpu = {
    async "writes on the CPU where there is no WebGPU, and says so"(browser) {
        const { page, errors, go } = await open(browser);
        await go();
        await ready(page);
        assert.match(await page.textContent("#notice-text"), /no WebGPU/);
        const steps = await write(page);
        assert.deepEqual(tokens(steps), nativeTokens("mtla", PROMPT, 40));
        await page.screenshot({ path: `${screenshots}/cpu.png`, fullPage: true });
        await noViolations(page);
        assert.deepEqual(errors, []);
    },
};

let failed = 0;
const only = process.env.ONLY;
for (const [flags, group] of [
    [WEBGPU, tests],
    [["--disable-features=WebGPU"], withoutWebGpu],
]) {
    for (const [name, test] of Object.entries(group)) {
        if (only && !name.includes(only)) continue;
        const browser = await launch(flags);
        const began = Date.now();
        try {
            await test(browser);
            console.log(`ok    ${name} (${((Date.now() - began) / 1000).toFixed(1)} s)`);
        } catch (error) {
            failed++;
            console.log(`FAIL  ${name}\n${error.stack}`);
            const [context] = browser.contexts();
            const [page] = context?.pages() ?? [];
            await page?.screenshot({ path: `${screenshots}/failed.png`, fullPage: true }).catch(() => {});
        } finally {
            await browser.close();
        }
    }
}
server.close();
if (failed > 0) {
    console.error(`${failed} failed`);
    process.exit(1);
}
