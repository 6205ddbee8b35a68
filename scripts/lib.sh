# shellcheck shell=bash
# What the scripts share: saying what happens and how long it took, and bounded waiting. Sourced, not run.

# Where the output of a quiet step goes until it is needed to explain a failure.
step_log=""

say() { printf '%s\n' "$*"; }

fail() {
    printf '\nStopped: %s\n' "$1" >&2
    shift
    local line
    for line in "$@"; do printf '  %s\n' "$line" >&2; done
    exit 1
}

# step WHAT COMMAND...: run quietly, say what and how long; on failure show the end of its output and return its code.
step() {
    local what="$1" started="$EPOCHREALTIME" code=0 took
    shift
    step_log="$(mktemp)"
    printf '  %-58s ' "$what"
    "$@" >"$step_log" 2>&1 </dev/null || code=$?
    took="$(elapsed "$started")"
    if [[ $code -eq 0 ]]; then
        printf 'done in %s s\n' "$took"
    else
        printf 'FAILED after %s s (exit %s)\n' "$took" "$code"
        tail -n 30 "$step_log" | sed 's/^/    | /' >&2
    fi
    rm -f "$step_log"
    return "$code"
}

# elapsed START: seconds since START (a value of EPOCHREALTIME), one decimal.
elapsed() {
    local now="$EPOCHREALTIME"
    local tenths=$(((${now/[.,]/} - ${1/[.,]/}) / 100000))
    printf '%d.%d' $((tenths / 10)) $((tenths % 10))
}

# wait_until SECONDS COMMAND...: true as soon as the command succeeds, false when the time is over.
wait_until() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [[ $SECONDS -lt $end ]] || return 1
        sleep 0.2
    done
}

is_root() { [[ $EUID -eq 0 ]]; }

# Debian and what descends from it: apt is there.
is_debian() { command -v apt-get >/dev/null && [[ -r /etc/debian_version ]]; }

systemd_is_pid_1() { [[ -d /run/systemd/system ]]; }

# loud_step WHAT COMMAND...: as step, for what takes minutes and tells its own progress.
loud_step() {
    local what="$1" started="$EPOCHREALTIME" code=0
    shift
    printf '  %s\n' "$what"
    "$@" </dev/null 2>&1 | sed -u 's/^/    | /' || code="${PIPESTATUS[0]}"
    if [[ $code -eq 0 ]]; then
        printf '  %-58s done in %s s\n' "$what" "$(elapsed "$started")"
    else
        printf '  %-58s FAILED after %s s (exit %s)\n' "$what" "$(elapsed "$started")" "$code"
    fi
    return "$code"
}
