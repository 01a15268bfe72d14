#!/bin/sh
# Opens an issue that says which run of the weekly workflow failed, or adds it to the one that is open:
# tools/report_break.sh <address of the run>
set -eu
title="The weekly run with other versions fails"
body="$1 failed. What ran with which versions is in its log; make test-oldest and make test-newest try it here."
open=$(gh issue list --state open --search "in:title \"$title\"" --json number --jq '.[0].number // empty')
if [ "$open" ]; then
    gh issue comment "$open" --body "$body"
else
    gh issue create --title "$title" --body "$body"
fi
