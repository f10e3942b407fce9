// The page: what a visitor sees and does. The model works in worker.js.

import { Slots } from "./slots.js";

const EXAMPLES = [
    { name: "A new story", text: "" },
    {
        name: "Where is the key?",
        text:
            "One bright morning Ada was in the tower. Tom was in the mill. Tom had a key. Tom carried the key from the mill " +
            "to the tower.\nWhere is the key?",
    },
    {
        name: "Who has the ring?",
        text:
            "One windy day Leo was in the forest. Mia was in the kitchen. Leo had a ring. Leo left the forest and went to the " +
            "kitchen. Leo gave Mia the ring in the kitchen.\nWho has the ring?",
    },
    {
        name: "What happens next?",
        text: "One foggy evening Nora was in the cellar. Finn was in the cellar. Nora had a lamp. Finn",
    },
];
const $ = (id) => document.getElementById(id);
const slots = new Slots($("slots"));
const ui = {
    form: $("form"),
    prompt: $("prompt"),
    text: $("text"),
    write: $("write"),
    stop: $("stop"),
    restart: $("restart"),
    status: $("status"),
    progress: $("progress"),
};

let worker;
let lost = false; // the GPU, since the worker was started
let description;
let backend = new URLSearchParams(location.search).get("backend") === "cpu" ? "cpu" : "gpu";
let writing; // {began, first, last, steps} while a text is under way
let writeWhenReady = false;

// --- The worker ---------------------------------------------------------------------------------------------------

/** Starts the program, or starts it again. */
function start() {
    worker?.terminate();
    lost = false;
    worker = new Worker("worker.js", { type: "module" });
    worker.onmessage = ({ data }) => heard[data.type](data);
    worker.onerror = (event) => {
        event.preventDefault();
        broke(
            { task: description ? "write" : "load", message: event.message || "the program could not be loaded" },
            worker,
        );
    };
    load();
}

function load() {
    description = undefined;
    ui.progress.hidden = false;
    ui.progress.removeAttribute("value");
    ui.status.textContent = "Loading…";
    enable();
    worker.postMessage({ type: "load", model: chosenModel(), backend });
}

/** The program has ended. Where that is because the GPU was lost, the worker says so a little later. */
function broke(error, where) {
    setTimeout(() => {
        if (where !== worker || lost) return;
        finish();
        if (error.task === "load" && backend === "gpu") {
            backend = "cpu";
            notice(`The GPU cannot be used (${error.message}); the model runs on the CPU.`);
            start();
        } else {
            notice(`Something went wrong: ${error.message}`, "Start again", start);
        }
    }, 500);
}

const chosenModel = () => ui.form.elements.model.value;

