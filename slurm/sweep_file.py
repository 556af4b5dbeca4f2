"""A sweep's file: which trainings, and what each is asked, checked before anything starts."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llava.errors import UserError, note
from llava.eval.pope import SETS, read_questions_of, set_of
from llava.eval.pope_questions import same_picture
from llava.files import existing
from slurm import runs
from slurm.launch import ROOT, find_script
from slurm.sweep_stages import ASK, DIAGNOSE, Run, Stage, with_root

KEYS = ("output_dir", "train", "grid", "list", "baseline", "pope", "dev", "diagnose")
TRAININGS = ("train_dpo.py", "train_pretrain.py")
SEEDS = ("--seed", "--data_seed")
LONGEST_NAME = 120  # characters of a run's folder
BASELINE = "baseline"
# What the sweep says itself, by the key of its file.
OURS = {
    "train": {"--output_dir": "it sets a folder for each run, inside output_dir"},
    "pope": dict.fromkeys(("--model_path", "--model_base", "--output_dir"), "it asks every run, into the run's folder"),
}
# Flags of pope_eval.py that llava.eval.diagnose knows too: the same questions, asked in the same way.
SHARED = ("coco_path", "pope_path", "prompt", "conv_mode", "dtype", "load_8bit", "load_4bit", "cache_dir")
SHARED += ("skip_missing_images",)


@dataclass(frozen=True)
class Sweep:
    """What is to be done; the baselines come first among the ``runs``."""

    file: Path
    folder: Path
    runs: list[Run]
    select: bool  # test questions only for the configuration that is best on the development set

    @property
    def programs(self) -> list[list[str]]:
        """All commands, in the order in which one after the other would do them."""
        stages = [stage for run in self.runs for stage in run.first]
        return [stage.command for stage in (*stages, *(stage for run in self.runs for stage in run.later))]


def read_sweep(path: Path, select: bool) -> Sweep:
    """The sweep of a file; ``select`` is ``--select-on dev``.

    Raises:
        UserError: anything in it that could not be run, or would be run twice.
    """
    file = existing(path, "--sweep")
    content = _load(file)
    for key in ("output_dir", "train", "pope"):
        if key not in content:
            raise UserError(f"{file}: {key} is missing; expected {', '.join(KEYS)}")
    if not isinstance(content["output_dir"], str) or not content["output_dir"].strip():
        raise UserError(f"{file}: output_dir: expected the path of a folder")
    folder = Path(content["output_dir"]).expanduser()
    train, pope = (_words(file, key, content[key], OURS[key]) for key in ("train", "pope"))
    dev = _words(file, "dev", content["dev"], OURS["pope"]) if "dev" in content else None
    diagnose = _words(file, "diagnose", content["diagnose"], OURS["pope"]) if "diagnose" in content else None
    if not train or Path(train[0]).name not in TRAININGS or Path(find_script(train)[0]).resolve().parent != ROOT:
        raise UserError(
            f"{file}: train: expected {' or '.join(TRAININGS)} with its arguments, found '{' '.join(train[:1])}'; "
            "how it is started is said by flags of submit.py (--launcher, --processes)"
        )
    flags = _flags(file, content, train)
    if select and dev is None:
        raise UserError(f"{file}: --select-on dev needs dev: flags of pope_eval.py for questions about other pictures")
    _check_questions(file, "pope", pope)
    if dev is not None:
        _check_questions(file, "dev", dev)
    if select:
        _refuse_shared_pictures(file, pope, dev or [])
    elif dev is not None:
        note(f"{file}: dev is not asked without --select-on dev")
    trainings = _trainings(file, train, flags, folder)
    runs.commands([*train, *(word for run in flags for word in _as_words(run)), "--output_dir", str(folder)], None)
    runs.commands(["pope_eval.py", *pope, *(dev or [])], None)
    if diagnose is not None:
        _check_module(file, diagnose)
    models = _baselines(file, content, train, flags)
    planned = [_run(name, folder / name, model, [], pope, dev, None, select) for name, model in models.items()]
    for name, command in trainings.items():
        shared = None if diagnose is None else [*_shared(pope, diagnose), *_base_cache(folder, diagnose), *diagnose]
        planned.append(_run(name, folder / name, str(folder / name), command, pope, dev, shared, select))
    return Sweep(file, folder, planned, select)


def _run(
    name: str,
    folder: Path,
    model: str,
    train: list[str],
    pope: list[str],
    dev: list[str] | None,
    diagnose: list[str] | None,
    select: bool,
) -> Run:
    """A run's stages; ``train`` is empty for a model that is only asked."""

    def ask(stage: str, words: list[str]) -> Stage:
        said = runs._value(words, "--set")
        extra = [*([] if said else ["--set", "all"]), *([] if "--scores" in words else ["--scores"])]
        place = str(folder / stage)
        return Stage(stage, [ASK, "--model-path", model, *words, *extra, "--output_dir", place], place)

    first = [Stage("train", train, str(folder))] if train else []
    first.append(ask("dev", dev) if select and dev is not None else ask("pope", pope))
    later = [ask("pope", pope)] if select else []
    if diagnose is not None:
        place = str(folder / "pope")
        words = [*DIAGNOSE, "--model-path", model, *diagnose, "--output_dir", place]
        later.append(Stage("diagnose", words, place))
    return Run(name, str(folder), first, later)


