# shellcheck shell=bash
# The second half of scripts/try-systemd --with-daemon: isolator itself, installed as docs/service.md says, and
# an agent run by it inside the booted system. Sourced; uses the caller's here, root, work, inside, step, say, fail.
# shellcheck disable=SC2154

# Wheels for the Python of the booted Debian (3.11), so that it needs no network; images, if this machine has them.
collect_wheels() {
    local wheels="$root/opt/wheels" python="$here/.venv/bin/python" lock
    mkdir -p "$wheels"
    "$python" -m pip wheel --quiet --no-deps --wheel-dir "$wheels" "$here" || return 1
    "$python" -m pip download --quiet --only-binary=:all: --python-version 3.11 --dest "$wheels" "$wheels"/isolator-*.whl ||
        return 1
    lock="$("$python" -c 'from isolator.settings import load_settings; print(load_settings().image_lock_path)')"
    if [[ -s $lock ]] && docker image inspect isolator/agent-python:latest >/dev/null 2>&1; then
        docker save --output "$root/opt/wheels/images.tar" isolator/agent-python:latest || return 1
        install -D -m 0600 "$lock" "$root/var/lib/isolator/images.json"
    fi
}

install_daemon() {
    inside 60 rm -r /opt/isolator
    inside 60 python3 -m venv /opt/isolator
    inside 180 sh -c '/opt/isolator/bin/pip install --quiet --no-index --find-links /opt/wheels isolator'
    inside 10 install -d /etc/isolator /srv/workspaces/one
    inside 10 chown 10001:10001 /srv/workspaces/one
    inside 10 sh -c 'printf "%s\n" "workspace_roots = [\"/srv/workspaces\"]" "pool_depth = 1" > /etc/isolator/isolator.toml'
    inside 60 systemctl start docker.service isolator.socket
    if [[ -s $root/opt/wheels/images.tar ]]; then
        inside 120 docker load --input /opt/wheels/images.tar
    fi
}

daemon_isolator() { inside "$1" /opt/isolator/bin/isolator "${@:2}"; }

daemon_words() { inside 10 journalctl --no-pager -n 60 -u isolator.service; }

spawn_one() {
    daemon_isolator 90 spawn --team trial --workspace /srv/workspaces/one --wait -- \
        python3 -c 'open("/workspace/out", "w").write("written by the agent")'
    grep -q "written by the agent" "$root/srv/workspaces/one/out"
}

not() { ! "$@"; }

info_has() { daemon_isolator 60 info --json | grep -q "$1"; }

# An agent in the background, and what a gateway does in it: commands with and without a terminal, files, messages.
work_in_one() {
    local agent
    agent="$(daemon_isolator 90 spawn --team trial --workspace /srv/workspaces/one -- sleep 600 | tail -n 1)"
    [[ "$(daemon_isolator 30 exec "$agent" -- sh -c 'id -u; cat' <<<"through stdin")" == $'10001\nthrough stdin' ]] ||
        { echo "exec without a terminal" >&2; return 1; }
    inside 30 /opt/isolator/bin/python -c "
from isolator.client import Client
with Client() as client:
    run = client.exec('$agent', ['sh', '-c', 'tty; stty size'], tty=True, size=(90, 33))
    output = b''.join(data for _, data in run)
    assert b'/dev/pts/' in output and b'33 90' in output, output
    files, path = client.files('$agent'), '/workspace/by-the-gateway'
    files.write(path, b'written through the API')
    assert files.read(path) == b'written through the API'
" || return 1
    [[ "$(stat -c %u "$root/srv/workspaces/one/by-the-gateway")" == 10001 ]] || { echo "the file's owner" >&2; return 1; }
    daemon_isolator 30 stop --grace 0 "$agent"
}

pool_filled() { [[ -n "$(daemon_isolator 20 ps --pool --quiet)" ]]; }
is_warm() { daemon_isolator 30 inspect --json "$1" | grep -Eq '"warm": ?true'; }

spawn_warm() {
    local agent
    wait_until 60 pool_filled || { echo "no box waits" >&2; return 1; }
    agent="$(daemon_isolator 90 spawn --team trial --workspace /srv/workspaces/one -- sleep 600 | tail -n 1)"
    is_warm "$agent" || { echo "it was built, not claimed" >&2; return 1; }
    [[ "$(daemon_isolator 30 exec "$agent" -- cat /workspace/out)" == "written by the agent" ]] || return 1
    daemon_isolator 30 stop --grace 0 "$agent"
}

with_pool_drop_in() {
    install -D -m 0644 "$here/systemd/isolator-pool.conf" "$root/etc/systemd/system/isolator.service.d/pool.conf"
    inside 30 systemctl daemon-reload
    inside 120 systemctl restart isolator.service
}

try_daemon() {
    say "isolator itself, under its own unit"
    inside 60 systemctl stop isolator.service
    step "installing it in /opt/isolator" install_daemon || fail "it could not be installed."
    step "systemctl start isolator" inside 120 systemctl start isolator.service || { daemon_words; exit 1; }
    step "isolator info over the activated socket" daemon_isolator 60 info || { daemon_words; exit 1; }
    if [[ -s $root/opt/wheels/images.tar ]]; then
        step "spawn --wait: an agent writes to its staged workspace" spawn_one || { daemon_words; exit 1; }
        step "exec, terminal and files in an agent" work_in_one || { daemon_words; exit 1; }
        step "the bare unit can't place workspaces in ready boxes, and says so" info_has pool_unavailable ||
            { daemon_words; exit 1; }
        step "restart with the pool's drop-in" with_pool_drop_in || { daemon_words; exit 1; }
        step "... with it, it can" not info_has pool_unavailable || { daemon_words; exit 1; }
        step "an agent is spawned" spawn_one || { daemon_words; exit 1; }
        step "and the next one is served from the pool, workspace and all" spawn_warm || { daemon_words; exit 1; }
        step "exec, terminal and files, again" work_in_one || { daemon_words; exit 1; }
    else
        say "  This machine holds no built image: no agent was spawned (isolator image build, then again)"
    fi
    step "restart" inside 120 systemctl restart isolator.service || { daemon_words; exit 1; }
    step "isolator info after it" daemon_isolator 60 info || { daemon_words; exit 1; }
    step "still up after a watchdog period" still_up || { daemon_words; exit 1; }
}

still_up() {
    sleep 35
    [[ "$(inside 10 systemctl show --value --property NRestarts isolator.service)" == 0 ]]
}
