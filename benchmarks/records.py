"""Records: the best students of an experiment over several seeds, with what they cost.

    python benchmarks/records.py --model <folder> --evaluation chat.json wiki.txt \
        --runs outputs/SR-001 outputs/SR-002 outputs/SR-003 --changed "latent weights learn"
    python benchmarks/records.py --merge elsewhere.json

The runs are `stage=run` of one `+experiment=…`, and nothing but their seed may differ. The best checkpoint of each
is measured by what measures everything in `quality.py`, in fp32; `--json` gets the rows of the record that stands
then, so that it is a point of that comparison's picture as well. `--records` gets the record and `--page` is written
anew from all of them. A stage costs what it did in the run where it took longest: what one run made, the others found.

`--looks` are `stage=evaluate` of the same runs: KL by position of a text, answers and tasks of the package, as far as
each measured them. One command gives all columns, the teacher's accuracy by its being among the models:

    python launch.py stage=evaluate checkpoint=SR-001 evaluate.against=[teacher] evaluate.text=wiki.txt \
        evaluate.tokens=65536 evaluate.answers=200 evaluate.tasks=[local]

A machine that measures and has no checkout says `--commit`, and its `--records` are merged elsewhere. Seeds that one
experiment at one commit did not have yet join its record; all that it had, measured again, take its place.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from evaluation import Evaluation, add_arguments, trained
from results import SEEDS_OF_A_RECORD, Results, shown

from qat.artifacts import write_json
from qat.checkpoint_files import BEST
from qat.errors import ArtifactError, ConfigError, QatError
from qat.evaluate.local import NAMES as TASKS
from qat.identities import RESULT
from qat.names import TEACHER
from qat.records import Record
from qat.shaping import flat, is_neutral

STAGES = ("cache", "convert", "distill")
SEEDS = ("seed", "data.seed")  # what shapes a result and may differ
FIGURES = ("kl", "kd_loss", "perplexity", "teacher_perplexity", "agreement")
# Columns of what stage=evaluate measures: of the student, and of the teacher where it has such a figure
LOOKS = {
    "KL at 64 to 127": ("kl_64_128", "{:.3f}"),
    "KL at 1,024 to 2,047": ("kl_1024_2048", "{:.3f}"),
    "answers that end": ("ended", "{:.0%}"),
    "accuracy": ("accuracy", "{:.1%}"),
}
NOTHING = "–"
PAGE = """# Records

