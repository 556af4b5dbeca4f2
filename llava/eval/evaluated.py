"""What POPE runs have left on the disk, as arrays: answers joined to their labels, and how each model was trained.

    runs = read_runs([Path("checkpoints/sweep"), Path("pope_results")])
    for group in grouped(runs): ...  # runs that differ in nothing but their seed

Free of torch. Read are ``pope_eval.py``'s folders (``run_*.json``, ``pope_SET.jsonl``), the label files that they were
made from, and the ``run.json`` of every model below the one that was asked.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llava.errors import UserError, note, warn
from llava.eval.pope import (
    PROTOCOLS,
    SETS,
    Confusion,
    Label,
    answers_of,
    is_parsed,
    parse_answer,
    read_answers,
    read_labels,
    read_questions_of,
    score,
    set_of,
)
from llava.files import field, read_json, read_jsonl, read_object, sha256
from llava.run_card import FILE as RUN_CARD

LEVELS = 4  # folders below a given one that are looked through
DEV = "dev"  # the folder of a development set's answers
POPE = "pope"  # pope_eval.py's folder inside a checkpoint
AGAIN = ".rerun"  # ends the name of a folder that repeats another one; it is no run more

# Arguments of the training scripts that do not decide a number (but for rounding). All others do, also new ones.
NOT_DECIDING = (
    # which model, and what it learns from on which disk: told by ``Run.root``, ``Run.start`` and the data files
    *("model_name_or_path", "lora_weight_path", "image_folder", "vg_path", "cache_dir"),
    *("feature_cache", "cache_hidden", "reference_cache"),
    # where it is written, and how often
    *("output_dir", "save_only_model", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit"),
    *("enable_jit_checkpoint", "resume_from_checkpoint", "restore_callback_states_from_checkpoint"),
    *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
    "hub_revision",
    # what is logged
    *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "logging_dir"),
    *("log_on_each_node", "log_level", "log_level_replica", "log_freq", "disable_tqdm", "report_to", "run_name"),
    *("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "debug", "skip_memory_metrics"),
    "include_num_input_tokens_seen",
    # which processes do the work, and what they keep in memory
    *("local_rank", "use_cpu", "deepspeed", "full_determinism", "torch_empty_cache_steps"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("activation_checkpointing", "activation_checkpointing_kwargs"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
    *("ddp_backend", "ddp_timeout"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order"),
    # without effect in these scripts, or another name of what is there too
    *("lazy_preprocess", "is_multimodal", "ignore_bias_buffers", "mpt_attn_impl", "remove_unused_columns"),
    *("label_names", "length_column_name", "lora_bias", "do_train", "do_predict", "optimizer_type"),
)
# What is measured on held-out data while a model trains: decides where the best of its checkpoints is kept.
MEASURING = (
    *("eval_data_path", "eval_strategy", "evaluation_strategy", "eval_steps", "eval_delay", "do_eval"),
    *("per_device_eval_batch_size", "prediction_loss_only", "eval_on_start", "eval_do_concat_batches"),
    *("eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics"),
    *("bf16_full_eval", "fp16_full_eval", "metric_for_best_model", "greater_is_better"),
)
DATA_FILES = ("data_path", "desc_data_path", "pope_data_path", "aux_data")

# Settings that are no argument of the last training: which script it was, what it went on from if that is not the root,
# which of its checkpoints was asked, with which other deltas; and the name of a delta that was made elsewhere.
COMPUTED = ("script", "start", "checkpoint", "with", "delta")

# Settings of a POPE run. ``--batch_size`` is not among them: it rounds, and by default is what fits the card.
# ``attn_implementation`` is a flag of the training scripts too.
ASKED = ("prompt", "conv_mode", "dtype", "load_8bit", "load_4bit", "pope.attn_implementation", "max_new_tokens")
NOTHING = "null"  # as JSON: what an older card does not know, a flag that is off


@dataclass(frozen=True, eq=False)
class SetAnswers:
    """One set of questions, answered: arrays over its Q questions in the order of the label file."""

    name: str  # "random", "popular", "adversarial", or any other
    labels_file: Path
    sha256: str  # of the label file
    ids: np.ndarray  # (Q,) int64
    images: np.ndarray  # (Q,) str, file name of the picture
    questions: list[str]
    truth: np.ndarray  # (Q,) bool, the label is yes
    said: np.ndarray  # (Q,) bool, the answer means yes (llava.eval.pope.parse_answer)
    scores: np.ndarray | None  # (Q,) float64, probability of yes (--scores); None where an answer has none
    texts: list[str]  # the answers
    unparsed: int  # answers that say neither yes nor no

    def confusion(self) -> Confusion:
        """Counts with 'yes' as the positive class."""
        pairs = Counter(zip(self.truth.tolist(), self.said.tolist(), strict=True))
        return Confusion(
            tp=pairs[True, True],
            fp=pairs[False, True],
            tn=pairs[False, False],
            fn=pairs[True, False],
            unparsed=self.unparsed,
        )


@dataclass(frozen=True, eq=False)
class Run:
    """One model asked. Sets are in the order random, popular, adversarial, others."""

    name: str  # shortest trailing part of its folder's path that no other run read with it has
    folder: Path  # of the model asked, if it was trained here and lies on this disk; else of the answers
    answers: Path  # folder of the answers (of the development set's, where there are no others)
    sets: dict[str, SetAnswers]
    dev: dict[str, SetAnswers]  # of a folder "dev" beside "pope"; a run may have these alone
    model: str  # short name of ``root``
    root: str  # the model at the bottom of the chain: a path, or a hub id as given
    start: str  # what the last training began from, as ``root`` is written; "" where nothing was trained here
    hadpo: bool  # train_dpo.py trained it, or something that it stands on
    settings: dict[str, Any]  # arguments that decide numbers, of the last training and of POPE (``ASKED``)
    seed: int | None  # of the last training
    card: dict[str, Any]  # of the POPE run (of the first, where there are several)
    training: dict[str, Any] | None  # run.json of the last training; None where nothing was trained here


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in nothing but their seed, by seed; ``settings`` are theirs without it."""

    runs: tuple[Run, ...]
    settings: dict[str, Any]


