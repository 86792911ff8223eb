#!/usr/bin/env bash
# Runs both lines of README's first screen in a bare Debian with only the packages that it names.
#
#   .ci/clean_machine.sh [SUITE]     a Debian release; bookworm by default
#
# Needs root, debootstrap and a quarter of an hour. The checkout's HEAD is what is installed. How
# this machine reaches its registries (mirrors, certificates, pip's settings) is the machine's and
# no part of the README, so the chroot is given it. Prints what each line took, and the results.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
suite=${1:-bookworm}
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
command -v debootstrap >/dev/null || { echo "debootstrap is missing: apt install debootstrap" >&2; exit 2; }

root=$(mktemp -d)
chmod 755 "$root"
mounted=()
clean_up() {
  for place in "${mounted[@]}"; do umount -l "$root/$place" || true; done
  if grep -q " $root/" /proc/mounts; then # never delete what is this machine's
    echo "still mounted, left as it is: $root" >&2
    return
  fi
  rm -rf --one-file-system "$root"
}
trap clean_up EXIT
share() { # a folder of this machine at its own place in the chroot
  mkdir -p "$root/$1"
  mount --rbind "/$1" "$root/$1"
  mount --make-rslave "$root/$1"
  mounted+=("$1")
}
inside() { # a shell line in the chroot's clone, with nothing of this machine's but its registries
  nice env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb \
    LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive "${registries[@]}" \
    chroot "$root" /bin/bash -c "cd /root/pyengine && $1"
}
registries=()
while IFS= read -r setting; do registries+=("$setting"); done \
  < <(env | grep -E '^(PIP_FIND_LINKS=|PIP_INDEX_URL=|PIP_EXTRA_INDEX_URL=|PIP_DEFAULT_TIMEOUT=|https?_proxy=|HTTPS?_PROXY=|no_proxy=|NO_PROXY=)' || true)

debootstrap --variant=minbase "$suite" "$root" "$mirror" >"$root.log" 2>&1 ||
  { tail -5 "$root.log"; exit 1; }
rm -f "$root.log"
share proc
share dev
cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
cp -L /etc/ssl/certs/ca-certificates.crt "$root/machine.crt" # Debian's package writes its own
registries+=(PIP_CERT=/machine.crt SSL_CERT_FILE=/machine.crt)
[ -e /etc/pip.conf ] && cp /etc/pip.conf "$root/etc/"
[ -e "$HOME/.config/pip/pip.conf" ] && install -D "$HOME/.config/pip/pip.conf" "$root/root/.config/pip/pip.conf"
# Folders that pip's settings name, whole: an index links across
for place in $(cat /etc/pip.conf "$HOME/.config/pip/pip.conf" 2>/dev/null |
  grep -oE '(file:/)?/[^ ]+' | sed 's|^file://||' | grep -v '^/etc/' | cut -d/ -f2 | sort -u); do
  share "$place"
done
clone() {
  rm -rf "$root/root/pyengine"
  git -C "$here" archive --prefix=root/pyengine/ HEAD | tar -x -C "$root"
}
clone

mapfile -t lines < <(python3 "$here/.ci/docs_blocks.py" --first-screen)
printf 'bare %s: %s packages, %s\n' "$suite" "$(inside 'dpkg -l | grep -c ^ii')" "$(inside 'cat /etc/debian_version')"
status=0
for line in "${lines[@]}"; do
  printf '\n$ %s\n' "$line"
  case $line in apt*) inside "apt-get update -qq" ;; esac
  clone
  start=$SECONDS
  if TIMEFORMAT='%R s; processor time %U s, of the system %S s'; time inside "${line/apt install/apt-get install -qq -y}" >"$root/out" 2>&1; then
    tail -3 "$root/out"
  else
    status=1
    tail -40 "$root/out"
    echo "FAILED after $((SECONDS - start)) s"
  fi
done
exit $status
