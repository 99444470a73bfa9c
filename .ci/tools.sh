# What the scripts beside it share; sourced, not run. What cannot be had is for the script to skip, with a word.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\n== %s (%s s)\n' "$*" "$SECONDS"; }
skip() { printf 'SKIPPED: %s\n' "$*"; }

# The commands before `--` are here, or can be installed with the packages after it.
debian() {
    local commands=() command
    while [ "$1" != -- ]; do commands+=("$1") && shift; done
    shift
    for command in "${commands[@]}"; do
        if ! command -v "$command" >/dev/null; then
            { apt-get update -qq && apt-get install -qq -y "$@"; } >/dev/null 2>&1 || return 1
        fi
    done
}

# A nightly toolchain with these components is here, or can be installed.
nightly() {
    cargo +nightly --version >/dev/null 2>&1 || rustup toolchain install nightly --profile minimal >/dev/null 2>&1 || return 1
    [ $# = 0 ] || rustup component add "$@" --toolchain nightly >/dev/null 2>&1
}
