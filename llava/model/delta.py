"""Deltas: a run on a frozen backbone keeps what it changed, and ``delta.json`` says what it stands on.

    whole model (or language model) <- delta <- delta ...

Such a row of folders is a chain. What a delta stands on is known by content: SHA-256 of the root's weight files, and
for every delta above it SHA-256 of what is below it and of its own weight files. So a base may be moved and called what
it likes, but not be changed.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llava.errors import UserError, note, warn
from llava.files import field, read_object
from llava.model.adapter import load_adapter
from llava.model.builder import (
    check_config,
    check_weights,
    local_folder,
    model_settings,
    read_config,
    settle_head,
    skeleton,
    tower_shape,
    whole_parameters,
    with_tower,
)
from llava.model.checkpoint import (
    ADAPTER_WEIGHTS,
    CONNECTOR,
    DELTA,
    NON_LORA,
    content_hash,
    first_of,
    has_tower,
    has_weights,
    read_adapter,
    read_connector,
    read_model_weights,
    read_tensors,
    read_tower_weights,
    tensor_names,
    weight_files,
)
from llava.model.dialects import (
    EMBEDDINGS,
    HEAD,
    POST_BLOCK,
    PROJECTOR,
    TOWER,
    State,
    lora_name,
    runtime_name,
    runtime_names,
)
from llava.model.huggingface import LANGUAGE_MODELS, cut_rows, is_huggingface

DELTA_CARD = "delta.json"
FORMAT = 1


def saves_delta(parts: set[str]) -> bool:
    """Whether a run that trains ``parts`` keeps only what it changed."""
    return "lora" in parts or not parts & {"backbone", "vision_tower"}


@dataclass(frozen=True)
class Standing:
    """What a model that trains stands on: an attribute (``stands_on``) of the model, for whoever saves it."""

    brought: frozenset[str]  # tensors that no folder below holds: kept whether they train or not
    card: dict[str, Any] | None  # delta.json but for the parts; None where nothing, or a whole model, is written


@dataclass(frozen=True)
class Stage:
    """One folder of a chain."""

    folder: Path
    name: str  # as it is recorded: an absolute path or a hub id
    kind: str  # "model", or of a delta "lora", "connector", "mixture"
    card: dict[str, Any] | None  # delta.json; upstream's deltas have none
    on: int  # the number of stages, from the root, that it was trained on

    @property
    def base(self) -> dict[str, str]:
        """Path and content hash of what a delta was trained on (of the last of several, which covers them all)."""
        return self.card["base"][-1]

    def files(self) -> list[Path]:
        """The weight files, in a fixed order."""
        if self.kind == "model":
            return weight_files(self.folder)
        names = {"lora": (ADAPTER_WEIGHTS, NON_LORA), "connector": (CONNECTOR,), "mixture": ((DELTA,),)}[self.kind]
        return [file for alternatives in names if (file := first_of(self.folder, alternatives))]

    def parts(self) -> set[str]:
        """Parts of the model that a delta brings; a LoRA on the vision tower is of both."""
        if self.card is not None:
            return set(self.card["parts"])
        names = [name for file in self.files() for name in tensor_names(file)]
        return {"lora" for name in names if "lora_" in name} | {
            _part(name) for name in names if "lora_" not in name or name.startswith(TOWER)
        }

    def tensors(self) -> State:
        """A delta's tensors by their names in the program, without those of a LoRA."""
        if self.kind == "connector":
            return read_connector(self.files()[0])
        if self.kind == "mixture":
            return runtime_names(read_tensors(self.files()[0]))
        return read_adapter(self.folder)[1]


def _part(name: str) -> str:
    """The part that a whole tensor of a model belongs to."""
    marks = {PROJECTOR: "projector", POST_BLOCK: "post_block", HEAD: "lm_head", TOWER: "vision_tower"}
    return next((part for mark, part in marks.items() if name.startswith(mark)), "backbone")


