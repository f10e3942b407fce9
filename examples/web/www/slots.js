// The picture of the cache: slots with the tokens that were merged into them, gates, and where the newest token looks.

export class Slots {
    /** @param {HTMLElement} element where the slots go */
    constructor(element) {
        this.element = element;
        this.clear(1);
    }

    /** Begins anew, with `downRate` tokens a slot. */
    clear(downRate) {
        this.downRate = downRate;
        this.tokens = [];
        this.gates = [];
        this.layers = [];
        this.layer = 0;
        this.head = "mean";
        this.element.replaceChildren();
        this.describe();
    }

    /** Shows another layer, or head: a number, or "mean". */
    choose(layer, head) {
        this.layer = layer;
        this.head = head;
        this.paint();
    }

    /** Takes in what a step of the model gave. */
    add(step) {
        step.taken.forEach((text, i) => {
            const place = this.tokens.length;
            const token = document.createElement("span");
            token.className = "token";
            token.textContent = text.replaceAll("\n", "⏎");
            if (place % this.downRate === 0) {
                const slot = document.createElement("span");
                slot.className = "slot";
                this.element.append(slot);
            }
            this.element.lastElementChild.append(token);
            this.tokens.push(token);
            this.gates.push(step.layers.map((layer) => layer.gates[i]));
        });
        this.layers = step.layers;
        this.paint();
    }

    /** How strongly the newest token looks at each slot, by the chosen head or all of them. */
    weights() {
        const heads = this.layers[this.layer]?.weights ?? [];
        if (heads.length === 0) return [];
        if (this.head !== "mean") return heads[this.head] ?? [];
        return heads[0].map((_, slot) => heads.reduce((sum, head) => sum + head[slot], 0) / heads.length);
    }

    paint() {
        const weights = this.weights();
        const most = Math.max(1e-9, ...weights);
        const slots = this.element.children;
        for (let slot = 0; slot < slots.length; slot++) {
            const weight = weights[slot] ?? 0;
            slots[slot].style.setProperty("--weight", (weight / most).toFixed(3));
            slots[slot].title = weights.length > 0 ? `looked at with ${(100 * weight).toFixed(1)} %` : "";
            slots[slot].classList.toggle("newest", slot === slots.length - 1);
        }
        this.tokens.forEach((token, place) => {
            const gate = this.gates[place][this.layer];
            token.style.setProperty("--gate", (gate ?? 0).toFixed(3));
            token.title = gate === undefined ? "" : `gate ${gate.toFixed(2)}`;
        });
        this.describe(weights);
    }

    describe(weights = []) {
        const count = this.element.children.length;
        let text = count === 0 ? "No slots yet" : `${this.tokens.length} tokens in ${count} slots`;
        if (weights.length > 0) {
            const place = weights.indexOf(Math.max(...weights));
            text += `; the newest token looks most at slot ${place + 1}: “${this.element.children[place].textContent}”`;
        }
        this.element.setAttribute("aria-label", text);
    }
}
