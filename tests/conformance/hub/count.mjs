// Prints, for each folder, the parameters by dtype that the hub's own code counts in it, as JSON; null where it finds no weights.
//
//     node count.mjs FOLDER...
//
// The folders stand for repositories: what the code would fetch is read from them.

import { existsSync, readFileSync, statSync } from "node:fs";
import { join } from "node:path";

import { parseSafetensorsMetadata } from "@huggingface/hub";

/** Answers what is asked of a repository on the hub, out of a folder. */
function reader(folder) {
    return async (url, options = {}) => {
        const path = new URL(url).pathname.split("/main/")[1];
        const file = join(folder, decodeURIComponent(path));
        if (!existsSync(file)) {
            return new Response("", { status: 404, headers: { "X-Error-Code": "EntryNotFound" } });
        }
        const { size } = statSync(file);
        const range = new Headers(options.headers).get("Range")?.match(/^bytes=(\d+)-(\d+)$/);
        if (options.method === "HEAD" || !range) {
            return new Response(options.method === "HEAD" ? null : readFileSync(file), { headers: { ETag: '"x"' } });
        }
        const [first, last] = [Number(range[1]), Math.min(Number(range[2]), size - 1)];
        const headers = { ETag: '"x"', "Content-Range": `bytes ${first}-${last}/${size}` };
        return new Response(readFileSync(file).subarray(first, last + 1), { status: 206, headers });
    };
}

const counts = [];
for (const folder of process.argv.slice(2)) {
    const library = existsSync(join(folder, "diffusion_pytorch_model.safetensors")) ? "diffusers" : undefined;
    const asked = { repo: "a/b", computeParametersCount: true, library, fetch: reader(folder) };
    const metadata = await parseSafetensorsMetadata(asked).catch((error) => {
        console.error(`${folder}: ${error}`);
        return null;
    });
    counts.push(metadata && metadata.parameterCount);
}
console.log(JSON.stringify(counts));