@dataclass
class Chain:
    """A whole model and the deltas over it, the newest last."""

    stages: tuple[Stage, ...]
    flag: str
    cache_dir: str | None = None
    entries: tuple[tuple[str, int], ...] = ()  # what the user named, and the number of stages up to there
    tower: Path | None = None  # the tower's folder where it is outside; set by ``configured``
    connector: Path | None = None  # a connector from elsewhere that goes over all of this

    @property
    def folders(self) -> list[Path]:
        """Newest first, the root last."""
        return [stage.folder for stage in reversed(self.stages)]

    @property
    def root_folder(self) -> Path:
        return self.stages[0].folder

    @property
    def newest(self) -> Path:
        return self.stages[-1].folder

    @property
    def source(self) -> Path:
        """The folder that stands for the model as a whole: its generation settings, its name."""
        return self.folder_with("generation_config.json")

    @property
    def blank(self) -> bool:
        """Whether this is no LLaVA yet but a language model."""
        return self._raw_config().get("model_type") in LANGUAGE_MODELS

    @property
    def adapter(self) -> Path | None:
        """The folder of a LoRA that nothing lies over."""
        return self.newest if self.stages[-1].kind == "lora" else None

    @property
    def adapts_head(self) -> bool:
        """Whether that LoRA is on the head or the embeddings."""
        file = first_of(self.adapter, ADAPTER_WEIGHTS) if self.adapter else None
        modules = tuple(name.removesuffix("weight") + "lora_" for name in (HEAD, EMBEDDINGS))
        return file is not None and any(name.startswith(modules) for name in tensor_names(file))

    def file_of(self, name: str) -> Path:
        """The weight file that brings ``name``, else the root's folder."""
        files = [self.connector] if self.connector else []
        files += [file for stage in reversed(self.stages) for file in stage.files()]
        other = self.tower if self.tower and name.startswith(TOWER) else self.root_folder
        return next((file for file in files if name in tensor_names(file)), other)

    @property
    def changed(self) -> set[str]:
        """Parts that differ from the root's."""
        return set().union({"projector"} if self.connector else (), *(stage.parts() for stage in self.stages[1:]))

    @functools.cached_property
    def hashes(self) -> list[str]:
        """What the first stage, the first two, ... are by content; reading it reads the files."""
        hashes = [content_hash(self.stages[0].files())]
        for stage in self.stages[1:]:
            hashes.append(hashlib.sha256((hashes[-1] + content_hash(stage.files())).encode()).hexdigest())
        return hashes

    def folder_with(self, name: str) -> Path:
        """The newest folder that holds a file ``name``, else the root's."""
        return next((folder for folder in self.folders if (folder / name).is_file()), self.root_folder)

    def root(self) -> Chain:
        """The root without any delta."""
        return Chain(self.stages[:1], self.flag, self.cache_dir, tower=self.tower)

    def below(self) -> Chain:
        """This chain without the newest delta."""
        return self._up_to(len(self.stages) - 2)

    @property
    def name(self) -> str:
        """What leads to this chain as ``--model-path``: the newest deltas, down to one whose base can be found."""
        last = len(self.stages) - 1
        while last and (self.stages[last].card is None or self.stages[last].on != last):
            last -= 1
        return ",".join(stage.name for stage in self.stages[last:])

    def files(self, without: AbstractSet[str] = frozenset()) -> list[Path]:
        """The weight files that decide the model's numbers, but for deltas that bring only parts ``without``."""
        files = self.stages[0].files() + (weight_files(self.tower) if self.tower else [])
        files += [file for stage in self.stages[1:] if stage.parts() - without for file in stage.files()]
        return files + ([self.connector] if self.connector and "projector" not in without else [])

    def _raw_config(self) -> dict[str, Any]:
        return read_config(self._config_folder, self.flag)

    @property
    def _config_folder(self) -> Path:
        """The newest folder with a ``config.json`` in the original format (what PEFT saves has none), else the root."""
        for folder in self.folders[:-1]:
            file = folder / "config.json"
            if file.is_file() and not is_huggingface(read_object(file)):
                return folder
        return self.root_folder

    def config(self) -> dict[str, Any]:
        """The newest ``config.json``, with what deltas below it brought beside their weights.

        Raises:
            UserError: it is not a LLaVA's, or another kind of LLaVA's.
        """
        newest, root = self._config_folder, self.root_folder
        config = check_config(self._raw_config(), newest, self.flag)
        if newest == root:
            _tell_aspect(config, root)
        elif config.get("mm_vision_config") is None and has_tower(root):
            # LLaVA's adapters name a tower and know nothing of one that their base brings.
            config["mm_vision_config"] = read_config(root, self.flag).get("mm_vision_config")
        for folder in self.folders[self.folders.index(newest) + 1 :]:
            below = read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
            if config.get("post_block") is None and below.get("post_block"):
                config["post_block"] = below["post_block"]
            if below.get("tie_word_embeddings") is False:
                config["tie_word_embeddings"] = False
        return config

    def configured(self) -> tuple[dict[str, Any], Path | None]:
        """``config()`` with the tower's shape, and the tower's folder where it is needed.

        Raises:
            UserError: no tower, or another one than a delta was trained with.
        """
        config = self.config()
        recorded = next((s.card["tower"] for s in reversed(self.stages) if s.card and "tower" in s.card), None)
        named = config.get("mm_vision_tower")
        if recorded and Path(recorded["path"]).is_dir():
            config["mm_vision_tower"] = recorded["path"]
        config, self.tower = with_tower(config, *self.folders, cache_dir=self.cache_dir)
        config["mm_vision_tower"] = named
        if recorded and self.tower:
            found = content_hash(weight_files(self.tower))
            if found != recorded["sha256"]:
                raise UserError(
                    f"{self.newest}: trained with the vision tower {recorded['path']} (sha256 {recorded['sha256']}), "
                    f"but {self.tower} is another one (sha256 {found}); put the old one back there"
                )
        return config, self.tower

    def state(self, adapter: bool = True, root: State | None = None) -> State:
        """All weights, but for those of a tower outside, in their dtypes on disk; LoRA weights are folded in.

        ``adapter`` False leaves out a LoRA on top; ``root`` are the root's weights where they are read already.
        """
        state = self._root_state() if root is None else root
        for number, stage in enumerate(self.stages[1:], 1):
            self._tell_replaced(number)
            new = stage.tensors()
            if self._huggingface_root:  # plain PEFT saves these with the rows of its padded base
                new = cut_rows(new, self.config()["vocab_size"])
            _check_rows(new, state, stage.folder)
            if self.tower and "vision_tower" in stage.parts() and not has_tower(self.root_folder):
                state = {**read_tower_weights(self.tower), **state}  # a delta holds only what trained of it
            state = lay_over(state, new)
            if stage.kind == "lora" and (adapter or stage is not self.stages[-1]):
                state = self._up_to(number)._folded(state)
        return state

    def _root_state(self) -> State:
        """The whole model's own weights.

        Raises:
            UserError: their names are those of no format that is known.
        """
        state = read_model_weights(self.root_folder)
        if EMBEDDINGS not in state:
            raise UserError(
                f"{self.root_folder}: the names of the weights are of no known format (first: {next(iter(state), '')});"
                f" expected LLaVA's ({EMBEDDINGS}) or Hugging Face's (language_model.{EMBEDDINGS})"
            )
        if self._huggingface_root:
            state = cut_rows(state, read_config(self.root_folder, self.flag)["vocab_size"])
        return state

    @property
    def _huggingface_root(self) -> bool:
        file = self.root_folder / "config.json"
        return file.is_file() and is_huggingface(read_object(file))

    def _up_to(self, number: int) -> Chain:
        return Chain(self.stages[: number + 1], self.flag, self.cache_dir, tower=self.tower)

    def _tell_replaced(self, number: int) -> None:
        """Siblings that bring the same part: it is said what becomes of it."""
        stage = self.stages[number]
        for other in self.stages[stage.on : number]:
            same = stage.parts() & other.parts()
            if "lora" in same:
                note(f"{stage.folder} and {other.folder} both bring a LoRA; both are added")
            if same - {"lora"}:
                what = ", ".join(sorted(same - {"lora"}))
                note(f"{stage.folder} and {other.folder} both bring {what}; that of {stage.folder} is used")

    def _folded(self, state: State) -> State:
        """``state`` with the LoRA on top merged into it: in float32, and rounded to each weight's own dtype.

        One weight at a time: a whole model in float32 would take twice the memory of its files.
        """
        from peft.tuners.lora import LoraLayer

        lora, _ = read_adapter(self.newest)
        config = self.config() if self.tower else self.configured()[0]
        config = {**({"mm_vision_config": tower_shape(self.tower)} if self.tower else {}), **config}
        # A LoRA on a tied head or on its embeddings is on one of them alone.
        if HEAD not in state and model_settings(config).tie_word_embeddings:
            state = {**state, HEAD: state[EMBEDDINGS]}
        model = skeleton({**config, "tie_word_embeddings": False})
        check_weights(model, state, self.file_of)
        with whole_parameters():
            model = load_adapter(model, self.newest)  # checks names and shapes
            for path, layer in model.named_modules():
                if not isinstance(layer, LoraLayer):
                    continue
                layer.to_empty(device="cpu")
                for name, parameter in layer.named_parameters():
                    if "lora_" in name:
                        parameter.data = lora[lora_name(f"{path}.{name}")].float()
                name = f"{runtime_name(path)}.weight"
                weight = layer.base_layer.weight
                weight.data = state[name].to(torch.float32, copy=True)  # head and embeddings may share their memory
                layer.merge()
                state = {**state, name: weight.data.to(state[name].dtype)}
                layer.to("meta")
        return settle_head(config, state)[1]

    def card(self) -> dict[str, Any]:
        """``delta.json`` of a run on this chain, but for its parts."""
        card: dict[str, Any] = {
            "format": FORMAT,
            "base": [{"path": name, "sha256": self.hashes[count - 1]} for name, count in self.entries],
        }
        if self.tower is not None and not has_tower(self.root_folder):
            card["tower"] = {"path": os.path.abspath(self.tower), "sha256": content_hash(weight_files(self.tower))}
        return card


