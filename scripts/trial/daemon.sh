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
    inside 10 sh -c 'echo "workspace_roots = [\"/srv/workspaces\"]" > /etc/isolator/isolator.toml'
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

try_daemon() {
    say "isolator itself, under its own unit"
    inside 60 systemctl stop isolator.service
    step "installing it in /opt/isolator" install_daemon || fail "it could not be installed."
    step "systemctl start isolator" inside 120 systemctl start isolator.service || { daemon_words; exit 1; }
    step "isolator info over the activated socket" daemon_isolator 60 info || { daemon_words; exit 1; }
    if [[ -s $root/opt/wheels/images.tar ]]; then
        step "spawn --wait: an agent writes to its staged workspace" spawn_one || { daemon_words; exit 1; }
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
