#!/usr/bin/env bash
#
# Builds the page and looks at it in a real browser: Chromium (Debian: `chromium`; CHROMIUM names another one), with
# WebGPU on SwiftShader, so that no GPU is needed. Screenshots are left in target/page-screenshots.
#
#   examples/web/test.sh              # all of it
#   ONLY=lost examples/web/test.sh    # the tests whose name has this word

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly TARGET=${CARGO_TARGET_DIR:-target}

cargo xtask web
cargo build --locked --package mtla-web --example write
node examples/web/test/page.mjs "$TARGET/page" "$TARGET/debug/examples/write" examples/web/models "$TARGET/page-screenshots"
