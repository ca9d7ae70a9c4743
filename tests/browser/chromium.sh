#!/bin/sh
# Installs Debian's Chromium where there is none and that is possible; says what it does.
set -eu
[ -z "${SACCADE_CHROMIUM:-}" ] || exit 0
for name in chromium chromium-browser google-chrome; do
  ! command -v "$name" >/dev/null 2>&1 || exit 0
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  echo "the browser tests need Chromium: apt-get install chromium chromium-driver"
  apt-get update -qq || true
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver >/dev/null || true
fi