def _load(file: Path) -> dict[str, Any]:
    """The file as text: what looks like a number stays as it was written."""
    try:
        text = file.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.BaseLoader)
        content = yaml.load(text, Loader=yaml.BaseLoader)
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text at byte {error.start}; save the file as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"{file}: {where}{getattr(error, 'problem', None) or 'no YAML'}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected keys with values: {', '.join(KEYS)}")
    _refuse_repeated(file, node)
    for key in content:
        if key not in KEYS:
            raise UserError(f"{file}: unknown key {key}; expected {', '.join(KEYS)}")
    return content


def _refuse_repeated(file: Path, node: yaml.Node) -> None:
    # YAML's own readers keep the last of two.
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated(file, item)
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                raise UserError(f"{file}: line {key.start_mark.line + 1}: {key.value} stands there twice")
            seen.add(key.value)
            _refuse_repeated(file, value)


def _words(file: Path, key: str, value: Any, ours: dict[str, str]) -> list[str]:
    """Text with a shell's quoting, or a list of words."""
    if isinstance(value, str):
        try:
            words = shlex.split(value.replace("\\\n", " "))
        except ValueError as error:
            raise UserError(f"{file}: {key}: {error}; quote as in a shell") from None
    elif isinstance(value, list) and all(isinstance(word, str) for word in value):
        words = value
    else:
        raise UserError(f"{file}: {key}: expected a text or a list of words")
    for word in words:
        if (flag := runs.flag_name(word)) in ours:
            raise UserError(f"{file}: {key}: {word.split('=')[0]} has no place in a sweep: {ours[flag]}")
    return words


def _flags(file: Path, content: dict[str, Any], train: list[str]) -> list[dict[str, list[str]]]:
    """Of every run the flags that vary, with their values as text."""
    if not content.keys() & {"grid", "list"}:
        raise UserError(f"{file}: nothing varies; expected grid: {{flag: [values]}}, list: [{{flag: value}}], or both")
    grid, items = content.get("grid", {}), content.get("list", [{}])
    if not isinstance(grid, dict) or not all(isinstance(v, list) and v for v in grid.values()):
        raise UserError(f"{file}: grid: expected flags with a list of values each, as learning_rate: [1e-6, 2e-6]")
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise UserError(f"{file}: list: expected entries of flags with values, as {{lora_r: 64, lora_alpha: 128}}")
    given = {flag for word in train if (flag := runs.flag_name(word))}
    listed = {key for item in items for key in item}
    for key in (*grid, *listed):
        flag = runs.flag_name(f"--{key}")
        if flag in OURS["train"]:
            raise UserError(f"{file}: {key} has no place in a sweep: {OURS['train'][flag]}")
        if flag in given:
            raise UserError(f"{file}: {key} stands in train and in grid or list; keep it in one of them")
    for key in grid:
        if key in listed:
            raise UserError(f"{file}: {key} stands in grid and in list; keep it in one of them")
    if not grid and not listed:
        raise UserError(f"{file}: nothing varies: grid and list name no flag")
    if any(not item for item in items) and not grid:
        raise UserError(f"{file}: list: an entry without a flag; expected entries as {{lora_r: 64, lora_alpha: 128}}")
    order = [key for part in content if part in ("grid", "list") for key in (grid if part == "grid" else _keys(items))]
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    found = []
    for item, combination in itertools.product(items, combinations):
        both = {**item, **combination}
        found.append({key: _values(file, key, both[key]) for key in order if key in both})
    return found


def _keys(items: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for item in items for key in item))


def _values(file: Path, key: str, value: Any) -> list[str]:
    """A flag's words: one, or of a list several."""
    words = value if isinstance(value, list) else [value]
    if not words or not all(isinstance(word, str) and word for word in words):
        raise UserError(f"{file}: {key}: expected a value, or a list of values for a flag that takes several")
    if runs.flag_name(f"--{key}") in SEEDS and not (len(words) == 1 and words[0].isdigit()):
        raise UserError(f"{file}: {key}: {' '.join(words)} is no seed; expected a whole number, 0 or more")
    return words


def _as_words(flags: dict[str, list[str]]) -> list[str]:
    return [word for key, values in flags.items() for word in (f"--{key}", *values)]


def _trainings(file: Path, train: list[str], flags: list[dict[str, list[str]]], folder: Path) -> dict[str, list[str]]:
    """The commands by the runs' names."""
    commands: dict[str, list[str]] = {}
    seen: dict[str, str] = {}
    for run in flags:
        name = _name(run)
        # 1e-6 and 0.000001 are one run.
        same = repr(sorted((runs.flag_name(f"--{key}"), [*map(_plain, values)]) for key, values in run.items()))
        if same in seen:
            raise UserError(f"{file}: {seen[same]} and {name} are the same run; leave one out")
        if name in commands or name == BASELINE:
            raise UserError(f"{file}: two runs would have the folder {name}; values must differ in letters or digits")
        seen[same] = name
        commands[name] = [*train, *_as_words(run), "--output_dir", str(folder / name)]
    return commands


