#!/usr/bin/env bash
# Puts an nginx that knows `resolve` in an upstream block (1.27.4 or newer) on PATH, for the tests.
#
# Debian 12 has 1.22. This takes the one of Debian 14 together with its own C library, unpacks both
# into a folder of their own and writes a wrapper. The system's packages are not touched.
# Needs root and apt-get; does nothing where such an nginx is there already.
set -euo pipefail

NEEDED=1.27.4
RELEASE=forky
HOME_OF_NGINX=${1:-/opt/nginx-tests}
WRAPPER=${2:-/usr/local/bin/nginx}
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

is_recent() {
  local version
  version=$("$1" -v 2>&1 | sed -nE 's|.*nginx/([0-9.]+).*|\1|p') || return 1
  [[ -n $version && $(printf '%s\n' "$NEEDED" "$version" | sort -V | head -1) == "$NEEDED" ]]
}

installed=$(command -v nginx || true)
if [[ -n $installed ]] && is_recent "$installed"; then
  exit 0
fi

# The mirror that this machine's own apt uses.
mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 2>/dev/null |
  grep '/debian/*$' | head -1 || true)
mirror=${mirror:-http://deb.debian.org/debian}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/unpacked"
: >"$work/status" # no package is installed, so apt lists everything that nginx needs, libc too
echo "deb [signed-by=$KEYRING] $mirror $RELEASE main" >"$work/sources.list"
apt=(apt-get -qq
  -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=/dev/null
  -o Dir::State::Lists="$work/lists" -o Dir::State::status="$work/status"
  -o Dir::Cache="$work/cache" -o APT::Sandbox::User=root -o Acquire::Retries=3)
"${apt[@]}" update
"${apt[@]}" install --download-only --yes --no-install-recommends nginx >/dev/null
for package in "$work"/cache/archives/*.deb; do
  dpkg-deb --extract "$package" "$work/unpacked"
done

libraries=$(cd "$work/unpacked" && find usr -name 'libc.so.6' -printf '%h' -quit)
loader=$(cd "$work/unpacked" && find "$libraries" -name 'ld-linux*' -print -quit)
rm -rf "$HOME_OF_NGINX"
mkdir -p "$(dirname "$HOME_OF_NGINX")" "$(dirname "$WRAPPER")"
mv "$work/unpacked" "$HOME_OF_NGINX"
cat >"$WRAPPER" <<END
#!/bin/sh
# Written by tests/deploy/install_nginx.sh
exec "$HOME_OF_NGINX/$loader" --library-path "$HOME_OF_NGINX/$libraries" "$HOME_OF_NGINX/usr/sbin/nginx" "\$@"
END
chmod 755 "$HOME_OF_NGINX" "$WRAPPER"
is_recent "$WRAPPER" || { echo "$WRAPPER does not run" >&2; exit 1; }