def read_runs(folders: Sequence[Path], labels: Path | None = None) -> list[Run]:
    """All POPE runs in ``folders`` and up to four levels below them, in the order of the folders and of names.

    A folder may be a training's (with ``pope/`` and ``dev/`` inside), one of answers, a sweep's, or one above these.
    Runs that are not finished are left out with a note. ``labels`` is where label files are that are not where they
    were: a folder of ``coco_pope_*.json``, or POPE's repository.

    Raises:
        UserError: no such folder, no finished run in any, a label file that is gone or another one, answers that are
            not those their card counted, or one folder whose sets were asked in different ways.
    """
    reader = _Reader(labels)
    answered: dict[Path, list[Path]] = {}  # folders of answers, by what they belong to
    places_of: dict[str, set[Path]] = {}
    trained: dict[Path, None] = {}
    for given in folders:
        top = Path(given).expanduser()
        if not top.is_dir():
            raise UserError(f"{given}: {'a file; expected a' if top.is_file() else 'no such'} folder")
        places = places_of.setdefault(str(given), set())
        for folder in _walk(top.resolve(), LEVELS, set()):
            if card_of(folder / RUN_CARD) is not None:
                trained[folder] = None
            if _holds_answers(folder):
                place = folder.parent if folder.name in (POPE, DEV) else folder
                places.add(place)
                if folder not in answered.setdefault(place, []):
                    answered[place].append(folder)
    found = {place: reader.at(place, inside) for place, inside in answered.items()}
    runs = [run for here in found.values() for run in here]
    if not runs:
        unfinished = f"; not finished: {', '.join(map(str, reader.unfinished))}" if reader.unfinished else ""
        raise UserError(
            f"{', '.join(places_of)}: no finished POPE run (looked {LEVELS} levels down for run_*.json and "
            f"pope_SET.jsonl as pope_eval.py writes them{unfinished}); ask the questions with pope_eval.py"
        )
    for given, places in places_of.items():
        if not any(found[place] for place in places):
            note(f"{given}: no finished POPE run in it")
    _tell_unasked(trained, runs, reader.unfinished)
    return _with_names(_with_contents(runs))