def _check_rows(new: State, state: State, folder: Path) -> None:
    """A whole head or embeddings in a delta must be of the vocabulary below, or of a longer one as its tokens say."""
    for key in {EMBEDDINGS, HEAD} & new.keys() & state.keys():
        if new[key].shape[1:] != state[key].shape[1:] or len(new[key]) < len(state[key]):
            raise UserError(
                f"{folder}: {key} has shape {tuple(new[key].shape)}, but the model below has "
                f"{tuple(state[key].shape)}; it was trained on another model"
            )


@functools.cache
def _say_once(message: str) -> None:
    note(message)


def _tell_aspect(config: dict[str, Any], folder: Path) -> None:
    """Fill in how pictures are prepared where a folder in Hugging Face's format leaves it open."""
    if config.get("image_aspect_ratio") or not is_huggingface(read_object(folder / "config.json")):
        return
    config["image_aspect_ratio"] = "pad" if config["model_type"] == "llava_llama" else "square"
    if config["image_aspect_ratio"] == "pad":
        _say_once(
            f"{folder}: pictures are padded to squares, as LLaVA-1.5 was trained; its own image processor would crop "
            "them"
        )


def lay_over(state: State, new: State) -> State:
    """``state`` with the tensors ``new`` in it; a connector or a block is replaced whole: it may be of another type."""
    for prefix in (PROJECTOR, POST_BLOCK):
        if any(key.startswith(prefix) for key in new):
            state = {key: value for key, value in state.items() if not key.startswith(prefix)}
    return {**state, **new}