The best students so far: KL(teacher‖student) over the whole vocabulary at T = 1, in fp32, on text that neither
training nor calibration saw; mean and standard deviation over the seeds. MB are those of the packed file, bits are
effective bits on the MLP, scales and the like included. Seconds are those of cache, conversion and distillation, and of
the whole job, evaluation and all. KL by position is on a text in windows of 2,048 tokens; answers are the greedy ones
to the package's 200 prompts that end by themselves within 128 tokens; accuracy is the mean over its local tasks, both
with the teacher's in brackets; a dash where nobody measured them. The record that stands is in bold: one stands with
three seeds, and another beats it with three of its own, on some text by more than the two standard deviations together,
on none by as much worse, and in a file that is no larger. Written by `benchmarks/records.py` from
[records.json](records.json), which has more figures.
"""


def main() -> None:
    """Measures a record if runs are given, takes in those of other files, writes the page."""
    options = arguments()
    try:
        kept = read(Path(options.records)) if Path(options.records).exists() else []
        fresh = [record for path in options.merge for record in read(Path(path))]
        if options.runs:
            told = described(options)
            check_seeds(kept, told)
            told["looks"] = [look(Path(folder), options.runs) for folder in options.looks]
            fresh.append(told | measure(options, told["preset"]))
        for record in fresh:
            kept = added(kept, record)
        for preset in dict.fromkeys(record["preset"] for record in fresh):
            members = [record for record in kept if record["preset"] == preset]
            for row in (standing(members) or members[-1])["texts"].values():
                Results(Path(options.json)).add(row)
    except QatError as error:
        raise SystemExit(f"records.py: {error}") from None
    write_json(Path(options.records), kept)
    Path(options.page).write_text(page(kept), encoding="utf-8")
    print(*(table([x for x in kept if x["preset"] == kept[-1]["preset"]]) if options.runs else []), sep="\n")


def described(options: argparse.Namespace) -> dict[str, Any]:
    """What the runs of a record say of themselves.

    Raises:
        ConfigError: they are not one experiment's complete runs.
    """
    runs = [result(Path(run)) for run in options.runs]
    check(runs)
    first = runs[0]
    return {
        "preset": first["quant"]["preset"],
        "experiment": experiment(first),
        "changed": options.changed,
        "commit": options.commit or first["environment"]["git"],
        "date": first["started"][:10],
        "device": first["environment"]["device"],
        "seeds": [run["config"]["seed"] for run in runs],
        "seconds": {part: max(run["timing"].get(f"{part}_s", 0.0) for run in runs) for part in (*STAGES, "total")},
    }


def measure(options: argparse.Namespace, preset: str) -> dict[str, Any]:
    """Bits and figures of the runs' best students; `--json` waits until they are in a record."""
    work = Evaluation(options)
    entry = trained(work, preset, [Path(run) / BEST for run in options.runs])
    with TemporaryDirectory() as folder:
        rows = Results(Path(folder) / "rows.json")
        work.measure(entry, rows)
        found = rows.rows
    return {
        "measured": time.strftime("%Y-%m-%d"),
        "bits": found[0]["bits"],
        "bits_all": found[0]["bits_all"],
        "megabytes": found[0]["megabytes"],
        "texts": {row["text"]: row for row in found},
    }


def check_seeds(records: list[dict[str, Any]], fresh: dict[str, Any]) -> None:
    """Makes sure that no seed of a record is lost to a fresh one.

    Raises:
        ConfigError: the record there has some of these seeds and others as well.
    """
    for old in (record for record in records if _place(record) == _place(fresh)):
        there, seeds = set(old["seeds"]), set(fresh["seeds"])
        if there & seeds and there - seeds:
            known = ", ".join(map(str, old["seeds"]))
            raise ConfigError(
                f"{fresh['experiment']} at {fresh['commit']} has seeds {known}: give all of them or others"
            )


def added(records: list[dict[str, Any]], fresh: dict[str, Any]) -> list[dict[str, Any]]:
    """The records with one more, which joins one of theirs that has other seeds or replaces it; it is the last.

    Raises:
        ConfigError: as `check_seeds` and `joined` say.
    """
    check_seeds(records, fresh)
    others = [record for record in records if _place(record) != _place(fresh)]
    for old in (record for record in records if _place(record) == _place(fresh)):
        if not set(old["seeds"]) & set(fresh["seeds"]):
            fresh = joined(old, fresh)
    return [*others, fresh]


def joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """One record of two that have different seeds.

    Raises:
        ConfigError: they were not measured alike.
    """
    differing = sorted(text for text in one["texts"] | other["texts"] if _measured(one, text) != _measured(other, text))
    if differing:
        raise ConfigError(f"seeds of {one['experiment']} were measured on different {', '.join(differing)}")
    return other | {
        "changed": other["changed"] or one["changed"],
        "device": " and ".join(dict.fromkeys([one["device"], other["device"]])),
        "seeds": one["seeds"] + other["seeds"],
        "seconds": {part: max(one["seconds"][part], value) for part, value in other["seconds"].items()},
        "looks": one.get("looks", []) + other.get("looks", []),
        "texts": {text: pooled(one["texts"][text], row) for text, row in other["texts"].items()},
    }


