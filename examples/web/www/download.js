// Files by their hash: from the browser's cache if they are there, and else from the server.

const CACHE = "mtla-models";

/** A file that could not be had; the message says which, and why. */
export class DownloadError extends Error {}

/** The list of models. */
export async function list() {
    return (await request("models.json")).json();
}

/**
 * The bytes of files `{path, bytes, sha256}`, in their order. `digest` computes SHA-256, and `progress` is told how much
 * of all is there, from 0 to 1.
 */
export async function files(wanted, digest, progress) {
    const total = wanted.reduce((sum, file) => sum + file.bytes, 0);
    const cache = await openCache();
    const got = [];
    let done = 0;
    for (const file of wanted) {
        const key = `${file.path}?${file.sha256}`;
        const fits = (bytes) => bytes.length === file.bytes && digest(bytes) === file.sha256;
        let bytes = await cached(cache, key);
        if (!bytes || !fits(bytes)) {
            bytes = await download(file, (part) => progress((done + part) / total));
            if (!fits(bytes)) {
                throw new DownloadError(`${file.path} arrived damaged: it is not what the page was built with.`);
            }
            // A full disk is no reason not to go on.
            await cache?.put(key, new Response(bytes)).catch(() => {});
        }
        done += file.bytes;
        progress(done / total);
        got.push(bytes);
    }
    return got;
}

/** There is none on pages that came unencrypted from elsewhere, and in some private windows. */
async function openCache() {
    try {
        return await self.caches?.open(CACHE);
    } catch {
        return undefined;
    }
}

async function cached(cache, key) {
    const response = await cache?.match(key);
    return response && new Uint8Array(await response.arrayBuffer());
}

async function request(path) {
    let response;
    try {
        response = await fetch(path);
    } catch {
        throw new DownloadError(`${path} could not be downloaded. Is there a connection?`);
    }
    if (!response.ok) {
        throw new DownloadError(`${path} could not be downloaded: the server says ${response.status}.`);
    }
    return response;
}

async function download(file, progress) {
    const response = await request(file.path);
    const bytes = new Uint8Array(file.bytes);
    let length = 0;
    try {
        for (const reader = response.body.getReader(); ;) {
            const { done, value } = await reader.read();
            if (done) break;
            if (length + value.length > file.bytes) {
                throw new DownloadError(`${file.path} arrived damaged: it is longer than ${file.bytes} bytes.`);
            }
            bytes.set(value, length);
            length += value.length;
            progress(length);
        }
    } catch (error) {
        if (error instanceof DownloadError) throw error;
        throw new DownloadError(`The download of ${file.path} broke off after ${length} of ${file.bytes} bytes.`);
    }
    return bytes.subarray(0, length);
}
