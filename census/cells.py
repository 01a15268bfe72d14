"""Adds the section "Beyond one model" to both notebooks: run in the repository's root.

    python census_cells.py            (twice does no harm: an earlier section is replaced)
"""

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell

ONE = "project-1-induction-heads/induction_heads_notebook.ipynb"
TWO = "project-2-Indirect-Object-Identification/IOI_notebook.ipynb"
TITLE = "# Beyond one model"


def md(text):
    return new_markdown_cell(text.strip())


def code(text, tags=()):
    cell = new_code_cell(text.strip())
    if tags:
        cell.metadata["tags"] = list(tags)
    return cell


FIRST = [
    md(f"""
{TITLE}

**Question.** Olsson et al. argue from 34 models. Does what one toy showed hold for a hundred, and what decides *when* induction heads form?

**Idea.** A **census** (`make census`, see `docs/census.md`) trained toys of 33 settings with several seeds each: one factor at a time about a centre, which is the two-layer toy of part A, and the whole plane of batch size by context length. Each training is one row: the step at the sharpest drop, the scores at the end, the settings. Rows of a census of yours, if you have run one here, stand beside ours.
"""),
    code("""
from pathlib import Path

import census_claims

places = [Path("results/census/toys.parquet"), *Path("../build/census/rows").glob("toy-*.parquet")]
census = pd.concat(map(pd.read_parquet, places), ignore_index=True).drop_duplicates("key")
census = census[(census["kind"] == "toy") & (census["state"] == "done")]
print(f"{len(census)} trainings of {census['seed'].nunique()} seeds")
"""),
    md("""
A row here is a whole training of the kind that part A took apart snapshot by snapshot. Nothing of it is computed anew in this notebook, but for the last training of this section.
"""),
    code("""
about_size = ["n_layers", "smeared", "n_heads", "d_model"]
usual = census[(census["batch"] == 64) & (census["context"] == 47) & (census["lr"] == 3e-3)]
usual = usual[usual["longest"] == 23]
shown = {"final_prefix": "best prefix matching", "emergence_step": "steps to the drop"}
shown |= {"final_icl": "ICL score (nats)"}
usual.groupby(about_size)[list(shown)].mean().rename(columns=shown).round(2)
"""),
    md("""
Each row is a mean over seeds. Look first at the prefix matching of one layer, with and without smeared keys, then down the columns for two layers and more: which sizes differ in *when*, and which in *how well* they end? A gap (`NaN`) means that no head formed in some or all of its trainings.
"""),
    code("""
checks.predict(
    "Twice the batch size: after how many steps do induction heads form?",
    ["after as many", "after fewer, but more than half as many", "after half as many"],
    mine=None,
)
"""),
    code("""
plane = census[census["context"] == 1 + 2 * census["longest"]]
plane = plane[(plane[["n_layers", "n_heads", "d_model"]] == [2, 4, 64]).all(axis=1)]
plane = plane[~plane["smeared"].astype(bool) & (plane["lr"] == 3e-3) & plane["formed"].astype(bool)]
by_place = plane.groupby(["batch", "context"])["emergence_step"]
mean, error = (stat.unstack("context") for stat in (by_place.mean(), by_place.sem()))
"""),
    code("""
plotting.lines(
    list(mean.columns),
    {f"batch {b}": (mean.loc[b].to_numpy(), error.loc[b].fillna(0).to_numpy()) for b in mean.index},
    title="When do induction heads form?",
    x_label="context length in tokens",
    y_label="steps to the sharpest drop",
)
"""),
    md("""
<details><summary>What is seen, and why</summary>

Every line is a batch size, every point a mean over seeds. If only the number of tokens in a step counted, a step of twice as many tokens would always come to the same, and doubling the context would lower the lines as much as doubling the batch does. Compare the distance between lines with their slope: a longer context gives more tokens a step, but it also makes what is to be found lie farther back.

"After half as many steps" would mean that the tokens seen decide alone: each sequence would be as useful beside many others as beside few. Gradients of a larger batch agree with each other more and more, and repeat each other.

</details>
"""),
    md("""
### Exercise 21: fit an exponent

*Difficulty 2 of 5, about 10 minutes.*

A power law $y = c\\,x^\\alpha$ is a straight line in logarithms: $\\log y = \\log c + \\alpha \\log x$. Return $\\alpha$, by least squares over all points.
"""),
    code(
        """
@checks.fit_exponent
def fit_exponent(x: Float[Tensor, "n"], y: Float[Tensor, "n"]) -> float:
    \"\"\"The exponent of the power law that fits y over x best in logarithms.\"\"\"
    raise NotImplementedError()
""",
        ["nbval-check-output"],
    ),
    md("""
<details><summary>Hint 1</summary>

The slope of a line by least squares is the covariance of both axes over the variance of the horizontal one.

</details>
<details><summary>Hint 2</summary>

Take the mean off `x.log()` and off `y.log()`. Then nothing is left of the scale.

</details>
<details><summary>Solution</summary>

```python
@checks.fit_exponent
def fit_exponent(x: Float[Tensor, "n"], y: Float[Tensor, "n"]) -> float:
    \"\"\"The exponent of the power law that fits y over x best in logarithms.\"\"\"
    a, b = x.log() - x.log().mean(), y.log() - y.log().mean()
    return ((a * b).sum() / (a * a).sum()).item()
```

</details>
"""),
    code("""
def column(rows: pd.DataFrame, name: str) -> Float[Tensor, "n"]:
    return torch.tensor(rows[name].to_numpy(dtype=float)).float()


by_batch = {
    f"context {c}": fit_exponent(column(rows, "batch"), column(rows, "emergence_step"))
    for c, rows in plane.groupby("context")
}
pd.Series(by_batch).round(2).to_frame("exponent of the batch size")
"""),
    md("""
One exponent for each context length, by your function. If they agree, batch and context act independently, and one law with two exponents is enough; if they drift with the context, it is not.
"""),
    code("""
from utils.power_law import fit_power_law

factors = {name: column(plane, name) for name in ("batch", "context")}
law = fit_power_law(factors, column(plane, "emergence_step"), column(plane, "seed").long())
exponents = {name: str(exponent) for name, exponent in law.exponents.items()}
interval = {name: [round(x, 2) for x in found] for name, found in law.intervals.items()}
pd.DataFrame({"exponent": exponents, "95 % of the draws": interval})
"""),
    md("""
Both exponents at once. The errors come from drawing whole seeds again: trainings of one seed share their weights and data, so they are not independent of each other.

A law is worth what it predicts. Here is a setting that is not in the grid: predict when its induction heads form, by the law, *then* train it. It takes about half a minute.
"""),
    code("""
from census.grid import CENTRE, with_context
from census.training import train

held_out = CENTRE._replace(batch=48, seed=11 + SEED, n_steps=500, **with_context(28))
predicted = law.at({"batch": 48.0, "context": float(held_out.context)})
found = train(held_out)["emergence_step"]
print(f"predicted {predicted:.0f} steps, found {found:.0f}: {found / predicted:.2f} times as many")
"""),
    md("""
How far off may it be? Compare with how much seeds of one setting differ from each other: that much no law of batch and context can say. Then try settings farther away, and see where the law ends.
"""),
    code("""
for claim_id, measured in census_claims.figures(census).items():
    ledger.record(claim_id, *measured)
"""),
    md("""
The claims of the census join the ledger below. Their rules were written before the census ran, and each says what toys can show of a claim about language models, and what not.
"""),
]

