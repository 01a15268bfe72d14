#!/bin/sh
# Known vulnerabilities in what is installed, secrets in what is committed, risky calls in the code.
# What bandit is told to pass over, and why, is in pyproject.toml.
set -eu
venv=.venv-audit
python3 -m venv "$venv"
"$venv/bin/python" -m pip install -q pip-audit==2.10.1 bandit==1.9.4 detect-secrets==1.5.0
# The look of random letters is no sign here: hashes and pictures have it.
git ls-files -z | xargs -0 "$venv/bin/detect-secrets-hook" \
    --disable-plugin Base64HighEntropyString --disable-plugin HexHighEntropyString
"$venv/bin/bandit" -q -c pyproject.toml -r utils census tools project-1-* project-2-*
"$venv/bin/pip-audit" --no-deps --disable-pip -r constraints.txt