def grouped(runs: Iterable[Run]) -> list[Group]:
    """Runs that differ in nothing but their seed, in the order in which they come first; each group by seed.

    Of one training asked twice, or copied, the first counts. Two trainings with one seed, and an untrained model asked
    twice, stay in their group, with a warning.
    """
    by_key: dict[str, list[Run]] = {}
    for run in runs:
        settings = _without_seed(run.settings).items()
        shown = {name: text for name, value in settings if (text := _as_json(value)) != NOTHING}
        by_key.setdefault(json.dumps([run.root, run.start, shown], sort_keys=True), []).append(run)
    groups = []
    for members in by_key.values():
        members.sort(key=lambda run: -1 if run.seed is None else run.seed)
        for one, other in itertools.pairwise(list(members)):
            if one.training and other.training and one.training.get("run", "") == other.training.get("run"):
                note(f"{other.answers}: answers of the training that {one.answers} is of too; they are left out")
                members.remove(other)
            elif (one.seed, _data_seed(one)) == (other.seed, _data_seed(other)):
                what = "the same model asked" if one.seed is None else f"seed {one.seed} is there"
                warn(f"{what} twice: {one.answers} and {other.answers}; both count")
        groups.append(Group(tuple(members), _without_seed(members[0].settings)))
    return groups


def differing(groups: Iterable[Group]) -> list[str]:
    """Settings in which groups differ, in the order of the training scripts' arguments; POPE's come last.

    Training's are compared among the groups that were trained, without one that all others went on from (they have its
    training in common); POPE's among all. A setting that a group lacks is as None, or as False. One that its script did
    not know, the other or an older one, is left out where all groups with it agree.
    """
    groups = list(groups)
    trained = _without_origin([group for group in groups if group.runs[0].training is not None])
    arguments = [name for group in trained for name in (group.runs[0].training or {}).get("arguments", {})]
    names = dict.fromkeys([*COMPUTED, *arguments, *(name for group in trained for name in group.settings)])
    found = [name for name in names if name not in ASKED and _differ(trained, name)]
    return [
        *(name for name in found if name in COMPUTED or not _unknown(trained, name)),
        *(name for name in ASKED if _differ(groups, name)),
    ]


def _data_seed(run: Run) -> Any:
    return run.settings.get("data_seed")


def _without_origin(trained: list[Group]) -> list[Group]:
    """Groups but for one that all others went on from, at once or by way of one another."""
    runs = {str(run.folder): run for group in trained for run in group.runs}
    stages = []  # by group: what it went on from
    for group in trained:
        found: list[str] = []
        start = group.runs[0].start
        while start in runs and start not in found:
            found.append(start)
            start = runs[start].start
        stages.append(found)
    for group in trained:
        own = {str(run.folder) for run in group.runs}
        others = [found for other, found in zip(trained, stages, strict=True) if other is not group]
        if others and all(own.intersection(found) for found in others):
            return [other for other in trained if other is not group]
    return trained


def _differ(groups: list[Group], name: str) -> bool:
    return len({_as_json(group.settings.get(name)) for group in groups}) > 1


def _unknown(groups: list[Group], name: str) -> bool:
    """Whether groups differ in an argument only because the scripts that trained some of them do not know it."""
    having = [group for group in groups if name in group.settings]
    others = [(group.runs[0].training or {}).get("arguments") for group in groups if name not in group.settings]
    return not _differ(having, name) and all(known and name not in known for known in others)


def _as_json(value: Any) -> str:
    return json.dumps(None if value is False else value, sort_keys=True)


def _without_seed(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in ("seed", "data_seed")}


# Folders