SECOND = [
    md(f"""
{TITLE}

**Question.** Where in a model do the roles sit, and is that the same from model to model?

**Idea.** The census of models (`make census ARGS="--models ..."`, see `docs/census.md`) measures any list of models and revisions as this notebook and the first one do, one row each. From three models on, this section draws how deep their heads sit.
"""),
    code("""
models = sorted(Path("../project-1-induction-heads/results/census").glob("models.parquet"))
models += sorted(Path("../build/census/rows").glob("model-*.parquet"))
rows = [pd.read_parquet(path) for path in models]
measured = pd.concat(rows).drop_duplicates("key") if rows else pd.DataFrame({"state": []})
measured = measured[measured["state"] == "done"]
print(f"{len(measured)} measured; the figure needs three")
"""),
    md("""
The rows are those committed with the repository and, if you have run a census, yours.
"""),
    code("""
roles = ["previous_token", "duplicate_token", "induction"]
columns = [f"n_{role}" for role in roles] + ["ioi_logit_diff", "ioi_accuracy"]
measured.set_index("name")[columns].round(2) if len(measured) else "none yet: see below"
"""),
    md("""
How many heads score 0.4 or more by each stripe, and whether the model does the task at all. A model that does not prefer the indirect object has no circuit for it to be looked for.
"""),
    code("""
depth = {role.replace("_", " "): measured[f"{role}_depth"] for role in roles if len(measured) > 2}
if depth:
    names = list(measured["name"])
    words = dict(title="How deep do the roles sit?", y_label="mean depth (1: last layer)")
    display(plotting.bars(names, {k: v.to_numpy() for k, v in depth.items()}, **words))
else:
    print('Next: make census ARGS="--models owner/one owner/two owner/three"')
"""),
    md("""
What to look for once there are bars: previous-token heads below induction heads in every model would be the order that the circuit needs, as an induction head reads what a previous-token head wrote. Whether the *shares* of the depth agree too is another matter, and an open one.
"""),
]


def add(path, cells, before):
    notebook = nbformat.read(path, as_version=4)
    starts = [i for i, c in enumerate(notebook.cells) if c.source.startswith(TITLE)]
    (end,) = (i for i, c in enumerate(notebook.cells) if c.source.startswith(before))
    begin = starts[0] if starts else end
    # ids of their own that do not change from run to run
    for i, cell in enumerate(cells):
        cell["id"] = f"beyond-{i}"
    notebook.cells[begin:end] = cells
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for cell in [*FIRST, *SECOND]:
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert cell.cell_type == "markdown" or len(lines) <= 12, cell.source
    add(ONE, FIRST, "# The ledger")
    add(TWO, SECOND, "# The ledger")
