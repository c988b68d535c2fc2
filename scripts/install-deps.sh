#!/usr/bin/env bash
# Installs what building and testing need on Debian 12: PostgreSQL 15 with its headers, a C and
# a C++ compiler, make, git (a build script of the io_uring library runs it),
# openssl (for certificates of tests), fio (a baseline of the benches). Does nothing for what is there already, and says what it
# does.
set -euo pipefail

packages=()
want() { # package, then a test that succeeds when it is there
  local package=$1
  shift
  "$@" >/dev/null 2>&1 || packages+=("$package")
}

want gcc command -v gcc
want g++ command -v g++
want make command -v make
want git command -v git
want openssl command -v openssl
want fio command -v fio
want postgresql-15 test -x /usr/lib/postgresql/15/bin/postgres
want postgresql-client-15 test -x /usr/lib/postgresql/15/bin/psql
want postgresql-server-dev-15 test -f /usr/include/postgresql/15/server/postgres.h

if ! command -v cargo >/dev/null 2>&1; then
  echo "install-deps: there is no Rust toolchain; install one (1.88 or newer) from https://rustup.rs" >&2
  exit 1
fi
if [ ${#packages[@]} -eq 0 ]; then
  exit 0
fi

run=()
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null 2>&1; then
    echo "install-deps: run as root: apt-get install ${packages[*]}" >&2
    exit 1
  fi
  run=(sudo)
fi
if ! command -v apt-get >/dev/null 2>&1; then
  echo "install-deps: this is no Debian; install by hand: ${packages[*]}" >&2
  exit 1
fi
echo "install-deps: installing ${packages[*]}"
# Debian's packages start a cluster of their own otherwise.
if [ ! -e /etc/postgresql-common/createcluster.conf ]; then
  "${run[@]}" mkdir -p /etc/postgresql-common
  echo "create_main_cluster = false" | "${run[@]}" tee /etc/postgresql-common/createcluster.conf >/dev/null
fi
"${run[@]}" apt-get update -qq
"${run[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