def pooled(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """One row of two: means and sample standard deviations over the seeds of both (Chan, Golub & LeVeque 1979)."""
    rows = (one, other)
    counts = [row.get("seeds", 1) for row in rows]
    total = sum(counts)
    means, deviations = {}, {}
    for name in FIGURES:
        apart = other[name] - one[name]
        within = [(row["seeds"] - 1) * row["deviation"][name] ** 2 for row in rows if "seeds" in row]
        between = apart**2 * math.prod(counts) / total
        means[name] = one[name] + apart * counts[1] / total
        deviations[name] = math.sqrt((sum(within) + between) / (total - 1))
    both = [checkpoint for row in rows for checkpoint in row["settings"]["checkpoints"]]
    told = {"settings": other["settings"] | {"checkpoints": both}, "seeds": total, "deviation": deviations}
    return other | means | told


def standing(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The one of a preset's records, oldest first, that no later one beats; None before three seeds of any."""
    found = None
    for record in records:
        if len(record["seeds"]) >= SEEDS_OF_A_RECORD and (found is None or beats(record, found)):
            found = record
    return found


def beats(fresh: dict[str, Any], old: dict[str, Any]) -> bool:
    """Whether one record of three seeds is better than another by more than chance, and no larger.

    A difference counts where it is larger than the standard deviations of both together.
    """
    gaps = []
    for text in fresh["texts"].keys() & old["texts"].keys():
        one, other = fresh["texts"][text], old["texts"][text]
        gaps.append((other["kl"] - one["kl"], one["deviation"]["kl"] + other["deviation"]["kl"]))
    better, as_good = any(gap > spread for gap, spread in gaps), all(gap >= -spread for gap, spread in gaps)
    return better and as_good and fresh["megabytes"] <= old["megabytes"]


def result(folder: Path) -> dict[str, Any]:
    """What a finished run recorded.

    Raises:
        ConfigError: it is not a whole job that came to its end.
    """
    path = folder / RESULT
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if (found.get("stage"), found.get("status")) != ("run", "complete"):
        raise ConfigError(f"{folder} is not the folder of a complete stage=run")
    return found


def look(folder: Path, runs: list[str]) -> dict[str, float]:
    """What a complete `stage=evaluate` says of the student of one of some runs, and of the teacher.

    Raises:
        ConfigError: it is none, or one of another student.
    """
    path = folder / RESULT
    found = Record(folder, json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}, str(folder))
    if (found.text("stage"), found.status) != ("evaluate", "complete"):
        raise ConfigError(f"{folder} is not the folder of a complete stage=evaluate")
    measured = Path(found.text("config", "checkpoint", "path"))
    students = {place.resolve() for run in runs for place in (Path(run), Path(run) / BEST)}
    if measured.resolve() not in students:
        raise ConfigError(f"{folder} measured {measured}, which is no student of {', '.join(runs)}")
    models = found.section("evaluation", "models")
    sides = {"": next(name for name in models if name != TEACHER), "teacher_": TEACHER}
    told = {key: found.number("metrics", key) for key in ("kl_64_128", "kl_1024_2048")}
    for prefix, name in sides.items():
        told[f"{prefix}ended"] = found.number("evaluation", "models", name, "answers", "greedy", "ended")
        scores = [found.number("evaluation", "models", name, "scores", task, "acc") for task in TASKS]
        told[f"{prefix}accuracy"] = None if None in scores else statistics.fmean(scores)
    return {key: value for key, value in told.items() if value is not None}


def check(runs: list[dict[str, Any]]) -> None:
    """Makes sure that runs are one experiment and differ in their seeds.

    Raises:
        ConfigError: they do not.
    """
    first = runs[0]
    if len({run["config"]["seed"] for run in runs}) < len(runs):
        raise ConfigError("two of these runs have the same seed")
    for run in runs[1:]:
        names = f"{first['run_id']} and {run['run_id']}"
        differing = _differences(first, run)
        if differing:
            raise ConfigError(f"{names} differ in {', '.join(differing)}: a record is one configuration")
        if run["environment"]["git"] != first["environment"]["git"]:
            raise ConfigError(f"{names} ran at different commits")


def experiment(run: dict[str, Any]) -> str:
    """The option of conf/experiment that a run was started with.

    Raises:
        ConfigError: it was started without one.
    """
    given = [word.partition("=")[2] for word in run["overrides"] if word.lstrip("+").startswith("experiment=")]
    if not given:
        raise ConfigError(f"{run['run_id']} was not started with +experiment=…, so nobody could repeat it by name")
    return given[0]


def page(records: list[dict[str, Any]]) -> str:
    """The whole page: a table a preset, oldest record first."""
    presets: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        presets.setdefault(record["preset"], []).append(record)
    parts = [PAGE]
    for preset, members in sorted(presets.items()):
        parts.append("\n".join([f"## {preset}", "", *table(members)]) + "\n")
    return "\n".join(parts)


def table(records: list[dict[str, Any]]) -> list[str]:
    """Markdown lines."""
    texts = sorted({text for record in records for text in record["texts"]})
    kinds = [f"{text} KL" for text in texts]
    heads = ["date", "experiment", "MB", "bits", *kinds, *LOOKS, "seconds", "device", "seeds", "commit"]
    lines = [[*heads, "what changed"], ["---"] * (len(heads) + 1)]
    stands = standing(records)
    for record in records:
        kl = [shown(record["texts"][text]) if text in record["texts"] else "" for text in texts]
        kl = [f"**{figure}**" if figure and record is stands else figure for figure in kl]
        seconds = " + ".join(f"{record['seconds'][stage]:.0f}" for stage in STAGES)
        told = f"{seconds}, {record['seconds']['total']:.0f}", record["device"], str(len(record["seeds"]))
        name = f"[{record['experiment']}](../conf/experiment/{record['experiment']}.yaml)"
        start = [record["date"], name, f"{record['megabytes']:.1f}", f"{record['bits']:.2f}"]
        looks = [looked(record.get("looks", []), *column) for column in LOOKS.values()]
        lines.append([*start, *kl, *looks, *told, f"`{record['commit'] or 'unknown'}`", record["changed"]])
    return [f"| {' | '.join(cells)} |" for cells in lines]


def looked(looks: list[dict[str, float]], figure: str, form: str) -> str:
    """The mean of a figure over the seeds that have it, the teacher's in brackets."""
    sides = [[one[name] for one in looks if name in one] for name in (figure, f"teacher_{figure}")]
    student, teacher = (form.format(statistics.fmean(values)) if values else "" for values in sides)
    return (f"{student} ({teacher})" if teacher else student) or NOTHING


def read(path: Path) -> list[dict[str, Any]]:
    """Records of a file.

    Raises:
        ArtifactError: there is none, or it is not what this script writes.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        for record in records:
            _place(record)
        return records
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path} does not hold records of this script ({error!r})") from None


def _place(record: dict[str, Any]) -> tuple[str, str, str]:
    return record["preset"], record["experiment"], record["commit"]


def _measured(record: dict[str, Any], text: str) -> dict[str, Any]:
    """How a record was measured on a text; nothing where it was not."""
    settings = record["texts"].get(text, {}).get("settings", {})
    return {name: value for name, value in settings.items() if name != "checkpoints"}


def _differences(*runs: dict[str, Any]) -> list[str]:
    """Names of the values that differ and can change what comes of a run, their seeds aside."""
    ours, theirs = (dict(flat(run["config"])) for run in runs)
    differing = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    return [name for name in differing if not (name in SEEDS or is_neutral(name))]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--runs", nargs="+", default=[], help="folders of runs, one a seed")
    parser.add_argument("--looks", nargs="+", default=[], help="folders of stage=evaluate of these runs")
    parser.add_argument("--changed", default="", help="what is different from the record before")
    parser.add_argument("--commit", help="of the code, where the runs could not tell")
    parser.add_argument("--json", default="docs/quality.json", help="rows of the comparison")
    parser.add_argument("--records", default="docs/records.json")
    parser.add_argument("--merge", nargs="+", default=[], metavar="JSON", help="files whose records go there as well")
    parser.add_argument("--page", default="docs/RECORDS.md")
    options = parser.parse_args()
    if options.runs and not (options.model and options.evaluation):
        parser.error("--runs need --model and --evaluation")
    return options


if __name__ == "__main__":
    main()
