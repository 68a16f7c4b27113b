#!/bin/sh
# Installs the host packages of host-packages.txt, and those named as arguments, that are missing,
# and looks for the Rust toolchain. Says what it installs; does nothing, silently, when all is
# there.
set -eu
here=$(dirname "$0")
packages="$(grep -v '^#' "$here/host-packages.txt") $*"

if ! command -v cargo > /dev/null; then
	echo "prerequisites: no cargo here: install Rust (https://rustup.rs), then try again" >&2
	exit 1
fi

if ! command -v dpkg-query > /dev/null; then
	echo "prerequisites: this is no Debian; see to it that these are installed:" >&2
	echo "$packages" >&2
	exit 0
fi

missing=
for package in $packages; do
	status=$(dpkg-query -W -f '${Status}' "$package" 2> /dev/null) || status=absent
	[ "$status" = "install ok installed" ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" != 0 ]; then
	echo "prerequisites: missing:$missing" >&2
	echo "prerequisites: installing them needs root: run this as root, or 'apt-get install$missing'" >&2
	exit 1
fi
echo "prerequisites: installing$missing"
export DEBIAN_FRONTEND=noninteractive
apt-get -q update < /dev/null
# shellcheck disable=SC2086 # one word per package
apt-get -q -y --no-install-recommends install $missing < /dev/null