def _walk(folder: Path, levels: int, seen: set[Path]) -> Iterator[Path]:
    real = folder.resolve()
    if real in seen:
        return
    seen.add(real)
    yield folder
    if not levels:
        return
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}; give the folders inside that can be") from None
    for name in names:
        if not re.match(r"\.|checkpoint-\d+$", name) and not re.search(rf"{re.escape(AGAIN)}\d*$", name):
            yield from _walk(folder / name, levels - 1, seen)


def answer_cards(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Cards of POPE runs in a folder with their files, the oldest first.

    Raises:
        UserError: one is broken.
    """
    cards = [(file, card) for file in sorted(folder.glob("run_*.json")) if (card := card_of(file, "model_path"))]
    return sorted(cards, key=lambda pair: str(pair[1].get("started")))


def card_of(file: Path, argument: str = "model_name_or_path") -> dict[str, Any] | None:
    """A run card whose arguments hold ``argument`` (by default a training's); other programs use such names too.

    Raises:
        UserError: it is broken.
    """
    card = (read_object if file.name == RUN_CARD else read_json)(file) if file.exists() else None
    arguments = card.get("arguments") if isinstance(card, dict) else None
    return card if isinstance(arguments, dict) and argument in arguments else None


def _holds_answers(folder: Path) -> bool:
    """Whether ``pope_eval.py`` was at work in a folder, finished or not."""
    return any(folder.glob("pope_*.part*.jsonl")) or bool(answer_cards(folder))


def _tell_unasked(trained: Iterable[Path], runs: list[Run], unfinished: list[Path]) -> None:
    """One line on models that were trained and not asked, and that no model asked stands on."""
    known = {run.folder for run in runs} | {Path(run.start) for run in runs} | {Path(run.root) for run in runs}
    known |= {path for folder in unfinished for path in (folder, folder.parent)}
    if missing := [str(folder) for folder in trained if folder not in known]:
        note(f"trained, but not asked POPE's questions: {', '.join(missing)}")


def _with_names(runs: list[Run]) -> list[Run]:
    """Every run with the shortest trailing part of its path that tells it from the others."""
    folders = Counter(run.folder for run in runs)
    parts = [_path_of_name(run, folders[run.folder] == 1).parts for run in runs]
    if len(set(parts)) < len(parts):
        parts = [run.answers.parts for run in runs]
    named = []
    for run, own in zip(runs, parts, strict=True):
        others = [other for other in parts if other is not own]
        lengths = (n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others))
        named.append(replace(run, name=str(Path(*own[-next(lengths, len(own)) :]))))
    return named


def _path_of_name(run: Run, only: bool) -> Path:
    """The path that a run's name is cut from; ``only``: no other run is of its folder."""
    if run.folder != run.answers:
        return run.folder if only or run.answers.parent == run.folder else run.answers
    # A name says the model and not "pope": that is how pope_eval.py calls it in its own row.
    return run.folder.parent if run.folder.name in (POPE, DEV) else run.folder


def _with_contents(runs: list[Run]) -> list[Run]:
    """Data files of one path and several contents are told apart by the beginning of their hashes."""
    hashes: dict[str, set[str]] = {}
    for run in runs:
        for path, digest in _data_of(run).items():
            hashes.setdefault(path, set()).add(digest)
    changed = {path for path, digests in hashes.items() if len(digests) > 1}
    for path in sorted(changed):
        warn(f"{path}: the runs were trained on {len(hashes[path])} different contents of it")
    told = []
    for run in runs:
        digests = {path: digest for path, digest in _data_of(run).items() if path in changed}
        files = {name: value for name, value in run.settings.items() if name in DATA_FILES and value in digests}
        settings = {name: f"{path} ({digests[path][:8]})" for name, path in files.items()}
        told.append(replace(run, settings=run.settings | settings))
    return told


def _data_of(run: Run) -> dict[str, str]:
    data = (run.training or {}).get("data")
    data = data if isinstance(data, dict) else {}
    return {path: str(file.get("sha256")) for path, file in data.items() if isinstance(file, dict)}


# One place


class _Reader:
    """Reads runs; label files that several runs share are read once."""

    def __init__(self, labels: Path | None) -> None:
        self.labels = None if labels is None else Path(labels).expanduser()
        if self.labels is not None and not self.labels.is_dir():
            raise UserError(f"--labels {labels}: no such folder; expected one of coco_pope_*.json")
        self.unfinished: list[Path] = []
        self._hashes: dict[Path, str] = {}
        self._read: dict[Path, tuple[dict[int, Label], dict[int, tuple[str, str]]]] = {}

    def at(self, place: Path, inside: list[Path]) -> list[Run]:
        """The runs whose answers lie in the folders ``inside``: ``place``, ``place/pope`` or ``place/dev``."""
        mains = [asked for folder in inside if folder.name != DEV and (asked := self._asked(folder))]
        dev = self._asked(place / DEV)
        runs = []
        for asked in mains:
            same = dev is not None and _model_asked(dev) == _model_asked(asked)
            runs.append(self._run(asked, asked.sets, dev.sets if same else {}))
            dev = None if same else dev
        if dev is not None and place / DEV in inside:
            runs.append(self._run(dev, {}, dev.sets))
        return [run for run in runs if run]

    def _asked(self, folder: Path) -> _Asked | None:
        """What was asked into a folder; None where there is nothing, or nothing finished."""
        if not folder.is_dir() or not _holds_answers(folder):
            return None
        cards = answer_cards(folder)
        by_set: dict[str, tuple[Path, dict[str, Any]]] = {}
        for file, card in cards:  # the newest last: its answers have replaced the others'
            if card.get("status") == "finished" and isinstance(card.get("metrics"), dict):
                by_set.update(dict.fromkeys(card["metrics"], (file, card)))
        if not by_set:
            note(f"{folder}: its POPE run is not finished ({_how_far(folder, cards)}); it is left out")
            self.unfinished.append(folder)
            return None
        order = sorted(by_set, key=lambda name: SETS.index(name) if name in SETS else len(SETS))
        (first_file, first), *used = {by_set[name][0]: by_set[name] for name in order}.values()
        for file, card in used:
            one, other = ({"model_path": _model_given(c), **_asked_how(c)} for c in (first, card))
            if unlike := [name for name in one if one[name] != other[name]]:
                raise UserError(
                    f"{file}: {unlike[0]} is {other[unlike[0]]!r}, but {one[unlike[0]]!r} in {first_file.name} beside "
                    "it; ask into two folders (--output_dir)"
                )
        return _Asked(folder, {name: self._set(folder, name, *by_set[name]) for name in order}, first)

    def _set(self, folder: Path, name: str, card_file: Path, card: dict[str, Any]) -> SetAnswers:
        file = folder / f"pope_{name}.jsonl"
        if not file.is_file():
            raise UserError(f"{file}: missing, though {card_file.name} counts its answers; ask again with pope_eval.py")
        labels_file, digest = self._labels_file(name, card_file, card)
        if labels_file not in self._read:
            self._read[labels_file] = (read_labels(labels_file), read_questions_of(labels_file))
        labels, asked = self._read[labels_file]
        answers = answers_of(read_answers(file), name, file)
        if card["arguments"].get("skip_missing_images"):
            if missing := labels.keys() - answers.keys():
                note(f"{file}: {len(missing)} of {len(labels)} questions were left out with their missing pictures")
            labels = {number: label for number, label in labels.items() if number in answers}
        counts = score(labels, answers, labels_file, file)
        _check_counts(counts, card["metrics"][name], file, card_file)
        texts = [answers[number].text for number in labels]
        return SetAnswers(
            name=name,
            labels_file=labels_file,
            sha256=digest,
            ids=np.fromiter(labels, np.int64, len(labels)),
            images=np.array([asked[number][0] for number in labels], dtype=np.str_),
            questions=[asked[number][1] for number in labels],
            truth=np.array([label.label == "yes" for label in labels.values()], dtype=bool),
            said=np.array([parse_answer(text) == "yes" for text in texts], dtype=bool),
            scores=_scores(file, labels),
            texts=texts,
            unparsed=sum(not is_parsed(text) for text in texts),
        )

    def _labels_file(self, name: str, card_file: Path, card: dict[str, Any]) -> tuple[Path, str]:
        """The label file of a set and its hash, which must be what the card says."""
        data = field(str(card_file), card, "data", dict)
        recorded = next(
            (path for path in data if name in (set_of(path), Path(path).stem.removeprefix("coco_pope_"))), None
        )
        if recorded is None:
            raise UserError(f"{card_file}: no label file of the set '{name}' under 'data'; ask again with pope_eval.py")
        digest = field(f"{card_file}: {recorded}", data[recorded], "sha256", str)
        places = [_directory(card) / Path(recorded).expanduser()]
        if self.labels is not None:
            for other in (Path(recorded).name, f"coco_pope_{name}.json"):
                places += [self.labels / other, self.labels / "output" / "coco" / other]
        there = [place for place in places if place.is_file()]
        for place in there:
            if self._hash(place) == digest:
                return place, digest
        found = f"{there[-1]} has another content (sha256 {self._hash(there[-1])[:12]}...)" if there else "is not there"
        raise UserError(
            f"{card_file}: its label file {recorded} (sha256 {digest[:12]}...) {'changed: ' if there else ''}{found}; "
            "pass the folder of the one it was asked from as --labels"
        )

    def _hash(self, file: Path) -> str:
        if file not in self._hashes:
            self._hashes[file] = sha256(file)
        return self._hashes[file]

    def _run(self, asked: _Asked, sets: dict[str, SetAnswers], dev: dict[str, SetAnswers]) -> Run | None:
        """A run, still without its name; None where the training of its model is not finished."""
        model = _model_asked(asked)
        chain = _chain(model, asked.card)
        newest, root = chain[0], chain[-1]
        # Deltas of one base, stacked: those that the last one was not trained on.
        beside = [_stage(name) for name in model[:-1] if all(name != stage.identity for stage in chain)]
        settings = _settings(chain) | ({"with": ",".join(_short(s.identity) for s in beside)} if beside else {})
        training = newest.card
        if training is not None and training.get("status") != "finished" and newest.checkpoint is None:
            note(f"{newest.folder}: its training is not finished ({training.get('status')}); it is left out")
            self.unfinished.append(asked.folder)
            return None
        if training is not None and newest.checkpoint is None:
            _tell_trained_again(newest, training, asked)
        start = chain[1].identity if training is not None and len(chain) > 1 else ""
        arguments = training["arguments"] if training is not None else {}
        return Run(
            name="",
            folder=newest.folder if training is not None and newest.folder else asked.folder,
            answers=asked.folder,
            sets=sets,
            dev=dev,
            model=_short(root.identity),
            root=root.identity,
            start=start,
            hadpo=any(stage.card is not None and _script(stage.card) == "train_dpo.py" for stage in chain + beside),
            settings=settings | _asked_how(asked.card),
            seed=arguments.get("seed"),
            card=asked.card,
            training=training,
        )


@dataclass(frozen=True)
class _Asked:
    """A folder of answers, and the first of its cards."""

    folder: Path
    sets: dict[str, SetAnswers]
    card: dict[str, Any]


def _how_far(folder: Path, cards: list[tuple[Path, dict[str, Any]]]) -> str:
    """What heartbeats or cards say about a run that has not finished."""
    states = [read_object(file).get("state") for file in sorted(folder.glob("status_*.json"))]
    said = [str(state) for state in [*states, *(card.get("status") for _, card in cards)] if state]
    return said[0] if said else "no card"


def _check_counts(counts: Confusion, recorded: Any, file: Path, card_file: Path) -> None:
    own = counts.as_dict()
    for key in ("tp", "fp", "tn", "fn"):
        if isinstance(recorded, dict) and recorded.get(key, own[key]) != own[key]:
            raise UserError(
                f"{file}: counts {key} {own[key]}, but {card_file.name} says {recorded[key]}: not the answers it is "
                "about; ask again with pope_eval.py"
            )


def _scores(file: Path, labels: Iterable[int]) -> np.ndarray | None:
    """Probabilities of yes in the order of ``labels``; None where an answer has none."""
    scores: dict[int, float] = {}
    for number, row in read_jsonl(file):
        if "score" not in row:
            return None
        where = f"{file}: line {number}"
        value = field(where, row, "score", (int, float))
        if not 0 <= value <= 1:
            raise UserError(f"{where}: score {value} is no probability; expected 0 to 1")
        scores[int(row["question_id"])] = float(value)
    return np.array([scores[number] for number in labels], dtype=np.float64)


def _asked_how(card: dict[str, Any]) -> dict[str, Any]:
    """The settings of a POPE run (``ASKED``), with what the defaults mean; older cards have fewer keys."""
    arguments = card["arguments"]
    prompt = card.get("protocol") or arguments.get("prompt") or "hadpo"
    hardware = card.get("hardware")
    on_cuda = isinstance(hardware, dict) and bool(hardware.get("gpus"))
    template = PROTOCOLS[prompt].template if prompt in PROTOCOLS else None
    return {
        "prompt": prompt,
        "conv_mode": arguments.get("conv_mode") or template,
        "dtype": arguments.get("dtype") or ("float16" if on_cuda else "float32"),
        "load_8bit": bool(arguments.get("load_8bit")),
        "load_4bit": bool(arguments.get("load_4bit")),
        "pope.attn_implementation": arguments.get("attn_implementation"),
        "max_new_tokens": arguments.get("max_new_tokens", 512),
    }


# The models below


@dataclass(frozen=True)
class _Stage:
    """A model of a chain: an absolute path or a hub id, and ``run.json`` where it was trained here."""

    identity: str
    folder: Path | None  # where it lies, if it does on this disk
    card: dict[str, Any] | None
    checkpoint: str | None  # its name, where it is one of a training's checkpoints


def _model_asked(asked: _Asked) -> list[str]:
    """What was asked: the identities of ``--model-path A,B``, in order."""
    names = _model_given(asked.card)
    # A folder that was moved takes its answers with it.
    inside = asked.folder.name in (POPE, DEV) and card_of(asked.folder.parent / RUN_CARD) is not None
    if inside and not _lies_here(names[-1]):
        names[-1] = str(asked.folder.parent)
    return names


def _model_given(card: dict[str, Any]) -> list[str]:
    return _split(str(card["arguments"]["model_path"]), _directory(card))


def _chain(names: list[str], card: dict[str, Any]) -> list[_Stage]:
    """The model asked, what it was trained on, and so on down to one of which nothing is known.

    A model's own ``run.json`` says what is below it. Where it has none (a delta of other programs), or what it names is
    gone: what stands before it in ``names``, then ``--model-base``, then its ``delta.json``.
    """
    base = card["arguments"].get("model_base")
    given = _split(str(base), _directory(card)) if base else []
    waiting, stages = list(names), []
    while waiting:
        stage = _stage(waiting.pop())
        if any(stage.identity == other.identity for other in stages):
            raise UserError(f"{stage.identity}: its training began from itself, by {RUN_CARD}; mend the path in it")
        stages.append(stage)
        if stage.card is not None:
            below = _began_from(stage.card)
            moved = bool(below) and Path(below[-1]).is_absolute() and not _lies_here(below[-1])
            if not moved:
                waiting = below
            elif not waiting:
                waiting, given = given or below, []
        elif not waiting and _is_delta(stage, bool(given)):
            waiting, given = given or _stands_on(stage), []
    return stages


def _stage(identity: str) -> _Stage:
    folder = Path(identity)
    if not _lies_here(identity):
        return _Stage(identity, None, None, None)
    card = card_of(folder / RUN_CARD)
    if card is None and re.fullmatch(r"checkpoint-\d+", folder.name):
        return _Stage(identity, folder, card_of(folder.parent / RUN_CARD), folder.name)
    return _Stage(identity, folder, card, None)


def _began_from(card: dict[str, Any]) -> list[str]:
    arguments, directory = card["arguments"], _directory(card)
    adapter = arguments.get("lora_weight_path")
    return [
        *_split(str(arguments["model_name_or_path"]), directory),
        *([_identity(adapter, directory)] if adapter else []),
    ]


def _is_delta(stage: _Stage, has_base: bool) -> bool:
    """Whether a model that was not trained here needs another one below it."""
    if stage.folder is None:
        return has_base
    whole = any(stage.folder.glob("*.safetensors")) or any(stage.folder.glob("pytorch_model*.bin"))
    names = ["adapter_config.json", "delta.json", *([] if whole else ["mm_projector.bin"])]
    return any((stage.folder / name).is_file() for name in names)


def _stands_on(stage: _Stage) -> list[str]:
    file = stage.folder / "delta.json" if stage.folder else None
    if file is None or not file.is_file():
        return []
    entries = field(str(file), read_object(file), "base", list)
    return [_identity(field(str(file), entry, "path", str), file.parent) for entry in entries]


def _directory(card: dict[str, Any]) -> Path:
    return Path(str(card.get("working_directory", ".")))


def _split(names: str, directory: Path) -> list[str]:
    """Identities of ``A,B``; an existing folder with a comma in its name is one."""
    if (directory / Path(names).expanduser()).is_dir():
        return [_identity(names, directory)]
    return [_identity(part.strip(), directory) for part in names.split(",") if part.strip()]


def _identity(name: str, directory: Path) -> str:
    """A folder's real path; a hub id as it is. A path that is gone is told from a hub id by its form."""
    path = directory / Path(name).expanduser()
    if path.is_dir():
        return str(path.resolve())
    return os.path.abspath(path) if name.startswith(("/", ".", "~")) or name.count("/") > 1 else name


def _lies_here(identity: str) -> bool:
    """Whether a model is a folder of this disk; a hub id is none, whatever the current folder holds."""
    return Path(identity).is_absolute() and Path(identity).is_dir()


def _short(identity: str) -> str:
    return identity.rstrip("/").split("/")[-1]


def _script(card: dict[str, Any]) -> str:
    """Which script trained: --beta is a flag of train_dpo.py alone."""
    return "train_dpo.py" if "beta" in card["arguments"] else "train_pretrain.py"


def _settings(chain: list[_Stage]) -> dict[str, Any]:
    """What decides the numbers of a training, and where it began if that is not the root."""
    newest = chain[0]
    if newest.card is None:
        # Of a delta that was made elsewhere its name is all that tells it from the model below it.
        return {"delta": _short(newest.identity)} if len(chain) > 1 else {}
    arguments = newest.card["arguments"]
    unused = {*NOT_DECIDING, *_idle(arguments)}
    settings = {"script": _script(newest.card)}
    if len(chain) > 2:
        settings["start"] = _short(chain[1].identity)
    if newest.checkpoint:
        settings["checkpoint"] = newest.checkpoint
    return settings | {name: value for name, value in arguments.items() if name not in unused}


def _idle(arguments: dict[str, Any]) -> list[str]:
    """Arguments without an effect beside the others."""
    idle = [] if arguments.get("load_best_model_at_end") else [*MEASURING]
    tuned = str(arguments.get("tune") or "").replace(" ", "").split(",")
    if not (arguments.get("lora_enable") or "lora" in tuned or arguments.get("train_type") == "use_lora"):
        idle += ["lora_r", "lora_alpha", "lora_dropout"]
    if arguments.get("bits") != 4:
        idle += ["double_quant", "quant_type"]
    if not arguments.get("aux_data"):
        idle += ["aux_weight"]
    return idle


def _tell_trained_again(stage: _Stage, training: dict[str, Any], asked: _Asked) -> None:
    trained, answered = str(training.get("started", "")), str(asked.card.get("started", ""))
    if trained and answered and trained > answered:
        warn(
            f"{asked.folder}: asked at {answered}, before the training of {stage.folder} was started (again) at "
            f"{trained}; if that changed the model, ask again with pope_eval.py"
        )