def read_chain(name: str, flag: str, cache_dir: str | None = None, base: str | None = None) -> Chain:
    """What ``name`` stands for: a whole model, a delta (what it stands on is found), or several of them, ``A,B``.

    The first of several is a whole model or a delta, those behind it are deltas: each was trained on all that is before
    it, or on a beginning of that (two deltas of one base). ``base`` (``--model-base``) is used in the place of what a
    ``delta.json`` names.

    Raises:
        UserError: a folder is missing, or a base has another content than the delta was trained on.
    """
    given = read_chain(base, "--model-base", cache_dir) if base else None
    reader = _Reader(flag, cache_dir, given)
    chain: Chain | None = None
    entries = []
    for part in split_names(name):
        chain = reader.put(chain, part, local_folder(part, flag, cache_dir=cache_dir))
        entries.append((_recorded_name(part), len(chain.stages)))
    assert chain is not None
    chain.entries = tuple(entries)
    if given is not None and not reader.used:
        if entries[0][1] > 1:
            raise _not_the_base(given, chain.stages[1])
        warn(f"--model-base {base} is not used: {split_names(name)[0]} is a whole model")
    return chain


def with_adapter(chain: Chain, name: str, flag: str) -> Chain:
    """``chain`` with the LoRA in the folder ``name`` on top, which was trained on the whole of it.

    Raises:
        UserError: it was trained on something else, or changes the vision tower.
    """
    folder = local_folder(name, flag, cache_dir=chain.cache_dir)
    stage = Stage(folder, _recorded_name(name), "lora", _read_card(folder), len(chain.stages))
    if stage.card is not None and stage.base["sha256"] != chain.hashes[-1]:
        raise UserError(
            f"{flag} {name} was trained on {stage.base['path']} with sha256 {stage.base['sha256']}, but the run starts "
            f"from {chain.newest} with sha256 {chain.hashes[-1]}; pass the one it was trained on"
        )
    moved = [name for tensors in read_adapter(folder) for name in tensors if name.startswith(TOWER)]
    if moved:
        raise UserError(
            f"{flag} {name} changes the vision tower (first: {moved[0]}), which does not go on training; make a whole "
            "model of it first: python -m llava.model.export"
        )
    _tell_other_base(stage, chain)
    return Chain((*chain.stages, stage), flag, chain.cache_dir)