def _plain(value: str) -> str:
    try:
        return repr(float(value))
    except ValueError:
        return value


def _name(flags: dict[str, list[str]]) -> str:
    """A folder: the flags that vary. Commas would separate the models of a stack, so there is none."""
    text = "_".join(f"{key}={'-'.join(values)}" for key, values in flags.items())
    name = re.sub(r"[^A-Za-z0-9._=-]+", "-", text)
    if len(name) > LONGEST_NAME:
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        name = f"{name[: LONGEST_NAME - 9]}-{digest}"
    return name


def _baselines(
    file: Path, content: dict[str, Any], train: list[str], flags: list[dict[str, list[str]]]
) -> dict[str, str]:
    """Models that are asked untrained, by name."""
    if "baseline" in content:
        given = content["baseline"]
        if not isinstance(given, str) or not given:
            raise UserError(f"{file}: baseline: expected a model's folder or hub id, or false for none")
        return {} if given.lower() in ("false", "no") else {BASELINE: given}
    if runs._value(train, "--vision_tower"):
        note(f"{file}: a language model with --vision_tower cannot be asked untrained: there is no baseline")
        return {}
    key = "--model_name_or_path"
    common = runs._value(train, key)
    of_runs = [
        word for run in flags for name, words in run.items() if runs.flag_name(f"--{name}") == key for word in words
    ]
    models = [common] if common else list(dict.fromkeys(of_runs))
    if not models:
        raise UserError(f"{file}: train has no {key}; name the baseline: a model, or false for none")
    if len(models) == 1:
        return {BASELINE: models[0]}
    return {f"{BASELINE}_{_name({'model': [model]})}": model for model in models}


def _question_files(file: Path, key: str, words: list[str]) -> list[Path]:
    given = runs._value(words, "--pope_path")
    if not given:
        raise UserError(f"{file}: {key}: --pope_path is missing: a folder of coco_pope_*.json")
    path = Path(given).expanduser()
    if path.is_file():
        return [path]
    found = [f for place in (path, path / "output" / "coco") for f in sorted(place.glob("coco_pope_*.json"))]
    if not found:
        raise UserError(f"{file}: {key}: --pope_path {given}: no coco_pope_*.json there (nor in output/coco)")
    return found


def _check_questions(file: Path, key: str, words: list[str]) -> None:
    files = _question_files(file, key, words)
    said = runs._value(words, "--set") or "all"
    for name in SETS if said == "all" else ({"adv": "adversarial"}.get(said, said),):
        if name not in map(set_of, files):
            raise UserError(
                f"{file}: {key}: --pope_path {runs._value(words, '--pope_path')}: no questions of the set '{name}' "
                "there; add them, or say which set is to be asked (--set)"
            )
    pictures = runs._value(words, "--coco_path")
    if not pictures or not Path(pictures).expanduser().is_dir():
        raise UserError(f"{file}: {key}: --coco_path {pictures or 'is missing'}: expected the folder of the pictures")


def _refuse_shared_pictures(file: Path, pope: list[str], dev: list[str]) -> None:
    """A configuration chosen on pictures of the test would be chosen on the test."""
    test, development = (
        {
            same_picture(image): f
            for f in _question_files(file, key, words)
            for image, _ in read_questions_of(f).values()
        }
        for key, words in (("pope", pope), ("dev", dev))
    )
    if shared := sorted(test.keys() & development.keys()):
        raise UserError(
            f"{file}: dev and pope ask about {len(shared)} of the same pictures ({shared[0]}: {development[shared[0]]} "
            f"and {test[shared[0]]}); --select-on dev needs other pictures (python -m llava.eval.pope_questions)"
        )


def _shared(pope: list[str], diagnose: list[str]) -> list[str]:
    """Those of POPE's words that say which questions and how, where ``diagnose`` does not say them itself."""
    own = {runs.flag_name(word) for word in diagnose}
    wanted = {f"--{flag}" for flag in SHARED} - own
    found: list[str] = []
    keep = False
    for word in pope:
        flag = runs.flag_name(word)
        keep = flag in wanted if flag else keep
        found += [word] if keep else []
    return found


def _base_cache(folder: Path, diagnose: list[str]) -> list[str]:
    """What is known of the base is computed for the first run and found by the others."""
    said = "--base_cache" in {runs.flag_name(word) for word in diagnose}
    return [] if said else ["--base_cache", str(folder / "diagnose_base")]


def _check_module(file: Path, words: Sequence[str]) -> None:
    done = subprocess.run(
        [sys.executable, *DIAGNOSE, "--help"], capture_output=True, text=True, check=False, env=with_root(os.environ)
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"{DIAGNOSE[-1]} --help fails here, and so would the diagnosis: {said}")
    known = {runs.flag_name(flag) for flag in re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", done.stdout)}
    for word in words:
        if (flag := runs.flag_name(word)) and flag not in known:
            raise UserError(
                f"{file}: diagnose: unknown flag {word}; python {' '.join(DIAGNOSE)} --help lists the flags"
            )
