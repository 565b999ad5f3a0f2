#!/bin/sh
# Install the Debian packages that the tests need and that are missing; without root, name them instead.
# Usage: install-debian-packages.sh LIST   (lines of "package command"; # starts a comment)
set -u
missing=""
while read -r package command; do
    case "$package" in ''|'#'*) continue ;; esac
    command -v "$command" >/dev/null 2>&1 || missing="$missing $package"
done < "$1"
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing Debian packages:$missing"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
else
    echo "not root: these Debian packages are missing, the tests that need them are skipped:$missing"
    echo "to run those too: sudo apt-get install$missing"
fi