def _tell_other_base(stage: Stage, below: Chain) -> None:
    """A LoRA of other programs says what it was trained on by name alone, which may since be another."""
    if stage.kind != "lora" or stage.card is not None:
        return
    said = read_object(stage.folder / "adapter_config.json").get("base_model_name_or_path")
    names = {Path(name).name for other in below.stages for name in (other.name, other.folder)}
    if isinstance(said, str) and said and Path(said).name not in names:
        _say_once(f"{stage.folder} was trained on {said} (its adapter_config.json), and is put on {below.newest}")


def split_names(name: str) -> list[str]:
    """``A,B`` -> A and B; an existing folder with a comma in its name is one."""
    if Path(name).expanduser().is_dir():
        return [name]
    return [part.strip() for part in name.split(",") if part.strip()] or [name]


def _recorded_name(name: str) -> str:
    folder = Path(name).expanduser()
    return os.path.abspath(folder) if folder.is_dir() else name


class _Reader:
    """Puts folders on chains; ``given`` (--model-base) is preferred where its content is what is looked for."""

    def __init__(self, flag: str, cache_dir: str | None, given: Chain | None) -> None:
        self.flag, self.cache_dir, self.given = flag, cache_dir, given
        self.used = False

    def put(self, chain: Chain | None, name: str, folder: Path, above: Sequence[Path] = ()) -> Chain:
        """``chain`` with ``folder``, called ``name``, on top; ``above`` are the deltas that led here."""
        if folder.resolve() in above:
            raise UserError(f"{folder / DELTA_CARD}: the delta stands on itself; mend the paths in it")
        stage = Stage(folder, _recorded_name(name), _kind(folder), _read_card(folder), 0)
        if stage.kind == "model":
            if stage.card is not None and not has_weights(folder):
                raise UserError(f"{folder}: {DELTA_CARD} without its weights; copy the whole folder again")
            if chain is not None:
                raise UserError(
                    f"{self.flag}: {name} is a whole model, but {chain.newest} comes before it; only the first of "
                    "several may be one"
                )
            return Chain((stage,), self.flag, self.cache_dir)
        below = chain or self._base(stage, name, (*above, folder.resolve()))
        stage = replace(stage, on=_stands_on(below, stage, self.flag))
        _tell_other_base(stage, below)
        return Chain((*below.stages, stage), self.flag, self.cache_dir)

    def _base(self, stage: Stage, name: str, above: Sequence[Path]) -> Chain:
        """What the delta ``stage``, called ``name``, was trained on."""
        mend = "--model-base" if self.flag == "--model-path" else f"{self.flag} BASE,{name}"
        if stage.card is None:
            if self.given is None:
                what = "a LoRA adapter" if stage.kind == "lora" else "only a connector"
                raise UserError(f"{self.flag} {name} holds {what}; pass the model it was trained on as {mend}")
            self.used = True
            return self.given
        if self.given is not None and self.given.hashes[-1] == stage.base["sha256"]:
            self.used = True
            return self.given  # all of what is listed
        chain: Chain | None = None
        for entry in stage.card["base"]:
            path = entry["path"]
            if chain is None and self.given is not None and self.given.hashes[-1] == entry["sha256"]:
                chain, self.used = self.given, True
                continue
            try:
                folder = local_folder(path, self.flag, cache_dir=self.cache_dir)
            except UserError:
                if self.given is not None:
                    raise _not_the_base(self.given, stage) from None
                raise UserError(
                    f"{stage.folder} was trained on {path}, which is not there; pass where it is now as {mend}"
                ) from None
            chain = self.put(chain, path, folder, above)
            if chain.hashes[-1] != entry["sha256"]:
                if self.given is not None:
                    raise _not_the_base(self.given, stage)
                raise UserError(
                    f"{stage.folder} was trained on {path} with sha256 {entry['sha256']}, but what is in {folder} now "
                    f"has sha256 {chain.hashes[-1]}; pass the model it was trained on as {mend}"
                )
        assert chain is not None
        return chain


