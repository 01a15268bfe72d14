"""Tables and figures of whatever rows are there."""

from html import escape
from pathlib import Path

import pandas as pd
from plotly.graph_objects import Figure

from census.rows import DONE, FAILED, Results
from utils import plotting
from utils.ledger.results import write_file

ROLES = ("previous_token", "duplicate_token", "induction")
TOY = ["n_layers", "smeared", "n_heads", "d_model", "longest", "context", "batch", "lr"]


def write(results: Results, folder: Path) -> list[Path]:
    """Compact the rows and write tables and figures into a folder; returns the files.

    ValueError when there is no row.
    """
    rows = results.table()
    if rows.empty:
        raise ValueError(f"report: no rows in {results.rows}, run a census first")
    files, parts = [], [counts(rows)]
    done = rows[rows["state"] == DONE]
    figures = {}
    for kind, of_kind in rows.groupby("kind"):
        files.append(folder / f"{kind}s.parquet")
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        of_kind.dropna(axis=1, how="all").to_parquet(files[-1], index=False)
    for kind, table, draw in (("toy", toy_table, emergence), ("model", model_table, depths)):
        if len(of_kind := done[done["kind"] == kind]):
            parts.append(table(of_kind).to_html(float_format="%.3f"))
            figures |= draw(of_kind)
    parts += [figure.to_html(full_html=False, include_plotlyjs=not i)
              for i, figure in enumerate(figures.values())]  # fmt: skip
    files.append(folder / "report.html")
    head = '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Census</title>'
    write_file(files[-1], head + "\n".join(parts) + "</html>\n")
    return files


def counts(rows: pd.DataFrame) -> str:
    """How many are done and failed, and why."""
    failed = rows[rows["state"] == FAILED]
    reasons = (f"{row['key']}: {row['error']}" for _, row in failed.iterrows())
    said = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    return f"<p>{len(rows) - len(failed)} done, {len(failed)} failed.</p><ul>{said}</ul>"


def toy_table(toys: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, a row for each setting."""
    columns = ["formed", "emergence_step", "emergence_tokens", "final_prefix", "final_icl"]
    columns += ["icl_in_window", "seconds"]
    table = toys.assign(formed=toys["formed"].astype(float)).groupby(TOY)[columns].mean()
    return table.assign(seeds=toys.groupby(TOY)["seed"].nunique())


def model_table(models: pd.DataFrame) -> pd.DataFrame:
    """A row for each model."""
    columns = ["first_loss", "second_loss", "icl", "n_induction", "induction_depth"]
    columns += ["lost_to_ablation", "lost_to_control", "ioi_logit_diff", "ioi_accuracy", "seconds"]
    return models.set_index("name")[columns]


def emergence(toys: pd.DataFrame) -> dict[str, Figure]:
    """Steps to the sharpest drop over context length, a line for each batch size."""
    plane = toys[(toys["context"] == 1 + 2 * toys["longest"]) & toys["formed"].astype(bool)]
    plane = plane[plane[["n_layers", "n_heads", "d_model"]].eq([2, 4, 64]).all(axis=1)]
    plane = plane[~plane["smeared"].astype(bool) & (plane["lr"] == 3e-3)]
    by_place = plane.groupby(["batch", "context"])["emergence_step"]
    if by_place.ngroups < 2:
        return {}
    mean, error = (stat.unstack("context") for stat in (by_place.mean(), by_place.sem()))
    series = {f"batch {int(b)}": (mean.loc[b].to_numpy(), error.loc[b].fillna(0).to_numpy())
              for b in mean.index}  # fmt: skip
    words = dict(title="When do induction heads form?", x_label="context length in tokens")
    words |= dict(y_label="steps to the sharpest drop", log_x=True, log_y=True)
    return {"emergence": plotting.lines(list(mean.columns), series, **words)}


def depths(models: pd.DataFrame) -> dict[str, Figure]:
    """Mean relative depth of each role, from three models on."""
    if len(models) < 3:
        return {}
    values = {role.replace("_", " "): models[f"{role}_depth"].to_numpy() for role in ROLES}
    words = dict(title="How deep do the roles sit?", y_label="mean depth (1: last layer)")
    return {"depths": plotting.bars(list(models["name"]), values, **words)}
