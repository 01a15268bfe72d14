#!/bin/sh
# Sees to it that the browser tests find a Chromium, and says what it did. Never fails: without one
# those tests are skipped with a sentence (but where CI is set, they fail).
for name in chromium chromium-browser google-chrome google-chrome-stable; do
    if command -v "$name" >/dev/null; then
        echo "Browser tests use $(command -v "$name")."
        exit 0
    fi
done
if [ -w /usr/bin ] && command -v apt-get >/dev/null; then
    echo "== Installing Debian's chromium for the browser tests (a minute, once) =="
    export DEBIAN_FRONTEND=noninteractive
    apt-get -q update && apt-get -q install -y --no-install-recommends chromium && exit 0
fi
echo "No Chromium here, so the browser tests are skipped. To have them, install Chromium or Chrome."