const heard = {
    progress({ share }) {
        ui.progress.value = share;
    },

    ready(message) {
        description = message.description;
        ui.progress.hidden = true;
        const { attention, parameters } = description;
        ui.status.textContent = `${attention}, ${(parameters / 1000).toFixed(0)} thousand parameters`;
        $("device").textContent = message.backend === "gpu" ? "your own GPU" : "your own CPU";
        if (message.backend === "cpu" && backend === "gpu") {
            notice("This browser offers no WebGPU here, so the model runs on the CPU: it works, and is slower.");
        }
        backend = message.backend;
        $("check").hidden = backend !== "gpu";
        layersAndHeads();
        clear();
        enable();
        if (writeWhenReady) write();
    },

    step({ step, dispatches, reads }) {
        const now = performance.now();
        writing.first ??= now;
        writing.steps++;
        ui.text.append(step.text);
        $("first").textContent = `${Math.round(writing.first - writing.began)} ms`;
        if (writing.steps > 1) {
            $("speed").textContent = (((writing.steps - 1) * 1000) / (now - writing.first)).toFixed(1);
        }
        if (backend === "gpu" && writing.steps > 1) {
            $("dispatches").textContent = dispatches;
            $("launches").textContent = step.launches;
            $("reads").textContent = reads;
        }
        $("tokens").textContent = step.length;
        bars(step);
        if ($("observe").checked) slots.add(step);
    },

    done({ reason }) {
        writing = undefined;
        ui.text.classList.remove("writing");
        const reasons = { stop: "The text is over.", length: "As many tokens as were asked for.", stopped: "Stopped." };
        ui.status.textContent = reasons[reason];
        enable();
    },

    checked({ cases }) {
        const worst = Math.max(...cases.map((one) => one.error));
        const wrong = cases.filter((one) => !one.right).length;
        const summary = wrong === 0 ? `All ${cases.length} agree` : `${wrong} of ${cases.length} differ`;
        const rows = cases.map((one) => `<tr><td>${one.name}</td><td>${one.error.toExponential(1)}</td></tr>`);
        $("check-result").innerHTML = `<p>${summary}; largest error ${worst.toExponential(1)}.</p>
      <table><thead><tr><th>problem</th><th>error</th></tr></thead><tbody>${rows.join("")}</tbody></table>`;
        $("check-run").disabled = false;
    },

    error({ task, message, download, broken }) {
        $("check-run").disabled = false;
        if (broken) {
            broke({ task, message }, worker);
            return;
        }
        finish();
        if (download) {
            notice(message, "Try again", load);
        } else if (task === "load") {
            notice(`The model cannot be used: ${message}`, "Try again", load);
        } else {
            notice(message);
            enable();
        }
    },

    lost({ message }) {
        lost = true;
        finish();
        notice(
            `The GPU was lost${message ? ` (${message.trim()})` : ""}. The text so far stays.`,
            "Start again",
            start,
        );
    },
};

/** Something ended a text and perhaps the program. */
function finish() {
    writing = undefined;
    ui.text.classList.remove("writing");
    ui.progress.hidden = true;
    ui.status.textContent = "";
    ui.write.disabled = ui.stop.disabled = ui.restart.disabled = true;
}

// --- What is shown ------------------------------------------------------------------------------------------------

function notice(text, action, act) {
    $("notice-text").textContent = text;
    $("notice").hidden = false;
    $("notice-action").hidden = !action;
    $("notice-action").textContent = action ?? "";
    $("notice-action").onclick = () => {
        $("notice").hidden = true;
        act();
    };
}

function enable() {
    const ready = Boolean(description);
    ui.write.disabled = !ready || Boolean(writing);
    ui.restart.disabled = !ready || Boolean(writing);
    ui.stop.disabled = !writing;
    for (const radio of ui.form.elements.model) radio.disabled = !ready || Boolean(writing);
}

function layersAndHeads() {
    const options = (count, name) => Array.from({ length: count }, (_, i) => new Option(`${name}${i + 1}`, i));
    $("layer").replaceChildren(...options(description.layers, ""));
    $("head").replaceChildren(new Option("all, on average", "mean"), ...options(description.heads, ""));
}

function clear() {
    slots.clear(description.down_rate);
    chooseSlots();
    for (const id of ["speed", "tokens", "dispatches", "launches", "reads", "first"]) $(id).textContent = "–";
    bars({ length: 0, cache_bytes: 0 });
}

function chooseSlots() {
    const head = $("head").value;
    slots.choose(Number($("layer").value), head === "mean" ? head : Number(head));
}

/** Beside the cache of this model, those of others of the same width, depth and heads. */
function bars({ length, cache_bytes: own }) {
    const name =
        description.attention === "MTLA"
            ? `MTLA, ${description.down_rate} tokens a slot`
            : `${description.attention}, this model`;
    const others = description.alternatives
        .filter(({ attention }) => attention !== description.attention)
        .map(({ attention, bytes_per_token: bytes }) => ({ name: attention, bytes: bytes * length }));
    const all = [{ name, bytes: own, own: true }, ...others];
    const most = Math.max(1, ...all.map(({ bytes }) => bytes));
    $("bars").replaceChildren(
        ...all.flatMap(({ name, bytes, own }) => {
            const cell = (text, kind) =>
                Object.assign(document.createElement("span"), { textContent: text, className: kind });
            const bar = cell("", own ? "bar own" : "bar");
            bar.style.width = `${(100 * bytes) / most}%`;
            return [cell(name, ""), bar, cell(`${(bytes / 1024).toFixed(1)} KiB`, "")];
        }),
    );
}

