#!/bin/sh
# Install the Debian packages that the tests need and that are missing; without root, name them instead.
# Usage: install-debian-packages.sh LIST   (lines of "package command [suite]"; # starts a comment)
# A suite is an older Debian release that still has a package which the running one lacks. It is added below every
# other source, so that nothing else ever comes from it: not by an upgrade, not as a dependency.
set -u

PATH="$PATH:/usr/sbin:/sbin"
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

install() {
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
}

add_suite() {
    [ -r "$KEYRING" ] || { echo "no $KEYRING: this is no Debian, the suite $1 cannot be checked"; return 1; }
    # Priority 1: only what is asked for by name and exists nowhere else.
    printf 'Package: *\nPin: release n=%s\nPin-Priority: 1\n' "$1" > "/etc/apt/preferences.d/pingjia-tests-$1"
    echo "deb [signed-by=$KEYRING] http://deb.debian.org/debian $1 main" > "/etc/apt/sources.list.d/pingjia-tests-$1.list"
}

missing=""
older=""
while read -r package command suite; do
    case "$package" in ''|'#'*) continue ;; esac
    command -v "$command" >/dev/null 2>&1 && continue
    if [ -n "$suite" ]; then older="$older $package/$suite"; else missing="$missing $package"; fi
done < "$1"
[ -z "$missing$older" ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "not root: these Debian packages are missing, the tests that need them are skipped:$missing$older"
    echo "to run those too: sudo sh $0 $1"
    exit 0
fi
echo "installing Debian packages:$missing$older"
# shellcheck disable=SC2086
[ -z "$missing" ] || install $missing || exit 1
for one in $older; do
    # A suite that has gone away must not keep the other tests from running.
    { add_suite "${one#*/}" && install "${one%/*}"; } || echo "$one could not be installed: tests that need it are skipped"
done
