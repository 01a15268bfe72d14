#!/bin/sh
# Opens a pull request with results that differ from the committed ones: tools/propose_results.sh <model>
# The nightly workflow runs it after `make notebooks`; a request that is open already gets the new commit.
set -eu
model=$1
branch=results-$model
.venv/bin/python -m tools.notebooks keep "$model"
git add -- README.md project-*/README.md project-*/results
if git diff --cached --quiet; then
    echo "The results of $model are those that are committed."
    exit 0
fi
git checkout -q -B "$branch"
git -c user.name="github-actions[bot]" -c user.email="github-actions[bot]@users.noreply.github.com" \
    commit -q -m "Results of $model, from the nightly run"
git push -q --force origin "$branch"
if [ "$(gh pr list --head "$branch" --state open --json number --jq length)" = 0 ]; then
    gh pr create --head "$branch" --title "Results of $model" \
        --body "Made by the nightly workflow. What to look at before merging: CONTRIBUTING.md, \"When the first run of GPT-2 small comes in\"."
fi