/** Scores of the models, as their training left them. */
async function about() {
    const row = async (name) => {
        const report = await (await fetch(`${name}/report.json`)).json();
        const all = report.answers.find(({ distance }) => distance === "all");
        const share = (field) => `${((100 * all[field]) / all.asked).toFixed(1)} %`;
        const { trainer, data } = report.settings;
        const cells = [
            name.toUpperCase(),
            report.parameters.toLocaleString("en"),
            `${trainer.length.steps} steps, ${data.stories.toLocaleString("en")} stories, seed ${trainer.seed}`,
            report.perplexity.model.toFixed(3),
            report.perplexity.five_gram.toFixed(3),
            share("right"),
            share("right_by_guess"),
        ];
        return `<tr>${cells.map((cell) => `<td>${cell}</td>`).join("")}</tr>`;
    };
    const heads = ["model", "parameters", "training", "perplexity", "of a 5-gram", "right answers", "by the last name"];
    try {
        const rows = await Promise.all(["mtla", "mha"].map(row));
        $("card").innerHTML =
            `<table><thead><tr>${heads.map((head) => `<th scope="col">${head}</th>`).join("")}</tr></thead>
      <tbody>${rows.join("")}</tbody></table>`;
    } catch {
        $("card").textContent = "The scores could not be downloaded.";
    }
}

// --- What a visitor does ------------------------------------------------------------------------------------------

function write() {
    writeWhenReady = false;
    $("notice").hidden = true;
    clear();
    const prompt = ui.prompt.value.trimEnd();
    const begin = Object.assign(document.createElement("span"), { textContent: prompt, className: "prompt" });
    ui.text.replaceChildren(begin);
    ui.text.classList.add("writing");
    ui.status.textContent = "Writing…";
    writing = { began: performance.now(), steps: 0 };
    enable();
    const options = {
        max_new_tokens: Number($("length").value),
        temperature: Number($("temperature").value),
        top_p: Number($("top-p").value),
        seed: Math.min(4294967295, Math.max(0, Math.trunc(Number($("seed").value) || 0))),
        observe: $("observe").checked,
    };
    worker.postMessage({ type: "write", prompt, options });
}

ui.form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!ui.write.disabled) write();
});
ui.prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ui.form.requestSubmit();
});
addEventListener("keydown", (event) => {
    if (event.key === "Escape") ui.stop.click();
});
ui.stop.addEventListener("click", () => worker.postMessage({ type: "stop" }));
ui.restart.addEventListener("click", () => {
    $("seed").value = Number($("seed").value) + 1;
    write();
});
for (const radio of ui.form.elements.model) {
    radio.addEventListener("change", () => {
        // The same prompt again, if there was one.
        writeWhenReady = ui.text.querySelector(".prompt") !== null;
        load();
    });
}
for (const id of ["temperature", "top-p", "length"]) {
    const show = () => ($(`${id}-value`).textContent = $(id).value);
    $(id).addEventListener("input", show);
    show();
}
for (const id of ["layer", "head"]) $(id).addEventListener("change", chooseSlots);
$("check-run").addEventListener("click", () => {
    $("check-run").disabled = true;
    $("check-result").textContent = "Checking…";
    worker.postMessage({ type: "check", seed: Math.floor(Math.random() * 2 ** 32) });
});
$("about").addEventListener("toggle", about, { once: true });
$("examples").append(
    ...EXAMPLES.map(({ name, text }) => {
        const button = Object.assign(document.createElement("button"), { type: "button", textContent: name });
        button.addEventListener("click", () => {
            ui.prompt.value = text;
            ui.form.requestSubmit();
        });
        return button;
    }),
);
ui.prompt.value = EXAMPLES[1].text;
start();