def _not_the_base(given: Chain, stage: Stage) -> UserError:
    return UserError(
        f"--model-base {given.newest} has sha256 {given.hashes[-1]}, but {stage.folder} was trained on "
        f"{stage.base['path']} with sha256 {stage.base['sha256']}; pass that one"
    )


def _stands_on(below: Chain, stage: Stage, flag: str) -> int:
    """How many of the stages ``below`` a delta was trained on.

    Raises:
        UserError: they never were what it was trained on.
    """
    if stage.card is None:
        return len(below.stages)
    if stage.base["sha256"] not in below.hashes:
        raise UserError(
            f"{flag}: {stage.folder} was trained on {stage.base['path']} with sha256 {stage.base['sha256']}, but "
            f"{below.newest} before it has sha256 {below.hashes[-1]}; put the model it was trained on before it"
        )
    return below.hashes.index(stage.base["sha256"]) + 1


def _kind(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "lora"
    if (folder / DELTA).is_file():
        return "mixture"
    return "connector" if not has_weights(folder) and first_of(folder, CONNECTOR) else "model"


def _read_card(folder: Path) -> dict[str, Any] | None:
    """``delta.json``, checked; None where there is none.

    Raises:
        UserError: another format, or something is missing in it.
    """
    file = folder / DELTA_CARD
    if not file.is_file():
        return None
    card = read_object(file)
    if card.get("format") != FORMAT:
        raise UserError(f"{file}: format {card.get('format')!r}; expected {FORMAT}: it was written by another version")
    field(str(file), card, "parts", list)
    entries = field(str(file), card, "base", list)
    if not entries:
        raise UserError(f"{file}: key 'base' is empty; expected what the delta stands on")
    for entry in [*entries, *([card["tower"]] if "tower" in card else [])]:
        for key in ("path", "sha256"):
            field(str(file), entry, key, str)
    return card
